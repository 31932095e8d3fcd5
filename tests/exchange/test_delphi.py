"""delphi's caches, explanations and scores, read from files that delphi itself wrote (tests/make/delphi_files.py)."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from interp.evidence.delphi_cache import LARGEST, DelphiCache, is_cache
from interp.exchange.delphi import read_explanations, read_scores
from interp.run.results import write_results
from interp.run.rundir import SCORE_KEY, scores_in
from interp.scorers.detection import Detection
from interp.scorers.fuzzing import Fuzzing
from interp.scorers.simulation import Simulation
from sae.base.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "delphi"
HOOK = "layers.1.mlp"
CACHE, WIDE = GOLDEN / "run" / "latents" / HOOK, GOLDEN / "wide" / "layers.0"
MIDDLE = "13_25.safetensors"


def plainly(folder: Path) -> dict[tuple[int, int, int], float]:
    """Every code by (row, place, latent), read in the plainest way."""
    codes = {}
    for path in folder.glob("*.safetensors"):
        file, first = load_file(path), int(path.name.split("_")[0])
        for (row, place, latent), value in zip(file["locations"].tolist(), file["activations"].tolist(), strict=True):
            codes[row, place, first + latent] = value
    return codes


def read_all(cache: DelphiCache, rows: list[int]) -> dict[tuple[int, int, int], float]:
    """Every code of some rows by (row, place, latent)."""
    found, codes = cache.read(rows), {}
    for token, latent, value in zip(
        *(x.tolist() for x in (found.latents.tokens, found.latents.ids)), found.latents.values.tolist(), strict=True
    ):
        codes[rows[found.rows[token]], int(found.places[token]), latent] = value
    return codes


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the cache that may be damaged."""
    return shutil.copytree(CACHE, tmp_path / HOOK)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run's explanations and scores that may be damaged."""
    return shutil.copytree(GOLDEN / "run", tmp_path / "run", ignore=shutil.ignore_patterns("latents"))


def change(path: Path, **tensors: Any) -> None:
    """Replaces tensors of a file, or takes them out."""
    file = {name: tensor.copy() for name, tensor in load_file(path).items()} | tensors
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in file.items() if tensor is not None}, path)


@pytest.mark.parametrize("folder", [CACHE, WIDE])
def test_codes_are_those_of_a_plain_reading(folder: Path) -> None:
    cache = DelphiCache(folder)
    codes = plainly(folder)
    assert len(codes) > 9
    assert read_all(cache, list(range(cache.n_rows))) == codes


def test_what_a_cache_tells() -> None:
    cache, file = DelphiCache(CACHE), load_file(CACHE / MIDDLE)
    assert (cache.d_sae, cache.n_rows, cache.context_length) == (40, 16, 48)
    assert (cache.model, cache.hookpoint) == ("some/model", HOOK)
    assert cache.config["dataset_repo"] == "some/texts"
    assert cache.tokens.dtype == torch.int32
    assert cache.tokens.tolist() == file["tokens"].tolist()
    assert is_cache(CACHE)
    assert not is_cache(CACHE.parent)


def test_locations_of_both_widths_are_read() -> None:
    kinds = {path.name: load_file(path)["locations"].dtype for path in WIDE.glob("*.safetensors")}
    assert kinds == {"0_69999.safetensors": np.uint16, "70000_139999.safetensors": np.uint32}
    assert DelphiCache(WIDE).d_sae == 140_000


def test_codes_come_in_the_order_of_tokens_and_latents() -> None:
    found = DelphiCache(CACHE).read([5, 2])
    assert found.rows.tolist() == [0] * 48 + [1] * 48
    assert found.places.tolist() == [*range(48), *range(48)]
    assert len(found.latents) == 96
    for start, stop in zip(found.latents.offsets, found.latents.offsets[1:], strict=False):
        ids = found.latents.ids[start:stop].tolist()
        assert ids == sorted(set(ids))


def test_any_rows_in_any_order() -> None:
    cache = DelphiCache(CACHE)
    dense = cache.read(range(16)).latents.to_dense().reshape(16, 48, 40)
    for rows in ([3], [9, 0, 15], [4, 4], []):
        assert torch.equal(cache.read(rows).latents.to_dense(), dense[rows].reshape(-1, 40))
    for rows in ([16], [-1], [0, 99]):
        with pytest.raises(IndexError, match="0 to 15"):
            cache.read(rows)


