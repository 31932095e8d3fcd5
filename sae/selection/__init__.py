"""Selection: which latents of a token stay. One rule a file; a rule is a frozen config that builds its working form.

A rule looks at scores, the pre-activations [n, d_sae], and returns a *support*: (row offsets, latent ids), ids
ascending within a row. The support contains the nonzeros; entries of value 0 may carry gradient and never count as
fired. Ties go to the lower index, so a support is a function of the scores alone.

What others ask about a rule, the rule answers: what competes, what it reads, what a fold does to it. Where a rule says
nothing, the answer is the careful one: all codes are computed where some would do, and a fold is refused.

`infer` looks at each token by itself and is used everywhere outside training. In training a per-token rule is asked by
`choose`; a batch-wide rule is given all tokens of its rank by way of `candidates`, `reduce` and `keep`, and agrees with
other ranks by the moment's mesh, so that micro-batches and ranks choose as one. What a rule remembers between
steps lies in a dict of tensors that is checkpointed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.plugins import Plugin, discover, names
from sae.kernels.codes import Entries, Support
from sae.kernels.scaling import alike, times
from sae.parallel.cut import NO_LATENTS, Cut
from sae.parallel.ledger import Ledger
from sae.parallel.mesh import ALONE, Mesh

if TYPE_CHECKING:
    from typing import Self


NEVER = torch.finfo(torch.float32).max  # threshold of a latent that never fires


@dataclass
class Moment:
    """What a rule knows of a training step beside the scores."""

    progress: float
    """Share of the steps that are done."""
    n_tokens: int
    """Tokens of the whole batch, over all micro-batches and ranks."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the rule remembers; it may put new tensors under the same names."""
    careful: bool = False
    """Whether the step is repeated because a fixed buffer was too small: now nothing may be left out."""
    failed: Tensor | None = None
    """Set by a rule that has left something out: a truth value on its device. The step is then not applied."""
    noted: Any = None
    """What a rule has noted of the tiles looked at so far; it is forgotten with the moment."""
    mesh: Mesh = ALONE
    """The ranks that choose together: along data they have other tokens, along latents other latents."""
    cut: Cut = NO_LATENTS
    """Which of the group's latents this rank holds; scores, states and entries are of those."""
    n_own: int = 0
    """Tokens of the batch that this rank has looked at, once a batch-wide rule is asked what it keeps."""


class Factors(NamedTuple):
    """By what a fold multiplies latents."""

    latents: Float[Tensor, "d_sae"]
    """Pre-activations and values; a unit of a latent then has that much less of an effect."""
    compared: tuple[Float[Tensor, "m"], ...]
    """What selection compares, for each group of latents that it chooses among."""
    by_norm: bool
    """Whether what it compares is pre-activations times decoder norms."""

    @property
    def one(self) -> float:
        """Returns the factor of all latents, 0 where they have different ones."""
        return float(self.latents[0]) if alike(self.latents) else 0.0

    @property
    def even(self) -> bool:
        """Returns whether what is compared with each other is multiplied by one factor."""
        return all(map(alike, self.compared))


Owned = tuple["Selection", dict[str, Tensor], tuple[float, ...]]
"""A rule with its tensors and its calibration in a coder."""


