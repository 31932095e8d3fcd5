"""Documents: where text comes from, as a stream of (document id, text), and what tells one source from another.

Sources are the quickstart corpus, local files and folders of them, data sets saved by `datasets`, and hub data sets. An
id depends on names and row numbers only, never on where a folder lies, and so does everything drawn by id.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.files import sha256_file
from sae.base.network import hub_or_cache
from sae.base.seeding import uniform
from sae.base.settings import at_least, choose

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
SAVED_DATASET = ("dataset_dict.json", "state.json")  # one of these lies in what `save_to_disk` made
GROUP_CHARS = 2_000  # paragraphs of a text file given alone are put together to documents of at least this length
HASHED_BYTES = 2**28  # larger files are told apart by size and time of change: reading them would take too long


@dataclass(frozen=True)
class TextConfig:
    """The text whose activations are read."""

    source: str = "quickstart"
    """quickstart (documentation on this machine), a txt/jsonl/parquet/arrow file, a folder of them, or a hub id."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of a saved one."""
    column: str = "text"
    """Column (or JSON key) that holds the text."""
    streaming: bool = True
    """Whether a hub data set is streamed instead of downloaded whole."""
    revision: str | None = None
    """Commit of a hub data set."""
    context_length: int = 256
    """Tokens per row."""
    layout: str = "packed"
    """packed (documents one after the other, EOS between) or one_per_row (each cut or padded to context_length)."""
    bos: str = "row"
    """Where BOS stands: at the start of every row, of every document, or none."""
    max_tokens: int | None = None
    """Stop after so many training tokens; none: as many as the run trains on."""
    held_out_share: float = 0.05
    """Share of documents kept from training, chosen by a hash of their id."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("text.layout", self.layout, ("packed", "one_per_row"))
        choose("text.bos", self.bos, ("row", "document", "none"))
        at_least("text.context_length", self.context_length, 2)
        if self.max_tokens is not None:
            at_least("text.max_tokens", self.max_tokens, self.context_length)
        if not 0 < self.held_out_share < 1:
            raise ConfigError(f"text.held_out_share: {self.held_out_share} is not between 0 and 1")
        if not self.column:
            raise ConfigError("text.column: empty; name the column that holds the text")
        path = Path(self.source).expanduser()
        looks_local = path.is_absolute() or self.source.startswith((".", "~")) or path.suffix in SUFFIXES
        if not self.source or (looks_local and not path.exists()):
            raise ConfigError(f"text.source: no such file or folder: {self.source!r}.{_sibling(path)}")


def documents(config: TextConfig, counts: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (document id, text). A row of a table or of a jsonl file is one document, and so is a text file.

    Only a text file that is given alone is cut, at blank lines, into documents of at least 2,000 characters. Empty and
    null texts are skipped and invalid UTF-8 is replaced; `counts` gets the numbers of "documents", "empty" and
    "invalid_utf8". ConfigError if the source cannot be read, lacks the column (naming those there are) or has no text.
    """
    counts = Counter() if counts is None else counts
    for document_id, value in _source(config):
        if isinstance(value, str | bytes):
            value = _clean(value, counts)
        elif value is not None:
            raise ConfigError(
                f"text.column: {config.column!r} holds a {type(value).__name__} in {document_id}, not text"
            )
        if not value or value.isspace():
            counts["empty"] += 1
            continue
        counts["documents"] += 1
        yield document_id, value
    if not counts["documents"]:
        raise ConfigError(f"text.source: {config.source} holds no text ({counts['empty']} empty documents)")


def data_identity(config: TextConfig) -> Any:
    """Returns what the data are, JSON-ready: a digest of local files, versions for quickstart, id and revision else."""
    path = Path(config.source).expanduser()
    if config.source == "quickstart":
        from sae.text import python_docs

        return {"quickstart": python_docs.fingerprint()}
    if not path.exists():
        return {"hub": config.source, "revision": config.revision}
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if _is_saved_dataset(path) else local_files(path)
    for file in files:
        stat = file.stat()
        content = sha256_file(file) if stat.st_size <= HASHED_BYTES else stat.st_mtime_ns
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        digest.update(repr((name, stat.st_size, content)).encode())
    return {"files": len(files), "sha256": digest.hexdigest()}


def commit_of_data(config: TextConfig) -> str | None:
    """Returns the commit of a hub data set, that it stay the same text; where it cannot be had, what was typed."""
    if config.source == "quickstart" or Path(config.source).expanduser().exists():
        return config.revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(config.source, revision=config.revision).sha
    except Exception:  # offline a copy may be cached; else loading it says in a line what is wrong
        return config.revision


