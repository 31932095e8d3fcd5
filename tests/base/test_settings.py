"""Configs: what is typed becomes what is meant, or one line that names the field, the value and the nearest match."""

import dataclasses
from pathlib import Path

import draccus
import numpy as np
import pytest
import torch

from cli.common import read_config
from sae.base.errors import ConfigError
from sae.base.fields import fields
from sae.base.settings import decode, flat, merge, parse_value, read_yaml, set_dotted, to_yaml
from sae.selection.topk import TopK
from sae.training.config import TrainConfig

FIELDS = [one for one in fields("sae.training.config:TrainConfig") if one.kind != "group"]


def read(*overrides, path=None):
    return read_config(TrainConfig, read_yaml(path) if path else {}, list(overrides))


def test_every_field_is_documented_and_can_be_set_on_the_command_line():
    for one in FIELDS:
        assert one.doc, f"{one.path} has no docstring"
        if one.default not in ("None", "") and one.path not in ("grid", "coder.objectives"):
            chosen = [f"--{one.path.rpartition('.')[0]}.type", one.of] if one.of else []
            read(*chosen, f"--{one.path}", one.default)
    wanted = {"coder.selection.k", "coder.selection.type", "text.column", "optim.lr", "tokens"}
    assert wanted <= {one.path for one in FIELDS}


def test_both_spellings_of_an_option_and_dashes():
    config = read("--coder.selection.k", "7", "--optim.lr=1e-4", "--batch-tokens", "128")
    assert (config.coder.selection, config.optim.lr, config.batch_tokens) == (TopK(7), 1e-4, 128)


def test_the_file_overrides_defaults_and_options_override_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("tokens: 1000\noptim: {lr: 1e-2, ema: 0.5}\n", encoding="utf-8")
    config = read("--optim.ema", "0.9", path=path)
    assert (config.tokens, config.optim.lr, config.optim.ema, config.optim.beta1) == (1000, 0.01, 0.9, 0.9)


