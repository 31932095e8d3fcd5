"""What parts of a matrix keep of its largest, by sums alone, is what a stable sort of the whole keeps."""

import threading
from itertools import pairwise

import pytest
import torch
from rigs.teams import together

from sae.kernels.codes import Entries
from sae.kernels.largest import top_entries, top_of
from sae.kernels.radix import DIGITS, histograms, largest_of_parts
from sae.parallel import collectives
from sae.parallel.mesh import Shape

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0])


def matrices(draw):
    """Returns how the scores of a matrix may look, ties above all."""
    rand = torch.rand(9, 7, generator=draw)
    return {
        "untied": torch.randn(9, 7, generator=draw),
        "all equal": torch.full((9, 7), -1.5),
        "signed zeros": torch.where(rand < 0.5, -0.0, 0.0),
        "few values": (rand * 4).floor() / 2 - 1,
        "subnormal": (rand - 0.5) * 1e-42,
        "one apart": torch.ones(9, 7) + (rand * 3).floor() * torch.finfo(torch.float32).eps,
        "special": SPECIAL[(rand * len(SPECIAL)).long()],
    }


class Sum:
    """The sum over threads that all come to it."""

    def __init__(self, n):
        self.given, self.meeting, self.sums = [None] * n, threading.Barrier(n, timeout=30), [0] * n

    def of(self, i):
        def total(own):
            self.given[i] = own
            self.sums[i] += 1
            self.meeting.wait()
            found = sum(self.given)
            self.meeting.wait()
            return found

        return total


def pieces(scores, rows, columns, draw):
    """Returns the entries of ragged pieces of a matrix, some of them empty; numbers are those of the whole."""
    bounds = [
        [0, *torch.randint(0, size + 1, (parts - 1,), generator=draw).sort().values.tolist(), size]
        for size, parts in zip(scores.shape, (rows, columns), strict=True)
    ]
    for top, bottom in pairwise(bounds[0]):
        for left, right in pairwise(bounds[1]):
            piece = scores[top:bottom, left:right]
            tokens, ids = torch.arange(top, bottom)[:, None], torch.arange(left, right)
            yield Entries(tokens.expand_as(piece).flatten(), ids.expand_as(piece).flatten(), piece.flatten())


def kept_of(parts, m, count):
    """Returns what every part keeps, and how many sums that took."""
    total, found = Sum(len(parts)), [None] * len(parts)

    def work(i):
        found[i] = largest_of_parts(parts[i], m, count, total.of(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(found), "a part waits for sums that others do not come to"
    assert len(set(total.sums)) == 1, "all come to as many"
    return found, total.sums[0]


def check(scores, seed):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 5, (2,), generator=draw).tolist()
    count, m = int(torch.randint(1, scores.numel() + 1, (), generator=draw)), scores.shape[1]
    parts = list(pieces(scores, rows, columns, draw))
    found, sums = kept_of(parts, m, count)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    for part, kept in zip(parts, found, strict=True):
        assert kept.own == int(kept.mask.sum())
        assert torch.equal(kept.least, found[0].least) or kept.least.isnan()
        mask[(part.tokens * m + part.ids)[kept.mask]] = True
    flat = scores.double().flatten()
    order = torch.argsort(flat, descending=True, stable=True)
    assert torch.equal(mask.nonzero()[:, 0], order[:count].sort().values)
    torch.testing.assert_close(found[0].least.double(), flat[order[count - 1]], rtol=0, atol=0, equal_nan=True)
    digits, places = map(len, histograms(scores.dtype))
    cut = flat[order[count - 1 : count + 1]]
    tied = count < len(flat) and bool((cut[0] == cut[1]) | cut.isnan().all())
    assert sums == digits + places * tied


@pytest.mark.parametrize("kind", matrices(torch.Generator()))
def test_parts_keep_what_a_stable_sort_of_the_whole_keeps(kind):
    for seed, dtype in enumerate(TYPES):
        check(matrices(torch.Generator().manual_seed(seed))[kind].to(dtype), seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", matrices(torch.Generator()))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_parts_of_many_matrices(kind, dtype):
    for seed in range(200):
        check(matrices(torch.Generator().manual_seed(seed))[kind].to(dtype), seed)


def test_two_ways_to_the_largest_agree():
    """Each rank first drops what it surely keeps nothing of; what is left is chosen among by all."""
    for scores in (torch.randn(64, 96), torch.randint(-9, 9, (64, 96)).float()):
        expected = top_entries(scores, 300)

        def work(mesh, scores=scores):
            rows = mesh.data.of(64)
            own = top_entries(scores[rows.start : rows.stop], 300, rows.start)
            kept = largest_of_parts(own, 96, 300, lambda x: collectives.total(x, mesh.team))
            return own.take(kept.mask)

        for got, wanted in zip(Entries.cat(together(Shape(data=3), work)), expected, strict=True):
            assert torch.equal(got, wanted)
        assert all(map(torch.equal, top_of(top_entries(scores, 500), 300), expected))


def test_as_many_bytes_move_whatever_is_kept():
    def moved(n, count):
        given = []
        entries = Entries(torch.arange(n), torch.zeros(n, dtype=torch.long), torch.arange(n).float())
        largest_of_parts(entries, 1, count, lambda own: (given.append(own.nbytes), own)[1])
        return given

    assert moved(10, 1) == moved(10, 9) == moved(5000, 4000) == [8 * DIGITS] * 2
