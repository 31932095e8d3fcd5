"""N(x): what is done to an activation before the encoder and undone after the decoder."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError, nearest

Undo = tuple[Tensor | float, Tensor | float]
KINDS = ("none", "scalar", "layer_norm", "l2", "center")


@dataclass(frozen=True)
class Normalization:
    """One input normalization. With it, the coder's weights and its training loss live in the normalized space."""

    kind: str = "none"
    """none | scalar (x * scale, so that E|x|^2 = d) | layer_norm (per token) | l2 (per token, to norm sqrt(d)) | center
    (per token, the mean over its components is taken out, as in a model whose writing weights are centered)."""
    scale: float = 1.0
    """The factor of kind "scalar"; measured on training tokens when training starts from 1."""
    eps: float = 1e-5
    """Added to the per-token standard deviation or norm."""
    unbiased: bool = True
    """Whether layer_norm's standard deviation divides by d - 1 (as OpenAI's and SAELens' coders do) or by d."""
    undo_eps: bool = True
    """Whether eps is also part of what undoes it; in OpenAI's and SAELens' coders it is not."""
    undone: bool = True
    """Whether layer_norm and l2 are undone at all; of SAELens' transcoders, whose output is of another site, they are
    not."""

    @property
    def per_token(self) -> bool:
        """Returns whether it is undone with numbers measured at the token itself."""
        return self.undone and self.kind in ("layer_norm", "l2", "center")

    def validate(self, field: str) -> None:
        """Raises ConfigError naming `field` if a value is out of range."""
        if self.kind not in KINDS:
            raise ConfigError(
                f"{field}.kind: {self.kind!r} is not one of {', '.join(KINDS)}.{nearest(self.kind, KINDS)}"
            )
        if not self.undone and self.kind not in ("layer_norm", "l2"):
            raise ConfigError(f"{field}.undone: false is for layer_norm and l2, not for {self.kind!r}")
        if not self.scale > 0:
            raise ConfigError(f"{field}.scale: {self.scale} must be positive")

    def apply(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Undo]:
        """Returns (N(x), (shift, spread)): x = N(x) * spread + shift, but for eps where `undo_eps` is false."""
        if self.kind == "none":
            return x, (0.0, 1.0)
        if self.kind == "scalar":
            return x * self.scale, (0.0, 1.0 / self.scale)
        if self.kind == "center":
            shift = x.mean(-1, keepdim=True)
            return x - shift, (shift, 1.0)
        if self.kind == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            spread = x.std(-1, keepdim=True, correction=int(self.unbiased))
        else:
            shift = torch.zeros_like(x[..., :1])
            spread = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        divisor = (spread + self.eps).clamp_min(torch.finfo(x.dtype).tiny)  # eps may be 0
        return (x - shift) / divisor, (shift, divisor if self.undo_eps else spread)


def by_site(
    normalization: Normalization, sites: list[tuple[int, float]], x: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n d"], Undo]:
    """Returns (N(x), (shift, spread)) of the columns of several sites side by side, each normalized by itself.

    `sites` holds (width, factor beside the common scale) of each.
    """
    own = [replace(normalization, scale=normalization.scale * scale) for _, scale in sites] or [normalization]
    if len(own) == 1 or normalization.kind == "none":
        return own[0].apply(x)
    columns = x.split([width for width, _ in sites], dim=1)
    parts = [part.apply(column) for part, column in zip(own, columns, strict=True)]
    shift, spread = (
        torch.cat([torch.as_tensor(how[i]).to(y).expand_as(y) for y, how in parts], dim=1) for i in range(2)
    )
    return torch.cat([y for y, _ in parts], dim=1), (shift, spread)


def undo(y: Float[Tensor, "n d"], how: Undo) -> Float[Tensor, "n d"]:
    """Returns N^-1(y) for the (shift, spread) that `Normalization.apply` returned with the input."""
    shift, spread = how
    return y * spread + shift
