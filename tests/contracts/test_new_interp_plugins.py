"""A new explainer and a new scorer are one file each: written here, put into a folder of plug-ins, and used like any.

Nothing else knows of them, so whatever a run does with plug-ins must work from what they say of themselves.
"""

import gzip
import json
import sys

import pyarrow.parquet as pq
import pytest
from rigs.fake_llm import Answer, FakeLLM
from rigs.interp_examples import judge
from rigs.interp_runs import explained, scores, scripted, tiny_coder
from rigs.runs import error_of

import interp.explainers
import interp.scorers
from cli.explain import main
from cli.view import main as view
from interp.client.requests import Chat
from interp.explainers import Explainer
from interp.scorers import Scorer
from sae.base.plugins import discover, names

EXPLAINER = '''
"""The first thing that a language model thinks of."""

from collections.abc import Sequence
from dataclasses import dataclass

from interp.client.requests import Abilities, Chat, Reply, Request
from interp.explainers import Explainer
from interp.prompts.explaining import SCHEMA, explanation_messages
from interp.records import Examples, Explanation
from sae.base.settings import at_least


@Explainer.register_subclass("first_thought")
@dataclass(frozen=True)
class FirstThought(Explainer):
    """Asks for two thoughts about a few windows."""

    few: int = 5
    """Windows that are shown."""

    def validate(self) -> None:
        at_least("explainers.first_thought.few", self.few, 1)

    def requests(self, examples: Examples, abilities: Abilities) -> list[Request]:
        active = [item for item in examples.explain if item.active][: self.few]
        asked = explanation_messages(active, ())
        chats = [Chat("explainer", asked, 64, schema=SCHEMA, sample=sample) for sample in range(2)]
        return chats if active else []

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        texts = dict.fromkeys(reply.data["explanation"] for reply in replies if reply.ok)
        return [Explanation(examples.latent, text, "first_thought") for text in texts]
'''
SCORER = '''
"""Does the judge's first word say that the explanation fits the strongest windows, and no others?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from interp.client.requests import Chat, Reply, Request
from interp.prompts.judging import DETECTION, one_text
from interp.prompts.windows import shown
from interp.records import Examples, Facts, Judgement, Score, Task
from interp.scorers import Scorer, Trial
from interp.scoring.judging import NO, YES, yes_or_no
from interp.scoring.metrics import classification
from interp.scoring.tasks import window_tasks
from sae.base.settings import at_least

if TYPE_CHECKING:
    from interp.evidence.subject import Subject


@Scorer.register_subclass("strongest")
@dataclass(frozen=True)
class Strongest(Scorer):
    """Asks of windows of either kind whether the explanation fits."""

    most: int = 8
    """Windows of either kind."""

    headline: ClassVar[str] = "auroc"
    tunes: ClassVar[bool] = True

    def validate(self) -> None:
        at_least("scorers.strongest.most", self.most, 1)

    def prepare(self, examples: Examples, subject: "Subject") -> dict[str, Any]:
        return {"width": subject.coder.spec.d_in, "model": subject.lm.name}

    def tasks(self, examples: Examples, split: str, prepared: dict[str, Any]) -> list[Task]:
        chosen = sorted(examples.of(split), key=lambda item: -item.window.strength)
        kinds = ([item for item in chosen if item.active == kind][: self.most] for kind in (True, False))
        return window_tasks([item for kind in kinds for item in kind], "strongest", examples.latent)

    def requests(self, trial: Trial) -> list[Request]:
        windows = [shown(task.items[0].window) for task in trial.tasks]
        asked = [one_text(DETECTION, trial.explanation.text, text) for text in windows]
        return [Chat(self.role, messages, max_tokens=1, choices=(YES, NO)) for messages in asked]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        return [yes_or_no(reply) for reply in replies]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        return classification(tasks, judgements, facts, threshold)
'''
NEW = ((interp.explainers, Explainer, "first_thought", EXPLAINER), (interp.scorers, Scorer, "strongest", SCORER))


@pytest.fixture(scope="module", autouse=True)
def _plugged_in(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for package, _, name, source in NEW:
            folder = tmp_path_factory.mktemp(name)
            (folder / f"{name}.py").write_text(source, encoding="utf-8")
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
            assert list(discover(package.__name__, [str(folder)])) == [name]
        yield
    for package, family, name, _ in NEW:
        del family._choice_registry[name], sys.modules[f"{package.__name__}.{name}"]
        delattr(package, name)


def answered(asked):
    """A judge that shows probabilities, and an explainer whose two thoughts differ."""
    if asked.body.get("logprobs") and "\n\nText: " in asked.text:
        found = judge(Chat("judge", tuple(asked.messages), 1, choices=("yes", "no"))).probabilities
        return Answer(max(found, key=found.get), found)
    return scripted(asked)


@pytest.fixture(scope="module")
def server():
    with FakeLLM(answered) as running:
        yield running


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("new-plugins"))


