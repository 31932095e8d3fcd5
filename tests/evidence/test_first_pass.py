"""The evidence pass: what it gathers, that it goes on where it ended, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.interp_evidence import (
    D_SAE,
    DEAD,
    NEGATIVE,
    SIZES,
    PlantedCodes,
    dense,
    of_rows,
    planted,
    read_corpus,
    states_equal,
    write_documents,
)

import interp.evidence.codes
import interp.evidence.first_pass
from interp.evidence.codes import LiveCodes, StoredCodes, encode_rows, row_blocks
from interp.evidence.corpus import Corpus, corpus_of_text
from interp.evidence.first_pass import CODES, Keep, gather_evidence
from interp.evidence.subject import Subject
from interp.evidence.tally import Evidence, Tally
from sae.assets import QUICKSTART_LM
from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.files import FolderLock, write_json
from sae.base.progress import Watch
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.models import load_language_model
from sae.lm.site import Site
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK
from sae.text.documents import TextConfig
from sae.text.tokenizing import special_ids


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 1024)
    return read_corpus(write_documents(tmp_path / "text.jsonl", [30, 64, 100, 700] * 12))


def by_hand(corpus, sizes=SIZES, seed: int = 0) -> Evidence:
    """All rows at once, from the dense codes."""
    tally = Tally(D_SAE, corpus.context_length, sizes, seed)
    coded = planted(corpus.tokens(corpus.kept))
    of = corpus.kept
    tally.add(coded.latents, coded.rows, coded.places, corpus.name[of], corpus.split[of], of)
    return Evidence(tally.state())


def calls_of(monkeypatch) -> list[np.ndarray]:
    """Notes the rows that are encoded from now on."""
    seen = []

    def noting(tokens):
        seen.append(tokens.numpy())
        return planted(tokens)

    monkeypatch.setattr("rigs.interp_evidence.planted", noting)
    return seen


def test_it_gathers_every_row_once(tmp_path, rows, monkeypatch):
    seen = calls_of(monkeypatch)
    found = gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES))
    states_equal(found, by_hand(rows))
    assert sum(map(len, seen)) == len(rows.kept)
    assert max(tokens.size for tokens in seen) <= 1024
    assert found.tokens == sum(int((rows.tokens([r])[0, 1:] >= 4).sum()) for r in rows.kept.tolist())
    assert DEAD not in found.alive()
    assert len(found.alive()) == D_SAE - 1
    assert not list((tmp_path / "run").glob("pass-*"))
    seen.clear()
    states_equal(gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES)), found)
    assert not seen  # it was all there


def test_the_largest_value_of_a_cell_is_its_place(tmp_path, rows):
    found = gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES))
    for latent in (NEGATIVE, 9, 33):
        for split in ("explain", "test"):
            for position in found.places("sample", split, latent):
                row, place = divmod(int(position), rows.context_length)
                values = np.abs(dense(rows.tokens([row]).numpy())[0, :, latent])
                cell = values[place // 32 * 32 :][:32]
                assert values[place] == cell.max() > 0


def test_other_blocks_in_another_order_give_the_same_bits(tmp_path, rows, monkeypatch):
    found = gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES))
    shuffled = np.random.default_rng(0).permutation(rows.kept)
    monkeypatch.setattr(interp.evidence.first_pass, "row_blocks", lambda corpus, of: np.array_split(shuffled, 23))
    states_equal(gather_evidence(PlantedCodes(rows), rows, tmp_path / "other", Keep(SIZES)), found)


def test_blocks_hold_every_row_once_and_are_bounded(rows, monkeypatch):
    groups = row_blocks(rows, rows.kept)
    assert np.array_equal(np.concatenate(groups), rows.kept)
    sizes = [len(group) * int(rows.length[group].max()) for group in groups]
    assert max(sizes) <= 1024
    assert np.mean(sizes) > 800
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 10)  # less than a row
    assert all(len(group) == 1 for group in row_blocks(rows, rows.kept)[:5])


@pytest.mark.parametrize("save_every_s", [0.0, 1e9])
def test_stopped_again_and_again_it_ends_with_the_same_bits(tmp_path, rows, monkeypatch, save_every_s):
    monkeypatch.setattr(interp.evidence.first_pass, "SAVE_EVERY_S", save_every_s)
    seen = calls_of(monkeypatch)
    stops = 0
    for _ in range(100):
        asked = iter(range(1000))
        try:
            found = gather_evidence(
                PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES), Watch(lambda it=asked: next(it) >= 1)
            )
            break
        except Stopped:
            stops += 1
    assert stops > 3
    assert sum(map(len, seen)) == len(rows.kept)  # nothing was done twice
    states_equal(found, by_hand(rows))


def test_files_that_were_merged_before_are_not_counted_twice(tmp_path, rows):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(lambda: True))
    first = (run / "pass-0.safetensors").read_bytes()
    asked = iter([False, True])
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(lambda: next(asked)))
    (run / "pass-1.safetensors").write_bytes(first)  # as if killed between merging it and deleting it
    states_equal(gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES)), by_hand(rows))


def test_two_halves_by_two_passes_are_the_whole(tmp_path, rows, monkeypatch):
    run = tmp_path / "run"
    groups = row_blocks(rows, rows.kept)
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(lambda: True))
    tally = Tally(D_SAE, rows.context_length, SIZES, 0)
    done = np.zeros(len(groups), bool)
    done[1::2] = True  # what a second rank had when all were killed
    for group in groups[1::2]:
        coded = planted(rows.tokens(group))
        tally.add(coded.latents, coded.rows, coded.places, rows.name[group], rows.split[group], group)
    interp.evidence.first_pass._save(run / "pass-1.safetensors", tally, done)
    seen = calls_of(monkeypatch)
    states_equal(gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES)), by_hand(rows))
    assert len(seen) == len(groups) - 1 - done.sum()


def kept_codes(folder: Path, rows: Corpus) -> dict[tuple[int, int], dict[int, float]]:
    found = {}
    for block in StoredCodes(folder / CODES, rows, D_SAE):
        places = zip(block["row"].tolist(), block["place"].tolist(), strict=True)
        offsets = block["offsets"].tolist()
        for number, place in enumerate(places):
            some = slice(offsets[number], offsets[number + 1])
            values = block["values"][some].tolist()
            pairs = zip(block["ids"][some].tolist(), values, strict=True)
            assert place not in found
            found[place] = {latent: value for latent, value in pairs if value}
    return found


def test_the_full_store_holds_all_codes(tmp_path, rows):
    run = tmp_path / "run"
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES, store=True), Watch(lambda: next(asked)))
    gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES, store=True))
    found = kept_codes(run, rows)
    checked = 0
    for row in rows.kept.tolist():
        codes = dense(rows.tokens([row]).numpy())[0]
        for place in range(1, int(rows.length[row])):
            latents = codes[place].nonzero()[0].tolist()
            assert found.pop((row, place)) == {latent: float(codes[place, latent]) for latent in latents}
            checked += 1
    assert checked == by_hand(rows).tokens
    assert not found


def test_the_full_store_is_read_as_the_codes_that_were_put_in(tmp_path, rows, monkeypatch):
    gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES, store=True))
    codes = StoredCodes(tmp_path / "run" / CODES, rows, D_SAE)
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 300)
    groups = [*row_blocks(rows, rows.kept), np.random.default_rng(0).permutation(rows.kept)]
    for group in groups:
        found, wanted = codes.read(group), planted(rows.tokens(group))
        assert np.array_equal(found.rows, wanted.rows)
        assert np.array_equal(found.places, wanted.places)
        assert torch.equal(found.latents.to_dense(), wanted.latents.to_dense())


def test_a_row_that_is_not_in_use_is_in_no_store(tmp_path):
    rows = of_rows(tmp_path / "corpus", [[0, 5, 6, 7]] * 4, [0, 1, -1, 2])
    gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES, store=True))
    with pytest.raises(IndexError, match=r"row 2 .*not in use"):
        StoredCodes(tmp_path / "run" / CODES, rows, D_SAE).read(np.array([0, 2]))


def test_the_full_store_can_be_asked_for_later(tmp_path, rows, monkeypatch):
    run = tmp_path / "run"
    asked = iter([False, True])
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(lambda: next(asked)))
    gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES, store=True))
    whole = kept_codes(run, rows)
    states_equal(gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES)), by_hand(rows))
    late = tmp_path / "late"
    gather_evidence(PlantedCodes(rows), rows, late, Keep(SIZES))
    seen = calls_of(monkeypatch)
    states_equal(gather_evidence(PlantedCodes(rows), rows, late, Keep(SIZES, store=True)), by_hand(rows))
    assert kept_codes(late, rows) == whole
    assert sum(map(len, seen)) == len(rows.kept)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (lambda rows: {"codes": PlantedCodes(rows, seed=1)}, "coder"),
        (lambda rows: {"keep": Keep()}, "sizes"),
        (lambda rows: {"keep": Keep(SIZES, seed=1)}, "seed"),
    ],
)
def test_evidence_of_something_else_is_not_taken(tmp_path, rows, changed, name):
    given = {"codes": PlantedCodes(rows), "corpus": rows, "folder": tmp_path / "run", "keep": Keep(SIZES)}
    with pytest.raises(Stopped):
        gather_evidence(**given, watch=Watch(lambda: True))
    with pytest.raises(ConfigError, match=f"made with another {name} than there is now"):
        gather_evidence(**{**given, **changed(rows)})


def test_evidence_of_other_rows_or_another_version_is_not_taken(tmp_path, rows):
    given = {"codes": PlantedCodes(rows), "folder": tmp_path / "run", "keep": Keep(SIZES)}
    gather_evidence(corpus=rows, **given)
    fewer = read_corpus(tmp_path / "text.jsonl", tokens=1000)
    with pytest.raises(ConfigError, match="made with another text"):
        gather_evidence(corpus=fewer, **given)
    header = tmp_path / "run" / "evidence.json"
    write_json(header, {"version": interp.evidence.first_pass.VERSION + 1})
    with pytest.raises(DataError, match=r"version \d is newer than \d; upgrade"):
        gather_evidence(corpus=rows, **given)
    header.write_text("[]")
    with pytest.raises(DataError, match="is damaged: it holds no object"):
        gather_evidence(corpus=rows, **given)


def test_damage_is_named_and_repaired(tmp_path, rows, monkeypatch):
    run = tmp_path / "run"
    found = gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES, store=True))
    wanted, codes = by_hand(rows), kept_codes(run, rows)
    states_equal(found, wanted)
    for part in ("latents", "codes"):
        shard = next((run / part).glob("shard-*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-9] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DataError, match=shard.name):
            kept_codes(run, rows) if part == "codes" else gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES))
        seen = calls_of(monkeypatch)
        states_equal(
            gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES, store=True), Watch(repair=True)), wanted
        )
        assert kept_codes(run, rows) == codes
        assert len(seen) == (1 if part == "codes" else len(row_blocks(rows, rows.kept)))


def test_a_damaged_part_of_a_pass_is_named_and_repaired(tmp_path, rows):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(lambda: True))
    part = run / "pass-0.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"pass-0\.safetensors"):
        gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES))
    states_equal(gather_evidence(PlantedCodes(rows), rows, run, Keep(SIZES), Watch(repair=True)), by_hand(rows))


def test_another_process_is_waited_for(tmp_path, rows):
    with FolderLock(tmp_path / "run"), pytest.raises(Stopped, match="waiting"):
        gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES), Watch(lambda: True))


def test_coders_that_cannot_be_read_are_refused(rows):
    for reads, message in (((), "names no site"), ((Site("a", width=2, tag="second"),), "two language models")):
        coder = SparseCoder(CoderSpec(2, 2, 4, TopK(1), reads=reads, writes=reads))
        with pytest.raises(ConfigError, match=message):
            LiveCodes(Subject(coder, tiny_lm), rows)


def test_more_places_than_can_be_told_apart_are_refused(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(interp.evidence.first_pass, "POSITIONS", rows.n_rows * rows.context_length)
    gather_evidence(PlantedCodes(rows), rows, tmp_path / "run", Keep(SIZES))
    monkeypatch.setattr(interp.evidence.first_pass, "POSITIONS", rows.n_rows * rows.context_length - 1)
    with pytest.raises(ConfigError, match=r"evidence.tokens: .* places"):
        gather_evidence(PlantedCodes(rows), rows, tmp_path / "other", Keep(SIZES))


def tiny_coder(lm, d_sae: int = 24, rule=None, reads: str = "model.layers.1", **fields) -> SparseCoder:
    torch.manual_seed(5)
    site = Site(reads, width=16)
    mask = fields.pop("mask", MaskSpec(tuple(special_ids(lm.tokenizer))))
    spec = CoderSpec(16, 16, d_sae, rule or TopK(4), reads=(site,), writes=(site,), mask=mask, **fields)
    coder = SparseCoder(spec)
    initialize(coder, torch.zeros(16), 0, "test")
    return coder


def documents_of_bytes(folder: Path, n: int = 12) -> Path:
    draw = np.random.default_rng(0)
    path = folder / "bytes.jsonl"
    texts = ("x" + "".join(draw.choice(list("abcd efgh\u00e9"), int(draw.integers(1, 90)))) for _ in range(n))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("rule", [TopK(4), JumpReLU()], ids=["topk", "jumprelu"])
def test_a_real_model_row_by_row_says_the_same(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 96)
    lm = tiny_lm()
    text = TextConfig(source=str(documents_of_bytes(tmp_path)), context_length=32)
    rows = corpus_of_text(text, lm.tokenizer, lm.source(), 10**9)
    by_row = []
    for row in rows.kept.tolist():
        ids = rows.tokens([row])[:, : int(rows.length[row])].long()
        by_row.append(lm.model(ids, output_hidden_states=True).hidden_states[2][0, 2:])
    x = torch.cat(by_row)
    limit = float(x.norm(dim=1).quantile(0.8))
    x = x[x.norm(dim=1) <= limit]
    mask = MaskSpec(tuple(special_ids(lm.tokenizer)), skip_positions=2, norm_limits={"model.layers.1": limit})
    coder = tiny_coder(lm, rule=rule, mask=mask)
    found = gather_evidence(LiveCodes(Subject(coder, lambda: lm), rows), rows, tmp_path / "run", Keep(SIZES))
    fired = (coder.encode(x).to_dense() != 0).sum(0)
    assert found.tokens == len(x) > 200
    assert found.state["fired"].tolist() == fired.tolist()
    assert 0 < fired.sum() < len(x) * 24


def test_rows_without_a_token_that_counts_are_no_trouble(tmp_path):
    lm = tiny_lm()
    rows = of_rows(tmp_path / "corpus", [[0]] * 4 + [[0, 5, 6, 7]] * 2, [0, 1, 2] * 2, context_length=8)
    coded = encode_rows(Subject(tiny_coder(lm), lambda: lm), rows.tokens([0, 1]))
    assert (len(coded.latents), len(coded.rows)) == (0, 0)
    assert (
        gather_evidence(
            LiveCodes(Subject(tiny_coder(lm), lambda: lm), rows), rows, tmp_path / "run", Keep(SIZES)
        ).tokens
        == 6
    )


def test_numbers_that_are_none_are_an_error(tmp_path):
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    rows = of_rows(tmp_path / "corpus", [[0, 5, 6, 7]] * 6, [0, 1, 2] * 2, context_length=8)
    for number, rule in enumerate((TopK(4), JumpReLU())):  # which takes what is not above its threshold for silent
        with pytest.raises(DataError, match=r"NaN or Inf .*model.dtype"):
            gather_evidence(
                LiveCodes(Subject(tiny_coder(lm, rule=rule), lambda: lm), rows),
                rows,
                tmp_path / str(number),
                Keep(SIZES),
            )


def test_the_quickstart_model(tmp_path):
    lm = load_language_model(str(QUICKSTART_LM))
    site = Site("model.layers.2", width=lm.model.config.hidden_size)
    mask = MaskSpec(tuple(special_ids(lm.tokenizer)))
    coder = SparseCoder(CoderSpec(site.width, site.width, 512, TopK(8), reads=(site,), writes=(site,), mask=mask))
    initialize(coder, torch.zeros(site.width), 0, "test")
    copy = tmp_path / "text.txt"
    copy.write_bytes((Path(__file__).parents[2] / "README.md").read_bytes())
    rows = corpus_of_text(TextConfig(source=str(copy), context_length=32), lm.tokenizer, lm.source(), 3000)
    subject = Subject(coder, lambda: lm)
    found = gather_evidence(LiveCodes(subject, rows), rows, tmp_path / "run", Keep())
    assert rows.meta["split_by"] == "blocks"
    assert found.state["fired"].sum() == 8 * found.tokens  # TopK fires k times on every token
    assert found.state["histogram"].sum() == found.state["positions"].sum() == found.state["fired"].sum()
    latent = int(found.state["fired"].argmax())
    position = int(found.places("top", "test", latent)[0])
    row, place = divmod(position, rows.context_length)
    coded = encode_rows(subject, rows.tokens([row]))
    codes = coded.latents.to_dense()[:, latent].numpy()
    assert codes[coded.places == place].item() == pytest.approx(strongest(found, latent, subject, rows), rel=1e-4)


def strongest(found: Evidence, latent: int, subject: Subject, rows) -> float:
    """The largest value of a latent in the test part, row by row."""
    values = [0.0]
    for row in np.flatnonzero(rows.split == 2).tolist():
        dense_codes = encode_rows(subject, rows.tokens([row])).latents.to_dense()[:, latent]
        values.append(float(dense_codes.max()) if len(dense_codes) else 0.0)
    return max(values)
