"""Meshes of every factorization with ragged lanes, latents and coders: each rank gets what one process would see."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.teams import together

from sae.coder.coder import SparseCoder
from sae.coder.cutting import part_of
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.objectives.reconstruction import Reconstruction
from sae.parallel.cut import Cut
from sae.parallel.mesh import Shape
from sae.selection.topk import TopK
from sae.stream.batch import ActivationBatch, TextBatch
from sae.stream.exchange import Exchange, Wanted
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

SHAPES = [Shape(s, d, m) for s in range(1, 5) for d in range(1, 5) for m in range(1, 5) if s * d * m <= 4]
NAMES = ("a", "b", "c")
STEPS = 3


def drawn(units, of, kept, seed, dtype):
    """Returns a whole batch of lanes, or of rows of text of which some positions count: [units, positions, d]."""
    draw = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(units, of, 3 + i, generator=draw).to(dtype) for i, name in enumerate(NAMES)}
    tokens = torch.randint(0, 99, (units, of), generator=draw).int()
    keep = torch.rand(units, of, generator=draw) < 0.6 if kept else torch.ones(units, of, dtype=torch.bool)
    return x, tokens, keep


def batch_of(whole, rows, kept, gradients):
    """Returns the part of a batch that a rank reads, of some of its lanes or rows."""
    x, tokens, keep = whole
    some = slice(rows.start, rows.stop)
    own = {name: value[some][keep[some]] for name, value in x.items()}
    text = TextBatch(tokens[some], keep[some]) if kept else None
    return ActivationBatch(
        own, {n: -v for n, v in own.items()} if gradients else {}, torch.zeros(len(own["a"]), dtype=torch.long), text
    )


def trained(coder, batches, mesh=None):
    """Returns the losses of a few steps, and the rows of W_dec that a rank then has."""
    trainer = CoderTrainer(coder, {"reconstruction": Reconstruction()}, OptimConfig(lr=1e-2), Schedule(STEPS, 50), mesh)
    losses = [trainer.step(Batch(x, x), step)["loss"] for step, x in enumerate(batches)]
    return losses, coder.W_dec.detach().clone()


def new_coder(width, d, seed):
    """Returns an untrained coder in float64."""
    site = (Site("a", width=d),)
    coder = SparseCoder(CoderSpec(d, d, width, TopK(2), site, site, variance=1.0))
    initialize(coder, torch.zeros(d), seed)
    return coder.double()


def check(shape, units, of, kept, gradients, dtype, width, blocks, wants, seed):
    """Raises unless every rank of a mesh sees, holds and trains what one process does."""
    whole = drawn(units, of, kept, seed, dtype)
    wanted = [Wanted(names, names if gradients else ()) for names in wants[: shape.sites]]
    batches = [drawn(units, of, False, seed + step, torch.float64)[0] for step in range(STEPS)]
    alone = [
        trained(new_coder(width, 3 + NAMES.index(w[0]), seed), [b[w[0]].flatten(0, 1) for b in batches]) for w in wants
    ]
    every = torch.arange(2.0 * width * blocks).view(width * blocks, 2)

    def work(mesh):
        exchange = Exchange(mesh, wanted, units, of)
        got = exchange(batch_of(whole, mesh.lanes.of(units), kept, gradients))
        cut = Cut(width, blocks, mesh.latents)
        own = cut.own(every)
        assert torch.equal(cut.whole(own), every)
        assert torch.equal(every[cut.ids(torch.arange(cut.held))], own)
        name = wants[mesh.sites.rank][0]
        moved = [
            Exchange(mesh, [Wanted((w[0],)) for w in wants[: shape.sites]], units, of)(
                batch_of((b, *whole[1:2], torch.ones_like(whole[2])), mesh.lanes.of(units), False, False)
            ).activations[name]
            for b in batches
        ]
        part = part_of(new_coder(width, 3 + NAMES.index(name), seed), mesh.latents)
        return mesh, got, trained(part, moved, mesh)

    for mesh, got, (losses, rows) in together(shape, work):
        group = torch.arange(units)[mesh.data.rank * units // shape.data : (mesh.data.rank + 1) * units // shape.data]
        x, tokens, keep = (
            {name: value[group] for name, value in whole[0].items()},
            whole[1][group],
            whole[2][group],
        )
        own = wanted[mesh.sites.rank]
        cuts = mesh.sites.moves or mesh.latents.moves
        assert [*got.activations] == [*own.activations] if cuts else set(got.activations) == set(NAMES)
        for name, value in got.activations.items():
            assert torch.equal(value, x[name][keep]), (shape, name)
        for name, value in got.gradients.items():
            assert torch.equal(value, -x[name][keep])
        if kept:
            assert torch.equal(got.text.tokens, tokens)
            assert torch.equal(got.text.keep, keep)
        wanted_losses, wanted_rows = alone[mesh.sites.rank]
        assert losses == pytest.approx(wanted_losses, rel=1e-9)
        torch.testing.assert_close(rows, Cut(width, 1, mesh.latents).own(wanted_rows), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    units=st.integers(4, 11),
    of=st.integers(1, 3),
    kept=st.booleans(),
    gradients=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    width=st.integers(4, 9),
    blocks=st.integers(1, 3),
    wants=st.lists(st.sampled_from([("a",), ("b", "a"), ("c",), ("a", "b", "c")]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_200_random_meshes(**drawn):
    check(**drawn)


def test_a_mesh_of_two_axes():
    check(Shape(2, 1, 2), 5, 2, True, True, torch.bfloat16, 7, 2, [("a",), ("b", "a")], 0)
