"""What a Neuronpedia instance can import, as `neuronpedia_schema.json` has it, and the check of an export against that.

The table of that file is written from what their code does, in github.com/hijohnnylin/neuronpedia at ebb8426: which
columns a table has, and of which types (apps/webapp/prisma/schema.prisma at a69f3394); which files are read, in which
order and how (apps/webapp/app/api/admin/import/route.ts at 28f865b6, import-file/route.ts beside it, and
apps/webapp/lib/utils/s3.ts at 99b125da); how lines of JSON become rows (apps/webapp/lib/db/import.ts at 3861c055).
"""

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sae.base.errors import DataError
from sae.base.visible import visible

SCHEMA = Path(__file__).with_name("neuronpedia_schema.json")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?")
INT = range(-(2**31), 2**31)
KINDS = {
    "text": lambda x: isinstance(x, str) and "\0" not in x and _encodes(x),
    "int": lambda x: type(x) is int and x in INT,
    "float": lambda x: type(x) in (int, float) and math.isfinite(x),
    "bool": lambda x: type(x) is bool,
    "json": lambda x: x is not None,
    "time": lambda x: isinstance(x, str) and TIME.fullmatch(x) is not None,
}
Keys = dict[tuple[str, tuple[str, ...]], set[tuple[Any, ...]]]
"""What there is of a table by the columns that name it."""


class Line(NamedTuple):
    """A line of a file: its text, and what it says."""

    at: str
    row: dict[str, Any]


@cache
def schema() -> dict[str, Any]:
    """Returns files, tables and relations, as the file beside this one has them."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def check_tree(
    folder: Path, model_id: str, source_id: str, draft: Path | None = None, config: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Returns how many lines each table gets from the files of a source in a folder, read as an instance reads them.

    Until it is published, the files of the source are in `draft`, and what config/ is to hold is in `config`, by name.
    Raises DataError for the first thing that an import would refuse, or would take for something else.
    """
    known = schema()
    keys: Keys = defaultdict(set)
    for table, there in known["there before"].items():
        keys[table, ("id",)] = {tuple(one) for one in there}
    counts: dict[str, int] = {}
    for file in known["files"]:
        place = file["path"].replace("MODEL", model_id).replace("SOURCE", source_id)
        of_source = Path(place).relative_to(model_id, source_id) if "MODEL" in file["path"] else None
        path = draft / of_source if draft and of_source else folder / place
        given = (config or {}).get(path.stem) if file["way"] == "upsert" else None
        named = known["tables"][file["table"]]
        wanted = {(file["table"], tuple(u)) for u in named["unique"]} | _asked_of(file["table"])
        counts[file["table"]] = 0
        for line in _lines(path, place, file["way"], given):
            _check(line, file["table"], named, keys)
            if file["way"] != "upsert":
                _check_place(line, file["table"], model_id, source_id)
            for table, columns in wanted:
                keys[table, columns].add(tuple(line.row.get(name) for name in columns))
            counts[file["table"]] += 1
    return counts


def _asked_of(table: str) -> set[tuple[str, tuple[str, ...]]]:
    """Returns the columns of a table by which others refer to it."""
    references = (one for other in schema()["tables"].values() for one in other["references"])
    return {(table, tuple(one["to"])) for one in references if one["table"] == table}


def _lines(path: Path, place: str, way: str, given: str | None) -> Iterator[Line]:
    """Yields the lines of the files at a place, which may have a number in its name, or the lines that are given."""
    if "-N." not in place:
        if given is None and not path.is_file():
            raise DataError(f"{place}: there is no such file")
        yield from _rows(place, path.read_bytes() if given is None else given.encode(), way)
        return
    paths = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    numbers = [re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name) for path in paths]
    if sorted(int(found[1]) for found in numbers if found) != list(range(len(paths))):
        raise DataError(f"{place}: {', '.join(path.name for path in paths)} are not batch-0, batch-1 ... alone")
    for one in paths:
        with gzip.open(one) as stream:
            yield from _rows(f"{Path(place).parent.as_posix()}/{one.name}", stream.read(), way)


def _rows(name: str, data: bytes, way: str) -> Iterator[Line]:
    """Yields the lines of one file as the importer reads them; they must read the same as they are."""
    text = data.decode("utf-8")
    whole = text.replace("\\u0000", " ") if way == "insert" else text
    lines, plain = whole.split("\n"), text.split("\n")
    if lines.pop() or (way == "insert" and not lines):
        raise DataError(f"{name}: it is empty, or its last line has no end")
    columns: list[str] | None = None
    for number, (line, own) in enumerate(zip(lines, plain, strict=False), 1):
        at = f"{name} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{at}: no JSON ({error})") from None
        if not isinstance(row, dict) or row != json.loads(own):
            raise DataError(f"{at}: no object, or not the same to the importer, which puts a space for NUL")
        if way == "insert" and list(row) != (columns := columns or list(row)):
            raise DataError(f"{at}: {', '.join(row)}; the first line has {', '.join(columns)}")
        yield Line(at, row)


def _check(line: Line, table: str, named: dict[str, Any], keys: Keys) -> None:
    """Raises DataError unless a line is a row that its table takes."""
    at, row = line
    missing = [name for name in named["required"] if row.get(name) is None]
    if missing:
        raise DataError(f"{at}: {missing[0]} is missing, which {table} needs")
    for name, value in row.items():
        kind = named["columns"].get(name)
        if kind is None:
            raise DataError(f"{at}: {table} has no {visible(name)}")
        if not _fits(value, kind):
            raise DataError(f"{at}: {name} is {visible(repr(value)[:60])}, which is no {kind}")
    for together in named["paired"]:
        lengths = {name: len(row[name]) for name in together if name in row}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{at}: {', '.join(f'{name} has {n}' for name, n in lengths.items())} values")
    for columns in named["unique"]:
        own = tuple(row.get(name) for name in columns)
        if None not in own and own in keys[table, tuple(columns)]:
            raise DataError(f"{at}: there is another {table} of {_told(columns, own)}")
    for one in named["references"]:
        own = tuple(row.get(name) for name in one["columns"])
        if None not in own and own not in keys[one["table"], tuple(one["to"])]:
            raise DataError(f"{at}: there is no {one['table']} of {_told(one['to'], own)}")


def _check_place(line: Line, table: str, model_id: str, source_id: str) -> None:
    """Raises DataError if a row is of another model or source than its folder."""
    own = {"Model": {"id": model_id}, "Source": {"modelId": model_id, "id": source_id}}
    for name, wanted in own.get(table, {"modelId": model_id, "layer": source_id}).items():
        if line.row.get(name, wanted) != wanted:
            raise DataError(f"{line.at}: {name} is {visible(str(line.row[name]))}, but the folder is of {wanted}")


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_fits(one, kind[:-2]) for one in value)
    return KINDS[kind](value) if kind in KINDS else value in schema()["enums"][kind]


def _told(columns: Iterable[str], values: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {visible(str(value))}" for name, value in zip(columns, values, strict=True))


def _encodes(text: str) -> bool:
    """Returns whether a text is one in UTF-8; half of a surrogate pair, which JSON can spell, is none in Postgres."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
