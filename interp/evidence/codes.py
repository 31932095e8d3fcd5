"""Where the codes of a text come from: the subject that is asked now, or a full store of what it said before.

`delphi_cache.py` has a third source, delphi's cache. Both passes over a text and the comparison of coders read any.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interp.evidence.corpus import Corpus
from interp.evidence.subject import Subject
from sae.base.errors import ConfigError, DataError
from sae.base.store import Shards, fingerprint_key
from sae.coder.coder import SparseCoder
from sae.kernels.codes import SparseLatents
from sae.lm.hooks import capture
from sae.lm.masking import norm_mask, token_mask

BLOCK_TOKENS = 4096


class Coded(NamedTuple):
    """The codes of the unmasked tokens of some rows, by the per-token rule."""

    latents: SparseLatents
    rows: Int[ndarray, "n"]
    """By token: which of the rows."""
    places: Int[ndarray, "n"]
    """By token: where in the row."""


class Codes(Protocol):
    """The codes of a corpus."""

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        ...

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus."""
        ...


class KeyedCodes(Codes, Protocol):
    """Codes that say whose they are."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what the codes depend on besides the corpus."""
        ...


class LiveCodes:
    """Codes that are computed when they are asked for."""

    def __init__(self, subject: Subject, corpus: Corpus) -> None:
        reads = subject.coder.spec.reads
        if not reads:
            raise ConfigError("coder: its spec names no site to read; set spec.reads")
        if any(site.tag for site in reads):
            raise ConfigError("coder: it reads two language models; evidence is gathered from one")
        self.subject, self.corpus = subject, corpus

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self.subject.coder.spec.d_sae

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus; DataError if a number is none."""
        return encode_rows(self.subject, self.corpus.tokens(rows))

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this coder and this language model from others."""
        coder = self.subject.coder
        weights = {name: t.reshape(-1)[:: max(1, t.numel() // 64)] for name, t in coder.state_dict().items()}
        sample = {name: [round(value, 6) for value in t.float().cpu().tolist()] for name, t in weights.items()}
        return {
            "coder": fingerprint_key({"spec": map_of(coder), "weights": sample}),
            "model": self.subject.lm.fingerprint(),
        }


def map_of(coder: SparseCoder) -> dict[str, Any]:
    """Returns what a coder's spec says of what it computes, and of where."""
    return {key: value for key, value in coder.spec.to_json().items() if key not in ("metrics", "training")}


class StoredCodes:
    """Codes that the evidence pass kept: one shard a block, in the order in which the corpus gives its blocks."""

    def __init__(self, folder: Path, corpus: Corpus, d_sae: int) -> None:
        self.d_sae, self._shards = d_sae, Shards(folder, "codes")
        self._number = np.full(corpus.n_rows, -1)
        for number, group in enumerate(row_blocks(corpus, corpus.kept)):
            self._number[group] = number

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus; IndexError for a row that is not in use."""
        numbers = self._number[rows]
        if (numbers < 0).any():
            raise IndexError(f"row {rows[numbers < 0][0]} of the text is not in use")
        blocks_there = {number: self._shards.read(number) for number in np.unique(numbers).tolist()}
        parts, places, counts = [], [], []
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            block = blocks_there[number]
            tokens = (block["row"] == row).nonzero()[:, 0]  # one after the other, as they were encoded
            first, last = (int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0)
            offsets = block["offsets"][first : last + 1]
            parts.append((offsets.diff(), *(block[name][offsets[0] : offsets[-1]] for name in ("ids", "values"))))
            places.append(block["place"][first:last])
            counts.append(last - first)
        n_codes, ids, values = (torch.cat(column) for column in zip(*parts, strict=True))
        offsets = torch.cat([n_codes.new_zeros(1), n_codes.cumsum(0)])
        latents = SparseLatents(offsets, ids.long(), values, self.d_sae)
        return Coded(latents, np.repeat(np.arange(len(counts)), counts), torch.cat(places).long().numpy())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields all blocks as they are: `row`, `place` [n], `offsets` [n + 1], `ids` (int32), `values` [nnz]."""
        for number in range(len(self._shards)):
            yield self._shards.read(number)


def block_tensors(coded: Coded, rows: Int[ndarray, "rows"]) -> dict[str, Tensor]:
    """Returns what is kept of the codes of a block: of every token its row and place, and its codes."""
    return {
        "row": torch.from_numpy(rows[coded.rows].astype(np.int32)),
        "place": torch.from_numpy(coded.places.astype(np.int32)),
        "offsets": coded.latents.offsets.cpu(),
        "ids": coded.latents.ids.to(torch.int32).cpu(),
        "values": coded.latents.values.float().cpu(),
    }


def row_blocks(corpus: Corpus, rows: Int[ndarray, "rows"]) -> list[Int[ndarray, "_some"]]:
    """Returns rows in groups of about `BLOCK_TOKENS` tokens, padding counted; rows should come longest first."""
    groups, start = [], 0
    while start < len(rows):
        stop = start + max(1, BLOCK_TOKENS // int(corpus.length[rows[start]]))
        groups.append(rows[start:stop])
        start = stop
    return groups


@torch.no_grad()
def read_activations(
    subject: Subject, tokens: Int[Tensor, "rows context"]
) -> tuple[Float[Tensor, "n d_in"], Bool[Tensor, "rows context"]]:
    """Returns what the coder reads of rows of text, at the tokens that are not masked, and which these are."""
    lm, coder = subject.lm, subject.coder
    spec = coder.spec
    wanted = {site.name: site for site in (*spec.reads, *spec.writes)}
    sites = [s for n, s in wanted.items() if s in spec.reads or n in spec.mask.norm_limits]
    with subject.lock:
        seen = capture(lm, sites, tokens)
        keep = token_mask(tokens, spec.mask).to(lm.device) & norm_mask(seen, spec.mask).to(lm.device)
        x = torch.cat([seen[site.name][keep].float() for site in spec.reads], dim=-1)
    return x.to(coder.device), keep


def encode_rows(subject: Subject, tokens: Int[Tensor, "rows context"]) -> Coded:
    """Returns the codes of rows of text. Masked tokens (special, first, outliers by norm) have none."""
    with subject.lock:
        x, keep = read_activations(subject, tokens)
        latents = subject.coder.encode(x)
    if not (_all_finite(x) and _all_finite(latents.values)):
        raise DataError(
            "activations: NaN or Inf in what the coder reads; the model is damaged, or its numbers are too large for "
            "model.dtype: use bfloat16 or float32"
        )
    rows, places = keep.nonzero().T.cpu().numpy()
    return Coded(latents, rows, places)


def _all_finite(x: Tensor) -> bool:
    """Returns whether there is neither NaN nor Inf: a finite sum has none, and costs a fraction of looking at all."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
