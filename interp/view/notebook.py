"""What a notebook calls: a run of explain, what it has found, and the examples of a latent."""

import os
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.run.config import ExplainConfig
from interp.run.explaining import explain_run
from interp.run.latents import named_latents
from interp.run.preparing import Given, load_coder, resolve_config
from interp.run.rundir import ENVIRONMENT, OWN_CODER, coder_digest, run_folder, saved_config
from interp.view.examples import LatentExamples
from interp.view.explained import ExplainedRun
from interp.view.reporting.report import keep_report
from sae.base.arguments import wrong
from sae.base.errors import ConfigError, nearest
from sae.base.paths import RUNS, near
from sae.base.plugins import Plugin
from sae.base.progress import Display
from sae.base.settings import decode, encode, read_yaml, set_dotted
from sae.base.shipped import configs
from sae.coder.coder import SparseCoder
from sae.lm.passed import passed_model

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike

RUN = "the folder of a run or of a coder, a hub id, a SparseCoder, or what sae.train or interp.explain returned"
NAMES = {"coder": "path", "text": "source"} | {
    f"models.{role}": "model" for role in ("explainer", "judge", "reader", "encoder")
}
"""Of sections of a config, the field that a name alone stands for."""
FAMILIES = ("explainers", "scorers")
"""Sections of plug-ins, of which a list names some by their kinds."""


def explain(
    run: Any,
    latents: Any = None,
    *,
    config: ExplainConfig | Mapping[str, Any] | Path | str | None = None,
    model: "ModelLike | None" = None,
    tokenizer: "TokenizerLike | None" = None,
    retry_failed: bool = False,
    repair: bool = False,
    trust_remote_code: bool = False,
    progress: Display = True,
    **fields: Any,
) -> ExplainedRun:
    """Says what latents mean and scores that, as sae-explain does, and returns the run with what it has found; its
    folder holds tables and a page to look at, report.html.

    The same call goes on where it stopped, and asks no model the same twice. It works in a notebook, whose event loop
    it leaves alone.

    Args:
        run: the coder: the folder of the run that trained it or its own, a hub id, whatever else `sae.load` takes, a
            loaded one (which the run's folder then keeps), or what `sae.train` returned; or a run of `explain`, by its
            folder or what that returned, whose settings then hold on.
        latents: ids: one, or several in a list, set, range, slice, array or mask; or as in a shell: "3,17,40-49",
            "random:100", "alive", "all", a file of ids. A hundred at random if nothing is said.
        config: an `ExplainConfig`, a mapping of its fields, a YAML file of them, or a shipped one by name ("openai").
        model: the language model that the coder reads, by name or loaded; by default the one it was trained on.
        tokenizer: of a loaded model, if its name does not lead to it.
        retry_failed: whether what failed before is done again.
        repair: whether what is stored is verified, and made again where it is damaged.
        trust_remote_code: whether a model may run code that it ships.
        progress: True for a bar or lines, False for silence, or a function that is given the `Position`.
        fields: more fields of the config, whole sections or by dotted name: `budget_usd=5`,
            `scorers=["detection"]`, `models={"explainer": "gpt-4o-mini"}`, `**{"evidence.tokens": 50_000}`.

    Raises ConfigError or TypeError in one line for what cannot be, before long work and with nothing left behind;
    Stopped after Ctrl-C, with all that is finished kept. Where the models give no more answers (the budget or quota is
    spent) or more latents fail than `fail_share`, what is there is returned, and `unfinished` says why.
    """
    config, given, asked = _asked(run, config, fields, trust_remote_code)
    said, lm = passed_model(config.model, model, tokenizer, trust_remote_code)
    config, given = replace(config, model=said), replace(given, lm=lm)
    latents = asked if latents is None else latents
    if latents is not None:
        d_sae = load_coder(config, lazy=True, given=given).spec.d_sae
        config = replace(config, latents=named_latents(latents, d_sae))
    config.validate()
    config = resolve_config(config, given)
    found = explain_run(config, given=given, retry_failed=retry_failed, repair=repair, progress=progress)
    if found is None:  # the first rank goes on, and writes to the folder
        return ExplainedRun(Path(config.run_dir))
    if found.summary is not None:
        keep_report(found.run_dir)
    way = "" if "goes on" in found.cut_off else "; the same call goes on with what is missing"
    failed = f"{found.failed}; retry_failed=True does them again" if found.failed else ""
    return ExplainedRun(found.run_dir, found.latents, f"{found.cut_off}{way}" if found.cut_off else failed)


