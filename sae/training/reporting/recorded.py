"""What the folder of a run tells of it, finished or not: read alone, without model or coder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, DataError
from sae.base.files import read_json
from sae.base.paths import near
from sae.base.settings import read_yaml
from sae.base.visible import visible
from sae.evaluation.tables import SAVED, table
from sae.training.history import METRICS, Log, read_log

OF_FIGURES = ("python", "packages", "device", "threads", "world_size", "model")  # not the command, the job, the kernel


@dataclass
class Run:
    """The folder of a run, as far as it can be read."""

    folder: Path
    label: str
    """What it is called on a page."""
    config: dict[str, Any]
    environment: dict[str, Any]
    """What of env.json has a part in figures, and tells nothing of a host."""
    lines: dict[str, list[dict[str, Any]]]
    """Of each coder, what was logged of its training batches."""
    speed: list[dict[str, Any]]
    evaluations: dict[str, list[tuple[int, dict[str, Any]]]]
    """Of each coder, (step, figures); the last one is that of the end, if the run has come to it."""
    finished: bool
    said: list[str] = field(default_factory=list)
    """What cannot be read, in sentences."""

    @property
    def batch_tokens(self) -> int:
        """Tokens a step; 1 if the config does not tell, so that what is drawn is over steps."""
        told = self.config.get("batch_tokens")
        return told if isinstance(told, int) else 1

    @property
    def coders(self) -> list[str]:
        """The names of its coders, in the order in which they were logged."""
        return list(dict.fromkeys([*self.lines, *self.evaluations]))

    def size(self, coder: str) -> int | None:
        """Returns how many latents a coder has, as its file says, or else its figures; None if neither does."""
        told = _tried(self.folder / "coders" / coder / "cfg.json", read_json, self.said).get("d_sae")
        if isinstance(told, int) or not self.evaluations.get(coder):
            return told
        density = self.evaluations[coder][-1][1]["density"]
        alive, dead = sum(density["log10_density_counts"]), density["dead_share"]
        return round(alive / (1 - dead)) if dead < 1 else None


def read_run(folder: Path, label: str) -> Run:
    """Returns what is in the folder of a run.

    ConfigError if it is no such folder; DataError if no line of its log can be read. All else that is damaged is said.
    """
    path, said = folder / METRICS, []
    if not path.is_file():
        raise ConfigError(f"run: {folder} holds no {METRICS}; it is not the folder of a training run.{near(folder)}")
    log = _log(path, said)
    lines = [line for line in log.lines if isinstance(line.get("step"), int) and isinstance(line.get("coder"), str)]
    if not lines and (log.damaged or log.lines):
        raise DataError(f"{path}: no line of it can be read; it is no log of a run, or damaged")
    if len(lines) < len(log.lines):
        said.append(f"{METRICS}: {len(log.lines) - len(lines)} lines name no step and coder; they are left out.")
    evaluations: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    measured = [(line["coder"], line["step"], line["held_out"], METRICS) for line in lines if "held_out" in line]
    last = _tried(folder / SAVED, read_json, said)
    measured += [(name, _steps(found), found, SAVED) for name, found in last.items()]
    for name, step, found, source in measured:
        try:
            table(found)
        except (KeyError, TypeError, AttributeError):
            said.append(f"{source}: of {visible(name)} at step {step} it holds no evaluation; that is left out.")
        else:
            evaluations.setdefault(name, []).append((step, found))
    trained: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "held_out" not in line:
            trained.setdefault(line["coder"], []).append(line)
    environment = _tried(folder / "env.json", read_json, said)
    return Run(
        folder,
        visible(label),
        _tried(folder / "config.yaml", read_yaml, said),
        {key: environment[key] for key in OF_FIGURES if key in environment},
        trained,
        _log(folder / "timings.jsonl", said).lines,
        evaluations,
        bool(last),
        said,
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that tell them apart; numbered where one folder is given twice."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def _steps(found: Any) -> int:
    return found.get("training", {}).get("steps", 0) if isinstance(found, dict) else 0


def _log(path: Path, said: list[str]) -> Log:
    """Returns a log, none if there is no file, and says what of it is damaged."""
    if not path.is_file():
        return Log([], [], False)
    log = read_log(path)
    if log.damaged:
        some = ", ".join(map(str, log.damaged[:5])) + (" ..." if len(log.damaged) > 5 else "")
        said.append(f"{path.name}: {len(log.damaged)} damaged lines are left out (line {some}).")
    if log.unfinished:
        said.append(f"{path.name}: the last line has no end; the run is writing it, or ended meanwhile.")
    return log


def _tried(path: Path, read: Any, said: list[str]) -> dict[str, Any]:
    """Returns what a file holds, nothing if there is none or it is damaged, which is said."""
    if not path.is_file():
        return {}
    try:
        found = read(path)
    except (ConfigError, DataError) as error:
        said.append(visible(" ".join(str(error).replace(f"{path.parent}/", "").split())) + ".")
        return {}
    if not isinstance(found, dict):
        said.append(f"{path.name}: it holds no mapping; it is left out.")
        return {}
    return found
