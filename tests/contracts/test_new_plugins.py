"""A new selection rule, encoder, loss term or optimizer is one file: each, written here, goes where all others go."""

import json
import sys

import pytest
import torch
from rigs.fakes import tiny_lm

import sae
from sae.base import plugins
from sae.base.errors import ConfigError
from sae.coder.normalization import Normalization
from sae.encoders import Encoder
from sae.objectives import Objective
from sae.optimizers import Optimizer
from sae.selection import Selection
from sae.training.config import CoderConfig

HEAD = """
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sae.encoders import Encoder
from sae.kernels.codes import Entries, by_rows, where
from sae.kernels.largest import top_entries, top_ids, top_of
from sae.objectives import Objective
from sae.optimizers import Optimizer
from sae.selection import Selection
"""
COMPETING = '''
@Selection.register_subclass("half_max")
@dataclass(frozen=True)
class HalfMax(Selection):
    """Keeps what is at least a share of the token's largest."""

    share: float = 0.7

    def infer(self, scores, tensors):
        return where((scores > 0) & (scores >= self.share * scores.amax(1, keepdim=True)))
'''
ALONE = '''
@Selection.register_subclass("soft")
@dataclass(frozen=True)
class Soft(Selection):
    """Takes a trained amount off every latent."""

    units: ClassVar[Mapping[str, str] | None] = {"amount": "scores"}

    def parameters(self, d_sae, spread=1.0):
        return {"amount": torch.full((d_sae,), 0.3 * spread)}

    def competes(self, calibrated):
        return "nothing"

    def infer(self, scores, tensors):
        return where(scores > tensors["amount"])

    def activate(self, kept, ids, tensors):
        return torch.relu(kept - tensors["amount"].index_select(0, ids))
'''
BATCH_WIDE = '''
@Selection.register_subclass("batch_share")
@dataclass(frozen=True)
class BatchShare(Selection):
    """Keeps so many entries of the batch, and outside training what is above the last cut."""

    batch_wide: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str] | None] = {"calibration": "scores"}
    mean: int = 5

    def infer(self, scores, tensors):
        return where(scores > tensors.get("calibration", torch.tensor(0.5)))

    def competes(self, calibrated):
        return "nothing"

    def start(self, m):
        return {"cut": torch.zeros(())}

    def candidates(self, scores, first_token, moment):
        return top_entries(scores, self.mean * moment.n_tokens, first_token)

    def reduce(self, entries, moment):
        return top_of(entries, self.mean * moment.n_tokens)

    def keep(self, entries, moment):
        kept = top_of(entries, self.mean * moment.n_tokens)
        moment.state["cut"] = kept.values.min().clamp_min(0)
        return kept

    def calibration(self, state):
        return state["cut"]
'''
GRADIENT = '''
@Selection.register_subclass("mattering")
@dataclass(frozen=True)
class Mattering(Selection):
    """Keeps the four that matter most to the loss in training, the four largest elsewhere."""

    @property
    def gradient_loss(self):
        return "next_token"

    def augment(self, scores, effect, state):
        return scores * effect

    def infer(self, scores, tensors):
        return by_rows(top_ids(scores, 4))
'''
ENCODER = '''
@Encoder.register_subclass("bilinear")
@dataclass(frozen=True)
class Bilinear(Encoder):
    """(y W^T + b) (1 + y V^T + c)"""

    maps: ClassVar[Mapping[str, str]] = {"W_enc": "b_enc", "W_by": "b_by"}

    def combined(self, mapped, by):
        return mapped * (1 + by)
'''
SCALED = 'scaled: ClassVar[tuple[str, ...] | None] = ("W_enc", "b_enc")\n    maps:'
SAYING = ENCODER.replace("maps:", SCALED).replace("bilinear", "saying")
OBJECTIVE = '''
@Objective.register_subclass("small")
@dataclass(frozen=True)
class Small(Objective):
    """The squares of the codes."""

    weight: float = 0.1

    def loss(self, step):
        return step.run.latents.values.square().sum() / step.n_tokens
'''
OPTIMIZER = '''
@Optimizer.register_subclass("sign")
@dataclass(frozen=True)
class Sign(Optimizer):
    """The rate, against the sign of the gradient."""

    def state(self, weight):
        return {}

    def update(self, weight, gradient, state, update, *, along, unit, half, touched):
        weight -= torch.where(update.applies, update.rate, 0.0).to(weight) * gradient.sign()
'''
EXACT = {"scale", "whitening", "center", "pre_bias"}  # of latents that stay what they are: every plug-in allows them
NEW = {
    "half_max": (Selection, COMPETING, EXACT),
    "soft": (Selection, ALONE, {*EXACT, "raw", "decoder_norm"}),
    "batch_share": (Selection, BATCH_WIDE, {*EXACT, "raw"}),
    "mattering": (Selection, GRADIENT, EXACT),
    "bilinear": (Encoder, ENCODER, EXACT),
    "saying": (Encoder, SAYING, {*EXACT, "raw", "decoder_norm"}),
    "small": (Objective, OBJECTIVE, {*EXACT, "raw", "decoder_norm"}),
    "sign": (Optimizer, OPTIMIZER, {*EXACT, "raw", "decoder_norm"}),
}
"""Of each name the family, the file, and the folds that must be possible (the others must be refused)."""


