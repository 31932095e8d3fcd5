"""sae-explain show as users type it, on folders of every kind, when nothing but the folder is left."""

import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rigs.runs import error_of

from cli.explain import main
from interp.run.kept import excerpts_of
from interp.run.rundir import shown_in

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def made(explained_coder):
    return explained_coder.parent


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy of that, in which paths are as they were."""
    shutil.copytree(made / "coder", tmp_path / "coder")
    return tmp_path / "coder"


@pytest.fixture
def show(capsys):
    def run(*arguments, command="show"):
        capsys.readouterr()
        code = main([*([command] if command else []), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_a_latent_is_shown_from_the_folder_alone(made, copy, show, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "nothing"))
    for path in copy.iterdir():
        if path.name != "explain":
            path.unlink()
    rows = pq.read_table(copy / "explain" / "results.parquet").to_pylist()
    latent = next(row["latent"] for row in rows if row["status"] == "ok")
    mine = [row for row in rows if row["latent"] == latent]
    for folder in (copy, copy / "explain"):
        code, printed = show(folder, latent)
        assert code == 0, printed
        assert f"token_lookup: {mine[0]['explanation']}" in printed
        for row in mine:
            figures = f"{row['score']:.3f} ({row['score_low']:.3f} to {row['score_high']:.3f}), null n/a"
            assert re.search(rf"{re.escape(row['scorer'])}: [\w ]+ {re.escape(figures)}.*, n {row['n']}\n", printed)
        assert f"fires on {mine[0]['fired']:,} of " in printed
        windows = printed.partition("strongest windows\n")[2].partition("\n\nsampled windows\n")
        strongest, sampled = (part.strip().splitlines() for part in (windows[0], windows[2]))
        assert len(strongest) == 8
        assert 10 <= len(sampled) <= 20
        assert all("«" in line and "»" in line for line in (*strongest, *sampled))
        peaks = [abs(float(line.split()[0])) for line in strongest]
        assert peaks == sorted(peaks, reverse=True)
        assert "\x1b" not in printed


def test_marks_are_the_tokens_that_fire(made, show):
    row = next(row for row in shown_in(made / "coder/explain/shards/1-of-1").rows() if row["strongest"])
    first = excerpts_of(row["strongest"])[0].window
    line = "".join(f"«{p}»" if value else p for p, value in zip(first.pieces(), first.activations, strict=True))
    _, printed = show(made / "coder", row["latent"])
    assert line.replace("»«", "") in printed


def test_what_is_not_explained_says_what_explains_it_and_that_does(copy, made, show):
    code, printed = show(made / "coder", 20)
    assert code == 0
    (line,) = [line for line in printed.splitlines() if "to explain it: " in line]
    assert "windows" not in printed
    words = shlex.split(line.partition("to explain it: ")[2])
    assert words[0] == "sae-explain"
    assert words[-1] == "--latents=20"
    config = copy / "explain" / "config.yaml"
    words = [str(config) if word.endswith("config.yaml") else word for word in words[1:]]
    code, printed = show(*words, f"--run-dir={copy / 'explain'}", command=None)
    assert code == 0, printed
    assert re.search(r"^  latent 20 ", printed, re.MULTILINE)  # it is told at once
    assert not re.search(r"^  latent 0 ", printed, re.MULTILINE)
    code, printed = show(copy, 20)
    assert "token_lookup: " in printed
    assert "to explain it" not in printed


def test_several_at_once_in_order(made, show):
    code, printed = show(made / "coder", "5-6", 3, 3)
    assert code == 0
    assert re.findall(r"^latent (\d+) of 0 to 47$", printed, re.MULTILINE) == ["3", "5", "6"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["48"], "latents: 48 is out of range; the coder has latents 0 to 47"),
        (["x"], "latents: 'x' is no latent id"),
        (["alive"], "latents: 'alive' names no latent"),
        (["random:3"], "latents: 'random:3' names no latent"),
        (["3,3"], "latents: 3 is there twice"),
        ([], "ID"),
    ],
)
def test_ids_that_are_none(made, show, ids, said):
    code, printed = show(made / "coder", *ids)
    assert code == 2
    assert said in error_of(printed)


def test_a_folder_that_is_not_explained_says_which_command_to_run(made, show, tmp_path):
    code, printed = show(made / "model", 3)
    assert code == 2
    assert f"run sae-explain {made / 'model'} first" in error_of(printed)
    code, printed = show(made / "codr", 3)
    assert code == 2
    assert error_of(printed).startswith(f"path: no such folder: {made / 'codr'}. Did you mean ")
    (tmp_path / "run" / "explain" / "a" / "shards").mkdir(parents=True)
    (tmp_path / "run" / "explain" / "b" / "shards").mkdir(parents=True)
    code, printed = show(tmp_path / "run", 3)
    assert code == 2
    assert "holds several explained runs; choose one: " in error_of(printed)


def test_shards_are_shown_before_they_are_merged(copy, show):
    shards = copy / "explain" / "shards"
    (shards / "1-of-1").rename(shards / "1-of-2")
    for name in ("results.parquet", "measures.parquet", "summary.json"):
        (copy / "explain" / name).unlink()
    code, printed = show(copy, 3)
    assert code == 0, printed
    assert "token_lookup: " in printed
    assert "strongest windows" in printed


def test_an_older_folder_is_shown_and_says_how_to_keep_examples(show):
    code, printed = show(GOLDEN / "run-v0" / "explained", 55)
    assert code == 0, printed
    assert 'token_lookup: fires on the tokens "g"' in printed
    assert "no examples of it are kept here; to keep them: sae-explain --config " in printed


def test_an_import_is_shown(show, tmp_path):
    assert main(["import", str(GOLDEN / "delphi" / "run"), str(tmp_path / "run")]) == 0
    latent = pq.read_table(tmp_path / "run" / "results.parquet")["latent"].to_pylist()[0]
    code, printed = show(tmp_path / "run", latent)
    assert code == 0, printed
    assert "delphi: " in printed
    assert "detection[" in printed
    assert "sae-explain" not in printed
    code, printed = show(tmp_path / "run", 999_999)
    assert code == 2
    assert f"latents: 999999 is not in {tmp_path / 'run'}; it holds {latent}" in error_of(printed)


@pytest.mark.parametrize(
    ("is_terminal", "environment", "bold"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colors_are_for_terminals_that_want_them(made, show, monkeypatch, is_terminal, environment, bold):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    _, printed = show(made / "coder", 3)
    assert ("\x1b[1;7m" in printed) == bold
    assert ("«" in printed) != bold
