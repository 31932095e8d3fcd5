"""Objectives: the terms of the training loss. One term a file, each a frozen config that computes itself.

Every term is a sum over tokens divided by numbers fixed before the step (the tokens of the whole batch, a variance
measured earlier), so that micro-batches and ranks add up to the same loss and gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.plugins import Plugin, discover
from sae.coder.coder import Choice, Pass, SparseCoder
from sae.coder.spec import CoderSpec
from sae.parallel.cut import NO_LATENTS, Cut
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@dataclass(frozen=True)
class Start:
    """What is known of the latents when a step begins."""

    dead: Bool[Tensor, "d_sae"]
    """Latents that have not fired for `dead_after_tokens` tokens."""
    density: Float[Tensor, "d_sae"]
    """Running share of the tokens at which each latent fires."""
    may_be_dead: int
    """No more latents than this are dead, of all ranks: the host knows it without waiting for the device."""
    cut: Cut = NO_LATENTS
    """Which latents of the coder this rank holds, where ranks hold parts of one: those above are of its own."""


@dataclass(frozen=True)
class Step:
    """What an objective sees of one micro-batch."""

    coder: SparseCoder
    run: Pass
    target: Float[Tensor, "n d_out"]
    """The activations to predict, in the normalized space."""
    n_tokens: int
    """Tokens of the whole batch, over all micro-batches and ranks."""
    variance: float
    """E|target - mean|^2, weighted by site, measured once before training."""
    residual_variance: Float[Tensor, ""]
    """The same of the residual at the previous step."""
    begun: Any = None
    """What the term's own `begin` returned."""
    beside: Choice | None = None
    """What the term's own `choose` has found in this micro-batch."""
    spliced: "Callable[[Float[Tensor, 'n d_out']], Spliced] | None" = None
    """Runs the language model with predictions (normalized space) in place of the activations; for end-to-end terms."""
    ran: "list[Spliced]" = field(default_factory=list)

    def through_model(self) -> "Spliced":
        """Returns what the language model says with the prediction spliced in; it is run once for all terms."""
        if self.spliced is None:
            raise ValueError("spliced: end-to-end terms need batches of whole rows, and a language model to run")
        if not self.ran:
            self.ran.append(self.spliced(self.run.prediction))
        return self.ran[0]

    def share(self, square: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns a sum of squared errors as the micro-batch's share of the fraction of variance unexplained."""
        return square / (self.n_tokens * self.variance)


@dataclass(frozen=True)
class Spliced:
    """What the language model says of the counted tokens of a micro-batch: those kept that have a next one."""

    clean: Float[Tensor, "counted vocabulary"]
    """Logits of the model as it is, without gradient."""
    patched: Float[Tensor, "counted vocabulary"]
    """Logits with the coder spliced in."""
    next_tokens: Tensor


@dataclass(frozen=True)
class Objective(Plugin):
    """One term of the loss."""

    needs_rows: ClassVar[bool] = False
    """Whether the term runs the language model, so that batches must be whole rows of text."""
    of_latents: ClassVar[bool | None] = None
    """Whether the term is a sum over latents, of which ranks that hold parts of a coder have each their own; False: it
    is of outputs, which all of them have. None: it is not known, so that no coder with the term can be cut."""
    weight: float = 1.0
    """Factor of the term."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError if a constant does not fit a coder of `d_sae` latents in so many blocks."""

    def factor(self, progress: float, multiplier: Float[Tensor, ""]) -> Float[Tensor, ""] | float:
        """Returns the weight when a share of the steps is done; `multiplier` is what `adapted` has come to."""
        return self.weight

    def adapted(self, multiplier: Float[Tensor, ""], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the multiplier of the next step, given the L0 of this one; it starts at 1. Both are float64."""
        return multiplier

    def report(self, density: Float[Tensor, "d_sae"], dead: Bool[Tensor, "d_sae"]) -> dict[str, float]:
        """Returns what else is worth logging, given how often each latent fires and which are dead."""
        return {}

    def begin(self, start: Start) -> Any:
        """Returns what the term needs to know of all latents in a step; `choose` and `loss` are given it."""
        return None

    def entries(self, spec: CoderSpec) -> int:
        """Returns how many entries of a token `choose` finds at the most, for the estimate of memory."""
        return 0

    def choose(self, coder: SparseCoder, scores: Float[Tensor, "n d_sae"], begun: Any) -> Choice | None:
        """Returns entries that the term looks at beside those that the rule chose, of some tokens; None: none.

        `scores` are all pre-activations, without gradient, of which nothing else is kept.
        """
        return None

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down what the term moves in a step beside its own value, of a coder that may be a part of one."""

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the term for this micro-batch, before its weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sparsity(Objective):
    """A penalty on activity: fixed, or steered so that the coder has the L0 that was asked for.

    Coders of different rules can so be compared at one L0.
    """

    of_latents: ClassVar[bool | None] = True
    target_l0: float = 0.0
    """L0 that the penalty steers to; 0 leaves the weight as it is."""
    warmup_share: float = 0.1
    """Share of the steps in which the penalty rises linearly from 0."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError if a constant is out of range."""
        name = Objective.get_choice_name(type(self))
        if not 0 <= self.target_l0 <= d_sae:
            raise ConfigError(f"objectives.{name}.target_l0: {self.target_l0} is not between 0 and d_sae = {d_sae}")
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(f"objectives.{name}.warmup_share: {self.warmup_share} is not between 0 and 1")

    def factor(self, progress: float, multiplier: Float[Tensor, ""]) -> Float[Tensor, ""] | float:
        """Returns the weight, risen and steered."""
        rise = min(1.0, progress / self.warmup_share) if self.warmup_share else 1.0
        return self.weight * rise * multiplier

    def excess(self, l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns L0 / target - 1, held between -1 and 1; a dense start would else count for too much."""
        return (l0 / self.target_l0 - 1).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Shrinking(Sparsity):
    """A penalty on the sizes of codes.

    With `target_l0`, the weight is multiplied at every step by exp(adapt_rate (L0 / target - 1)): the integral
    controller of a dual ascent, under which a penalty never becomes a reward.
    """

    adapt_rate: float = 0.02
    """Largest change of the penalty's logarithm in one step."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError if a constant is out of range."""
        super().validate(d_sae, selection, n_blocks)
        if not self.adapt_rate > 0:
            name = Objective.get_choice_name(type(self))
            raise ConfigError(f"objectives.{name}.adapt_rate: {self.adapt_rate} must be positive")

    def adapted(self, multiplier: Float[Tensor, ""], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns a larger multiplier if L0 is above the target, a smaller one if below."""
        return multiplier * (self.adapt_rate * self.excess(l0)).exp() if self.target_l0 else multiplier


def zero(step: Step) -> Float[Tensor, ""]:
    """Returns an exact zero for a term that does not apply at this step."""
    return torch.zeros((), device=step.target.device, dtype=step.target.dtype)


def check_cut(terms: Mapping[str, Objective]) -> None:
    """Raises ConfigError if a term does not say what it is where ranks hold parts of a coder."""
    for term in terms.values():
        if term.of_latents is None:
            name = Objective.get_choice_name(type(term))
            raise ConfigError(f"parallel.latents: it is not known how objective {name} adds up over ranks; set it to 1")


discover(__name__, __path__)
