"""What the answers of a stage come to on the way: how many are valid or cost nothing, and what the rest will cost."""

from collections.abc import Mapping
from dataclasses import dataclass

from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger, Usage
from interp.client.local.words import NAME
from interp.client.requests import Reply, Request


@dataclass
class Share:
    """What some latents took."""

    rows: int = 0
    asked: int = 0
    new: int = 0
    """Of the answers, those that were not there before."""
    usd: float = 0.0

    @property
    def reused(self) -> bool:
        """Returns whether all of it was there before, so that it tells nothing of what others take."""
        return not self.new and (self.asked > 0 or not self.rows)


class Answered:
    """Counts the answers of a stage about `latents` latents, for whoever watches it."""

    def __init__(self, ledger: Ledger, endpoints: Mapping[str, EndpointConfig], latents: int) -> None:
        self.ledger, self.latents, self.before = ledger, latents, ledger.usd_in_all
        self.aside = {role for role, config in endpoints.items() if config.model == NAME}
        """Roles whose answers say nothing: comparing words in this process asks no model."""
        self.asked = self.cached = self.valid = self.done = self.reused = 0
        self.usd = 0.0
        """What the latents that are done have cost."""

    def take(self, share: Share, request: Request, reply: Reply) -> None:
        """Counts the reply to a request, here and in its latents' share."""
        share.asked += 1
        if not reply.cached:
            share.new += 1
            share.usd += self.ledger.cost(request.role, Usage(reply.tokens_in, reply.tokens_out)) or 0.0
        if request.role not in self.aside:
            self.asked += 1
            self.cached += reply.cached
            self.valid += reply.ok

    def end(self, latents: int, share: Share) -> None:
        """Counts so many latents as done."""
        self.done += latents
        self.reused += latents if share.reused else 0
        self.usd += share.usd

    def figures(self) -> dict[str, float]:
        """Returns what is told: answers, shares of them in [0, 1], USD so far and, of the whole stage, expected.

        Nothing where no model was asked. What is expected is what the latents that were asked anew have cost, each,
        times those which are left and which are under way.
        """
        if not self.asked:
            return {}
        found = {
            "answers": self.asked,
            "cached_share": self.cached / self.asked,
            "valid_share": self.valid / self.asked,
        }
        usd, anew = self.ledger.usd_in_all, self.done - self.reused
        if usd is None or self.before is None:
            return found
        expected = self.before + self.usd / anew * (self.latents - self.reused) if anew else 0.0
        return found | {"usd": usd} | ({"usd_expected": max(expected, usd)} if expected else {})
