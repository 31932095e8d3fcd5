"""From what a coder writes to the logits of the next token, past the later layers: which way that is in a model.

    stream <- factor norm(W x)        logits = W_U (gain * M stream / spread) + bias

What is written reaches the stream as it is from layers, attention and MLPs; through W_O or W_out from their inner
vectors; through its gain where a norm follows (Gemma 2); times what the model multiplies by (Granite). M subtracts the
mean where the final norm does. Whatever lies before a nonlinearity has no such way.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.lm.guesses import ATTENTION, ATTENTION_OUT, LAYER_LISTS, MLP_OUT, MLPS
from sae.lm.placement import present, without_hooks
from sae.lm.residual import residual_of
from sae.lm.site import Site, tagged_columns

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")

BEGIN, ATTENDED, MIDDLE, FED, END = range(5)  # the order within a layer
IN_STREAM = (BEGIN, MIDDLE, END)
AFTER = {ATTENDED: MIDDLE, FED: END}


class NoPath(Exception):
    """Says why what a coder writes does not reach the logits in a way that can be told token by token."""


class Path(NamedTuple):
    """How a site reaches the residual stream."""

    layer: int
    place: int
    """In the order within a layer; in `IN_STREAM` where the site is the stream itself."""
    projection: nn.Module | None = None
    """What is in between, if anything: first this,"""
    norm: str = ""
    """then the norm of this path,"""
    factor: float = 1.0
    """then what the model multiplies by."""


@dataclass(frozen=True)
class Ways:
    """How all that a coder writes reaches the residual stream of a model."""

    model: nn.Module
    parts: tuple[tuple[Path, slice], ...]
    """In the order of the model, each with its columns of what is written."""

    @property
    def norms(self) -> list[str]:
        """Returns the norms in between: how much one scales what passes it is known at a token only."""
        return list(dict.fromkeys(path.norm for path, _ in self.parts if path.norm))

    def __call__(
        self, x: Float[Tensor, "m d_out"], spreads: dict[str, Float[Tensor, "m 1"]] | None = None
    ) -> Float[Tensor, "m d_model"]:
        """Returns directions at all written sites as they are in the stream; norms divide by `spreads`, else by 1.

        What several sites write adds up, save that a site in the stream itself holds all that was written before it.
        """
        stream: Tensor | None = None
        for path, columns in self.parts:
            part = x[:, columns]
            part = part if path.projection is None else through_projection(path.projection, part)
            if path.norm:
                part = through_norm(self.model.get_submodule(path.norm), part)
                part = part / spreads[path.norm].to(part) if spreads else part
            part = part * path.factor
            stream = part if stream is None or path.place in IN_STREAM else stream + part
        assert stream is not None
        return stream


def ways_of(model: nn.Module, coder: SparseCoder) -> Ways:
    """Returns how what a coder writes reaches the stream; NoPath if it does not do so linearly.

    Of a coder of two models, what it writes to the first one.
    """
    sites = tagged_columns(coder.spec.writes, "")
    if not sites:
        raise NoPath("the coder writes nothing to this model")
    found = [(_path(model, site), columns) for site, columns in sites]
    return Ways(model, tuple(sorted(found, key=lambda part: part[0][:2])))


def final_norm(model: nn.Module) -> str:
    """Returns the path of the norm before the unembedding; NoPath if there is none of a known name."""
    above = _layers(model).rpartition(".")[0]
    parent = model.get_submodule(above)
    name = next((name for name in FINAL_NORMS if isinstance(getattr(parent, name, None), nn.Module)), None)
    if name is None:
        raise NoPath("no final norm was found in the model")
    return f"{above}.{name}".removeprefix(".")


class Gain(NamedTuple):
    """What a norm makes of small changes of its input while its scale stands, but for that scale."""

    factor: Float[Tensor, "d"]
    centers: bool

    def __call__(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Returns changes of the output for those of the input, times what the norm divides by."""
        x = x.to(self.factor)
        return self.factor * (x - x.mean(1, keepdim=True) if self.centers else x)


