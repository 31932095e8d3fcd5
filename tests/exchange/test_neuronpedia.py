"""What is written for Neuronpedia, read back as its importer reads it: labels, scores, windows, and their folder."""

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from interp.exchange import neuronpedia
from interp.exchange.neuronpedia import AUTHOR, About, Batch, Exported, export_run
from interp.exchange.neuronpedia_names import Names
from interp.exchange.neuronpedia_schema import check_tree
from interp.records import ACTIVE, Examples, Explanation, Facts, Item, Measure, Score, Window
from interp.run.rundir import explained_in, scores_in
from interp.scorers.detection import Detection
from interp.scorers.simulation import Simulation
from sae.base.errors import ConfigError, DataError

MODEL, SOURCE = "gemma-2-2b", "20-some-res"
SCORERS = {"detection": Detection(), "simulation": Simulation()}
NOTHING = Facts(0, 0, {}, 0.0, (), ())


def read(folder: Path, name: str, source: str = SOURCE) -> list[dict[str, Any]]:
    """The lines of all files of a kind, as the importer reads them: the columns are those of the first."""
    rows: list[dict[str, Any]] = []
    paths = sorted((folder / MODEL / source / name).glob("*"), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
    for path in paths:
        lines = gzip.decompress(path.read_bytes()).decode("ascii").replace("\\u0000", " ").strip().split("\n")
        rows += [{key: json.loads(line).get(key) for key in json.loads(lines[0])} for line in lines]
    return rows


def feature(latent: int) -> dict[str, Any]:
    return {"index": str(latent), "maxActApprox": 1.5, "frac_nonzero": 0.25}


def exported(
    run: Path,
    folder: Path,
    examples: Iterable[Examples] = (),
    source: str = SOURCE,
    model: str = MODEL,
    latents: Iterable[int] = range(4),
    labels: dict[int, str] | None = None,
    dataset: str | None = None,
) -> Exported:
    """Exports a run whose latents are those of the examples and some others."""
    examples = sorted(examples, key=lambda one: one.latent)
    ids = sorted({*latents, *(one.latent for one in examples)})
    about = About(Names(model, source), source={"dataset": dataset})
    batches = [Batch([feature(latent) for latent in ids], examples)]
    return export_run(run, folder, SCORERS, about, batches, labels)


def score(measures: dict[str, Measure], n: int = 20) -> dict[str, Any]:
    return asdict(Score(measures, n, 0.8, {"parse": 5}))


def made(run: Path, shards: int = 1, texts: dict[tuple[int, str], str] | None = None) -> Path:
    """A run of two explainers on latents 0 to 3; latent 2 has no explanation by one of them."""
    texts = texts or {(latent, name): f"{name} on {latent}" for latent in range(4) for name in ("llm", "token_lookup")}
    for latent, name in reversed(texts):
        folder = run / "shards" / f"{latent % shards + 1}-of-{shards}"
        text, by = texts[latent, name], "some/writer" if name == "llm" else ""
        row: dict[str, Any] = {"latent": latent, "explainer": name, "by": by, "status": "ok", "explanation": None}
        if (latent, name) != (2, "llm"):
            row["explanation"] = Explanation(latent, text, name, by).to_json()
        explained_in(folder).append(row)
        scores = scores_in(folder)
        told = {"latent": latent, "explainer": name, "explanation": text, "status": "ok"}
        ruled = name == "token_lookup"
        accuracy = Measure(0.75 + latent / 100, 0.5, 0.9)
        for scorer, null, measures in (
            ("simulation", False, {"correlation": Measure(0.5)}),
            ("detection", True, {"balanced_accuracy": Measure(0.11)}),
            ("detection", False, {"balanced_accuracy": accuracy, "auroc": Measure(0.99)}),
            ("unknown", False, {"balanced_accuracy": accuracy}),
        ):
            row = {**told, "scorer": scorer, "null": null, "judge": "judge", "by_rule": ruled}
            scores.append(row | {"score": score(measures)})
    return run


def window(pieces: Iterable[str], values: dict[int, float], start: int = 0) -> Window:
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + len(piece))
    n = len(bounds) - 1
    activations = tuple(values.get(i, 0.0) for i in range(n))
    return Window(0, start, tuple(range(n)), "".join(pieces), tuple(bounds), activations, 0)


def example(latent: int, *windows: Window) -> Examples:
    items = tuple(Item(one, ACTIVE) for one in windows)
    silent = Item(window("silent", {}, start=999), "random")
    return Examples(latent, NOTHING, explain=items[:1], valid=items[1:2], test=(*items[2:], silent))


