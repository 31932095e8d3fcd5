"""sae-view RUN --prompt as users type it: a table, JSON, standard input, and what is wrong in one line."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from rigs.runs import error_of, typed

import interp
from cli.view import main
from interp.view.widths import columns

TEXT = "abcd efgh abcd"


@pytest.fixture
def view(capsys):
    return typed(main, capsys)


def test_it_is_what_python_says(view, explained_coder, monkeypatch):
    found = interp.prompt(explained_coder, None, TEXT, explained_coder, top=5)
    code, told, said = view(explained_coder, "--prompt", TEXT, "--json", "--top", 5)
    assert code == 0, said
    assert json.loads(told) == json.loads(json.dumps(found.to_json()))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"{TEXT}\n".encode())))
    code, piped, _ = view(explained_coder, "--prompt", "-", "--json", "--top", 5)
    assert (code, piped) == (0, told)
    code, table, _ = view(explained_coder, "--prompt", TEXT, "--top", 5, "--by", "fires")
    assert code == 0
    assert table.replace("\n", " ").startswith(found.title())
    order = [int(line[:8]) for line in table.splitlines() if line[:8].strip().isdecimal()]
    assert order == [one.latent for one in found.top(5, "fires")]
    assert max(map(columns, table.splitlines())) <= 120
    labels = {one.label.split(" ")[0] for one in found.top(5, "fires") if one.label}
    assert all(label in table for label in labels)
    one = found.latents[0].latent
    code, table, _ = view(explained_coder, "--prompt", TEXT, "--latents", one)
    assert [int(line[:8]) for line in table.splitlines() if line[:8].strip().isdecimal()] == [one]


def test_without_labels_it_says_what_makes_them(view, explained_coder, tmp_path):
    shutil.copytree(explained_coder, tmp_path / "coder")
    shutil.rmtree(tmp_path / "coder" / "explain")
    code, table, said = view(tmp_path / "coder", "--prompt", TEXT)
    assert code == 0
    assert "latents fire" in " ".join(table.split())
    assert f"sae-explain {tmp_path / 'coder'}" in said


def test_bad_input_is_one_line_before_the_model_is_loaded(view, explained_coder, tmp_path, monkeypatch):
    monkeypatch.setattr("interp.view.opening.load_language_model", None)
    for words, why in (
        ((explained_coder, "--prompt", ""), "--prompt: the text is empty"),
        (
            (explained_coder, "--prompt", "a", "--latents", "48"),
            "--latents: 48 is out of range; the coder has latents 0 to",
        ),
        ((explained_coder, "--prompt", "a", "--by", "size"), "--by: 'size' is not one of value, fires, effect"),
        ((explained_coder, "--prompt", "a", "--top", "0"), "--top: 0 is too small; it must be at least 1"),
        ((explained_coder, explained_coder, "--prompt", "a"), "RUN: 2 runs; --prompt, --serve and --export take one"),
        ((tmp_path / "nothing", "--prompt", "a"), "no such folder"),
    ):
        code, _, said = view(*words)
        assert code == 2
        assert why in error_of(said)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff\xfe\xff")))
    code, _, said = view(explained_coder, "--prompt", "-")
    assert (code, "--prompt: standard input is no UTF-8 text" in error_of(said)) == (2, True)


def test_a_text_longer_than_the_model_was_trained_on_is_refused(view, explained_coder):
    code, _, said = view(explained_coder, "--prompt", "abcd " * 60)
    assert code == 2
    assert "together" in error_of(said)
