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


def test_a_run_of_a_newer_version_is_one_line(explained_coder, tmp_path, capsys):
    shutil.copytree(explained_coder.parent, tmp_path / "made")
    run = tmp_path / "made" / "coder"
    (run / "explain" / "notes.jsonl").write_text('{"version": 99, "latent": 1}\n', encoding="utf-8")
    assert main([str(run), "--serve", "--port", "0"]) == 1
    assert "newer than 1; upgrade sae-interp" in error_of(capsys.readouterr().err)