@torch.no_grad()
def gain_of(norm: nn.Module, d: int) -> Gain:
    """Returns the centering and gain of a norm of width d.

    Both are read off what it makes of a vector of mean 0, so that no kind of norm need be known (Gemma's gain is
    1 + its weight).
    """
    norm = without_hooks(norm).float()
    probe = torch.ones(d, device=next((p.device for p in norm.parameters()), torch.device("cpu")))
    probe[::2] = -1
    if d % 2:
        probe[-3:] = probe.new_tensor([-1.0, -1.0, 2.0])
    up, down, shifted = norm(probe), norm(-probe), norm(probe + 1)
    gain = (up - down) / (2 * probe) * probe.square().mean().sqrt()
    return Gain(gain, torch.allclose(up, shifted, atol=1e-3))


def through_norm(norm: nn.Module, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Returns what a norm makes of small changes x of its input while its scale stands: centering and gain."""
    gain = gain_of(norm, x.shape[1])
    return gain(x)


@torch.no_grad()
def through_projection(projection: nn.Module, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d_model"]:
    """Returns x times the weight of a projection, whichever way round it keeps it."""
    with present(projection):
        x = x.to(next(projection.parameters()))
    return (projection(x) - projection(torch.zeros_like(x[:1]))).float()


def _path(model: nn.Module, site: Site) -> Path:
    prefix = _layers(model)
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)(?:\.(.+))?", site.hook) if prefix else None
    unknown = NoPath(f"what is written at {site.name} does not reach the residual stream linearly")
    if match is None:
        raise unknown
    number, name, is_input = int(match[1]), match[2] or "", site.side == "input"
    if site.side == "normalized":
        raise unknown
    if not name:
        return Path(number, BEGIN if is_input else END)
    layer = model.get_submodule(f"{prefix}.{number}")
    module, norms = layer.get_submodule(name), _norms_after(layer)
    factor = float(getattr(getattr(model, "config", None), "residual_multiplier", None) or 1.0)
    parts = ((ATTENDED, ATTENTION, ATTENTION_OUT), (FED, MLPS, MLP_OUT))
    for (place, owners, projections), after in zip(parts, norms, strict=True):
        norm = f"{prefix}.{number}.{after}" if after else ""
        if name == after:
            return Path(number, place, None, norm if is_input else "", factor)
        if name in owners and not is_input:
            within = _adds_within(model, number, place, site.hook)
            return Path(number, AFTER[place] if within else place, None, norm, 1.0 if within else factor)
        if name in [f"{owner}.{projection}" for owner in owners for projection in projections]:
            return Path(number, place, module if is_input else None, norm, factor)
    if is_input and "." not in name and _is_norm(module):  # it reads the stream
        first = next(name for name, child in layer.named_children() if _is_norm(child))
        return Path(number, BEGIN if name == first else MIDDLE)
    raise unknown


def _adds_within(model: nn.Module, number: int, place: int, owner: str) -> bool:
    """Whether a module adds what it makes to the stream itself, as BLOOM's do: its output is the stream."""
    try:
        written = residual_of(model).places[number, "hook_attn_out" if place == ATTENDED else "hook_mlp_out"]
    except (ConfigError, KeyError):
        return False
    return isinstance(written, tuple) and written[0].startswith(f"{owner}.")


def _is_norm(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 1


def _norms_after(layer: nn.Module) -> tuple[str, str]:
    """Returns the norm between attention and the stream, and that between the MLP and it; "" where there is none."""
    names = {name for name, _ in layer.named_children()}
    attention = "post_self_attn_layernorm" if "post_self_attn_layernorm" in names else ""
    if "post_feedforward_layernorm" in names:  # Gemma 2 and 3, OLMo 2; elsewhere it is the norm before the MLP
        attention = "post_attention_layernorm"
    mlp = next((name for name in ("post_feedforward_layernorm", "post_mlp_layernorm") if name in names), "")
    return attention, mlp


def _layers(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    return next((name for name in LAYER_LISTS if isinstance(modules.get(name), nn.ModuleList)), "")
