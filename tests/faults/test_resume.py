"""Rows 2 and 3: a run that is killed and resumed ends bit for bit like one that was not, and skips or repeats no token.

Blocks last 8 steps, so that kills fall into half-used pools, and 110 blocks are read through after about 13 steps, so
that the run crosses into a second epoch. A held-out evaluation every 6 steps and the weight average are in it too.
"""

import random
import time
from functools import partial
from pathlib import Path

import pytest
from rigs.children import Child, at_step, die, ranks, sae_train
from rigs.fakes import tiny_config, tiny_text_folder
from rigs.runs import assert_equal, lines

from sae.base.settings import to_yaml

STEPS = 20
CHANGES = {
    "tokens": STEPS * 512,
    "batch_tokens": 512,
    "dead_after_tokens": 1024,
    "optim.ema": 0.9,
    "eval.tokens": 64,
    "eval.every_steps": 6,
    "checkpoints.every_steps": 3,
    "grid": {"coder.selection.k": [2, 4]},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text_folder(tmp_path_factory.mktemp("text"), documents=12, words=100)


class Runs:
    """Runs of one config below a folder."""

    def __init__(self, folder: Path, model: Path, text: Path, changes: dict | None = None, n_ranks: int = 1) -> None:
        self.folder, self.n_ranks = folder, n_ranks
        self.config = folder / "config.yaml"
        self.config.write_text(to_yaml(tiny_config(model, text, {**CHANGES, **(changes or {})})), encoding="utf-8")

    def start(self, name: str, *, resume: bool = False, first=None) -> list[Child]:
        """Starts or resumes run `name` on all ranks."""
        run = str(self.folder / name)
        argv = ["--resume", run] if resume else ["--config", str(self.config), "--run-dir", run]
        environments = ranks(self.n_ranks) if self.n_ranks > 1 else [{}]
        log = self.folder / "logs"
        return [
            Child(log / f"{name}-{rank}.txt", partial(sae_train, argv, first), environment)
            for rank, environment in enumerate(environments)
        ]

    def run(self, name: str, **how) -> list[int]:
        """Runs or resumes run `name` on all ranks and returns their exit codes."""
        children = self.start(name, **how)
        codes = [child.wait() for child in children]
        self.output = "\n".join(child.output for child in children)
        return codes

    def killed(self, name: str, steps: list[int]) -> None:
        """Starts run `name`, kills it at each of the steps and resumes it in between and to the end."""
        for number, step in enumerate(steps):
            assert self.run(name, resume=number > 0, first=partial(at_step, step, die)) == [-9] * self.n_ranks
        assert self.run(name, resume=True) == [0] * self.n_ranks, self.output


@pytest.mark.slow
@pytest.mark.parametrize("source", ["live", "disk", "write_through"])
def test_killed_twice_and_resumed_equals_uninterrupted(tmp_path, tiny_model, text, source):
    runs = Runs(tmp_path, tiny_model, text, {"activations.source": source})
    assert runs.run("whole") == [0], runs.output
    draw = random.Random(source)
    runs.killed("killed", [draw.randrange(1, 12), draw.randrange(12, STEPS)])
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    last = lines(tmp_path / "whole")[-1]
    assert last["step"] == STEPS
    assert last["active_steps.auxk"] > 0


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_equal_uninterrupted_and_take_the_tokens_of_one(tmp_path, tiny_model, text):
    runs = Runs(tmp_path, tiny_model, text, n_ranks=2)
    assert runs.run("whole") == [0, 0], runs.output
    runs.killed("killed", [10])
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    runs.n_ranks = 1
    assert runs.run("alone") == [0], runs.output
    for one, two in zip(lines(tmp_path / "alone"), lines(tmp_path / "whole"), strict=True):
        if "fvu" in one:
            assert two["tokens"] == one["tokens"]
            assert two["fvu"] == pytest.approx(one["fvu"], rel=1e-4)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path, tiny_model, text):
    runs = Runs(tmp_path, tiny_model, text, {"activations.source": "write_through"})
    assert runs.run("whole") == [0], runs.output
    draw, code, kills = random.Random(1), -9, 0
    while code == -9 and kills < 5:
        begun = (tmp_path / "killed" / "config.yaml").exists()
        child = runs.start("killed", resume=begun)[0]
        child.wait_for((tmp_path / "killed" / "config.yaml").exists)
        time.sleep(draw.uniform(0.0, 0.4))
        child.kill()
        code, kills = child.wait(), kills + 1
    assert runs.run("killed", resume=True) == [0], runs.output
    assert_equal(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_starts_over(tmp_path, tiny_model, text):
    runs = Runs(tmp_path, tiny_model, text)
    assert runs.run("whole") == [0], runs.output
    runs.killed("killed", [1, 0])
    assert_equal(tmp_path / "killed", tmp_path / "whole")
