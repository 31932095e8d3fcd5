"""Explain, then score: thousands of latents in flight, one journal row for each finished piece of work.

    RUN/evidence/                         what both passes found, shared by all shards
    RUN/shards/i-of-n/journal-explain.jsonl   latent x explainer
    RUN/shards/i-of-n/journal-score.jsonl     latent x scorer x explanation, its null beside it
    RUN/shards/i-of-n/journal-examples.jsonl  what people are shown of a latent: its facts, and some of its windows
    RUN/shards/i-of-n/cache.sqlite            every answer that was paid for
    RUN/shards/i-of-n/latents.json            which latents it is about

A row is written when all its answers are there, so a run that ends at any moment goes on where it stopped; what it had
asked meanwhile comes from the cache. Memory holds the examples of the latents in flight only.
"""

import asyncio
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import ROLES, Abilities, Reply, Request
from interp.client.running import finished
from interp.records import Examples, Explanation
from interp.run import explanations_file
from interp.run.answered import Answered, Share
from interp.run.config import ExplainConfig
from interp.run.flows import AGAIN, CutOff, Flow, Row, explanation_flow, score_flow
from interp.run.journal import Journal
from interp.run.kept import excerpts_kept
from interp.run.preparing import Prepared
from interp.run.reasons import FAILED, OK, main_reason, told
from interp.run.rundir import CACHE, LATENTS, asked_in, explained_in, scores_in, shard_folder, shown_in
from interp.scorers import Scorer
from sae.base.files import FolderLock, write_json
from sae.base.progress import UNWATCHED, Watch
from sae.base.seeding import uniform

log = logging.getLogger(__name__)
FEWEST_FOR_NULL = 20  # latents; of fewer, a null would be told by chance
WAVE = 10_000  # latents whose questions go out together, about 0.1 MiB each
FAILURES_IN_A_ROW = 100
POLL_S = 60.0  # between two looks at the state of batches
KEPT = 200  # examples that stay in memory, half a MiB each


Work = tuple[Journal, Row, Flow]


@dataclass
class Ended:
    """How a run ended."""

    failed: int
    """Latents of which some row failed."""
    latents: int
    why: str = ""
    """Of these, by what, the most frequent first, with the first message of each."""
    cut_off: str = ""
    """Why the run got no more answers, if so: the budget or quota is spent, or the models do not answer any more."""