@dataclass(frozen=True)
class Selection(Plugin):
    """A sparsifying rule. Subclasses add their constants as fields and say how they choose."""

    batch_wide: ClassVar[bool] = False
    """Whether one token's latents depend on the other tokens of the batch, in training."""
    over: ClassVar[str] = "token"
    """Among what a latent must win to be kept by `infer`: "nothing", its "group" of neighbors, or the whole "token".
    Groups lie within a block of latents, also where blocks share a budget."""
    signed: ClassVar[bool] = False
    """Whether codes may be negative: they are then pre-activations as they are."""
    gated: ClassVar[bool] = False
    """Whether pre-activations say only whether a latent fires, and tensors of the rule how much."""
    keeps_positive: ClassVar[bool] = False
    """Whether it keeps all that is positive, so that nothing but a penalty makes codes sparse."""
    trains_thresholds: ClassVar[bool] = False
    """Whether it has thresholds, of raw pre-activations, to which `active` gives a gradient."""
    reads_bias: ClassVar[bool] = False
    """Whether it looks at `b_enc` beside its own tensors."""
    units: ClassVar[Mapping[str, str] | None] = None
    """What its tensors and its `calibration` are measured in, where not in numbers: "scores" (what selection compares)
    or "latents". None: it is not known what a factor does to the rule, so that no fold may multiply its latents."""
    beside_scores: ClassVar[float] = 0.25
    """How many tensors as large as its scores it holds beside them while it chooses, at the most, in float32."""
    fires_at_first: ClassVar[float] = 0.5
    """Share of all entries that a fresh coder keeps, of a rule that has no k."""
    encoder: ClassVar[str | None] = None
    """The encoder that chooses in its place and looks here for constants, if it is one that `pursues`."""
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

    @property
    def gradient_loss(self) -> str | None:
        """Returns the loss whose gradient at the sites takes part in the choice in training; None: no gradient does."""
        return None

    @property
    def looks_at_gradients(self) -> bool:
        """Returns whether `infer` is to be given scores that a gradient has augmented."""
        return False

    @property
    def augments_alone(self) -> bool:
        """Returns whether `augment`, outside training, looks at each latent by itself."""
        return False

    def with_gradients(self, looks: bool) -> "Self":
        """Returns the rule as it is where it looks at gradients at inference, or does not, if it has that choice."""
        return self

    @property
    def implied_l0(self) -> int | None:
        """Returns how many latents of a token fire, at most or on average, if the constants say it."""
        return None

    def l0_at_first(self, m: float) -> float:
        """Returns how many of m latents are expected to fire for a token at the first step."""
        return float(self.implied_l0 or self.fires_at_first * m)

    def competes(self, calibrated: bool) -> str:
        """Returns `over`, or what is so once training has found a calibration."""
        return self.over

    def best_of(self, m: int) -> "tuple[int, Budget] | None":
        """Returns (size, rule) if `infer` keeps of each `size` neighbors among m latents the k best, as `rule` does.

        They can then be found in parts. None: that is not so, or not known.
        """
        return None

    def unit(self, m: int) -> int | None:
        """Returns how many neighbors among m latents must be on one rank where ranks hold different latents.

        None: the rule cannot choose over several ranks, or it is not known how.
        """
        if self.batch_wide:
            return None
        return {"nothing": 1, "token": 1 if self.best_of(m) else None}.get(self.over)

    def within(self, held: int, m: int) -> "Self":
        """Returns the rule as a rank asks it that holds so many of m latents."""
        return self

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
        return kept if self.signed else torch.relu(kept)

    def active(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns 1 where a latent fires, else 0, with a gradient to the thresholds of a rule that trains them."""
        raise NotImplementedError

    def rescaled(self, own: dict[str, Tensor], calibration: tuple[float, ...], by: Factors) -> Owned:
        """Returns what chooses the same latents, with values in the new units, where a fold multiplies them.

        ConfigError if nothing does.
        """
        name, units, factor = self.get_choice_name(type(self)), self.units, torch.cat(by.compared)
        if units is None:
            if alike(torch.cat([by.latents, factor]), 1.0):
                return self, own, calibration
            raise ConfigError(f"selection: {name!r} is not a rule of which it is known what a factor does to it")
        one_cut = "calibration" in units and calibration
        if not by.even and (one_cut or self.competes(bool(calibration)) != "nothing"):
            way = "fold_decoder_norm first" if by.by_norm else "select_by_decoder_norm or one factor for all"
            raise ConfigError(
                f"selection: {name!r} compares latents with each other, and this fold would multiply them by "
                f"{float(factor.min()):.4g} to {float(factor.max()):.4g}; it needs {way}"
            )
        if one_cut:
            calibration = tuple(cut * float(part[0]) for cut, part in zip(calibration, by.compared, strict=True))
        return self, self.in_units(own, by.latents, factor), calibration

    def in_units(
        self, own: dict[str, Tensor], latents: Float[Tensor, "d_sae"], scores: Float[Tensor, "d_sae"]
    ) -> dict[str, Tensor]:
        """Returns the rule's tensors where latents and scores are so many times as large; NEVER stays finite."""
        factors = {"latents": latents, "scores": scores}
        found = {name: factors[unit] for name, unit in (self.units or {}).items() if name in own}
        return own | {name: times(own[name], factor).clamp_max(NEVER) for name, factor in found.items()}

    def moved(self, own: dict[str, Tensor], change: Float[Tensor, "d_sae"]) -> dict[str, Tensor]:
        """Returns the rule's tensors where b_enc takes up `change` and pre-activations stay; ConfigError if unknown."""
        if self.reads_bias:
            name = self.get_choice_name(type(self))
            raise ConfigError(f"selection: {name!r} looks at b_enc, and it is not known what a fold of it does to that")
        return own

    def start(self, m: int) -> dict[str, Tensor]:
        """Returns what the rule remembers of m latents before the first step."""
        return {}

    def choose(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor], moment: Moment) -> Support:
        """Returns the support in training, for a per-token rule."""
        return self.infer(scores, tensors)

    def cuts(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "m_or_1"] | None:
        """Returns what a score must exceed to be kept in training, for each latent or one for all.

        None: `choose` says what is kept. With cuts, the host need not know how many entries there are.
        """
        return None

    def augment(
        self, scores: Float[Tensor, "n m"], effect: Float[Tensor, "n m"], moment: Moment
    ) -> Float[Tensor, "n m"]:
        """Returns the scores of a rule that has a `gradient_loss`; `effect` is |<g, W_dec_i>|.

        Outside training the moment's state is a number `calibration`, 0 if none was found.
        """
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
        """Returns the kept ones of the candidates of this rank, which are sorted by (token, latent).

        Other ranks have others, of which they are asked at the same time: by `moment.mesh` they agree.
        """
        raise NotImplementedError

    def moves(self, ledger: Ledger, cut: Cut) -> None:
        """Writes down what it moves in a step among latents that are so cut, beside lists of the k best of a token."""

    def gathered(self, n: int, batch: int, m: int) -> tuple[int, int]:
        """Returns how many entries, at the least and the most, a rank tells others of n tokens and m latents."""
        return 0, 0

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

    ranks: ClassVar[bool] = False
    """Whether `infer`, before any calibration, keeps the k best of whatever latents it is given."""
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

    @property
    def implied_l0(self) -> int | None:
        """Returns k."""
        return self.k

    def l0_at_first(self, m: float) -> float:
        """Returns the k of the first step."""
        return float(self.k_at(0.0))

    def best_of(self, m: int) -> "tuple[int, Budget] | None":
        """Returns all m and the rule itself, if it `ranks`."""
        return (m, self) if self.ranks else None

    def rank(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Returns that of which the largest are kept, of a rule that `ranks`."""
        return scores

    @property
    def ks(self) -> tuple[int, int]:
        """Returns the least and the most that k is in training."""
        both = (self.k, self.k_start or self.k)
        return min(both), max(both)

    def k_at(self, progress: float) -> int:
        """Returns k when a share of the steps is done."""
        if not self.k_start:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * min(1.0, progress / self.anneal_share))


def trainable() -> dict[str, type[Selection]]:
    """Returns {name: class} of the rules that training can use; the others are of coders that are loaded."""
    return {name: kind for name, kind in names(Selection).items() if kind.encoder is None}


discover(__name__, __path__)
