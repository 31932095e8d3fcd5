"""Whole steps of a trainer by some path of kernels, against the reference in float64: what that takes.

Weights and activations are such that float32 takes every score exactly and that many are equal, so that no rounding
changes a choice; in float64 they may also be any. Rules, loss terms, encoders and optimizers are those registered.
"""

from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from rigs.kernel_contract import INTERPRETED
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.encoders import Encoder
from sae.kernels import dispatch, reference, segmented
from sae.lm.site import Site
from sae.objectives import Objective, Spliced
from sae.objectives.reconstruction import Reconstruction
from sae.optimizers import Optimizer
from sae.selection import Selection, trainable
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gradient_topk import NORMS, GradientTopK
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.training import choosing
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D, K = 12, 4
M, N, STEPS = (36, 12, 3) if INTERPRETED else (48, 40, 5)
MICRO = 7
FIRST, PLANNED = 8, 20  # steps are in the middle of a run: penalties are there, the rate is the peak
DEAD = slice(M - 8, M - 2)  # latents that fire nowhere
ALIKE = slice(0, None, 4), slice(1, None, 4)  # latents of which each is another's twin, and tokens
RULES = {name: kind for name, kind in trainable().items() if name == kind.get_choice_name(kind)}  # no second names
TERMS = names(Objective)
ENCODERS = {name: kind for name, kind in names(Encoder).items() if kind.trainable and not kind.pursues}
SPARSE, DENSE = 1.0, -1.0  # shares of entries from which on codes are multiplied densely: none if there is room, all
IN_FLOAT32 = 2e-6  # how near a path comes in float32 with every choice the same; 9e-7 was seen
Seen = list[dict[str, Tensor]]
"""By name, what each step has computed and left."""