class Pipeline:
    """One shard of a run."""

    def __init__(self, config: ExplainConfig, prepared: Prepared, shard: tuple[int, int] = (1, 1)) -> None:
        self.config, self.prepared = config, prepared
        number, of = shard
        self.latents: list[int] = prepared.latents.tolist()[number - 1 :: of]
        self.folder = shard_folder(Path(config.run_dir), shard)
        self.explainers, self.scorers = config.all_explainers(), config.all_scorers()
        self.thread = ThreadPoolExecutor(1)  # examples and the subject model, one latent at a time
        self.abilities: dict[str, Abilities] = {}
        self.kept: dict[int, Examples] = {}
        self.failed_in_a_row = 0

    def run(self, retry_failed: bool = False, watch: Watch = UNWATCHED) -> Ended:
        """Does all that is not in the journals yet; with `retry_failed`, also what failed before.

        Raises Stopped when asked to stop; everything finished is kept.
        """
        with FolderLock(self.folder):
            self.explained = explained_in(self.folder)
            self.scores = scores_in(self.folder)
            self.ready = Journal(self.folder / "journal-prepared.jsonl", ("latent", "scorer"))
            self.again = AGAIN if retry_failed else ()
            self.shown = shown_in(self.folder)
            write_json(self.folder / LATENTS, sorted({*asked_in(self.folder), *self.latents}))
            self._take_in_file()
            with threadpool_limits(1, "blas"):  # figures are small: more threads only wait for one another
                spent = finished(self._run(watch))
        return self._ended(spent)

    def _ended(self, cut_off: str) -> Ended:
        asked, failed = set(self.latents), dict[int, str]()
        messages: dict[str, str] = {}
        for row in (*self.explained.rows(), *self.scores.rows()):
            if row["status"] == FAILED and not row.get("null") and row["latent"] in asked:
                failed.setdefault(row["latent"], main_reason(row))
                messages = row.get("messages", {}) | messages
        return Ended(len(failed), len(self.latents), told(Counter(failed.values()), messages), cut_off)

    def _take_in_file(self) -> None:
        """Writes down explanations that come from a file, as if an explainer of the file's name had made them."""
        if not self.config.explanations:
            return
        path = Path(self.config.explanations).expanduser()
        name, found = path.stem, explanations_file.read_explanations(path, self.prepared.evidence.d_sae)
        texts = ((latent, place, text) for latent in self.latents for place, text in enumerate(found.get(latent, ())))
        for latent, place, text in texts:
            explainer = explanations_file.variant(name, place)
            there = self._explanation(latent, explainer)
            if there is None or there.text != text:
                row = {"latent": latent, "explainer": explainer, "by": "", "status": OK, "reason": ""}
                self.explained.append(row | {"explanation": Explanation(latent, text, explainer).to_json()})

    async def _run(self, watch: Watch) -> str:
        roles = {role: self.config.endpoint(role) for role in ROLES}
        cache, budget, again = self.folder / CACHE, self.config.budget_usd, bool(self.again)
        shared = {self.config.model.name: self.prepared.subject}
        async with Client(roles, cache, budget, watch, POLL_S, again, shared) as self.client:
            for role in self.config.roles_asked():
                self.abilities[role] = await self.client.abilities(role)
            self.watch = watch
            try:
                if self.config.only != "score":
                    await self._phase("explaining", self.latents, self._explain)
                if self.config.only != "explain":
                    self.theirs = {explainer: self._partners(explainer) for explainer in self._sources()}
                    await self._phase("scoring", self.latents, self._score)
            except CutOff as error:
                return str(error)
            finally:
                self.spent = self.client.ledger.totals()
        return ""

    async def _phase(self, label: str, latents: list[int], work: Callable[[int], Awaitable[list[Work]]]) -> None:
        """Does some work on every latent: live, so many at once; through the Batch API in waves."""
        batched = any(self.config.endpoint(role).via == "batch" for role in self.abilities)
        groups = [latents[i : i + WAVE] for i in range(0, len(latents), WAVE)] if batched else [[i] for i in latents]
        todo = iter(groups)

        async def worker() -> None:
            for group in todo:
                if self.watch.should_stop() or errors:
                    return
                share = Share()
                try:
                    await (self._in_waves(group, work, share) if batched else self._do(await work(group[0]), share))
                except Exception as error:  # the others end what they have begun
                    errors.append(error)
                told.end(len(group), share)
                self.tell()

        errors: list[Exception] = []
        endpoints = {role: self.config.endpoint(role) for role in ROLES}
        self.answered = told = Answered(self.client.ledger, endpoints, len(latents))
        workers = 1 if batched else self.config.in_flight
        with self.watch.stage(label, len(latents), "latents", at_once=workers) as progress:
            self.tell: Callable[[], None] = lambda: progress.update(told.done, told.reused, **told.figures())
            await asyncio.gather(*(worker() for _ in range(workers)))
        for error in sorted(errors, key=lambda error: isinstance(error, CutOff)):
            raise error
        self.watch.poll(f"while {label}; the same command goes on")

    async def _in_waves(self, latents: list[int], work: Callable[[int], Awaitable[list[Work]]], share: Share) -> None:
        """Asks what all latents have to ask together, then begins each anew with the answers, until nobody asks more.

        So no flow, with all the examples that it holds, waits for a batch.
        """
        answers: dict[Request, Reply] = {}
        while True:
            wanted: dict[Request, None] = {}
            for latent in latents:
                if self.watch.should_stop():
                    return
                for journal, row, flow in await work(latent):
                    share.rows += 1
                    try:
                        asked = next(flow)
                        while all(request in answers for request in asked):
                            asked = flow.send([answers[request] for request in asked])
                        wanted |= dict.fromkeys(request for request in asked if request not in answers)
                    except StopIteration as ended:
                        self._end(journal, row | ended.value)
            if not wanted:
                return
            answers |= zip(wanted, await self._ask(list(wanted), share), strict=True)

    async def _ask(self, requests: list[Request], share: Share) -> list[Reply]:
        def heard(request: Request, reply: Reply) -> None:
            self.answered.take(share, request, reply)
            self.tell()

        return await self.client.ask_all(requests, heard)

    async def _do(self, work: list[Work], share: Share) -> None:
        """Answers flows side by side, all their requests at once, and writes down what they return."""
        share.rows = len(work)
        replies: dict[int, Any] = dict.fromkeys(range(len(work)))
        while replies:
            waiting: dict[int, list[Request]] = {}
            for i, answers in replies.items():
                journal, row, flow = work[i]
                try:
                    waiting[i] = flow.send(answers)
                except StopIteration as ended:
                    self._end(journal, row | ended.value)
            found = iter(await self._ask([request for asked in waiting.values() for request in asked], share))
            replies = {i: list(islice(found, len(asked))) for i, asked in waiting.items()}

    def _end(self, journal: Journal, row: Row) -> None:
        """Writes a row down; ends the run where one after the other fails, before all the rest has failed too."""
        journal.append(row)
        self.failed_in_a_row = self.failed_in_a_row + 1 if row["status"] == FAILED else 0
        if self.failed_in_a_row >= FAILURES_IN_A_ROW:
            reason = f"{self.failed_in_a_row} answers in a row failed ({row['reason']})"
            raise CutOff(f"{reason}; once that is mended, --retry-failed goes on")

    async def _explain(self, latent: int) -> list[Work]:
        todo = [name for name in self.explainers if self._open(self.explained, (latent, name))]
        if not todo and (latent,) in self.shown:
            return []
        examples = await self._examples(latent)
        chooser, found = self.config.chooser(), list[Work]()
        for name in todo:
            explainer = self.explainers[name]
            by = self.config.endpoint("explainer").model if explainer.needs_llm else ""
            row = {"latent": latent, "explainer": name, "by": by}
            found.append((self.explained, row, explanation_flow(explainer, examples, self.abilities, chooser)))
        return found

    async def _score(self, latent: int) -> list[Work]:
        plain = [(name, scorer) for name, scorer in self.scorers.items() if not scorer.needs_explanation]
        todo: list[tuple[str, Scorer, str, bool, Explanation]] = [
            (name, scorer, "", False, Explanation(latent, "", "none")) for name, scorer in plain
        ]
        for explainer in self._sources():
            own = self._explanation(latent, explainer)
            for name, scorer in self.scorers.items():
                if own is None or not scorer.needs_explanation or not self._has_judge(scorer, own):
                    continue
                todo.append((name, scorer, explainer, False, own))
                other = self._other(latent, name, explainer)
                if other is not None:
                    todo.append((name, scorer, explainer, True, other))
        todo = [one for one in todo if self._open(self.scores, (latent, one[0], one[2], one[3]), one[4].text)]
        if not todo and (latent,) in self.shown:
            return []
        examples = await self._examples(latent)
        found: list[Work] = []
        for name, scorer, explainer, null, explanation in todo:
            ready = await self._prepare(scorer, name, examples)
            row = {"latent": latent, "scorer": name, "explainer": explainer, "null": null, "of": explanation.latent}
            row |= {"explanation": explanation.text, "judge": self._judge(scorer)}
            able = self.abilities.get(scorer.role, Abilities())
            flow = score_flow(scorer, explanation, examples, ready, able, null=null)
            found.append((self.scores, row, flow))
        return found

    def _open(self, journal: Journal, key: Hashable, explanation: str | None = None) -> bool:
        """Whether a row is to be written (again): none there, one that failed, or one of another explanation."""
        if key not in journal or journal.status(key) in self.again:
            return True
        row = journal.get(key) if explanation is not None else None
        return row is not None and row["explanation"] != explanation

    def _has_judge(self, scorer: Scorer, explanation: Explanation) -> bool:
        """Whether there is anybody to judge; without a judge, rules judge themselves and other texts go unjudged."""
        return bool(self.config.endpoint(scorer.role).model) or (scorer.takes_rules and explanation.rule is not None)

    def _judge(self, scorer: Scorer) -> str:
        return Path(self.config.endpoint(scorer.role).model).name

    def _sources(self) -> list[str]:
        """The explainers of which explanations are there, and the file's."""
        return list(dict.fromkeys([*self.explainers, *(name for _, name in self.explained)]))

    def _explanation(self, latent: int, explainer: str) -> Explanation | None:
        row = self.explained.get((latent, explainer))
        return Explanation.from_json(row["explanation"]) if row and row["explanation"] else None

    async def _examples(self, latent: int) -> Examples:
        """The examples of a latent; the last ones made are kept, since a small run needs all of them twice."""
        found = self.kept.pop(latent, None)
        if found is None:
            in_thread = partial(asyncio.get_running_loop().run_in_executor, self.thread)
            found = await in_thread(self.prepared.examples, latent)
            if (latent,) not in self.shown:
                windows = await in_thread(self.prepared.shown, found)
                row = {"latent": latent, "facts": asdict(found.facts), "missing": found.missing}
                self.shown.append(row | {name: excerpts_kept(some) for name, some in windows.items()})
        self.kept[latent] = found
        if len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept)))
        return found

    async def _prepare(self, scorer: Scorer, name: str, examples: Examples) -> dict[str, Any]:
        """What a scorer computes with the subject model, once for a latent."""
        if type(scorer).prepare is Scorer.prepare or examples.missing:
            return {}
        row = self.ready.get((examples.latent, name))
        if row is None:
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self.thread, scorer.prepare, examples, self.prepared.subject)
            row = {"latent": examples.latent, "scorer": name, "prepared": made}
            self.ready.append(row)
        return row["prepared"]

    def _partners(self, explainer: str) -> dict[int, int]:
        """By latent, whose explanation it is scored with for the null: of explained latents in an order by hash, each
        takes the next one's. A shard has its share of them.
        """
        texts = [latent for latent in self.latents if self._explanation(latent, explainer) is not None]
        texts.sort(key=lambda latent: uniform("null", f"{self.config.seed} {latent}"))
        share, most = len(self.latents) / max(1, len(self.prepared.latents)), self.config.null_latents
        chosen = texts if most < 0 else texts[: math.ceil(most * share)]
        if len(chosen) < max(2, FEWEST_FOR_NULL * share):
            return {}
        return dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))

    def _other(self, latent: int, scorer: str, explainer: str) -> Explanation | None:
        """Another latent's explanation, for the null: of the same one as before, where there was one."""
        row = self.scores.get((latent, scorer, explainer, True))
        of = row["of"] if row else self.theirs[explainer].get(latent)
        return None if of is None else self._explanation(of, explainer)


async def check_models(
    endpoints: Mapping[str, EndpointConfig], roles: Iterable[str], cache: Path, budget_usd: float | None = None
) -> bytes:
    """Raises ConfigError in one line if a model that is asked cannot be asked; before any long work starts.

    Returns what the file of answers is to begin with, b"" where there is one: a command that is refused makes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = cache if cache.is_file() else Path(folder, CACHE)
        async with Client(endpoints, path, budget_usd) as client:
            await client.check(roles)
        return b"" if path == cache else path.read_bytes()
