"""Optimization of one coder: Adam, its schedule, the decoder's norm constraint and the weight average."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder

LR_AT_WIDTH = (2e-4, 2**14)  # the law two libraries use for Adam: lr = 2e-4 / sqrt(d_sae / 2^14)


@dataclass(frozen=True)
class OptimConfig:
    """How a coder is optimized."""

    lr: float | None = None
    """Peak learning rate; none: 2e-4 / sqrt(d_sae / 2^14), Gao 2024's dependence on the width."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    eps: float = 6.25e-10
    """Adam's epsilon."""
    warmup_share: float = 0.02
    """Share of the steps in which the rate rises linearly from 0; at most 0.05."""
    decay_share: float = 0.2
    """Share of the steps, at the end, in which the rate falls linearly to 0."""
    clip_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 never."""
    ema: float = 0.0
    """Decay of the bias-corrected weight average that is evaluated and saved; 0 saves the weights themselves."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is out of range."""
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"optim.lr: {self.lr} must be positive (or left out: it then follows from the width)")
        limits = {"beta1": 1.0, "beta2": 1.0, "warmup_share": 0.05, "decay_share": 1.0, "ema": 1.0}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit or (limit == 1.0 and value == 1.0 and name != "decay_share"):
                raise ConfigError(f"optim.{name}: {value} is not between 0 and {limit}")
        if self.clip_norm < 0 or self.eps <= 0:
            name = "clip_norm" if self.clip_norm < 0 else "eps"
            raise ConfigError(f"optim.{name}: {getattr(self, name)} must be positive")

    def peak(self, d_sae: int) -> float:
        """Returns the peak learning rate of a coder with d_sae latents."""
        rate, width = LR_AT_WIDTH
        return self.lr if self.lr is not None else rate / (d_sae / width) ** 0.5

    def rate(self, d_sae: int, step: int, steps: int) -> float:
        """Returns the learning rate of step `step` (from 0) of `steps`."""
        warmup, decay = self.warmup_share * steps, self.decay_share * steps
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = min(1.0, (steps - step) / decay) if decay else 1.0
        return self.peak(d_sae) * rise * fall


def adam(coder: SparseCoder, config: OptimConfig) -> torch.optim.Adam:
    """Returns fused Adam over the coder's parameters, with its state already there so that saving is symmetric."""
    optimizer = torch.optim.Adam(
        coder.parameters(), lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    for parameter in coder.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@torch.no_grad()
def project_decoder_gradient(coder: SparseCoder) -> None:
    """Removes from each latent's decoder gradient the part along the decoder, which would only change its norm."""
    if coder.W_dec.grad is not None:
        for weight, grad in zip(coder.decoders(), coder.decoders(gradient=True), strict=True):
            square = torch.linalg.vector_norm(weight, dim=1, keepdim=True).square().clamp_min(1e-30)
            grad.addcmul_((grad * weight).sum(1, keepdim=True) / square, weight, value=-1.0)


@torch.no_grad()
def normalize_decoder(coder: SparseCoder) -> None:
    """Scales every latent's decoder to norm 1, in place; rows of zeros stay."""
    for weight in coder.decoders():
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-30))


class Average:
    """Exponential moving average of the weights, started at zero and divided by 1 - decay^t (Gao 2024, appendix A)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the weights after a step."""
        self.steps += 1
        for name, parameter in module.named_parameters():
            self.sums[name].lerp_(parameter, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """Returns the bias-corrected average; valid after the first update."""
        return {name: value / (1 - self.decay**self.steps) for name, value in self.sums.items()}
