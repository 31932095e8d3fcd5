"""One layer of a language model, by what it computes: what it adds to the residual stream, and where.

    resid_pre + attn_out = resid_mid      resid_mid + mlp_out = resid_post

Within 1e-5 of each token's norm, or within the rounding of the model's precision where that is coarser. In layers whose
attention and MLP read the same stream resid_pre + attn_out + mlp_out = resid_post, and there is no resid_mid.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sae.base.sums import in_float64
from sae.lm.calls import Call
from sae.lm.heads import attention_in, heads_at, width_in
from sae.lm.norms import norm_of

TOLERANCE = 1e-5
SHARE = 0.1  # of what is added: a sum that misses by more has not been told from the sum without it

Place = tuple[str, str]
"""A module's path and its side."""


class Unserved(Exception):
    """Says why a layer has no place of a name."""


def off(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest error of a token's vector, relative to the norm of the one wanted."""
    found, wanted = in_float64(found), in_float64(wanted)
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)).max())


def tolerance(x: Tensor) -> float:
    """Returns how far a sum in the precision of x may be off."""
    return max(TOLERANCE, torch.finfo(x.dtype).eps)


def factor(base: Tensor, part: Tensor, total: Tensor) -> float | None:
    """Returns the number a with base + a part = total: 1.0 where nothing scales what is added; None if there is none.

    The sum is made in the model's own precision, in which the right tensor is off by nothing, even where what it adds
    is hardly more than the rounding.
    """
    if not base.shape == part.shape == total.shape:
        return None
    bound = min(tolerance(total), SHARE * off(base, total))
    if bound == 0:
        return None
    if off(base + part, total) <= bound:
        return 1.0
    added, wanted = in_float64(total) - in_float64(base), in_float64(part)
    a = float((added * wanted).sum() / wanted.square().sum().clamp_min(1e-30))
    return a if off(base + a * part, total) <= bound else None


@dataclass(frozen=True)
class Added:
    """What a layer adds to the stream."""

    path: str
    """The module that makes it."""
    tensor: Tensor
    factor: float
    """How many times it is added."""


