"""Addresses: taken apart as they are typed, told without what may be a secret, refused in one line."""

import pytest

from interp.client.address import parse
from interp.client.config import EndpointConfig
from sae.base.errors import ConfigError
from sae.base.settings import decode

SECRET = "hush-hush-1234"


@pytest.mark.parametrize(
    ("url", "base", "query", "shown"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", {}, "http://localhost:8000/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1", {}, "http://[::1]:8000/v1"),
        (
            "https://x.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21",
            "https://x.openai.azure.com/openai/deployments/gpt",
            {"api-version": "2024-10-21"},
            "https://x.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21",
        ),
        (
            f"https://h/v1?code={SECRET}&api-version=1",
            "https://h/v1",
            {"code": SECRET, "api-version": "1"},
            "https://h/v1?api-version=1",
        ),
        (f"https://h/v1?key={SECRET}%3D&flag=", "https://h/v1", {"key": f"{SECRET}=", "flag": ""}, "https://h/v1"),
        ("HTTPS://b\u00fccher.example/v1", "HTTPS://b\u00fccher.example/v1", {}, "HTTPS://b\u00fccher.example/v1"),
    ],
)
def test_an_address_is_what_is_sent_to_and_what_is_shown(url, base, query, shown):
    found = parse(url, "f", "KEY")
    assert (found.base, dict(found.query), found.shown) == (base, query, shown)
    assert SECRET not in repr(found) + repr(EndpointConfig("m", base_urls=(url,)))


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@h/v1",
        f"https://{SECRET}@h/v1",
        f"https://u:{SECRET}/x@h/v1",
        f"https://u:{SECRET}?x@h/v1",
        f"https://u:1#{SECRET}@h/v1",
        f"https://h/v1#{SECRET}",
        f"https://h/v1?a=b#{SECRET}",
        f"localhost:8000?key={SECRET}",
        f"https://h/v1&key={SECRET}",
        f"https://h/v1;key={SECRET}?a=b",
        f"ftp://h/v1?key={SECRET}",
        f"https://?key={SECRET}",
        "http://h:99999/v1",
        "http://h:80a/v1",
        "http://h:0/v1",
        "http://h:-1/v1",
        "http://[::1/v1",
        "http://::1]:8000/v1",
        "http://[::zz]/v1",
        "http://[localhost]:8000/v1",
        "http://ho st/v1",
        "http://h/v 1",
        " http://h/v1",
        "http://h/v1\n",
        "http://h\u200b/v1",
        "http://a..b/v1",
        "http://h<x>/v1",
        "\u201chttp://h/v1\u201d",
        "",
        "http://",
        "/v1",
    ],
)
@pytest.mark.parametrize("by", ["base_urls", "OPENAI_BASE_URL"])
def test_what_is_no_address_is_named_in_one_line_without_secrets(url, by, monkeypatch):
    if by == "base_urls":
        config = EndpointConfig("m", base_urls=(url,))
    else:
        monkeypatch.setenv(by, url or "?")
        config = EndpointConfig("m")
    with pytest.raises(ConfigError, match=rf"^(judge\.)?{by}: ") as caught:
        config.validate("judge")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variable_that_no_role_needs_is_not_looked_at(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    EndpointConfig().validate("judge")
    EndpointConfig("m", via="local").validate("judge")
    EndpointConfig("m", base_urls=("http://h/v1",)).validate("judge")


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.8.9.1")),
        *((host, True) for host in ("[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]")),
        *((host, False) for host in ("localhost.example", "10.0.0.1", "[fe80::1]", "api.openai.com", "notlocalhost")),
    ],
)
def test_loopback_costs_nothing_however_it_is_written_and_named(host, here, monkeypatch):
    url = f"http://{host}:8000/v1"
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert EndpointConfig("m", base_urls=(url,)).on_loopback == here
    assert EndpointConfig("m").prices is None
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert EndpointConfig("m").prices == ((0.0, 0.0) if here else None)


@pytest.mark.parametrize("name", ["0123456789abcdef0123456789abcdef", "sk_live_0123456789", "sk-1", "a b", ""])
def test_a_key_in_place_of_its_variables_name_is_not_repeated(name):
    with pytest.raises(ConfigError, match=r"^judge\.api_key_env: not the name") as caught:
        EndpointConfig("m", api_key_env=name).validate("judge")
    assert not name or name not in str(caught.value)


def test_a_variable_that_is_set_may_have_any_name(monkeypatch):
    monkeypatch.setenv("my_key_2", "x")
    EndpointConfig("m", api_key_env="my_key_2").validate("judge")


@pytest.mark.parametrize("secret", ["http://h/v1?key=PLANTED&b=PLANTED", "http://me:PLANTED@h/v1", "//h?PLANTED"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda url: {"base_urls": [[url]]},
        lambda url: {"base_urls": {"a": url}},
        lambda url: {"base_urls": {url: 1}},
        lambda url: {"model": [url]},
        lambda url: {"via": url},
        lambda url: {url: 1},
        lambda url: url,
    ],
)
def test_an_address_in_a_wrong_place_is_told_without_its_key(wrap, secret):
    with pytest.raises(ConfigError, match=r"^judge.*\*\*\*") as caught:
        decode(EndpointConfig, wrap(secret), "judge").validate("judge")
    assert "PLANTED" not in str(caught.value)
