"""What the stream costs: wall time of a live run against the language model alone plus the coder alone.

    python tests/benchmarks/streaming.py [--model FOLDER --site layers.15 --text FOLDER] [--steps 60 --rounds 5]

Every round times the three in turn on the same blocks and batches; printed are the ratio's median and range.
Target on a CPU: at most 1.10.
"""

import argparse
import statistics
import time

import torch

from sae.activations import Blocks, LiveSource, norm_mask
from sae.config import CoderConfig
from sae.measuring import measure, sample
from sae.models import load_language_model
from sae.normalization import Normalization
from sae.optim import OptimConfig
from sae.selection.topk import TopK
from sae.sites import resolve
from sae.spec import MaskSpec
from sae.stream import Stream
from sae.text import TextConfig, special_ids, tokenize
from sae.trainer import CoderTrainer, Schedule, new_coder


class Counted:
    """A source that notes which blocks were read, so that the model alone can be timed on the same ones."""

    def __init__(self, source):
        self.source, self.blocks = source, []

    def __len__(self):
        return len(self.source)

    def read(self, block):
        self.blocks.append(block)
        return self.source.read(block)


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--site", default="layers.2")
    parser.add_argument("--text", default="quickstart")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ahead", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)

    lm = load_language_model(args.model)
    sites = resolve(lm.model, [args.site])
    config = TextConfig(source=args.text, context_length=args.context, max_tokens=300_000)
    text = tokenize(config, lm.tokenizer, lm.source())
    mask = MaskSpec(tuple(special_ids(lm.tokenizer)))
    live = LiveSource(lm, Blocks(text.train, 8, 0), sites, mask, "float32")
    name = sites[0].name
    reads = tuple(sites)
    found = measure(sample(live, 16_384, lambda: False), reads, reads, mask, 10.0, Normalization())
    coder = new_coder(CoderConfig(d_sae=args.d_sae, selection=TopK(args.k)), found)
    trainer = CoderTrainer(coder, CoderConfig().objectives, OptimConfig(), Schedule(10**6, 10**7))

    def batch_of(stream):
        activations = next(stream).activations
        return activations[name].float()[norm_mask(activations, coder.spec.mask)]

    ratios = []
    for number in range(args.rounds + 1):  # the first round warms up and is not counted
        source = Counted(live)
        stream = Stream(source, 1024, seed=0, ahead=args.ahead)
        batches = []

        def together(stream=stream, batches=batches):
            for step in range(args.steps):
                x = batch_of(stream)
                batches.append(x)
                trainer.step(x, step)

        whole = seconds(together)
        stream.close()
        model = seconds(lambda s=source: [live.read(block) for block in s.blocks])
        alone = seconds(lambda b=batches: [trainer.step(x, step) for step, x in enumerate(b)])
        ratio = whole / (model + alone)
        ratios += [ratio] if number else []
        print(f"run {whole:.2f} s, model alone {model:.2f} s, coder alone {alone:.2f} s, ratio {ratio:.3f}")
    print(f"median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
