"""What every driver shares: the command line, the order of the batches, the held-out measurement and the result file.

A driver hands `main` one function `train(args, x) -> (reconstruct, steps)`. It trains on the rows of `x` [n, d_in] and
returns the finished coder in its library's inference form: reconstruct(x) -> (x_hat [b, d_in], codes [b, d_sae]).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]


def row_order(n: int, batch: int, epochs: int, seed: int) -> Tensor:
    """Row numbers [steps, batch]: one permutation per epoch, end to end; the last incomplete batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    steps = len(order) // batch
    return order[: steps * batch].view(steps, batch)


class Batches:
    """The rows of `x` in a fixed order, as fresh tensors; every iteration starts over, `forever` never ends."""

    def __init__(self, x: Tensor, order: Tensor):
        self.x, self.order = x, order

    def __iter__(self) -> Iterator[Tensor]:
        return (self.x[rows] for rows in self.order)

    def __len__(self) -> int:
        return len(self.order)

    def forever(self) -> Iterator[Tensor]:
        while True:
            yield from self


def held_out_fvu(x: Tensor, reconstruct: Reconstruct, chunk: int = 2048) -> tuple[float, float, float]:
    """FVU, L0 and dead share over all rows of `x`.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2, sums over all rows and columns in float64, the mean that of `x`.
    """
    mean = x.double().mean(0)
    residual, total, active, fired = 0.0, 0.0, 0, None
    for part in x.split(chunk):
        x_hat, codes = reconstruct(part)
        residual += (part.double() - x_hat.double()).square().sum().item()
        total += (part.double() - mean).square().sum().item()
        active += int((codes != 0).sum())
        now = (codes != 0).any(0)
        fired = now if fired is None else fired | now
    return residual / total, active / len(x), 1 - fired.float().mean().item()


def parser() -> argparse.ArgumentParser:
    """The command line all drivers have in common."""
    result = argparse.ArgumentParser()
    result.add_argument("--data", required=True, help="safetensors file with `train` and `held_out`")
    result.add_argument("--lr", type=float, required=True)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--epochs", type=int, default=2)
    result.add_argument("--d-sae", type=int, default=2048)
    result.add_argument("--k", type=int, default=32)
    result.add_argument("--batch", type=int, default=1024)
    result.add_argument("--rows", type=int, help="use only the first rows of `train`, for a quick check")
    result.add_argument("--out", type=Path, required=True)
    return result


def main(library: str, version: str, train: Callable, arguments: argparse.ArgumentParser | None = None) -> None:
    """Parse the command line, train, measure on the held-out rows, write the result."""
    args = (arguments or parser()).parse_args()
    data = load_file(args.data)
    x, held_out = data["train"][: args.rows], data["held_out"]
    start = time.perf_counter()
    reconstruct, steps = train(args, x)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        fvu, l0, dead = held_out_fvu(held_out, reconstruct)
        train_fvu, _, dead_train = held_out_fvu(x[-100_000:], reconstruct)
    options = {name: str(value) for name, value in vars(args).items() if name not in ("out", "lr", "seed")}
    result = {
        "library": library,
        "version": version,
        "lr": args.lr,
        "seed": args.seed,
        "held_out_fvu": fvu,
        "train_fvu": train_fvu,
        "l0": l0,
        "dead_share": dead,  # never fired over the held-out rows
        "dead_share_train": dead_train,  # never fired over the last 100,000 training rows
        "seconds": seconds,
        "tokens_per_s": steps * args.batch / seconds,
        "steps": steps,
        "options": options,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(".partial")
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    scratch.rename(args.out)
    print(json.dumps(result))
