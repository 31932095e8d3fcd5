"""Files -> cells: what stands in the named column of every row, whatever the kind of file.

Text files become UTF-8 as they are read, from the encoding that is named or that their byte-order mark tells. Their
lines end at a line feed alone: other characters that end lines stand inside text.
"""

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from sae.base.errors import ConfigError, nearest
from sae.base.lines import marked

GROUP_CHARS = 2_000  # paragraphs of a text file given alone are put together to documents of at least this length
DELIMITERS = (",", "\t", ";", "|")  # of csv and tsv: the one by which the first line has the column, or most of them
COMPRESSED = (".gz", ".zst", ".bz2")
UTF_8 = "utf-8"


def kind_of(path: Path) -> str:
    """Returns the suffix that says how a file is read, below its compression; "" if it is not read."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return "" if suffix not in READERS or (suffix in TABLES and path.suffix != suffix) else suffix


def cells(file: Path, name: str, column: str, encoding: str | None) -> Iterator[Any]:
    """Yields what stands in a column (or at a path of keys, `a.0.b`) of every row; of a text file, its paragraphs.

    Text comes as str or, not yet decoded, as UTF-8. ConfigError names a file, and where it can a line, that cannot be
    read.
    """
    try:
        yield from READERS[kind_of(file)](file, column, encoding)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, csv.Error) as error:  # Arrow's errors are among them
        raise ConfigError(f"text.source: {name} cannot be read ({' '.join(str(error).split())})") from error


def whole(file: Path, name: str, encoding: str | None) -> bytes:
    """Returns all of a text file as UTF-8; ConfigError if it cannot be read."""
    try:
        return b"".join(_lines(file, encoding))
    except (OSError, EOFError) as error:
        raise ConfigError(f"text.source: {name} cannot be read ({' '.join(str(error).split())})") from error


def pick(row: Any, column: str, where: str) -> Any:
    """Returns what stands in a row under a key, or at the end of a path of keys and numbers; None where it breaks off.

    ConfigError lists the keys there are, if one is missing.
    """
    if isinstance(row, dict) and column in row:
        return row[column]
    found, before = row, ""
    for part in column.split("."):
        if isinstance(found, list) and part.isdecimal():
            found = found[int(part)] if int(part) < len(found) else None
        elif isinstance(found, dict):
            require(column, part, {f"{before}{key}": key for key in found}, where)
            found = found[part]
        elif found is not None:
            raise ConfigError(f"text.column: {where} has no column {column!r}: {before[:-1]} is no object")
        before += f"{part}."
    return found


def require(column: str, part: str, columns: Any, where: str) -> None:
    """Raises ConfigError, with the nearest name, unless one of `columns` (names in full, by what to call them) fits."""
    columns = columns if isinstance(columns, dict) else {name: name for name in columns}
    if part not in columns.values():
        listed = ", ".join(columns)
        raise ConfigError(f"text.column: {where} has no column {column!r}.{nearest(column, columns)} It has: {listed}")


def opened(file: Path) -> BinaryIO:
    """Returns an open file, decompressed."""
    if file.suffix not in COMPRESSED:
        return open(file, "rb")
    import pyarrow as pa

    return io.BufferedReader(cast(Any, pa.input_stream(str(file))))  # which compression, its name says


def _lines(file: Path, encoding: str | None) -> Iterator[bytes]:
    """Yields the lines of a text file as UTF-8; bytes that are none in its encoding are left or replaced."""
    with opened(file) as raw:
        head = raw.peek(4)[:4] if isinstance(raw, io.BufferedReader) else b""
        encoding = encoding or marked(head) or UTF_8
        if codecs.lookup(encoding).name == UTF_8:
            yield from raw
            return
        with io.TextIOWrapper(raw, encoding, errors="replace", newline="\n") as lines:
            for line in lines:
                yield line.encode(UTF_8, "surrogatepass")


def _each_line(file: Path, encoding: str | None) -> Iterator[bytes]:
    """Yields the lines of a table, which a carriage return alone may end too: it stands in none but in quotes."""
    return chain.from_iterable(line.splitlines(keepends=True) for line in _lines(file, encoding))


def _text(line: bytes) -> str:
    return line.decode("utf-8-sig", errors="surrogateescape")


def _paragraphs(file: Path, _column: str, encoding: str | None) -> Iterator[bytes]:
    """Yields runs of whole paragraphs, which end at blank lines."""
    group, size = [], 0
    for line in _lines(file, encoding):
        group.append(line)
        size += len(line)
        if size >= GROUP_CHARS and not line.strip():
            yield b"".join(group)
            group, size = [], 0
    yield b"".join(group)


def _json_lines(file: Path, column: str, encoding: str | None) -> Iterator[Any]:
    for number, line in enumerate(_each_line(file, encoding), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(_text(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"text.source: {file.name} line {number} is not JSON ({error})") from error
        yield pick(_object(row, f"{file.name} line {number}"), column, file.name)


def _json(file: Path, column: str, encoding: str | None) -> Iterator[Any]:
    """Yields of a list of records, alone or as "data" of an object; of one record; or of JSON lines called .json."""
    try:
        found = json.loads(_text(b"".join(_lines(file, encoding))))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # more than one value: records one after the other
            yield from _json_lines(file, column, encoding)
            return
        raise ConfigError(f"text.source: {file.name} is not JSON ({error})") from error
    rows = found.get("data") if isinstance(found, dict) and column not in found else found
    for number, row in enumerate(rows if isinstance(rows, list) else [found]):
        yield pick(_object(row, f"{file.name} record {number}"), column, file.name)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"text.source: {where} is a {type(row).__name__}, not an object")
    return row


def _csv(file: Path, column: str, encoding: str | None) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # the default would refuse a text of 128 KiB
    lines = map(_text, _each_line(file, encoding))
    head = next(lines, "")
    columns = {mark: next(csv.reader([head], delimiter=mark), []) for mark in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda mark: (column in columns[mark], len(columns[mark])))
    rows = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        require(column, column, names, file.name)
        for row in rows:
            if row and len(row) != len(names):
                what = f"{len(row)} fields, not {len(names)}"
                raise ConfigError(f"text.source: {file.name} line {rows.line_num} has {what}")
            if row:
                yield row[names.index(column)]
    except csv.Error as error:
        raise ConfigError(f"text.source: {file.name} line {rows.line_num}: {error}") from error


def _table(file: Path, column: str, encoding: str | None) -> Iterator[Any]:
    import pyarrow as pa

    for top, batch in _columns(file, column):
        if str(batch.type) in ("string", "large_string", "string_view"):
            batch = batch.cast(pa.large_binary())  # Arrow does not check UTF-8, Python does
            yield from (None if cell is None else cell.decode(errors="surrogateescape") for cell in batch.to_pylist())
        elif "binary" in str(batch.type):
            codec = encoding or UTF_8
            errors = "surrogateescape" if codecs.lookup(codec).name == UTF_8 else "replace"
            yield from (None if cell is None else cell.decode(codec, errors) for cell in batch.to_pylist())
        else:
            yield from (pick({top: cell}, column, file.name) for cell in batch.to_pylist())


def _columns(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yields the batches of the column that a name or a path of keys begins with, and its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            top = top_of(column, table.schema_arrow.names, file.name)
            for batch in table.iter_batches(columns=[top]):
                yield top, batch.column(0)
        return
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # the other one of Arrow's two layouts
            reader = pa.ipc.open_file(source)
        top = top_of(column, reader.schema.names, file.name)
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield top, batch.column(top)


def top_of(column: str, columns: Any, where: str) -> str:
    """Returns the column of a table that a name or a path of keys begins with; ConfigError if it has none."""
    top = column.partition(".")[0]
    top = top if column not in columns and top in columns else column
    require(column, top, columns, where)
    return top


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Any]]] = {
    ".txt": _paragraphs,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _table,
    ".arrow": _table,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
TABLES = (".parquet", ".arrow")  # compressed inside
DESCRIBING = (".json", ".csv", ".tsv")  # in a folder with other files, these may say something about them
