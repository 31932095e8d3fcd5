"""The dry run against what a real run of the embedded model takes."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rigs.fakes import tiny_config
from rigs.peaks import peaks

from cli.train import main
from sae.base.errors import ConfigError
from sae.base.units import data_size
from sae.training.estimate import estimate

SHORT = ["--tokens", "20480", "--eval.tokens", "4096", "--text.max_tokens", "200000"]
WIDE = ["--tokens", "8192", "--eval.tokens", "4096", "--text.max_tokens", "200000", "--coder.d_sae", "65536"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("config", [SHORT, WIDE], ids=["quickstart", "wide"])
def test_memory_and_disk_of_a_real_run(config, n, tmp_path):
    first, *others = peaks(n, config, tmp_path / "run")
    print(first, others)
    assert first["peak"] == pytest.approx(first["estimated"], rel=0.15)
    for other in others:
        assert other["peak"] <= 1.15 * first["others"]
    written = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert written <= 1.5 * first["disk"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [["--parallel.latents", "2"], ["--parallel.sites", "2", "--activations.sites", "[layers.1, layers.2]"]],
    ids=["latents", "sites"],
)
def test_memory_of_a_real_run_on_a_mesh(mesh, tmp_path):
    """Beside pages of the files from which no rank has to hold the coders whole."""
    first, second = peaks(2, [*WIDE, *mesh], tmp_path / "run")
    mapped = sum(file.stat().st_size for file in (tmp_path / "run/coders").rglob("*.safetensors"))
    print(first, second, mapped)
    assert first["peak"] == pytest.approx(first["estimated"] + mapped, rel=0.1)
    assert second["peak"] == pytest.approx(first["others"] + mapped, rel=0.1)


def test_a_dry_run_of_several_ranks_says_what_one_of_them_takes(capsys, monkeypatch):
    monkeypatch.setattr("sae.training.estimate.measured_flops_per_s", lambda device: 1e11)
    found = []
    for n in ("1", "3"):
        assert main(["--dry-run", "--ranks", n, "--checkpoints.every_steps", "9", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, three = found
    assert three["memory"]["pool"] == one["memory"]["pool"] * 22 // 64  # lanes are dealt raggedly
    assert three["memory"]["coders"] == one["memory"]["coders"]  # whole on each
    assert three["memory"]["snapshot"] == pytest.approx(one["memory"]["snapshot"] / 3, abs=3)
    assert three["peak_memory_others"] < three["peak_memory"]  # which does not measure
    assert one["traffic"]["sent"] == [0, 0]
    least, most = three["traffic"]["sent"]
    assert least == most > 4 * three["coder_parameters"]
    assert three["compute_s"] == pytest.approx(one["compute_s"] / 3, rel=0.1)  # lanes are dealt raggedly


def test_a_dry_run_of_several_ranks_says_what_they_exchange(capsys):
    assert main(["--dry-run", "--ranks", "2", "--ranks.deadline_s", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " of rank 0, " in lines[2]
    found = {line[:13].rstrip(): line[13:] for line in lines}
    assert list(found)[-6:] == ["mesh", "exchange", "  data", "  all", "seconds", "limits"]
    assert found["seconds"].startswith("683 steps x (")
    assert found["mesh"] == "sites 1 x data 2 x latents 1"
    assert " of memory, " in found["limits"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dry-run", "--ranks", "0"], "--ranks: 0 must be at least 1"),
        (["--dry-run", "--ranks", "some"], "--ranks: "),
        (["--dry-run", "--ranks", "65"], "activations.lanes: 64 for 65 ranks, of which each needs one"),
        (["--ranks", "2"], "--ranks: is for --dry-run"),
    ],
)
def test_ranks_that_cannot_be_are_refused_in_one_line(argv, said, capsys):
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.splitlines()[-1].startswith(f"error: {said}")


@pytest.mark.slow
def test_a_dry_run_imports_nothing_that_it_does_not_use():
    """But for what transformers takes in with any model: scipy, sympy and torch's compiler."""
    unused = ("datasets", "pyarrow", "pandas", "sklearn", "matplotlib", "openai", "gguf", "tensorboard", "interp")
    code = f"""
import sys
from cli.train import main
assert main(["--dry-run"]) == 0
print("LOADED", *[name for name in {unused!r} if name in sys.modules])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.slow
def test_a_dry_run_that_ends_its_process_says_all_and_gives_its_code():
    for more, code in (((), 0), (("--activations.sites", "nowhere"), 2)):
        command = [sys.executable, "-m", "cli.train", "--dry-run", *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == code, done.stderr
        assert ("compute " in done.stdout, "error: " in done.stderr) == (code == 0, code == 2)


def test_a_dry_run_in_a_process_of_others_leaves_its_collector_as_it_was(capsys, monkeypatch):
    before = gc.get_threshold()
    seen = []
    monkeypatch.setattr("cli.train._act", lambda *_: seen.append(gc.get_threshold()) or 0)
    assert main(["--dry-run"]) == 0
    assert seen != [before]
    assert gc.get_threshold() == before


PLACES = {"model.embed_tokens": 0, "model.layers": "cuda:1", "model.layers.1": "disk", "model.norm": 0, "lm_head": 0}


def placed(model, text, **kwargs):
    found = estimate(tiny_config(model, text, {"model.device": "auto", "model.kwargs": kwargs}))
    (line,) = [line for line in found.lines() if line.startswith("placed ")] if kwargs else [found.placed]
    return line, found


@pytest.mark.slow
def test_a_map_says_what_goes_where(tiny_model, tiny_text):
    line, found = placed(tiny_model, tiny_text, device_map={**PLACES, "model.rotary_emb": "cpu"})
    block = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    rest = 4 * found.lm_parameters - 2 * block
    shares = (
        f"{data_size(rest)} of the model on 0, {data_size(block)} of the model on cuda:1, {data_size(block)} of the"
    )
    assert line == f"placed       {shares} model on disk; the memory above counts all of it as one"
    with pytest.raises(
        ConfigError, match=r"^model\.kwargs\.device_map: it does not say where these go: lm_head.weight"
    ):
        placed(tiny_model, tiny_text, device_map={"model": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({}, ""),
        (
            {"device_map": "auto"},
            "by what is free when the model is loaded (device_map auto)",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized when it is loaded, to a size that is not known"),
    ],
)
def test_what_is_not_known_is_said(tiny_model, tiny_text, kwargs, told):
    assert told in placed(tiny_model, tiny_text, **kwargs)[0]
