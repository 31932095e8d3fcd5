"""What ranks cost: user CPU seconds per token of 1, 2 and 4 ranks, each with as much of a batch as one has alone.

    PYTHONPATH=tests python tests/benchmarks/weak_scaling.py [--config NAME] [--ranks 1 2 4] [--repeats 3] [SETTING...]

Each rank has 64 lanes, of blocks of 254 tokens, and 1,024 tokens of a batch, so that a lane takes a block every 15.875
steps: the 127 steps after step 10, which are counted, are eight passes of the language model for each lane, whatever
the number of ranks. Counted is the user CPU time of all threads of the ranks, which hardly depends on what else a
machine does; start-up and evaluation are not. Beside it, CPU time by what it goes to: passes of the language model,
collectives as the main thread sees them, all else that it does, and other threads, which are gloo's and the heartbeat.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from rigs.children import Child, at_step, ranks, sae_train

FIRST, STEPS, BATCH, LANES = 10, 127, 1024, 64


PARTS = ("model", "collectives", "main", "others")
spent = dict.fromkeys(PARTS[:2], 0.0)


def timed(owner: object, name: str, part: str) -> None:
    """Has the CPU time of a function count as that of a part."""
    original = getattr(owner, name)

    def call(*given, **named):
        began = time.thread_time()
        try:
            return original(*given, **named)
        finally:
            spent[part] += time.thread_time() - began

    setattr(owner, name, call)


def note(file: Path) -> None:
    """Adds the CPU seconds of this process to a file: user, and by part."""
    main = time.thread_time()
    parts = {**spent, "main": main - sum(spent.values()), "others": time.process_time() - main}
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"user": os.times().user, **parts}) + "\n")


def watched(file: Path) -> None:
    """Has a run of one coder note its CPU time at either end of what is counted."""
    import torch.distributed as dist

    from sae.stream.sources import LiveSource

    timed(LiveSource, "read", "model")
    for name in ("all_reduce", "all_gather"):
        timed(dist, name, "collectives")
    for step in (FIRST, FIRST + STEPS):
        at_step(step, partial(note, file))


def seconds_per_token(n: int, config: str, more: list[str]) -> dict[str, float]:
    """Returns the CPU seconds per token of n ranks: user, and by part."""
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
        ends = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
        tokens = STEPS * n * BATCH
        return {part: sum(end[part] - start[part] for start, end in ends) / tokens for part in ends[0][0]}


def main() -> None:
    """Prints the median and the range of each number of ranks, and its ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    given, more = parser.parse_known_args()
    found: dict[int, list[dict[str, float]]] = {n: [] for n in given.ranks}
    for _ in range(given.repeats):
        for n, each in found.items():
            each.append(seconds_per_token(n, given.config, more))
            print(f"{n} ranks: " + ", ".join(f"{part} {x * 1e6:.1f}" for part, x in each[-1].items()), flush=True)
    middles = {n: {part: statistics.median(one[part] for one in each) for part in each[0]} for n, each in found.items()}
    first = middles[given.ranks[0]]["user"]
    for n, each in found.items():
        users = [one["user"] * 1e6 for one in each]
        split = ", ".join(f"{part} {middles[n][part] * 1e6:.1f}" for part in PARTS)
        print(
            f"{n} ranks: {middles[n]['user'] * 1e6:.1f} us of user CPU a token ({min(users):.1f} to {max(users):.1f}), "
            f"{middles[n]['user'] / first:.3f} of the first; {split}"
        )


if __name__ == "__main__":
    main()
