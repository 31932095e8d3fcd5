"""Row 20: pickles of strangers are data. None of their code runs, and no tensor is taken for what is not there."""

import contextlib
import json
import os
import pickle
import struct
import subprocess
from functools import partial

import pytest
import torch
from rigs.hostile import (
    MAGIC,
    SYSTEM,
    TWICE,
    Call,
    Storage,
    archive,
    imported,
    of_views,
    older,
    pickled,
    plain,
    refused,
    text,
    view,
    zipped,
)

import sae
from cli.evaluate import main as sae_eval
from sae.base.errors import ConfigError, DataError
from sae.untrusted import weights
from sae.untrusted.pickles import Inert, read_pickle


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
    with contextlib.suppress(Exception):  # what it returns is no storage
        pickle.loads(CODE[name](touch(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "container"),
    [
        *((name, "archive") for name in CODE),
        *(("a file in a pickle", kind) for kind in CONTAINERS if kind != "archive"),
    ],
)
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


OBJECT = imported("sae_training.config.Config") + b")\x81"  # an object of a class that comes as Inert
TRICKS = {
    "its class": text(b"__class__") + imported("torch.FloatStorage"),
    "its methods": text(b"__setstate__") + imported("torch.device") + text(b"__reduce__") + imported("torch.device"),
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


BAD_VALUES = {
    "a change to a function": (
        imported("torch.device") + b"}(" + text(b"x") + b"K\x01ubb",
        "it wants to change a _Name",
    ),
    "a change to a tensor's dtype": (imported("torch.float32") + b"}b", "it wants to change a dtype"),
    "a call of a value": (b"K\x01)R", "it takes a int for a _Name"),
    "a call of a storage": (imported("torch.FloatStorage") + b")R", "it wants to call torch.FloatStorage"),
    "a call with a list": (imported("torch.device") + b"]R", "it takes a list for a tuple"),
    "a call with many": (imported("torch.device") + b"(" + b"N" * 9 + b"tR", "it wants to call torch.device in a way"),
    "a text that is packed": (
        imported("_codecs.encode") + text(b"a") + text(b"zip") + b"\x86R",
        "it wants to encode text",
    ),
    "bytes from a number": (imported("builtins.bytearray") + b"\x8a\x05\0\0\0\0\x17\x85R", "import builtins.bytearray"),
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
        b"(" + text(b"storage") + imported("torch.device") + text(b"0") + b"NK\x01tQ",
        "it takes torch.device for a storage",
    ),
    "a storage of a nested key": (
        TWICE + b"(" + text(b"storage") + imported("torch.FloatStorage") + b"h\x00NK\x01tQ",
        "it takes a tuple for a str",
    ),
    "a storage that is not there": (
        b"(" + text(b"storage") + imported("torch.FloatStorage") + text(b"../../x") + b"NK\x01tQ",
        "damaged or no file of tensors: 'x/data/../../x'",
    ),
    "a tensor of no storage": (
        imported("torch._utils._rebuild_tensor_v2") + b"(NK\0))tR",
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
    refused(path, message)


def test_what_follows_a_pickle_is_not_left_out(tmp_path):
    whole = older(pickle.dumps({"step": 1}, 2))
    for name, raw in (("x.bin", pickle.dumps({"W": torch.ones(2)})), ("x.pth", whole)):
        path = plain(tmp_path / name, raw)
        read_pickle(path)
        plain(path, raw + raw)
        refused(path, "bytes follow that belong to nothing")


# ---- tensors that are not there


@pytest.mark.parametrize("layout", ["archive", "older"])
def test_views_within_their_storage_are_read(tmp_path, layout):
    tree = {"a": view((2, 3), (3, 1)), "b": view((2,), (3,), 1), "c": view((), (), 5), "d": view((0, 9), (9, 1), 6)}
    found = weights.tensors(of_views(tmp_path / "x.pt", layout, tree))
    assert [t.tolist() for t in found.values()] == [[[0, 1, 2], [3, 4, 5]], [1, 4], 5, []]


OUTSIDE, ANOTHER = "lies outside of its storage of 6 numbers", "a storage declares|the length that is declared|damaged"
BAD_VIEWS = {
    "longer": (view((7,), (1,)), OUTSIDE),
    "a hundred gigabytes": (view((25 * 10**9,), (1,)), OUTSIDE),
    "far apart": (view((2,), (10**12,)), OUTSIDE),
    "behind": (view((6,), (1,), 1), OUTSIDE),
    "before": (view((2,), (1,), -1), OUTSIDE),
    "backwards": (view((2,), (-1,), 3), OUTSIDE),
    "a negative length": (view((-1,), (1,)), OUTSIDE),
    "lengths that overflow": (view((2**32, 2**32), (2**32, 1)), OUTSIDE),
    "too many strides": (view((2,), (1, 1)), "damaged or no file of tensors"),
    "the same number": (view((10**6, 10**6), (0, 0)), "its tensors are far larger than the file"),
    "many axes": (view((1,) * 9, (1,) * 9), "a tensor has more than 8 axes"),
    "a text for a length": (view(("2",), (1,)), "it takes a str for a int"),
    "a list for a shape": (view([2], (1,)), "it takes a list for a tuple"),
    "another length of the storage": (view((2,), (1,), storage=Storage(5)), ANOTHER),
    "a negative storage": (view((2,), (1,), storage=Storage(-6)), ANOTHER),
    "a huge storage": (view((2,), (1,), storage=Storage(25 * 10**9)), ANOTHER),
    "a storage of other numbers": (view((2,), (1,), storage=Storage(kind=torch.DoubleStorage)), ANOTHER),
    "another storage": (view((2,), (1,), storage=Storage(key="1")), "damaged or no file of tensors"),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, "archive") for case in BAD_VIEWS] + [(case, "older") for case in BAD_VIEWS if "storage" in case],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, case, layout):
    tensor, message = BAD_VIEWS[case]
    refused(of_views(tmp_path / "x.pt", layout, {"W": tensor}), message)


def test_storages_that_are_views_of_others_are_refused(tmp_path):
    storage = Storage()
    storage.reference += (("1", 0, 3),)
    values = pickled({"W": view((2,), (1,), storage=storage)})
    refused(archive(tmp_path / "x.pt", values, {"data/0": bytes(24)}), "no storage of tensors")


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
