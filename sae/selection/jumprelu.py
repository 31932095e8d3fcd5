"""JumpReLU: a latent fires above a threshold of its own, which is trained (Rajamanoharan 2024, arXiv 2407.14435).

    a_i = h_i H(h_i - theta_i),   theta_i >= 0

H is the step function. Its gradient is estimated with a rectangle K(u) = 1[|u| < 1/2] of width eps (equations 11, 12):

    d a_i / d theta_i = -(theta_i / eps) K((h_i - theta_i) / eps)
    d H / d theta_i   = -(1 / eps) K((h_i - theta_i) / eps)          (the term `l0`; h_i gets none of it)

So the support in training also holds the entries just below their threshold, with the value 0. The paper starts at
theta = 0.001 with eps = 0.001, for inputs of unit mean square norm and a hundred thousand steps or more. Here inputs
should have normalization `scalar`, which makes that norm d. A threshold moves by no more than the learning rate in a
step, so a short run stays near its start, which is therefore measured in the spread of the untrained pre-activations.
Thresholds are float32 whatever the precision of the coder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels.codes import Support, where
from sae.selection import Selection


@Selection.register_subclass("jumprelu")
@dataclass(frozen=True)
class JumpReLU(Selection):
    """Keeps what lies above the latent's own trained threshold."""

    over: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("l0",),)
    trains_thresholds: ClassVar[bool] = True
    fires_at_first: ClassVar[float] = 0.3  # near its threshold
    units: ClassVar[Mapping[str, str] | None] = {"threshold": "scores"}
    threshold_start: float = 1.5
    """Threshold of every latent before the first step, in standard deviations of the pre-activations then."""
    bandwidth: float = 0.5
    """Width eps of the rectangle that gives thresholds their gradient."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError unless both constants are positive."""
        for name in ("threshold_start", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"selection.{name}: {getattr(self, name)} must be positive")

    def parameters(self, d_sae: int, spread: float = 1.0) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns the thresholds."""
        return {"threshold": torch.full((d_sae,), self.threshold_start * spread)}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the entries above their threshold."""
        return where(scores > tensors["threshold"].clamp_min(0))

    def cuts(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "m_or_1"] | None:
        """Returns what lies so near below the thresholds that it carries gradient to them."""
        return tensors["threshold"].clamp_min(0) - self.bandwidth / 2

    def activate(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns what lies above its threshold, and 0 elsewhere."""
        return _Step.apply(kept, tensors["threshold"].index_select(0, ids), self.bandwidth, True)  # type: ignore[no-any-return]

    def active(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns H(h - theta)."""
        return _Step.apply(kept, tensors["threshold"].index_select(0, ids), self.bandwidth, False)  # type: ignore[no-any-return]


class _Step(torch.autograd.Function):
    """H(h - theta), whose gradient goes to theta alone, or h times it, with the straight-through gradient to theta."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, threshold: Tensor, bandwidth: float, jumps: bool) -> Tensor:
        threshold = threshold.clamp_min(0)
        ctx.save_for_backward(kept, threshold)
        ctx.bandwidth, ctx.jumps = bandwidth, jumps
        return torch.where(kept > threshold, kept, torch.zeros_like(kept)) if jumps else (kept > threshold).to(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (grad,), (kept, threshold) = grads, ctx.saved_tensors
        near = -grad * ((kept - threshold).abs() < ctx.bandwidth / 2).to(grad)
        if not ctx.jumps:
            return None, near / ctx.bandwidth, None, None
        return grad * (kept > threshold), near * threshold / ctx.bandwidth, None, None
