"""Runs over meshes that lose a rank, in a step, while saving or evaluating, and go on by the same mesh or by others."""

import errno
import os
import resource
import signal
from functools import partial

import pytest
import torch
from rigs.children import Child, at_step, die, ranks, sae_train
from rigs.continued import DEADLINE_S, in_save
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, files, lines

import sae
from sae.base.files import load_tensors
from sae.base.settings import to_yaml
from sae.parallel.mesh import Shape

pytestmark = pytest.mark.slow
CHANGES = {
    "tokens": 16 * 128,
    "grid": {"coder.selection": {"top": {"type": "topk", "k": 4}, "mutual": {"type": "mutual_choice", "k": 4}}},
    "checkpoints.every_steps": 3,
    "eval.every_steps": 4,
    "eval.tokens": 256,
    "ranks.deadline_s": DEADLINE_S,
    "activations.lanes": 32,
}


def in_evaluation() -> None:
    """Has this process die while it looks at coders midway, which lie in the run's folder."""
    import sae.training.loop

    sae.training.loop.evaluate_all = lambda *args, **options: die()


def full_before(method: str) -> None:
    """Has no file of this process grow beyond some kilobytes once the run comes to that, as on a full disk."""
    import sae.training.loop

    original = getattr(sae.training.loop.Run, method)

    def last(*args, **kwargs):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        return original(*args, **kwargs)

    setattr(sae.training.loop.Run, method, last)


class Runs:
    """Runs of one config below a folder."""

    def __init__(self, folder, model, text) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(to_yaml(tiny_config(model, text, CHANGES)), encoding="utf-8")

    def run(self, name, shape, lost=None):
        """Begins or goes on with a run on a mesh, the last rank of which is lost, or to the end."""
        n = shape.sites * shape.data * shape.latents
        children = self.begun(name, shape, {n - 1: lost})
        codes = [child.wait() for child in children]
        assert codes == ([0] * n if lost is None else [1] * (n - 1) + [-9]), "\n".join(c.output for c in children)
        return self.folder / name

    def begun(self, name, shape, first):
        """Begins or goes on with a run on a mesh, in ranks that do something `first`, by number; returns the ranks."""
        n, run = shape.sites * shape.data * shape.latents, self.folder / name
        argv = ["--resume", str(run)] if run.exists() else ["--config", str(self.config), "--run-dir", str(run)]
        argv += ["--parallel.sites", str(shape.sites), "--parallel.latents", str(shape.latents)]
        children = []
        for number, environment in enumerate(ranks(n) if n > 1 else [{}]):
            work = partial(sae_train, argv, first.get(number))
            children.append(Child(self.folder / "logs" / f"{name}-{number}.txt", work, environment))
        return children


@pytest.fixture
def runs(tmp_path, tiny_model, tiny_text):
    return Runs(tmp_path, tiny_model, tiny_text)


@pytest.mark.parametrize("shape", [Shape(latents=2), Shape(sites=2, latents=2)], ids=str)
def test_resumed_on_the_same_mesh_it_is_the_run_that_was_not_killed(runs, shape):
    whole = runs.run("whole", shape)
    for lost in (partial(at_step, 4, die), in_save(6), in_evaluation):
        runs.run("killed", shape, lost)
    killed = runs.run("killed", shape)
    assert_equal(killed, whole)
    assert not any(path.startswith(".") for path in files(killed) - {".lock"})
    for name, coder in sae.load_all(killed).items():
        sae.save(coder, runs.folder / "alone")
        for file in ("cfg.json", "sae.safetensors"):
            assert (runs.folder / "alone" / file).read_bytes() == (killed / name / file).read_bytes()


def test_resumed_on_other_meshes_it_is_that_of_one_process_but_for_rounding(runs):
    one = runs.run("one", Shape())
    many = {
        Shape(data=2): partial(at_step, 4, die),
        Shape(latents=2): in_save(6),
        Shape(sites=2, latents=2): in_evaluation,
        Shape(sites=2): partial(at_step, 11, die),
        Shape(): None,
    }
    for shape, lost in many.items():
        run = runs.run("many", shape, lost)
    for wanted, found in zip(lines(one), lines(run), strict=True):
        assert found.keys() == wanted.keys()
        for name in ("fvu", "l0", "loss"):
            assert found.get(name, 0) == pytest.approx(wanted.get(name, 0), rel=1e-6), (wanted["step"], name)
    for path in (one / "coders").rglob("*.safetensors"):
        found = load_tensors(run / path.relative_to(one))
        for key, wanted in load_tensors(path).items():
            assert float((found[key] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()), (path, key)


def test_a_full_disk_is_told_by_the_rank_that_writes_and_the_run_goes_on_once_there_is_room(runs):
    """The first rank makes a file of its full size; others may have no room for their rows of it."""
    shape = Shape(latents=2)
    whole = runs.run("whole", shape)
    for method, folder in {"_evaluate_midway": ".evaluated", "finish": "coders"}.items():
        for rank in (1, 0):
            children = runs.begun("full", shape, {rank: partial(full_before, method)})
            assert [child.wait() for child in children] == [1, 1], "\n".join(c.output for c in children)
            error = children[rank].output.splitlines()[-1]
            assert error.startswith(f"error: [Errno {errno.EFBIG}] cannot write {runs.folder}/full/{folder}/")
            assert error.endswith("/sae.safetensors: File too large")
            assert error.count("cannot write") == 1, "of the drafts of several coders one"
            assert "File too large" not in children[1 - rank].output
    assert_equal(runs.run("full", shape), whole)


class Watching:
    """What a callback can see of coders that no rank has whole."""

    def __init__(self, folder):
        self.folder = folder

    def on_step(self, moment):
        if moment.step == 1:
            with pytest.raises(RuntimeError, match="no rank has them whole; ask for them in on_evaluate or on_end"):
                moment.coders  # noqa: B018

    def on_evaluate(self, moment):
        for name, coder in moment.coders.items():
            sae.save(coder, self.folder / str(moment.step) / name)

    on_end = on_evaluate


def train_watched(config, run, folder):
    torch.set_num_threads(1)
    result = sae.train(config, run_dir=run, callbacks=[Watching(folder)], progress=False)
    for name, coder in result.coders.items():
        if os.environ["RANK"] == "1":  # any rank has them all
            sae.save(coder, folder / "result" / name)
    return 0


def test_callbacks_and_the_result_have_whole_coders_also_of_ranks_that_hold_no_latent(runs, tiny_model, tiny_text):
    few = {"coder.d_sae": 3, "grid": {"coder.selection.k": [1, 2]}}
    config, folder = tiny_config(tiny_model, tiny_text, CHANGES | few | {"parallel.latents": 4}), runs.folder / "seen"
    work = partial(train_watched, config, runs.folder / "run", folder)
    children = [Child(runs.folder / f"{env['RANK']}.txt", work, env) for env in ranks(4)]
    assert [child.wait() for child in children] == [0] * 4, "\n".join(child.output for child in children)
    assert sorted(path.name for path in folder.iterdir()) == ["12", "16", "4", "8", "result"]
    for name, coder in sae.load_all(runs.folder / "run").items():
        for moment in ("16", "result"):
            seen = sae.load(folder / moment / name.removeprefix("coders/"))
            assert seen.spec == coder.spec
            assert all(torch.equal(x, coder.state_dict()[key]) for key, x in seen.state_dict().items())
        midway = sae.load(folder / "8" / name.removeprefix("coders/"))
        assert not torch.equal(midway.W_enc, coder.W_enc)
