"""Files as someone makes them who means harm, or as damage leaves them; and what reading one must end in."""

import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.base.errors import DataError
from sae.untrusted import weights

READERS = (weights.shapes, weights.tensors)
MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
W = np.arange(6, dtype=np.float32)
TWICE = b"N\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple of 2^60 tuples


def refused(path, message, *readers):
    """Asserts that every way to read a file ends in one line of an error that names it, and returns that line."""
    for read in readers or READERS:
        with pytest.raises(DataError, match=message) as error:
            read(path)
        line = str(error.value)
        assert str(path) in line
        assert line.isprintable()
        assert len(line) < len(str(path)) + 400
    return line


def flips(raw, count, seed=0):
    """Yields copies of some bytes with one bit changed."""
    draw = random.Random(seed)
    for at in sorted(draw.sample(range(8 * len(raw)), min(count, 8 * len(raw)))):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        yield at // 8, bytes(changed)


def memory(field):
    """Returns a number of bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_at_peak(anew=False):
    """Returns the most bytes of memory that this process has had since they were last counted `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def assert_same(mine, theirs):
    """Raises unless two trees of containers hold the same, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        mine, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs))
        assert torch.equal(mine, theirs)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert_same(mine[name], value)
    elif isinstance(theirs, list | tuple):
        assert type(mine) is type(theirs)
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    else:
        assert mine == theirs


# ---- pickles


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def older(values, keys=(), storages=b""):
    """Returns a file of torch's older layout with this pickle of values."""
    return (
        b"".join(pickle.dumps(head, 2) for head in (MAGIC, 1001, SYSTEM))
        + values
        + pickle.dumps(list(keys), 2)
        + storages
    )


def archive(path, values, members=()):
    """Writes a file of torch's present layout with this pickle of values."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", values)
        for name, data in dict(members).items():
            file.writestr(f"x/{name}", data)
    return path


def plain(path, values):
    """Writes bytes as they are."""
    path.write_bytes(values)
    return path


def zipped(path, values):
    """Writes bytes compressed by gzip."""
    path.write_bytes(gzip.compress(values, 1))
    return path


def text(value):
    """Returns the instruction that puts UTF-8 on the stack."""
    return b"X" + struct.pack("<I", len(value)) + value


def imported(full):
    """Returns the instruction that looks a function or class up by its full name."""
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


class Storage:
    """Pickles as a reference to a storage of float32."""

    def __init__(self, size=6, key="0", kind=torch.FloatStorage):
        self.reference = "storage", kind, key, "cpu", size


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.reference if isinstance(obj, Storage) else None


class OlderPickler(Pickler):
    def persistent_id(self, obj):
        return (*obj.reference, None) if isinstance(obj, Storage) else None


def view(shape, stride, offset=0, storage=None):
    """Pickles as a tensor."""
    return Call(torch._utils._rebuild_tensor_v2, storage or Storage(), offset, shape, stride, False, OrderedDict())


def pickled(tree, kind=Pickler):
    """Returns the pickle of a tree of calls and storages."""
    file = io.BytesIO()
    kind(file, 2).dump(tree)
    return file.getvalue()


def of_views(path, layout, tree):
    """Writes a file of tensors that are views of one storage, the numbers from 0 to 5."""
    if layout == "archive":
        return archive(path, pickled(tree), {"data/0": W.tobytes()})
    return plain(path, older(pickled(tree, OlderPickler), ["0"], struct.pack("<q", 6) + W.tobytes()))


# ---- archives and safetensors


def npy(array, shape=None, descr=None, fortran=False):
    file = io.BytesIO()
    header = {"descr": descr or array.dtype.str, "fortran_order": fortran, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def npz(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def safetensors(path, header, data=bytes(24), length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape=(2, 3), start=0, stop=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}
