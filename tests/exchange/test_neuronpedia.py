"""Neuronpedia's lines, read back by a reader that takes nothing but its fields and types."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from interp.exchange.neuronpedia import AUTHOR, Exported, export_run
from interp.records import ACTIVE, Examples, Explanation, Facts, Item, Measure, Score, Window
from interp.run.rundir import explained_in, scores_in
from interp.scorers.detection import Detection
from interp.scorers.simulation import Simulation
from sae.base.errors import ConfigError

# As declared in apps/webapp/prisma/schema.prisma, with the nested scores of its API.
EXPLANATION = {
    "id": "id", "modelId": str, "layer": str, "index": str, "authorId": "id", "description": str,
    "typeName": (str, None), "explanationModelName": (str, None), "scores": list,
}  # fmt: skip
SCORE = {"value": float, "explanationScoreTypeName": str, "explanationScoreModelName": str, "jsonDetails": str}
ACTIVATION = {
    "id": "id", "modelId": str, "layer": str, "index": str, "creatorId": "id", "dataSource": (str, None),
    "tokens": [str], "values": [float], "maxValue": float, "maxValueTokenIndex": int, "minValue": float,
}  # fmt: skip
SCORERS = {"detection": Detection(), "simulation": Simulation()}
NOTHING = Facts(0, 0, {}, 0.0, (), ())


def check(value: Any, kind: Any, name: str) -> None:
    if kind == "id":
        assert isinstance(value, str), name
        assert re.fullmatch("c[0-9a-f]{24}", value) or value == AUTHOR, name
    elif isinstance(kind, tuple):
        assert value is None or type(value) is kind[0], name
    elif isinstance(kind, list):
        assert type(value) is list, name
        assert all(type(one) is kind[0] for one in value), name
    else:
        assert type(value) is kind, name


def read(path: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a file, which have just these fields, in one order; as they are, and as the importer reads them."""
    text = path.read_bytes().decode("ascii")
    assert text == "" or text.endswith("\n")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    imported = text.replace("\\u0000", " ").strip().split("\n") if text else []
    assert [json.loads(line) for line in imported] == rows
    for row in rows:
        assert list(row) == list(fields)
        for name, kind in fields.items():
            check(row[name], kind, name)
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


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


def test_explanations_and_scores(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert export_run(run, tmp_path / "out", SCORERS, "gemma-2-2b", "20-some-res") == Exported(7, 0)
    rows = read(tmp_path / "out" / "explanations.jsonl", EXPLANATION)
    assert (tmp_path / "out" / "activations.jsonl").read_bytes() == b""
    places = [(row["index"], row["typeName"]) for row in rows]
    assert places == sorted(places)
    assert ("2", "llm") not in places
    row = rows[2]
    assert (row["modelId"], row["layer"], row["index"]) == ("gemma-2-2b", "20-some-res", "1")
    assert (row["description"], row["typeName"], row["explanationModelName"]) == ("llm on 1", "llm", "some/writer")
    assert rows[3]["explanationModelName"] is None
    for one in (found for row in rows for found in row["scores"]):
        assert list(one) == list(SCORE)
        for name, kind in SCORE.items():
            check(one[name], kind, name)
    told = [(s["explanationScoreTypeName"], s["explanationScoreModelName"], s["value"]) for s in row["scores"]]
    assert told == [("detection", "judge", 0.76), ("simulation", "judge", 0.5)]
    assert {one["explanationScoreModelName"] for one in rows[3]["scores"]} == {"rule"}
    details = {"measure": "balanced_accuracy", "low": 0.5, "high": 0.9, "n": 20, "coverage": 0.8}
    assert json.loads(row["scores"][0]["jsonDetails"]) == details


def test_scores_that_are_none_or_of_another_text(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    journal = scores_in(run / "shards" / "1-of-1")
    row = {**journal.get((0, "detection", "llm", False)), "score": score({"balanced_accuracy": Measure(None)})}
    journal.append(row)
    journal.append({**journal.get((0, "simulation", "llm", False)), "explanation": "an older one"})
    journal.append({**row, "latent": 1, "status": "insufficient"} | {"score": {}})
    export_run(run, tmp_path, SCORERS, "m", "s")
    rows = {(row["index"], row["typeName"]): row for row in read(tmp_path / "explanations.jsonl", EXPLANATION)}
    assert rows["0", "llm"]["scores"] == []
    assert [one["explanationScoreTypeName"] for one in rows["1", "llm"]["scores"]] == ["simulation"]


def test_activations(tmp_path: Path) -> None:
    weak, strong = window([" a", "b", " c"], {1: 0.1}, 40), window([" x", " y"], {0: -1 / 3, 1: 0.5}, 10)
    given = [example(12, weak, strong, weak), example(3, strong)]
    count = export_run(made(tmp_path), tmp_path, SCORERS, "m", "s", iter(given), dataset="some/texts")
    assert count == Exported(7, 3)
    rows = read(tmp_path / "activations.jsonl", ACTIVATION)
    assert [(row["index"], row["maxValue"]) for row in rows] == [("3", 0.5), ("12", 0.5), ("12", 0.1)]
    assert rows[0]["tokens"] == [" x", " y"]
    assert rows[0]["values"] == [-0.333333, 0.5]
    assert (rows[0]["maxValueTokenIndex"], rows[0]["minValue"]) == (1, -0.333333)
    assert (rows[0]["dataSource"], rows[0]["layer"]) == ("some/texts", "s")
    for row in rows:
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])


