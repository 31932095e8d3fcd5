"""Checkpoints are written while the training goes on: it is held for a copy in memory, and a thread writes that.

Each rank writes its rows of every tensor that it holds to files of its own; rank 0's thread publishes the folder once
the files of all ranks are whole. One is written at a time.
"""

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.base.files import explained, publish, write_json
from sae.base.room import Need, shortage
from sae.base.tensorfile import Rows, write_tensors
from sae.coder.shard import HeldRows
from sae.parallel.agreement import PeerError
from sae.parallel.desk import Desk
from sae.parallel.mesh import Mesh, of_data
from sae.parallel.ranks import Share
from sae.parallel.shared_file import own_rows
from sae.training.checkpoint import STATE, complete, is_intact, part_name

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What this rank writes of some tensors."""

    share: Share
    """Which of the ranks it is that write them."""
    tensors: dict[str, Rows]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        mesh: Mesh | None = None,
        rows: Callable[[str, Tensor], HeldRows | None] = lambda name, tensor: None,
    ) -> "Part":
        """Returns it as views. Ranks that hold the same rows, as `rows` says (None: all of them), share them.

        Without a mesh all ranks hold all.
        """
        mesh = mesh or of_data()
        return cls(mesh.team, {name: own_rows(x, mesh, rows(name, x)) for name, x in tensors.items()})


Parts = dict[str, Part]
"""By the file that they are written to, without the number of the part."""


class Saver:
    """Writes the checkpoints of a run, the newest `keep` of which stay. All ranks make the same calls."""

    def __init__(self, run_dir: Path, keep: int, newest: Path | None = None) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.newest = newest
        """The newest checkpoint that is whole."""
        self.copy = Copy()
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Returns whether what is in the background went wrong, which `wait` raises."""
        return self._failure is not None

    def save(
        self,
        step: int,
        own: Parts,
        values: dict[str, Any],
        told: dict[str, dict[str, Any]] | None = None,
        more: bool = False,
        training: bool = True,
    ) -> None:
        """Begins to write checkpoints/step-N: tensors and, as state.json, `values`; waits for the one before.

        Beside the values of rank 0 stands what each has `told`, by what it is and by name: as a list, in the order of
        the ranks, where several tell of one name.

        Where the `training` goes on, the tensors may change as soon as this returns; else they stay as they are until
        `wait`. Older checkpoints stay until it is whole. `wait` raises OSError, with nothing written, if there is no
        room for it; where `more` will follow, also if there is none for the next: that is best known while all is
        saved.
        """
        self.wait()
        desk = Desk()
        if training:
            try:
                own = self.copy.take(own)
            except Exception as error:  # no memory: the others' threads wait for this one's
                raise desk.fail(error) from error
        values, told = deepcopy(({"step": step, **values}, told or {}))
        folder = self.run_dir / "checkpoints" / f"step-{step:09d}"
        whole = folder.absolute()  # a callback may be in another folder for a while

        def write() -> None:
            _write(desk, whole, own, values, told, self.keep, more)
            self.newest = folder

        self._start(write)

    def make_room(self, own: Parts) -> None:
        """Takes the memory for copies of such tensors, in the background: new pages cost more than a copy."""
        self._start(lambda: self.copy.make_room(own))

    def wait(self) -> None:
        """Waits until what was begun is whole; raises what went wrong on any rank, which rank 0 tells."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits for what is being written when the run ends by an error; one of its own is only logged."""
        try:
            self.wait()
        except PeerError:
            pass  # rank 0 tells
        except Exception as error:
            log.warning("the checkpoint on the way is lost: %s", error)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = error

        self._writing = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._writing.start()


