"""Rows for evidence: one section each, cut with gaps, split without overlap, near-duplicates dropped."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rigs.interp_evidence import WORDS, drawn, read_corpus, tokenizer, write_documents

import interp.evidence.corpus
from interp.evidence.corpus import DROPPED, SECTION_ROWS, SHARES, corpus_of_text
from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.files import cache_dir
from sae.base.progress import Watch
from sae.text.documents import TextConfig

CONTEXT = 64
BODY = CONTEXT - 1  # behind BOS


def words(rows: interp.evidence.corpus.Corpus, row: int) -> list[int]:
    return rows.tokens([row])[0, rows.first : rows.length[row]].tolist()


def ids(texts: list[str]) -> list[int]:
    return tokenizer().convert_tokens_to_ids(texts)


def write(path: Path, texts: list[list[str]]) -> Path:
    path.write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def lengths():
    return [5, BODY, BODY + 1, SECTION_ROWS * BODY, 30 * BODY + 7, 1, 700] * 12


def test_every_document_is_cut_into_rows_with_a_gap_between_sections(tmp_path, lengths):
    rows = read_corpus(write_documents(tmp_path / "text.jsonl", lengths))
    row = section = 0
    for number, n in enumerate(lengths):
        text = ids(drawn(number, n))
        for place, start in enumerate(range(0, n, BODY)):
            if place % (SECTION_ROWS + 1) == SECTION_ROWS:
                section += 1
                continue  # left out
            assert words(rows, row) == text[start : start + BODY]
            assert rows.tokens([row])[0, 0] == tokenizer().bos_token_id
            assert rows.section[row] == section
            assert rows.document[row] == number
            row += 1
        section += 1 if -(-n // BODY) % (SECTION_ROWS + 1) else 0
    assert rows.n_rows == row
    assert rows.meta["documents"] == len(lengths)
    assert rows.meta["sections"] == len(set(rows.section.tolist()))
    assert rows.meta["split_by"] == "document"
    assert len(np.unique(rows.name)) == rows.n_rows
    assert rows.n_tokens == sum(len(words(rows, int(r))) for r in rows.kept)


def test_a_section_lies_in_one_part_and_no_text_in_two(tmp_path, lengths):
    rows = read_corpus(write_documents(tmp_path / "text.jsonl", lengths))
    of_section = {}
    for section, split in zip(rows.section.tolist(), rows.split.tolist(), strict=True):
        assert of_section.setdefault(section, split) == split or split == DROPPED
    assert Counter(rows.split.tolist()).keys() == {0, 1, 2}  # random words do not repeat
    seen: dict[tuple[int, ...], int] = {}
    for row in rows.kept.tolist():
        text = words(rows, row)
        for start in range(len(text) - 5):
            assert seen.setdefault(tuple(text[start : start + 6]), rows.split[row]) == rows.split[row]


def test_parts_get_their_shares_by_the_name_alone(tmp_path):
    source = write_documents(tmp_path / "text.jsonl", [20] * 3000)
    rows = read_corpus(source)
    for number, share in enumerate(SHARES):
        assert np.mean(rows.split == number) == pytest.approx(share, abs=0.04)  # four standard deviations
    fewer = read_corpus(source, tokens=20 * 500)  # what else there is changes nothing
    assert fewer.n_rows == 500
    assert np.array_equal(fewer.split, rows.split[:500])
    assert np.array_equal(fewer.name, rows.name[:500])


@pytest.mark.parametrize("n", [3, 4, 5, 6, 10, 49])
def test_few_sections_leave_no_part_empty(tmp_path, n):
    rows = read_corpus(write_documents(tmp_path / "text.jsonl", [30] * n))
    counts = [int((rows.split == number).sum()) for number in range(3)]
    assert sum(counts) == n
    assert min(counts) >= 1
    assert all(abs(count - share * n) <= 1 for count, share in zip(counts, SHARES, strict=True))


def test_too_little_text_is_an_error(tmp_path):
    source = write_documents(tmp_path / "text.jsonl", [30, 30])
    with pytest.raises(ConfigError, match=r"text.source: .* 2 sections .*at least 3"):
        read_corpus(source)


def test_one_text_is_split_by_blocks_and_says_so(tmp_path):
    words_of = drawn(0, 40 * BODY)
    text = tmp_path / "text.txt"  # in paragraphs, which are no documents
    text.write_text("\n\n".join(" ".join(words_of[i : i + 50]) for i in range(0, len(words_of), 50)))
    one_line = write(tmp_path / "one.jsonl", [words_of])
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    for source in (text, packed, one_line):
        rows = read_corpus(source)
        assert rows.meta["split_by"] == "blocks"
        assert rows.meta["documents"] == 1
        assert rows.meta["sections"] == 5
        assert {0, 1, 2} <= set(rows.split.tolist())
        assert words(rows, SECTION_ROWS) == ids(words_of[(SECTION_ROWS + 1) * BODY :][:BODY])


def test_rows_that_repeat_another_part_are_dropped(tmp_path):
    n, copies = 300, 60
    shared = drawn(999, 50)

    def near(number: int) -> list[str]:
        text = list(shared)
        text[number % 50] = WORDS[number % 7]  # alike, not equal
        return text

    texts = [near(number) if number < copies else drawn(number, 50) for number in range(n)]
    rows = read_corpus(write(tmp_path / "text.jsonl", texts))
    assert rows.n_rows == n
    kept = Counter(rows.split[:copies].tolist())
    assert set(kept) == {DROPPED, 2}  # the test keeps its own
    assert kept[DROPPED] > copies / 3
    assert (rows.split[copies:] != DROPPED).all()
    assert set(rows.kept.tolist()) == set(np.flatnonzero(rows.split != DROPPED).tolist())
    short = [["w1", "w2", "w3"] if number < copies else drawn(number, 50) for number in range(n)]
    rows = read_corpus(write(tmp_path / "short.jsonl", short))
    assert set(rows.split[:copies].tolist()) == {DROPPED, 2}  # also rows too short for one run of eight


def test_half_a_row_in_common_counts_and_a_fifth_does_not(tmp_path):
    texts = [drawn(number, 60) for number in range(400)]
    for number in range(1, 400, 2):
        shared = 45 if number % 4 == 1 else 12
        texts[number] = [*texts[number - 1][:shared], *texts[number][shared:]]
    rows = read_corpus(write(tmp_path / "text.jsonl", texts))
    of = {name: [0, 0] for name in ("much", "little")}
    for number in range(1, 400, 2):
        pair = rows.split[number - 1 : number + 1]
        alone = read_parts(number)
        if DROPPED in pair:
            dropped = int(np.argmin(pair))
            assert alone[dropped] < alone[1 - dropped]  # test is kept, and of the others valid
        if alone[0] != alone[1]:
            of["much" if number % 4 == 1 else "little"][int(DROPPED in pair)] += 1
    assert of["much"][1] > 50
    assert of["much"][0] <= 3  # a sample of runs is looked at
    assert of["little"][1] <= 3
    assert of["little"][0] > 50


def read_parts(number: int) -> list[int]:
    """The parts that two neighboring documents fall into by their names."""
    from interp.evidence.corpus import _parts

    return _parts([f"text.jsonl:{i}#0" for i in range(400)])[number - 1 : number + 1].tolist()


def test_a_long_text_is_compared_in_rounds_with_the_same_result(tmp_path, monkeypatch):
    texts = [drawn(number % 130, 90) for number in range(300)]
    source = write(tmp_path / "text.jsonl", texts)
    whole = read_corpus(source)
    assert (whole.split == DROPPED).sum() > 100
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(interp.evidence.corpus, "SHINGLED_TOKENS", 3000)
    monkeypatch.setattr(interp.evidence.corpus, "SHARD_TOKENS", 50 * CONTEXT)
    rounds = read_corpus(source)
    assert len(rounds.shards) > 5
    assert np.array_equal(rounds.split, whole.split)


def test_text_that_only_repeats_itself_is_an_error(tmp_path):
    source = write(tmp_path / "text.jsonl", [drawn(0, 50)] * 100)
    with pytest.raises(ConfigError, match=r"text.source: .* repeats itself: .*explain and valid"):
        read_corpus(source)


def test_rows_are_read_from_any_shard(tmp_path, lengths, monkeypatch):
    monkeypatch.setattr(interp.evidence.corpus, "SHARD_TOKENS", 7 * CONTEXT)
    rows = read_corpus(write_documents(tmp_path / "text.jsonl", lengths))
    assert len(rows.shards) > 10
    whole = np.concatenate([rows.shards.read(i)["tokens"].numpy() for i in range(len(rows.shards))])
    chosen = np.random.default_rng(0).integers(0, rows.n_rows, 40)
    found = rows.tokens(chosen).numpy()
    assert found.shape == (40, rows.length[chosen].max())
    assert np.array_equal(found, whole[chosen][:, : found.shape[1]])
    for row in chosen[:10].tolist():
        n = min(4, int(rows.length[row]) - 1)
        assert rows.span(row * CONTEXT + 1, n) == whole[row, 1 : 1 + n].tolist()
    lengths_kept = rows.length[rows.kept]
    assert (np.diff(lengths_kept) <= 0).all()  # longest first
    assert rows.tokens([]).shape == (0, 1)


def test_it_is_made_once_and_only_whole(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "text.jsonl", [200] * 40)
    calls = iter([False, False, True])
    monkeypatch.setattr(interp.evidence.corpus, "BATCH_DOCUMENTS", 1)
    text = TextConfig(source=str(source), context_length=8)
    with pytest.raises(Stopped):
        corpus_of_text(text, tokenizer(), {"model": "planted"}, 10**9, Watch(lambda: next(calls)))
    assert not list((cache_dir() / "corpora").glob("[!.]*"))
    first = corpus_of_text(text, tokenizer(), {"model": "planted"}, 10**9)
    monkeypatch.setattr(interp.evidence.corpus, "_encoded", None)  # no second time
    again = corpus_of_text(text, tokenizer(), {"model": "planted"}, 10**9)
    assert again.key == first.key
    assert np.array_equal(again.split, first.split)
    for other in ({"model": "another"}, {"model": "planted"}):
        tokens = 10**9 if other["model"] == "another" else 500
        with pytest.raises(TypeError):  # it would have to be made
            corpus_of_text(text, tokenizer(), other, tokens)


def test_only_so_many_tokens_are_taken(tmp_path):
    rows = read_corpus(write_documents(tmp_path / "text.jsonl", [40] * 100), tokens=1000)
    assert rows.n_tokens == 1000
    assert rows.meta["documents"] == 25


@pytest.mark.parametrize("bos", ["none", "document"])
def test_rows_begin_with_bos_if_there_is_one(tmp_path, bos):
    source = write_documents(tmp_path / "text.jsonl", [100] * 5)
    without = corpus_of_text(
        TextConfig(source=str(source), context_length=CONTEXT), tokenizer(bos=False), {"model": "planted"}, 10**9
    )
    rows = read_corpus(source, bos=bos)
    assert (without.first, rows.first) == (0, 0 if bos == "none" else 1)
    for found, start in ((without, 0), (rows, rows.first)):
        assert found.length[:2].tolist() == [CONTEXT, 100 - (CONTEXT - start) + start]
        assert (found.tokens([0])[0, start:] >= 4).all()


def test_special_tokens_in_text_are_no_tokens_of_it(tmp_path):
    texts = [["w1", "</s>", "<s>", "w2", "<pad>", "strange", *drawn(number, 20)] for number in range(5)]
    rows = read_corpus(write(tmp_path / "text.jsonl", texts))
    assert words(rows, 0)[:3] == ids(["w1", "w2", "<unk>"])


@pytest.mark.parametrize("part", ["tokens", "rows"])
def test_damage_is_named_and_repaired(tmp_path, part):
    source = write_documents(tmp_path / "text.jsonl", [200] * 20)
    rows = read_corpus(source)
    text, split = words(rows, 3), rows.split.copy()  # the file is mapped
    (shard,) = (cache_dir() / "corpora" / rows.key / part).glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=shard.name):
        read_corpus(source).tokens([0])
    mended = corpus_of_text(
        TextConfig(source=str(source), context_length=CONTEXT),
        tokenizer(),
        {"model": "planted"},
        10**9,
        Watch(repair=True),
    )
    assert words(mended, 3) == text
    assert np.array_equal(mended.split, split)
