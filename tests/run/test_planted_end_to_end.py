"""A planted coder through all of it: evidence, examples, the pipeline with its null, and a scripted judge.

Every latent fires on four words of its own (w20, w21, ...), unless the word before ends in one of three digits. The
judge applies what an explanation says, "words: ...; unless after: ...", to what it is shown. So the right label is
right everywhere; without its "unless" it is wrong where the words stand and the latent is silent, and with the words of
its neighbor where that one fires.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rigs.interp_evidence import FIRST_WORD, SIZES, WORDS, read_corpus, tokenizer, write_documents
from rigs.interp_examples import texts_of, unescaped
from rigs.interp_runs import scores

from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger
from interp.client.requests import Abilities, Reply
from interp.evidence.codes import Coded
from interp.evidence.examples import ExampleConfig, ExampleMaker
from interp.evidence.first_pass import Keep, gather_evidence
from interp.evidence.places import plan_places
from interp.evidence.second_pass import visit_places
from interp.records import TIERS
from interp.run.config import CoderConfig, ExplainConfig, ModelsConfig
from interp.run.pipeline import Pipeline
from interp.run.preparing import Prepared
from interp.run.rundir import Settings, begin_run
from interp.scorers.detection import Detection
from interp.scorers.fuzzing import Fuzzing
from interp.scorers.simulation import Simulation
from sae.kernels.codes import SparseLatents
from sae.text.decode import Decoder

LATENTS, OWN = 20, 4
UNLESS = "; unless after: 7, 8, 9"
SCORERS = {"detection": Detection(), "fuzzing": Fuzzing(), "simulation": Simulation()}


def own(latent, n=OWN):
    """The latent's first n words."""
    return [WORDS[OWN * (latent % LATENTS) + i] for i in range(n)]


LABELS = {
    "right": lambda latent: f"words: {', '.join(own(latent))}{UNLESS}",
    "broad": lambda latent: f"words: {', '.join(word for one in range(6) for word in own(latent + one))}",
    "narrow": lambda latent: f"words: {', '.join(own(latent, 1))}{UNLESS}",
}


