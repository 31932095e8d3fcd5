"""The evidence pass: rows through the language model and the coder, into a tally, resumable and on any number of ranks.

    evidence/pass-R.safetensors      what rank R has gathered so far, and of which blocks
    evidence/latents.safetensors     the merged tally of all blocks, once all are done
    evidence/codes/                  optional: every code, one shard a block

Rows come longest first, in blocks of about 4,096 tokens. A block's codes enter one tally once: a file whose blocks are
all in another one was merged into it already. So a kill at any moment loses a minute, and the result is the same bits.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from interp.corpus import Corpus
from interp.latents import Evidence, Sizes, Tally
from interp.subject import Subject
from sae import distributed
from sae.activations import capture, norm_mask, token_mask
from sae.errors import ConfigError, DataError, Stopped
from sae.files import load_tensors, read_json, save_tensors, write_json
from sae.progress import Progress
from sae.spec import SparseLatents
from sae.store import ShardWriter, fingerprint_key

BLOCK_TOKENS = 4096
SAVE_EVERY_S = 60.0
MERGED, HEADER = "latents.safetensors", "evidence.json"


class Coded(NamedTuple):
    """The codes of the unmasked tokens of some rows, by the per-token rule."""

    latents: SparseLatents
    rows: Int[ndarray, "n"]
    """By token: which of the rows."""
    places: Int[ndarray, "n"]
    """By token: where in the row."""


@torch.no_grad()
def encode(subject: Subject, tokens: Int[Tensor, "rows context"]) -> Coded:
    """Returns the codes of rows of text. Masked tokens (special, first, outliers by norm) have none."""
    lm, coder = subject.lm, subject.coder
    spec = coder.spec
    wanted = {site.name: site for site in (*spec.reads, *spec.writes)}
    sites = [s for n, s in wanted.items() if s in spec.reads or n in spec.mask.norm_limits]
    with subject.lock:
        seen = capture(lm, sites, tokens)
        keep = token_mask(tokens, spec.mask).to(lm.device) & norm_mask(seen, spec.mask).to(lm.device)
        x = torch.cat([seen[site.name][keep].float() for site in spec.reads], dim=-1)
        latents = coder.encode(x.to(coder.W_enc.device))
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
) -> Evidence:
    """Returns the evidence of every latent on the whole corpus, from `folder` as far as it is there.

    Raises DataError if the folder holds evidence of something else, Stopped (everything saved) when asked to stop.
    """
    check_readable(subject)
    made_from = fingerprint(subject, corpus, sizes, seed)
    with distributed.together():
        _check(folder, made_from)
    if (folder / MERGED).is_file():
        return Evidence(load_tensors(folder / MERGED))
    groups = blocks(corpus, corpus.kept)
    own = folder / f"pass-{distributed.rank()}.safetensors"
    tally = Tally(subject.coder.spec.d_sae, corpus.context_length, sizes, seed)
    with distributed.together():
        if distributed.rank() == 0:
            done = _take_in(folder, tally, len(groups))
            _save(folder / "pass-0.safetensors", tally, done)
            for path in _passes(folder):
                if path != own:
                    path.unlink()
    done = load_tensors(folder / "pass-0.safetensors")["done"].numpy().copy()
    mine = np.flatnonzero(~done)[distributed.rank() :: distributed.world_size()]
    if distributed.rank():
        done[:] = False
    writer = ShardWriter(folder / "codes", "codes", made_from, str(distributed.rank())) if store else None
    progress = Progress("evidence", len(mine), "blocks", visible=distributed.rank() == 0)
    saved = time.monotonic()
    with distributed.together():
        for count, number in enumerate(mine.tolist()):
            rows = groups[number]
            coded = encode(subject, corpus.tokens(rows))
            tally.add(coded.latents, coded.rows, coded.places, corpus.name[rows], corpus.split[rows], rows)
            if writer is not None:
                writer.write(number, _stored(coded, rows))
            done[number] = True
            progress.update(count + 1)
            stop = should_stop()
            if stop or time.monotonic() - saved > SAVE_EVERY_S:
                _save(own, tally, done)
                saved = time.monotonic()
            if stop and count + 1 < len(mine):
                raise Stopped("during the evidence pass; the same command goes on")
        _save(own, tally, done)
        progress.close()
    with distributed.together():
        if distributed.rank() == 0:
            whole = Tally(subject.coder.spec.d_sae, corpus.context_length, sizes, seed)
            done = _take_in(folder, whole, len(groups))
            if not done.all():
                raise DataError(f"{folder}: {int((~done).sum())} blocks are missing; run the command again")
            if store:
                ShardWriter(folder / "codes", "codes", made_from).finish({"blocks": len(groups)})
            save_tensors(folder / MERGED, whole.state())
            for path in _passes(folder):
                path.unlink()
    return Evidence(load_tensors(folder / MERGED))


def fingerprint(subject: Subject, corpus: Corpus, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Returns what evidence depends on: coder, language model, rows, sizes and seed."""
    coder = subject.coder
    weights = {name: tensor.reshape(-1)[:: max(1, tensor.numel() // 64)] for name, tensor in coder.state_dict().items()}
    sample = {name: [round(value, 6) for value in tensor.float().cpu().tolist()] for name, tensor in weights.items()}
    spec = {key: value for key, value in coder.spec.to_json().items() if key not in ("metrics", "training")}
    return {
        "coder": fingerprint_key({"spec": spec, "weights": sample}),
        "model": subject.lm.fingerprint(),
        "rows": corpus.key,
        "sizes": asdict(sizes),
        "seed": seed,
    }


def check_readable(subject: Subject) -> None:
    """Raises ConfigError if the coder does not read one language model at named sites."""
    spec = subject.coder.spec
    if not spec.reads:
        raise ConfigError("coder: its spec names no site to read; set spec.reads")
    if any(site.tag for site in spec.reads):
        raise ConfigError("coder: it reads two language models; evidence is gathered from one")


def _check(folder: Path, made_from: dict[str, Any]) -> None:
    if not (folder / HEADER).is_file():
        if distributed.rank() == 0:
            write_json(folder / HEADER, made_from)
        return
    there = read_json(folder / HEADER)
    differing = sorted(key for key in made_from if there.get(key) != made_from[key])
    if differing:
        raise DataError(
            f"{folder}: holds evidence made with another {', '.join(differing)}; choose another run_dir or delete it"
        )


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
    return {
        "row": torch.from_numpy(rows[coded.rows].astype(np.int32)),
        "place": torch.from_numpy(coded.places.astype(np.int32)),
        "offsets": coded.latents.offsets.cpu(),
        "ids": coded.latents.ids.to(torch.int32).cpu(),
        "values": coded.latents.values.to(torch.float16).cpu(),
    }


def stored_codes(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yields the blocks of a full store: `row`, `place` [n], `offsets` [n + 1], `ids` and `values` (float16) [nnz]."""
    from sae.store import Shards

    shards = Shards(folder / "codes", "codes")
    for index in range(len(shards)):
        yield shards.read(index)
