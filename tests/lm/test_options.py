"""model.kwargs: what from_pretrained takes goes through, all else is one line before anything is loaded."""

import re
from pathlib import Path

import draccus
import pytest
import torch
from transformers import BitsAndBytesConfig

import sae
from sae.base.errors import ConfigError
from sae.base.settings import decode, to_yaml
from sae.lm.models import ModelConfig, load_language_model
from sae.lm.options import ready
from sae.training.config import TrainConfig


@pytest.mark.parametrize(
    "kwargs",
    [
        {"device_map": "auto"},
        {"device_map": "cuda:1"},
        {"device_map": 0},
        {
            "device_map": {
                "model.embed_tokens": 0,
                "model.layers.0": "cuda:1",
                "model.layers.1": "cpu",
                "lm_head": "disk",
            }
        },
        {"device_map": "auto", "max_memory": {0: "20GiB", "1": "20 GB", "cpu": 10**9}, "offload_folder": "away"},
        {"device_map": "auto", "offload_buffers": True},
        {"quantization_config": {"load_in_8bit": True}},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": {"text_config": "eager", "vision_config": "sdpa"}},
        {"variant": "fp16"},
    ],
)
def test_what_from_pretrained_takes_is_kept_as_it_is(kwargs):
    config = ModelConfig("x", kwargs=kwargs)
    config.validate()
    assert config.kwargs == kwargs
    assert decode(ModelConfig, draccus.encode(config)) == config


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"device_mpa": "auto"}, "device_mpa: no such argument. Did you mean 'device_map'? Allowed: device_map, "),
        ({"device_map": "automatic"}, "device_map: 'automatic' is not one of auto, balanced, "),
        ({"device_map": {}}, "device_map: {} is not one of auto"),
        ({"device_map": {"": "meta"}}, "device_map: {'': 'meta'} is not one of auto"),
        ({"device_map": {"": "cpu", "lm_head": "disk"}}, "device_map: '' names all of the model; where weights go to"),
        ({"offload_folder": "away"}, "offload_folder: it is for a device_map; say that too"),
        ({"device_map": {"lm_head": "gpu"}}, "device_map: {'lm_head': 'gpu'} is not one of auto"),
        ({"device_map": True}, "device_map: True is not one of auto"),
        ({"device_map": "auto", "max_memory": "20GiB"}, "max_memory: '20GiB' is not a mapping of devices to sizes"),
        ({"device_map": "auto", "max_memory": {0: "a lot"}}, "max_memory: {0: 'a lot'} is not a mapping"),
        ({"max_memory": {0: "20GiB"}}, "max_memory: it is for a device_map; say that too"),
        ({"quantization_config": "nf4"}, "quantization_config: 'nf4' is not a mapping, such as"),
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            "attn_implementation: 'kernels-community/flash-attn'",
        ),
        ({"attn_implementation": {"text_config": "a/b"}}, "attn_implementation: {'text_config': 'a/b'} is not a name"),
        ({"trust_remote_code": True}, "trust_remote_code: code of a model's own runs only if you type --trust-remote"),
        ({"revision": "main"}, "revision: model.revision says it"),
        ({"token": "hf_abc"}, "token: a config is kept on disk; log in"),
        ({"use_safetensors": False}, "use_safetensors: weights are read from safetensors alone"),
        ({"use_kernels": True}, "use_kernels: kernels are code on the hub"),
    ],
)
def test_what_it_may_not_be_given_is_one_line_before_anything_is_loaded(kwargs, told):
    for load in (lambda: ModelConfig("x", kwargs=kwargs).validate(), lambda: load_language_model("x", kwargs=kwargs)):
        with pytest.raises(ConfigError, match=rf"^{re.escape(f'model.kwargs.{told}')}"):
            load()


def test_a_key_is_not_repeated_in_the_error():
    with pytest.raises(ConfigError) as raised:
        ModelConfig("x", kwargs={"token": "hf_abc"}).validate()
    assert "hf_abc" not in str(raised.value)


