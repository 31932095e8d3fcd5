"""EleutherAI's delphi: its explanations and scores, read as rows of our journals.

    RUN/explanations/HOOKPOINT_latentID.txt       one JSON string
    RUN/scores/SCORER/HOOKPOINT_latentID.txt      one JSON list: a judgement for every window
    RUN/run_config.json                           settings

(as eai-delphi 0.1.3 writes them; tests/golden/delphi was made by it). Scores are computed anew, for delphi leaves out
what its judge failed to answer and tells of no failure; here it lowers the coverage. Silent windows come in tiers:

- random; "similar": alike by embedding (delphi's FAISS); "wrong_marks": the latent fires, but not on what is marked;
- neighbor; "other_latent": windows of latent 0 or 1, which delphi 0.1.3 takes for those of a neighbor, because it reads
  (neighbor, similarity) the other way round. Their distance is a whole number.

Figures of a tier that our scorers have not are under its name ("balanced_accuracy[similar]"), none under another's.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from interp.client.requests import Abilities, Reply, Request
from interp.records import ACTIVE, TIERS, Examples, Explanation, Facts, Item, Judgement, Score, Task, Window
from interp.run.explanations_file import LONGEST_CHARS
from interp.run.flows import Row, score_flow
from interp.scorers import Scorer, Trial
from interp.scorers.detection import Detection
from interp.scorers.fuzzing import Fuzzing
from interp.scorers.simulation import Simulation
from sae.base.errors import DataError
from sae.base.files import read_json, safe_join

log = logging.getLogger(__name__)

EXPLAINER = "delphi"
UNPARSED = "Explanation could not be parsed."
SCORERS: dict[str, Scorer] = {"detection": Detection(), "fuzz": Fuzzing(), "simulation": Simulation()}
QUANTILES, MOST_LEVEL = 10, 10

_NAME = re.compile(r"(.+)_latent(0|[1-9]\d{0,9})\.txt")
_NOTHING_KNOWN = Facts(0, 0, {}, 0.0, (), ())


def read_explanations(folder: Path | str) -> dict[str, dict[int, str]]:
    """Returns the explanations by hookpoint and latent, from a run's folder or that of its explanations.

    What delphi could not parse is no explanation; nor is an empty text, nor one of more than 10,000 characters. How
    many are left out is logged. Raises DataError naming a file that delphi did not write.
    """
    folder = _below(Path(folder), "explanations")
    found: dict[str, dict[int, str]] = {}
    left_out = 0
    for hookpoint, latent, path in _files(folder):
        text = read_json(path)
        if not isinstance(text, str):
            raise DataError(f"{path} holds no JSON string")
        text = text.encode("utf-8", "replace").decode().strip()  # half a surrogate pair could not be written again
        if not text or text == UNPARSED or len(text) > LONGEST_CHARS:
            left_out += 1
        else:
            found.setdefault(hookpoint, {})[latent] = text
    if left_out:
        log.warning("%s: %d files hold no explanation (not parsed by delphi, empty, or too long)", folder, left_out)
    return found


def read_scores(folder: Path | str) -> Iterator[Row]:
    """Yields a row for every scorer, hookpoint and latent of a run's folder or that of its scores.

    It is a row of the score journal (`interp.run.flows.score_flow`) by the explainer "delphi", and tells beside it

    - `hookpoint`: that the latent is of;
    - `doubtful`: how many answers may be failed calls. For these delphi's simulator writes zeros, but its judge may
      have said so. If it read probabilities they are taken for failed, else for answers.

    Windows have no section and no place in a corpus. Quantiles are deciles if there are ten. Simulation is held against
    activations in tenths of the latent's largest, rounded up, for delphi keeps no others. Raises DataError naming the
    file and the entry that delphi did not write.
    """
    folder = _below(Path(folder), "scores")
    explanations, settings = folder.parent / "explanations", _settings(folder.parent / "run_config.json")
    texts = read_explanations(explanations) if explanations.is_dir() else {}
    names = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not SCORERS.keys() & set(names):
        raise DataError(f"{folder} holds no scores: it has no folder {', '.join(SCORERS)}")
    for name in names:
        if name not in SCORERS:
            log.warning("%s: scores by %s are not read", folder, name)
            continue
        for hookpoint, latent, path in _files(safe_join(folder, name)):
            row = {"latent": latent, "scorer": Scorer.get_choice_name(type(SCORERS[name])), "explainer": EXPLAINER}
            row |= {"null": False, "of": latent, "explanation": texts.get(hookpoint, {}).get(latent, "")}
            yield row | {"judge": settings.judge, "hookpoint": hookpoint} | _scored(name, path, settings)


def _below(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _files(folder: Path) -> list[tuple[str, int, Path]]:
    """Returns hookpoint, latent and path of every file; delphi writes a slash in a hookpoint as two dashes."""
    found = []
    for name in sorted(path.name for path in folder.glob("*.txt")):
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataError(f"{folder / name}: its name is not HOOKPOINT_latentNUMBER.txt")
        found.append((match[1].replace("--", "/"), int(match[2]), safe_join(folder, name)))
    return sorted(found)


class _Settings(NamedTuple):
    """What run_config.json says of scores; delphi's defaults where it is not there."""

    judge: str
    quantiles: int
    silent: str
    """Where silent windows are from: random, neighbours, FAISS."""
    fuzz: str
    """What silent windows are in fuzzing: these (default), or active ones with wrong marks (active)."""
    by_probability: bool
    """Whether simulation reads probabilities, so that a level of exactly 0 everywhere is a failed call."""


