"""Where activations come from: computed now, or read from disk and computed once.

Everything is read in blocks: block b is a fixed set of `block_rows` rows of text, one pass of the language model, and
holds the activations of its unmasked tokens. A block is the same whether it is computed now or read from disk.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from sae.base.files import cache_dir
from sae.base.progress import Watch
from sae.base.room import Need, check_room
from sae.base.seeding import generator
from sae.base.store import Shards, ShardWriter
from sae.lm.hooks import capture, capture_with_gradients, sites_of_model
from sae.lm.masking import MaskSpec, token_mask
from sae.lm.models import DTYPES, LanguageModel
from sae.lm.site import SECOND, Site
from sae.parallel import ranks
from sae.stream.batch import Block
from sae.text.tokenizing import TokenRows

ACTIVATIONS = "activations"
"""What a store of them says it is."""


@dataclass(frozen=True)
class Blocks:
    """Block b of a text is a fixed set of rows. Rows are shuffled once, so that a block is a sample of the corpus."""

    rows: TokenRows
    block_rows: int
    seed: int

    def __len__(self) -> int:
        return -(-self.rows.n_rows // self.block_rows)

    @cached_property
    def order(self) -> Int[Tensor, "rows"]:
        """Returns the fixed shuffled order of rows."""
        return torch.randperm(self.rows.n_rows, generator=generator(self.seed, "rows"))

    def tokens(self, block: int) -> Int[Tensor, "block_rows context"]:
        """Returns the tokens of one block; the last may have fewer rows."""
        start = block * self.block_rows
        return self.rows.tokens(self.order[start : start + self.block_rows])


@dataclass(frozen=True)
class Reading:
    """What is read of a language model, or of two: the activations of unmasked tokens at some sites."""

    lm: LanguageModel
    sites: list[Site]
    mask: MaskSpec
    dtype: str = "float32"
    """Precision in which activations are kept."""
    loss: str | None = None
    """The loss whose gradients are read as well, if any."""
    second: LanguageModel | None = None
    """The model of the sites that are tagged so."""

    @property
    def models(self) -> dict[str, LanguageModel]:
        """Returns the models by the tag of their sites."""
        return {"": self.lm} | ({SECOND: self.second} if self.second else {})


class LiveSource:
    """Computes blocks with the language model."""

    def __init__(self, reading: Reading, blocks: Blocks) -> None:
        self.reading, self.blocks = reading, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def told(self, blocks: list[int]) -> str:
        """Returns the numbers of some blocks."""
        return f"blocks {', '.join(map(str, blocks))}"

    def read(self, block: int) -> Block:
        """Returns one block."""
        tokens = self.blocks.tokens(block)
        reading = self.reading
        kept = token_mask(tokens, reading.mask).flatten().nonzero()[:, 0].to(reading.lm.device)  # no wait for a device
        activations: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for tag, lm in reading.models.items():
            sites = sites_of_model(reading.sites, tag)
            if reading.loss:
                seed = self.blocks.seed + block
                seen, found = capture_with_gradients(lm, sites, tokens, reading.mask, reading.loss, seed)
                gradients |= {name: x.to(kept.device) for name, x in found.items()}
            else:
                seen = capture(lm, sites, tokens)
            activations |= {name: x.to(kept.device) for name, x in seen.items()}
        return Block(self._rows(activations, kept), self._rows(gradients, kept))

    def _rows(self, tensors: dict[str, Tensor], kept: Int[Tensor, "n"]) -> dict[str, Tensor]:
        names = [site.name for site in self.reading.sites if site.name in tensors]
        return {name: tensors[name].flatten(0, 1)[kept].to(DTYPES[self.reading.dtype]) for name in names}


class CachedSource:
    """Reads blocks from disk and computes, once, those that are not there yet (live + write-through).

    One block is one shard, so that blocks may be stored in any order, by any rank, and be repaired alone.
    """

    def __init__(self, live: LiveSource, folder: Any, fingerprint: dict[str, Any], part: str = "0") -> None:
        self.live, self.writer = live, ShardWriter(folder, ACTIVATIONS, fingerprint, part=part)
        self.stored = Shards(folder, ACTIVATIONS, fingerprint, partial=True)

    def __len__(self) -> int:
        return len(self.live)

    def told(self, blocks: list[int]) -> str:
        """Returns the numbers of some blocks."""
        return self.live.told(blocks)

    def read(self, block: int) -> Block:
        """Returns one block, on the CPU, stored from then on."""
        if block not in self.stored and self.stored.has_file(block):
            self.stored.reload()  # another rank has stored it
        if block not in self.stored:
            made = self.live.read(block)
            tensors = {f"activations/{name}": x.cpu() for name, x in made.activations.items()}
            tensors |= {f"gradients/{name}": x.cpu() for name, x in made.gradients.items()}
            self.stored.add(block, self.writer.write(block, tensors))
            return _block(tensors)
        return _block(self.stored.read(block))

    def reload(self) -> None:
        """Takes in what other ranks have stored."""
        self.stored.reload()

    def fill(self, blocks: range, watch: Watch) -> None:
        """Stores all of `blocks`; raises Stopped between two of them when asked to."""
        left = [block for block in blocks if block not in self.stored]
        there, visible = len(blocks) - len(left), ranks.rank() == 0
        with watch.stage("storing activations", len(blocks), "blocks", start=there, visible=visible) as progress:
            for done, block in enumerate(left, 1):
                watch.poll("while storing activations")
                self.read(block)
                if done == 1:  # all blocks are of one size
                    folder, size = self.writer.folder, self.stored.entries[block]["bytes"]
                    field = "SAE_CACHE" if folder.is_relative_to(cache_dir()) else "activations.path"
                    check_room(Need(field, folder, size * (len(left) - 1)))
                progress.update(there + done)


def _block(stored: dict[str, Tensor]) -> Block:
    return Block(*({k.partition("/")[2]: v for k, v in stored.items() if k.startswith(p)} for p in ("a", "g")))


class Source(Protocol):
    """Where blocks come from."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def read(self, block: int) -> Block:
        """Returns one block."""
        ...

    def told(self, blocks: list[int]) -> str:
        """Returns where some blocks lie, for people."""
        ...
