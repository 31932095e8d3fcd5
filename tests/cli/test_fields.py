"""No knob that does nothing: every field of a training run, changed alone, changes what the run leaves behind."""

import json

import pytest
from rigs.runs import checkpoints, files, lines, result

from sae.base.fields import fields

pytestmark = pytest.mark.slow

CHANGED = {
    "seed": 1,
    "model.dtype": "bfloat16",
    "text.column": "words",
    "text.context_length": 16,
    "text.layout": "one_per_row",
    "text.bos": "document",
    "text.max_tokens": 10_000,
    "text.held_out_share": 0.2,
    "activations.sites": ["layers.0"],
    "activations.block_rows": 3,
    "activations.lanes": 32,
    "activations.dtype": "bfloat16",
    "activations.skip_positions": 2,
    "activations.norm_filter": 1.1,
    "activations.targets": ["layers.1.mlp:input"],
    "activations.statistics_tokens": 1000,
    "coder.d_sae": 32,
    "coder.expansion": 3,
    "coder.encoder": "glu",
    "coder.selection.loss": "sampled",
    "coder.normalization.kind": "layer_norm",
    "coder.normalization.scale": 0.5,
    "coder.normalization.eps": 0.1,
    "coder.normalization.unbiased": False,
    "coder.normalization.undo_eps": False,
    "coder.layout": "crosscoder",
    "coder.budget": "shared",
    "coder.skip": True,
    "coder.balance_sites": False,
    "coder.pre_bias": "none",
    "coder.center": "geometric_median",
    "coder.decoder_norm": "free",
    "coder.select_by_decoder_norm": True,
    "coder.seed": 1,
    "optim.kind": "sparse_adam",
    "optim.lr": 2e-3,
    "optim.beta1": 0.8,
    "optim.beta2": 0.99,
    "optim.eps": 1e-3,
    "optim.warmup_share": 0.05,
    "optim.decay_share": 0.5,
    "optim.clip_norm": 0.01,
    "optim.ema": 0.9,
    "grid": {"optim.lr": [1e-3, 2e-3]},
    "tokens": 19 * 128,
    "batch_tokens": 64,
    "micro_batch_tokens": 32,
    "precision": "bfloat16",
    "kernels": "reference",
    "dead_after_tokens": 384,
    "eval.tokens": 128,
    "eval.every_steps": 10,
    "checkpoints.every_steps": 7,
    "checkpoints.keep": 1,
    "log.every_steps": 2,
}
TWO_SITES = {"activations.sites": ["layers.0", "layers.1"]}
TRANSCODERS = {"activations.sites": ["layers.*.mlp:input"], "activations.targets": ["layers.*.mlp"]}
# what else must be set for a field to mean anything
SETTING = {
    "text.column": {"text.source": "table.jsonl"},
    "coder.expansion": {"coder.d_sae": 0},
    "coder.normalization.scale": {"coder.normalization.kind": "scalar"},
    "coder.normalization.eps": {"coder.normalization.kind": "layer_norm"},
    "coder.normalization.unbiased": {"coder.normalization.kind": "layer_norm"},
    "coder.normalization.undo_eps": {"coder.normalization.kind": "layer_norm", "coder.normalization.eps": 0.1},
    "coder.select_by_decoder_norm": {"coder.decoder_norm": "free", "optim.lr": 0.1},
    "coder.decoder_norm": {"optim.lr": 0.1},
    "optim.kind": {"coder.d_sae": 256},
    "optim.warmup_share": {"tokens": 60 * 128},
    "activations.targets": {"activations.sites": ["layers.1:input"]},
    "coder.selection.loss": {"coder.selection": {"type": "gradient_topk", "k": 4}},
    "coder.layout": TWO_SITES,
    "coder.budget": TRANSCODERS | {"coder.layout": "cross_layer"},
    "coder.skip": TRANSCODERS,
    "coder.balance_sites": TWO_SITES | {"coder.layout": "crosscoder"},
}
ELSEWHERE = {
    "name": "names the folder (test_train)",
    "run_dir": "names the folder (every test)",
    "model.name": "every test",
    "model.revision": "a commit on the hub",
    "model.device": "test_input",
    "model.kwargs": "test_options",
    "text.source": "every test",
    "text.name": "a data set on the hub",
    "text.split": "test_text",
    "text.encoding": "test_damage",
    "text.roles": "test_chats",
    "text.streaming": "a data set on the hub",
    "text.revision": "a data set on the hub",
    "activations.source": "changes time alone (test_resume); of tensors test_subject",
    "activations.path": "where they lie (test_subject)",
    "activations.prefetch_blocks": "changes time alone (test_stream)",
    "coder.normalization.undone": "of loaded coders (test_saelens); refused in training (test_family_settings)",
    "coder.selection.type": "contracts",
    "coder.objectives": "contracts",
    "coder.start_from": "test_family_settings",
    "second_model.name": "test_family_settings",
    "second_model.revision": "a commit on the hub",
    "ranks.backend": "of several ranks (distributed)",
    "ranks.deadline_s": "of several ranks (distributed)",
    "ranks.timeout_s": "of several ranks (distributed)",
    "parallel.sites": "of several ranks (distributed)",
    "parallel.latents": "of several ranks (distributed)",
    "second_model.dtype": "as model.dtype",
    "second_model.device": "as model.device",
    "second_model.kwargs": "as model.kwargs",
    "max_bad_steps": "test_numbers",
    "log.tracker": "test_progress",
    "log.project": "test_progress",
}


