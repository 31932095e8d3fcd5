"""The kernels on a CPU in C++, compiled at first use: exact, in float32, the same bits for any number of threads.

They are called through plain C, so a build takes two seconds and needs a compiler and nothing else; the interpreter is
free for others meanwhile. `kernels.cpp` has the mathematics, `sae/kernels/reference.py` its definition.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.codes import ByLatent
from sae.kernels.native.building import Unavailable, library
from sae.kernels.update import Update

__all__ = [
    "above", "adam", "available", "by_latent", "decode", "errors", "products", "takes", "top_ids",
    "weight_gradient",
]  # fmt: skip
LARGEST = 2**31 - 1  # entries, rows and columns are counted in 32 bits


def available() -> str | None:
    """Returns why there are no native kernels here, None if there are; they are built now if they have not been."""
    found = library()
    return str(found) if isinstance(found, Unavailable) else None


def takes(*tensors: Tensor | None) -> bool:
    """Returns whether these tensors are such as the kernels work on: float32 on the CPU."""
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def top_ids(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Returns the ids of the k largest of every row, ascending; ties go to the lower id, NaN is larger than all."""
    n, m = scores.shape
    if not 0 <= k <= m:
        raise ValueError(f"top_ids: {k} of {m} columns")
    ids = torch.empty(n, k, dtype=torch.long)
    if ids.numel():
        _call("top_ids", *_rows("scores", scores), n, m, k, ids)
    return ids


def above(
    scores: Float[Tensor, "n m"], cuts: Float[Tensor, "m_or_1"], capacity: int
) -> tuple[Int[Tensor, "n"], Int[Tensor, "capacity"], Int[Tensor, ""]]:
    """Returns (found entries of each row, their places token * m + latent, how many are above their cuts or NaN).

    Found are the first `capacity` of them, in the order of (token, latent); places beyond the last are -1.
    """
    n, m = scores.shape
    if len(cuts) not in (1, m):
        raise ValueError(f"above: {len(cuts)} cuts of {m} columns")
    counts, places, count = (torch.empty(shape, dtype=torch.long) for shape in ((n,), (capacity,), ()))
    each = int(len(cuts) > 1)
    _call("above", *_rows("scores", scores), n, m, _read("cuts", cuts), each, capacity, counts, places, count)
    return counts, places, count


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d"]:
    """Returns the codes times the decoder."""
    out = torch.empty(offsets.numel() - 1, weight.shape[1])
    _call("decode", *_codes(offsets, ids, weight), _read("values", values, ids.shape), _plain("weight", weight), out)
    return out


def products(
    offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], rows: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]
) -> Float[Tensor, "nnz"]:
    """Returns <rows_t, weight_j> for every entry (t, j)."""
    out = torch.empty(len(ids))
    wanted = (offsets.numel() - 1, weight.shape[1])
    _call("products", *_codes(offsets, ids, weight), _read("rows", rows, wanted), _plain("weight", weight), out)
    return out


def errors(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    rest: Float[Tensor, "*n d"],
    target: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "nnz"]]:
    """Returns (target - rest - codes times decoder, the products of that with the decoder at the support)."""
    n, d = offsets.numel() - 1, weight.shape[1]
    error, out = torch.empty(n, d), torch.empty(len(ids))
    rest = rest.expand(n, d)
    rest = rest if rest.stride(1) == 1 else rest.contiguous()
    _call(
        "errors",
        *_codes(offsets, ids, weight),
        _read("values", values, ids.shape),
        _plain("weight", weight),
        *_rows("rest", rest),
        _read("target", target, (n, d)),
        error,
        out,
    )
    return error, out


def by_latent(offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], m: int) -> ByLatent:
    """Returns the entries sorted by latent, those of a latent in their order; order and tokens are int32."""
    n, nnz = offsets.numel() - 1, len(ids)
    _small("entries", nnz)
    starts = torch.empty(m + 1, dtype=torch.long)
    order, tokens = (torch.empty(nnz, dtype=torch.int32) for _ in range(2))
    given = _plain("offsets", offsets, None, torch.long), _plain("ids", ids, None, torch.long)
    _call("by_latent", n, m, nnz, *given, starts, order, tokens, threads=False)
    return ByLatent(starts, order, tokens)


