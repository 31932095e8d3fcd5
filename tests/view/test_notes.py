"""Notes: what was told to be kept is kept, whoever writes and whatever ends the writer."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from html import unescape

import pytest
from rigs.explained_runs import write_explained_run
from rigs.pages import blocks

import interp
from interp.run.explanations_file import read_explanations
from interp.view.notes import LONGEST_CHARS, VERSION, Notes, Outdated
from interp.view.reporting.report import write_report
from interp.view.terminal import lines
from sae.base.errors import ConfigError, DataError
from sae.base.visible import visible

WRITER = """
import sys
from pathlib import Path
from interp.view.notes import Notes
notes = Notes(Path(sys.argv[1]))
for i in range(100_000):
    notes.change(i % 7, label=f"label {i} " + "x" * 300)
    print(i, flush=True)
"""


def test_a_note_is_there_for_whoever_opens_the_folder_next(tmp_path):
    notes = Notes(tmp_path, d_sae=10)
    assert notes.to_json() == []
    note = notes.change(3, label="  months 🙂 ")
    assert (note.label, note.bookmark, note.history) == ("months 🙂", False, 1)
    notes.change(3, bookmark=True)
    notes.change(9, bookmark=True)
    again = Notes(tmp_path)
    assert [(one.latent, one.label, one.bookmark, one.history) for one in again] == [
        (3, "months 🙂", True, 2),
        (9, None, True, 1),
    ]
    again.change(9, bookmark=False)
    assert [one.latent for one in notes] == [3]  # another process has written it
    assert [one.bookmark for one in notes.history(3)] == [False, True]
    size = notes.path.stat().st_size
    notes.change(3, bookmark=True)
    assert notes.path.stat().st_size == size  # nothing has changed


def test_nobodys_label_is_overwritten_unseen(tmp_path):
    one, other = Notes(tmp_path), Notes(tmp_path)
    one.change(3, label="a", was=None)
    with pytest.raises(Outdated):
        other.change(3, label="b", was=None)
    other.change(3, label="b", was="a")
    other.change(3, label="c")  # the last one wins where nobody asks
    one.change(3, bookmark=True, was="a")  # which is no label
    assert one.labels() == {3: "c"}
    assert [note.label for note in one.history(3)] == ["a", "b", "c", "c"]
    one.change(3, label=None, was="c")
    assert one.labels() == {}
    assert [note.label for note in one.history(3)][:3] == ["a", "b", "c"]


def test_labels_can_be_scored_as_explanations(tmp_path):
    notes = Notes(tmp_path)
    notes.change(3, label="</script>\n\u202e months")
    notes.change(4, label="days")
    notes.change(5, bookmark=True)
    assert notes.export(tmp_path / "mine.jsonl") == 2
    assert read_explanations(tmp_path / "mine.jsonl", 10) == {3: ("</script>\n\u202e months",), 4: ("days",)}


@pytest.mark.parametrize(
    ("latent", "change", "said"),
    [
        (10, {}, "latent: 10 is not the id of a latent from 0 to 9"),
        (-1, {}, "latent: -1"),
        (True, {}, "latent: True"),
        ("3", {}, "latent: '3'"),
        (3, {"bookmark": 1}, "bookmark: 1 is neither"),
        (3, {"label": 5}, "label: it is no text"),
        (3, {"label": "x" * (LONGEST_CHARS + 1)}, "at most 10000"),
    ],
)
def test_what_is_no_note_is_one_line(tmp_path, latent, change, said):
    notes = Notes(tmp_path, d_sae=10)
    with pytest.raises(ConfigError, match=said):
        notes.change(latent, **change)
    assert not notes.path.exists()


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    notes = Notes(tmp_path)
    notes.change(3, label="a")
    notes.change(4, label="b")
    whole = notes.path.read_bytes()
    for cut in range(len(whole.split(b"\n")[0]) + 1, len(whole)):
        notes.path.write_bytes(whole[:cut])
        torn = Notes(tmp_path)
        assert torn.labels() == {3: "a"}
        torn.change(5, label="c")
        assert Notes(tmp_path).labels() == {3: "a", 5: "c"}
        notes.path.write_bytes(whole)


def test_a_damaged_line_and_a_newer_version_are_told(tmp_path, caplog):
    notes = Notes(tmp_path)
    notes.change(3, label="a")
    whole = notes.path.read_bytes()
    notes.path.write_bytes(b"\0\0\0\n" + whole)
    assert Notes(tmp_path).labels() == {3: "a"}
    assert "damaged" in caplog.text
    row = json.loads(whole) | {"version": VERSION + 1}
    notes.path.write_bytes(whole + json.dumps(row).encode() + b"\n")
    with pytest.raises(DataError, match="newer"):
        Notes(tmp_path)


@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_the_file_as_it_was(tmp_path, monkeypatch, fault):
    notes = Notes(tmp_path)
    notes.change(3, label="a")
    before = notes.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    if fault == "write":
        opened = os.fdopen
        real = lambda *args, **options: _Full(opened(*args, **options))  # noqa: E731
        monkeypatch.setattr("os.fdopen", real)
    else:
        monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match=r"notes: they cannot be written \(No space left on device\)") as caught:
        notes.change(3, label="b")
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert notes.path.read_bytes() == before
    assert notes.change(3, label="b").history == 2


class _Full:
    """A file of which half of what is written fits."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, line):
        return self.file.write(line[: len(line) // 2])


def test_a_folder_that_takes_nothing_is_one_line(tmp_path):
    (tmp_path / "notes.jsonl").mkdir()
    with pytest.raises(ConfigError, match="notes: they cannot be written"):
        Notes(tmp_path).change(3, label="a")


def killed_while_writing(folder, seconds):
    """Ends a writer of notes by SIGKILL; returns the last one that it was told is kept."""
    with subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE) as writer:
        first = writer.stdout.readline()
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")
    return max([int(first), *(int(line) for line in rest[:-1])])


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_what_was_told_to_be_kept_outlives_kill_9(tmp_path, times):
    moments = random.Random(17)
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        last = killed_while_writing(folder, moments.uniform(0, 0.05))
        notes = Notes(folder)
        kept = {note.latent: note.label for note in notes}
        for latent in range(min(7, last + 1)):
            newest = last - (last - latent) % 7
            told = int(kept[latent].split()[1])
            assert told >= newest
            assert told in (newest, last + 1)  # the one in hand may be there, but is whole
            assert kept[latent] == f"label {told} " + "x" * 300
        assert sum(note.history for note in notes) in (last + 1, last + 2)


@pytest.mark.slow
def test_two_writers_lose_nothing(tmp_path):
    code = WRITER.replace("100_000", "40").replace("i % 7", "int(sys.argv[2])")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], stdout=subprocess.DEVNULL) for n in (1, 2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [(note.latent, note.history) for note in Notes(tmp_path)] == [(1, 40), (2, 40)]


def test_a_file_that_was_put_in_its_place_is_read_from_its_beginning(tmp_path):
    notes = Notes(tmp_path)
    for label in ("a", "b", "c"):
        notes.change(3, label=label)
    kept = notes.path.read_bytes()
    notes.path.unlink()
    assert notes.to_json() == []
    assert notes.change(4, label="d").history == 1
    assert Notes(tmp_path).labels() == notes.labels() == {4: "d"}
    other = tmp_path / "other"
    other.write_bytes(kept)
    other.replace(notes.path)
    assert notes.labels() == {3: "c"}
    notes.path.write_bytes(kept.splitlines(keepends=True)[0])
    assert notes.labels() == {3: "a"}
    assert notes.change(3, label="e").history == 2


@pytest.mark.parametrize(
    "change",
    [
        {"label": 5},
        {"label": ["x"]},
        {"label": "\ud800"},
        {"latent": -1},
        {"latent": 1e999},
        {"latent": "3"},
        {"version": "1"},
    ],
)
def test_a_line_that_is_no_note_is_left_out(tmp_path, change, caplog):
    notes = Notes(tmp_path)
    notes.change(3, label="a")
    row = json.loads(notes.path.read_text()) | change
    with notes.path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert [note["label"] for note in Notes(tmp_path).to_json()] == ["a"]
    assert "damaged" in caplog.text


def test_half_a_character_is_no_label(tmp_path):
    with pytest.raises(ConfigError, match="label: it holds half of a character"):
        Notes(tmp_path).change(3, label="\ud800")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_notes_that_cannot_be_read_are_one_line(tmp_path):
    notes = Notes(tmp_path)
    notes.change(3, label="a")
    notes.path.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        notes.to_json()


def test_an_edited_label_is_shown_wherever_labels_are(tmp_path):
    run_dir = write_explained_run(tmp_path / "run", 6)
    run, latent = interp.results(run_dir), 4
    before = run[latent]
    own = before.label.text
    assert run.texts([latent]) == {latent: own}
    Notes(run_dir).change(latent, label="quaint\u202e\nmonths")
    edited, shown = "quaint\u202e\nmonths", "quaint\\u{202e}\\nmonths"
    now = run[latent]
    assert (now.text, now.edited, now.label) == (edited, edited, before.label)
    assert run.texts([latent, 0]).keys() == {0, latent}
    assert run.texts([latent]) == {latent: edited}
    assert run.table() == interp.results(run_dir).table()
    assert [found.label for found in run.search("quaint")] == [shown]
    told = [repr(now), str(now), now._repr_html_(), run._repr_html_(), "\n".join(lines(now, "", colors=True))]
    for text in told:
        assert f"edited: {shown}" in text
        assert visible(own[:20]) in unescape(text)
    (index,) = blocks(write_report([run_dir])[0])["main"]["runs"]
    assert index["notes"] == {str(latent): {"label": shown}}
    Notes(run_dir).change(latent, label=None)
    assert run[latent] == before
    assert "edited:" not in "".join([repr(run[latent]), str(run[latent]), run._repr_html_()])
