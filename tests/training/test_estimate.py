"""The dry run against what a real run of the embedded model takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHANGES = ["--tokens", "61440", "--eval.tokens", "4096", "--text.max_tokens", "200000", "--run_dir", "run"]
CODE = """
import json, re, sys
from pathlib import Path
from cli.common import read_config
from cli.recipes import recipe
from cli.train import main
from sae.training.config import TrainConfig
from sae.training.estimate import estimate
changes = sys.argv[1:]
found = estimate(read_config(TrainConfig, recipe(), changes))
assert main(changes) == 0
# the peak of this address space; that of getrusage begins with the size of the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"estimated": found.peak_memory, "peak": peak, "disk": found.disk}))
"""


@pytest.mark.slow
def test_memory_and_disk_of_a_real_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *CHANGES], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["peak"] == pytest.approx(found["estimated"], rel=0.3)
    written = sum(p.stat().st_size for p in Path(tmp_path / "run").rglob("*") if p.is_file())
    assert written <= 1.5 * found["disk"]
