"""The table of a card: what its script needs no card for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import bench
from gpu.bench import LARGE, LIMIT_S, bytes_of, parsed


def test_all_parts_are_run_in_less_than_eight_minutes_unless_some_are_named(capsys):
    assert LIMIT_S < 8 * 60
    assert parsed([]).then == list(bench.THEN)
    assert parsed(["--then"]).then == []
    with pytest.raises(SystemExit, match="2"):
        parsed(["--then", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_the_bytes_of_the_large_step_are_those_of_its_scores_rows_and_weights():
    scores, rows, weights = (32_768 * 131_072 * 4, 32_768 * 64 * 4096 * 12, 2 * 131_072 * 4096 * 33)
    assert bytes_of(LARGE) == scores + rows + weights + 16 * 32_768 * 4096


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
def test_every_part_is_gone_through_on_a_cpu(tmp_path):
    command = [sys.executable, bench.__file__, "--device", "cpu", "--tiny", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path(tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["parity"]["holds"]
    assert {*bench.FIRST, *bench.THEN} <= {*found}
    assert not [name for part in found.values() if isinstance(part, dict) for name in part if "failed" in name]
