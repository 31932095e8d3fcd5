"""The evidence pass: the codes of a text into a tally, resumable and on any number of ranks.

    evidence/pass-R.safetensors      what rank R has gathered so far, and of which blocks
    evidence/latents/                the merged tally of all blocks, once all are done
    evidence/codes/                  optional: every code, one shard a block

Rows come longest first, in blocks of about 4,096 tokens. A block's codes enter one tally once: a file whose blocks are
all in another one was merged into it already. So a kill at any moment loses a minute, and the result is the same bits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray

from interp.evidence.codes import Codes, KeyedCodes, block_tensors, row_blocks
from interp.evidence.corpus import Corpus
from interp.evidence.tally import Evidence, Sizes, Tally
from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.files import FolderLock, load_tensors, read_json, remove_stale, save_tensors, write_json
from sae.base.progress import UNWATCHED, Watch
from sae.base.room import Need, check_room
from sae.base.store import META, Shards, ShardWriter, remove_damaged
from sae.parallel import agreement, ranks

VERSION = 2  # raise it whenever the same rows would give other evidence, or other files
SAVE_EVERY_S = 60.0
SAVING_SHARE = 0.1  # of the time; what is saved grows with the coder
POSITIONS = 2**32
HEADER, LATENTS, CODES = "evidence.json", "latents", "codes"


@dataclass(frozen=True)
class Keep:
    """What is kept of a text."""

    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    store: bool = False
    """Whether all codes are kept too (`interp.evidence.codes.StoredCodes` reads them)."""


def gather_evidence(codes: KeyedCodes, corpus: Corpus, folder: Path, keep: Keep, watch: Watch = UNWATCHED) -> Evidence:
    """Returns the evidence of every latent on the whole corpus, from `folder` as far as it is there.

    `codes` are those of this corpus. Raises as `check_evidence` does, and Stopped (everything saved) when asked to
    stop. Another process that gathers in the same folder is waited for.
    """
    first = ranks.rank() == 0
    with held_with_ranks(folder, watch):
        with agreement.together():
            made_from = check_evidence(codes, corpus, folder, keep)
            if first and not (folder / HEADER).is_file():
                write_json(folder / HEADER, made_from)
            corpus.key = made_from["rows"]  # as this folder calls it
            if watch.repair and first:
                _repair(folder, made_from)
        new_tally = partial(Tally, codes.d_sae, corpus.context_length, keep.sizes, keep.seed)
        work = _Pass(codes, corpus, folder, new_tally, watch)
        part = str(ranks.rank())
        merged = ShardWriter(folder / LATENTS, "evidence", made_from, part)
        kept = ShardWriter(folder / CODES, "codes", made_from, part) if keep.store else None
        if not merged.done or (kept is not None and len(kept.done) < len(work.groups)):
            work.encode(kept, all_tallied=bool(merged.done))
        with agreement.together():
            if first:
                if not merged.done:
                    merged.write(0, work.merged().state())
                merged.finish({})
                if kept is not None:
                    kept.finish({})
                for path in _passes(folder):
                    path.unlink()
    return Evidence(Shards(folder / LATENTS, "evidence", made_from).read(0))


def stored_evidence(folder: Path) -> Evidence | None:
    """Returns the evidence that a finished pass left in a folder, mapped, or None where there is none."""
    there = (folder / LATENTS / META).is_file()
    return Evidence(Shards(folder / LATENTS, "evidence", verify=False).read(0)) if there else None


class _Pass:
    """The blocks of a corpus on their way into tallies."""

    def __init__(
        self, codes: Codes, corpus: Corpus, folder: Path, new_tally: Callable[[], Tally], watch: Watch
    ) -> None:
        self.codes, self.corpus, self.folder, self.new_tally, self.watch = codes, corpus, folder, new_tally, watch
        self.groups = row_blocks(corpus, corpus.kept)

    def encode(self, kept: ShardWriter | None, all_tallied: bool) -> None:
        """Encodes this rank's share of the blocks that are in no tally yet, or whose codes are to be stored."""
        rank, tallied = ranks.rank(), np.ones(len(self.groups), bool)
        tally, own = self.new_tally(), self.folder / f"pass-{rank}.safetensors"
        if not all_tallied:
            tallied = self._tallied(tally)
        done_before = range(len(self.groups)) if kept is None else set(kept.done)
        missing = [n for n in range(len(self.groups)) if not tallied[n] or n not in done_before]
        mine = missing[rank :: ranks.world_size()]
        done = tallied & (rank == 0)
        stage = self.watch.stage("evidence", len(mine), "blocks", visible=rank == 0)
        due = time.monotonic() + SAVE_EVERY_S
        with stage as progress, agreement.together():
            for count, number in enumerate(mine, 1):
                rows = self.groups[number]
                coded = self.codes.read(rows)
                if kept is not None and number not in done_before:
                    size = kept.write(number, block_tensors(coded, rows))["bytes"]
                    if count == 1:  # all blocks are of about one size
                        check_room(Need("run_dir", self.folder, size * (len(missing) - 1)))
                if not tallied[number]:
                    names, splits = self.corpus.name[rows], self.corpus.split[rows]
                    tally.add(coded.latents, coded.rows, coded.places, names, splits, rows)
                    done[number] = True
                progress.update(count)
                now, stop = time.monotonic(), self.watch.should_stop()
                if not all_tallied and (stop or now > due or count == len(mine)):
                    _save(own, tally, done)
                    due = time.monotonic() + max(SAVE_EVERY_S, (time.monotonic() - now) / SAVING_SHARE)
                if stop and count < len(mine):
                    raise Stopped("during the evidence pass; the same command goes on")

    def merged(self) -> Tally:
        """Returns the tally of all blocks; DataError if some are in none."""
        tally = self.new_tally()
        done = self._take_in(tally)
        if not done.all():
            raise DataError(f"{self.folder}: {int((~done).sum())} blocks are missing; run the command again")
        return tally

    def _tallied(self, tally: Tally) -> Bool[ndarray, "blocks"]:
        """Has the first rank take into its tally all that was gathered before; returns which blocks that is."""
        first = self.folder / "pass-0.safetensors"
        with agreement.together():
            if ranks.rank() == 0:
                _save(first, tally, self._take_in(tally))
                for path in _passes(self.folder):
                    if path != first:
                        path.unlink()
        with agreement.together():  # no rank goes on before all know what is done
            return load_tensors(first)["done"].numpy().copy()

    def _take_in(self, tally: Tally) -> Bool[ndarray, "blocks"]:
        """Merges all that was gathered into a tally and returns which blocks that is."""
        done = np.zeros(len(self.groups), bool)
        for path in _passes(self.folder):
            state = load_tensors(path)
            blocks_there = state.pop("done").numpy()
            if not (blocks_there & ~done).any():
                continue
            tally.merge(state)
            done |= blocks_there
        return done