def _settings(path: Path) -> _Settings:
    config = read_json(path) if path.is_file() else {}
    config = config if isinstance(config, dict) else {}
    parts = (config.get(name) for name in ("sampler_cfg", "constructor_cfg"))
    sampler, constructor = (part if isinstance(part, dict) else {} for part in parts)
    return _Settings(
        judge=Path(str(config.get("explainer_model", ""))).name,
        quantiles=sampler.get("n_quantiles", QUANTILES),
        silent=str(constructor.get("non_activating_source", "random")),
        fuzz=str(config.get("fuzz_type", "default")),
        by_probability=config.get("explainer_provider") == "offline",
    )


def _scored(name: str, path: Path, settings: _Settings) -> Row:
    """Returns what `interp.run.flows.score_flow` makes of the judgements in a file."""
    entries = read_json(path)
    if name == "simulation" and isinstance(entries, list):
        entries = _sequences(entries)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} holds no list of {name}'s judgements")
    read = _simulated if name == "simulation" else _classified
    found = [read(_Entry(path, number, entry), name, settings) for number, entry in enumerate(entries)]
    recorded = _Recorded(SCORERS[name], tuple(task for task, _ in found), tuple(judgement for _, judgement in found))
    try:
        next(score_flow(recorded, Explanation(0, "", EXPLAINER), Examples(0, _NOTHING_KNOWN), {}, Abilities()))
    except StopIteration as ended:
        row: Row = ended.value
    else:
        raise AssertionError("nothing is asked: the answers are there")
    if found:
        row |= {"by_rule": False, "tasks": {**row["tasks"], "starts": [[] for _ in found]}}
    return row | {"doubtful": sum(bool(said.levels) and not any(said.levels) for said in recorded.given)}