def test_values_of_python_are_those_of_a_file():
    typed = {
        "tokens": np.int64(1000),
        "batch_tokens": 1e2,
        "optim": {"lr": np.float32(0.5), "warmup_share": torch.tensor(0.25)},
        "coder": {"d_sae": 1e3, "selection": {"type": "topk", "k": 4.0}},
        "text": {"source": Path("folder")},
        "activations": {"sites": np.array(["layers.2"])},
    }
    config = decode(TrainConfig, typed)
    assert (config.tokens, config.batch_tokens, config.coder.d_sae) == (1000, 100, 1000)
    assert {type(n) for n in (config.tokens, config.batch_tokens, config.coder.d_sae, config.coder.selection.k)} == {
        int
    }
    assert (config.optim.lr, config.text.source, config.activations.sites) == (0.5, "folder", ("layers.2",))
    assert read("--tokens", "1e6").tokens == 1_000_000
    with pytest.raises(ConfigError, match=r"^tokens: 1\.5 is not a whole number$"):
        decode(TrainConfig, {"tokens": np.float64(1.5)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coder.selction.k", "3"], "coder.selction: no such field. Did you mean 'selection'?"),
        (["--optim.learning_rate", "1"], "optim.learning_rate: no such field."),
        (["--tokens", "many"], "tokens: 'many' is not a whole number"),
        (["--tokens", "1.5"], "tokens: 1.5 is not a whole number"),
        (["--tokens", "true"], "tokens: True is not a whole number"),
        (["--tokens", "null"], "tokens: None is not a whole number"),
        (["--optim.lr", ".nan"], "optim.lr: nan is not a number"),
        (["--text.streaming", "maybe"], "text.streaming: 'maybe' is not true or false"),
        (["--activations.sites", "layers.2"], "activations.sites: 'layers.2' is not a list"),
        (["--coder.selection.type", "topkk"], "coder.selection.type: 'topkk' is not one of"),
        (["--coder", "5"], "coder: 5 is not a mapping"),
        (
            ["--coder.objectives.auxk.weigth", "1"],
            "coder.objectives.auxk.weigth: no such field. Did you mean 'weight'",
        ),
        (["tokens", "5"], "'tokens': expected --field value"),
        (["--tokens"], "--tokens: its value is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as found:
        read(*options)
    assert str(found.value).startswith(message)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coder.selection.k", "99", "--coder.d_sae", "64"], "coder.selection.k: 99"),
        (["--coder.selection.k", "0", "--coder.d_sae", "64"], "coder.selection.k: 0"),
        (["--batch_tokens", "100"], "batch_tokens: 100 is not a multiple of 64"),
        (["--batch_tokens", "0"], "batch_tokens: 0 is too small"),
        (["--tokens", "64", "--batch_tokens", "128"], "tokens: 64 is less than one batch"),
        (["--precision", "float8"], "precision: 'float8' is not one of float32, bfloat16"),
        (["--model.dtype", "float23"], "model.dtype: 'float23' is not one of .* Did you mean 'float32'?"),
        (["--activations.sites", "[]"], "activations.sites: empty"),
        (["--activations.source", "disc"], "activations.source: 'disc' is not one of .* Did you mean 'disk'?"),
        (["--activations.block_rows", "0"], "activations.block_rows: 0 is too small"),
        (
            ["--coder.normalization.kind", "layernorm"],
            "normalization.kind: 'layernorm' .* Did you mean 'layer_norm'",
        ),
        (["--text.layout", "pack"], "text.layout: 'pack' is not one of"),
        (["--text.held_out_share", "0"], "text.held_out_share: 0.0 is not between"),
        (["--text.source", "./nowhere.txt"], "text.source: no such file or folder: './nowhere.txt'"),
        (["--text.context_length", "1"], "text.context_length: 1 is too small"),
        (["--eval.tokens", "0"], "eval.tokens: 0 is too small"),
        (["--checkpoints.keep", "0"], "checkpoints.keep: 0 is too small"),
        (["--log.tracker", "wandbb"], "log.tracker: 'wandbb' is not one of .* Did you mean 'wandb'?"),
        (["--dead_after_tokens", "0"], "dead_after_tokens: 0 is too small"),
        (["--grid", "{tokens: [1, 2]}"], "grid: 'tokens' is not coder, optim or a field below them"),
        (["--grid", "{optim.lr: []}"], "grid.optim.lr: .* at least one value"),
        (["--grid", "{optim.lr: [1, 1]}"], "grid.optim.lr: .* none twice"),
        (["--grid", "{optim.rate: [1]}"], "optim.rate: no such field"),
        (["--coder.center", "median"], "coder.center: 'median' is not one of"),
        (["--coder.pre_bias", "encoder"], "coder.pre_bias: 'encoder' is not one of"),
        (["--coder.decoder_norm", "one"], "coder.decoder_norm: 'one' is not one of"),
        (["--coder.expansion", "0"], "coder.expansion: 0"),
        (["--coder.d_sae", "-1"], "coder.d_sae: -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be_are_refused_before_anything_loads(options, message):
    with pytest.raises(ConfigError, match=message) as found:
        read(*options).validate()
    assert "\n" not in str(found.value)


def test_a_grid_is_every_combination_by_label():
    config = read("--grid", "{coder.selection.k: [8, 16], optim.lr: [1e-3, 1e-2]}")
    points = {label: (coder.selection, optim.lr) for label, coder, optim in config.points()}
    assert points == {
        "k=8,lr=0.001": (TopK(8), 1e-3),
        "k=8,lr=0.01": (TopK(8), 1e-2),
        "k=16,lr=0.001": (TopK(16), 1e-3),
        "k=16,lr=0.01": (TopK(16), 1e-2),
    }
    assert [label for label, *_ in read().points()] == [""]


def test_derived_sizes():
    config = read("--tokens", "1000", "--batch_tokens", "128")
    assert (config.steps, config.dead_after) == (7, 100)
    assert read("--tokens", "1_000_000_000").dead_after == 10_000_000
    assert read("--dead_after_tokens", "5").dead_after == 5
    assert (config.coder.width(10), dataclasses.replace(config.coder, d_sae=7).width(10)) == (80, 7)


def test_text_stays_text_and_numbers_are_numbers():
    assert read("--model.revision", "12345e6").model.revision == "12345e6"
    assert read("--model.name", "null").model.name == "null"
    assert read("--model.revision", "null").model.revision is None
    assert parse_value(TrainConfig, "optim.lr", "1e-4") == 1e-4
    tokens = read("--tokens", "1.5e6").tokens
    assert (tokens, type(tokens)) == (1_500_000, int)
    assert type(read("--optim.lr", "1e0").optim.lr) is float
    for text in ("1e999", "1e-3", "1.5"):
        with pytest.raises(ConfigError, match=r"tokens: .* is not a whole number"):
            read("--tokens", text)
    assert parse_value(TrainConfig, "activations.sites", "[a.b, c:input]") == ["a.b", "c:input"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"coder": {"selection": "jumprelu"}}, "such as {type: jumprelu}; or type --coder.selection.type jumprelu"),
        ({"coder": {"selection": "topkk"}}, "such as {type: topk}; or type --coder.selection.type topk"),
        ({"model": "gpt2"}, "such as {name: gpt2}; or type --model.name gpt2"),
        ({"text": "my.txt"}, "such as {source: my.txt}; or type --text.source my.txt"),
        ({"model": "http://me:key@host/x"}, "such as {name: http://***host/x}; or type --model.name http://***host/x"),
        ({"model": 3}, "such as {name: quickstart}; or type --model.name quickstart"),
    ],
)
def test_what_is_no_mapping_is_told_with_it_in_its_place(data, told):
    with pytest.raises(ConfigError) as refused:
        decode(TrainConfig, data)
    assert str(refused.value).endswith(told)


def test_text_that_looks_like_a_number_survives_a_file(tmp_path):
    config = read("--name", "1e3", "--model.revision", "12345e6")
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read(path=tmp_path / "again.yaml") == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_mark_of_byte_order(tmp_path, encoding):
    (tmp_path / "mine.yaml").write_text("run_dir: caf\u00e9\n", encoding=encoding)
    assert read(path=tmp_path / "mine.yaml").run_dir == "caf\u00e9"


def test_merging_another_plug_in_drops_the_fields_of_the_old_one():
    base = {"selection": {"type": "topk", "k": 3}, "x": {"y": 1, "z": 2}}
    assert merge(base, {"selection": {"type": "other"}})["selection"] == {"type": "other"}
    assert merge(base, {"selection": {"k": 5}})["selection"] == {"type": "topk", "k": 5}
    data = merge(base, {})
    set_dotted(data, "x.y", 7)
    assert (data["x"], base["x"]) == ({"y": 7, "z": 2}, {"y": 1, "z": 2})
    assert flat(data) == {"selection.type": "topk", "selection.k": 3, "x.y": 7, "x.z": 2}


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", "\x00"])
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^config: .*bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml")


def test_configs_encode_to_what_decodes_to_them():
    config = read("--coder.selection.k", "3", "--activations.sites", "[a, b]")
    assert decode(TrainConfig, draccus.encode(config)) == config


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"coder.selection": [{"type": "topk", "k": 2}]}, "give mappings and lists a name"),
        ({"coder": {"a/b": {}}}, "names a folder"),
        ({"coder.selection.k": []}, "must hold at least one value"),
    ],
)
def test_grids_that_cannot_be(grid, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(grid=grid).validate()


def test_grid_points_have_names():
    grid = {"coder": {"topk": {"selection": {"type": "topk", "k": 2}}, "mc": {"d_sae": 64}}, "optim.lr": [0.1, 0.2]}
    assert [label for label, *_ in TrainConfig(grid=grid).points()] == [
        "topk,lr=0.1",
        "topk,lr=0.2",
        "mc,lr=0.1",
        "mc,lr=0.2",
    ]