def changes(family, name):
    """Fields of a run that use a plug-in; what decides alone, so that folds are refused for its own reasons."""
    alone = {"coder.selection": {"type": "relu"}, "coder.objectives.l1": {"type": "l1", "weight": 0.03}}
    return {
        Selection: {"coder.selection": {"type": name}},
        Encoder: {"coder.encoder": name} | alone,
        Objective: {"coder.objectives.new": {"type": name}} | alone,
        Optimizer: {"optim.kind": name} | alone,
    }[family]


QUICK = ("batch_share", "bilinear", "small")  # one of each kind but the optimizer, which `test_optimizers.py` looks at


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NEW])
def plugged(request, tmp_path, monkeypatch):
    """The name of a plug-in whose file has just been put into the folder of its family."""
    family, source, _ = NEW[request.param]
    package = sys.modules[family.__module__]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"new_{request.param}.py").write_text(HEAD + source, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "new")])
    found = plugins.discover(package.__name__, [str(tmp_path / "new")])
    yield request.param
    family._choice_registry.pop(request.param)
    for name in found:
        del sys.modules[f"{package.__name__}.{name}"]
        delattr(package, name)


def same(folded, coder, x, into=None):
    """Asserts that a fold has the output of the coder it is of, and fires where that one does."""
    expected, found = coder(x if into is None else into(x)), folded(x)
    out = expected.out if into is None else (expected.out.double() @ INVERSE + MEAN).float()
    torch.testing.assert_close(found.out, out, rtol=1e-4, atol=1e-4)
    moved = (found.latents.to_dense() != 0) != (expected.latents.to_dense() != 0)
    assert moved.float().mean() < 1e-3, "but for what lies at a threshold to the last bit"


D = 16
MATRIX = torch.eye(D).double() + 0.3 * torch.ones(D, D).double().triu(1)
INVERSE, MEAN = torch.linalg.inv(MATRIX), torch.linspace(-1, 1, D).double()
FOLDS = {
    "scale": ("scalar", lambda coder: coder.fold_scale()),
    "raw": ("scalar", lambda coder: coder.fold_scale("raw")),
    "decoder_norm": ("none", lambda coder: coder.fold_decoder_norm()),
    "whitening": ("none", lambda coder: coder.fold_whitening(MEAN.float(), MATRIX, INVERSE)),
    "center": ("center", lambda coder: coder.fold_token_norm()),
    "pre_bias": ("none", lambda coder: coder.fold_pre_bias()),
}


def test_it_trains_and_goes_where_all_others_go(plugged, tiny_train, tiny_text, tmp_path):
    family, _, folds = NEW[plugged]
    code, printed = tiny_train(
        {"coder.normalization.kind": "scalar", "coder.decoder_norm": "free", **changes(family, plugged)}
    )
    assert code == 0, printed
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    coder = sae.load(tmp_path / "run")
    x = coder.spec.normalization.scale**-1 * torch.randn(40, D)
    assert 0 < coder.encode(x).l0().mean() < 64

    for name, (kind, fold) in FOLDS.items():
        scale = coder.spec.normalization.scale if kind == "scalar" else 1.0
        normal = coder.with_spec(coder.spec.with_(normalization=Normalization(kind, scale)))
        if name not in folds:
            with pytest.raises(ConfigError, match=r"^(selection|encoder): "):
                fold(normal)
            continue
        into = (lambda x: ((x.double() - MEAN) @ MATRIX).float()) if name == "whitening" else None
        same(fold(normal), normal, x, into)

    sae.save(coder, tmp_path / "saved")
    loaded, mapped = sae.load(tmp_path / "saved"), sae.load(tmp_path / "saved", lazy=True)
    assert loaded.spec == coder.spec
    assert torch.equal(loaded.encode(x).values, coder.encode(x).values)
    asked = [0, 3, 17, 40, 63]
    some, full = mapped.encode(x, latents=asked).to_dense(), coder.encode(x).to_dense()
    torch.testing.assert_close(some[:, asked], full[:, asked])
    assert (some != 0).sum() == (full[:, asked] != 0).sum()

    report = sae.diagnose(coder, tiny_lm(), 256, str(tiny_text))
    assert report.l0 > 0
    assert report.lines()


@pytest.mark.parametrize("layout", ["crosscoder", pytest.param("cross_layer", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "plugged",
    [pytest.param("half_max", marks=pytest.mark.slow), pytest.param("soft", marks=pytest.mark.slow), "batch_share"],
    indirect=True,
)
def test_a_new_rule_trains_in_coders_of_several_sites(plugged, layout, tiny_train, tmp_path):
    sites = {"activations.sites": ["layers.0", "layers.1"], "coder.layout": layout}
    code, printed = tiny_train(sites | {"coder.selection": {"type": plugged}})
    assert code == 0, printed
    coder = sae.load(tmp_path / "run")
    x = torch.randn(20, 2 * D)
    some, full = coder.encode(x, latents=[1, 40]).to_dense(), coder.encode(x).to_dense()
    torch.testing.assert_close(some[:, [1, 40]], full[:, [1, 40]])


@pytest.mark.parametrize("plugged", ["bilinear"], indirect=True)
def test_a_new_encoder_says_what_it_does_not_go_with(plugged):
    assert CoderConfig(encoder=plugged).validate() is None
    with pytest.raises(ConfigError, match=r"^coder.encoder: 'bilinea' is not one of bilinear, glu, linear\..*bilinear"):
        CoderConfig(encoder="bilinea").validate()
