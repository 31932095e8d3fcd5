"""Rows 9 and 20 to 22: files of strangers that are damaged or made to do harm end in one line that names them.

No code of theirs runs, nothing is written, and neither time nor memory goes beyond what an honest file takes.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import time
import zipfile
import zlib
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Child
from safetensors.torch import load_file, save_file

import sae
from cli.evaluate import main as sae_eval
from sae import weights
from sae.coder import SparseCoder
from sae.errors import ConfigError, DataError
from sae.files import sha256_file
from sae.places import LocalFiles
from sae.selection.jumprelu import JumpReLU
from sae.spec import CoderSpec
from sae.weights import Inert, read_pickle

READERS = (weights.shapes, weights.tensors)


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


# ---- pickles with code


MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def older(values, keys=(), storages=b""):
    """Returns a file of torch's older layout with this pickle of values."""
    return b"".join(pickle.dumps(head, 2) for head in (MAGIC, 1001, SYSTEM)) + values + pickle.dumps(list(keys), 2) + storages


def by_stack(module, name, text):
    """Returns a pickle that calls module.name(text), the name looked up with its dots."""
    parts = [b"\x8c" + bytes([len(part)]) + part for part in (module, name)]
    return b"\x80\x04" + b"".join(parts) + b"\x93X" + struct.pack("<I", len(text)) + text + b"\x85R."


CODE = {
    "system": lambda command: pickle.dumps(Call(os.system, command), 2),
    "system, protocol 0": lambda command: pickle.dumps(Call(os.system, command), 0),
    "system, protocol 5": lambda command: pickle.dumps(Call(os.system, command), 5),
    "in the depth": lambda command: pickle.dumps({"model": [{"W": (torch.ones(2), Call(os.system, command))}]}, 4),
    "eval": lambda command: pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 2),
    "exec": lambda command: pickle.dumps(Call(exec, f"import os; os.system({command!r})"), 4),
    "subprocess": lambda command: pickle.dumps(Call(subprocess.check_call, ["sh", "-c", command]), 4),
    "partial": lambda command: pickle.dumps(Call(partial(os.system, command)), 4),
    "torch's own import": lambda command: by_stack(b"torch.serialization", b"os.system", command.encode()),
    "a pickle in a pickle": lambda command: pickle.dumps(
        {"W": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, command), 2))}, 4
    ),
    "a file in a pickle": lambda command: pickle.dumps(
        Call(torch.storage._load_from_bytes, older(pickle.dumps(Call(os.system, command), 2))), 4
    ),
    "an old instance": lambda command: b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
    "an old object": lambda command: b"(cos\nsystem\nS" + repr(command).encode() + b"\no.",
}