@dataclass(frozen=True)
class Case:
    """A coder, and how it is trained."""

    rule: Selection
    terms: dict[str, Objective] = field(default_factory=dict)
    """Beside the reconstruction and what the rule needs."""
    spec: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    product: torch.dtype | None = None
    exact: bool = True
    """Whether float32 takes the scores of activations on a grid exactly."""
    within: float = 1e-13
    """How near another path comes in float64, as a share of the largest number of each tensor; 2e-15 was seen."""

    def trainer(self, dtype: torch.dtype, micro: int) -> CoderTrainer:
        usual = {"d_in": D, "d_out": D, "d_sae": M, "selection": self.rule, "variance": float(D)}
        needed = {group[0]: TERMS[group[0]]() for group in self.rule.needs}
        schedule = Schedule(PLANNED, 3 * N // 2, micro, self.product)
        optim = {"lr": 1e-2, "eps": 1e-3, "clip_norm": 0.0}  # with a smaller eps the rounding of a 0 would count
        terms = {"reconstruction": Reconstruction(), **needed, **self.terms}
        coder = SparseCoder(CoderSpec(**{**usual, **self.spec})).to(dtype)
        return CoderTrainer(coder, terms, OptimConfig(**{**optim, **self.optim}), schedule)


def _rule(kind: Any) -> Selection:
    return kind(k=K) if "k" in kind.__dataclass_fields__ else kind()


def _made_for(term: Objective) -> Selection:
    """Returns TopK, or the first rule that a term goes with."""
    for rule in (TopK(K), *map(_rule, RULES.values())):
        try:
            term.validate(M, rule)
        except ConfigError:
            continue
        return rule
    raise AssertionError(f"{term} goes with no rule")


def _sites(side: str, *widths: int, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> tuple[Site, ...]:
    return tuple(Site(f"{side}.{i}", width=w, weight=s) for i, (w, s) in enumerate(zip(widths, weights, strict=False)))


LAYERS = {"reads": _sites("read", 4, 4, 4), "writes": _sites("write", 4, 4, 4), "cross_layer": True, "pre_bias": "own"}
TWO = _sites("both", 4, 8, weights=(4.0, 0.25))
CASES = {
    **{f"rule {name}": Case(_rule(kind)) for name, kind in RULES.items()},
    **{f"term {name}": Case(_made_for(kind()), {name: kind()}) for name, kind in TERMS.items()},
    **{f"encoder {name}": Case(ReLU(), spec={"encoder": name}) for name in ENCODERS},
    **{f"optimizer {name}": Case(TopK(K), optim={"kind": name}) for name in names(Optimizer)},
    **{f"effects by {norm}": Case(GradientTopK(K, gradient_norm=norm)) for norm in NORMS},
    "k that grows": Case(TopK(K, k_start=9)),
    "more latents than entries": Case(FeatureChoice(1)),
    "transcoder with a skip": Case(
        TopK(K),
        spec={"d_out": 9, "reads": _sites("a", D), "writes": _sites("b", 9), "pre_bias": "own", "skip": True},
    ),
    "no bias before": Case(TopK(K), spec={"pre_bias": "none"}),
    "own bias before": Case(TopK(K), spec={"pre_bias": "own"}),
    "compared by decoder norm": Case(TopK(K), spec={"select_by_decoder_norm": True, "decoder_norm": "free"}),
    "the batch compared by decoder norm": Case(
        MutualChoice(K), spec={"select_by_decoder_norm": True, "decoder_norm": "free"}
    ),
    "weighted sites": Case(TopK(K), {"auxk": TERMS["auxk"]()}, {"reads": TWO, "writes": TWO}),
    "cross-layer": Case(TopK(K), {"matryoshka": TERMS["matryoshka"](prefixes=(0.25, 1.0))}, {**LAYERS, "skip": True}),
    "cross-layer with one budget": Case(MutualChoice(2), spec={**LAYERS, "budget": "shared"}),
    "scaled": Case(TopK(K), spec={"normalization": Normalization("scalar", 0.5)}),
    "normalized by token": Case(TopK(K), spec={"normalization": Normalization("layer_norm")}, exact=False),
    "averaged": Case(TopK(K), optim={"ema": 0.9}),
    "clipped": Case(TopK(K), optim={"clip_norm": 0.01}, within=5e-7),  # PyTorch's Adam takes that factor in float32
    "product in bfloat16": Case(TopK(K), product=torch.bfloat16),
}


def steps(
    case: Case, path: tuple[str, ModuleType], dtype: torch.dtype, *, micro: int = 0, tied: bool = True, share: float
) -> Seen:
    """Returns what some steps by a path have computed; where `tied`, the weights are drawn anew before each.

    `share` is that of entries from which on codes are multiplied densely.
    """
    made, seen = case.trainer(dtype, micro), []
    update = made.updater.update

    def watched(*given: Any) -> None:
        """Tells the gradients, which an update may overwrite."""
        seen[-1] |= {f"gradient.{name}": gradient.clone() for name, gradient in made.updater.gradients.items()}
        if made.updater.unit:
            seen[-1] |= {f"along.{i}": along.clone() for i, along in enumerate(made.updater.along)}
        update(*given)

    setattr(made.updater, "update", watched)  # noqa: B010
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_chosen", path)
        for module in (dispatch, choosing):
            patch.setattr(module, "DENSE_SHARE", share)
        patch.setattr(choosing, "TILE_TOKENS", N // 3 + 1)  # several tiles a step
        patch.setattr(choosing, "TILE_ENTRIES", {"cpu": (1, 2**25)})
        patch.setattr(segmented, "ROWS", 20)
        for step in range(STEPS):
            if tied or not step:
                _draw_weights(made, step, tied)
            seen.append({})
            figures = made.step(_batch(made, step, micro, dtype, tied), FIRST + step)
            figures.check()
            tensors, values = made.state()
            beside = {name: values[name] for name in ("residual_variance", "tokens_seen")}
            told = {**beside, **values["multipliers"], **figures}  # type: ignore[dict-item]
            seen[-1] |= tensors | {f"told.{name}": torch.tensor(value) for name, value in told.items()}
            seen[-1] |= {f"rounded.{name}": value.clone() for name, value in made.chooser.rounded.items()}
            seen[-1] = {name: value.clone() for name, value in seen[-1].items()}
    assert all(made.active_steps.values()), "a loss term that is 0 shows nothing"
    return seen


@cache
def right(name: str, micro: int, tied: bool) -> Seen:
    """Returns what the reference computes in float64, with no dense product but the encoder's."""
    return steps(CASES[name], ("reference", reference), torch.float64, micro=micro, tied=tied, share=SPARSE)


def assert_near(found: Seen, expected: Seen, within: float) -> None:
    """Fails unless the largest difference of every tensor is such a share of its largest number."""
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            largest = float(value.abs().max())
            apart = float((one[name].double() - value.double()).abs().max())
            cut_off = INTERPRETED and name.startswith("rounded.")  # Triton's interpreter does not round to bfloat16
            assert apart <= max(within, 2**-7 * cut_off) * max(1e-30, largest), (step, name, apart, largest)


def _draw(shape: tuple[int, ...], seed: int, tied: bool, most: float = 1.0, parts: int = 8) -> Tensor:
    """Returns numbers up to about `most`: any, or whole multiples of 1 / parts."""
    draw = torch.Generator().manual_seed(seed)
    if not tied:
        return torch.randn(shape, generator=draw, dtype=torch.float64) * most / 2
    most_parts = int(most * parts)
    return torch.randint(-most_parts, most_parts + 1, shape, generator=draw).double() / parts


@torch.no_grad()
def _draw_weights(made: CoderTrainer, seed: int, tied: bool) -> None:
    """Gives a coder weights: where `tied`, some latents are twins; some fire nowhere."""
    coder, rule = made.coder, made.coder.spec.selection
    for number, (name, parameter) in enumerate(coder.named_parameters()):
        start = rule.parameters(M).get(name, torch.zeros(())).double()
        new = start + _draw(tuple(parameter.shape), 100 * seed + number, tied, 1.0 if parameter.dim() > 1 else 0.5)
        if name == "W_dec":
            new = _of_norm_one(new) if tied else torch.nn.functional.normalize(new, dim=1)
            if coder.spec.decoder_norm == "free":
                new *= 2.0 ** (torch.arange(len(new)) % 3 - 1)[:, None]
        if len(new) == M and tied:
            new[ALIKE[1]] = new[ALIKE[0]]
        if name == "b_enc":
            new[DEAD] = -64.0
        parameter.copy_(new)
    for name, rounded in made.chooser.rounded.items():
        rounded.copy_(coder.get_parameter(name))


def _of_norm_one(rows: Tensor) -> Tensor:
    """Returns rows whose norm takes no rounding: four halves each, with the signs of the largest numbers."""
    places = rows.abs().topk(4, dim=1).indices
    halves = torch.where(rows.gather(1, places) < 0, -0.5, 0.5).to(rows)
    return torch.zeros_like(rows).scatter_(1, places, halves)


def _batch(made: CoderTrainer, seed: int, micro: int, dtype: torch.dtype, tied: bool) -> Batch:
    """Returns a batch with gradients and a model of one layer to splice into; where `tied`, some tokens are twins."""
    spec = made.coder.spec
    x, gradients = (_draw((N, width), part + seed, tied, 2.0, 4) for part, width in ((1000, D), (2000, spec.d_out)))
    for rows in (x, gradients) if tied else ():  # with rounding, where in a product a row stands would count
        rows[ALIKE[1]] = rows[ALIKE[0]]
    target = x if spec.is_autoencoder else _draw((N, spec.d_out), 3000 + seed, tied, 2.0, 4)
    x, target, gradients = (rows.to(dtype) for rows in (x, target, gradients))
    if not any(term.needs_rows for term in made.objectives.values()):
        return Batch(x, target, gradients)
    head = torch.randn(spec.d_out, 11, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    parts, following = target.split(micro or N), torch.arange(N).remainder(11).split(micro or N)
    spliced = lambda i, out: Spliced(parts[i] @ head, out @ head, following[i])  # noqa: E731
    return Batch(x, target, gradients, tuple(map(len, parts)), spliced)
