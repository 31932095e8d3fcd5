"""Journals: what a crash, another process or strange text may do to them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.run.journal
from interp.run.journal import VERSION, Journal
from sae.base.errors import DataError

KEY = ("latent", "name")


def row(latent: int, name: str = "a", **more) -> dict:
    return {"latent": latent, "name": name, **more}


def plain(found: dict) -> dict:
    assert found["version"] == VERSION
    return {key: value for key, value in found.items() if key != "version"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def test_the_last_row_of_a_key_counts(path):
    journal = Journal(path, KEY)
    assert not list(journal)
    assert list(journal.rows()) == []
    assert journal.get((1, "a")) is None
    for number, status in ((1, "failed"), (2, "ok"), (1, "ok")):
        journal.append(row(number, status=status, text=f"{number} {status}"))
    for there in (journal, Journal(path, KEY)):
        assert list(there) == [(1, "a"), (2, "a")]
        assert (1, "a") in there
        assert (1, "b") not in there
        assert there.status((1, "a")) == "ok"
        assert there.status((3, "a")) == ""
        assert plain(there.get((1, "a")))["text"] == "1 ok"
        assert [found["text"] for found in there.rows()] == ["1 ok", "2 ok"]
    assert len(path.read_bytes().splitlines()) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from(["\u2028\u0085\x0b", "\n\r", "\ud83d", "🙂", '"}\n{"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), JSON), max_size=12), st.integers(0, 12))
def test_reading_by_key_and_reading_through_agree(tmp_path_factory, rows, reopened):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal, wanted = Journal(path, KEY), {}
    for number, (latent, data) in enumerate(rows):
        if number == reopened:
            journal = Journal(path, KEY)
        journal.append(row(latent, data=data))
        wanted[latent, "a"] = row(latent, data=data)
    for there in (journal, Journal(path, KEY)):
        assert {key: plain(there.get(key)) for key in there} == wanted
        found = list(there.rows())
        assert {(r["latent"], r["name"]): plain(r) for r in found} == wanted
        assert len(found) == len(wanted)


@pytest.mark.parametrize("cut", [1, 2, 20, 39])
def test_a_torn_last_line_is_cut_off_and_the_rest_kept(path, cut):
    journal = Journal(path, KEY)
    for number in range(3):
        journal.append(row(number, text="é" * number))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    torn = path.read_bytes()
    there = Journal(path, KEY)
    assert list(there) == [(0, "a"), (1, "a")]
    assert len(list(there.rows())) == 2
    assert path.read_bytes() == torn  # it may be that of a run that goes on
    there.append(row(7))
    there.append(row(8))
    for again in (there, Journal(path, KEY)):
        assert sorted(again) == [(0, "a"), (1, "a"), (7, "a"), (8, "a")]
        assert [r["latent"] for r in again.rows()] == [0, 1, 7, 8]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_the_rest_whole(path, monkeypatch):
    journal = Journal(path, KEY)
    journal.append(row(1))

    def full(file, text):
        with open(file, "a") as handle:
            handle.write(text[: len(text) // 2])
        raise OSError(28, f"cannot write {file}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(interp.run.journal, "append", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(row(2))
    assert (2, "a") not in journal
    journal.append(row(3))
    for there in (journal, Journal(path, KEY)):
        assert list(there) == [(1, "a"), (3, "a")]
        assert [r["latent"] for r in there.rows()] == [1, 3]


def test_a_newer_version_is_refused_and_an_older_read(path):
    path.parent.mkdir()
    path.write_text(json.dumps({"version": VERSION + 1, **row(1)}) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}: version {VERSION + 1} is newer than {VERSION}; upgrade"):
        Journal(path, KEY)
    path.write_text(json.dumps(row(1)) + "\n")
    assert list(Journal(path, KEY)) == [(1, "a")]


def test_damaged_lines_do_not_count(path):
    journal = Journal(path, KEY)
    for number in range(3):
        journal.append(row(number))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\x00\xff garbage\n"
    path.write_bytes(b"".join([*lines, b"[1, 2]\n", b"\n"]))
    there = Journal(path, KEY)
    assert list(there) == [(0, "a"), (2, "a")]
    assert [r["latent"] for r in there.rows()] == [0, 2]
    there.append(row(1))
    assert [r["latent"] for r in Journal(path, KEY).rows()] == [0, 1, 2]


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(path):
    journal = Journal(path, KEY)
    with pytest.raises(ValueError, match="JSON"):
        journal.append(row(1, value=float("nan")))
    assert not path.exists()
    journal.append(row(1, value=1.0))
    assert len(list(Journal(path, KEY).rows())) == 1


def test_what_another_adds_is_read(path):
    journal, other = Journal(path, KEY), Journal(path, KEY)
    journal.append(row(1, text="é"))
    for number in range(100, 110):
        other.append(row(number, text="日本"))
    journal.append(row(2, text="mine"))  # its place is behind what the other one wrote
    assert plain(journal.get((2, "a"))) == row(2, text="mine")
    assert plain(journal.get((1, "a"))) == row(1, text="é")
    assert [r["latent"] for r in journal.rows()] == [1, 2]  # those that it knows of
    there = Journal(path, KEY)
    assert [r["latent"] for r in there.rows()] == [1, 2, *range(100, 110)]
    assert there.get((105, "a"))["text"] == "日本"


def test_rows_of_some_latents_are_those_rows(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", ("latent", "scorer"))
    for latent, scorer in ((7, "b"), (3, "a"), (7, "a")):
        journal.append({"latent": latent, "scorer": scorer, "status": "ok"})
    assert [(row["latent"], row["scorer"]) for row in journal.rows({7})] == [(7, "a"), (7, "b")]
    assert list(journal.rows([5])) == list(journal.rows(())) == []
    assert len(list(journal.rows())) == 3


def test_rows_are_read_as_far_as_is_asked_for(tmp_path):
    path, inner = tmp_path / "j.jsonl", 'a "heavy": 3, } \\'
    rows = [{"latent": i, "status": "ok", "text": inner, "heavy": [i] * 9, "tail": inner} for i in range(3)]
    written = Journal(path, ("latent",))
    for row in (*rows, {"latent": 7, "status": "failed", "text": inner}):
        written.append(row)
    brief = Journal(path, ("latent",), until="heavy")
    assert [brief.status(key) for key in brief] == ["ok"] * 3 + ["failed"]
    found = list(brief.rows())
    assert [row["text"] for row in found] == [inner] * 4
    assert not any("heavy" in row or "tail" in row for row in found)
    assert [row.get("heavy") for row in brief.rows({0, 7}, until="tail")] == [[0] * 9, None]
    assert [row["tail"] for row in brief.rows({0, 1}, until="")] == [inner] * 2
    assert brief.get((1,)) == written.get((1,)) == {"version": 1, **rows[1]}