def archive(path, values, members=()):
    """Writes a file of torch's present layout with this pickle of values."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", values)
        for name, data in dict(members).items():
            file.writestr(f"x/{name}", data)
    return path


def plain(path, values):
    path.write_bytes(values)
    return path


def zipped(path, values):
    path.write_bytes(gzip.compress(values, 1))
    return path


CONTAINERS = {
    "archive": lambda folder, values: archive(folder / "x.pt", values),
    "older": lambda folder, values: plain(folder / "x.pth", older(values)),
    "plain": lambda folder, values: plain(folder / "x.bin", values),
    "zipped": lambda folder, values: zipped(folder / "x.pkl.gz", values),
    "older, zipped": lambda folder, values: zipped(folder / "x.pkl.gz", older(values)),
}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def touch(marker):
    return f"touch '{marker}'"


@pytest.mark.parametrize("name", CODE)
def test_the_code_would_run_if_it_were_unpickled(marker, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        try:
            pickle.loads(CODE[name](touch(marker)))
        except Exception as error:  # what it returns is no storage
            assert "touch" not in str(error)
    assert marker.exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", CODE)
def test_code_in_a_pickle_never_runs(tmp_path, marker, name, container):
    path = CONTAINERS[container](tmp_path, CODE[name](touch(marker)))
    refused(path, "is refused: (it wants to import|its instruction)")
    with contextlib.suppress(DataError):
        read_pickle(path, ("", "posix", "builtins"))  # whatever stands for a class of theirs, it stands for nothing
    weights.verify(path)
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("system", "it wants to import posix.system, which no file of tensors needs"),
        ("eval", "it wants to import __builtin__.eval"),
        ("torch's own import", "it wants to import torch.serialization.os.system"),
        ("a pickle in a pickle", "it wants to import posix.system"),
        ("an old instance", "its instruction STRING is not one that files of tensors need"),
    ],
)
def test_what_a_pickle_wants_to_import_is_named(tmp_path, marker, name, said):
    refused(CONTAINERS["archive"](tmp_path, CODE[name](touch(marker))), said)


@pytest.mark.parametrize("file", ["ae.pt", "x.pth", "7.pt", "pytorch_model.bin", "gpt2_layer_3.pkl.gz"])
def test_a_folder_with_such_a_file_is_not_loaded(tmp_path, marker, file, capsys):
    values = CODE["in the depth"](touch(marker))
    (zipped if file.endswith(".gz") else archive)(tmp_path / file, values)
    config = {"trainer": {"dict_class": "AutoEncoder", "activation_dim": 4, "dict_size": 8}, "buffer": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((DataError, ConfigError)) as error:
        sae.load(tmp_path)
    assert str(error.value).isprintable()
    assert sae_eval([str(tmp_path)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


OBJECT = name("sae_training.config.Config") + b")\x81"  # an object of a class that comes as Inert
TRICKS = {
    "its class": text(b"__class__") + name("torch.FloatStorage"),
    "its methods": text(b"__setstate__") + name("torch.device") + text(b"__reduce__") + name("torch.device"),
    "its dict": text(b"__dict__") + b"}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_objects_without_their_class_keep_no_power_of_their_own(tmp_path, trick):
    values = b"\x80\x02" + OBJECT + b"}(" + TRICKS[trick] + b"ub}b."
    found = read_pickle(archive(tmp_path / "x.pt", values), ("sae_training.",))
    assert type(found) is Inert
    assert Inert.__dict__.keys() == {"__module__", "__doc__", "__dict__", "__weakref__"}
    assert vars(Inert()) == {}


def test_a_change_by_what_is_no_dict_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02" + OBJECT + b"]b.")
    refused(path, "it takes a list for a dict", lambda path: read_pickle(path, ("sae_training.",)))


TWICE = b"N\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple of 2^60 tuples
BAD_VALUES = {
    "a change to a function": (name("torch.device") + b"}(" + text(b"x") + b"K\x01ubb", "it wants to change a _Name"),
    "a change to a tensor's dtype": (name("torch.float32") + b"}b", "it wants to change a dtype"),
    "a call of a value": (b"K\x01)R", "it takes a int for a _Name"),
    "a call of a storage": (name("torch.FloatStorage") + b")R", "it wants to call torch.FloatStorage"),
    "a call with a list": (name("torch.device") + b"]R", "it takes a list for a tuple"),
    "a call with many": (name("torch.device") + b"(" + b"N" * 9 + b"tR", "it wants to call torch.device in a way"),
    "a text that is packed": (name("_codecs.encode") + text(b"a") + text(b"zip") + b"\x86R", "it wants to encode text"),
    "bytes from a number": (name("builtins.bytearray") + b"\x8a\x05\0\0\0\0\x17\x85R", "import builtins.bytearray"),
    "a set": (b"\x8f", "its instruction EMPTY_SET"),
    "a tuple as a key": (TWICE + b"}h\x00Ns", "a tuple is no name of a tensor"),
    "an endless key": (b"}\x8a\xff" + b"\x7f" * 255 + b"Ns", "a int is no name of a tensor"),
    "an append to a tuple": (b")Na", "it takes a tuple for a list"),
    "an item of a list": (b"]NNs", "it takes a list for a dict"),
    "a name of no text": (TWICE + text(b"x") + b"\x93", "it takes a tuple for a str"),
    "a reference to nothing": (b"NQ", "it takes a NoneType for a tuple"),
    "a reference to a module": (text(b"module") + b"NNNN\x85\x85\x85\x85\x86Q", "no storage of tensors"),
    "a storage of no kind": (b"(" + text(b"storage") + b"NNNNtQ", "it takes a NoneType for a _Name"),
    "a storage of another kind": (
        b"(" + text(b"storage") + name("torch.device") + text(b"0") + b"NK\x01tQ",
        "it takes torch.device for a storage",
    ),
    "a storage of a nested key": (
        TWICE + b"(" + text(b"storage") + name("torch.FloatStorage") + b"h\x00NK\x01tQ",
        "it takes a tuple for a str",
    ),
    "a storage that is not there": (
        b"(" + text(b"storage") + name("torch.FloatStorage") + text(b"../../x") + b"NK\x01tQ",
        "damaged or no file of tensors: 'x/data/../../x'",
    ),
    "a tensor of no storage": (
        name("torch._utils._rebuild_tensor_v2") + b"(NK\0))tR",
        "it takes a NoneType for a _Storage",
    ),
    "nothing": (b"", "is damaged or no file of tensors"),
    "an open mark": (b"(", "is damaged or no file of tensors"),
    "no mark": (b"t", "is damaged or no file of tensors"),
    "a value that was not kept": (b"h\x05", "is damaged or no file of tensors"),
    "a length beyond the end": (b"X\xff\xff\xff\x7f", "is damaged or no file of tensors"),
    "a length beyond all": (b"\x8d" + b"\xff" * 7 + b"\x7f", "is damaged or no file of tensors"),
    "a name without an end": (b"c" + b"x" * 100_000, "is damaged or no file of tensors"),
    "a name that is long": (b"c" + b"x" * 2000 + b"\ny\n", "it wants to import 'x"),
    "a name with a new line": (text(b"a\nb") + text(b"\x1b[31m") + b"\x93", r"it wants to import 'a\\nb\.\\x1b"),
    "an unknown instruction": (b"\xff", "is damaged or no file of tensors"),
    "tensors called the same": (None, "two tensors are called a.b"),
    "a tensor with no name": (None, r"'a\\nb' is no name of a tensor"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_pickles_that_do_what_files_of_tensors_do_not_are_refused(tmp_path, case):
    values, message = BAD_VALUES[case]
    path = tmp_path / "x.pt"
    if values is None:
        w = torch.ones(1)
        torch.save({"a.b": w, "a": {"b": w}} if "same" in case else {"a\nb": w}, path)
    else:
        archive(path, b"\x80\x04" + values + b".")
    started = time.process_time()
    refused(path, message)
    assert time.process_time() - started < 2


def test_what_follows_a_pickle_is_not_left_out(tmp_path):
    whole = older(pickle.dumps({"step": 1}, 2))
    for name, raw in (("x.bin", pickle.dumps({"W": torch.ones(2)})), ("x.pth", whole)):
        path = plain(tmp_path / name, raw)
        read_pickle(path)
        plain(path, raw + raw)
        refused(path, "bytes follow that belong to nothing")


# ---- tensors that are not there


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
    return Call(torch._utils._rebuild_tensor_v2, storage or Storage(), offset, shape, stride, False, OrderedDict())


def pickled(tree, kind=Pickler):
    file = io.BytesIO()
    kind(file, 2).dump(tree)
    return file.getvalue()


def of_views(folder, layout, tree, size=6):
    numbers = np.arange(6, dtype=np.float32).tobytes()
    if layout == "archive":
        return archive(folder / "x.pt", pickled(tree), {"data/0": numbers})
    return plain(folder / "x.pth", older(pickled(tree, OlderPickler), ["0"], struct.pack("<q", size) + numbers))


@pytest.mark.parametrize("layout", ["archive", "older"])
def test_views_within_their_storage_are_read(tmp_path, layout):
    tree = {"a": view((2, 3), (3, 1)), "b": view((2,), (3,), 1), "c": view((), (), 5), "d": view((0, 9), (9, 1), 6)}
    found = weights.tensors(of_views(tmp_path, layout, tree))
    assert [t.tolist() for t in found.values()] == [[[0, 1, 2], [3, 4, 5]], [1, 4], 5, []]


OUTSIDE = {
    "longer": view((7,), (1,)),
    "a hundred gigabytes": view((25 * 10**9,), (1,)),
    "far apart": view((2,), (10**12,)),
    "behind": view((6,), (1,), 1),
    "before": view((2,), (1,), -1),
    "backwards": view((2,), (-1,), 3),
    "a negative length": view((-1,), (1,)),
    "lengths that overflow": view((2**32, 2**32), (2**32, 1)),
    "too many strides": view((2,), (1, 1)),
    "the same number": view((10**6, 10**6), (0, 0)),
    "many axes": view((1,) * 9, (1,) * 9),
    "a text for a length": view(("2",), (1,)),
    "a list for a shape": view([2], (1,)),
    "another length of the storage": view((2,), (1,), storage=Storage(5)),
    "a negative storage": view((2,), (1,), storage=Storage(-6)),
    "a huge storage": view((2,), (1,), storage=Storage(25 * 10**9)),
    "a storage of other numbers": view((2,), (1,), storage=Storage(kind=torch.DoubleStorage)),
    "another storage": view((2,), (1,), storage=Storage(key="1")),
}


@pytest.mark.parametrize("layout", ["archive", "older"])
@pytest.mark.parametrize("case", OUTSIDE)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, case, layout):
    path = of_views(tmp_path, layout, {"W": OUTSIDE[case]})
    refused(path, "is refused|is damaged or no file of tensors")


def test_numbers_of_other_machines_are_refused(tmp_path):
    values = pickled({"W": view((2,), (1,))})
    path = archive(tmp_path / "x.pt", values, {"data/0": bytes(24), "byteorder": b"big"})
    refused(path, "its numbers are not little-endian")
    other = b"".join(pickle.dumps(head, 2) for head in (MAGIC, 1001, {**SYSTEM, "little_endian": False}))
    refused(plain(tmp_path / "x.pth", other + pickle.dumps({}, 2) + pickle.dumps([], 2)), "not little-endian")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, tensor):
    torch.save({"W": tensor}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", r"it wants to import torch\.")


# ---- archives


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


W = np.arange(6, dtype=np.float32)
BAD_ARRAYS = {
    "a hundred gigabytes": (npy(W, (25 * 10**9,)), "tensor W is refused: it declares 100000000000 bytes but holds 24"),
    "one more": (npy(W, (7,)), "it declares 28 bytes but holds 24"),
    "one less": (npy(W, (5,)), "it declares 20 bytes but holds 24"),
    "negative": (npy(W, (-2, -3)), "tensor W is refused"),
    "overflow": (npy(W, (2**62, 4)), "tensor W is refused"),
    "no whole number": (npy(W, (6.0,)), "tensor W is damaged: it has no header"),
    "truth": (npy(W, (True, 6)), "tensor W"),
    "endless": (npy(W, (10**400, 10)), "tensor W|damaged"),
    "many axes": (npy(W, (6,) + (1,) * 40), "tensor W is refused"),
    "objects": (npy(W, (3,), "|O"), "tensor W is refused: it holds object, not numbers"),
    "text": (npy(W, (6,), "<U1"), "tensor W is refused: it holds <U1, not numbers"),
    "complex": (npy(W, (3,), "<c8"), "it holds complex64, not numbers"),
    "bfloat16": (npy(W, (12,), "|V2"), r"it holds \|V2, not numbers"),
    "records": (npy(W, (6,), [("a", "<f4")]), "tensor W is refused: it holds"),
    "no dtype": (npy(W, (6,), "nonsense"), "tensor W is damaged: it has no header"),
    "code": (npy(W).replace(b"'fortran_order': False", b"'x': __import__('os')"), "tensor W is damaged"),
    "a long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{" + b" " * 100_000, "tensor W is damaged"),
    "another version": (b"\x93NUMPY\x09\x00" + npy(W)[8:], "tensor W is damaged"),
    "another file": (b"PK\x03\x04", "tensor W is damaged"),
    "nothing": (b"", "tensor W is damaged"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_not_there_are_named(tmp_path, case, method):
    data, message = BAD_ARRAYS[case]
    refused(npz(tmp_path / "x.npz", {"b.npy": npy(W), "W.npy": data}, method), message)


def test_objects_in_an_npz_are_not_unpickled(tmp_path, marker):
    np.savez(tmp_path / "x.npz", W=np.array([Call(os.system, touch(marker))], dtype=object))
    refused(tmp_path / "x.npz", "tensor W is refused: it holds object, not numbers")
    assert not marker.exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["W"]
    assert marker.exists()


def patched(path, *places):
    """Changes bytes of an archive: (signature of a header, which of them, offset in it, bytes)."""
    raw = bytearray(path.read_bytes())
    for signature, which, offset, data in places:
        at = -1
        for _ in range(which + 1):
            at = raw.index(signature, at + 1)
        raw[at + offset : at + offset + len(data)] = data
    path.write_bytes(raw)
    return path


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
LIES = {  # in an archive of W.npy (152 bytes) and b.npy
    "a longer member": ([(CENTRAL, 0, 20, b"\xff\xff\xff\x7f" * 2)], "lie one over the other"),
    "another size": ([(CENTRAL, 0, 24, b"\xff")], "its member W.npy has two sizes"),
    "a member beyond the end": ([(CENTRAL, 0, 42, b"\xff\xff\xff\x7f")], "damaged"),
    "a member in another": ([(CENTRAL, 1, 42, b"\0\0\0\0")], "damaged"),
    "a name of its own": ([(LOCAL, 0, 30, b"X")], "damaged"),
    "a longer name of its own": ([(LOCAL, 0, 26, b"\xff\xff")], "damaged"),
    "a longer field of its own": ([(LOCAL, 1, 28, b"\xff\xff")], "its member b.npy ends beyond the file"),
    "a shifted field of its own": ([(LOCAL, 0, 28, b"\x01")], "tensor W is damaged"),
    "no header of its own": ([(LOCAL, 1, 0, b"XX")], "damaged"),
    "encrypted": ([(CENTRAL, 0, 8, b"\x01")], "its member W.npy is encrypted"),
    "strongly encrypted": ([(CENTRAL, 0, 8, b"\x41")], "its member W.npy is encrypted"),
    "another method": ([(CENTRAL, 0, 10, b"\x0c")], "its member W.npy is neither stored nor deflated"),
    "an unknown method": ([(CENTRAL, 0, 10, b"\x63")], "its member W.npy is neither stored nor deflated"),
    "another version": ([(CENTRAL, 0, 6, b"\xff")], "damaged"),
    "two of one name": ([(CENTRAL, 1, 46, b"W"), (LOCAL, 1, 30, b"W")], "it holds two members of one name"),
    "a directory beyond the end": ([(END, 0, 16, b"\xff\xff\xff\x7f")], "cannot read|damaged"),
    "a long directory": ([(END, 0, 12, b"\xff\xff\xff\x7f")], "damaged"),
    "no directory": ([(END, 0, 8, b"\0\0\0\0"), (END, 0, 12, b"\0\0\0\0")], None),
}


@pytest.mark.parametrize("lie", LIES)
def test_archives_that_contradict_themselves_are_refused(tmp_path, lie):
    places, message = LIES[lie]
    path = patched(npz(tmp_path / "x.npz", {"W.npy": npy(W), "b.npy": npy(W)}), *places)
    if message is None:  # an empty archive is whole, and holds nothing
        assert weights.tensors(path) == {}
    else:
        refused(path, message)


NAMES = ["../../x.npy", "/x.npy", "a/../../x.npy", "a\\x.npy", "new\nline.npy", "\x1b[31m.npy", "x.txt", "n" * 600 + ".npy"]


@pytest.mark.parametrize("member", NAMES)
def test_members_with_such_names_are_refused_and_not_written(tmp_path, member):
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    refused(npz(folder / "x.npz", {"W.npy": npy(W), member: npy(W)}), "is refused: ")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "side", "x.npz"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    refused(npz(tmp_path / "x.npz", {"W.npy": npy(W)}, method), "its member W.npy is neither stored nor deflated")


def test_archives_of_other_things_are_refused(tmp_path):
    for members in ({}, {"a/data.pkl": b"", "b/data.pkl": b""}, {"a/b/data.pkl": b""}, {"data.pkl": b""}):
        refused(npz(tmp_path / "x.pt", {"README": b"", **members}), "it is an archive, but not one of torch")


def flips(raw, count, seed=0):
    """Yields copies of some bytes with one bit changed."""
    draw = random.Random(seed)
    for at in sorted(draw.sample(range(8 * len(raw)), min(count, 8 * len(raw)))):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        yield at // 8, bytes(changed)


@pytest.mark.parametrize("make", ["npz", "compressed", "pt"])
def test_changed_numbers_in_archives_are_found_by_their_checksums(tmp_path, make):
    numbers = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    path = tmp_path / ("x.pt" if make == "pt" else "x.npz")
    if make == "pt":
        torch.save({"W": torch.from_numpy(numbers)}, path)
    else:
        (np.savez if make == "npz" else np.savez_compressed)(path, W=numbers)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        (info,) = (i for i in file.infolist() if i.filename.endswith(("W.npy", "data/0")))
    start = info.header_offset + 30 + sum(struct.unpack("<HH", raw[info.header_offset + 26 :][:4]))
    data = raw[start : start + info.compress_size]
    for _, changed in flips(data, 60):
        path.write_bytes(raw[:start] + changed + raw[start + len(data) :])
        with pytest.raises(DataError, match=rf"{path} is damaged: its member {info.filename}: "):
            weights.verify(path)
    for end in range(0, len(raw), 31):
        path.write_bytes(raw[:end])
        refused(path, "damaged")


@pytest.mark.parametrize("kind", ["x.npz", "x.pt", "x.pth", "x.bin", "x.pkl.gz", "x.safetensors"])
def test_damage_anywhere_ends_in_one_line_or_in_tensors(tmp_path, kind):
    path, tensors = tmp_path / kind, {"W": torch.randn(4, 3), "k": torch.tensor(3.0)}
    if kind == "x.npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif kind == "x.safetensors":
        save_file(tensors, path)
    elif kind in ("x.bin", "x.pkl.gz"):
        (plain if kind == "x.bin" else zipped)(path, pickle.dumps(tensors, 4))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "x.pt")
    raw, ends = path.read_bytes(), {"damaged": 0, "read": 0}
    if kind.endswith(".gz"):
        raw = gzip.decompress(raw)
    for _, changed in flips(raw, 250):
        (zipped if kind.endswith(".gz") else plain)(path, changed)
        try:
            weights.verify(path)
            for tensor in weights.tensors(path).values():
                assert tensor.sum() is not None
            ends["read"] += 1
        except DataError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()
            ends["damaged"] += 1
    assert min(ends.values()) > 0


# ---- safetensors


def safetensors(path, header, data=bytes(24), length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape=(2, 3), start=0, stop=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


UNREADABLE, NUMBERS = "its header cannot be read", "tensor W has a shape or place of other than whole numbers"
BAD_HEADERS = {
    "text": (b"hello", UNREADABLE),
    "no UTF-8": (b"\xff\xfe\xfd", UNREADABLE),
    "UTF-16": ('{"W": 1}'.encode("utf-16"), UNREADABLE),
    "a list": ([1], UNREADABLE),
    "a number": (b"5", UNREADABLE),
    "deep": (b'{"W":' * 50_000, UNREADABLE),
    "deep and closed": (b'{"W":' * 50_000 + b"1" + b"}" * 50_000, UNREADABLE),
    "a key twice": (b'{"W": %s, "W": %s}' % ((json.dumps(entry()).encode(),) * 2), UNREADABLE),
    "no entry": ({"W": 1}, UNREADABLE),
    "no shape": ({"W": {"dtype": "F32", "data_offsets": [0, 24]}}, UNREADABLE),
    "one offset": ({"W": {**entry(), "data_offsets": [0]}}, UNREADABLE),
    "three offsets": ({"W": {**entry(), "data_offsets": [0, 12, 24]}}, UNREADABLE),
    "offsets of text": ({"W": {**entry(), "data_offsets": "ab"}}, "tensor W"),
    "a shape of text": ({"W": entry("ab")}, NUMBERS),
    "a shape that is a number": ({"W": entry(6)}, UNREADABLE),
    "no whole number": ({"W": entry((2.0, 3.0))}, NUMBERS),
    "truth": ({"W": entry((True, 6))}, NUMBERS),
    "negative": ({"W": entry((-2, -3))}, NUMBERS),
    "overflow": ({"W": entry((2**62, 4), 0, 2**66)}, NUMBERS),
    "beyond 64 bits": ({"W": entry((2**64,), 0, 24)}, NUMBERS),
    "a long number": (b'{"W": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 24]}}' % (b"9" * 5000), UNREADABLE),
    "many axes": ({"W": entry((1,) * 9)}, NUMBERS),
    "a hundred gigabytes": (
        {"W": entry((25, 10**9), 0, 10**11)},
        "its header declares 100,000,000,000 bytes of tensors, not what follows",
    ),
    "another size": ({"W": entry((2, 4))}, r"tensor W of shape \(2, 4\) takes 32 bytes from 0 on, but is said to lie at 0 to 24"),
    "half the size": ({"W": entry(dtype="F16")}, r"tensor W of shape \(2, 3\) takes 12 bytes"),
    "backwards": ({"W": entry(start=24, stop=0)}, "tensor W of shape"),
    "a hole": ({"W": entry((1,), 0, 4), "b": entry((1,), 20, 24)}, r"tensor b of shape \(1,\) takes 4 bytes from 4 on"),
    "a hole before": ({"W": entry((1,), 20, 24)}, "tensor W of shape"),
    "overlapping": ({"W": entry(), "b": entry((1,), 20, 24)}, "tensor b of shape"),
    "the same place": ({"W": entry(), "b": entry()}, "tensor b of shape"),
    "less than follows": ({"W": entry((5,), 0, 20)}, "its header declares 20 bytes of tensors, not what follows"),
    "nothing": ({}, "its header declares 0 bytes"),
    "only metadata": ({"__metadata__": {"a": "b"}}, "its header declares 0 bytes"),
    "an unknown dtype": ({"W": entry(dtype="F4")}, "tensor W holds F4; known are F64, F32"),
    "a dtype that is a list": ({"W": entry(dtype=["F32"])}, "tensor W holds"),
    "a long dtype": ({"W": entry(dtype="F" * 10_000)}, "tensor W holds 'F"),
    "a name of two lines": ({"W\n\x1b[31m": entry()}, "is no name of a tensor"),
    "a long name": ({"W" * 1000: entry()}, "is no name of a tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_headers_that_lie_are_refused(tmp_path, case):
    header, message = BAD_HEADERS[case]
    started = time.process_time()
    refused(safetensors(tmp_path / "x.safetensors", header), message)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 25, 23])
def test_headers_longer_than_the_file_are_refused(tmp_path, length):
    path = safetensors(tmp_path / "x.safetensors", b"", bytes(24), length)
    refused(path, "its header is longer than the file" if length > 24 else UNREADABLE)


def test_a_header_that_is_right_is_read(tmp_path):
    path = safetensors(tmp_path / "x.safetensors", {"W": entry((5,), 0, 20), "e": entry((0, 3), 20, 20), "k": entry((), 20, 24)})
    assert weights.shapes(path) == {"W": (5,), "e": (0, 3), "k": ()}
    assert sorted(weights.tensors(path)) == ["W", "e", "k"]


# ---- what is no file


KINDS = ["x.safetensors", "x.npz", "x.pt", "x.bin", "x.pkl.gz"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["empty", "short", "missing", "folder", "pipe", "device", "loop", "dangling", "zeros"])
def test_what_is_no_file_of_tensors_is_named_at_once(tmp_path, kind, what):
    path = tmp_path / kind
    make = {
        "empty": path.touch,
        "short": lambda: path.write_bytes(b"PK"),
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "zeros": lambda: path.write_bytes(bytes(10_000)),
    }
    make[what]()
    message = {"folder": "not a file of tensors", "pipe": "not a file", "device": "not a file", "missing": "cannot read"}
    refused(path, message.get(what, "cannot read|damaged|refused"))
    if what in ("missing", "folder", "pipe", "device", "loop", "dangling"):
        refused(path, "not a file|cannot read", weights.verify)


def without_rights(folder, result):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    said = []
    for act in (
        lambda: weights.tensors(folder / "x.safetensors"),
        lambda: weights.verify(folder / "x.npz"),
        lambda: weights.shapes(folder / "x.pt"),
        lambda: LocalFiles(folder).path("cfg.json").read_bytes() and sae.load(folder),
    ):
        try:
            act()
            said.append("nothing")
        except (DataError, ConfigError, PermissionError) as error:
            said.append(f"{type(error).__name__}: {error}")
    print(json.dumps(said))
    return 0


def test_files_that_may_not_be_read_are_named(tmp_path):
    folder = tmp_path / "coder"
    folder.mkdir()
    for name in ("x.safetensors", "x.npz", "x.pt", "cfg.json"):
        (folder / name).write_bytes(b"{}")
        (folder / name).chmod(0)
    for above in (folder, *folder.parents):
        if above == Path("/tmp"):
            break
        above.chmod(0o755)
    child = Child(tmp_path / "log.txt", partial(without_rights, folder, None))
    assert child.wait() == 0, child.output
    said = json.loads(child.output.splitlines()[-1])
    for line, name in zip(said, ("x.safetensors", "x.npz", "x.pt"), strict=False):
        assert line == f"DataError: cannot read {folder / name}: Permission denied"
    assert "Permission denied" in said[3]


# ---- bombs


GIB = 2**30


def deflated(size):
    """Returns a raw deflate stream of zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def lying_archive(path, name, stream, declared, crc=0, copies=1):
    """Writes an archive by hand, whose directory says that a member unpacks to so many bytes, some times over."""
    fields = (20, 0, 8, 0, 0x21, crc, len(stream), declared, len(name), 0)
    local = struct.pack("<4s5H3I2H", LOCAL, *fields) + name + stream
    central = b"".join(
        struct.pack("<4s6H3I5H2I", CENTRAL, 20, *fields[:-1], 0, 0, 0, 0, 0, 0) + f"{i:06d}".encode() + name[6:]
        if copies > 1
        else struct.pack("<4s6H3I5H2I", CENTRAL, 20, *fields[:-1], 0, 0, 0, 0, 0, 0) + name
        for i in range(copies)
    )
    end = struct.pack("<4s4H2IH", END, 0, 0, copies, copies, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def sparse(path, head, size):
    """Writes a file that is as long as it says, and has room on the disk for its head only."""
    path.write_bytes(head)
    os.truncate(path, size)


def bombs(folder):
    big = npy(np.zeros(0, np.float32), (2**26,))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = packer.compress(big) + b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    lying_archive(folder / "deflated.npz", b"W.npy", stream, 2**28 + len(big))
    lying_archive(folder / "lying.npz", b"W.npy", stream, 152)
    lying_archive(folder / "over.npz", b"000000W.npy", stream[: 2**16], 2**20, copies=5000)
    lying_archive(folder / "deflated.pt", b"x/data.pkl", deflated(2**28), 2**28)
    npz(folder / "bzip2.npz", {"W.npy": bytes(2**24)}, zipfile.ZIP_BZIP2)
    npz(folder / "declared.npz", {"W.npy": npy(W, (25 * 10**9,))})
    with gzip.open(folder / "zeros.pkl.gz", "wb", 6) as file:
        for _ in range(256):
            file.write(bytes(2**20))
    with gzip.open(folder / "text.pkl.gz", "wb", 6) as file:  # one value of 256 MiB
        file.write(b"\x80\x04X" + struct.pack("<I", 2**28))
        for _ in range(256):
            file.write(bytes(2**20))
    safetensors(folder / "declared.safetensors", {"W": entry((25, 10**9), 0, 10**11)})
    safetensors(folder / "length.safetensors", b"{", length=2**63)
    sparse(folder / "header.safetensors", (90 * GIB).to_bytes(8, "little") + b'{"', 100 * GIB)
    sparse(folder / "zeros.safetensors", b"", 100 * GIB)
    sparse(folder / "zeros.pt", b"", 100 * GIB)
    sparse(folder / "zeros.npz", b"PK\x03\x04", 100 * GIB)
    sparse(folder / "line.pt", b"c", 100 * GIB)
    sparse(folder / "value.pt", b"\x80\x04\x8e" + (90 * GIB).to_bytes(8, "little"), 100 * GIB)
    sparse(folder / "archive.pt", LOCAL, 100 * GIB)
    archive(folder / "lists.pt", b"\x80\x02" + b"]" * 4_000_000 + b".")
    archive(folder / "twice.pt", b"\x80\x02" + TWICE + b".")
    archive(folder / "key.pt", b"\x80\x02}" + TWICE + b"h\x00Ns.")
    of_views(folder, "older", {"W": OUTSIDE["a hundred gigabytes"]}).rename(folder / "view.pt")
    of_views(folder, "archive", {"W": OUTSIDE["the same number"]}).rename(folder / "expanded.pt")
    often = {str(i): view((2**16,), (1,), storage=Storage(2**16)) for i in range(5000)}
    archive(folder / "often.pt", pickled(often), {"data/0": bytes(2**18)})
    again = b"h\x01h\x02R" * 50_000  # the same call on the same value
    packed = b"(" + text(b"x" * 2**20) + text(b"latin1") + b"tq\x02R"
    plain(folder / "encoded.bin", b"\x80\x02](" + name("_codecs.encode") + b"q\x01" + packed + again + b"e.")
    inner = older(pickled(Storage(2**18), OlderPickler), ["0"], struct.pack("<q", 2**18) + bytes(2**20))
    packed = b"B" + struct.pack("<I", len(inner)) + inner + b"\x85q\x02R"
    call = name("torch.storage._load_from_bytes") + b"q\x01"
    plain(folder / "nested.bin", b"\x80\x03](" + call + packed + again + b"e.")
    fields = b"}(" + b"".join(text(b"%d" % i) + b"N" for i in range(20_000)) + b"uq\x02"
    objects = b"(" + b"h\x01)\x81h\x02b" * 50_000 + b"t"
    archive(folder / "fields.pt", b"\x80\x02" + fields + name("sae_training.config.Config") + b"q\x01" + objects + b".")
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 100_000))
    archive(folder / "keys.pt", b"\x80\x02}(" + keys + b"u.")  # all of one hash


