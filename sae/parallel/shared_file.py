"""One file that several ranks write, each its rows of every tensor: no process needs the whole."""

from contextlib import ExitStack
from pathlib import Path

from sae.base.files import replacing
from sae.base.tensorfile import Rows, begin_rows, write_rows
from sae.parallel import agreement


def save_rows(path: Path, rows: dict[str, Rows]) -> None:
    """Writes a safetensors file whole or not at all, of the rows that each rank has; all ranks call it.

    What fails on one of them ends all, with the file as it was before.
    """
    with ExitStack() as draft:

        def begun() -> str:
            place = draft.enter_context(replacing(path))
            begin_rows(place, rows)
            return str(place)

        place = agreement.agreed(begun)
        with agreement.together():
            write_rows(Path(place), rows)
        with agreement.together():
            draft.close()  # on rank 0: the file has its name
