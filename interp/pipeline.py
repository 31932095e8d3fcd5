"""Explain, then score: thousands of latents in flight, one journal row for each finished piece of work.

    RUN/evidence/                         what both passes found, shared by all shards
    RUN/shards/i-of-n/journal-explain.jsonl   latent x explainer
    RUN/shards/i-of-n/journal-score.jsonl     latent x scorer x explanation, its null beside it
    RUN/shards/i-of-n/cache.sqlite            every answer that was paid for

A row is written when all its answers are there, so a run that ends at any moment goes on where it stopped; what it had
asked meanwhile comes from the cache. Memory holds the examples of the latents in flight only.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import torch
from threadpoolctl import threadpool_limits

from interp import outside
from interp.client import Client
from interp.client.requests import ROLES, Abilities
from interp.config import ExplainConfig
from interp.flows import AGAIN, FAILED, OK, CutOff, Flow, Row, explained, scored
from interp.journal import Journal
from interp.preparing import Prepared
from interp.records import Examples, Explanation
from interp.scorers import Scorer
from sae.environment import versions
from sae.errors import ConfigError, Stopped
from sae.files import FolderLock, append, atomic_write, check_writable, write_json
from sae.progress import Progress
from sae.seeding import generator
from sae.settings import flat, read_yaml, to_yaml

log = logging.getLogger(__name__)
EXPLAIN_KEY = ("latent", "explainer")
SCORE_KEY = ("latent", "scorer", "explainer", "null")
FEWEST_FOR_NULL = 20
WAVE = 2000  # latents whose questions go into one batch
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

    def run(self, retry_failed: bool = False, should_stop: Callable[[], bool] = lambda: False) -> Ended:
        """Does all that is not in the journals yet; with `retry_failed`, also what failed before.

        Raises Stopped when asked to stop; everything finished is kept.
        """
        with FolderLock(self.folder):
            self.explained = Journal(self.folder / "journal-explain.jsonl", EXPLAIN_KEY)
            self.scores = Journal(self.folder / "journal-score.jsonl", SCORE_KEY)
            self.ready = Journal(self.folder / "journal-prepared.jsonl", ("latent", "scorer"))
            self.again = AGAIN if retry_failed else ()
            self._take_in_file()
            with threadpool_limits(1, "blas"):  # figures are small: more threads only wait for one another
                spent = asyncio.run(self._run(should_stop))
        rows = [*self.explained.rows(), *self.scores.rows()]
        failed = {row["latent"] for row in rows if row["status"] == FAILED and not row.get("null")}
        return Ended(len(failed), len(self.latents), spent)

    def _take_in_file(self) -> None:
        """Writes down explanations that come from a file, as if an explainer of the file's name had made them."""
        if not self.config.explanations:
            return
        path = Path(self.config.explanations).expanduser()
        name, found = path.stem, outside.explanations(path, self.prepared.evidence.d_sae)
        for latent in self.latents:
            there = self._explanation(latent, name)
            if latent in found and (there is None or there.text != found[latent]):
                explanation = Explanation(latent, found[latent], name).to_json()
                row = {"latent": latent, "explainer": name, "by": "", "status": OK, "reason": ""}
                self.explained.append(row | {"explanation": explanation})

    async def _run(self, should_stop: Callable[[], bool]) -> str:
        async with self._client(should_stop) as self.client:
            roles = {scorer.role for scorer in self.scorers.values()} if self.config.only != "explain" else set()
            if any(explainer.needs_llm for explainer in self.explainers.values()) and self.config.only != "score":
                roles |= {"explainer", "judge"}
            for role in sorted(role for role in roles if self.config.endpoint(role).model):
                self.abilities[role] = await self.client.abilities(role)
            self.stopping = should_stop
            try:
                if self.config.only != "score":
                    await self._phase("explaining", self.latents, self._explain)
                if self.config.only != "explain":
                    self.theirs = self._derangement()
                    await self._phase("scoring", self.latents, self._score)
            except CutOff as error:
                return str(error)
            finally:
                self.spent = self.client.ledger.totals()
                append(self.folder / "spent.jsonl", json.dumps(self.spent) + "\n")
        return ""

    @asynccontextmanager
    async def _client(self, should_stop: Callable[[], bool]) -> AsyncIterator[Client]:
        roles = {role: self.config.endpoint(role) for role in ROLES}
        cache, budget = self.folder / "cache.sqlite", self.config.budget_usd
        async with Client(roles, cache, budget, should_stop, POLL_S) as client:
            yield client

    async def _phase(self, label: str, latents: list[int], work: Callable[[int], Awaitable[list[Work]]]) -> None:
        """Does some work on every latent: live, so many at once; through the Batch API in waves."""
        progress = Progress(label, len(latents), "latents")
        batched = any(self.config.endpoint(role).via == "batch" for role in self.abilities)
        groups = [latents[i : i + WAVE] for i in range(0, len(latents), WAVE)] if batched else [[i] for i in latents]
        todo = iter(groups)
        done = 0

        async def worker() -> None:
            nonlocal done
            for group in todo:
                if self.stopping() or errors:
                    return
                try:
                    await self._do([one for latent in group for one in await work(latent)])
                except Exception as error:  # the others end what they have begun
                    errors.append(error)
                done += len(group)
                progress.update(done, **self._shown())

        errors: list[Exception] = []
        await asyncio.gather(*(worker() for _ in range(1 if batched else self.config.in_flight)))
        progress.close()
        for error in sorted(errors, key=lambda error: isinstance(error, CutOff)):
            raise error
        if self.stopping():
            raise Stopped(f"while {label}; the same command goes on")

    async def _do(self, work: list[Work]) -> None:
        """Answers flows side by side, all their requests at once, and writes down what they return."""
        waiting: dict[int, list[Any]] = {}
        replies: dict[int, Any] = dict.fromkeys(range(len(work)))
        while replies:
            for i, answers in replies.items():
                journal, row, flow = work[i]
                try:
                    waiting[i] = flow.send(answers)
                except StopIteration as ended:
                    journal.append(row | ended.value)
                    self._notice(ended.value)
            asked = list(waiting)
            answers = await self.client.ask_all([request for i in asked for request in waiting[i]]) if asked else []
            replies, start = {}, 0
            for i in asked:
                stop = start + len(waiting[i])
                replies[i], start = answers[start:stop], stop
            waiting = {}

    def _notice(self, row: Row) -> None:
        """Ends the run where one piece of work after the other fails, before all the rest has failed too."""
        if row["status"] != FAILED:
            self.failed_in_a_row = 0
            return
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= FAILURES_IN_A_ROW:
            raise CutOff(f"{self.failed_in_a_row} answers in a row failed ({row['reason']})")

    async def _explain(self, latent: int) -> list[Work]:
        todo = [name for name in self.explainers if self._open(self.explained, (latent, name))]
        if not todo:
            return []
        examples = await self._examples(latent)
        chooser = self.scorers.get("detection") or next(iter(self.scorers.values()), None)
        found: list[Work] = []
        for name in todo:
            explainer = self.explainers[name]
            by = self.config.endpoint("explainer").model if explainer.needs_llm else ""
            row = {"latent": latent, "explainer": name, "by": by}
            found.append((self.explained, row, explained(explainer, examples, self.abilities, chooser)))
        return found

    async def _score(self, latent: int) -> list[Work]:
        plain = [(name, scorer) for name, scorer in self.scorers.items() if not scorer.needs_explanation]
        todo: list[tuple[str, Scorer, str, bool, Explanation]] = [
            (name, scorer, "", False, Explanation(latent, "", "none")) for name, scorer in plain
        ]
        for explainer in self._sources():
            own = self._explanation(latent, explainer)
            other = self._explanation(self.theirs[latent], explainer) if latent in self.theirs else None
            for name, scorer in self.scorers.items():
                if scorer.needs_explanation and own is not None:
                    todo.append((name, scorer, explainer, False, own))
                    if other is not None:
                        todo.append((name, scorer, explainer, True, other))
        todo = [one for one in todo if self._open(self.scores, (latent, one[0], one[2], one[3]), one[4].text)]
        if not todo:
            return []
        examples = await self._examples(latent)
        found: list[Work] = []
        for name, scorer, explainer, null, explanation in todo:
            ready = await self._prepare(scorer, name, examples)
            row = {"latent": latent, "scorer": name, "explainer": explainer, "null": null, "of": explanation.latent}
            row |= {"explanation": explanation.text, "judge": self._judge(scorer)}
            able = self.abilities.get(scorer.role, Abilities())
            found.append((self.scores, row, scored(scorer, explanation, examples, ready, able)))
        return found

    def _open(self, journal: Journal, key: Hashable, explanation: str | None = None) -> bool:
        """Whether a row is to be written (again): none there, one that failed, or one of another explanation."""
        if key not in journal or journal.status(key) in self.again:
            return True
        row = journal.get(key) if explanation is not None else None
        return row is not None and row["explanation"] != explanation

    def _judge(self, scorer: Scorer) -> str:
        return Path(self.config.endpoint(scorer.role).model).name

    def _sources(self) -> list[str]:
        """The explainers of which explanations are there, and the file's."""
        keys = self.explained.keys()
        return list(dict.fromkeys([*self.explainers, *(name for _, name in keys)]))

    def _explanation(self, latent: int, explainer: str) -> Explanation | None:
        row = self.explained.get((latent, explainer))
        return Explanation.from_json(row["explanation"]) if row and row["explanation"] else None

    async def _examples(self, latent: int) -> Examples:
        """The examples of a latent; the last ones made are kept, since a small run needs all of them twice."""
        found = self.kept.pop(latent, None)
        if found is None:
            found = await asyncio.get_running_loop().run_in_executor(self.thread, self.prepared.examples, latent)
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

    def _derangement(self) -> dict[int, int]:
        """By latent, whose explanation it is scored with for the null: one round through explained latents, drawn."""
        keys = self.explained.keys()
        explained = sorted({latent for latent, name in keys if self._explanation(latent, name)})
        most = len(explained) if self.config.null_latents < 0 else self.config.null_latents
        order = torch.randperm(len(explained), generator=generator(self.config.seed, "null")).tolist()[:most]
        chosen = [explained[i] for i in order]
        if len(chosen) < FEWEST_FOR_NULL:
            return {}
        return dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))

    def _shown(self) -> dict[str, float]:
        accounts = self.client.ledger.accounts.values()
        asked = {"calls": sum(account.calls for account in accounts), "cached": sum(a.cached for a in accounts)}
        usd = self.client.ledger.usd
        missing = sum(sum(account.failures.values()) for account in accounts)
        return asked | {"missing": missing} | ({} if usd is None else {"usd": usd})


