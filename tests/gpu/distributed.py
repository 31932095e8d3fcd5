"""What ranks do on one card. Not collected by pytest: it takes minutes, and a GPU.

    python tests/gpu/distributed.py [--device cpu] [--only NAME ...]

It prints a line for each check, with its figures, and ends with 1 if one has failed. Less than eight minutes pass: each
check has so many seconds and no more (`LIMITS`). With `--device cpu` all that needs no card is gone through, on small
sizes. What is checked:

    nccl        sae.train inside of a group of one over NCCL, and over gloo and NCCL, as torchrun --nproc-per-node 1
    agree       2 and 4 ranks over gloo on one device come to what one comes to: float64 in 60 steps, float32 in 10
    cost        what the host waits for in a step, and collectives, of every rule
    lost        a rank that is suspended, or killed, is named and ends the others; what goes on equals what ran through
    checkpoint  for how much of a checkpoint's writing the training is held
    memory      the device's peak against the estimate
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

LIMITS = {"nccl": 60, "agree": 160, "cost": 50, "lost": 130, "checkpoint": 30, "memory": 40}
CPU_TIMES = 4  # so much longer on a CPU, which has no part in the eight minutes
DEADLINE_S = 5.0
NAMED_WITHIN_S = 5.0  # beyond the deadline
LARGE = {"d": 2048, "d_sae": 32_768, "k": 32, "tokens": 4096}
SMALL = {"d": 64, "d_sae": 512, "k": 4, "tokens": 256}
TINY = {"d": 24, "d_sae": 200, "k": 4, "tokens": 128}
QUICK = ["--text.max_tokens", "100000", "--coder.d_sae", "512", "--eval.tokens", "1024", "--log.every_steps", "1"]
QUICK += ["--tokens", "61440", "--checkpoints.every_steps", "10", "--activations.statistics_tokens", "2048"]
Line = tuple[str, bool | None, str]
"""What was checked, whether it holds (None: it could not be tried), and its figures."""


class Place(NamedTuple):
    """Where a check runs, and until when."""

    device: str
    folder: Path
    end: float

    @property
    def sizes(self) -> dict[str, int]:
        return LARGE if self.device == "cuda" else SMALL


# ---- checks: in this process, which touches no card


def nccl(place: Place) -> Iterator[Line]:
    alone = result(place, start(place, "trained", backend=""))
    for backend in ("cpu:gloo,cuda:nccl", "nccl"):
        if place.device != "cuda":
            yield f"{backend}, one rank", None, "there is no card"
            continue
        found = result(place, start(place, "trained", backend=backend))
        yield (
            f"{backend}, one rank",
            abs(found["fvu"] / alone["fvu"] - 1) < 1e-3,
            f"FVU {found['fvu']:.6f}, without a group {alone['fvu']:.6f}",
        )
    found = result(place, start(place, "trained", backend="gloo"))
    yield "gloo, one rank", found == alone, f"FVU {found['fvu']:.6f}, without a group {alone['fvu']:.6f}"


def agree(place: Place) -> Iterator[Line]:
    for n in (2, 4):
        found, *_ = [result(place, child) for child in [start(place, "agreeing", n, rank) for rank in range(n)]]
        for rule, (loss, weights) in found["float64"].items():
            told = f"loss {loss:.1e}, weights {weights:.1e} after 60 steps"
            yield f"{n} ranks, float64, {rule}", max(loss, weights) <= 1e-9, told
        for rule, (loss, gradient) in found["float32"].items():
            told = f"loss {loss:.1e} over 10 steps, first gradient {gradient:.1e}"
            yield f"{n} ranks, float32, {rule}", loss <= 1e-4 and gradient <= 1e-5, told


def cost(place: Place) -> Iterator[Line]:
    for rule, (collectives, warned, profiled) in result(place, start(place, "counted")).items():
        told = f"{collectives} collectives; the host waits {profiled} times by the profiler"
        told += f", {warned} by the sync debug mode" if place.device == "cuda" else " (on a CPU: reads a number)"
        yield f"a step of {rule}", collectives > 0, told


def lost(place: Place) -> Iterator[Line]:
    whole = run(place, "whole", "through")
    codes = [child.wait(left(place)) for child in whole]
    if codes != [0, 0]:
        raise RuntimeError(f"an undisturbed run of two ranks ended with {codes}: {said(place, 'through', 0)}")
    for label, number, victim, at in (("suspended", signal.SIGSTOP, 1, 12), ("killed", signal.SIGKILL, 0, 33)):
        children = run(place, "broken", label)
        wait_for_step(place, place.folder / "broken", at, children, label)
        children[victim].send_signal(number)
        struck = time.monotonic()
        code = children[1 - victim].wait(left(place))
        took = time.monotonic() - struck
        children[victim].kill()
        text = said(place, label, 1 - victim)
        named = f"rank {victim} " in text
        holds = code not in (0, None) and named and took <= DEADLINE_S + NAMED_WITHIN_S
        yield f"rank {victim} is {label}", holds, f"the other ends after {took:.1f} s with {code}: {last(text)}"
    again = [child.wait(left(place)) for child in run(place, "broken", "again")]
    yield "what goes on equals what ran through", *same(place, again)


def checkpoint(place: Place) -> Iterator[Line]:
    found = result(place, start(place, "saved"))
    share = found["held"] / (found["held"] + found["written"])
    told = f"held {found['held']:.3f} s, then written in {found['written']:.2f} s: {share:.1%} of {found['gb']:.2f} GB"
    yield "training is held by a checkpoint", share <= 0.1, told


def memory(place: Place) -> Iterator[Line]:
    found = result(place, start(place, "filled"))
    ratio = found["peak"] / found["estimate"]
    holds = abs(ratio - 1) <= 0.1 if place.device == "cuda" else ratio <= 1.1
    told = f"{found['peak'] / 1e9:.2f} GB at the peak, estimated {found['estimate'] / 1e9:.2f} GB: {ratio:.2f}"
    yield "memory", holds, told


CHECKS: dict[str, Callable[[Place], Iterator[Line]]] = {
    "nccl": nccl,
    "agree": agree,
    "cost": cost,
    "lost": lost,
    "checkpoint": checkpoint,
    "memory": memory,
}


# ---- processes


def left(place: Place) -> float:
    """Returns the seconds that a check still has."""
    return max(0.1, place.end - time.monotonic())


def start(place: Place, work: str, n: int = 1, rank: int = 0, backend: str = "gloo") -> subprocess.Popen:
    """Starts one rank at some work of this script; what it returns lies in a file."""
    command = [sys.executable, __file__, "--device", place.device, "--work", work, "--into", str(place.folder)]
    environment = environment_of(n, rank, place) if n > 1 else dict(os.environ)
    environment["SAE_TRY_BACKEND"] = backend
    return spawn(place, command, f"{work}-{n}-{rank}", environment)


def spawn(place: Place, command: list[str], name: str, environment: dict[str, str]) -> subprocess.Popen:
    with (place.folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    child.name = name  # type: ignore[attr-defined]
    CHILDREN.append(child)
    return child


CHILDREN: list[subprocess.Popen] = []


def environment_of(n: int, rank: int, place: Place) -> dict[str, str]:
    """Returns the environment of a rank, as a launcher sets it; the port is one for all of a start."""
    if rank == 0:
        while True:
            PORT[0] = random.SystemRandom().randrange(10_000, 32_000)
            with socket.socket() as free:
                if free.connect_ex(("127.0.0.1", PORT[0])):
                    break
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
    return {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT[0])}


PORT = [0]


def result(place: Place, child: subprocess.Popen) -> dict[str, Any]:
    """Returns what a process has found."""
    code, name = child.wait(left(place)), child.name  # type: ignore[attr-defined]
    if code:
        text = (place.folder / f"{name}.log").read_text(errors="replace")
        raise RuntimeError(f"{name} ended with {code}: {last(text)}")
    rank = int(name.rpartition("-")[2])
    return json.loads((place.folder / f"{name.partition('-')[0]}-{rank}.json").read_text())


def run(place: Place, folder: str, log: str) -> list[subprocess.Popen]:
    """Starts two ranks of sae-train on the device; the folder's run goes on, if there is one."""
    where = place.folder / folder
    begin = ["--resume", str(where)] if where.exists() else ["--run-dir", str(where), *QUICK]
    begin += ["--model.device", place.device, "--ranks.backend", "gloo", "--ranks.deadline_s", str(DEADLINE_S)]
    if where.exists():
        begin = begin[:2]
    command = [sys.executable, "-m", "cli.train", *begin]
    return [spawn(place, command, f"{log}-{rank}", environment_of(2, rank, place)) for rank in range(2)]


