"""sae-eval: a run's coders or one of them, wherever it lies; options, refusals and exit codes."""

import json
import os
import shutil
import signal

import pytest
import torch
from rigs.fakes import tiny_config
from rigs.runs import files
from safetensors.torch import save_file

import sae
import sae.evaluation.evaluation
import sae.evaluation.looking
from cli.evaluate import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, filled by the first test that needs it."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(tmp_path, tiny_train, trained):
    if not trained.exists():
        code, printed = tiny_train({"tokens": 256, "grid": {"coder.selection.k": [2, 4]}}, folder=trained)
        assert code == 0, printed
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_gives_a_table_and_a_file_with_the_figures_of_its_end(run, capsys):
    assert main([str(run), "--tokens", "256"]) == 0
    printed = capsys.readouterr()
    assert "coders/model.layers.1/k=2" in printed.out
    assert "CE recovered" in printed.out
    told = [f"json         {run / 'sae-eval.json'}", f"next         sae-explain {run}"]
    assert printed.err.splitlines()[-2:] == told
    found = json.loads((run / "sae-eval.json").read_text())
    wanted = json.loads((run / "evaluation.json").read_text())
    for k in (2, 4):
        one, other = found[f"coders/model.layers.1/k={k}"], wanted[f"model.layers.1/k={k}"]
        for part in ("reconstruction", "loss", "density"):
            assert one[part] == other[part]


def test_one_coder_is_enough_and_needs_no_run_around_it(tmp_path, run, capsys):
    assert main([str(run), "--tokens", "64"]) == 0
    wanted = json.loads((run / "sae-eval.json").read_text())["coders/model.layers.1/k=4"]
    inside = run / "coders" / "model.layers.1" / "k=4"
    outside = shutil.copytree(inside, tmp_path / "elsewhere" / "coder")
    (tmp_path / "elsewhere" / "config.yaml").write_text("of: something else")
    for folder, name in ((inside, "k=4"), (outside, "coder")):
        assert main([str(folder), "--tokens", "64", "--json", str(tmp_path / "new" / "found.json")]) == 0
        assert json.loads((tmp_path / "new" / "found.json").read_text()) == {name: wanted}
        assert "sae-eval.json" not in files(folder)


