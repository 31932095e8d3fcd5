"""A coder in parts: neighboring latents on a device each, or left on the disk that they were mapped from.

The matrices stay what they are in the file, mapped, in the precision they are stored in: so rows are looked up and the
coder is saved as one that lies in memory. What a device holds is a copy of its latents' rows, in the precision in which
the coder computes; of latents on disk, rows are read when they are needed, by tiles (`tiles.py`). Inputs, codes and
outputs, and tensors that are no matrices of latents, are on one device.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.base.errors import ConfigError
from sae.coder import tiles
from sae.coder.coder import Choice, SparseCoder
from sae.coder.spec import CoderSpec
from sae.coder.tensors import Piece
from sae.kernels.codes import PAD, counted, offsets_of, rows_of

if TYPE_CHECKING:
    from typing import Self

DISK = "disk"
WHOLE = "load it on one device (device=...)"


class Part(NamedTuple):
    """Neighboring latents of one block."""

    latents: slice
    device: torch.device | None
    """None: on disk."""


class Visit(NamedTuple):
    """Entries of codes whose latents lie in a piece."""

    piece: Piece
    entries: Int[Tensor, "some"]
    """Their numbers."""
    offsets: Int[Tensor, "n_plus_1"]
    rows: slice | Int[Tensor, "r"]
    """Of the piece, among which they are."""
    ids: Int[Tensor, "some"]
    """Which of these."""

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns these rows of a tensor of the piece."""
        return tensor[self.rows].to(self.piece.device, dtype)