def shard_folder(run_dir: Path, shard: tuple[int, int]) -> Path:
    """Returns the folder of shard i of n."""
    return run_dir / "shards" / f"{shard[0]}-of-{shard[1]}"


# What may differ when a run goes on: none of it changes a row that is written.
FREE = ("latents", "only", "explanations", "null_latents", "budget_usd", "in_flight", "fail_share")
FREE_OF_MODELS = ("base_urls", "api_key_env", "max_concurrency", "timeout_s", "max_tries", "price_in", "price_out")


def begin(config: ExplainConfig) -> None:
    """Writes config.yaml and env.json of a new run; ConfigError if the folder holds a run with other settings."""
    folder = Path(config.run_dir)
    check_writable(folder, "run_dir")
    if int(os.environ.get("RANK", "0")):
        return
    now, path = draccus.encode(config), folder / "config.yaml"
    if path.is_file():
        there = read_yaml(path)
        before, after = flat(there), flat(now)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) == after.get(key) or _is_free(key, now, there):
                continue
            raise ConfigError(
                f"{key}: {after.get(key)!r}, but {folder} holds a run with {before.get(key)!r}; choose another run_dir"
            )
    atomic_write(path, to_yaml(config))
    about = {"coder": config.coder.path, "baseline": config.coder.baseline, "model": config.model.name}
    about |= {"text": config.text.source, "tokens": config.evidence.tokens, "seed": config.seed}
    write_json(folder / "env.json", {**versions(), "about": about})


def _is_free(key: str, now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a setting may differ: it changes no row, or belongs to an explainer or scorer that comes or goes."""
    first, *rest = key.split(".")
    if first in ("explainers", "scorers"):
        return not rest or not (rest[0] in now[first] and rest[0] in before[first])
    return first in FREE or (first == "models" and rest[-1] in FREE_OF_MODELS)
