"""The encoder that needs no model: TF-IDF vectors, fitted to the texts that are asked about together."""

import asyncio

from interp.client.holder import Holder
from interp.client.ledger import Ledger
from interp.client.local.tfidf import tfidf
from interp.client.requests import Abilities, Embed, Reply, Request

NAME = "tfidf"


class WordEncoder(Holder):
    """Answers Embed; making vectors anew costs less than storing them."""

    where = NAME
    keeps = False
    waiting = 1

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def load(self, role: str) -> Abilities:
        """Returns what it can be asked."""
        return Abilities(fits_texts=True)

    async def answer(self, request: Request, abilities: Abilities) -> Reply:
        """Returns the vectors of all texts."""
        self.ledger.count_local(request.role, 0, 0)
        if not isinstance(request, Embed):
            return Reply(failure="unsupported", detail=f"{NAME} only compares texts")
        return Reply(vectors=await asyncio.to_thread(tfidf, request.texts))
