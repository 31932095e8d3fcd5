r"""Results -> what a local Neuronpedia instance imports: latents, windows and explanations with what they stand in.

    FOLDER/config/explanation_type.jsonl                 explainers; and models, scorers, judges (*_model*, *_score_*)
    FOLDER/MODEL/SOURCE/release.jsonl model.jsonl sourceset.jsonl source.jsonl
    FOLDER/MODEL/SOURCE/features/batch-N.jsonl.gz        a latent a line: density, histograms, tokens, vector
    FOLDER/MODEL/SOURCE/activations/batch-N.jsonl.gz     a window a line
    FOLDER/MODEL/SOURCE/explanations/batch-N.jsonl.gz    a label a line, of people too
    FOLDER/MODEL/SOURCE/scores/batch-N.jsonl.gz          a headline score a line, for its import-file route

The tree is that of its public exports (docs.neuronpedia.org/api-and-data/exports), which its import reads from below
v1/ of a bucket. `neuronpedia_schema.py` says which columns there are, from its code, and has the last word: nothing is
published that it would refuse. Several sources may share a folder; one that is exported again is replaced.

`layer` is the id of a source ("20-gemmascope-res-16k"), and `index`, a latent, is a string. Of a latent that fires
below 0 too, `maxValue` is the value of the largest magnitude, with its sign. Rows have ids of what they say, and files
the same bytes whenever the results are the same. The importer puts a space for every \u0000 in a file, even where that
is part of the text "\\u0000", which then is no JSON any more: no line has it.
"""

import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from interp.exchange.neuronpedia_names import Names
from interp.exchange.neuronpedia_schema import check_tree
from interp.records import Examples, Window
from interp.run.flows import measure_of
from interp.run.rundir import explained_in, scores_in, shard_folders
from interp.scorers import Scorer
from sae.base.errors import ConfigError
from sae.base.files import atomic_write, is_complete, publish

AUTHOR = "clkht01d40000jv08hvalcvly"  # whom every instance has, who owns what Neuronpedia's own tools export
HUMAN = "human"  # the explainer of labels that people wrote
RULE = "rule"  # the judge where a rule judged itself
DIGITS = 6
BATCH = 1024  # latents, or explanations, of one file, as in the public exports

Row = dict[str, Any]


class Exported(NamedTuple):
    """How many lines were written."""

    latents: int
    activations: int
    explanations: int
    scores: int


@dataclass(frozen=True)
class Batch:
    """Some latents of a source, the next ones of it."""

    features: list[Row]
    """Their columns but for the ids of model and source."""
    examples: list[Examples]


@dataclass(frozen=True)
class About:
    """What latents stand in."""

    names: Names
    release: Row = field(default_factory=dict)
    """Columns beside the names, here and below."""
    model: Row = field(default_factory=dict)
    sourceset: Row = field(default_factory=dict)
    source: Row = field(default_factory=dict)
    creator: str = "sae-interp"


