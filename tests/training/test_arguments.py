"""What train takes beside a TrainConfig: a mapping, a file, and a model that is loaded already."""

import re

import pytest
import torch
from rigs.fakes import tiny_config
from rigs.runs import lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae
from sae.base.errors import ConfigError, Stopped
from sae.base.settings import read_yaml, to_yaml
from sae.training.arguments import as_config, with_model
from sae.training.config import TrainConfig

FEW = {"tokens": 4 * 128, "checkpoints.every_steps": 2}


@pytest.fixture
def config(tiny_model, tiny_text):
    return tiny_config(tiny_model, tiny_text, FEW)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def other(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    return model


def test_a_mapping_and_a_file_are_the_config_that_they_say(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    for given in (config, read_yaml(path), path, str(path)):
        assert as_config(given) == config
    with pytest.raises(ConfigError, match=r"^tokns: no such field\. Did you mean 'tokens'\?"):
        as_config({"tokns": 3})


@pytest.mark.parametrize("given", [None, 3, TrainConfig, ["a"], torch.zeros(1)])
def test_what_is_no_config_is_one_line(given):
    with pytest.raises(TypeError, match=r"^config: .* was given; it takes a TrainConfig, a mapping of its fields, or"):
        sae.train(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TrainConfig(tokens="5k"), "tokens: '5k' is not a whole number"),
        (TrainConfig(tokens=1.5), "tokens: 1.5 is not a whole number"),
        (
            "quickstart",
            "config: no such file: quickstart. sae-train --config quickstart --print-config prints",
        ),
        ("quikstart", "config: no such file: quikstart. Did you mean 'quickstart'?"),
        ("nothing/at/all.yaml", "config: no such file: nothing/at/all.yaml."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_in_a_config_is_one_line(given, message):
    with pytest.raises(ConfigError) as found:
        sae.train(given)
    assert str(found.value).startswith(message)


def test_whole_numbers_of_a_config_are_whole():
    config = as_config(TrainConfig(tokens=5e3))
    assert (config, type(config.tokens)) == (TrainConfig(tokens=5000), int)


def test_a_folder_that_is_none_is_one_line(config):
    with pytest.raises(TypeError, match=r"^run_dir: 3 was given; it takes the path of a folder$"):
        sae.train(config, run_dir=3)


def test_a_run_of_a_loaded_model_is_that_of_its_name(quick, config, model, tiny_model, tmp_path):
    named = sae.train(config, run_dir=tmp_path / "named", progress=False)
    nothing = tiny_config("/absent", config.text.source, FEW)
    given = sae.train(nothing, run_dir=tmp_path / "given", model=model, progress=False)
    assert given.metrics == named.metrics
    assert str(given).startswith(f"TrainResult('{tmp_path / 'given'}')\n  model.layers.")
    assert max(map(len, str(given).splitlines())) < 300, "a cell's last line is to be read"
    assert lines(tmp_path / "given") == lines(tmp_path / "named")
    assert read_yaml(tmp_path / "given/config.yaml") == read_yaml(tmp_path / "named/config.yaml")
    (coder,) = given.coders.values()
    assert coder.spec.reads[0].model == str(tiny_model)


def test_other_weights_than_the_names_are_told_on_resuming_and_evaluating(quick, config, other, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = sae.train(config, run_dir=folder, model=other, progress=False)
    with pytest.raises(ConfigError, match=r"^--resume: the weights is not that of the run"):
        sae.train(config, resume=True, run_dir=folder, progress=False)
    (coder,) = run.coders.values()
    with pytest.raises(ConfigError, match=r"trained on a loaded model, whose weights are not those of .*; pass it$"):
        sae.evaluate(coder, progress=False)
    found = sae.evaluate(coder, other, tokens=256, progress=False)
    assert found["reconstruction"] == coder.spec.metrics["reconstruction"]


def test_a_model_of_no_name_is_passed_again(quick, config, other, tiny_model, tmp_path, monkeypatch):
    other.config._name_or_path = ""
    folder, passed = tmp_path / "run", {"model": other, "tokenizer": AutoTokenizer.from_pretrained(tiny_model)}
    saved = sae.training.loop.Run._save

    def stopping(run, *rest):
        saved(run, *rest)
        raise Stopped("here")

    with monkeypatch.context() as patch:
        patch.setattr("sae.training.loop.Run._save", stopping)
        with pytest.raises(Stopped):
            sae.train(config, run_dir=folder, progress=False, **passed)
    assert read_yaml(folder / "config.yaml")["model"]["name"] == "object:LlamaForCausalLM"
    with pytest.raises(ConfigError, match=r"^model\.name: this was a loaded LlamaForCausalLM that has no name"):
        sae.train(folder / "config.yaml", resume=True, run_dir=folder, progress=False)
    run = sae.train(config, resume=True, run_dir=folder, progress=False, **passed)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    (coder,) = run.coders.values()
    with pytest.raises(ConfigError, match=r"has no name; pass it again"):
        sae.evaluate(coder)


def test_a_name_and_a_config_stand_in_place_of_the_configs_own(config, tiny_model):
    for given in (str(tiny_model), tiny_model, {"name": str(tiny_model)}, sae.load_language_model(tiny_model)):
        made, lm = with_model(tiny_config("/absent", config.text.source), given, None)
        assert made.model.name == str(tiny_model)
        assert (lm is None) != isinstance(given, type(lm))
    made, lm = with_model(config, None, tiny_model)
    assert made == config
    assert lm.name == str(tiny_model)


def test_a_config_that_says_something_else_of_the_model_is_told(config, model):
    for field, said, there in (("dtype", "bfloat16", "float32"), ("device", "cuda", "cpu")):
        changed = tiny_config(config.model.name, config.text.source, {f"model.{field}": said})
        with pytest.raises(
            ConfigError, match=re.escape(f"model.{field}: {said}, but the model that was passed has {there}")
        ):
            with_model(changed, model, None)
    made, _ = with_model(tiny_config(config.model.name, config.text.source), model.bfloat16(), None)
    assert made.model.dtype == "bfloat16"
