"""Reading weight files of strangers: safetensors, npz and pickles, without running what is in them.

Headers come first, so that a file which declares more than it holds is refused before memory is asked for. What can be
mapped into memory is, and is read from disk only where it is looked at. A pickle is read by torch's own reader of
weights, which builds tensors and plain containers and calls nothing else.
"""

import gzip
import io
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sae.errors import DataError
from sae.files import load_tensors

SAFETENSORS, NPZ, PICKLES = (".safetensors",), (".npz",), (".pt", ".pth", ".bin", ".pkl.gz")
HEADER_BYTES = 100 * 2**20  # the limit that safetensors itself sets
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 20  # weights do not shrink by more, when they are compressed
Shapes = dict[str, tuple[int, ...]]


def is_weights(name: str) -> bool:
    """Returns whether a file is one of tensors, by its name."""
    return name.endswith((*SAFETENSORS, *NPZ, *PICKLES))


def shapes(path: Path) -> Shapes:
    """Returns {tensor name: shape}; of safetensors and npz from the headers alone. DataError names a damaged file."""
    if path.suffix in SAFETENSORS:
        return _safetensors_shapes(path)
    if path.suffix in NPZ:
        return {name: array.shape for name, array in _npz(path).items()}
    return {name: tuple(value.shape) for name, value in flattened(read_pickle(path)).items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, on the CPU, memory-mapped where the file allows."""
    if path.suffix in SAFETENSORS:
        _safetensors_shapes(path)
        return load_tensors(path)
    if path.suffix in NPZ:
        return {name: torch.from_numpy(array) for name, array in _npz(path).items()}
    return flattened(read_pickle(path))


def verify(path: Path) -> None:
    """Raises DataError if a file differs from the checksums that it holds: npz and torch's archives have one a member."""
    if path.name.endswith((*NPZ, *PICKLES)) and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
            raise DataError(f"{path} is damaged: {_reason(error)}") from error
        if damaged:
            raise DataError(f"{path} is damaged: the checksum of {damaged} is not that of its bytes")


def flattened(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors in nested dicts and lists by dotted name."""
    if isinstance(tree, Tensor):
        return {prefix.rstrip("."): tree.detach()}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: t for key, value in pairs for name, t in flattened(value, f"{prefix}{key}.").items()}


def read_pickle(path: Path, inert: tuple[str, ...] = ()) -> Any:
    """Returns what a .pt, .pth or .pkl.gz file holds: tensors, numbers, text and plain containers of them.

    Objects of classes whose full names begin with one of `inert` come as `Inert`, whose attributes are theirs; none of
    their code is imported. DataError names anything else that the file wants to import.
    """
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path) as file:
                return _Plain(_Limited(file, BOMB_RATIO * path.stat().st_size + BOMB_BYTES), path, inert).load()
        if zipfile.is_zipfile(path):
            _check_archive(path)
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert else []
        stubs: list[Any] = [(Inert, name) for name in wanted if name.startswith(inert)]
        with torch.serialization.safe_globals(stubs):
            mapped = zipfile.is_zipfile(path)  # older files are read whole
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: {_reason(error)}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged file breaks its reader in any way
        raise DataError(f"{path} is missing, damaged or no file of tensors: {_reason(error)}") from error


class Inert:
    """Stands for an object whose class is not to be imported."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Plain(pickle.Unpickler):
    """Reads a plain pickle of tensors: the same few names as torch's reader of weights, and nothing else."""

    def __init__(self, file: Any, path: Path, inert: tuple[str, ...]) -> None:
        super().__init__(file)
        self.path, self.inert = path, inert

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
            "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
            "torch.storage._load_from_bytes": _storage,
            "torch.device": torch.device,
        }
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full in known:
            return known[full]
        if full.startswith(self.inert or ("\0",)):
            return type(name, (Inert,), {})
        raise DataError(f"{self.path} is refused: it wants to import {full}, which no file of tensors needs")


class _Limited(io.RawIOBase):
    """A stream that ends in an error after so many bytes: a few compressed ones can stand for very many."""

    def __init__(self, file: Any, limit: int) -> None:
        self.file, self.left = file, limit

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        found = self.file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise DataError("it unpacks to far more than weights can")
        return found

    def readline(self, size: int | None = -1) -> bytes:
        """Returns the next line."""
        found = self.file.readline(self.left + 1)
        self.left -= len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with the next bytes."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _storage(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _safetensors_shapes(path: Path) -> Shapes:
    """Reads the header; DataError if it is larger than the file, or declares what the file does not hold."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            return parse_header(_head(file, size), size, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _head(file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    return file.read(min(length, HEADER_BYTES)) if len(start) == 8 and length <= min(size - 8, HEADER_BYTES) else b""


def parse_header(raw: bytes, size: int, path: Path | str) -> Shapes:
    """Returns {tensor name: shape} of a safetensors header whose file has `size` bytes."""
    try:
        header = json.loads(raw)
        found = {name: entry for name, entry in header.items() if name != "__metadata__"}
        parsed = {name: tuple(map(int, entry["shape"])) for name, entry in found.items()}
        ends = [int(entry["data_offsets"][1]) for entry in found.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is damaged or no safetensors file: its header cannot be read") from error
    if 8 + len(raw) + max(ends, default=0) != size:
        raise DataError(
            f"{path} is damaged: its header declares {max(ends, default=0):,} bytes of tensors, not what follows"
        )
    return parsed


def _npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file; those stored as they are, which is the default, memory-mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(path)
            return {info.filename.removesuffix(".npy"): _array(path, archive, info) for info in archive.infolist()}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is missing, damaged or no npz file: {_reason(error)}") from error


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        start = member.tell()
        declared = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or declared != info.file_size - start:
            what = "Python objects" if dtype.hasobject else f"{declared:,} bytes but holds {info.file_size - start:,}"
            raise DataError(f"{path}: tensor {info.filename.removesuffix('.npy')} is refused: it declares {what}")
        if info.compress_type != zipfile.ZIP_STORED:
            flat = np.frombuffer(bytearray(member.read()), dtype)
            return flat.reshape(shape, order="F" if fortran else "C")
    with open(path, "rb") as file:  # the archive's own record of the member, which may differ in its length
        file.seek(info.header_offset)
        names, extra = struct.unpack("<HH", file.read(30)[26:30])
    offset = info.header_offset + 30 + names + extra + start
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C") if declared else np.zeros(shape, dtype)


def _check_archive(path: Path) -> None:
    """Refuses an archive that unpacks to far more than it is."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * path.stat().st_size:
        raise DataError(
            f"{path} is refused: {path.stat().st_size:,} bytes unpack to {unpacked:,}, far more than weights can"
        )
