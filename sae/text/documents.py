"""Documents: where text comes from, as a stream of (document id, document), and what tells one source from another.

Sources are the quickstart corpus, local files and folders of them, data sets saved by `datasets`, and hub data sets. An
id depends on names and row numbers only, never on where a folder lies, and so does everything drawn by id. A document
is a text, a list of token ids, or a chat: a list of messages with `role` and `content`.
"""

import encodings.aliases
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.files import sha256_file
from sae.base.network import hub_or_cache
from sae.base.paths import near
from sae.base.seeding import uniform
from sae.base.settings import at_least, choose
from sae.text.chats import as_chat
from sae.text.damage import repaired, too_much, what_it_may_be
from sae.text.readers import COMPRESSED, DESCRIBING, READERS, TABLES, cells, kind_of, pick, top_of, whole

Document = str | list[int] | list[dict[str, Any]]

LOOK_CHARS = 2**20  # so much is looked at before anything long begins
SAVED_DATASET = ("dataset_dict.json", "state.json")  # one of these lies in what `save_to_disk` made
AS_STORED = "it was stored damaged, or in another encoding than what stands before it"
HASHED_BYTES = 2**28  # larger files are told apart by size and time of change: reading them would take too long


@dataclass(frozen=True)
class TextConfig:
    """The text whose activations are read."""

    source: str = "quickstart"
    """quickstart (documentation on this machine), a txt/jsonl/json/csv/tsv (also .gz/.zst), parquet or arrow file, a
    folder of them, or a hub id."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of a saved one."""
    column: str = "text"
    """Column (or JSON key, or a path of them: a.0.b) that holds the text, token ids, or chats (lists of messages)."""
    encoding: str | None = None
    """Encoding of text files; none: what the byte-order mark says, else UTF-8."""
    roles: tuple[str, ...] = ()
    """Of chats, the roles whose words count, such as assistant: the others are read, but masked; none: all."""
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
        _check_encoding(self.encoding)
        path = Path(self.source).expanduser()
        looks_local = path.is_absolute() or self.source.startswith((".", "~")) or bool(kind_of(path))
        if not self.source or (looks_local and not path.exists()):
            raise ConfigError(f"text.source: no such file or folder: {self.source!r}.{near(path)}")


def documents(config: TextConfig, counts: Counter[str] | None = None) -> Iterator[tuple[str, Document]]:
    """Yields (document id, document). A row of a table or of a jsonl file is one document, and so is a text file.

    Only a text file that is given alone is cut, at blank lines, into documents of at least 2,000 characters. Empty and
    null ones are skipped, damaged characters are replaced, and what is no text is left out: `counts` gets the numbers
    of "documents", "empty", "damaged" and "skipped" ones, what `refuse_if_damaged` needs, and how many chats have each
    "role ...". ConfigError if the source cannot be read, lacks the column (naming those there are), has no text or is
    damaged throughout.
    """
    counts = Counter() if counts is None else counts
    for document_id, value in _source(config):
        found = "" if value is None else _document(value, config, document_id, counts)
        if found is None:
            counts["skipped"] += 1
        elif not found or (isinstance(found, str) and found.isspace()):
            counts["empty"] += 1
        else:
            counts["documents"] += 1
            yield document_id, found
    check_met(config, counts)
    if not counts["documents"]:
        raise ConfigError(f"text.source: {config.source} holds no text ({counts['empty']} empty documents)")


def check_met(config: TextConfig, counts: Counter[str]) -> None:
    """Raises ConfigError if of the documents counted so far too much is damaged, or none has a role that is asked for.

    The message names the first file that is damaged and what its encoding may be.
    """
    if too_much(counts):
        share = counts["damaged_characters"] / counts["characters"]
        raise ConfigError(
            f"text.source: {share:.2%} of the characters of {config.source} are damaged or no text"
            f"{_first_damaged(config)}"
        )
    seen = [key.removeprefix("role ") for key in counts if key.startswith("role ")]
    for role in config.roles if counts["documents"] else ():
        if role not in seen:
            there = f"there are {', '.join(seen)}" if seen else f"text.column {config.column!r} holds no chats"
            raise ConfigError(f"text.roles: no message of {role!r};{nearest(role, seen)} {there}")


