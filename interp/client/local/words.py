"""The encoder that needs no model: TF-IDF vectors, fitted to the texts that are asked about together."""

import asyncio

from interp.client.local.tfidf import tfidf
from interp.client.requests import Abilities, Embed, Reply, Request

NAME = "tfidf"


class WordEncoder:
    """Answers Embed; making vectors anew costs less than storing them."""

    where = NAME
    keeps = False

    async def load(self, role: str) -> Abilities:
        """Returns what it can be asked."""
        return Abilities(fits_texts=True)

    async def answer(self, request: Request) -> Reply:
        """Returns the vectors of all texts."""
        if not isinstance(request, Embed):
            return Reply(failure="unsupported", detail=f"{NAME} only compares texts")
        return Reply(vectors=await asyncio.to_thread(tfidf, request.texts))

    async def close(self) -> None:
        """Has nothing to end."""
