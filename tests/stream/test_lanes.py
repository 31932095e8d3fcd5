"""The order of tokens: each once per epoch, a function of (seed, step), exact to save; reading ahead overlaps."""

import threading
from concurrent.futures import wait

import pytest
import torch

from sae.parallel.ranks import Share
from sae.stream.batch import LANES, Block
from sae.stream.lanes import Stream


class Numbered:
    """A source whose activations name their token; blocks differ in size, and every fifth has none."""

    def __init__(self, n_blocks=70, fails_at=None, stuck_at=None):
        self.n_blocks, self.fails_at, self.stuck_at = n_blocks, fails_at, stuck_at
        self.sizes = [0 if block % 5 == 4 else 6 + block % 3 for block in range(n_blocks)]
        self.reads, self.go_on = 0, threading.Event()

    def __len__(self):
        return self.n_blocks

    def read(self, block):
        self.reads += 1
        if block == self.fails_at:
            raise OSError("disk on fire")
        if block == self.stuck_at:
            self.go_on.wait()
        names = torch.arange(self.sizes[block]) + 1000 * block
        return Block({"site": names[:, None].float()}, {"site": -names[:, None].float()})


def taken(stream, batches):
    return [next(stream).activations["site"][:, 0].long().tolist() for _ in range(batches)]


def test_gradients_go_with_their_activations():
    stream = Stream(Numbered(), LANES, seed=0)
    for _ in range(5):
        batch = next(stream)
        assert torch.equal(batch.gradients["site"], -batch.activations["site"])
    stream.close()


def test_every_token_once_per_epoch():
    source = Numbered()
    stream = Stream(source, LANES, seed=0)
    whole = sorted(1000 * block + i for block, n in enumerate(source.sizes) for i in range(n))
    # lanes stand in different epochs at the end of one; each visit hands out its block's tokens once
    seen: dict[int, list[int]] = {}
    for _ in range(3 * len(whole) // LANES):
        before = stream.visit.clone()
        for lane, token in enumerate(taken(stream, 1)[0]):
            visit = int(before[lane])
            while stream.block_of(visit) != token // 1000:
                visit += LANES
            seen.setdefault(visit, []).append(token)
    for visit, tokens in seen.items():
        assert len(set(tokens)) == len(tokens), "none twice in one visit"
        if visit < int(stream.visit.min()):
            assert len(tokens) == source.sizes[stream.block_of(visit)], "none left out of a finished visit"
    for epoch in range(3):
        blocks = [stream.block_of(epoch * len(source) + place) for place in range(len(source))]
        assert sorted(blocks) == list(range(len(source)))


@pytest.mark.parametrize("n_blocks", [3, 70, 200])
def test_reading_ahead_changes_nothing(n_blocks):
    plain = taken(Stream(Numbered(n_blocks), 2 * LANES, seed=1), 30)
    for ahead in (1, 64):
        stream = Stream(Numbered(n_blocks), 2 * LANES, seed=1, ahead=ahead)
        assert taken(stream, 30) == plain
        stream.close()
    assert taken(Stream(Numbered(n_blocks), 2 * LANES, seed=2), 30) != plain


@pytest.mark.parametrize(("world", "lanes"), [(2, 64), (3, 64), (6, 64), (12, 64), (96, 128), (128, 128), (5, 7)])
@pytest.mark.parametrize("ahead", [0, 3])
def test_ranks_share_the_batches_of_one(world, lanes, ahead):
    alone = taken(Stream(Numbered(), 2 * lanes, seed=0, n_lanes=lanes), 12)
    shares = [Stream(Numbered(), 2 * lanes, 0, ahead, Share(rank, world), lanes) for rank in range(world)]
    parts = [taken(stream, 12) for stream in shares]
    assert [[token for part in batch for token in part] for batch in zip(*parts, strict=True)] == alone
    sizes = {len(part[0]) for part in parts}
    assert max(sizes) - min(sizes) <= 2, "one lane more than another at the most"
    states = [stream.state() for stream in shares]
    again = Stream(Numbered(), 2 * lanes, 0, 0, Share(1, 2), lanes)  # of what all have summed up, with others beside it
    again.load_state({name: sum(state[name] for state in states) for name in states[0]})
    whole = Stream(Numbered(), 2 * lanes, seed=0, n_lanes=lanes)
    taken(whole, 12)
    half = len(Share(0, 2).of(lanes)) * 2
    assert taken(again, 5) == [batch[half:] for batch in taken(whole, 5)]
    for stream in shares:
        stream.close()


@pytest.mark.parametrize("lanes", [1, 5, 48])
def test_every_number_of_lanes_reads_every_block(lanes):
    stream = Stream(Numbered(), lanes, seed=0, ahead=2, n_lanes=lanes)
    seen = set()
    while int(stream.visit.min()) < len(stream.source):
        seen.update(token for batch in taken(stream, 1) for token in batch)
    sizes = dict(enumerate(stream.source.sizes))
    assert seen == {1000 * block + i for block, n in sizes.items() for i in range(n)}
    stream.close()


@pytest.mark.parametrize("n_blocks", [3, 70])
@pytest.mark.parametrize("ahead", [0, 64])
@pytest.mark.parametrize("step", [1, 3, 17])
def test_it_continues_from_any_step(n_blocks, ahead, step):
    stream = Stream(Numbered(n_blocks), LANES, seed=0, ahead=ahead)
    taken(stream, step)
    state = {name: value.clone() for name, value in stream.state().items()}
    rest = taken(stream, 20)
    stream.close()
    again = Stream(Numbered(n_blocks), LANES, seed=0, ahead=ahead)
    again.load_state(state)
    assert taken(again, 20) == rest
    again.close()


def test_so_much_is_read_while_the_consumer_is_busy_and_no_more():
    source = Numbered(n_blocks=1000)
    source.sizes = [6] * 1000
    stream = Stream(source, LANES, seed=0, ahead=8)
    for _ in range(20):
        next(stream)
        assert stream.reader is not None
        wait(stream.reader.waiting.values())
        held = len(stream.pools)
        used = sum(int(visit) // LANES for visit in stream.visit)
        assert source.reads == held + used + 8, "the block in hand of every lane, those used up, and eight ahead"
    stream.close()


def test_an_error_of_the_thread_is_raised_where_it_is_needed():
    stream = Stream(Numbered(fails_at=7), LANES, seed=0, ahead=16)
    with pytest.raises(OSError, match="disk on fire"):
        next(stream)
    stream.close()


def test_batches_are_handed_out_while_a_later_block_is_read():
    source = Numbered(n_blocks=400, stuck_at=70)
    source.sizes = [400] * 400
    stream = Stream(source, 16 * LANES, seed=0, ahead=64)
    for _ in range(400 // 16):  # all of the first 64 blocks
        next(stream)
    source.go_on.set()
    assert 70 in next(stream).blocks.tolist()
    stream.close()
