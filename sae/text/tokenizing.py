"""Text -> token rows, made once: tokenization, the BOS policy, and the held-out split by document.

Every token remembers its document, and a document lies wholly in the train or in the held-out part. Rows are reused
exactly if everything they depend on is the same (model, revision, tokenizer, data, settings), never because a folder is
there: the folder's name is a hash of all that, and it takes its name only when it is whole.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae.base.arguments import wrong
from sae.base.errors import ConfigError
from sae.base.files import cache_dir, made_once
from sae.base.progress import UNWATCHED, Watch
from sae.base.seeding import uniform
from sae.base.store import Shards, ShardWriter, fingerprint_key
from sae.text.chats import chat_tokens
from sae.text.documents import Document, TextConfig, check_met, data_identity, documents
from sae.text.packing import Packer, added

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 2  # raise it whenever the same text would become other rows
SHARD_TOKENS = 2**22
BATCH_CHARS = 2**18  # tokenized in one call, between two looks at the stop flag
PIECE_CHARS = 100_000  # a longer document is tokenized in pieces cut at a space, so that memory stays bounded
CHARS_PER_TOKEN = 100  # of a document that fills one row only, no more than this times context_length is looked at
FEW_DOCUMENTS = 64  # so few may all fall into one part by chance
PARTS = ("train", "held_out")


class TokenRows:
    """One part of a tokenized text: n_rows rows of context_length tokens, read from memory-mapped shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.context_length: int = shards.meta["context_length"]
        self.sizes = [shards.entries[i]["tensors"]["tokens"][1][0] for i in range(len(shards))]
        self.n_rows = sum(self.sizes)
        self._ends = torch.tensor(self.sizes).cumsum(0)
        self._open: dict[int, dict[str, Tensor]] = {}

    def tokens(self, rows: Int[Tensor, "rows"] | list[int]) -> Int[Tensor, "rows context"]:
        """Returns token ids, int32, with `sae.text.packing.PADDING` where a row is longer than its text."""
        return self._gather("tokens", rows)

    def documents(self, rows: Int[Tensor, "rows"] | list[int]) -> Int[Tensor, "rows context"]:
        """Returns the running number of every token's document, int32, with -1 on padding."""
        return self._gather("documents", rows)

    def _gather(self, name: str, rows: Tensor | list[int]) -> Tensor:
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_rows:
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())}: there are {self.n_rows}")
        out = torch.empty(len(rows), self.context_length, dtype=torch.int32)
        shards = torch.searchsorted(self._ends, rows, right=True)
        for shard in shards.unique().tolist():
            if shard not in self._open:
                self._open[shard] = self.shards.read(shard)
            here = shards == shard
            out[here] = self._open[shard][name][rows[here] - self._ends[shard] + self.sizes[shard]]
        return out


@dataclass(frozen=True)
class GivenRows:
    """Rows that lie in memory."""

    ids: Int[Tensor, "rows context"]

    @property
    def n_rows(self) -> int:
        """Returns how many rows there are."""
        return len(self.ids)

    @property
    def context_length(self) -> int:
        """Returns their length."""
        return self.ids.shape[1]

    def tokens(self, rows: Int[Tensor, "n"]) -> Int[Tensor, "n context"]:
        """Returns the chosen rows."""
        return self.ids[rows]


def as_rows(rows: Any) -> Any:
    """Returns rows of a store as they are, and a tensor, array or list of token ids [rows, context] as rows."""
    if hasattr(rows, "n_rows"):
        return rows
    try:
        ids = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):  # text, objects, lists of unequal lengths
        ids = torch.zeros(0)
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise wrong("rows", rows, "rows of a store of tokens, or token ids [rows, context]")
    return GivenRows(ids.cpu())


@dataclass(frozen=True)
class TokenizedText:
    """Both parts of a text and what was met on the way."""

    train: TokenRows
    held_out: TokenRows
    meta: dict[str, Any]
    """Counts of documents, tokens, empty and repaired ones; whether the held-out part is by "document" or by "rows"."""
    key: str
    """Names the text in fingerprints of what is computed from it."""


