"""Rows 8 and 19: NaN and infinity stop or skip a step and are named; extremes of any kind stay finite."""

import json
import math
import os
import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child, ranks, sae_train
from rigs.fakes import measured, tiny_config, tiny_model_folder
from rigs.runs import assert_equal, checkpoints, error_of, lines

import sae.training.loop
import sae.training.preparing
from sae.base.files import load_tensors
from sae.base.settings import to_yaml
from sae.lm.models import load_language_model
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.stream.lanes import Stream
from sae.training.beginning import new_coder
from sae.training.optim import OptimConfig
from sae.training.reporting.report import write_report
from sae.training.step import NonFiniteError
from sae.training.trainer import CoderTrainer, Schedule

# Row 8


def poison(monkeypatch, *batches: int) -> None:
    """Puts NaN into one token of some batches, counted from 1."""
    original, count = Stream.__next__, []

    def drawn(self):
        batch = original(self)
        count.append(None)
        if len(count) in batches:
            next(iter(batch.activations.values()))[3] = torch.nan
        return batch

    monkeypatch.setattr(Stream, "__next__", drawn)


def test_nan_in_activations_stops_the_run_names_the_batch_and_keeps_it(tmp_path, monkeypatch, tiny_train):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 8)
        code, printed = tiny_train(folder=run)
    assert code == 1
    dump = run / "bad-batch-step-8-rank-0.safetensors"
    kept = load_tensors(dump)
    block = int(kept["blocks"][3])
    assert error_of(printed) == (
        "step 8, coder model.layers.1: NaN or Inf in what was streamed, at 1 of 128 tokens; the step was not applied, "
        f"its batch (blocks {block}) is in {dump} (max_bad_steps: 0)"
    )
    assert kept["model.layers.1"][3].isnan().all()
    assert kept["model.layers.1"].isfinite().all(1).sum() == 127
    assert checkpoints(run) == [5]
    code, printed = tiny_train(options=("--resume", run))  # the disturbance was passing
    assert code == 0, printed
    assert tiny_train(folder=tmp_path / "whole")[0] == 0
    assert_equal(run, tmp_path / "whole")


def test_so_many_bad_batches_are_skipped_and_no_more(tmp_path, monkeypatch, tiny_train):
    with monkeypatch.context() as patch:
        poison(patch, 8, 12)
        code, printed = tiny_train({"max_bad_steps": 2}, folder=tmp_path / "skipped")
    assert code == 0, printed
    assert "skipped (2 of 2 allowed)" in printed
    assert [line["step"] for line in lines(tmp_path / "skipped")] == [n for n in range(1, 21) if n not in (8, 12)]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 4)
        signalled = partial(signal.raise_signal, signal.SIGTERM)
        original = CoderTrainer.step
        patch.setattr(CoderTrainer, "step", lambda s, x, i: (signalled() if i == 6 else None, original(s, x, i))[1])
        assert tiny_train({"max_bad_steps": 1}, folder=run)[0] == 75
    with monkeypatch.context() as patch:
        poison(patch, 1)
        code, printed = tiny_train(options=("--resume", run))
    assert code == 1, "the count goes on after a resume"
    assert "step 8" in error_of(printed)


def trainer(x: torch.Tensor, dead_after_tokens: int = 64, d_sae: int = 8, k: int = 2, **terms: object) -> CoderTrainer:
    found = measured(x)
    objectives = {"reconstruction": Reconstruction(), "auxk": AuxK(), **terms}
    config = tiny_config(Path("m"), Path("."), {"coder.d_sae": d_sae, "coder.selection.k": k}).coder
    schedule = Schedule(steps=10, dead_after_tokens=dead_after_tokens)
    return CoderTrainer(new_coder(config, found), objectives, OptimConfig(lr=1e-2), schedule)


def infinite_loss(patch, subject: CoderTrainer) -> None:
    patch.setattr(AuxK, "loss", lambda self, step: step.coder.W_enc.sum() * math.inf)


def infinite_gradient(patch, subject: CoderTrainer) -> None:
    finish = subject.updater.finish

    def overflowing(sink):
        found = finish(sink)
        subject.updater.gradients["b_enc"].fill_(math.inf)
        return found

    patch.setattr(subject.updater, "finish", overflowing)


