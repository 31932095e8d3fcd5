"""The evidence pass: rows through the language model and the coder, into a tally, resumable and on any number of ranks.

    evidence/pass-R.safetensors      what rank R has gathered so far, and of which blocks
    evidence/latents/                the merged tally of all blocks, once all are done
    evidence/codes/                  optional: every code, one shard a block

Rows come longest first, in blocks of about 4,096 tokens. A block's codes enter one tally once: a file whose blocks are
all in another one was merged into it already. So a kill at any moment loses a minute, and the result is the same bits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.corpus import Corpus
from interp.latents import Evidence, Sizes, Tally
from interp.subject import Subject
from sae import distributed
from sae.activations import capture, norm_mask, token_mask
from sae.errors import ConfigError, DataError, Stopped
from sae.files import FolderLock, load_tensors, read_json, remove_stale, save_tensors, write_json
from sae.progress import Progress
from sae.spec import SparseLatents
from sae.store import Shards, ShardWriter, fingerprint_key, repair

VERSION = 1  # raise it whenever the same rows would give other evidence
BLOCK_TOKENS = 4096
SAVE_EVERY_S = 60.0
SAVING_SHARE = 0.1  # of the time; what is saved grows with the coder
POSITIONS = 2**32
HEADER, LATENTS, CODES = "evidence.json", "latents", "codes"


class Coded(NamedTuple):
    """The codes of the unmasked tokens of some rows, by the per-token rule."""

    latents: SparseLatents
    rows: Int[ndarray, "n"]
    """By token: which of the rows."""
    places: Int[ndarray, "n"]
    """By token: where in the row."""


@torch.no_grad()
def read(
    subject: Subject, tokens: Int[Tensor, "rows context"]
) -> tuple[Float[Tensor, "n d_in"], Bool[Tensor, "rows context"]]:
    """Returns what the coder reads of rows of text, at the tokens that are not masked, and which these are."""
    lm, coder = subject.lm, subject.coder
    spec = coder.spec
    wanted = {site.name: site for site in (*spec.reads, *spec.writes)}
    sites = [s for n, s in wanted.items() if s in spec.reads or n in spec.mask.norm_limits]
    with subject.lock:
        seen = capture(lm, sites, tokens)
        keep = token_mask(tokens, spec.mask).to(lm.device) & norm_mask(seen, spec.mask).to(lm.device)
        x = torch.cat([seen[site.name][keep].float() for site in spec.reads], dim=-1)
    return x.to(coder.W_enc.device), keep


def encode(subject: Subject, tokens: Int[Tensor, "rows context"]) -> Coded:
    """Returns the codes of rows of text. Masked tokens (special, first, outliers by norm) have none."""
    with subject.lock:
        x, keep = read(subject, tokens)
        latents = subject.coder.encode(x)
    if not all(torch.isfinite(found).all() for found in (x, latents.values)):
        raise DataError(
            "activations: NaN or Inf in what the coder reads; the model is damaged, or its numbers are too large for "
            "model.dtype: use bfloat16 or float32"
        )
    rows, places = keep.nonzero().T.cpu().numpy()
    return Coded(latents, rows, places)


def blocks(corpus: Corpus, rows: Int[ndarray, "rows"]) -> list[Int[ndarray, "some"]]:
    """Returns rows in groups of about `BLOCK_TOKENS` tokens, padding counted; rows should come longest first."""
    groups, start = [], 0
    while start < len(rows):
        stop = start + max(1, BLOCK_TOKENS // int(corpus.length[rows[start]]))
        groups.append(rows[start:stop])
        start = stop
    return groups


def gather(
    subject: Subject,
    corpus: Corpus,
    folder: Path,
    sizes: Sizes,
    seed: int = 0,
    store: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    repair: bool = False,
) -> Evidence:
    """Returns the evidence of every latent on the whole corpus, from `folder` as far as it is there.

    With `store`, all codes are kept there too; with `repair`, damaged files are found and made again. Raises DataError
    if the folder holds evidence of something else, Stopped (everything saved) when asked to stop. Another process that
    gathers in the same folder is waited for.
    """
    check_readable(subject, corpus)
    made_from = fingerprint(subject, corpus, sizes, seed)
    groups, part = blocks(corpus, corpus.kept), str(distributed.rank())
    with alone(folder, should_stop):
        with distributed.together():
            _check(folder, made_from)
            if repair and distributed.rank() == 0:
                _repair(folder, made_from)
        merged = ShardWriter(folder / LATENTS, "evidence", made_from, part)
        codes = ShardWriter(folder / CODES, "codes", made_from, part) if store else None
        new_tally = partial(Tally, subject.coder.spec.d_sae, corpus.context_length, sizes, seed)
        if not merged.done or (codes is not None and len(codes.done) < len(groups)):
            _pass(subject, corpus, folder, groups, new_tally, bool(merged.done), codes, should_stop)
        with distributed.together():
            if distributed.rank() == 0:
                if not merged.done:
                    tally = new_tally()
                    done = _take_in(folder, tally, len(groups))
                    if not done.all():
                        raise DataError(f"{folder}: {int((~done).sum())} blocks are missing; run the command again")
                    merged.write(0, tally.state())
                merged.finish({})
                if codes is not None:
                    codes.finish({})
                for path in _passes(folder):
                    path.unlink()
    return Evidence(Shards(folder / LATENTS, "evidence", made_from).read(0))


def _pass(
    subject: Subject,
    corpus: Corpus,
    folder: Path,
    groups: list[Int[ndarray, "some"]],
    new_tally: Callable[[], Tally],
    all_tallied: bool,
    codes: ShardWriter | None,
    should_stop: Callable[[], bool],
) -> None:
    """Encodes this rank's share of the blocks that are in no tally yet, or whose codes are to be stored and are not."""
    tally, first, own = new_tally(), folder / "pass-0.safetensors", folder / f"pass-{distributed.rank()}.safetensors"
    with distributed.together():
        if distributed.rank() == 0 and not all_tallied:
            _save(first, tally, _take_in(folder, tally, len(groups)))
            for path in _passes(folder):
                if path != first:
                    path.unlink()
    with distributed.together():  # no rank goes on before all know what is done
        tallied = np.ones(len(groups), bool) if all_tallied else load_tensors(first)["done"].numpy().copy()
    stored = range(len(groups)) if codes is None else set(codes.done)
    missing = [number for number in range(len(groups)) if not tallied[number] or number not in stored]
    mine = missing[distributed.rank() :: distributed.world_size()]
    done = tallied & (distributed.rank() == 0)
    progress = Progress("evidence", len(mine), "blocks", visible=distributed.rank() == 0)
    due = time.monotonic() + SAVE_EVERY_S
    with distributed.together():
        for count, number in enumerate(mine, 1):
            rows = groups[number]
            coded = encode(subject, corpus.tokens(rows))
            if codes is not None and number not in stored:
                codes.write(number, _stored(coded, rows))
            if not tallied[number]:
                tally.add(coded.latents, coded.rows, coded.places, corpus.name[rows], corpus.split[rows], rows)
                done[number] = True
            progress.update(count)
            now, stop = time.monotonic(), should_stop()
            if not all_tallied and (stop or now > due or count == len(mine)):
                _save(own, tally, done)
                due = time.monotonic() + max(SAVE_EVERY_S, (time.monotonic() - now) / SAVING_SHARE)
            if stop and count < len(mine):
                raise Stopped("during the evidence pass; the same command goes on")
        progress.close()


