"""The kernels for cards, as far as a machine without one can tell: interpreted, and compiled for two kinds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")]


@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_steps.py"])
def test_under_the_interpreter_each_does_what_it_promises(file):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/kernels" / file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_for_a_card_registers_suffice(architecture, tmp_path, monkeypatch):
    """What is spilled to memory costs more than it saves; one that is not compiled at all is no kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that its default will change
    from rigs.compiling import compiled_kernels

    found = compiled_kernels(architecture)
    assert {name for name, _ in found} == {
        *("_maxima", "_chosen", "_counted", "_written", "_decode", "_errors", "_products"),
        *("_beside", "_summed", "_corrected", "_adam", "_normalized"),
    }
    for name, kept in found:
        assert kept.spilled <= 64, (name, kept)  # bytes of a thread
        assert kept.shared <= 48 << 10, (name, kept)
