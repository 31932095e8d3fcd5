"""The largest of rows, of columns and of a whole matrix, exactly: ties go to the lower index, NaN counts as largest."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.codes import Entries
from sae.kernels.rows import counted, offsets_of

GROUPS = 16
SAMPLED = 64  # every 64th entry tells where the cut through a matrix will about lie
TALL = 128  # groups of rows whose largest entries tell where the cut through a column will about lie
HALVINGS = 8  # of the range in which it is looked for


def top_ids(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Returns the column ids of the k largest entries of every row, ascending.

    One entry more than k is looked up: where it equals the k-th, the choice between them was torch's and is redone.
    """
    if k == scores.shape[1]:
        return torch.arange(k, device=scores.device).expand(len(scores), k).contiguous()
    values, ids = _largest(scores, k + 1)
    ids = ids[:, :k]
    tied = _equal(values[:, k - 1], values[:, k]).nonzero()[:, 0]
    ids = ids.sort(dim=1).values
    if len(tied):
        rows, least = scores[tied], values[tied, k - 1, None]
        equal = _equal(rows, least)
        above = ~(rows <= least) & ~least.isnan()
        wanted = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        ids[tied] = wanted.nonzero()[:, 1].reshape(len(tied), k)
    return ids


def kept_of_parts(values: Float[Tensor, "s n c"], k: int) -> Int[Tensor, "s n"]:
    """Returns how many of the k largest of every row lie in each of its parts, given the c largest of each part.

    Parts lie in the order of columns, so ties go to the earlier one, and within it to the lower column: a part keeps
    that many of its own largest. c is at least k, or the size of the largest part; -inf, which fills up a part that has
    fewer, is kept nowhere.
    """
    parts, n, c = values.shape
    rows = values.transpose(0, 1).flatten(1)
    ids = top_ids(rows, min(k, parts * c))
    kept = (rows.gather(1, ids) != -torch.inf).long()
    return kept.new_zeros(n, parts).scatter_add_(1, torch.div(ids, c, rounding_mode="floor"), kept).T


def _equal(a: Tensor, b: Tensor) -> Bool[Tensor, "*shape"]:
    """Returns where two are equal, as one NaN is to another."""
    return (a == b) | (a.isnan() & b.isnan())


