"""The fields of a config class as its source tells them: nothing is imported, which alone takes seconds with torch.

So a command can list its fields, complete them, and say at once which of them was misspelled. What is read is what
`dataclasses` would make of it: annotated names with their defaults and docstrings, those of base classes first; the
fields of a config within; and for a family of plug-ins those of every file in its folder.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("sae", "interp")


@dataclass(frozen=True)
class Field:
    """One field, or a group of them."""

    path: str
    """As it is typed: "coder.selection.k"; in a mapping of plug-ins by the plug-in's name: "scorers.fuzzing.layout"."""
    kind: str
    """Its annotation, such as "int" or "str | None"; "group" of several fields."""
    default: str
    """As one would type it; "" where there is none to be typed."""
    doc: str
    of: str = ""
    """The plug-in that it belongs to, "" if it is there whatever is chosen."""
    choices: tuple[str, ...] = ()
    """All values that are allowed, where the source names them; of a mapping of plug-ins, all their names."""


class _Found(NamedTuple):
    """A class, and the module that it stands in."""

    module: str
    node: ast.ClassDef


class _Own(NamedTuple):
    """One annotated name of a class, and the module whose names its annotation and default use."""

    module: str
    annotation: ast.expr
    default: ast.expr | None
    doc: str


def fields(config: str) -> list[Field]:
    """Returns the fields of a config class, "module:Class", and of all configs within, each group before its fields."""
    module, _, name = config.partition(":")
    found = _find(module, name)
    if found is None:
        raise LookupError(f"{module} has no class {name}")
    return list(_walk(found, "", ""))


def _walk(config: _Found, prefix: str, of: str) -> Iterator[Field]:
    allowed = _allowed(config)
    for name, own in _fields_of(config).items():
        path, kind = prefix + name, ast.unparse(own.annotation)
        within = _find(own.module, kind)
        if within is None:
            family = _find(own.module, kind.removeprefix("dict[str, ").removesuffix("]"))
            plugins = _plugins(family) if family else {}
            choices = tuple(plugins) or (("true", "false") if kind == "bool" else allowed.get(name, ()))
            yield Field(path, kind, _typed(own), own.doc, of, choices)
            for plugin, choice in plugins.items():
                yield from _walk(choice, f"{path}.{plugin}.", plugin)
            continue
        plugins = _plugins(within)
        yield Field(path, "group", "", own.doc or _docstring(within.node), of)
        if not plugins:
            yield from _walk(within, f"{path}.", of)
            continue
        told = f"{own.doc} One of: {', '.join(plugins)}."
        yield Field(f"{path}.type", "str", _chosen(own, plugins), told, of, tuple(plugins))
        for plugin, choice in plugins.items():
            yield from _walk(choice, f"{path}.", plugin)


def _fields_of(found: _Found) -> dict[str, _Own]:
    """Returns the annotated names of a class, those of its bases first; of several docstrings the nearest."""
    own: dict[str, _Own] = {}
    for base in reversed(found.node.bases):
        above = _find(found.module, ast.unparse(base))
        own |= _fields_of(above) if above else {}
    body = found.node.body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            name, known = node.target.id, own.get(node.target.id)
            own[name] = _Own(found.module, node.annotation, node.value, _text(after) or (known.doc if known else ""))
    return own


def _allowed(found: _Found) -> dict[str, tuple[str, ...]]:
    """Returns by field what `choose(..., self.field, allowed)` allows: constants, or the names of a family."""
    allowed: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(found.node):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "choose" and len(node.args) == 3:
            field, values = ast.unparse(node.args[1]), _literal(found.module, node.args[2])
            if family := re.search(r"\bnames\((\w+)\)", ast.unparse(node.args[2])):
                values = tuple(_plugins(_find(found.module, family[1]) or found))
            if field.startswith("self.") and isinstance(values, tuple | dict):
                allowed[field.removeprefix("self.")] = tuple(map(str, values))
    return allowed


