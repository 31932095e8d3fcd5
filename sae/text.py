"""Text -> token rows, made once: sources, tokenization, packing, the BOS policy, and the held-out split by document.

Every token remembers its document, and a document lies wholly in the train or in the held-out part. Rows are reused
exactly if everything they depend on is the same (model, revision, tokenizer, data, settings), never because a folder is
there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import ConfigError, Stopped, nearest
from sae.files import cache_dir, sha256_file
from sae.packing import Packer
from sae.seeding import uniform
from sae.settings import at_least, choose
from sae.store import Shards, ShardWriter, fingerprint_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
SHARD_TOKENS = 2**22
BATCH_DOCUMENTS = 64
PIECE_CHARS = 100_000  # a longer document is tokenized in pieces cut at a space, so that memory stays bounded
PARTS = ("train", "held_out")


@dataclass(frozen=True)
class TextConfig:
    """The text whose activations are read."""

    source: str = "quickstart"
    """quickstart (documentation on this machine), a txt/jsonl/parquet/arrow file, a folder of them, or a hub id."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
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
    """Stop after so many training tokens."""
    held_out_share: float = 0.05
    """Share of documents kept from training, chosen by a hash of their id."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("text.layout", self.layout, ("packed", "one_per_row"))
        choose("text.bos", self.bos, ("row", "document", "none"))
        at_least("text.context_length", self.context_length, 2)
        if self.max_tokens is not None:
            at_least("text.max_tokens", self.max_tokens, 1)
        if not 0 < self.held_out_share < 1:
            raise ConfigError(f"text.held_out_share: {self.held_out_share} is not between 0 and 1")
        path = Path(self.source).expanduser()
        looks_local = path.is_absolute() or self.source.startswith((".", "~")) or path.suffix in SUFFIXES
        if looks_local and not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ConfigError(f"text.source: no such file or folder: {self.source}.{nearest(path.name, siblings)}")


class TokenRows:
    """One part of a tokenized text: n_rows rows of context_length tokens, read from memory-mapped shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.context_length: int = shards.meta["context_length"]
        self.sizes = [shards.entries[i]["tensors"]["tokens"][1][0] for i in range(len(shards))]
        self.n_rows = sum(self.sizes)
        self._ends = torch.tensor(self.sizes).cumsum(0)
        self._open: dict[int, dict[str, Tensor]] = {}

    def tokens(self, rows: Int[Tensor, "rows"]) -> Int[Tensor, "rows context"]:
        """Returns token ids, int32."""
        return self._gather("tokens", rows)

    def documents(self, rows: Int[Tensor, "rows"]) -> Int[Tensor, "rows context"]:
        """Returns the running number of every token's document, -1 on padding."""
        return self._gather("documents", rows)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), self.context_length, dtype=torch.int32)
        for place, row in enumerate(rows.tolist()):
            shard = int(torch.searchsorted(self._ends, row, right=True))
            if shard not in self._open:
                self._open[shard] = self.shards.read(shard)
            out[place] = self._open[shard][name][row - int(self._ends[shard]) + self.sizes[shard]]
        return out


@dataclass(frozen=True)
class TokenizedText:
    """Both parts of a text and what was met on the way."""

    train: TokenRows
    held_out: TokenRows
    meta: dict[str, Any]
    """Counts of documents, tokens, empty and repaired ones; whether the held-out part is by "document" or by "rows"."""
    key: str
    """Names the text in fingerprints of what is computed from it."""