class Copy:
    """Memory for a copy of what this rank writes, used again for each checkpoint; pinned for what lies on a GPU."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], Tensor] = {}

    def make_room(self, own: Parts) -> None:
        """Takes the memory, page by page."""
        for group, part in own.items():
            for name, rows in part.tensors.items():
                self._of((group, name), rows.tensor).zero_()

    def take(self, own: Parts) -> Parts:
        """Returns copies, which the next call overwrites."""
        copies, on_gpu = {}, False
        for group, (share, tensors) in own.items():
            copied = {}
            for name, rows in tensors.items():
                copied[name] = rows._replace(tensor=self._of((group, name), rows.tensor))
                copied[name].tensor.copy_(rows.tensor, non_blocking=True)
                on_gpu |= rows.tensor.is_cuda
            copies[group] = Part(share, copied)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _of(self, key: tuple[str, str], like: Tensor) -> Tensor:
        held = self.held.get(key)
        if held is None or (held.shape, held.dtype) != (like.shape, like.dtype):
            held = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
            self.held[key] = held
        return held


def _write(
    desk: Desk,
    folder: Path,
    own: Parts,
    values: dict[str, Any],
    told: dict[str, dict[str, Any]],
    keep: int,
    more: bool,
) -> None:
    """Writes this rank's files of a checkpoint; rank 0 publishes those of all."""
    draft: Path | str = ""
    try:
        sizes = desk.gathered(
            "size", sum(rows.tensor.nbytes for part in own.values() for rows in part.tensors.values())
        )
        if desk.rank:
            draft = desk.get("draft")
            desk.gathered("written", [_files(Path(draft), own), told] if draft else [])
            desk.get("published")
            return
        size = sum(sizes)
        if is_intact(folder):
            desk.put("draft", "")
        else:
            _check_room(folder, size, f"checkpoint {folder.name}")
            shutil.rmtree(folder, ignore_errors=True)
            known: dict[str, dict[str, Any]] = {}
            with publish(folder, known) as draft:
                desk.put("draft", str(draft))
                found = desk.gathered("written", [_files(draft, own), told])
                for files, _ in found:
                    known.update(files)
                write_json(draft / STATE, values | _together([of_rank for _, of_rank in found]))
        older = [path for path in complete(folder.parents[1]) if path < folder]
        for old in older[: max(0, len(older) - keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        if more:
            _check_room(folder, size, f"the checkpoint that follows {folder.name}")
        desk.put("published", True)
    except BaseException as error:
        raised = desk.fail(error)
        if draft and desk.rank:  # rank 0 may have removed it while this one was writing to it
            shutil.rmtree(draft, ignore_errors=True)
        if raised is error:
            raise
        raise raised from error


def _files(draft: Path, own: Parts) -> dict[str, dict[str, Any]]:
    """Writes this rank's files and returns their sizes and digests by name."""
    written = {}
    for group, (share, tensors) in own.items():
        name, where = part_name(group, share), None
        plain = {key: row.tensor for key, row in tensors.items()}
        if share.world_size > 1:
            where = {key: json.dumps({"rows": _bounds(row), "shape": row.shape}) for key, row in tensors.items()}
        else:
            plain = {key: row.tensor.view(row.shape) for key, row in tensors.items()}
        with explained(draft / name):
            written[name] = write_tensors(draft / name, plain, where)
    return written


def _bounds(rows: Rows) -> list[list[int]]:
    """Returns where its pieces begin and end in the whole."""
    return [[piece.start, piece.stop] for piece in rows.pieces]


def _together(told: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Returns what all ranks have told, by what it is and by name; of what several told, a list."""
    found: dict[str, dict[str, list[Any]]] = {}
    for of_rank in told:
        for kind, by_name in of_rank.items():
            for name, value in by_name.items():
                found.setdefault(kind, {}).setdefault(name, []).append(value)
    return {
        kind: {name: several if len(several) > 1 else several[0] for name, several in by_name.items()}
        for kind, by_name in found.items()
    }


def _check_room(folder: Path, size: int, what: str) -> None:
    missing = shortage(Need(f"no room for {what}", folder.parent, size))
    if missing:
        raise OSError(errno.ENOSPC, missing)
