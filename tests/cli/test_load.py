"""sae-load: what it lists, shows, fetches, converts, pushes and checks; usage errors are one line and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rigs.explained_runs import write_explained_run
from rigs.fake_hub import COMMIT, Faults, fake_hub, reached_from_here
from rigs.hub_coders import GEMMA, gemma, native, saelens
from rigs.pages import blocks
from safetensors.torch import save_file

import sae
from cli.load import main
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.pages.page import write_page
from sae.selection.groupmax import GroupMax
from sae.untrusted.hints import Hints

ROOT = Path(__file__).parents[2]
AJT = "neuronpedia/gpt2-small__res_sce-ajt"
RELEASE = "gpt2-small-res_sce-ajt"


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def hub(tmp_path, monkeypatch, faults):
    root = tmp_path / "hub"
    for number in (2, 6, 10):
        saelens(root, f"{AJT}/{number}-res_sce-ajt", seed=number)
    (root / "models" / AJT / "README.md").write_text("# A release\n")
    gemma(root)
    with fake_hub(root, tmp_path / "home", faults) as (environment, asked):
        reached_from_here(monkeypatch, environment)
        yield root, asked


@pytest.fixture
def load(capsys):
    """Returns sae-load: words -> (exit code, lines printed, last line of errors)."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        said = printed.err.splitlines()
        run.to_fetch = said[next((i for i, line in enumerate(said) if line.startswith("to fetch ")), 0) :]
        return code, printed.out.splitlines(), (said or [""])[-1]

    return run


def table(lines):
    """The rows of `sae-load show` by name."""
    rows = [line.partition("  ") for line in lines]
    return {name: [text.strip() for own, _, text in rows if own == name] for name, _, _ in rows}


def weights_fetched(asked):
    gets = [request.split() for request in asked if request.startswith("GET") and "/resolve/" in request]
    return [words[1] for words in gets if len(words) == 2 and words[1].endswith((".npz", ".safetensors", ".pt"))]


def test_list_is_a_line_a_release(load):
    code, lines, said = load("list", "--model", "gpt2")
    assert (code, said) == (0, "next         sae-load show RELEASE")
    assert lines[0].split() == ["release", "model", "coders", "layers", "widths", "L0", "format", "verified"]
    row = next(line for line in lines if line.startswith("gpt2-small-res-jb "))
    assert row.split() == ["gpt2-small-res-jb", "openai-community/gpt2", "13", "0-11", "10-70", "saelens", "no"]
    assert lines[-1].endswith(" coders")
    assert len(load("list")[1]) > 180
    for typed, part in (("gemma", "gemma"), ("GEMMA-2-2", "gemma-2-2"), ("google/", "google/")):
        models = {line.split()[1] for line in load("list", "--model", typed)[1][1:-2]}
        assert len(models) > 1
        assert all(part in model.lower() for model in models)
    assert {line.split()[1] for line in load("list", "--model", "gpt2")[1][1:-2]} == {"openai-community/gpt2"}
    names = [line.split()[0] for line in load("list", "--model", "gpt2", "--release", "res-jb")[1][1:-2]]
    assert names
    assert all("res-jb" in name for name in names)
    assert load("list", "--release", "gpt2-small-res-jb")[2] == "next         sae-load show gpt2-small-res-jb"
    code, lines, _ = load("list", "--model", "gpt2", "--json")
    assert {row["name"]: row["layers"] for row in json.loads("\n".join(lines))}[RELEASE] == [2, 6, 10]


def test_show_of_a_release_lists_its_coders_from_the_table_alone(load, hub):
    _, asked = hub
    code, lines, _ = load("show", RELEASE)
    assert code == 0
    assert lines[1].split() == [f"{RELEASE}/blocks.2.hook_resid_pre", "2-res_sce-ajt", "gpt2-small/2-res_sce-ajt"]
    assert lines[-1] == f"3 coders in hf://{AJT}, expected in the format saelens"
    assert asked == []
    code, lines, _ = load("show", "temporal-sae-llama-3.1-8b")
    assert (code, "depend on the whole context" in lines[-1]) == (0, True)


