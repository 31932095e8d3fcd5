"""How near texts are to a query in meaning: the inner products of vectors that an encoder gives.

Without an encoder the vectors are TF-IDF of words and parts of words (`interp.client.local.tfidf`), fitted to the
texts: made anew in less time than reading them would take. Those of a model are made once and kept, a digest of each
text beside its vector: only texts that are new are ever encoded. One matrix product answers a query.
"""

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray

from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.local.tfidf import vectorizer
from interp.client.local.words import NAME as TFIDF
from interp.client.requests import Embed
from interp.prompts.reading import query_for_words
from sae.base.errors import ConfigError, DataError
from sae.base.files import load_tensors, save_tensors, tensors_metadata

BATCH = 64  # texts of a request
KEEP_EVERY = 2048  # texts, so that a kill loses no more
Vectors = Float32[ndarray, "n d"]


class Meaning(Protocol):
    """What tells how near texts are to a query."""

    name: str
    """Of the encoder."""

    def near(self, query: str, more: Sequence[str]) -> Float32[ndarray, "n"]:
        """Returns the cosine of every text to a query, then those of `more` texts."""
        ...


def meaning_of(texts: Sequence[str], encoder: EndpointConfig, kept: Path | None) -> Meaning:
    """Returns what tells how near these texts are to a query, by an encoder; vectors of a model are kept in a file."""
    if encoder.model in ("", TFIDF):
        return ByWords(texts)
    return ByEncoder(texts, encoder, kept)


class ByWords:
    """TF-IDF, of a description's telling words."""

    name = TFIDF

    def __init__(self, texts: Sequence[str]) -> None:
        told = [query_for_words(text) for text in texts]
        self._vectorizer, self._size = vectorizer(), len(texts)
        try:
            self._vectors = self._vectorizer.fit_transform(told).tocsc()
        except ValueError:  # no text has a word
            self._vectors = None

    def near(self, query: str, more: Sequence[str]) -> Float32[ndarray, "n"]:
        """Returns the cosine of every text to a query, then those of `more` texts."""
        if self._vectors is None:
            return np.zeros(self._size + len(more), dtype=np.float32)
        sought = self._vectorizer.transform([query_for_words(query)])
        new = self._vectorizer.transform(map(query_for_words, more)).tocsc() if more else None
        columns, values = sought.indices, sought.data
        some = [part[:, columns] @ values for part in (self._vectors, new) if part is not None]
        return np.concatenate(some).astype(np.float32)


class ByEncoder:
    """Vectors of a model, kept in a file."""

    def __init__(self, texts: Sequence[str], encoder: EndpointConfig, kept: Path | None) -> None:
        self.name, self._asking = encoder.model, Asking(encoder)
        self._more: dict[str, ndarray] = {}
        self._vectors = self._made(list(texts), kept)

    def near(self, query: str, more: Sequence[str]) -> Float32[ndarray, "n"]:
        """Returns the cosine of every text to a query, then those of `more` texts."""
        new = [text for text in more if text not in self._more]
        sought, *vectors = self._asking.vectors([query, *new])
        self._more |= dict(zip(new, vectors, strict=True))
        return np.concatenate([self._vectors @ sought, [self._more[text] @ sought for text in more]]).astype(np.float32)

    def _made(self, texts: list[str], kept: Path | None) -> Vectors:
        digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16] for text in texts]
        known = _read(kept, self.name)
        missing = list(
            {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}.items()
        )
        for start in range(0, len(missing), KEEP_EVERY):
            some = missing[start : start + KEEP_EVERY]
            found = self._asking.vectors([text for _, text in some])
            known |= dict(zip((digest for digest, _ in some), found.astype(np.float16), strict=True))
            if kept is not None:
                _write(kept, self.name, known)
        return np.stack([known[digest] for digest in digests]).astype(np.float32) if texts else np.zeros((0, 1), "f4")


class Asking:
    """An encoder that stays loaded, asked from plain code, also where an event loop is running already."""

    def __init__(self, encoder: EndpointConfig) -> None:
        self._config = replace(encoder, via="http") if encoder.via == "batch" else encoder  # somebody waits
        self._loop, self._lock, self._client = asyncio.new_event_loop(), threading.Lock(), None
        threading.Thread(target=self._loop.run_forever, name="encoder", daemon=True).start()

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Returns a vector of length 1 for each text; ConfigError in one line where the encoder gives none."""
        with self._lock:
            return asyncio.run_coroutine_threadsafe(self._asked(list(texts)), self._loop).result()

    async def _asked(self, texts: list[str]) -> Vectors:
        if self._client is None:
            self._folder = tempfile.TemporaryDirectory()  # the answers are kept elsewhere
            client = Client({"encoder": self._config}, Path(self._folder.name) / "answers.sqlite")
            self._client = await client.__aenter__()
        requests = [Embed("encoder", tuple(texts[start : start + BATCH])) for start in range(0, len(texts), BATCH)]
        replies = await self._client.ask_all(requests)
        failed = next((reply for reply in replies if not reply.ok), None)
        if failed is not None:
            why = failed.detail or failed.failure
            raise ConfigError(f"models.encoder: {self._config.model} gives no vectors ({why}); search by words instead")
        found = np.array([vector for reply in replies for vector in reply.vectors], dtype=np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _read(path: Path | None, encoder: str) -> dict[bytes, ndarray]:
    """Returns the vectors that are kept by an encoder, by the digests of their texts; none where a file is damaged."""
    if path is None or not path.is_file():
        return {}
    try:
        if tensors_metadata(path).get("encoder") != encoder:
            return {}
        kept = load_tensors(path)
        return {
            bytes(row): vector for row, vector in zip(kept["digests"].numpy(), kept["vectors"].numpy(), strict=True)
        }
    except (DataError, KeyError, ValueError):
        return {}  # they are made again


def _write(path: Path, encoder: str, known: dict[bytes, ndarray]) -> None:
    digests = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1).copy()
    tensors = {"digests": torch.from_numpy(digests), "vectors": torch.from_numpy(np.stack(list(known.values())))}
    save_tensors(path, tensors, {"encoder": encoder})