@dataclass(frozen=True)
class _Recorded(Scorer):
    """A scorer whose judgements are there already."""

    like: Scorer
    found: tuple[Task, ...]
    given: tuple[Judgement, ...]

    def tasks(self, examples: Examples, split: str, prepared: dict[str, Any]) -> list[Task]:
        """Returns what was judged."""
        return list(self.found)

    def requests(self, trial: Trial) -> list[Request]:
        """Returns nothing: it was asked."""
        return []

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the answers."""
        return list(self.given)

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the scorer's score, and the figures of tiers that it does not know under their names."""
        score = self.like.score(tasks, judgements, facts)
        measures = dict(score.measures)
        for tier in sorted({task.tier for task in tasks} - {ACTIVE, *TIERS}):
            chosen = [i for i, task in enumerate(tasks) if task.tier in (ACTIVE, tier)]
            renamed = [tasks[i] if tasks[i].truth else replace(tasks[i], tier=TIERS[0]) for i in chosen]
            theirs = self.like.score(renamed, [judgements[i] for i in chosen], facts).measures
            told = ("balanced_accuracy", "auroc", "f1", "tnr")
            measures |= {f"{figure}[{tier}]": theirs[figure] for figure in told if figure in theirs}
        return replace(score, measures=measures)

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns what the scorer says of them."""
        return self.like.misses(tasks, judgements, threshold)


class _Entry(NamedTuple):
    """One entry of a file, whose fields are looked at before they are believed."""

    path: Path
    number: int
    fields: dict[str, Any]

    def wrong(self, name: str, allowed: str) -> DataError:
        """Returns the error of a field that is not as delphi writes it."""
        there = repr(self.fields[name])[:60] if name in self.fields else "missing"
        return DataError(f"{self.path}: entry {self.number}: {name} is {there}, not {allowed}")

    def truth(self, name: str, or_null: bool = False) -> bool | None:
        """Returns a field that is true or false, or null if that is allowed."""
        value = self.fields.get(name, "")
        if not isinstance(value, bool) and not (or_null and value is None):
            raise self.wrong(name, "true, false or null" if or_null else "true or false")
        return value

    def real(self, name: str) -> float:
        """Returns a field that is a number, int or float as it was."""
        value = self.fields.get(name)
        if not _is_real(value):
            raise self.wrong(name, "a number")
        return value  # type: ignore[return-value]

    def reals(self, name: str) -> list[float]:
        """Returns a field that is a list of numbers."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(map(_is_real, value)):
            raise self.wrong(name, "a list of numbers")
        return value


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _classified(entry: _Entry, name: str, settings: _Settings) -> tuple[Task, Judgement]:
    """Reads one window of detection or fuzzing."""
    active, prediction = entry.truth("activating"), entry.truth("prediction", or_null=True)
    distance, fires = entry.real("distance"), any(entry.reals("activations"))
    p = None if entry.fields.get("probability") is None else entry.real("probability")
    if p is not None and not 0 <= p <= 1:
        raise entry.wrong("probability", "from 0 to 1")
    if prediction is None:
        judgement = Judgement(None, "no answer")
    elif p == 0 and prediction:  # delphi's 0 / 0: neither answer was among the five most probable tokens
        judgement = Judgement(None, "no_mass")
    else:
        judgement = Judgement(float(prediction if p is None else p))
    if active:
        return Task((), 1.0, ACTIVE, _decile(distance, settings)), judgement
    if not fires:
        tier = "similar" if settings.silent == "FAISS" else "random"
    elif name == "fuzz" and settings.fuzz == "active":
        tier = "wrong_marks"
    else:
        tier = "other_latent" if isinstance(distance, int) else "neighbor"
    return Task((), 0.0, tier), judgement


def _sequences(groups: list[Any]) -> list[Any] | None:
    """Returns the windows of a simulation: of the group of all (distance 0), or of each; None if it is none."""
    if not all(isinstance(group, dict) for group in groups):
        return None
    whole = [group for group in groups if group.get("distance") == 0] or groups
    found = [group.get("scored_sequence_simulations") for group in whole]
    return [entry for one in found for entry in one] if all(isinstance(one, list) for one in found) else None


def _simulated(entry: _Entry, name: str, settings: _Settings) -> tuple[Task, Judgement]:
    """Reads one window of simulation."""
    inner = entry.fields.get("simulation")
    if not isinstance(inner, dict):
        raise entry.wrong("simulation", "an object")
    levels = _Entry(entry.path, entry.number, inner).reals("expected_activations")
    actual, quantile = entry.reals("true_activations"), entry.real("distance")
    if len(levels) != len(actual):
        judgement = Judgement(None, "parse")
    elif settings.by_probability and not any(levels):
        judgement = Judgement(None, "no answer")
    else:
        judgement = Judgement(max(levels, default=0.0) / MOST_LEVEL, levels=tuple(levels))
    window = Window(-1, -1, (), "", (), tuple(actual), 0)
    if quantile >= 0:
        return Task((Item(window, ACTIVE),), 1.0, ACTIVE, _decile(quantile, settings)), judgement
    tier = {"random": "random", "FAISS": "similar"}.get(settings.silent, "unknown")
    return Task((Item(window, tier),), 0.0, tier), judgement


def _decile(quantile: float, settings: _Settings) -> int:
    """Returns the decile of delphi's quantile, of which 0 is the strongest; -1 where there are not ten of them."""
    if settings.quantiles != QUANTILES or quantile not in range(QUANTILES):
        return -1
    return QUANTILES - 1 - int(quantile)