def test_show_of_a_repository_lists_addresses_that_can_be_shown(load, hub):
    _, asked = hub
    code, lines, said = load("show", AJT)
    assert (code, lines[-1], said) == (0, "3 coders", f"next         sae-load show {lines[0]}")
    assert lines[:3] == [f"{AJT}/{number}-res_sce-ajt" for number in (10, 2, 6)]
    assert load("show", lines[0])[0] == 0
    assert weights_fetched(asked) == []


def test_show_of_one_says_what_it_is_without_its_weights(load, hub):
    _, asked = hub
    code, lines, _ = load("show", f"{RELEASE}/blocks.2.hook_resid_pre")
    assert code == 0
    assert weights_fetched(asked) == []
    found = table(lines)
    assert found["files"] == [f"hf://{AJT}, commit {COMMIT}"]
    assert found["weights"] == ["2-res_sce-ajt/sae_weights.safetensors"]
    assert found["format"] == ["saelens"]
    assert "W_enc float32 [6, 20]" in found["tensor"]
    assert found["reads"] == ["blocks.2.hook_resid_pre of openai-community/gpt2"]
    assert (found["selection"], found["pre-bias"], found["normalization"]) == (["relu"], ["decoder"], ["none"])
    assert found["released as"] == [f"{RELEASE}/blocks.2.hook_resid_pre"]
    assert found["verified"] == ["no, its files were never loaded here"]
    assert found["Neuronpedia"] == ["gpt2-small/2-res_sce-ajt"]
    saelens(hub[0], "tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0")
    code, lines, _ = load("show", "tommmcgrath/gpt2-small-mlp-out-saes")  # by address, and yet what is stated applies
    assert table(lines)["normalization"] == ["center"]


def test_show_of_an_archive_and_of_a_folder(load, hub, tmp_path):
    code, lines, _ = load("show", f"{GEMMA}/layer_3")
    assert (code, table(lines)["advertised L0"]) == (0, ["59"])
    folder = native(tmp_path / "mine", k=3)
    code, lines, _ = load("show", folder)
    found = table(lines)
    assert (found["format"], found["selection"]) == (["native"], ["topk of 3"])
    assert (code, found["reads"]) == (0, ["model.layers.1 of tiny/llama"])
    native(tmp_path / "both" / "a")
    native(tmp_path / "both" / "b")
    code, lines, _ = load("show", tmp_path / "both")
    assert lines[:2] == [f"{tmp_path}/both/a", f"{tmp_path}/both/b"]


def test_show_says_what_has_to_be_said(load, hub):
    root, _ = hub
    saelens(root, "own/scaled", normalize_activations="expected_average_only_in")
    code, lines, _ = load("show", "own/scaled")
    assert code == 0
    assert table(lines)["spec"][0].startswith(
        "not known: scale: hf://own/scaled/sae_weights.safetensors does not say it"
    )
    code, lines, _ = load("show", "own/scaled", "--scale", "2.5", "--model-name", "some/model")
    assert table(lines)["normalization"] == ["scalar, times 2.5"]
    assert table(lines)["reads"] == ["blocks.2.hook_resid_pre of some/model"]


def test_show_of_a_pickle_does_not_fetch_it(load, hub):
    root, asked = hub
    folder = root / "models" / "own" / "pickled"
    folder.mkdir(parents=True)
    torch.save({"encoder.weight": torch.zeros(20, 6)}, folder / "ae.pt")
    (folder / "config.json").write_text("{}")
    code, lines, _ = load("show", "own/pickled")
    assert code == 0
    assert table(lines)["spec"] == ["not known: ae.pt would have to be fetched"]
    assert weights_fetched(asked) == []