def export_run(
    run_dir: Path | str,
    folder: Path | str,
    scorers: Mapping[str, Scorer],
    about: About,
    batches: Iterable[Batch],
    labels: Mapping[int, str] | None = None,
) -> Exported:
    """Writes the files of a run's source below a folder, checked, and returns how many lines they have.

    `scorers` are the run's, by name: of each the headline is told. The active windows of all parts are written, each
    once, from the strongest down. `labels` are of people, by latent. Raises ConfigError if the run has no results, or
    if there is something else in the place of the source; DataError if an instance would refuse what was made. What is
    there stays as it was then.
    """
    folder, names = Path(folder).expanduser(), about.names
    target = folder / names.model_id / names.source_id
    if target.exists() and not is_complete(target):
        raise ConfigError(f"folder: {target} exists and is no whole export; delete it or choose another folder")
    rows = _Explained(Path(run_dir), scorers, names, labels or {})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=folder) as temp:
        draft = Path(temp, "source")  # the folder above is for its owner alone
        for name, own in _metadata(about).items():
            atomic_write(draft / f"{name}.jsonl", _line(own))
        latents, activations = _write_batches(draft, batches, names, about.source.get("dataset"))
        explanations, scores = rows.of(latents)
        for name, lines in (("explanations", explanations), ("scores", scores)):
            for number in range(-(-len(lines) // BATCH)):
                some = islice(lines, number * BATCH, (number + 1) * BATCH)
                _write_batch(draft / name, number, map(_line, some))
        types = _types(explanations, scores, scorers, about.creator)
        config = {name: _beside(folder / "config" / f"{name}.jsonl", own) for name, own in types.items()}
        check_tree(folder, names.model_id, names.source_id, draft, config)
        for name, text in config.items():
            atomic_write(folder / "config" / f"{name}.jsonl", text)
        shutil.rmtree(target, ignore_errors=True)
        with publish(target) as made:
            shutil.copytree(draft, made, dirs_exist_ok=True)
    return Exported(len(latents), activations, len(explanations), len(scores))


def _metadata(about: About) -> dict[str, Row]:
    """Returns the one line of each file that says what latents stand in."""
    names, owned = about.names, {"creatorId": AUTHOR}
    public, by = {"visibility": "PUBLIC"}, {"creatorName": about.creator}
    release = {"name": names.release, "description": names.release, "urls": [], **by, **owned, **public}
    model = {"id": names.model_id, "displayName": names.model_id, "displayNameShort": names.model_id, **owned, **public}
    model |= {"owner": "unknown", "layers": 0, "neuronsPerLayer": 0, "inferenceEnabled": False}
    of_set = {"modelId": names.model_id, "name": names.set, "releaseName": names.release, "description": names.set}
    of_set |= {"urls": [], "allowInferenceSearch": False, **by, **owned, **public}
    source = {"modelId": names.model_id, "id": names.source_id, "setName": names.set, "hasDashboards": True}
    source |= {"inferenceEnabled": False, **owned, **public}
    return {
        "release": release | about.release,
        "model": model | about.model,
        "sourceset": of_set | about.sourceset,
        "source": source | about.source,
    }


def _write_batches(draft: Path, batches: Iterable[Batch], names: Names, dataset: str | None) -> tuple[set[int], int]:
    """Returns the latents that were written, and how many windows."""
    latents, activations = set[int](), 0
    where = {"modelId": names.model_id, "layer": names.source_id}
    files = 0
    for number, batch in enumerate(batches):
        features = [{**where, "sourceSetName": names.set, "creatorId": AUTHOR, **row} for row in batch.features]
        _write_batch(draft / "features", number, map(_line, features))
        latents |= {int(row["index"]) for row in features}
        windows = [_line(row) for one in batch.examples for row in _activations(one, where, dataset)]
        if windows:
            _write_batch(draft / "activations", files, windows)
            files, activations = files + 1, activations + len(windows)
    return latents, activations


class _Explained:
    """The explanations of a run and their scores, as rows."""

    def __init__(self, run_dir: Path, scorers: Mapping[str, Scorer], names: Names, labels: Mapping[int, str]) -> None:
        self.folders, self.scorers, self.labels = shard_folders(run_dir), scorers, labels
        self.where = {"modelId": names.model_id, "layer": names.source_id}

    def of(self, latents: set[int]) -> tuple[list[Row], list[Row]]:
        """Returns the explanations of some latents, by latent and explainer, and their scores."""
        told = defaultdict[tuple[int, str, str], list[Row]](list)
        for folder in self.folders:
            for row in scores_in(folder).rows():
                if row["scorer"] in self.scorers and not row["null"]:
                    found = _score(row, self.scorers[row["scorer"]].headline)
                    if found is not None:
                        told[row["latent"], row["explainer"], row["explanation"]].append(found)
        texts: dict[tuple[int, str], tuple[str, str | None]] = {
            (latent, HUMAN): (text, None) for latent, text in self.labels.items()
        }
        for folder in self.folders:
            for row in explained_in(folder).rows():
                if row["explanation"] is not None:
                    texts[row["latent"], row["explainer"]] = row["explanation"]["text"], _named(row["by"])
        explanations, scores = list[Row](), list[Row]()
        for (latent, explainer), (text, by) in sorted(texts.items(), key=lambda one: one[0]):
            if latent not in latents:
                continue
            named = {**self.where, "index": str(latent)}
            own = _identity(*named.values(), explainer, text)
            row = {"id": own, **named, "authorId": AUTHOR, "description": text, "typeName": explainer}
            explanations.append(row | {"explanationModelName": by})
            for score in sorted(told[latent, explainer, text], key=lambda score: list(score.values())[1:]):
                identity = _identity(own, score["explanationScoreTypeName"], score["explanationScoreModelName"])
                scores.append({"id": identity, "initiatedByUserId": AUTHOR, "explanationId": own, **score})
        return explanations, scores


def _score(row: Row, headline: str) -> Row | None:
    """Returns a score by its headline, with the interval and the coverage beside it; None where it is n/a."""
    found = measure_of(row, headline)
    if found.value is None:
        return None
    details = {"measure": headline, "low": found.low, "high": found.high}
    details |= {name: row["score"][name] for name in ("n", "coverage")}
    return {
        "value": found.value,
        "explanationScoreTypeName": row["scorer"],
        "explanationScoreModelName": RULE if row["by_rule"] else row["judge"],
        "jsonDetails": json.dumps(details),
    }


def _activations(example: Examples, where: Row, dataset: str | None) -> Iterator[Row]:
    named = {**where, "index": str(example.latent)}
    items = (*example.explain, *example.valid, *example.test)
    windows = {item.window.start: item.window for item in items if item.active}
    for window in sorted(windows.values(), key=lambda window: (-window.strength, window.start)):
        identity = _identity(*named.values(), str(window.start), window.text)
        yield {"id": identity, **named, "creatorId": AUTHOR, "dataSource": dataset, **_activation(window)}


def _activation(window: Window) -> Row:
    values = rounded(window.activations)
    peak = max(range(len(values)), key=lambda place: abs(values[place]))
    return {
        "tokens": window.pieces(),
        "values": values,
        "maxValue": values[peak],
        "maxValueTokenIndex": peak,
        "minValue": min(values),
    }


def _types(explanations: list[Row], scores: list[Row], scorers: Mapping[str, Scorer], creator: str) -> dict[str, Any]:
    """Returns the rows of config/ by file: what explanations and scores name must be there before them."""
    headlines = {name: f"its {scorer.headline.replace('_', ' ')}" for name, scorer in scorers.items()}
    people = {HUMAN: "Labels that people wrote"}
    named = {
        "explanation_model_type": ({row["explanationModelName"] for row in explanations} - {None}, {}),
        "explanation_type": ({row["typeName"] for row in explanations}, people),
        "explanation_score_model": ({row["explanationScoreModelName"] for row in scores}, {}),
        "explanation_score_type": ({row["explanationScoreTypeName"] for row in scores}, headlines),
    }
    found: dict[str, list[Row]] = {"eval_type": []}
    for file, (names, said) in named.items():
        owned = {} if "model" in file else {"creatorId": AUTHOR}
        found[file] = [
            {"name": name, "displayName": name, "description": said.get(name, name), "creatorName": creator, **owned}
            for name in sorted(names)
        ]
    return found


def _beside(path: Path, rows: list[Row]) -> str:
    """Returns the lines of a file of config/, with those of other sources that are there."""
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = {json.loads(line)["name"]: f"{line}\n" for line in before} | {row["name"]: _line(row) for row in rows}
    return "".join(lines[name] for name in sorted(lines))


def _write_batch(folder: Path, number: int, lines: Iterable[str]) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:
        for line in lines:
            file.write(line.encode("ascii"))
    atomic_write(folder / f"batch-{number}.jsonl.gz", packed.getvalue())


def rounded(values: Iterable[float]) -> list[float]:
    """Returns numbers with as many digits as are written."""
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _named(by: str) -> str | None:
    """Returns the name of a model, of one on this disk without its folder."""
    return (Path(by).name if Path(by).expanduser().is_absolute() else by) or None


def _identity(*parts: str) -> str:
    """Returns an id in the form of theirs, the same for the same parts: importing twice adds nothing."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _line(row: Row) -> str:
    """Returns a line of ASCII that reads as JSON before and after the importer has replaced what is NUL to it."""
    line = json.dumps(_storable(row), allow_nan=False)
    return line.replace("\\\\u0000", "\\u005cu0000") + "\n"


def _storable(value: Any) -> Any:
    """Returns a value whose texts a database of theirs holds: without NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        return value.replace("\0", " ").encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    return {name: _storable(one) for name, one in value.items()} if isinstance(value, dict) else value
