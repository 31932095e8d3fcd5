"""What was asked and what it cost, by role, and the budget that no call may break.

Before a call its worst case is set aside: a token for every byte that is sent, and the whole limit on the answer. While
spent plus set aside plus the next call's worst case would exceed the budget, no call goes out; the first call that
does not fit ends spending for good, so that what is missing at the end is what was asked last. A call whose answer was
lost on the way (a timeout, a connection that broke) may have been charged: its worst case counts as spent.

The budget is one of a cache file, and so of a run's folder, not of a command: what earlier commands spent stands in the
file, written in one transaction with the answers that it bought, and counts. Only what was under way when a process was
killed, at most the requests that may be out at once, is not known. With --shard every shard has a file, and a budget,
of its own.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from interp.client.config import EndpointConfig
from interp.client.requests import Chat, LogProb, Request
from sae.base.errors import ConfigError

CHARS_PER_TOKEN = 4
"""Where no server tells: the usual guess for English."""
TEMPLATE_TOKENS = 16
"""What a chat template adds to a message at most, about."""


@dataclass
class Account:
    """One role's calls so far. Tokens and cost are of calls made now; cached answers cost nothing."""

    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = 0.0
    """None where the price is unknown."""
    estimated: int = 0
    """Calls whose tokens no server told, so that a quarter of the characters is counted; lost ones at their worst."""
    failures: dict[str, int] = field(default_factory=dict)
    """Answers that are missing, by reason."""


COUNTED = ("calls", "cached", "tokens_in", "tokens_out", "estimated", "usd")
"""Fields of an account that are added up over commands."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one call."""

    tokens_in: int
    tokens_out: int
    estimated: bool = False