def test_fetch_takes_what_one_coder_needs_and_says_where_it_is(load, hub):
    code, lines, _ = load("fetch", f"{RELEASE}/blocks.2.hook_resid_pre")
    assert code == 0
    assert load.to_fetch[0].startswith("to fetch     1 of 2 files, 1.33 kB, of commit ")  # its config is here
    assert load.to_fetch[1].split() == ["1/1", "2-res_sce-ajt/sae_weights.safetensors", "1.33", "kB"]
    folder = lines[-1].split()[1]
    assert sorted(path.name for path in Path(folder).iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert sae.load(folder).spec.reads == sae.load(f"{AJT}/2-res_sce-ajt").spec.reads
    code, lines, _ = load("fetch", f"{AJT}/2-res_sce-ajt")
    assert load.to_fetch[0].startswith("to fetch     0 of 2 files, 0 B")


def test_fetch_into_a_folder_for_a_machine_without_a_network(load, hub, tmp_path):
    code, lines, _ = load("fetch", "gemma-2-2b/3-gemmascope-res-16k", "--to", tmp_path / "models")
    assert code == 0
    folder = tmp_path / "models" / GEMMA / "layer_3/width_16k/average_l0_59"
    assert lines[-1] == f"in           {folder}"
    found = sae.load(folder)
    assert found.spec.reads[0].hook == "blocks.3.hook_resid_post"
    assert not folder.joinpath("params.npz").is_symlink()


def test_fetch_of_a_release_or_repository_takes_all_of_it(load, hub, tmp_path):
    root, _ = hub
    saelens(root, f"{AJT}/unlisted")
    assert load("fetch", RELEASE, "--to", tmp_path / "release")[0] == 0
    assert load.to_fetch[0].startswith("to fetch     9 of 9 files")
    assert len(sae.load_all(tmp_path / "release")) == 3
    assert load("fetch", AJT, "--to", tmp_path / "all")[0] == 0
    assert len(sae.load_all(tmp_path / "all")) == 4
    assert (tmp_path / "all" / AJT / "README.md").is_file()


def test_fetch_of_a_release_of_files_takes_the_configs_around_them(load, hub, tmp_path):
    root, _ = hub
    folder = root / "models" / "mwhanna" / "qwen3-4b-transcoders"
    folder.mkdir(parents=True)
    for name in ("layer_0.safetensors", "layer_1.safetensors", "config.yaml", "notes.txt"):
        (folder / name).write_bytes(b"{}")
    code, _, _ = load("fetch", "mwhanna-qwen3-4b-transcoders", "--to", tmp_path)
    assert (code, load.to_fetch[0].split()[2:6]) == (0, ["3", "of", "3", "files,"])
    found = sorted(path.name for path in (tmp_path / "mwhanna" / "qwen3-4b-transcoders").glob("*.*"))
    assert found == [".cache", "config.yaml", "layer_0.safetensors", "layer_1.safetensors"]


def test_fetch_of_what_is_here_says_so(load, tmp_path):
    folder = native(tmp_path / "mine")
    assert load("fetch", folder)[:2] == (0, [f"on this disk {folder}"])


def test_fetch_does_not_begin_what_the_disk_cannot_hold(load, hub, monkeypatch):
    _, asked = hub
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, error = load("fetch", f"{AJT}/2-res_sce-ajt")
    assert (code, error) == (2, "error: --cache-dir: 1.33 kB are needed, 1 kB are free")
    assert weights_fetched(asked) == []


def test_fetch_that_breaks_off_names_the_file(load, hub, faults):
    faults.cut["2-res_sce-ajt/sae_weights.safetensors"] = 10
    code, _, error = load("fetch", f"{AJT}/2-res_sce-ajt")
    assert code == 1
    assert error.startswith(
        f"error: hf://{AJT}/2-res_sce-ajt/sae_weights.safetensors is not cached and cannot be fetched"
    )


def test_fetch_compares_what_came_with_the_digest_of_the_hub(load, hub, faults, tmp_path):
    faults.flipped.add("2-res_sce-ajt/sae_weights.safetensors")
    for more in ([], ["--to", tmp_path / "there"]):
        code, _, error = load("fetch", f"{AJT}/2-res_sce-ajt", *more)
        assert (code, "sae_weights.safetensors is damaged: its sha256 is " in error) == (1, True)


def test_without_a_network_show_and_fetch_name_the_file_that_is_missing(load, hub, faults):
    assert load("show", f"{AJT}/2-res_sce-ajt")[0] == 0
    faults.down = True
    for what in ("show", "fetch"):
        code, _, error = load(what, f"{AJT}/2-res_sce-ajt")
        assert code == 1
        assert error.startswith(f"error: hf://{AJT}/2-res_sce-ajt/sae_weights.safetensors is not cached and cannot be")
        assert f"`hf download {AJT} 2-res_sce-ajt/sae_weights.safetensors --revision {COMMIT}`" in error


def test_convert_writes_the_same_map_and_says_what_it_does_not_keep(load, hub, tmp_path):
    code, lines, _ = load("convert", f"{AJT}/2-res_sce-ajt", "--to", "native", tmp_path / "native")
    assert (code, lines) == (0, [f"written      {tmp_path}/native, in the format native"])
    assert sae.load(tmp_path / "native").spec == sae.load(f"{AJT}/2-res_sce-ajt").spec
    (tmp_path / "there").mkdir()
    code, lines, _ = load("convert", tmp_path / "native", "--to", "saelens", tmp_path / "there")
    assert code == 0
    assert lines[1].startswith("not kept     training")
    x = torch.randn(5, 6)
    assert torch.equal(sae.load(tmp_path / "there")(x).out, sae.load(tmp_path / "native")(x).out)


def test_convert_refuses_what_would_be_lost_and_leaves_nothing(load, tmp_path):
    coder = SparseCoder(CoderSpec(6, 6, 20, GroupMax(4)))
    initialize(coder, torch.zeros(6), 0)
    sae.save(coder, tmp_path / "mine")
    code, _, error = load("convert", tmp_path / "mine", "--to", "saelens", tmp_path / "new")
    assert code == 2
    assert error.startswith("error: selection: SAELens cannot say 'groupmax', which would be lost")
    assert not (tmp_path / "new").exists()


def test_convert_looks_at_what_it_has_written(load, tmp_path, monkeypatch):
    from sae.formats import saelens as written

    folder, original = native(tmp_path / "mine"), written.write

    def twice(target, coder):
        original(target, coder)
        raw = bytearray((target / "sae_weights.safetensors").read_bytes())
        raw[-400:] = bytes(400)
        (target / "sae_weights.safetensors").write_bytes(raw)

    monkeypatch.setattr(written, "write", twice)
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "new", tmp_path / "there"):
        code, _, error = load("convert", folder, "--to", "saelens", target)
        assert code == 1
        assert error.startswith("error: what was written is another map: outputs differ by ")
    assert not (tmp_path / "new").exists()
    assert not any((tmp_path / "there").iterdir())