def weight_gradient(
    by: ByLatent, coefficients: Float[Tensor, "nnz"], rows: Float[Tensor, "n d"], out: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Writes sums of coefficient times row over a latent's entries, else 0; returns the sum of squares."""
    (n, d), m, nnz = rows.shape, by.starts.numel() - 1, len(by.order)
    squares = torch.empty((), dtype=torch.float64)
    _call(
        "weight_gradient",
        *(n, m, d, nnz),
        _plain("starts", by.starts, None, torch.long),
        _plain("order", by.order, None, torch.int32),
        _plain("tokens", by.tokens, (nnz,), torch.int32),
        _read("coefficients", coefficients, (nnz,)),
        _read("rows", rows),
        _plain("out", out, (m, d)),
        squares,
    )
    return squares


def adam(
    weight: Float[Tensor, "m *d"],
    gradient: Float[Tensor, "m *d"],
    mean: Float[Tensor, "m *d"],
    square: Float[Tensor, "m *d"],
    update: Update,
    *,
    along: Float[Tensor, "m"] | None = None,
    unit: bool = False,
    half: Tensor | None = None,
    touched: Bool[Tensor, "m"] | None = None,
) -> None:
    """Takes one step of Adam (Kingma 2015, algorithm 1) in place, if it applies.

    `along` is the product of gradient and weight row by row over the row's square: it takes from the gradient what only
    changes norms. `unit` then divides rows by their norms. `half` gets the new weight, rounded. Rows that are not
    `touched` are not visited.
    """
    shape = weight.shape
    m, d = shape if len(shape) == 2 else (1, weight.numel()) if touched is None else (weight.numel(), 1)
    if len(shape) != 2 and (unit or along is not None):
        raise ValueError("adam: `along` and `unit` are of rows")
    tensors = {"weight": weight, "gradient": gradient, "mean": mean, "square": square}
    _call(
        "adam",
        *(m, d),
        *(_plain(name, tensor, shape) for name, tensor in tensors.items()),
        *map(ctypes.c_double, update[:4]),
        _plain("step", update.step, ()),
        _plain("scale", update.scale, ()),
        _plain("applies", update.applies, (), torch.bool),
        None if along is None else _plain("along", along, (m,)),
        int(unit),
        None if half is None else _plain("half", half, shape, torch.bfloat16),
        None if touched is None else _plain("touched", touched, (m,), torch.bool),
    )


def _call(name: str, *arguments: Any, threads: bool = True) -> None:
    """Calls a kernel with integers, addresses of tensors and None for what is not there; IndexError if it says so."""
    found = library()
    if isinstance(found, Unavailable):
        raise RuntimeError(f"no native kernels: {found}")
    given: list[Any] = [ctypes.c_int(torch.get_num_threads())] if threads else []
    for argument in arguments:
        if isinstance(argument, Tensor):
            given.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            given.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
    kernel: Callable[..., int] = getattr(found, name)
    if kernel(*given):
        raise IndexError(f"{name}: an offset or an id lies outside")


def _plain(
    name: str, tensor: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns a tensor that the kernels may read; ValueError where they would read something else."""
    told = tensor.dtype, tensor.device.type, tensor.is_contiguous()
    if told != (dtype, "cpu", True) or (shape is not None and tensor.shape != shape):
        wanted = "" if shape is None else f" {list(shape)}"
        raise ValueError(f"{name}: {list(tensor.shape)} {told} is not a contiguous {dtype}{wanted} on the CPU")
    return tensor


def _read(name: str, tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Returns a tensor that is only read, which may be one whose rows lie apart."""
    return _plain(name, tensor.contiguous(), shape)


def _rows(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """Returns a matrix whose rows are contiguous, and how far they lie apart."""
    _small("columns", tensor.shape[1])
    if not takes(tensor) or tensor.stride(1) != 1:
        raise ValueError(f"{name}: {tensor.dtype} on {tensor.device} is not float32 with contiguous rows on the CPU")
    return tensor, tensor.stride(0)


def _codes(offsets: Tensor, ids: Tensor, weight: Tensor) -> tuple[int, int, int, int, Tensor, Tensor]:
    checked = _plain("offsets", offsets, None, torch.long), _plain("ids", ids, None, torch.long)
    return offsets.numel() - 1, weight.shape[0], weight.shape[1], len(ids), *checked


def _small(what: str, number: int) -> None:
    if number > LARGEST:
        raise ValueError(f"{number} {what} are more than {LARGEST}")