class Ledger:
    """Counts by role, and guards the budget of all roles together.

    `accounts` are of this command, `before` of those that worked with the cache file earlier.
    """

    def __init__(self, endpoints: Mapping[str, EndpointConfig], budget_usd: float | None = None) -> None:
        self.budget_usd, self.spent_out, self._reserved = budget_usd, False, 0.0
        self.prices = {role: config.prices for role, config in endpoints.items() if config.model}
        self.accounts = {
            role: Account(usd=None if price is None else 0.0) for role, price in sorted(self.prices.items())
        }
        self.before: dict[str, Account] = {}
        self._saved = {role: _counts(account) for role, account in self.accounts.items()}
        unknown = [role for role, price in self.prices.items() if price is None]
        if budget_usd is not None and unknown:
            raise ConfigError(
                f"budget_usd: {budget_usd} cannot be kept, for the price of {', '.join(unknown)} is unknown; "
                f"set {unknown[0]}.price_in and {unknown[0]}.price_out"
            )

    @property
    def usd(self) -> float | None:
        """Returns what this command has spent; None where a price is unknown."""
        return _sum(self.accounts.values())

    @property
    def usd_in_all(self) -> float | None:
        """Returns what has been spent by this command and those before; None where a price is unknown."""
        return _sum([*self.before.values(), *self.accounts.values()])

    def start_from(self, spent: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over what earlier commands spent, by role; what had no price then is counted at that of now."""
        self.before = {role: Account(**counts) for role, counts in spent.items()}
        for role, account in self.before.items():
            if account.usd is None:
                account.usd = self.cost(role, Usage(account.tokens_in, account.tokens_out))

    def unsaved(self) -> dict[str, dict[str, Any]]:
        """Returns by role what has come since this was last asked: for the cache, which adds it up."""
        found: dict[str, dict[str, Any]] = {}
        for role, account in self.accounts.items():
            now, saved = _counts(account), self._saved[role]
            if now != saved:
                found[role] = {name: None if now[name] is None else now[name] - saved[name] for name in COUNTED}
                self._saved[role] = now
        return found

    def cost(self, role: str, usage: Usage) -> float | None:
        """Returns USD for so many tokens; None where the price is unknown."""
        price = self.prices.get(role)
        return None if price is None else usage.tokens_in * price[0] + usage.tokens_out * price[1]

    def reserve(self, role: str, worst: Usage) -> bool:
        """Sets a call's worst case aside and returns whether the budget allows it."""
        if self.budget_usd is not None:
            coming = self._reserved + (self.cost(role, worst) or 0.0)
            self.spent_out = self.spent_out or (self.usd_in_all or 0.0) + coming > self.budget_usd
            if self.spent_out:
                return False
        self.hold(role, worst)
        return True

    def hold(self, role: str, worst: Usage) -> None:
        """Sets aside what was sent earlier and has not been answered yet: the budget cannot forbid it any more."""
        self._reserved += self.cost(role, worst) or 0.0

    def release(self, role: str, worst: Usage) -> None:
        """Ends a reserve."""
        self._reserved -= self.cost(role, worst) or 0.0

    def refusal(self) -> str:
        """Returns why the budget allows no more calls, and what helps."""
        spent = f"{self.usd_in_all or 0.0:.4g} USD are spent in all"
        aside = f" and {self._reserved:.4g} set aside for calls under way" if self._reserved > 1e-9 else ""
        return f"{spent}{aside}; more could break the budget of {self.budget_usd:g} USD; a higher --budget-usd goes on"

    def settle(self, role: str, worst: Usage, used: Usage) -> None:
        """Replaces a call's reserve by what it used."""
        self.release(role, worst)
        account = self.accounts[role]
        account.calls += 1
        account.tokens_in += used.tokens_in
        account.tokens_out += used.tokens_out
        account.estimated += used.estimated
        if account.usd is not None:
            account.usd += self.cost(role, used) or 0.0

    def count_local(self, role: str, tokens_in: int, tokens_out: int) -> None:
        """Counts an answer of a model in this process, which costs nothing."""
        self.settle(role, Usage(0, 0), Usage(tokens_in, tokens_out))

    def missing(self, role: str, failure: str) -> None:
        """Counts an answer that is missing."""
        failures = self.accounts[role].failures
        failures[failure] = failures.get(failure, 0) + 1

    def totals(self) -> dict[str, Any]:
        """Returns plain JSON values: by role what Account holds, `usd` of all, and `budget_usd`.

        They are of this command; `usd_in_all` is also of those before.
        """
        roles = {role: asdict(account) for role, account in self.accounts.items()}
        return {"roles": roles, "usd": self.usd, "usd_in_all": self.usd_in_all, "budget_usd": self.budget_usd}


def _counts(account: Account) -> dict[str, Any]:
    return {name: getattr(account, name) for name in COUNTED}


def _sum(accounts: Iterable[Account]) -> float | None:
    known = [account.usd for account in accounts]
    return sum(usd for usd in known if usd is not None) if None not in known else None


def worst_case(body: Mapping[str, Any]) -> Usage:
    """Returns the most tokens that a body can come to: a token holds a byte at least."""
    limit = max((body.get(name) or 0 for name in ("max_tokens", "max_completion_tokens")), default=0)
    sent = len(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    return Usage(sent + TEMPLATE_TOKENS * len(body.get("messages", ())), limit, estimated=True)


def guessed_usage(chars_in: int, chars_out: int) -> Usage:
    """Returns the tokens of a call whose server does not tell, by the number of characters."""
    return Usage(-(-chars_in // CHARS_PER_TOKEN), -(-chars_out // CHARS_PER_TOKEN), estimated=True)


def estimated_accounts(requests: Iterable[Request], endpoints: Mapping[str, EndpointConfig]) -> dict[str, Account]:
    """Returns by role what requests would come to if none is cached: a guess of the prompts, the limits of the answers.

    Nothing is asked and no file is touched. `usd` is None where the price is unknown.
    """
    found: dict[str, Account] = {}
    for request in requests:
        config = endpoints.get(request.role, EndpointConfig())
        account = found.setdefault(request.role, Account(usd=None if config.prices is None else 0.0))
        if isinstance(request, Chat):
            chars = sum(len(content) for _, content in request.messages) + len(request.schema)
            answer = 1 if request.choices else request.max_tokens + config.thinking_tokens
            used = guessed_usage(
                chars + CHARS_PER_TOKEN * TEMPLATE_TOKENS * len(request.messages) // 2, CHARS_PER_TOKEN * answer
            )
        elif isinstance(request, LogProb):
            used = guessed_usage(len(request.text), 0)
        else:
            used = guessed_usage(sum(map(len, request.texts)), 0)
        account.calls += 1
        account.estimated += 1
        account.tokens_in += used.tokens_in
        account.tokens_out += used.tokens_out
        if account.usd is not None and config.prices is not None:
            account.usd += used.tokens_in * config.prices[0] + used.tokens_out * config.prices[1]
    return found
