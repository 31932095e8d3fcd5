"""Packing: documents -> rows of equal length, by layout and BOS policy."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -1  # no token id: a tokenizer may lack PAD, and its EOS also stands inside text
CUT_ROWS = 64  # this many in one go, because cutting copies what is left over


class Packer:
    """Turns a stream of documents into rows of `length` tokens. A document may come in pieces, so it is never whole.

    packed: documents one after the other with EOS behind each, cut every `length` tokens; what is left over at the end
    is dropped. one_per_row: the beginning of each document, padded. BOS stands at the start of every row ("row") or of
    every document ("document") or nowhere ("none"). What a tokenizer does not have is left out.
    """

    def __init__(self, length: int, layout: str, bos: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.length, self.one_per_row = length, layout == "one_per_row"
        self.bos = _special(tokenizer, "bos_token_id") if bos != "none" else []
        self.eos = _special(tokenizer, "eos_token_id") if not self.one_per_row else []
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
        start = self.bos if first and self.by_document else []
        if self.one_per_row:
            tokens = tokens[: self.length - self._n_open - len(start)]
        filled = np.concatenate([start, tokens, self.eos if last else []], dtype=np.int32, casting="unsafe")
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

    def _cut(self) -> None:
        """Makes rows of what is open, as many as it fills."""
        start = [] if self.by_document else self.bos
        body = self.length - len(start)
        n = self._n_open // body
        if n:
            tokens, documents = _joined(self._open)
            self._open, self._n_open = [(tokens[n * body :], documents[n * body :])], self._n_open - n * body
            tokens, documents = tokens[: n * body].reshape(n, body), documents[: n * body].reshape(n, body)
            start = np.tile(np.array(start, np.int32), (n, 1))
            self._keep(np.hstack([start, tokens]), np.hstack([documents[:, : start.shape[1]], documents]))

    def _close(self) -> None:
        """Makes one padded row of what is open, unless that is only a BOS."""
        tokens, documents = _joined(self._open) if self._open else (np.zeros(0, np.int32),) * 2
        self._open, self._n_open = [], 0
        if len(tokens) <= (len(self.bos) if self.by_document else 0):
            return
        start = np.array([] if self.by_document else self.bos, np.int32)
        tokens, documents = np.concatenate([start, tokens]), np.concatenate([documents[: len(start)], documents])
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