def said(place: Place, log: str, rank: int) -> str:
    return (place.folder / f"{log}-{rank}.log").read_text(errors="replace")


def last(text: str) -> str:
    """Returns the last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line] or lines
    return told[-1][:160] if told else "nothing said"


def wait_for_step(place: Place, folder: Path, step: int, children: list[subprocess.Popen], log: str) -> None:
    file = folder / "metrics.jsonl"
    while not file.is_file() or file.read_bytes().count(b"\n") < step:
        if any(child.poll() is not None for child in children) or time.monotonic() > place.end:
            raise RuntimeError(f"no step {step} of {folder.name}: {last(said(place, log, 0))}")
        time.sleep(0.02)


def same(place: Place, codes: list[int]) -> tuple[bool, str]:
    """Compares two run folders; on a card, sums of floats may come in another order, and how much that is, is said."""
    a, b = place.folder / "whole", place.folder / "broken"
    if codes != [0, 0]:
        return False, f"it ended with {codes}: {last(said(place, 'again', 0))}"
    files = ["metrics.jsonl", "evaluation.json", *(str(p.relative_to(a)) for p in a.glob("coders/*/*.safetensors"))]
    differing = [name for name in files if (a / name).read_bytes() != (b / name).read_bytes()]
    if not differing:
        return True, f"byte for byte: {', '.join(Path(name).name for name in files)}"
    fvu = [json.loads((side / "metrics.jsonl").read_text().splitlines()[-1])["fvu"] for side in (a, b)]
    told = f"{', '.join(differing)} differ; FVU of the last step {fvu[0]:.8f} and {fvu[1]:.8f}"
    return place.device == "cuda" and abs(fvu[0] / fvu[1] - 1) < 1e-2, told


# ---- works: each in a process of its own, where torch is


def trained(device: str, folder: Path) -> dict[str, Any]:
    """A run inside of a group of one rank, or of none."""
    import torch
    import torch.distributed as dist

    import sae

    torch.manual_seed(0)
    backend, options = os.environ["SAE_TRY_BACKEND"], quick_config(device)
    name = backend.replace(",", "-").replace(":", "-") or "alone"
    with ExitStack() as group:
        if backend:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            group.callback(dist.destroy_process_group)
        (found,) = sae.train(options, run_dir=folder / name, progress=False).metrics.values()
    return {"fvu": found["reconstruction"]["fvu"], "ce": found["loss"]["ce_spliced"]}


def quick_config(device: str) -> dict[str, Any]:
    """Returns the config of a run of the embedded model; on a card it is one with a coder that fills memory."""
    large = device == "cuda"
    return {
        "name": "gpu",
        "model": {"name": "quickstart", "device": device},
        "text": {"source": "quickstart", "max_tokens": 100_000},
        "activations": {"sites": ["layers.2"], "statistics_tokens": 4096},
        "coder": {"d_sae": 2**18 if large else 512, "selection": {"type": "topk", "k": 16}},
        "tokens": 20 * 1024,
        "batch_tokens": 1024,
        "eval": {"tokens": 2048},
    }


def agreeing(device: str, folder: Path) -> dict[str, Any]:
    """How far this group is from one rank alone, by rule; rank 0 tells."""
    import torch

    from sae.parallel.ranks import RanksConfig, process_group, rank
    from sae.selection import trainable

    large, n = LARGE if device == "cuda" else SMALL, int(os.environ["WORLD_SIZE"])
    jobs = [("float64", rule, TINY, 60) for rule in trainable()]
    jobs += [("float32", rule, large, 10) for rule in ("topk", "mutual_choice")[: 4 // n]]  # each moves gigabytes
    several, found = {}, {"float64": {}, "float32": {}}
    with process_group(RanksConfig(backend="gloo", deadline_s=30.0)):
        first = rank() == 0
        for kind, rule, sizes, steps in jobs:
            several[kind, rule] = training(rule, sizes, steps, getattr(torch, kind), device)
    for kind, rule, sizes, steps in jobs if first else ():
        losses, gradients, weights = several.pop((kind, rule))
        wanted = training(rule, sizes, steps, getattr(torch, kind), device)
        loss = float(((losses - wanted[0]).abs() / wanted[0].abs()).max())
        own, other = (weights, wanted[2]) if kind == "float64" else (gradients, wanted[1])
        apart = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(own, other, strict=True))
        found[kind][rule] = loss, apart
    return found


def counted(device: str, folder: Path) -> dict[str, Any]:
    """By rule: collectives of a step, and what the host waits for by torch's debug mode and by the profiler."""
    import warnings

    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from sae.parallel import ranks
    from sae.selection import trainable

    cuda, found = device == "cuda", {}
    waits = ("Synchronize",) if cuda else ("aten::_local_scalar_dense",)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with ranks.process_group():
        heart = ranks.group().heart
        for rule in trainable():
            trainer, batches = trainer_of(rule, LARGE if cuda else SMALL, 3, torch.float32, device)
            for step in range(2):
                trainer.step(batches(step), step)
            batch, before = batches(2), heart.begun
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                if cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                trainer.step(batch, 2)
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            collectives = heart.begun - before
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
                trainer.step(batch, 2)
            synced = sum("synchroniz" in str(one.message) for one in warned)
            seen = sum(event.count for event in profiled.key_averages() if any(w in event.key for w in waits))
            found[rule] = collectives, synced, seen
    dist.destroy_process_group()
    return found


