"""Recipes: a family of coders on a model, each a file of its own, below what a user's file changes.

A family's file says how it selects and what it minimizes; a model's, where it is read, on what text and how long. What
a family must know of the model stands in the model's `facts`, and is asked for as `$k` or `$mlp_input`. What a family
needs otherwise on that model stands there too, below its name, in `for`. So any family goes with any model.

`extends: jumprelu on smollm2` is what makes a file of a user's own a recipe; it may name a family, a model (TopK on it)
or another file, beside it or not. A file that extends nothing stands by itself, as the config of a run does.
"""

import re
from functools import reduce
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.paths import near
from sae.base.settings import choose, merge, read_yaml
from sae.base.shipped import configs

FAMILY, MODEL = "topk", "quickstart"
Layers = dict[Path, dict[str, Any]]


def first_lines(kind: str) -> dict[str, str]:
    """Returns by name what the shipped configs of a kind are, as their first lines say it."""
    shipped = configs(kind).items()
    return {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in shipped}


def config_path(name: str, kind: str) -> Path:
    """Returns the file of a config given as a shipped name or a path."""
    return _found(name, configs(kind), "--config", None)


def fields_of(path: Path, kind: str) -> dict[str, Any]:
    """Returns what a file of a kind says, on top of what it extends."""
    return reduce(merge, _layers(str(path), configs(kind), "--config")[0].values(), {})


def recipe(config: str | None = None, on: str | None = None) -> dict[str, Any]:
    """Returns the fields of a training run: of a family, model or file, on a model or a file that is like a model's.

    The run is called as the model and the family are, unless a file says otherwise. ConfigError if a name is unknown,
    if no model can be chosen any more, or if the model's file lacks a fact that is asked for.
    """
    families, models = configs("families"), configs("models")
    files, asked = _layers(config or FAMILY, families | models, "--config")
    of_model = {path: data for path, data in files.items() if path in models.values()}
    of_family = {path: data for path, data in files.items() if path in families.values()}
    if not (of_family or of_model) and any("facts" in data for data in files.values()):
        of_model = files  # a user's own model
    if (on or asked) and not of_family:
        what = "is a model already" if of_model else "extends no family, so it stands by itself"
        raise ConfigError(f"--on: {config} {what}; name a family, or let a file of yours say: extends: {FAMILY}")
    if not (of_family or of_model):
        return reduce(merge, files.values(), {})
    own = [data for path, data in files.items() if path not in of_model | of_family]
    of_model = of_model or _layers(on or asked or MODEL, models, "--on")[0]
    of_family = of_family or _layers(FAMILY, families, "--config")[0]
    model, family = [*of_model][-1].stem, [*of_family][-1].stem
    said = reduce(merge, [*of_model.values(), *of_family.values(), *own], {})
    exceptions, facts = _section(said, "for"), _section(said, "facts")
    for name in exceptions:
        choose("for", name, families)
    name = model if family == FAMILY else f"{model}-{family.replace('_', '-')}"
    below = [*of_model.values(), *of_family.values(), exceptions.get(family) or {}]
    fields = reduce(merge, [*below, *own], {"name": name})
    return _filled({key: value for key, value in fields.items() if key not in ("for", "facts")}, facts, model)


def _layers(name: str, shipped: dict[str, Path], field: str) -> tuple[Layers, str | None]:
    """Returns what a config and all that it extends say, by file, the lowest first; and the model that it is "on"."""
    layers: Layers = {}
    wanted: str | None = name
    model: str | None = None
    beside: Path | None = None
    while wanted is not None:
        wanted, _, below = (str(wanted), "", "") if Path(str(wanted)).is_file() else str(wanted).partition(" on ")
        model = model or below or None
        path = _found(wanted, shipped, field, beside)
        if path in layers:
            raise ConfigError(f"extends: {path} extends itself, by way of {next(iter(layers))}")
        data = read_yaml(path)
        for key in {"on", True} & data.keys():  # in YAML "on" is a truth value
            raise ConfigError(f"on: {path} says it in `extends`: {data.get('extends', FAMILY)} on {data[key]}")
        wanted, beside, field = data.pop("extends", None), path.parent, "extends"
        layers = {path: data, **layers}
    return layers, model


def _found(name: str, shipped: dict[str, Path], field: str, beside: Path | None) -> Path:
    """Returns the file that a name means: one beside the file that names it, a shipped one, or a path."""
    near_by = [beside / f"{name}.yaml", beside / name] if beside else []
    candidates = [*near_by, *([shipped[name]] if name in shipped else []), Path(name).expanduser()]
    found = next((path for path in candidates if path.is_file()), None)
    if found and (field != "--on" or found.suffix in (".yaml", ".yml")):  # a .gguf file is no file about a model
        return found
    families, models = configs("families"), configs("models")
    if field == "--on":
        hint = f" It is a family: --config {name}." if name in families else nearest(Path(name).name.lower(), models)
        ways = f"any other model: sae-train --model.name {name} --activations.sites '[layers.6]'"
        raise ConfigError(f"--on: no file about a model {name!r}.{hint} There are {', '.join(models)}; {ways}")
    pairs = {_plain(f"{model}-{family}"): (family, model) for model in models for family in families}
    family, model = pairs.get(_plain(name), ("", "")) if MODEL in shipped else ("", "")  # as runs are called
    pair = f"'{family} on {model}'" if field == "extends" else f"--config {family} --on {model}"
    hint = f" Did you mean {pair}?" if family else nearest(name, shipped) or near(name)
    raise ConfigError(f"{field}: no file and no shipped config {name!r}.{hint} Shipped: {', '.join(shipped)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _section(said: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a section of a model's file; ConfigError if it is no mapping."""
    found = said.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: {found!r} is not a mapping")
    return found


def _filled(value: Any, facts: dict[str, Any], model: str) -> Any:
    """Returns what a config says with the model's facts in place of `$name`."""
    if isinstance(value, dict):
        return {key: _filled(item, facts, model) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, facts, model) for item in value]
    if not (isinstance(value, str) and re.fullmatch(r"\$\w+", value)):
        return value
    if value[1:] not in facts:
        told = nearest(value[1:], facts)
        raise ConfigError(f"facts: {model} has no {value[1:]!r}, which is asked for as {value}.{told}")
    return facts[value[1:]]
