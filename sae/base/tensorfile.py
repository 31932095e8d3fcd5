"""The safetensors format as it is written here, whole or by several processes together; the library reads it.

In pieces, with the digest taken along: a thread that writes gigabytes neither holds the interpreter nor a second copy,
and what was written need not be read again. The bytes are those that the library would write.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 1 << 22
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the format calls them, in the order in which their tensors lie in a file."""


class Rows(NamedTuple):
    """Some rows of a tensor, or all of it."""

    tensor: Tensor
    pieces: list[range]
    """Their numbers in the whole, in the order in which they lie in the tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @classmethod
    def of(
        cls, tensor: Tensor, share: Callable[[int], range], held: tuple[Sequence[range], int] | None = None
    ) -> "Rows":
        """Returns the rows of a share, as a view; a scalar is one row.

        `held` says which rows of a larger one, of so many, the tensor itself has.
        """
        rows = tensor.detach() if tensor.dim() else tensor.detach().view(1)
        mine, shape, found, start = share(len(rows)), tuple(tensor.shape), list[range](), 0
        if held:
            shape = (held[1], *shape[1:])
        for piece in held[0] if held else [range(len(rows))]:
            own = piece[max(0, mine.start - start) : max(0, mine.stop - start)]
            found += [own] if own else []
            start += len(piece)
        return cls(rows[mine.start : mine.stop], found, shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Writes a file, flushed to disk, and returns its size and digest, {"bytes", "sha256"}.

    Equal tensors and metadata give equal bytes.
    """
    header, places = _layout({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, metadata)
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for name in places:
            for piece in _pieces(tensors[name]):
                file.write(piece)
                digest.update(piece)
        _flush(file)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def begin_rows(path: Path, tensors: Mapping[str, Rows]) -> None:
    """Makes a file of its full size, with the header alone: every process may now write its rows to it."""
    header, places = _layout({name: (x.tensor.dtype, x.shape) for name, x in tensors.items()}, None)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, size in places.values()))
        _flush(file)


def write_rows(path: Path, tensors: Mapping[str, Rows]) -> None:
    """Writes rows to a file that `begin_rows` has made, in whichever process, of tensors of the same names."""
    header, places = _layout({name: (x.tensor.dtype, x.shape) for name, x in tensors.items()}, None)
    # not to be read: NFS would fill in the pages at the ends of the rows, and send back what it has of the neighbors'
    with open(path, "wb", opener=lambda at, flags: os.open(at, flags & ~(os.O_CREAT | os.O_TRUNC))) as file:
        for name, rows in tensors.items():
            row = torch.Size(rows.shape[1:]).numel() * rows.tensor.itemsize
            for piece, tensor in zip(rows.pieces, rows.tensor.split([len(p) for p in rows.pieces]), strict=True):
                file.seek(len(header) + places[name][0] + piece.start * row)
                for some in _pieces(tensor):
                    file.write(some)
        _flush(file)


def _layout(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the header, and by name where a tensor begins behind it and how many bytes it takes."""
    order = list(DTYPES)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        places[name] = end, torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + places[name][1]]}
        end += places[name][1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.dim() > 1 and not tensor.is_contiguous():  # a mapped transpose: never in memory whole
        for rows in tensor.split(max(1, PIECE_BYTES // max(1, tensor[:1].nbytes))):
            yield from _pieces(rows.contiguous())
        return
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.stride() != (1,):  # of one element or none, any stride counts as contiguous
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    raw = flat.view(torch.uint8).numpy().data
    yield from (raw[start : start + PIECE_BYTES] for start in range(0, len(raw), PIECE_BYTES))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
