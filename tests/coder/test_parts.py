"""A coder in parts is the coder that lies in one: the same entries, the same numbers to rounding."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.any_coder import D_SAE, RULES, batch, kinds, made

import sae
from sae.base.errors import ConfigError
from sae.base.files import write_json
from sae.coder import coder as module
from sae.coder import tiles
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.parts import Part, cut, in_parts
from sae.coder.spec import CoderSpec
from sae.selection.gradient_topk import GradientTopK
from sae.selection.topk import TopK

CPU = torch.device("cpu")
SIZES = st.tuples(
    st.sampled_from([1, 2, 3, 5, D_SAE]), st.sampled_from([1, 7, 40, 2**20]), st.sampled_from([1, 30, 2**20])
)
"""Latents of a tile, entries of its scores, entries of W_enc."""
SHARES = st.lists(st.tuples(st.sampled_from([CPU, None]), st.integers(1, 5)), min_size=1, max_size=5)


def same(found, expected, rel=1e-9):
    """Asserts that codes have the same entries, in order, with the same values to rounding."""
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.ids, expected.ids)
    assert torch.allclose(found.values, expected.values, rtol=rel, atol=rel)
    assert found.shape == expected.shape


def patched(patch, sizes, all_scores=1):
    patch.setattr(tiles, "LATENTS", sizes[0])
    patch.setattr(tiles, "SCORES", {"cpu": sizes[1]})
    patch.setattr(tiles, "HELD", sizes[2])
    patch.setattr(module, "CHUNK_ENTRIES", all_scores)


def divided(coder, shares, dtype=torch.float64):
    return in_parts(coder, cut(coder.spec, shares), CPU, dtype)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(kinds(), SIZES)
def test_tiles_choose_what_all_scores_would(kind, sizes):
    coder = made(**kind).double()
    x, gradients = batch(coder)
    x, gradients = x.double(), None if gradients is None else gradients.double()
    expected = coder.encode(x, gradients)
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, sizes)
        same(coder.encode(x, gradients), expected)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(RULES)), st.booleans(), st.integers(0, 2**20), SIZES, SHARES)
def test_ties_go_to_the_lower_latent_wherever_it_lies(rule, layers, seed, sizes, shares):
    layers = layers and rule not in ("matching_pursuit", "one group", "groups of one")
    coder = made(rule, seed, whole=True, layers=layers)
    coder.spec = coder.spec.with_(normalization=Normalization())
    x, gradients = batch(coder, whole=True)
    x[::5] = 0.0
    coder.b_enc[::2] = 0.0
    expected = coder.encode(x, gradients)
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, sizes)
        same(coder.encode(x, gradients), expected, rel=0)
        if not coder.spec.encoding.pursues:
            same(divided(coder, shares, torch.float32).encode(x, gradients), expected, rel=0)


@pytest.mark.parametrize(
    "kind",
    [
        {"rule": "topk", "select_by_decoder_norm": True, "normalization": Normalization("layer_norm")},
        {"rule": "groupmax", "skip": True},
        {"rule": "jumprelu", "layers": True},
        {"rule": "mutual_choice", "layers": True, "budget": "shared", "encoder": "glu"},
        {"rule": "with gradients"},
    ],
)
def test_each_way_of_choosing(kind):
    does_the_same(kind, (5, 40, 30), [(CPU, 1), (None, 2)], [23, 0, 7])


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(kinds(), SIZES, SHARES, st.lists(st.integers(0, D_SAE - 1), unique=True))
def test_a_coder_in_parts_does_what_one_that_lies_together_does(kind, sizes, shares, asked):
    if kind["rule"] != "matching_pursuit":
        does_the_same(kind, sizes, shares, asked)


def does_the_same(kind, sizes, shares, asked):
    coder = made(**kind).to_dtype(torch.float64)
    x, gradients = (None if part is None else part.double() for part in batch(coder))
    rows, (out, codes) = torch.randn(3, coder.spec.d_out).double(), coder(x, gradients)
    expected = {
        "dense": coder.encode_dense(x, gradients),
        "decoded": coder.decode(codes, x),
        "norms": coder.decoder_norms(),
        "onto": coder.onto_decoders(rows),
        "scores": coder.scores(x),
        "encoders": coder.encoder_rows(asked),
        "decoders": coder.decoder_rows(asked),
    }
    some = coder.encode(x, gradients, latents=asked)
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, sizes)
        parts = divided(coder, shares)
        found = parts(x, gradients)
        same(found.latents, codes)
        same(parts.encode(x, gradients), codes)
        same(parts.encode(x, gradients, latents=asked), some)
        torch.testing.assert_close(found.out, out)
        again = {
            "dense": parts.encode_dense(x, gradients),
            "decoded": parts.decode(codes, x),
            "norms": parts.decoder_norms(),
            "onto": parts.onto_decoders(rows),
            "scores": parts.scores(x),
            "encoders": parts.encoder_rows(asked),
            "decoders": parts.decoder_rows(asked),
        }
    for name, tensor in expected.items():
        torch.testing.assert_close(again[name], tensor, msg=lambda why, name=name: f"{name}: {why}")


@pytest.mark.parametrize("encoder", ["linear", "glu"])
@pytest.mark.parametrize("layers", [False, True])
def test_outputs_have_a_gradient_in_the_inputs(encoder, layers):
    coder = made("topk", layers=layers, encoder=encoder, skip=True).double()
    slopes = []
    for one in (coder, divided(coder, [(CPU, 1), (None, 2)])):
        x = batch(coder)[0].double().requires_grad_()
        one(x).out.square().sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("norm", ["batch", "token", "none"])
def test_a_gradient_may_take_part_in_the_choice(norm):
    coder = made("with gradients").double()
    coder.spec = coder.spec.with_(selection=GradientTopK(3, beta=2.0, inference="gradient", gradient_norm=norm))
    x, gradients = (part.double() for part in batch(coder))
    assert tiles.can_be(coder, gradients=True) == (norm != "token"), "which looks at all latents of a token"
    parts = divided(coder, [(CPU, 1), (None, 1)])
    same(parts.encode(x, gradients), coder.encode(x, gradients))
    plain = coder.with_spec(coder.spec.with_(selection=GradientTopK(3))).encode(x)
    assert not torch.equal(plain.ids, parts.encode(x, gradients).ids)


def test_parts_are_cut_in_every_block_and_between_groups():
    shares = [(CPU, 0.5), (None, 0.5)]

    def ends(rule, **fields):
        return [(part.latents.start, part.latents.stop, part.device) for part in cut(made(rule, **fields).spec, shares)]

    assert ends("topk") == [(0, 12, CPU), (12, 24, None)]
    assert ends("topk", layers=True) == [
        (block + start, block + start + 4, device) for block in (0, 8, 16) for start, device in ((0, CPU), (4, None))
    ]
    assert [part.latents.stop for part in cut(made("groupmax").spec, [(CPU, 0.4), (None, 0.6)])] == [12, 24], "of 6"
    assert ends("one group") == [(0, 12, CPU), (12, 24, None)], "one group of all latents is cut"
    assert cut(made("topk").spec, [(CPU, 0.01), (None, 0.99)]) == [Part(slice(0, 24), None)]


def test_it_stays_where_it_lies_and_says_so():
    parts = divided(made("topk"), [(CPU, 1), (None, 1)], torch.float32)
    where = "latents 0 to 11 on cpu, 12 to 23 on disk"
    assert parts.whereabouts == where
    assert where in parts._repr_html_()
    for refused in (parts.double, parts.fold_decoder_norm, lambda: parts.to("meta"), lambda: parts.to_dtype(None)):
        with pytest.raises(ConfigError, match=r"^coder: one in parts \(latents 0 to 11 on cpu, .*; load it on one dev"):
            refused()
    assert copy.deepcopy(parts).W_enc is parts.W_enc


def test_what_pursues_is_not_cut():
    with pytest.raises(
        ConfigError, match=r"^device_map: encoder 'matching_pursuit' looks at all latents for every one"
    ):
        divided(made("matching_pursuit"), [(CPU, 1), (None, 1)])


D, MANY, BLOCK = 256, 180_000, 4096
READER = """
import ctypes, json, mmap, re, sys, threading
from pathlib import Path
import torch
import sae

