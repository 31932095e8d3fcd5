"""Where a server is: an address as it is typed, sent to and shown.

    https://x.openai.azure.com/openai/deployments/gpt  ?api-version=2024-10-21&code=...
    base: shown, stored, part of what tells answers apart    query: goes along with every request

A query may hold a key, so no message and no file has it, but for what is known to be none (`PLAIN`).
"""

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from sae.base.errors import ConfigError

PLAIN = ("api-version",)
"""Parameters that hold no key."""


@dataclass(frozen=True)
class Address:
    """A server's address, taken apart."""

    base: str
    """Without query, user and trailing slash."""
    host: str
    """As the base names it, in lower case."""
    query: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def shown(self) -> str:
        """Returns what messages and files have of it."""
        kept = "&".join(f"{name}={quote(value)}" for name, value in self.query if name in PLAIN)
        return f"{self.base}?{kept}" if kept else self.base

    @property
    def secrets(self) -> list[str]:
        """Returns the values that must not be shown, also as they are spelled in an address."""
        held = [value for name, value in self.query if name not in PLAIN]
        return [spelled for value in held for spelled in (value, quote(value, safe=""), quote_plus(value))]

    @property
    def on_loopback(self) -> bool:
        """Returns whether it is of this machine."""
        name = self.host.rstrip(".")
        try:
            found = ip_address(name)
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")
        found = (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found
        return found.is_loopback or found.is_unspecified  # "0.0.0.0", as servers name themselves

    @property
    def is_azure(self) -> bool:
        """Returns whether it is of Azure's own models, whose keys go by a header of their own (not of a user's)."""
        return re.search(r"\.(openai|cognitiveservices|services\.ai)\.azure\.(com|us|cn)$", self.host) is not None


def parse(url: str, where: str, key: str, schemes: tuple[str, ...] = ("http", "https")) -> Address:
    """Returns an address; ConfigError naming `where`, and never what may be a secret, if it is none.

    `where` is the field or variable that holds it, `key` is the environment variable in which the server's key belongs.
    """
    if "@" in url:
        raise ConfigError(f"{where}: an address holds no keys, users or passwords; set {key} instead")
    plain, _, query = url.partition("?")
    if "#" in url:
        raise ConfigError(f"{where}: {plain.partition('#')[0]!r} goes on with #, which no server is ever sent")
    if told := re.match("(.*?)[&;]", plain):
        raise ConfigError(f"{where}: {told[1]!r} goes on with & or ;, but what goes along with it begins with ?")
    try:
        host = _host(plain, schemes)
    except ValueError as error:
        raise ConfigError(
            f"{where}: {plain!r} is no address such as {schemes[0]}://localhost:8000/v1: {error}"
        ) from None
    return Address(plain.rstrip("/"), host, tuple(parse_qsl(query, keep_blank_values=True)))


def _host(url: str, schemes: tuple[str, ...]) -> str:
    """Returns the host; ValueError says what is wrong."""
    if not url.isprintable() or any(character.isspace() for character in url):
        raise ValueError("it holds a blank, or what cannot be seen")
    parts = urlsplit(url)
    if parts.scheme not in schemes:
        raise ValueError(f"it begins with none of {', '.join(f'{name}://' for name in schemes)}")
    host, port = parts.hostname, parts.port  # a bad port raises
    if not host:
        raise ValueError("it names no host")
    if port == 0:
        raise ValueError("no server has port 0")
    if "[" in parts.netloc:
        ip_address(host)
    elif not re.fullmatch(r"[a-z0-9._-]+", host.encode("idna").decode(), re.IGNORECASE):  # UnicodeError: a bad label
        raise ValueError("a host is named by letters, digits, dots and dashes")
    return host
