"""Weight files are read as those who wrote them read them: every container, layout, dtype and order."""

import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from rigs.hostile import assert_same
from safetensors.torch import save_file

from sae.base.errors import DataError
from sae.untrusted import weights
from sae.untrusted.weights import flatten

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
)


CONTAINERS = [("w.pt", None, True), ("w.pth", None, False)]
CONTAINERS += [(name, protocol, True) for name in ("w.bin", "w.pkl.gz") for protocol in (2, 3, 4, 5)]


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
