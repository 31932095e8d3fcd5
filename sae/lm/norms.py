"""Norms, told by what they compute: x / rms(x), the same of x without its mean, each times a gain plus a bias."""

import copy
import itertools
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from sae.base.seeding import generator
from sae.lm.placement import without_hooks

DRAWS = 8
TOLERANCE = 1e-4  # of what a norm makes in float32, against its formula
USUAL = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps, 0.0)  # where a module does not say its epsilon


@dataclass(frozen=True)
class Norm:
    """What a norm does before its gain and bias."""

    centers: bool
    """Whether it takes the mean over the components out."""
    eps: float
    """What keeps it from dividing by zero,"""
    outside: bool = False
    """added to the root rather than to the mean square below it."""

    def __call__(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        """Returns x, in float32, without its mean if it centers, over its root mean square."""
        x = x.float()
        if self.centers:
            x = x - x.mean(-1, keepdim=True)
        square = x.square().mean(-1, keepdim=True)
        return x / (square.sqrt() + self.eps) if self.outside else x * torch.rsqrt(square + self.eps)

    def spread(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape 1"]:
        """Returns what x is divided by."""
        x = x.float()
        square = (x - x.mean(-1, keepdim=True) if self.centers else x).square().mean(-1, keepdim=True)
        return square.sqrt() + self.eps if self.outside else (square + self.eps).sqrt()


_known: WeakKeyDictionary[nn.Module, dict[int, Norm | None]] = WeakKeyDictionary()


def norm_of(module: nn.Module, width: int) -> Norm | None:
    """Returns which norm a module computes on vectors of a width; None if it is no layer norm or RMS norm.

    It is tried on random vectors, of unit size and of a size at which its epsilon counts.
    """
    known = _known.setdefault(module, {})
    if width not in known:
        with unset_fake_temporarily():
            known[width] = _measured(module, width)
    return known[width]


@torch.no_grad()
def _measured(module: nn.Module, width: int) -> Norm | None:
    parameters = list(module.parameters())
    if width < 2 or any(parameter.dim() > 1 for parameter in parameters):  # what mixes the components is no norm
        return None
    draws = torch.randn(DRAWS, width, generator=generator(0, "norm"))
    x = (draws + torch.randn(DRAWS, 1, generator=generator(1, "norm"))) * torch.logspace(-1, 1, DRAWS)[:, None]
    try:
        kept = module._parameters
        if any(isinstance(parameter, FakeTensor) for parameter in parameters):  # no weights yet: any show its kind
            own = copy.copy(module)
            own._parameters = {n: x if x is None else nn.Parameter(torch.ones(x.shape)) for n, x in kept.items()}
        else:
            own = without_hooks(module)
        norm = own.float().cpu().forward  # past the hooks that led here
        made, small, none = norm(x), norm(x * 1e-4), norm(torch.zeros_like(x))
    except OSError:  # of weights that are kept on a disk: no answer
        raise
    except Exception:  # whatever it is, it does not take a vector per token alone
        return None
    if any(not isinstance(y, Tensor) or y.shape != x.shape for y in (made, small, none)):
        return None
    said = [v for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, float)]
    for centers, outside, eps in itertools.product((False, True), (False, True), (*said, *USUAL)):
        kind = Norm(centers, eps, outside)
        ideal, bias = kind(x), none.nan_to_num()
        gain = ((made - bias) * ideal).sum(0) / ideal.square().sum(0).clamp_min(1e-30)
        if not gain.any() and not bias.any():
            return None
        if _close(gain * ideal + bias, made) and _close(gain * kind(x * 1e-4) + bias, small):
            return kind
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether each row is the other's within the tolerance."""
    return bool(((found - wanted).norm(dim=-1) <= TOLERANCE * wanted.norm(dim=-1)).all())
