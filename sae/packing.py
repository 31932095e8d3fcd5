"""Packing: documents -> rows of equal length, by layout and BOS policy."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -1  # no token id: a tokenizer may lack PAD, and its EOS also stands inside text


class Packer:
    """Turns documents into rows by the layout and the BOS policy."""

    def __init__(self, length: int, layout: str, bos: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.length, self.one_per_row, self.policy = length, layout == "one_per_row", bos
        self.bos: Any = tokenizer.bos_token_id if bos != "none" else None
        self.eos: Any = tokenizer.eos_token_id
        self.rows: list[list[int]] = []
        self.numbers: list[list[int]] = []
        self.n_rows = 0
        self._row: list[int] = []
        self._number: list[int] = []

    def add(self, pieces: list[list[int]], document: int) -> None:
        """Takes in one document."""
        tokens = [token for piece in pieces for token in piece]
        if self.policy == "document" and self.bos is not None:
            tokens = [self.bos, *tokens]
        if self.one_per_row:
            start = [self.bos] if self.policy == "row" and self.bos is not None else []
            row = [*start, *tokens][: self.length]
            self._close(row, [document] * len(row))
            return
        if self.eos is not None:
            tokens = [*tokens, self.eos]
        place = 0
        while place < len(tokens):
            if not self._row and self.policy == "row" and self.bos is not None:
                self._row, self._number = [self.bos], [document]
            taken = tokens[place : place + self.length - len(self._row)]
            place += len(taken)
            self._row += taken
            self._number += [document] * len(taken)
            if len(self._row) == self.length:
                self._close(self._row, self._number)
                self._row, self._number = [], []

    def finish(self) -> bool:
        """Pads the row begun last if it is the only one; returns whether there is any row."""
        if not self.rows and not self.n_rows and len(self._row) > 1:
            self._close(self._row, self._number)
        return bool(self.rows or self.n_rows)

    def take(self, n: int) -> dict[str, Int[Tensor, "rows context"]]:
        """Returns and forgets up to n rows, as tensors `tokens` and `documents`."""
        rows, numbers = self.rows[:n], self.numbers[:n]
        del self.rows[:n], self.numbers[:n]
        self.n_rows += len(rows)
        return {
            "tokens": torch.tensor(rows, dtype=torch.int32),
            "documents": torch.tensor(numbers, dtype=torch.int32),
        }

    def _close(self, row: list[int], numbers: list[int]) -> None:
        missing = self.length - len(row)
        self.rows.append(row + [PADDING] * missing)
        self.numbers.append(numbers + [PADDING] * missing)
