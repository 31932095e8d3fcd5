"""The table of a card: a training step beside the product and the bytes that it cannot do without.

    python tests/gpu/bench.py [--out FILE] [--then PART ...]            # one card, no network, under eight minutes
    python tests/gpu/bench.py --device cpu --tiny                       # its code, on sizes that mean nothing

It writes one JSON, of what it has after each part, and a line for each figure. Parts, in this order, of which the first
three are always run:

    parity    the kernels against their definitions, and steps against those of float64 on the CPU; nothing is timed
              unless this holds
    unit      the product alone, by tiles into a kept buffer, in float32, TF32 and bfloat16; the bandwidth of a copy
    step      4,096 columns, 131,072 latents, k 64, products in bfloat16, Adam in float32, 32,768 tokens: over the
              bfloat16 product (target 1.7), and over product and bytes at measured rates (target 1.25); its memory
    shapes    the same of A, B and C of the CPU's table
    parts     each kernel at the sizes of the large step, and what torch's profiler sees of that
    rules     a step of every trainable rule at shape C, over TopK's
    sparsify  tokens a second of eai-sparsify, where it can be imported (target: ours twice as fast)
    wide      4,194,304 latents of 768 columns with Adam in float32, on one card
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT_S = 7.5 * 60
TARGETS = {"step / product": 1.7, "step / (product + bytes)": 1.25, "tokens/s, ours / sparsify": 2.0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a step."""

    d: int
    d_sae: int
    k: int
    tokens: int


LARGE = Shape(4096, 131_072, 64, 32_768)
SHAPES = {"A": Shape(512, 8192, 32, 8192), "B": Shape(768, 24_576, 64, 8192), "C": Shape(2048, 65_536, 64, 8192)}
WIDE = Shape(768, 2**22, 64, 4096)
TINY = {"large": Shape(24, 200, 4, 64), "wide": Shape(8, 500, 2, 32), "A": Shape(16, 64, 4, 32)}
TILE = 2**28  # entries of the product that are held at once


class Bench:
    """Where it runs, what is found, and what time is left."""

    def __init__(self, device: str, tiny: bool, out: Path) -> None:
        import torch

        self.device, self.tiny, self.out, self.began = device, tiny, out, time.monotonic()
        self.large = TINY["large"] if tiny else LARGE
        self.wide = TINY["wide"] if tiny else WIDE
        self.shapes = {"A": TINY["A"]} if tiny else SHAPES
        self.found: dict[str, Any] = {"tiny": tiny, "targets": TARGETS, "device": device, "torch": torch.__version__}
        if device == "cuda":
            card = torch.cuda.get_device_properties(0)
            self.found["device"] = {"name": card.name, "memory": card.total_memory, "sms": card.multi_processor_count}

    def tell(self, part: str, **figures: Any) -> None:
        """Takes figures of a part in, writes all, and prints these."""
        self.found.setdefault(part, {}).update(figures)
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        for name, value in figures.items():
            print(
                f"{part:9}{name:42} {value:.4g}" if isinstance(value, float) else f"{part:9}{name:42} {value}",
                flush=True,
            )

    def seconds(self, work: Callable[[], Any], times: int = 5, warm: int = 2) -> float:
        """Returns the median time of some work, on the card's own clock."""
        import torch

        if self.tiny:
            times, warm = 1, 0
        for _ in range(warm):
            work()
        found = []
        for _ in range(times):
            if self.device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                work()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end) / 1e3)
            else:
                at = time.perf_counter()
                work()
                found.append(time.perf_counter() - at)
        return statistics.median(found)


# ---- parts


