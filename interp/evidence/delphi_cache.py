"""EleutherAI's delphi: its cache of codes, read as if a coder had just encoded the text.

    RUN/latents/HOOKPOINT/START_END.safetensors   codes of latents START to END (END included), one file a range
    RUN/latents/HOOKPOINT/config.json             model, dataset, row length

(as eai-delphi 0.1.3 writes it; tests/golden/delphi was made by it). A file has `locations` [nnz, 3], in uint16 or
uint32 (row, place in the row, latent - START), `activations` [nnz], in float16, and a full copy of `tokens` [rows,
context]. The firing counts beside it are pickled, so they are not read.

`interp/exchange/delphi.py` reads explanations and scores.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from numpy import ndarray
from torch import Tensor

from interp.evidence.codes import Coded
from interp.evidence.corpus import SECTION_ROWS, Corpus, Source, split_rows
from sae.base.errors import DataError
from sae.base.files import load_tensors, read_json, safe_join
from sae.base.progress import UNWATCHED, Watch
from sae.base.store import fingerprint_key
from sae.kernels.codes import SparseLatents
from sae.lm.masking import MaskSpec, token_mask

log = logging.getLogger(__name__)

CONFIG = "config.json"
LARGEST = float(np.finfo(np.float16).max)
CHUNK = 2**22  # entries looked at at once: 100 MiB of locations
SAMPLE = 2**16  # entries of a file that go into the fingerprint

_NAME = re.compile(r"(0|[1-9]\d{0,9})_(0|[1-9]\d{0,9})\.safetensors")


def is_cache(folder: Path | str) -> bool:
    """Returns whether a folder looks like delphi's cache of one hookpoint; `DelphiCache` tells whether it is sound."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and any(_NAME.fullmatch(path.name) for path in folder.glob("*.safetensors"))


