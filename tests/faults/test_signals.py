"""Row 6: a signal ends a run cleanly, whatever it is doing, and the run can be resumed as if nothing had happened."""

import os
import shutil
import signal
import time
from functools import partial

import pytest
from rigs.children import Child, at_step, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.losses import PHASES as PHASES_OF_RANKS
from rigs.losses import Draw, Losses
from rigs.runs import assert_equal, checkpoints

import sae.stream.sources
import sae.text.tokenizing
import sae.training.loop
import sae.training.preparing
import sae.training.trainer
from sae.base.files import cache_dir
from sae.base.settings import to_yaml

CHANGES = {"activations.source": "disk", "eval.every_steps": 8}
PHASES = {
    "preparing tokens": (sae.text.tokenizing, "documents", 1, []),
    "storing activations": (sae.stream.sources.LiveSource, "read", 50, []),
    "measuring": (sae.training.preparing, "sample_activations", 1, []),
    "a step": (sae.training.trainer.CoderTrainer, "step", 8, [5, 8]),
    "an evaluation on the way": (sae.training.loop, "evaluate_all", 1, [5, 8]),
    "the last evaluation": (sae.training.loop, "evaluate_all", 3, [15, 20]),
}
"""What a run can be doing: a function that is called then (where, name, which call), and the checkpoints it leaves."""
LONG_PHASES = [phase for phase in PHASES_OF_RANKS if phase != "the last evaluation"]
"""Of ranks. Their last evaluation is over before rank 0 is let go: there is nothing left to stop."""


def interrupt(monkeypatch, where: object, name: str, call: int, number: int) -> None:
    """Sends this process a signal as soon as a function is called for the given time."""
    original, calls = getattr(where, name), []

    def hit(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, hit)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed; filled by the first test that needs it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *(pytest.param(p, signal.SIGTERM, marks=pytest.mark.slow) for p in PHASES),
        pytest.param("a step", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("a step", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_one_checkpoint_exit_75_and_a_resume_as_if_nothing_had_happened(
    tmp_path, monkeypatch, tiny_train, whole, phase, number
):
    if not whole.exists():
        assert tiny_train(CHANGES, folder=whole)[0] == 0
        shutil.rmtree(cache_dir())
    before = signal.getsignal(number)
    *place, kept = PHASES[phase]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, *place, number)
        code, printed = tiny_train(CHANGES, folder=run)
    assert code == 75
    assert printed.splitlines()[-1].startswith("stopped ")
    assert f"continue with --resume {run}" in printed
    assert checkpoints(run) == kept
    assert signal.getsignal(number) == before
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert_equal(run, whole)


def slow_step() -> None:
    """A step that takes for ever, as seen by someone who has pressed Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
    print("first signal taken", flush=True)
    while True:
        time.sleep(3600)


@pytest.fixture
def config(tmp_path, tiny_model, tiny_text):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text)), encoding="utf-8")
    return path


def test_the_second_signal_ends_it_at_once_and_what_was_saved_is_kept(tmp_path, config, tiny_train):
    run = tmp_path / "run"
    argv = ["--config", str(config), "--run-dir", str(run)]
    child = Child(tmp_path / "log.txt", partial(sae_train, argv, partial(at_step, 7, slow_step)))
    child.wait_for(lambda: "first signal taken" in child.output and checkpoints(run) == [5])
    child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM  # in the middle of that step
    assert checkpoints(run) == [5]
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed


def stop_me(rank: str, step: int) -> None:
    if os.environ["RANK"] == rank:
        at_step(step, partial(signal.raise_signal, signal.SIGUSR1))


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, config, rank):
    run = tmp_path / "run"
    argv = ["--config", str(config), "--run-dir", str(run)]
    work = partial(sae_train, argv, partial(stop_me, rank, 6))
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [75, 75], [child.output for child in children]
    assert checkpoints(run) == [5, 7]
    assert all("stopped at step 7 of 20" in child.output for child in children)


def stop_while_measuring() -> None:
    if os.environ["RANK"] == "0":  # which measures for all
        original = sae.training.preparing.sample_activations

        def sample(*args):
            signal.raise_signal(signal.SIGTERM)
            return original(*args)

        sae.training.preparing.sample_activations = sample


@pytest.mark.slow
def test_a_signal_to_one_rank_while_measuring_stops_all(tmp_path, config):
    argv = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    work = partial(sae_train, argv, stop_while_measuring)
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [75, 75], [child.output for child in children]


@pytest.fixture(scope="module")
def several(tmp_path_factory, tiny_model, tiny_text):
    return Losses(tmp_path_factory.mktemp("several"), tiny_model, tiny_text)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [(phase, number % 2) for number, phase in enumerate(LONG_PHASES)])
def test_a_signal_to_one_rank_in_any_phase_stops_all_and_the_run_goes_on(several, phase, rank):
    output = several.stop(Draw(2, rank, phase, signal.SIGTERM))
    who = "got SIGTERM: all stop as soon as can be" if rank else "SIGTERM: stopping as soon as can be"
    assert who in output[0] or phase == "training"  # where the stop may be agreed on before it is told
    assert len({text.splitlines()[-1] for text in output}) <= 2, output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_while_rank_0_tokenizes_stops_all_and_the_run_goes_on(several, rank):
    several.stop(Draw(2, rank, "tokenizing", signal.SIGUSR1))
