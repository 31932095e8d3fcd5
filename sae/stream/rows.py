"""Whole rows of text as batches, for losses that run the language model.

    epoch e takes the rows in the order permutation(seed, e); batch s holds the next batch_tokens / context of them

Unlike the stream of `sae/stream/lanes.py`, a batch is not shuffled over tokens. Its rows depend on (seed, s) alone.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from sae.base.seeding import generator
from sae.lm.hooks import capture
from sae.lm.masking import token_mask
from sae.lm.models import DTYPES
from sae.lm.replay import Stretch, recorded
from sae.parallel.ranks import ALONE, Share
from sae.stream.batch import ActivationBatch, TextBatch
from sae.stream.sources import Reading
from sae.text.tokenizing import TokenRows


class RowStream:
    """An endless iterator of batches of whole rows whose position can be saved and restored exactly."""

    def __init__(self, reading: Reading, rows: TokenRows, batch_tokens: int, seed: int, share: Share = ALONE) -> None:
        self.reading, self.rows, self.seed, self.share = reading, rows, seed, share
        self.per_batch = batch_tokens // rows.context_length
        self.batch = 0
        self._order: tuple[int, Tensor] | None = None

    def order(self, epoch: int) -> Int[Tensor, "rows"]:
        """Returns the order of the rows in an epoch."""
        return torch.randperm(self.rows.n_rows, generator=generator(self.seed, "row batches", epoch))

    def __iter__(self) -> "Iterator[ActivationBatch]":
        return self

    def __next__(self) -> ActivationBatch:
        """Returns this rank's rows of the next batch, with `text`."""
        first = self.batch * self.per_batch
        chosen = torch.stack([self._row(first + place) for place in self.share.of(self.per_batch)])
        self.batch += 1
        tokens = self.rows.tokens(chosen)
        keep = token_mask(tokens, self.reading.mask)
        sites = tuple(self.reading.sites)
        stretches = {Stretch(sites, to_last=True), *(Stretch((site,)) for site in sites)}
        with recorded(self.reading.lm.model, stretches) as made:
            seen = capture(self.reading.lm, self.reading.sites, tokens)
        places = keep.flatten().nonzero()[:, 0].to(self.reading.lm.device)  # found on the host: no wait for a device
        kept = {name: x.flatten(0, 1)[places].to(DTYPES[self.reading.dtype]) for name, x in seen.items()}
        return ActivationBatch(kept, {}, chosen[keep.nonzero()[:, 0]], TextBatch(tokens, keep, made))

    def _row(self, place: int) -> Tensor:
        epoch, index = divmod(place, self.rows.n_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.order(epoch)
        return self._order[1][index]

    def state(self) -> dict[str, Tensor]:
        """Returns the position after the last batch; on other ranks zero, since these are summed."""
        return {"batch": torch.tensor(self.batch if self.share.rank == 0 else 0)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues behind the batch after which `state` was taken."""
        self.batch = int(state["batch"])

    def close(self) -> None:
        """Does nothing; nothing is read ahead."""
