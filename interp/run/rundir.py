"""The folder of a run: its settings, its shards, and what may differ when a run goes on.

A path that a run was given is told from another by where it leads, a coder by its weights. Once there are rows, what
they were made with stays as it is; the settings of a run without any are replaced.
"""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import torch

from interp.client.requests import ROLES
from interp.evidence.codes import map_of
from interp.evidence.first_pass import HEADER
from interp.run.config import ExplainConfig, ModelsConfig
from interp.run.journal import Journal
from interp.run.preparing import NOTHING, Given, load_coder
from sae.base.errors import ConfigError
from sae.base.files import atomic_write, read_json, write_json
from sae.base.paths import check_writable, explained_below, from_anywhere, moved_along, near, same_place
from sae.base.settings import decode, flat, read_yaml, set_dotted, to_yaml
from sae.base.store import fingerprint_key
from sae.coder.coder import SparseCoder
from sae.lm.environment import versions
from sae.loading import hub
from sae.text.documents import TextConfig, data_identity

LATENTS, CACHE = "latents.json", "cache.sqlite"  # in a shard
ENVIRONMENT = "env.json"
OWN_CODER = "coder"  # in the folder of a run that was given a loaded one
EXPLAIN_KEY = ("latent", "explainer")
SCORE_KEY = ("latent", "scorer", "explainer", "null")

# What may differ when a run goes on: none of it changes a row that is written.
FREE = ("run_dir", "latents", "only", "explanations", "null_latents", "budget_usd", "in_flight", "fail_share")
CODER = ("path", "name", "revision", "hints")  # by what names it is called, and what it is by
PLACES = ("coder.path", "model.name", "text.source", "evidence.cache", *(f"models.{role}.model" for role in ROLES))
SHIPPED = ("quickstart", "tfidf")  # names of no folder, whatever lies here
FREE_OF_MODELS = ("base_urls", "api_key_env", "max_concurrency", "timeout_s", "max_tries", "price_in", "price_out")


def shard_folder(run_dir: Path, shard: tuple[int, int]) -> Path:
    """Returns the folder of shard i of n."""
    return run_dir / "shards" / f"{shard[0]}-of-{shard[1]}"


def cache_of(config: ExplainConfig, shard: tuple[int, int]) -> Path:
    """Returns the file of the answers that a shard of a run got."""
    return shard_folder(Path(config.run_dir), shard) / CACHE


def explained_in(shard: Path, until: str = "") -> Journal:
    """Returns the journal of explanations of a shard, its rows as far as a field."""
    return Journal(shard / "journal-explain.jsonl", EXPLAIN_KEY, until)


def scores_in(shard: Path, until: str = "") -> Journal:
    """Returns the journal of scores of a shard, its rows as far as a field."""
    return Journal(shard / "journal-score.jsonl", SCORE_KEY, until)


def shown_in(shard: Path, until: str = "") -> Journal:
    """Returns the journal of what people are shown of the latents of a shard, its rows as far as a field."""
    return Journal(shard / "journal-examples.jsonl", ("latent",), until)


def asked_in(shard: Path) -> list[int]:
    """Returns the latents that the commands on a shard were about, ascending."""
    path = shard / LATENTS
    return read_json(path) if path.is_file() else []


def latents_of(run_dir: Path) -> list[int]:
    """Returns the latents that any command on a run was about, ascending; ConfigError as `shard_folders`."""
    return sorted({latent for shard in shard_folders(run_dir) for latent in asked_in(shard)})


def shard_folders(run_dir: Path, whole: bool = True) -> list[Path]:
    """Returns the folders of all shards of a run; ConfigError if they are not the shards of one division.

    Unless it must be `whole`, those that are there will do.
    """
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
    if (missing and whole) or not found:
        what = f"shard {missing[0]} of {next(iter(totals))} is missing" if missing else "it holds no shards"
        raise ConfigError(f"run_dir: {run_dir}: {what}; run it first")
    return found


def explained_folders(typed: Path) -> list[Path]:
    """Returns the folders of the explained runs that are meant by one of them, or by the folder of the coder or of the
    run that trained it: one, or all below that.
    """
    of_run = [(up, typed.relative_to(up / "coders")) for up in typed.parents if (up / "coders") in typed.parents]
    beside = [up / "explain" / name for up, name in of_run] + [up / "explain" for up, _ in of_run]
    for folder in (typed, typed / "explain", *beside):
        if (folder / "shards").is_dir():
            return [folder]
    return explained_below(typed)


def run_folder(path: Path) -> Path:
    """Returns the folder of an explained run, given that or the folder of its coder or of the run that trained it.

    ConfigError if there is none, or several.
    """
    typed = path.expanduser()
    if not typed.is_dir():
        raise ConfigError(f"path: no such folder: {path}.{near(path, folders=True)}")
    found = explained_folders(typed)
    if len(found) > 1:
        raise ConfigError(f"path: {path} holds several explained runs; choose one: {', '.join(map(str, found))}")
    if not found:
        raise ConfigError(f"path: {path} is no explained run, it holds no shards; run sae-explain {path} first")
    return found[0]


