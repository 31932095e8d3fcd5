"""The unit: the one dense product that no step can do without, into a kept buffer and as a fresh result."""

import torch
import torch.nn.functional as F
import worker
from torch import Tensor


class Unit(worker.Stepper):
    """`torch.addmm(b, x, W.T, out=buffer)`, or `F.linear(x, W, b)`."""

    def __init__(self, options: dict, given: dict[str, Tensor]) -> None:
        self.W = given["W"].clone()
        self.b = torch.zeros(len(self.W))
        self.buffer = torch.zeros(options["tokens"], len(self.W))
        self.fresh = options["fresh"]
        self.about = {"library": "F.linear" if self.fresh else "torch.addmm"}

    def step(self, x: Tensor) -> float:
        if self.fresh:
            F.linear(x, self.W, self.b)
        else:
            torch.addmm(self.b, x, self.W.T, out=self.buffer)
        return 0.0

    def weights(self) -> dict[str, Tensor]:
        return {}

    def moments(self) -> dict[str, Tensor]:
        return {}


if __name__ == "__main__":
    worker.serve(Unit)