def test_entries_in_any_order(copy: Path) -> None:
    file = load_file(copy / MIDDLE)
    order = np.random.default_rng(0).permutation(len(file["activations"]))
    change(copy / MIDDLE, locations=file["locations"][order], activations=file["activations"][order])
    mixed, plain = DelphiCache(copy).read([7, 1, 12]).latents, DelphiCache(CACHE).read([7, 1, 12]).latents
    assert torch.equal(mixed.offsets, plain.offsets)
    assert torch.equal(mixed.ids, plain.ids)
    assert torch.equal(mixed.values, plain.values)


def test_a_cache_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    monkeypatch.setattr("interp.evidence.delphi_cache.CHUNK", 7)
    assert read_all(DelphiCache(CACHE), list(range(16))) == plainly(CACHE)
    file = load_file(copy / MIDDLE)
    order = np.r_[3 : len(file["activations"]), 0:3]  # in order within every piece, but not from piece to piece
    assert (len(order) - 3) % 7 == 0
    change(copy / MIDDLE, locations=file["locations"][order], activations=file["activations"][order])
    assert read_all(DelphiCache(copy), list(range(16))) == plainly(CACHE)


def test_values_that_overflowed(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = load_file(copy / MIDDLE)["activations"].copy()
    values[:2] = np.inf, -np.inf
    change(copy / MIDDLE, activations=values)
    cache = DelphiCache(copy)
    assert "2 activations were too large" in caplog.text
    assert {LARGEST, -LARGEST} <= set(cache.read(range(16)).latents.values.tolist())


def test_a_fingerprint_is_of_the_content(copy: Path) -> None:
    assert DelphiCache(copy).fingerprint() == DelphiCache(CACHE).fingerprint()
    change(copy / MIDDLE, activations=load_file(copy / MIDDLE)["activations"] * 2)
    assert DelphiCache(copy).fingerprint() != DelphiCache(CACHE).fingerprint()


def moved(column: int, value: int) -> Any:
    def damage(folder: Path) -> None:
        locations = load_file(folder / MIDDLE)["locations"].copy()
        locations[5, column] = value
        change(folder / MIDDLE, locations=locations)

    return damage


def twice(folder: Path) -> None:
    locations = load_file(folder / MIDDLE)["locations"].copy()
    locations[1] = locations[0]
    change(folder / MIDDLE, locations=locations)


def not_a_number(folder: Path) -> None:
    values = load_file(folder / MIDDLE)["activations"].copy()
    values[3] = np.nan
    change(folder / MIDDLE, activations=values)


def cut(folder: Path) -> None:
    data = (folder / MIDDLE).read_bytes()
    (folder / MIDDLE).write_bytes(data[:-100])


def configured(**settings: Any) -> Any:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def outside(folder: Path) -> None:
    (folder / MIDDLE).rename(folder.parent / "elsewhere")
    (folder / MIDDLE).symlink_to(folder.parent / "elsewhere")


def replaced(**tensors: Any) -> Any:
    return lambda folder: change(folder / MIDDLE, **tensors)


DAMAGES = {
    "13 to 25 are missing": lambda folder: (folder / MIDDLE).unlink(),
    "0 to 12 are missing": lambda folder: (folder / "0_12.safetensors").unlink(),
    "2 files of codes, but n_splits in config.json is 3": lambda folder: (folder / "26_39.safetensors").unlink(),
    "13_26.safetensors: its latents overlap": lambda folder: shutil.copy(folder / MIDDLE, folder / "13_26.safetensors"),
    "13_25.safetensors is missing, damaged": cut,
    "13_25.safetensors: locations name row 16; there are 0 to 15": moved(0, 16),
    "13_25.safetensors: locations name place 48; there are 0 to 47": moved(1, 48),
    "13_25.safetensors: locations name latent 13; there are 0 to 12": moved(2, 13),
    "13_25.safetensors: the same row, place and latent are there twice": twice,
    "13_25.safetensors: an activation is not a number": not_a_number,
    "13_25.safetensors has no tokens; cache with save_tokens=True": replaced(tokens=None),
    "13_25.safetensors has no locations": replaced(locations=None),
    "13_25.safetensors has other tokens than 0_12": replaced(tokens=np.ones((16, 48), int)),
    "13_25.safetensors: activations are torch.float32": replaced(activations=np.ones(416, np.float32)),
    "13_25.safetensors: activations are torch.float16 .415": replaced(activations=np.ones(415, np.float16)),
    "locations are torch.int64 .416, 2., not integers": replaced(locations=np.ones((416, 2), int)),
    "cannot read .*config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config.json has no model_name": configured(model_name=None),
    "cache_ctx_len is 64, but rows have 48": configured(cache_ctx_len=64),
    "points outside": outside,
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_cache_is_refused(copy: Path, told: str) -> None:
    DAMAGES[told](copy)
    with pytest.raises(DataError, match=told):
        DelphiCache(copy)


def test_a_folder_above_names_its_hookpoints() -> None:
    with pytest.raises(DataError, match=r"has caches of layers\.1\.mlp: name one of these"):
        DelphiCache(CACHE.parent)
    with pytest.raises(DataError, match=r"is it delphi's cache\?"):
        DelphiCache(GOLDEN / "run" / "scores")


def test_explanations(caplog: pytest.LogCaptureFixture) -> None:
    texts = {3: 'The word number 1, "quoted" and <b>é</b>.', 17: 'The word number 2, "quoted" and <b>é</b>.'}
    assert read_explanations(GOLDEN / "run") == {HOOK: texts}  # what was not parsed, of latent 30, is none
    assert "1 files hold no explanation" in caplog.text
    assert read_explanations(GOLDEN / "run" / "explanations") == {HOOK: texts}


def test_explanations_that_are_none(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "explanations"
    (folder / "a--b.c_latent7_latent8.txt").write_text('"half \\ud83d pair"')
    (folder / f"{HOOK}_latent4.txt").write_text('" "')
    (folder / f"{HOOK}_latent5.txt").write_text(json.dumps("long" * 9999))
    found = read_explanations(run)
    assert found["a/b.c_latent7"] == {8: "half ? pair"}
    assert sorted(found[HOOK]) == [3, 17]
    assert "3 files" in caplog.text


@pytest.mark.parametrize(
    "name", ["notes.txt", "x_latent.txt", "x_latent-1.txt", "x_latent1e3.txt", "_latent1.txt", "x_latent01.txt"]
)
def test_names_that_delphi_does_not_write(run: Path, name: str) -> None:
    (run / "explanations" / name).write_text('"text"')
    with pytest.raises(DataError, match="its name is not HOOKPOINT_latentNUMBER"):
        read_explanations(run)


def test_links_out_of_the_folder_are_refused(run: Path) -> None:
    (run / "secret").write_text('"secret"')
    (run / "explanations" / "x_latent1.txt").symlink_to(run / "secret")
    with pytest.raises(DataError, match="points outside"):
        read_explanations(run)


def rows_of(folder: Path, scorer: str) -> dict[int, dict[str, Any]]:
    return {row["latent"]: row for row in read_scores(folder) if row["scorer"] == scorer}


@pytest.mark.parametrize(("name", "scorer"), [("detection", "detection"), ("fuzz", "fuzzing")])
def test_scores_are_those_of_a_plain_reading(name: str, scorer: str) -> None:
    rows = rows_of(GOLDEN / "run", scorer)
    assert sorted(rows) == [3, 17, 30]
    for latent, row in rows.items():
        entries = json.loads((GOLDEN / "run" / "scores" / name / f"{HOOK}_latent{latent}.txt").read_bytes())
        assert len(entries) == 18
        given = [e for e in entries if e["prediction"] is not None and not (e["prediction"] and e["probability"] == 0)]
        assert 0 < len(given) < 18
        right = Counter((e["activating"], (e["probability"] >= 0.5) == e["activating"]) for e in given)
        tpr, tnr = (right[kind, True] / (right[kind, True] + right[kind, False]) for kind in (True, False))
        score = row["score"]
        assert score["measures"]["balanced_accuracy"]["value"] == pytest.approx((tpr + tnr) / 2)
        assert score["measures"]["tpr"]["low"] < tpr < score["measures"]["tpr"]["high"]
        assert (score["n"], score["coverage"]) == (len(given), len(given) / 18)
        assert sum(score["invalid"].values()) == 18 - len(given) == len(row["reasons"])
        assert row["values"] == [e["probability"] if e in given else None for e in entries]
        for column, values in {
            "truth": [float(e["activating"]) for e in entries],
            "tier": ["active" if e["activating"] else "random" for e in entries],
            "decile": [9 - e["distance"] if e["activating"] else -1 for e in entries],
            "section": [-1] * 18,
            "starts": [[]] * 18,
        }.items():
            assert row["tasks"][column] == values


def test_what_a_row_tells() -> None:
    row = rows_of(GOLDEN / "run", "detection")[3]
    told = {
        name: row[name] for name in ("explainer", "null", "of", "judge", "hookpoint", "status", "by_rule", "doubtful")
    }
    assert told == {
        "explainer": "delphi", "null": False, "of": 3, "judge": "judge", "hookpoint": HOOK, "status": "ok",
        "by_rule": False, "doubtful": 0,
    }  # fmt: skip
    assert row["explanation"] == 'The word number 1, "quoted" and <b>é</b>.'
    assert rows_of(GOLDEN / "run", "detection")[30]["explanation"] == ""
    assert row["score"]["invalid"] == {"no answer": 8, "no_mass": 1}  # a probability of 0 with a prediction of 1


def test_failed_answers_lower_the_coverage_alone(run: Path) -> None:
    path = run / "scores" / "detection" / f"{HOOK}_latent17.txt"
    entries, before = json.loads(path.read_bytes()), rows_of(run, "detection")[17]
    for failed in range(10, 18):
        entries[failed] |= {"prediction": None, "probability": None, "correct": None}
    path.write_text(json.dumps(entries))
    row = rows_of(run, "detection")[17]
    assert before["score"]["coverage"] == pytest.approx(15 / 18)
    assert (row["score"]["coverage"], row["score"]["n"]) == (pytest.approx(10 / 18), 10)
    path.write_text(json.dumps([e | {"prediction": None, "probability": None} for e in entries]))
    row = rows_of(run, "detection")[17]
    assert (row["status"], row["reason"], row["score"]["coverage"]) == ("failed", "18 no answer", 0)
    assert row["score"]["measures"]["balanced_accuracy"]["value"] is None
    path.write_text("[]")
    assert rows_of(run, "detection")[17]["status"] == "n/a"


def test_predictions_without_probabilities_are_yes_and_no() -> None:
    row = rows_of(GOLDEN / "neighbours", "detection")[3]
    assert set(row["values"]) == {0.0, 1.0, None}
    assert row["score"]["measures"]["auroc[other_latent]"]["value"] is None  # of yes and no, balanced accuracy says all


def test_tiers_are_not_filled_from_others() -> None:
    """What these windows are of: tests/make/delphi_files.py."""
    measures = rows_of(GOLDEN / "neighbours", "detection")[3]["score"]["measures"]
    assert measures["balanced_accuracy[other_latent]"]["value"] == pytest.approx((measures["tpr"]["value"] + 4 / 9) / 2)
    assert measures["balanced_accuracy"]["value"] is None
    assert measures["balanced_accuracy[neighbor]"]["value"] is None
    row = rows_of(GOLDEN / "neighbours", "fuzzing")[3]  # fuzz_type active
    assert set(row["tasks"]["tier"]) == {"active", "wrong_marks"}
    assert row["score"]["measures"]["tnr[wrong_marks]"]["value"] is not None


def test_tiers_that_are_mixed_are_told_apart(tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN / "neighbours", tmp_path / "run")
    path = run / "scores" / "detection" / f"{HOOK}_latent3.txt"
    entries = json.loads(path.read_bytes())
    silent = [entry for entry in entries if not entry["activating"] and entry["prediction"] is not None]
    for place, entry in enumerate(silent):
        entry["prediction"] = place < 2
        entry["activations"] = [0] * 8 if place < 4 else [0.5] * 8
    path.write_text(json.dumps(entries))
    measures = rows_of(run, "detection")[3]["score"]["measures"]
    assert measures["tnr"]["value"] == 0.5
    assert measures["tnr[other_latent]"]["value"] == 1.0


def configure(run: Path, **parts: Any) -> None:
    config = json.loads((run / "run_config.json").read_text())
    for name, value in parts.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (run / "run_config.json").write_text(json.dumps(config))


def test_settings_of_a_run_name_tiers_and_deciles(run: Path) -> None:
    configure(run, constructor_cfg={"non_activating_source": "FAISS"}, sampler_cfg={"n_quantiles": 5})
    row = rows_of(run, "detection")[17]
    assert set(row["tasks"]["tier"]) == {"active", "similar"}
    assert set(row["tasks"]["decile"]) == {-1}
    path = run / "scores" / "detection" / f"{HOOK}_latent17.txt"
    entries = json.loads(path.read_bytes())
    for entry in entries:
        if not entry["activating"]:
            entry |= {"distance": -0.5, "activations": [1.0] * 8}
    path.write_text(json.dumps(entries))
    assert set(rows_of(run, "detection")[17]["tasks"]["tier"]) == {"active", "neighbor"}
    (run / "run_config.json").unlink()
    row = rows_of(run, "detection")[3]
    assert set(row["tasks"]["tier"]) == {"active", "random"}
    assert (row["judge"], max(row["tasks"]["decile"])) == ("", 9)


def test_simulation_is_the_correlation_that_delphi_finds() -> None:
    row = rows_of(GOLDEN / "run", "simulation")[17]
    groups = json.loads((GOLDEN / "run" / "scores" / "simulation" / f"{HOOK}_latent17.txt").read_bytes())
    whole = next(group for group in groups if group["distance"] == 0)
    assert row["score"]["measures"]["correlation"]["value"] == pytest.approx(whole["ev_correlation_score"], abs=1e-9)
    assert row["tasks"]["truth"] == [1.0] * 10 + [0.0] * 8
    assert row["tasks"]["decile"] == [*range(9, -1, -1)] + [-1] * 8
    assert (row["doubtful"], row["score"]["coverage"]) == (3, 1.0)  # one failed, one in vain, one in earnest
    assert len(row["levels"]) == 18


def test_zeros_are_failures_where_probabilities_were_read(run: Path) -> None:
    configure(run, explainer_provider="offline")
    row = rows_of(run, "simulation")[17]
    assert (row["doubtful"], row["score"]["coverage"]) == (0, 15 / 18)
    assert row["reasons"] == dict.fromkeys(("1", "2", "3"), "no answer")


def test_simulations_without_silent_windows(run: Path) -> None:
    path = run / "scores" / "simulation" / f"{HOOK}_latent17.txt"
    groups = [group for group in json.loads(path.read_bytes()) if group["distance"] != 0]
    groups[0]["scored_sequence_simulations"][0]["simulation"]["expected_activations"].pop()
    path.write_text(json.dumps(groups))
    row = rows_of(run, "simulation")[17]
    assert row["tasks"]["truth"] == [1.0] * 10
    assert row["reasons"] == {"0": "parse"}
    assert row["score"]["measures"]["correlation"]["value"] is None


def test_rows_are_rows_of_the_journal(tmp_path: Path) -> None:
    journal = scores_in(tmp_path / "shards" / "1-of-1")
    rows = list(read_scores(GOLDEN / "run"))
    for row in rows:
        journal.append(row)
    assert len(rows) == 7
    for row in rows:
        there = journal.get(tuple(row[name] for name in SCORE_KEY))
        assert there == {"version": there["version"], **row}
    scorers = {"detection": Detection(), "fuzzing": Fuzzing(), "simulation": Simulation()}
    summary = write_results(tmp_path, scorers, {})
    told = {one["scorer"]: (one["latents"], one["coverage"]) for one in summary["scores"]}
    assert told["detection[judge]"] == (3, pytest.approx((9 + 15 + 15) / 18 / 3))
    assert told["simulation[judge]"] == (1, 1.0)


def test_other_scores_are_named_and_left(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "scores" / "surprisal").mkdir()
    assert len(list(read_scores(run))) == len(list(read_scores(run / "scores"))) == 7
    assert "scores by surprisal are not read" in caplog.text
    for name in ("detection", "fuzz", "simulation"):
        shutil.rmtree(run / "scores" / name)
    with pytest.raises(DataError, match="holds no scores"):
        list(read_scores(run))


WRONG = {
    "entry 2: prediction is 'yes', not true, false or null": {"prediction": "yes"},
    "entry 2: prediction is 1, not true": {"prediction": 1},
    "entry 2: prediction is -1, not true": {"prediction": -1},
    "entry 2: activating is None, not true or false": {"activating": None},
    "entry 2: probability is 1.5, not from 0 to 1": {"probability": 1.5},
    "entry 2: probability is True, not a number": {"probability": True},
    "entry 2: distance is nan": {"distance": float("nan")},
    "entry 2: distance is 1000": {"distance": 10**400},
    "entry 2: activations is .1, '2'., not a list of numbers": {"activations": [1, "2"]},
}


@pytest.mark.parametrize("told", WRONG)
def test_entries_that_delphi_does_not_write(run: Path, told: str) -> None:
    path = run / "scores" / "fuzz" / f"{HOOK}_latent3.txt"
    entries = json.loads(path.read_bytes())
    entries[2] |= WRONG[told]
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=rf"latent3\.txt: {told}"):
        list(read_scores(run))


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "null", "[" * 100_000, '[{"scored_sequence_simulations": 3}]'])
@pytest.mark.parametrize("name", ["detection", "simulation"])
def test_files_that_delphi_does_not_write(run: Path, name: str, text: str) -> None:
    path = run / "scores" / name / f"{HOOK}_latent17.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"latent17\.txt"):
        list(read_scores(run))
