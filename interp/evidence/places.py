"""Which places the second pass visits: kept cells of each latent, and candidates for its silent windows.

Candidates are tokens on which a latent usually fires, places where its neighbors fire, and one pool of places drawn by
hash, which all latents share.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from interp.evidence.corpus import Corpus
from interp.evidence.tally import Evidence
from interp.records import SPLITS
from sae.base.seeding import GOLDEN, generator, mixed
from sae.text.packing import PADDING

KINDS = ("sample", "top", "same_token", "neighbor")
POOL = {"explain": 512, "valid": 512, "test": 2048}
CANDIDATES = 64  # places looked at for a tier of one latent in one part, of which most turn out not to be silent
TOKENS_OF_LATENT = 10  # a latent's usual tokens: those of most of its peaks
PLACES_OF_TOKEN = 256  # of every such token and part, so many places are remembered
ROWS_AT_ONCE = 4096  # that are searched for them
PEAKS = {"explain": 64, "valid": 32, "test": 64}  # places looked at for all that fires, about as the parts are large


@dataclass(frozen=True)
class Plan:
    """The places to visit: one entry each for (latent, kind, part, position in the corpus)."""

    latents: Int[ndarray, "n_latents"]
    """The latents in question, ascending."""
    latent: Int[ndarray, "m"]
    """By entry, a place in `latents`."""
    kind: Int[ndarray, "m"]
    split: Int[ndarray, "m"]
    position: Int[ndarray, "m"]
    pool: Int[ndarray, "pool"]
    """Positions of the shared pool."""
    pool_split: Int[ndarray, "pool"]

    def peaks(self) -> Int[ndarray, "some"]:
        """Returns the entries at which it is looked at what else fires: the first ones of each latent's sample."""
        sampled = np.flatnonzero(self.kind == KINDS.index("sample"))
        group = self.latent[sampled].astype(np.int64) * len(SPLITS) + self.split[sampled]
        turn = np.arange(len(group)) - np.searchsorted(group, group)  # those of a latent and part come one by one
        return sampled[turn < np.array(list(PEAKS.values()))[self.split[sampled]]]


def plan_places(
    evidence: Evidence, corpus: Corpus, latents: Int[ndarray, "n"], neighbors: list[list[int]], seed: int
) -> Plan:
    """Returns the places to visit for some latents, whose neighbors are given in their order."""
    found: list[tuple[int, int, int, ndarray]] = [(0, 0, 0, np.zeros(0, np.int64))]
    usual = [_usual_tokens(evidence, corpus, int(latent)) for latent in latents]
    where = _occurrences(corpus, sorted({token for tokens in usual for token in tokens}), seed)
    for i, latent in enumerate(latents.tolist()):
        for s, split in enumerate(SPLITS):
            sample, top = (evidence.places(kind, split, latent) for kind in ("sample", "top"))
            found += [(i, 0, s, sample), (i, 1, s, np.setdiff1d(top, sample))]
            if split != "test":  # elsewhere silent windows are drawn at random only
                continue
            same = [where[token][s] for token in usual[i]]
            theirs = [evidence.places("sample", split, other) for other in neighbors[i]]
            for kind, candidates in ((2, _in_turn(same)), (3, _in_turn(theirs))):
                found.append((i, kind, s, candidates[~np.isin(candidates, np.concatenate([sample, top]))]))
    latent, kind, part = np.repeat(
        np.array([key for *key, _ in found], np.int32), [len(places) for *_, places in found], axis=0
    ).T
    return Plan(latents, latent, kind, part, np.concatenate([places for *_, places in found]), *_pool(corpus, seed))


def _usual_tokens(evidence: Evidence, corpus: Corpus, latent: int) -> list[int]:
    """Returns the tokens of most of the latent's peaks in the explain part, the most frequent first."""
    positions = evidence.places("sample", "explain", latent)
    found, counts = np.unique(tokens_at(corpus, positions), return_counts=True)
    return found[np.argsort(-counts, kind="stable")][:TOKENS_OF_LATENT].tolist()