def local_files(path: Path) -> list[Path]:
    """Returns the readable files of a folder, or the file itself; ConfigError if there are none.

    The order is that of a hash of their names, so that the first `max_tokens` tokens are a sample of the whole folder.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"text.source: {path.name} is not one of {', '.join(SUFFIXES)}")
        return [path]
    found = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    if not found:
        raise ConfigError(f"text.source: the folder {path} holds no {', '.join(SUFFIXES)} file")
    return sorted(found, key=lambda p: uniform("order", p.relative_to(path).as_posix()))


def _source(config: TextConfig) -> Iterator[tuple[str, Any]]:
    path = Path(config.source).expanduser()
    if config.source == "quickstart":
        from sae.text import python_docs

        return python_docs.documents()
    if not path.exists() or _is_saved_dataset(path):
        return _dataset(config, path)
    return _local(path, config.column)


def _local(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    for file in local_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if file.suffix == ".txt" and path.is_dir():
            yield name, file.read_bytes()
            continue
        readers: dict[str, Callable[[Path, str], Iterator[Any]]] = {".txt": _paragraphs, ".jsonl": _json_cells}
        for number, cell in enumerate(readers.get(file.suffix, _table_cells)(file, column)):
            yield f"{name}:{number}", cell


def _paragraphs(file: Path, _column: str) -> Iterator[bytes]:
    """Yields runs of whole paragraphs, which end at blank lines."""
    group, size = [], 0
    with open(file, "rb") as lines:
        for line in lines:
            group.append(line)
            size += len(line)
            if size >= GROUP_CHARS and not line.strip():
                yield b"".join(group)
                group, size = [], 0
    yield b"".join(group)


def _json_cells(file: Path, column: str) -> Iterator[Any]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"text.source: {file.name} line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f"text.source: {file.name} line {number} is a {type(row).__name__}, not an object")
            _require(column, row, file.name)
            yield row[column]


def _table_cells(file: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        for cells in _table_columns(file, column):
            if str(cells.type) in ("string", "large_string", "string_view"):
                cells = cells.cast(pa.large_binary())  # Arrow does not check UTF-8, Python does
            yield from cells.to_pylist()
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ConfigError(f"text.source: {file.name} cannot be read ({' '.join(str(error).split())})") from error


def _table_columns(file: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            _require(column, table.schema_arrow.names, file.name)
            for batch in table.iter_batches(columns=[column]):
                yield batch.column(0)
        return
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # the other one of Arrow's two layouts
            reader = pa.ipc.open_file(source)
        _require(column, reader.schema.names, file.name)
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield batch.column(column)


def _dataset(config: TextConfig, path: Path) -> Iterator[tuple[str, Any]]:
    """A data set of the hub, or one that `save_to_disk` made."""
    import datasets

    name = path.name if path.exists() else config.source
    try:
        if path.exists():
            rows: Any = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                choose("text.split", config.split, map(str, rows))
                rows = rows[config.split]
        else:
            options: dict[str, Any] = {"split": config.split, "revision": config.revision}
            with hub_or_cache():
                rows = datasets.load_dataset(config.source, config.name, streaming=config.streaming, **options)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub client raises becomes one line with the way out
        reason = " ".join(str(error).split())[:200]
        kind = "a saved data set that cannot be read" if path.exists() else "no local path, nor a data set to be loaded"
        raise ConfigError(f"text.source: {config.source!r} is {kind} ({reason}).{_sibling(path)}") from error
    if rows.column_names is not None:  # a stream may learn them only from its rows
        _require(config.column, rows.column_names, name)
        rows = rows.select_columns([config.column])
    for number, row in enumerate(rows):
        _require(config.column, row, name)
        yield f"{name}:{number}", row[config.column]


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_DATASET)


def _require(column: str, columns: Any, where: str) -> None:
    if column not in columns:
        listed = ", ".join(columns)
        raise ConfigError(f"text.column: {where} has no column {column!r}.{nearest(column, columns)} It has: {listed}")


def _clean(text: str | bytes, counts: Counter[str]) -> str:
    """The text as valid Unicode: tokenizers take neither broken UTF-8 nor the lone surrogates that JSON can spell."""
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape")  # an invalid byte becomes a surrogate, for now
    text = text.removeprefix("\ufeff")
    valid = re.sub("[\ud800-\udfff]", "\ufffd", text)
    counts["invalid_utf8"] += valid != text
    return valid


def _sibling(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