def documents(config: TextConfig, counts: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (document id, text). A text file is one document, as is a row of the other kinds.

    Empty and null texts are skipped, invalid UTF-8 is replaced; both are counted. ConfigError if the column is missing
    (listing those there are) or the source cannot be read or holds nothing.
    """
    counts = Counter() if counts is None else counts
    path = Path(config.source).expanduser()
    if config.source == "quickstart":
        from sae import quickstart

        found = quickstart.documents()
    elif path.exists():
        found = _local(path, config, counts)
    else:
        found = _hub(config)
    for document_id, text in found:
        if not isinstance(text, str) or not text.strip():
            counts["empty"] += 1
            continue
        counts["documents"] += 1
        yield document_id, text
    if not counts["documents"]:
        raise ConfigError(f"text.source: {config.source} holds no text ({counts['empty']} empty documents)")


def _local(path: Path, config: TextConfig, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    for file in local_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if file.suffix == ".txt":
            raw = file.read_bytes()
            text = raw.decode("utf-8", errors="replace")
            counts["invalid_utf8"] += int("�" in text and b"\xef\xbf\xbd" not in raw)
            yield name, text
            continue
        rows = _json_rows(file, counts) if file.suffix == ".jsonl" else _table_rows(file, config)
        for number, row in enumerate(rows):
            yield f"{name}:{number}", _cell(row, config.column, name)


def local_files(path: Path) -> list[Path]:
    """Returns the readable files of a folder in a fixed order, or the file itself; ConfigError if there are none."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"text.source: {path.name} is not one of {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise ConfigError(f"text.source: the folder {path} holds no {', '.join(SUFFIXES)} file")
    return found


def _json_rows(file: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            counts["invalid_utf8"] += int("�" in line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"text.source: {file.name} line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f"text.source: {file.name} line {number} is a {type(row).__name__}, not an object")
            yield row


def _table_rows(file: Path, config: TextConfig) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                _cell(dict.fromkeys(table.schema_arrow.names), config.column, file.name)
                yield from table.iter_batches(columns=[config.column])
        else:
            with pa.memory_map(str(file)) as source:
                yield from pa.ipc.open_stream(source)

    try:
        for batch in batches():
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ConfigError(f"text.source: {file.name} cannot be read ({' '.join(str(error).split())})") from error


def _hub(config: TextConfig) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            config.source, config.name, split=config.split, streaming=config.streaming, revision=config.revision
        )
    except Exception as error:  # whatever the hub client raises becomes one line with the way out
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"text.source: {config.source!r} is no local path and could not be loaded as a data set: {reason}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{config.source}:{number}", _cell(row, config.column, config.source)  # type: ignore[arg-type]


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ConfigError(
            f"text.column: {where} has no column {column!r}.{nearest(column, row)} It has: {', '.join(row)}"
        )
    return row[column]


def tokenize(
    config: TextConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: dict[str, Any],
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda n: None,
) -> TokenizedText:
    """Returns the rows of a text, tokenized now or read from the cache below `cache_dir()/tokens`.

    `fingerprint` says which model and tokenizer. Strings that look like special tokens are tokenized as plain text.
    Raises ConfigError if there is less text than one row; Stopped, with nothing kept, if asked to stop.
    """
    full = {**fingerprint, "text": {**asdict(config), "source": _identity(config)}, "version": 1}
    key = fingerprint_key(full)
    folder = cache_dir() / "tokens" / key
    stores = {part: folder / part for part in PARTS}
    if not all((store / "meta.json").exists() for store in stores.values()):
        _fill(stores, full, config, tokenizer, should_stop, progress)
    parts = {part: TokenRows(Shards(store, "tokens", full)) for part, store in stores.items()}
    return TokenizedText(parts["train"], parts["held_out"], parts["train"].shards.meta, key)


def _fill(
    stores: dict[str, Path],
    fingerprint: dict[str, Any],
    config: TextConfig,
    tokenizer: "PreTrainedTokenizerBase",
    should_stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> None:
    packers = {part: Packer(config.context_length, config.layout, config.bos, tokenizer) for part in PARTS}
    writers = {part: ShardWriter(store, "tokens", fingerprint) for part, store in stores.items()}
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def flush(part: str, all_of_it: bool) -> None:
        per_shard = max(1, SHARD_TOKENS // config.context_length)
        while len(packers[part].rows) >= (1 if all_of_it else per_shard):
            writers[part].write(sizes[part], packers[part].take(per_shard))
            sizes[part] += 1

    for number, (held_out, pieces) in enumerate(_tokenized(config, tokenizer, counts)):
        if should_stop():
            raise Stopped("while tokenizing; run again to start it over")
        part = PARTS[held_out]
        packers[part].add(pieces, number)
        counts[f"{part}_tokens"] += sum(map(len, pieces))
        flush(part, all_of_it=False)
        progress(counts["train_tokens"] + counts["held_out_tokens"])
        if config.max_tokens and counts["train_tokens"] >= config.max_tokens and counts["held_out_tokens"]:
            break
    train, held_out = packers["train"], packers["held_out"]
    by = "document"
    if not held_out.n_rows and not held_out.finish():
        by = "rows"  # one document, or very few: its last rows are kept back instead
        moved = min(max(1, round(config.held_out_share * len(train.rows))), max(0, len(train.rows) - 1))
        held_out.rows, held_out.numbers = (
            train.rows[len(train.rows) - moved :],
            train.numbers[len(train.rows) - moved :],
        )
        del train.rows[len(train.rows) - moved :], train.numbers[len(train.numbers) - moved :]
    if not (train.n_rows or len(train.rows)) or not (held_out.n_rows or len(held_out.rows)):
        raise ConfigError(
            f"text.source: {config.source} has {counts['train_tokens'] + counts['held_out_tokens']} tokens in "
            f"{counts['documents']} documents; two rows of text.context_length = {config.context_length} are needed"
        )
    for part in PARTS:
        flush(part, all_of_it=True)
        meta = {**counts, "context_length": config.context_length, "held_out_by": by, "bos_id": packers[part].bos}
        writers[part].finish(meta)


def _tokenized(
    config: TextConfig, tokenizer: "PreTrainedTokenizerBase", counts: Counter[str]
) -> Iterator[tuple[bool, list[list[int]]]]:
    """Yields (held out?, token ids in pieces) of every document."""
    batch: list[tuple[str, str]] = []

    def encoded() -> Iterator[tuple[bool, list[list[int]]]]:
        pieces = [_pieces(text) for _, text in batch]
        flat = [piece for group in pieces for piece in group]
        ids = tokenizer(flat, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        place = 0
        for (document_id, _), group in zip(batch, pieces, strict=True):
            yield is_held_out(document_id, config.held_out_share), ids[place : place + len(group)]  # type: ignore[misc]
            place += len(group)

    for document in documents(config, counts):
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            yield from encoded()
            batch = []
    if batch:
        yield from encoded()


def _pieces(text: str) -> list[str]:
    pieces = []
    while len(text) > PIECE_CHARS:
        cut = text.rfind(" ", 1, PIECE_CHARS)
        cut = PIECE_CHARS if cut < 1 else cut
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def is_held_out(document_id: str, share: float) -> bool:
    """Returns whether a document belongs to the held-out part; a larger share contains the smaller one."""
    return uniform("held-out", document_id) < share


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Returns the ids that never count: BOS, EOS, PAD and every added token flagged special (chat control)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _identity(config: TextConfig) -> Any:
    """Returns what the data are: names and checksums of local files, versions for quickstart, id and revision else."""
    path = Path(config.source).expanduser()
    if config.source == "quickstart":
        from sae import quickstart

        return {"quickstart": quickstart.fingerprint()}
    if path.exists():
        return {p.relative_to(path).as_posix() if path.is_dir() else p.name: sha256_file(p) for p in local_files(path)}
    return {"hub": config.source, "revision": config.revision}
