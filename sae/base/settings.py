"""Configs as files and overrides: YAML plus dotted overrides into frozen dataclasses, with one-line errors.

Decoding and encoding are draccus's; here is what stands around it: merging, and errors that name the field, the value,
what is allowed and the nearest match.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import draccus
import yaml

from sae.base.errors import ConfigError, nearest
from sae.base.fields import fields
from sae.base.lines import decoded
from sae.base.plugins import Plugin, names

T = TypeVar("T")


def choose(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{field}: {shown(value)} is not one of {', '.join(allowed)}.{nearest(value, allowed)}")


def shown(value: Any) -> str:
    """Returns a value as an error has it: of addresses, wherever they stand in it, without what may be a key."""
    return re.sub(r"(?<=//)[^\s'\"/]*@|(?<=//)([^\s'\"?]*)\?[^\s'\"]*", r"\1***", repr(value))


def at_least(field: str, value: float, least: float) -> None:
    """Raises ConfigError unless value >= least."""
    if not value >= least:
        raise ConfigError(f"{field}: {value} is too small; it must be at least {least}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; ConfigError if it cannot be read or is no mapping."""
    try:
        data = yaml.load(decoded(path.read_bytes()), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data or {}, dict):
        raise ConfigError(f"config: {path} holds a {type(data).__name__}, not a mapping of fields")
    return data or {}


def parse_value(kind: type[Any], key: str, text: str) -> Any:
    """Returns the value typed for field `a.b.c` of a config: YAML ("1e-4", "[a, b]", "null"), or text as it stands.

    Of addresses there may be one or several, in brackets or not, as one types them: http://[::1]:8000/v1, http://a?b=c.
    """
    hint: Any = kind
    for part in key.split("."):
        hint = get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    if hint is str or (isinstance(hint, UnionType) and str in get_args(hint) and text != "null"):
        return text  # a commit such as 12345e6 is no number, and " #" no comment
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    if hint == tuple[str, ...] and _is_address(value):  # [::1] and ?a=b are no YAML in brackets
        inner = text.strip()
        inner = inner[1:-1] if inner.startswith("[") and inner.endswith("]") else inner
        return [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]
    return value


def encode(config: Any) -> dict[str, Any]:
    """Returns a config as plain values, those of its files."""
    return draccus.encode(config)