BOMBS = [
    *("deflated.npz", "lying.npz", "over.npz", "deflated.pt", "bzip2.npz", "declared.npz", "zeros.pkl.gz", "text.pkl.gz"),
    *("declared.safetensors", "length.safetensors", "header.safetensors", "zeros.safetensors", "zeros.pt", "zeros.npz"),
    *("line.pt", "value.pt", "archive.pt", "lists.pt", "twice.pt", "key.pt", "view.pt", "expanded.pt", "often.pt"),
    *("encoded.bin", "nested.bin", "fields.pt", "keys.pt"),
]


def defused(folder, names):
    """Reads each file, in little room, and prints what came of it: error, MiB of memory at its peak, seconds."""
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if " kB" in line}
    resource.setrlimit(resource.RLIMIT_AS, (memory["VmSize"] + 8 * GIB, resource.RLIM_INFINITY))
    for name in names:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start, peak = time.process_time(), _peak()
        said = []
        for read in (weights.shapes, weights.tensors, weights.verify, partial(read_pickle, inert=("sae_training.",))):
            try:
                read(folder / name)
                said.append("")
            except DataError as error:
                said.append(str(error))
        print(json.dumps([name, said, (_peak() - peak) / 2**20, time.process_time() - start]), flush=True)
    return 0


def _peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    print("START", time.time())
    bombs(folder)
    print("BUILT", time.time())
    child = Child(folder / "log.txt", partial(defused, folder, BOMBS))
    assert child.wait(100) == 0, child.output
    print(child.output)
    print("DONE", time.time())
    lines = [json.loads(line) for line in child.output.splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_neither_memory_nor_time(outcomes, bomb):
    said, mebibytes, seconds = outcomes[bomb]
    for line in said[:2]:
        assert f"/{bomb}" in line
        assert line.isprintable()
    assert mebibytes < 160
    assert seconds < 10