def as_saelens(ours, folder, **metadata):
    """Writes a TopK coder of ours as SAELens would have saved it."""
    coder = sae.load(ours)
    assert coder.spec.pre_bias == "decoder"
    folder.mkdir(parents=True)
    named = {"model_name": coder.spec.reads[0].model, "hook_name": "blocks.1.hook_resid_post", **metadata}
    config = {"architecture": "topk", "d_in": coder.spec.d_in, "d_sae": coder.spec.d_sae, "k": coder.spec.selection.k}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    config |= {"metadata": {"sae_lens_version": "6.0.0", **named}}
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in coder.state_dict().items()}
    save_file(tensors | {"W_enc": tensors["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")
    return coder.spec.training["text"]


def test_a_coder_in_another_format_is_measured_like_the_same_one_of_ours(tmp_path, run, capsys):
    inside = run / "coders" / "model.layers.1" / "k=4"
    text = as_saelens(inside, tmp_path / "theirs")
    options = ["--tokens", "256", *(f"--text.{key}={value}" for key, value in text.items() if value)]
    found = []
    for folder in (inside, tmp_path / "theirs"):
        assert main([str(folder), *options, "--json", str(tmp_path / "found.json")]) == 0, capsys.readouterr()
        (one,) = json.loads((tmp_path / "found.json").read_text()).values()
        found.append(one)
    for part in ("reconstruction_unfiltered", "loss"):
        theirs, ours = ({k: v for k, v in one[part].items() if v is not None} for one in reversed(found))
        assert theirs == pytest.approx(ours, rel=1e-5)
    capsys.readouterr()
    as_saelens(inside, tmp_path / "nameless", model_name=None)
    assert main([str(tmp_path / "nameless"), *options]) == 2
    assert "--model.name: the coder does not say which language model it reads" in capsys.readouterr().err


def test_more_tokens_other_text_and_nulls(tmp_path, run, capsys):
    (tmp_path / "other.txt").write_text("some other text, and then some more of it\n\n" * 200)
    options = ["--tokens", "512", "--nulls", "--text.source", str(tmp_path / "other.txt")]
    assert main([str(run), *options]) == 0
    assert "null: " in capsys.readouterr().out
    found = json.loads((run / "sae-eval.json").read_text())["coders/model.layers.1/k=4"]
    assert found["nulls"].keys() >= {"pca"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["{run}", "--tokens", "0"], "--tokens: 0 must be at least 1"),
        (["{run}", "--tokens", "few"], "--tokens: invalid int value: 'few'"),
        (["{run}", "--model.dtype", "fp32"], "model.dtype: 'fp32' is not one of auto, float32, bfloat16, float16."),
        (["{run}", "--modle.dtype", "float32"], "--modle.dtype: no such field. Did you mean --model.dtype?"),
        (["{run}", "--optim.lr", "1"], "--optim.lr: not used here; fields of model, second_model, "),
        (["{run}", "--model.name", "./nowhere"], "model.name: no such folder: ./nowhere."),
        (["{run}", "--text.source", "./nowhere"], "text.source: no such file or folder: './nowhere'."),
        (["{run}", "--json", "{run}/config.yaml/found.json"], "--json: cannot write to {run}/config.yaml: "),
        (["{run}", "--json={run}"], "--json: {run} is a folder; name a file, such as {run}/figures.json"),
        (["{run}/checkpoints"], "path: {run}/checkpoints/ holds no coder in a known format; its files are "),
        (["{run}/nowhere"], "path: no such folder: {run}/nowhere."),
        ([], "the following arguments are required: path"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run, capsys, argv, named):
    capsys.readouterr()
    assert main([word.format(run=run) for word in argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {named.format(run=run)}")
    assert not (run / "sae-eval.json").exists()


def test_a_damaged_coder_is_named(run, capsys):
    weights = run / "coders" / "model.layers.1" / "k=2" / "sae.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert main([str(run)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {weights} is ")


def test_a_signal_stops_it(run, monkeypatch, capsys):
    original = sae.evaluation.looking.capture

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(sae.evaluation.looking, "capture", interrupted)
    monkeypatch.setattr(sae.evaluation.evaluation, "rows_per_pass", lambda *_: 1)
    assert main([str(run), "--tokens", "256"]) == 75
    assert capsys.readouterr().err.splitlines()[-1] == "stopped during evaluation"
    assert not (run / "sae-eval.json").exists()


def test_figures_are_kept_where_nobody_reads_the_table(run, monkeypatch, capsys):
    def broken(_found):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("cli.evaluate.tables", broken)
    main([str(run), "--tokens", "64"])
    assert (run / "sae-eval.json").is_file()


def test_a_coder_of_stored_activations_is_measured_on_them(tmp_path, quick, capsys, caplog):
    caplog.set_level("INFO")
    x = torch.randn(900, 16)
    save_file({"vit.3": x}, tmp_path / "acts.safetensors")
    there = {"activations.sites": ["vit.3"], "model.name": "quickstart", "tokens": 256}
    config = tiny_config("", "quickstart", there)
    run, memory = tmp_path / "run", tmp_path / "memory"
    trained = sae.train(config, run_dir=run, activations=tmp_path / "acts.safetensors").metrics["vit.3"]
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "CE clean" not in printed
    found = json.loads((run / "sae-eval.json").read_text())["coders/vit.3"]
    assert found["reconstruction"]["fvu"] == trained["reconstruction"]["fvu"]
    assert "held out" in caplog.text
    save_file({"vit.3": x + 1}, tmp_path / "other.safetensors")
    assert main([str(run), "--activations.path", str(tmp_path / "other.safetensors")]) == 0
    assert json.loads((run / "sae-eval.json").read_text())["coders/vit.3"]["reconstruction"]["tokens"] == 900
    sae.train(config, run_dir=memory, activations=x)
    sae.train(config, run_dir=tmp_path / "drawn", activations=iter([x[:300]] * 20))
    assert main([str(tmp_path / "drawn")]) == 0
    capsys.readouterr()
    for argv, said in (
        ([str(memory)], "--activations.path: the coder was trained on tensors in memory, which is not here; name act"),
        ([str(run), "--text.source", "quickstart"], "--model.name: the coder does not say which language model it re"),
        ([str(run), "--activations.path", "nowhere"], "activations.path: no such file or folder: nowhere"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err