def test_push_puts_a_coder_and_its_card_where_load_finds_it(load, hub, tmp_path, monkeypatch):
    root, asked = hub
    folder = native(tmp_path / "mine", k=3, metrics={"advertised": {"l0": 3.0}})
    code, _, error = load("push", folder, "me/coder")
    assert (code, error.partition(";")[0]) == (2, "error: repo: pushing needs a token")
    assert asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, lines, _ = load("push", folder, "me/coder", "--private")
    assert (code, lines[0].startswith("pushed       http://")) == (0, True)
    assert "private: True" in asked
    assert any(request.startswith("POST /api/models/me/coder/commit/main Bearer hf_secret") for request in asked)
    assert sae.load("me/coder").spec == sae.load(folder).spec
    readme = (root / "models" / "me" / "coder" / "README.md").read_text()
    tags = ["mechanistic-interpretability", "sparse-autoencoder"]
    front = {"library_name": "sae-interp", "base_model": ["tiny/llama"], "tags": tags}
    assert yaml.safe_load(readme.split("---\n")[1]) == front
    for row in ("reads | model.layers.1 of tiny/llama", "selection | topk of 3", "advertised L0 | 3"):
        assert f"| {row} |" in readme
    assert 'coder = sae.load("me/coder")' in readme


@pytest.mark.parametrize("format", ["native", "saelens", "sparsify"])
def test_push_tells_nothing_of_where_things_lie_here(load, hub, tmp_path, monkeypatch, format):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    made, folder = sae.load(native(tmp_path / "made")), tmp_path / "coder"
    sites = (Site("model.layers.1", model=str(tmp_path / "mine")),)
    text = {"source": str(tmp_path / "texts" / "a.txt"), "files": [str(tmp_path / "b.txt")], "column": "text"}
    sae.save(made.with_spec(made.spec.with_(reads=sites, writes=sites, training={"text": text, "tokens": 5})), folder)
    assert load("push", folder, "me/coder", "--to", format)[0] == 0
    files = [path for path in (hub[0] / "models/me/coder").rglob("*") if path.is_file()]
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
    assert [file.name for file in files if b"mine" in file.read_bytes()].count("README.md") == 1
    card = (hub[0] / "models/me/coder/README.md").read_text()
    assert " of mine |" in card
    assert "base_model" not in card
    if format == "native":
        spec = sae.load("me/coder").spec
        assert (spec.reads[0].model, spec.training["text"]["source"]) == ("mine", "texts/a.txt")
    assert sae.load(folder).spec.reads[0].model == str(tmp_path / "mine")