@pytest.fixture(scope="module")
def command(coder, server, tmp_path_factory):
    """Returns sae-explain with both: (run's folder, options) -> exit code."""
    cache = str(tmp_path_factory.mktemp("new-plugins-cache"))
    chosen = {
        "explainers.mine.type": "first_thought",
        "explainers.mine.few": 3,
        "scorers.yours.type": "strongest",
        "scorers.yours.most": 6,
        "models.explainer.model": "fake",
        "models.explainer.base_urls": f"[{server.url}]",
        "evidence.tokens": 30_000,
        "latents": "random:24",
        "examples.test": 12,
    }

    def run(folder, *options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAE_CACHE", cache)
            words = [f"--{name}={value}" for name, value in chosen.items()]
            return main([str(coder), *words, "--run-dir", str(folder), *map(str, options)])

    return run


@pytest.fixture(scope="module")
def run_dir(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new-plugins-run")
    assert command(folder) == 0
    return folder


def test_they_are_chosen_by_name_and_set_by_field(command, tmp_path, capsys):
    assert {"first_thought", "strongest"} <= {*names(Explainer), *names(Scorer)}
    assert main(["--help-fields"]) == 0
    told = capsys.readouterr().out
    assert "--explainers.first_thought.few  (default: 5)\n      Windows that are shown." in told
    assert "--scorers.strongest.most  (default: 8)\n      Windows of either kind." in told
    for wrong, error in (
        ("--scorers.yours.most=0", "scorers.strongest.most: 0 is too small; it must be at least 1"),
        ("--scorers.yours.mots=9", "--scorers.yours.mots: no such field. Did you mean --scorers.yours.most?"),
        ("--explainers.mine.type=first_thougt", "explainers.mine.type: 'first_thougt' is not one of"),
    ):
        assert command(tmp_path / "run", wrong) == 2
        assert error_of(capsys.readouterr().err).startswith(error)


@pytest.mark.slow
def test_a_dry_run_shows_their_prompts_and_counts_them(command, tmp_path, server, capsys):
    before = len(server.calls)
    assert command(tmp_path / "run", "--dry-run", "--null=0") == 0
    told = capsys.readouterr().out
    assert "--- explainer mine, latent" in told
    assert "--- scorer yours, latent" in told
    assert "=== " in told.split("--- explainer mine")[1]
    assert "Does the description fit the text?" in told.split("--- scorer yours")[1]
    assert "explainer: fake, 48 requests" in told  # two a latent
    assert len(server.calls) == before


def test_a_run_explains_and_scores_with_them(run_dir):
    labels, figures = explained(run_dir), scores(run_dir)
    ok = {latent for (latent, _), row in labels.items() if row["status"] == "ok"}
    assert {explainer for _, explainer in labels} == {"mine"}
    assert len(ok) >= 20
    assert all(labels[latent, "mine"]["by"] == "fake" for latent in ok)
    assert any(labels[latent, "mine"]["explanation"]["text"] != "words: none" for latent in ok)
    assert {key[1:] for key in figures} == {("yours", "mine", False), ("yours", "mine", True)}
    row = figures[min(ok), "yours", "mine", False]
    assert row["score"]["n"] == len(row["values"]) == 12
    assert row["threshold"] is not None  # tuned on the valid split
    prepared = (run_dir / "shards/1-of-1/journal-prepared.jsonl").read_text().splitlines()
    assert {json.dumps(json.loads(line)["prepared"]["width"]) for line in prepared} == {"16"}
    assert len(prepared) == len(ok)


def test_tables_and_the_report_tell_of_them_with_null_and_lift(run_dir):
    rows = pq.read_table(run_dir / "results.parquet").to_pylist()
    assert {(row["explainer"], row["scorer"], row["headline"]) for row in rows} == {("mine", "yours[fake]", "auroc")}
    scored = [row for row in rows if row["score"] is not None]
    assert len(scored) >= 20
    figures = pq.read_table(run_dir / "measures.parquet").to_pylist()
    by_latent = {row["latent"]: row["value"] for row in figures if row["measure"] == "auroc"}
    assert {row["latent"]: row["score"] for row in scored} == by_latent
    assert all(row["lift"] == row["score"] - row["null"] for row in scored)
    (figures,) = json.loads((run_dir / "summary.json").read_text())["scores"]
    assert figures["headline"] == "auroc"
    assert figures["lift"]["low"] is not None


@pytest.mark.slow
def test_what_is_there_is_asked_no_more_and_what_is_lost_comes_back_the_same(command, run_dir, server, capsys):
    before = (run_dir / "results.parquet").read_bytes(), len(server.calls)
    assert command(run_dir) == 0
    told = capsys.readouterr().out
    assert "yours[fake]: auroc" in told
    assert "\nmine: " in told
    for name in ("explain", "score", "prepared"):
        journal = run_dir / f"shards/1-of-1/journal-{name}.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:7]))
    assert command(run_dir) == 0  # from the answers so far
    assert before == ((run_dir / "results.parquet").read_bytes(), len(server.calls))


@pytest.mark.slow
def test_they_are_compared_and_exported(run_dir, tmp_path, capsys):
    found = tmp_path / "compared.json"
    assert main(["compare", str(run_dir), str(run_dir), "--tokens=2000", "--json", str(found)]) == 0
    pairs = json.loads(found.read_text())["matchings"]["decoder"]["pairs"]
    assert pairs
    assert all(pair["explanations"][0] == pair["explanations"][1] for pair in pairs)
    lines = tmp_path / "lines"
    assert view([str(run_dir), "--export", "neuronpedia", str(lines), "--model-id=tiny", "--source-id=1-res"]) == 0

    def rows(kind):
        packed = (lines / "tiny" / "1-res" / kind / "batch-0.jsonl.gz").read_bytes()
        return [json.loads(line) for line in gzip.decompress(packed).splitlines()]

    assert {row["typeName"] for row in rows("explanations")} == {"mine"}
    assert {row["explanationScoreTypeName"] for row in rows("scores")} == {"yours"}
    assert {row["explanationScoreModelName"] for row in rows("scores")} == {"fake"}
