"""Where a role's model is: a server, this process, or OpenAI's Batch API."""

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

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
    base_urls: tuple[str, ...] = ()
    """Addresses such as http://localhost:8000/v1; several share the requests. None: $OPENAI_BASE_URL, or OpenAI."""
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

    def validate(self, field: str) -> None:
        """Raises ConfigError naming the field, `field`.x, whose value is not allowed."""
        choose(f"{field}.via", self.via, VIAS)
        at_least(f"{field}.max_concurrency", self.max_concurrency, 1)
        at_least(f"{field}.max_tries", self.max_tries, 1)
        at_least(f"{field}.thinking_tokens", self.thinking_tokens, 0)
        if not self.timeout_s > 0:
            raise ConfigError(f"{field}.timeout_s: {self.timeout_s} is too small; it must be above 0")
        for name in ("price_in", "price_out"):
            at_least(f"{field}.{name}", getattr(self, name) or 0, 0)
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError(f"{field}.price_in, {field}.price_out: give both, or neither")
        if not self.api_key_env.replace("_", "a").isalnum():  # the key itself, most likely: not to be repeated
            raise ConfigError(f"{field}.api_key_env: not the name of an environment variable")
        if self.via == "local" and self.base_urls:
            raise ConfigError(f"{field}.base_urls: a model in this process has no address; remove it, or set via: http")
        if self.via == "batch" and len(self.base_urls) > 1:
            raise ConfigError(f"{field}.base_urls: {len(self.base_urls)} addresses; a batch goes to one")
        for url in self.base_urls:
            parts = urlsplit(url)
            if parts.username or parts.password or parts.query:
                raise ConfigError(f"{field}.base_urls: an address holds no keys; set {self.api_key_env} instead")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"{field}.base_urls: {url!r} is no address such as http://localhost:8000/v1")

    @property
    def on_loopback(self) -> bool:
        """Returns whether all its servers are on this machine."""
        return bool(self.base_urls) and all(map(_loopback, self.base_urls))

    @property
    def prices(self) -> tuple[float, float] | None:
        """Returns USD per prompt token and per answer token; None where they are unknown."""
        if self.price_in is not None and self.price_out is not None:
            return self.price_in / 1e6, self.price_out / 1e6
        return (0.0, 0.0) if self.via == "local" or self.on_loopback else None


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
