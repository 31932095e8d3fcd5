"""A connection to a server, with all that the environment says of it: keys, headers, certificates, proxies.

Whatever is wrong there is a ConfigError that names the variable and repeats no secret: the packages below would raise
errors of codecs, imports and files that name neither, some of them only once the first question goes out.
"""

import importlib.util
import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from interp.client.address import Address, parse
from interp.client.config import EndpointConfig
from sae.base.errors import ConfigError

CONNECT_S = 10.0
PROXIES = ("http", "https", "socks5", "socks5h")
LOGGERS = ("httpx", "httpx2", "openai._base_client")
"""Who logs the whole address of every request."""
_QUOTES = "\"'\u2018\u2019\u201c\u201d\u00ab\u00bb`"


@dataclass(frozen=True)
class Proxy:
    """What stands between this machine and a server."""

    variable: str
    url: str = field(repr=False)
    """As it is set, with a user and password if it has them."""

    @property
    def shown(self) -> str:
        """Returns what messages have of it."""
        scheme, _, rest = self.url.partition("://")
        return f"the proxy {scheme}://{rest.rpartition('@')[2]} of {self.variable}"

    @property
    def secrets(self) -> list[str]:
        """Returns what must not be shown: the password, or the only word where there is none."""
        user, _, password = self.url.partition("://")[2].rpartition("@")[0].partition(":")
        return [password or user, unquote(password or user)]


def connect(config: EndpointConfig, address: Address) -> tuple[Any, Proxy | None]:
    """Returns an openai client for an address, and the proxy that its requests pass, if any; ConfigError."""
    import openai

    for name in LOGGERS:
        logging.getLogger(name).addFilter(_without_query)  # once, however often it is added
    key, proxy, certificates = key_of(config, address), proxy_of(address), _certificates()
    _check_headers()
    azure = bool(key) and (address.is_azure or "api-version" in dict(address.query)) and not key.startswith("eyJ")
    timeout = openai.Timeout(config.timeout_s, connect=min(CONNECT_S, config.timeout_s / 2))
    options: dict[str, Any] = {"verify": certificates} if certificates else {}
    hooks = [_without_bearer] if azure and address.is_azure else []
    options |= {"event_hooks": {"request": hooks, "response": [_as_utf8]}}
    options |= {"proxy": proxy.url} if proxy else {}
    try:  # the environment has been read, so that a proxy is never asked for what is on this machine
        passage = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=timeout, **options)
    except Exception as error:
        named = f"{proxy.variable}: {proxy.shown}" if proxy else f"base_urls: {address.shown}"
        raise ConfigError(f"{named} cannot be used ({type(error).__name__}); set it right, or unset it") from None
    client = openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=address.base,
        default_query=dict(address.query),
        default_headers={"api-key": key} if azure else {},  # but for tokens of users, which begin with eyJ
        timeout=timeout,
        max_retries=0,
        http_client=passage,
    )
    return client, proxy


def key_of(config: EndpointConfig, address: Address) -> str:
    """Returns the server's key, "" for one on loopback that has none; ConfigError if it cannot be one."""
    name = config.api_key_env
    key = os.environ.get(name, "")
    if not key.strip():
        if address.on_loopback:
            return ""
        state = "holds blanks alone" if key else "is not set"
        raise ConfigError(
            f"api_key_env: the environment variable {name} {state}, and the model {config.model!r} is at "
            f"{address.shown}"
        )
    _sendable(name, key)
    return key


def proxy_of(address: Address) -> Proxy | None:
    """Returns the proxy that the environment names for an address, never one for loopback; ConfigError."""
    set_here, scheme = getproxies(), urlsplit(address.base).scheme
    url = set_here.get(scheme) or set_here.get("all") or ""
    if address.on_loopback or not url or proxy_bypass(address.host):
        return None
    used = scheme if set_here.get(scheme) else "all"
    names = (f"{used}_proxy", f"{used}_PROXY".upper())
    variable = next((name for name in names if os.environ.get(name)), names[1])
    proxy = Proxy(variable, url if "://" in url else f"http://{url}")
    told, _, rest = proxy.url.partition("://")
    try:
        parse(f"{told.lower()}://{rest.rpartition('@')[2]}", variable, variable, PROXIES)
    except ConfigError as error:
        raise ConfigError(f"{error}; correct it, or name {address.host} in NO_PROXY") from None
    if told.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(
            f"{variable}: {proxy.shown} needs the package socksio, which is not installed: pip install socksio; "
            f"or name {address.host} in NO_PROXY"
        )
    return proxy


def _certificates() -> ssl.SSLContext | None:
    """Returns the certificates to trust that the environment names, None for the usual ones; ConfigError."""
    for name, there in (("SSL_CERT_FILE", os.path.isfile), ("SSL_CERT_DIR", os.path.isdir)):
        path = os.environ.get(name)
        if not path:
            continue
        if not there(path):
            raise ConfigError(f"{name}: no such {'folder' if there is os.path.isdir else 'file'}: {path}")
        try:
            return _trusting(name, path, os.stat(path).st_mtime_ns)
        except OSError as error:  # ssl's own are of this kind too
            reason = error.strerror or type(error).__name__
            raise ConfigError(f"{name}: {path} cannot be read as certificates ({reason})") from None
    return None


@lru_cache
def _trusting(variable: str, path: str, _mtime_ns: int) -> ssl.SSLContext:
    """Returns what trusts the certificates of a file or folder: read once, since it takes as long as ten answers."""
    is_file = variable == "SSL_CERT_FILE"
    return ssl.create_default_context(cafile=path if is_file else None, capath=None if is_file else path)


def _check_headers() -> None:
    """Raises ConfigError for what the openai package makes headers of, where no header can hold it."""
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        _sendable(name, os.environ.get(name, ""))
    for name, value in custom_headers().items():
        _sendable(f"OPENAI_CUSTOM_HEADERS ({name!a})", value, blanks=True)
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ConfigError(f"OPENAI_CUSTOM_HEADERS: {name!a} is no name of a header")


def custom_headers() -> dict[str, str]:
    """Returns the headers that the openai package takes from the environment, one a line."""
    pairs = (line.partition(":") for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n"))
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _sendable(variable: str, value: str, blanks: bool = False) -> None:
    """Raises ConfigError, without the value, for one that no header can hold, or that was copied with its quotes."""
    odd = next((c for c in value if not ("!" <= c <= "~" or (blanks and c in " \t"))), "")
    quotes = value[:1] in _QUOTES or value[-1:] in _QUOTES if value and not blanks else False
    if odd or quotes:
        odd = odd or (value[0] if value[0] in _QUOTES else value[-1])
        named = {"\n": "a line break", "\r": "a line break", " ": "a blank"}.get(odd, f"the character U+{ord(odd):04X}")
        raise ConfigError(
            f"{variable}: holds {named} ({odd!a}), which no key or header has; set it again, without quotes, "
            "blanks and line breaks"
        )


async def _without_bearer(request: Any) -> None:
    """Takes out of a request what Azure would take for the token of a user."""
    request.headers.pop("authorization", None)


async def _as_utf8(response: Any) -> None:
    """Has an answer read as JSON is written, whatever encoding it names: some that there are decode no text."""
    response.encoding = "utf-8"


def _without_query(record: logging.LogRecord) -> bool:
    """Takes the queries of addresses out of a log record, which may be keys."""
    text = record.getMessage()
    if "?" in text:
        record.msg, record.args = re.sub(r"(://[^\s?\"']*)\?[^\s\"']+", r"\1?***", text), ()
    return True
