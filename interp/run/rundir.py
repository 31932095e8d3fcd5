"""The folder of a run: its settings, its shards, and what may differ when a run goes on."""

import os
from dataclasses import replace
from pathlib import Path

import draccus

from interp.client.requests import ROLES
from interp.run.config import ExplainConfig, ModelsConfig
from interp.run.journal import Journal
from sae.base.errors import ConfigError, nearest
from sae.base.files import atomic_write, check_writable, read_json, write_json
from sae.base.settings import decode, flat, read_yaml, to_yaml
from sae.lm.environment import versions

LATENTS, CACHE = "latents.json", "cache.sqlite"  # in a shard
EXPLAIN_KEY = ("latent", "explainer")
SCORE_KEY = ("latent", "scorer", "explainer", "null")

# What may differ when a run goes on: none of it changes a row that is written.
FREE = ("latents", "only", "explanations", "null_latents", "budget_usd", "in_flight", "fail_share")
FREE_OF_MODELS = ("base_urls", "api_key_env", "max_concurrency", "timeout_s", "max_tries", "price_in", "price_out")


def run_folder(path: Path) -> Path:
    """Returns the folder of an explained run, given that or its coder's; ConfigError if there is none, or several."""
    for folder in (path, path / "explain"):
        if (folder / "config.yaml").is_file() and (folder / "shards").is_dir():
            return folder
    if not path.is_dir():
        siblings = (child.name for child in path.parent.glob("*") if child.is_dir())
        raise ConfigError(f"path: no such folder: {path}.{nearest(path.name, siblings)}")
    below = sorted(p.parent for p in path.glob("explain*/**/shards"))
    if below:
        raise ConfigError(f"path: {path} holds several explained runs; choose one: {', '.join(map(str, below))}")
    raise ConfigError(f"path: {path} is no explained run; run sae-explain {path} first")


def shard_folder(run_dir: Path, shard: tuple[int, int]) -> Path:
    """Returns the folder of shard i of n."""
    return run_dir / "shards" / f"{shard[0]}-of-{shard[1]}"


def explained_in(shard: Path) -> Journal:
    """Returns the journal of explanations of a shard."""
    return Journal(shard / "journal-explain.jsonl", EXPLAIN_KEY)


def scores_in(shard: Path) -> Journal:
    """Returns the journal of scores of a shard."""
    return Journal(shard / "journal-score.jsonl", SCORE_KEY)


def shown_in(shard: Path) -> Journal:
    """Returns the journal of what people are shown of the latents of a shard."""
    return Journal(shard / "journal-examples.jsonl", ("latent",))


def asked_in(shard: Path) -> list[int]:
    """Returns the latents that the commands on a shard were about, ascending."""
    path = shard / LATENTS
    return read_json(path) if path.is_file() else []


def shard_folders(run_dir: Path) -> list[Path]:
    """Returns the folders of all shards of a run; ConfigError if they are not the shards of one division."""
    found = sorted((run_dir / "shards").glob("*-of-*"))
    totals = {folder.name.partition("-of-")[2] for folder in found}
    if len(totals) > 1:
        raise ConfigError(
            f"run_dir: {run_dir} holds shards of {' and '.join(sorted(totals))}; keep those of one division"
        )
    missing = [
        i
        for i in range(1, int(next(iter(totals), "0")) + 1)
        if run_dir / "shards" / f"{i}-of-{next(iter(totals))}" not in found
    ]
    if missing or not found:
        what = f"shard {missing[0]} of {next(iter(totals))} is missing" if missing else "it holds no shards"
        raise ConfigError(f"run_dir: {run_dir}: {what}; run it first")
    return found


def saved_config(run_dir: Path) -> ExplainConfig:
    """Returns the config of the run in a folder.

    Its ids never stand there as one bare number, which to the version that wrote it was so many latents at random.
    """
    data = read_yaml(run_dir / "config.yaml")
    latents = str(data.get("latents", ""))
    return decode(ExplainConfig, {**data, "latents": f"random:{latents}"} if latents.isdecimal() else data)


def begin_run(config: ExplainConfig) -> None:
    """Writes config.yaml and env.json of a run; ConfigError if the folder holds a run with other settings.

    Explainers, scorers and models may come in later commands: config.yaml tells of all that the run ever had.
    """
    folder = Path(config.run_dir)
    check_writable(folder, "run_dir")
    if int(os.environ.get("RANK", "0")):
        return
    path, whole = folder / "config.yaml", _told(config)
    if path.is_file():
        whole = _continued(_told(saved_config(folder)), whole)
    atomic_write(path, to_yaml(whole))
    about = {"coder": config.coder.path, "baseline": config.coder.baseline, "model": config.model.name}
    about |= {"text": config.text.source, "tokens": config.evidence.tokens, "seed": config.seed}
    write_json(folder / "env.json", {**versions(), "about": about})


def _told(config: ExplainConfig) -> ExplainConfig:
    """Returns a config that names the model of every role, as a file may have it."""
    return replace(config, models=ModelsConfig(**{role: config.endpoint(role) for role in ROLES})).shown()


def _continued(before: ExplainConfig, now: ExplainConfig) -> ExplainConfig:
    """Returns the settings of now, with what before had and now does not name; ConfigError where they contradict."""
    asked = replace(before, only="both").roles_asked()
    old, new = vars(before.models), vars(now.models)
    models = {role: new[role] if new[role].model or role not in asked else old[role] for role in ROLES}
    whole = replace(
        now,
        models=ModelsConfig(**models),
        explainers=before.explainers | now.explainers,
        scorers=before.scorers | now.scorers,
    )
    there, here = flat(draccus.encode(before)), flat(draccus.encode(whole))
    for key in sorted(there.keys() | here.keys()):
        first, *rest = key.split(".")
        free = first in FREE
        if first == "models":
            free = rest[0] not in asked or rest[-1] in FREE_OF_MODELS
        elif first in ("explainers", "scorers"):
            free = not rest or rest[0] not in getattr(before, first)
        if there.get(key) != here.get(key) and not free:
            raise ConfigError(
                f"{key}: {here.get(key)!r}, but {now.run_dir} holds a run with {there.get(key)!r}; "
                "choose another run_dir"
            )
    return whole
