"""What a tally keeps, against dictionaries of every cell; its sample is uniform, and its size is fixed."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.evidence.tally
from interp.evidence.tally import BINS, CELL, Evidence, Sizes, Tally, bin_edges
from interp.records import SPLITS
from sae.kernels.codes import SparseLatents

SMALL = Sizes(explain=3, valid=2, test=4, top=2)
MASK = 2**64 - 1


def hashed(seed: int, latent: int, name: int, cell: int) -> int:
    """The number of a cell, written with Python's integers."""
    x = (name + cell * 0xD1B54A32D192ED03) & MASK
    x ^= ((latent + seed + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) >> 32


class Text:
    """Random codes of random rows: entry (row, place) -> {latent: value}; masked places are missing."""

    def __init__(self, draw: np.random.Generator, d_sae: int, context: int, n_rows: int, l0: int) -> None:
        self.d_sae, self.context = d_sae, context
        self.names = draw.integers(0, 2**62, n_rows)
        self.splits = draw.integers(0, 3, n_rows).astype(np.int8)
        favored = draw.integers(0, d_sae, max(1, 2 * l0))  # so that latents fire again
        if d_sae > 2**16:  # with the same low bits
            favored = np.concatenate([favored % (d_sae - 2**16), favored % (d_sae - 2**16) + 2**16])
        self.codes: list[dict[int, dict[int, float]]] = []
        for row in range(n_rows):
            length = 0 if row % 5 == 3 else int(draw.integers(0, context + 1))
            places = [p for p in range(length) if draw.random() < 0.9]
            self.codes.append({place: self._code(draw, favored, l0) for place in places})

    @staticmethod
    def _code(draw: np.random.Generator, favored: np.ndarray, l0: int) -> dict[int, float]:
        chosen = np.unique(draw.choice(favored, int(draw.integers(0, l0 + 1))))
        values = draw.choice([0.0, -1.5, 2.0, 2.0, 1e-30, 1e9, *draw.normal(size=4)], len(chosen)).astype(np.float32)
        return dict(zip(chosen.tolist(), values.tolist(), strict=True))

    def block(self, rows: list[int]) -> tuple:
        """The arguments of `Tally.add` for some rows."""
        found = [(at, place, code) for at, row in enumerate(rows) for place, code in self.codes[row].items()]
        counts = [len(code) for *_, code in found]
        ids = [latent for *_, code in found for latent in code]
        values = [value for *_, code in found for value in code.values()]
        latents = SparseLatents(
            torch.tensor(np.append(0, np.cumsum(counts)), dtype=torch.int64),
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(values, dtype=torch.float32),
            self.d_sae,
        )
        at, places = (np.array([f[i] for f in found], np.int64) for i in (0, 1))
        chosen = np.array(rows)
        return latents, at, places, self.names[chosen], self.splits[chosen], chosen

    def tally(self, blocks: list[list[int]], sizes: Sizes = SMALL, seed: int = 3) -> Tally:
        tally = Tally(self.d_sae, self.context, sizes, seed)
        for rows in blocks:
            tally.add(*self.block(rows))
        return tally


def reference(text: Text, sizes: Sizes, seed: int) -> dict:
    """The same by dictionaries: cells of every latent, and counts."""
    cells: dict[tuple[int, int, int], tuple[float, int]] = {}
    counts = {name: {} for name in ("fired", "histogram", "positions", "cells_fired")}
    looked: set[tuple[int, int]] = set()
    tokens = 0

    def add(name: str, key: tuple) -> None:
        counts[name][key] = counts[name].get(key, 0) + 1

    for row, codes in enumerate(text.codes):
        for place, code in codes.items():
            tokens += 1
            looked.add((row, place // CELL))
            for latent, value in code.items():
                if not value:
                    continue
                size = abs(np.float32(value).item())
                octave = math.floor(math.log2(size))
                half = 2 * (octave + 12) + (size >= 1.5 * 2.0**octave)
                add("fired", (latent,))
                add("histogram", (latent, min(max(half, 0), BINS - 1)))
                add("positions", (latent, place * 16 // text.context))
                key = (latent, row, place // CELL)
                if key not in cells or size > cells[key][0]:
                    cells[key] = size, place
    kept: dict[tuple[str, str, int], list[int]] = {}
    for (latent, row, cell), (size, place) in cells.items():
        split = SPLITS[text.splits[row]]
        add("cells_fired", (latent, int(text.splits[row])))
        position = row * text.context + place
        kept.setdefault(("sample", split, latent), []).append(
            (hashed(seed, latent, int(text.names[row]), cell), position)
        )
        kept.setdefault(("top", split, latent), []).append((-size, position))
    places = {
        (kind, split, latent): [p for _, p in sorted(found)[: sizes.of(split) if kind == "sample" else sizes.top]]
        for (kind, split, latent), found in kept.items()
    }
    by_part = [sum(text.splits[row] == part for row, _ in looked) for part in range(3)]
    return {"places": places, "tokens": tokens, "cells": by_part, **counts}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 7, 70_000]), st.sampled_from([5, 32, 48, 100]), st.integers(1, 12),
    st.integers(0, 6),
)  # fmt: skip
def test_it_keeps_what_dictionaries_of_all_cells_keep(seed, d_sae, context, n_rows, l0):
    draw = np.random.default_rng(seed)
    text = Text(draw, d_sae, context, n_rows, l0)
    order = draw.permutation(n_rows).tolist()
    cuts = sorted(draw.integers(0, n_rows + 1, 2).tolist())
    blocks = [part for part in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]) if part]
    found, wanted = Evidence(text.tally(blocks).state()), reference(text, SMALL, 3)

    assert found.tokens == wanted["tokens"]
    assert found.state["cells"].tolist() == wanted["cells"]
    for name in ("fired", "histogram", "positions", "cells_fired"):
        array = found.state[name].reshape(d_sae, -1)
        there = {(int(i), int(j)): int(array[i, j]) for i, j in zip(*array.nonzero(), strict=True)}
        assert there == {(*key, 0)[:2]: n for key, n in wanted[name].items()}, name
    for kind in ("sample", "top"):
        for split in SPLITS:
            kept = set(np.flatnonzero((found.state[f"{kind}.{split}"] != -1).any(1)).tolist())
            assert kept == {key[2] for key in wanted["places"] if key[:2] == (kind, split)}
            for latent in kept:
                assert found.places(kind, split, latent).tolist() == wanted["places"][kind, split, latent]
    for latent in found.alive()[:5].tolist():
        fired = [wanted["cells_fired"].get((latent, part), 0) for part in range(3)]
        rates = [n / max(1, all_) for n, all_ in zip(fired, wanted["cells"], strict=True)]
        assert list(found.rates(latent).values()) == pytest.approx(rates)
        assert found.counts(latent)["fired"] == wanted["fired"][latent,]


@pytest.mark.parametrize("d_sae", [9, 70_000])
def test_any_division_and_order_gives_the_same_bits(d_sae, monkeypatch):
    draw = np.random.default_rng(1)
    text = Text(draw, d_sae, 64, 30, 5)
    whole = text.tally([list(range(30))]).state()
    rows = draw.permutation(30).tolist()
    shards = [text.tally([[row] for row in rows[i::3]]).state() for i in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = Tally(d_sae, 64, SMALL, 3)
        for number in order:
            merged.merge(shards[number])
        assert_same(merged.state(), whole)
    monkeypatch.setattr(interp.evidence.tally, "SLICE", d_sae + 2)  # whatever is merged at once
    monkeypatch.setattr(interp.evidence.tally, "PENDING", 3)
    assert_same(text.tally([[row] for row in rows]).state(), whole)
    merged = Tally(d_sae, 64, SMALL, 3)
    for state in shards:
        merged.merge(state)
    assert_same(merged.state(), whole)


def assert_same(state: dict, wanted: dict) -> None:
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name]), name


