"""Stored activations, of whatever model: safetensors files, or tensors in memory, as the blocks of a stream.

A tensor [n, width] or [rows, positions, width] goes by the name of its site. Beside it, "mask" of the same leading
shape says which vectors count, and "gradients/NAME" are the gradients there. The rows of all sites in a file belong
together. Blocks are cut from file after file, in the order of their names: a whole file where it is small, slices of
it else, so that no large file is ever in memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.base.errors import ConfigError, DataError, nearest
from sae.base.files import read_json
from sae.base.paths import near
from sae.base.store import HEADER
from sae.lm.site import SECOND, Site
from sae.lm.sites import SIDES, fits
from sae.stream.batch import Block

FIELD = "activations.path"
HELD_OUT = "held_out"
"""The folder, below that of stored activations, of those that are only measured on."""
MASK, MEMORY = "mask", "tensors in memory"
PREFIX, GRADIENTS = "activations/", "gradients/"
LEAVES = (".pt", ".pth", ".bin", ".npy", ".npz", ".h5", ".parquet", ".arrow")  # that people keep tensors in
PROBES, PROBED_BYTES = 16, 4096  # of a file, to know it again


@dataclass(frozen=True)
class Shard:
    """Tensors whose rows belong together: of a file, or in memory."""

    label: str
    """What to call it in an error."""
    shapes: dict[str, tuple[int, ...]]
    """By site, "mask" and "gradients/SITE"."""
    dtypes: dict[str, str]
    """As safetensors calls them: F32, BF16, I64 ..."""
    read: Callable[[str, int, int], Tensor] = field(repr=False)
    """Returns rows [start, stop) of a tensor."""
    digest: str
    """Tells it from others of the same shapes."""

    @property
    def names(self) -> list[str]:
        """Returns the names of its sites."""
        return [name for name in self.shapes if name != MASK and not name.startswith(GRADIENTS)]


@dataclass(frozen=True)
class Stored:
    """Stored activations, before anything of them is chosen."""

    label: str
    shards: list[Shard]
    held_out: list[Shard] = field(default_factory=list)
    """Those that are only measured on; empty where a share of the others is kept for that."""
    about: dict[str, Any] = field(default_factory=dict)
    """What is known of them, where they were stored here: model, revision, special_ids, skip_positions ..."""

    @property
    def fingerprint(self) -> str:
        """Returns 16 hex digits that differ for other activations."""
        digests = [shard.digest for shard in (*self.shards, *self.held_out)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]

    def sites(self, typed: str, field: str = "activations.sites") -> list[Site]:
        """Returns the sites meant by a name, the end of one, or a glob; ConfigError with the nearest if there is none.

        Their widths are those of the first file.
        """
        names = self.shards[0].names
        found = [typed] if typed in names else [name for name in names if fits(name, typed)]
        if not found:
            told = f"which has {_list(names)}.{nearest(typed, names)}"
            raise ConfigError(f"{field}: {typed!r} is not in {self.label}, {told}")
        if len(found) > 1 and not has_magic(typed):
            raise ConfigError(f"{field}: {typed!r} is ambiguous: {', '.join(found[:5])}; write one in full")
        return [self.site(name) for name in found]

    def site(self, name: str) -> Site:
        """Returns the site of a name."""
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise ConfigError(f"activations.sites: {name!r} cannot name a coder's folder; store it by another name")
        rest, at, tag = name.rpartition("@") if name.endswith(f"@{SECOND}") else (name, "", "")
        hook, colon, side = rest.rpartition(":")
        hook, side = (hook, side) if colon and side in SIDES else (rest, "output")
        model = self.about.get(f"{tag} model" if at else "model") or ""
        revision = self.about.get(f"{tag} revision" if at else "revision")
        shape = self.shards[0].shapes[name]
        return Site(hook, side, model, revision, tag=tag, width=shape[-1] if shape else 0)


@dataclass(frozen=True)
class TensorSource:
    """Blocks of stored activations."""

    pieces: list[tuple[Shard, int, int]]
    """The rows [start, stop) of which shard each block is."""
    names: list[str]
    """The sites that are read."""
    dtype: torch.dtype = torch.float32
    skip_positions: int = 0
    """The first positions of every row that are masked, where there are rows."""
    with_gradients: bool = False

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def vectors(self) -> int:
        """Returns how many vectors there are, masked ones too."""
        return sum((stop - start) * _positions(shard, self.names[0]) for shard, start, stop in self.pieces)

    @property
    def has_rows(self) -> bool:
        """Returns whether some of it is [rows, positions, width]."""
        return any(len(shard.shapes[self.names[0]]) == 3 for shard, _, _ in self.pieces)

    def told(self, blocks: list[int]) -> str:
        """Returns where some blocks lie, for people."""
        pieces = [self.pieces[block] for block in blocks]
        return "; ".join(f"{shard.label}, rows {start} to {stop}" for shard, start, stop in pieces)

    def read(self, block: int) -> Block:
        """Returns one block."""
        shard, start, stop = self.pieces[block]
        keep, shape = None, shard.shapes[self.names[0]]
        if len(shape) == 3:
            keep = torch.ones(stop - start, shape[1], dtype=torch.bool)
            keep[:, : self.skip_positions] = False
        if MASK in shard.shapes:
            told = shard.read(MASK, start, stop).bool().cpu()
            keep = told if keep is None else keep & told

        def kept(name: str) -> Tensor:
            x = shard.read(name, start, stop)
            return (x if keep is None else x[keep.to(x.device)]).to(self.dtype)

        graded = self.names if self.with_gradients else []
        return Block({name: kept(name) for name in self.names}, {name: kept(f"{GRADIENTS}{name}") for name in graded})

    def split(self, share: float) -> tuple["TensorSource", "TensorSource"]:
        """Returns (blocks to train on, blocks held out): about `share` of them, one at least, at equal distances."""
        n = len(self.pieces)
        count = max(1, round(share * n))
        apart = {(2 * i + 1) * n // (2 * count) for i in range(count)}
        return replace(self, pieces=[p for i, p in enumerate(self.pieces) if i not in apart]), self.some(sorted(apart))

    def some(self, blocks: Iterable[int]) -> "TensorSource":
        """Returns some of the blocks."""
        return replace(self, pieces=[self.pieces[block] for block in blocks])


def cut(
    shards: Sequence[Shard],
    sites: Iterable[str],
    most: int,
    with_gradients: bool = False,
    like: Shard | None = None,
    **how: Any,
) -> TensorSource:
    """Returns shards in blocks of at most `most` vectors, one row at least.

    ConfigError if they do not go together, or with the shard `like`. A shard that holds nothing is an empty block: so
    blocks keep their numbers. `how` is as in `TensorSource`.
    """
    names = list(sites)
    wanted = names + [f"{GRADIENTS}{name}" for name in names if with_gradients]
    pieces = []
    for shard in shards:
        rows = _leading(shard, wanted, like or shards[0])[0]
        step = max(1, most // max(1, _positions(shard, names[0])))
        pieces += [(shard, start, min(start + step, rows)) for start in range(0, max(1, rows), step)]
    return TensorSource(pieces, names, with_gradients=with_gradients, **how)


def divided(
    stored: Stored, sites: list[str], most: int, share: float, skip_positions: int, **how: Any
) -> tuple[TensorSource, TensorSource]:
    """Returns (blocks to train on, blocks held out): those that are stored so, or else about a share of all.

    No block is larger than that share, so that some of few vectors is not half of them.
    """
    how["skip_positions"] = skip_positions
    train = cut(stored.shards, sites, most, **how)
    if stored.held_out:
        return train, cut(stored.held_out, sites, most, **how)
    return cut(stored.shards, sites, min(most, max(1, int(share * train.vectors))), **how).split(share)


def _positions(shard: Shard, name: str) -> int:
    """Returns how many vectors a row is."""
    return math.prod(shard.shapes[name][1:-1])


def _leading(shard: Shard, names: list[str], first: Shard) -> tuple[int, ...]:
    """Returns the leading shape of a file's tensors, [n] or [rows, positions]; ConfigError if they do not fit."""
    lead = shard.shapes.get(names[0], ())[:-1]
    for name in names:
        shape, kind = shard.shapes.get(name), shard.dtypes.get(name, "")
        if shape is None:
            near_by = nearest(name, shard.shapes)
            raise ConfigError(
                f"activations: {shard.label} has no tensor {name!r}; it has {_list(shard.shapes)}.{near_by}"
            )
        if len(shape) not in (2, 3):
            raise ConfigError(
                f"activations: {name} in {shard.label} has the shape {list(shape)}; it must be [n, width] or "
                "[rows, positions, width]"
            )
        if not kind.startswith(("F", "BF")):
            raise ConfigError(f"activations: {name} in {shard.label} has the data type {kind}; activations are floats")
        if shape[-1] != first.shapes[name][-1]:
            wide = f"width {shape[-1]} in {shard.label}, but {first.shapes[name][-1]} in {first.label}"
            raise ConfigError(f"activations: {name} has {wide}")
        if shape[:-1] != lead:
            raise ConfigError(
                f"activations: in {shard.label}, {names[0]} is {list(lead)} vectors and {name} {list(shape[:-1])}; the "
                "rows of all sites belong together"
            )
    if MASK in shard.shapes and (shard.shapes[MASK] != lead or shard.dtypes[MASK].startswith(("F", "BF"))):
        raise ConfigError(
            f"activations: mask in {shard.label} is {shard.dtypes[MASK]} {list(shard.shapes[MASK])}; it must be bool "
            f"or uint8 {list(lead)}, as the vectors beside it"
        )
    return lead


