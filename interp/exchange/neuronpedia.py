r"""Results -> Neuronpedia's JSON lines: explanations with their scores, and the windows in which each latent fires.

    FOLDER/explanations.jsonl   id modelId layer index authorId description typeName explanationModelName scores
    FOLDER/activations.jsonl    id modelId layer index creatorId dataSource tokens values maxValue maxValueTokenIndex
                                minValue

The names are the columns of its public exports (docs.neuronpedia.org/api-and-data/exports), as hijohnnylin/neuronpedia
writes them (utils/neuronpedia-utils/neuronpedia_utils/export-data.py at 1a80fe9), declares them (`Explanation` and
`Activation` in apps/webapp/prisma/schema.prisma at 008d504) and reads them (apps/webapp/lib/db/import.ts at efd6e35).
`layer` is the id of a source ("20-gemmascope-res-16k"), and `index`, a latent, is a string. `scores` is no column of
these exports. Its entries are named as those which the API gives with a feature (`ExplanationScore` in the schema),
and the importer leaves it out. It takes the columns from the first line, so every line has all of them. Of a latent
that fires below 0 too, `maxValue` is the value of the largest magnitude, with its sign.

Before it imports them, an instance must have the latents (its `Neuron`), the user (`authorId`, `creatorId`), and the
explainers and their models (`ExplanationType`, `ExplanationModelType`) by these names. Its importer puts a space for
every \u0000 in a file, even where that is part of the text "\\u0000", which then is no JSON any more: no line has it.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from interp.records import Examples, Window
from interp.run.flows import measure_of
from interp.run.rundir import explained_in, scores_in, shard_folders
from interp.scorers import Scorer
from sae.base.errors import ConfigError
from sae.base.files import atomic_write

EXPLANATIONS, ACTIVATIONS = "explanations.jsonl", "activations.jsonl"
AUTHOR = "clkht01d40000jv08hvalcvly"  # who owns what Neuronpedia's own tools export
DIGITS = 6

_ID = re.compile(r"[A-Za-z0-9._-]+")


class Exported(NamedTuple):
    """How many lines were written."""

    explanations: int
    activations: int


def export_run(
    run_dir: Path | str,
    folder: Path | str,
    scorers: dict[str, Scorer],
    model_id: str,
    source_id: str,
    examples: Iterable[Examples] = (),
    dataset: str | None = None,
) -> Exported:
    """Writes explanations.jsonl and activations.jsonl of a run into a folder and returns how many lines they have.

    `scorers` are the run's, by name: of each the headline is told. `examples` may come in any order; their active
    windows of all parts are written, each once, by latent and from the strongest down. `dataset` names the text. Lines
    are in the same order, with the same ids, whenever the results are the same. Raises ConfigError if an id is not one
    of Neuronpedia's, or if the run has no results.
    """
    for name, value in (("model_id", model_id), ("source_id", source_id)):
        if not _ID.fullmatch(value):
            raise ConfigError(f"{name}: {value!r} is not an id of Neuronpedia's: letters, digits and . _ - alone")
    where = {"modelId": model_id, "layer": source_id}
    explanations = _explanations(Path(run_dir), scorers, where)
    activations = _activations(examples, where, {"creatorId": AUTHOR, "dataSource": dataset})
    for name, lines in ((EXPLANATIONS, explanations), (ACTIVATIONS, activations)):
        atomic_write(Path(folder) / name, "".join(lines))
    return Exported(len(explanations), len(activations))


def _explanations(run_dir: Path, scorers: dict[str, Scorer], where: dict[str, str]) -> list[str]:
    folders = shard_folders(run_dir)
    scores: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for folder in folders:
        for row in scores_in(folder).rows():
            if row["scorer"] in scorers and not row["null"]:
                found = _score(row, scorers[row["scorer"]].headline)
                if found is not None:
                    scores[row["latent"], row["explainer"], row["explanation"]].append(found)
    lines: dict[tuple[int, str], str] = {}
    for folder in folders:
        for row in explained_in(folder).rows():
            if row["explanation"] is None:
                continue
            latent, explainer, text = row["latent"], row["explainer"], row["explanation"]["text"]
            named = {**where, "index": str(latent)}
            lines[latent, explainer] = _line(
                {
                    "id": _identity(*named.values(), explainer, text),
                    **named,
                    "authorId": AUTHOR,
                    "description": text,
                    "typeName": explainer,
                    "explanationModelName": row["by"] or None,
                    "scores": sorted(scores[latent, explainer, text], key=lambda score: list(score.values())[1:]),
                }
            )
    return [lines[key] for key in sorted(lines)]


def _score(row: dict[str, Any], headline: str) -> dict[str, Any] | None:
    """Returns a score by its headline, with the interval and the coverage beside it; None where it is n/a."""
    found = measure_of(row, headline)
    if found.value is None:
        return None
    details = {"measure": headline, "low": found.low, "high": found.high}
    details |= {name: row["score"][name] for name in ("n", "coverage")}
    return {
        "value": found.value,
        "explanationScoreTypeName": row["scorer"],
        "explanationScoreModelName": "rule" if row["by_rule"] else row["judge"],
        "jsonDetails": json.dumps(details),
    }


def _activations(examples: Iterable[Examples], where: dict[str, str], origin: dict[str, str | None]) -> list[str]:
    lines: dict[int, list[str]] = {}
    for example in examples:
        named = {**where, "index": str(example.latent)}
        items = (*example.explain, *example.valid, *example.test)
        windows = {item.window.start: item.window for item in items if item.active}
        strongest = sorted(windows.values(), key=lambda window: (-window.strength, window.start))
        ids = (_identity(*named.values(), str(window.start), window.text) for window in strongest)
        lines[example.latent] = [
            _line({"id": identity, **named, **origin, **_activation(window)})
            for identity, window in zip(ids, strongest, strict=True)
        ]
    return [line for latent in sorted(lines) for line in lines[latent]]


def _activation(window: Window) -> dict[str, Any]:
    values = [float(f"{value:.{DIGITS}g}") for value in window.activations]
    peak = max(range(len(values)), key=lambda place: abs(values[place]))
    return {
        "tokens": window.pieces(),
        "values": values,
        "maxValue": values[peak],
        "maxValueTokenIndex": peak,
        "minValue": min(values),
    }


def _identity(*parts: str) -> str:
    """Returns an id in the form of theirs, the same for the same parts: importing twice adds nothing."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _line(row: dict[str, Any]) -> str:
    """Returns a line of ASCII that reads as JSON before and after the importer has replaced what is NUL to it."""
    line = json.dumps(_without_nul(row), allow_nan=False)
    return line.replace("\\\\u0000", "\\u005cu0000") + "\n"


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", " ")
    if isinstance(value, list):
        return [_without_nul(one) for one in value]
    return {name: _without_nul(one) for name, one in value.items()} if isinstance(value, dict) else value
