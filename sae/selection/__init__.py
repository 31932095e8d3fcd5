"""Selection: which latents of a token stay. One rule a file; a rule is a frozen config that builds its working form.

A rule looks at scores, the pre-activations [n, d_sae], and returns a *support*: (row offsets, latent ids), ids
ascending within a row. The support contains the nonzeros; entries of value 0 may carry gradient and never count as
fired. Ties go to the lower index, so a support is a function of the scores alone.

`infer` looks at each token by itself and is used everywhere outside training. In training a per-token rule is asked by
`choose`; a batch-wide rule is given all tokens of the batch by way of `candidates`, `reduce` and `keep`, so that
micro-batches and ranks choose as one. What a rule remembers between steps lies in a dict of tensors that is
checkpointed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.plugins import Plugin, discover, names
from sae.kernels.codes import Entries, Support

if TYPE_CHECKING:
    from typing import Self


@dataclass
class Moment:
    """What a rule knows of a training step beside the scores."""

    progress: float
    """Share of the steps that are done."""
    n_tokens: int
    """Tokens of the whole batch, over all micro-batches and ranks."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the rule remembers; it may put new tensors under the same names."""


@dataclass(frozen=True)
class Selection(Plugin):
    """A sparsifying rule. Subclasses add their constants as fields and say how they choose."""

    batch_wide: ClassVar[bool] = False
    """Whether one token's latents depend on the other tokens of the batch, in training."""
    needs_gradient: ClassVar[bool] = False
    """Whether the gradient of a loss at the site takes part in the choice, in training."""
    signed: ClassVar[bool] = False
    """Whether codes may be negative."""
    pursues: ClassVar[bool] = False
    """Whether it chooses by what earlier choices leave of the input (`pursue`), not by pre-activations."""
    needs: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Loss terms without which the rule does not train or its codes are not sparse: one of each group must be there."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if a constant does not fit a coder of `d_sae` latents."""

    def shared_by(self, blocks: int) -> "Self":
        """Returns the rule with the budget of `blocks` blocks of latents together."""
        return self

    def parameters(self, d_sae: int, spread: float = 1.0) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns the trained tensors of the rule, one value a latent, as they start.

        `spread` is the standard deviation of the pre-activations of an untrained coder.
        """
        return {}

    def buffers(self, d_sae: int) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns the calibrated tensors of the rule, one value a latent, as they start."""
        return {}

    def competes(self, calibrated: bool) -> bool:
        """Returns whether `infer` lets the m latents that it is given compete for a token's budget."""
        return False

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the support by the per-token rule.

        `tensors` holds the coder's per-latent tensors for these m latents, and a number `calibration` if training
        found one.
        """
        raise NotImplementedError

    def activate(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns the latents' values from their pre-activations at the support."""
        return torch.relu(kept)

    def pursue(self, y: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values, for a rule that `pursues`, of inputs and the decoder."""
        raise NotImplementedError

    def start(self, m: int) -> dict[str, Tensor]:
        """Returns what the rule remembers of m latents before the first step."""
        return {}

    def choose(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor], moment: Moment) -> Support:
        """Returns the support in training, for a per-token rule."""
        return self.infer(scores, tensors)

    def augment(
        self, scores: Float[Tensor, "n m"], effect: Float[Tensor, "n m"], state: dict[str, Tensor]
    ) -> Float[Tensor, "n m"]:
        """Returns the scores of a rule that `needs_gradient`; `effect` is |<g, W_dec_i>|."""
        raise NotImplementedError

    def begin(self, moment: Moment) -> None:
        """Is called before the batch is looked at."""

    def candidates(self, scores: Float[Tensor, "n m"], first_token: int, moment: Moment) -> Entries:
        """Returns the entries of some tokens among which those lie that a batch-wide rule may keep."""
        raise NotImplementedError

    def reduce(self, entries: Entries, moment: Moment) -> Entries:
        """Returns the candidates among entries, sorted by (token, latent), of some of the batch's tokens."""
        raise NotImplementedError

    def keep(self, entries: Entries, moment: Moment) -> Entries:
        """Returns the kept entries, given the candidates of all tokens of the batch, sorted by (token, latent)."""
        raise NotImplementedError

    def finish(self, moment: Moment) -> None:
        """Is called, on every rank, after a step was applied."""

    def calibration(self, state: dict[str, Tensor]) -> Tensor | None:
        """Returns what `infer` needs: a number, one for each latent (the buffer `threshold`), or nothing."""
        return None

    def report(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Returns what is worth logging of what the rule remembers."""
        return {}


@dataclass(frozen=True)
class Budget(Selection):
    """A rule that keeps a given number of latents per token, or per token on average."""

    k: int = 32
    """Latents kept per token; of a batch-wide rule, on average."""
    k_start: int = 0
    """k at the first step, from which it goes linearly to `k`; 0 starts at `k`."""
    anneal_share: float = 0.25
    """Share of the steps in which k goes from `k_start` to `k`."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError unless 1 <= k <= d_sae."""
        for name, value in (("k", self.k), ("k_start", self.k_start or self.k)):
            if not 1 <= value <= d_sae:
                raise ConfigError(f"selection.{name}: {value} is not between 1 and d_sae = {d_sae}")
        if not 0 < self.anneal_share <= 1:
            raise ConfigError(f"selection.anneal_share: {self.anneal_share} is not above 0 and at most 1")

    def shared_by(self, blocks: int) -> "Self":
        """Returns the rule with k for all blocks together."""
        return replace(self, k=self.k * blocks, k_start=self.k_start * blocks)

    def competes(self, calibrated: bool) -> bool:
        """Returns True: k are kept of all."""
        return True

    def k_at(self, progress: float) -> int:
        """Returns k when a share of the steps is done."""
        if not self.k_start:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * min(1.0, progress / self.anneal_share))


def trainable() -> dict[str, type[Selection]]:
    """Returns {name: class} of the rules that training can use; the others are of coders that are loaded."""
    return {name: kind for name, kind in names(Selection).items() if not kind.pursues}


discover(__name__, __path__)
