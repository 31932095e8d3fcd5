"""How long a checkpoint holds the training up, of how long it takes to write, and what it costs the steps meanwhile.

    python tests/benchmarks/checkpoint_wait.py --d-sae 32768 --folder /some/disk
    torchrun --nproc-per-node 2 tests/benchmarks/checkpoint_wait.py --d-sae 32768 --folder /some/disk

Held is the copy and whatever else `Saver.save` does on the training thread; the write ends when the folder has its name
(pieces hashed along, flushed to disk). Each figure: the median of the repeats, and the smallest and largest.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.objectives.reconstruction import Reconstruction
from sae.parallel import ranks
from sae.selection.topk import TopK
from sae.training import saving
from sae.training.optim import OptimConfig
from sae.training.saving import Part, Saver
from sae.training.trainer import CoderTrainer, Schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=256, help="of a step, on each rank")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    with ranks.process_group():
        folder = asked.folder / "checkpoint_wait"
        try:
            measure(asked, folder)
        finally:
            if ranks.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)


def measure(asked: argparse.Namespace, folder: Path) -> None:
    trainer = new_trainer(asked.d_in, asked.d_sae)
    x = torch.randn(asked.tokens, asked.d_in, generator=torch.Generator().manual_seed(ranks.rank()))
    saver, written, ended = Saver(folder, keep=1), [], []
    original = saving._write

    def timed(*args: object) -> None:
        began = time.perf_counter()
        original(*args)
        ended.append(time.perf_counter())
        written.append(ended[-1] - began)

    saving._write = timed
    tensors = trainer.state()[0]
    size = sum(tensor.nbytes for tensor in tensors.values())
    saver.make_room({"coder-0": Part.of(tensors)})
    held, alone, during = [], [], []
    for repeat in range(asked.repeats + 1):
        alone += [step(trainer, x) for _ in range(3)]
        began = time.perf_counter()
        saver.save(repeat, {"coder-0": Part.of(trainer.state()[0])}, {})
        held.append(time.perf_counter() - began)
        while len(ended) <= repeat:
            during.append(step(trainer, x))
        saver.wait()
    if ranks.rank() == 0:
        print(f"{size / 1e6:.0f} MB by {ranks.world_size()} ranks, torch threads {torch.get_num_threads()}")
        shares = [h / w for h, w in zip(held, written, strict=True)]
        print(f"held of the first, for which the memory was new until then: {held[0]:.3f} s, {shares[0]:.1%}")
        for name, values in {"held s": held[1:], "write s": written[1:], "held / write": shares[1:]}.items():
            print(f"{name:14}", told(values))
        print(f"{'step s alone':14}", told(alone[3:]))
        print(f"{'step s while':14}", told(during), f"x {statistics.median(during) / statistics.median(alone[3:]):.2f}")


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n {len(values)})"


def step(trainer: CoderTrainer, x: torch.Tensor) -> float:
    began = time.perf_counter()
    trainer.step(x, 1)
    return time.perf_counter() - began


def new_trainer(d_in: int, d_sae: int) -> CoderTrainer:
    spec = CoderSpec(d_in, d_in, d_sae, TopK(32))
    coder = SparseCoder(spec)
    initialize(coder, torch.zeros(d_in), 0)
    return CoderTrainer(coder, {"reconstruction": Reconstruction()}, OptimConfig(), Schedule(1000, 10**9))


if __name__ == "__main__":
    main()