def outcome(run, cache):
    """What training, evaluation, checkpoints and stores came to; no file that merely repeats the config."""
    weights = {name: content for name, content in result(run).items() if name.endswith(".safetensors")}
    stored = sum((cache / name).stat().st_size for name in files(cache) if "activations" in name)
    evaluated = (run / "evaluation.json").read_text(encoding="utf-8")
    return lines(run), weights, evaluated, checkpoints(run), stored


@pytest.fixture
def outcome_of(tmp_path, tiny_text, tiny_train, monkeypatch):
    """Returns (name, changed fields) -> what the run came to, with a cache of its own."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())]
    rows = [json.dumps({"text": text, "words": text.upper()}) for text in texts]
    (tmp_path / "table.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(name, changes):
        cache = tmp_path / f"{name}-cache"
        monkeypatch.setenv("SAE_CACHE", str(cache))
        text = {"text": changes["text.source"]} if "text.source" in changes else {}
        code, printed = tiny_train(changes, folder=tmp_path / name, **text)
        assert code == 0, printed
        return outcome(tmp_path / name, cache)

    return run


def test_every_field_is_here_or_tested_elsewhere():
    """The constants of rules and loss terms are tested in contracts/test_knobs.py."""
    known = {one.path for one in fields("sae.training.config:TrainConfig") if one.kind != "group"}
    plugins = {name for name in known if name.startswith(("coder.selection.", "coder.objectives."))}
    wanted = known - plugins | {"coder.selection.type", "coder.selection.loss", "coder.objectives"}
    assert sorted({*CHANGED, *ELSEWHERE}) == sorted(wanted)


@pytest.mark.parametrize("field", CHANGED)
def test_a_changed_field_changes_the_run(field, outcome_of):
    setting = SETTING.get(field, {})
    before, after = outcome_of("before", setting), outcome_of("after", setting | {field: CHANGED[field]})
    assert before != after
    if field.startswith(("eval", "checkpoints", "log")):  # what is only looked at differently is trained alike
        assert before[1] == after[1]


def test_the_same_fields_give_the_same_outcome(outcome_of):
    for number, setting in enumerate([{}, SETTING["coder.selection.loss"], SETTING["coder.budget"]]):
        assert outcome_of(f"once-{number}", setting) == outcome_of(f"twice-{number}", setting)