def saved_config(run_dir: Path) -> ExplainConfig:
    """Returns the config of the run in a folder, which may have been moved with what it tells of.

    Its ids never stand there as one bare number, which to the version that wrote it was so many latents at random.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run_dir: {run_dir} has no config.yaml: it is no run of sae-explain, or an imported one")
    data = read_yaml(path)
    latents = str(data.get("latents", ""))
    config = decode(ExplainConfig, {**data, "latents": f"random:{latents}"} if latents.isdecimal() else data)
    moved = {
        key: moved_along(value, config.run_dir, run_dir)
        for key, value in _places(config).items()
        if value not in SHIPPED
    }
    return replace(_with(config, moved), run_dir=str(run_dir))


@dataclass(frozen=True)
class Settings:
    """What a command does in a folder, and what the folder is to tell of the run."""

    config: ExplainConfig
    """Of the command; paths are spelled as the run began, where they lead to the same."""
    whole: ExplainConfig
    """Of all commands that worked on the run."""
    coder: str
    """Digest of the coder."""
    site: str = ""
    """What the coder reads; "" where that is not known."""


def settings_for(config: ExplainConfig, given: Given = NOTHING) -> Settings:
    """Returns the settings with which a resolved config begins a run in its folder, or goes on with the one there.

    Nothing is written. ConfigError if the folder holds a run with other settings, or cannot be written to.
    """
    folder = Path(config.run_dir)
    check_writable(folder, "run_dir")
    loaded, config = load_coder(config, lazy=True, given=given), _placed(config)
    coder, site = coder_digest(loaded), ", ".join(dict.fromkeys(read.name for read in loaded.spec.reads))
    if not (folder / "config.yaml").is_file() or _has_nothing(folder):
        return Settings(config, _told(config), coder, site)
    before = saved_config(folder)
    then = _places(before)
    config = _with(config, {k: then[k] for k, v in _places(config).items() if then[k] != v and same_place(then[k], v)})
    return Settings(config, _continued(_told(before), _told(config), coder), coder, site)


def check_explained(config: ExplainConfig) -> None:
    """Raises ConfigError if a resolved config only scores explanations, and its folder holds none."""
    folder = Path(config.run_dir)
    explained = (any(explained_in(shard)) for shard in (folder / "shards").glob("*-of-*"))
    needed = not config.explanations and all(scorer.needs_explanation for scorer in config.all_scorers().values())
    if config.only == "score" and needed and not any(explained):
        raise ConfigError(
            f"only: score, but {folder} holds no explanation; leave out --score-only to have some written"
        )


def begin_run(
    config: ExplainConfig,
    settings: Settings | None = None,
    answers: bytes = b"",
    shard: tuple[int, int] = (1, 1),
    given: Given = NOTHING,
) -> None:
    """Writes config.yaml and env.json of a run, what its file of answers begins with, and the coder if it was given.

    Explainers, scorers and models may come in later commands: config.yaml tells of all that the run ever had.
    """
    settings, folder = settings or settings_for(config), Path(config.run_dir)
    if answers:
        atomic_write(shard_folder(folder, shard) / CACHE, answers)
    if given.coder is not None and (digest_in(folder) != settings.coder or not Path(config.coder.path).is_dir()):
        hub.save(given.coder, config.coder.path)
    atomic_write(folder / "config.yaml", to_yaml(settings.whole))
    about = {"coder": config.coder.path, "baseline": config.coder.baseline, "model": config.model.name}
    about |= {"site": settings.site} if settings.site else {}
    about |= {"text": config.text.source, "tokens": config.evidence.tokens, "seed": config.seed}
    write_json(folder / ENVIRONMENT, {**versions(), "about": about, "coder": settings.coder})


def forget_run(run_dir: Path) -> None:
    """Removes what a command has written that is refused after all, as long as there is no row and no evidence."""
    if not _has_nothing(run_dir):
        return
    for name in ("config.yaml", ENVIRONMENT):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("shards", OWN_CODER):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    with suppress(OSError):
        run_dir.rmdir()


def coder_digest(coder: SparseCoder) -> str:
    """Returns 16 hex digits of what a coder computes: its spec, whatever its model is called, and all its weights."""
    spec = map_of(coder)
    for sites in (spec["reads"], spec["writes"]):
        for site in sites:
            site["model"] = site["revision"] = None
    digest = hashlib.sha256()
    for name, tensor in sorted(coder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return fingerprint_key({"spec": spec, "weights": digest.hexdigest()})


def _places(config: ExplainConfig) -> dict[str, str]:
    """Returns the fields of a config that may be paths."""
    values = flat(draccus.encode(config))
    return {key: values[key] for key in PLACES}


def _placed(config: ExplainConfig) -> ExplainConfig:
    """Returns a config whose places are found wherever its run is: by their names from here only where that is so of
    the run's folder too (`moved_along`). What a server has is not looked for here.
    """
    if not Path(config.run_dir).is_absolute():
        return config
    remote = {f"models.{role}.model" for role in ROLES if getattr(config.models, role).via != "local"}
    named = {key: value for key, value in _places(config).items() if key not in remote and value not in SHIPPED}
    placed = {key: from_anywhere(value) for key, value in named.items()}
    return _with(config, {key: value for key, value in placed.items() if value != named[key]})


def _with(config: ExplainConfig, changes: dict[str, str]) -> ExplainConfig:
    data = draccus.encode(config)
    for key, value in changes.items():
        set_dotted(data, key, value)
    return decode(ExplainConfig, data) if changes else config


def _has_nothing(folder: Path) -> bool:
    """Returns whether a folder holds no row and no evidence: but settings, of a command that was refused."""
    journals = (folder / "shards").glob("*/journal-*.jsonl")
    return not (folder / "evidence" / HEADER).is_file() and not any(path.stat().st_size for path in journals)


def _told(config: ExplainConfig) -> ExplainConfig:
    """Returns a config that names the model of every role, as a file may have it."""
    return replace(config, models=ModelsConfig(**{role: config.endpoint(role) for role in ROLES})).shown()


def _continued(before: ExplainConfig, now: ExplainConfig, coder: str) -> ExplainConfig:
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
    known = digest_in(Path(now.run_dir))
    if known not in ("", coder):
        raise ConfigError(
            f"coder.path: {now.coder.path} has other weights than the coder that {now.run_dir} is of; choose another "
            "folder with --run-dir"
        )
    there, here = flat(draccus.encode(before)), flat(draccus.encode(whole))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    of_rows = any(key.startswith(("models.", "explainers.", "scorers.")) for key in differing)
    used = _used(before) if of_rows else {}
    for key in differing:
        if not _is_free(key, before, now, used, bool(known)):
            raise ConfigError(
                f"{key}: {here.get(key)!r}, but {now.run_dir} holds a run with {there.get(key)!r}; leave that as it "
                f"was, or choose another folder with --run-dir"
            )
    return whole


def _is_free(
    key: str, before: ExplainConfig, now: ExplainConfig, used: dict[str, set[str]], coder_is_known: bool
) -> bool:
    """Returns whether a field may differ: no row depends on it, or what it names is compared by what it holds."""
    first, *rest = key.split(".")
    evidence_tells = (Path(now.run_dir) / "evidence" / HEADER).is_file() and not now.evidence.cache
    match first:
        case "models":
            return rest[0] not in used["models"] or rest[-1] in FREE_OF_MODELS
        case "explainers" | "scorers":
            return not rest or rest[0] not in used[first] or rest[0] not in getattr(before, first)
        case "coder" if rest[0] in CODER:
            return coder_is_known or (rest[0] == "path" and evidence_tells)
        case "model" if rest[0] in ("name", "revision"):
            return evidence_tells
        case "text" if rest[0] == "source":
            there, here = (_identity(replace(now.text, source=one.text.source)) for one in (before, now))
            return evidence_tells and there in (None, here)
        case "evidence" if rest[0] == "cache":
            return bool(before.evidence.cache and now.evidence.cache)  # its evidence tells of what is in it
    return first in FREE


def _used(before: ExplainConfig) -> dict[str, set[str]]:
    """Returns the names of the explainers and scorers that rows are of, and the roles whose models rows are by."""
    used: dict[str, set[str]] = {"explainers": set(), "scorers": set(), "models": set()}
    for shard in (Path(before.run_dir) / "shards").glob("*-of-*"):
        for row in explained_in(shard).rows():
            used["explainers"].add(row["explainer"])
            if row["by"] and row["by"] == before.models.explainer.model:
                used["models"] |= {"explainer", "judge"}
        for row in scores_in(shard).rows():
            used["scorers"].add(row["scorer"])
            scorer = before.scorers.get(row["scorer"])
            if scorer and not row.get("by_rule") and row["judge"] == Path(before.endpoint(scorer.role).model).name:
                used["models"].add(scorer.role)
    return used


def digest_in(run_dir: Path) -> str:
    """Returns the digest of the coder that a run is of, "" of one by an older version, which kept none."""
    path = run_dir / ENVIRONMENT
    return read_json(path).get("coder", "") if path.is_file() else ""


def _identity(text: TextConfig) -> Any:
    """Returns what a text holds; None if it is not here."""
    return data_identity(text) if Path(text.source).expanduser().exists() else None
