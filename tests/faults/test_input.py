"""Rows 15 to 18 and 22: bad text, hooks, settings and models end at once in a line with field, value and fix."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config, tiny_model_folder, tiny_tokenizer
from rigs.runs import error_of, lines
from torch import nn

import sae.training.preparing
from cli.evaluate import main as sae_eval
from sae.base.settings import to_yaml
from sae.lm.models import load_language_model
from sae.loading import hub
from sae.training.estimate import estimate

# Row 15


def jsonl(path: Path, rows: list[object], raw: bytes = b"") -> Path:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + raw)
    return path


WORDS = "one two three four five six seven eight nine ten " * 20


@pytest.mark.parametrize(
    ("rows", "raw"),
    [
        ([{"text": WORDS}, {"text": ""}, {"text": None}, {"text": "  "}] * 12, b""),
        ([{"text": WORDS * 100}], b""),
        ([{"text": WORDS}] * 12, b'{"text": "\xff\xfe ' + WORDS.encode() + b'"}\n'),
        ([{"text": "ab" * 20}] * 5, b""),  # fewer tokens than lanes, let alone than a batch
    ],
    ids=["empty and null", "one giant document", "invalid UTF-8", "less than a batch"],
)
def test_odd_text_is_trained_on(tmp_path, tiny_train, rows, raw):
    code, printed = tiny_train({"tokens": 640}, text=jsonl(tmp_path / "text.jsonl", rows, raw), folder=tmp_path / "run")
    assert code == 0, printed
    assert [line["tokens"] for line in lines(tmp_path / "run")] == [128] * 5


BAD_TEXT = {
    "empty": ([], {}, r"text\.source: .*text\.jsonl holds no text \(0 empty documents\)"),
    "only empty rows": ([{"text": ""}] * 3, {}, r"text\.source: .* holds no text \(3 empty documents\)"),
    "less than a row": ([{"text": "ab"}] * 3, {}, r"text\.source: .* fewer than one row of text\.context_length = 32;"),
    "no such column": (
        [{"text": WORDS}],
        {"text.column": "txt"},
        r"text\.column: text\.jsonl has no column 'txt'\. Did you mean 'text'\? It has: text",
    ),
    "not text": ([{"text": 3}], {}, r"text\.column: 'text' holds a int in text\.jsonl:0, not text"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_text_that_gives_nothing_is_named(tmp_path, tiny_train, request, name):
    if name in ("empty", "no such column", "not text"):
        request.getfixturevalue("no_model")  # it is known before
    rows, changes, named = BAD_TEXT[name]
    code, printed = tiny_train(changes, text=jsonl(tmp_path / "text.jsonl", rows))
    assert code == 2
    assert re.match(named, error_of(printed))


def test_a_folder_of_a_run_that_failed_so_early_can_be_used_again(tmp_path, tiny_train):
    run, few = tmp_path / "run", jsonl(tmp_path / "text.jsonl", [{"text": "ab"}] * 3)
    assert tiny_train(text=few, folder=run)[0] == 2
    assert tiny_train(folder=run)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "code"), [([{"text": "ab"}] * 3, 2), ([{"text": "ab" * 20}] * 5, 0)])
def test_ranks_neither_wait_for_each_other_nor_differ_on_little_text(tmp_path, tiny_model, rows, code):
    config, text = tmp_path / "config.yaml", jsonl(tmp_path / "text.jsonl", rows)
    config.write_text(to_yaml(tiny_config(tiny_model, text, {"tokens": 640})), encoding="utf-8")
    work = partial(sae_train, ["--config", str(config), "--run-dir", str(tmp_path / "run")])
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [code, code], [child.output for child in children]


# Row 16


@pytest.mark.parametrize(
    ("has", "layout"),
    [
        ((True, True, True), "packed"),
        ((True, True, True), "one_per_row"),
        ((False, True, False), "packed"),
        ((True, False, False), "packed"),
        ((False, False, False), "one_per_row"),
    ],
)
def test_any_tokenizer_will_do_and_the_mask_is_right(tmp_path, tiny_train, has, layout):
    tokenizer = tiny_tokenizer(*has)
    model = tiny_model_folder(tmp_path / "model", tokenizer)
    text = jsonl(tmp_path / "text.jsonl", [{"text": f"{WORDS[:100]} <s> </s> <pad> {WORDS[:100]}"}] * 24)
    changes = {"tokens": 640, "text.layout": layout, "activations.statistics_tokens": 10**6}
    code, printed = tiny_train(changes, model=model, text=text, folder=tmp_path / "run")
    assert code == 0, printed
    spec = hub.load(tmp_path / "run").spec
    assert set(spec.mask.special_ids) == set(tokenizer.all_special_ids)
    assert len(spec.mask.special_ids) == sum(has)
    assert spec.mask.skip_positions == 1
    _, eos, _ = has
    train = next(int(n.replace(",", "")) for n in re.findall(r"text: ([\d,]+) train tokens", printed))
    counted = int(re.search(r"0 of ([\d,]+) tokens beyond", printed)[1].replace(",", ""))
    rows = train // 32
    unmasked = rows * 31  # the first position of a row is masked, whether BOS stands there or not
    if eos and layout == "packed":  # and one EOS behind each of the documents, two of which may be cut
        assert unmasked - 24 <= counted < unmasked
    else:
        assert counted == unmasked


# Row 17


@pytest.mark.parametrize(
    ("site", "named"),
    [
        ("model.layer.1", r"no module 'model\.layer\.1' in this model\. Did you mean 'model\.layers\.1'"),
        ("layers.7", r"no module 'layers\.7' in this model\. Did you mean 'layers\.1' or"),
        ("blocks.0.hook_resid_pots", r"is not a known name\. Did you mean 'hook_resid_post'\?"),
        ("blocks.9.hook_resid_post", r"none of model\.layers\.9 is in this model"),
        ("mlp", r"'mlp' is ambiguous: model\.layers\.0\.mlp, model\.layers\.1\.mlp; write one in full"),
        ("layers.*.ffn", r"no module 'layers\.\*\.ffn' in this model"),
        ("layers.1:inptu", r"ends in 'inptu'; the side is one of output, input"),
        ("embed_tokens:input", r"gives int32 of shape \[2, 3\] for 2 rows of 3 tokens, not a vector per token"),
        ("rotary_emb", r"gives float32 of shape \[1, 3, 8\] for 2 rows of 3 tokens, not a vector per token"),
    ],
)
def test_a_mistyped_hook_is_known_before_the_model_is_loaded(monkeypatch, tiny_train, no_model, site, named):
    monkeypatch.setattr("sae.training.estimate.estimate", estimate)
    code, printed = tiny_train({"activations.sites": [site]})
    assert code == 2
    assert re.match(rf"activations\.sites: .*{named}", error_of(printed))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.device", "cuda:99"], "model.device: 'cuda:99' is not available here"),
        (["--model.name", "./nowhere"], "model.name: no such folder: ./nowhere."),
        (["--model.name", "no/such-model"], "model.name: 'no/such-model' could not be loaded: "),
        (
            ["--coder.d_sae", "0", "--coder.selection.k", "129"],
            "coder.selection.k: 129 is not between 1 and d_sae = 128",
        ),
    ],
)
def test_so_is_what_needs_the_models_config(monkeypatch, tiny_train, no_model, options, named):
    monkeypatch.setattr("sae.training.estimate.estimate", estimate)
    code, printed = tiny_train(options=options)
    assert code == 2
    assert error_of(printed).startswith(named)


def test_a_module_that_returns_a_tuple_and_a_glob_are_read(tmp_path, tiny_train):
    changes = {"activations.sites": ["layers.1.self_attn", "layers.*.mlp"], "tokens": 256}
    code, printed = tiny_train(changes, folder=tmp_path / "run")
    assert code == 0, printed
    found = {path.name for path in (tmp_path / "run" / "coders").iterdir()}
    assert found == {"model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"}


def test_a_module_that_never_runs_is_an_error_and_not_silence(monkeypatch, tiny_train):
    def with_more(**options):
        lm = load_language_model(**options)
        lm.model.spare = nn.Linear(16, 16)
        return lm

    monkeypatch.setattr(sae.training.preparing, "load_language_model", with_more)
    code, printed = tiny_train({"activations.sites": ["layers.0", "spare"]})
    assert code == 2
    assert re.match(r"activations\.sites: spare never ran in a forward pass of ", error_of(printed))


# Row 18


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--coder.selection.k", "100"], "coder.selection.k: 100 is not between 1 and d_sae = 64"),
        (["--coder.selection.k=0"], "coder.selection.k: 0 is not between 1 and d_sae = 64"),
        (["--coder.objectives.auxk.k", "65"], "coder.objectives.auxk.k: 65 is not between 0 and d_sae = 64"),
        (["--optim.lr", "-1"], "optim.lr: -1.0 must be positive"),
        (["--optim.lr", "fast"], "optim.lr: 'fast' is not a number"),
        (["--optim.lr", ".inf"], "optim.lr: inf is not a number"),
        (["--coder.selection.kk", "3"], "--coder.selection.kk: no such field. Did you mean --coder.selection.k?"),
        (["--codr.d_sae", "3"], "--codr.d_sae: no such field. Did you mean --coder.d_sae?"),
        (["--coder.selection.type", "top_k"], "coder.selection.type: 'top_k' is not one of "),
        (["--tokens", "many"], "tokens: 'many' is not a whole number"),
        (["--tokens", "true"], "tokens: True is not a whole number"),
        (["--tokens", "null"], "tokens: None is not a whole number"),
        (["--tokens", "100"], "tokens: 100 is less than one batch (128 tokens)"),
        (["--batch-tokens", "100"], "batch_tokens: 100 is not a multiple of 64"),
        (["--activations.sites", "[]"], "activations.sites: empty"),
        (
            ["--activations.source", "disc"],
            "activations.source: 'disc' is not one of live, disk, write_through, tensors",
        ),
        (["--model.dtype", "fp32"], "model.dtype: 'fp32' is not one of auto, float32, bfloat16, float16."),
        (["--text.source", "./nowhere.txt"], "text.source: no such file or folder: './nowhere.txt'."),
        (["--grid", "{optim.lr: [1, -1]}"], "optim.lr: -1"),
        (["--activations.sites", "layers.1"], "activations.sites: 'layers.1' is not a list; put it in brackets"),
        (["--coder.skip", "maybe"], "coder.skip: 'maybe' is not true or false"),
        (["--grid", "{coder.selection.k: []}"], "grid.coder.selection.k: [] must hold at least one value, and none"),
        (["--grid", "{tokens: [1]}"], "grid: 'tokens' is not coder, optim or a field below them"),
        (
            ["--log.tracker", "wandbb"],
            "log.tracker: 'wandbb' is not one of none, wandb, trackio. Did you mean 'wandb'?",
        ),
    ],
)
def test_a_wrong_setting_is_named_before_the_model_is_loaded(tmp_path, tiny_train, no_model, options, named):
    code, printed = tiny_train(options=options, folder=tmp_path / "run")
    assert code == 2
    assert error_of(printed).startswith(named)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("coder: {selection: {type: topk, k: three}}", "coder.selection.k: 'three' is not a whole number"),
        ("model: {revision: 12345e6}", "model.revision: 12345000000 is not text; put it in quotes"),
        ("coder: 3", "coder: 3 is not a mapping of fields"),
        ("[1, 2]", "config: {path} holds a list, not a mapping of fields"),
        ("a: [1, 2", "config: {path} is not valid YAML: "),
        ("batch_token: 128", "batch_token: no such field. Did you mean 'batch_tokens'?"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, capsys, no_model, content, named):
    from cli.train import main

    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert main(["--config", str(path)]) == 2
    assert error_of(capsys.readouterr().err).startswith(named.format(path=path))


def test_a_coder_of_another_width_is_named(tmp_path, tiny_train, capsys):
    run = tmp_path / "run"
    assert tiny_train({"tokens": 128}, folder=run)[0] == 0
    wide = tiny_model_folder(tmp_path / "wide", hidden_size=32)
    assert sae_eval([str(run), "--model.name", str(wide)]) == 2
    assert error_of(capsys.readouterr().err) == (
        f"coder coders/model.layers.1: takes model.layers.1 to have width 16; in {wide} it has 32"
    )


# Row 22

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM

class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def test_a_model_that_brings_code_runs_it_only_if_the_user_says_so(
    tmp_path, tiny_train, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, marker, run = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "marker", tmp_path / "run"
    (model / "tiny_remote.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "tiny_remote.TinyConfig", "AutoModelForCausalLM": "tiny_remote.TinyForCausalLM"}
    config |= {"auto_map": names, "model_type": "tiny_remote", "architectures": ["TinyForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    code, printed = tiny_train({"tokens": 128}, model=model, folder=run)
    assert code == 2
    assert error_of(printed) == (
        f"model.name: {str(model)!r} ships its own code (AutoConfig, AutoModelForCausalLM), which would run on this "
        "machine; read it, then type --trust-remote-code"
    )
    assert not marker.exists()
    code, printed = tiny_train({"tokens": 128}, model=model, folder=run, options=("--trust-remote-code",))
    assert code == 0, printed
    assert marker.read_text() == "ran"
    assert json.loads((run / "env.json").read_text())["trust_remote_code"] is True
    capsys.readouterr()
    assert sae_eval([str(run), "--tokens", "64"]) == 2
    assert "--trust-remote-code" in error_of(capsys.readouterr().err)
    assert sae_eval([str(run), "--tokens", "64", "--trust-remote-code"]) == 0


def test_so_does_a_tokenizer_that_brings_code(tmp_path, tiny_train, tiny_model):
    model, marker = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "marker"
    (model / "tiny_remote.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "tiny_remote.TinyConfig"]}, "tokenizer_class": "TinyConfig"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    code, printed = tiny_train(model=model)
    assert code == 2
    assert error_of(printed).endswith("type --trust-remote-code")
    assert not marker.exists()


def test_a_config_file_cannot_say_it_for_the_user(tmp_path, tiny_train):
    code, printed = tiny_train(options=("--model.trust_remote_code", "true"))
    assert code == 2
    assert error_of(printed) == "--model.trust_remote_code: no such field. Did you mean --trust-remote-code?"