class CoderInParts(SparseCoder):
    """A sparse coder whose latents lie in parts; made by `in_parts`. It is used like another, and never trained."""

    parts: tuple[Part, ...] = ()
    """In the order of latents."""
    _pieces: tuple[Piece, ...] = ()
    _stored: Mapping[str, Tensor] = MappingProxyType({})
    """What the file has of tensors that are held, which may be in another precision."""

    def pieces(self) -> list[Piece]:
        """Returns all latents in order, as they lie."""
        return list(self._pieces)

    @property
    def held(self) -> list[Piece]:
        """Returns the pieces that are copies on a device."""
        return [piece for piece, part in zip(self._pieces, self.parts, strict=True) if part.device is not None]

    @property
    def like(self) -> Tensor:
        """Returns a tensor of the precision and on the device in which it computes."""
        return self.b_dec

    @property
    def dtype(self) -> torch.dtype:
        """Returns the precision in which it computes."""
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        """Returns where codes and outputs are."""
        return self.b_dec.device

    @property
    def whereabouts(self) -> str:
        """Returns where its latents are."""
        ranges = (f"{p.latents.start:,} to {p.latents.stop - 1:,} on {p.device or DISK}" for p in self.parts)
        return f"latents {', '.join(ranges)}"

    @torch.no_grad()
    def preactivations(
        self,
        y: Float[Tensor, "n d_in"],
        tensors: dict[str, Tensor] | None = None,
        out: Float[Tensor, "n d_sae"] | None = None,
    ) -> Float[Tensor, "n d_sae"]:
        """Returns what the encoder makes of its input, without gradient; n * d_sae values, so for small n only."""
        of = tiles.Seen(y.to(self.dtype).chunk(self.spec.n_blocks, dim=1))
        out = y.new_empty(len(y), self.spec.d_sae, dtype=self.dtype) if out is None else out
        for span in tiles.spans(self):
            first, columns = 0, slice(span.first, span.first + len(span.ids))
            for h, _ in tiles.read(self, span, of).scores(of):
                out[first : first + len(h), columns] = h
                first += len(h)
        return out

    def preactivations_at(self, y: Float[Tensor, "n d_in"], choice: Choice) -> Float[Tensor, "nnz"]:
        """Returns pre-activations at what was chosen, differentiable in y."""
        offsets, ids, known, exact = choice
        given = known if exact and self.spec.encoding.affine else None
        if given is not None and not (torch.is_grad_enabled() and y.requires_grad):
            return given
        inputs, order, kept = y.chunk(self.spec.n_blocks, dim=1), [ids[:0]], [y.new_zeros(0, dtype=self.dtype)]
        for visit in self._visits(offsets, ids):
            own = {name: visit.read(tensor, self.dtype) for name, tensor in visit.piece.encoders.items()}
            seen = inputs[visit.piece.block].to(visit.piece.device, self.dtype)
            there = None if given is None else given[visit.entries].to(visit.piece.device)
            made = self.spec.encoding.preactivations_at(seen, own, visit.offsets, visit.ids, there)
            order.append(visit.entries)
            kept.append(made.to(self.device))
        found = torch.cat(kept)[torch.cat(order).argsort()]
        return found if known is None else torch.where(known == PAD, known, found)

    def decoded(
        self,
        values: Float[Tensor, "nnz"],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        frozen: bool = False,
    ) -> Float[Tensor, "n d_out"]:
        """Returns codes times decoder, without bias, differentiable in the codes: the sum over the parts."""
        out = torch.zeros(offsets.numel() - 1, self.spec.d_out, dtype=self.dtype, device=self.device)
        for visit in self._visits(offsets, ids):
            weight, own = visit.read(visit.piece.decoder, self.dtype), values[visit.entries].to(visit.piece.device)
            made = kernels.decode(own, weight, visit.offsets, visit.ids).to(self.device)
            out = out + torch.nn.functional.pad(made, (visit.piece.columns.start, 0))
        return out

    @torch.no_grad()
    def onto_decoders(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_sae"]:
        """Returns <row, W_dec_i> for every latent."""
        parts = []
        for piece, weight in self._decoders(rows.dtype):
            parts.append((rows[:, piece.columns].to(piece.device) @ weight.T).to(self.device))
        return torch.cat(parts, dim=1)

    def decoder_norms(self) -> Float[Tensor, "d_sae"]:
        """Returns the norm of each latent's decoder over all the columns that it writes."""
        return torch.cat([weight.norm(dim=1).to(self.device) for _, weight in self._decoders(self.dtype)])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns its tensors as they are stored, so that what is saved is what was loaded."""
        return {**super().state_dict(*args, **kwargs), **self._stored}

    def to_dtype(self, dtype: torch.dtype | None) -> "Self":
        """Raises ConfigError: it stays as it lies."""
        self._refuse("cannot be had in another precision")

    def _decoders(self, dtype: torch.dtype) -> Iterator[tuple[Piece, Float[Tensor, "m width"]]]:
        """Yields the decoders in order, some rows at a time."""
        for span in tiles.spans(self):
            yield span.piece, span.piece.decoder[span.some].to(span.piece.device, dtype)

    def _visits(self, offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"]) -> Iterator[Visit]:
        """Yields the entries of codes by the pieces in which their latents lie; on disk, some rows at a time."""
        tokens, n = rows_of(offsets, len(ids)), offsets.numel() - 1
        for piece in self._pieces:
            mine = ((ids >= piece.latents.start) & (ids < piece.latents.stop)).nonzero()[:, 0]
            if not len(mine):
                continue
            local = ids[mine] - piece.latents.start
            rows, at = local.unique(return_inverse=True)
            held = piece.decoder.device == piece.device and piece.decoder.dtype == self.dtype
            size = len(rows) if held else max(1, tiles.HELD // max(piece.width, piece.decoder.shape[1]))
            for first in range(0, len(rows), size):
                here = slice(None) if size >= len(rows) else ((at >= first) & (at < first + size)).nonzero()[:, 0]
                own = offsets_of(counted(tokens[mine[here]], n)).to(piece.device)
                some = slice(None) if held else rows[first : first + size]
                chosen = local if held else at[here] - first
                yield Visit(piece, mine[here], own, some, chosen.to(piece.device))

    def _folded(self, fold: Any, *args: Any) -> NoReturn:
        self._refuse("cannot be folded")

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("stays where it lies")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"coder: one in parts ({self.whereabouts}) {what}; {WHOLE}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        return self.with_spec(self.spec)  # nothing changes its tensors


def in_parts(mapped: SparseCoder, parts: Sequence[Part], device: torch.device, dtype: torch.dtype) -> CoderInParts:
    """Returns a mapped coder in parts that computes in a precision, with inputs and codes on a device."""
    spec = mapped.spec
    check_cut(spec)
    matrices = {*spec.encoding.maps, "W_dec"}
    own = {*spec.selection.parameters(0), *spec.selection.buffers(0)}
    tensors = {
        name: tensor if name in matrices else tensor.to(device, torch.float32 if name in own else dtype, copy=True)
        for name, tensor in mapped.state_dict().items()
    }
    made = CoderInParts(spec, "meta")
    made.load_state_dict(tensors, assign=True)
    made.requires_grad_(False).eval()
    made.parts = tuple(parts)
    made._stored = {name: tensor for name, tensor in mapped.state_dict().items() if name not in matrices}
    made._pieces = tuple(_piece(made, part) for part in parts)
    return made


def check_cut(spec: CoderSpec) -> None:
    """Raises ConfigError if the latents of such a coder cannot lie in parts."""
    if spec.encoding.pursues:
        raise ConfigError(
            f"device_map: encoder {spec.encoder!r} looks at all latents for every one that it chooses, so they cannot "
            f"lie in parts; {WHOLE}"
        )


def cut(spec: CoderSpec, shares: Sequence[tuple[torch.device | None, float]]) -> list[Part]:
    """Returns parts of so large shares of every block's latents, in order; groups of neighbors that compete stay whole.

    A share that comes to no latents has no part.
    """
    size = spec.d_sae // spec.n_blocks
    unit = spec.selection.unit(size) or 1
    unit = unit if unit < size else 1
    total, parts = sum(share for _, share in shares), []
    for block in range(spec.n_blocks):
        first, reached = block * size, 0.0
        for device, share in shares:
            reached += share / total
            last = block * size + round(reached * size / unit) * unit
            parts += [Part(slice(first, last), device)] if last > first else []
            first = last
    return parts


def _piece(coder: CoderInParts, part: Part) -> Piece:
    """Returns what a part has of a coder's tensors: a copy on its device, or what is mapped."""
    some, size = part.latents, coder.spec.d_sae // coder.spec.n_blocks
    number = some.start // size
    decoder = coder.decoders(frozen=True)[number][some.start - number * size : some.stop - number * size]
    encoders = {name: tensor.detach()[some] for name, tensor in coder.encoder_tensors().items()}
    device = part.device or coder.device
    if part.device is not None:
        encoders = {name: _copied(tensor, device, coder.dtype) for name, tensor in encoders.items()}
        decoder = _copied(decoder, device, coder.dtype)
    return Piece(number, some, coder.blocks[number].columns, device, encoders, decoder)


def _copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    made = torch.empty(tensor.shape, dtype=dtype, device=device)
    step = max(1, tiles.HELD // max(1, tensor[:1].numel()))  # for what a copy to a card or from a transpose takes
    for into, some in zip(made.split(step), tensor.split(step), strict=True):
        into.copy_(some)
    return made
