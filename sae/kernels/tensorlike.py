"""What sparse codes answer like the dense tensor that they stand for, without making it.

One rule: `op(z, ...)` is what `op(z.to_dense(), ...)` is. The result is sparse again where its zeros are those of z,
and a tensor where a reduction or a column is asked for; what would fill the zeros (`z + 1`, `z == 0`) is a TypeError
that names `to_dense`. Everything is differentiable in the values.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae.kernels.rows import entries_of, flat, offsets_of, rows_of

if TYPE_CHECKING:
    from typing import Self

CHUNK_ENTRIES = 2**24  # of the dense rows that are looked at together
WHOLE = slice(None)


class Top(NamedTuple):
    """The largest codes of each token, as `torch.topk` gives them."""

    values: Tensor
    indices: Tensor


class Tensorlike:
    """Operations on codes [*leading, d_sae]; `SparseLatents` says what they consist of."""

    offsets: Tensor
    ids: Tensor
    values: Tensor
    d_sae: int
    leading: tuple[int, ...] | None
    __array_ufunc__ = None  # so that NumPy leaves arithmetic to what stands here
    __hash__ = object.__hash__  # of the object, as a tensor's

    to_dense: Callable[[], Tensor]

    @property
    def n_tokens(self) -> int:
        """Returns the number of tokens: the product of the leading dimensions."""
        return self.offsets.numel() - 1

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the dense tensor, [*leading, d_sae]."""
        return torch.Size((*((self.n_tokens,) if self.leading is None else self.leading), self.d_sae))

    @property
    def ndim(self) -> int:
        """Returns the number of dimensions, that of the latents included."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Returns where the values are."""
        return self.values.device

    def size(self, dim: int | None = None) -> Any:
        """Returns the shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        raise TypeError("the truth of many codes is not one; ask (z != 0).any(), or z.to_dense()")

    def __repr__(self) -> str:
        what = " x ".join(map(str, self.shape[:-1])) or "1"
        said = [f"{what} token{'s' * (self.shape[:-1].numel() != 1)}", f"d_sae {self.d_sae}"]
        if self.device.type != "meta":
            fired = int((self.values != 0).sum())
            said += [f"{fired} nonzero", f"L0 {fired / max(1, self.n_tokens):.1f}"]
        said.append(str(self.dtype).removeprefix("torch."))
        return f"SparseLatents({', '.join(said)}{'' if self.device.type == 'cpu' else f', {self.device}'})"

    def __getattr__(self, name: str) -> Any:
        hint = f"; z.to_dense().{name} has it" if hasattr(Tensor, name) and not name.startswith("_") else ""
        raise AttributeError(f"SparseLatents has no {name!r}{hint}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = getattr(cls, func.__name__, None) if args and isinstance(args[0], cls) else None
        if own is None:
            raise TypeError(f"torch's {func.__name__} takes no SparseLatents; pass z.to_dense()")
        return own(*args, **(kwargs or {}))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        made = self.to_dense().detach().cpu().numpy()
        return made if dtype is None else made.astype(dtype, copy=False)  # None would be float64

    def __dlpack__(self, **options: Any) -> Any:
        return self.to_dense().detach().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()

    def to(self, *args: Any, **kwargs: Any) -> "Self":
        """Returns the codes on another device, or with values of another type; arguments as of `Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        offsets, ids = self.offsets.to(values.device), self.ids.to(values.device)
        return self._with(offsets=offsets, ids=ids, values=values)

    def cpu(self) -> "Self":
        """Returns the codes on the CPU."""
        return self.to("cpu")

    def cuda(self) -> "Self":
        """Returns the codes on the GPU."""
        return self.to("cuda")

    def float(self) -> "Self":
        """Returns the codes in float32: ones and zeros of what a comparison gave."""
        return self.to(torch.float32)

    def detach(self) -> "Self":
        """Returns the codes without gradient."""
        return self._with(values=self.values.detach())

    def numpy(self) -> Any:
        """Returns the dense codes as an array."""
        return self.__array__()

    def to_sparse(self) -> Tensor:
        """Returns the codes as torch's sparse COO tensor [*leading, d_sae]."""
        places = torch.stack(self._coordinates())
        return torch.sparse_coo_tensor(places, self.values, self.shape, is_coalesced=False)

    def __getitem__(self, key: Any) -> Any:
        """Returns `to_dense()[key]`: sparse codes, or a tensor where the last index is that of one latent.

        Some latents, by a slice or ids, are codes of so many latents. TypeError where tokens and latents are paired by
        tensors, or picked by a mask of both.
        """
        *tokens, latents = self._keys(key)
        picked = torch.arange(self.n_tokens, device=self.offsets.device).reshape(self.shape[:-1])[tuple(tokens)]
        offsets, entries = entries_of(self.offsets, picked.reshape(-1))
        found = self._with(offsets=offsets, ids=self.ids[entries], values=self.values[entries], leading=picked.shape)
        return found if isinstance(latents, slice) and latents == WHOLE else found._of_latents(latents)

    def _keys(self, key: Any) -> list[Any]:
        """Returns an index as one for each dimension, the last of latents; those of tokens may have others between."""
        keys = [_as_index(one, self.device) for one in (key if isinstance(key, tuple) else (key,))]
        sizes = [0 if one is None or one is ... else _bools(one) or 1 for one in keys]
        if sum(sizes) > self.ndim:
            raise IndexError(f"{sum(sizes)} indices for the {self.ndim} dimensions of {self!r}")
        gaps = [i for i, one in enumerate(keys) if one is ...] or [len(keys)]
        if len(gaps) > 1:
            raise IndexError("an index has one ellipsis at most")
        keys[gaps[0] : gaps[0] + 1] = [WHOLE] * (self.ndim - sum(sizes))
        last = keys[-1]
        scattered = any(isinstance(one, Tensor) and one.ndim for one in keys[:-1])
        if last is None or _bools(last) > 1 or (scattered and isinstance(last, Tensor)):
            raise TypeError("codes are indexed by token, then by latent, not by both at once; index z.to_dense()")
        return keys

    def _of_latents(self, latents: Any) -> Any:
        wanted = torch.arange(self.d_sae, device=self.device)[latents]
        if wanted.ndim > 1 or (wanted.ndim and len(wanted.unique()) < len(wanted)):
            raise TypeError("latents: give each once, in one list; index z.to_dense() for more")
        place = self.ids.new_full((self.d_sae,), -1).index_copy(
            0, wanted.reshape(-1), torch.arange(wanted.numel()).to(wanted)
        )
        mine = place[self.ids] >= 0
        tokens, ids, values = rows_of(self.offsets)[mine], place[self.ids[mine]], self.values[mine]
        if not wanted.ndim:
            return values.new_zeros(self.n_tokens).index_put((tokens,), values).reshape(self.shape[:-1])
        offsets = offsets_of(torch.bincount(tokens, minlength=self.n_tokens))
        return self._with(offsets=offsets, ids=ids, values=values, d_sae=len(wanted))

    def _with(self, **changes: Any) -> "Self":
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]  # it is a dataclass, as `SparseLatents`

    def _coordinates(self) -> list[Int[Tensor, "nnz"]]:
        """Returns the place of every entry in each dimension."""
        tokens = rows_of(self.offsets)
        return [*(torch.unravel_index(tokens, self.shape[:-1]) if self.ndim > 1 else ()), self.ids]

    def _each(self, op: Callable[[Any, Any], Any], other: Any) -> Any:
        """Returns op(z, other) where it is 0 at the zeros of z, which are not looked at one by one."""
        if isinstance(other, Tensorlike):
            return self._both(op, other)
        if not isinstance(other, (Tensor, int, float)):
            if not hasattr(other, "__array__"):
                return NotImplemented
            other = torch.as_tensor(other)
        at = other
        if isinstance(other, Tensor) and other.ndim:
            try:
                whole = other.expand(self.shape)
            except RuntimeError:
                raise TypeError(f"a tensor {list(other.shape)} does not stretch to codes {list(self.shape)}") from None
            at = whole[tuple(self._coordinates())]
        if bool(op(self.values.new_zeros(()), other).any()):
            raise _dense(op, "which has no zeros where z has")
        return self._with(values=op(self.values, at))

    def _both(self, op: Callable[[Any, Any], Any], other: "Tensorlike") -> Any:
        if self.shape != other.shape:
            raise TypeError(f"codes {list(self.shape)} and {list(other.shape)} are not of one shape")
        if bool(op(self.values.new_zeros(()), other.values.new_zeros(())).any()):
            raise _dense(op, "which is not 0 where both are")
        places = torch.cat([flat(codes.offsets, codes.ids, self.d_sae) for codes in (self, other)])
        union, index = places.unique(return_inverse=True)
        a, b = (
            codes.values.new_zeros(len(union)).index_put((at,), codes.values)
            for codes, at in zip((self, other), index.split([len(self.ids), len(other.ids)]), strict=True)
        )
        rows = torch.div(union, self.d_sae, rounding_mode="floor")
        offsets = offsets_of(torch.bincount(rows, minlength=self.n_tokens))
        return self._with(offsets=offsets, ids=union - rows * self.d_sae, values=op(a, b))

    def __mul__(self, other: Any) -> Any:
        return self._each(operator.mul, other)

    def __add__(self, other: Any) -> Any:
        return self._each(operator.add, other)

    def __sub__(self, other: Any) -> Any:
        return self._each(operator.sub, other)

    def __truediv__(self, other: Any) -> Any:
        return self._each(operator.truediv, other)

    def __pow__(self, other: Any) -> Any:
        return self._each(operator.pow, other)

    __rmul__, __radd__ = __mul__, __add__  # 0 + z, with which sum() begins, is z

    def __rsub__(self, other: Any) -> Any:
        return (-self)._each(_from, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._each(_into, other)

    def __neg__(self) -> "Self":
        return self._with(values=-self.values)

    def __abs__(self) -> "Self":
        return self.abs()

    def __lt__(self, other: Any) -> Any:
        return self._each(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._each(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._each(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._each(operator.ge, other)

    def __eq__(self, other: object) -> Any:
        return self._each(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._each(operator.ne, other)

    def abs(self) -> "Self":
        """Returns the sizes of the codes."""
        return self._with(values=self.values.abs())

    def sum(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Returns sums over dimensions, over everything without; of what a comparison gave, counts in int64."""
        index, kept, _ = self._groups(dim, keepdim)
        values = self.values if self.values.is_floating_point() else self.values.long()
        return values.new_zeros(kept.numel()).index_add(0, index, values).reshape(kept)

    def mean(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Returns means over dimensions, zeros included; of what a comparison gave, shares."""
        return self.sum(dim, keepdim) / self._groups(dim, keepdim)[2]

    def amax(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Returns the largest values over dimensions, zeros included."""
        index, kept, size = self._groups(dim, keepdim)
        full = torch.bincount(index, minlength=kept.numel()) == size
        start = self.values.new_zeros(kept.numel()).masked_fill(full, -math.inf)
        return start.scatter_reduce(0, index, self.values, "amax").reshape(kept)

    def any(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Returns whether any is not 0, over dimensions."""
        return (self != 0).sum(dim, keepdim) > 0

    def max(self, dim: int | None = None) -> Any:
        """Returns the largest value or, over the latents (dim -1), (values, indices)."""
        return self.amax() if dim is None else Top(*(found[..., 0] for found in self.topk(1, dim)))

    def topk(self, k: int, dim: int = -1) -> Top:
        """Returns the k largest codes of each token and their ids, [*leading, k]; zeros where fewer are above 0."""
        if dim % self.ndim != self.ndim - 1:
            raise TypeError(f"topk: dim {dim} is not that of the latents; z.to_dense().topk({k}, {dim}) takes any")
        rows = self._with(leading=None)
        size = max(1, CHUNK_ENTRIES // self.d_sae)
        parts = [rows[start : start + size].to_dense().topk(k) for start in range(0, max(1, self.n_tokens), size)]
        return Top(*(torch.cat(found).reshape(*self.shape[:-1], k) for found in zip(*parts, strict=True)))

    def _groups(self, dim: int | Sequence[int] | None, keepdim: bool) -> tuple[Int[Tensor, "nnz"], torch.Size, int]:
        """Returns (the group of every entry, the shape of the groups, the size of a group), where `dim` is reduced."""
        dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        for one in dims:
            if not -self.ndim <= one < self.ndim:
                raise IndexError(f"dim: {one} is none of the {self.ndim} dimensions of {self!r}")
        gone = {one % self.ndim for one in dims}
        index = torch.zeros_like(self.ids)
        for i, places in enumerate(self._coordinates()):
            index = index if i in gone else index * self.shape[i] + places
        sizes = [1 if i in gone else size for i, size in enumerate(self.shape)]
        left = sizes if keepdim else [size for i, size in enumerate(sizes) if i not in gone]
        return index, torch.Size(left), math.prod(self.shape[i] for i in gone)


def _from(z: Any, other: Any) -> Any:
    return z + other  # of -z


def _into(z: Any, other: Any) -> Any:
    return other / z


def _as_index(one: Any, device: torch.device) -> Any:
    if one is None or one is ... or isinstance(one, (int, slice)):
        return one
    if isinstance(one, Tensorlike):
        raise TypeError("codes are no index; z * (z > 1) keeps some of z, and z.to_dense() takes a dense mask")
    index = torch.as_tensor(one, device=device)
    index = index if index.numel() else index.to(torch.bool if index.dtype == torch.bool else torch.long)
    return int(index) if index.ndim == 0 and index.dtype != torch.bool else index


def _bools(index: Any) -> int:
    """Returns the number of dimensions that a mask takes; 0 of another index."""
    return index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 0


def _dense(op: Callable[..., Any], why: str) -> TypeError:
    name = getattr(op, "__name__", "").strip("_<>")
    return TypeError(f"{name}: the result would be dense, {why}; say it of z.to_dense(), or of z.values")