def tokens_at(corpus: Corpus, positions: Int[ndarray, "m"]) -> Int[ndarray, "m"]:
    """Returns the token at every position."""
    rows, index = np.unique(positions // corpus.context_length, return_inverse=True)
    return corpus.tokens(rows).numpy()[index, positions % corpus.context_length]


def _occurrences(corpus: Corpus, tokens: list[int], seed: int) -> dict[int, list[Int[ndarray, "_some"]]]:
    """Returns by token and part up to `PLACES_OF_TOKEN` places where it stands, drawn by hash, in that order."""
    wanted = np.array(tokens, np.int64)
    kept: list[tuple[ndarray, ndarray, ndarray, ndarray]] = []  # token, part, draw, position
    for start in range(0, len(corpus.kept), ROWS_AT_ONCE):
        rows = corpus.kept[start : start + ROWS_AT_ONCE]
        ids = corpus.tokens(rows).numpy()
        ids[:, : corpus.first] = -1
        row, place = np.isin(ids, wanted).nonzero()
        token, part = ids[row, place], corpus.split[rows[row]]
        position = rows[row] * corpus.context_length + place
        draw = mixed((position.astype(np.uint64) + np.uint64(seed + 1)) * GOLDEN, steps=1)
        kept.append(_fewest([(token, part, draw, position)]))
        if len(kept) == 16:
            kept = [_fewest(kept)]
    token, part, _, position = _fewest(kept) if kept else (np.zeros(0, np.int64),) * 4
    bounds = np.searchsorted(token * len(SPLITS) + part, np.add.outer(wanted * len(SPLITS), np.arange(len(SPLITS) + 1)))
    return {
        t: [position[b[s] : b[s + 1]] for s in range(len(SPLITS))] for t, b in zip(tokens, bounds.tolist(), strict=True)
    }


def _fewest(parts: list[tuple[ndarray, ndarray, ndarray, ndarray]]) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Returns the first `PLACES_OF_TOKEN` draws of every (token, part), in order."""
    token, part, draw, position = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((draw, part, token))
    token, part, draw, position = (column[order] for column in (token, part, draw, position))
    group = token.astype(np.int64) * len(SPLITS) + part
    place = np.arange(len(group)) - np.searchsorted(group, group)
    few = place < PLACES_OF_TOKEN
    return token[few], part[few], draw[few], position[few]


def _in_turn(lists: list[Int[ndarray, "_some"]]) -> Int[ndarray, "few"]:
    """Returns the first of each list, then the second of each, until there are enough candidates."""
    longest = max(map(len, lists), default=0)
    table = np.full((len(lists), longest), -1, np.int64)
    for row, found in zip(table, lists, strict=True):
        row[: len(found)] = found
    flat = table.T.reshape(-1)
    flat = flat[flat >= 0]
    _, index = np.unique(flat, return_index=True)
    return flat[np.sort(index)][:CANDIDATES]


def _pool(corpus: Corpus, seed: int) -> tuple[Int[ndarray, "pool"], Int[ndarray, "pool"]]:
    """Returns positions drawn from all tokens of each part alike, and their parts."""
    positions, parts = [], []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(corpus.split == number)
        ends = np.cumsum(corpus.length[rows] - corpus.first)
        total = int(ends[-1]) if len(ends) else 0
        drawn = np.zeros(0, np.int64)
        if total:  # twice as many as needed, since some are drawn twice
            draws = torch.randint(total, (2 * POOL[split],), generator=generator(seed, "silent windows", split)).numpy()
            drawn = draws[np.sort(np.unique(draws, return_index=True)[1])]
        index = np.searchsorted(ends, drawn, side="right")
        places = drawn - np.append(0, ends)[index] + corpus.first
        found = rows[index] * corpus.context_length + places
        found = found[tokens_at(corpus, found) > PADDING][: POOL[split]]  # of context only, nothing is known
        positions.append(found)
        parts.append(np.full(len(found), number, np.int32))
    return np.concatenate(positions), np.concatenate(parts)
