"""The second pass: every chosen place again, with all of its left context, and what each latent does around it.

The places are those of a plan (`interp.evidence.places`). A row is visited at most once, whatever lies in it. Results
are written in shards, ordered by latent, so reading one latent is a slice of each; a shard is also what a restart need
not do again. Blocks of the first pass that are visited almost whole are read as then: their codes may be kept.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from numpy import ndarray

from interp.evidence.codes import Codes, row_blocks
from interp.evidence.corpus import Corpus
from interp.evidence.first_pass import held_with_ranks
from interp.evidence.places import Plan
from sae.base.progress import UNWATCHED, Watch
from sae.base.store import Shards, ShardWriter, fingerprint_key, remove_damaged
from sae.parallel import agreement, ranks

KIND = "windows"
VERSION = 2  # raise it whenever a shard would hold other rows
REACH = 31  # tokens looked at on either side: a window of 32 may lie anywhere around its place
SPAN = 2 * REACH + 1
SHARD_BLOCKS = 16
WHOLE = 0.9  # of the rows of a block of the first pass are visited: then all are read, as at most a tenth is in vain


class Spots(NamedTuple):
    """What one latent does at its places, in the order of the plan."""

    kind: Int[ndarray, "m"]
    split: Int[ndarray, "m"]
    position: Int[ndarray, "m"]
    values: Float[ndarray, "m span"]
    """From 31 tokens before the place to 31 behind it."""
    pool: Bool[ndarray, "pool span"]
    """Where it fires around the places of the shared pool."""


def visit_places(codes: Codes, corpus: Corpus, plan: Plan, folder: Path, watch: Watch = UNWATCHED) -> "Visits":
    """Returns what was found at the places of a plan, computed now as far as it is not in `folder`.

    Each plan has a folder of its own in there, so that other latents can be looked at later. Raises Stopped, with all
    finished shards kept, when asked to stop.
    """
    made_from = {"version": VERSION, "plan": _digest(plan), "rows": corpus.key}
    folder = folder / KIND / fingerprint_key(made_from)
    context, first = corpus.context_length, ranks.rank() == 0
    rows = np.unique(np.concatenate([plan.position, plan.pool]) // context)
    groups, visitor = _blocks_to_visit(corpus, rows), _Visitor(codes, context, plan)
    batches = [groups[i : i + SHARD_BLOCKS] for i in range(0, len(groups), SHARD_BLOCKS)]
    with held_with_ranks(folder, watch):
        with agreement.together():
            if watch.repair and first:
                remove_damaged(folder, KIND, made_from)
        with agreement.together():  # no rank goes on before all know what is done
            writer = ShardWriter(folder, KIND, made_from, str(ranks.rank()))
        missing = [number for number in range(len(batches)) if number not in writer.done]
        mine = missing[ranks.rank() :: ranks.world_size()]
        stage = watch.stage("windows", sum(len(batches[i]) for i in mine), "blocks", visible=first)
        with stage as progress, agreement.together():
            for number in mine:
                parts = []
                for group in batches[number]:
                    watch.poll("while visiting windows; the same command goes on")
                    parts.append(visitor.visit(group))
                    progress.update(progress.n + 1)
                writer.write(number, {name: torch.from_numpy(array) for name, array in _joined(parts).items()})
        with agreement.together():
            if first:
                writer.finish({})
    return Visits(plan, folder, made_from)


def _blocks_to_visit(corpus: Corpus, rows: Int[ndarray, "rows"]) -> list[Int[ndarray, "_some"]]:
    """Returns blocks that hold these rows, each once: those of the first pass, where they are visited almost whole."""
    wanted = np.zeros(corpus.n_rows, bool)
    wanted[rows] = True
    whole = [block for block in row_blocks(corpus, corpus.kept) if wanted[block].mean() >= WHOLE]
    for block in whole:
        wanted[block] = False
    rest = rows[wanted[rows]]
    return [*whole, *row_blocks(corpus, rest[np.argsort(-corpus.length[rest], kind="stable")])]


class Visits:
    """The finished second pass, read latent by latent."""

    def __init__(self, plan: Plan, folder: Path, made_from: dict[str, str]) -> None:
        self.plan = plan
        shards = Shards(folder, KIND, made_from)
        self._shards = [{k: t.numpy() for k, t in shards.read(i).items()} for i in range(len(shards))]
        self._ends = [np.append(0, np.cumsum(shard["count"], dtype=np.int64)) for shard in self._shards]
        self._peaks = plan.peaks()
        self._knows = all("peak" in shard for shard in self._shards)  # as shards of older versions do not
        counts = [shard["peak_count"] for shard in self._shards] if self._knows else []
        self._peak_ends = [np.append(0, np.cumsum(count, dtype=np.int64)) for count in counts]

    def spots(self, latent: int) -> Spots:
        """Returns what one of the plan's latents does; KeyError if it is none of them."""
        at = self._place(latent)
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

    def beside(self, latent: int) -> tuple[Integer[ndarray, "nnz"], int] | None:
        """Returns the ids of all that fires at peaks of a latent, itself among them, and how many peaks these are.

        None where that is not kept, since an older version visited some of them; KeyError as `spots`.
        """
        at = self._place(latent)
        if not self._knows:
            return None
        low, high = np.searchsorted(self.plan.latent[self._peaks], np.array([at, at + 1], self.plan.latent.dtype))
        positions, found = self.plan.position[self._peaks[low:high]], [np.zeros(0, np.int64)]
        for shard, ends in zip(self._shards, self._peak_ends, strict=True):
            place = np.searchsorted(shard["peak"], positions)
            place = place[place < np.searchsorted(shard["peak"], positions, side="right")]
            found.append(shard["peak_ids"][_ranges(ends[place], ends[place + 1])])
        return np.concatenate(found), len(positions)

    def _place(self, latent: int) -> int:
        at = int(np.searchsorted(self.plan.latents, latent))
        if at >= len(self.plan.latents) or self.plan.latents[at] != latent:
            raise KeyError(latent)
        return at


