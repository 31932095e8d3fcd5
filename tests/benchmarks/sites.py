"""What the axis of sites costs: user CPU seconds of one pass of a model, four sites x two settings, over several ranks.

    PYTHONPATH=tests python tests/benchmarks/sites.py [--ranks 1 4] [--repeats 3] [SETTING...]

All ranks together read the batches that one process reads, and train its eight coders. Counted is the user CPU time of
all threads of all ranks from step 10 to the last, which hardly depends on what else a machine does (`weak_scaling.py`
says more). A line of each rank's exchange says which bytes it has given to the all-to-all of a step.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.weak_scaling import BATCH, FIRST, LANES, STEPS, watched
from rigs.children import Child, ranks, sae_train

GRID = {"coder.selection.k": [16, 32]}


def counting(file: Path) -> None:
    """Has a run note its CPU time at either end of what is counted, and the bytes that the axis of sites moves."""
    import torch.distributed as dist

    watched(file)
    original = dist.all_to_all_single

    def counted(output, given, received, sent, group=None):
        own = dist.get_rank(group)
        moved = sum(n for place, n in enumerate(sent) if place != own)
        file.with_suffix(".moved").write_text(f"{moved}")
        return original(output, given, received, sent, group=group)

    dist.all_to_all_single = counted


def measured(n: int, more: list[str]) -> tuple[float, list[int]]:
    """Returns the user CPU seconds of n ranks, and the bytes that each gives to others in a step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "tokens": (FIRST + STEPS + 1) * BATCH,
            "batch_tokens": BATCH,
            "activations.lanes": LANES,
            "activations.sites": "[layers.0,layers.1,layers.2,layers.3]",
            "grid": json.dumps(GRID),
            "parallel.sites": n,
            "log.every_steps": 50,
            "activations.block_rows": 2,
            "activations.statistics_tokens": 8192,
            "eval.tokens": 512,
            "run_dir": f"{folder}/run",
            "text.max_tokens": 600_000,
        }
        argv = ["--config", "topk", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
        files = [Path(folder, f"{i}.seconds") for i in range(n)]
        made = [
            Child(Path(folder, f"{i}.txt"), partial(sae_train, argv + more, partial(counting, file)), environment)
            for i, (file, environment) in enumerate(zip(files, ranks(n) if n > 1 else [{}], strict=True))
        ]
        if any([child.wait() for child in made]):
            raise SystemExit("".join(child.output for child in made))
        noted = [[json.loads(line)["user"] for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
        moved = [int(file.with_suffix(".moved").read_text()) for file in files if n > 1]
        return sum(users[len(users) // 2] - users[0] for users in noted), moved  # each coder of a rank has noted it


def main() -> None:
    """Prints the median and the range of each number of ranks, and its ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    given, more = parser.parse_known_args()
    found: dict[int, list[float]] = {n: [] for n in given.ranks}
    for _ in range(given.repeats):
        for n, each in found.items():
            seconds, moved = measured(n, more)
            each.append(seconds)
            print(f"{n} ranks: {seconds:.2f} s of user CPU, bytes given to others in a step {moved}", flush=True)
    first = statistics.median(found[given.ranks[0]])
    for n, each in found.items():
        middle = statistics.median(each)
        print(f"{n} ranks: {middle:.2f} s ({min(each):.2f} to {max(each):.2f}), {middle / first:.3f} of the first")


if __name__ == "__main__":
    main()