@pytest.mark.parametrize(
    ("harm", "named"), [(infinite_loss, "loss term auxk is"), (infinite_gradient, "gradient of b_enc is not finite")]
)
def test_a_step_with_a_loss_or_gradient_that_is_not_finite_changes_nothing(monkeypatch, harm, named):
    x = torch.randn(64, 4)
    subject = trainer(x)
    subject.step(x, 0)
    tensors, values = subject.state()
    before = {name: value.clone() for name, value in tensors.items()}, json.dumps(values)
    with monkeypatch.context() as patch:
        harm(patch, subject)
        with pytest.raises(NonFiniteError, match=named):
            subject.step(x, 1).check()
    tensors, values = subject.state()
    assert json.dumps(values) == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in tensors.items())


@pytest.mark.slow
def test_a_coder_that_fails_does_not_hold_up_the_others(tmp_path, monkeypatch, tiny_train):
    original, calls = Reconstruction.loss, Counter[int]()

    def loss(self, step):
        k = step.coder.spec.selection.k
        calls[k] += 1
        return original(self, step) * (math.nan if (k, calls[k]) == (2, 6) else 1)

    changes = {"max_bad_steps": 1, "grid": {"coder.selection.k": [2, 4]}}
    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "loss", loss)
        assert tiny_train(changes, folder=tmp_path / "run")[0] == 0
    assert tiny_train(changes, folder=tmp_path / "whole")[0] == 0
    found, wanted = ([line for line in lines(tmp_path / name) if "k=4" in line["coder"]] for name in ("run", "whole"))
    assert found == wanted


def poison_one_rank(rank: str, *batches: int) -> None:
    if os.environ["RANK"] == rank:
        poison(pytest.MonkeyPatch(), *batches)


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "codes"), [(0, [1, 1]), (1, [0, 0])])
def test_nan_on_one_rank_ends_or_skips_the_step_on_all(tmp_path, tiny_model, tiny_text, allowed, codes):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, {"max_bad_steps": allowed})), encoding="utf-8")
    argv = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    work = partial(sae_train, argv, partial(poison_one_rank, "1", 8))
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == codes, [child.output for child in children]
    for child in children:
        assert "step 8, coder model.layers.1: NaN or Inf in what was streamed, at 1 of 128 tokens" in child.output


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_nan_is_found_before_training(tmp_path, monkeypatch, tiny_train, value):
    def damaged(*args, **kwargs):
        lm = load_language_model(*args, **kwargs)
        lm.model.get_submodule("model.layers.0.mlp.down_proj").weight.data[0, 0] = value
        return lm

    monkeypatch.setattr(sae.training.preparing, "load_language_model", damaged)
    code, printed = tiny_train()
    assert code == 2
    assert re.match(
        r"activations: model\.layers\.1 holds NaN or Inf at 62 of 62 tokens in blocks 0; ", error_of(printed)
    )


# Row 19


def extreme(name: str, n: int = 64) -> torch.Tensor:
    x = torch.randn(n, 4)
    if name == "constant":
        return torch.full((n, 4), 3.7)
    if name == "zero":
        return torch.zeros(n, 4)
    if name == "mostly zero":
        x[: n * 3 // 4] = 0
    if name == "huge":
        return x * 1e15
    return x


@pytest.mark.parametrize("name", ["usual", "constant", "zero", "mostly zero", "huge"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("latents", ["usual", "all dead", "none firing"])
def test_extremes_have_finite_metrics_and_weights(name, batch, latents):
    x = extreme(name)
    subject = trainer(x, dead_after_tokens=1 if latents == "all dead" else 10**9)
    if latents == "none firing":
        subject.coder.b_enc.data.fill_(-1e30)
    if latents == "all dead":
        subject.tokens_since_fired.fill_(10**9)
    for index in range(4):
        metrics = subject.step(x[index : index + batch], index)
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert all(parameter.isfinite().all() for parameter in subject.coder.parameters())


def test_a_batch_that_the_norm_filter_empties_changes_nothing_but_time(tmp_path):
    x = torch.randn(64, 4)
    subject = trainer(x)
    subject.step(x, 0)
    residual = subject.residual_variance
    metrics = subject.step(x[:0], 1)
    assert metrics["tokens"] == metrics["fvu"] == metrics["l0"] == 0
    assert subject.residual_variance == residual


def test_a_model_whose_activations_are_all_zero(tmp_path, tiny_train, monkeypatch):
    model = tiny_model_folder(tmp_path / "model", initializer_range=0.0)
    monkeypatch.setattr(sae.training.loop, "write_report", write_report)
    code, printed = tiny_train(model=model, folder=tmp_path / "run")
    assert code == 0, printed
    for line in lines(tmp_path / "run"):
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str)), line
    json.loads((tmp_path / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "run" / "report.html").exists()
