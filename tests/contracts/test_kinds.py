"""Every selection rule in every kind of coder: micro-batches change nothing but rounding, a resume changes nothing."""

import copy

import pytest
import torch

from sae.base import plugins
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.objectives import Objective
from sae.selection import trainable
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

RULES = {name: kind for name, kind in trainable().items() if name == kind.get_choice_name(kind)}  # no second names
ONE, OTHER = (Site("a", width=12),), (Site("b", width=8),)
READS, WRITES = (tuple(Site(f"{side}.{i}", width=4) for i in range(3)) for side in ("read", "write"))
FREE = {"pre_bias": "own", "decoder_norm": "free"}
KINDS = {
    "transcoder": {"reads": ONE, "writes": OTHER} | FREE,
    "skip": {"reads": ONE, "writes": OTHER, "skip": True} | FREE,
    "crosscoder": {"reads": READS, "writes": READS},
    "cross_layer": {"reads": READS, "writes": WRITES, "cross_layer": True} | FREE,
    "shared": {"reads": READS, "writes": WRITES, "cross_layer": True, "budget": "shared"} | FREE,
}


def trainer(rule, kind, micro=0):
    d_in, d_out = (sum(site.width for site in KINDS[kind][side]) for side in ("reads", "writes"))
    coder = SparseCoder(CoderSpec(d_in, d_out, 48, rule, variance=float(d_out), **KINDS[kind]))
    initialize(coder, torch.zeros(d_out), 0, input_center=torch.zeros(d_in))
    names = dict.fromkeys(("reconstruction", "auxk", *(group[0] for group in rule.needs)))
    terms = {name: plugins.names(Objective)[name]() for name in names}
    return CoderTrainer(coder, terms, OptimConfig(lr=1e-2, ema=0.9), Schedule(6, 60, micro))


def batch(coder, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(24, coder.spec.d_in, generator=draw)
    y = x if coder.spec.is_autoencoder else torch.randn(24, coder.spec.d_out, generator=draw)
    return Batch(x, y, torch.randn(24, coder.spec.d_out, generator=draw))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_every_kind(name, kind):
    rule = RULES[name](k=4) if "k" in RULES[name].__dataclass_fields__ else RULES[name]()
    whole, parts, resumed = trainer(rule, kind), trainer(rule, kind, 7), trainer(rule, kind)
    for step in range(4):
        b = batch(whole.coder, step)
        if step == 2:
            resumed.load_state(*copy.deepcopy(whole.state()))
        line = whole.step(b, step)
        assert parts.step(b, step)["fvu"] == pytest.approx(line["fvu"], rel=1e-3)
        if step >= 2:
            assert resumed.step(b, step) == line
    once, again = whole.trained(), resumed.trained()
    assert once.spec == again.spec
    for key, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert torch.isfinite(once(batch(once, 9).x).out).all()