def _largest(scores: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Returns the k largest of every row in falling order, and their columns.

    They lie in the k groups with the largest maxima, so only the members of those are sorted: the same values as
    sorting the row, at half the time for k = 32 of 4,096 on a CPU.
    """
    n, m = scores.shape
    groups = m // GROUPS
    if m % GROUPS or groups < 2 * k:
        return torch.topk(scores, k, dim=1)
    grouped = scores.view(n, GROUPS, groups)  # group j holds columns j, j + groups, ...: the maximum vectorizes
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    members = grouped.gather(2, best[:, None, :].expand(-1, GROUPS, -1)).reshape(n, -1)
    values, chosen = torch.topk(members, k, dim=1)
    return values, best.gather(1, chosen % k) + chosen // k * groups


def top_entries(scores: Float[Tensor, "n m"], count: int, first_token: int = 0) -> Entries:
    """Returns the `count` largest entries of a matrix in the order of (token, latent); all of them if it has fewer.

    A sample of the entries gives a bound that leaves few candidates: a tenth of the time of a sort of all of them.
    """
    flat = scores.reshape(-1)
    if count >= flat.numel():
        index = torch.arange(flat.numel(), device=flat.device)
    else:
        index = _candidates(flat, count)
        index = index[_first_largest(flat[index], count)]
    tokens = torch.div(index, scores.shape[1], rounding_mode="floor")
    return Entries(tokens + first_token, index % scores.shape[1], flat[index])


def top_of(entries: Entries, count: int) -> Entries:
    """Returns the `count` largest of entries that are in the order of (token, latent), in that order."""
    return entries if count >= len(entries.ids) else entries.take(_first_largest(entries.values, count))


def _candidates(flat: Float[Tensor, "entries"], count: int) -> Int[Tensor, "candidates"]:
    """Returns the indices, ascending, of at least `count` entries among which the largest are."""
    sample = flat[::SAMPLED]
    expected = int(count / SAMPLED * 1.3) + 16
    if expected < len(sample):
        index = (~(flat < sample.topk(expected).values[-1])).nonzero()[:, 0]
        if len(index) >= count:
            return index
    return torch.arange(flat.numel(), device=flat.device)


def kth_largest(values: Float[Tensor, "m"], k: int) -> Float[Tensor, ""]:
    """Returns the value at place k from above, found without a sort: many times as fast where k is large."""
    return values.kthvalue(len(values) - k + 1).values


def _first_largest(values: Float[Tensor, "m"], count: int) -> Int[Tensor, "count"]:
    """Returns the indices, ascending, of the `count` largest values; of equal ones the first."""
    if count <= 0:
        return torch.zeros(0, dtype=torch.long, device=values.device)
    return torch.nonzero_static(among_largest(values, count), size=count)[:, 0]


def among_largest(values: Float[Tensor, "m"], count: int) -> Bool[Tensor, "m"]:
    """Returns which are the `count` largest, at least one and at most all; of equal ones the first."""
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    least = kth_largest(values, count)
    above, equal = ~(values <= least), values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def top_of_columns(scores: Float[Tensor, "n m"], budgets: Int[Tensor, "m"], first_token: int = 0) -> Entries:
    """Returns the budgets[i] largest entries of every column i (all n where it has fewer), in any order.

    Columns are sorted together with those whose budget has the same power of two above it: most budgets are small.
    """
    budgets, parts, size = budgets.clamp_max(len(scores)), [], 1
    most = int(budgets.max()) if len(budgets) else 0
    while size < 2 * most:
        ids = ((budgets > size // 2) & (budgets <= size)).nonzero()[:, 0]
        if len(ids):
            parts.append(_top_of_rows(scores[:, ids].T.contiguous(), ids, budgets[ids], size))
        size *= 2
    found = Entries.cat(parts) if parts else Entries(budgets[:0], budgets[:0], scores.reshape(-1)[:0])
    return Entries(found.tokens + first_token, found.ids, found.values)


def _top_of_rows(rows: Float[Tensor, "g n"], ids: Int[Tensor, "g"], budgets: Int[Tensor, "g"], size: int) -> Entries:
    values, tokens = rows.topk(min(size + 1, rows.shape[1]), dim=1)
    if values.shape[1] > 1:
        last = budgets[:, None].clamp_max(values.shape[1] - 1)
        tied = (values.gather(1, last - 1) == values.gather(1, last))[:, 0].nonzero()[:, 0]
        ordered = rows[tied].sort(dim=1, descending=True, stable=True)
        values[tied], tokens[tied] = (part[:, : values.shape[1]] for part in ordered)
    wanted = torch.arange(values.shape[1], device=rows.device) < budgets[:, None]
    return Entries(tokens[wanted], ids[:, None].expand_as(wanted)[wanted], values[wanted])


def reached(scores: Float[Tensor, "n m"], counts: Int[Tensor, "m"], total: int) -> Float[Tensor, "m"]:
    """Returns, of every column, a number that at least counts[i] of its entries reach, and hardly more; -inf if not so.

    The counts, which sum to `total` at the most, are above 0. A number that so many of the largest of groups reach, so
    many entries do. Columns of which more than half the groups are asked for are looked at whole: there are few. It
    takes few passes over a part of the matrix, and no sort.
    """
    size = max(1, len(scores) // TALL)
    tall = scores[: len(scores) // size * size].unflatten(0, (size, -1)).amax(0)
    found = _halved(tall, counts)
    if size > 1:
        asked, ids = counts.topk(min(len(counts), 2 * total // len(tall)))
        found = found.scatter(0, ids, _halved(scores.index_select(1, ids), asked))
    return found


def _halved(columns: Float[Tensor, "n m"], counts: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns a number for each column that at least so many reach, found by halving the range of its entries."""
    low, high = columns.amin(0), columns.amax(0)  # each many times as fast as both at once
    held = torch.empty_like(columns)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = torch.ge(columns, middle, out=held).sum(0, dtype=torch.float32) >= counts
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(counts <= len(columns), low, -torch.inf)


def by_rank(entries: Entries, m: int) -> tuple[Int[Tensor, "entries"], Int[Tensor, "m_plus_1"]]:
    """Returns (order, starts): latent i owns starts[i]:starts[i+1] of the order, in which its largest entry is first.

    Entries are given in the order of tokens, in which equal ones stay; NaN is largest.
    """
    ids, values = entries.ids, entries.values
    if values.dtype == torch.float64:
        order = torch.argsort(values, stable=True, descending=True)
        order = order[torch.argsort(ids[order], stable=True)]
    else:  # one sort of whole numbers, which is many times as fast: bits of a float32, read as one, are in its order
        bits = (values.float() + 0.0).view(torch.int32)  # -0 is 0
        rising = torch.where(values.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))
        order = torch.argsort((ids << 32) + (2**31 - 1 - rising.long()), stable=True)
    return order, offsets_of(counted(ids, m))


def ranks(order: Int[Tensor, "entries"], starts: Int[Tensor, "m_plus_1"]) -> Int[Tensor, "entries"]:
    """Returns the rank of every entry among those of its latent, 0 for the largest, from what `by_rank` returns."""
    place = torch.arange(len(order), device=order.device)
    place -= torch.repeat_interleave(starts[:-1], starts.diff(), output_size=len(order))
    return torch.empty_like(order).scatter_(0, order, place)