class _Visitor:
    """Looks for the latents of a plan around its places."""

    def __init__(self, codes: Codes, context: int, plan: Plan) -> None:
        self.codes, self.context, self.plan = codes, context, plan
        self.places, self.pool = _ByRow.of(plan.position, context), _ByRow.of(plan.pool, context)
        self.peaks = _ByRow.of(np.unique(plan.position[plan.peaks()]), context)
        self.id_type = np.int16 if codes.d_sae < 2**15 else np.int32
        self.rank = np.full(codes.d_sae, -1, np.int32)
        self.rank[plan.latents] = np.arange(len(plan.latents))

    def visit(self, group: Int[ndarray, "rows"]) -> dict[str, ndarray]:
        """Returns what is found in some rows: by entry how many values, where and which; the same of the pool; and by
        peak the ids of all that fires there.
        """
        coded, context, plan = self.codes.read(group), self.context, self.plan
        ids, values = coded.latents.ids.cpu().numpy(), coded.latents.values.float().cpu().numpy()
        token = np.repeat(np.arange(len(coded.rows)), np.diff(coded.latents.offsets.cpu().numpy()))
        fires = values != 0
        if not fires.all():  # in the support without firing
            ids, values, token = ids[fires], values[fires], token[fires]
        peak, peak_where = self.peaks.here(group, context)
        spots = coded.rows * context + coded.places
        of_peak = np.searchsorted(spots, peak_where)
        of_peak[np.append(spots, -1)[of_peak] != peak_where] = -1  # masked now, by its norm
        peak_low, peak_high = (np.searchsorted(token, of_peak, side) for side in ("left", "right"))
        at_peaks = ids[_ranges(peak_low, peak_high)].astype(self.id_type)
        chosen = np.flatnonzero(self.rank[ids] >= 0)
        spot = coded.rows[token[chosen]] * context + coded.places[token[chosen]]  # ascends with the tokens
        latent, values = self.rank[ids[chosen]].astype(np.int64), values[chosen]

        entry, where = self.places.here(group, context)
        key = latent * (len(group) * context) + spot
        order = key.argsort(kind="stable")
        first = plan.latent[entry] * (len(group) * context)
        low, high = _around(key[order], first, where, context)
        found = order[_ranges(low, high)]
        pool_entry, pool_where = self.pool.here(group, context)
        pool_low, pool_high = _around(spot, np.zeros(len(pool_where), np.int64), pool_where, context)
        hits, pool_fires = _ranges(pool_low, pool_high), pool_high - pool_low
        return {
            "latent": plan.latent[entry],
            "entry": entry.astype(np.int64),
            "count": (high - low).astype(np.uint8),
            "at": (spot[found] - np.repeat(where, high - low) + REACH).astype(np.uint8),
            "value": values[found].astype(np.float32),
            "pool_latent": latent[hits].astype(np.int32),
            "pool_entry": np.repeat(pool_entry, pool_fires).astype(np.int32),
            "pool_at": (spot[hits] - np.repeat(pool_where, pool_fires) + REACH).astype(np.uint8),
            "peak": self.peaks.positions[peak],
            "peak_count": (peak_high - peak_low).astype(np.int32),
            "peak_ids": at_peaks,
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
    """Returns the parts as one, ordered by latent, and what is of peaks by their position."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ordered = _by(whole, "latent", ("latent", "entry", "count"), "count", ("at", "value"))
    ordered |= _by(whole, "peak", ("peak", "peak_count"), "peak_count", ("peak_ids",))
    pool = whole["pool_latent"].argsort(kind="stable")
    return ordered | {name: whole[name][pool] for name in ("pool_latent", "pool_entry", "pool_at")}


def _by(
    whole: dict[str, ndarray], key: str, columns: tuple[str, ...], count: str, lists: tuple[str, ...]
) -> dict[str, ndarray]:
    """Returns columns in the order of one, and lists of which `count` says how long each is."""
    order, ends = whole[key].argsort(kind="stable"), np.cumsum(whole[count], dtype=np.int64)
    flat = _ranges((ends - whole[count])[order], ends[order])
    return {name: whole[name][order] for name in columns} | {name: whole[name][flat] for name in lists}


def _digest(plan: Plan) -> str:
    columns = (plan.latents, plan.latent, plan.kind, plan.split, plan.position, plan.pool)
    return fingerprint_key({"columns": [hashlib.sha256(c.tobytes()).hexdigest() for c in columns]})
