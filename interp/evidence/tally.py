"""Coder + rows -> latent evidence: one pass over the text, in memory that neither tokens nor L0 enlarge.

A row is cut into cells of 32 tokens. Where a latent fires in a cell, the cell gets the number

    hash(seed, latent, row's name, cell) << 32 | position of the latent's largest value there

and for each latent and part the cells of the smallest numbers are kept: a uniform sample of all cells in which it
fires. Merging two samples is a union of which the smallest are kept, so neither the order of rows nor the number of
ranks nor a restart changes it, and no generator has a state. The cells with the largest values are kept likewise.
Beside them every latent has counts. Together that is 4 KB a latent.

What is kept here are places; `second_pass.py` visits them again, and its values are the ones that count.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from numpy import ndarray
from torch import Tensor

from interp.records import SPLITS
from sae.base.seeding import GOLDEN, mixed
from sae.kernels.codes import SparseLatents

CELL = 32
EMPTY = np.uint64(2**64 - 1)
LOW = np.uint64(2**32 - 1)
OCTAVES = (-12, 12)  # of the histogram of activations: from 2^-12 to 2^12, in halves; what lies beyond is at its ends
BINS = 2 * (OCTAVES[1] - OCTAVES[0])
POSITION_BINS = 16
PENDING = 2**20  # numbers that wait to be merged, 12 bytes each; of more than a quarter as many latents, four of each
SLICE = 2**20  # numbers merged at once


@dataclass(frozen=True)
class Sizes:
    """How many cells are kept of every latent."""

    explain: int = 160
    valid: int = 64
    test: int = 160
    top: int = 16

    def of(self, split: str) -> int:
        """Returns the size of the uniform sample of a part."""
        return getattr(self, split)


def bin_edges() -> list[float]:
    """Returns the lower edges of the histogram's bins: powers of two, and half-way between them."""
    return [float(2**octave * half) for octave in range(*OCTAVES) for half in (1.0, 1.5)]


