"""Our own TopK coder by its default recipe: statistics, initialization and optimizer step are the library's own.

Glue: the rows in the benchmark's order instead of the library's stream, and `dead_after_tokens` a tenth of the tokens,
which is what a run of `sae-train` of this length takes.
"""

from importlib.metadata import version

import common
import torch

from sae.coder.normalization import Normalization
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.trainer import CoderTrainer, Schedule


def train(args, x):
    batches = common.Batches(x, common.row_order(len(x), args.batch, args.epochs, args.seed))
    config = CoderConfig(d_sae=args.d_sae, selection=TopK(args.k), seed=args.seed)
    site = (Site("benchmark"),)
    found = measure({"benchmark": x[:32_768]}, site, site, MaskSpec(), Recipe(Normalization(), 0.0))
    schedule = Schedule(len(batches), dead_after_tokens=len(batches) * args.batch // 10)
    trainer = CoderTrainer(new_coder(config, found), config.objectives, OptimConfig(lr=args.lr), schedule)
    for step, batch in enumerate(batches):
        trainer.step(batch, step)
    coder = trainer.trained()
    print(f"AuxK active in {trainer.active_steps['auxk']} of {len(batches)} steps")

    def reconstruct(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, latents = coder(part)
        return out, latents.to_dense()

    return reconstruct, len(batches)


if __name__ == "__main__":
    common.main("sae-interp", version("sae-interp"), train)
