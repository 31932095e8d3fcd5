"""Runs over meshes: a coder that one rank trains is, to the bit, that of a single process, however many ranks read."""

import os
import signal
from functools import partial

import pytest
import torch
from rigs.children import Child, at_step, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import lines, result

from sae.base.settings import to_yaml
from sae.stream.lanes import Stream

CODERS = {
    "activations.sites": ["layers.0", "layers.1", "layers.1:input"],
    "grid": {"coder": {"wide": {"d_sae": 64}, "narrow": {"d_sae": 40}}},
    "activations.lanes": 32,
}


@pytest.fixture
def trained(tmp_path, tiny_model, tiny_text):
    """Returns (name, ranks, changes) -> the folder of a run of six coders."""

    def run(name, n=1, changes=None, fails=False, first=None, options=(), code=0):
        config = tmp_path / f"{name}.yaml"
        config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, CODERS | (changes or {}))), encoding="utf-8")
        argv = ["--config", str(config), "--run-dir", str(tmp_path / name)]
        work = partial(sae_train, [*options] or argv, first)
        every = ranks(n) if n > 1 else [{}]
        made = [Child(tmp_path / f"{name}-{i}.txt", work, env) for i, env in enumerate(every)]
        codes = [child.wait() for child in made]
        assert all(codes) if fails else codes == [code] * n, made[0].output
        return [child.output for child in made] if fails else tmp_path / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"micro_batch_tokens": 50, "activations.dtype": "bfloat16"}])
def test_coders_dealt_to_single_ranks_are_those_of_one_process_to_the_bit(trained, more):
    one = result(trained("one", changes=more))
    for n in (2, 4):
        assert result(trained(f"of-{n}", n, more | {"parallel.sites": n})) == one, (
            "six coders, of four two have one each"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "sites", "latents"), [(2, 1, 2), (4, 2, 2), (4, 2, 1), (4, 1, 2), (3, 1, 3)])
def test_every_other_mesh_trains_the_same_but_for_rounding(trained, n, sites, latents):
    one, other = trained("one"), trained("other", n, {"parallel.sites": sites, "parallel.latents": latents})
    for wanted, found in zip(lines(one), lines(other), strict=True):
        assert found.keys() == wanted.keys()
        for name in ("step", "coder", "tokens"):
            assert found[name] == wanted[name]
        for name in ("loss", "fvu", "grad_norm", "l0"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), (wanted["step"], wanted["coder"], name)


@pytest.mark.slow
def test_more_groups_than_coders_are_refused_by_all_ranks(trained):
    one = {"activations.sites": ["layers.1"], "grid": {}, "parallel.sites": 2}
    told = trained("few", 2, one, fails=True)
    assert "error: parallel.sites: 2 groups of ranks for 1 coder, of which each needs one; set it to 1" in told[0]


@pytest.mark.slow
def test_gradients_and_rows_of_text_go_to_the_ranks_that_need_them(trained):
    graded = {"coder.selection.type": "gradient_topk", "tokens": 8 * 128}
    assert result(trained("sites", 2, graded | {"parallel.sites": 2})) == result(trained("one", changes=graded))
    rows = {"coder.objectives.kl": {"type": "kl"}, "tokens": 8 * 128}
    assert result(trained("rows", 2, rows | {"parallel.sites": 2})) == result(trained("row", changes=rows))


def poison_one_rank(rank: str) -> None:
    """Puts NaN into a token that a rank has read, at the first site, for the eighth step."""
    if os.environ.get("RANK", "0") == rank:
        original, count = Stream.__next__, []

        def drawn(self):
            batch = original(self)
            count.append(1)
            if len(count) == 8:
                batch.activations["model.layers.0"][3] = torch.nan
            return batch

        Stream.__next__ = drawn


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0, 1])
def test_what_one_rank_has_read_wrong_all_know_at_the_same_step(trained, tmp_path, allowed):
    more = {"max_bad_steps": allowed, "log.every_steps": 10, "checkpoints.every_steps": 100}
    told = trained("sites", 2, more | {"parallel.sites": 2}, not allowed, partial(poison_one_rank, "1"))
    for rank in range(2):
        assert (tmp_path / "sites" / f"bad-batch-step-8-rank-{rank}.safetensors").is_file()
        printed = (tmp_path / f"sites-{rank}.txt").read_text(encoding="utf-8")
        for coder in ("wide", "narrow"):
            assert f"coder model.layers.0/{coder}: NaN or Inf in what was streamed, at 1 of 128 tokens" in printed
        assert "layers.1" not in printed[printed.index("step 8, ") :].partition("; the step")[0]
    if allowed:
        assert result(told) == result(trained("one", 1, more, False, partial(poison_one_rank, "0")))


def ask_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(trained, tmp_path):
    short, more = {"tokens": 20 * 128}, {"parallel.sites": 2}
    whole = result(trained("whole", changes=short))
    trained("part", 2, short | more, False, partial(at_step, 12, ask_to_end), code=75)
    again = trained("part", 1, None, False, None, ["--resume", str(tmp_path / "part"), "--parallel.sites", "1"])
    assert result(again) == whole
