"""Text becomes rows of tokens that know their document, made once, whatever the text, the tokenizer or the weather."""

import itertools
import json
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.children import PATIENCE_S
from rigs.fakes import tiny_tokenizer

from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.files import FolderLock, cache_dir
from sae.base.progress import Watch
from sae.text import python_docs
from sae.text import tokenizing as text_module
from sae.text.documents import TextConfig, documents
from sae.text.packing import PADDING, Packer
from sae.text.readers import GROUP_CHARS
from sae.text.tokenizing import TokenizedText, TokenRows, is_held_out, special_ids, tokenize

BOS, EOS, PAD = 0, 1, 2
WORDS = ("the", "quick", "brown", "fox")


class Counting:
    """A tokenizer that counts how many texts it was given."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, texts, **options):
        self.texts += len(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def jsonl(folder: Path, texts: list, name: str = "data.jsonl", column: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return folder / name


def config(source: Path, **options) -> TextConfig:
    return TextConfig(**{"source": str(source), "context_length": 16, "held_out_share": 0.2, **options})


def rows(part: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    return part.tokens(list(range(part.n_rows))), part.documents(torch.arange(part.n_rows))


def numbers(text: TokenizedText) -> tuple[set[int], set[int]]:
    return tuple({*rows(part)[1].unique().tolist()} - {PADDING} for part in (text.train, text.held_out))  # type: ignore[return-value]


@pytest.fixture
def hundred(tmp_path):
    return jsonl(tmp_path, [f"document number {i} " + "x" * (i % 40) for i in range(100)])


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pack"}, r"text\.layout: 'pack' is not one of packed, one_per_row\. Did you mean 'packed'"),
        ({"bos": "rows"}, r"text\.bos: 'rows' .* Did you mean 'row'"),
        ({"context_length": 1}, r"text\.context_length: 1"),
        ({"max_tokens": 0}, r"text\.max_tokens: 0"),
        ({"max_tokens": 15, "context_length": 16}, r"text\.max_tokens: 15"),
        ({"held_out_share": 0.0}, r"text\.held_out_share: 0\.0 is not between"),
        ({"held_out_share": 1.0}, r"text\.held_out_share"),
        ({"held_out_share": float("nan")}, r"text\.held_out_share"),
        ({"column": ""}, r"text\.column"),
        ({"source": ""}, r"text\.source"),
        ({"source": "/no/such/folder"}, r"text\.source: no such file or folder"),
        ({"source": "nowhere.jsonl"}, r"text\.source: no such file or folder"),
    ],
)
def test_settings_that_are_not_allowed_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**options).validate()


def test_the_default_is_valid_and_a_typo_gets_the_nearest_name(tmp_path):
    TextConfig().validate()
    jsonl(tmp_path, ["x"], "corpus.jsonl")
    with pytest.raises(ConfigError, match=r"Did you mean 'corpus\.jsonl'\?"):
        config(tmp_path / "corpsu.jsonl").validate()


# Sources


def test_every_kind_of_file_in_a_folder_gives_documents_with_ids_that_do_not_know_the_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fill(folder: Path) -> Path:
        jsonl(folder / "sub \u00fc", ["j0", "j1"], "a.jsonl")
        (folder / "t.txt").write_text("one document\n\nwith two paragraphs")
        (folder / "README.md").write_text("not text to train on")
        table = pa.table({"text": ["p0", "p1"], "other": [1, 2]})
        pq.write_table(table, folder / "b.parquet")
        for name, opened in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, opened(sink, table.schema) as writer:
                writer.write_table(table)
        return folder

    found = dict(documents(config(fill(tmp_path / "one place \u6587"))))
    assert found == {
        "sub \u00fc/a.jsonl:0": "j0",
        "sub \u00fc/a.jsonl:1": "j1",
        "t.txt": "one document\n\nwith two paragraphs",
        "b.parquet:0": "p0",
        "b.parquet:1": "p1",
        "stream.arrow:0": "p0",
        "stream.arrow:1": "p1",
        "file.arrow:0": "p0",
        "file.arrow:1": "p1",
    }
    assert list(documents(config(fill(tmp_path / "elsewhere")))) == list(found.items())


def test_a_text_file_alone_is_cut_at_blank_lines(tmp_path):
    text = "".join(f"paragraph {i} " + "word " * 100 + "\n\n" for i in range(40)) + "no line end"
    (tmp_path / "book.txt").write_text(text)
    found = list(documents(config(tmp_path / "book.txt")))
    assert "".join(part for _, part in found) == text
    assert [name for name, _ in found] == [f"book.txt:{i}" for i in range(len(found))]
    assert all(len(part) >= GROUP_CHARS and part.endswith("\n\n") for _, part in found[:-1])
    assert len(found) > 5


def test_data_sets_saved_to_disk_are_read_by_split(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_dict({"text": ["a", None, "c"], "other": [1, 2, 3]})
    train.select([2, 0]).save_to_disk(tmp_path / "single")  # rows in another order than on disk
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "both")
    assert list(documents(config(tmp_path / "single"))) == [("single:0", "c"), ("single:1", "a")]
    assert list(documents(config(tmp_path / "both"))) == [("both:0", "a"), ("both:2", "c")]
    assert list(documents(config(tmp_path / "both", split="test"))) == [("both:0", "a")]
    with pytest.raises(ConfigError, match=r"text\.split: 'tset' is not one of train, test\. Did you mean 'test'"):
        list(documents(config(tmp_path / "both", split="tset")))
    with pytest.raises(ConfigError, match=r"no column 'txt'.* Did you mean 'text'.* It has: text, other"):
        list(documents(config(tmp_path / "both", column="txt")))


def test_hub_data_sets_are_streamed_by_name_split_and_revision(monkeypatch):
    import datasets

    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"body": ["a", "b"], "other": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    wanted = TextConfig(source="org/data", name="small", split="train[:1%]", column="body", revision="abc")
    assert list(documents(wanted)) == [("org/data:0", "a"), ("org/data:1", "b")]
    assert calls == [(("org/data", "small"), {"streaming": True, "split": "train[:1%]", "revision": "abc"})]
    with pytest.raises(ConfigError, match=r"org/data has no column 'text'\. It has: body, other"):
        list(documents(replace(wanted, column="text")))


def test_a_name_that_is_neither_local_nor_on_the_hub_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    with pytest.raises(ConfigError, match="is no local path, nor") as caught:
        list(documents(TextConfig(source="my_text")))
    assert "Did you mean 'my_texts'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quickstart_is_the_default(monkeypatch):
    monkeypatch.setattr(python_docs, "documents", lambda: iter([("json:JSONDecoder", "decodes")]))
    assert list(documents(TextConfig())) == [("json:JSONDecoder", "decodes")]


# Faults in data


def test_empty_and_null_texts_are_skipped_and_invalid_text_is_repaired_and_all_are_counted(tmp_path):
    lines = [
        b'{"text": "good \xef\xbf\xbd"}',  # damaged before it was stored
        b'{"text": ""}',
        b'{"text": " \\n\\t"}',
        b'{"text": null}',
        b"",
        b'{"text": "bad \xff\xfe byte"}',
        b'{"text": "lone \\ud800 surrogate \\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    counts: Counter[str] = Counter()
    found = [text for _, text in documents(config(tmp_path / "a.jsonl"), counts)]
    assert found == ["good \ufffd", "bad \ufffd\ufffd byte", "lone \ufffd surrogate \U0001f600"]
    assert (counts["documents"], counts["empty"], counts["damaged"], counts["skipped"]) == (3, 3, 3, 0)


def test_invalid_utf8_in_text_files_and_tables_is_replaced(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"bad \xff", None, b"good"], pa.binary())
    for name, kind in (("a", pa.string()), ("b", pa.large_string())):
        cells = pa.Array.from_buffers(kind, 3, raw.cast(pa.large_binary() if name == "b" else pa.binary()).buffers())
        pq.write_table(pa.table({"text": cells}), tmp_path / f"{name}.parquet")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfbad \xff too")
    counts: Counter[str] = Counter()
    found = dict(documents(config(tmp_path), counts))
    assert found == {
        "a.parquet:0": "bad \ufffd",
        "a.parquet:2": "good",
        "b.parquet:0": "bad \ufffd",
        "b.parquet:2": "good",
        "c.txt": "bad \ufffd too",
    }
    assert (counts["documents"], counts["empty"], counts["damaged"], counts["skipped"]) == (5, 2, 3, 0)


def test_a_missing_column_lists_those_there_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"content": ["a"], "id": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.jsonl").write_text('{"content": "a", "id": 1}')
    for kind in ("parquet", "arrow", "jsonl"):
        message = rf"text\.column: a\.{kind} has no column 'contents'\. Did you mean 'content'\? It has: content, id"
        with pytest.raises(ConfigError, match=message):
            list(documents(config(tmp_path / f"a.{kind}", column="contents")))
        with pytest.raises(ConfigError, match=r"text\.column: 'id' holds a int in a\..*:0, not text"):
            list(documents(config(tmp_path / f"a.{kind}", column="id")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
        ("a.jsonl", b'["x"]', r"a\.jsonl line 1 is a list, not an object"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}', r"holds no text \(1 empty"),
        ("a.txt", b"\n\n", "holds no text"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read"),
        ("a.arrow", b"ARROW1", r"a\.arrow cannot be read"),
        ("a.doc", b"text\nx", r"a\.doc is not one of \.txt, \.jsonl"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        list(documents(config(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        list(documents(config(tmp_path)))


# Packing

LENGTHS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=12)
POLICIES = st.sampled_from(["row", "document", "none"])


def pack(lengths, length, layout, bos, tokenizer):
    """Documents of the given piece lengths through a Packer, and the tokens of each document."""
    packer = Packer(length, layout, bos, tokenizer)
    made = [np.arange(sum(pieces)) % 50 + 10 for pieces in lengths]
    for document, (pieces, tokens) in enumerate(zip(lengths, made, strict=True)):
        for i, piece in enumerate(np.split(tokens, np.cumsum(pieces)[:-1])):
            packer.add(piece, document, first=i == 0, last=i == len(pieces) - 1)
    packer.finish()
    n = packer.n_rows
    taken = [packer.take(2) for _ in range(-(-n // 2))]
    assert packer.n_ready == 0
    if not taken:
        return torch.zeros(0, length), torch.zeros(0, length), made
    return *(torch.cat([part[name] for part in taken]) for name in ("tokens", "documents")), made


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 70), bos=POLICIES, has_bos=st.booleans(), has_eos=st.booleans())
def test_packed_rows_are_the_documents_one_after_the_other(lengths, length, bos, has_bos, has_eos):
    tokens, owners, made = pack(lengths, length, "packed", bos, tiny_tokenizer(has_bos, has_eos))
    first_id, eos_id = [0] if has_bos else [], [int(has_bos)] if has_eos else []
    stream, owner = [], []
    for document, body in enumerate(made):
        part = [*(first_id if bos == "document" else []), *body.tolist(), *eos_id]
        stream += part
        owner += [document] * len(part)
    starts = first_id if bos == "row" else []
    body = length - len(starts)
    n = len(stream) // body
    assert tokens.shape == owners.shape == (n, length)
    assert tokens[:, len(starts) :].flatten().tolist() == stream[: n * body]
    assert owners[:, len(starts) :].flatten().tolist() == owner[: n * body]
    if starts:
        assert (tokens[:, 0] == 0).all()
        assert torch.equal(owners[:, 0], owners[:, 1])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 70), bos=POLICIES, has_bos=st.booleans())
def test_one_per_row_is_the_beginning_of_every_document_that_has_tokens(lengths, length, bos, has_bos):
    tokens, owners, made = pack(lengths, length, "one_per_row", bos, tiny_tokenizer(has_bos))
    start = [0] if has_bos and bos != "none" else []
    kept = [document for document, body in enumerate(made) if len(body)]
    assert len(tokens) == len(kept)
    for row, owner, document in zip(tokens.tolist(), owners.tolist(), kept, strict=True):
        wanted = [*start, *made[document].tolist()][:length]
        padding = [PADDING] * (length - len(wanted))
        assert row == wanted + padding
        assert owner == [document] * len(wanted) + padding


# Tokenizing


@pytest.mark.parametrize("layout", ["packed", "one_per_row"])
@pytest.mark.parametrize("bos", ["row", "document", "none"])
def test_no_document_is_in_both_parts_and_none_is_lost(hundred, layout, bos):
    text = tokenize(config(hundred, layout=layout, bos=bos), tiny_tokenizer(), {"model": "m"})
    train, held_out = numbers(text)
    assert not train & held_out
    assert len(train | held_out) >= (100 if layout == "one_per_row" else 97)  # a last row may be dropped
    wanted = {i for i in range(100) if is_held_out(f"data.jsonl:{i}", 0.2)}
    assert held_out <= wanted
    assert train & wanted == set()
    assert text.meta["documents"] == 100
    assert text.meta["held_out_by"] == "document"
    assert text.train.context_length == 16
    tokens, owners = rows(text.train)
    assert tokens.dtype == owners.dtype == torch.int32
    assert ((tokens == PADDING) == (owners == PADDING)).all()
    if bos == "row":
        assert (tokens[:, 0] == BOS).all()


def test_tokens_decode_to_the_text(tmp_path):
    texts = [f"text {i}: na\u00efve \u6587\u5b57 \U0001f600" for i in range(20)]
    tokenizer = tiny_tokenizer()
    text = tokenize(config(jsonl(tmp_path, texts), layout="one_per_row", context_length=64, bos="none"), tokenizer, {})
    for part in (text.train, text.held_out):
        for tokens, owners in zip(*rows(part), strict=True):
            document = owners[0]
            assert tokenizer.decode(tokens[owners >= 0]) == texts[document]


def test_rows_of_several_shards_are_read_in_any_order(hundred, monkeypatch):
    whole = tokenize(config(hundred), tiny_tokenizer(), {"made": "in one"})
    monkeypatch.setattr(text_module, "SHARD_TOKENS", 40 * 16)
    monkeypatch.setattr(text_module, "BATCH_CHARS", 100)
    parts = tokenize(config(hundred), tiny_tokenizer(), {"made": "in many"})
    assert len(parts.train.shards) > 3 > len(whole.train.shards)
    assert parts.train.n_rows == whole.train.n_rows
    order = torch.randperm(parts.train.n_rows)
    order = torch.cat([order, order[:5]])
    assert torch.equal(parts.train.tokens(order), rows(whole.train)[0][order])
    assert torch.equal(parts.train.documents(order.tolist()), rows(whole.train)[1][order])
    assert parts.train.tokens([]).shape == (0, 16)
    for outside in ([parts.train.n_rows], [-1]):
        with pytest.raises(IndexError, match="there are"):
            parts.train.tokens(outside)


def test_a_giant_document_is_tokenized_in_pieces_to_the_same_rows(tmp_path, monkeypatch):
    giant = " ".join(f"word{i}" for i in range(3000)) + "y" * 2000
    source = jsonl(tmp_path, [giant, *(f"short {i}" for i in range(70))])
    whole = tokenize(config(source), tiny_tokenizer(), {"made": "whole"})
    monkeypatch.setattr(text_module, "PIECE_CHARS", 500)
    counting = Counting(tiny_tokenizer())
    cut = tokenize(config(source), counting, {"made": "cut"})
    assert counting.texts > 100
    for part in ("train", "held_out"):
        for a, b in zip(rows(getattr(whole, part)), rows(getattr(cut, part)), strict=True):
            assert torch.equal(a, b)


def test_max_tokens_stops_at_that_many_and_still_holds_out(hundred, monkeypatch):
    monkeypatch.setattr(text_module, "BATCH_CHARS", 100)
    text = tokenize(config(hundred, max_tokens=64), tiny_tokenizer(), {})
    assert text.meta["train_tokens"] == 64
    assert text.meta["held_out_tokens"] > 0
    assert text.train.n_rows == 4
    assert text.meta["documents"] < 100
    short = tokenize(config(hundred, max_tokens=64, layout="one_per_row", context_length=8), tiny_tokenizer(), {})
    kept = (rows(short.train)[0] != PADDING).sum() - short.train.n_rows  # without BOS
    assert kept == short.meta["train_tokens"] == 64


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(min_size=1), unique=True), small=st.floats(0, 1), large=st.floats(0, 1))
def test_a_larger_held_out_share_contains_the_smaller(names, small, large):
    small, large = sorted((small, large))
    held = [{name for name in names if is_held_out(name, share)} for share in (0, small, large, 1)]
    assert set() == held[0] <= held[1] <= held[2] <= held[3] == set(names)


def test_the_held_out_share_is_kept():
    assert 450 < sum(is_held_out(f"document {i}", 0.05) for i in range(10_000)) < 550


# Few and little


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("share", [0.001, 0.999])
def test_of_a_few_documents_at_least_one_goes_to_each_part(tmp_path, n, share):
    source = jsonl(tmp_path, [f"{i} " + "words " * 20 for i in range(n)])
    text = tokenize(config(source, held_out_share=share), tiny_tokenizer(), {})
    train, held_out = numbers(text)
    assert train
    assert held_out
    assert not train & held_out
    assert text.meta["held_out_by"] == "document"


@pytest.mark.parametrize("layout", ["packed", "one_per_row"])
def test_a_single_document_gives_up_its_end(tmp_path, layout):
    body = " ".join(f"{i:04d}" for i in range(400))
    source = jsonl(tmp_path, [body])
    tokenizer = tiny_tokenizer()
    text = tokenize(config(source, held_out_share=0.1, layout=layout, bos="none"), tokenizer, {})
    assert text.meta["held_out_by"] == "rows"
    first = tokenizer.decode(text.held_out.tokens([0])[0])
    assert 0.88 < body.index(first) / len(body) < 0.92
    assert text.held_out.documents([0])[0, 0] == 0


def test_a_held_out_part_of_less_than_a_row_is_padded(tmp_path):
    source = jsonl(tmp_path, ["a b c " * 30, "d"])
    text = tokenize(config(source), tiny_tokenizer(), {})
    short = text.held_out if text.meta["held_out_tokens"] < 15 else None
    if short is None:  # the draw fell on the long one
        pytest.fail("choose other ids")
    tokens, owners = rows(short)
    assert tokens[0, :3].tolist()[0] == BOS
    assert (tokens[0, 3:] == PADDING).all()
    assert (owners[0, 3:] == PADDING).all()


def test_less_text_than_a_row_is_a_config_error_with_the_count(tmp_path):
    source = jsonl(tmp_path, ["short", "also short"])
    with pytest.raises(ConfigError, match=r"gives \d+ train tokens .* text\.context_length = 256"):
        tokenize(config(source, context_length=256), tiny_tokenizer(), {})
    with pytest.raises(ConfigError, match=r"text\.held_out_share: .* gives 0 held_out tokens"):
        tokenize(config(jsonl(tmp_path, ["word " * 9] * 200), held_out_share=1e-9), tiny_tokenizer(), {})
    assert not [path for path in cache_dir().rglob("*") if path.is_file()]


# Special tokens


def test_special_strings_in_text_stay_text(tmp_path):
    texts = ["a <s> b </s> c <pad> d <|im_start|>user e"] * 20
    options = {"additional_special_tokens": ["<|im_start|>"]}
    tokenizer = tiny_tokenizer(**options)
    assert EOS in tokenizer(texts[0])["input_ids"], "the trap is armed"
    text = tokenize(config(jsonl(tmp_path, texts), bos="none", layout="one_per_row", context_length=64), tokenizer, {})
    tokens, owners = rows(text.train)
    assert not torch.isin(tokens, torch.tensor(sorted(special_ids(tokenizer)))).any()
    assert tokenizer.decode(tokens[0][owners[0] >= 0]) == texts[0]


def test_special_words_that_a_vocabulary_spells_are_dropped_and_unknown_ones_kept(tmp_path):
    texts = ["the <s> quick </s> brown <pad> zebra <unk> fox"] * 20
    tokenizer = tiny_tokenizer(words=WORDS)
    assert BOS in tokenizer(texts, split_special_tokens=True)["input_ids"][0], "the trap is armed"
    text = tokenize(config(jsonl(tmp_path, texts), bos="none", layout="one_per_row"), tokenizer, {})
    assert tokenizer.decode(text.train.tokens([0])[0, :6]) == "the quick brown <unk> <unk> fox"
    assert (text.train.tokens([0])[0, 6:] == PADDING).all()


@pytest.mark.parametrize(
    "has", [(False, False, False), (True, False, False), (False, True, True), (False, False, True)]
)
@pytest.mark.parametrize("bos", ["row", "document", "none"])
@pytest.mark.parametrize("layout", ["packed", "one_per_row"])
def test_tokenizers_may_lack_bos_eos_and_pad(hundred, has, bos, layout):
    tokenizer = tiny_tokenizer(*has)
    text = tokenize(config(hundred, bos=bos, layout=layout), tokenizer, {})
    tokens, owners = rows(text.train)
    assert text.meta["bos"] == ([0] if has[0] and bos != "none" else [])
    assert bool((tokens == tokenizer.bos_token_id).any() if has[0] else False) == (has[0] and bos != "none")
    assert bool((tokens == tokenizer.eos_token_id).any() if has[1] else False) == (has[1] and layout == "packed")
    assert (owners[:, 0] >= 0).all()


def test_special_ids_are_the_named_and_the_added_ones_flagged_special():
    tokenizer = tiny_tokenizer(additional_special_tokens=["<|im_start|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    found = special_ids(tokenizer)
    assert {BOS, EOS, PAD, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<image>"])} == found
    assert special_ids(tiny_tokenizer(False, False, False)) == set()


# Reuse


def test_the_same_text_is_tokenized_once_and_every_change_again(hundred, tmp_path):
    counting = Counting(tiny_tokenizer())
    base, model = config(hundred), {"model": "gpt2", "revision": "main"}
    first = tokenize(base, counting, model)
    made = counting.texts
    assert made == 100
    again = tokenize(replace(base, streaming=False), counting, dict(reversed(model.items())))
    assert counting.texts == made
    assert again.key == first.key
    assert torch.equal(rows(again.train)[0], rows(first.train)[0])

    moved = tmp_path / "elsewhere" / hundred.name
    moved.parent.mkdir()
    moved.write_bytes(hundred.read_bytes())
    assert tokenize(replace(base, source=str(moved)), counting, model).key == first.key
    assert counting.texts == made

    keys = {first.key}
    changes = [
        (base, {**model, "model": "pythia"}, counting),
        (base, {**model, "revision": "abc"}, counting),
        (base, model, Counting(tiny_tokenizer(pad=False))),
        (replace(base, context_length=17), model, counting),
        (replace(base, layout="one_per_row"), model, counting),
        (replace(base, bos="none"), model, counting),
        (replace(base, held_out_share=0.21), model, counting),
        (replace(base, max_tokens=100), model, counting),
    ]
    for changed, fingerprint, tokenizer in changes:
        before = tokenizer.texts
        keys.add(tokenize(changed, tokenizer, fingerprint).key)
        assert tokenizer.texts > before
    jsonl(tmp_path, ["other text of the same name"] * 50)
    keys.add(tokenize(base, counting, model).key)
    assert len(keys) == len(changes) + 2


def test_what_a_stop_or_an_error_interrupts_starts_over(hundred, monkeypatch):
    monkeypatch.setattr(text_module, "BATCH_CHARS", 200)
    monkeypatch.setattr(text_module, "SHARD_TOKENS", 640)
    polls = iter(range(100))
    with pytest.raises(Stopped, match="while tokenizing"):
        tokenize(config(hundred), tiny_tokenizer(), {}, Watch(lambda: next(polls) > 5))
    assert next(polls) == 7
    assert not [path for path in cache_dir().rglob("*") if path.is_file()]

    class Breaks(Counting):
        def __call__(self, texts, **options):
            if self.texts > 50:
                raise MemoryError
            return super().__call__(texts, **options)

    with pytest.raises(MemoryError):
        tokenize(config(hundred), Breaks(tiny_tokenizer()), {})  # type: ignore[arg-type]
    counting = Counting(tiny_tokenizer())
    assert tokenize(config(hundred), counting, {}).meta["documents"] == 100
    assert counting.texts == 100


def test_progress_counts_up_to_all_tokens(hundred, monkeypatch):
    monkeypatch.setattr(text_module, "BATCH_CHARS", 200)
    monkeypatch.setattr("sae.base.progress.SECONDS_BETWEEN_CALLS", 0.0)
    seen: list[int] = []
    text = tokenize(config(hundred), tiny_tokenizer(), {}, Watch(display=lambda at: seen.append(at.n)))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == text.meta["train_tokens"]


def test_a_second_run_waits_for_the_first_and_reads_its_rows(hundred):
    tokenizer = Counting(tiny_tokenizer())
    inside, go_on = threading.Event(), threading.Event()

    def pause() -> bool:
        inside.set()
        assert go_on.wait(PATIENCE_S)
        return False

    first = threading.Thread(target=tokenize, args=(config(hundred), tokenizer, {}, Watch(pause)))
    first.start()
    assert inside.wait(PATIENCE_S)
    polls: list[int] = []

    def wait() -> bool:
        polls.append(1)
        go_on.set()
        return False

    text = tokenize(config(hundred), tokenizer, {}, Watch(wait))
    first.join()
    assert polls
    assert tokenizer.texts == 100
    assert text.train.n_rows > 0


def test_waiting_for_another_run_can_be_stopped(hundred):
    key = tokenize(config(hundred), tiny_tokenizer(), {}).key
    folder = cache_dir() / "tokens"
    (folder / key / "COMPLETE").unlink()
    with FolderLock(folder / ".locks" / key), pytest.raises(Stopped, match=str(os.getpid())):
        tokenize(config(hundred), tiny_tokenizer(), {}, Watch(lambda: True))


def test_damaged_rows_are_named_not_used(hundred):
    text = tokenize(config(hundred), tiny_tokenizer(), {})
    path = cache_dir() / "tokens" / text.key / "train" / "shard-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train/shard-000000\.safetensors: changed"):
        tokenize(config(hundred), tiny_tokenizer(), {}).train.tokens([0])


def test_swapped_parts_are_noticed(hundred):
    key = tokenize(config(hundred), tiny_tokenizer(), {}).key
    folder = cache_dir() / "tokens" / key
    os.rename(folder / "train", folder / "x")
    os.rename(folder / "held_out", folder / "train")
    os.rename(folder / "x", folder / "held_out")
    with pytest.raises(DataError, match="holds tokens/held_out, not tokens/train"):
        tokenize(config(hundred), tiny_tokenizer(), {})


def test_a_cache_that_cannot_be_written_is_said_before_any_work(hundred, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "file"))
    counting = Counting(tiny_tokenizer())
    with pytest.raises(ConfigError, match="cannot write to"):
        tokenize(config(hundred), counting, {})
    assert counting.texts == 0


def test_pieces_of_a_long_document_are_the_document(monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_CHARS", 10)
    for text in ("short", "a b c d e f g h i j k", "x" * 35, "words of several lengths, and averyveryverylongone too"):
        pieces = list(text_module._pieces(text, 3, "train", TextConfig()))
        assert "".join(piece.text for piece in pieces) == text
        assert all(0 < len(piece.text) <= 10 for piece in pieces)
        assert [(piece.first, piece.last) for piece in pieces[1:-1]] == [(False, False)] * (len(pieces) - 2)
        assert (pieces[0].first, pieces[-1].last) == (True, True)
        for before, after in itertools.pairwise(pieces):  # cut at a space where there is one
            assert after.text[0] == " " or " " not in before.text[1:]