def saved(device: str, folder: Path) -> dict[str, Any]:
    """Seconds for which a checkpoint holds the training, and those in which a thread then writes it."""
    import torch

    from sae.training.saving import Part, Saver

    trainer, batches = trainer_of("topk", LARGE, 4, torch.float32, device)
    trainer.step(batches(0), 0)
    tensors, saver, found = trainer.state()[0], Saver(folder / "saved", 1), {}
    parts = {"coder-0": Part.of(tensors)}
    saver.make_room(parts)
    for step in (1, 2):
        saver.wait()
        began = time.monotonic()
        saver.save(step, parts, {})
        held = time.monotonic()
        saver.wait()
        found = {"held": held - began, "written": time.monotonic() - held}
    return found | {"gb": sum(x.nbytes for x in tensors.values()) / 1e9}


def filled(device: str, folder: Path) -> dict[str, Any]:
    """The peak of a run, and what is estimated: of the card's memory, or of the process."""
    import torch

    import sae
    from sae.training.arguments import as_config
    from sae.training.estimate import estimate

    config = as_config(quick_config(device))
    expected = estimate(config)
    sae.train(config, run_dir=folder / "filled", progress=False)
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(), "estimate": expected.peak_memory - expected.process}
    import resource

    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "estimate": expected.peak_memory}


