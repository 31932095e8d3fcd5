"""Where a run begins: in which folder, and whether it goes on there. Rank 0 decides it, for all ranks.

A job that its scheduler starts again goes on with its own run: the one whose env.json says so. Slurm says that it has
started a job again. A torchrun starts its ranks again for whatever reason one of them ended, a wanted stop as well.
"""

import glob
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import draccus

from sae import kernels
from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.files import LOCK, read_json, write_json
from sae.base.settings import decode, read_yaml
from sae.parallel import agreement, ranks
from sae.parallel.launch import launch
from sae.training import checkpoint
from sae.training.config import TrainConfig

AUTO = "auto"
STOPPED = "STOPPED"  # a file: a signal has ended the run, and who started it
SHARED_WITHIN_S = 30.0  # a network file system may show a new file late
_begun_here: set[Path] = set()  # this process has not been started again since


def own_jobs() -> dict[str, str]:
    """Returns what tells this job from others, hashed: env.json names no hosts."""
    found = launch()
    told = {"step": found.step, "agent": found.agent}
    return {name: hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for name, text in told.items() if text}


def begin(
    config: Callable[[], TrainConfig],
    run_dir: Path | None,
    resume: bool | str,
    fresh: Callable[[Path], Path] = lambda folder: folder,
) -> tuple[TrainConfig, Path, bool]:
    """Returns the config of the run, its folder, and whether it goes on there: on every rank what rank 0 finds.

    `resume` is True, False or "auto": go on if there is something to go on with. `fresh` is given the folder of a new
    run that nobody has named, and may return another. Stopped if torchrun starts a run again that a signal has ended.
    """
    decided = agreement.agreed(lambda: _decided(config(), run_dir, resume, fresh))
    return decode(TrainConfig, decided["config"]), Path(decided["folder"]), decided["resume"]


def _decided(
    config: TrainConfig, run_dir: Path | None, resume: bool | str, fresh: Callable[[Path], Path]
) -> dict[str, Any]:
    config.validate()
    named = run_dir or (Path(config.run_dir) if config.run_dir else None)
    folder = (named or Path("runs") / config.name).expanduser()
    if resume is not True:
        found = _going_on(folder, config.name, named is not None, resume == AUTO)
        folder, resume = found or (folder if named else fresh(folder)), found is not None
    if _stopped_by(folder) == own_jobs().get("agent"):
        raise Stopped(f"already: a signal had ended {folder} when torchrun started it again")
    if not resume and config.kernels != "auto":  # a run that goes on takes others, and says so
        kernels.check(config.kernels)
    config = checkpoint.resumed_config(config, folder) if resume else checkpoint.placed_config(config)
    return {"config": draccus.encode(config), "folder": str(folder), "resume": resume}


def _going_on(folder: Path, name: str, named: bool, typed: bool) -> Path | None:
    """Returns the folder of the run to go on with, None for a new one."""
    beside = [folder]
    if not named:  # its folder has a number if the name was taken; one of a longer name is another run
        beside = [path for path in sorted(folder.parent.glob(f"{glob.escape(folder.name)}*")) if _name_of(path) == name]
    own = [path for path in beside if _is_own(path, typed)]
    if len(own) > 1:
        raise ConfigError(f"--resume {AUTO}: {', '.join(map(str, own))} are all of this job; name one with --run-dir")
    if named and typed:
        own = beside
    return next((path for path in own if (path / "config.yaml").is_file()), None)


def _name_of(folder: Path) -> str | None:
    """Returns what the config of the run in a folder is called, if there is one that can be read."""
    with suppress(OSError, ConfigError):
        return read_yaml(folder / "config.yaml").get("name", TrainConfig().name)
    return None


def _is_own(folder: Path, typed: bool) -> bool:
    """Returns whether this very job has begun the run in a folder, when it was started before."""
    jobs = own_jobs()
    if folder.resolve() in _begun_here and not typed:
        return False
    with suppress(DataError):
        begun = read_json(folder / "env.json").get("job", {})
        again = launch().requeued or typed  # one start of a job may train several times
        return any(begun.get(name) == jobs[name] for name in jobs if name == "agent" or again)
    return False


def _stopped_by(folder: Path) -> str:
    """Returns which torchrun's run in a folder a signal has ended."""
    with suppress(DataError):
        return read_json(folder / STOPPED)["agent"]
    return "nobody's"


def mark(folder: Path, stopped: bool) -> None:
    """Leaves word that a signal has ended the run, for the torchrun that will start it again; or takes it away."""
    _begun_here.add(folder.resolve())
    agent = own_jobs().get("agent")
    if ranks.rank() == 0:
        if not stopped:
            (folder / STOPPED).unlink(missing_ok=True)
        elif agent:
            write_json(folder / STOPPED, {"agent": agent})


def check_shared(folder: Path) -> None:
    """Raises ConfigError, on every rank, if one of them does not see the folder that rank 0 holds locked."""
    group = ranks.group()
    if group is None:
        return
    written = agreement.agreed(lambda: (folder / LOCK).read_text(encoding="utf-8"))
    end, seen = time.monotonic() + SHARED_WITHIN_S, False
    while not seen and time.monotonic() < end:
        with suppress(OSError):
            seen = (folder / LOCK).read_text(encoding="utf-8") == written
        if not seen:
            time.sleep(0.1)
    blind = agreement.concluded(seen, lambda every: [i for i, saw in enumerate(every) if not saw])
    if blind:
        who = f"{group.peers[blind[0]]}" + (f" and {len(blind) - 1} more" if len(blind) > 1 else "")
        raise ConfigError(
            f"run_dir: {folder} is not shared: {who} does not see there what {group.peers[0]} has written"
        )