def parity(bench: Bench) -> None:
    """Raises AssertionError where a kernel is not its definition, or a step not that of float64."""
    import torch
    from rigs import kernel_contract as contract

    from sae.kernels import cuda

    on = (cuda, bench.device, not bench.tiny)
    for dtype in contract.LOW:
        for kind in ("untied", "tied", "alike"):
            contract.test_top_ids_equal_a_stable_sort(*on, dtype, kind)
        contract.test_decode_errors_and_products(*on, dtype)
        contract.test_gradients_of_weights_and_their_squares(*on, dtype)
    for either in (True, False):
        contract.test_above_lists_what_is_above_its_cut_and_tells_of_more_than_there_is_room_for(*on, either)
        contract.test_updates_are_those_of_adam_with_clipping_projection_and_norms(*on, either)
    contract.test_entries_by_latent_keep_their_order(*on)
    shape = TINY["large"] if bench.tiny else Shape(256, 2048, 16, 512)
    losses = {}
    for device, dtype in ((bench.device, torch.float32), ("cpu", torch.float64)):
        trainer, x = trainer_of("topk", shape, device, None, dtype)
        losses[dtype] = [float(trainer.step(x, index)["loss"]) for index in range(5)]
    apart = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    assert apart < 1e-4, losses
    bench.tell("parity", holds=True, **{"loss of 5 steps, apart from float64": apart})


def unit(bench: Bench) -> None:
    """Measures the product in three precisions, and a copy."""
    import torch

    shape = bench.large
    x = torch.randn(shape.tokens, shape.d, device=bench.device)
    weight = torch.randn(shape.d_sae, shape.d, device=bench.device)
    flop = 2 * shape.tokens * shape.d * shape.d_sae
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        product = product_of(x.to(dtype), weight.to(dtype))
        took = bench.seconds(product, times=2 if name == "float32" else 5, warm=1)
        bench.tell("unit", **{f"product, {name}, s": took, f"product, {name}, TFLOP/s": flop / took / 1e12})
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = torch.empty_like(weight)
    took = bench.seconds(lambda: rows.copy_(weight), times=20)
    bench.tell("unit", **{"copy, read and written, bytes/s": 2 * weight.nbytes / took})