def _plugins(family: _Found) -> dict[str, _Found]:
    """Returns the plug-ins of a family by name; {} of a class that is no family."""
    if "Plugin" not in map(ast.unparse, family.node.bases):
        return {}
    found = {}
    for folder in _folders(family.module):
        for path in sorted(folder.glob("[!_]*.py")):
            module = f"{family.module}.{path.stem}"
            for node in _source(path).classes.values():
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith(".register_subclass"):
                        found[ast.literal_eval(mark.args[0])] = _Found(module, node)
    return dict(sorted(found.items()))


def _chosen(own: _Own, plugins: dict[str, _Found]) -> str:
    """Returns the name of the plug-in that `field(default_factory=Class)` makes."""
    maker = ast.unparse(own.default.keywords[0].value) if isinstance(own.default, ast.Call) else ""
    return next((name for name, plugin in plugins.items() if plugin.node.name == maker), "")


def _typed(own: _Own) -> str:
    """Returns a default as text: of what a call makes, as far as the source says it."""
    default = own.default
    if default is None:
        return ""
    if isinstance(default, ast.Call):  # field(default=..., ...) or field(default_factory=...)
        made = {word.arg: word.value for word in default.keywords}
        default = made.get("default", made.get("default_factory", default))
    for node in ast.walk(default) if isinstance(default, ast.Lambda) else ():
        terms = _constant(own.module, node.id) if isinstance(node, ast.Name) else None
        if isinstance(terms, ast.Dict):
            return ", ".join(str(_literal(own.module, key)) for key in terms.keys if key)
    text = ast.unparse(default)
    value = {"dict": {}, "list": [], "tuple": []}.get(text, _literal(own.module, default))
    return text if value is ... else str(list(value) if isinstance(value, tuple) else value)


def _literal(module: str, node: ast.expr) -> Any:
    """Returns the value of a literal, also of arithmetic and by a name that stands for one; ... of anything else."""
    if isinstance(node, ast.Name):
        node = _constant(module, node.id) or node
    names = ast.Name | ast.Call | ast.Attribute | ast.comprehension | ast.Lambda | ast.JoinedStr
    if any(isinstance(one, names) for one in ast.walk(node)):
        return ...
    return eval(compile(ast.Expression(node), module, "eval"), {"__builtins__": {}})  # numbers and text of our own


def _constant(module: str, name: str) -> ast.expr | None:
    """Returns what a name of a module was set to, wherever that was imported from."""
    found = _home(module, name, "constants")
    return _source(_file(found)).constants[name] if found else None


def _find(module: str, name: str) -> _Found | None:
    """Returns the class of ours that a name of a module stands for, wherever that was imported from."""
    found = _home(module, name, "classes")
    return _Found(found, _source(_file(found)).classes[name]) if found else None


def _home(module: str, name: str, kind: str) -> str:
    """Returns the module of ours in which a class or constant stands that a module knows; "" if there is none."""
    source = _source(_file(module))
    if name in getattr(source, kind):
        return module
    there = source.imports.get(name, "")
    return _home(there, name, kind) if there.partition(".")[0] in OURS else ""


class _Source(NamedTuple):
    """What a module defines at its top."""

    classes: dict[str, ast.ClassDef]
    imports: dict[str, str]
    """The module that a name comes from; renamed ones are left out."""
    constants: dict[str, ast.expr]


@cache
def _source(path: Path) -> _Source:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = _Source({}, {}, {})
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found.imports.update({one.name: str(node.module) for one in node.names if one.asname is None})
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found.constants[ast.unparse(target)] = node.value
    return found


def _folders(package: str) -> list[Path]:
    """Returns where the modules of a package lie: one that is imported says it, which may be more than its folder."""
    imported = getattr(sys.modules.get(package), "__path__", None)
    if imported is not None:
        return [Path(folder) for folder in imported]
    parent, _, name = package.rpartition(".")
    if parent:
        return [folder / name for folder in _folders(parent)]
    spec = find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]


def _file(module: str) -> Path:
    parent, _, name = module.rpartition(".")
    places = [folder / end for folder in _folders(parent) for end in (f"{name}.py", f"{name}/__init__.py")]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise LookupError(f"no source of {module}")
    return found


def _docstring(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def _text(node: ast.stmt | None) -> str:
    """Returns what stands in a string of its own, in one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""
