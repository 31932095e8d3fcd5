"""An export as an instance would refuse it: every kind of fault is found, and told in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from interp.exchange.neuronpedia import About, Batch, export_run
from interp.exchange.neuronpedia_names import Names
from interp.exchange.neuronpedia_schema import check_tree, schema
from interp.records import ACTIVE, Examples, Explanation, Facts, Item, Window
from interp.run.rundir import explained_in
from interp.scorers.detection import Detection
from sae.base.errors import DataError

IDS = "gpt2-small", "6-my-res"
AT = "gpt2-small/6-my-res"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    explained_in(tmp_path / "run" / "shards" / "1-of-1").append(
        {"latent": 0, "explainer": "llm", "by": "", "explanation": Explanation(0, "text", "llm").to_json()}
    )
    window = Window(0, 0, (1, 2), "ab", (0, 1, 2), (0.0, 1.0), 1)
    examples = Examples(0, Facts(1, 2, {}, 1.0, (), ()), test=(Item(window, ACTIVE),))
    rows = [{"index": str(n), "pos_str": ["a"], "pos_values": [1.0], "topkCosSimIndices": [1]} for n in range(2)]
    export_run(
        tmp_path / "run", tmp_path / "out", {"detection": Detection()}, About(Names(*IDS)), [Batch(rows, [examples])]
    )
    return tmp_path / "out"


def changed(path: Path, changes: dict[str, Any], line: int = 0) -> None:
    """Changes columns of a line; None of a value that is `...` takes the column away."""
    packed = path.suffix == ".gz"
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    rows = [json.loads(one) for one in data.decode().splitlines()]
    rows[line] = {key: value for key, value in (rows[line] | changes).items() if value is not ...}
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if packed else data)


def test_what_is_exported_is_sound_and_its_lines_are_counted(tree: Path) -> None:
    counts = check_tree(tree, *IDS)
    assert {table: n for table, n in counts.items() if n} == {
        "ExplanationType": 1, "SourceRelease": 1, "Model": 1, "SourceSet": 1, "Source": 1, "Neuron": 2, "Activation": 1,
        "Explanation": 1,
    }  # fmt: skip


FEATURES, WINDOWS = f"{AT}/features/batch-0.jsonl.gz", f"{AT}/activations/batch-0.jsonl.gz"
LABELS = f"{AT}/explanations/batch-0.jsonl.gz"


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (f"{AT}/release.jsonl", {"creatorName": ...}, "creatorName is missing, which SourceRelease needs"),
        (f"{AT}/release.jsonl", {"creatorId": "somebody"}, "there is no User of id somebody"),
        (f"{AT}/release.jsonl", {"visibility": "public"}, "visibility is 'public', which is no Visibility"),
        (f"{AT}/model.jsonl", {"hidden": 1}, "Model has no hidden"),
        (f"{AT}/model.jsonl", {"layers": 12.0}, "layers is 12.0, which is no int"),
        (f"{AT}/model.jsonl", {"layers": 2**31}, "which is no int"),
        (f"{AT}/model.jsonl", {"id": "gpt2-large"}, "id is gpt2-large, but the folder is of gpt2-small"),
        (f"{AT}/model.jsonl", {"defaultSourceSetName": "my-res"}, "there is no SourceSet of name my-res"),
        (f"{AT}/model.jsonl", {"createdAt": "yesterday"}, "createdAt is 'yesterday', which is no time"),
        (f"{AT}/sourceset.jsonl", {"releaseName": "other"}, "there is no SourceRelease of name other"),
        (f"{AT}/sourceset.jsonl", {"description": "a\0b"}, "description is"),
        (f"{AT}/source.jsonl", {"setName": "other"}, "there is no SourceSet of modelId gpt2-small, name other"),
        (f"{AT}/source.jsonl", {"id": "7-my-res"}, "id is 7-my-res, but the folder is of 6-my-res"),
        (FEATURES, {"index": 0}, "index is 0, which is no text"),
        (FEATURES, {"index": "1"}, "line 2: there is another Neuron of modelId gpt2-small, layer 6-my-res, index 1"),
        (FEATURES, {"pos_str": None}, "pos_str is None, which is no text[]"),
        (FEATURES, {"pos_values": []}, "pos_str has 1, pos_values has 0 values"),
        (FEATURES, {"topkCosSimIndices": [1.5]}, "topkCosSimIndices is [1.5], which is no int[]"),
        (FEATURES, {"pos_str": ["\ud800"]}, "which is no text[]"),
        (FEATURES, {"sourceSetName": "other"}, "there is no SourceSet of"),
        (WINDOWS, {"index": "7"}, "there is no Neuron of modelId gpt2-small, layer 6-my-res, index 7"),
        (WINDOWS, {"values": [1]}, "tokens has 2, values has 1 values"),
        (WINDOWS, {"maxValue": "1"}, "maxValue is '1', which is no float"),
        (WINDOWS, {"tokens": ["\\u0000", "b"]}, "no JSON (Invalid"),
        (WINDOWS, {"tokens": ["\0", "b"]}, "not the same to the importer"),
        (LABELS, {"typeName": "other"}, "there is no ExplanationType of name other"),
        (LABELS, {"explanationModelName": "gpt"}, "there is no ExplanationModelType of name gpt"),
        (LABELS, {"modelId": "gpt2-large"}, "there is no Model of id gpt2-large"),
    ],
)  # fmt: skip
def test_a_fault_is_found_in_one_line(tree: Path, file: str, changes: dict[str, Any], said: str) -> None:
    changed(tree / file, changes)
    with pytest.raises(DataError) as error:
        check_tree(tree, *IDS)
    line = str(error.value)
    assert line.startswith(file)
    assert said in line
    assert line.isprintable()


def test_a_column_that_the_first_line_lacks_is_found(tree: Path) -> None:
    changed(tree / FEATURES, {"hookName": "blocks.6.hook_resid_post"}, line=1)
    with pytest.raises(DataError, match=r"batch-0.jsonl.gz line 2: .* the first line has "):
        check_tree(tree, *IDS)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda tree: (tree / "config" / "eval_type.jsonl").unlink(), "there is no such file"),
        (lambda tree: (tree / AT / "model.jsonl").unlink(), "there is no such file"),
        (lambda tree: (tree / FEATURES).write_bytes(gzip.compress(b"")), "it is empty"),
        (lambda tree: (tree / FEATURES).rename(tree / AT / "features" / "batch-1.jsonl.gz"), "are not batch-0"),
        (lambda tree: (tree / AT / "features" / "notes.txt").write_text("x"), "are not batch-0"),
        (lambda tree: (tree / WINDOWS).write_bytes(gzip.compress(b"{}{}\n")), "line 1: no JSON"),
        (lambda tree: (tree / WINDOWS).write_bytes(gzip.compress(b"[1]\n")), "line 1: no object"),
    ],
)
def test_files_that_are_missing_or_broken(tree: Path, broken: Any, said: str) -> None:
    broken(tree)
    with pytest.raises(DataError, match=said):
        check_tree(tree, *IDS)


def test_the_schema_names_what_it_has() -> None:
    known = schema()
    tables = known["tables"]
    assert {file["table"] for file in known["files"]} == tables.keys()
    read = [file["table"] for file in known["files"]]
    for name, table in tables.items():
        columns = table["columns"]
        for named in ([*table["required"]], *table["unique"], *table["paired"]):
            assert set(named) <= columns.keys(), name
        for one in table["references"]:
            assert set(one["columns"]) <= columns.keys(), name
            if one["table"] in tables and all(not columns[column].endswith("?") for column in one["columns"]):
                assert read.index(one["table"]) < read.index(name)  # what must be there is imported before
                assert set(one["to"]) <= tables[one["table"]]["columns"].keys()
