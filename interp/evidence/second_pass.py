"""The second pass: every chosen place again, with all of its left context, and what each latent does around it.

Places are the cells kept by the evidence pass, and candidates for silent windows: tokens on which a latent usually
fires, places where its neighbors fire, and one pool of places drawn by hash, which all latents share. A row is visited
at most once, whatever lies in it. Results are written in shards, ordered by latent, so reading one latent is a slice of
each; a shard is also what a restart need not do again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from numpy import ndarray

from interp.evidence.codes import Codes, blocks
from interp.evidence.corpus import Corpus
from interp.evidence.first_pass import alone
from interp.evidence.tally import Evidence
from interp.records import SPLITS
from sae.base.errors import Stopped
from sae.base.progress import Progress
from sae.base.seeding import generator
from sae.base.store import Shards, ShardWriter, fingerprint_key, remove_damaged
from sae.parallel import collectives

KIND = "windows"
REACH = 31  # tokens looked at on either side: a window of 32 may lie anywhere around its place
SPAN = 2 * REACH + 1
KINDS = ("sample", "top", "same_token", "neighbor")
POOL = {"explain": 512, "valid": 512, "test": 2048}
CANDIDATES = 64  # places looked at for a tier of one latent in one part, of which most turn out not to be silent
TOKENS_OF_LATENT = 10  # a latent's usual tokens: those of most of its peaks
PLACES_OF_TOKEN = 256  # of every such token and part, so many places are remembered
ROWS_AT_ONCE = 4096  # that are searched for them
SHARD_BLOCKS = 16


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


class Spots(NamedTuple):
    """What one latent does at its places, in the order of the plan."""

    kind: Int[ndarray, "m"]
    split: Int[ndarray, "m"]
    position: Int[ndarray, "m"]
    values: Float[ndarray, "m span"]
    """From 31 tokens before the place to 31 behind it."""
    pool: Bool[ndarray, "pool span"]
    """Where it fires around the places of the shared pool."""


def plan(evidence: Evidence, corpus: Corpus, latents: Int[ndarray, "n"], neighbors: list[list[int]], seed: int) -> Plan:
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


def visit(
    codes: Codes,
    corpus: Corpus,
    plan: Plan,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
    repair: bool = False,
) -> "Visits":
    """Returns what was found at the places of a plan, computed now as far as it is not in `folder`.

    Each plan has a folder of its own in there, so that other latents can be looked at later. With `repair`, damaged
    files are found and made again. Raises Stopped, with all finished shards kept, when asked to stop.
    """
    made_from = {"plan": _digest(plan), "rows": corpus.key}
    folder = folder / KIND / fingerprint_key(made_from)
    context = corpus.context_length
    rows = np.unique(np.concatenate([plan.position, plan.pool]) // context)
    rows = rows[np.argsort(-corpus.length[rows], kind="stable")]
    groups = blocks(corpus, rows)
    batches = [groups[i : i + SHARD_BLOCKS] for i in range(0, len(groups), SHARD_BLOCKS)]
    places, pool = _ByRow.of(plan.position, context), _ByRow.of(plan.pool, context)
    rank = np.full(codes.d_sae, -1, np.int32)
    rank[plan.latents] = np.arange(len(plan.latents))
    with alone(folder, should_stop):
        with collectives.together():
            if repair and collectives.rank() == 0:
                remove_damaged(folder, KIND, made_from)
        with collectives.together():  # no rank goes on before all know what is done
            writer = ShardWriter(folder, KIND, made_from, str(collectives.rank()))
        missing = [number for number in range(len(batches)) if number not in writer.done]
        mine = missing[collectives.rank() :: collectives.world_size()]
        progress = Progress("windows", sum(len(batches[i]) for i in mine), "blocks", visible=collectives.rank() == 0)
        with collectives.together():
            for number in mine:
                parts = []
                for group in batches[number]:
                    if should_stop():
                        raise Stopped("while visiting windows; the same command goes on")
                    parts.append(_visit(codes, context, plan, group, rank, places, pool))
                    progress.update(progress.n + 1)
                writer.write(number, {name: torch.from_numpy(array) for name, array in _joined(parts).items()})
            progress.close()
        with collectives.together():
            if collectives.rank() == 0:
                writer.finish({})
    return Visits(plan, folder, made_from)


class Visits:
    """The finished second pass, read latent by latent."""

    def __init__(self, plan: Plan, folder: Path, made_from: dict[str, str]) -> None:
        self.plan = plan
        shards = Shards(folder, KIND, made_from)
        self._shards = [{k: t.numpy() for k, t in shards.read(i).items()} for i in range(len(shards))]
        self._ends = [np.append(0, np.cumsum(shard["count"], dtype=np.int64)) for shard in self._shards]

    def spots(self, latent: int) -> Spots:
        """Returns what one of the plan's latents does; KeyError if it is none of them."""
        at = int(np.searchsorted(self.plan.latents, latent))
        if at >= len(self.plan.latents) or self.plan.latents[at] != latent:
            raise KeyError(latent)
        here = np.array([at, at + 1], np.int32)  # of another type, all latents would be copied
        entries, values = [], []
        pool = np.zeros((len(self.plan.pool), SPAN), bool)
        for shard, ends in zip(self._shards, self._ends, strict=True):
            low, high = np.searchsorted(shard["latent"], here)
            counts = shard["count"][low:high].astype(np.int64)
            dense = np.zeros((high - low, SPAN), np.float32)
            nonzero = slice(ends[low], ends[high])
            dense[np.repeat(np.arange(high - low), counts), shard["at"][nonzero]] = shard["value"][nonzero]
            entries.append(shard["entry"][low:high])
            values.append(dense)
            low, high = np.searchsorted(shard["pool_latent"], here)
            pool[shard["pool_entry"][low:high], shard["pool_at"][low:high]] = True
        entry = np.concatenate(entries)
        order = entry.argsort()
        entry = entry[order]
        return Spots(
            self.plan.kind[entry],
            self.plan.split[entry],
            self.plan.position[entry],
            np.concatenate(values)[order],
            pool,
        )


