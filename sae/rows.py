"""Whole rows of text as batches, for losses that run the language model: the order of rows, and the spliced model.

    epoch e takes the rows in the order permutation(seed, e); batch s holds the next batch_tokens / context of them

Unlike the stream of `sae/stream.py`, a batch is not shuffled over tokens. Its rows depend on (seed, s) alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations import capture, counted, model_inputs, token_mask
from sae.errors import ConfigError
from sae.intervene import replace_at
from sae.models import DTYPES, LanguageModel
from sae.objectives import Spliced
from sae.seeding import generator
from sae.spec import MaskSpec, Site
from sae.stream import ActivationBatch
from sae.text import TokenRows


@dataclass(frozen=True)
class TextBatch:
    """The rows that a batch of activations comes from."""

    tokens: Int[Tensor, "rows context"]
    keep: Bool[Tensor, "rows context"]
    """Which positions are in the batch, in the order of its activations."""


class RowStream:
    """An endless iterator of batches of whole rows whose position can be saved and restored exactly."""

    def __init__(
        self,
        lm: LanguageModel,
        rows: TokenRows,
        sites: list[Site],
        mask: MaskSpec,
        batch_tokens: int,
        seed: int,
        dtype: str = "float32",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lm, self.rows, self.sites, self.mask, self.seed = lm, rows, sites, mask, seed
        self.dtype, self.rank, self.world_size = DTYPES[dtype], rank, world_size
        self.per_batch = batch_tokens // rows.context_length
        if self.per_batch < world_size or self.per_batch % world_size:
            raise ConfigError(
                f"batch_tokens: {batch_tokens} are {self.per_batch} rows of {rows.context_length} tokens; end-to-end "
                f"terms need whole rows, as many for each of {world_size} ranks"
            )
        self.batch = 0
        self._order: tuple[int, Tensor] | None = None

    def order(self, epoch: int) -> Int[Tensor, "rows"]:
        """Returns the order of the rows in an epoch."""
        return torch.randperm(self.rows.n_rows, generator=generator(self.seed, "row batches", epoch))

    def __iter__(self) -> "Iterator[ActivationBatch]":
        return self

    def __next__(self) -> ActivationBatch:
        """Returns this rank's rows of the next batch, with `text`."""
        share = self.per_batch // self.world_size
        first = self.batch * self.per_batch + self.rank * share
        chosen = torch.stack([self._row(place) for place in range(first, first + share)])
        self.batch += 1
        tokens = self.rows.tokens(chosen)
        keep = token_mask(tokens, self.mask)
        seen = capture(self.lm, self.sites, tokens)
        kept = {name: x[keep.to(x.device)].to(self.dtype) for name, x in seen.items()}
        return ActivationBatch(kept, {}, chosen[keep.nonzero()[:, 0]], TextBatch(tokens, keep))

    def _row(self, place: int) -> Tensor:
        epoch, index = divmod(place, self.rows.n_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.order(epoch)
        return self._order[1][index]

    def state(self) -> dict[str, Tensor]:
        """Returns the position after the last batch; on other ranks zero, since these are summed."""
        return {"batch": torch.tensor(self.batch if self.rank == 0 else 0)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues behind the batch after which `state` was taken."""
        self.batch = int(state["batch"])

    def close(self) -> None:
        """Does nothing; nothing is read ahead."""


def splicer(
    lm: LanguageModel, text: TextBatch, usual: Bool[Tensor, "n"], writes: tuple[Site, ...], rows_per_pass: int
) -> tuple[tuple[int, ...], Callable[[int, Float[Tensor, "m d_out"]], Spliced]]:
    """Returns the tokens of each micro-batch of rows, and a function that runs the model on one of them.

    The function puts raw outputs [m, d_out] of the coder in place at the sites written, at the tokens that are left by
    `usual`, and returns clean and patched logits of the counted tokens; the patched ones are differentiable in the
    outputs. All sites are replaced by what the coder made of the model's own activations.
    """
    keep = text.keep.clone()
    keep[text.keep] = usual.cpu()
    chunks = list(zip(text.tokens.split(rows_per_pass), keep.split(rows_per_pass), strict=True))

    def run(number: int, outputs: Float[Tensor, "m d_out"]) -> Spliced:
        tokens, kept = (part.to(lm.device) for part in chunks[number])
        outputs = outputs.to(lm.device)
        chosen = counted(tokens, kept)

        def logits() -> Tensor:
            found = lm.model(**model_inputs(lm, tokens)).logits[:, :-1][chosen]
            return found.to(torch.promote_types(found.dtype, torch.float32))

        with torch.no_grad():
            clean = logits()
        with ExitStack() as stack, torch.enable_grad():
            start = 0
            for site in writes:
                columns = outputs[:, start : start + site.width]
                stack.enter_context(replace_at(lm.model, site, _at(columns, kept), kept))
                start += site.width
            return Spliced(clean, logits(), tokens[:, 1:][chosen].long())

    return tuple(int(part.sum()) for _, part in chunks), run


def _at(rows: Float[Tensor, "m d"], keep: Bool[Tensor, "rows context"]) -> Callable[[Tensor], Tensor]:
    """Returns what puts rows at the kept positions of a tensor."""
    return lambda x: torch.zeros_like(x, dtype=rows.dtype).masked_scatter(keep[..., None].expand_as(x), rows)
