"""A device that is not here: its tensors are kept by the CPU, which reads them for nobody who does not ask.

It tells of code that mixes a device with the CPU, as every GPU refuses, or asks for float64, as Apple's refuse; not of
operations that a device lacks, how exact it is, or how fast. It is there in one thread alone.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
LACKING: set[torch.dtype] = set()
"""The kinds of numbers that it has not."""
MIXING = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "masked_fill", "set_")
"""What takes tensors of the CPU beside those of the device."""


class Away(torch.Tensor):
    """A tensor of the device; to PyTorch one without values, so that nothing reads it behind the device's back."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Away":
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, requires_grad=held.requires_grad, **place
        )

    def __init__(self, held: torch.Tensor) -> None:
        if held.dtype in LACKING:
            raise TypeError(f"this device has no {held.dtype}")
        self.held = held

    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    tolist = lambda self: self.cpu().tolist()  # noqa: E731 which PyTorch does of no subclass
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(call, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Within the block there is such a device, for whoever asks."""

    def __enter__(self) -> Any:
        def made_here(make: Any) -> Any:
            def tensor(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
                made = make(data, *arguments, **options)
                return made if device is None else made.to(device)  # which to PyTorch would be without values

            return tensor

        own = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
        self.undo = lambda: [setattr(torch, name, make) for name, make in own.items()]
        for name, make in own.items():
            setattr(torch, name, made_here(make))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.undo()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(call, args, kwargs or {})


def _run(call: Any, args: Any, kwargs: Any) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    away = {id(value.held): value for value in given if isinstance(value, Away)}
    name = call.overloadpacket.__name__
    if away and name not in MIXING and any(not isinstance(value, Away) and value.dim() for value in given):
        raise RuntimeError(f"tensors of the device and of the CPU in {name}")
    asked = kwargs.get("device")
    to = torch.device(asked).type == DEVICE.type if asked is not None else bool(away)
    here = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs

    def unwrapped(value: Any) -> Any:
        return value.held if isinstance(value, Away) else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return away.get(id(value)) if id(value) in away else Away(value) if to else value

    return tree_map(wrapped, call(*tree_map(unwrapped, args), **tree_map(unwrapped, here)))