class WordCodes:
    """The codes of the planted coder."""

    d_sae = LATENTS

    def __init__(self, rows):
        self.rows = rows

    def read(self, rows):
        """Returns the codes of rows: of every word the latent that it belongs to, from 2 to 4 by its place."""
        word = self.rows.tokens(rows).numpy().astype(np.int64) - FIRST_WORD
        before = np.pad(word, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        row, place = (word >= 0).nonzero()
        word, before = word[row, place], before[row, place]
        fires = (word < OWN * LATENTS) & (before >= 0) & (before % 10 < 7)
        offsets = torch.from_numpy(np.append(0, np.cumsum(fires)))
        ids, values = torch.from_numpy(word[fires] // OWN), torch.from_numpy(2 + place[fires] % 11 / 5).float()
        return Coded(SparseLatents(offsets, ids, values, LATENTS), row, place)

    def fingerprint(self):
        """Returns what they depend on."""
        return {"coder": "planted words"}


def holds(description, words):
    """Returns by word whether a description is true of it; of the first one nothing stands before, so it is not."""
    wanted, _, stops = description.removeprefix("words: ").partition("; unless after: ")
    wanted, stops = set(wanted.split(", ")), set(stops.split(", "))
    return [word in wanted and place > 0 and words[place - 1][-1] not in stops for place, word in enumerate(words)]


def fits(description, line):
    """Returns whether a description is true of any word of a text, or of any that is marked in it."""
    text, marks = unescaped(line)
    found = list(re.finditer(r"\w+", text))
    inside = [not marks or any(a <= word.start() and word.end() <= b for a, b in marks) for word in found]
    true = holds(description, [word[0] for word in found])
    return any(one and seen for one, seen in zip(true, inside, strict=True))


def judge(chat):
    """Answers as a model that reads: yes or no with some doubt, or the levels of tokens."""
    if chat.choices:
        description, ((_, line),) = texts_of(chat)
        p = 0.9 if fits(description, line) else 0.1
        return Reply(probabilities={"yes": p, "no": 1 - p})
    content = chat.messages[-1][1]
    listed = re.findall(r'^(\d+)\t" ?(\w+)"$', content, re.MULTILINE)
    true = holds(content.split("\n")[0].removeprefix("Description: "), [word for _, word in listed])
    levels = [{"token": int(n), "level": 7} for (n, _), one in zip(listed, true, strict=True) if one]
    return Reply(data={"levels": levels})


class ScriptedClient:
    """Has the judge answer in this process."""

    def __init__(self, endpoints, *_):
        self.ledger = Ledger(endpoints)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def abilities(self, role):
        """Returns those of a server that tells probabilities and keeps to schemas."""
        return Abilities(choices=True, structured="json_schema")

    async def ask_all(self, requests, heard):
        """Returns the judge's answers."""
        replies = [judge(request) for request in requests]
        for request, reply in zip(requests, replies, strict=True):
            heard(request, reply)
        return replies


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By label, scorer and whether it is the null: the means over latents of all measures."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        rows = read_corpus(write_documents(folder / "text.jsonl", [60] * 400))
    codes, latents = WordCodes(rows), np.arange(LATENTS)
    evidence = gather_evidence(codes, rows, folder / "evidence", Keep(SIZES))
    near = [[(latent + 1) % LATENTS] for latent in range(LATENTS)]
    visits = visit_places(codes, rows, plan_places(evidence, rows, latents, near, 0), folder / "evidence")
    config = ExampleConfig(shown=5, contrast=5, valid=5, test=12)
    maker = ExampleMaker(evidence, visits, rows, Decoder(tokenizer()), config, 0)
    nothing, pairs = dict.fromkeys(range(LATENTS), ((), ())), {i: ((near[i][0], 0.9),) for i in range(LATENTS)}
    prepared = Prepared(SimpleNamespace(), rows, evidence, latents, maker, nothing, pairs)
    assert not any(prepared.examples(latent).missing for latent in range(LATENTS))
    for name, label in LABELS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"latent": i, "text": label(i)}) for i in range(LATENTS)))
        run = ExplainConfig(
            str(folder / "run"),
            coder=CoderConfig("planted"),
            examples=config,
            scorers=SCORERS,
            models=ModelsConfig(judge=EndpointConfig("scripted")),
            explanations=str(file),
            null_latents=-1 if name == "right" else 0,
        )
        begin_run(run, Settings(run, run, "planted"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("interp.run.pipeline.Client", ScriptedClient)
            patch.setattr("interp.scoring.metrics.DRAWS", 20)  # no interval is looked at
            assert not Pipeline(run, prepared).run().failed
    values = {}
    for (_, scorer, name, null), row in scores(folder / "run").items():
        assert row["score"]["coverage"] == 1
        for measure, one in row["score"]["measures"].items():
            if one["value"] is not None:
                values.setdefault((name, scorer, null), {}).setdefault(measure, []).append(one["value"])
    return {key: {name: np.array(some) for name, some in measures.items()} for key, measures in values.items()}


BOTH = pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
HARD = tuple(f"[{tier}]" for tier in TIERS[1:])


@BOTH
def test_the_right_label_is_right_in_every_tier(found, scorer):
    right = found["right", scorer, False]
    for tier in ("", *HARD):
        assert len(right[f"balanced_accuracy{tier}"]) == LATENTS
        assert right[f"balanced_accuracy{tier}"].min() >= 0.95
    assert right["precision_true_rate"].min() == 1


@BOTH
def test_the_label_of_another_latent_says_nothing(found, scorer):
    null = found["right", scorer, True]["balanced_accuracy"]
    assert len(null) == LATENTS
    assert null.mean() == pytest.approx(0.5, abs=0.04)


@BOTH
def test_a_label_too_broad_loses_precision(found, scorer):
    broad = found["broad", scorer, False]
    assert broad["tpr"].min() == 1
    assert broad["precision_true_rate"].mean() < 0.9
    for tier in HARD:
        assert broad[f"tnr{tier}"].mean() < 0.1
        assert broad[f"balanced_accuracy{tier}"].mean() < 0.55


@BOTH
def test_a_label_too_narrow_loses_recall(found, scorer):
    narrow = found["narrow", scorer, False]
    assert 0.15 < narrow["tpr"].mean() < 0.5
    assert narrow["precision_true_rate"].min() == 1
    for tier in ("", *HARD):
        assert narrow[f"tnr{tier}"].min() == 1
        assert narrow[f"balanced_accuracy{tier}"].mean() == pytest.approx((1 + narrow["tpr"].mean()) / 2, abs=0.02)


def test_simulation_follows_the_label(found):
    right, null, broad, narrow = (
        found[name, "simulation", null]["correlation"].mean()
        for name, null in (("right", False), ("right", True), ("broad", False), ("narrow", False))
    )
    assert right > 0.9
    assert abs(null) < 0.05
    assert broad < right - 0.2
    assert narrow < right - 0.2