class Smallest:
    """Keeps, for every latent, the n smallest of the numbers it is offered."""

    def __init__(self, kept: Integer[ndarray, "d n"]) -> None:
        self.kept = kept
        self.limit = kept.max(1, initial=0)
        """By latent: what is not below it cannot enter."""
        self.pending = max(PENDING, 4 * len(kept))
        self._waiting: list[tuple[ndarray, ndarray]] = []
        self._n = 0

    def offer(self, latents: Integer[ndarray, "m"], numbers: Integer[ndarray, "m"]) -> None:
        """Takes in numbers, latents ascending; each (latent, number) may be offered once."""
        chosen = np.flatnonzero(numbers < self.limit[latents])
        if len(chosen):
            self._waiting.append((latents[chosen].astype(np.int32), numbers[chosen]))
            self._n += len(chosen)
            if self._n >= self.pending:
                self.settle()

    def settle(self) -> Integer[ndarray, "d n"]:
        """Merges what waits, and returns all that is kept, in no order."""
        if not self._n:
            return self.kept
        latents, numbers = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n = [], 0
        order = latents.argsort(kind="stable")  # every offer is a run in order: merging runs is fast
        numbers, latents = numbers[order], latents[order]
        starts = np.searchsorted(latents, np.arange(len(self.kept) + 1))
        touched = np.flatnonzero(np.diff(starts))
        n, first = self.kept.shape[1], 0
        while first < len(touched):  # slices of latents, small enough for the memory they take
            ahead = touched[first : first + max(1, SLICE // n)]
            widest = np.maximum.accumulate(starts[ahead + 1] - starts[ahead])
            fits = (widest + n) * np.arange(1, len(widest) + 1) <= SLICE
            some = ahead[: max(1, int(fits.sum()))]
            first += len(some)
            counts = starts[some + 1] - starts[some]
            wide = np.full((len(some), n + int(counts.max())), EMPTY, np.uint64)
            wide[:, :n] = self.kept[some]
            rows = np.repeat(np.arange(len(some)), counts)
            places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
            wide[rows, n + places] = numbers[np.repeat(starts[some], counts) + places]
            wide.partition(n - 1, axis=1)
            self.kept[some] = wide[:, :n]
            self.limit[some] = wide[:, n - 1]
        return self.kept


class Tally:
    """What a pass gathers of each of d_sae latents: cells by part, and counts.

    `state()` holds all of it, 8 bytes a number: (160 + 64 + 160 + 3 x 16) cells, 48 + 16 bins and 4 counts a latent.
    """

    def __init__(self, d_sae: int, context_length: int, sizes: Sizes, seed: int) -> None:
        self.d_sae, self.context_length, self.seed = d_sae, context_length, seed
        self.sample = {split: Smallest(np.full((d_sae, sizes.of(split)), EMPTY)) for split in SPLITS}
        self.top = {split: Smallest(np.full((d_sae, sizes.top), EMPTY)) for split in SPLITS}
        self.fired = np.zeros(d_sae, np.int64)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.positions = np.zeros((d_sae, POSITION_BINS), np.int64)
        self.cells_fired = np.zeros((d_sae, len(SPLITS)), np.int64)
        self.cells = np.zeros(len(SPLITS), np.int64)
        self.tokens = np.zeros(1, np.int64)

    def add(
        self,
        latents: SparseLatents,
        rows: Integer[ndarray, "n"],
        places: Integer[ndarray, "n"],
        names: Integer[ndarray, "n_rows"],
        splits: Integer[ndarray, "n_rows"],
        numbers: Integer[ndarray, "n_rows"],
    ) -> None:
        """Takes in the codes of n tokens.

        Token i stands at place `places[i]` of row `rows[i]` of those whose names, parts and numbers in the corpus
        follow. All tokens of a row must come in one call, and tokens in their order.
        """
        values, ids = latents.values.detach().float().cpu().numpy(), latents.ids.cpu().numpy()
        counts = np.diff(latents.offsets.cpu().numpy())
        per_row = -(-self.context_length // CELL)
        cell_of_token = rows * per_row + places // CELL
        present = np.unique(cell_of_token)
        self.cells += np.bincount(splits[present // per_row], minlength=len(SPLITS))
        self.tokens += len(rows)
        token = np.repeat(np.arange(len(counts)), counts)
        if not values.all():  # in the support without firing
            fires = np.flatnonzero(values)
            values, ids, token = values[fires], ids[fires], token[fires]
        bits = np.abs(values).view(np.uint32)
        place = places[token]
        np.add.at(self.fired, ids, 1)
        np.add.at(self.histogram.reshape(-1), ids * BINS + _bins(bits), 1)
        np.add.at(self.positions.reshape(-1), ids * POSITION_BINS + place * POSITION_BINS // self.context_length, 1)
        self._add_cells(ids, cell_of_token[token], bits, place % CELL, per_row, names, splits, numbers)

    def _add_cells(self, ids, cells, bits, within, per_row, names, splits, numbers) -> None:
        """Finds the largest value of each (latent, cell), earliest first, and offers the cell."""
        if not len(ids):
            return
        order = _by_latent(ids, self.d_sae)  # within a latent the entries stay in the order of cells
        ids, cells = ids[order], cells[order]
        starts = np.flatnonzero(np.append(True, (ids[1:] != ids[:-1]) | (cells[1:] != cells[:-1])))
        ranked = (bits.astype(np.uint64) << np.uint64(5)) | (CELL - 1 - within).astype(np.uint64)
        best = np.maximum.reduceat(ranked[order], starts)
        latent, cell = ids[starts], cells[starts]
        value, within = best >> np.uint64(5), CELL - 1 - (best & np.uint64(CELL - 1)).astype(np.int64)
        row, in_row = cell // per_row, cell % per_row
        position = (numbers[row] * self.context_length + in_row * CELL + within).astype(np.uint64)
        drawn = _hash(self.seed, latent, names[row], in_row)
        largest = ~value & LOW  # the smallest number is the largest value
        part = splits[row]
        np.add.at(self.cells_fired.reshape(-1), latent * len(SPLITS) + part, 1)
        for number, split in enumerate(SPLITS):
            mine = np.flatnonzero(part == number)
            self.sample[split].offer(latent[mine], (drawn[mine] << np.uint64(32)) | position[mine])
            self.top[split].offer(latent[mine], (largest[mine] << np.uint64(32)) | position[mine])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Takes in what another pass gathered on other rows."""
        for name, tensor in state.items():
            there = tensor.numpy()
            kind, _, split = name.partition(".")
            if not split:
                getattr(self, name).__iadd__(there)
                continue
            size = max(1, SLICE // there.shape[1])
            for start in range(0, len(there), size):
                numbers = there[start : start + size].view(np.uint64)
                latents, places = np.nonzero(numbers != EMPTY)
                getattr(self, kind)[split].offer(latents + start, numbers[latents, places])

    def state(self) -> dict[str, Tensor]:
        """Returns all that was gathered, ready to be saved; cells as int64 with the bits of their numbers."""
        kept = {
            f"{kind}.{split}": getattr(self, kind)[split].settle() for kind in ("sample", "top") for split in SPLITS
        }
        for name, numbers in kept.items():
            numbers.sort(axis=1)
            kept[name] = numbers.view(np.int64)
        counts = ("fired", "histogram", "positions", "cells_fired", "cells", "tokens")
        return {name: torch.from_numpy(array) for name, array in (kept | {c: getattr(self, c) for c in counts}).items()}


class Evidence:
    """What a finished pass says of every latent: the state of a `Tally`, read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.numpy() for name, tensor in state.items()}
        self.d_sae = len(self.state["fired"])

    @property
    def tokens(self) -> int:
        """Returns the number of tokens that were looked at."""
        return int(self.state["tokens"][0])

    def places(self, kind: str, split: str, latent: int) -> Integer[ndarray, "found"]:
        """Returns positions in the corpus where the latent is largest in its cells, by hash or ("top") by strength.

        A position is row times row length plus place in the row.
        """
        numbers = self.state[f"{kind}.{split}"][latent].view(np.uint64)
        return (numbers[numbers != EMPTY] & LOW).astype(np.int64)

    def largest(self, latent: int) -> float:
        """Returns the latent's largest value by magnitude; 0 of one that fired nowhere."""
        first = min(self.state[f"top.{split}"][latent].view(np.uint64).min(initial=EMPTY) for split in SPLITS)
        return 0.0 if first == EMPTY else float((~(first >> np.uint64(32)) & LOW).astype(np.uint32).view(np.float32))

    def alive(self) -> Integer[ndarray, "latents"]:
        """Returns the latents that fired at all."""
        return np.flatnonzero(self.state["fired"])

    def rates(self, latent: int) -> dict[str, float]:
        """Returns by part the share of cells in which the latent fires."""
        fired, cells = self.state["cells_fired"][latent], self.state["cells"]
        return {split: float(fired[i] / max(1, cells[i])) for i, split in enumerate(SPLITS)}

    def counts(self, latent: int) -> dict[str, Any]:
        """Returns `fired`, `tokens`, `histogram` and `positions` as plain values."""
        return {
            "fired": int(self.state["fired"][latent]),
            "tokens": self.tokens,
            "histogram": tuple(self.state["histogram"][latent].tolist()),
            "positions": tuple(self.state["positions"][latent].tolist()),
        }


def _by_latent(ids: Integer[ndarray, "nnz"], d_sae: int) -> Integer[ndarray, "nnz"]:
    """The stable order by latent: a radix sort, 16 bits at a time, is several times faster than comparing."""
    order = ids.astype(np.uint16).argsort(kind="stable")
    if d_sae > 2**16:
        order = order[(ids[order] >> 16).astype(np.uint16).argsort(kind="stable")]
    return order


def _bins(bits: Integer[ndarray, "n"]) -> Integer[ndarray, "n"]:
    """The bin of positive floats given as bits: exponent and first bit of the mantissa are the half octave."""
    return np.clip((bits >> 22).astype(np.int64) - 2 * (127 + OCTAVES[0]), 0, BINS - 1)


def _hash(
    seed: int, latent: Integer[ndarray, "m"], name: Integer[ndarray, "m"], cell: Integer[ndarray, "m"]
) -> Integer[ndarray, "m"]:
    """32 bits that look drawn at random, one for each (seed, latent, row's name, cell)."""
    x = name.astype(np.uint64) + cell.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x ^= (latent.astype(np.uint64) + np.uint64(seed + 1)) * GOLDEN
    return mixed(x) >> np.uint64(32)