class DelphiCache:
    """The codes of a text, as delphi cached them at one hookpoint.

    Rows are packed text: there are no documents. delphi encodes every token; those that `mask` leaves out by what or
    where they are have no codes here. `folder` is the hookpoint's. Raises DataError naming the file that is missing,
    damaged or contradicts another: all locations are read once to find out. Later they are memory-mapped.
    """

    tokens: Int[Tensor, "rows context"]
    """Token ids, int32."""
    d_sae: int
    """Latents of the coder: one more than the last of the last file."""
    model: str
    """The language model's name."""
    config: dict[str, Any]
    """All of config.json: dataset_repo, dataset_split, dataset_name, dataset_column, n_tokens and so on."""

    def __init__(self, folder: Path | str, mask: MaskSpec | None = None) -> None:
        self.folder, self.mask = Path(folder), mask or MaskSpec(skip_positions=0)
        ranges = _ranges(self.folder)
        self.config = _config(self.folder, len(ranges))
        self.model, self.d_sae = self.config["model_name"], ranges[-1][1] + 1
        (first, tokens), *others = (_open(self.folder, *latents) for latents in ranges)
        for shard, copy in others:
            if not np.array_equal(copy, tokens):
                raise DataError(f"{shard.path} has other tokens than {first.path.name}: they are not of one cache")
        length = self.config.get("cache_ctx_len", tokens.shape[1])
        if length != tokens.shape[1]:
            raise DataError(
                f"{self.folder / CONFIG}: cache_ctx_len is {length}, but rows have {tokens.shape[1]} tokens"
            )
        if tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max:
            raise DataError(f"{first.path}: a token id is below 0 or above {np.iinfo(np.int32).max}")
        self.tokens = torch.from_numpy(tokens.astype(np.int32))
        self._shards = [_indexed(shard, *tokens.shape) for shard in (first, *(shard for shard, _ in others))]

    @property
    def n_rows(self) -> int:
        """Returns the number of rows."""
        return len(self.tokens)

    @property
    def context_length(self) -> int:
        """Returns the number of tokens in a row."""
        return self.tokens.shape[1]

    @property
    def hookpoint(self) -> str:
        """Returns the name of the module that was read, which is the folder's."""
        return self.folder.resolve().name

    def read(self, rows: Int[ndarray, "some"] | Sequence[int]) -> Coded:
        """Returns the codes of the tokens of some rows, values in float32; IndexError if there is no such row.

        A value that was too large for delphi's float16 is the largest one of that type.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()}: the cache has 0 to {self.n_rows - 1}")
        n = len(rows) * self.context_length
        parts = [shard.entries(rows, self.context_length) for shard in self._shards]
        token, ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        counted = token_mask(self.tokens[rows], self.mask).flatten().numpy()
        token, ids, values = (column[counted[token]] for column in (token, ids, values))
        order = token.astype(np.min_scalar_type(n)).argsort(kind="stable")  # the files are in order of latents
        offsets = np.append(0, np.bincount(token, minlength=n)[counted].cumsum())
        offsets, ids, values = (torch.from_numpy(column) for column in (offsets, ids[order], values[order]))
        of, places = np.divmod(np.flatnonzero(counted), self.context_length)
        return Coded(SparseLatents(offsets, ids, values, self.d_sae), of, places)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what evidence on this cache depends on: its settings, its tokens, and a sample of every file."""
        samples = {}
        for shard in self._shards:
            step = max(1, len(shard.values) // SAMPLE)
            parts = (column[::step].tobytes() for column in (shard.locations, shard.values))
            samples[shard.path.name] = [len(shard.values), *(hashlib.sha256(part).hexdigest() for part in parts)]
        tokens = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        mask = [self.mask.special_ids, self.mask.skip_positions, self.mask.next_token]
        return {"delphi": self.config, "mask": mask, "hookpoint": self.hookpoint, "tokens": tokens, "files": samples}


class CachedCodes:
    """A cache of delphi as the codes of a corpus; see `corpus_of_cache`."""

    def __init__(self, cache: DelphiCache) -> None:
        self.cache, self.d_sae = cache, cache.d_sae

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus."""
        return self.cache.read(rows + rows // SECTION_ROWS)  # one is left out between two sections

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this cache from others."""
        return {"cache": fingerprint_key(self.cache.fingerprint())}


def corpus_of_cache(cache: DelphiCache, tokens: int, watch: Watch = UNWATCHED) -> Corpus:
    """Returns the first `tokens` tokens of a cache's text as rows with their split, which is one by blocks."""
    rows = cache.tokens.numpy()
    source = Source(
        f"evidence.cache: {cache.folder}",
        cache.fingerprint(),
        cache.context_length,
        [],
        [],
        lambda: (("cache", number, row) for number, row in enumerate(rows)),
    )
    return split_rows(source, tokens, watch)


@dataclass(frozen=True)
class _Shard:
    """One file of codes, memory-mapped."""

    path: Path
    first: int
    last: int
    locations: Integer[ndarray, "nnz 3"]
    values: Float[ndarray, "nnz"]
    starts: Int[ndarray, "rows_and_1"] = field(default_factory=lambda: np.zeros(1, np.int64))
    """Where each row begins, in order of (row, place, latent)."""
    order: Int[ndarray, "nnz"] | None = None
    """The entries in that order, where they are stored in another."""

    def entries(
        self, rows: Int[ndarray, "some"], context: int
    ) -> tuple[Int[ndarray, "found"], Int[ndarray, "found"], Float[ndarray, "found"]]:
        """Returns of every entry of some rows: its token, counted over these rows, its latent and its value."""
        counts = self.starts[rows + 1] - self.starts[rows]
        of = np.repeat(np.arange(len(rows)), counts)
        index = np.arange(len(of)) + np.repeat(self.starts[rows] - (counts.cumsum() - counts), counts)
        if self.order is not None:
            index = self.order[index]
        _, place, latent = self.locations[index].astype(np.int64).T
        return of * context + place, latent + self.first, self.values[index].astype(np.float32).clip(-LARGEST, LARGEST)


def _ranges(folder: Path) -> list[tuple[int, int]]:
    """Returns the first and the last latent of every file; DataError if they leave some out or overlap."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("*.safetensors")]
    ranges = sorted((int(name[1]), int(name[2])) for name in names if name)
    if not ranges:
        below = sorted(path.name for path in folder.glob("*") if is_cache(path))
        where = f"it has caches of {', '.join(below)}: name one of these folders" if below else "is it delphi's cache?"
        raise DataError(f"{folder} holds no START_END.safetensors; {where}")
    expected = 0
    for first, last in ranges:
        name = f"{first}_{last}.safetensors"
        if first > expected:
            raise DataError(f"{folder}: latents {expected} to {first - 1} are missing: the file before {name} is gone")
        if first < expected or last < first:
            raise DataError(f"{folder / name}: its latents overlap those of other files, or it has none")
        expected = last + 1
    return ranges


def _config(folder: Path, n_files: int) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_name"), str):
        raise DataError(f"{path} has no model_name: is it delphi's?")
    if config.get("n_splits", n_files) != n_files:
        raise DataError(f"{folder} has {n_files} files of codes, but n_splits in {CONFIG} is {config['n_splits']}")
    return config


def _open(folder: Path, first: int, last: int) -> tuple[_Shard, Int[ndarray, "rows context"]]:
    """Returns a file of the shapes that it must have, and its tokens."""
    path = safe_join(folder, f"{first}_{last}.safetensors")
    tensors = load_tensors(path)
    for name in ("locations", "activations", "tokens"):
        if name not in tensors:
            raise DataError(f"{path} has no {name}" + ("; cache with save_tokens=True" if name == "tokens" else ""))
    locations, values, tokens = (tensors[name] for name in ("locations", "activations", "tokens"))
    if locations.ndim != 2 or locations.shape[1] != 3 or locations.is_floating_point():
        raise DataError(f"{path}: locations are {locations.dtype} {list(locations.shape)}, not integers [nnz, 3]")
    if values.shape != locations.shape[:1] or values.dtype != torch.float16:
        raise DataError(f"{path}: activations are {values.dtype} {list(values.shape)}, not float16 [{len(locations)}]")
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise DataError(f"{path}: tokens are {tokens.dtype} {list(tokens.shape)}, not integers [rows, context]")
    return _Shard(path, first, last, locations.numpy(), values.numpy()), tokens.numpy()


def _indexed(shard: _Shard, rows: int, context: int) -> _Shard:
    """Returns a file with the places of its rows; DataError if an entry is out of range, twice there, or no number."""
    width, counts, overflown = shard.last - shard.first + 1, np.zeros(rows, np.int64), 0
    in_order, before = True, -1
    for start in range(0, len(shard.values), CHUNK):
        found, values = (column[start : start + CHUNK] for column in (shard.locations, shard.values))
        for column, limit, name in zip(found.T, (rows, context, width), ("row", "place", "latent"), strict=True):
            if column.min() < 0 or column.max() >= limit:
                wrong = column.max() if column.max() >= limit else column.min()
                raise DataError(f"{shard.path}: locations name {name} {wrong}; there are 0 to {limit - 1}")
        if np.isnan(values).any():
            raise DataError(f"{shard.path}: an activation is not a number")
        overflown += int(np.isinf(values).sum())
        counts += np.bincount(found[:, 0], minlength=rows)
        keys = _keys(found, context, width)
        in_order = in_order and bool(keys[0] > before and (np.diff(keys) > 0).all())
        before = keys[-1]
    if overflown:
        log.warning("%s: %d activations were too large for float16; read as %g", shard.path, overflown, LARGEST)
    order = None
    if not in_order:
        keys = _keys(shard.locations, context, width)
        order = keys.argsort()
        if (np.diff(keys[order]) == 0).any():
            raise DataError(f"{shard.path}: the same row, place and latent are there twice")
    return replace(shard, starts=np.append(0, counts.cumsum()), order=order)


def _keys(locations: Integer[ndarray, "n 3"], context: int, width: int) -> Int[ndarray, "n"]:
    """Returns one number for every location, in order of (row, place, latent)."""
    row, place, latent = locations.astype(np.int64).T
    return (row * context + place) * width + latent
