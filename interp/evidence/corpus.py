"""Text -> rows of one section each: what evidence is gathered on, split so that no text is both explained and tested.

A document is cut into rows of the coder's context length. Up to eight rows of it are one *section*; a longer document
gives several, with a row left out between two of them. A section lies wholly in the explain (40 %), the valid (20 %) or
the test part (40 %), by a hash of its name. Rows that repeat what another part says are dropped. A text without
documents (one text file) is one long document, so its split is one by blocks and labeled so.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt
from torch import Tensor

from interp.records import SPLITS
from sae.base.errors import ConfigError
from sae.base.files import cache_dir, made_once
from sae.base.progress import UNWATCHED, Watch
from sae.base.seeding import uniform
from sae.base.store import Shards, ShardWriter, fingerprint_key
from sae.text.documents import Document, TextConfig, check_met, documents
from sae.text.packing import PADDING, added, room, same, token_ids
from sae.text.readers import kind_of
from sae.text.tokenizing import PIECE_CHARS, SHARD_TOKENS, encode_texts, piece_end, rows_made_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 3  # raise it whenever the same text would become other rows, another split or another file
SECTION_ROWS = 8
SHARES = (0.4, 0.2, 0.4)
FEW_SECTIONS = 50  # so few are dealt out by rank: chance might leave a part empty
SHINGLE_TOKENS = 8
SHINGLE_SAMPLE = 4  # one shingle in four is looked at, which ones by their hash
SHINGLED_TOKENS = 2**26  # of a longer text, shingles are compared in several rounds, each with a share of the hashes
REPEATED = 0.5  # a row that has this share of its shingles in another part repeats it
DROPPED = -1
BATCH_DOCUMENTS = 256
TOKENS, INDEX = "tokens", "rows"  # folders: all tokens; what is known of every row


class Corpus:
    """Rows of one section each, padded behind, with the part they belong to.

    Attributes, one value a row: `document` and `section` (int32), `split` (int8: a place in `interp.records.SPLITS`),
    `length` (int32, tokens up to the end of the text) and `name` (int64, a hash of document and place, the same on
    every machine).
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.shards = Shards(folder / TOKENS, TOKENS, fingerprint)
        index = Shards(folder / INDEX, INDEX, fingerprint).read(0)
        self.document, self.section, self.split, self.length, self.name = (
            index[key].numpy() for key in ("document", "section", "split", "length", "name")
        )
        self.meta: dict[str, Any] = self.shards.meta
        self.context_length: int = self.meta["context_length"]
        self.first: int = self.meta["first"]
        """Place of the first token of the text in a row: behind BOS, if there is one."""
        self.behind: int = self.meta.get("behind", 0)
        """Tokens that stand behind the text of a row, such as [SEP]."""
        self.key = folder.name
        self.content = fingerprint_key({k: v for k, v in fingerprint.items() if k not in ("model", "revision")})
        """As `key`, whatever the model is called whose tokenizer it is."""
        self._ends = np.cumsum([entry["tensors"]["tokens"][1][0] for entry in self.shards.entries.values()])
        self._open: dict[int, Tensor] = {}

    @property
    def n_rows(self) -> int:
        """Returns the number of rows, dropped ones included."""
        return len(self.section)

    @property
    def n_tokens(self) -> int:
        """Returns the number of tokens of the text in rows that are kept."""
        return int((self.length[self.split != DROPPED] - self.first).sum())

    @cached_property
    def kept(self) -> Int[np.ndarray, "rows"]:
        """Returns the rows in use, longest first, so that rows of a pass have about the same length."""
        rows = np.flatnonzero(self.split != DROPPED)
        return rows[np.argsort(-self.length[rows], kind="stable")]

    def tokens(self, rows: Int[np.ndarray, "rows"] | list[int]) -> Int[Tensor, "rows longest"]:
        """Returns tokens, int32 (see `sae.text.packing`), as wide as the longest of these rows, padded behind."""
        rows = np.asarray(rows, dtype=np.int64)
        width = int(self.length[rows].max(initial=1)) + self.behind
        out = torch.full((len(rows), width), PADDING, dtype=torch.int32)
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            stored, start = self._shard(shard)
            out[here] = stored[rows[here] - start][:, : out.shape[1]]
        return out

    def span(self, position: int, n: int) -> list[int]:
        """Returns the ids of the n tokens from a position in the corpus on, all of one row."""
        row, place = divmod(position, self.context_length)
        stored, start = self._shard(int(np.searchsorted(self._ends, row, side="right")))
        return token_ids(stored[row - start, place : place + n]).tolist()

    def _shard(self, number: int) -> tuple[Int[Tensor, "rows context"], int]:
        """The rows of a shard, and the number of the first."""
        if number not in self._open:
            self._open[number] = self.shards.read(number)["tokens"]
        return self._open[number], int(self._ends[number - 1]) if number else 0


