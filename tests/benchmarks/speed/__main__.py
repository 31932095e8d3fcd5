"""A training step of ours beside the one product that it cannot do without, and beside other libraries' steps.

    python -m tests.benchmarks.speed --shapes A,B --threads 1,2 --peers sparsify --python sparsify=env/.../bin/python

Every contestant is a process; their steps alternate, and every figure is a ratio of two steps of one round: the median
over rounds, and the quartiles. Before that, first steps must agree in loss and gradients.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.speed.checking import agreement
from tests.benchmarks.speed.contestants import Contestant, Running, Shape, write_tensors
from tests.benchmarks.speed.telling import lines_of, machine, scaling_lines

SHAPES = {"A": Shape(512, 8192, 32), "B": Shape(768, 24576, 64), "C": Shape(2048, 65536, 64)}
PEERS = {
    "sparsify": ("sparsify", "eai-sparsify", {}),
    "saelens": ("saelens", "sae-lens", {"sparse": False}),
    "saelens_sparse": ("saelens", "sae-lens", {"sparse": True}),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning", {}),
}
FAMILIES = ("mutual_choice", "feature_choice", "jumprelu", "gated", "gradient", "transcoder", "bf16")
WIDTHS = [2**n for n in range(14, 19)]
BATCHES = [2**n for n in range(8, 13)]
LARGE = 2**32  # bytes of state from which on two libraries are resident at a time
UNIT, FRESH, BASE = "addmm(out=)", "F.linear", "at the base"


def ours(shape: Shape, kernels: str | None = None, family: str = "topk", label: str = "") -> Contestant:
    """Returns our step, of a family or (bf16) with the product in bfloat16."""
    product = "bfloat16" if family == "bf16" else "float32"
    rule = "topk" if family == "bf16" else family
    label = label or " ".join(["ours", *([kernels] if kernels else []), *([family] if family != "topk" else [])])
    return Contestant(label, "ours", shape, options={"kernels": kernels, "family": rule, "product": product})


def units(shape: Shape) -> list[Contestant]:
    """Returns the product, into a kept buffer and as a fresh result."""
    return [Contestant(label, "unit", shape, options={"fresh": label == FRESH}) for label in (UNIT, FRESH)]


def compare(contestants: list[Contestant], threads: int, steps: int, parts: bool = False) -> dict:
    """Returns what is measured of all contestants, each making one step a round.

    SystemExit if steps that should compute the same do not.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files: dict[Shape, Path] = {}
        for shape in {contestant.shape: None for contestant in contestants}:
            files[shape] = Path(folder) / f"{len(files)}.safetensors"
            write_tensors(shape, files[shape])
        running = [stack.enter_context(Running(one, files[one.shape], threads)) for one in contestants]
        about = [one.about for one in running]  # they have started side by side
        firsts = [one.ask("step")["loss"] for one in running]
        agreements = checked(running, firsts, Path(folder), files)
        for path in files.values():
            path.unlink()
        for one in running:
            one.ask("forget")
            one.ask("step")  # warm again
        rounds = [[one.ask("step") for one in running] for _ in range(steps)]
        found = {
            one.contestant.label: {
                "shape": vars(one.contestant.shape),
                "about": about[i],
                "wall": [times[i]["wall"] for times in rounds],
                "cpu": [times[i]["cpu"] for times in rounds],
                "memory": one.ask("memory"),
                "agreement": agreements.get(one.contestant.label),
            }
            for i, one in enumerate(running)
        }
        if parts:
            mine = next(one for one in running if one.contestant.driver == "ours")
            found[mine.contestant.label] |= mine.ask("parts", 3)
    return {"threads": threads, "contestants": found}