def test_another_seed_draws_another_sample():
    text = Text(np.random.default_rng(2), 4, 64, 40, 4)
    a, b = (Evidence(text.tally([list(range(40))], seed=seed).state()) for seed in (0, 1))
    assert any(set(a.places("sample", "test", i)) != set(b.places("sample", "test", i)) for i in range(4))
    assert all(np.array_equal(a.places("top", "test", i), b.places("top", "test", i)) for i in range(4))


def everywhere(n_latents: int, n_cells: int, split: int = 0) -> tuple:
    """Codes of latents that fire once in every cell; rows of two cells each."""
    n_rows = n_cells // 2
    latents = SparseLatents(
        torch.arange(n_cells + 1) * n_latents,
        torch.arange(n_latents).repeat(n_cells),
        torch.ones(n_cells * n_latents),
        n_latents,
    )
    rows, places = np.repeat(np.arange(n_rows), 2), np.tile([5, CELL + 20], n_rows)
    names = np.arange(n_rows) * 1_000_003  # far from random: the hash alone must see to that
    return latents, rows, places, names, np.full(n_rows, split, np.int8), np.arange(n_rows)


def chi_square(draws: np.ndarray, n_cells: int, each: int) -> float:
    """Sum over cells of squared deviations by their variance, for `len(draws) / each` draws without replacement."""
    latents, p = len(draws) / each, each / n_cells
    counts = np.bincount(draws, minlength=n_cells)
    return float(((counts - latents * p) ** 2 / (latents * p * (1 - p))).sum())


