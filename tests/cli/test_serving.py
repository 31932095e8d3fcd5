"""sae-view RUN --serve as users type it: the address when it is ready, one line when it cannot be, and a clean end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest
from rigs.runs import error_of
from starlette.testclient import TestClient

import sae
from cli.steer import main as steer
from cli.view import main
from interp.view.notes import Notes
from interp.view.serving.server import listening


@contextmanager
def serving(run, *options, env=None):
    """Yields (address, process) of a server that is ready."""
    command = [sys.executable, "-m", "cli.view", str(run), "--serve", "--port", "0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **(env or {})}, **pipes) as server:
        try:
            yield server.stdout.readline().strip(), server
        finally:
            server.kill()


def asked(url, path, data=None):
    headers = {"Content-Type": "application/json"}
    body = None if data is None else json.dumps(data).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=60) as answer:
        return answer.read()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_page_is_served_and_notes_outlive_kill_9(explained_coder, tmp_path):
    shutil.copytree(explained_coder.parent, tmp_path / "made")
    run = tmp_path / "made" / "coder"
    with serving(run) as (url, server):
        assert url.startswith("http://127.0.0.1:")
        assert b"<main" in asked(url, "")
        assert json.loads(asked(url, "block/main"))["live"] is True
        assert json.loads(asked(url, "api/about"))["d_sae"] == 48
        assert json.loads(asked(url, "api/prompt", {"text": "one two"}))["tokens"]
        for latent in range(3):
            asked(url, "api/notes", {"latent": latent, "label": f"label {latent}"})
        server.kill()
    with serving(run) as (url, server):
        kept = json.loads(asked(url, "api/notes"))["notes"]
        assert [(note["latent"], note["label"]) for note in kept] == [(n, f"label {n}") for n in range(3)]
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert Notes(run / "explain").labels() == {n: f"label {n}" for n in range(3)}


@pytest.fixture
def refused(capsys, monkeypatch):
    """Returns the one line with which sae-view --serve ends before it loads the model."""
    monkeypatch.setattr("interp.view.opening.load_language_model", lambda *_, **__: pytest.fail("the model was loaded"))

    def run(*options):
        code = main([*map(str, options), "--serve"])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        return error_of(printed.err)

    return run


def test_what_cannot_be_served_is_one_line(explained_coder, refused, tmp_path, monkeypatch):
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port: {port} is in use on 127.0.0.1; --port " in refused(explained_coder, "--port", port)
    assert "--port: 70000 is not from 0" in refused(explained_coder, "--port", 70000)
    assert "SAE_VIEW_TOKEN" in refused(explained_coder, "--host", "0.0.0.0")
    assert "no address of this machine" in refused(explained_coder, "--host", "nowhere.invalid")
    assert "--export take one" in refused(explained_coder, explained_coder)
    plain = tmp_path / "plain"
    shutil.copytree(explained_coder, plain, ignore=shutil.ignore_patterns("explain"))
    assert f"nothing is explained in {plain}; run this first: sae-explain {plain}" in refused(plain, "--port", 0)
    monkeypatch.setattr("cli.serving.find_spec", lambda name: None)
    assert refused(explained_coder).endswith("pip install 'sae-interp[view]'")


def test_a_run_of_a_newer_version_is_one_line_before_a_model_is_loaded(explained_coder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("interp.view.opening.load_language_model", lambda *_, **__: pytest.fail("the model was loaded"))
    shutil.copytree(explained_coder.parent, tmp_path / "made")
    run = tmp_path / "made" / "coder"
    (journal,) = (run / "explain").glob("shards/*/journal-examples.jsonl")
    kept = journal.read_text()
    journal.write_text(kept.replace('"version":1', '"version":99', 1))
    assert main([str(run), "--serve", "--port", "0"]) == 1
    assert "newer than 1; upgrade sae-interp" in error_of(capsys.readouterr().err)
    assert steer([str(run), "--latent", "1", "--strength", "2x", "a"]) == 1
    assert "newer than 1; upgrade sae-interp" in error_of(capsys.readouterr().err)
    journal.write_text(kept)
    (run / "explain" / "notes.jsonl").write_text('{"version": 99, "latent": 1}\n', encoding="utf-8")
    assert main([str(run), "--serve", "--port", "0"]) == 1
    assert "newer than 1; upgrade sae-interp" in error_of(capsys.readouterr().err)


def test_steering_is_served_without_a_page_of_any_coder(explained_coder, tmp_path, capsys, monkeypatch):
    shutil.copytree(explained_coder, tmp_path / "plain", ignore=shutil.ignore_patterns("explain"))
    served = []
    monkeypatch.setattr("interp.view.serving.server.serve", lambda app, *_: served.append(app))
    assert steer([str(tmp_path / "plain"), "--serve", "--port", "0"]) == 0
    client = TestClient(served[0], "http://127.0.0.1")
    (one,) = client.get("/v1/models").json()["data"]
    asked = {"model": one["id"], "prompt": "abcd", "max_tokens": 4, "temperature": 0, "steer": "3=20"}
    told = client.post("/v1/completions", json=asked).json()
    wanted = sae.steer(None, tmp_path / "plain", "abcd", "3=20", new_tokens=4)
    assert (told["choices"][0]["text"], told["steer"]) == (wanted.steered, "3=20")
    assert client.get("/").status_code == client.get("/api/about").status_code == 404
    assert client.get("/").json()["error"]["message"] == "not found"
    for more, told in (
        (("abc", "--serve"), "abc: one word too many"),
        (("--edits", "3:clip=1", "abc"), "--edits: 'clip' is not one of clamp"),
        (("--edits", "3=1 if 4", "abc"), "--edits: '4' is not LATENT>VALUE"),
        (("--serve", "--kl", "1"), "--kl: it does not go with --serve"),
        (("--serve", "--latent", "3"), "--latent: it does not go with --serve"),
        (("abc", "--latent", "3", "--port", "1"), "--port: it goes with --serve"),
        (("--latent", "3"), "PROMPT"),
    ):
        assert steer([str(tmp_path / "plain"), *more]) == 2
        assert told in error_of(capsys.readouterr().err)
