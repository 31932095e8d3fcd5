"""Ours: `CoderTrainer.step` of a family of `configs/families`, by its default optimizer, clipping included."""

import torch
import worker
from torch import Tensor

import sae
from sae import kernels
from sae.base.memory import keep_freed_memory
from sae.coder.normalization import Normalization
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.objectives.auxk import AuxK
from sae.objectives.gate import Gate
from sae.objectives.l0 import L0
from sae.objectives.l1 import L1
from sae.objectives.reconstruction import Reconstruction
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

STEPS = 10_000
AUXK = {"reconstruction": Reconstruction(), "auxk": AuxK()}
FAMILIES = {
    "topk": lambda k: (TopK(k), AUXK),
    "mutual_choice": lambda k: (MutualChoice(k), AUXK),
    "feature_choice": lambda k: (FeatureChoice(k), {"reconstruction": Reconstruction()}),
    "jumprelu": lambda k: (JumpReLU(), AUXK | {"l0": L0(target_l0=float(k))}),
    "gated": lambda k: (Gated(), AUXK | {"l1": L1(target_l0=float(k)), "gate": Gate()}),
    "gradient": lambda k: (GradientTopK(k, beta=0.5), AUXK),
    "transcoder": lambda k: (TopK(k), AUXK),
}
SCALED = ("jumprelu", "gated")  # by `normalization`


class Ours(worker.Stepper):
    """One coder, whose rule keeps about k latents a token from the first step on."""

    def __init__(self, options: dict, given: dict[str, Tensor]) -> None:
        if options["kernels"]:
            kernels.use(options["kernels"])
        self.family, W, first = options["family"], given["W"], given["x"][: options["tokens"]]
        rule, terms = FAMILIES[self.family](options["k"])
        normalization = Normalization("scalar" if self.family in SCALED else "none")
        config = CoderConfig(d_sae=len(W), selection=rule, objectives=terms, normalization=normalization)
        reads = (Site("read"),)
        writes = (Site("written"),) if self.family == "transcoder" else reads
        seen = {"read": first, "written": self.target(first)}
        found = measure(seen, reads, writes, MaskSpec(), Recipe(normalization, 0.0))
        coder = new_coder(config, found)
        with torch.no_grad():
            coder.W_enc.copy_(W)
            coder.W_dec.copy_(W)
            if self.family in SCALED:
                self.settle(coder, first, options["k"])
        self.trainer = CoderTrainer(
            coder,
            config.objectives,
            OptimConfig(lr=options["lr"], warmup_share=0.0),
            Schedule(STEPS, options["dead_after"], product_dtype=getattr(torch, options["product"])),
        )
        self.steps = 0
        self.about = {"library": f"sae-interp {sae.__version__}", "adam": "fused", "kernels": options["kernels"]}

    def settle(self, coder: sae.SparseCoder, x: Tensor, k: int) -> None:
        """Moves thresholds to where k latents fire, as they do once the penalty has found its weight."""
        scores = coder.preactivations(coder.centered(x)[0])
        level = scores.flatten().kthvalue(scores.numel() - k * len(x)).values
        if self.family == "jumprelu":
            coder.threshold.fill_(level)
        else:
            coder.b_enc.fill_(-level)

    def target(self, x: Tensor) -> Tensor:
        """Returns what is to be written: another site's activations for a transcoder, a map of those read."""
        return x.flip(1) if self.family == "transcoder" else x

    def step(self, x: Tensor) -> float:
        beside = x.flip(0) if self.family == "gradient" else None
        metrics = self.trainer.step(Batch(x, self.target(x), beside), self.steps)
        self.steps += 1
        return float(metrics["loss"])

    def weights(self) -> dict[str, Tensor]:
        return dict(self.trainer.coder.named_parameters())

    def moments(self) -> dict[str, Tensor]:
        tensors, _ = self.trainer.state()
        own = "adam.exp_avg."
        return {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}


if __name__ == "__main__":
    keep_freed_memory()  # as sae-train does
    worker.serve(Ours)
