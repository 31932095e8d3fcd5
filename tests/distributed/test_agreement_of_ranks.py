"""Ranks that share batches unevenly, or have nothing of one, train the coder that one process trains: every kind."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from rigs import teams
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.sharing import Case, D, bounds, cases, new_trainer, train_all, trained

from sae.base.files import load_tensors, save_tensors
from sae.base.settings import to_yaml
from sae.kernels.codes import PAD
from sae.parallel.mesh import Mesh, Shape
from sae.parallel.ranks import rank, world_size
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer

SOME = ["fewer entries than latents", "cross-layer mutual_choice", "rows, mutual"]
SHAPES = [Shape(data=n) for n in (2, 3, 4)] + [Shape(latents=n) for n in (2, 4)] + [Shape(1, 2, 2)]


@pytest.fixture(scope="module")
def alone():
    """Returns (case, steps, type) -> what one process comes to."""
    known = {}

    def found(name, steps, dtype):
        if (name, steps, dtype) not in known:
            known[name, steps, dtype] = trained(cases()[name], steps, dtype)
        return known[name, steps, dtype]

    return found


@pytest.fixture
def together(tmp_path):
    """Returns (cases, shape of the mesh, steps, type) -> what every rank has of each case."""

    def found(names, shape, steps, dtype):
        n = shape.data * shape.latents
        work = partial(train_all, names, steps, dtype, tmp_path, shape)
        made = [Child(tmp_path / f"{i}.txt", work, environment) for i, environment in enumerate(ranks(n))]
        assert [child.wait() for child in made] == [0] * n, "".join(child.output for child in made)
        loaded = [load_tensors(tmp_path / f"{i}.safetensors") for i in range(n)]
        return {
            name: [{k.removeprefix(f"{name}: "): v for k, v in x.items() if k.startswith(f"{name}: ")} for x in loaded]
            for name in names
        }

    return found


def assert_alike(name, one, every):
    """All ranks hold the same bits, and what one process has to 1e-9."""
    for key, wanted in one.items():
        for held in every[1:]:
            assert torch.equal(held[key], every[0][key]), (name, key)
        got = every[0][key]
        if not wanted.is_floating_point():
            assert torch.equal(got, wanted), (name, key)
            continue
        size = wanted.abs().amax().clamp_min(1e-3) if wanted.numel() else 1.0
        assert float(((got - wanted).double().abs() / size).amax()) <= 1e-9, (name, key)


@pytest.mark.parametrize("name", SOME)
def test_some_kinds_on_ranks_that_share_batches_or_hold_parts_of_a_coder(alone, name):
    one = alone(name, 9, torch.float64)
    for shape in (Shape(data=3), Shape(1, 2, 2)):
        assert_alike(name, one, teams.together(shape, lambda mesh: trained(cases()[name], 9, torch.float64, mesh)))
    assert int(one["auxk"]) or name.startswith("cross-layer"), "dead latents learn as well"


ROUNDED = ["rule topk", "rule jumprelu", "term multi_topk"]


@pytest.mark.parametrize(
    "name",
    [n if n in ROUNDED else pytest.param(n, marks=pytest.mark.slow) for n in cases() if n.startswith(("rule", "term"))],
)
def test_parts_of_a_coder_are_trained_as_all_of_it_where_products_are_bfloat16(name):
    """Entries that only fill a buffer up are known by their number: it must outlive that precision."""
    train = partial(trained, cases()[name], 9, torch.float32, products=torch.bfloat16)
    one, exact = train(Mesh()), trained(cases()[name], 9, torch.float32, Mesh())
    torch.testing.assert_close(one["loss"], exact["loss"], rtol=0.02, atol=0)
    for held in teams.together(Shape(latents=2), train):
        torch.testing.assert_close(held["loss"], one["loss"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_fills_a_buffer_up_is_found_in_every_precision(dtype):
    for back in (torch.float32, torch.float64):
        assert float(torch.tensor(PAD, dtype=dtype).to(back)) == PAD


@pytest.mark.parametrize("shape", [Shape(latents=2), Shape(1, 2, 2)], ids=str)
def test_a_rank_that_has_more_of_the_best_than_room_has_all_repeat_the_step(shape):
    case = Case(rule="topk", options={"k": 4, "k_start": 40}, width=400)
    one = trained(case, 4, torch.float64, Mesh())
    one = {key: value for key, value in one.items() if not key.startswith("gradient.")}  # those are of the first try
    assert_alike("k_start", one, teams.together(shape, lambda mesh: trained(case, 4, torch.float64, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in cases() if name.startswith(("rule", "fewer"))])
def test_every_rule_on_every_mesh_after_60_steps_in_float64(alone, name, shape):
    every = teams.together(shape, lambda mesh: trained(cases()[name], 60, torch.float64, mesh))
    assert_alike(name, alone(name, 60, torch.float64), every)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(data=3), Shape(1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in cases() if not name.startswith(("rule", "fewer"))])
def test_every_kind_after_60_steps_in_float64(alone, name, shape):
    every = teams.together(shape, lambda mesh: trained(cases()[name], 60, torch.float64, mesh))
    assert_alike(name, alone(name, 60, torch.float64), every)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(data=2), Shape(1, 2, 2)], ids=str)
def test_every_kind_in_float32(alone, together, shape):
    """First gradients to 1e-5; losses of ten steps to 1e-4: later, one near tie that falls the other way is seen."""
    for name, every in together(list(cases()), shape, 10, torch.float32).items():
        one = alone(name, 10, torch.float32)
        torch.testing.assert_close(every[0]["loss"], one["loss"], rtol=1e-4, atol=0, msg=name)
        for key in (key for key in one if key.startswith("gradient.")):
            assert float((every[0][key] - one[key]).norm()) <= 1e-5 * float(one[key].norm()) + 1e-12, (name, key)
            assert torch.equal(every[1][key], every[0][key])


def test_ranks_repeat_the_step_for_which_one_of_them_had_no_room(monkeypatch):
    """All entries of a token are one rank's, and from the seventh step on the other's, which expects none."""
    repeated, given = [], CoderTrainer._given

    def seen(self, planned, careful=False):
        if careful:
            repeated.append((planned.index, self.mesh.latents.rank))
        return given(self, planned, careful)

    def losses(mesh):
        trainer = new_trainer(Case(options={"k": 4}, width=400), 20, torch.float64, mesh)
        rows = torch.randn(400, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows[:, 0] = torch.where(torch.arange(400) < 200, 5.0, -5.0)
        own = mesh.latents.of(400)
        for weight in (trainer.coder.W_enc, trainer.coder.W_dec):
            weight.data.copy_((rows / rows.norm(dim=1, keepdim=True))[own.start : own.stop])
        figures = []
        for step in range(8):
            x = torch.randn(256, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            x[:, 0] = 6 if step < 6 else -6
            figures.append(trainer.step(Batch(x, x), step))
        trainer.settle()
        return [found["loss"] for found in figures]

    monkeypatch.setattr(CoderTrainer, "_given", seen)
    one = losses(Mesh())
    assert not repeated, "one process has room for all"
    for found in teams.together(Shape(latents=2), losses):
        assert found == pytest.approx(one, rel=1e-9)
    steps = [[step for step, rank in repeated if rank == own] for own in (0, 1)]
    assert steps[0] == steps[1]
    assert 6 in steps[0]


def keep_batches(folder):
    """Has this process write down what every step is given."""
    original = CoderTrainer.step

    def step(self, batch, index):
        save_tensors(folder / f"{index}-{rank()}-of-{world_size()}.safetensors", {"x": batch.x, "target": batch.target})
        return original(self, batch, index)

    CoderTrainer.step = step


@pytest.mark.slow
def test_three_ranks_read_the_tokens_of_one_in_their_order(tmp_path, tiny_model, tiny_text):
    changes = {"tokens": 4 * 128, "activations.sites": ["layers.1:input"], "activations.targets": ["layers.1"]}
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, changes)), encoding="utf-8")
    for n in (1, 3):
        argv = ["--config", str(config), "--run-dir", str(tmp_path / f"of-{n}")]
        work = partial(sae_train, argv, partial(keep_batches, tmp_path))
        made = [Child(tmp_path / f"{n}-{i}.txt", work, env) for i, env in enumerate(ranks(n) if n > 1 else [{}])]
        assert [child.wait() for child in made] == [0] * n, made[0].output
    for step in range(4):
        (one,), three = ([load_tensors(tmp_path / f"{step}-{i}-of-{n}.safetensors") for i in range(n)] for n in (1, 3))
        for name, whole in one.items():
            assert torch.equal(torch.cat([own[name] for own in three]), whole), "bit for bit"
        assert sorted(len(own["x"]) for own in three) == [42, 42, 44], "21 and 22 lanes of two tokens"


def test_shares_are_ragged_and_some_are_empty():
    sizes = [[b - a for a, b in pairwise(cuts)] for cuts in (bounds(s, 3, 96) for s in range(12))]
    assert all(sum(step) == 96 for step in sizes)
    assert {i for step in sizes for i, size in enumerate(step) if size == 0} == {0, 1, 2}
