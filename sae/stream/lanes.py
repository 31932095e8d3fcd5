"""The order of tokens: L lanes, each shuffling one block at a time; a batch takes equally from every lane.

    visit i = 0, 1, 2, ...    epoch = i // n_blocks    block = order_epoch[i % n_blocks]    lane = i mod L

Lane l makes the visits l, l + L, l + 2 L, ... and hands out the block's tokens in a shuffled order, keyed by
(seed, visit). So the tokens of batch s depend on (seed, L, s) alone: not on time, threads, the source, or the number of
ranks, which own whole lanes, some one more than others. A batch mixes L blocks of shuffled rows; memory holds those and
what is read ahead.
The state is (visit, offset) per lane, that of the last batch handed out; what was read ahead is read again on resume.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.parallel.ranks import ALONE, Share
from sae.stream.batch import LANES, ActivationBatch, Block
from sae.stream.sources import Source


class Reader:
    """Reads visits in order, up to `ahead` of them in a thread before they are needed: overlap with back-pressure."""

    def __init__(self, source: Source, visits: Iterator[tuple[int, int]], ahead: int) -> None:
        self.source, self.visits, self.ahead = source, visits, ahead
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="activations") if ahead else None
        self.waiting: dict[int, Future[Block]] = {}

    def take(self, visit: int, block: int) -> Block:
        """Returns the block of a visit; an error of the thread is raised here."""
        if self.pool is None:
            return self.source.read(block)
        self._top_up()
        while visit not in self.waiting:  # a lane ran dry sooner than its neighbors
            self._submit()
        found = self.waiting.pop(visit).result()
        self._top_up()
        return found

    def _top_up(self) -> None:
        while len(self.waiting) < self.ahead:
            self._submit()

    def _submit(self) -> None:
        visit, block = next(self.visits)
        self.waiting[visit] = self.pool.submit(self.source.read, block)  # type: ignore[union-attr]

    def close(self) -> None:
        """Drops what was read ahead and ends the thread."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


class Stream:
    """An endless iterator of batches whose position can be saved and restored exactly."""

    def __init__(
        self,
        source: Source,
        batch_tokens: int,
        seed: int,
        ahead: int = 0,
        share: Share = ALONE,
        n_lanes: int = LANES,
    ) -> None:
        self.source, self.seed, self.ahead, self.n_lanes = source, seed, ahead, n_lanes
        self.draw = batch_tokens // n_lanes
        self.lanes = share.of(n_lanes)
        self.visit = torch.arange(n_lanes)
        self.offset = torch.zeros(n_lanes, dtype=torch.int64)
        self.pools: dict[int, tuple[int, Block, Tensor]] = {}
        self.reader: Reader | None = None
        self.orders: dict[int, Tensor] = {}

    def block_of(self, visit: int) -> int:
        """Returns the block of a visit; epoch 0 goes through the blocks in order, later ones shuffled."""
        epoch, place = divmod(visit, len(self.source))
        if epoch == 0:
            return place
        if epoch not in self.orders:
            apart = 2 + 2 * self.n_lanes // len(self.source)  # epochs between the last lane and what is read ahead
            self.orders = {e: order for e, order in self.orders.items() if e >= epoch - apart}
            self.orders[epoch] = torch.randperm(len(self.source), generator=generator(self.seed, "blocks", epoch))
        return int(self.orders[epoch][place])

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        """Returns the next batch."""
        if self.reader is None:
            self.reader = Reader(self.source, self._upcoming(), self.ahead)
        parts: list[tuple[Block, Tensor, int]] = []
        for lane in self.lanes:
            parts += self._drawn(lane)
        sites = parts[0][0].activations
        gradients = parts[0][0].gradients
        return ActivationBatch(
            {site: torch.cat([block.activations[site][rows] for block, rows, _ in parts]) for site in sites},
            {site: torch.cat([block.gradients[site][rows] for block, rows, _ in parts]) for site in gradients},
            torch.cat([torch.full((len(rows),), number) for _, rows, number in parts]),
        )

    def _drawn(self, lane: int) -> list[tuple[Block, Tensor, int]]:
        """Takes `draw` tokens from a lane, going on to its next block when one is used up."""
        parts, missing, empty = [], self.draw, 0
        while missing:
            visit = int(self.visit[lane])
            if lane not in self.pools or self.pools[lane][0] != visit:
                block = self.reader.take(visit, self.block_of(visit))  # type: ignore[union-attr]
                order = torch.randperm(len(block), generator=generator(self.seed, "tokens", visit))
                self.pools[lane] = (visit, block, order)
            _, block, order = self.pools[lane]
            start = int(self.offset[lane])
            rows = order[start : start + missing]
            if len(rows):
                parts.append((block, rows, self.block_of(visit)))
                missing -= len(rows)
                self.offset[lane] = start + len(rows)
            empty = 0 if len(block) else empty + 1
            if empty > len(self.source):
                raise ConfigError("text: every token is masked; nothing is left to train on")
            if int(self.offset[lane]) >= len(block):
                del self.pools[lane]
                self.visit[lane] += self.n_lanes
                self.offset[lane] = 0
        return parts

    def _upcoming(self) -> Iterator[tuple[int, int]]:
        """Yields the visits of this rank's lanes from the current state on, in the order they will be needed."""
        lap = int(self.visit[list(self.lanes)].min()) // self.n_lanes
        started = {lane: int(self.visit[lane]) for lane in self.lanes}
        while True:
            for lane in self.lanes:
                visit = lap * self.n_lanes + lane
                if visit >= started[lane]:
                    yield visit, self.block_of(visit)
            lap += 1

    def state(self) -> dict[str, Tensor]:
        """Returns the position after the last batch: (visit, offset) of every lane of this rank."""
        own = torch.zeros(self.n_lanes, dtype=torch.int64)
        own[list(self.lanes)] = 1
        return {"visit": self.visit * own, "offset": self.offset * own}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues behind the batch after which `state` was taken (summed over ranks)."""
        self.close()
        self.visit, self.offset = state["visit"].clone(), state["offset"].clone()

    def close(self) -> None:
        """Stops reading ahead."""
        if self.reader is not None:
            self.reader.close()
        self.reader, self.pools = None, {}
