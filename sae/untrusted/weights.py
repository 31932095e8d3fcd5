"""Weight files of strangers: safetensors, npz and pickles, read without running what is in them.

Headers come first, so that a file which declares more than it holds is refused before memory is asked for. What can be
mapped into memory is, and is read from disk only where it is looked at.

    safetensors   header and file must agree to the byte; its numbers have no checksum, so a changed one goes unseen
    npz, .pt      a checksum for each member of the archive (`verify`)
    .pkl.gz       one checksum for all, which is looked at whenever it is read
    older .pt     no checksum
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.base.errors import DataError
from sae.base.files import load_tensors
from sae.untrusted import digests
from sae.untrusted.archives import Archive, Bytes, is_archive
from sae.untrusted.damage import naming_damage, printable
from sae.untrusted.pickles import read_pickle

SAFETENSORS, NPZ, PICKLES = (".safetensors",), (".npz",), (".pt", ".pth", ".bin", ".pkl.gz")
HEADER_BYTES = 4 * 2**20  # of safetensors: forty thousand tensors
NPY_HEADER_BYTES = 2**16
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # the same, but for names that are not Latin
}
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8},
}
MOST_VALUES, DEEPEST, LONGEST_NAME, MOST_AXES = 200_000, 32, 500, 8
TREE = (Tensor, dict, list, tuple)
Shapes = dict[str, tuple[int, ...]]


def is_weights(name: str) -> bool:
    """Returns whether a file is one of tensors, by its name."""
    return name.endswith((*SAFETENSORS, *NPZ, *PICKLES))


def shapes(path: Path) -> Shapes:
    """Returns {tensor name: shape}; of safetensors from the header alone. DataError names a damaged file or tensor."""
    if path.suffix in SAFETENSORS:
        return _header(path)
    return {name: tuple(tensor.shape) for name, tensor in tensors(path).items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, on the CPU, memory-mapped where the file allows.

    DataError names a file or tensor that is damaged, or declares what it does not hold.
    """
    if path.suffix in SAFETENSORS:
        _header(path)
        return load_tensors(path)
    with naming_damage(path, "file of tensors"):
        return _npz(path) if path.suffix in NPZ else flatten(read_pickle(path), str(path))


def verify(path: Path) -> None:
    """Raises DataError if a file differs from the digest that came with it from the hub, or from those that it holds.

    Zip archives have one for each member.
    """
    with naming_damage(path, "file of tensors"):
        digests.verify(path)
        if not path.name.endswith(SAFETENSORS) and is_archive(path):
            with Archive(path) as archive:
                archive.verify()


def flatten(tree: Any, source: str = "a file") -> dict[str, Tensor]:
    """Returns the tensors in nested dicts and lists by dotted name.

    DataError if two have one name, or if the containers hold each other without end.
    """
    found: dict[str, Tensor] = {}
    todo, left = [("", tree, 0)] if isinstance(tree, TREE) else [], MOST_VALUES
    while todo:
        name, value, depth = todo.pop()
        if isinstance(value, Tensor):
            if name in found:
                raise DataError(f"{source} is refused: two tensors are called {printable(name)}")
            found[_checked(name, source)] = value.detach()
            continue
        left -= len(value)
        if left < 0 or depth > DEEPEST or len(name) > LONGEST_NAME:
            raise DataError(f"{source} is refused: its containers hold each other, too deep or too often")
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [(key, item) for key, item in pairs if isinstance(item, TREE)]
        todo += [(f"{name}.{key}" if depth else str(key), item, depth + 1) for key, item in reversed(inner)]
    return found


def parse_header(raw: bytes, size: int, path: Path | str) -> Shapes:
    """Returns {tensor name: shape} of a safetensors header whose file has `size` bytes.

    DataError names a tensor whose bytes are not as many as its shape says, or not those between its neighbors'.
    """
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        parsed = {name: _entry(**entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged or no safetensors file: its header cannot be read") from error
    for name, (start, stop, dtype, shape) in parsed.items():
        _checked(name, path)
        if dtype not in tuple(SIZES):
            raise DataError(f"{path}: tensor {name} holds {printable(dtype)}; known are {', '.join(SIZES)}")
        if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape)):
            raise DataError(f"{path} is damaged: tensor {name} has a shape or place of other than whole numbers")
    end = 0
    for name, (start, stop, dtype, shape) in sorted(parsed.items(), key=lambda item: item[1][:2]):
        declared = math.prod(shape) * SIZES[dtype]
        if (start, stop) != (end, end + declared):
            raise DataError(
                f"{path} is damaged: tensor {name} of shape {shape} takes {declared:,} bytes from {end:,} on, but is "
                f"said to lie at {start:,} to {stop:,}"
            )
        end = stop
    if 8 + len(raw) + end != size:
        raise DataError(f"{path} is damaged: its header declares {end:,} bytes of tensors, not what follows")
    return {name: shape for name, (*_, shape) in parsed.items()}


def _header(path: Path) -> Shapes:
    with naming_damage(path, "safetensors file"), open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path} is damaged or no safetensors file: its header is longer than the file")
        if length > HEADER_BYTES:
            raise DataError(f"{path} is refused: a header of {length:,} bytes, where {HEADER_BYTES:,} are plenty")
        return parse_header(file.read(length), size, path)


def _entry(dtype: Any, shape: Any, data_offsets: Any) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    start, stop = data_offsets
    return start, stop, dtype, tuple(shape)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _checked(name: str, source: Path | str) -> str:
    """Returns the name of a tensor; DataError if it is not one line that can be shown."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise DataError(f"{source} is refused: {printable(name)} is no name of a tensor")
    return name


def _npz(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with Archive(path) as archive:
        for member in archive.members:
            if not member.endswith(".npy"):
                raise DataError(f"{path} is refused: its member {member} is no array")
            name = _checked(member.removesuffix(".npy"), path)
            found[name] = _array(archive.read(member), f"{path}: tensor {name}")
    return found


def _array(raw: Bytes, source: str) -> Tensor:
    """Returns the array in the bytes of an .npy file: a text that says shape, order and dtype, then its numbers."""
    text = io.BytesIO(raw[:NPY_HEADER_BYTES].tobytes())
    try:
        shape, fortran, dtype = NPY_VERSIONS[np.lib.format.read_magic(text)](text)
    except Exception as error:  # what it reads there is a Python literal
        raise DataError(f"{source} is damaged: it has no header of an array") from error
    found = raw[text.tell() :]
    declared = math.prod(shape) * dtype.itemsize
    if dtype.str[1:] not in NUMBERS:
        raise DataError(f"{source} is refused: it holds {printable(dtype)}, not numbers")
    if declared != len(found) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise DataError(f"{source} is refused: it declares {printable(declared)} bytes but holds {len(found)}")
    array = np.asarray(found).view(dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
