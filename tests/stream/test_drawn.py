"""Activations that are drawn: the batches of stored ones, from any step on again; what an iterator does wrong."""

import contextlib

import pytest
import torch

from sae.base.errors import ConfigError
from sae.stream.batch import LANES
from sae.stream.drawn import Drawn, DrawnStream, Ended, is_iterator
from sae.stream.lanes import Stream
from sae.stream.tensors import cut, stored_in_memory

SITE = "block.3"
SIZES = [40, 0, 7, 100, 3]


class Items:
    """Items of different sizes that name their vectors, written into one buffer; it can be set back."""

    def __init__(self, n_items=400):
        self.n_items, self.item, self.buffer = n_items, 0, torch.zeros(max(SIZES), 2)

    def __iter__(self):
        return self

    def __next__(self):
        if self.item == self.n_items:
            raise StopIteration
        size = SIZES[self.item % len(SIZES)]
        self.buffer[:size] = torch.arange(size)[:, None] + 1000.0 * self.item
        self.item += 1
        return {SITE: self.buffer[:size]}

    def state(self):
        return {"item": self.item}

    def load_state(self, state):
        self.item = state["item"]


class Data:
    """The same as data sets name it, which know no state before they begin."""

    def __init__(self):
        self.items = Items()

    def __iter__(self):
        return iter(self.items)

    def state_dict(self):
        return self.items.state() if self.items.item else None

    def load_state_dict(self, state):
        self.items.load_state(state)


def drawn(given, most=20):
    return Drawn(given, SITE, most)


def taken(stream, batches):
    return [next(stream).activations[SITE][:, 0].long().tolist() for _ in range(batches)]


def test_the_batches_are_those_of_the_same_blocks_stored():
    items = [{SITE: item[SITE].clone()} for item in Items() if len(item[SITE])]
    source = cut(stored_in_memory(items, "").shards, [SITE], 20)
    assert taken(DrawnStream(drawn(Items()), LANES, seed=1), 30) == taken(Stream(source, LANES, seed=1), 30)


@pytest.mark.parametrize("kind", [Items, Data])
@pytest.mark.parametrize("step", [1, 4, 13])
def test_it_continues_from_any_step(kind, step):
    stream = DrawnStream(drawn(kind()), 2 * LANES, seed=0)
    held_out = stream.source.take(30)
    assert len(held_out[0]) == 20
    taken(stream, step)
    state = {name: value.clone() for name, value in stream.state().items()}
    rest = taken(stream, 8)
    again = DrawnStream(drawn(kind()), 2 * LANES, seed=0)
    again.load_state(state)
    assert taken(again, 8) == rest
    assert len(again.source.ready) < 3 * LANES, "what was used up before is not kept"


def test_before_the_first_batch_what_is_held_out_is_not_drawn_again():
    stream = DrawnStream(drawn(Items()), LANES, seed=0)
    stream.source.take(30)
    state = stream.state()
    again = DrawnStream(drawn(Items()), LANES, seed=0)
    again.load_state(state)
    assert taken(again, 3) == taken(stream, 3)


def test_what_is_looked_at_is_drawn_all_the_same():
    looked, plain = (DrawnStream(drawn(Items()), LANES, seed=0) for _ in range(2))
    assert sum(map(len, looked.source.peek(300).blocks)) >= 300
    assert taken(looked, 9) == taken(plain, 9)


def test_the_end_leaves_the_position_behind_the_last_whole_batch():
    stream = DrawnStream(drawn(Items(150)), LANES, seed=0)
    batches = len(list(until_the_end(stream)))
    with pytest.raises(Ended, match="the iterator ended after 4,500 vectors"):
        next(stream)
    state = stream.state()
    longer = DrawnStream(drawn(Items()), LANES, seed=0)
    longer.load_state(state)
    assert taken(longer, 2) == taken(DrawnStream(drawn(Items()), LANES, seed=0), batches + 2)[-2:]


def test_without_a_state_it_cannot_go_on():
    with_state, without = DrawnStream(drawn(Items()), LANES, 0), DrawnStream(drawn(x[SITE] for x in Items()), LANES, 0)
    taken(with_state, 1), taken(without, 1)
    assert not without.source.resumable
    with pytest.raises(ConfigError, match=r"--resume: the iterator of the run had no state\(\) and load_state\(\)"):
        with_state.load_state(without.state())
    with pytest.raises(ConfigError, match=r"--resume: this iterator has no state\(\) and load_state\(\)"):
        without.load_state(with_state.state())


def until_the_end(stream):
    with contextlib.suppress(Ended):
        while True:
            yield next(stream)


def bad(*items):
    return drawn(item for item in (torch.ones(70, 2), *items))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bad(torch.ones(5, 3)), "block.3 has width 3 in item 2 of the iterator, but 2 in item 1 of the iter"),
        (lambda: bad({"other": torch.ones(5, 2)}), "item 2 of the iterator has no tensor 'block.3'; it has other"),
        (lambda: bad(torch.ones(5, 2).long()), "item 2 of the iterator has the data type I64; activations are floats"),
        (lambda: bad(torch.ones(5)), r"item 2 of the iterator has the shape \[5\]; it must be \[n, width\]"),
        (lambda: bad(*[torch.ones(0, 2)] * 1001), "1,000 items of the iterator in a row are empty"),
        (lambda: bad("text"), "str is no tensor"),
        (lambda: drawn(iter([])), "the iterator gives nothing"),
        (lambda: bad().take(100), r"the iterator ended after 70 vectors, of which the first 100 are held out"),
    ],
)
def test_what_an_iterator_does_wrong_is_said(make, said):
    with pytest.raises((ConfigError, TypeError), match=said) as error:
        taken(DrawnStream(make(), 2 * LANES, seed=0), 3)
    assert "\n" not in str(error.value)


def test_a_state_that_cannot_be_kept_is_refused_at_once():
    class Odd(Items):
        def state(self):
            return {"at": torch.zeros(1)}

    with pytest.raises(ConfigError, match=r"state\(\) of the iterator must return plain JSON values"):
        drawn(Odd())


def test_what_is_an_iterator():
    assert is_iterator(Items())
    assert is_iterator(x for x in [])
    for given in (torch.ones(2, 2), torch.ones(2, 2).numpy(), {}, [], "acts", None):
        assert not is_iterator(given)
