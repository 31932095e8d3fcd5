"""Gradient TopK, the selection of gradient SAEs: latents that matter downstream win (Olmo 2024, arXiv 2411.10397).

    s_i = h_i (1 + beta |<g, W_dec_i>| / c)   where h_i > 0,   s_i = h_i elsewhere
    a   = ReLU(h) at the k largest s

g is the gradient, at the activation itself and with no coder spliced in, of the summed next-token cross-entropy. So
h_i |<g, W_dec_i>| is a first-order estimate of what the loss changes by when the latent is taken away. With beta = 0
this is TopK bit for bit; the score only picks, so no gradient flows through it, and values stay unmodified.

The paper's public text gives the term beta * z * |W_dec^T g|. Read here: the sum with z, values left as they are, and
division by a mean, which frees beta of units. `gradient_norm` says which: `batch`, the mean of |<g, W_dec_i>| over
tokens and latents in the step before (there is none in step 0, which is TopK); `token`, the mean over a token's
latents; `none`, 1.

A token's gradient is that of all later losses: it knows the future. So inference is `plain` (beta = 0) by default;
with `gradient`, the coder must be given g, and figures obtained that way are labeled.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.sums import in_float64
from sae.parallel import collectives
from sae.parallel.cut import Cut
from sae.parallel.ledger import Ledger
from sae.selection import Factors, Moment, Owned, Selection
from sae.selection.topk import TopK

if TYPE_CHECKING:
    from typing import Self

LOSSES = ("next_token", "sampled")
NORMS = ("batch", "token", "none")
INFERENCE = ("plain", "gradient")


@Selection.register_subclass("gradient_topk")
@dataclass(frozen=True)
class GradientTopK(TopK):
    """Keeps the k largest of every token, by a score that counts what a latent does to the loss."""

    beside_scores: ClassVar[float] = 4.1
    beta: float = 0.5
    """Weight of the gradient term in the score."""
    loss: str = "next_token"
    """The loss: next_token, the cross-entropy of the text; sampled, that of a token drawn from the model itself."""
    gradient_norm: str = "batch"
    """What |<g, W_dec_i>| is divided by: its mean over the previous batch, over the token, or none."""
    inference: str = "plain"
    """plain: outside training no gradient is used; gradient: it is, and must be given."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if a constant is out of range."""
        super().validate(d_sae)
        if not self.beta >= 0:
            raise ConfigError(f"selection.beta: {self.beta} must be at least 0")
        for name, allowed in (("loss", LOSSES), ("gradient_norm", NORMS), ("inference", INFERENCE)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"selection.{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def gradient_loss(self) -> str | None:
        """Returns the loss."""
        return self.loss

    @property
    def looks_at_gradients(self) -> bool:
        """Returns whether `inference` says so."""
        return self.inference == "gradient"

    @property
    def augments_alone(self) -> bool:
        """Returns whether it is not a mean over the token's latents that effects are divided by."""
        return self.gradient_norm != "token"

    def with_gradients(self, looks: bool) -> "Self":
        """Returns the rule of either inference."""
        return replace(self, inference="gradient" if looks else "plain")

    def rescaled(self, own: dict[str, Tensor], calibration: tuple[float, ...], by: Factors) -> Owned:
        """Returns the rule for effects |<g, W_dec_i>| that are divided by the factors of latents."""
        if by.one:
            beta = self.beta * by.one if self.gradient_norm == "none" else self.beta
            changed = replace(self, beta=beta)
            return super(GradientTopK, changed).rescaled(own, tuple(c / by.one for c in calibration), by)
        if self.looks_at_gradients:
            raise ConfigError("selection.inference: 'gradient' looks at |<g, W_dec_i>|, which this fold would change")
        return super().rescaled(own, (), by)  # the mean effect was of other decoders

    def start(self, m: int) -> dict[str, Tensor]:
        """Returns the mean effect of the previous step, of which there is none."""
        return {f"effect.{name}": torch.zeros((), dtype=torch.float64) for name in ("mean", "sum", "count")}

    def begin(self, moment: Moment) -> None:
        """Begins to sum up the step's effects."""
        moment.state.update({f"effect.{n}": torch.zeros_like(moment.state["effect.mean"]) for n in ("sum", "count")})

    def augment(
        self, scores: Float[Tensor, "n m"], effect: Float[Tensor, "n m"], moment: Moment
    ) -> Float[Tensor, "n m"]:
        """Returns s; in training, counts the effects. Ranks with other latents of the same tokens all ask."""
        state, latents = moment.state, moment.mesh.latents
        if "effect.sum" in state:
            state["effect.sum"] = state["effect.sum"] + in_float64(effect).sum()
            state["effect.count"] = state["effect.count"] + effect.numel()
        if self.gradient_norm == "token":
            mean = effect.mean(1, keepdim=True)
            if latents.moves:
                mean = collectives.total(effect.sum(1, keepdim=True), latents) / moment.cut.latents
            effect = effect / mean.clamp_min(1e-30)
        elif self.gradient_norm == "batch":
            mean = state["effect.mean" if "effect.mean" in state else "calibration"].to(effect)
            effect = torch.where(mean == 0, 0.0, effect / mean)
        return torch.where(scores > 0, scores * (1 + self.beta * effect), scores)

    def finish(self, moment: Moment) -> None:
        """Takes the step's mean effect over to the next step."""
        state = moment.state
        both = collectives.total(torch.stack([state["effect.sum"], state["effect.count"]]), moment.mesh.team)
        state["effect.sum"], state["effect.count"] = both  # what is saved is the same on every rank
        state["effect.mean"] = both[0] / both[1].clamp_min(1)

    def moves(self, ledger: Ledger, cut: Cut) -> None:
        """Writes down the sum of the effects and their number; those of every token, if that is divided by."""
        ledger.summed("team", torch.zeros(2, dtype=torch.float64).nbytes)
        if self.gradient_norm == "token":
            ledger.summed("latents", ledger.tokens * torch.float32.itemsize, times=ledger.tiles)

    def calibration(self, state: dict[str, Tensor]) -> Tensor | None:
        """Returns the mean effect of the last step."""
        return state["effect.mean"]

    def report(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Returns the mean of |<g, W_dec_i>|."""
        return {"gradient_effect": float(state["effect.mean"])}