def product_of(x: Any, weight: Any) -> Callable[[], None]:
    """Returns what multiplies by tiles of tokens, into one buffer."""
    import torch

    size = max(1, TILE // len(weight))
    buffer = torch.empty(min(size, len(x)), len(weight), dtype=x.dtype, device=x.device)

    def multiply() -> None:
        for part in x.split(size):
            torch.mm(part, weight.T, out=buffer[: len(part)])

    return multiply


def step(bench: Bench) -> None:
    """Measures the large step, and its memory."""
    measured = timed_step(bench, bench.large, "step")
    shape, figures = bench.large, bench.found["unit"]
    product = figures["product, bfloat16, s"]
    least = product + bytes_of(shape) / figures["copy, read and written, bytes/s"]
    bench.tell("step", **{"step / product": measured / product, "step / (product + bytes)": measured / least})


def shapes(bench: Bench) -> None:
    """Measures steps at the shapes of the CPU's table."""
    import torch

    for name, shape in bench.shapes.items():
        x = torch.randn(shape.tokens, shape.d, device=bench.device).bfloat16()
        weight = torch.randn(shape.d_sae, shape.d, device=bench.device).bfloat16()
        product = bench.seconds(product_of(x, weight))
        del x, weight
        took = timed_step(bench, shape, "shapes", name)
        least = product + bytes_of(shape) / bench.found["unit"]["copy, read and written, bytes/s"]
        bench.tell(
            "shapes", **{f"{name}: step / product": took / product, f"{name}: / (product + bytes)": took / least}
        )


def bytes_of(shape: Shape) -> float:
    """Returns the least bytes of a step beside the product's operands: what is too large for any cache, once each.

    Scores are written and read; the rows that codes name are gathered for the error and both weight gradients, in
    float32; gradients are written, and read by Adam with weights and moments, which it writes, with a copy in bfloat16.
    """
    entries, weights = shape.tokens * shape.k, 2 * shape.d_sae * shape.d
    scores, gathered, activations = (
        2 * 2 * shape.tokens * shape.d_sae,
        3 * 4 * entries * shape.d,
        4 * 4 * shape.tokens * shape.d,
    )
    return scores + gathered + activations + weights * (4 + 4 + 3 * 8) + weights


def timed_step(bench: Bench, shape: Shape, part: str, label: str = "", times: int = 7) -> float:
    """Returns the seconds of a step with products in bfloat16, and tells tokens a second and the memory above state."""
    import torch

    label = f"{label}: " if label else ""
    trainer, x = trainer_of("topk", shape, bench.device, torch.bfloat16)
    state = taken(bench)
    numbers = iter(range(10**6))
    took = bench.seconds(lambda: trainer.step(x, next(numbers)), times, warm=3)
    found = {"s": took, "tokens/s": shape.tokens / took, "loss": float(trainer.step(x, next(numbers))["loss"])}
    if bench.device == "cuda":
        found["peak above state, MiB"] = (torch.cuda.max_memory_allocated() - state) / 2**20
        found["peak, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    bench.tell(part, **{f"{label}{name}": value for name, value in found.items()})
    return took


def taken(bench: Bench) -> int:
    """Returns the bytes that tensors take now, and measures peaks from here on."""
    import torch

    if bench.device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def parts(bench: Bench) -> None:
    """Measures every kernel at the sizes of the large step, and lists what takes longest in the step itself."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from sae.kernels import cuda
    from sae.kernels.update import Update

    shape, device = bench.large, bench.device
    n, m, d, k = shape.tokens, shape.d_sae, shape.d, shape.k
    tile = min(n, max(1, TILE // m))
    scores = torch.randn(tile, m, device=device)
    tiles = n / tile
    ids = torch.cat([cuda.top_ids(torch.randn(min(tile, n - i), m, device=device), k) for i in range(0, n, tile)]).view(
        -1
    )
    cut = torch.full((1,), 3.3, device=device)
    bandwidth = bench.found["unit"]["copy, read and written, bytes/s"]

    def one(name: str, work: Callable[[], Any], moved: float, of: float = 1.0) -> None:
        took = bench.seconds(work) * of
        bench.tell("parts", **{f"{name}, s": took, f"{name}, share of the copy's bandwidth": moved / took / bandwidth})

    one("top_ids, float32", lambda: cuda.top_ids(scores, k), 4 * n * m, tiles)
    half = scores.bfloat16()
    one("top_ids, bfloat16", lambda: cuda.top_ids(half, k), 2 * n * m, tiles)
    one("above, float32", lambda: cuda.above(scores, cut, 2 * k * tile), 4 * n * m, tiles)
    one("torch.topk, float32", lambda: torch.topk(scores, k, sorted=False), 4 * n * m, tiles)
    del scores, half
    offsets, values = torch.arange(0, n * k + 1, k, device=device), torch.rand(n * k, device=device)
    weight, x = torch.randn(m, d, device=device), torch.randn(n, d, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        rows, w, name, size = x.to(dtype), weight.to(dtype), str(dtype).removeprefix("torch."), dtype.itemsize
        gathered = size * n * k * d
        one(f"decode, {name}", lambda w=w: cuda.decode(values, w, offsets, ids), gathered)
        one(f"errors, {name}", lambda w=w: cuda.errors(values, w, offsets, ids, x[0], x), gathered)
        one(f"products, {name}", lambda w=w, rows=rows: cuda.products(offsets, ids, rows, w), gathered)
        out = torch.empty_like(weight)
        by = cuda.by_latent(offsets, ids, m)
        one(
            f"weight_gradient, {name}",
            lambda rows=rows, by=by, out=out: cuda.weight_gradient(by, values, rows, out),
            gathered + out.nbytes,
        )
        del rows, w, out
    one("by_latent", lambda: cuda.by_latent(offsets, ids, m), 3 * 8 * n * k)
    state, number = [torch.zeros_like(weight) for _ in range(3)], torch.ones((), device=device)
    update = Update(1e-4, 0.9, 0.999, 1e-8, number, number, number > 0)
    copy, along = torch.empty(m, d, dtype=torch.bfloat16, device=device), torch.zeros(m, device=device)
    one(
        "adam, with all",
        lambda: cuda.adam(weight, *state, update, along=along, unit=True, half=copy),
        7 * weight.nbytes + copy.nbytes,
    )
    del weight, x, state, copy
    trainer, x = trainer_of("topk", shape, device, torch.bfloat16)
    for index in range(2):
        trainer.step(x, index)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as seen:
        trainer.step(x, 2)
        taken(bench)
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    longest = sorted(seen.key_averages(), key=lambda event: -getattr(event, kind))[:16]
    bench.tell("parts", profile=[{"name": e.key[:80], "s": getattr(e, kind) / 1e6, "calls": e.count} for e in longest])


def rules(bench: Bench) -> None:
    """Measures a step of every rule."""
    import torch

    from sae.selection import trainable

    shape, took = list(bench.shapes.values())[-1], {}
    for rule in sorted(trainable(), key=lambda name: name != "topk"):
        try:
            trainer, batch = trainer_of(rule, shape, bench.device, torch.bfloat16)
            numbers = iter(range(10**6))
            took[rule] = bench.seconds(lambda t=trainer, b=batch, i=numbers: t.step(b, next(i)), times=3)
            l0 = float(trainer.step(batch, next(numbers))["l0"])
            bench.tell("rules", **{f"{rule}: / topk": took[rule] / took["topk"], f"{rule}: l0": l0})
            del trainer, batch
        except Exception as error:  # what one rule cannot do is told beside what the others can
            bench.tell("rules", **{f"{rule}: failed": f"{type(error).__name__}: {error}"[:200]})


def wide(bench: Bench) -> None:
    """Measures how many latents one card trains."""
    if bench.device == "cuda":
        import torch

        needed = 2 * bench.wide.d_sae * bench.wide.d * (4 * 4 + 2) * 1.05
        if torch.cuda.mem_get_info()[0] < needed:
            bench.tell("wide", skipped=f"the card has less than {needed / 1e9:.0f} GB free")
            return
    timed_step(bench, bench.wide, "wide", f"{bench.wide.d_sae} latents", times=3)
    bench.tell("wide", **{"16 M latents": "not tried: no optimizer of ours keeps its moments in 8 bits"})


def sparsify(bench: Bench) -> None:
    """Measures eai-sparsify's step on the same activations, under bfloat16 autocast as its trainer runs it."""
    if find_spec("sparsify") is None:
        bench.tell("sparsify", skipped="not there")
        return
    import torch
    from sparsify import SaeConfig, SparseCoder

    shape = bench.large
    coder = SparseCoder(shape.d, SaeConfig(num_latents=shape.d_sae, k=shape.k), device=bench.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    x = activations(shape, bench.device, torch.float32)
    for tokens in (shape.tokens, shape.tokens // 4):

        def stepped(tokens: int = tokens) -> None:
            coder.set_decoder_norm_to_unit_norm()
            for part in x.split(tokens):
                with torch.autocast(bench.device, torch.bfloat16):
                    coder(part, part).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()

        try:
            took = bench.seconds(stepped, times=3)
        except torch.cuda.OutOfMemoryError:
            continue
        ours = bench.found["step"]["tokens/s"]
        bench.tell("sparsify", **{"tokens at once": tokens, "s": took, "tokens/s": shape.tokens / took})
        bench.tell("sparsify", **{"tokens/s, ours / sparsify": ours * took / shape.tokens})
        return
    bench.tell("sparsify", failed="out of memory")


FIRST: dict[str, Callable[[Bench], None]] = {part.__name__: part for part in (parity, unit, step)}
THEN: dict[str, Callable[[Bench], None]] = {part.__name__: part for part in (shapes, parts, rules, sparsify, wide)}


# ---- what is trained


def activations(shape: Shape, device: str, dtype: Any) -> Any:
    """Returns random rows with one direction in all of them: some latents fire at nearly every token, as they do."""
    import torch

    draw = torch.Generator("cpu").manual_seed(1)  # the same on every device
    x = torch.randn(shape.tokens, shape.d, generator=draw).to(device, dtype)
    return x.add_(torch.randn(shape.d, generator=draw).to(device, dtype))


def trainer_of(rule: str, shape: Shape, device: str, product: Any, dtype: Any = None) -> tuple[Any, Any]:
    """Returns a trainer and the batch that it is given, with products in a precision (None: that of the weights)."""
    import torch

    from sae import kernels
    from sae.base.plugins import names
    from sae.coder.coder import SparseCoder
    from sae.coder.normalization import Normalization
    from sae.lm.masking import MaskSpec
    from sae.lm.site import Site
    from sae.objectives import Objective
    from sae.objectives.reconstruction import Reconstruction
    from sae.selection import trainable
    from sae.training.config import CoderConfig
    from sae.training.optim import OptimConfig
    from sae.training.step import Batch
    from sae.training.trainer import CoderTrainer, Schedule

    kernels.use(kernels.best(torch.device(device)))

    kind = trainable()[rule]
    options = {"k": shape.k} if "k" in kind.__dataclass_fields__ else {}
    terms = {name: names(Objective)[name]() for group in kind.needs for name in group[:1]}
    objectives = {"reconstruction": Reconstruction(), **terms}
    config = CoderConfig(shape.d_sae, selection=kind(**options), objectives=objectives)
    site = (Site("x", width=shape.d),)
    spec = config.spec(site, site, Normalization(), mask=MaskSpec(), variance=float(shape.d))
    coder = SparseCoder(spec, device).to(dtype or torch.float32)
    draw = torch.Generator("cpu" if shape.d_sae < 10_000 else device).manual_seed(0)
    with torch.no_grad():
        for name, start in kind(**options).parameters(shape.d_sae, shape.d**0.5).items():
            getattr(coder, name).copy_(start)
        for rows, copied in zip(coder.W_enc.split(2**16), coder.W_dec.split(2**16), strict=True):
            drawn = torch.randn(rows.shape, generator=draw, device=draw.device)
            rows.copy_(drawn / drawn.norm(dim=1, keepdim=True))
            copied.copy_(rows)
        coder.b_dec.zero_()
    x = activations(shape, device, coder.W_enc.dtype)
    scores = coder.preactivations(coder.centered(x[:256])[0]) if not options else None
    if scores is not None:  # thresholds where about k latents fire
        level = scores.flatten().float().sort().values[-shape.k * len(scores)]
        with torch.no_grad():
            if "threshold" in dict(coder.named_parameters()):
                coder.threshold.fill_(level)
            else:
                coder.b_enc.fill_(-level)
    schedule = Schedule(10_000, dead_after_tokens=10**9, product_dtype=product)
    trainer = CoderTrainer(coder, objectives, OptimConfig(lr=1e-4, warmup_share=0.0), schedule)
    return trainer, Batch(x, x, x.flip(0) / 10 if spec.selection.gradient_loss else None)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns what was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "bench.json")
    parser.add_argument("--then", nargs="*", choices=THEN, default=list(THEN), metavar="PART")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns 1 if one failed, or if the time was over."""
    options = parsed(argv)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    bench, failed = Bench(options.device, options.tiny, options.out), 0
    late = threading.Timer(LIMIT_S, lambda: (print("the time is over", flush=True), os._exit(1)))
    late.daemon = True
    late.start()
    for name, part in {**FIRST, **{name: THEN[name] for name in options.then}}.items():
        at = time.monotonic()
        try:
            part(bench)
        except Exception as error:  # the next part may do; the JSON says which did not
            failed += 1
            bench.tell(name, failed=f"{type(error).__name__}: {error}"[:500])
            traceback.print_exc()
            if name in FIRST:
                break
        bench.tell(name, took_s=round(time.monotonic() - at, 1))
        release(bench)
    late.cancel()
    return 1 if failed else 0


def release(bench: Bench) -> None:
    """Gives back what a part has left."""
    import gc

    import torch

    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
