"""What a step is said to move is what the collectives of real ranks move, byte for byte, for every rule."""

import json
from functools import partial

import pytest
import torch
from rigs.children import Child, ranks

from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.lm.site import Site
from sae.objectives import Objective
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.parallel import collectives
from sae.parallel.mesh import Shape
from sae.parallel.ranks import own_share, process_group, rank
from sae.selection import trainable
from sae.training.config import ActivationConfig, CoderConfig, TrainConfig
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.step import Batch
from sae.training.traffic import traffic
from sae.training.trainer import CoderTrainer, Schedule

LANES, TOKENS, STEPS = 8, 96, 3
READS, WRITES = (tuple(Site(f"{side}{i}", width=12) for i in range(2)) for side in "rw")
CONFIG = TrainConfig(tokens=STEPS * TOKENS, batch_tokens=TOKENS, activations=ActivationConfig(lanes=LANES))


def plans():
    """Returns all rules, and coders of several blocks or terms, by name."""
    found = {}
    for name, kind in trainable().items():
        k = {"k": 4} if "k" in kind.__dataclass_fields__ else {}
        terms = {group[0]: Objective.get_choice_class(group[0])() for group in kind.needs}
        objectives = {"reconstruction": Reconstruction(), "auxk": AuxK(k=8), **terms}
        coder = CoderConfig(d_sae=64, selection=kind(**k), objectives=objectives)
        found[name] = CoderPlan(name, READS[:1], READS[:1], coder, OptimConfig())
        if name in ("mutual_choice", "feature_choice", "gradient_topk"):
            layered = CoderConfig(d_sae=64, selection=kind(**k), objectives=objectives, layout="cross_layer")
            found[f"cross-layer {name}"] = CoderPlan(name, READS, WRITES, layered, OptimConfig())
    skip = CoderConfig(d_sae=2 * 10**5, encoder="glu", skip=True)  # of more than one bucket
    return found | {"buckets": CoderPlan("buckets", READS, WRITES, skip, OptimConfig())}


def count(folder):
    """The work of a rank: leaves, by plan, what it has handed to every collective of its last step."""
    moved = []
    for name, place in (("all_reduce", 0), ("all_gather", 1)):
        original = getattr(collectives.dist, name)

        def counted(*given, name=name, place=place, original=original, **named):
            moved.append((name, given[place].nbytes))
            return original(*given, **named)

        setattr(collectives.dist, name, counted)
    found = {}
    with process_group():
        mine = own_share().of(LANES)
        n = len(mine) * TOKENS // LANES
        for label, plan in plans().items():
            coder = SparseCoder(plan.spec)
            initialize(coder, torch.zeros(plan.d_out), 0)
            trainer = CoderTrainer(coder, plan.coder.objectives, plan.optim, Schedule(STEPS, 2 * TOKENS))
            draw = torch.Generator().manual_seed(rank())
            for step in range(STEPS if plan.d_sae < 1000 else 1):
                moved.clear()
                x, y = (torch.randn(n, width, generator=draw) for width in (plan.d_in, plan.d_out))
                gradients = y if plan.spec.selection.gradient_loss else None
                trainer.step(Batch(x, x if plan.spec.is_autoencoder else y, gradients), step)
                collectives.any_rank(False)
            found[label] = list(moved)
        (folder / f"{rank()}.json").write_text(json.dumps(found))
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_bytes_and_collectives_of_a_step(n, tmp_path):
    made = [Child(tmp_path / f"{i}.txt", partial(count, tmp_path), own) for i, own in enumerate(ranks(n))]
    assert [child.wait() for child in made] == [0] * n, "".join(child.output for child in made)
    every = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(n)]
    for label, plan in plans().items():
        said = traffic(CONFIG, [plan], Shape(data=n))
        for moved in (found[label] for found in every):
            sizes = [size for _, size in moved]
            candidates = sum(size for name, size in moved if name == "all_gather" and size > 8)  # 8: how many there are
            least, most = (plan.spec.n_blocks * 12 * rows for rows in plan.spec.rule.gathered(TOKENS // n, TOKENS, 64))
            assert len(moved) == said.collectives[0], label
            assert sum(sizes) - candidates == said.sent[0] - least, label
            assert least <= candidates <= most, label
        assert (said.sent[0] < said.sent[1]) == plan.spec.rule.batch_wide, label


def test_alone_nothing_moves():
    assert traffic(CONFIG, list(plans().values()), Shape()).sent == (0, 0)


def test_what_a_ring_brings():
    said = traffic(CONFIG, [plans()["topk"]], Shape(data=4))
    summed = said.sent[0] - 8
    assert said.received == (1.5 * summed + 3 * 8,) * 2  # of each other rank its number of tokens
