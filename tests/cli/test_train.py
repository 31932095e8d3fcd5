"""sae-train: its main paths, overrides, resume, refusals and exit codes."""

import json
import logging
import re
import signal
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from rigs.fakes import tiny_config
from rigs.pages import blocks
from rigs.runs import assert_equal, checkpoints, files, lines
from safetensors.torch import save_file

import sae.training.loop
import sae.training.run
from cli import ended_by, running
from cli.common import read_config
from cli.recipes import recipe
from cli.train import main
from sae.base.errors import ConfigError, Stopped
from sae.base.settings import to_yaml
from sae.kernels import dispatch
from sae.loading import hub
from sae.objectives.reconstruction import Reconstruction
from sae.training.checkpoint import placed_config
from sae.training.config import TrainConfig

SHORT = {"tokens": 256}


@pytest.fixture
def config(tmp_path, tiny_model, tiny_text):
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text)), encoding="utf-8")
    return str(path)


def test_a_run_leaves_a_folder_that_explains_itself_and_says_what_to_do_next(tmp_path, config, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", config, "--name", "first", "--eval.every_steps=8"]) == 0
    run, printed = tmp_path / "runs" / "first", capsys.readouterr()
    for shown in ("model.layers.1", "FVU", "L0", "dead latents", "CE recovered", "steps with auxk active"):
        assert shown in printed.out
    assert printed.err.splitlines()[-4:] == [
        "run folder   runs/first",
        "report       runs/first/report.html",
        "next         sae-eval runs/first",
        "             sae-explain runs/first",
    ]
    for shown in ("run folder", "sites", "parameters", "memory", "disk", "compute"):  # before anything loads
        assert shown in printed.err
    coder = "coders/model.layers.1"
    found = {name for name in files(run) if not name.startswith("checkpoints/")}
    assert found == {
        *(".lock", "config.yaml", "env.json", "metrics.jsonl", "timings.jsonl", "evaluation.json", "report.html"),
        *(f"{coder}/cfg.json", f"{coder}/sae.safetensors"),
    }
    assert checkpoints(run) == [15, 20]
    trained = [line for line in lines(run) if "fvu" in line]
    assert [line["step"] for line in trained] == list(range(1, 21))
    assert [line["step"] for line in lines(run) if "held_out" in line] == [8, 16]
    assert trained[-1]["fvu"] < trained[0]["fvu"]
    environment = json.loads((run / "env.json").read_text())
    assert environment["trust_remote_code"] is False
    assert environment["packages"].keys() >= {"sae-interp", "torch", "transformers"}
    loaded = hub.load(run)
    assert loaded.spec.metrics == json.loads((run / "evaluation.json").read_text())["model.layers.1"]
    (drawn,) = blocks(run / "report.html")["curves"]
    assert drawn["training"]["fvu"]["y"] == [line["fvu"] for line in trained]
    assert len(drawn["held_out"]["fvu"]["x"]) == 3


@pytest.mark.slow
def test_a_run_of_relative_names_is_found_from_any_folder(tmp_path, tiny_model, tiny_text, monkeypatch):
    (tmp_path / "lm").symlink_to(tiny_model)
    (tmp_path / "texts").symlink_to(tiny_text)
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    typed = tiny_config("lm", "texts")
    (tmp_path / "tiny.yaml").write_text(to_yaml(typed), encoding="utf-8")
    assert main(["--config", "tiny.yaml", "--run_dir", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run").rename("moved")
    assert main(["--resume", "moved"]) == 0
    training = hub.load("moved").spec.training
    assert training["text"]["source"] == str(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    model, text = replace(typed.model, name="quickstart"), replace(typed.text, source="owner/text")
    placed = placed_config(replace(typed, model=model, text=text))
    assert (placed.model.name, placed.text.source) == ("quickstart", "owner/text")


@pytest.fixture
def half_a_gigabyte(monkeypatch):
    """Makes every disk one of 500 MB."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=5 * 10**8))


def estimated(monkeypatch, disk, cached):
    found = SimpleNamespace(lines=list, disk=disk, cached=cached)
    monkeypatch.setattr("sae.training.estimate.estimate", lambda *_: found)


def test_too_little_disk_is_an_error_before_anything_loads(
    tmp_path, config, monkeypatch, quick, half_a_gigabyte, capsys
):
    monkeypatch.chdir(tmp_path)
    estimated(monkeypatch, 10**9, 0)
    monkeypatch.setattr("sae.training.run.train", lambda *_: pytest.fail("training began first"))
    assert main(["--config", config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: run_dir: 1 GB of disk are needed, 500 MB are free at {tmp_path}; make room, or choose another folder"
    )
    assert not (tmp_path / "runs").exists()


def test_what_only_may_be_too_little_is_a_warning(tmp_path, config, monkeypatch, quick, half_a_gigabyte, capsys):
    monkeypatch.chdir(tmp_path)
    estimated(monkeypatch, 3 * 10**8, 3 * 10**8)
    monkeypatch.setattr("sae.training.run.train", lambda *_: SimpleNamespace(metrics={}, coders={}))
    assert main(["--config", config]) == 0
    assert "warning      run_dir and SAE_CACHE: 600 MB of disk are needed, 500 MB are free " in capsys.readouterr().err


def test_the_config_in_the_folder_makes_the_same_run_again(tmp_path, tiny_train):
    assert tiny_train(SHORT, folder=tmp_path / "one")[0] == 0
    again = ["--config", str(tmp_path / "one" / "config.yaml"), "--run-dir", str(tmp_path / "two")]
    assert main(again) == 0
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_a_run_named_by_its_config_alone_gets_a_number_if_the_name_is_taken(
    tmp_path, config, monkeypatch, quick, capsys
):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        assert main(["--config", config, "--tokens", "128"]) == 0
        first, *_ = capsys.readouterr().err.splitlines()
        if number:
            assert first == (
                f"runs/tiny holds a run, so this one goes to runs/tiny-{number + 1}; to continue that one: "
                "sae-train --resume runs/tiny; to begin it anew: rm -r runs/tiny"
            )
        else:
            assert first == "run folder   runs/tiny"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2", "tiny-3"}


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--coder.selection.k", "8"], "coder.selection.k", 8),
        (["--coder.selection.k=8"], "coder.selection.k", 8),
        (["--batch-tokens", "256"], "batch_tokens", 256),
        (["--optim.lr", "1e-4"], "optim.lr", 1e-4),
        (["--optim.lr", "null"], "optim.lr", None),
        (["--activations.sites", "[layers.0, layers.1]"], "activations.sites", ["layers.0", "layers.1"]),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--name", "a: b #c"], "name", "a: b #c"),
        (["--name", "1e3"], "name", "1e3"),
        (["--model.revision", "12345e6"], "model.revision", "12345e6"),
        (["--text.name=null"], "text.name", None),
        (["--coder.objectives.auxk.weight", "0"], "coder.objectives.auxk.weight", 0),
    ],
)
def test_every_field_is_an_option(config, capsys, options, field, value):
    assert main(["--config", config, "--print-config", *options]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    for part in field.split("."):
        found = found[part]
    assert found == value


def test_the_printed_config_is_a_config(config, tmp_path, capsys):
    assert main(["--config", config, "--print-config", "--tokens", "512"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    expected = read_config(TrainConfig, recipe(config), ["--tokens", "512"])
    assert read_config(TrainConfig, recipe(str(printed)), []) == expected


def test_families_and_models_are_listed_and_found_by_what_is_listed(capsys):
    assert main(["--list-configs"]) == 0
    families, models, ways = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    for option, (_, *listed) in (("--config", families), ("--on", models)):
        for line in listed:
            assert main([option, line.split()[0], "--print-config"]) == 0
    assert len(families) > 20
    assert "sae-train --config jumprelu --on smollm2" in ways[0]
    capsys.readouterr()
    assert main(["--list-configs", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [len(told[kind]) + 1 for kind in ("families", "models")] == [len(families), len(models)]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (
            ["--config", "quickstrat"],
            "--config: no file and no shipped config 'quickstrat'. Did you mean 'quickstart'?",
        ),
        (["tokens", "3"], "'tokens': expected --field value; did you mean --tokens?"),
        (["--tokens"], "--tokens: its value is missing"),
        (["--resume"], "--resume: expected one argument"),
        (["--resume", "nowhere"], "--resume: no such folder: nowhere."),
        (["--resume", "nowhere", "--config", "quickstart"], "--config: a resumed run has its own; "),
        (["--resume", "nowhere", "--on", "quickstart"], "--on: a resumed run has its own; "),
        (["--config", "."], "--config: no file and no shipped config '.'."),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--coder.selection.k", "8"], "coder.selection.k"),
        (["--tokens", "512", "--seed", "3"], "seed, tokens"),
        (["--model.name", "quickstart"], "model.name"),
        (["--grid", "{optim.lr: [0.1]}"], "grid.optim.lr"),
    ],
)
def test_a_resume_refuses_what_would_make_it_another_run(tmp_path, tiny_train, options, named):
    run = tmp_path / "run"
    assert tiny_train(SHORT, folder=run)[0] == 0
    before = {name: (run / name).read_bytes() for name in files(run)}
    code, printed = tiny_train(options=("--resume", run, *options))
    assert code == 2
    (line,) = printed.splitlines()
    assert line.startswith(f"error: --resume: {named} cannot change in a run that has begun")
    assert {name: (run / name).read_bytes() for name in files(run)} == before


def test_a_resume_takes_new_settings_for_logging_evaluation_and_retention(tmp_path, tiny_train):
    run = tmp_path / "run"
    assert tiny_train(SHORT, folder=run)[0] == 0
    options = ["--log.every_steps", "2", "--eval.tokens=128", "--checkpoints.keep", "1", "--max-bad-steps", "3"]
    code, printed = tiny_train(options=("--resume", run, *options))
    assert code == 0, printed


def test_a_finished_run_resumed_is_finished_again(tmp_path, tiny_train):
    run = tmp_path / "run"
    assert tiny_train(SHORT, folder=run)[0] == 0
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evaluation.json")}
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert {name: (run / name).read_bytes() for name in before} == before


def test_each_coder_of_a_grid_equals_the_one_trained_alone(tmp_path, tiny_train):
    grid = {"grid": {"coder.selection.k": [2, 4], "optim.lr": [0.001]}, "activations.sites": ["layers.*"]}
    code, printed = tiny_train(grid, folder=tmp_path / "grid")
    assert code == 0, printed
    names = {f"model.layers.{layer}/k={k},lr=0.001" for layer in (0, 1) for k in (2, 4)}
    assert json.loads((tmp_path / "grid" / "evaluation.json").read_text()).keys() == names
    alone = {"coder.selection.k": 2, "optim.lr": 0.001, "activations.sites": ["layers.1"]}
    assert tiny_train(alone, folder=tmp_path / "alone")[0] == 0
    weights = "sae.safetensors"
    one = tmp_path / "grid" / "coders" / "model.layers.1" / "k=2,lr=0.001" / weights
    assert one.read_bytes() == (tmp_path / "alone" / "coders" / "model.layers.1" / weights).read_bytes()


SIX = {
    "topk": {"selection": {"type": "topk", "k": 4}},
    "mutual": {"selection": {"type": "mutual_choice", "k": 4}},
    "feature": {"selection": {"type": "feature_choice", "k": 4, "mutual_share": 0.5}},
    "jumprelu": {"selection": {"type": "jumprelu"}, "objectives": {"l0": {"type": "l0", "target_l0": 4}}},
    "gated": {"selection": {"type": "gated"}, "objectives": {"l1": {"type": "l1"}, "gate": {"type": "gate"}}},
    "matryoshka": {"normalization": {"kind": "layer_norm"}, "objectives": {"matryoshka": {"type": "matryoshka"}}},
}


@pytest.mark.slow
def test_six_different_coders_of_one_pass_equal_those_trained_alone(tmp_path, tiny_train):
    code, printed = tiny_train({"grid": {"coder": SIX}}, folder=tmp_path / "grid")
    assert code == 0, printed
    for name in SIX:
        assert tiny_train({"grid": {"coder": {name: SIX[name]}}}, folder=tmp_path / name)[0] == 0
        one, alone = (next((tmp_path / run).rglob(f"{name}/sae.safetensors")) for run in ("grid", name))
        assert one.read_bytes() == alone.read_bytes(), name
        evaluated = [json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("grid", name)]
        (key,) = evaluated[1]
        assert evaluated[0][key] == evaluated[1][key]


@pytest.mark.slow  # of one coder: tests/training/test_subject.py
def test_gradients_are_streamed_alike_from_the_model_and_from_disk_and_mask_every_coder(tmp_path, tiny_train):
    coders = {"topk": {"selection": {"type": "topk", "k": 4}}, "g": {"selection": {"type": "gradient_topk", "k": 4}}}
    for source in ("live", "disk", "write_through"):
        changes = {"grid": {"coder": coders}, "activations.source": source}
        assert tiny_train(changes, folder=tmp_path / source)[0] == 0
    assert_equal(tmp_path / "live", tmp_path / "disk")
    assert_equal(tmp_path / "live", tmp_path / "write_through")
    found = {name.rpartition("/")[2]: coder for name, coder in hub.load_all(tmp_path / "live").items()}
    assert found.keys() == coders.keys()
    assert all(coder.spec.mask.next_token for coder in found.values()), "the one beside it sees the same tokens"
    evaluated = json.loads((tmp_path / "live" / "evaluation.json").read_text())
    (with_gradients,) = (result["with_gradients"] for name, result in evaluated.items() if name.endswith("/g"))
    assert "see the future" in with_gradients["label"]
    assert all("with_gradients" not in result for name, result in evaluated.items() if name.endswith("/topk"))
    assert tiny_train(folder=tmp_path / "plain")[0] == 0
    assert not hub.load(tmp_path / "plain").spec.mask.next_token


def test_what_is_next_is_possible(tmp_path, tiny_train):
    save_file({"vit.3": torch.randn(900, 16)}, tmp_path / "acts.safetensors")
    stored = {"source": "tensors", "path": str(tmp_path / "acts.safetensors"), "sites": ["vit.3"]}
    changes = {"tokens": 256, **{f"activations.{name}": value for name, value in stored.items()}}
    code, printed = tiny_train(changes, model="quickstart", folder=tmp_path / "of vectors")
    assert code == 0
    assert f"next         sae-eval '{tmp_path / 'of vectors'}'" in printed
    assert "sae-explain" not in printed  # there is no text


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (RuntimeError("two\nlines"), 1, "error: two lines"),
        (KeyError("x"), 1, "error: KeyError: 'x'"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (ConfigError("a.b: 3 is too small"), 2, "error: a.b: 3 is too small"),
        (Stopped("at step 3"), 75, "stopped at step 3"),
        (KeyboardInterrupt(), 130, ended_by(2)),
        (BrokenPipeError(32, "of a server"), 1, "error: [Errno 32] of a server"),
    ],
)
def test_exit_codes(capsys, raised, code, shown):
    def command(argv):
        raise raised

    assert running.run(command, []) == code
    assert capsys.readouterr().err.splitlines() == [shown]
    assert running.run(command, ["--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code in (1, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_of_which_a_library_makes_an_error_is_still_a_signal(capsys, number):
    def command(argv):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from None

    assert running.run(command, []) == 128 + number
    assert capsys.readouterr().err.splitlines() == [ended_by(number)]


@pytest.mark.parametrize(("size", "number"), [("WORLD_SIZE", "RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")])
def test_only_rank_zero_talks(monkeypatch, size, number):
    for rank, level in (("0", logging.INFO), ("1", logging.WARNING)):
        for name, value in ((size, "2"), (number, rank), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        assert running.run(lambda argv: logging.getLogger("sae").level, []) == level


def test_text_beyond_what_is_trained_on_is_not_tokenized(tmp_path, tiny_train):
    code, printed = tiny_train({"tokens": 2560, "text.max_tokens": None}, folder=tmp_path / "run")
    assert code == 0, printed
    (found,) = re.findall(r"text: ([\d,]+) train tokens in rows of 32", printed)
    assert 2560 <= int(found.replace(",", "")) <= 2560 + 32 + 2560 // 31  # a whole row more, and BOS in every row
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["text"]["max_tokens"] == 2560
    assert hub.load(tmp_path / "run").spec.training["text"]["max_tokens"] == 2560


def test_coders_are_saved_before_anything_can_fail_in_their_evaluation(tmp_path, tiny_train, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("sae.training.loop.evaluate_all", broken)
        code, printed = tiny_train(SHORT, folder=tmp_path / "run")
    assert (code, printed.splitlines()[-1]) == (1, "error: out of memory")
    before = hub.load(tmp_path / "run")
    assert before.spec.metrics == {}
    assert tiny_train(options=("--resume", tmp_path / "run"))[0] == 0
    after = hub.load(tmp_path / "run")
    assert torch.equal(before.W_enc, after.W_enc)
    assert after.spec.metrics["reconstruction"]["fvu"] > 0


def test_the_library_refuses_a_resume_of_another_run_too(tmp_path, quick, tiny_model, tiny_text):
    run, config = tmp_path / "run", tiny_config(tiny_model, tiny_text, SHORT)
    sae.training.run.train(config, run_dir=run)
    other = tiny_config(tiny_model, tiny_text, {**SHORT, "activations.block_rows": 3, "text.max_tokens": None})
    with pytest.raises(ConfigError, match=r"^--resume: activations\.block_rows cannot change in a run that has begun"):
        sae.training.run.train(other, resume=True, run_dir=run)
    assert main(["--resume", str(run), "--coder.selection.k", "3", "--dry-run"]) == 2  # what would be refused, is
    branch = tiny_config(tiny_model, tiny_text, {**SHORT, "model.revision": "main"})
    sae.training.run.train(branch, resume=True, run_dir=run)  # a branch is pinned to a commit by the run, and no change
    with pytest.raises(ConfigError, match="no such folder"):
        sae.training.run.train(config, resume=True, run_dir=tmp_path / "elsewhere")
    again = sae.training.run.train(tiny_config(tiny_model, tiny_text, {**SHORT, "eval.tokens": 64}), True, run_dir=run)
    assert again.metrics["model.layers.1"]["reconstruction"]["tokens"] < 64


def test_the_command_resumes_a_run_begun_from_python_with_fewer_terms(tmp_path, quick, tiny_model, tiny_text, capsys):
    terms = {"reconstruction": Reconstruction()}
    config = tiny_config(tiny_model, tiny_text, SHORT)
    config = replace(config, coder=replace(config.coder, objectives=terms))
    sae.training.run.train(config, run_dir=tmp_path / "run")
    assert main(["--resume", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert "auxk" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_model_that_cannot_be_estimated_may_still_run(config, monkeypatch, quick, capsys):
    def untraceable(*_):
        raise RuntimeError("data-dependent\nexpression")

    monkeypatch.setattr("sae.training.estimate.estimate", untraceable)
    monkeypatch.setattr("sae.training.run.train", lambda *_: SimpleNamespace(metrics={}, coders={}))
    assert main(["--config", config]) == 0
    assert "warning      no estimate: data-dependent expression" in capsys.readouterr().err


def test_what_fails_beside_the_run_ends_nothing(tmp_path, tiny_train, monkeypatch):
    """A tracker and the report: one line each, and all figures are where they always are."""

    def broken(*_args, **_options):
        raise BrokenPipeError(32, "Broken pipe")

    assert tiny_train(folder=tmp_path / "whole")[0] == 0
    module = ModuleType("wandb")
    module.init, module.log, module.finish = (lambda **_settings: None), broken, broken
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("sae.training.loop.write_report", broken)
    code, printed = tiny_train({"log.tracker": "wandb"}, folder=tmp_path / "run")
    assert code == 0
    assert printed.count("log.tracker: wandb failed (BrokenPipeError: ") == 1
    assert printed.count("report.html failed (BrokenPipeError: ") == 1
    assert "report       " not in printed
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_a_tracker_that_cannot_begin_is_known_before_the_model_is_loaded(tiny_train, monkeypatch, no_model):
    def init(**_settings):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    code, printed = tiny_train({"log.tracker": "wandb"})
    assert code == 2
    assert printed.splitlines()[-1].startswith("error: log.tracker: wandb cannot begin (api_key not configured")


def test_a_log_holds_no_bars_and_the_number_of_tokens_that_there_are(tmp_path, tiny_train):
    code, printed = tiny_train({"eval.tokens": 10**6}, folder=tmp_path / "run")
    assert code == 0
    assert "\r" not in printed
    assert "it/s" not in printed
    (found,) = json.loads((tmp_path / "run" / "evaluation.json").read_text()).values()
    assert f"evaluating on {found['reconstruction_unfiltered']['tokens']:,} held-out tokens" in printed


def test_kernels_that_cannot_be_had_are_refused_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dispatch, "missing", lambda path: "there is no compiler")
    assert main(["--kernels", "native", "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: kernels: native cannot be had here: there is no compiler\n"
    assert not (tmp_path / "run").exists()
