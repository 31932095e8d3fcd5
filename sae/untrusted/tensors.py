"""The tensors of one coder: each is taken with its shape, and none may be left over."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sae.base.errors import DataError, nearest

FINITE_CHUNK = 2**20  # numbers that are looked at together, for which some more bytes are taken than they have


class Tensors(Mapping[str, Tensor]):
    """The tensors of a coder's files. What is taken is checked; what nobody takes is an error in the end."""

    def __init__(self, source: str, found: dict[str, Tensor]) -> None:
        self.source, self._found, self._left = source, found, dict.fromkeys(found)

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor and counts it as used; DataError if it is missing."""
        if name not in self._found:
            raise DataError(f"{self.source}: tensor {name} is missing.{nearest(name, self._found)}")
        self._left.pop(name, None)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor of exactly this shape (or any, if none is given); DataError names it otherwise."""
        tensor = self[name]
        if shape and tuple(tensor.shape) != shape:
            raise DataError(f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def matrix(self, name: str, rows: int, columns: int, transposed: bool = False) -> Tensor:
        """Returns a matrix as [rows, columns], whichever way it is stored.

        A square one is taken as the format documents it, which is `transposed` or not; else the orientation follows
        from the lengths of the biases. DataError if neither way fits.
        """
        tensor = self[name]
        shape = tuple(tensor.shape)
        if shape not in ((rows, columns), (columns, rows)):
            raise DataError(
                f"{self.source}: tensor {name} has shape {shape}, expected {(rows, columns)} or its transpose"
            )
        flip = transposed if rows == columns else shape == (columns, rows)
        return tensor.T if flip else tensor

    def number(self, name: str) -> float:
        """Returns a tensor of one value as a number; DataError names it if it is none."""
        tensor = self[name]
        if tensor.numel() != 1:
            raise DataError(f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected one number")
        check_finite({name: tensor}, self.source)
        return float(tensor)

    def ignore(self, *names: str) -> None:
        """Says that these tensors, as far as they are there, do not bear on what the coder computes."""
        for name in names:
            self._left.pop(name, None)

    def refuse_unused(self) -> None:
        """Raises DataError naming a tensor that was not used: then this is not the coder that it was taken for."""
        if self._left:
            names = ", ".join(list(self._left)[:4])
            raise DataError(f"{self.source}: tensor {names} is not part of this format; refused rather than left out")


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises DataError naming a tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{source}: tensor {name} holds NaN or Inf, read as {tensor.dtype}")


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no number of a tensor is NaN or infinite."""
    rows = tensor if tensor.dim() else tensor[None]
    at_once = max(1, FINITE_CHUNK * len(rows) // max(1, rows.numel()))
    parts = rows.split(at_once)  # what isfinite makes of one takes more room than the part
    return all(bool(torch.isfinite(p.float() if p.element_size() == 1 else p).all()) for p in parts)
