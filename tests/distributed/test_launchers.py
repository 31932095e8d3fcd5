"""Started by mpirun, and by `accelerate launch`: one run of two ranks, the very one that two processes by hand make."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rigs.children import PATIENCE_S, Child, free_port, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal

from sae.base.settings import to_yaml

ROOT = Path(__file__).parents[2]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "cli.train"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", str(free_port()), "-m", "cli.train"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [MPIRUN, ACCELERATE], ids=["mpirun", "accelerate"])
def test_two_processes_of_a_launcher_are_one_run(words, tmp_path, tiny_model, tiny_text):
    if not shutil.which(words[0]):
        pytest.skip(f"no {words[0]} here (Debian: openmpi-bin)")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, {"tokens": 20 * 128})), encoding="utf-8")
    argv = [*words, "--config", config, "--run-dir", tmp_path / "launched"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ranks        2 (") == 1, done.stderr
    work = partial(sae_train, ["--config", str(config), "--run-dir", str(tmp_path / "by-hand")])
    started = [Child(tmp_path / f"{i}.log", work, one) for i, one in enumerate(ranks(2))]
    assert [child.wait() for child in started] == [0, 0]
    assert_equal(tmp_path / "launched", tmp_path / "by-hand")
