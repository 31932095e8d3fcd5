"""Row 20: archives and safetensors that lie about what they hold are refused; damage is found where it can be."""

import gzip
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from rigs.hostile import CENTRAL, END, LOCAL, Call, W, entry, flips, npy, npz, plain, refused, safetensors, zipped
from safetensors.torch import save_file

from sae.base.errors import DataError
from sae.untrusted import weights

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


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_not_there_are_named(tmp_path, case):
    data, message = BAD_ARRAYS[case]
    refused(npz(tmp_path / "x.npz", {"b.npy": npy(W), "W.npy": data}), message)
    if case == "one more":
        refused(npz(tmp_path / "y.npz", {"W.npy": data}, zipfile.ZIP_DEFLATED), message)


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "x.npz", W=np.array([Call(os.system, f"touch '{marker}'")], dtype=object))
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


NAMES = [
    "../../x.npy",
    "/x.npy",
    "a/../../x.npy",
    "a\\x.npy",
    "new\nline.npy",
    "\x1b[31m.npy",
    "x.txt",
    "n" * 600 + ".npy",
]


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
    for _, changed in flips(raw, 120):
        (zipped if kind.endswith(".gz") else plain)(path, changed)
        try:
            weights.verify(path)
            ends["read"] += all(tensor.sum() is not None for tensor in weights.tensors(path).values())
        except DataError as error:
            ends["damaged"] += str(path) in str(error) and str(error).isprintable()
    assert min(ends.values()) > 0
    assert sum(ends.values()) == 120


# ---- safetensors


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
    "another size": (
        {"W": entry((2, 4))},
        r"tensor W of shape \(2, 4\) takes 32 bytes from 0 on, but is said to lie at 0 to 24",
    ),
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
    refused(safetensors(tmp_path / "x.safetensors", header), message)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 25, 23])
def test_headers_longer_than_the_file_are_refused(tmp_path, length):
    path = safetensors(tmp_path / "x.safetensors", b"", bytes(24), length)
    refused(path, "its header is longer than the file" if length > 24 else UNREADABLE)


def test_a_header_that_is_right_is_read(tmp_path):
    path = safetensors(
        tmp_path / "x.safetensors", {"W": entry((5,), 0, 20), "e": entry((0, 3), 20, 20), "k": entry((), 20, 24)}
    )
    assert weights.shapes(path) == {"W": (5,), "e": (0, 3), "k": ()}
    assert sorted(weights.tensors(path)) == ["W", "e", "k"]