def stored_at(path: str) -> Stored:
    """Returns the activations in a folder, a file or the files of a glob; ConfigError if there are none."""
    if not path:
        raise ConfigError(
            f"{FIELD}: empty; name a folder, file or glob of safetensors, or give activations=... in Python"
        )
    here = Path(path).expanduser()
    about: dict[str, Any] = {}
    apart: list[Path] = []
    if here.is_dir():
        files, apart = sorted(here.glob("*.safetensors")), sorted((here / HELD_OUT).glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{FIELD}: {path} holds no .safetensors file{_other_files(here)}")
        for folder, there in ((here / HELD_OUT, apart), (here, files)):
            about = _about(folder, len(there))
    elif here.is_file():
        if here.suffix != ".safetensors":
            raise ConfigError(f"{FIELD}: {path} is no .safetensors file{_conversion(here)}")
        files = [here]
    else:
        files = [Path(found) for found in sorted(glob(str(here))) if found.endswith(".safetensors")]
        if not files:
            what = "no .safetensors file is matched by" if has_magic(path) else "no such file or folder:"
            raise ConfigError(f"{FIELD}: {what} {path}.{near(path)}")
    return Stored(str(path), [_of_file(file) for file in files], [_of_file(file) for file in apart], about)


def _about(folder: Path, files: int) -> dict[str, Any]:
    """Returns what is known of a folder that was stored here, nothing of others; ConfigError if it is not whole."""
    header = read_json(folder / HEADER) if (folder / HEADER).is_file() else {}
    about = header.get("fingerprint") if isinstance(header, dict) else None
    about = about if isinstance(about, dict) else {}
    if about.get("blocks", files) != files:
        way = "run what stored them again with activations.source disk, it continues"
        raise ConfigError(f"{FIELD}: {folder} holds {files} of {about['blocks']} blocks; {way}")
    return about


def _of_file(path: Path) -> Shard:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            keys = {name.removeprefix(PREFIX): name for name in found}
            shapes = {short: tuple(found[name].get_shape()) for short, name in keys.items()}
            dtypes = {short: str(found[name].get_dtype()) for short, name in keys.items()}
        with path.open("rb") as raw:
            size = raw.seek(0, 2)
            digest = hashlib.sha256(json.dumps([path.name, size, shapes]).encode())
            for number in range(PROBES):
                raw.seek(number * max(0, size - PROBED_BYTES) // (PROBES - 1))
                digest.update(raw.read(PROBED_BYTES))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, damaged or no safetensors file: {error}") from error

    def read(name: str, start: int, stop: int) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(keys[name])[start:stop]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is missing, damaged or no safetensors file: {error}") from error

    return Shard(str(path), shapes, dtypes, read, digest.hexdigest())


def given_activations(given: Any, name: str) -> Stored:
    """Returns what people pass as activations: a path as in `stored_at`, or what `stored_in_memory` takes."""
    return stored_at(str(given)) if isinstance(given, (str, Path)) else stored_in_memory(given, name)


def stored_in_memory(given: Any, name: str) -> Stored:
    """Returns tensors in memory as stored activations: one, a mapping of them by site, or a list of either.

    A tensor without a name is of the site `name`. Arrays of numpy will do. TypeError for anything else.
    """
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    if not parts:
        raise ConfigError("activations: an empty list; give tensors [n, width]")
    label = MEMORY if len(parts) == 1 else f"{MEMORY} [{{}}]"
    shards = [shard_in_memory(label.format(number), named_tensors(part, name)) for number, part in enumerate(parts)]
    return Stored(MEMORY, shards)


def named_tensors(given: Any, name: str) -> dict[str, Tensor]:
    """Returns a tensor or array, or a mapping of them by site, as tensors by site; TypeError for anything else."""
    parts = given if isinstance(given, Mapping) else {name: given}
    for key, value in parts.items():
        if not (isinstance(key, str) and hasattr(value, "__array__") and hasattr(value, "shape")):
            raise TypeError(
                f"activations: {type(value).__name__} is no tensor; give a path, a tensor [n, width], a dict of them "
                "by site, a list of these, or an iterator"
            )
    return {key: torch.as_tensor(value).detach() for key, value in parts.items()}


def shard_in_memory(label: str, tensors: dict[str, Tensor]) -> Shard:
    """Returns tensors in memory, whose rows belong together, as a shard of a name."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    dtypes = {name: f"{'F' if x.is_floating_point() else 'I'}{8 * x.itemsize}" for name, x in tensors.items()}
    digest = hashlib.sha256(json.dumps([shapes, dtypes]).encode())
    for x in tensors.values():
        sample = x[:: max(1, len(x) // 64)] if x.dim() else x
        digest.update(sample.double().cpu().numpy().tobytes())
    return Shard(label, shapes, dtypes, lambda name, start, stop: tensors[name][start:stop], digest.hexdigest())


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _other_files(folder: Path) -> str:
    found = next((path for path in sorted(folder.iterdir()) if path.suffix in LEAVES), None)
    below = next(iter(sorted(folder.glob("*/*.safetensors"))), None)
    return _conversion(found) if found else f"; {below.parent} does" if below else ""


def _conversion(path: Path) -> str:
    """Returns how to make a safetensors file of one that holds tensors in another format."""
    if path.suffix not in LEAVES:
        return ""
    load = (
        f"torch.from_numpy(numpy.load({path.name!r}))"
        if path.suffix in (".npy", ".npz")
        else f"torch.load({path.name!r})"
    )
    return f"; convert {path.name}: safetensors.torch.save_file({{'SITE': {load}}}, '{path.stem}.safetensors')"
