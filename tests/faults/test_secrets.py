"""No file of a run and nothing that it prints has a secret: keys, and what addresses, headers and proxies hold."""

import json
import logging
from urllib.parse import quote

import pytest
from rigs.fake_llm import FakeLLM, error
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_runs import coder_folder, scripted

from cli.explain import main
from sae.base.settings import read_yaml

SECRETS = {
    name: f"hush-{name}/0123+456"  # whatever looks like a key is scrubbed anyway
    for name in ("key", "query", "password", "proxy", "header", "token")
}
SMALL = ["--evidence.tokens", "20000", "--latents", "4,", "--examples.test", "10", "--examples.shown", "6"]


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    model = tiny_model_folder(folder / "model", num_hidden_layers=2, initializer_range=0.5)
    return coder_folder(folder / "coder", model, tiny_text_folder(folder / "text"))


@pytest.fixture
def run(coder, tmp_path, monkeypatch, capsys, caplog):
    """Returns sae-explain with every secret in its environment: arguments -> (exit code, all that can be read)."""
    caplog.set_level(logging.DEBUG)
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["key"])
    monkeypatch.setenv("HF_TOKEN", SECRETS["token"])
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Own: {SECRETS['header']}")
    monkeypatch.setattr("interp.client.remote.limiter.FIRST_PAUSE_S", 0.001)

    def explain(*arguments):
        words = [str(coder), *SMALL, "--run-dir", str(tmp_path / "run"), "--models.explainer.model", "fake", *arguments]
        monkeypatch.setattr("sys.argv", ["sae-explain", *words])
        code = main(words)
        printed = capsys.readouterr()
        files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
        return code, [printed.out, printed.err, caplog.text, *files]

    return explain


def leaks(shown):
    """The secrets that stand somewhere, each with what stands about it."""
    forms = {
        name: (value, quote(value), quote(value, safe=""), json.dumps(value)[1:-1]) for name, value in SECRETS.items()
    }
    return {
        name: text[max(0, text.index(form) - 200) :][:300]
        for name, told in forms.items()
        for form in told
        for text in shown
        if form in text
    }


ECHO = error(400, " ".join(value for name, value in SECRETS.items() if name != "password"))


@pytest.mark.parametrize(
    "more", [pytest.param((), id="plain", marks=pytest.mark.slow), pytest.param(("--debug",), id="debug")]
)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(None, id="ok", marks=pytest.mark.slow),
        pytest.param(ECHO, id="400"),
        pytest.param(error(500, ECHO.body["error"]["message"]), id="500", marks=pytest.mark.slow),
    ],
)
def test_a_run_tells_no_secret_whatever_its_server_says(run, tmp_path, monkeypatch, fault, more):
    with FakeLLM(scripted, logprobs=0) as server:  # also as the proxy, which is sent whole addresses
        monkeypatch.setenv("HTTP_PROXY", server.url.replace("http://", f"http://u:{quote(SECRETS['proxy'], safe='')}@"))
        url = f"http://llm.example/v1?api-version=7&code={quote(SECRETS['query'], safe='')}"
        asked = ["--models.explainer.base_urls", f"[{url}]", "--models.explainer.max_tries", "2", *more]
        code, shown = run(*asked)
        assert code == 0, shown[1]
        assert server.calls[0].headers["x-own"] == SECRETS["header"]
        assert "code=" in server.calls[0].query
        if fault:
            server.answer = lambda _: fault
            code, told = run(*asked, "--latents", "5,6,7", "--retry-failed")
            assert code in (1, 2, 3)
            shown += told
    assert not leaks(shown)
    assert read_yaml(tmp_path / "run" / "config.yaml")["models"]["explainer"]["base_urls"] == [
        "http://llm.example/v1?api-version=7"
    ]


@pytest.mark.parametrize("by", ["field", "variable", "list"])
@pytest.mark.parametrize(
    "url", ["http://u:{password}@llm.example/v1", "http://llm.example:x/v1?a={query}", "llm?{query}"]
)
def test_an_address_that_is_refused_is_not_repeated(run, tmp_path, monkeypatch, url, by):
    url = url.format(**SECRETS)
    arguments = [] if by == "variable" else ["--models.explainer.base_urls", url if by == "field" else f"[{url}]"]
    if by == "variable":
        monkeypatch.setenv("OPENAI_BASE_URL", url)
    code, shown = run(*arguments)
    assert code == 2
    assert ("OPENAI_BASE_URL" if by == "variable" else "models.explainer.base_urls") in shown[1]
    assert not leaks(shown)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OPENAI_API_KEY", "\u201c{key}\u201d"),
        ("OPENAI_API_KEY", "{key}\n"),
        ("OPENAI_ORG_ID", "\u201c{key}"),
        ("HTTP_PROXY", "socks4://u:{password}@proxy"),
        ("SSL_CERT_FILE", "/no/such/file"),
    ],
)
def test_a_mistake_of_the_environment_ends_the_command_before_anything_is_written(
    run, tmp_path, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value.format(**SECRETS))
    code, shown = run("--models.explainer.base_urls", "http://llm.example/v1")
    assert code == 2
    assert variable in shown[1]
    assert shown[1].count("\n") == 1 + shown[1].count("run folder")
    assert not leaks(shown)
    assert not (tmp_path / "run").exists()


def test_a_printed_config_has_no_query(run):
    code, shown = run(
        "--models.explainer.base_urls", f"http://llm.example/v1?code={SECRETS['query']}", "--print-config"
    )
    assert code == 0
    assert "http://llm.example/v1\n" in shown[0]
    assert not leaks(shown)
