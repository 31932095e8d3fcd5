"""Config fields as they are typed: taken apart, and those that do not exist told at once with the nearest that do."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from sae.base.errors import ConfigError, nearest
from sae.base.fields import Field
from sae.base.settings import choose
from sae.base.shipped import configs
from sae.training.names import TRAINING_ARGUMENTS

USUAL = TRAINING_ARGUMENTS | {  # and by what other trainers of sparse coders call them
    "batch_size": "batch_tokens",
    "dataset": "text.source",
    "dataset_path": "text.source",
    "hook_name": "activations.sites",
    "hook_point": "activations.sites",
    "hookpoint": "activations.sites",
    "layer": "activations.sites",
    "layers": "activations.sites",
    "model_name": "model.name",
    "sparsity": "coder.selection.k",
    "steps": "tokens",
}
EXAMPLES = {"int": "64", "float": "0.1", "bool": "true", "tuple": "'[A, B]'", "dict": "'{A: B}'"}


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (dotted field, text of its value) of "--field value" and "--field=value"; ConfigError for other words."""
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected --field value (see --help-fields)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key}: its value is missing")
            value = rest.pop(0)
        found.append((key.replace("-", "_"), value))
    return found


def check(words: Sequence[str], table: Sequence[Field], options: Iterable[str]) -> None:
    """Raises ConfigError for the first word that sets no field of the table: what else may have been meant.

    The nearest are looked for among the command's own options too. What a field's value may be is not looked at, but
    for the names of plug-ins.
    """
    options = list(options)
    last = None
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(_stray(word, last, table, options))
        key, equals, _ = word[2:].partition("=")
        last = field_of(key.replace("-", "_"), table)
        if last is None:
            raise ConfigError(f"--{key}: {unknown(key, table, options)}")
        if not equals:
            raise ConfigError(f"--{key}: its value is missing, such as --{key} {example(last, table)}")
    for path, value in pairs(words):
        field = field_of(path, table)
        if field is not None and path.endswith(".type"):
            choose(path, value, field.choices)


def field_of(path: str, table: Sequence[Field]) -> Field | None:
    """Returns the field or group that a dotted path sets; None if there is none.

    In a mapping of plug-ins each has a name that whoever types it chooses, and in any other mapping anything has one.
    """
    for field in table:
        if field.path == path:
            return field
    for field in table:
        if field.kind.startswith("dict[") and path.startswith(f"{field.path}."):
            inside = [one for one in table if one.path.startswith(f"{field.path}.")]
            name, _, rest = path.removeprefix(f"{field.path}.").partition(".")
            if not field.choices or not rest:
                return field
            if rest == "type":
                return Field(path, "str", name, "", choices=field.choices)
            return next((one for one in inside if one.path.split(".", field.path.count(".") + 2)[-1] == rest), None)
    return None


def unknown(typed: str, table: Sequence[Field], options: Sequence[str]) -> str:
    """Returns what to say of a field that does not exist: the nearest by its whole name, or by the last part of it."""
    path = typed.replace("-", "_")
    switched = path.removeprefix("no_")
    turned = next((one for one in table if one.kind == "bool" and switched in (one.path, _last(one.path))), None)
    if path.startswith("no_") and turned:
        return f"no such option; to turn it off: --{turned.path} false"
    if path.startswith("no_") and f"--{switched.replace('_', '-')}" in options:
        return f"no such option; --{switched.replace('_', '-')} is off unless it is typed"
    paths = list(dict.fromkeys(_as_named(path, one.path, table) for one in table))
    known = [*paths, *(name[2:].replace("-", "_") for name in options)]
    close = get_close_matches(path, known, n=1, cutoff=0.75)
    usual = [USUAL[_last(path)]] if USUAL.get(_last(path)) in paths else []
    alike = [one for one in paths if _last(one) == _last(path)]
    alike = [one for one in alike if one.count(".") == min(other.count(".") for other in alike)][:3]
    names = {_last(one): one for one in reversed(paths)}
    nearly = [names[name] for name in get_close_matches(_last(path), names, n=1, cutoff=0.7)]
    if "." in path:
        found = [one for one in close if _last(one) == _last(path)] or alike or close or nearly
    else:
        found = usual or alike or close or nearly
    if found:
        shown = [name if (name := f"--{one.replace('_', '-')}") in options else f"--{one}" for one in found]
        return f"no such field. Did you mean {' or '.join(shown)}?"
    group = path.rpartition(".")[0]
    if group and field_of(group, table):
        return f"no such field. Fields of {group}: {', '.join(_last(one) for one in paths if _above(one) == group)}"
    return "no such field; --help-fields lists all, --help-fields GROUP those of a group"


def _as_named(typed: str, path: str, table: Sequence[Field]) -> str:
    """Returns the path of a field by the name that was typed for its plug-in, if it is of the same mapping."""
    for field in table:
        if field.kind.startswith("dict[") and field.choices and typed.startswith(f"{field.path}."):
            name, _, rest = path.removeprefix(f"{field.path}.").partition(".")
            own = typed.removeprefix(f"{field.path}.").partition(".")[0]
            return f"{field.path}.{own}.{rest}" if name in field.choices and own not in field.choices else path
    return path


def example(field: Field, table: Sequence[Field]) -> str:
    """Returns what one may type as the value of a field; of a group, one of its fields."""
    if field.kind == "group":
        return next(f"'{{{_last(one.path)}: {one.default}}}'" for one in table if _above(one.path) == field.path)
    if field.choices and not field.kind.startswith("dict["):
        return field.default if field.default in field.choices else field.choices[0]
    usual = next((text for kind, text in EXAMPLES.items() if field.kind.startswith(kind)), "TEXT")
    return (
        field.default
        if field.default not in ("", "None", "[]", "{}") and field.kind in ("int", "float", "str")
        else usual
    )


def _stray(word: str, last: Field | None, table: Sequence[Field], options: Sequence[str]) -> str:
    """Returns what to say of a word that is no option: one dash too few, or one more item of a list."""
    name, equals, _ = word.partition("=")
    if word.startswith("-") and not equals and f"-{name}" in options:
        return f"{word}: no such option. Did you mean -{name}?"
    if word.startswith("-") and len(name) > 2:
        plain = name[1:].replace("-", "_")
        return f"{word}: options begin with two dashes" + (
            f": -{name}" if field_of(plain, table) else f"; {unknown(name[1:], table, options)}"
        )
    if word.startswith("-"):
        return f"{word}: no such option.{nearest(word, [one for one in options if not one.startswith('--')])}"
    if last is not None and last.kind.startswith(("tuple[", "list[")):
        return f"{word!r}: a list goes in brackets: --{last.path} '[A, {word}]'"
    field = field_of(word.replace("-", "_"), table)
    if field is not None or f"--{name}" in options:
        return f"{word!r}: expected --field value; did you mean --{word}?"
    kinds = {"--on": "models", "--config": "families"} if "--on" in options else {"--config": "explain"}
    for option, kind in kinds.items():
        if option in options and (word in configs(kind) or (option == "--config" and word.endswith((".yaml", ".yml")))):
            return f"{word!r}: expected --field value; did you mean {option} {word}?"
    return f"{word!r}: one word too many; expected --field value (see --help-fields)"


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _above(path: str) -> str:
    return path.rpartition(".")[0]
