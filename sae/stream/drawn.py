"""Activations drawn from an iterator, once each, as the blocks of a stream.

An item is what `named_tensors` takes; it is cut into blocks of at most so many vectors, which are numbered as they
come. To go on from where a batch was taken, the iterator is set back to the item of the oldest block of which something
is left, and what is drawn again of blocks that are used up is dropped: so a checkpoint holds no activations. That needs
an iterator with `state()`, which returns plain JSON values, and `load_state(values)`; or with `state_dict()` and
`load_state_dict(values)`, as data sets have them.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError
from sae.stream.batch import ActivationBatch, Block
from sae.stream.lanes import Stream
from sae.stream.tensors import Shard, cut, named_tensors, shard_in_memory

EMPTY_ITEMS = 1000  # in a row: more are no gap in the data but an iterator that has nothing to give
ITEMS = "items"  # of the saved position of a stream: where the iterator stood


def is_iterator(given: Any) -> bool:
    """Returns whether activations are to be drawn, not looked up: tensors, mappings, lists and paths can be."""
    return (
        hasattr(given, "__iter__") and not isinstance(given, (str, dict, list, tuple)) and not hasattr(given, "shape")
    )


class Ended(ConfigError):
    """The iterator has nothing more to give."""


@dataclass(frozen=True)
class Peeked:
    """Some blocks of an iterator, which are there to be drawn later."""

    blocks: list[Block]

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, block: int) -> Block:
        """Returns one of them."""
        return self.blocks[block]

    def told(self, blocks: list[int]) -> str:
        """Returns the numbers of some blocks."""
        return f"blocks {', '.join(map(str, blocks))} of the iterator"


class Drawn:
    """The blocks of an iterator, each of which is read once, in an order that is about that of their numbers."""

    def __init__(self, given: Any, name: str, most: int, **how: Any) -> None:
        self.given, self.name, self.most, self.how = given, name, most, how
        pairs = (("state", "load_state"), ("state_dict", "load_state_dict"))
        found = next(((a, b) for a, b in pairs if hasattr(given, a) and hasattr(given, b)), None)
        self.ask, self.set_back = (getattr(given, method) for method in found) if found else (None, None)
        self.iterator = iter(given)
        self.items, self.vectors, self.next = 0, 0, 0
        self.ready: dict[int, Block] = {}
        self.marks: list[tuple[int, str]] = []
        """The number of the first block of an item, and the state of the iterator before it."""
        self.wanted: Callable[[int], bool] = lambda block: True
        self.mark = self._mark()
        self.first: Shard | None = self._item()
        """The first item, which says what sites there are; drawn, and not yet taken apart."""
        if self.first is None:
            raise ConfigError("activations: the iterator gives nothing")
        self.like = self.first
        self.names = self.first.names
        """The sites that are read: all, unless set otherwise."""

    @property
    def resumable(self) -> bool:
        """Returns whether the iterator can be set back."""
        return self.ask is not None

    def __len__(self) -> int:
        return sys.maxsize  # it may have no end

    def told(self, blocks: list[int]) -> str:
        """Returns the numbers of some blocks."""
        return Peeked([]).told(blocks)

    def _mark(self) -> str:
        try:
            return json.dumps(self.ask()) if self.ask else ""
        except TypeError as error:
            reason = f"must return plain JSON values, such as {{'item': 12}} ({error})"
            raise ConfigError(f"activations: state() of the iterator {reason}") from None

    def _item(self) -> Shard | None:
        try:
            item = next(self.iterator)
        except StopIteration:
            return None
        self.items += 1
        return shard_in_memory(f"item {self.items} of the iterator", named_tensors(item, self.name))

    def _draw(self) -> None:
        """Takes the next item apart; Ended if there is none."""
        for _ in range(EMPTY_ITEMS):
            if self.first is None:
                self.mark = self._mark()
            item, self.first = self.first or self._item(), None
            if item is None:
                raise Ended(f"activations: the iterator ended after {self.vectors:,} vectors")
            source = cut([item], self.names, self.most, like=self.like, **self.how)
            blocks = [block for block in map(source.read, range(len(source))) if len(block)]
            if not blocks:
                continue
            self.marks.append((self.next, self.mark))
            self.vectors += sum(map(len, blocks))
            for block in blocks:
                if self.wanted(self.next):  # the iterator may write its next item over this one
                    self.ready[self.next] = Block(_copied(block.activations), _copied(block.gradients))
                self.next += 1
            return
        raise ConfigError(f"activations: {EMPTY_ITEMS:,} items of the iterator in a row are empty")

    def read(self, block: int) -> Block:
        """Returns a block, which is then forgotten; Ended if the iterator ends before it."""
        while block not in self.ready:
            self._draw()
        return self.ready.pop(block)

    def peek(self, tokens: int) -> Peeked:
        """Returns the next blocks of so many vectors, or all that are left; Ended if there are none."""
        with suppress(Ended):
            while sum(map(len, self.ready.values())) < tokens:
                self._draw()
        if not self.ready:
            self._draw()
        return Peeked(list(self.ready.values()))

    def take(self, tokens: int) -> list[Block]:
        """Returns the blocks of the next items, of so many vectors or a few more, and begins to number those behind."""
        blocks: list[Block] = []
        while sum(map(len, blocks)) < tokens:
            try:
                self._draw()
            except Ended as ended:
                raise ConfigError(f"{ended}, of which the first {tokens:,} are held out (eval.tokens)") from None
            blocks += self.ready.values()
            self.ready, self.marks, self.next = {}, [], 0
        return blocks

    def state(self, oldest: int) -> dict[str, Tensor]:
        """Returns what to set the iterator back by, to where block `oldest` and all later ones are drawn again."""
        if not self.resumable:
            return {}
        self.marks = self.marks[max(0, sum(first <= oldest for first, _ in self.marks) - 1) :]
        first, mark = self.marks[0] if self.marks else (self.next, self.mark if self.first else self._mark())
        return {ITEMS: torch.tensor(list(f"{first} {mark}".encode()), dtype=torch.uint8)}

    def load_state(self, state: dict[str, Tensor], wanted: Callable[[int], bool]) -> None:
        """Sets the iterator back; blocks that are not wanted are not kept. ConfigError if it cannot be."""
        if ITEMS not in state or self.set_back is None:
            which = "this iterator has" if ITEMS in state else "the iterator of the run had"
            raise ConfigError(
                f"--resume: {which} no state() and load_state(), so the run cannot go on exactly; start a new one"
            )
        first, _, mark = bytes(state[ITEMS].tolist()).decode().partition(" ")
        values = json.loads(mark)
        if values is not None:  # it had not begun
            self.set_back(values)
        self.iterator = iter(self.given)
        self.next, self.first, self.ready, self.marks, self.wanted = int(first), None, {}, [], wanted


class DrawnStream(Stream):
    """Batches of what is drawn; Ended if the iterator ends, at the position behind the last whole batch."""

    source: Drawn

    def __next__(self) -> ActivationBatch:
        """Returns the next batch."""
        before = self.visit.clone(), self.offset.clone()
        try:
            return super().__next__()
        except Ended:
            self.visit, self.offset = before
            raise

    def state(self) -> dict[str, Tensor]:
        """Returns the position after the last batch, with that of the iterator if it has one."""
        return super().state() | self.source.state(int(self.visit.min()))

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues behind the batch after which `state` was taken."""
        super().load_state(state)
        began = self.visit.tolist()
        self.source.load_state(state, lambda block: block >= began[block % self.n_lanes])


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}