def memory():
    kinds = dict(re.findall(r"(Rss\\w+):\\s+(\\d+) kB", Path("/proc/self/status").read_text()))
    return {"own": 1024 * int(kinds["RssAnon"]), "mapped": 1024 * (int(kinds["RssFile"]) + int(kinds["RssShmem"]))}

def drop_pages(tensor):  # what was changed in them would be lost; the kernel does so when it is short of memory
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0

torch.set_num_threads(1)
x = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
dtype, folder = sys.argv[2], Path(sys.argv[1])
sae.load(folder / "small", device_map="disk", dtype=dtype)(x)  # what is imported on the way
peaks, done = {}, threading.Event()
def watch():
    while not done.wait(0.002):
        for kind, value in memory().items():
            key = f"{doing} {kind}"
            peaks[key] = max(value - before[kind], peaks.get(key, 0))
before, doing = memory(), "run"
watcher = threading.Thread(target=watch)
watcher.start()
coder = sae.load(folder / "large", device_map="disk", dtype=dtype)
out, latents = coder(x)
read = memory()
for tensor in (coder.W_enc, coder.W_dec):
    drop_pages(tensor)
dropped = read["mapped"] - memory()["mapped"]
again = coder(x)
doing = "save"
sae.save(coder, folder / "copy")
done.set()
watcher.join()
assert torch.equal(again.out, out) and torch.equal(again.latents.ids, latents.ids)
found = {"ids": latents.ids.tolist(), "sum": float(out.double().sum())}
print(json.dumps({"peaks": peaks, "dropped": dropped, **found}))
"""


def rows(number, count, seed):
    """Random rows of a block of a matrix, the same whenever they are asked for."""
    return np.random.default_rng((seed, number)).standard_normal((count, D), dtype=np.float32)


def written(folder, d_sae):
    """Writes a coder block by block; returns the size of its file."""
    spec, header, size = CoderSpec(D, D, d_sae, TopK(8)), {}, 0
    tensors = SparseCoder(spec, "meta").state_dict()
    for name, tensor in tensors.items():
        start, size = size, size + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "sae.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for seed, tensor in enumerate(tensors.values()):
            if tensor.dim() < 2:
                file.write(np.zeros(tensor.numel(), np.float32).tobytes())
                continue
            for number, first in enumerate(range(0, len(tensor), BLOCK)):
                file.write(rows(number, min(BLOCK, len(tensor) - first), seed).tobytes())
    write_json(folder / "cfg.json", spec.to_json())
    return size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory by kind is told by Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_file(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    size = written(tmp_path / "large", MANY)
    written(tmp_path / "small", 3000)
    assert size > 256 * 2**20
    code = [sys.executable, "-c", READER, str(tmp_path), dtype]
    found = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    print(dtype, size, found["peaks"], found["dropped"])
    assert found["peaks"]["run own"] < size / 6
    assert found["peaks"]["save own"] < size / 6
    assert found["dropped"] > size / 2, "pages of the file, which the kernel may have back whenever it wants"
    for name, tensor in sae.load(tmp_path / "large", lazy=True).state_dict().items():
        assert torch.equal(sae.load(tmp_path / "copy", lazy=True).state_dict()[name], tensor), "as it is stored"
    if dtype == "float32":
        whole, x = sae.load(tmp_path / "large"), torch.randn(300, D, generator=torch.Generator().manual_seed(1))
        expected = whole(x)
        assert found["ids"] == expected.latents.ids.tolist()
        assert found["sum"] == pytest.approx(float(expected.out.double().sum()), rel=1e-4)
