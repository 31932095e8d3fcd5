"""Settings of the families that cannot be: one line names the field, the value and what is allowed."""

import re
import shutil

import pytest
from rigs.fakes import tiny_model_folder, tiny_tokenizer
from rigs.runs import error_of

from cli.evaluate import main as sae_eval
from sae.training.estimate import estimate

GRADIENT = {"type": "gradient_topk", "k": 4}
ROWS = {"batch_tokens": 128, "text.context_length": 32, "coder.objectives": {"kl": {"type": "kl"}}}
BEFORE_THE_MODEL = [
    (
        {"coder.normalization.kind": "layer_norm", "coder.normalization.undone": False},
        "coder.normalization.undone: false is for coders that are loaded; training undoes it",
    ),
    ({"coder.selection": {"type": "relu"}}, r"coder\.objectives: selection relu needs the term l1 or tanh; add it"),
    ({"coder.selection": {"type": "jumprelu"}}, r"coder\.objectives: selection jumprelu needs the term l0; add it"),
    ({"coder.objectives": {"gate": {"type": "gate"}}}, r"coder\.objectives\.gate: needs selection gated, not topk"),
    ({"coder.objectives": {"l0": {"type": "l0"}}}, r"coder\.objectives\.l0: needs the thresholds .* not topk; use l1"),
    ({"coder.selection": {"type": "groupmax", "k": 5}}, r"coder\.selection\.k: 5 groups cannot share d_sae = 64"),
    ({"coder.selection": GRADIENT | {"beta": -1}}, r"coder\.selection\.beta: -1.* must be at least 0"),
    ({"coder.selection": GRADIENT | {"loss": "kl"}}, r"coder\.selection\.loss: 'kl' is not one of next_token, sampled"),
    ({"coder.selection": {"type": "feature_choice", "k": 4, "mutual_share": 2}}, r"coder\.selection\.mutual_share: 2"),
    ({"coder.selection": {"type": "feature_choice", "k": 4, "shift": -1}}, r"coder\.selection\.shift: -1"),
    (
        {"coder.selection": {"type": "feature_choice", "k": 4, "density": "muttual"}},
        r"coder\.selection\.density: 'muttual' is not one of mutual, own\. Did you mean 'mutual'\?",
    ),
    (
        {"coder.selection": {"type": "mutual_choice", "k": 4, "threshold_decay": 1}},
        r"coder\.selection\.threshold_decay",
    ),
    ({"coder.selection": {"type": "topk", "k": 4, "k_start": 99}}, r"coder\.selection\.k_start: 99 is not between 1"),
    ({"coder.selection": {"type": "topk", "k": 4, "anneal_share": 0}}, r"coder\.selection\.anneal_share: 0"),
    (
        {"coder.objectives": {"matryoshka": {"type": "matryoshka", "prefixes": [0.5, 0.25, 1]}}},
        r"coder\.objectives\.matryoshka\.prefixes: \[0\.5, 0\.25, 1\.?0?\] must grow",
    ),
    ({"coder.objectives": {"multi": {"type": "multi_topk", "k": 65}}}, r"coder\.objectives\.multi_topk\.k: 65 is not"),
    ({"coder.objectives": {"aux_zipf": {"type": "aux_zipf", "tau": 0}}}, r"coder\.objectives\.aux_zipf\.tau: 0"),
    ({"coder.budget": "shared"}, r"coder\.budget: 'shared' is for coder\.layout cross_layer"),
    ({"coder.layout": "clt"}, r"coder\.layout: 'clt' is not one of per_site, crosscoder, cross_layer"),
    ({"activations.targets": ["layers.0", "layers.1"]}, r"activations\.targets: 2 for 1 sites; name one for each"),
    (ROWS | {"activations.source": "disk"}, r"coder\.objectives: end-to-end terms .* drop stored activations"),
    (
        ROWS | {"coder.selection": GRADIENT},
        r"coder\.objectives: end-to-end .* drop a selection that looks at",
    ),
    (
        ROWS | {"second_model.name": "other", "coder.layout": "crosscoder"},
        r"second_model: end-to-end terms \(kl, ce\) run one model",
    ),
    (ROWS | {"text.context_length": 48}, r"batch_tokens: 128 is not whole rows of text\.context_length 48"),
    (
        {"grid": {"coder.selection": {"a": GRADIENT, "b": GRADIENT | {"loss": "sampled"}}}},
        r"grid: selections with the losses next_token, sampled cannot share one pass",
    ),
    ({"second_model.name": "other"}, r"second_model: read by crosscoders only; .* not per_site"),
    ({"coder.selection": {"type": "gated"}}, r"coder\.objectives: selection gated needs the term gate; add it"),
    (
        {"coder.selection": {"type": "gated"}, "coder.objectives": {"gate": {"type": "gate"}}},
        r"coder\.objectives: selection gated needs the term l1; add it",
    ),
    ({"grid": {"coder": {"a/b": {"d_sae": 32}}}}, r"grid\.coder: 'a/b' names a folder; use letters"),
    ({"grid": {"coder": [{"d_sae": 32}]}}, r"grid\.coder: give mappings and lists a name"),
]


