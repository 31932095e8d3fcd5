"""What users hand in: files of explanations, and which latents they mean."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from interp.run.explanations_file import LONGEST_CHARS, read_explanations
from interp.run.preparing import chosen_latents
from sae.base.errors import ConfigError

D_SAE = 50


@pytest.fixture
def read(tmp_path):
    def of(content: str | bytes) -> dict[int, tuple[str, ...]]:
        path = tmp_path / "mine.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_explanations(path, D_SAE)

    return of


@pytest.mark.parametrize(
    "content",
    [
        '{"latent": 3, "text": "é a"}\n{"latent": "17", "text": " b \\n"}\n',
        '\n{"index": "3", "description": "é a", "layer": "1"}\r\n\n{"index": 17, "description": "b"}',
        '{"3": "é a", "17": "b"}',
        '{\n "3": "é a",\n "17": "b"\n}\n',
        '\ufeff{"feature": 3, "explanation": "é a"}\n{"id": 17, "explanation": "b"}',
    ],
)
def test_lines_or_an_object_of_explanations(read, content):
    assert read(content) == {3: ("é a",), 17: ("b",)}
    assert read(content.removeprefix("\ufeff").encode("utf-16")) == read(content)  # what PowerShell writes


def test_one_line_is_no_object_of_explanations(read):
    assert read('{"latent": 3, "text": "a"}') == {3: ("a",)}


def test_a_text_may_hold_what_others_take_for_the_end_of_a_line(read):
    text = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"latent": 1, "text": text}, ensure_ascii=False)
    assert read(line + "\n" + json.dumps({"latent": 2, "text": "e"})) == {1: (text,), 2: ("e",)}


@pytest.mark.parametrize(
    "content",
    [
        '{"id": 1, "text": "a"}\n{"id": 2, "text": "c"}\n{"id": "01", "text": "b"}\n{"id": 1, "text": "a"}',
        '{"1": "a", "2": "c", "1": "b"}',
        '{"1": ["a", "b", "a "], "2": "c"}',
        '{"latent": 1, "text": ["a", "b"]}\n{"latent": 2, "text": "c"}',
    ],
)
def test_a_latent_may_have_several_explanations(read, content):
    assert read(content) == {1: ("a", "b"), 2: ("c",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"latent": 50, "text": "a"}', r"mine.jsonl:1: 50 is no latent; the coder has 0 to 49"),
        ('{"latent": -1, "text": "a"}', r"-1 is no latent"),
        ('{"latent": 1.0, "text": "a"}', r"1.0 is no latent"),
        ('{"latent": true, "text": "a"}', r"True is no latent"),
        ('{"latent": "²", "text": "a"}', r"'²' is no latent"),
        ('{"latent": "%s", "text": "a"}' % ("9" * 5000), r"is no latent"),
        ('{"7/../x": "a"}', r"'7/../x' is no latent"),
        ('{"latent": 1, "text": ""}', r"latent 1 has no text"),
        ('{"latent": 1, "text": ["a", 2]}', r"latent 1 has no text"),
        ('{"latent": 1, "text": []}', r"latent 1 has no text"),
        ('{"1": {"a": "b"}}', r"latent 1 has no text"),
        ('{"latent": 1, "text": "%s"}' % ("a" * (LONGEST_CHARS + 1)), r"at most 10,000 characters"),
        ('{"latent": 1, "text": "a"}\nnonsense', r"mine.jsonl:2: not a line of JSON"),
        ('{"latent": 1}', r"mine.jsonl:1: expected an object with latent and text"),
        ("[1, 2]", r"mine.jsonl:1: expected an object"),
        ('"text"', r"mine.jsonl:1: expected an object"),
        ("[" * 100_000, r"mine.jsonl:1: not a line of JSON"),
        ("", r"holds none"),
        ("{}", r"expected an object|holds none"),
        (b"\xff\xfea", r"cannot be read"),
        (b"\xe9", r"cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_none_is_named(read, content, message):
    with pytest.raises(ConfigError, match=r"^explanations: .*" + message):
        read(content)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_explanations(tmp_path / "none.jsonl", D_SAE)


ALIVE = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47])


def chosen(typed: str | int, seed: int = 0) -> list[int]:
    return chosen_latents(typed, SimpleNamespace(alive=lambda: ALIVE, d_sae=D_SAE), seed).tolist()


def test_latents_by_name_number_and_range(tmp_path):
    assert chosen("all") == list(range(D_SAE))
    assert chosen("alive") == ALIVE.tolist()
    assert chosen("3") == chosen(" 3 ") == chosen("3,") == chosen("3-3") == chosen(3) == [3]
    assert chosen("0") == [0]
    assert chosen("7,3, 40-43 9") == [3, 7, 9, 40, 41, 42, 43]
    assert chosen("0-49") == list(range(D_SAE))
    file = tmp_path / "ids with a space.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # as Windows' editors and PowerShell save it
        file.write_text("3\n7, 9-11\n\n", encoding=encoding)
        assert chosen(str(file)) == [3, 7, 9, 10, 11]


def test_an_id_stays_one_whatever_file_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("3", "3-4", "random:2"):
        (tmp_path / name).write_text("17")
    assert (chosen("3"), chosen("3-4"), len(chosen("random:2"))) == ([3], [3, 4], 2)


def test_random_draws_so_many_that_are_alive():
    some = chosen("random:5")
    assert len(set(some)) == 5
    assert set(some) <= set(ALIVE.tolist())
    assert some == sorted(some) == chosen("random:5") == chosen("random: 5")
    assert any(chosen("random:5", seed) != some for seed in range(1, 4))
    assert set(some) <= set(chosen("random:9"))  # more keep those that were drawn
    assert chosen("random:1000") == ALIVE.tolist()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("random:0", "give at least 1"),
        ("random", "random:100"),
        ("random:", "random:100"),
        ("random:x", "random:100"),
        ("random:-3", "random:100"),
        ("random:3,17", "random:100"),
        ("alvie", "Did you mean 'alive'"),
        ("50", "50 is out of range; the coder has latents 0 to 49"),
        ("9" * 30, "is out of range; the coder has latents 0 to 49"),
        ("50,", "50 is out of range; the coder has latents 0 to 49"),
        ("3,49-50", "50 is out of range"),
        ("-3", "'-3' is no latent id or range"),
        ("3,-3", "'-3' is no latent id"),
        ("3-", "'3-' is no latent id"),
        ("3,x", "'x' is no latent id"),
        ("1.5", "'1.5' is no latent id"),
        ("layers/../3", "is no latent id"),
        ("7,3,7", "7 is there twice"),
        ("3,40-45,1-3", "3 is there twice"),
        ("", "none given"),
        (",", "none given"),
    ],
)
def test_latents_that_are_none_are_refused(typed, message):
    with pytest.raises(ConfigError, match=rf"^latents: .*{message}"):
        chosen(typed)


def test_a_list_may_be_longer_than_a_file_name():
    assert (
        len(chosen_latents(",".join(map(str, range(1000))), SimpleNamespace(alive=lambda: ALIVE, d_sae=1000), 0))
        == 1000
    )


@pytest.mark.parametrize("typed", ["3,9-5", "²"])
def test_ranges_that_run_backwards_and_odd_digits_are_refused(typed):
    with pytest.raises(ConfigError, match="latents: "):
        chosen(typed)


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes(b"\xff\xfe3")
    with pytest.raises(ConfigError, match="latents: "):
        chosen(str(file))
