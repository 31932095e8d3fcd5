"""Text in another encoding is read or refused by name; what is no text is left out and told, or refused."""

import gzip
import json
import random
import sqlite3
import zlib
from collections import Counter

import pytest
from rigs.fakes import tiny_tokenizer

from interp.evidence.corpus import corpus_of_text
from sae.base.errors import ConfigError
from sae.text.documents import TextConfig, documents, first_look
from sae.text.tokenizing import tokenize, what_was_met

FRENCH = "Le café est fermé, et la forêt brûlée sent encore l'été; où êtes-vous allés ? Déjà à Noël.\n"
RUSSIAN = "Каждая несчастливая семья несчастлива по-своему, говорит эта книга.\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
CHINESE = "学而时习之,不亦说乎?有朋自远方来,不亦乐乎?\n"


def text_of(path, **options):
    return "".join(text for _, text in documents(TextConfig(str(path), **options)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, name):
    rows = [FRENCH + RUSSIAN, JAPANESE + "\u2028" + "\x85 \U0001f600"] * 5
    lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
    written = {
        "a.txt": "".join(rows),
        "a.jsonl": "".join(lines),
        "a.json": json.dumps([{"text": row} for row in rows], ensure_ascii=False),
        "a.csv": "text,n\n" + "".join(f'"{row}",1\n' for row in rows),
    }[name]
    (tmp_path / name).write_bytes(written.encode(encoding))
    assert text_of(tmp_path / name) == "".join(rows)


@pytest.mark.parametrize("big", [False, True])
def test_the_order_of_bytes_is_that_of_the_mark(tmp_path, big):
    for bits in (16, 32):
        (tmp_path / "a.txt").write_bytes(f"\ufeff{RUSSIAN}".encode(f"utf-{bits}-{'be' if big else 'le'}"))
        assert text_of(tmp_path / "a.txt") == RUSSIAN


@pytest.mark.parametrize(
    ("text", "encoding", "hint"),
    [
        (FRENCH, "latin-1", "latin-1"),
        (FRENCH + "\u201cquoted\u201d \u2014 dashed\n", "cp1252", "cp1252"),
        (RUSSIAN, "cp1251", "cp1251"),
        (JAPANESE, "shift_jis", "shift_jis"),
        (CHINESE, "gb18030", "gb18030"),
        (FRENCH, "utf-16-le", "utf-16-le"),
        (FRENCH, "utf-16-be", "utf-16-be"),
        (CHINESE, "utf-16-le", "utf-16-le"),
        (JAPANESE, "utf-16-be", "utf-16-be"),
        ("plain English of no accents\n", "utf-16-le", "utf-16-le"),
        ("plain English of no accents\n", "utf-32-le", "utf-32"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_another_encoding_is_refused_by_a_name_that_then_reads_it(tmp_path, text, encoding, hint, name):
    text = ("text,n\n" if name == "a.csv" else "") + "".join(
        f'"{text}",1\n' if name == "a.csv" else text for _ in range(40)
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    if encoding.startswith("utf") and name == "a.csv":
        refused = rf"a\.csv .*text\.encoding \(it may be .*{hint}"  # its first line cannot be read
    else:
        refused = rf"text\.source: .*% of the characters of .*{name}.*text\.encoding \(it may be .*{hint}"
    with pytest.raises(ConfigError, match=refused) as caught:
        first_look(TextConfig(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    found = text_of(tmp_path / name, encoding=encoding)
    assert text.count(found[:20]) == 40


def test_an_encoding_that_does_not_exist_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r"text\.encoding: 'latin1x' is no encoding of text.* Did you mean 'latin"):
        TextConfig(encoding="latin1x").validate()
    for wrong in ("base64", "rot13", "undefined", "", "zlib", "hex"):
        with pytest.raises(ConfigError, match=r"text\.encoding"):
            TextConfig(encoding=wrong).validate()
    for right in ("latin-1", "UTF8", "utf_16_le", "cp1252", "shift-jis", "gb18030"):
        TextConfig(encoding=right).validate()


def binary(kind, tmp_path):
    if kind == "sqlite":
        with sqlite3.connect(tmp_path / "x.db") as base:
            base.execute("create table t (a text)")
        base.close()
        return (tmp_path / "x.db").read_bytes()
    noise = random.Random(0).randbytes(3000)
    return {
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0" + noise,
        "gzip": gzip.compress(FRENCH.encode() * 99),
        "zlib": zlib.compress(noise),
        "parquet": b"PAR1\x15\x04\x15\x10" + noise + b"PAR1",
        "pyc": compile("x = 1\n" * 50, "a.py", "exec").co_code + b"\0\0\0" * 9,
        "noise": noise,
    }[kind]


@pytest.mark.parametrize("kind", ["png", "gzip", "zlib", "parquet", "pyc", "noise", "sqlite"])
def test_bytes_that_are_no_text_are_refused(tmp_path, kind):
    (tmp_path / "a.txt").write_bytes(binary(kind, tmp_path))
    with pytest.raises(ConfigError, match=r"text\.source: .*a\.txt.*it is not text"):
        first_look(TextConfig(str(tmp_path / "a.txt")))
    with pytest.raises(ConfigError, match=r"text\.source: .*a\.txt.*it is not text"):
        tokenize(TextConfig(str(tmp_path / "a.txt"), context_length=8), tiny_tokenizer(), {})


def test_one_file_among_many_is_left_out_and_told_and_a_few_bytes_are_replaced_and_told(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"document {number} " + "of plain words " * 300, encoding="utf-8")
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0" + b"\xff\0" * 30)
    (folder / "old.txt").write_bytes(b"a caf\xe9 " + b"and more " * 300)
    (folder / "none.txt").write_text(" \n")
    config = TextConfig(str(folder), context_length=16)
    text = tokenize(config, tiny_tokenizer(), {})
    assert what_was_met(text.meta) == "from 61 documents (1 empty, 1 no text, 1 damaged)"
    rows = corpus_of_text(config, tiny_tokenizer(), {}, 10**7)
    assert what_was_met(rows.meta) == "from 61 documents (1 empty, 1 no text, 1 damaged)"
    assert "PNG" not in "".join(text for _, text in documents(config))
    assert what_was_met({"documents": 1200}) == "from 1,200 documents"


def test_a_part_in_another_encoding_is_not_called_damaged_before(tmp_path):
    lines = [json.dumps({"text": "plain words " * 9}) + "\n"] * 2000
    bad = json.dumps({"text": FRENCH * 9}, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode() + (bad * 30).encode("cp1252"))
    with pytest.raises(ConfigError, match=r"the first in a\.jsonl:2000; it was stored damaged, or in another encoding"):
        text_of(tmp_path / "a.jsonl")


def test_damage_is_refused_though_little_of_the_text_is_wanted(tmp_path):
    (tmp_path / "a.txt").write_bytes((FRENCH * 400).encode("latin-1"))
    for max_tokens in (16, 1000):
        with pytest.raises(ConfigError, match=r"text\.encoding \(it may be latin-1"):
            tokenize(
                TextConfig(str(tmp_path / "a.txt"), context_length=16, max_tokens=max_tokens), tiny_tokenizer(), {}
            )
        with pytest.raises(ConfigError, match=r"text\.encoding \(it may be latin-1"):
            corpus_of_text(TextConfig(str(tmp_path / "a.txt"), context_length=16), tiny_tokenizer(), {}, max_tokens)


@pytest.mark.parametrize("damage", ["\ufffd", "\0", "\x01", "lone"])
def test_columns_of_tables_that_were_damaged_before_are_refused_as_such(tmp_path, damage):
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = "\udc80" if damage == "lone" else damage
    texts = [f"text {number} with{damage * 3} damage" for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    names = ["a.jsonl"]
    if damage != "\udc80":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
        names.append("a.parquet")
    for name in names:
        with pytest.raises(ConfigError, match=rf"of the characters of .*{name} are damaged"):
            first_look(TextConfig(str(tmp_path / name)))
    counts: Counter[str] = Counter()
    good = [f"text {number} of plain words" * 40 for number in range(300)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*good, texts[0]]))
    assert len(list(documents(TextConfig(str(tmp_path / "b.jsonl")), counts))) == 301
    assert counts["damaged"] == 1


def test_text_of_any_script_or_layout_is_not_called_damaged(tmp_path):
    odd = "tabs\tand\x0cpages\x1b[1mbold\x1b[0m \r\n\x0b emoji \U0001f600\u200d\U0001f525 \u2028 \x85 \u00ad\ufeff "
    (tmp_path / "a.txt").write_text(odd * 50 + RUSSIAN + JAPANESE + CHINESE, encoding="utf-8", newline="")
    counts: Counter[str] = Counter()
    list(documents(TextConfig(str(tmp_path / "a.txt")), counts))
    assert not counts["damaged_characters"]
