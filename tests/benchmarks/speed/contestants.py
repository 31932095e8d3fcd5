"""Who takes part in a comparison: processes that each hold one coder, and the tensors that they share."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae.base.seeding import generator
from sae.evaluation.synthetic import Synthetic

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BATCHES = 4
DEAD_AFTER = 10**9  # tokens: no latent is dead in any library, and AuxK is asked for but adds nothing


@dataclass(frozen=True)
class Shape:
    """The sizes of a step."""

    d: int
    latents: int
    k: int
    tokens: int = 1024

    @property
    def state_bytes(self) -> int:
        """Returns what weights, gradients and moments take in float32."""
        return 16 * 2 * self.d * self.latents

    def __str__(self) -> str:
        return f"d {self.d:,}, {self.latents:,} latents, k {self.k}, {self.tokens:,} tokens"


def write_tensors(shape: Shape, path: Path) -> None:
    """Writes batches x, the weights W that encoder and decoder start from, and the first batch's mean `center`.

    Activations are sums of few of 2 d directions, scaled so that the variance of the first batch is 1: with it a sum of
    squares a token, which some libraries minimize, is the FVU that others do.
    """
    truth = Synthetic(d=shape.d, n_directions=2 * shape.d, active=24.0)
    x, _ = truth.sample(BATCHES * shape.tokens, "speed")
    first = x[: shape.tokens]
    x = x / (first - first.mean(0)).square().sum(1).mean().sqrt()
    W = torch.randn(shape.latents, shape.d, generator=generator(0, "init"))
    W /= W.norm(dim=1, keepdim=True)
    save_file({"x": x, "W": W, "center": x[: shape.tokens].mean(0)}, path)


@dataclass(frozen=True)
class Contestant:
    """Something whose steps are timed."""

    label: str
    driver: str
    shape: Shape
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Returns whether it is a step of TopK in float32, so that all who are compute the same."""
        family, product = (self.options.get(name) for name in ("family", "product"))
        return self.driver != "unit" and family in (None, "topk") and product in (None, "float32")


class Running:
    """A contestant's process, until `with` ends it."""

    def __init__(self, contestant: Contestant, data: Path, threads: int) -> None:
        self.contestant, shape = contestant, contestant.shape
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        environment.pop("PYTHONPATH", None)
        if contestant.python == sys.executable:
            environment["PYTHONPATH"] = str(ROOT)
        if contestant.driver == "ours":
            environment["GOMP_SPINCOUNT"] = "1000"  # as commands have it
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # ends with the process
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [contestant.python, HERE / f"step_{contestant.driver}.py", str(writing)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=(writing,),
            text=True,
            env=environment,
        )
        os.close(writing)
        self.replies = os.fdopen(reading)
        rate = 2e-4 / (shape.latents / 2**14) ** 0.5
        sizes = {"k": shape.k, "tokens": shape.tokens, "lr": rate, "dead_after": DEAD_AFTER}
        self._say({"data": str(data), "threads": threads, **sizes, **contestant.options})

    def _say(self, request: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is told by the reply that does not come
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def _reply(self) -> dict[str, Any]:
        reply = self.replies.readline()
        if not reply:
            self.log.seek(0)
            raise SystemExit(f"{self.contestant.label} has ended:\n{self.log.read()[-3000:]}")
        return json.loads(reply)

    @cached_property
    def about(self) -> dict[str, str]:
        """Returns what the process says of itself once its coder is there; to be read before anything is asked."""
        return self._reply()

    def ask(self, name: str, *arguments: object) -> dict[str, Any]:
        """Returns what the session in the process replies to a request."""
        self._say([name, arguments])
        return self._reply()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.replies.close()
        if any(error):
            self.process.kill()
        self.process.wait()
        self.log.close()
