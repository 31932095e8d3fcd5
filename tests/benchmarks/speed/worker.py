"""One library in a process of its own, which keeps its coder and makes a step when it is asked to.

Runs in the environment of that library: needs torch and safetensors alone. The first line of standard input is a JSON
object of options; after that every line is one request. Each is answered by one line of JSON.
"""

import ctypes
import json
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BETA1 = 0.9  # of every library's Adam here
STATE_BYTES = 16  # of a float32 weight with its gradient and two moments


class Stepper(ABC):
    """A coder in training, in the terms of its library."""

    about: dict[str, str]
    """Library with version, and whatever else a reader should know."""

    @abstractmethod
    def step(self, x: Tensor) -> float:
        """Makes one whole optimizer step; returns the loss before it."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Returns all trained tensors by name; W_enc and W_dec as the library has them."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Returns Adam's mean gradients of W_enc [latents, d], b_enc, W_dec [latents, d], b_dec."""


def of_optimizer(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns Adam's mean gradients by name."""
    return {name: optimizer.state[weight]["exp_avg"] for name, weight in weights.items()}


def make_fused(optimizer: torch.optim.Optimizer) -> None:
    """Has an Adam that a library has made, but not used, take its step in one fused kernel."""
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)


def memory(name: str) -> int:
    """Returns a size in bytes from /proc/self/status: VmRSS, or VmHWM, the peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """Gives the system back what is freed, and starts VmHWM over at what is resident then."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Returns (wall seconds, CPU seconds of all threads, what the work returned)."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


class Session:
    """What a process holds between requests."""

    def __init__(self, build: Callable[[dict, dict[str, Tensor]], Stepper], options: dict) -> None:
        torch.set_num_threads(options["threads"])
        small = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
        first = build({**options, "k": 4, "tokens": 32}, {"x": small, "W": small, "center": small.mean(0)})
        first.step(small[:32])  # what a library loads and sets up at its first step is not of the coder
        del first
        with safe_open(options["data"], "pt") as file:
            self.batches = file.get_tensor("x").clone().split(options["tokens"])
            forget_peak()
            self.resident = memory("VmRSS")
            self.stepper = build(options, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        self.steps = 0

    def about(self) -> dict:
        return {**self.stepper.about, "torch": torch.__version__, "python": platform.python_version()}

    def step(self) -> dict:
        x = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        wall, cpu, loss = timed(lambda: self.stepper.step(x))
        return {"wall": wall, "cpu": cpu, "loss": loss}

    def gradients(self, path: str) -> dict:
        """Writes the gradients that Adam was given in the first step, as its mean gradients tell them."""
        if self.steps != 1:
            raise RuntimeError(f"gradients are told after the first step, not after {self.steps}")
        moments = self.stepper.moments().items()
        save_file({name: (mean.detach() / (1 - BETA1)).contiguous() for name, mean in moments}, path)
        return {}

    def forget(self) -> dict:
        forget_peak()
        return {}

    def memory(self) -> dict:
        """Returns the peak since `forget`, above what was resident before the coder, and what its state takes."""
        numbers = sum(weight.numel() for weight in self.stepper.weights().values())
        return {"peak": memory("VmHWM") - self.resident, "state": STATE_BYTES * numbers}

    def parts(self, steps: int) -> dict:
        """Returns (name, shapes given, seconds a step) of every operation, and seconds a step outside of all."""
        with torch.profiler.profile(record_shapes=True) as profile:
            spent = sum(self.step()["wall"] for _ in range(steps)) / steps
        events = profile.key_averages(group_by_input_shape=True)
        found = [(e.key, e.input_shapes, e.self_cpu_time_total / 1e6 / steps) for e in events]
        return {"parts": [*found, ("outside operations", [], spent - sum(seconds for *_, seconds in found))]}


def serve(build: Callable[[dict, dict[str, Tensor]], Stepper]) -> None:
    """Answers requests until standard input ends, on the pipe whose number is given: libraries print to stdout."""
    replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    session = Session(build, json.loads(sys.stdin.readline()))
    print(json.dumps(session.about()), file=replies)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(session, name)(*arguments)), file=replies)