def test_explanations_and_their_scores_name_what_is_there(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert exported(run, tmp_path / "out") == Exported(4, 0, 7, 14)
    rows = read(tmp_path / "out", "explanations")
    places = [(row["index"], row["typeName"]) for row in rows]
    assert places == sorted(places)
    assert ("2", "llm") not in places
    row = rows[2]
    assert (row["modelId"], row["layer"], row["index"]) == ("gemma-2-2b", "20-some-res", "1")
    assert (row["description"], row["typeName"], row["explanationModelName"]) == ("llm on 1", "llm", "some/writer")
    assert rows[3]["explanationModelName"] is None
    scores = [one for one in read(tmp_path / "out", "scores") if one["explanationId"] == row["id"]]
    told = [(s["explanationScoreTypeName"], s["explanationScoreModelName"], s["value"]) for s in scores]
    assert told == [("detection", "judge", 0.76), ("simulation", "judge", 0.5)]
    details = {"measure": "balanced_accuracy", "low": 0.5, "high": 0.9, "n": 20, "coverage": 0.8}
    assert json.loads(scores[0]["jsonDetails"]) == details
    config = tmp_path / "out" / "config"
    named = {
        path.stem: [json.loads(line)["name"] for line in path.read_text().splitlines()] for path in config.iterdir()
    }
    assert named == {
        "eval_type": [],
        "explanation_model_type": ["some/writer"],
        "explanation_score_model": ["judge", "rule"],
        "explanation_score_type": ["detection", "simulation"],
        "explanation_type": ["llm", "token_lookup"],
    }


def test_scores_that_are_none_or_of_another_text(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    journal = scores_in(run / "shards" / "1-of-1")
    row = {**journal.get((0, "detection", "llm", False)), "score": score({"balanced_accuracy": Measure(None)})}
    journal.append(row)
    journal.append({**journal.get((0, "simulation", "llm", False)), "explanation": "an older one"})
    journal.append({**row, "latent": 1, "status": "insufficient"} | {"score": {}})
    exported(run, tmp_path)
    ids = {(row["index"], row["typeName"]): row["id"] for row in read(tmp_path, "explanations")}
    of = {name: [s for s in read(tmp_path, "scores") if s["explanationId"] == own] for name, own in ids.items()}
    assert of["0", "llm"] == []
    assert [one["explanationScoreTypeName"] for one in of["1", "llm"]] == ["simulation"]


def test_labels_of_people_are_explanations_of_theirs(tmp_path: Path) -> None:
    exported(made(tmp_path / "run"), tmp_path, labels={1: "months <b>", 77: "not of this run"})
    rows = read(tmp_path, "explanations")
    assert [(row["index"], row["description"]) for row in rows if row["typeName"] == "human"] == [("1", "months <b>")]
    assert '"human"' in (tmp_path / "config" / "explanation_type.jsonl").read_text()


def test_activations(tmp_path: Path) -> None:
    weak, strong = window([" a", "b", " c"], {1: 0.1}, 40), window([" x", " y"], {0: -1 / 3, 1: 0.5}, 10)
    given = [example(12, weak, strong, weak), example(3, strong)]
    assert exported(made(tmp_path), tmp_path, iter(given), dataset="some/texts") == Exported(5, 3, 7, 14)
    rows = read(tmp_path, "activations")
    assert [(row["index"], row["maxValue"]) for row in rows] == [("3", 0.5), ("12", 0.5), ("12", 0.1)]
    assert rows[0]["tokens"] == [" x", " y"]
    assert rows[0]["values"] == [-0.333333, 0.5]
    assert (rows[0]["maxValueTokenIndex"], rows[0]["minValue"]) == (1, -0.333333)
    assert (rows[0]["dataSource"], rows[0]["layer"], rows[0]["creatorId"]) == ("some/texts", SOURCE, AUTHOR)
    for row in rows:
        assert re.fullmatch("c[0-9a-f]{24}", row["id"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])


def test_a_latent_that_fires_below_zero_is_told_by_magnitude(tmp_path: Path) -> None:
    strengths = (-0.5, -3.0, 2.0)
    windows = [window("abc", {1: value, 2: 0.25}, start=100 * place) for place, value in enumerate(strengths)]
    exported(made(tmp_path), tmp_path, [example(0, *windows)])
    rows = read(tmp_path, "activations")
    assert [(row["maxValue"], row["maxValueTokenIndex"]) for row in rows] == [(-3.0, 1), (2.0, 1), (-0.5, 1)]
    assert [row["minValue"] for row in rows] == [-3.0, 0.0, -0.5]


def test_tokens_that_are_parts_of_characters(tmp_path: Path) -> None:
    text = Window(0, 0, (1, 2, 3, 4), "a\U0001f642!", (0, 1, 1, 2, 3), (0.0, 1.0, 2.0, 0.0), 0)
    exported(made(tmp_path), tmp_path, [example(0, text)])
    assert read(tmp_path, "activations")[0]["tokens"] == ["a", "", "\U0001f642", "!"]


HOSTILE = [
    "two\nlines\r\n", "\u2028\u2029\x85", '"}\n{"modelId": "other"', "NUL \0 here", "the text \\u0000",
    "\\\\u0000 and \\", "\\\0", "</script><b>é</b> \U0001f642", "\ufffd\x1b[31m", "half \ud800 a pair",
    "\u202eRTL\u200b", "```\n<<< \"' ${x}", "x" * 1_000_000,
]  # fmt: skip


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    texts = {(i, "llm"): text for i, text in enumerate(HOSTILE) if i != 2} | {(99, "llm"): HOSTILE[2]}
    shown = [example(5, window(HOSTILE, {0: 1.0}))]
    labels = dict(enumerate(HOSTILE))
    exported(made(tmp_path, texts=texts), tmp_path, shown, latents=[*range(len(HOSTILE)), 99], labels=labels)
    plain = [text.replace("\0", " ").replace("\ud800", "?") for text in HOSTILE]
    rows = read(tmp_path, "explanations")
    assert {int(r["index"]): r["description"] for r in rows if r["typeName"] == "human"} == dict(enumerate(plain))
    assert {r["description"] for r in rows if r["typeName"] == "llm"} == {*plain}
    assert read(tmp_path, "activations")[0]["tokens"] == plain


def test_the_same_results_are_the_same_bytes(tmp_path: Path) -> None:
    given = [example(latent, window("abc", {latent: 1.0}, start=latent)) for latent in range(3)]
    for name, shards, order in (("one", 1, given), ("three", 3, given[::-1])):
        exported(made(tmp_path / name, shards), tmp_path / name / "out", order)
    exported(tmp_path / "one", tmp_path / "again" / "out", given)
    first, *others = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / name / "out" for name in ("one", "three", "again"))
    )
    assert len(first) == 15
    assert others == [first, first]