def checked(running: list[Running], losses: list[float], folder: Path, files: dict[Shape, Path]) -> dict[str, dict]:
    """Returns, by label, how the first steps of the same mathematics agree with our first; SystemExit if they do not.

    Where there are several shapes there is nothing to compare.
    """
    alike = [(one, loss) for one, loss in zip(running, losses, strict=True) if one.contestant.is_plain]
    found: dict[str, dict] = {}
    if len({one.contestant.shape for one, _ in alike}) != 1:
        return found
    mine, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    (first, loss), *others = alike
    if others:
        first.ask("gradients", str(mine))
    for other, its in others:
        other.ask("gradients", str(theirs))
        told = agreement(mine, theirs, files[other.contestant.shape], (loss, its))
        found[other.contestant.label] = told.to_json()
        print(
            f"{other.contestant.label}: loss {its:.6f}, off ours by {told.loss:.1e}; gradients by "
            f"{told.largest:.1e} at most, times {told.factor:.4f}; {told.ties} latents of near ties",
            flush=True,
        )
        if not told.holds:
            raise SystemExit(f"{other.contestant.label} computes something else: {told}")
        theirs.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: [item for item in text.split(",") if item]  # noqa: E731
    parser.add_argument("--shapes", type=listed, default=["A", "B"], help=f"of {', '.join(SHAPES)}; default A,B")
    parser.add_argument("--threads", type=listed, default=["1"], help="default 1")
    parser.add_argument("--steps", type=int, default=9, help="rounds that are timed")
    parser.add_argument("--peers", type=listed, default=[], help=f"of {', '.join(PEERS)}")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=EXECUTABLE")
    parser.add_argument("--kernels", type=listed, default=[], help="of ours: torch, native; default its own choice")
    parser.add_argument("--families", type=listed, default=[], help=f"of ours beside topk: {', '.join(FAMILIES)}")
    parser.add_argument("--parts", action="store_true", help="the operations of our step")
    parser.add_argument("--widths", action="store_true", help="instead: 16k to 262k latents at d 512, against 16k")
    parser.add_argument("--batches", action="store_true", help="instead: 256 to 4,096 tokens, against 1,024")
    parser.add_argument("--out", type=Path, help="JSON file of all that is measured")
    given = parser.parse_args()
    given.pythons = dict(item.split("=", 1) for item in given.python)

    found = []
    for threads in map(int, given.threads):
        for name, against, contestants in plans(given):
            run = {"name": name, "against": against, **compare(contestants, threads, given.steps, given.parts)}
            print("\n".join(scaling_lines(run) if against == BASE else lines_of(run)), flush=True)
            found.append(run)
            if given.out:
                given.out.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


Plan = tuple[str, str, list[Contestant]]


def plans(given: argparse.Namespace) -> list[Plan]:
    """Returns (name, label of what others are divided by, contestants) of every comparison that is asked for."""
    kernels = given.kernels or [None]
    base = Shape(512, WIDTHS[0], 32)
    if given.widths:
        return [scaling(base, Shape(512, width, 32), kernels[0]) for width in WIDTHS[1:]]
    if given.batches:
        return [scaling(base, Shape(512, WIDTHS[0], 32, n), kernels[0]) for n in BATCHES if n != base.tokens]
    return [plan for name in given.shapes for plan in of_shape(name, given, kernels)]


def scaling(base: Shape, other: Shape, kernels: str | None) -> Plan:
    """Returns the comparison of our step and of the product in two sizes."""
    mine = [ours(base, kernels, label=BASE), ours(other, kernels, label="ours")]
    products = [
        Contestant(f"{UNIT}{at}", "unit", shape, options={"fresh": False})
        for at, shape in ((f" {BASE}", base), ("", other))
    ]
    return str(other), BASE, [*mine, *products]


def of_shape(name: str, given: argparse.Namespace, kernels: list[str | None]) -> list[Plan]:
    """Returns one comparison of all; of large coders, one for each that ours is compared with."""
    shape = SHAPES[name]
    first, *rest = [ours(shape, kind) for kind in kernels]
    rest += [ours(shape, kind, family) for kind in kernels for family in given.families]
    for peer in given.peers:
        driver, folder, options = PEERS[peer]
        python = os.path.abspath(given.pythons.get(driver, f"env/{folder}/bin/python"))
        if not Path(python).exists():
            raise SystemExit(f"{peer}: there is no {python}; README.md here says how to make it, --python where it is")
        rest.append(Contestant(peer, driver, shape, python, options))
    title = f"{name}: {shape}"
    if shape.state_bytes > LARGE and rest:
        return [(title, UNIT, [*units(shape), first, one]) for one in rest]
    return [(title, UNIT, [*units(shape), first, *rest])]


if __name__ == "__main__":
    main()
