"""A run from its config to its tables: what can be refused is, before long work; then evidence, answers, results."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.client.config import EndpointConfig
from interp.client.requests import ROLES
from interp.client.running import finished
from interp.evidence.first_pass import check_evidence
from interp.run.config import ExplainConfig
from interp.run.pipeline import Pipeline, check_models
from interp.run.preparing import NOTHING, Given, evidence_of, looked_at, read_from
from interp.run.results import what_is_told, write_results
from interp.run.rundir import (
    begin_run,
    cache_of,
    check_explained,
    forget_run,
    saved_config,
    settings_for,
    shard_folders,
)
from sae.base.errors import ConfigError
from sae.base.progress import Display, Watch
from sae.base.visible import visible
from sae.parallel.agreement import together
from sae.parallel.ranks import process_group, rank
from sae.parallel.stopping import stop_flag

log = logging.getLogger(__name__)
WHOLE = (1, 1)


@dataclass(frozen=True)
class Outcome:
    """What a command has come to in the folder of a run."""

    run_dir: Path
    latents: list[int]
    """Those that it was about."""
    summary: dict[str, Any] | None
    """What all of the folder amounts to; None of evidence alone, and of a shard: `sae-explain merge` tells it with the
    others."""
    cut_off: str = ""
    """Why the models gave no more answers, if so."""
    failed: str = ""
    """How many latents failed and by what, if more did than `fail_share` allows."""


def explain_run(
    config: ExplainConfig,
    shard: tuple[int, int] = WHOLE,
    given: Given = NOTHING,
    *,
    retry_failed: bool = False,
    repair: bool = False,
    progress: Display = True,
) -> Outcome | None:
    """Explains and scores the latents of a resolved config, as far as its folder does not hold that yet.

    Args:
        config: what `interp.run.preparing.resolve_config` returned.
        shard: (i, n) for the i-th of n parts of the latents.
        given: what is loaded already, and what is allowed.
        retry_failed: whether what failed before is done again.
        repair: whether what is stored is verified, and made again where it is damaged.
        progress: how far the work is, and how that is shown.

    Returns None on all ranks but the first, whose work is done once the text is read. Raises ConfigError for what
    cannot be, before long work and with nothing left behind; Stopped after a signal. What is finished is kept.
    """
    check_explained(config)
    with stop_flag() as stop:
        watch = Watch(stop, repair=repair, display=progress)
        settings = settings_for(config, given)
        config, answers = settings.config, b""
        with process_group():
            first = rank() == 0
            with together():
                if first and config.only != "evidence":
                    endpoints, cache = {role: config.endpoint(role) for role in ROLES}, cache_of(config, shard)
                    asked = [role for role in config.roles_asked() if not _is_given(endpoints[role], config, given)]
                    answers = finished(check_models(endpoints, asked, cache, config.budget_usd))
            reading = read_from(config, given, watch)
            check_evidence(reading[2], reading[1], *evidence_of(config))
            if first:  # all can be: from here on the folder is this run's
                begin_run(config, settings, answers, shard, given)
            log.info("run folder   %s", config.run_dir)
            try:
                prepared = looked_at(config, reading, watch)
            except ConfigError:
                if first:
                    forget_run(Path(config.run_dir))
                raise
        if not first:
            return None
        if config.only == "evidence":
            return Outcome(Path(config.run_dir), prepared.latents.tolist(), None)
        ended = Pipeline(config, prepared, shard).run(retry_failed, watch)
    failed = f"{ended.failed} of {ended.latents} latents failed: {visible(ended.why)}"
    return Outcome(
        Path(config.run_dir),
        prepared.latents.tolist(),
        tell_run(Path(config.run_dir)) if shard == WHOLE else None,
        ended.cut_off,
        failed if ended.failed > config.fail_share * ended.latents else "",
    )


def _is_given(endpoint: EndpointConfig, config: ExplainConfig, given: Given) -> bool:
    """Whether a role is that of the language model, and that is loaded already."""
    return given.lm is not None and (endpoint.via, endpoint.model) == ("local", config.model.name)


def tell_run(run_dir: Path) -> dict[str, Any]:
    """Writes the tables and the summary of a run from its shards, and returns the summary; ConfigError if one lacks."""
    shard_folders(run_dir)  # says in a line what is missing
    return write_results(run_dir, saved_config(run_dir).all_scorers(), what_is_told(run_dir))
