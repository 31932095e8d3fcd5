"""Adam whose moments are kept in 8 bits, block by block (Dettmers 2022, arXiv 2110.02861), with torchao's codes.

    moment = table[code] x largest of the block      a block: 256, 128 or 64 columns of one row

A step is Adam's own, some rows at a time, on what the codes stand for. Of the second moment the root is kept: the
smallest value that a code has beside 0 is some 3e-7 of the block's largest, and of squares that would be a gradient of
6e-4. A second moment of 0 beside a mean that is not would move a weight by mean / eps in a step whose gradient is 0:
seldom in other networks, and the rule for rows of latents that are silent. Blocks lie within a row, so that no latent's
moments are told in shares of another's.

What is saved is memory: 2.03 to 2.13 bytes a weight for 8. Biases, and weights whose columns are no multiple of 64,
keep moments of 32 bits.
"""

import logging
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels import kernel
from sae.kernels.update import Update
from sae.optimizers import Optimizer

BLOCKS = (256, 128, 64)
ON_CPU, ELSEWHERE = 1 << 17, 1 << 22  # numbers that are taken out of their codes at once; a CPU caches as many
CUT = 14  # bits of a float32 that are not looked at to find its code: it is the nearest to one part in a thousand
SIGNED = {"exp_avg": True, "root_avg_sq": False}


@Optimizer.register_subclass("adam8bit")
@dataclass(frozen=True)
class Adam8bit(Optimizer):
    """Adam with moments of 8 bits."""

    def validate(self) -> None:
        """Raises ConfigError without torchao."""
        if find_spec("torchao") is None:
            raise ConfigError("optim.kind: adam8bit needs torchao; pip install 'sae-interp[adam8bit]'")

    def bytes_of_state(self, width: int) -> float:
        """Returns two codes, and of every block two numbers."""
        block = _block(width)
        return 2 * (1 + 4 / block) if block else super().bytes_of_state(width)

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns codes [m, d] and, of each block, the largest [m, blocks]; of what is no such matrix, Adam's."""
        block = _block(weight.shape[1]) if weight.dim() == 2 and weight.dtype == torch.float32 else 0
        if not block:
            return super().state(weight)
        found = {}
        for name in SIGNED:
            found[f"{name}.codes"] = torch.zeros_like(weight, dtype=torch.uint8)
            found[f"{name}.largest"] = weight.new_zeros(len(weight), weight.shape[1] // block)
        return found

    def update(
        self,
        weight: Float[Tensor, "m *d"],
        gradient: Float[Tensor, "m *d"],
        state: dict[str, Tensor],
        update: Update,
        *,
        along: Float[Tensor, "m"] | None = None,
        unit: bool = False,
        half: Tensor | None = None,
        touched: Bool[Tensor, "m"] | None = None,
    ) -> None:
        """Takes a step of Adam in place, and rounds the moments; if it does not apply, not even those."""
        if "exp_avg" in state:
            return super().update(weight, gradient, state, update, along=along, unit=unit, half=half, touched=touched)
        size = max(1, (ON_CPU if weight.device.type == "cpu" else ELSEWHERE) // weight.shape[1])
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            own = {name: value[rows] for name, value in state.items()}
            mean, root = (_taken_out(own, name) for name in SIGNED)
            mean *= root > 0
            square = root.square_()
            some = [None if of_rows is None else of_rows[rows] for of_rows in (along, half, touched)]
            options = {"along": some[0], "unit": unit, "half": some[1], "touched": some[2]}
            kernel("adam", weight)(weight[rows], gradient[rows], mean, square, update, **options)
            for name, moment in zip(SIGNED, (mean, square.sqrt_()), strict=True):
                _put_back(own, name, moment, update.applies)
        return None


def _block(width: int) -> int:
    """Returns the columns of a block, 0 if they cannot be equal."""
    return next((block for block in BLOCKS if width % block == 0), 0)


def _taken_out(state: dict[str, Tensor], name: str) -> Float[Tensor, "m d"]:
    codes, largest = state[f"{name}.codes"], state[f"{name}.largest"]
    values = _table(SIGNED[name], codes.device).index_select(0, codes.reshape(-1).int())
    return (values.view(largest.numel(), -1) * largest.reshape(-1, 1)).view(codes.shape)


def _put_back(state: dict[str, Tensor], name: str, moment: Float[Tensor, "m d"], applies: Bool[Tensor, ""]) -> None:
    codes, largest = state[f"{name}.codes"], state[f"{name}.largest"]
    scaled, found = _library().scale_tensor(moment, codes.shape[1] // largest.shape[1])
    upper = (scaled.view(torch.int32) >> CUT).bitwise_and_((1 << 32 - CUT) - 1)
    nearest = _codes(SIGNED[name], codes.device).index_select(0, upper.view(-1))
    for held, new in ((codes, nearest.view_as(codes)), (largest, found.view_as(largest))):
        held.copy_(torch.where(applies, new, held))


@cache
def _library() -> Any:
    """Returns torchao's functions; what it tells of its own kernels when it is imported is of none that are used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("torchao.optim.quant_utils")
    finally:
        logging.disable(before)


@cache
def _table(signed: bool, device: torch.device) -> Float[Tensor, "256"]:
    """Returns the values of the codes, ascending, between -1 or 0 and 1."""
    return torch.tensor(_library().create_dynamic_map(signed=signed), device=device)


@cache
def _codes(signed: bool, device: torch.device) -> UInt8[Tensor, "_"]:
    """Returns torchao's code of the numbers that begin with the same bits, by those: a search takes far longer."""
    table = _table(signed, torch.device("cpu"))
    middle = torch.arange(1 << 32 - CUT, dtype=torch.int32) << CUT | 1 << CUT - 1
    return _library().quantize_8bit_with_qmap(middle.view(torch.float32), table).to(device)
