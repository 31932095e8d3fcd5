"""Tensors on their way from the host to where coders are."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

BUFFERS = 2  # one is filled while the other is read


class Carrier:
    """Brings tensors to a device: to a CUDA one over pinned buffers and a stream of its own.

    A batch is so copied while the device still works on the last one, and the host waits for neither; only for a
    buffer that is not read to its end, `BUFFERS` batches later.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device = device
        self.cuda = torch.cuda if device.type == "cuda" else cuda
        self.stream = self.cuda.Stream(device) if self.cuda else None
        self.buffers: dict[Any, list[tuple[Tensor, Any]]] = defaultdict(list)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Returns a tensor on the device; `name` says what it is, the same in every batch."""
        if self.cuda is None or x.device.type != "cpu" or not x.numel():
            return x.to(self.device)
        buffer, read = self._buffer(name, x)
        buffer.copy_(x)
        here = self.cuda.current_stream(self.device)
        with self.cuda.stream(self.stream):
            found = buffer.to(self.device, non_blocking=True)
            read.record(self.stream)
        here.wait_event(read)
        found.record_stream(here)
        return found

    def _buffer(self, name: str, x: Tensor) -> tuple[Tensor, Any]:
        """Returns a pinned tensor of the shape of x that nothing is read from any more, and what says when it is."""
        waiting = self.buffers[name, x.dtype]
        memory, read = waiting.pop(0) if len(waiting) == BUFFERS else (x.new_empty(0), self.cuda.Event())
        read.synchronize()
        if memory.numel() < x.numel():
            memory = torch.empty(x.numel(), dtype=x.dtype, pin_memory=self.device.type == "cuda")
        waiting.append((memory, read))
        return memory[: x.numel()].view(x.shape), read
