"""sae-steer as users type it: both continuations as they are written, JSON, and what is wrong in one line."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from rigs.runs import error_of, typed

import sae
from cli.steer import main
from interp.view.opening import open_run

PROMPT = "abcd efgh abcd"


@pytest.fixture
def steer(capsys):
    return typed(main, capsys)


def test_it_prints_what_python_returns(steer, explained_coder, monkeypatch):
    opened = open_run(explained_coder)
    known = opened.largest(range(12))
    labels = {one.latent: one.label.text for one in opened.run.records(range(12)) if one.label.text}
    latent = max(labels, key=known.values.__getitem__)
    wanted = sae.steer(opened.lm, opened.coder, PROMPT, f"{latent}=2x", new_tokens=12, largest=known)
    usual = (explained_coder, "--latent", latent, "--strength", "2x", "--new-tokens", 12)
    code, told, said = steer(*usual, PROMPT)
    assert code == 0, said
    assert told.startswith(f"{wanted}\n")
    assert "2 of its largest activation, " in told
    assert "in the evidence of " in told
    assert told.splitlines()[-1] == f"latent {latent}".ljust(13) + f"token_lookup: {labels[latent]}"
    code, told, said = steer(*usual, PROMPT, "--json")
    assert json.loads(told) == json.loads(json.dumps(wanted.to_json()))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"{PROMPT}\n".encode())))
    assert steer(*usual, "-", "--json")[1] == told
    assert steer(explained_coder, f"--edits={latent}=2x", "--new-tokens", 12, PROMPT, "--json")[1] == told


def test_every_option_is_heard(steer, explained_coder):
    opened = open_run(explained_coder)
    how = {"new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 5, "kl": 0.3}
    wanted = sae.steer(opened.lm, opened.coder, PROMPT, "3:add in answer", largest=opened.largest([3]), **how)
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, told, said = steer(explained_coder, "--latent", 3, "--how=add", "--where=answer", *options, PROMPT, "--json")
    assert code == 0, said
    assert json.loads(told) == json.loads(json.dumps(wanted.to_json()))
    code, told, said = steer(explained_coder, "--latent", 3, "--how=add", "--where=answer", *options, PROMPT)
    assert told.startswith(str(wanted))


def test_without_an_explained_run_the_largest_is_measured_and_said(steer, explained_coder, tmp_path, monkeypatch):
    monkeypatch.setattr("sae.steering.strengths.TEXT_TOKENS", 512)
    shutil.copytree(explained_coder, tmp_path / "coder")
    shutil.rmtree(tmp_path / "coder" / "explain")
    latent = max((known := open_run(explained_coder).largest(range(12)).values), key=known.__getitem__)
    code, told, said = steer(tmp_path / "coder", "--latent", latent, "--strength", "1x", "--new-tokens", 3, PROMPT)
    assert code == 0, said
    assert "largest activations were measured on " in said
    assert "1 of its largest activation, " in told


def test_bad_input_is_one_line_before_the_model_is_loaded(steer, explained_coder, monkeypatch):
    monkeypatch.setattr("interp.view.opening.load_language_model", None)
    run = (explained_coder, PROMPT)
    wrong = {
        "--latent: say which latent is edited, or --edits for several": run,
        "--how: 'clip' is not one of clamp, add, scale, ablate.": (*run, "--latent", 3, "--how", "clip"),
        "--strength: 'a lot' is neither a number nor one of largest activations, as in 2x": (
            *(*run, "--latent", 3, "--strength", "a lot"),
        ),
        "--strength: clamp of latent 3 needs one, or kl, which finds it": (*run, "--latent", 3),
        "--latent: 4000 is not one of this coder's; allowed are 0 to ": (*run, "--latent", 4000, "--strength", 1),
        "--where: 'anser' is not one of prompt, answer, both. Did you mean 'answer'?": (
            *(*run, "--latent", 3, "--strength", 1, "--where", "anser"),
        ),
        "--latent: does not go with --edits, which says all of it": (*run, "--latent", 3, "--edits", "3=1"),
        "--edits: it holds no edit; say one, such as 508=4": (*run, "--edits", ""),
        "--edits: latent 3 is edited twice at the same tokens: 3=1 and 3=2": (*run, "--edits", "3=1, 3=2"),
        "--kl: 0 is not above 0": (*run, "--latent", 3, "--kl", 0),
        "--kl: no strength changes so much": (*run, "--latent", 3, "--kl", "inf"),
        "--strength: '2x' is of clamp and add; scale takes": (
            *run,
            "--latent",
            3,
            "--how",
            "scale",
            "--strength",
            "2x",
        ),
        "--new-tokens: 0 is too small": (*run, "--latent", 3, "--strength", 1, "--new-tokens", 0),
        "--temperature: -1.0 is too small": (*run, "--latent", 3, "--strength", 1, "--temperature", -1),
        "--top-p: 2.0 is not above 0 and at most 1": (*run, "--latent", 3, "--strength", 1, "--top-p", 2),
        "--top-p: nothing is drawn at temperature 0": (*run, "--latent", 3, "--strength", 1, "--top-p", 0.5),
        "--seed: nothing is drawn at temperature 0": (*run, "--latent", 3, "--strength", 1, "--seed", 7),
        "PROMPT: the text is empty": (explained_coder, "", "--latent", 3),
        "--strngth: no such option. Did you mean '--strength'?": (*run, "--strngth", 3),
    }
    for told, arguments in wrong.items():
        code, out, said = steer(*arguments)
        assert code == 2, said
        assert error_of(said).startswith(told), said
        assert not out
    code, _, said = steer(explained_coder / "absent", PROMPT, "--latent", 3, "--strength", 1)
    assert code == 2
    assert "no such folder" in error_of(said)


def test_what_the_model_has_to_tell_is_one_line_as_well(steer, explained_coder):
    code, _, said = steer(explained_coder, "--latent", 3, "--strength", 1, "--chat", PROMPT)
    assert code == 2
    assert error_of(said).startswith("PROMPT: the tokenizer of ")
    code, told, said = steer(explained_coder, "--latent", 3, "--kl", 900, "--new-tokens", 3, PROMPT)
    assert code == 2
    assert error_of(said).startswith("--kl: 900 nats cannot be reached; the nearest is ")
    assert told.startswith("plain ")
    assert told.endswith("\n")
