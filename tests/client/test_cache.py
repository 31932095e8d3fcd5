"""A cache in delphi's layout explained as if the model had just run, and a store of codes that spares it a second run.

That delphi's own files are read right is shown in test_delphi.py; here the cache is written by hand, in that layout.
"""

import json

import numpy as np
import pytest
import torch
from rigs.interp_runs import D_SAE, explain_config, run, scores, tiny_coder
from safetensors.numpy import save_file

from interp.evidence import codes
from interp.evidence.codes import encode_rows
from interp.evidence.delphi_cache import CachedCodes, DelphiCache
from interp.run.preparing import prepare, read_from
from interp.run.reasons import OK
from sae.base.errors import ConfigError
from sae.lm.masking import token_mask

ROWS, CONTEXT, SPLIT = 120, 48, 20
HOOK = "layers.1"


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def cache(coder, tmp_path_factory):
    """What delphi would write of that coder: packed text without BOS, every token encoded."""
    folder = tmp_path_factory.mktemp("latents") / HOOK
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        config = explain_config(coder, folder / "run")
        subject, rows, _ = read_from(config)
        text = np.concatenate([rows.tokens([r])[0, rows.first : rows.length[r]].numpy() for r in range(rows.n_rows)])
        text[7::331] = 1  # </s> between documents
        tokens = text[: ROWS * CONTEXT].reshape(ROWS, CONTEXT)
        dense = np.zeros((ROWS, CONTEXT, D_SAE), np.float16)
        spec = subject.coder.spec
        subject.coder.spec = spec.with_(mask=type(spec.mask)((), skip_positions=0))
        coded = encode_rows(subject, torch.from_numpy(tokens.astype(np.int32)))
        dense[coded.rows, coded.places] = coded.latents.to_dense().numpy()
    for first in range(0, D_SAE, SPLIT):
        part = dense[..., first : first + SPLIT]
        found = {
            "locations": np.stack(part.nonzero(), 1).astype(np.uint16),
            "activations": part[part != 0],
            "tokens": tokens.astype(np.int64),
        }
        save_file(found, folder / f"{first}_{min(first + SPLIT, D_SAE) - 1}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_name": config.model.name, "cache_ctx_len": CONTEXT}))
    return folder


@pytest.fixture
def no_text_read(monkeypatch):
    """Makes it an error to run the model on text."""

    def capture(*_args, **_options):
        raise AssertionError("the model was run")

    monkeypatch.setattr(codes, "capture", capture)


def test_a_cache_is_explained_without_the_model(coder, cache, tmp_path, no_text_read):
    config = explain_config(coder, tmp_path / "run", {"evidence.cache": str(cache)})
    prepared = prepare(config)
    run(config, prepared)
    done = [row for row in scores(tmp_path / "run").values() if row["status"] == OK]
    assert {row["scorer"] for row in done} == {"detection", "embedding"}
    told = json.loads((tmp_path / "run" / "evidence" / "text.json").read_text())
    assert told["split_by"] == "blocks"
    assert told["context_length"] == CONTEXT
    assert 0.8 * ROWS * CONTEXT < told["tokens"] < ROWS * CONTEXT  # one row in nine is left out


def test_rows_and_codes_of_a_cache_belong_together(coder, cache, tmp_path):
    config = explain_config(coder, tmp_path / "run", {"evidence.cache": str(cache)})
    subject, rows, cached = read_from(config)
    assert isinstance(cached, CachedCodes)
    spec = subject.coder.spec
    assert spec.mask.special_ids
    some = rows.kept[[0, 3, 8, 9, -1]]
    found, tokens = cached.read(some), rows.tokens(some)
    live = encode_rows(subject, tokens)
    assert np.array_equal(found.rows, live.rows)
    assert np.array_equal(found.places, live.places)
    assert len(found.rows) == int(token_mask(tokens, spec.mask).sum()) < tokens.numel() - len(some)
    torch.testing.assert_close(found.latents.to_dense(), live.latents.to_dense(), rtol=2e-3, atol=1e-3)


def test_a_cache_of_something_else_is_refused(coder, cache, tmp_path, caplog):
    def asked(folder, **more):
        return read_from(explain_config(coder, tmp_path / "run", {"evidence.cache": str(folder), **more}))

    with pytest.raises(ConfigError, match=r"evidence.cache: no such folder: .*Did you mean 'layers.1'"):
        asked(cache.parent / "layers.l")
    with pytest.raises(ConfigError, match=r"coder.baseline: .* no codes of neurons"):
        asked(cache, **{"coder.baseline": "neurons"})
    (fewer := tmp_path / "fewer").mkdir()
    for name in ("config.json", f"0_{SPLIT - 1}.safetensors"):
        (fewer / name).write_bytes((cache / name).read_bytes())
    with pytest.raises(ConfigError, match=f"evidence.cache: .* of {SPLIT} latents; the coder has {D_SAE}"):
        asked(fewer)
    config = json.loads((cache / "config.json").read_text())
    (other := tmp_path / "other").mkdir()
    for path in cache.glob("*.safetensors"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"model_name": "another/model"}))
    asked(other)
    assert "is of another/model; the coder reads" in caplog.text


def test_a_mask_leaves_tokens_of_a_cache_out(cache):
    whole, spec = DelphiCache(cache), DelphiCache(cache).mask
    assert len(whole.read([0, 5]).rows) == 2 * CONTEXT
    masked = DelphiCache(cache, type(spec)((1,), skip_positions=2))
    found, all_of_it = masked.read([0, 5]), whole.read([0, 5]).latents.to_dense().reshape(2, CONTEXT, D_SAE)
    assert found.places.min() == 2
    assert not (whole.tokens[[0, 5]][found.rows, found.places] == 1).any()
    assert torch.equal(found.latents.to_dense(), all_of_it[found.rows, found.places])
    assert masked.fingerprint() != whole.fingerprint()


def test_with_a_store_other_latents_are_explained_without_the_model(coder, tmp_path, monkeypatch, request):
    config = explain_config(coder, tmp_path / "run", {"evidence.store": True, "latents": "0-9"})
    prepare(config)
    live = prepare(explain_config(coder, tmp_path / "live", {"latents": "10-19"}))
    request.getfixturevalue("no_text_read")
    others = prepare(explain_config(coder, tmp_path / "run", {"evidence.store": True, "latents": "10-19"}))
    for latent in range(10, 20):
        a, b = (found.maker.visits.spots(latent) for found in (others, live))
        assert np.array_equal(a.position, b.position)
        np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-5)
        assert np.array_equal(a.pool, b.pool)
