"""Pickles are read as data: what torch and pickle wrote comes back as it was."""

import gzip
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from rigs.hostile import assert_same

from sae.base.errors import DataError
from sae.untrusted import weights
from sae.untrusted.pickles import Inert, read_pickle
from sae.untrusted.weights import flatten

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
)


def contents():
    base = torch.randn(10, 7)
    return {
        "plain": torch.randn(3, 4),
        "transposed": base.T,
        "row": base[2],
        "column": base[:, 3],
        "slice": base[2:5, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "number": torch.tensor(3.5),
        "k": torch.tensor(4),
        "empty": torch.zeros(0, 5),
        "expand": torch.tensor(2.0).expand(30),
        "nested": {"x": [torch.ones(2), (torch.arange(3), 1, -5, 2.5, 10**40, "text", b"bytes", None, True)]},
        **{str(dtype): torch.tensor([0, 1, 2, 3]).to(dtype) for dtype in DTYPES},
    }


def module():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return layers.state_dict()


def saved(path, tree, protocol=None, archive=True):
    """Writes a tree in the container that the name says; with a protocol, by pickle itself."""
    if path.name.endswith(".pkl.gz"):
        with gzip.open(path, "wb") as file:
            pickle.dump(tree, file, protocol=protocol)
    elif protocol is not None:
        path.write_bytes(pickle.dumps(tree, protocol=protocol))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=archive)
    return path


CONTAINERS = [("w.pt", None, True), ("w.pth", None, False)]


@pytest.mark.parametrize(("name", "protocol", "archive"), CONTAINERS)
@pytest.mark.parametrize("make", [contents, module], ids=["contents", "module"])
def test_pickles_come_as_they_were_written(tmp_path, make, name, protocol, archive):
    tree = make()
    path = saved(tmp_path / name, tree, protocol, archive)
    assert_same(read_pickle(path), dict(tree))
    weights.verify(path)
    wanted = flatten(dict(tree))
    assert_same(weights.tensors(path), wanted)
    assert weights.shapes(path) == {name: tuple(tensor.shape) for name, tensor in wanted.items()}


@pytest.mark.parametrize("archive", [True, False])
def test_state_dicts_come_as_torchs_own_reader_gives_them(tmp_path, archive):
    path = saved(tmp_path / "w.pt", {"model": module(), "step": 3}, archive=archive)
    assert_same(read_pickle(path), torch.load(path, weights_only=True))


def test_what_lies_in_an_archive_is_mapped_and_may_be_changed_without_a_trace(tmp_path):
    path = saved(tmp_path / "w.pt", {"w": torch.ones(2, 3)})
    before = path.read_bytes()
    found = weights.tensors(path)["w"]
    found.mul_(2)
    assert found.tolist() == [[2] * 3] * 2
    assert path.read_bytes() == before
    assert weights.tensors(path)["w"].tolist() == [[1] * 3] * 2


def test_tensors_that_share_a_storage_do_so_again(tmp_path):
    w = torch.randn(4, 3)
    for archive in (True, False):
        found = weights.tensors(saved(tmp_path / "w.pt", {"a": w, "b": w.T}, archive=archive))
        found["a"][0, 1] = 9
        assert found["b"][1, 0] == 9


@dataclass
class Settings:
    d_in: int = 3
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@pytest.mark.parametrize(("name", "protocol", "archive"), [(*CONTAINERS[0],), (*CONTAINERS[1],), ("w.pkl.gz", 4, True)])
def test_objects_of_named_classes_come_without_their_class(tmp_path, name, protocol, archive):
    tree = {"cfg": Settings(d_in=7), "state_dict": {"W": torch.ones(2)}}
    path = saved(tmp_path / name, tree, protocol, archive)
    with pytest.raises(DataError, match=rf"it wants to import {__name__}\.Settings, which no file of tensors needs"):
        read_pickle(path)
    found = read_pickle(path, inert=(f"{__name__}.",))
    assert type(found["cfg"]) is Inert
    assert vars(found["cfg"]) == {"d_in": 7, "dtype": torch.float32, "device": "cpu"}
    assert list(weights.flatten(found)) == ["state_dict.W"]
