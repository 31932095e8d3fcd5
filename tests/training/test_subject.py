"""Runs on stored activations: as on live ones, bit for bit; no model is loaded; what is wrong is said at once."""

import json
import re
from functools import partial
from shutil import copytree

import pytest
import torch
from rigs.children import Child, at_step, die, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, error_of, files, lines
from safetensors.torch import save_file

import sae
from sae.base.errors import ConfigError, DataError
from sae.base.files import load_tensors
from sae.base.settings import to_yaml
from sae.training.estimate import estimate
from sae.training.run import train
from sae.training.step import NonFiniteError

SHORT = {"tokens": 256, "text.max_tokens": 2000}
GRID = {"grid": {"coder.selection.k": [2, 4]}, "tokens": 12 * 128}


def of(path, changes=None):
    """A config that reads stored activations; its model and text are nowhere."""
    there = {"activations.source": "tensors", "activations.path": str(path), "activations.sites": ["layers.1"]}
    return tiny_config("nowhere/nothing", "quickstart", {**there, **(changes or {})})


def weights(run):
    return {path.parent.name: load_tensors(path) for path in (run / "coders").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def acts(tmp_path_factory, tiny_model, tiny_text):
    """Activations of the tiny model, stored by a run that is beside them, and the folder of that run."""
    folder = tmp_path_factory.mktemp("acts")
    changes = {**GRID, "activations.source": "disk", "activations.path": str(folder / "store"), "text.max_tokens": 8000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        patch.setattr("sae.training.loop.write_report", lambda run_dir: None)
        train(tiny_config(tiny_model, tiny_text, changes), run_dir=folder / "run")
        train(tiny_config(tiny_model, tiny_text, {**GRID, "text.max_tokens": 8000}), run_dir=folder / "live")
    return folder


def test_stored_activations_train_as_live_ones_bit_for_bit(acts, tmp_path, quick, no_model):
    config = of(acts / "store", GRID)
    result = train(config, run_dir=tmp_path / "run")
    live = acts / "live"
    for run in (acts / "run", tmp_path / "run"):
        assert (run / "metrics.jsonl").read_bytes() == (live / "metrics.jsonl").read_bytes()
        for name, tensors in weights(live).items():
            assert all(torch.equal(x, weights(run)[name][key]) for key, x in tensors.items())
    ours, theirs = (sae.load(run / "coders" / "model.layers.1" / "k=4").spec for run in (tmp_path / "run", live))
    assert ours.mask == theirs.mask
    assert [site.model for site in ours.reads] == [site.model for site in theirs.reads], "the store says whose they are"
    found = result.metrics["model.layers.1/k=4"]
    assert "loss" not in found
    assert found["reconstruction"]["fvu"] == pytest.approx(
        json.loads((live / "evaluation.json").read_text())["model.layers.1/k=4"]["reconstruction"]["fvu"], rel=0.1
    )


@pytest.mark.slow
def test_what_was_held_out_is_measured_again(acts, tmp_path, quick, no_model, monkeypatch):
    """By the coder's own word, whatever folder and share it was; of other activations all are measured."""
    x = torch.randn(1000, 16)
    for given in (x, x.numpy(), {"layers.1": x}, [x[:400], x[400:]], acts / "store"):
        result = train(of(""), run_dir=tmp_path / str(len(list(tmp_path.iterdir()))), activations=given)
        ((name, coder),) = result.coders.items()
        again = sae.evaluate(coder, activations=given, tokens=256)
        assert again["reconstruction"] == result.metrics[name]["reconstruction"]
    said = train(of(""), run_dir=tmp_path / "said", activations=x).coders["layers.1"]
    assert said.spec.reads[0].model == "nowhere/nothing", "model.name says whose they are"
    coder = train(of("", {"model.name": "quickstart"}), run_dir=tmp_path / "last", activations=x).coders["layers.1"]
    assert sae.evaluate(coder, activations=x)["reconstruction"]["tokens"] == 50
    assert sae.evaluate(coder, activations=x + 1)["reconstruction"]["tokens"] == 1000
    with pytest.raises(ConfigError, match="lm: the coder's spec names no model; pass it, or activations="):
        sae.evaluate(coder)
    with pytest.raises(ConfigError, match=r"has no tensor 'layers\.1'; it has layers\.2"):
        sae.evaluate(coder, activations={"layers.2": x})


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(acts, tmp_path, n_ranks):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(of(acts / "store", {**GRID, "eval.every_steps": 6})), encoding="utf-8")

    def run(name, killed_at=None):
        folder = tmp_path / name
        argv = ["--resume", str(folder)] if folder.exists() else ["--config", str(config), "--run-dir", str(folder)]
        first = partial(at_step, killed_at, die) if killed_at else None
        environments = ranks(n_ranks) if n_ranks > 1 else [{}]
        made = [
            Child(tmp_path / f"{name}-{rank}.txt", partial(sae_train, argv, first), environment)
            for rank, environment in enumerate(environments)
        ]
        codes = [child.wait() for child in made]
        return codes, "".join(child.output for child in made)

    codes, printed = run("whole")
    assert codes == [0] * n_ranks, printed
    assert run("killed", 8)[0] == [-9] * n_ranks
    codes, printed = run("killed")
    assert codes == [0] * n_ranks, printed
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    for one, two in zip(
        lines(acts / "live"), filter(lambda line: "fvu" in line, lines(tmp_path / "whole")), strict=True
    ):
        assert two["fvu"] == (one["fvu"] if n_ranks == 1 else pytest.approx(one["fvu"], rel=1e-4))


def test_a_resume_on_other_activations_is_refused(tmp_path, quick):
    x = torch.randn(600, 16)
    config = of("", {"tokens": 256, "checkpoints.every_steps": 1})
    train(config, run_dir=tmp_path / "run", activations=x)
    with pytest.raises(ConfigError, match="--resume: the data is not that of the run"):
        train(config, resume=True, run_dir=tmp_path / "run", activations=x + 1)
    with pytest.raises(ConfigError, match=r"activations.path: empty; .* or give activations=\.\.\. in Python"):
        train(config, resume=True, run_dir=tmp_path / "run")
    train(config, resume=True, run_dir=tmp_path / "run", activations=x)


def test_transcoders_crosscoders_and_gradients(tmp_path, quick):
    x = torch.randn(500, 16)
    given = {"in": x, "out": x[:, :8] * 2, "gradients/in": x, "gradients/out": x[:, :8]}
    transcoder = {"activations.sites": ["in"], "activations.targets": ["out"], "tokens": 256}
    (coder,) = train(of("", transcoder), run_dir=tmp_path / "t", activations=given).coders.values()
    assert (coder.spec.d_in, coder.spec.d_out) == (16, 8)
    backward = {"activations.sites": ["out"], "activations.targets": ["in"], "tokens": 256}
    assert train(of("", backward), run_dir=tmp_path / "b", activations=given).coders.keys() == {"out-to-in"}
    cross = {"activations.sites": ["in", "out"], "coder.layout": "crosscoder", "tokens": 256}
    (found,) = train(of("", cross), run_dir=tmp_path / "c", activations=given).metrics.values()
    assert found["fvu_by_site"].keys() == {"in", "out"}
    graded = {"activations.sites": ["in"], "coder.selection": {"type": "gradient_topk", "k": 4}, "tokens": 256}
    (found,) = train(of("", graded), run_dir=tmp_path / "g", activations=given).metrics.values()
    assert "with_gradients" in found
    with pytest.raises(ConfigError, match="has no tensor 'gradients/in'"):
        train(of("", graded), run_dir=tmp_path / "h", activations={"in": x})


def test_bad_numbers_are_named_by_their_file(tmp_path, quick):
    good, bad = torch.randn(2, 320, 16)
    bad[107] = torch.nan
    for name, x in (("a", good), ("b", bad)):
        save_file({"layers.1": x}, tmp_path / f"{name}.safetensors")
    config = of(tmp_path, {"text.held_out_share": 0.1})
    later = of(tmp_path, {"text.held_out_share": 0.1, "activations.statistics_tokens": 64})
    with pytest.raises(NonFiniteError, match=r"its batch \(.*b.safetensors, rows 64 to 128\) is in"):
        train(later, run_dir=tmp_path / "later")
    with pytest.raises(ConfigError, match=r"layers.1 holds NaN or Inf at 1 of 64 tokens in .*b.safetensors, rows 64 "):
        train(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_said_before_anything_is_written(acts, tmp_path, tiny_train, no_model):
    for name, x in (("few", torch.randn(90, 16)), ("more", torch.randn(900, 16))):
        (tmp_path / name).mkdir()
        save_file({"layers.1": x}, tmp_path / name / "x.safetensors")

    def error(folder, **changes):
        there = {"activations.source": "tensors", "activations.path": str(tmp_path / folder)}
        code, printed = tiny_train({**there, **changes})
        assert code == 2, printed
        assert not (tmp_path / "run").exists()
        return error_of(printed)

    assert "batch_tokens: 128 is more than the 86 vectors to train on in" in error("few")
    assert "'layers.7' is not in" in error("more", **{"activations.sites": ["layers.7"]})
    assert "end-to-end terms (kl, ce) run the model live" in error("more", **{"coder.objectives.kl": {"type": "kl"}})
    assert "no such file or folder" in error("nowhere")
    copytree(acts / "store", tmp_path / "part")
    (tmp_path / "part" / "shard-000007.safetensors").unlink()
    assert re.search(r"part holds (\d+) of (?!\1)\d+ blocks; run what stored them again", error("part"))
    assert "is not read by source live" in error("more", **{"activations.source": "live"})


def test_a_folder_that_holds_something_else_is_not_stored_in(acts, tmp_path, tiny_train):
    def error(path, *options):
        code, printed = tiny_train({"activations.source": "disk", "activations.path": str(path)}, options)
        assert code == 2, printed
        return error_of(printed)

    with pytest.MonkeyPatch.context() as patch:  # broken off before anything is stored, it goes on
        patch.setattr("sae.stream.sources.LiveSource.read", lambda *_: 1 / 0)
        there = {"activations.source": "disk", "activations.path": str(tmp_path / "new"), **SHORT}
        assert tiny_train(there, folder=tmp_path / "broken")[0] == 1
    code, printed = tiny_train(there, folder=tmp_path / "again")
    assert code == 0, printed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    before = files(acts / "store")
    for options in ([], ["--repair"]):
        assert "mine: holds other files; name another folder" in error(tmp_path / "mine", *options)
        assert "was made with other settings" in error(acts / "store", *options)
    assert files(tmp_path / "mine") == {"thesis.txt"}
    assert files(acts / "store") == before


def test_an_estimate_needs_no_model(acts, no_model):
    found = estimate(of(acts / "store"))
    assert (found.widths, found.lm_parameters, found.cached) == ({"model.layers.1": 16}, 0, 0)
    assert found.lines()
    with pytest.raises(ConfigError, match="batch_tokens: 12800 is more than"):
        estimate(of(acts / "store", {"batch_tokens": 12800, "tokens": 12800}))


def test_a_damaged_store_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.safetensors is missing, damaged or no safetensors file"):
        train(of(tmp_path), run_dir=tmp_path / "run")


class Items:
    """An endless iterator that can be set back."""

    def __init__(self, end=10**6):
        self.item, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.item == self.end:
            raise StopIteration
        self.item += 1
        draw = torch.Generator().manual_seed(self.item)
        return {"vit.3": torch.randn(50, 16, generator=draw) * torch.rand(50, 1, generator=draw)}

    def state(self):
        return self.item

    def load_state(self, state):
        self.item = state


DRAWN = {"activations.sites": ["vit.3"], "tokens": 12 * 128, "checkpoints.every_steps": 3}


def drawn_run(folder, resume=False, first=None):
    """The work of a child that trains on an iterator."""
    import os

    import sae.training.loop

    os.fsync = lambda descriptor: None
    sae.training.loop.write_report = lambda run_dir: None
    if first:
        first()
    train(of("", DRAWN), resume=resume, run_dir=folder, activations=Items())
    return 0


def test_a_run_on_an_iterator_killed_and_resumed_equals_uninterrupted(tmp_path):
    for name, resume, first, code in (
        ("whole", False, None, 0),
        ("killed", False, partial(at_step, 1, die), -9),
        ("killed", True, partial(at_step, 7, die), -9),
        ("killed", True, None, 0),
    ):
        child = Child(tmp_path / "log.txt", partial(drawn_run, tmp_path / name, resume, first))
        assert child.wait() == code, child.output
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    held_out = [load_tensors(tmp_path / name / "held_out.safetensors")["vit.3"] for name in ("whole", "killed")]
    assert torch.equal(*held_out)
    assert len(held_out[0]) == 300, "eval.tokens, in whole items"
    coder = sae.load(tmp_path / "whole")
    assert sae.evaluate(coder, activations=Items(), tokens=70)["reconstruction"]["tokens"] == 100


def test_an_iterator_that_ends_leaves_a_checkpoint_to_go_on_from(tmp_path, quick):
    with pytest.raises(ConfigError, match=r"ended after 1,150 vectors, at step 4 of 12; set tokens to 512 at"):
        train(of("", DRAWN), run_dir=tmp_path / "run", activations=Items(end=23))
    train(of("", DRAWN), resume=True, run_dir=tmp_path / "run", activations=Items())
    train(of("", DRAWN), run_dir=tmp_path / "whole", activations=Items())
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_an_iterator_without_a_state_is_told_so_and_not_resumed(tmp_path, quick, caplog):
    caplog.set_level("INFO")
    config = of("", {**DRAWN, "checkpoints.every_steps": 1})
    train(config, run_dir=tmp_path / "run", activations=iter(Items().__next__, None))
    assert "it has no state() and load_state(), so the run cannot be resumed" in caplog.text
    with pytest.raises(ConfigError, match="--resume: the iterator of the run had no state"):
        train(config, resume=True, run_dir=tmp_path / "run", activations=Items())
    with pytest.raises(ConfigError, match="activations: the iterator gives nothing"):
        train(config, run_dir=tmp_path / "other", activations=iter(()))
    with pytest.raises(ConfigError, match=r"ended after 100 vectors, of which the first 256 are held out \(eval"):
        train(config, run_dir=tmp_path / "other", activations=Items(end=2))
    assert not (tmp_path / "other").exists()
