"""Some latents of a coder: the same entries as in the full codes, and a file that is mostly left unread."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.any_coder import D_SAE, RULES, TOKENS, WHOLE, batch, entries, kinds, made

import sae
from sae.base.errors import ConfigError
from sae.base.files import write_json
from sae.coder import tiles
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.coder.tensors import checked_ids
from sae.selection.relu import ReLU
from sae.selection.topk import TopK


def agrees(coder, x, gradients, asked, exact=False):
    """Asserts that the codes of some latents are their entries in the full codes, in order."""
    full, some = coder.encode(x, gradients), coder.encode(x, gradients, latents=asked)
    expected = entries(full, asked)
    assert list(entries(some)) == list(expected), "other entries, or in another order"
    assert list(entries(some).values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=0 if exact else 1e-5)
    assert some.shape == (*x.shape[:-1], D_SAE)
    assert torch.equal(some.offsets.diff(), torch.bincount(some.tokens, minlength=full.n_tokens))
    assert some.values.dtype == coder.W_enc.dtype


@settings(deadline=None, max_examples=100)
@given(kinds(), st.lists(st.integers(0, D_SAE - 1), unique=True), st.sampled_from([1, 30, 70, 2**24]))
def test_some_latents_are_the_entries_of_the_full_codes(kind, asked, held):
    coder = made(**kind).double()  # in which no two products are so near that their order is one of rounding
    x, gradients = batch(coder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "HELD", held)  # one row at a time, a few, or all
        agrees(coder, x.double(), gradients, asked)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(RULES)),
    st.booleans(),
    st.integers(0, 2**20),
    st.lists(st.integers(0, D_SAE - 1), unique=True),
    st.sampled_from([1, 30, 70]),
)
def test_ties_fall_as_in_the_full_codes(rule, layers, seed, asked, held):
    layers = layers and rule not in ("matching_pursuit", "one group", "groups of one")
    coder = made(rule, seed, whole=True, layers=layers)
    coder.spec = coder.spec.with_(normalization=Normalization())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "HELD", held)
        agrees(coder, *batch(coder, whole=True), asked, exact=True)


def test_there_are_ties_to_be_broken():
    coder = made("topk", whole=True)
    scores = coder.scores(batch(coder, whole=True)[0]).sort(dim=1, descending=True).values
    assert (scores[:, 2] == scores[:, 3]).float().mean() > 0.2


@pytest.mark.parametrize("rule", ["relu", "calibrated", "topk", "groupmax", *WHOLE])
@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_and_no_latents_at_all(rule, shape):
    coder = made(rule)
    x, gradients = batch(coder, shape=shape)
    for asked in ([5, 3, 20], []):
        agrees(coder, x, gradients, asked)
    assert coder.encode(x, gradients, torch.tensor([2])).shape == (*shape, D_SAE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([3, 24], "latents: 24 is not a latent; allowed are 0 to 23"),
        ([-1], "latents: -1 is not a latent; allowed are 0 to 23"),
        ([3, 7, 3], "latents: 3 is given twice; each may be asked for once"),
    ],
)
def test_an_id_that_cannot_be_is_named(asked, message):
    coder = made()
    with pytest.raises(ConfigError) as refused:
        coder.encode(batch(coder)[0], latents=asked)
    assert str(refused.value) == message
    if len(set(asked)) == len(asked):
        for rows in (coder.encoder_rows, coder.decoder_rows):
            with pytest.raises(ConfigError, match=r"^latents: .* is not a latent"):
                rows(asked)


def test_what_an_id_is_not_and_what_inputs_are_not():
    with pytest.raises(ConfigError, match=r"^latents: torch.bool are no latent ids; allowed are whole numbers"):
        checked_ids(torch.ones(D_SAE, dtype=torch.bool), D_SAE, torch.device("cpu"))
    with pytest.raises(ValueError, match="x: last dimension is 5, but this coder has d_in = 6"):
        made().encode(torch.zeros(2, 5), latents=[1])


def test_gradients_are_asked_for_and_refused_as_in_the_full_codes():
    coder = made("topk")
    x, g = batch(coder)[0], torch.zeros(TOKENS, 6)
    with pytest.raises(ValueError, match="this coder's inference looks at none"):
        coder.encode(x, g, latents=[1])
    with pytest.raises(ValueError, match="pass those of the loss"):
        made("with gradients").encode(x, latents=[1])


@pytest.mark.parametrize("layers", [False, True])
def test_rows_are_those_of_the_matrices_in_full_width(layers):
    coder, ids = made(layers=layers), [21, 0, 9, 9]
    if layers:
        block = coder.decoders()[1][9 - 8]
        assert torch.equal(coder.decoder_rows(ids)[2], torch.cat([torch.zeros(3), block]))
        assert torch.equal(coder.encoder_rows(ids)[0], torch.cat([torch.zeros(8), coder.W_enc[21]]))
    else:
        assert torch.equal(coder.encoder_rows(ids), coder.W_enc[ids])
        assert torch.equal(coder.decoder_rows(torch.tensor(ids)), coder.W_dec[ids])
    assert coder.decoder_rows([]).shape == (0, coder.spec.d_out)
    rows = made(layers=layers).to_dtype(torch.bfloat16).encoder_rows(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, coder.encoder_rows(ids).bfloat16().float())
    rows.zero_()
    assert coder.W_enc.abs().min() > 0, "a copy"


@pytest.mark.parametrize("rule", RULES)
def test_only_the_rows_that_it_takes_are_read(rule, monkeypatch):
    """Tells by what the chunks of W_enc are: those of the latents, of their groups, or of all that compete."""
    read, coder = [], made(rule, layers=False)
    inner = tiles.read

    def counted(coder, span, of):
        read.append(len(span.piece.encoders["W_enc"][span.some]))
        return inner(coder, span, of)

    monkeypatch.setattr(tiles, "read", counted)
    monkeypatch.setattr(tiles, "HELD", 30)
    coder.encode(*batch(coder), latents=[3, 4, 23])
    if rule in WHOLE:
        assert not read, "the full codes"
    else:
        alone = rule in ("calibrated", "feature_choice", "gated", "jumprelu", "relu")
        assert sum(read) == (3 if alone else {"groupmax": 12, "groups of one": 3}.get(rule, D_SAE))
        assert max(read) <= 30 // 6, "no more than a chunk at once"


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, torch.float32) for rule in RULES]
    + [(rule, torch.bfloat16) for rule in ("gated", "signed_topk", "groupmax")],
)
def test_a_mapped_coder_has_the_codes_of_one_that_is_loaded(rule, dtype, tmp_path):
    sae.save(made(rule, select_by_decoder_norm=rule != "jumprelu").to_dtype(dtype), tmp_path)
    mapped, loaded = sae.load(tmp_path, lazy=True), sae.load(tmp_path)
    assert mapped.W_enc.dtype == dtype
    x, gradients = batch(loaded)
    asked = [3, 4, 17, 23]
    expected, found = entries(loaded.encode(x, gradients), asked), entries(mapped.encode(x, gradients, asked))
    assert found.keys() == expected.keys()
    assert expected or rule == "one group"
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-5)


def test_inputs_are_not_rounded_to_the_coders_precision():
    coder = made("relu").to_dtype(torch.bfloat16)
    x = batch(coder)[0]
    assert torch.equal(coder.encode(x.double(), latents=[1, 2]).values, coder.encode(x, latents=[1, 2]).values)
    rounded = coder.encode(x.bfloat16(), latents=[1, 2])
    assert not torch.equal(rounded.to_dense(), coder.encode(x, latents=[1, 2]).to_dense())


READER = """
import json, sys, threading, time
import psutil, torch
import sae