def tokenize(
    config: TextConfig, tokenizer: "PreTrainedTokenizerBase", fingerprint: dict[str, Any], watch: Watch = UNWATCHED
) -> TokenizedText:
    """Returns the rows of a text, tokenized now or read from the cache below `cache_dir()/tokens`.

    Strings that look like special tokens are tokenized as plain text. A text of one document gives up its end as the
    held-out part (`meta["held_out_by"]` is then "rows"); of a few documents at least one goes to each part.

    Args:
        config: which text, and how it becomes rows.
        tokenizer: any tokenizer of transformers; it may lack BOS, EOS and PAD.
        fingerprint: which model it belongs to: whatever else must be equal for rows to be reused.
        watch: polled between batches; where it is stopped, nothing is kept.

    Raises ConfigError if the text gives no row, or none to hold out; DataError if the cached rows are damaged.
    """
    config.validate()
    full = {**fingerprint, **rows_made_from(config, tokenizer), "version": VERSION}
    key = fingerprint_key(full)
    folder = cache_dir() / "tokens" / key
    made_once(folder, lambda draft: _fill(draft, full, config, tokenizer, watch), watch)
    parts = {part: TokenRows(Shards(folder / part, f"tokens/{part}", full)) for part in PARTS}
    return TokenizedText(parts["train"], parts["held_out"], parts["train"].shards.meta, key)