class Source(NamedTuple):
    """Text in tokens, cut into rows."""

    name: str
    """What to call it in an error."""
    fingerprint: dict[str, Any]
    context_length: int
    before: list[int]
    """What every row begins with, beside its own tokens."""
    behind: list[int]
    """What stands behind them."""
    rows: Callable[[], Iterator[tuple[str, int, Int[np.ndarray, "_n"]]]]
    """Gives (document, number of the row in it, its own tokens)."""
    met: Callable[[], dict[str, int]] = dict
    """Gives what was counted of documents on the way; ConfigError if too much is damaged."""


def corpus_of_text(
    text: TextConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: dict[str, Any],
    tokens: int,
    watch: Watch = UNWATCHED,
) -> Corpus:
    """Returns the first `tokens` tokens of a text as rows with their split, made now or read from the cache.

    `fingerprint` says whose tokenizer it is. Raises ConfigError if there is too little text for three parts.
    """
    before, behind = added(tokenizer, text.bos)
    body, counts = room(text.context_length, before, behind), Counter[str]()

    def met() -> dict[str, int]:
        check_met(text, counts)
        return counts

    source = Source(
        f"text.source: {text.source}",
        {**fingerprint, **rows_made_from(text, tokenizer)},
        text.context_length,
        before,
        behind,
        lambda: _rows(text, tokenizer, body, counts),
        met,
    )
    return split_rows(source, tokens, watch)


def split_rows(source: Source, tokens: int, watch: Watch = UNWATCHED) -> Corpus:
    """Returns the rows of a source with their split; see `corpus_of_text`."""
    full = {**source.fingerprint, "tokens": tokens, "version": VERSION}
    folder = cache_dir() / "corpora" / fingerprint_key(full)
    made_once(folder, lambda draft: _fill(draft, full, source, tokens, watch), watch)
    return Corpus(folder, full)


def _fill(folder: Path, fingerprint: dict[str, Any], source: Source, tokens: int, watch: Watch) -> None:
    """Writes a corpus into a folder: the tokens, and what is known of every row."""
    taken = _take(folder, fingerprint, source, tokens, watch)
    section, split = np.array(taken.sections, np.int32), _parts(taken.names)[taken.sections]
    shards = Shards(folder / TOKENS, TOKENS, fingerprint)
    tables = [shards.read(number)["tokens"].numpy() for number in range(len(shards))]
    split[_repeating(tables, split, len(source.before))] = DROPPED
    empty = [name for number, name in enumerate(SPLITS) if not (split == number).any()]
    if empty:
        raise ConfigError(
            f"{source.name} repeats itself: all that {' and '.join(empty)} would get is said again in "
            "another part; give other text, or more of it"
        )
    place = np.arange(len(section)) - np.searchsorted(section, section)  # the row's place in its section
    hashes = np.array([int(uniform("section", name) * 2**63) for name in taken.names], np.int64)
    index = {
        "document": np.cumsum([name.endswith("#0") for name in taken.names], dtype=np.int32)[section] - 1,
        "section": section,
        "split": split,
        "length": np.array(taken.lengths, np.int32),
        "name": hashes[section] + place.astype(np.int64),
    }
    writer = ShardWriter(folder / INDEX, INDEX, fingerprint)
    writer.write(0, {key: torch.from_numpy(value) for key, value in index.items()})
    writer.finish({})


