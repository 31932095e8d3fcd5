"""Checkpoints: everything a bit-exact continuation needs, published whole or not at all; safetensors and JSON only.

And the lock on the run folder they lie in, and the config with which a run may go on.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus

from sae.base.errors import ConfigError, DataError
from sae.base.files import (
    FolderLock,
    atomic_write,
    is_complete,
    remove_stale,
    verify,
)
from sae.base.paths import from_anywhere, near, same_place
from sae.base.settings import decode, flat, read_yaml, set_dotted
from sae.parallel import agreement, ranks
from sae.parallel.ranks import Share
from sae.training.config import TrainConfig

log = logging.getLogger(__name__)
STATE = "state.json"
CHANGEABLE = ("log", "checkpoints", "eval", "ranks", "parallel", "max_bad_steps", "kernels")  # of a run that has begun
PLACES = ("model.name", "second_model.name", "text.source", "activations.path", "coder.start_from", "run_dir")
"""Fields of what is one, however it is spelled."""
PINNED = ("model.revision", "text.revision", "text.max_tokens")  # written to config.yaml as they were found


def part_name(group: str, share: Share) -> str:
    """Returns the name of the file with a rank's rows of a group of tensors; alone, it is the group's."""
    part = f".part-{share.rank + 1:05d}-of-{share.world_size:05d}" if share.world_size > 1 else ""
    return f"{group}{part}.safetensors"


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


def is_intact(folder: Path) -> bool:
    """Returns whether there is a checkpoint that passes its checksums."""
    with suppress(DataError):
        verify(folder)
        return True
    return False


def has_begun(run_dir: Path) -> bool:
    """Returns whether a run has trained in a folder: there is something to resume, which a new run would overwrite."""
    return any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "coders"))


@contextmanager
def locked(run_dir: Path, resume: bool) -> Iterator[None]:
    """Holds the run folder's lock, on rank 0; ConfigError if it is held, or if a new run would overwrite another.

    What is refused before the run has begun leaves the folder as it was.
    """
    settings = {run_dir / name: b"" for name in ("config.yaml", "env.json")}
    with ExitStack() as held:
        with agreement.together():
            if ranks.rank() == 0:
                try:
                    held.enter_context(FolderLock(run_dir))
                except ConfigError as error:
                    raise ConfigError(f"run_dir: {error}") from error
                if has_begun(run_dir) and not resume:
                    raise ConfigError(
                        f"run_dir: {run_dir} holds a run; continue it with --resume {run_dir}, or name another"
                    )
                settings = {path: path.read_bytes() if path.is_file() else b"" for path in settings}
        try:
            yield
        except (ConfigError, DataError):
            if ranks.rank() == 0 and not resume and not has_begun(run_dir):
                for path, before in settings.items():
                    atomic_write(path, before) if before else path.unlink(missing_ok=True)
            raise


def saved_config(folder: Path) -> TrainConfig:
    """Returns the config of the run in a folder; ConfigError if there is none."""
    path = folder.expanduser() / "config.yaml"
    if not path.is_file():
        if not folder.is_dir():
            raise ConfigError(f"--resume: no such folder: {folder}.{near(folder)}")
        run = next((f" Did you mean {str(up)!r}?" for up in folder.parents if (up / "config.yaml").is_file()), "")
        raise ConfigError(f"--resume: {folder} is not the folder of a run; it has no config.yaml.{run}")
    return decode(TrainConfig, read_yaml(path))


def placed_config(config: TrainConfig) -> TrainConfig:
    """Returns a config whose model, text and coder to start from are found from any folder that a run is read in."""
    data = draccus.encode(config)
    for key, value in flat(data).items():
        if key in PLACES and key != "run_dir" and value != "quickstart":  # that one is made, whatever lies here
            here = key == "activations.path" and value  # of this machine, also if it is a glob or has yet to be made
            set_dotted(data, key, str(Path(value).expanduser().absolute()) if here else from_anywhere(value))
    return decode(TrainConfig, data)


def resumed_config(config: TrainConfig, folder: Path) -> TrainConfig:
    """Returns the run's own config with what may change of `config`: logging, evaluation, retention.

    ConfigError names a field whose change would make it another run.
    """
    saved = saved_config(folder)
    was, now = flat(draccus.encode(saved)), flat(draccus.encode(config))
    changed = [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
    changed = [key for key in changed if key not in PINNED or _is_pin(now.get(key))]
    changed = [key for key in changed if key not in PLACES or not same_place(was.get(key, ""), now[key])]
    changed = sorted(key for key in changed if key.split(".")[0] not in CHANGEABLE)
    if changed:
        raise ConfigError(f"--resume: {', '.join(changed)} cannot change in a run that has begun; start a new one")
    kept = replace(saved, **{name: getattr(config, name) for name in CHANGEABLE})
    return replace(kept, kernels=saved.kernels) if config.kernels == "auto" else kept


def _is_pin(value: Any) -> bool:
    """Whether a value is one that a run would have kept as it is: an amount, or a whole commit."""
    return isinstance(value, int) or re.fullmatch("[0-9a-f]{40}", value or "") is not None
