"""Where a role's model is: a server, this process, or OpenAI's Batch API."""

import os
import re
from dataclasses import dataclass, field, replace

from interp.client.address import Address, parse
from sae.base.errors import ConfigError
from sae.base.settings import at_least, choose

VIAS = ("http", "local", "batch")


@dataclass(frozen=True)
class EndpointConfig:
    """The model behind a role. Roles of equal configs share one limiter and one loaded model."""

    model: str = ""
    """Name that the server knows; of local, a hub id, a folder, a .gguf file or "quickstart". Empty: no such model."""
    via: str = "http"
    """http (an OpenAI-compatible server), local (a Hugging Face model in this process), batch (OpenAI's Batch API)."""
    base_urls: tuple[str, ...] = field(default=(), repr=False)
    """Addresses such as http://localhost:8000/v1; several share the requests. None: $OPENAI_BASE_URL, or OpenAI.
    A query (?api-version=...) goes along with every request; as it may hold a key, it stands in no file of the run."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key, which stands nowhere else. Servers on loopback need none."""
    max_concurrency: int = 64
    """Requests under way at once, over all addresses; fewer while the server is overloaded."""
    timeout_s: float = 120.0
    """Time for one try, from sending to the answer's last byte."""
    max_tries: int = 6
    """How often a request is sent before it counts as failed."""
    thinking_tokens: int = 0
    """Room for what a model thinks before it answers. 0: it is asked not to think, where it can be."""
    price_in: float | None = None
    """USD for a million prompt tokens (of batch: at its own rate); without it, cost is unknown. Loopback costs none."""
    price_out: float | None = None
    """USD for a million answer tokens."""

    def validate(self, where: str) -> None:
        """Raises ConfigError naming the field, `where`.x, whose value is not allowed."""
        choose(f"{where}.via", self.via, VIAS)
        at_least(f"{where}.max_concurrency", self.max_concurrency, 1)
        at_least(f"{where}.max_tries", self.max_tries, 1)
        at_least(f"{where}.thinking_tokens", self.thinking_tokens, 0)
        if not self.timeout_s > 0:
            raise ConfigError(f"{where}.timeout_s: {self.timeout_s} is too small; it must be above 0")
        for name in ("price_in", "price_out"):
            at_least(f"{where}.{name}", getattr(self, name) or 0, 0)
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError(f"{where}.price_in, {where}.price_out: give both, or neither")
        name = self.api_key_env
        if name not in os.environ and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):  # the key itself, most likely
            raise ConfigError(f"{where}.api_key_env: not the name of an environment variable")
        if self.via == "local" and self.base_urls:
            raise ConfigError(f"{where}.base_urls: a model in this process has no address; remove it, or set via: http")
        if self.via == "batch" and len(self.base_urls) > 1:
            raise ConfigError(f"{where}.base_urls: {len(self.base_urls)} addresses; a batch goes to one")
        if self.via != "local" and (self.model or self.base_urls):
            self.addresses(f"{where}.base_urls")

    def addresses(self, where: str = "base_urls") -> tuple[Address, ...]:
        """Returns where its servers are, by `base_urls` or $OPENAI_BASE_URL; ConfigError for what is no address."""
        told = [(url, where) for url in self.base_urls]
        told = told or [(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1", "OPENAI_BASE_URL")]
        return tuple(parse(url, named, self.api_key_env) for url, named in told)

    def shown(self) -> "EndpointConfig":
        """Returns it as files have it: addresses without queries."""
        return replace(self, base_urls=tuple(one.shown for one in self.addresses())) if self.base_urls else self

    @property
    def on_loopback(self) -> bool:
        """Returns whether all its servers are on this machine."""
        return self.via != "local" and all(address.on_loopback for address in self.addresses())

    @property
    def prices(self) -> tuple[float, float] | None:
        """Returns USD per prompt token and per answer token; None where they are unknown."""
        if self.price_in is not None and self.price_out is not None:
            return self.price_in / 1e6, self.price_out / 1e6
        return (0.0, 0.0) if self.via == "local" or self.on_loopback else None
