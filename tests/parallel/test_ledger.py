"""What a step is said to move along each axis is what ranks of a mesh hand over, byte for byte, for every coder."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from rigs.sharing import CONTEXT, OF_MODEL, TOKENS, Case, cases
from rigs.teams import together

from sae.coder.coder import SparseCoder
from sae.coder.cutting import part_of
from sae.coder.initialization import initialize
from sae.objectives import Spliced
from sae.objectives.auxk import AuxK
from sae.objectives.l0 import L0
from sae.parallel import collectives
from sae.parallel.mesh import Shape
from sae.selection import Selection
from sae.selection.mutual_choice import MutualChoice
from sae.stream.batch import ActivationBatch, TextBatch
from sae.stream.exchange import Exchange
from sae.training.config import ActivationConfig, CoderConfig, TextConfig, TrainConfig
from sae.training.dealing import units, wanted
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.step import Batch
from sae.training.traffic import traffic
from sae.training.trainer import CoderTrainer, Schedule

LANES, STEPS, DEAD_AFTER = 8, 3, 1
SHAPES = [Shape(data=3), Shape(latents=3), Shape(data=2, latents=2)]
RULES = [name for name in cases() if name.startswith("rule ")]


@pytest.fixture
def counted(monkeypatch):
    """Returns what was handed to collectives, (function, bytes), by group."""
    moved = defaultdict(list)
    for name, place, at in (("all_reduce", 0, 2), ("all_gather", 1, 2), ("all_to_all_single", 1, 9)):
        original = getattr(collectives.dist, name)

        def count(*given, name=name, place=place, at=at, original=original, **named):
            group = given[at] if len(given) > at else named.get("group")
            moved[id(group)].append((name, given[place].nbytes))
            return original(*given, **named)

        monkeypatch.setattr(collectives.dist, name, count)
    return moved


def config_of(case: Case) -> TrainConfig:
    coder = case.config()
    return TrainConfig(
        tokens=STEPS * TOKENS,
        batch_tokens=TOKENS,
        micro_batch_tokens=2 * case.micro if case.reads != (OF_MODEL,) else 32,
        text=TextConfig(context_length=CONTEXT),
        activations=ActivationConfig(lanes=LANES, dtype="float32"),
        coder=coder,
    )


def plan_of(case: Case, name: str = "coder") -> CoderPlan:
    coder = case.config()
    terms = {**coder.objectives, "auxk": AuxK(k=min(8, coder.d_sae))}
    terms |= {"l0": L0(target_l0=2)} if "l0" in terms else {}
    return CoderPlan(name, case.reads, case.writes, replace(coder, objectives=terms), OptimConfig(**case.optim))


def data_decides(plan: CoderPlan) -> set[str]:
    """Returns along which axes what moves, or in how many parts, depends on more than whether latents are dead."""
    kind = Selection.get_choice_name(type(plan.spec.rule))
    cut = {"latents"} if kind in ("jumprelu", "relu", "gated") else set()  # in how many tiles
    return cut | {"mutual_choice": {"team"}, "feature_choice": {"data", "latents", "team"}}.get(kind, set())


def drawn(mesh, config, plans) -> ActivationBatch:
    """Returns what a rank has read of a batch."""
    count, of = units(config)
    kept = of - config.activations.skip_positions if config.needs_rows else of
    n = len(mesh.lanes.of(count)) * kept
    sites = {name: torch.randn(n, site.width) for plan in plans for name, site in plan.sites.items()}
    graded = {s.name: torch.randn(n, s.width) for p in plans if p.spec.selection.gradient_loss for s in p.writes}
    text = None
    if config.needs_rows:
        keep = torch.ones(n // kept, CONTEXT, dtype=torch.bool)
        keep[:, : of - kept] = False
        text = TextBatch(torch.zeros(keep.shape, dtype=torch.int32), keep)
    return ActivationBatch(sites, graded, torch.zeros(n, dtype=torch.int64), text)


def batch_of(plan, batch: ActivationBatch, config, data: int) -> Batch:
    x, y = (torch.cat([batch.activations[s.name] for s in side], 1) for side in (plan.reads, plan.writes))
    graded = plan.spec.selection.gradient_loss
    gradients = torch.cat([batch.gradients[s.name] for s in plan.writes], 1) if graded else None
    if batch.text is None:
        return Batch(x, y, gradients)
    rows = max(1, -(-config.micro_batch_tokens // data) // CONTEXT)
    sizes = tuple(map(len, x.split(rows * (CONTEXT - config.activations.skip_positions))))
    splice = lambda i, made: Spliced(torch.zeros(len(made), 4), made[:, :4], torch.zeros(len(made)).long())  # noqa: E731
    return Batch(x, y, gradients, sizes, splice)


def steps_of(shape: Shape, config, plans, groups, counted):
    """Returns what every rank hands over at each step, (function, bytes), by axis."""

    def work(mesh):
        own = [plan for plan, group in zip(plans, groups, strict=True) if group == mesh.sites.rank]
        trainers = []
        for plan in own:
            whole = SparseCoder(plan.spec)
            initialize(whole, torch.zeros(plan.d_out), 0)
            micro = -(-config.micro_batch_tokens // shape.data)
            schedule = Schedule(STEPS, DEAD_AFTER, 0 if config.needs_rows else micro)
            coder = part_of(whole, mesh.latents)
            trainers.append(CoderTrainer(coder, plan.coder.objectives, plan.optim, schedule, mesh))
        exchange = Exchange(mesh, wanted(plans, groups, shape.sites), *units(config))
        axes = {name: getattr(mesh, name).group for name in ("sites", "data", "latents", "team")}
        found = []
        for step in range(STEPS):
            for group in axes.values():
                counted[id(group)].clear() if group else None
            batch = exchange(drawn(mesh, config, plans))
            for plan, trainer in zip(own, trainers, strict=True):
                trainer.step(batch_of(plan, batch, config, shape.data), step)
            found.append({name: list(counted[id(group)]) for name, group in axes.items() if group})
            for trainer in trainers:
                trainer.settle()  # a step that is repeated would count twice
        return found

    return together(shape, work)


def check(label, shape, config, plans, counted, groups=None):
    groups = groups or [0] * len(plans)
    said = traffic(config, plans, shape, groups).by_axis
    loose = set().union(*map(data_decides, plans))
    every = steps_of(shape, config, plans, groups, counted)
    for step, ranks in enumerate(zip(*every, strict=True)):
        for axis in ("sites", "data", "latents", "team"):
            moved = [rank.get(axis, []) for rank in ranks]
            sent = max(sum(size for _, size in own) for own in moved)
            count = max(map(len, moved))
            if axis not in said:
                assert not count, (label, shape, axis)
                continue
            assert said[axis].sent[0] <= sent <= said[axis].sent[1], (label, shape, axis, step, sent, said[axis])
            ends = said[axis].collectives
            assert ends[0] <= count <= ends[1], (label, shape, axis, step, count, said[axis])
            if axis not in loose and step != 1:  # at first no latent may be dead, at last all
                end = 0 if step == 0 else 1
                assert sent == said[axis].sent[end], (label, shape, axis, step, sent, count, said[axis])
                assert count == ends[end], (label, shape, axis, step, said[axis])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rule_moves_what_is_said(shape, counted):
    for name in RULES:
        check(name, shape, config_of(cases()[name]), [plan_of(cases()[name])], counted)


@pytest.mark.slow
def test_every_term_and_kind_of_coder_moves_what_is_said(counted):
    for name in cases().keys() - set(RULES):
        check(name, Shape(data=2, latents=2), config_of(cases()[name]), [plan_of(cases()[name])], counted)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(sites=2), Shape(sites=2, data=2), Shape(sites=2, data=2, latents=2)], ids=str)
def test_groups_along_sites_move_what_is_said(shape, counted):
    chosen = ["rule topk", "transcoder gradient_topk", "crosscoder topk"]
    plans = [plan_of(cases()[name], name) for name in chosen]
    check("sites", shape, config_of(cases()["rule topk"]), plans, counted, [0, 1, 1])


def test_what_mutual_choice_agrees_on_does_not_grow():
    said = set()
    for k, tokens, shape in ((1, 64, Shape(data=2)), (99, 8192, Shape(data=2)), (9, 640, Shape(data=5, latents=8))):
        coder = CoderConfig(d_sae=4096, selection=MutualChoice(k))
        config = TrainConfig(batch_tokens=tokens, coder=coder)
        case = Case()
        moved = traffic(config, [CoderPlan("c", case.reads, case.writes, coder, OptimConfig())], shape)
        said.add(moved.by_axis["team"].sent)
    assert said == {(2 * 2**19 + 8, 5 * 2**19 + 8)}
