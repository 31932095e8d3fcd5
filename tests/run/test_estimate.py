"""What `--dry-run` counts: by the config's sizes, choosing and corrections included, and what a run then asks."""

import re
from dataclasses import replace

import pytest
from rigs.fake_llm import FakeLLM
from rigs.interp_examples import planted
from rigs.interp_runs import explain_config, prepare_apart, run, scripted, tiny_coder, with_llm

from interp.evidence.examples import ExampleConfig
from interp.records import ACTIVE, TIERS
from interp.run.estimate import _more, filled, lines

SIZES = ExampleConfig(shown=9, contrast=5, valid=7, test=11)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("estimate"))


@pytest.fixture(scope="module")
def prepared(coder, tmp_path_factory):
    return prepare_apart(coder, tmp_path_factory.mktemp("estimate-evidence"))


def counted(config, prepared):
    """Requests by role, and the last line."""
    told = list(lines(config, prepared))
    found = {
        m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"^(\w+): .*?, ([\d,]+) requests", "\n".join(told), re.M)
    }
    return found, told


def sized(coder, path, latents="random:200", **changes):
    changes = {"latents": latents, "models.explainer": {"model": "gpt-x"}, "examples": vars(SIZES)} | changes
    return explain_config(coder, path, changes)


def test_examples_are_filled_to_the_sizes_of_the_config():
    for few in (
        planted(n=3),
        planted(n=40),
        planted(n=3, tiers=("random",)),
        replace(planted(n=3), valid=(), explain=()),
    ):
        found = filled(few, SIZES)
        kinds = {
            "explain": {ACTIVE: 9, "random": 5},
            "valid": {ACTIVE: 7, "random": 7},
            "test": dict.fromkeys((ACTIVE, *TIERS), 11),
        }
        for split, sizes in kinds.items():
            assert {tier: sum(i.tier == tier for i in found.of(split)) for tier in (ACTIVE, *TIERS)} == dict.fromkeys(
                (ACTIVE, *TIERS), 0
            ) | sizes
            for item in found.of(split):
                assert any(
                    item.window == other.window and item.active == other.active
                    for other in (*few.explain, *few.valid, *few.test)
                )


def test_every_request_of_a_plain_run_is_counted(coder, prepared, tmp_path):
    scorers = {name: {"type": name} for name in ("detection", "fuzzing", "intruder")}
    scorers["intruder"]["questions"] = 6
    config = sized(coder, tmp_path, scorers=scorers, explainers={"llm": {"type": "llm"}}, null_latents=40)
    found, told = counted(config, prepared)
    assert found["explainer"] == 48  # the coder has no more
    assert found["judge"] == (48 + 40) * 2 * 44 + 48 * 6  # a latent's own score has no null
    assert any("48 latents; of 40 the scores" in line for line in told)
    assert "at an unknown price" in "\n".join(told)
    assert told[-1].startswith("about 0.00 USD, and what has no known price")
    titles = [line.split(",")[0] for line in told if line.startswith("--- ")]
    assert titles == ["--- explainer llm", "--- scorer detection", "--- scorer fuzzing", "--- scorer intruder"]


def test_choosing_and_correcting_are_counted(coder, prepared, tmp_path):
    llm = {"type": "llm", "candidates": 5, "refine": True}
    both = {"llm": llm, "token_lookup": {"type": "token_lookup"}}
    config = sized(
        coder,
        tmp_path,
        latents="random:30",
        scorers={"detection": {"type": "detection"}},
        explainers=both,
        null_latents=0,
    )
    found, told = counted(config, prepared)
    assert found["explainer"] == 30 * (5 + 1)
    assert found["judge"] == 30 * (6 * 14 + 44)  # a rule asks nobody
    assert "--- correction by llm" in "\n".join(told)
    only = replace(config, only="explain")
    assert counted(only, prepared)[0] == {"explainer": 30 * 6, "judge": 30 * 6 * 14}
    assert counted(replace(config, only="score"), prepared)[0] == {"judge": 30 * 44}


def test_the_valid_split_is_counted_where_a_threshold_is_tuned(coder, prepared, tmp_path):
    encoder = {"model": "e", "via": "http", "base_urls": ["http://localhost:1/v1"]}
    file = tmp_path / "theirs.jsonl"
    file.write_text('{"latent": 1, "text": "x"}')
    config = sized(coder, tmp_path, latents="3,4", scorers={"embedding": {"type": "embedding"}}, explanations=str(file))
    config = replace(config, models=replace(config.models, encoder=replace(config.models.encoder, **encoder)))
    assert counted(config, prepared)[0] == {"encoder": 2 * (2 + 2)}  # of test and valid: the text, and up to 64 windows


def test_fewer_than_twenty_latents_have_no_null_and_alive_is_a_bound(coder, prepared, tmp_path):
    few, _ = counted(
        sized(coder, tmp_path, latents="random:19", scorers={"detection": {"type": "detection"}}), prepared
    )
    assert few["judge"] == 19 * 44
    _, told = counted(sized(coder, tmp_path, latents="alive"), prepared)
    assert any(line.startswith("up to 48 latents; of 48") for line in told)


def test_a_run_asks_no_more_than_was_said(coder, prepared, tmp_path):
    with FakeLLM(scripted, logprobs=0, schemas=("json_schema",)) as server:
        changes = with_llm(server.url)
        del changes["scorers"]["fuzzing"]
        config = explain_config(coder, tmp_path / "run", changes)
        pipeline, _ = run(config, prepared)
    said, _ = counted(config, prepared)
    probes = 4  # of what a role's model can do
    for role, n in said.items():
        account = pipeline.spent["roles"][role]
        assert 0.7 * n <= account["calls"] + account["cached"] - probes <= n, role  # some latents have too few windows


def test_what_is_cut_finely_has_more_tokens():
    """The counts of Gemma's tokenizer."""
    for text, tokens in (
        ("Anyone who has lived by the sea knows how the light changes before rain, and why they come home. ", 20),
        ("\u9019\u662f\u4e00\u500b\u6e2c\u8a66,\u770b\u770b\u6709\u591a\u5c11\u500b\u6a19\u8a18\u3002", 13),
        ("        return self.lock[key] if key in self.lock else {'a': 1, 'b': [2, 3]}\n", 30),
    ):
        assert len(text) / 4 + _more(text) == pytest.approx(tokens, rel=0.35)
    assert _more("plain words") == 0
