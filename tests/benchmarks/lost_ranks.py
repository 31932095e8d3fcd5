"""Takes ranks from runs of two and three, in every phase, by kill -9 and SIGSTOP.

PYTHONPATH=.:tests python tests/benchmarks/lost_ranks.py --draws 40

Prints a line for each: how long the others took to end, whether all named the lost rank, and whether the run then came
to the end of an undisturbed one, byte for byte.
"""

import argparse
import tempfile
from pathlib import Path

from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.losses import DEADLINE_S, SLACK_S, Losses, draws


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="the draw to begin with")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = Losses(folder, tiny_model_folder(folder / "model"), tiny_text_folder(folder / "text"))
        for number, draw in enumerate(draws(chosen.draws, chosen.seed)[chosen.first :], chosen.first):
            try:
                outcome = losses.lose(draw)
            except AssertionError as error:
                failed += 1
                print(f"{number:3}  {draw}: FAILED {str(error)[:2000]}", flush=True)
                continue
            named = sum(outcome.named)
            well = named == len(outcome.named) and outcome.seconds < DEADLINE_S + SLACK_S and set(outcome.codes) == {1}
            failed += not well
            print(
                f"{number:3}  {draw}: {outcome.seconds:.1f} s, named by {named} of {len(outcome.named)}, "
                f"codes {outcome.codes}, equal{'' if well else '  FAILED ' + str(outcome.output)[-2000:]}",
                flush=True,
            )
    print(f"{failed} of {chosen.draws - chosen.first} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