def test_push_puts_reports_beside_the_coder_and_nothing_else_of_the_run(load, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-7f3a")
    run = tmp_path / "run"
    coder = native(run / "coders" / "model.layers.1")
    write_explained_run(run / "explain", 3)
    (run / "notes.txt").write_text("mine")
    for page in ("report.html", "explain/report.html"):
        write_page(run / page, "Mine", [("sae.pages", "site.js")], [("main", {"pages": []})])
    pushed = {"README.md", "cfg.json", "sae.safetensors", "report.html", "explain/report.html"}
    for path, repo in ((coder, "me/one"), (run, "me/run")):
        code, lines, _ = load("push", path, repo)
        assert code == 0
        assert [line.split(",")[0] for line in lines[1:]] == [
            "report       report.html",
            "report       explain/report.html",
        ]
        folder = hub[0] / "models" / repo
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert found.keys() == pushed
        assert found["explain/report.html"] == (run / "explain" / "report.html").read_bytes()
        assert "- [explain/report.html](explain/report.html)" in found["README.md"].decode()
        told = b"".join(found.values()) + json.dumps(blocks(folder / "report.html")).encode()
        assert b"sk-planted" not in told
        assert b"hf_mine" not in told
    monkeypatch.setattr("cli.reports.LARGEST", 100)
    assert load("push", coder, "me/small")[0] == 0
    assert not list((hub[0] / "models/me/small").rglob("*.html"))
    assert "is not put beside the coder: " in caplog.text
    assert " at most" in caplog.text


def test_push_of_several_keeps_their_names_and_figures(load, hub, tmp_path, monkeypatch, tiny_train):
    root, asked = hub
    folder = tmp_path / "run"
    code, printed = tiny_train({"tokens": 256, "grid": {"coder.selection.k": [2, 4]}}, folder=folder)
    assert code == 0, printed
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert load("push", folder / "coders", "me/run")[0] == 0
    assert "private: False" in asked
    found = sae.load_all("me/run")
    assert [*found] == ["model.layers.1/k=2", "model.layers.1/k=4"]
    readme = (root / "models" / "me" / "run" / "README.md").read_text()
    assert "## model.layers.1/k=4" in readme
    fvu = sae.load(folder / "coders/model.layers.1/k=2").spec.metrics["reconstruction"]["fvu"]
    assert f"| FVU | {fvu:.4f} |" in readme
    assert 'sae.load("me/run/model.layers.1/k=2")' in readme


def test_a_token_that_is_not_allowed_to_is_one_line(load, hub, faults, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("rigs.fake_hub._Handler._write", lambda self, parts, sent: self._error("", 403))
    code, _, error = load("push", native(tmp_path / "mine"), "me/coder")
    assert code == 2
    assert error.startswith("error: repo: me/coder cannot be written to: ")
    assert "hf_secret" not in error


def test_doctor_tells_what_it_finds_and_its_exit_code_too(load, tmp_path, monkeypatch):
    folder, seen = native(tmp_path / "mine"), []

    def diagnose(coder, lm, tokens, text):
        seen.append((coder.spec.d_sae, lm, tokens, text))
        return SimpleNamespace(lines=lambda: ["well or not"], healthy=lm == "tiny/llama", score=0.0)

    monkeypatch.setattr("sae.lm.models.load_language_model", lambda name, trust_remote_code: name)
    monkeypatch.setattr("sae.evaluation.doctor.diagnose", diagnose)
    assert load("doctor", folder)[:2] == (0, ["well or not"])
    assert load("doctor", folder, "--model", "other/model", "--tokens", "64", "--text", "x.txt")[0] == 1
    assert seen == [(20, "tiny/llama", 2048, None), (20, "other/model", 64, "x.txt")]


@pytest.mark.parametrize("right", ["decoder", "none"])
def test_the_doctor_tries_every_answer_to_what_the_files_leave_open(load, tmp_path, tiny_model, tiny_text, right):
    """An old transcoder of sparsify does not say whether it subtracts its bias; read rightly, this one copies."""
    (tmp_path / "layers.1").mkdir()
    eye, bias = torch.eye(16), torch.full((16,), 3.0)
    both = torch.cat([eye, -eye])
    tensors = {"encoder.weight": both, "encoder.bias": torch.zeros(32), "W_dec": both.clone(), "b_dec": bias}
    if right == "none":  # the encoder takes out by itself what the decoder puts back
        tensors["encoder.bias"] = -both @ bias
    save_file(tensors, tmp_path / "layers.1" / "sae.safetensors")
    config = {"d_in": 16, "num_latents": 32, "k": 16, "transcode": True}
    (tmp_path / "layers.1" / "cfg.json").write_text(json.dumps(config))
    code, _, error = load("show", tmp_path / "layers.1")
    assert code == 0
    with pytest.raises(ConfigError, match=r"^pre_bias: .* pass pre_bias=none or decoder, or let `sae-load doctor` try"):
        sae.load(tmp_path / "layers.1")
    words = ("--model", tiny_model, "--text", tiny_text, "--site", "layers.1:input->layers.1:input")
    code, lines, error = load("doctor", tmp_path / "layers.1", *words)
    assert lines[-1] == f"fits best    --pre-bias {right}", (lines, error)
    assert lines[0] == f"with --pre-bias {right}:"
    assert sum(line.startswith("with --pre-bias") for line in lines) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["lsit"], "COMMAND: 'lsit' is not one of list, show, fetch, convert, push, doctor. Did you mean 'list'?"),
        (["show"], "the following arguments are required: ID"),
        (["show", "./nowhere"], "path: no such folder: ./nowhere."),
        (["show", "gpt2-small-res-jb/blocks.8.hook_resid"], "path: the release gpt2-small-res-jb has no coder"),
        (["list", "--model", "gtp2"], "model: no coder of 'gtp2' is known. Did you mean 'gpt2'?"),
        (["list", "--release", "gemma-scop-2b"], "release: no coder of 'gemma-scop-2b' is known. Did you mean 'gemma-"),
        (["list", "--model", ""], "model: no coder of '' is known."),
        (["show", "{mine}", "--pre-bias", "some"], "--pre-bias: 'some' is not one of none, decoder, own."),
        (["show", "{mine}", "--format", "saelnes"], "format: 'saelnes' is not one of"),
        (["show", "{mine}", "--depth", "3"], "--depth: no such option."),
        (["fetch", "own/none"], "path: no folder and no hub repository 'own/none'"),
        (["fetch", AJT + "/7"], f"path: hf://{AJT} has no '7'."),
        (["convert", "{mine}", "{mine}/new"], "the following arguments are required: --to"),
        (["convert", "{mine}", "--to", "natve", "{mine}/new"], "format: 'natve' is not one of"),
        (["convert", "{mine}", "--to", "native", "{mine}"], "folder: {mine} exists and is not empty"),
        (["convert", "{mine}", "--to", "native", "{mine}/cfg.json"], "folder: {mine}/cfg.json exists and is not empty"),
        (["push", "{mine}", "name"], "repo: 'name' is not OWNER/NAME"),
        (["doctor", "{mine}", "--tokens", "0"], "--tokens: 0 must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(load, hub, tmp_path, words, named):
    mine = native(tmp_path / "mine")
    code, _, error = load(*(word.format(mine=mine) for word in words))
    assert (code, error.startswith(f"error: {named.format(mine=mine)}")) == (2, True), error


def test_every_hint_that_releases_do_not_give_themselves_is_an_option(capsys):
    assert main(["show", "--help"]) == 0
    text = capsys.readouterr().out
    for field in Hints.__dataclass_fields__.keys() - {"processed", "normalization"}:
        assert ("--model-name" if field == "model" else f"--{field.replace('_', '-')}") in text, field


def test_help_and_list_load_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "openai", "matplotlib", "huggingface_hub")
    code = f"""
import sys
from cli.load import main
main(["list"])
assert main(["--help"]) == 0
print("LOADED", *[name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "usage: sae-load" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"