def results(run: Any) -> ExplainedRun:
    """Returns what a run of `explain` or sae-explain has found so far; nothing is computed, and no model is loaded.

    `run` is its folder, that of the coder or of the run that trained it, or what `sae.train` or `explain` returned.
    ConfigError if there is no explained run there, or several.
    """
    if isinstance(run, ExplainedRun):
        return run
    folder = _folder(run)
    if folder is None:
        raise wrong("run", run, "the folder of a run, or what sae.train or interp.explain returned")
    return ExplainedRun(run_folder(Path(folder)))


def examples(run: Any, latent: Any) -> LatentExamples:
    """Returns the windows of a latent that an explained run keeps, the largest activations first.

    `run` as in `results`; `latent` is an id. `.top(5)` are the first five; each has `tokens`, `activations`, and a text
    in which the tokens that fire are marked. What the coder's mask leaves out (BOS and other special tokens, attention
    sinks) fires nowhere, as in training. ConfigError if the latent is not explained there, saying how it will be.
    """
    return results(run).examples(latent)


def _asked(run: Any, config: Any, fields: dict[str, Any], trust_remote_code: bool) -> tuple[ExplainConfig, Given, Any]:
    """What is asked for, but for the model: what a run was, then the config, then single fields; and latents of it."""
    base, folder, coder = ExplainConfig(), _folder(run), run if isinstance(run, SparseCoder) else None
    if folder is None and coder is None:
        raise wrong("run", run, RUN)
    if folder is not None and (Path(folder).expanduser() / "shards").is_dir():
        base = saved_config(Path(folder).expanduser())
    elif folder is not None:
        fields = {"coder.path": folder, **fields}
    said: Any = {}
    if isinstance(config, str | os.PathLike):
        path = configs("explain").get(str(config)) or Path(config).expanduser()
        if not path.is_file():
            named = nearest(str(config), configs("explain")) or near(path)
            raise ConfigError(f"config: no file and no shipped config {str(config)!r}.{named}")
        of_a_run = (path.parent / ENVIRONMENT).is_file()
        base, said = (saved_config(path.parent), {}) if of_a_run else (base, read_yaml(path))
    elif isinstance(config, ExplainConfig):
        base = config
    elif isinstance(config, Mapping):
        said = config
    elif config is not None:
        raise wrong("config", config, "an ExplainConfig, a mapping of its fields, or a YAML file of them")
    data, said = encode(base), {**said, **fields}
    latents = said.pop("latents", None)
    for key, value in said.items():
        set_dotted(data, str(key), _plain(value, str(key)))
    if coder is not None:
        folder = data["run_dir"] or str(Path(RUNS) / f"coder-{coder_digest(coder)[:8]}" / "explain")
        set_dotted(data, "run_dir", folder)
        set_dotted(data, "coder.path", str(Path(folder).expanduser() / OWN_CODER))
    return decode(ExplainConfig, data), Given(coder, trust_remote_code=trust_remote_code), latents


def _folder(run: Any) -> str | None:
    """Returns the folder or address that is meant by a path, or by what has one: the result of a run; None if none."""
    found = getattr(run, "run_dir", run)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, str) for part in found):
        return "/".join(found)  # a release and a coder of it, as sae.load takes them
    return os.fspath(found) if isinstance(found, str | os.PathLike) else None


def _plain(value: Any, key: str) -> Any:
    """Returns a value of a config as its file has it: sections and plug-ins as mappings, a name for what it names."""
    family, _, name = key.partition(".")
    if family in FAMILIES and not name and isinstance(value, str | Plugin | list | tuple | set):
        several = [value] if isinstance(value, str | Plugin) else value
        value = {one if isinstance(one, str) else one.get_choice_name(type(one)): one for one in several}
    if isinstance(value, str) and (key in NAMES or (family in FAMILIES and name and "." not in name)):
        return {NAMES.get(key, "type"): value}
    if isinstance(value, Plugin):
        return {"type": value.get_choice_name(type(value)), **encode(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return encode(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    to_list = getattr(value, "tolist", None)  # of numpy and torch
    return to_list() if callable(to_list) else value