def test_ids_differ_where_anything_does(tmp_path: Path) -> None:
    run, found = made(tmp_path / "run"), set()
    one = example(0, window("ab", {0: 1.0}))
    shifted = example(0, replace(one.explain[0].window, start=7))
    for model, source, given in (
        ("m", SOURCE, one),
        (MODEL, "1-t", one),
        (MODEL, SOURCE, one),
        (MODEL, SOURCE, shifted),
    ):
        exported(run, tmp_path / "out", [given], source, model)
        (path,) = (tmp_path / "out" / model / source / "activations").iterdir()
        found.add(json.loads(gzip.decompress(path.read_bytes()))["id"])
    assert len(found) == 4


def test_many_latents_are_many_files_that_name_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 2)
    run = made(tmp_path / "run")
    given = [example(latent, window("abc", {0: 1.0}, start=latent)) for latent in (2, 3)]
    batches = [Batch([feature(0), feature(1)], []), Batch([feature(2), feature(3)], given)]
    export_run(run, tmp_path, SCORERS, About(Names(MODEL, SOURCE)), batches)
    names = {
        kind: sorted(path.name for path in (tmp_path / MODEL / SOURCE / kind).iterdir())
        for kind in ("features", "activations", "explanations", "scores")
    }
    assert [len(found) for found in names.values()] == [2, 1, 4, 7]  # a batch without windows leaves no empty file
    assert names["activations"] == ["batch-0.jsonl.gz"]
    assert check_tree(tmp_path, MODEL, SOURCE)["Neuron"] == 4


def test_sources_share_a_folder_and_one_that_comes_again_is_replaced(tmp_path: Path) -> None:
    one = [example(0, window("ab", {0: 1.0}))]
    exported(made(tmp_path / "a"), tmp_path / "out", one)
    exported(made(tmp_path / "b", texts={(0, "other"): "x"}), tmp_path / "out", source="21-some-res")
    exported(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out" / MODEL / SOURCE / "activations").exists()
    assert len(read(tmp_path / "out", "explanations", "21-some-res")) == 1
    types = (tmp_path / "out" / "config" / "explanation_type.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in types] == ["llm", "other", "token_lookup"]
    for source in (SOURCE, "21-some-res"):
        check_tree(tmp_path / "out", MODEL, source)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config", MODEL]


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / MODEL / SOURCE).mkdir(parents=True)
    (tmp_path / MODEL / SOURCE / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is no whole export; delete it or choose another folder"):
        exported(made(tmp_path / "run"), tmp_path)
    assert [path.name for path in (tmp_path / MODEL / SOURCE).iterdir()] == ["thesis.tex"]


def test_a_run_without_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no shards"):
        exported(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["number", "schema"])
def test_a_failure_leaves_the_files_of_before(tmp_path: Path, failing: str) -> None:
    run = made(tmp_path / "run")
    out = tmp_path / "out"
    exported(run, out, [example(0, window("ab", {0: 1.0}))])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if failing == "number":
        with pytest.raises(ValueError, match="not JSON compliant"):
            exported(run, out, [example(0, window("ab", {0: float("inf")}))])
    else:
        batches = [Batch([feature(0) | {"pos_str": ["a"], "pos_values": []}], [])]
        with pytest.raises(
            DataError, match=r"features/batch-0.jsonl.gz line 1: pos_str has 1, pos_values has 0 values"
        ):
            export_run(run, out, SCORERS, About(Names(MODEL, SOURCE)), batches)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in out.iterdir()) == ["config", MODEL]
