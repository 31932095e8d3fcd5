"""Checkpoints: everything a bit-exact continuation needs, published whole or not at all; safetensors and JSON only."""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.errors import DataError
from sae.files import is_complete, load_tensors, publish, read_json, remove_stale, save_tensors, verify, write_json

log = logging.getLogger(__name__)
STATE = "state.json"


def save(run_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any], keep: int) -> Path:
    """Writes and returns checkpoints/step-N: a safetensors file per name and `state.json`; keeps the newest `keep`."""
    folder = run_dir / "checkpoints" / f"step-{step:09d}"
    if not is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with publish(folder) as draft:
            for name, group in tensors.items():
                save_tensors(
                    draft / f"{name}.safetensors", {k: v.detach().cpu().contiguous() for k, v in group.items()}
                )
            write_json(draft / STATE, {"step": step, **values})
    for old in complete(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def complete(run_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return [path for path in sorted((run_dir / "checkpoints").glob("step-*")) if is_complete(path)]


def latest(run_dir: Path) -> Path | None:
    """Returns the newest checkpoint that passes its checksums, or None if there is none.

    Left-over drafts of killed processes are removed. A damaged checkpoint is named in the log and passed over; if all
    are damaged, DataError.
    """
    remove_stale(run_dir / "checkpoints")
    found = complete(run_dir)
    for path in reversed(found):
        try:
            verify(path)
        except DataError as error:
            log.warning("checkpoint passed over: %s", error)
            continue
        return path
    if found:
        raise DataError(f"{run_dir}/checkpoints: none of {len(found)} checkpoints is intact; start a new run")
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Returns (tensors by file name, values) of a checkpoint."""
    tensors = {path.stem: load_tensors(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / STATE)
