"""Compare TopK training across libraries on one activation tensor: best of three learning rates, then three seeds.

For every recipe: its own default learning rate x {1/3, 1, 3} at seed 0, one more factor of 3 while the best sits at the
edge, then the best rate at seeds 1 and 2. One process and one result file per run; a file that exists is not rerun.

    python run.py --data acts.safetensors --results DIR --python sparsify=/path/python --python saelens=/path/python
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SCALED = "input scaled, lr decay over the last 1/5"


@dataclass(frozen=True)
class Recipe:
    """A driver with options; its default learning rate is `lr`, or `lr` / sqrt(d_sae / 2^14) where `law` is set."""

    driver: str
    lr: float
    law: bool
    words: str
    options: tuple[str, ...] = ()

    def rate(self, d_sae: int, factor: int) -> float:
        default = self.lr / math.sqrt(d_sae / 2**14) if self.law else self.lr
        return float(f"{default * 3.0**factor:.3g}")


RECIPES = {
    "sparsify": Recipe("sparsify", 5e-3, True, "default: signum + ScheduleFree, no AuxK"),
    "dictionary_learning": Recipe("dictionary_learning", 2e-4, True, "default: Adam, raw input, constant lr"),
    "saelens": Recipe("saelens", 3e-4, False, "default: Adam, raw input, constant lr"),
    "sparsify-adam": Recipe("sparsify", 2e-4, True, "Adam, linear decay, no AuxK", ("--optimizer", "adam")),
    "dictionary_learning-scaled": Recipe(
        "dictionary_learning", 2e-4, True, f"Adam, {SCALED}", ("--normalize", "--decay")
    ),
    "saelens-scaled": Recipe(
        "saelens",
        3e-4,
        False,
        f"Adam, {SCALED}, AuxK after 20 silent steps",
        ("--normalize", "expected_average_only_in", "--decay", "--dead-window", "20"),
    ),
    "ours": Recipe("ours", 2e-4, True, "default"),
}


class Runner:
    """Runs one driver once, or reads the result it left behind."""

    def __init__(self, args: argparse.Namespace, pythons: dict[str, str]):
        self.args, self.pythons = args, pythons

    def __call__(self, name: str, lr: float, seed: int) -> dict:
        out = self.args.results / f"{name}_lr{lr:g}_seed{seed}.json"
        if not out.exists():
            recipe, args = RECIPES[name], self.args
            command = [*shlex.split(args.prefix), self.pythons[recipe.driver], HERE / f"drive_{recipe.driver}.py"]
            command += ["--data", args.data, "--lr", lr, "--seed", seed, "--epochs", args.epochs, "--d-sae", args.d_sae]
            command += ["--k", args.k, "--batch", args.batch, "--out", out, *recipe.options]
            args.results.mkdir(parents=True, exist_ok=True)
            with out.with_suffix(".log").open("w") as log:
                subprocess.run([str(part) for part in command], check=True, stdout=log, stderr=log)
        result = json.loads(out.read_text())
        print(
            f"{name} lr {lr:g} seed {seed}: FVU {result['held_out_fvu']:.4f}, dead {result['dead_share']:.1%}, "
            f"{result['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return result


def compare(name: str, run: Runner, d_sae: int, seeds: int, extensions: int = 4) -> tuple[list[dict], bool]:
    """Results of the best learning rate over all seeds, and whether that rate is inside the grid."""
    fvu = {}
    for factor in (-1, 0, 1):
        fvu[factor] = run(name, RECIPES[name].rate(d_sae, factor), 0)["held_out_fvu"]
    for _ in range(extensions):
        best = min(fvu, key=fvu.get)
        if min(fvu) < best < max(fvu):
            break
        beyond = best + (1 if best == max(fvu) else -1)
        fvu[beyond] = run(name, RECIPES[name].rate(d_sae, beyond), 0)["held_out_fvu"]
    best = min(fvu, key=fvu.get)
    results = [run(name, RECIPES[name].rate(d_sae, best), seed) for seed in range(seeds)]
    return results, min(fvu) < best < max(fvu)


def row(name: str, results: list[dict], inside: bool) -> str:
    """One line of the table; the star marks a learning rate still at the edge of its grid."""
    fvus = [result["held_out_fvu"] for result in results]
    spread = statistics.stdev(fvus) if len(fvus) > 1 else math.nan
    mean = {key: statistics.mean(result[key] for result in results) for key in ("dead_share", "l0", "tokens_per_s")}
    first = results[0]
    return (
        f"| {name} | {first['library']} {first['version']} | {RECIPES[name].words} | "
        f"{first['lr']:g}{'' if inside else '*'} | {statistics.mean(fvus):.4f} ± {spread:.4f} | {mean['l0']:.1f} | "
        f"{mean['dead_share']:.1%} | {mean['tokens_per_s']:,.0f} |"
    )


def verdict(table: dict[str, list[dict]]) -> str:
    """Pass when our mean held-out FVU is at most the best peer's mean plus one pooled standard deviation."""
    fvus = {name: [result["held_out_fvu"] for result in results] for name, results in table.items()}
    mine, peers = fvus.pop("ours"), fvus
    name = min(peers, key=lambda peer: statistics.mean(peers[peer]))
    pooled = math.sqrt((statistics.variance(mine) + statistics.variance(peers[name])) / 2)
    limit = statistics.mean(peers[name]) + pooled
    word = "pass" if statistics.mean(mine) <= limit else "FAIL"
    return f"{word}: ours {statistics.mean(mine):.4f}, limit {limit:.4f} = {name}'s mean + pooled sd {pooled:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--results", required=True, type=Path, help="folder of result files and logs")
    parser.add_argument("--python", action="append", default=[], metavar="DRIVER=EXECUTABLE")
    parser.add_argument("--only", nargs="*", choices=RECIPES, help="recipes, default: all whose driver has a --python")
    parser.add_argument("--prefix", default="", help='put before every run, e.g. "nice -n 5"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()

    pythons = dict(item.split("=", 1) for item in args.python)
    names = args.only or [name for name in RECIPES if RECIPES[name].driver in pythons]
    if missing := {RECIPES[name].driver for name in names} - set(pythons):
        parser.error(f"no --python given for {sorted(missing)}")
    run, table, lines = Runner(args, pythons), {}, []
    lines.append("| recipe | library | in words | best lr | held-out FVU ± sd | L0 | dead | tokens/s |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in names:
        table[name], inside = compare(name, run, args.d_sae, args.seeds)
        lines.append(row(name, table[name], inside))
    if "ours" in table and len(table) > 1 and args.seeds > 1:
        lines += ["", verdict(table)]
    (args.results / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
