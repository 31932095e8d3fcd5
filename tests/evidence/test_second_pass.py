"""The second pass: around every place, what the latent does with all of its left context; no row is read twice."""

import json

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.interp_evidence import (
    CONTEXT,
    CONTEXT_LENGTH,
    D_SAE,
    DEAD,
    DENSE,
    FIRST_WORD,
    NEGATIVE,
    SIZES,
    Found,
    PlantedCodes,
    dense,
    planted,
    read_corpus,
    write_documents,
)

import interp.evidence.codes
import interp.evidence.kept_codes
import interp.evidence.second_pass
from interp.evidence.codes import LiveCodes, row_blocks
from interp.evidence.corpus import corpus_of_text
from interp.evidence.first_pass import Keep, gather_evidence
from interp.evidence.kept_codes import KeptCodes
from interp.evidence.places import CANDIDATES, KINDS, PEAKS, POOL, plan_places
from interp.evidence.second_pass import REACH, SPAN, WHOLE, visit_places
from interp.evidence.subject import Subject
from interp.records import SPLITS
from sae.base.errors import DataError, Stopped
from sae.base.progress import Watch
from sae.base.store import ShardWriter
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.text.documents import TextConfig
from sae.text.tokenizing import special_ids


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both passes over documents of many lengths, in small blocks."""
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        patch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 2048)
        yield Found(folder, read_corpus(write_documents(folder / "text.jsonl", [3, 20, 40, 64, 150, 700] * 25)))


def around(codes: np.ndarray, place: int) -> np.ndarray:
    """Values of one latent in one row [context] from 31 tokens before a place to 31 behind, 0 outside of the row."""
    return np.pad(codes, REACH)[place : place + SPAN]


def test_the_values_around_every_place_are_those_of_the_whole_row(found):
    rows, seen = found.rows, dict.fromkeys(KINDS, 0)
    codes = dense(rows.tokens(np.arange(rows.n_rows)).numpy())
    edges = set()
    for latent in range(D_SAE):
        spots = found.visits.spots(latent)
        for kind, split, position, values in zip(*spots[:4], strict=True):
            row, place = divmod(int(position), rows.context_length)
            assert rows.split[row] == split
            assert np.array_equal(values, around(codes[row, :, latent], place))
            seen[KINDS[kind]] += 1
            edges |= {end for end in (place == 1, place == rows.length[row] - 1) if end}
    assert min(seen.values()) > 100
    assert edges


def test_the_table_of_the_pool_is_right_at_the_edges_of_rows_too(found):
    rows, places = found.rows, found.plan.pool % CONTEXT_LENGTH
    codes = dense(rows.tokens(np.arange(rows.n_rows)).numpy()) != 0
    at_start, at_end = (places < 4).sum(), (places > CONTEXT_LENGTH - 4).sum()
    assert min(at_start, at_end) > 10
    for latent in range(0, D_SAE, 7):
        wanted = [around(codes[p // CONTEXT_LENGTH, :, latent], p % CONTEXT_LENGTH) for p in found.plan.pool.tolist()]
        assert np.array_equal(found.visits.spots(latent).pool, np.stack(wanted))


def test_all_that_fires_at_the_first_peaks_of_each_part_is_known(found):
    rows, total = found.rows, 0
    codes = dense(rows.tokens(np.arange(rows.n_rows)).numpy())
    for latent in range(D_SAE):
        first = [found.evidence.places("sample", split, latent)[: PEAKS[split]] for split in SPLITS]
        row, place = np.divmod(np.concatenate(first), CONTEXT_LENGTH)
        ids, peaks = found.visits.beside(latent)
        assert peaks == len(row)
        fires = codes[row, place] != 0
        assert np.array_equal(np.bincount(ids, minlength=D_SAE), fires.sum(0))
        assert fires[:, latent].all()
        total += len(ids)
    assert total > 10_000


def test_folders_of_older_versions_do_not_know_what_fires_together(found, tmp_path, monkeypatch):
    few = plan_places(found.evidence, found.rows, np.array([9, 41]), [[10], [42]], 0)
    monkeypatch.setattr(interp.evidence.second_pass, "SHARD_BLOCKS", 2)
    with monkeypatch.context() as patch:

        def older(writer, number, tensors):
            return ShardWriter.write(writer, number, {k: t for k, t in tensors.items() if not k.startswith("peak")})

        patch.setattr(interp.evidence.second_pass, "ShardWriter", type("Older", (ShardWriter,), {"write": older}))
        asked = iter(range(1000))
        with pytest.raises(Stopped):
            visit_places(found.codes, found.rows, few, tmp_path, Watch(lambda: next(asked) >= 3))
    again = visit_places(found.codes, found.rows, few, tmp_path)
    assert again.beside(9) is None
    assert np.array_equal(
        again.spots(9).values, visit_places(found.codes, found.rows, few, tmp_path / "b").spots(9).values
    )


def test_the_places_are_those_that_evidence_kept(found):
    rows = found.rows
    for latent in (DENSE, CONTEXT, NEGATIVE, 9, 41):
        spots = found.visits.spots(latent)
        for number, split in enumerate(SPLITS):
            sample, top, same, near = (
                spots.position[(spots.kind == kind) & (spots.split == number)] for kind in range(4)
            )
            kept = found.evidence.places("sample", split, latent)
            assert sample.tolist() == kept.tolist()
            assert set(top) == set(found.evidence.places("top", split, latent)) - set(kept)
            if split != "test":
                assert not len(same) + len(near)
                continue
            assert max(len(same), len(near)) <= CANDIDATES
            usual = rows.tokens(found.evidence.places("sample", "explain", latent) // CONTEXT_LENGTH)
            peaks = usual[np.arange(len(usual)), found.evidence.places("sample", "explain", latent) % CONTEXT_LENGTH]
            assert {rows.span(p, 1)[0] for p in same.tolist()} <= set(peaks.tolist())
            neighbors = [(latent + 40) % D_SAE, (latent + 1) % D_SAE]
            theirs = [found.evidence.places("sample", split, other) for other in neighbors]
            assert set(near) <= set(np.concatenate(theirs))
            assert not set(np.concatenate([same, near])) & set(np.concatenate([sample, top]))
            assert len(set(same.tolist())) == len(same)
            assert len(set(near.tolist())) == len(near)


def test_the_pool_is_drawn_from_all_tokens_of_each_part(found):
    rows, pool = found.rows, found.plan.pool
    assert len(np.unique(pool)) == len(pool)
    row, place = np.divmod(pool, CONTEXT_LENGTH)
    assert ((place >= rows.first) & (place < rows.length[row])).all()
    for number, split in enumerate(SPLITS):
        mine = found.plan.pool_split == number
        kept = rows.split == number
        assert (rows.split[row[mine]] == number).all()
        assert 0.8 * POOL[split] < mine.sum() <= POOL[split]
        lengths = (rows.length[kept] - 1).astype(float)
        expected = lengths @ lengths / lengths.sum()  # mean length of the row of a token
        spread = np.sqrt((lengths @ (lengths - expected) ** 2) / lengths.sum())
        drawn = (rows.length[row[mine]] - 1).mean()
        assert abs(drawn - expected) < 5 * spread / np.sqrt(mine.sum())


class Noting(PlantedCodes):
    """Notes the rows that are read, block by block."""

    def __init__(self, rows):
        super().__init__(rows)
        self.blocks = []

    def read(self, rows):
        self.blocks.append(rows)
        return super().read(rows)


def test_no_row_is_read_twice_and_none_without_a_place_but_in_blocks_that_are_visited_almost_whole(found, tmp_path):
    codes = Noting(found.rows)
    few = plan_places(found.evidence, found.rows, np.array([9, 41]), [[10], [42]], 0)
    visit_places(codes, found.rows, few, tmp_path)
    wanted = np.unique(np.concatenate([few.position, few.pool]) // CONTEXT_LENGTH)
    first = row_blocks(found.rows, found.rows.kept)
    whole = [block for block in first if np.isin(block, wanted).mean() >= WHOLE]
    assert 0 < len(whole) < len(first)
    assert [block.tolist() for block in codes.blocks[: len(whole)]] == [block.tolist() for block in whole]
    assert not np.isin(np.concatenate(whole), wanted).all(), "some are read in vain"
    rest = np.concatenate(codes.blocks[len(whole) :])
    assert sorted(rest.tolist()) == np.setdiff1d(wanted, np.concatenate(whole)).tolist()
    codes.blocks.clear()
    visit_places(codes, found.rows, few, tmp_path)
    assert not codes.blocks


def test_stopped_and_continued_it_finds_the_same(found, tmp_path, monkeypatch):
    monkeypatch.setattr(interp.evidence.second_pass, "SHARD_BLOCKS", 2)
    seen = []

    def noting(tokens):
        seen.append(len(tokens))
        return planted(tokens)

    monkeypatch.setattr("rigs.interp_evidence.planted", noting)
    chosen = np.array([CONTEXT, 9, 41])
    few = plan_places(found.evidence, found.rows, chosen, [[10], [10], [42]], 0)
    stops = 0
    for _ in range(100):
        asked = iter(range(1000))
        try:
            again = visit_places(found.codes, found.rows, few, tmp_path, Watch(lambda it=asked: next(it) >= 3))
            break
        except Stopped:
            stops += 1
    assert stops > 2
    total = len(np.unique(np.concatenate([few.position, few.pool]) // CONTEXT_LENGTH))
    assert total <= sum(seen) <= 1.7 * total  # at most the shard in hand is lost
    monkeypatch.setattr(interp.evidence.second_pass, "SHARD_BLOCKS", 1000)
    whole = visit_places(found.codes, found.rows, few, tmp_path / "whole")
    for latent in chosen.tolist():
        for name, a, b in zip(again.spots(9)._fields, again.spots(latent), whole.spots(latent), strict=True):
            assert np.array_equal(a, b), name
        assert np.array_equal(np.sort(again.beside(latent)[0]), np.sort(whole.beside(latent)[0]))


def test_other_latents_can_be_looked_at_later(found, tmp_path):
    for latents in ([9], [9, 41], [41]):
        some = plan_places(found.evidence, found.rows, np.array(latents), [[]] * len(latents), 0)
        spots = visit_places(found.codes, found.rows, some, tmp_path).spots(latents[-1])
        usual = found.visits.spots(latents[-1])
        for kind in range(2):
            here, there = (s.values[s.kind == kind] for s in (spots, usual))
            assert np.array_equal(here, there)


def test_what_is_not_there_is_told(found, tmp_path):
    few = plan_places(found.evidence, found.rows, np.array([9, 41]), [[10], [42]], 0)
    visits = visit_places(found.codes, found.rows, few, tmp_path)
    for latent in (10, 8, 63):
        with pytest.raises(KeyError):
            visits.spots(latent)
        with pytest.raises(KeyError):
            visits.beside(latent)
    dead = found.visits.spots(DEAD)
    assert not len(dead.position[dead.kind < 3])
    assert not dead.pool.any()
    assert found.visits.beside(DEAD)[1] == 0


def test_no_latents_are_no_trouble(found, tmp_path):
    none = plan_places(found.evidence, found.rows, np.zeros(0, np.int64), [], 0)
    assert len(none.position) == 0
    with pytest.raises(KeyError):
        visit_places(found.codes, found.rows, none, tmp_path).spots(9)


def test_damage_is_named_and_repaired(found, tmp_path):
    few = plan_places(found.evidence, found.rows, np.array([9]), [[10]], 0)
    wanted = visit_places(found.codes, found.rows, few, tmp_path).spots(9).values.copy()
    shard = next(tmp_path.rglob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=shard.name):
        visit_places(found.codes, found.rows, few, tmp_path)
    assert np.array_equal(
        visit_places(found.codes, found.rows, few, tmp_path, Watch(repair=True)).spots(9).values, wanted
    )


def test_a_real_model_in_other_blocks_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 200)
    lm, draw = tiny_lm(), np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcdefgh ij"), int(draw.integers(2, 150)))) for _ in range(20)]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": "x" + text}) + "\n" for text in texts))
    rows = corpus_of_text(TextConfig(source=str(source), context_length=48), lm.tokenizer, lm.source(), 10**9)
    site = Site("model.layers.1", width=16)
    mask = MaskSpec(tuple(special_ids(lm.tokenizer)))
    coder = SparseCoder(CoderSpec(16, 16, 32, TopK(3), reads=(site,), writes=(site,), mask=mask))
    initialize(coder, torch.zeros(16), 0, "test")
    codes = LiveCodes(Subject(coder, lambda: lm), rows)
    evidence = gather_evidence(codes, rows, tmp_path / "run", Keep(SIZES))
    latents = evidence.alive()
    few = plan_places(evidence, rows, latents, [[int(latents[0])]] * len(latents), 0)
    visits = visit_places(codes, rows, few, tmp_path / "run")
    codes = {}
    for row in rows.kept.tolist():
        ids = rows.tokens([row])[:, : int(rows.length[row])].long()
        x = lm.model(ids, output_hidden_states=True).hidden_states[2][0]
        codes[row] = np.zeros((48, 32), np.float32)
        codes[row][1 : len(x)] = coder.encode(x[1:]).to_dense().numpy()
    fires = total = 0
    for latent in latents.tolist():
        spots = visits.spots(latent)
        wanted = np.stack([around(codes[p // 48][:, latent], p % 48) for p in spots.position.tolist()])
        assert np.allclose(spots.values, wanted, rtol=1e-3, atol=1e-4)
        fires, total = fires + int((wanted != 0).sum()), total + len(wanted)
        pool = np.stack([around(codes[p // 48][:, latent], p % 48) for p in few.pool.tolist()])
        assert np.array_equal(spots.pool, pool != 0)
        sampled = spots.position[spots.kind == 0]  # fewer than are looked at, so that all are
        hits = sum((codes[p // 48][p % 48] != 0).astype(int) for p in sampled.tolist())
        assert np.array_equal(np.bincount(visits.beside(latent)[0], minlength=32), hits)
    assert total > 500
    assert fires > total


def test_left_context_counts(found):
    spots = found.visits.spots(CONTEXT)
    sample = spots.position[spots.kind == 0]
    far = 0
    for position in sample.tolist():
        row, place = divmod(position, CONTEXT_LENGTH)
        before = found.rows.tokens([row])[0, 1:place].tolist()
        assert FIRST_WORD + 1 in before
        far += before[::-1].index(FIRST_WORD + 1) > REACH
    assert far  # in some it stands out of reach of a window


def test_what_the_first_pass_kept_is_not_computed_again_and_gives_the_same_bytes(found, tmp_path, monkeypatch):
    reads, files = [], []
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 2048)
    for room in (0, 100_000, 2**28):
        monkeypatch.setattr(interp.evidence.kept_codes, "KEPT_BYTES", room)
        codes, folder = Noting(found.rows), tmp_path / str(room)
        seen = KeptCodes(codes)
        for block in row_blocks(found.rows, found.rows.kept):
            seen.read(block)
        codes.blocks.clear()
        visit_places(seen.again(), found.rows, found.plan, folder)
        reads.append(len(codes.blocks))
        files.append([path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))])
    assert files[0] == files[1] == files[2] != []
    assert reads[0] > reads[1] > reads[2]
