"""What makes a host wait for its device: reads of numbers, and results whose size the numbers decide.

On a CPU nothing waits; but each of these would, on a card, so they are counted here.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZED_BY_NUMBERS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
}
PICKED = ("aten::index", "aten::index_put", "aten::index_put_")
READ = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu")


class Waits(TorchDispatchMode):
    """Counts them by name; `found` says where from."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        given = args[1] if name in PICKED and len(args) > 1 else []
        masked = any(getattr(index, "dtype", None) in (torch.bool, torch.uint8) for index in given)
        repeated = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in SIZED_BY_NUMBERS or masked or repeated:
            self.found.append(name)
        return func(*args, **kwargs)


@contextmanager
def waits(monkeypatch):
    """Yields the names of all reads and waits while open."""
    mode = Waits()
    with monkeypatch.context() as patch:
        for name in READ:
            original = getattr(torch.Tensor, name)

            def read(self, *args, original=original, name=name, **kwargs):
                mode.found.append(f"Tensor.{name}")
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        with mode:
            yield mode.found
