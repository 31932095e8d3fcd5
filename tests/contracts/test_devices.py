"""What a device other than the CPU is asked, in whole runs: of one that has float64, and of one that has not.

The device is pretended; `rigs/pretended.py` says what that can tell.
"""

import pytest
import torch
from rigs import pretended
from rigs.fakes import tiny_config
from rigs.interp_runs import explain_config, tiny_coder

import sae
from interp.run.preparing import prepare
from sae.base import sums
from sae.base.errors import ConfigError
from sae.evaluation.doctor import diagnose
from sae.lm.devices import resolve_device
from sae.lm.models import load_language_model
from sae.loading import hub

SMALL = {
    "activations.prefetch_blocks": 0,  # a thread of its own would not have the device
    "activations.statistics_tokens": 64,
    "tokens": 2 * 128,
    "eval.tokens": 64,
    "checkpoints.every_steps": 2,
}
FAMILIES = {
    "topk": {},
    "mutual_choice": {"coder.selection.type": "mutual_choice"},
    "aux_zipf": {"coder.objectives.aux_zipf.type": "aux_zipf"},
    "feature_choice": {"coder.selection.type": "feature_choice"},
    "gradient_topk": {"coder.selection.type": "gradient_topk"},
    "jumprelu": {"coder.selection": {"type": "jumprelu"}, "coder.objectives.l0": {"type": "l0", "weight": 0.01}},
    "gated": {"coder.selection": {"type": "gated"}, **{f"coder.objectives.{n}.type": n for n in ("gate", "l1")}},
    "crosscoder": {"activations.sites": ["layers.0", "layers.1"], "coder.layout": "crosscoder"},
    "transcoder": {"activations.sites": ["layers.1.mlp:input"], "activations.targets": ["layers.1.mlp"]},
}


@pytest.fixture(params=["float64", "no float64"])
def device(request, monkeypatch):
    """Returns the device, which is there within `with Pretended()`."""
    if request.param == "no float64":
        monkeypatch.setattr(pretended, "LACKING", {torch.float64})
        monkeypatch.setattr(sums, "WITHOUT_FLOAT64", {pretended.DEVICE.type})
    return pretended.DEVICE


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_coder_is_trained_and_evaluated(tmp_path, monkeypatch, quick, tiny_model, tiny_text, device, family):
    config = tiny_config(tiny_model, tiny_text, {**SMALL, **FAMILIES[family], "kernels": "torch"})  # there is no other
    ((name, known),) = sae.train(config, run_dir=tmp_path / "here", progress=False).metrics.items()
    lm = load_language_model(str(tiny_model), device="cpu")
    monkeypatch.setattr("sae.training.preparing.load_language_model", lambda **_: lm)
    with pretended.Pretended():
        lm.model.to(device)
        found = sae.train(config, run_dir=tmp_path / "there", progress=False)
    assert found.coders[name].W_enc.device == device
    for part, figures in (("reconstruction", ("fvu", "l0", "cosine")), ("loss", ("ce_spliced", "kl_mean"))):
        for figure in figures:
            assert found.metrics[name][part][figure] == pytest.approx(known[part][figure], rel=1e-4, abs=1e-7)


def test_a_coder_is_measured_diagnosed_and_folded(tmp_path, device):
    coder = hub.load(tiny_coder(tmp_path))
    lm = load_language_model(str(tmp_path / "model"), device="cpu")
    x = torch.randn(4, 16)
    wanted = coder(x).out
    with pretended.Pretended():
        lm.model.to(device)
        coder.to(device)
        assert sae.evaluate(coder, lm, tokens=256, nulls=True, progress=False)["nulls"]["pca"]["fvu"] < 1
        assert diagnose(coder, lm, tokens=256, text=str(tmp_path / "text"))
        again = coder.fold_decoder_norm()
        assert again.W_dec.device == device
        torch.testing.assert_close(again(x.to(device)).out.cpu(), wanted)


def test_latents_are_looked_at_for_explaining(tmp_path, monkeypatch, device):
    folder = tiny_coder(tmp_path)
    lm = load_language_model(str(tmp_path / "model"), device="cpu")
    monkeypatch.setattr("interp.run.preparing.load_language_model", lambda **_: lm)
    monkeypatch.setattr("interp.run.preparing.resolve_device", lambda _: device)
    config = explain_config(folder, tmp_path / "run", {"evidence.tokens": 4000, "latents": "random:4"})
    with pretended.Pretended():
        lm.model.to(device)
        prepared = prepare(config)
        assert prepared.maker.make(int(prepared.latents[0]))


def test_a_gpu_is_taken_where_there_is_one_of_any_maker(monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.device: 'mps' is not available here \(.*\); try cpu"):
        resolve_device("mps")
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    for cuda, apple, taken in (
        (False, False, "cpu"),
        (False, True, "mps"),
        (True, True, "cuda:0"),
        (True, False, "cuda:0"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda known=cuda: known)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda known=apple: known)
        assert str(resolve_device("auto")) == taken
