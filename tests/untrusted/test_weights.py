"""Weight files are read as those who wrote them read them: every container, layout, dtype and order."""

import gzip
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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


def assert_same(mine, theirs):
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
CONTAINERS += [(name, protocol, True) for name in ("w.bin", "w.pkl.gz") for protocol in (2, 3, 4, 5)]


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


# npz


def arrays():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 3))
    return {
        "W_enc": w.astype(np.float32),
        "fortran": np.asfortranarray(w.astype(np.float32)),
        "big_endian": w.astype(">f4"),
        "big_endian_fortran": np.asfortranarray(w.astype(">f8")),
        "half": w.astype(np.float16),
        "double": w,
        "k": np.array(32),
        "threshold": np.array(0.25, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
        "bytes": np.arange(5, dtype=np.uint8),
        "cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_comes_as_numpy_reads_it(tmp_path, save):
    save(tmp_path / "w.npz", **arrays())
    path = tmp_path / "w.npz"
    weights.verify(path)
    found = weights.tensors(path)
    assert weights.shapes(path) == {name: array.shape for name, array in arrays().items()}
    with np.load(path) as theirs:
        assert list(found) == list(theirs)
        for name, array in theirs.items():
            assert found[name].numpy().dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found[name].numpy(), array)


def test_npz_of_a_stream_has_its_sizes_behind_the_bytes(tmp_path):
    class Pipe:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

        def flush(self):
            self.file.flush()

        def read(self):
            raise AssertionError("a stream that is written")

    with open(tmp_path / "w.npz", "wb") as file:
        np.savez(Pipe(file), **arrays())
    with zipfile.ZipFile(tmp_path / "w.npz") as archive:
        assert all(info.flag_bits & 8 for info in archive.infolist())
    assert weights.tensors(tmp_path / "w.npz")["W_enc"].tolist() == arrays()["W_enc"].tolist()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_version(tmp_path, version):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive, archive.open("W.npy", "w") as member:
        np.lib.format.write_array(member, arrays()["W_enc"], version=version)
    assert weights.tensors(tmp_path / "w.npz")["W"].tolist() == arrays()["W_enc"].tolist()


def test_stored_arrays_are_mapped_and_changing_them_leaves_the_file(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.ones(3, np.float32))
    before = (tmp_path / "w.npz").read_bytes()
    weights.tensors(tmp_path / "w.npz")["w"].zero_()
    assert (tmp_path / "w.npz").read_bytes() == before


# safetensors


def test_safetensors_come_as_the_library_reads_them(tmp_path):
    names = [d for d in DTYPES if d != torch.uint16]
    tensors = {str(dtype): torch.tensor([[0, 1, 2, 3]]).to(dtype) for dtype in names}
    tensors |= {"empty": torch.zeros(0, 5), "number": torch.tensor(2.0)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, {"format": "pt"})
    assert weights.shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = weights.tensors(path)
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    weights.verify(path)
    save_file({}, path, {"only": "metadata"})
    assert weights.shapes(path) == weights.tensors(path) == {}


# names


def test_names_of_nested_tensors_are_dotted_and_in_order():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = OrderedDict(z=a, sub={"y": [b, {"x": c}], 7: a, "text": "t"}, n=3, none=None)
    found = flatten(tree)
    assert list(found) == ["z", "sub.y.0", "sub.y.1.x", "sub.7"]
    assert [tensor.numel() for tensor in found.values()] == [1, 2, 3, 1]
    assert flatten(3) == flatten(None) == flatten([]) == {}
    assert not flatten({"p": torch.nn.Parameter(a)})["p"].requires_grad


def test_one_tensor_may_have_two_names_but_two_tensors_not_one():
    w = torch.ones(2)
    assert list(flatten({"a": w, "b": w})) == ["a", "b"]
    for tree in ({"a.b": w, "a": {"b": w}}, {1: w, "1": w}):
        with pytest.raises(DataError, match=r"^file is refused: two tensors are called (a\.b|1)$"):
            flatten(tree, "file")


def test_containers_within_each_other_come_to_an_end():
    endless, doubled, deep = [], (), []
    endless.append(endless)
    for _ in range(60):
        doubled = (doubled, doubled)
    for _ in range(100_000):
        deep = [deep]
    wide = [[0] * 1000] * 1000
    for tree in (endless, doubled, deep, wide, {"k" * 1000: [torch.ones(1)]}):
        with pytest.raises(DataError, match="its containers hold each other, too deep or too often"):
            flatten(tree)


def test_files_of_tensors_are_known_by_their_names():
    names = ["a.safetensors", "params.npz", "ae.pt", "x.pth", "pytorch_model.bin", "sae.pkl.gz"]
    assert all(map(weights.is_weights, names))
    assert not any(map(weights.is_weights, ["cfg.json", "a.gz", "config.yaml", "npz", "a.pickle"]))
