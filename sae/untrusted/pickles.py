"""Pickles of strangers (.pt, .pth, .bin, .pkl.gz), read as data: nothing is imported, and nothing in them is called.

A pickle is a program for a small machine with a stack, which builds values and calls functions by name. Here the
instructions are carried out one by one: numbers, text and plain containers are built, names stay names, and the few
calls that stand for a tensor are understood. All else is refused by its name, before anything of it has happened.

Tensors are views of storages. In a zip archive `<name>/data.pkl` refers to members `<name>/data/<key>`. In the older
layout five pickles follow each other: a magic number, a version, the machine's properties, the values, and the keys of
the storages, whose lengths and bytes come behind. In a plain pickle each storage is such a file by itself, as bytes.
"""

import gzip
import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from sae.base.errors import DataError
from sae.untrusted.archives import Archive, Bytes, allowance, is_archive
from sae.untrusted.damage import naming_damage, printable

T = TypeVar("T")

MAGIC = 0x1950A86A20F9469CFC6C
MOST_STEPS = 500_000  # instructions in one file; a tensor takes about thirty
MOST_ARGUMENTS, MOST_AXES = 8, 8
LONGEST_LINE = 4096
STORAGES = {
    **{"torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16},
    **{"torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32},
    **{"torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8},
    **{"torch.BoolStorage": torch.bool, "torch.storage.UntypedStorage": torch.uint8},
}
LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Inert:
    """Stands for an object whose class is not to be imported; its attributes are those of the object."""


@dataclass(frozen=True)
class _Name:
    """The full name of a function or class, which it is never looked up by."""

    full: str


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors are views of; None where their bytes come later in the file."""

    flat: Tensor | None


def read_pickle(path: Path, inert: tuple[str, ...] = ()) -> Any:
    """Returns what a .pt, .pth, .bin or .pkl.gz file holds: tensors, numbers, text and plain containers of them.

    Tensors are memory-mapped where the file allows. Objects of classes whose full names begin with one of `inert` come
    as `Inert`. DataError names what else the file wants to import, and a file that is damaged or no pickle.
    """
    with naming_damage(path, "file of tensors"):
        reader = _Reader(path, inert)
        if path.name.endswith(".gz"):
            return reader.sequence(_Source(_unzipped(path)))
        if is_archive(path):
            with Archive(path) as archive:
                return reader.archived(archive)
        return reader.sequence(_Source(np.memmap(path, np.uint8, "c")))


def _unzipped(path: Path) -> Bytes:
    found, limit = bytearray(), allowance(path)
    with gzip.open(path) as file:
        while piece := file.read(2**20):
            found += piece
            if len(found) > limit:
                raise DataError(f"{path} is refused: it unpacks to more than {limit:,} bytes, which weights do not")
    return np.frombuffer(found, np.uint8)


class _Source:
    """Bytes that are read one after the other, none of them twice."""

    def __init__(self, raw: Bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, size: int) -> Bytes:
        """Returns the next bytes without a copy; ValueError if there are fewer."""
        if not 0 <= size <= len(self.raw) - self.at:
            raise ValueError(f"it ends {self.at + size - len(self.raw):,} bytes too early")
        self.at += size
        return self.raw[self.at - size : self.at]

    def read(self, size: int) -> bytes:
        """Returns the next bytes."""
        return self.take(size).tobytes()

    def readline(self) -> bytes:
        """Returns the next line with its end."""
        line = self.raw[self.at : self.at + LONGEST_LINE].tobytes()
        return self.read(line.index(b"\n") + 1)


class _Reader:
    """Reads the pickles of one file, which together may not ask for more than the file can mean."""

    def __init__(self, path: Path, inert: tuple[str, ...]) -> None:
        self.path, self.inert = path, inert
        self.steps, self.bytes = MOST_STEPS, allowance(path)
        self.calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "_codecs.encode": self._encoded,
            "torch.Size": lambda sizes: sizes,
            "torch.device": lambda name, *_: name,
            "torch.storage._load_from_bytes": self._nested,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": lambda *args: self._tensor(*args[:4]),
            "torch._utils._rebuild_tensor_v3": lambda *args: self._tensor(*args[:4], dtype=args[6]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        }

    def refused(self, why: str) -> DataError:
        """Returns the error of a file that is not read."""
        return DataError(f"{self.path} is refused: {why}")

    def archived(self, archive: Archive) -> Any:
        """Returns the values in an archive."""
        tops = [name.removesuffix("/data.pkl") for name in archive.members if name.endswith("/data.pkl")]
        if len(tops) != 1 or "/" in tops[0]:
            raise self.refused("it is an archive, but not one of torch")
        if f"{tops[0]}/byteorder" in archive.members and bytes(archive.read(f"{tops[0]}/byteorder")) != b"little":
            raise self.refused("its numbers are not little-endian")
        storages: dict[str, Bytes] = {}

        def storage(kind: str, size: int, key: str) -> _Storage:
            if key not in storages:
                storages[key] = archive.read(f"{tops[0]}/data/{key}")
            return self._typed(storages[key], kind, size)

        return self.run(_Source(archive.read(f"{tops[0]}/data.pkl")), storage)

    def sequence(self, source: _Source) -> Any:
        """Returns the values in a file of the older layout, or in a plain pickle."""
        first = self.run(source)
        if not isinstance(first, int) or first != MAGIC:
            self._end(source)
            return first
        self.run(source)
        if not self.run(source)["little_endian"]:
            raise self.refused("its numbers are not little-endian")
        start, declared = source.at, dict[str, tuple[str, int]]()

        def declare(kind: str, size: int, key: str) -> _Storage:
            declared[key] = kind, size
            return _Storage(None)

        self.run(source, declare)
        storages: dict[str, _Storage] = {}
        for key in self.run(source):
            kind, size = declared[key]
            if int.from_bytes(source.read(8), "little") != size:
                raise self.refused(f"storage {printable(key)} does not have the length that is declared")
            storages[key] = self._typed(source.take(size * STORAGES[kind].itemsize), kind, size)
        self._end(source)
        source.at = start  # the values once more, now that there is something to look at
        return self.run(source, lambda kind, size, key: storages[key])

    def _end(self, source: _Source) -> None:
        if source.at < len(source.raw):
            raise self.refused(f"{len(source.raw) - source.at:,} bytes follow that belong to nothing")

    def run(self, source: _Source, storage: Callable[..., _Storage] | None = None) -> Any:
        """Returns the value that one pickle builds; `storage(kind, size, key)` is asked for what it refers to."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop(count: int | None = None) -> list[Any]:
            start = marks.pop() if count is None else len(stack) - count
            found = stack[start:]
            del stack[start:]
            return found

        for opcode, value, _ in pickletools.genops(cast(Any, source)):
            self._step()
            name, arg = opcode.name, cast(Any, value)
            if name in LITERALS:
                stack.append(arg)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE" or name in TUPLES:
                stack.append(tuple(pop(TUPLES.get(name))))
            elif name in ("APPEND", "APPENDS"):
                items = pop(1 if name == "APPEND" else None)
                self._of(list, stack[-1]).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = pop(2 if name == "SETITEM" else None)
                self._fill(self._of(dict, stack[-1]), items)
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name == "GLOBAL":
                stack.append(self._named(*arg.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self._named(*pop(2)))
            elif name in ("REDUCE", "NEWOBJ"):
                stack.append(self._called(*pop(2)))
            elif name == "BUILD":
                (state,) = pop(1)
                self._build(stack[-1], state)
            elif name == "BINPERSID" and storage:
                stack.append(storage(*self._referred(stack.pop())))
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise self.refused(f"its instruction {name} is not one that files of tensors need")
        raise ValueError("it ends too early")

    def _named(self, module: str, name: str) -> Any:
        """Returns a dtype, or a name that is known; DataError tells any other."""
        full = f"{self._of(str, module)}.{self._of(str, name)}"
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if full in self.calls or full in STORAGES or full.startswith(self.inert or ("\0",)):
            return _Name(full)
        raise self.refused(f"it wants to import {printable(full)}, which no file of tensors needs")

    def _called(self, what: Any, args: Any) -> Any:
        name = self._of(_Name, what).full
        if name in self.calls and len(self._of(tuple, args)) <= MOST_ARGUMENTS:
            return self.calls[name](*args)
        if name in self.calls or name in STORAGES:
            raise self.refused(f"it wants to call {name} in a way that files of tensors do not")
        return Inert()

    def _referred(self, to: Any) -> tuple[str, int, str]:
        """Returns (kind, size, key) of the storage that a reference means."""
        if len(self._of(tuple, to)) not in (5, 6) or to[0] != "storage" or any(to[5:]):
            raise self.refused("it refers to something that is no storage of tensors")
        kind = self._of(_Name, to[1]).full
        if kind not in STORAGES:
            raise self.refused(f"it takes {kind} for a storage")
        return kind, self._of(int, to[4]), self._of(str, to[2])

    def _build(self, target: Any, state: Any) -> None:
        """Gives an object its attributes; those of a module's dictionary of tensors tell its versions only."""
        if isinstance(target, Inert):
            fields = self._of(dict, state[0] if isinstance(state, tuple) else state)
            self._step(len(fields))
            vars(target).update(fields)
        elif not isinstance(target, OrderedDict):
            raise self.refused(f"it wants to change a {type(target).__name__}")

    def _of(self, kind: type[T], value: Any) -> T:
        if not isinstance(value, kind):
            raise self.refused(f"it takes a {type(value).__name__} for a {kind.__name__}")
        return value

    def _step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise self.refused(f"it has more than {MOST_STEPS:,} instructions")

    def _fill(self, into: dict[Any, Any], items: list[Any]) -> None:
        """Puts keys and values that follow each other into a dict; nested keys could take for ever to compare."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**60):
                raise self.refused(f"a {type(key).__name__} is no name of a tensor or a field")
            into[key] = value

    def _encoded(self, text: str, code: str) -> bytes:
        """Returns bytes, which older pickles write as text."""
        self._spend(len(self._of(str, text)))
        if code != "latin1":
            raise self.refused("it wants to encode text")
        return text.encode("latin1")

    def _nested(self, raw: bytes) -> Any:
        self._spend(len(self._of(bytes, raw)))
        return self.sequence(_Source(np.frombuffer(bytearray(raw), np.uint8)))

    def _spend(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise self.refused("its tensors are far larger than the file, which those of weights are not")

    def _typed(self, raw: Bytes, kind: str, size: int) -> _Storage:
        dtype = STORAGES[kind]
        if len(raw) != size * dtype.itemsize:
            raise self.refused(f"a storage declares {size * dtype.itemsize:,} bytes but holds {len(raw):,}")
        return _Storage(torch.from_numpy(np.asarray(raw)).view(dtype) if size else torch.empty(0, dtype=dtype))

    def _tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Returns a view of a storage; DataError if it is not within it."""
        if max(len(self._of(tuple, shape)), len(self._of(tuple, stride))) > MOST_AXES:
            raise self.refused(f"a tensor has more than {MOST_AXES} axes")
        numbers = [self._of(int, n) for n in (offset, *shape, *stride)]
        flat = self._of(_Storage, storage).flat
        if flat is None:
            return None
        flat = flat if dtype is None else flat.view(dtype)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if min(numbers) < 0 or (math.prod(shape) and last >= len(flat)):
            raise self.refused(
                f"a tensor of shape {printable(shape)} lies outside of its storage of {len(flat):,} numbers"
            )
        self._spend(math.prod(shape) * flat.element_size())
        return flat.as_strided(shape, stride, offset)
