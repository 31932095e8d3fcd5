"""The folder of a run is read as far as it can be, and what cannot be read is told."""

import pytest
from rigs.recorded import LATENTS, recorded

from sae.base.errors import ConfigError, DataError
from sae.training.reporting.recorded import labels, read_run
from sae.training.reporting.report import write_report


@pytest.fixture
def folder(tmp_path):
    return recorded(tmp_path / "run", {"a": (0.2, 8.0), "b": (0.1, 16.0)}, midway=10)


def test_a_whole_folder(folder):
    run = read_run(folder, "run")
    assert run.coders == ["a", "b"]
    assert run.batch_tokens == 1024
    assert [step for step, _ in run.evaluations["a"]] == [10, 20, 30, 40]
    assert run.size("b") == LATENTS
    assert run.finished
    assert not run.said
    assert set(run.environment) == {"python", "packages", "device"}  # nothing of the host


def test_a_size_that_no_file_tells_follows_from_the_figures(folder):
    (folder / "coders" / "a" / "cfg.json").unlink()
    assert read_run(folder, "run").size("a") == LATENTS


def test_damage_is_told_and_the_rest_is_read(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3:5] = ["{broken\n", "[1]\n"]
    lines[7:7] = ['{"note": 1}\n', '{"step": 5, "coder": "a", "held_out": 3}\n']
    path.write_text("".join(lines) + '{"step": 41, "co')
    (folder / "evaluation.json").write_text('{"a": {}, "b"')
    (folder / "config.yaml").write_text("a: [")
    run = read_run(folder, "run")
    text = "\n".join(run.said)
    assert "metrics.jsonl: 2 damaged lines are left out (line 4, 5)." in text
    assert "metrics.jsonl: the last line has no end" in text
    assert "metrics.jsonl: 1 lines name no step and coder" in text
    assert "metrics.jsonl: of a at step 5 it holds no evaluation; that is left out." in text
    assert "evaluation.json is not valid JSON" in text
    assert "config.yaml" in text
    assert str(folder) not in text
    assert sum(map(len, run.lines.values())) == 78
    assert not run.finished
    assert run.batch_tokens == 1


def test_a_folder_of_no_run_and_a_log_of_nothing_are_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"^run: .* holds no metrics.jsonl; it is not the folder of a training run."):
        read_run(tmp_path, "x")
    (folder / "metrics.jsonl").write_bytes(b"\x00\xff\n\x01\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: no line of it can be read"):
        read_run(folder, "x")


def test_runs_are_called_by_where_their_paths_differ(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert labels([tmp_path / "x", tmp_path / "x"]) == ["x (1)", "x (2)"]


@pytest.mark.parametrize(
    "garbage", ["", "[]", "3", "null", '{"a": 1}', '{"a": {"reconstruction": 3}}', "\0", "a: [", '"x"']
)
def test_whatever_stands_in_a_file_a_page_is_written_or_one_line_says_why_not(folder, garbage):
    for name in ("evaluation.json", "config.yaml", "env.json", "timings.jsonl", "coders/a/cfg.json", "metrics.jsonl"):
        before = (folder / name).read_bytes()
        (folder / name).write_text(garbage + "\n")
        try:
            assert write_report(folder).is_file()
        except DataError as error:
            assert name == "metrics.jsonl"
            assert "\n" not in str(error)  # noqa: PT017
        (folder / name).write_bytes(before)
    assert not read_run(folder, "run").said