def trainer_of(rule: str, sizes: dict[str, int], steps: int, dtype: Any, device: str) -> tuple[Any, Callable]:
    """Returns a trainer on made-up activations, and what gives this rank's share of the batch of a step."""
    import torch

    from sae.base.plugins import names
    from sae.coder.normalization import Normalization
    from sae.lm.masking import MaskSpec
    from sae.lm.site import Site
    from sae.objectives import Objective
    from sae.objectives.auxk import AuxK
    from sae.objectives.reconstruction import Reconstruction
    from sae.parallel import ranks
    from sae.selection import trainable
    from sae.training.beginning import new_coder
    from sae.training.config import CoderConfig
    from sae.training.measuring import Recipe, measure
    from sae.training.optim import OptimConfig
    from sae.training.step import Batch
    from sae.training.trainer import CoderTrainer, Schedule

    kind, d, tokens = trainable()[rule], sizes["d"], sizes["tokens"]
    options = {"k": sizes["k"]} if "k" in kind.__dataclass_fields__ else {}
    terms = {name: names(Objective)[name]() for group in kind.needs for name in group[:1]}
    objectives = {"reconstruction": Reconstruction(), "auxk": AuxK(k=8), **terms}
    config = CoderConfig(sizes["d_sae"], selection=kind(**options), objectives=objectives)
    fixed = torch.Generator().manual_seed(0)
    directions = torch.randn(16 * sizes["k"], d, generator=fixed).to(device, dtype)

    def drawn(seed: int, n: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        codes = torch.rand(n, len(directions), generator=draw) * (torch.rand(n, len(directions), generator=draw) < 0.05)
        return codes.to(device, dtype) @ directions

    site = (Site("x", width=d),)
    recipe = Recipe(Normalization(), 10.0, config.center, config.balance_sites)
    found = measure({"x": drawn(999, 2048).float()}, site, site, MaskSpec(), recipe)
    coder = new_coder(config, found, device).to(dtype)
    trainer = CoderTrainer(coder, objectives, OptimConfig(lr=1e-3), Schedule(steps, dead_after_tokens=3 * tokens))

    def share(step: int) -> Batch:
        mine = ranks.own_share().of(tokens)
        x = drawn(step, tokens)[mine.start : mine.stop]
        g = drawn(5000 + step, tokens)[mine.start : mine.stop] / 10 if coder.spec.selection.gradient_loss else None
        return Batch(x, x, g)

    return trainer, share


def training(rule: str, sizes: dict[str, int], steps: int, dtype: Any, device: str) -> tuple[Any, list, list]:
    """Returns the losses of some steps, the gradients of the first and the weights after the last."""
    import torch

    trainer, share = trainer_of(rule, sizes, steps, dtype, device)
    losses, gradients = [], []
    for step in range(steps):
        losses.append(trainer.step(share(step), step)["loss"])
        gradients = gradients or [p.grad.detach().clone().cpu() for p in trainer.coder.parameters()]
    weights = [p.detach().cpu() for p in trainer.coder.parameters()]
    return torch.tensor(losses, dtype=torch.float64), gradients, weights


WORKS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    work.__name__: work for work in (trained, agreeing, counted, saved, filled)
}


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns what was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the checks, or one process of one; returns the exit code."""
    options = parsed(argv)
    if options.work:
        found = WORKS[options.work](options.device, options.into)
        (options.into / f"{options.work}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return 0
    failed, began = 0, time.monotonic()
    for name in options.only:
        at, limit = time.monotonic(), LIMITS[name] * (CPU_TIMES if options.device == "cpu" else 1)
        with tempfile.TemporaryDirectory(prefix=f"ranks-{name}-") as folder:
            try:
                for line in CHECKS[name](Place(options.device, Path(folder), at + limit)):
                    failed += line[1] is False
                    tell(name, line)
            except Exception as error:
                failed += 1
                tell(name, ("not gone through", False, f"{type(error).__name__}: {error}"))
            for child in CHILDREN:
                child.kill()
                child.wait()
            CHILDREN.clear()
        print(f"{name:11}{time.monotonic() - at:.0f} s of {limit}", flush=True)
    print(f"{failed} failed, in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def tell(name: str, line: Line) -> None:
    what, holds, figures = line
    print(f"{name:11}{'skipped' if holds is None else 'pass' if holds else 'FAIL':8}{what:38} {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
