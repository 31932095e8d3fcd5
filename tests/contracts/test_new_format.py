"""A new format is one file: written here into a folder of its own, it goes through all that the others do."""

import sys

import pytest
import torch
from rigs.fake_hub import fake_hub, reached_from_here

import sae
from cli.load import main
from sae import formats
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.untrusted.files import LocalFiles

SOURCE = '''
"""Acme's coders: `acme.safetensors` holds up [d, m], cut [m] and down [m, d]; `acme.json` says k and the hook."""

from sae.base.files import save_tensors, write_json
from sae.coder.spec import CoderSpec
from sae.formats import _exporting
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.untrusted.configs import as_int

WEIGHTS = r"acme\\.safetensors"


def detect(place):
    return "acme_version" in place.config("acme.json")


def read(place):
    config, found = place.config("acme.json"), place.tensors()
    m = found["cut"].numel()
    d = found["up"].numel() // max(1, m)
    tensors = {"W_enc": found.take("up", d, m).T, "b_enc": -found.take("cut", m), "W_dec": found.take("down", m, d)}
    tensors["b_dec"] = tensors["W_dec"].new_zeros(d)
    sites = (Site(str(config["hook"]), model=place.hints.model or ""),)
    rule = TopK(as_int(config.get("k"), "k", place))
    return CoderSpec(d, d, m, rule, sites, sites, pre_bias="none", decoder_norm="free"), tensors


def write(folder, coder):
    _exporting.check_expressible("Acme", coder.spec, selection=("topk",))
    tensors = {"up": coder.W_enc.T, "cut": -coder.b_enc, "down": coder.W_dec}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "acme.safetensors", tensors)
    hook = coder.spec.reads[0].hook
    write_json(folder / "acme.json", {"acme_version": 1, "k": _exporting.rule_of(coder.spec)[1]["k"], "hook": hook})
'''
D, M = 6, 20
X = torch.randn(8, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def acme(tmp_path, monkeypatch):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "acme.py").write_text(SOURCE)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "plugins")])
    formats.formats.cache_clear()
    yield
    formats.formats.cache_clear()
    sys.modules.pop("sae.formats.acme", None)


@pytest.fixture
def original():
    site = (Site("model.layers.1", model="tiny/llama"),)
    coder = SparseCoder(CoderSpec(D, D, M, TopK(3), site, site, pre_bias="none", decoder_norm="free"))
    initialize(coder, torch.zeros(D), 0)
    with torch.no_grad():
        coder.b_enc.normal_()
        coder.b_dec.zero_()
    return coder


@pytest.fixture
def folder(tmp_path, original):
    formats.formats()["acme"].write(tmp_path / "made", original)
    return tmp_path / "made"


def load(capsys, *words):
    capsys.readouterr()
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_it_is_told_from_all_others_and_read_whole_lazily_and_in_parts(folder, original):
    (place,) = formats.candidates(LocalFiles(folder))
    assert formats.formats_of(place) == ["acme"]
    whole, lazy = sae.load(folder), sae.load(folder, lazy=True, model="other/model")
    assert whole.spec.training["released"]["format"] == "acme"
    assert lazy.spec.reads == (Site("model.layers.1", model="other/model"),)
    for coder in (whole, lazy, sae.load(folder, format="acme")):
        assert torch.equal(coder(X).out, original(X).out)
        some, codes = coder.encode(X, latents=[3, 17]).to_dense(), original.encode(X).to_dense()
        assert torch.equal(some[:, [3, 17]], codes[:, [3, 17]])
        assert some.count_nonzero() == codes[:, [3, 17]].count_nonzero() > 0


def test_commands_show_list_and_convert_it(folder, original, tmp_path, capsys):
    code, out, _ = load(capsys, "show", folder)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, rows["format"], rows["selection"]) == (0, "acme", "topk of 3")
    formats.formats()["acme"].write(tmp_path / "other", original)
    assert load(capsys, "show", tmp_path)[1].splitlines()[:2] == [str(tmp_path / "made"), str(tmp_path / "other")]
    assert load(capsys, "convert", folder, "--to", "native", tmp_path / "ours")[0] == 0
    assert load(capsys, "convert", tmp_path / "ours", "--to", "acme", tmp_path / "theirs")[0] == 0
    assert torch.equal(sae.load(tmp_path / "theirs").W_enc, original.W_enc)
    sae.save(SparseCoder(original.spec.with_(pre_bias="decoder")), tmp_path / "third")
    code, _, err = load(capsys, "convert", tmp_path / "third", "--to", "acme", tmp_path / "none")
    assert (code, "pre_bias: Acme cannot say 'decoder'" in err) == (2, True)


def test_on_the_hub_it_is_known_from_its_header_alone(folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "hub"
    (root / "models" / "own").mkdir(parents=True)
    folder.rename(root / "models" / "own" / "coder")
    with fake_hub(root, tmp_path / "home") as (environment, asked):
        reached_from_here(monkeypatch, environment)
        code, out, _ = load(capsys, "show", "own/coder")
        rows = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert (code, rows["format"], rows["selection"]) == (0, "acme", "topk of 3")
        gets = [request for request in asked if request.startswith("GET") and "acme.safetensors" in request]
        assert all("bytes=" in request for request in gets)
        assert sae.load("own/coder").spec.training["released"]["format"] == "acme"


@pytest.mark.parametrize("harm", ["cut off", "another shape", "one too many", "no k"])
def test_a_file_that_is_damaged_or_another_ends_in_one_line(folder, harm, capsys):
    from safetensors.torch import load_file, save_file

    path = folder / "acme.safetensors"
    found = load_file(path)
    if harm == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "no k":
        (folder / "acme.json").write_text('{"acme_version": 1, "hook": "x"}')
    else:
        save_file(found | ({"down": found["up"].clone()} if harm == "another shape" else {"more": torch.ones(1)}), path)
    code, out, err = load(capsys, "convert", folder, "--to", "native", folder / "x")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(folder) in err
