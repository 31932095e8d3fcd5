"""Connections: the environment's mistakes are told by name before anything is asked, and loopback passes no proxy."""

import asyncio

import pytest
from openai import APIConnectionError
from rigs.fake_llm import KEY, FakeLLM, endpoint, error

from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.remote import connection
from interp.client.requests import Chat
from sae.base.errors import ConfigError

PASSWORD = "hush-hush-1234"
REMOTE = ("http://llm.example/v1",)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """An environment that says nothing but the key."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENAI_ORG_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("interp.client.remote.limiter.FIRST_PAUSE_S", 0.001)


def check(tmp_path, config):
    async def run():
        async with Client({"judge": config}, tmp_path / "cache") as client:
            await client.check(["judge"])

    asyncio.run(run())


def ask(tmp_path, config):
    async def run():
        async with Client({"judge": config}, tmp_path / "cache") as client:
            return await client.ask(Chat("judge", (("user", "question"),), max_tokens=50))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OPENAI_API_KEY", f"\u201c{PASSWORD}\u201d"),
        ("OPENAI_API_KEY", f"{PASSWORD}\n"),
        ("OPENAI_API_KEY", f"{PASSWORD}\r"),
        ("OPENAI_API_KEY", f" {PASSWORD}"),
        ("OPENAI_API_KEY", f"{PASSWORD}\u00e9"),
        ("OPENAI_API_KEY", f"{PASSWORD}\u200b"),
        ("OPENAI_API_KEY", f"'{PASSWORD}'"),
        ("OPENAI_API_KEY", f"{PASSWORD} {PASSWORD}"),
        ("OPENAI_API_KEY", ""),
        ("OPENAI_API_KEY", " \n"),
        ("OPENAI_ORG_ID", f"org-{PASSWORD}\u2026"),
        ("OPENAI_PROJECT_ID", f"{PASSWORD}\n"),
        ("OPENAI_CUSTOM_HEADERS", f"X-Token: {PASSWORD}\u00e9"),
        ("OPENAI_CUSTOM_HEADERS", f"X Token: {PASSWORD}"),
        ("HTTP_PROXY", f"socks4://u:{PASSWORD}@proxy:1080"),
        ("HTTP_PROXY", f"ftp://u:{PASSWORD}@proxy"),
        ("ALL_PROXY", f"http://u:{PASSWORD}@proxy:99999"),
        ("ALL_PROXY", f"http://u:{PASSWORD}@[::1"),
        ("http_proxy", "http://pro xy:3128"),
        ("HTTP_PROXY", "http://"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
        ("SSL_CERT_FILE", __file__),
        ("SSL_CERT_DIR", "/no/such/folder"),
    ],
)
def test_a_mistake_of_the_environment_is_named_and_its_value_is_not_told(tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable) as caught:
        check(tmp_path, EndpointConfig("m", base_urls=REMOTE))
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS5"])
@pytest.mark.parametrize("variable", ["ALL_PROXY", "http_proxy"])
def test_a_proxy_that_needs_a_package_says_which(tmp_path, monkeypatch, variable, scheme):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(variable, f"{scheme}://u:{PASSWORD}@proxy:1080")
    with pytest.raises(
        ConfigError, match=rf"^{variable}: the proxy {scheme}://proxy:1080 .* pip install socksio"
    ) as caught:
        check(tmp_path, EndpointConfig("m", base_urls=REMOTE))
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x", "http://h:99999"])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_loopback_is_never_sent_to_a_proxy(tmp_path, monkeypatch, proxy, name):
    for variable in PROXIES[:3]:
        monkeypatch.setenv(variable, proxy)
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeLLM() as server:
        here = server.url.replace("127.0.0.1", name)
        assert ask(tmp_path, EndpointConfig("fake", base_urls=(here,))).text == "hello"


def test_a_proxy_is_used_for_what_it_is_for_and_named_where_it_fails(tmp_path, monkeypatch):
    with FakeLLM() as server:  # as a proxy it is sent whole addresses
        there = server.url.removesuffix("/v1").replace("http://", f"http://user:{PASSWORD}@")
        monkeypatch.setenv("HTTP_PROXY", there)
        assert ask(tmp_path, EndpointConfig("fake", base_urls=REMOTE)).text == "hello"
        assert all("proxy-authorization" in call.headers for call in server.calls)
        server.always = error(407, f"who are you, {PASSWORD}?")
        told = r"\(HTTP 407: who are you, \*\*\*\?, by way of the proxy http://127\.0\.0\.1:\d+ of HTTP_PROXY\)"
        with pytest.raises(ConfigError, match=told):
            check(tmp_path, EndpointConfig("other", base_urls=REMOTE))
    with pytest.raises(ConfigError, match=r"by way of the proxy http://127\.0\.0\.1:\d+ of HTTP_PROXY") as caught:
        check(tmp_path, EndpointConfig("another", base_urls=REMOTE, max_tries=1))
    assert PASSWORD not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "example")
    assert connection.proxy_of(EndpointConfig("m", base_urls=REMOTE).addresses()[0]) is None


def test_a_query_goes_along_with_every_request_and_azure_gets_its_header(tmp_path):
    with FakeLLM() as server:
        url = server.url.replace("/v1", "/openai/deployments/gpt") + "?api-version=2024-10-21&a=b%20c"
        config = endpoint(server, base_urls=(url,))
        ask(tmp_path, config)
        paths = {call.path for call in server.calls}
        assert paths <= {"/openai/deployments/gpt/chat/completions", "/openai/deployments/gpt/completions"}
        assert {call.query.replace("%20", "+") for call in server.calls} == {"api-version=2024-10-21&a=b+c"}
        assert {call.headers["api-key"] for call in server.calls} == {KEY}


@pytest.mark.parametrize(
    ("url", "key", "sent"),
    [
        ("https://x.openai.azure.com/openai/v1", KEY, {"api-key": KEY}),
        ("https://x.openai.azure.com/openai/v1", "eyJ0.token", {"authorization": "Bearer eyJ0.token"}),
        ("https://x.services.ai.azure.com/openai/v1", KEY, {"api-key": KEY}),
        ("https://x.openai.azure.us/openai/v1", KEY, {"api-key": KEY}),
        ("https://x.eastus.inference.ml.azure.com/v1", KEY, {"authorization": f"Bearer {KEY}"}),
        ("https://x.eastus.models.ai.azure.com/v1", KEY, {"authorization": f"Bearer {KEY}"}),
        ("https://api.openai.com/v1", KEY, {"authorization": f"Bearer {KEY}"}),
    ],
)
def test_a_key_goes_where_its_server_looks_for_it(monkeypatch, url, key, sent):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    config = EndpointConfig("m", base_urls=(url,))

    async def headers():
        client, _ = connection.connect(config, config.addresses()[0])
        found = []

        async def catch(request):
            found.append({k: v for k, v in request.headers.items() if k in ("api-key", "authorization")})
            raise ConnectionError

        monkeypatch.setattr(client._client._transport, "handle_async_request", catch)
        with pytest.raises((ConnectionError, APIConnectionError)):
            await client.post("/chat/completions", cast_to=str, body={})
        await client.close()
        return found[0]

    assert asyncio.run(headers()) == sent