@contextmanager
def held_with_ranks(folder: Path, watch: Watch) -> Iterator[None]:
    """Holds a folder for this process and its ranks; waits for whoever holds it, until asked to stop."""
    with ExitStack() as held:
        with agreement.together():
            if ranks.rank() == 0:
                held.enter_context(FolderLock(folder, watch))
                remove_stale(folder)
        yield


def check_evidence(codes: KeyedCodes, corpus: Corpus, folder: Path, keep: Keep) -> dict[str, Any]:
    """Returns what the evidence in a folder is made from, or would be; nothing is written.

    Raises ConfigError if there is too much text, or the folder holds evidence of something else. By what names model
    and text are called does not count.
    """
    if corpus.n_rows * corpus.context_length > POSITIONS:
        raise ConfigError(
            f"evidence.tokens: {corpus.n_rows:,} rows of {corpus.context_length} tokens are more than {POSITIONS:,} "
            "places, padding counted; take fewer tokens, or a shorter text.context_length for short documents"
        )
    made_from = codes.fingerprint() | {"version": VERSION, "rows": corpus.key, "text": corpus.content}
    made_from |= {"sizes": asdict(keep.sizes), "seed": keep.seed}
    if not (folder / HEADER).is_file():
        return made_from
    there = read_json(folder / HEADER)
    if not isinstance(there, dict):
        raise DataError(f"{folder / HEADER} is damaged: it holds no object; delete {folder}")
    if there.get("version", 0) > VERSION:
        raise DataError(f"{folder}: version {there['version']} is newer than {VERSION}; upgrade sae-interp")
    differing = sorted(key for key, (old, new) in _compared(there, made_from).items() if old != new)
    if differing:
        raise ConfigError(
            f"run_dir: {folder} holds evidence made with another {', '.join(differing)} than there is now; go on where "
            "it was made, or explain in another folder (sae-explain --run-dir)"
        )
    return there


def _compared(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what must be equal, by name: older evidence tells of its text only by a key that names the model too."""
    keys = here.keys() - {"rows" if "text" in there else "text"}
    return {key: tuple(_nameless(one.get(key)) for one in (there, here)) for key in keys}


def _nameless(value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in ("model", "revision")} if isinstance(value, dict) else value


def _repair(folder: Path, made_from: dict[str, Any]) -> None:
    for name, kind in ((LATENTS, "evidence"), (CODES, "codes")):
        remove_damaged(folder / name, kind, made_from)
    for path in _passes(folder):
        try:
            load_tensors(path)
        except DataError:
            path.unlink()


def _passes(folder: Path) -> list[Path]:
    return sorted(folder.glob("pass-*.safetensors"))


def _save(path: Path, tally: Tally, done: Bool[ndarray, "blocks"]) -> None:
    save_tensors(path, tally.state() | {"done": torch.from_numpy(done)})