@pytest.mark.parametrize(("changes", "message"), BEFORE_THE_MODEL, ids=lambda value: str(value)[:60])
def test_before_the_model_is_loaded(tmp_path, tiny_train, no_model, changes, message):
    code, printed = tiny_train(changes, folder=tmp_path / "run")
    assert code == 2
    assert re.match(message, error_of(printed)), error_of(printed)
    assert not (tmp_path / "run" / "config.yaml").exists()


L0 = {"l0": {"type": "l0"}}
PREDICTED = {"activations.sites": ["layers.0"], "activations.targets": ["layers.1"]}
KNOWN_BY_THE_CONFIG = [
    ({"coder.skip": True}, r"coder\.skip: true lets an autoencoder copy its input; it is for transcoders"),
    (
        {"activations.sites": ["layers.1"], "activations.targets": ["layers.0"]},
        r"activations\.targets: model\.layers\.0 is computed before model\.layers\.1, from which it is to be predicted",
    ),
    (
        {"activations.sites": ["layers.*"], "activations.targets": ["layers.1"]},
        r"activations\.targets: 'layers\.1' names 1 sites, but 'layers\.\*' 2; each site needs its own target",
    ),
    (
        {
            "activations.sites": ["layers.0"],
            "activations.targets": ["layers.1"],
            "coder.normalization.kind": "layer_norm",
        },
        r"coder\.normalization\.kind: 'layer_norm' is undone with .* a transcoder takes none or scalar",
    ),
    ({"activations.targets": ["layers.1.mpl"]}, r"activations\.targets: no module 'layers\.1\.mpl' .*Did you mean"),
    (
        {"activations.sites": ["layers.1", "layers.0"], "coder.layout": "cross_layer"},
        r"activations\.sites: model\.layers\.0 is computed before model\.layers\.1, from which it is to be predicted",
    ),
    (
        {"coder.selection": {"type": "jumprelu"}, "coder.objectives": L0, "coder.select_by_decoder_norm": True},
        r"coder\.select_by_decoder_norm: true does not go with trained thresholds",
    ),
    (
        {"activations.sites": ["layers.*"], "coder.layout": "cross_layer", "coder.d_sae": 63},
        r"coder\.d_sae: 63 latents cannot be shared equally by 2 layers",
    ),
]


@pytest.mark.parametrize(("changes", "message"), KNOWN_BY_THE_CONFIG, ids=lambda value: str(value)[:60])
def test_as_soon_as_the_models_config_is_known(monkeypatch, tmp_path, tiny_train, no_model, changes, message):
    monkeypatch.setattr("sae.training.estimate.estimate", estimate)
    code, printed = tiny_train(changes, folder=tmp_path / "run")
    assert code == 2
    assert re.match(message, error_of(printed)), error_of(printed)


@pytest.mark.slow
def test_a_crosscoder_of_two_models_is_trained_and_evaluated_in_each(tmp_path, tiny_train):
    other = tiny_model_folder(tmp_path / "other", num_hidden_layers=3)
    changes = {"second_model": {"name": str(other), "device": "cpu"}, "coder.layout": "crosscoder"}
    code, printed = tiny_train(changes, folder=tmp_path / "run")
    assert code == 0, printed
    assert sae_eval([str(tmp_path / "run"), "--tokens", "64"]) == 0


def test_a_second_model_of_another_tokenizer_is_refused(tmp_path, tiny_train):
    other = tiny_model_folder(tmp_path / "other", tiny_tokenizer(pad=False))
    code, printed = tiny_train({"second_model": {"name": str(other), "device": "cpu"}, "coder.layout": "crosscoder"})
    assert code == 2
    assert re.match(r"second_model\.name: .*other has another tokenizer than ", error_of(printed))


@pytest.mark.slow
def test_what_a_coder_starts_from_must_be_alike(tmp_path, tiny_train):
    assert tiny_train({"tokens": 128}, folder=tmp_path / "first")[0] == 0
    start = {"coder.start_from": str(next((tmp_path / "first" / "coders").iterdir())), "tokens": 128}
    assert tiny_train(start, folder=tmp_path / "second")[0] == 0
    for name, value in {"d_sae": 32, "selection": {"type": "mutual_choice", "k": 4}}.items():
        code, printed = tiny_train(start | {f"coder.{name}": value}, folder=tmp_path / name)
        assert code == 2
        assert re.match(rf"coder\.start_from: .* has {name}\S* .*, but this run ", error_of(printed))
    shutil.rmtree(tmp_path / "first")
    code, printed = tiny_train(start, folder=tmp_path / "third")
    assert code == 2
    assert "first" in error_of(printed)
