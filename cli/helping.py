"""What --help and --help-fields say of config fields and subcommands."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.fields import Field

from .telling import report


def told_beside(commands: Mapping[str, argparse.ArgumentParser], table: Sequence[Field]) -> str:
    """Returns what --help says behind the options: the subcommands, and the groups of config fields."""
    lines = []
    if commands:
        lines += ["", "commands (COMMAND --help says more):"]
        lines += [f"  {name:14}{parser.description}" for name, parser in commands.items()]
    if table:
        groups = [one for one in table if one.kind == "group" and "." not in one.path]
        alone = [one.path for one in table if one.kind != "group" and "." not in one.path]
        lines += ["", "fields (--help-fields GROUP lists a group's, --coder.selection.k 64 sets one):"]
        lines += [f"  {one.path:14}{one.doc}" for one in groups]
        lines += [f"  {', '.join(alone)}"] if alone else []
    return "".join(f"{line}\n" for line in lines)


def tell_fields(table: Sequence[Field], group: str, as_json: Any) -> None:
    """Prints config fields: all, or those of a group, a plug-in or a name; ConfigError if nothing is called so."""
    asked = group.strip("-").replace("-", "_")
    inside = [one for one in table if one.path == asked or one.path.startswith(f"{asked}.")]
    found = inside or [one for one in table if asked in (one.of, one.path.rpartition(".")[2])] if asked else table
    if not found:
        known = {part for one in table for part in (one.path, one.of, one.path.rpartition(".")[2]) if part}
        raise ConfigError(f"--help-fields: no group, plug-in or field {group!r}.{nearest(asked, sorted(known), 3)}")
    found = [one for one in found if one.kind != "group"] or list(found)
    report(as_json, found, map(_lines, found))


def _lines(one: Field) -> str:
    of = f"[{one.of}] " if one.of and f".{one.of}." not in one.path else ""
    default = f"default: {one.default}" if one.default else "no default"
    return f"  --{one.path}  ({default})\n      {of}{one.doc}"