@contextmanager
def alone(folder: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Holds a folder for this process and its ranks; waits for whoever holds it, until asked to stop."""
    with ExitStack() as held:
        with distributed.together():
            if distributed.rank() == 0:
                held.enter_context(FolderLock(folder, should_stop))
                remove_stale(folder)
        yield


def fingerprint(subject: Subject, corpus: Corpus, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Returns what evidence depends on: coder, language model, rows, sizes and seed."""
    coder = subject.coder
    weights = {name: tensor.reshape(-1)[:: max(1, tensor.numel() // 64)] for name, tensor in coder.state_dict().items()}
    sample = {name: [round(value, 6) for value in tensor.float().cpu().tolist()] for name, tensor in weights.items()}
    spec = {key: value for key, value in coder.spec.to_json().items() if key not in ("metrics", "training")}
    return {
        "version": VERSION,
        "coder": fingerprint_key({"spec": spec, "weights": sample}),
        "model": subject.lm.fingerprint(),
        "rows": corpus.key,
        "sizes": asdict(sizes),
        "seed": seed,
    }


def check_readable(subject: Subject, corpus: Corpus) -> None:
    """Raises ConfigError if the coder does not read one language model at named sites, or there is too much text."""
    spec = subject.coder.spec
    if not spec.reads:
        raise ConfigError("coder: its spec names no site to read; set spec.reads")
    if any(site.tag for site in spec.reads):
        raise ConfigError("coder: it reads two language models; evidence is gathered from one")
    if corpus.n_rows * corpus.context_length > POSITIONS:
        raise ConfigError(
            f"evidence.tokens: {corpus.n_rows:,} rows of {corpus.context_length} tokens are more than {POSITIONS:,} "
            "places, padding counted; take fewer tokens, or a shorter text.context_length for short documents"
        )


def _check(folder: Path, made_from: dict[str, Any]) -> None:
    if not (folder / HEADER).is_file():
        if distributed.rank() == 0:
            write_json(folder / HEADER, made_from)
        return
    there = read_json(folder / HEADER)
    if isinstance(there, dict) and there.get("version", 0) > VERSION:
        raise DataError(f"{folder}: version {there['version']} is newer than {VERSION}; upgrade sae-interp")
    differing = sorted(key for key in made_from if not isinstance(there, dict) or there.get(key) != made_from[key])
    if differing:
        raise DataError(
            f"{folder}: holds evidence made with another {', '.join(differing)}; choose another run_dir or delete it"
        )


def _repair(folder: Path, made_from: dict[str, Any]) -> None:
    for name, kind in ((LATENTS, "evidence"), (CODES, "codes")):
        repair(folder / name, kind, made_from)
    for path in _passes(folder):
        try:
            load_tensors(path)
        except DataError:
            path.unlink()


def _passes(folder: Path) -> list[Path]:
    return sorted(folder.glob("pass-*.safetensors"))


def _take_in(folder: Path, tally: Tally, n_blocks: int) -> Any:
    """Merges all that was gathered into a tally and returns which blocks that is."""
    done = np.zeros(n_blocks, bool)
    for path in _passes(folder):
        state = load_tensors(path)
        blocks_there = state.pop("done").numpy()
        if not (blocks_there & ~done).any():
            continue
        tally.merge(state)
        done |= blocks_there
    return done


def _save(path: Path, tally: Tally, done: Any) -> None:
    save_tensors(path, tally.state() | {"done": torch.from_numpy(done)})


def _stored(coded: Coded, rows: Int[ndarray, "rows"]) -> dict[str, Tensor]:
    """One block of the full store: for every token its row and place, and its codes as compressed rows."""
    values = coded.latents.values.float().cpu()
    half = values.to(torch.float16)
    return {
        "row": torch.from_numpy(rows[coded.rows].astype(np.int32)),
        "place": torch.from_numpy(coded.places.astype(np.int32)),
        "offsets": coded.latents.offsets.cpu(),
        "ids": coded.latents.ids.to(torch.int32).cpu(),
        "values": half if half.isfinite().all() else values,
    }


def stored_codes(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yields the blocks of a full store: `row`, `place` [n], `offsets` [n + 1], `ids` and `values` [nnz].

    Values are float16, but float32 in a block where one is too large for that.
    """
    shards = Shards(folder / CODES, "codes")
    for index in range(len(shards)):
        yield shards.read(index)
