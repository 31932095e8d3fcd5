"""The tensors of a coder, and what they are of: blocks of latents, decoders, what a rule has for each latent.

What reads some latents (`partial.py`), folds (`folds.py`) or computes the map (`coder.py`) stands on this.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder.normalization import Undo
from sae.coder.spec import CoderSpec
from sae.kernels.sink import Sink
from sae.parallel.cut import Cut

if TYPE_CHECKING:
    from typing import Self

    from sae.coder.shard import Shard


class LatentBlock(NamedTuple):
    """A contiguous group of latents and the columns it writes: the whole coder, or one layer of a cross-layer coder."""

    latents: slice
    """Of the d_sae latents."""
    rows: slice
    """Of W_dec."""
    columns: slice
    """Of the output."""


class Piece(NamedTuple):
    """Neighboring latents of one block, whose tensors lie together."""

    block: int
    latents: slice
    columns: slice
    """Of the output, which they write."""
    device: torch.device
    """Where they are computed with."""
    encoders: dict[str, Tensor]
    decoder: Float[Tensor, "m width"]

    @property
    def width(self) -> int:
        """Returns the width of what they see."""
        return self.encoders["W_enc"].shape[1]


class CoderTensors(nn.Module):
    """A sparse autoencoder, transcoder or crosscoder with one latent per row.

    Tensors: W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; b_pre [d_in] and W_skip
    [d_out, d_in] where `spec` has them; what its encoder and its selection rule have beside for each latent, such as
    threshold [d_sae]. A cross-layer coder of L layers has W_enc [d_sae, d_in / L], W_skip [d_out, d_in / L], and in
    W_dec [rows, d_out / L] as many rows for a latent as there are layers it writes to, one after the other.
    """

    def __init__(self, spec: CoderSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        layers = spec.n_blocks
        rows = spec.d_sae * (layers + 1) // 2  # a block writes to 1, 2, ..., L layers
        shapes: dict[str, tuple[int, ...]] = {}
        for weight, bias in spec.encoding.maps.items():
            shapes |= {weight: (spec.d_sae, spec.d_in // layers), bias: (spec.d_sae,)}
        shapes |= {"W_dec": (rows, spec.d_out // layers), "b_dec": (spec.d_out,)}
        if spec.pre_bias == "own":
            shapes["b_pre"] = (spec.d_in,)
        if spec.skip:
            shapes["W_skip"] = (spec.d_out, spec.d_in // layers)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))
        for name, start in spec.selection.parameters(spec.d_sae).items():
            self.register_parameter(name, nn.Parameter(start.to(device)))
        for name, start in spec.selection.buffers(spec.d_sae).items():
            self.register_buffer(name, start.to(device))

    @property
    def whole(self) -> CoderSpec:
        """Returns the spec of the whole coder, also where this is a shard of it."""
        return self.shard.whole if self.shard else self.spec

    @property
    def d_in(self) -> int:
        """Returns the width of what it reads."""
        return self.spec.d_in

    @property
    def d_out(self) -> int:
        """Returns the width of what it writes."""
        return self.spec.d_out

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self.spec.d_sae

    @property
    def dtype(self) -> torch.dtype:
        """Returns the precision of its matrices."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """Returns where its tensors are."""
        return self.W_dec.device

    @property
    def whereabouts(self) -> str:
        """Returns where its latents are, in words."""
        return f"on {self.device}"

    @property
    def like(self) -> Tensor:
        """Returns a tensor of the precision and on the device in which it computes."""
        return self.W_enc

    def to_dtype(self, dtype: torch.dtype | None) -> "Self":
        """Returns this coder with its matrices and biases in another precision (None: as they are, nothing is read).

        What selection compares with is float32 in any case.
        """
        own = {*self.spec.selection.parameters(0), *self.spec.selection.buffers(0)}
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if name in own or dtype is not None:
                tensor.data = tensor.data.to(torch.float32 if name in own else dtype).contiguous()
        return self

    sink: Sink | None = None
    """Where a training step collects the gradients of the matrices; else autograd returns them."""
    shard: "Shard | None" = None
    """Whose latents these are, where ranks hold parts of one coder; the spec is then of these latents alone."""
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_pre: nn.Parameter
    W_skip: nn.Parameter

    @property
    def blocks(self) -> list[LatentBlock]:
        """Returns the blocks of latents, in order."""
        layers, size = self.spec.n_blocks, self.spec.d_sae // self.spec.n_blocks
        width, blocks, row = self.spec.d_out // layers, [], 0
        for layer in range(layers):
            rows = size * (layers - layer)
            latents = slice(layer * size, (layer + 1) * size)
            blocks.append(LatentBlock(latents, slice(row, row + rows), slice(layer * width, self.spec.d_out)))
            row += rows
        return blocks

    def decoders(self, frozen: bool = False) -> list[Float[Tensor, "m width"]]:
        """Returns, for each block, the decoder with one row a latent over all the columns that it writes.

        These are views, without gradient where `frozen`.
        """
        return self.decoders_of(self.W_dec.detach() if frozen else self.W_dec)

    def decoders_of(self, weight: Float[Tensor, "rows width"]) -> list[Float[Tensor, "m _width"]]:
        """Returns the same views of a tensor that is like W_dec."""
        sizes = [block.rows.stop - block.rows.start for block in self.blocks]
        layers, width = len(sizes), weight.shape[1]
        views = zip(range(layers, 0, -1), weight.split(sizes), strict=True)
        return [part.view(self.spec.d_sae // layers, times * width) for times, part in views]

    def decoder_norms(self) -> Float[Tensor, "d_sae"]:
        """Returns the norm of each latent's decoder over all the columns that it writes."""
        return torch.cat([part.norm(dim=1) for part in self.decoders()])

    @torch.no_grad()
    def encoder_rows(self, latents: Sequence[int] | Int[Tensor, "m"]) -> Float[Tensor, "m d_in"]:
        """Returns the encoder rows of some latents, in float32; zero in columns that a latent does not read."""
        ids, layers = checked_ids(latents, self.spec.d_sae, self.W_enc.device), self.spec.n_blocks
        out = torch.zeros(len(ids), layers, self.W_enc.shape[1], device=ids.device)
        out[torch.arange(len(ids), device=ids.device), ids // (self.spec.d_sae // layers)] = self.W_enc[ids].float()
        return out.flatten(1).to(self.device)

    @torch.no_grad()
    def decoder_rows(self, latents: Sequence[int] | Int[Tensor, "m"]) -> Float[Tensor, "m d_out"]:
        """Returns the decoder rows of some latents, in float32; zero in columns that a latent does not write."""
        ids = checked_ids(latents, self.spec.d_sae, self.W_dec.device)
        out = torch.zeros(len(ids), self.spec.d_out, device=ids.device)
        for block, weight in zip(self.blocks, self.decoders(frozen=True), strict=True):
            mine = (ids >= block.latents.start) & (ids < block.latents.stop)
            out[mine, block.columns] = weight[ids[mine] - block.latents.start].float()
        return out.to(self.device)

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the encoder, with a row for each latent."""
        return {name: getattr(self, name) for pair in self.spec.encoding.maps.items() for name in pair}

    @property
    def cuts(self) -> list[Cut]:
        """Returns which latents these are, of each of those groups, where ranks hold parts of one coder."""
        return self.shard.groups if self.shard else [Cut(group.stop - group.start) for group in self.rule_groups()]

    def pieces(self) -> list[Piece]:
        """Returns all latents in order, as they lie: block by block."""
        encoders, pieces = self.encoder_tensors(), []
        for number, (block, decoder) in enumerate(zip(self.blocks, self.decoders(frozen=True), strict=True)):
            own = {name: tensor.detach()[block.latents] for name, tensor in encoders.items()}
            pieces.append(Piece(number, block.latents, block.columns, self.W_enc.device, own, decoder))
        return pieces

    def rule_groups(self) -> list[slice]:
        """Returns the latents among which selection chooses: each block, or all together."""
        return [slice(0, self.spec.d_sae)] if self.spec.budget == "shared" else [block.latents for block in self.blocks]

    def given(self, number: int, some: slice | Int[Tensor, "m"]) -> dict[str, Tensor]:
        """Returns what a rule is given of some latents: its tensors, and the calibration of their group if there is."""
        own = {name: tensor[some] for name, tensor in self.per_latent().items()}
        if number < len(self.spec.calibration):
            own["calibration"] = torch.tensor(self.spec.calibration[number], dtype=torch.float32)
        return own

    def per_latent(self) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns the tensors with one value a latent that a selection rule may look at."""
        rule = self.spec.selection
        names = [*rule.parameters(0), *rule.buffers(0), *(["b_enc"] if rule.reads_bias else [])]
        return {name: getattr(self, name) for name in names}

    def with_spec(self, spec: CoderSpec) -> "Self":
        """Returns a coder of another spec with these very tensors."""
        other = copy.copy(self)
        other.spec = spec
        return other

    def centered(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Undo]:
        """Returns N(x) - p, the encoder's input, and what undoes the normalization of an output."""
        y, how = self.spec.normalize(x)
        if self.spec.pre_bias != "none":
            y = y - (self.b_dec if self.spec.pre_bias == "decoder" else self.b_pre)
        return y, how


def checked_ids(latents: Sequence[int] | Tensor, d_sae: int, device: torch.device) -> Int[Tensor, "m"]:
    """Returns latent ids as a tensor; ConfigError names one that there is not."""
    ids = torch.as_tensor(latents, device=device)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ConfigError(f"latents: {ids.dtype} are no latent ids; allowed are whole numbers from 0 to {d_sae - 1}")
    ids = ids.long().reshape(-1)
    outside = ids[(ids < 0) | (ids >= d_sae)]
    if len(outside):
        raise ConfigError(f"latents: {int(outside[0])} is not a latent; allowed are 0 to {d_sae - 1}")
    return ids
