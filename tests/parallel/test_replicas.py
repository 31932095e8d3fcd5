"""Weights are compared bit for bit, and ranks that compute in different ways are refused before they train."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config

from sae.base.settings import to_yaml
from sae.parallel.replicas import CHUNK, fingerprint

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


@given(st.integers(0, 2**31), st.sampled_from(TYPES), st.integers(1, 40))
def test_a_fingerprint_sees_every_bit_and_the_order(seed, dtype, n):
    x = torch.randint(0, 200, (n, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(x.T.contiguous().T)
    changed = x.clone().view(torch.uint8)
    place, bit = seed % changed.numel(), seed % 8
    changed.view(-1)[place] ^= 1 << bit
    assert fingerprint(changed.view(dtype)) != fingerprint(x)
    swapped = x.flip(0)
    assert (fingerprint(swapped) == fingerprint(x)) == torch.equal(swapped, x)


def test_a_fingerprint_does_not_depend_on_how_it_is_cut(monkeypatch):
    x = torch.randn(1000, 7)
    whole = fingerprint(x)
    monkeypatch.setattr("sae.parallel.replicas.CHUNK", 64)
    assert x.numel() < CHUNK
    assert fingerprint(x) == whole


def test_zeros_of_two_signs_are_two_things():
    assert fingerprint(torch.zeros(3)) != fingerprint(-torch.zeros(3))


@pytest.fixture
def argv(tmp_path, tiny_model, tiny_text):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text)), encoding="utf-8")
    return ["--config", str(path), "--run-dir", str(tmp_path / "run")]


def of_another_kind() -> None:
    torch.backends.cpu.get_cpu_capability = lambda: "ANOTHER"


def drifting() -> None:
    """Lets this rank's weights differ in the last bit of one number, once step 7 is taken."""
    from sae.training.trainer import CoderTrainer

    original = CoderTrainer.step

    def step(self, x, index):
        found = original(self, x, index)
        if index == 7:
            weight = self.coder.b_dec.data.view(torch.int32)
            weight[3] ^= 1
        return found

    CoderTrainer.step = step


def run(tmp_path, argv, first):
    works = [partial(sae_train, argv), partial(sae_train, argv, first)]
    children = [Child(tmp_path / f"{e['RANK']}.txt", w, e) for w, e in zip(works, ranks(2), strict=True)]
    return [child.wait() for child in children], "".join(child.output for child in children)


@pytest.mark.slow
def test_ranks_on_two_kinds_of_cpu_are_refused_before_they_train(tmp_path, argv):
    codes, output = run(tmp_path, argv, of_another_kind)
    assert codes == [2, 2], output
    assert "ranks: they would train different weights: rank 0 (" in output
    assert "ANOTHER; set ATEN_CPU_CAPABILITY=default for all ranks" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rank_that_comes_to_hold_other_weights_ends_the_run_at_the_next_checkpoint(tmp_path, argv):
    codes, output = run(tmp_path, argv, drifting)
    assert codes == [1, 1], output
    assert "rank 0 (" in output
    assert "hold different weights after step 10 (" in output
    assert "b_dec" in output
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000000005"]