class _Taken(NamedTuple):
    """What is known of the rows that were written."""

    sections: list[int]
    """By row, which of the sections it lies in."""
    lengths: list[int]
    names: list[str]
    """Of sections."""


def _take(folder: Path, fingerprint: dict[str, Any], source: Source, tokens: int, watch: Watch) -> _Taken:
    """Writes the first tokens of a source shard by shard; ConfigError if they are fewer sections than parts."""
    writer = ShardWriter(folder / TOKENS, TOKENS, fingerprint)
    per_shard, n_tokens = max(1, SHARD_TOKENS // source.context_length), 0
    taken, rows = _Taken([], [], []), list[np.ndarray]()

    def flush(least: int) -> None:
        while len(rows) >= least:
            writer.write(len(writer.done), {"tokens": torch.from_numpy(np.stack(rows[:per_shard]))})
            del rows[:per_shard]

    with watch.stage("text", tokens, "tokens") as progress:
        for name, number, ids in source.rows():
            if number % (SECTION_ROWS + 1) == SECTION_ROWS:
                continue  # left out between two sections
            section = f"{name}#{number // (SECTION_ROWS + 1)}"
            if taken.names[-1:] != [section]:
                taken.names.append(section)
            row = np.full(source.context_length, PADDING, np.int32)
            start = [] if same(ids[: len(source.before)], source.before) else source.before  # a chat may bring its own
            filled = [*start, *ids.tolist()]
            row[: len(filled) + len(source.behind)] = [*filled, *source.behind]
            rows.append(row)
            taken.sections.append(len(taken.names) - 1)
            taken.lengths.append(len(filled))
            n_tokens += len(ids)
            flush(per_shard)
            if len(taken.lengths) % 64 == 0:
                progress.update(n_tokens)
                watch.poll("while tokenizing")
            if n_tokens >= tokens:
                break
    met = source.met()
    flush(1)
    if len(taken.names) < len(SPLITS):
        raise ConfigError(
            f"{source.name} gives {len(taken.names)} sections of text ({n_tokens:,} tokens); at least "
            f"{len(SPLITS)} are needed, one to explain from, one to choose by, one to test on"
        )
    documents = sum(name.endswith("#0") for name in taken.names)
    around = {"first": len(source.before), "behind": len(source.behind)}
    meta = {"context_length": source.context_length, **around, **met, "documents": documents}
    split_by = "blocks" if documents == 1 else "document"
    writer.finish(meta | {"sections": len(taken.names), "split_by": split_by})
    return taken


def _is_one_text(text: TextConfig) -> bool:
    path = Path(text.source).expanduser()
    return path.is_file() and kind_of(path) == ".txt"


def _rows(
    text: TextConfig, tokenizer: "PreTrainedTokenizerBase", body: int, met: Counter[str]
) -> Iterator[tuple[str, int, Int[np.ndarray, "_n"]]]:
    """Yields (document, number of the row in it, its own tokens). A text is never held whole."""
    source = documents(text, met)
    if _is_one_text(text):
        source = ((Path(text.source).name, piece) for _, piece in source)
    pieces = ((name, part) for name, whole in source for part in _cut(whole))
    for name, group in groupby(_encoded(pieces, tokenizer, text.roles), key=lambda piece: piece[0]):
        left, number = np.zeros(0, np.int64), 0
        for _, ids in group:
            left = np.concatenate([left, ids])
            while len(left) >= body:
                yield name, number, left[:body]
                left, number = left[body:], number + 1
        met["skipped"] += not number and not len(left)
        if len(left):
            yield name, number, left


def _cut(whole: Document) -> Iterator[Document]:
    """Yields a document in pieces that are tokenized in one go."""
    if not isinstance(whole, str):
        yield whole
        return
    start = 0
    while start < len(whole):
        stop = piece_end(whole, start, PIECE_CHARS)
        yield whole[start:stop]
        start = stop


def _encoded(
    pieces: Iterator[tuple[str, Document]], tokenizer: "PreTrainedTokenizerBase", roles: tuple[str, ...]
) -> Iterator[tuple[str, Int[np.ndarray, "_n"]]]:
    batch: list[tuple[str, Document]] = []
    size = 0

    def encoded() -> Iterator[tuple[str, Int[np.ndarray, "_n"]]]:
        return zip((name for name, _ in batch), encode_texts(tokenizer, [t for _, t in batch], roles), strict=True)

    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if len(batch) >= BATCH_DOCUMENTS or size >= PIECE_CHARS:
            yield from encoded()
            batch, size = [], 0
    if batch:
        yield from encoded()


def _parts(names: list[str]) -> Int[np.ndarray, "sections"]:
    """Returns the part of every section: by its hash, or by the rank of its hash where there are few."""
    n, draws = len(names), np.array([uniform("split", name) for name in names])
    bounds = np.cumsum(SHARES)[:-1]
    if n < FEW_SECTIONS:
        draws = draws.argsort().argsort()
        valid = round(SHARES[1] * n)
        bounds = np.array([(n - valid) // 2, (n - valid) // 2 + valid])
    return np.searchsorted(bounds, draws, side="right").astype(np.int8)


def _repeating(
    shards: list[Int[np.ndarray, "_rows context"]], split: Int[np.ndarray, "rows"], first: int
) -> Int[np.ndarray, "repeating"]:
    """Returns the rows of explain that repeat valid or test, and those of valid that repeat test.

    Rows are compared by their shingles, runs of eight tokens, of which those whose hash is divisible by four are kept.
    A row too short for one counts as a shingle of its own.
    """
    counts, shared = np.zeros(len(split)), np.zeros(len(split))
    rounds = 1 + sum(tokens.size for tokens in shards) // SHINGLED_TOKENS
    for number in range(rounds):
        hashes, owners, start = [], [], 0
        for tokens in shards:
            found, rows = _shingles(tokens[:, first:])
            mine = (found >> np.uint64(40)) % np.uint64(rounds) == number
            hashes.append(found[mine])
            owners.append(rows[mine] + start)
            start += len(tokens)
        row = np.concatenate(owners)
        _, shingle = np.unique(np.concatenate(hashes), return_inverse=True)
        bits = np.zeros(shingle.max(initial=0) + 1, np.uint8)
        np.bitwise_or.at(bits, shingle, (1 << split[row].astype(np.uint8)).astype(np.uint8))
        later = np.array([0b110, 0b100, 0b000], np.uint8)[split[row]]  # the parts that keep theirs
        counts += np.bincount(row, minlength=len(split))
        shared += np.bincount(row, weights=(bits[shingle] & later) != 0, minlength=len(split))
    return np.flatnonzero((shared >= REPEATED * counts) & (shared > 0))


def _shingles(tokens: Int[np.ndarray, "rows n"]) -> tuple[UInt[np.ndarray, "found"], Int[np.ndarray, "found"]]:
    ids = (tokens.astype(np.int64) + 2).astype(np.uint64)
    width = min(SHINGLE_TOKENS, ids.shape[1])
    size = ids.shape[1] - width + 1
    rolled = np.zeros((len(ids), size), np.uint64)
    for i in range(width):
        rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + ids[:, i : i + size]
    rolled ^= rolled >> np.uint64(29)
    rolled *= np.uint64(0xBF58476D1CE4E5B9)
    rolled ^= rolled >> np.uint64(32)
    whole = tokens[:, width - 1 :] != PADDING
    kept = whole & (rolled % np.uint64(SHINGLE_SAMPLE) == 0)
    short = ~kept.any(1)  # nothing to go by: its beginning stands for it
    kept[short, 0] = True
    rows, places = kept.nonzero()
    return rolled[rows, places], rows
