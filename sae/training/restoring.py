"""A checkpoint is read back: of each tensor the rows that this rank holds, whichever ranks have written them.

Files are mapped into memory, so that nothing is read but what is asked for.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.base.errors import DataError
from sae.base.files import read_json
from sae.coder.shard import HeldRows
from sae.parallel.ranks import Share
from sae.training.checkpoint import STATE


def load(folder: Path) -> tuple[dict[str, "Stored"], dict[str, Any]]:
    """Returns (tensors by group, values) of a checkpoint, however many ranks have written it.

    DataError if it is torn.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        files.setdefault(re.sub(r"\.part-\d+-of-\d+$", "", path.stem), []).append(path)
    return {group: Stored(paths) for group, paths in files.items()}, read_json(folder / STATE)


class _Piece(NamedTuple):
    """Neighboring rows of a tensor, in one of the files."""

    rows: range
    """Their numbers in the whole."""
    start: int
    """The first one's number in the file."""
    file: Any


class Stored(Mapping[str, Tensor]):
    """The tensors of files that hold some of the rows each."""

    def __init__(self, paths: list[Path]) -> None:
        """Reads what the files say they hold; DataError if rows are missing."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[_Piece]] = {}
        self.files: dict[str, Any] = {}
        """One that knows the type of a tensor."""
        for path in paths:
            try:
                file = safe_open(path, "pt")
                metadata = file.metadata() or {}
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is missing, damaged or no safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 it is no mapping
                self._add(name, file, metadata.get(name))
        for name, pieces in self.pieces.items():
            pieces.sort(key=lambda piece: piece.rows.start)
            ends = [0, *(piece.rows.stop for piece in pieces)]
            if [piece.rows.start for piece in pieces] != ends[:-1] or ends[-1] != (self.shapes[name] or (1,))[0]:
                raise DataError(f"{paths[0].parent}: rows of {name} are missing")

    def _add(self, name: str, file: Any, told: str | None) -> None:
        """Takes in the rows of a tensor that a file says it holds; one that says nothing has all."""
        shape = tuple(file.get_slice(name).get_shape())
        n = shape[0] if shape else 1
        where = json.loads(told) if told else {"first": 0, "shape": shape}
        bounds = where.get("rows") or [[where.get("first", 0), where.get("first", 0) + n]]
        self.shapes[name], self.files[name] = tuple(where["shape"]), file
        pieces, start = self.pieces.setdefault(name, []), 0
        for first, stop in bounds if n else ():
            pieces.append(_Piece(range(first, stop), start, file))
            start += stop - first

    def rows(self, name: str, wanted: Sequence[range]) -> Tensor:
        """Returns some rows, those of each range after those of the one before."""
        if not self.shapes[name]:
            return self.pieces[name][0].file.get_tensor(name).view(1)
        parts = [self.files[name].get_slice(name)[:0]]
        for some in wanted:
            for rows, start, file in self.pieces[name]:
                first, stop = max(some.start, rows.start), min(some.stop, rows.stop)
                if first < stop:
                    at = start - rows.start
                    parts.append(file.get_slice(name)[first + at : stop + at])
        return torch.cat(parts) if len(parts) > 2 else parts[-1]

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.rows(name, [range(shape[0])] if shape else []).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


class Held(Mapping[str, Tensor]):
    """The rows that this rank holds of stored tensors, each read when it is asked for."""

    def __init__(self, stored: Stored, rows: Callable[[str, Tensor], HeldRows | None]) -> None:
        """Takes what says which rows of a tensor these are; None: all."""
        self.stored, self._rows = stored, rows

    def __getitem__(self, name: str) -> Tensor:
        shape = self.stored.shapes[name]
        held = self._rows(name, torch.empty(shape, device="meta"))
        if held is None:
            return self.stored[name]
        if held.total != shape[0]:
            raise DataError(f"checkpoint: {name} has {shape[0]} rows, where the coder has {held.total}")
        return self.stored.rows(name, held.pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def values_of_part(told: Any, share: Share, own: float) -> dict[str, Any]:
    """Returns the plain values of a trainer, of what those of all parts of its coder have told.

    `share` is this rank's place among the parts, which hold `own` of the latents. Where they were cut in another way,
    all values stand but how many entries of a token were kept of these latents: as many as their share of all.
    """
    several = told if isinstance(told, list) else [told]
    if len(several) == share.world_size:
        return several[share.rank]
    heard = [h | {"per_token": h.get("everywhere", h["per_token"]) * own} for h in several[0].get("heard", [])]
    return several[0] | ({"heard": heard} if heard else {})