process = psutil.Process()
def memory():
    found = process.memory_info()
    return {"mapped": found.rss, "own": found.rss - found.shared}
torch.set_num_threads(1)
sae.load(sys.argv[2], lazy=True).encode(torch.ones(2, 256), latents=[1])  # what is imported on the way
before, peak, done = memory(), memory(), threading.Event()
def watch():
    while not done.wait(0.002):
        peak.update({name: max(value, peak[name]) for name, value in memory().items()})
watcher = threading.Thread(target=watch)
watcher.start()
coder = sae.load(sys.argv[1], lazy=True)
ids = list(range(0, coder.spec.d_sae, coder.spec.d_sae // 10))[:10]
rows = coder.encoder_rows(ids), coder.decoder_rows(ids)
latents = coder.encode(torch.ones(2, coder.spec.d_in), latents=ids)
done.set()
watcher.join()
grown = {name: value - before[name] for name, value in peak.items()}
print(json.dumps({"grown": grown, "fired": latents.ids.tolist(), "sums": [float(part.sum()) for part in rows]}))
"""


def large(folder, rule, d_sae, d_in=256):
    """Writes a coder whose file is a hole but for its header and rows 0 and d_sae / 10 of W_enc; returns its size."""
    spec, header, size = CoderSpec(d_in, d_in, d_sae, rule), {}, 0
    for name, tensor in SparseCoder(spec, "meta").state_dict().items():
        start, size = size, size + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "sae.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
        for row in (0, d_sae // 10):
            file.seek(8 + len(text) + header["W_enc"]["data_offsets"][0] + 4 * d_in * row)
            file.write(np.ones(d_in, np.float32).tobytes())
    write_json(folder / "cfg.json", spec.to_json())
    return size


@pytest.mark.slow
@pytest.mark.parametrize("rule", [ReLU(), TopK(2)])
def test_ten_rows_of_a_large_file_take_little_memory(rule, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    size = large(tmp_path / "large", rule, 160_000)
    large(tmp_path / "small", rule, 100)
    assert size > 300e6
    code = [sys.executable, "-c", READER, str(tmp_path / "large"), str(tmp_path / "small")]
    found = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert found["fired"] == [0, 16_000] * 2
    assert found["sums"] == [512.0, 0.0]
    if isinstance(rule, ReLU):
        assert found["grown"]["mapped"] < size / 5  # a kernel with large pages maps 2 MiB for each of twenty rows
        assert found["grown"]["own"] < size / 30
    else:
        assert found["grown"]["own"] < size / 5, "half of the file, W_enc, went by in chunks"
