"""What the stream costs, and what a grid saves.

    python tests/benchmarks/streaming.py [--coders topk] [--model FOLDER --site layers.15 --text FOLDER]
    python tests/benchmarks/streaming.py --coders topk mutual_choice feature_choice jumprelu gated matryoshka

Every round times, on the same blocks and batches and in an order drawn anew (a machine's speed drifts): the run, which
streams activations and trains all coders on them; the language model alone; each coder alone; with several coders also
one run for each. Every part begins with the same state. Printed are the median and range of

    cost:    run / (language model alone + sum of the coders alone)       target on a CPU: 1.10, of a grid of six 1.05
    saving:  (separate runs - run) / (n - 1 times the language model alone)       1 if a grid saves what it predicts
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch

from sae.base.memory import keep_freed_memory
from sae.base.progress import UNWATCHED
from sae.base.settings import decode
from sae.lm.masking import MaskSpec, norm_mask
from sae.lm.models import load_language_model
from sae.lm.sites import resolve_sites
from sae.stream.lanes import Stream
from sae.stream.sources import Blocks, LiveSource, Reading
from sae.text.documents import TextConfig
from sae.text.tokenizing import special_ids, tokenize
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.measuring import Recipe, measure, sample_activations
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

MATRYOSHKA = {"reconstruction": {"type": "reconstruction", "weight": 0}, "matryoshka": {"type": "matryoshka"}}


def coder_config(name: str, d_sae: int, k: int) -> CoderConfig:
    usual = {"reconstruction": {"type": "reconstruction"}, "auxk": {"type": "auxk"}}
    penalty = {"l0": {"type": "l0", "target_l0": k}} if name == "jumprelu" else {}
    penalty |= {"l1": {"type": "l1", "target_l0": k}, "gate": {"type": "gate"}} if name == "gated" else {}
    steered = {"selection": {"type": name}, "normalization": {"kind": "scalar"}, "objectives": usual | penalty}
    fixed = {
        "jumprelu": steered,
        "gated": steered,
        "matryoshka": {"selection": {"type": "topk", "k": k}, "objectives": MATRYOSHKA},
    }
    return decode(CoderConfig, {"d_sae": d_sae, **fixed.get(name, {"selection": {"type": name, "k": k}})})


class Counted:
    """A source that notes which blocks were read, so that the model alone can be timed on the same ones."""

    def __init__(self, source):
        self.source, self.blocks = source, []

    def __len__(self):
        return len(self.source)

    def read(self, block):
        self.blocks.append(block)
        return self.source.read(block)


class Bench:
    """The parts to time."""

    def __init__(self, args) -> None:
        self.args = args
        lm = load_language_model(args.model)
        sites = resolve_sites(lm.model, [args.site])
        config = TextConfig(source=args.text, context_length=args.context, max_tokens=300_000)
        text = tokenize(config, lm.tokenizer, lm.source())
        mask = MaskSpec(tuple(special_ids(lm.tokenizer)))
        self.name, reads = sites[0].name, tuple(sites)
        self.live = LiveSource(Reading(lm, sites, mask), Blocks(text.train, args.block_rows, 0))
        seen = sample_activations(self.live, 16_384, UNWATCHED)
        self.trainers = []
        for name in args.coders:
            coder = coder_config(name, args.d_sae, args.k)
            found = measure(seen, reads, reads, mask, Recipe(coder.normalization))
            trainer = CoderTrainer(new_coder(coder, found), coder.objectives, OptimConfig(), Schedule(10**4, 10**7))
            self.trainers.append(trainer)
            self.mask = found.mask
        self.begun = [copy.deepcopy(trainer.state()) for trainer in self.trainers]

    def run(self, trainers) -> tuple[float, list[int], list[Batch]]:
        """Returns the seconds of a run of these trainers, the blocks it read and its batches."""
        self.rewind()
        source, batches = Counted(self.live), []
        began = time.perf_counter()
        stream = Stream(source, 1024, seed=0, ahead=self.args.ahead)
        for step in range(self.args.steps):
            activations = next(stream).activations
            x = activations[self.name].float()[norm_mask(activations, self.mask)]
            batches.append(Batch(x, x))
            for trainer in trainers:
                trainer.step(batches[-1], step)
        took = time.perf_counter() - began
        stream.close()
        return took, source.blocks, batches

    def parts(self) -> dict[str, Callable[[], float]]:
        """Returns what to time; a first run, which warms up, finds the blocks and batches."""
        _, blocks, batches = self.run(self.trainers)
        each = list(enumerate(self.trainers))
        timed = {"run": lambda: self.run(self.trainers)[0], "model": lambda: self.model_alone(blocks)}
        timed |= {f"alone {i}": lambda trainer=trainer: self.alone(trainer, batches) for i, trainer in each}
        if len(each) > 1:
            timed |= {f"separate {i}": lambda trainer=trainer: self.run([trainer])[0] for i, trainer in each}
        return timed

    def rewind(self) -> None:
        for trainer, state in zip(self.trainers, self.begun, strict=True):
            trainer.load_state(*copy.deepcopy(state))

    def model_alone(self, blocks) -> float:
        began = time.perf_counter()
        for block in blocks:
            self.live.read(block)
        return time.perf_counter() - began

    def alone(self, trainer, batches) -> float:
        self.rewind()
        began = time.perf_counter()
        for step, batch in enumerate(batches):
            trainer.step(batch, step)
        return time.perf_counter() - began


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.3f}, range {min(values):.3f} to {max(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coders", nargs="+", default=["topk"])
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--site", default="layers.2")
    parser.add_argument("--text", default="quickstart")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--block-rows", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ahead", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as sae-train does
    parts, order = Bench(args).parts(), random.Random(0)
    costs, savings = [], []
    for _ in range(args.rounds):
        took = {name: parts[name]() for name in order.sample(list(parts), len(parts))}
        whole, model = took["run"], took["model"]
        alone, separate = (
            sum(seconds for name, seconds in took.items() if name.startswith(kind)) for kind in ("alone", "separate")
        )
        costs.append(whole / (model + alone))
        line = f"run {whole:.2f} s, model alone {model:.2f} s, coders alone {alone:.2f} s, cost {costs[-1]:.3f}"
        if separate:
            savings.append((separate - whole) / ((len(args.coders) - 1) * model))
            line += f"; separate runs {separate:.2f} s, saving {savings[-1]:.3f}"
        print(line, flush=True)
    print(f"cost {spread(costs)}")
    if savings:
        print(f"saving {spread(savings)}")


if __name__ == "__main__":
    main()
