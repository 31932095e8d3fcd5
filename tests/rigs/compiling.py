"""Kernels compiled for a card that is not there, by what they are called with on stand-ins for tensors."""

import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.kernels.cuda import crossing, dealing, gradients, largest, sparse, updating
from sae.kernels.update import Update

NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
SHAPES = ((131_072, 4096), (400, 20_000), (30, 7))
"""(latents, columns)."""


class Needs(NamedTuple):
    """What a kernel needs of a card."""

    registers: int
    spilled: int
    """Bytes of a thread's stack."""
    shared: int


def compiled_kernels(architecture: int) -> list[tuple[str, Needs]]:
    """Returns (name, needs) of every kernel as it is started for several sizes, for a compute capability."""
    found: dict[str, tuple[str, Needs]] = {}

    def launch(kernel: Any, programs: int, *given: Any, **options: Any) -> None:
        signature, fixed, known = signature_of(kernel, given)
        key = str((kernel.fn.__name__, signature, fixed, known, options))
        if key not in found:
            source = ASTSource(kernel, signature, fixed, known)
            done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            found[key] = kernel.fn.__name__, needs_of(done)

    with FakeTensorMode(), ExitStack() as patches:
        for module in (crossing, dealing, gradients, largest, sparse, updating):
            patches.enter_context(patch.object(module, "launch", launch))
        start_all()
    return list(found.values())


def start_all() -> None:
    """Starts every kernel as training does."""
    empty, half = torch.empty, torch.bfloat16
    for dtype in (torch.float32, half):
        largest.top_ids(empty(64, 131_072, dtype=dtype), 64)
    largest.top_ids(empty(64, 2_000_000), 300)
    crossing.above(empty(64, 131_072), empty(131_072), 5000)
    offsets, ids, values = empty(11, dtype=torch.long), empty(6400, dtype=torch.long), empty(6400)
    update = Update(1e-3, 0.9, 0.999, 1e-8, empty(()), empty(()), empty((), dtype=torch.bool))
    for m, d in SHAPES:
        by = gradients.by_latent(offsets, ids, m)
        for dtype in (torch.float32, half):
            weight, x = empty(m, d, dtype=dtype), empty(10, d, dtype=dtype)
            sparse.decode(values, weight, offsets, ids)
            sparse.errors(values, weight, offsets, ids, empty(d), x)
            sparse.products(offsets, ids, x, weight)
            gradients.weight_gradient(by, values, x, empty(m, d))
        state = [empty(m, d) for _ in range(4)]
        updating.adam(*state, update)
        updating.adam(*state, update, along=empty(m), unit=True, half=empty(m, d, dtype=half))
        updating.adam(*state, update, unit=True, touched=empty(m, dtype=torch.bool))


def signature_of(kernel: Any, given: tuple[Any, ...]) -> tuple[dict, dict, dict]:
    """Returns (types, constants, what is known to divide by 16) of a call, as Triton takes them from the arguments."""
    signature, fixed, known = {}, {}, {}
    for parameter, value in zip(kernel.params, given, strict=True):
        at, name = (parameter.num,), parameter.name
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], fixed[at] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], known[at] = f"*{NAMES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                known[at] = [["tt.divisibility", 16]]
    return signature, fixed, known


def needs_of(done: Any) -> Needs:
    """Returns what the tool that comes with Triton reads in a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", told.split("Function", 1)[1])}
    return Needs(used["REG"], used["STACK"] + used["LOCAL"], done.metadata.shared)
