"""Files that several ranks write, each its rows of every tensor: no process needs the whole."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from sae.base.files import explained, replacing
from sae.base.tensorfile import Rows, begin_rows, write_rows
from sae.parallel import agreement
from sae.parallel.mesh import Mesh


def own_rows(tensor: Tensor, mesh: Mesh, held: tuple[Sequence[range], int] | None) -> Rows:
    """Returns what this rank writes, of a tensor of which it has some rows (None: all), where others have the same."""
    return Rows.of(tensor, (mesh.data if held else mesh.team).of, held)


def save_rows(files: Mapping[Path, dict[str, Rows]], first: bool) -> None:
    """Writes safetensors files, each whole or not at all, of the rows that each rank has of them; all ranks call it.

    A rank names those files that it has rows of; one of the ranks that do is their `first`. What fails on one of them
    ends all, with the files as they were before.
    """
    with ExitStack() as drafts:
        own: dict[str, str] = {}
        with agreement.together():
            for path, rows in files.items() if first else ():
                place = drafts.enter_context(replacing(path))
                with explained(path):
                    begin_rows(place, rows)
                own[str(path)] = str(place)
        places = agreement.concluded(own, lambda every: dict(ChainMap(*every)))
        with agreement.together():
            for path, rows in files.items():
                with explained(path):  # of several drafts, which one
                    write_rows(Path(places[str(path)]), rows)
        with agreement.together():
            drafts.close()  # on the first of each: the files have their names