def first_look(config: TextConfig) -> None:
    """Reads the beginning of a text; raises ConfigError for what `documents` would refuse of it, before long work."""
    counts: Counter[str] = Counter()
    for _ in documents(config, counts):
        if counts["characters"] >= LOOK_CHARS or counts["documents"] >= LOOK_CHARS:
            break
    check_met(config, counts)


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
    Files of kinds that often describe others (json, csv, tsv) are read where there are no others.
    """
    allowed = f"{', '.join(READERS)} (text also compressed: {', '.join(COMPRESSED)})"
    if path.is_file():
        if not kind_of(path):
            raise ConfigError(f"text.source: {path.name} is not one of {allowed}")
        return [path]
    found = {p for p in path.rglob("*") if kind_of(p) and p.is_file()}
    found = {p for p in found if kind_of(p) not in DESCRIBING} or found
    found = [p for p in found if p.suffix not in COMPRESSED or p.with_suffix("") not in found]
    if not found:
        raise ConfigError(f"text.source: the folder {path} holds no {allowed} file")
    return sorted(found, key=lambda p: uniform("order", p.relative_to(path).as_posix()))


def _source(config: TextConfig) -> Iterator[tuple[str, Any]]:
    path = Path(config.source).expanduser()
    if config.source == "quickstart":
        from sae.text import python_docs

        return python_docs.documents()
    if not path.exists() or _is_saved_dataset(path):
        return _dataset(config, path)
    return _local(path, config)


def _local(path: Path, config: TextConfig) -> Iterator[tuple[str, Any]]:
    for file in local_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if kind_of(file) == ".txt" and path.is_dir():
            yield name, whole(file, name, config.encoding)
            continue
        try:
            for number, cell in enumerate(cells(file, name, config.column, config.encoding)):
                yield f"{name}:{number}", cell
        except ConfigError as error:
            hint = _hint(file, config)  # what is in another encoding has no columns and is no JSON
            if not hint:
                raise
            raise ConfigError(f"{error}; {hint}") from error


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
            rows = rows.with_format(None)  # as it was saved, it may give tensors
        else:
            options: dict[str, Any] = {"split": config.split, "revision": config.revision}
            with hub_or_cache():
                rows = datasets.load_dataset(config.source, config.name, streaming=config.streaming, **options)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub client raises becomes one line with the way out
        reason = " ".join(str(error).split())[:200]
        kind = "a saved data set that cannot be read" if path.exists() else "no local path, nor a data set to be loaded"
        raise ConfigError(f"text.source: {config.source!r} is {kind} ({reason}).{near(path)}") from error
    if rows.column_names is not None:  # a stream may learn them only from its rows
        rows = rows.select_columns([top_of(config.column, rows.column_names, name)])
    for number, row in enumerate(rows):
        yield f"{name}:{number}", pick(row, config.column, name)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_DATASET)


def _document(value: Any, config: TextConfig, where: str, counts: Counter[str]) -> Document | None:
    """Returns a cell as a document, None if it is no text; ConfigError if it is nothing that can be one."""
    value = as_chat(value)
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")  # an invalid byte becomes a surrogate, for now
    if isinstance(value, str):
        return repaired(value, counts)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        counts.update(f"role {role}" for role in {message.get("role") for message in value})
        try:
            return _mapped(value, counts)
        except _NoText:
            return None
    if isinstance(value, list) and all(type(number) is int for number in value):
        return value
    kind = type(value).__name__
    kind += f" of {type(value[0]).__name__}" if isinstance(value, list) else ""
    raise ConfigError(f"text.column: {config.column!r} holds a {kind} in {where}, not text, token ids or a chat")


class _NoText(Exception):
    """A part of a chat is no text."""


def _mapped(value: Any, counts: Counter[str]) -> Any:
    """Returns nested messages with every text repaired, without the empty keys that tables give to every record."""
    if isinstance(value, dict):
        return {key: _mapped(part, counts) for key, part in value.items() if part is not None or key == "content"}
    if isinstance(value, list):
        return [_mapped(part, counts) for part in value]
    if isinstance(value, str) and (value := repaired(value, counts)) is None:
        raise _NoText
    return value


def _first_damaged(config: TextConfig) -> str:
    """Says which document is damaged first, and what to do about its file."""
    path, counts = Path(config.source).expanduser(), Counter[str]()
    for document_id, value in _source(config):
        if value is not None:
            _document(value, config, document_id, counts)
        if counts["damaged_characters"]:
            files = local_files(path) if path.exists() and not _is_saved_dataset(path) else []
            name = document_id.rpartition(":")[0] or document_id
            file = next((f for f in files if name in (f.name, f.relative_to(path).as_posix())), None)
            hint = _hint(file, config) if file else ""
            return f", the first in {document_id}; {hint or AS_STORED}"
    return ""


def _hint(file: Path, config: TextConfig) -> str:
    return "" if kind_of(file) in TABLES else what_it_may_be(file, config.encoding)


def _check_encoding(encoding: str | None) -> None:
    try:
        if encoding is None or "a".encode(encoding).decode(encoding) == "a":
            return
    except (LookupError, UnicodeError):  # none of that name, or none of text
        pass
    names = {name.replace("_", "-") for pair in encodings.aliases.aliases.items() for name in pair}
    raise ConfigError(
        f"text.encoding: {encoding!r} is no encoding of text, such as utf-8, utf-16, latin-1 or cp1252."
        f"{nearest(encoding or '', sorted(names))}"
    )