def test_the_sample_is_uniform():
    n_latents, n_cells, each = 300, 1000, 160
    tally = Tally(n_latents, 2 * CELL, Sizes(), 0)
    tally.add(*everywhere(n_latents, n_cells))
    found = Evidence(tally.state())
    cells = np.stack([found.places("sample", "explain", latent) // CELL for latent in range(n_latents)])
    assert cells.shape == (n_latents, each)
    spread = 5 * math.sqrt(2 * n_cells)  # five standard deviations of the statistic
    assert abs(chi_square(cells.reshape(-1), n_cells, each) - n_cells) < spread
    shared = [len(np.intersect1d(a, b)) for a, b in pairwise(cells)]
    expected, variance = each**2 / n_cells, each**2 / n_cells * (1 - each / n_cells) ** 2
    assert abs(np.mean(shared) - expected) < 5 * math.sqrt(variance / len(shared))  # latents are independent
    biased = np.stack([np.random.default_rng(i).permutation(900)[:each] for i in range(n_latents)])
    assert abs(chi_square(biased.reshape(-1), n_cells, each) - n_cells) > spread  # a sample without the last tenth
    assert abs(chi_square(np.tile(cells[0], n_latents), n_cells, each) - n_cells) > spread  # the same for all


def held(tally: Tally) -> int:
    """Bytes of all arrays that a tally holds on to, also those that wait."""
    keepers = [*tally.sample.values(), *tally.top.values()]
    arrays = [a for a in vars(tally).values() if isinstance(a, np.ndarray)]
    arrays += [a for keeper in keepers for a in (keeper.kept, keeper.limit)]
    return sum(a.nbytes for a in arrays) + sum(a.nbytes for k in keepers for pair in k._waiting for a in pair)


def test_memory_is_fixed_for_a_latent_whatever_the_text():
    d_sae, waiting = 2000, 6 * 12 * interp.evidence.tally.PENDING
    sizes = []
    for l0, n_tokens in ((4, 512), (64, 512), (64, 8192)):
        tally, draw = Tally(d_sae, 256, Sizes(), 0), np.random.default_rng(0)
        for block in range(n_tokens // 512):
            ids = torch.from_numpy(np.sort(draw.permuted(np.tile(np.arange(d_sae), (512, 1)), axis=1)[:, :l0], 1))
            codes = SparseLatents(torch.arange(0, 512 * l0 + 1, l0), ids.reshape(-1), torch.ones(512 * l0), d_sae)
            rows, places = np.repeat([0, 1], 256), np.tile(np.arange(256), 2)
            tally.add(codes, rows, places, np.array([block, -block - 1]), np.array([0, 2]), 2 * block + np.arange(2))
            assert held(tally) <= 8192 * d_sae + waiting
        saved = sum(tensor.numel() * tensor.element_size() for tensor in tally.state().values())
        assert saved <= 8192 * d_sae
        sizes.append(saved)
    assert len(set(sizes)) == 1


def test_the_largest_positions_fit():
    tally = Tally(1, 256, SMALL, 0)
    codes = SparseLatents(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([2.0]), 1)
    last = 2**32 // 256 - 1
    tally.add(codes, np.array([0]), np.array([255]), np.array([5]), np.array([2]), np.array([last]))
    found = Evidence(tally.state())
    assert found.places("sample", "test", 0).tolist() == found.places("top", "test", 0).tolist() == [2**32 - 1]


def test_bins_begin_at_their_edges():
    edges = bin_edges()
    assert len(edges) == BINS
    values = np.array([v for edge in edges for v in (edge, np.nextafter(np.float32(edge), np.float32(0)))], np.float32)
    tally = Tally(1, 256, SMALL, 0)
    codes = SparseLatents(
        torch.arange(len(values) + 1), torch.zeros(len(values), dtype=torch.int64), torch.from_numpy(values), 1
    )
    zeros = np.zeros(len(values), np.int64)
    tally.add(codes, zeros, np.arange(len(values)), np.array([1]), np.array([0]), np.array([0]))
    histogram = tally.histogram[0].tolist()
    assert histogram == [3] + [2] * (BINS - 2) + [1]  # what is below the first edge falls into the first bin
