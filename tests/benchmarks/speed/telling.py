"""What was measured, as lines of Markdown."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

MIB = 2**20


def machine() -> dict[str, object]:
    """Returns what the numbers depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return {"cpu": name, "cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}


def quartiles(times: Sequence[float], units: Sequence[float]) -> str:
    """Returns the median of ratios of one round, and the quartiles."""
    low, middle, high = np.percentile(np.array(times) / np.array(units), [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def lines_of(run: dict) -> list[str]:
    """Returns a run's table, and after it the parts of our step where they were asked for."""
    found, against = run["contestants"], run["against"]
    unit = found[against]
    mine = next((one for label, one in found.items() if label.startswith("ours")), unit)
    seconds = np.median(unit["cpu"]), np.median(unit["wall"])
    lines = [
        "",
        f"**{run['name']}**; threads: {run['threads']}; {len(unit['cpu'])} rounds; "
        f"{against}: {seconds[0]:.4f} s CPU, {seconds[1]:.4f} s",
        "",
        f"| step | library | CPU / {against} | wall / {against} | CPU / ours | wall / ours | MiB above state |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, one in found.items():
        memory = one["memory"]
        above = f"{(memory['peak'] - memory['state']) / MIB:,.0f}" if memory["state"] else ""
        ratios = [quartiles(one[clock], other[clock]) for other in (unit, mine) for clock in ("cpu", "wall")]
        about = one["about"]
        library = f"{about['library']}, torch {about['torch']}" + (f", Adam {about['adam']}" if "adam" in about else "")
        lines.append(f"| {label} | {library} | {' | '.join(ratios)} | {above} |")
    for label, one in found.items():
        if "parts" in one:
            lines += ["", f"Operations of {label}, wall time / unit:", "", *parts(one["parts"], seconds[1])]
    return lines


def scaling_lines(run: dict) -> list[str]:
    """Returns, for step and product, what a latent costs at a token against another size of the same, in CPU time."""
    found, against = run["contestants"], run["against"]
    lines = []
    for label, base in (("ours", against), ("addmm(out=)", f"addmm(out=) {against}")):
        one, other = found[label], found[base]
        sizes = [x["shape"]["latents"] * x["shape"]["tokens"] for x in (one, other)]
        ratios = quartiles(np.array(one["cpu"]) / sizes[0], np.array(other["cpu"]) / sizes[1])
        lines.append(f"| {run['name']} | {run['threads']} | {label} | {np.median(one['cpu']):.3f} s | {ratios} |")
    return lines


def parts(found: list, unit: float, most: int = 14) -> list[str]:
    """Returns the operations that take the longest, by name and by the shape of what they are given first."""
    total: Counter[tuple[str, str]] = Counter()
    for name, shapes, seconds in found:
        first = next((" x ".join(map(str, shape)) for shape in shapes if shape), "")
        total[name, first] += seconds
    rows = [f"| {name} | {shape} | {seconds / unit:.3f} |" for (name, shape), seconds in total.most_common(most)]
    rest = sum(total.values()) - sum(seconds for _, seconds in total.most_common(most))
    return ["| operation | first shape | / unit |", "|---|---|---|", *rows, f"| the rest | | {rest / unit:.3f} |"]