def _visit(
    codes: Codes,
    context: int,
    plan: Plan,
    group: Int[ndarray, "rows"],
    rank: Int[ndarray, "d_sae"],
    places: "_ByRow",
    pool: "_ByRow",
) -> dict[str, ndarray]:
    """Returns what is found in some rows: by entry how many values there are, where and which; the same of the pool."""
    coded = codes.read(group)
    ids, values = coded.latents.ids.cpu().numpy(), coded.latents.values.float().cpu().numpy()
    token = np.repeat(np.arange(len(coded.rows)), np.diff(coded.latents.offsets.cpu().numpy()))
    chosen = np.flatnonzero((rank[ids] >= 0) & (values != 0))
    spot = coded.rows[token[chosen]] * context + coded.places[token[chosen]]  # ascends with the tokens
    latent, values = rank[ids[chosen]].astype(np.int64), values[chosen]

    entry, where = places.here(group, context)
    key = latent * (len(group) * context) + spot
    order = key.argsort(kind="stable")
    first = plan.latent[entry] * (len(group) * context)
    low, high = _around(key[order], first, where, context)
    found = order[_ranges(low, high)]
    pool_entry, pool_where = pool.here(group, context)
    pool_low, pool_high = _around(spot, np.zeros(len(pool_where), np.int64), pool_where, context)
    hits, fires = _ranges(pool_low, pool_high), pool_high - pool_low
    return {
        "latent": plan.latent[entry],
        "entry": entry.astype(np.int64),
        "count": (high - low).astype(np.uint8),
        "at": (spot[found] - np.repeat(where, high - low) + REACH).astype(np.uint8),
        "value": values[found].astype(np.float32),
        "pool_latent": latent[hits].astype(np.int32),
        "pool_entry": np.repeat(pool_entry, fires).astype(np.int32),
        "pool_at": (spot[hits] - np.repeat(pool_where, fires) + REACH).astype(np.uint8),
    }


def _ranges(low: Int[ndarray, "m"], high: Int[ndarray, "m"]) -> Int[ndarray, "total"]:
    """Returns low, low + 1, ... high - 1 of every pair, one after the other."""
    counts = high - low
    return np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


class _ByRow(NamedTuple):
    """Positions, and which of them lie in a row."""

    positions: Int[ndarray, "m"]
    order: Int[ndarray, "m"]
    rows: Int[ndarray, "m"]
    """In that order."""

    @staticmethod
    def of(positions: Int[ndarray, "m"], context: int) -> "_ByRow":
        """Returns positions, put in order."""
        rows = positions // context
        order = rows.argsort(kind="stable")
        return _ByRow(positions, order, rows[order])

    def here(self, group: Int[ndarray, "rows"], context: int) -> tuple[Int[ndarray, "some"], Int[ndarray, "some"]]:
        """Returns the entries in some rows, and where: number of the row among these times length plus place."""
        low, high = np.searchsorted(self.rows, group), np.searchsorted(self.rows, group, side="right")
        entry = self.order[_ranges(low, high)]
        return entry, np.repeat(np.arange(len(group)), high - low) * context + self.positions[entry] % context


def _around(
    keys: Int[ndarray, "nnz"], first: Int[ndarray, "m"], where: Int[ndarray, "m"], context: int
) -> tuple[Int[ndarray, "m"], Int[ndarray, "m"]]:
    """Returns the range of ascending keys within reach of every place, in its own row; `first` is added to both."""
    row = where // context * context
    low = np.searchsorted(keys, first + np.maximum(where - REACH, row))
    high = np.searchsorted(keys, first + np.minimum(where + REACH, row + context - 1), side="right")
    return low, high


def _joined(parts: list[dict[str, ndarray]]) -> dict[str, ndarray]:
    """Returns the parts as one, ordered by latent."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = whole["latent"].argsort(kind="stable")
    ends = np.cumsum(whole["count"], dtype=np.int64)
    flat = _ranges((ends - whole["count"])[order], ends[order])
    pool = whole["pool_latent"].argsort(kind="stable")
    ordered = {name: whole[name][order] for name in ("latent", "entry", "count")}
    ordered |= {name: whole[name][flat] for name in ("at", "value")}
    return ordered | {name: whole[name][pool] for name in ("pool_latent", "pool_entry", "pool_at")}


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
        kept.append(_fewest([(token, part, _draws(position, seed), position)]))
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


def _draws(positions: Int[ndarray, "m"], seed: int) -> UInt[ndarray, "m"]:
    x = (positions.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(27))


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
            drawn = draws[np.sort(np.unique(draws, return_index=True)[1])][: POOL[split]]
        index = np.searchsorted(ends, drawn, side="right")
        places = drawn - np.append(0, ends)[index] + corpus.first
        positions.append(rows[index] * corpus.context_length + places)
        parts.append(np.full(len(drawn), number, np.int32))
    return np.concatenate(positions), np.concatenate(parts)


def _digest(plan: Plan) -> str:
    columns = (plan.latents, plan.latent, plan.kind, plan.split, plan.position, plan.pool)
    return fingerprint_key({"columns": [hashlib.sha256(c.tobytes()).hexdigest() for c in columns]})