class Layer:
    """One layer's modules in a pass over a few tokens, and which of them make what it adds to the stream.

    In a layer of the kind "sequential" the second reads what the first has added to, in one of the kind "parallel" both
    read the stream; in one that is "normed" a norm follows each sum. Of one that is "half" known what attention adds is
    found and no more; all else is "other".
    """

    def __init__(self, model: nn.Module, path: str, calls: dict[str, Call]) -> None:
        self.model, self.path = model, path
        self.pre: Tensor = calls[path].given  # type: ignore[assignment]
        self.post: Tensor = calls[path].made  # type: ignore[assignment]
        within = {p: call for p, call in calls.items() if p.startswith(f"{path}.") and call.runs == 1}
        self.calls = dict(sorted(within.items(), key=lambda item: item[0].count(".")))  # the outermost first
        self.made = self._distinct("output")
        self.mid: Place | None = None
        self.between: Tensor | None = None  # what the MLP, or the norm before it, reads
        self.first: Added | None = None
        self.second: Added | None = None
        self.kind: Literal["sequential", "parallel", "normed", "half", "other"] = "other"
        found = next(itertools.chain(self._sequential(), self._parallel(), self._normed(), self._half()), None)
        if found:
            self.kind, self.mid, self.between, self.first, self.second = found

    def _distinct(self, side: str) -> dict[str, Tensor]:
        """Returns the tensors on one side of the modules that are as wide as the stream, by the outermost module."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, call in self.calls.items():
            x = call.made if side == "output" else call.given
            if x is not None and x.shape == self.pre.shape and x.dtype == self.pre.dtype:
                found.setdefault(id(x), (path, x))
        return dict(found.values())

    def _added(self, base: Tensor, total: Tensor) -> Added | None:
        """Returns what was added to one tensor to get another; rather what is added as it is."""
        found = [Added(path, x, a) for path, x in self.made.items() if (a := factor(base, x, total)) is not None]
        return next((each for each in found if each.factor == 1), found[0] if found else None)

    def _sequential(self) -> Iterator[tuple]:
        for side in ("output", "input"):  # an output, where there is one, is all that the rest of the model reads
            for path, mid in self._distinct(side).items():
                first, second = self._added(self.pre, mid), self._added(mid, self.post)
                if first and second:
                    yield "sequential", (path, side), mid, first, second

    def _parallel(self) -> Iterator[tuple]:
        for (a, x), (m, y) in itertools.permutations(self.made.items(), 2):
            if self.is_attention(a) and not self.is_attention(m):
                sums = ((self.pre + x) + y, (x + y) + self.pre, (self.pre + y) + x)
                bound = min(tolerance(x), *(SHARE * off(self.post - part, self.post) for part in (x, y)))
                if bound > 0 and min(off(total, self.post) for total in sums) <= bound:
                    yield "parallel", None, self.pre, Added(a, x, 1.0), Added(m, y, 1.0)

    def _normed(self) -> Iterator[tuple]:
        norms = [call for path, call in self.calls.items() if self.is_norm(path)]
        last = [norm for norm in norms if norm.made is self.post]
        for norm, end in itertools.product(norms, last):
            first = self._added(self.pre, norm.given)  # type: ignore[arg-type]
            second = norm.made is not None and self._added(norm.made, end.given)  # type: ignore[arg-type]
            if first and second:
                yield "normed", None, norm.made, first, second

    def _half(self) -> Iterator[tuple]:
        for path, mid in self._distinct("input").items():
            first = self._added(self.pre, mid) if self.is_norm(path) and mid is not self.post else None
            if first and self.is_attention(first.path):
                yield "half", (path, "input"), mid, first, None

    def is_norm(self, path: str) -> bool:
        """Returns whether a module takes vectors of the stream's width and is a norm by what it computes."""
        given = self.calls[path].given
        module = self.model.get_submodule(path)
        return given is not None and norm_of(module, given.shape[-1]) is not None

    def is_attention(self, path: str) -> bool:
        """Returns whether a module of this layer is attention's, or a norm of what attention makes."""
        if attention_in(self.model, path, self.path):
            return True
        given = self.calls[path].given
        makers = (p for p, call in self.calls.items() if call.made is not None and call.made is given)
        return self.is_norm(path) and any(attention_in(self.model, p, self.path) for p in makers)

    # ---- names

    def resid_mid(self) -> Place:
        """Returns where the stream is read after attention and before the MLP."""
        if self.kind == "parallel":
            raise Unserved("attention and MLP of this model read the same stream; nothing lies between them")
        if self.mid is None:
            raise Unserved(self._unexplained())
        return self.mid

    def attn_out(self) -> Place:
        """Returns what attention adds to the stream."""
        return self._exactly(self.first, True)

    def mlp_out(self) -> Place:
        """Returns what the MLP adds to the stream."""
        return self._exactly(self.second, False)

    def _exactly(self, added: Added | None, attention: bool) -> Place:
        if added is None or self.kind == "normed":
            raise Unserved(self._unexplained())
        if self.is_attention(added.path) != attention:
            raise Unserved(f"what {added.path} adds to the stream is {'not attention' if attention else 'attention'}'s")
        if added.factor != 1:
            raise Unserved(f"this model adds {added.factor:.4g} times what {added.path} makes; write that path")
        return added.path, "output"

    def _unexplained(self) -> str:
        if self.kind == "normed":
            paths = f"{self.first.path} and {self.second.path}"  # type: ignore[union-attr]
            return f"a norm follows each sum in {self.path}, so that what {paths} make does not add up to its output"
        if self.mid:
            return f"no module makes what is added to {':'.join(self.mid)} in {self.path}; write the module path"
        alone = self._added(self.pre, self.post)
        if alone:
            return f"all that {self.path} adds to the stream is what {alone.path} makes; write that path"
        return (
            f"no tensor x in {self.path} is its input plus what a module makes, with x plus what another makes its "
            f"output (within {tolerance(self.pre):.0e}); write the module path"
        )

    def _norms(self, base: Tensor | None) -> list[str]:
        """Returns the norms that read a tensor, and whose output something else reads."""
        return [
            p
            for p, call in self.calls.items()
            if base is not None and call.given is base and self.is_norm(p) and self._readers(call.made)
        ]

    def _readers(self, x: Tensor | None) -> list[str]:
        """Returns the modules, other than norms, that are given a tensor."""
        return [p for p, call in self.calls.items() if x is not None and call.given is x and not self.is_norm(p)]

    def norm_before(self, attention: bool) -> Place:
        """Returns what the norm before attention, or before the MLP, makes before its gain."""
        norms = self._norms(self.pre if attention else self.between)
        if self.kind == "parallel":
            to_attention = [p for p in norms if any(map(self.is_attention, self._readers(self.calls[p].made)))]
            norms = to_attention if attention else [p for p in norms if p not in to_attention]
        if not norms:
            raise Unserved(f"no norm of {self.path} reads the stream before {'attention' if attention else 'the MLP'}")
        return norms[0], "normalized"

    def z(self) -> Place:
        """Returns what attention's output projection is given, all heads side by side."""
        for path, call in self.calls.items():
            x = call.made
            if call.given is None or x is None or not heads_at(self.model, path, "input"):
                continue
            above = (self.calls.get(path[:n]) for n in range(len(self.path) + 1, len(path)) if path[n] == ".")
            if (
                any(parent is not None and parent.made is x for parent in above)
                or any(factor(self.pre, x, total) for total in self._distinct("input").values())
                or (self.first and self.first.tensor is x)
            ):
                return path, "input"
        raise Unserved(f"no output projection of attention heads was found in {self.path}; write the module path")

    def mlp(self, what: str) -> Place:
        """Returns the MLP's input ("in"), the input of its last linear map ("post"), or its own output ("out")."""
        if self.second is None or self.is_attention(self.second.path):
            raise Unserved(self._unexplained())
        made = self.second.tensor
        if self.is_norm(self.second.path):  # which follows the MLP
            made = self.calls[self.second.path].given
        places = [p for p, call in self.calls.items() if call.made is made and not self.is_norm(p)]
        if what == "post":
            places = [p for p in places if width_in(self.model.get_submodule(p)) and self.calls[p].given is not None]
        elif what == "in":
            normed = [self.calls[p].made for p in self._norms(self.between)] or [self.between]
            places = [p for x in normed for p in self._readers(x) if not self.is_attention(p)]
        if not places:
            raise Unserved(f"no module of {self.path} is given what this name means; write the module path")
        return places[0], "output" if what == "out" else "input"


NAMES = {
    "hook_resid_pre": lambda layer: (layer.path, "input"),
    "hook_attn_out": Layer.attn_out,
    "hook_resid_mid": Layer.resid_mid,
    "hook_mlp_in": Layer.resid_mid,
    "hook_mlp_out": Layer.mlp_out,
    "hook_resid_post": lambda layer: (layer.path, "output"),
    "ln1.hook_normalized": lambda layer: layer.norm_before(attention=True),
    "ln2.hook_normalized": lambda layer: layer.norm_before(attention=False),
    "attn.hook_z": Layer.z,
    "mlp.hook_in": lambda layer: layer.mlp("in"),
    "mlp.hook_post": lambda layer: layer.mlp("post"),
    "mlp.hook_out": lambda layer: layer.mlp("out"),
}
"""Of a TransformerLens name below "blocks.L.": its place in a layer, or `Unserved`."""
