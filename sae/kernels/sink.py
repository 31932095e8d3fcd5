"""What a step's backward passes say of the large weights, collected, so that each gradient is written once.

The gradient of W_enc and of W_dec is a sparse matrix times rows: codes' gradients times inputs, codes times errors. The
passes of a step (micro-batches, loss terms) leave their parts here instead of a dense gradient each; at the end all
parts of a weight are one product, sorted by latent once for both weights.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.sums import in_float64
from sae.kernels import dense
from sae.kernels.dispatch import densely, kernel


@dataclass
class _Part:
    """A sparse matrix whose transpose times rows is a part of the gradient."""

    offsets: Int[Tensor, "n_plus_1"]
    ids: Int[Tensor, "nnz"]
    coefficients: Float[Tensor, "nnz"]
    rows: Float[Tensor, "n d"]


@dataclass
class Gradient:
    """The gradient of one weight [m, d] as it comes together, and what adds up beside it for each row."""

    weight: Float[Tensor, "m d"]
    out: Float[Tensor, "m d"]
    """Where the gradient will be; of dense codes it is there at once."""
    bias: Float[Tensor, "m"]
    """Sum of the coefficients: of an encoder, the gradient of its bias."""
    through: Float[Tensor, "m"]
    """The same of the parts whose rows depend on a bias before the encoder."""
    along: Float[Tensor, "m"]
    """<gradient_j, weight_j>: of a decoder, what would change the norms of its rows."""
    touched: Float[Tensor, "m"]
    """How many entries of a row are not 0, in all parts; all 0 if that was not asked for."""
    tells_rows: bool
    parts: list[_Part] = field(default_factory=list)
    begun: bool = False
    """Whether `out` holds a part already."""

    def add(self, offsets: Tensor, ids: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        """Takes in a part: coefficients^T rows."""
        if self.tells_rows:
            self.touched.index_add_(0, ids, (coefficients != 0).to(self.touched))  # what fills a buffer up is 0
        if not densely(offsets, ids, self.out):
            self.parts.append(_Part(offsets, ids, coefficients, rows))
            return
        full = dense.matrix(coefficients.to(rows.dtype), offsets, ids, len(self.out))
        torch.addmm(self.out, full.T, rows, beta=int(self.begun), out=self.out)
        self.begun = True

    def of_encoder(self, offsets: Tensor, ids: Tensor, gradient: Tensor, y: Tensor, through: bool) -> None:
        """Takes in the gradient of pre-activations at a support; `through` says that y depends on a bias."""
        self.add(offsets, ids, gradient, y)
        self.bias.index_add_(0, ids, gradient)
        if through:
            self.through.index_add_(0, ids, gradient)

    def of_decoder(self, offsets: Tensor, ids: Tensor, values: Tensor, gradient: Tensor, slopes: Tensor) -> None:
        """Takes in the gradient of an output, and `slopes`, that of the codes which made it."""
        self.add(offsets, ids, values, gradient)
        self.along.index_add_(0, ids, values * slopes)

    def finish(self, sorts: dict[tuple[int, ...], tuple[Any, ...]]) -> Float[Tensor, ""]:
        """Writes the gradient and returns its sum of squares; `sorts` are what `by_latent` has made for others."""
        if not self.parts:
            if not self.begun:
                self.out.zero_()
            return in_float64(torch.linalg.vector_norm(self.out)).square()
        key = tuple(number for part in self.parts for number in (id(part.ids), id(part.offsets)))
        whole = self.parts[0] if len(self.parts) == 1 else _joined(self.parts)
        if key not in sorts:
            sorts[key] = kernel("by_latent", self.out)(whole.offsets, whole.ids, len(self.out))
        out = torch.empty_like(self.out) if self.begun else self.out
        squares = kernel("weight_gradient", out)(sorts[key], whole.coefficients, whole.rows, out)
        if self.begun:
            squares = in_float64(torch.linalg.vector_norm(self.out.add_(out))).square()
        return squares


class Sink:
    """The gradients of some weights by name."""

    def __init__(
        self, weights: dict[str, tuple[Float[Tensor, "_m _d"], Float[Tensor, "_m _d"]]], tells_rows: bool = False
    ) -> None:
        """Begins with weights and the places of their gradients, one latent a row; it may tell which are `touched`."""
        self._held: dict[str, Gradient] = {}
        for name, (weight, out) in weights.items():
            bias, through, along, touched = out.new_zeros(4, len(out))
            self._held[name] = Gradient(weight.detach(), out, bias, through, along, touched, tells_rows)

    def of(self, name: str) -> Gradient:
        """Returns the gradient of a weight."""
        return self._held[name]

    def finish(self) -> dict[str, Float[Tensor, ""]]:
        """Writes all gradients and returns their sums of squares."""
        sorts: dict[tuple[int, ...], tuple[Any, ...]] = {}
        return {name: found.finish(sorts) for name, found in self._held.items()}


def _joined(parts: list[_Part]) -> _Part:
    starts = [*accumulate((len(part.ids) for part in parts), initial=0)]
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    end = offsets[0].new_full((1,), starts[-1])
    columns = zip(*((part.ids, part.coefficients, part.rows) for part in parts), strict=True)
    return _Part(torch.cat([*offsets, end]), *map(torch.cat, columns))