def rows_made_from(config: TextConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Returns what token rows of a text depend on beside the model: settings, data and tokenizer, for a fingerprint."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("source", "streaming")}
    for name in ("encoding", "roles"):  # where they are not used, rows are those of before there were any
        if not settings[name]:
            del settings[name]
    before, behind = added(tokenizer, config.bos)
    around = {"added": [before, behind]} if behind or before not in ([], [tokenizer.bos_token_id]) else {}
    return {"tokenizer": tokenizer_digest(tokenizer), "text": settings, "data": data_identity(config), **around}


def what_was_met(meta: dict[str, Any]) -> str:
    """Returns how many documents were read, and how many of them were empty, no text, or damaged, in words."""
    names = {"empty": "empty", "skipped": "no text", "damaged": "damaged"}
    met = ", ".join(f"{meta[key]:,} {name}" for key, name in names.items() if meta.get(key))
    return f"from {meta['documents']:,} documents" + (f" ({met})" if met else "")


def is_held_out(document_id: str, share: float) -> bool:
    """Returns whether a document belongs to the held-out part; a larger share contains the smaller one."""
    return uniform("held-out", document_id) < share


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Returns the ids that never count: BOS, EOS, PAD and every added token flagged special (chat control)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _fill(
    folder: Path, fingerprint: dict[str, Any], config: TextConfig, tokenizer: "PreTrainedTokenizerBase", watch: Watch
) -> None:
    packers = {part: Packer(config.context_length, config.layout, config.bos, tokenizer) for part in PARTS}
    writers = {part: ShardWriter(folder / part, f"tokens/{part}", fingerprint) for part in PARTS}
    per_shard = max(1, SHARD_TOKENS // config.context_length)
    counts: Counter[str] = Counter()

    def flush(part: str, least: int) -> None:
        while packers[part].n_ready >= least:
            writers[part].write(len(writers[part].done), packers[part].take(per_shard))

    with watch.stage("tokenizing", config.max_tokens, "tokens") as progress:
        for batch in _batches(_assigned(config, counts)):
            watch.poll("while tokenizing")
            for piece, ids in zip(
                batch, encode_texts(tokenizer, [piece.text for piece in batch], config.roles), strict=True
            ):
                left = _left(config, counts) if piece.part == "train" else sys.maxsize
                counts["skipped"] += not len(ids) and piece.first and piece.last
                if left > 0:
                    last = piece.last or len(ids) >= left
                    used = packers[piece.part].add(ids[:left], piece.document, piece.first, last)
                    counts[f"{piece.part}_tokens"] += used
                    flush(piece.part, per_shard)
            progress.update(counts["train_tokens"])
            if _left(config, counts) <= 0 and counts["held_out_tokens"]:
                break
    check_met(config, counts)
    for part, packer in packers.items():
        packer.finish(pad=part == "held_out")
        if not packer.n_rows:
            raise ConfigError(_too_short(part, config, counts))
        flush(part, 1)
    by = "rows" if counts["documents"] == 1 else "document"
    meta = {**counts, "context_length": config.context_length, "held_out_by": by}
    for part, packer in packers.items():
        writers[part].finish({**meta, "n_rows": packer.n_rows, "bos": packer.before, "eos": packer.end})


def _left(config: TextConfig, counts: Counter[str]) -> int:
    """How many train tokens are still wanted."""
    return sys.maxsize if config.max_tokens is None else config.max_tokens - counts["train_tokens"]


@dataclass(frozen=True)
class _Piece:
    """A part of a document short enough to be tokenized in one go."""

    text: Document
    document: int
    part: str
    first: bool
    last: bool


def _assigned(config: TextConfig, counts: Counter[str]) -> Iterator[_Piece]:
    """Yields all documents in pieces, each with its number and its part."""
    source = documents(config, counts)
    few = list(islice(source, FEW_DOCUMENTS))
    if len(few) == 1:
        text = few[0][1]
        end = round(len(text) * (1 - config.held_out_share))
        end = piece_end(text, 0, end) if isinstance(text, str) else end
        head, tail = text[:end], text[end:]
        yield from _pieces(head, 0, "train", config)
        yield from _pieces(tail, 0, "held_out", config)
        return
    share = config.held_out_share
    if len(few) < FEW_DOCUMENTS:  # these are all: move the boundary between two of them
        drawn = sorted(uniform("held-out", document_id) for document_id, _ in few)
        n = min(max(1, sum(draw < share for draw in drawn)), len(drawn) - 1)
        share = (drawn[n - 1] + drawn[n]) / 2
    for number, (document_id, text) in enumerate(chain(few, source)):
        part = PARTS[is_held_out(document_id, share)]
        if part == "held_out" or _left(config, counts) > 0:
            yield from _pieces(text, number, part, config)


def _pieces(text: Document, document: int, part: str, config: TextConfig) -> Iterator[_Piece]:
    if not isinstance(text, str):
        yield _Piece(text, document, part, first=True, last=True)
        return
    if config.layout == "one_per_row":
        text = text[: config.context_length * CHARS_PER_TOKEN]
    stop = 0
    while stop < len(text):
        start, stop = stop, piece_end(text, stop, PIECE_CHARS)
        yield _Piece(text[start:stop], document, part, first=not start, last=stop >= len(text))


def piece_end(text: str, start: int, length: int) -> int:
    """Returns where a piece from `start` on ends: at the last space before `length` characters, if there is one."""
    if len(text) <= start + length:
        return len(text)
    space = text.rfind(" ", start + 1, start + length)
    return space if space > 0 else start + length


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", found: Sequence[Document], roles: tuple[str, ...] = ()
) -> Iterator[Int[np.ndarray, "_n"]]:
    """Yields the tokens of each document: of a text none of them special, of token ids those that they are.

    `split_special_tokens` stops a tokenizer from looking for special tokens in text; that its vocabulary spells one
    all the same, as Unigram and word vocabularies do, is why ids are looked at as well. The unknown token may stay.
    Of a chat, those outside of `roles` are context only (see `sae.text.packing`); one that spells a special token gives
    none. ConfigError if a token id is none of the tokenizer's.
    """
    options = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids", "verbose"), False)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in named else None
    special = special_ids(tokenizer)
    never = np.array([number for number in special if number != unknown], np.int64)
    texts = [text for text in found if isinstance(text, str)]
    encoded = iter(tokenizer(texts, split_special_tokens=True, **options)["input_ids"] if texts else ())
    for document in found:
        if isinstance(document, str):
            ids = np.array(next(encoded), np.int64)
            yield ids[~np.isin(ids, never)]
        elif document and isinstance(document[0], dict):
            yield chat_tokens(tokenizer, cast(Any, document), roles, special)
        else:
            yield _known(cast(Any, document), tokenizer)


def _known(document: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> Int[np.ndarray, "_n"]:
    """Returns token ids without what stands around a text, which rows get by the settings."""
    try:
        ids = np.array(document, np.int64)
    except OverflowError:
        ids = np.array(document, object)
    wrong = ids[(ids < 0) | (ids >= len(tokenizer))]
    if len(wrong):
        raise ConfigError(
            f"text.column: it holds token id {wrong[0]}; the tokenizer of {tokenizer.name_or_path or 'the model'} has "
            f"{len(tokenizer)}: these are ids of another one"
        )
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    around = [number for number in (*chain(*added(tokenizer)), *named) if number is not None]
    text = np.flatnonzero(~np.isin(ids, around))
    return ids[text[0] : text[-1] + 1] if len(text) else ids[:0]


def _too_short(part: str, config: TextConfig, counts: Counter[str]) -> str:
    where = f"{config.source} gives {counts[f'{part}_tokens']} {part} tokens from {counts['documents']} documents"
    if part == "train":
        row = f"fewer than one row of text.context_length = {config.context_length}"
        return f"text.source: {where}, {row}; give more text or make rows shorter"
    return f"text.held_out_share: {where}; raise {config.held_out_share} or give more text"


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns 16 hex digits of a hash over the tokenizer's vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = repr(sorted(tokenizer.get_vocab().items()))
    else:  # truncation and padding are state that a call leaves behind, not rules
        stored = json.loads(backend.to_str())
        rules = json.dumps({**stored, "truncation": None, "padding": None}, sort_keys=True)
    return hashlib.sha256((rules + repr(sorted(tokenizer.all_special_ids))).encode()).hexdigest()[:16]
