"""What ranks cost: user CPU seconds per token of 1, 2 and 4 ranks, each with as much of a batch as one has alone.

    PYTHONPATH=tests python tests/benchmarks/weak_scaling.py [--config NAME] [--ranks 1 2 4] [--repeats 3] [SETTING...]

Each rank has 64 lanes, of blocks of 254 tokens, and 1,024 tokens of a batch, so that a lane takes a block every 15.875
steps: the 127 steps after step 10, which are counted, are eight passes of the language model for each lane, whatever
the number of ranks. Counted is the user CPU time of all threads of the ranks, which hardly depends on what else a
machine does; start-up and evaluation are not.
"""

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

from rigs.children import Child, at_step, ranks, sae_train

FIRST, STEPS, BATCH, LANES = 10, 127, 1024, 64


def note(file: Path) -> None:
    """Adds the user CPU seconds of this process to a file."""
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{os.times().user}\n")


def watched(file: Path) -> None:
    """Has a run of one coder note its CPU time at either end of what is counted."""
    for step in (FIRST, FIRST + STEPS):
        at_step(step, partial(note, file))


def seconds_per_token(n: int, config: str, more: list[str]) -> float:
    """Returns the user CPU seconds per token of n ranks."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "tokens": (FIRST + STEPS + 1) * n * BATCH,
            "batch_tokens": n * BATCH,
            "activations.lanes": n * LANES,
        }
        settings |= {"activations.block_rows": 2, "activations.statistics_tokens": 8192, "eval.tokens": 512}
        settings |= {"run_dir": f"{folder}/run", "text.max_tokens": 600_000}
        argv = ["--config", config, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
        files = [Path(folder, f"{i}.seconds") for i in range(n)]
        made = [
            Child(Path(folder, f"{i}.txt"), partial(sae_train, argv + more, partial(watched, file)), environment)
            for i, (file, environment) in enumerate(zip(files, ranks(n) if n > 1 else [{}], strict=True))
        ]
        if any([child.wait() for child in made]):
            raise SystemExit("".join(child.output for child in made))
        used = [float(b) - float(a) for a, b in (file.read_text().split() for file in files)]
        return sum(used) / (STEPS * n * BATCH)


def main() -> None:
    """Prints the median and the range of each number of ranks, and its ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    given, more = parser.parse_known_args()
    found: dict[int, list[float]] = {n: [] for n in given.ranks}
    for _ in range(given.repeats):
        for n, seconds in found.items():
            seconds.append(seconds_per_token(n, given.config, more))
            print(f"{n} ranks: {seconds[-1] * 1e6:.1f} us", flush=True)
    first = statistics.median(found[given.ranks[0]])
    for n, seconds in found.items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds) * 1e6:.1f} to {max(seconds) * 1e6:.1f}"
        print(f"{n} ranks: {middle * 1e6:.1f} us of user CPU a token ({spread}), {middle / first:.3f} of the first")


if __name__ == "__main__":
    main()