def to_yaml(config: Any) -> str:
    """Returns a config as YAML that decodes to the same config."""
    return yaml.dump(draccus.encode(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with `over` on top, mappings merged; naming another `type` drops what the old type had."""
    merged = {key: merge({}, value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in over.items():
        if not isinstance(value, dict):
            merged[key] = value
            continue
        old = merged.get(key)
        switched = isinstance(old, dict) and "type" in value and value["type"] != old.get("type", value["type"])
        merged[key] = merge(old if isinstance(old, dict) and not switched else {}, value)
    return merged


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b.c` in nested mappings, in place, by the rule of `merge`."""
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    data.update(merge(data, nested))


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def decode(kind: type[T], data: dict[str, Any], where: str = "") -> T:
    """Returns the dataclass `kind` from plain values; ConfigError names the path, the value and the nearest field."""
    data = _plain(kind, data)
    _check_keys(kind, data, where)
    try:
        return draccus.decode(kind, data)
    except draccus.ParsingError as error:
        text = re.sub(r"^`([^`]*)`: ", lambda m: f"{_join(where, m[1])}: ", " ".join(str(error).split()))
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error


def _plain(kind: Any, data: Any) -> Any:
    """Returns values as a file has them: 1e6 where a whole number belongs, one address for a list of them as a list.

    NumPy's and torch's numbers are numbers, their arrays lists, and paths text.
    """
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    data = data.tolist() if callable(getattr(data, "tolist", None)) else data
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(data, float) and int in kinds and float not in kinds and data.is_integer():
        return int(data)
    if isinstance(data, list | tuple):
        return [_plain(get_args(kind)[0] if get_origin(kind) in (list, tuple) else None, item) for item in data]
    if not isinstance(data, dict):
        return [data] if kind == tuple[str, ...] and _is_address(data) else data
    if get_origin(kind) is dict:
        return {key: _plain(get_args(kind)[1], value) for key, value in data.items()}
    if isinstance(kind, type) and issubclass(kind, Plugin) and isinstance(data.get("type"), str):
        kind = names(kind).get(data["type"], kind)
    hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    return {key: _plain(hints.get(key), value) for key, value in data.items()}


def _is_address(value: Any) -> bool:
    """Returns whether a value looks like a server's address, good or bad: it may hold a key and must not be told."""
    return isinstance(value, str) and any(mark in value for mark in "/?@")


def _meant(kind: type[Any], key: str, where: str) -> str:
    """Returns a hint at the field that others call so (`ALSO_CALLED`), or that is called so further down, if any is."""
    known = getattr(kind, "ALSO_CALLED", {}).get(key)
    try:
        paths = [one.path for one in fields(f"{kind.__module__}:{kind.__qualname__}") if one.kind != "group"]
    except (LookupError, ValueError):  # a class without a source file
        paths = []
    below = dict.fromkeys(name for name in paths if name.rpartition(".")[2] == key)
    found = [known] if known else [name for name in below if name.count(".") == min(n.count(".") for n in below)]
    return f" Did you mean {' or '.join(repr(_join(where, name)) for name in found)}?" if found else ""


def _check_keys(kind: Any, data: Any, where: str) -> None:
    """Refuses unknown fields with their nearest match, which the decoder does not tell."""
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
        return
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where or 'config'}: {shown(data)} is not a mapping of fields, {_mapping(kind, where, data)}"
        )
    if issubclass(kind, Plugin) and "type" in data:
        choose(f"{where}.type", data["type"], names(kind))
        kind, data = names(kind)[data["type"]], {key: value for key, value in data.items() if key != "type"}
    elif issubclass(kind, Plugin) and kind.__subclasses__():
        raise ConfigError(f"{where}.type: missing; choose one of {', '.join(names(kind))}")
    hints = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key, value in data.items():
        if key not in known:
            told = shown(str(key))[1:-1]
            others = [name for name, other in _family(kind).items() if key in other.__dataclass_fields__]
            meant = f" It is one of the type {' or '.join(others)}." if others else _meant(kind, str(key), where)
            meant = meant or nearest(key, known)
            raise ConfigError(f"{_join(where, told)}: no such field.{meant} Allowed: {', '.join(known) or 'none'}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            _check_keys(hint, value, _join(where, key))
        else:
            _check_type(hint, value, _join(where, key))
            if get_origin(hint) is dict:
                for name, item in value.items():
                    _check_keys(get_args(hint)[1], item, f"{_join(where, key)}.{name}")


def _family(kind: type[Any]) -> dict[str, type[Any]]:
    """Returns the plug-ins beside one, by name; {} of a class that is none."""
    return next((names(base) for base in kind.__mro__[1:] if Plugin in base.__bases__), {})  # type: ignore[arg-type]


def _mapping(kind: type[Any], where: str, given: Any) -> str:
    """Returns an example of the mapping that a class of fields is given as, in a file and as it is typed.

    It is what was given in its place, if it can be: the name of a plug-in, or the text of the first field.
    """
    if issubclass(kind, Plugin):
        path, value = ["type"], next(iter([*get_close_matches(str(given), names(kind), 1), *names(kind)]))
    else:
        path, hint, value = [], kind, None
        while dataclasses.is_dataclass(hint):
            field = dataclasses.fields(hint)[0]
            hint, value = get_type_hints(hint)[field.name], field.default
            path.append(field.name)
        if hint is str and isinstance(given, str) and given:
            value = shown(given)[1:-1]
        value = value if isinstance(value, str | int | float) and value != "" else "..."
    example = reduce(lambda inner, name: f"{{{name}: {inner}}}", reversed(path), str(value))
    return f"such as {example}" + (f"; or type --{'.'.join([where, *path])} {value}" if where else "")


def _such_as(hint: Any, value: Any) -> str:
    """Returns an example of the list or mapping that a field is, in place of a value that is none."""
    if (get_origin(hint) or hint) in (tuple, list):
        return f", such as [{value}]" if isinstance(value, str | int | float) else ""
    if (get_origin(hint) or hint) is not dict:
        return ""
    held: Any = get_args(hint)[1] if get_args(hint) else Any
    if isinstance(held, type) and Plugin in held.__mro__:
        name = next(iter(held.get_known_choices()))  # type: ignore[attr-defined]
        return f", such as {{{name}: {{type: {name}}}}}"
    return ", such as {NAME: VALUE}"


def _check_type(hint: Any, value: Any, where: str) -> None:
    """Refuses what the decoder would bend into shape or pass on: null, truth values, infinite numbers, letters."""
    if dataclasses.is_dataclass(hint):
        return _check_keys(hint, value, where)
    if hint is Any:
        return
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return
    allowed = [_FITS.get(get_origin(kind) or kind, (lambda value: True, "")) for kind in kinds if kind is not NoneType]
    if value is None or not any(fits(value) for fits, _ in allowed):
        raise ConfigError(f"{where}: {shown(value)} is not {allowed[0][1]}{_such_as(kinds[0], value)}")
    kind: Any = get_origin(kinds[0]) or kinds[0]
    if kind in (tuple, list, dict):
        for name, item in value.items() if kind is dict else enumerate(value):
            _check_type(get_args(kinds[0])[kind is dict], item, f"{where}.{name}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


_FITS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda value: isinstance(value, str), "text; put it in quotes"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        "a number",
    ),
    tuple: (lambda value: isinstance(value, list | tuple), "a list; put it in brackets"),
    list: (lambda value: isinstance(value, list | tuple), "a list; put it in brackets"),
    dict: (lambda value: isinstance(value, dict), "a mapping"),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4), and 1.5e6 a whole one."""

    def _number(self, node: yaml.ScalarNode) -> float:
        value = self.construct_yaml_float(node)
        return int(value) if "e" in node.value.lower() and value.is_integer() else value


class _Dumper(yaml.SafeDumper):
    """Its counterpart, which puts text that looks like such a number in quotes."""


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader._number)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
