"""Rows 36 and 37: neither clock, zone, locale, hash seed nor threads change a result; asking touches nothing."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, files, lines

from cli.evaluate import main as sae_eval
from cli.train import main as sae_train
from sae.base.settings import to_yaml
from sae.training.trainer import CoderTrainer

GERMAN = Path("/usr/share/i18n/locales/de_DE").exists() and shutil.which("localedef")
NO_COMMAS = pytest.param(True, marks=pytest.mark.skip(reason="no locale with decimal commas: apt-get install locales"))


def run_python(code: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **changes}, capture_output=True, text=True, timeout=900)


# Row 36


ELSEWHERE = """
import locale, sys, time
import torch
import sae.training.loop
from cli.train import main

sae.training.loop.write_report = lambda run_dir: None
if sys.argv[1]:
    locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
    assert locale.format_string("%.1f", 0.5) == "0,5"
torch.set_num_threads(1)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("commas", [True] if GERMAN else [False, NO_COMMAS])
def test_hash_seed_time_zone_and_decimal_commas_change_nothing(tmp_path, tiny_train, tiny_model, tiny_text, commas):
    assert tiny_train(folder=tmp_path / "here")[0] == 0
    if commas:
        german = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")]
        subprocess.run(german, check=True, capture_output=True)
    config = tmp_path / "elsewhere.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text)), encoding="utf-8")
    done = run_python(
        ELSEWHERE,
        "german" if commas else "",
        *("--config", config, "--run-dir", tmp_path / "there"),
        PYTHONHASHSEED="4711",
        TZ="Pacific/Apia",
        LOCPATH=str(tmp_path),
        SAE_CACHE=str(tmp_path / "other cache"),
    )
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / "there", tmp_path / "here")


def test_a_clock_that_jumps_changes_nothing(tmp_path, tiny_train, monkeypatch):
    assert tiny_train(folder=tmp_path / "steady")[0] == 0
    draw = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: draw.uniform(-1e9, 3e9))
        code, printed = tiny_train(folder=tmp_path / "jumpy")
    assert code == 0, printed
    assert_equal(tmp_path / "jumpy", tmp_path / "steady")


@pytest.mark.slow
def test_the_order_of_tokens_depends_on_no_thread(tmp_path, tiny_train, monkeypatch, request):
    """Values may differ in their last bits with the number of threads, which is where the promise of equal bits ends;
    reading ahead in a thread changes not even those.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    original = CoderTrainer.step
    request.addfinalizer(lambda: torch.set_num_threads(1))
    for name, threads, ahead in (("one", 1, 0), ("ahead", 1, 7), ("two", 2, 7)):
        with monkeypatch.context() as patch:
            batches = seen[name] = []
            patch.setattr(CoderTrainer, "step", lambda s, x, i, b=batches: (b.append(x.x), original(s, x, i))[1])
            torch.set_num_threads(threads)
            changes = {"activations.prefetch_blocks": ahead, "batch_tokens": 512, "tokens": 20 * 512}  # several pools
            code, printed = tiny_train(changes, folder=tmp_path / name)
            assert code == 0, printed
    assert_equal(tmp_path / "ahead", tmp_path / "one")
    assert len(seen["two"]) == 20
    for one, two in zip(seen["one"], seen["two"], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert two["fvu"] == pytest.approx(one["fvu"], rel=1e-3)


# Row 37


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """An empty home and working folder, no network, no GPU, no key."""
    folder = tmp_path / "bare"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in {"HOME": folder, "SAE_CACHE": folder / "cache", "HF_HOME": folder / "hf"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return folder


@pytest.mark.parametrize(
    ("command", "argv", "shown"),
    [
        (sae_train, ["--help"], "--dry-run"),
        (sae_train, ["--help-fields"], "--coder.selection.k"),
        (sae_train, ["--list-configs"], "quickstart"),
        (sae_train, ["--print-config"], "batch_tokens:"),
        (sae_train, ["--dry-run"], "parameters "),
        (sae_train, ["--dry-run", "--coder.selection.k", "8", "--activations.source", "disk"], "memory "),
        (sae_eval, ["--help"], "--nulls"),
    ],
)
def test_asking_works_anywhere_and_touches_nothing(bare, capsys, command, argv, shown):
    try:
        code = command(argv)
    except SystemExit as end:  # argparse ends --help so
        code = end.code
    assert code == 0, capsys.readouterr().err
    assert shown in capsys.readouterr().out
    assert files(bare) == set()
    assert list(bare.iterdir()) == []