def test_the_dtype_is_that_of_its_own_field():
    for kwargs in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        assert ModelConfig("x", kwargs=kwargs) == ModelConfig("x", dtype="bfloat16")
        assert ModelConfig("x", dtype="bfloat16", kwargs=kwargs) == ModelConfig("x", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"^model\.kwargs\.dtype: bfloat16, but model\.dtype is float32; say"):
        ModelConfig("x", dtype="float32", kwargs={"dtype": "bfloat16"}).validate()
    with pytest.raises(ConfigError, match=r"^model\.dtype: 'float8_e5m2' is not one of auto, float32"):
        ModelConfig("x", dtype=torch.float8_e5m2).validate()
    with pytest.raises(ConfigError, match=r"^model\.kwargs\.device_map: model\.device is cpu; say one of them"):
        ModelConfig("x", device=torch.device("cpu"), kwargs={"device_map": "auto"}).validate()


def test_objects_are_kept_as_a_file_can_hold_them():
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    given = {"quantization_config": quantized, "device_map": {"": torch.device("cpu")}, "offload_folder": Path("a")}
    config = ModelConfig("x", kwargs=given)
    config.validate()
    assert config.kwargs["device_map"] == {"": "cpu"}
    assert config.kwargs["offload_folder"] == "a"
    assert "bnb_4bit_compute_dtype: bfloat16" in to_yaml(config)
    made = ready(config.kwargs)["quantization_config"]
    assert isinstance(made, BitsAndBytesConfig)
    assert made.to_dict() == quantized.to_dict()


def test_without_any_a_config_is_written_as_before():
    assert "kwargs" not in to_yaml(TrainConfig())
    assert decode(TrainConfig, draccus.encode(TrainConfig())) == TrainConfig()


def test_what_computes_otherwise_has_another_fingerprint_and_what_lies_elsewhere_the_same(tiny_model):
    plain = load_language_model(tiny_model)
    assert "attn_implementation" not in plain.fingerprint()
    eager = load_language_model(tiny_model, kwargs={"attn_implementation": "eager"})
    assert eager.model.config._attn_implementation == "eager" != plain.model.config._attn_implementation
    assert eager.fingerprint() == {**plain.fingerprint(), "attn_implementation": "eager"}
    placed = load_language_model(tiny_model, kwargs={"device_map": {"": "cpu"}})
    assert placed.fingerprint() == plain.fingerprint()


def test_what_quantizing_lacks_is_told(tiny_model):
    with pytest.raises(ConfigError, match=r"^model\.name: .* could not be loaded: .*bitsandbytes"):
        load_language_model(tiny_model, kwargs={"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(ConfigError, match=r"^model\.kwargs\.quantization_config: .*quant"):
        load_language_model(tiny_model, kwargs={"quantization_config": {"quant_method": "none such"}})


def test_a_run_reads_its_model_with_them_typed_or_not(tiny_train, tmp_path):
    code, printed = tiny_train({"tokens": 256, "log.every_steps": 2})
    assert code == 0, printed
    options = ("--model.kwargs.attn_implementation", "eager", "--model.kwargs.device_map", "{'': cpu}")
    for changes, typed in (({}, options), ({"model.kwargs": {"attn_implementation": "eager"}}, ())):
        folder = tmp_path / f"run {len(typed)}"
        changes = {"tokens": 256, "log.every_steps": 2, "model.device": "auto", **changes}
        code, printed = tiny_train(changes, options=typed, folder=folder)
        assert code == 0, printed
        assert '"attn_implementation": "eager"' in (folder / "env.json").read_text()
    assert sae.load(folder).spec.reads[0].name == "model.layers.1"
    code, printed = tiny_train(options=("--model.kwargs.device_mpa", "auto"), folder=tmp_path / "none")
    assert code == 2
    assert printed.strip().endswith(
        "Allowed: device_map, max_memory, offload_folder, offload_buffers, "
        "quantization_config, attn_implementation, dtype, variant, torch_dtype"
    )
