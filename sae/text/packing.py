"""Packing: documents -> rows of equal length, by layout and BOS policy, with what the tokenizer adds to a text.

A row holds token ids, `PADDING` where it is longer than its text, and below that tokens that are context only: the
model reads them, and no coder does (what others say in a chat).
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from sae.base.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -1  # no token id: a tokenizer may lack PAD, and its EOS also stands inside text
PROBES = ("a", "1", ".")  # texts of which a tokenizer knows at least one
CUT_ROWS = 64  # this many in one go, because cutting copies what is left over


def context_only(ids: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
    """Returns tokens as they stand in rows where the model reads them and no coder does."""
    return PADDING - 1 - ids


def token_ids(tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Returns which tokens those of rows are, context or not; PADDING stays."""
    return torch.maximum(tokens, PADDING - 1 - tokens)


def same(tokens: Int[ndarray, "_n"], ids: list[int]) -> bool:
    """Returns whether tokens of rows, context only or not, are those with these ids."""
    return np.maximum(tokens, PADDING - 1 - tokens).tolist() == ids


def added(tokenizer: "PreTrainedTokenizerBase", bos: str = "row") -> tuple[list[int], list[int]]:
    """Returns what stands before and behind a text: what the tokenizer itself adds to one, measured.

    It is [CLS] and [SEP] for BERT, nothing and </s> for T5. A tokenizer that adds nothing, as GPT-2's, still has its
    BOS put before a text. With the policy `bos` "none", nothing is added.
    """
    if bos == "none":
        return [], []
    for probe in PROBES:
        whole, plain = (list(tokenizer.encode(probe, add_special_tokens=special)) for special in (True, False))
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            before, behind = whole[:start], whole[start + len(plain) :]
            if whole == [*before, *plain, *behind] and (before or behind):
                return before, behind
    return _special(tokenizer, "bos_token_id"), []


def room(length: int, before: list[int], behind: list[int]) -> int:
    """Returns how many tokens of text a row has; ConfigError if none."""
    n_added = len(before) + len(behind)
    if length <= n_added:
        raise ConfigError(
            f"text.context_length: {length} leaves no room for text beside the {n_added} tokens that the tokenizer adds"
        )
    return length - n_added


class Packer:
    """Turns a stream of documents into rows of `length` tokens. A document may come in pieces, so it is never whole.

    packed: documents one after the other with EOS behind each, cut every `length` tokens; what is left over at the end
    is dropped. one_per_row: the beginning of each document, padded. What the tokenizer adds to a text (`added`) stands
    around every row ("row") or every document ("document") or nowhere ("none"); what a document has there already is
    not put there twice. Raises ConfigError if a row has no room for text.
    """

    def __init__(self, length: int, layout: str, bos: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.length, self.one_per_row = length, layout == "one_per_row"
        self.before, self.behind = added(tokenizer, bos)
        room(length, self.before, self.behind)
        self.end = self.behind if self.one_per_row else self.behind or _special(tokenizer, "eos_token_id")
        """What stands behind a document."""
        self.by_document = bos == "document" or self.one_per_row
        self.n_rows = self.n_ready = 0
        """Rows made so far, and how many of them have not been taken."""
        self._ready: list[tuple[ndarray, ndarray]] = []  # (tokens, documents), each [some rows, length]
        self._open: list[tuple[ndarray, ndarray]] = []  # those that fill no row yet, each [some tokens]
        self._n_open = 0

    def add(self, tokens: Int[ndarray, "n"], document: int, first: bool = True, last: bool = True) -> int:
        """Takes in the next piece of document number `document`, which begins and ends with it or goes on.

        Returns how many of `tokens` found room.
        """
        start = self.before if first and self.by_document else []
        start = [] if same(tokens[: len(start)], start) else start
        if self.one_per_row:
            tokens = tokens[: max(0, self.length - self._n_open - len(start) - len(self.end))]
        end = [] if not last or same(tokens[len(tokens) - len(self.end) :], self.end) else self.end
        filled = np.concatenate([start, tokens, end], dtype=np.int32, casting="unsafe")
        self._open.append((filled, np.full(len(filled), document, np.int32)))
        self._n_open += len(filled)
        if self.one_per_row and last:
            self._close()
        elif self._n_open >= CUT_ROWS * self.length:
            self._cut()
        return len(tokens)

    def finish(self, pad: bool = False) -> None:
        """Ends the stream; with `pad`, a row that was begun is kept if there is no other."""
        self._cut()
        if pad and not self.n_rows:
            self._close()

    def take(self, n: int) -> dict[str, Int[Tensor, "rows context"]]:
        """Returns and forgets the first n rows that are ready, as int32 tensors `tokens` and `documents`."""
        tokens, documents = _joined(self._ready)
        self._ready = [(tokens[n:], documents[n:])]
        self.n_ready -= len(tokens[:n])
        return {"tokens": torch.from_numpy(tokens[:n]), "documents": torch.from_numpy(documents[:n])}

    @property
    def _around_rows(self) -> tuple[list[int], list[int]]:
        return ([], []) if self.by_document else (self.before, self.behind)

    def _cut(self) -> None:
        """Makes rows of what is open, as many as it fills."""
        before, behind = self._around_rows
        body = room(self.length, before, behind)
        n = self._n_open // body
        if n:
            tokens, documents = _joined(self._open)
            self._open, self._n_open = [(tokens[n * body :], documents[n * body :])], self._n_open - n * body
            tokens, documents = tokens[: n * body].reshape(n, body), documents[: n * body].reshape(n, body)
            start, end = (np.tile(np.array(side, np.int32), (n, 1)) for side in (before, behind))
            owners = np.pad(documents, ((0, 0), (len(before), len(behind))), mode="edge")
            self._keep(np.hstack([start, tokens, end]), owners)

    def _close(self) -> None:
        """Makes one padded row of what is open, unless that holds no text."""
        tokens, documents = _joined(self._open) if self._open else (np.zeros(0, np.int32),) * 2
        self._open, self._n_open = [], 0
        none = len(self.before) + len(self.end if self.one_per_row else []) if self.by_document else 0
        if len(tokens) <= none:
            return
        before, behind = self._around_rows
        tokens = np.concatenate([before, tokens, behind], dtype=np.int32, casting="unsafe")
        documents = np.pad(documents, (len(before), len(behind)), mode="edge")
        padding = (0, self.length - len(tokens))
        self._keep(*(np.pad(x, padding, constant_values=PADDING)[None] for x in (tokens, documents)))

    def _keep(self, tokens: Int[ndarray, "rows context"], documents: Int[ndarray, "rows context"]) -> None:
        self._ready.append((tokens, documents))
        self.n_rows += len(tokens)
        self.n_ready += len(tokens)


def _special(tokenizer: "PreTrainedTokenizerBase", name: str) -> list[int]:
    found = getattr(tokenizer, name, None)
    return [] if found is None else [found]


def _joined(parts: list[tuple[ndarray, ndarray]]) -> tuple[ndarray, ndarray]:
    tokens, documents = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(documents)