def test_a_latent_that_fires_below_zero_is_told_by_magnitude(tmp_path: Path) -> None:
    strengths = (-0.5, -3.0, 2.0)
    windows = [window("abc", {1: value, 2: 0.25}, start=100 * place) for place, value in enumerate(strengths)]
    export_run(made(tmp_path), tmp_path, SCORERS, "m", "s", [example(0, *windows)])
    rows = read(tmp_path / "activations.jsonl", ACTIVATION)
    assert [(row["maxValue"], row["maxValueTokenIndex"]) for row in rows] == [(-3.0, 1), (2.0, 1), (-0.5, 1)]
    assert [row["minValue"] for row in rows] == [-3.0, 0.0, -0.5]


def test_tokens_that_are_parts_of_characters(tmp_path: Path) -> None:
    text = Window(0, 0, (1, 2, 3, 4), "a\U0001f642!", (0, 1, 1, 2, 3), (0.0, 1.0, 2.0, 0.0), 0)
    export_run(made(tmp_path), tmp_path, SCORERS, "m", "s", [example(0, text)])
    assert read(tmp_path / "activations.jsonl", ACTIVATION)[0]["tokens"] == ["a", "", "\U0001f642", "!"]


HOSTILE = [
    "two\nlines\r\n", "\u2028\u2029\x85", '"}\n{"modelId": "other"', "NUL \0 here", "the text \\u0000",
    "\\\\u0000 and \\", "\\\0", "</script><b>é</b> \U0001f642", "\ufffd\x1b[31m",
]  # fmt: skip


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    texts = {(i, "llm"): text for i, text in enumerate(HOSTILE) if i != 2} | {(99, "llm"): HOSTILE[2]}
    export_run(made(tmp_path, texts=texts), tmp_path, SCORERS, "m", "s", [example(5, window(HOSTILE, {0: 1.0}))])
    rows = read(tmp_path / "explanations.jsonl", EXPLANATION)
    plain = {str(latent): text.replace("\0", " ") for (latent, _), text in texts.items()}
    assert {row["index"]: row["description"] for row in rows} == plain
    tokens = read(tmp_path / "activations.jsonl", ACTIVATION)[0]["tokens"]
    assert tokens == [text.replace("\0", " ") for text in HOSTILE]


def test_the_same_results_are_the_same_bytes(tmp_path: Path) -> None:
    given = [example(latent, window("abc", {latent: 1.0}, start=latent)) for latent in range(3)]
    for name, shards, order in (("one", 1, given), ("three", 3, given[::-1])):
        export_run(made(tmp_path / name, shards), tmp_path / name, SCORERS, "m", "s", order)
    export_run(tmp_path / "one", tmp_path / "again", SCORERS, "m", "s", given)
    for file in ("explanations.jsonl", "activations.jsonl"):
        first, *others = ((tmp_path / name / file).read_bytes() for name in ("one", "three", "again"))
        assert first
        assert others == [first, first]


def test_ids_differ_where_anything_does(tmp_path: Path) -> None:
    run, found = made(tmp_path / "run"), set()
    one = example(0, window("ab", {0: 1.0}))
    shifted = example(0, replace(one.explain[0].window, start=7))
    for model, source, given in (("m", "s", one), ("n", "s", one), ("m", "t", one), ("m", "s", shifted)):
        export_run(run, tmp_path, SCORERS, model, source, [given])
        found.add(read(tmp_path / "activations.jsonl", ACTIVATION)[0]["id"])
    assert len(found) == 4


@pytest.mark.parametrize("wrong", ["", "google/gemma", "a b", "x\n", "../x"])
def test_ids_that_neuronpedia_has_not(tmp_path: Path, wrong: str) -> None:
    run = made(tmp_path)
    with pytest.raises(ConfigError, match=r"^model_id: "):
        export_run(run, tmp_path / "out", SCORERS, wrong, "s")
    with pytest.raises(ConfigError, match=r"^source_id: "):
        export_run(run, tmp_path / "out", SCORERS, "m", wrong)
    assert not (tmp_path / "out").exists()


def test_a_run_without_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no shards"):
        export_run(tmp_path, tmp_path / "out", SCORERS, "m", "s")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_the_files_of_before(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    export_run(run, tmp_path, SCORERS, "m", "s", [example(0, window("ab", {0: 1.0}))])
    before = {name: (tmp_path / name).read_bytes() for name in ("explanations.jsonl", "activations.jsonl")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_run(run, tmp_path, SCORERS, "m", "other", [example(0, window("ab", {0: float("inf")}))])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activations.jsonl", "explanations.jsonl", "run"]
