"""The families on data of which the truth is known (`sae.evaluation.synthetic`): equal L0, fresh data at every step.

    python tests/benchmarks/synthetic.py [NAME ...] [--seeds 0 1 2] [--json FILE]

Prints FVU, L0, dead share and what was found of the true directions, on fresh tokens by each coder's per-token rule;
of batch-wide rules also FVU and L0 of the rule of training on the same tokens. About 15 s a coder.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sae.coder.normalization import Normalization
from sae.evaluation.metrics import fvu
from sae.evaluation.synthetic import Synthetic, score
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.objectives.aux_zipf import AuxZipf
from sae.objectives.auxk import AuxK
from sae.objectives.gate import Gate
from sae.objectives.l0 import L0
from sae.objectives.l1 import L1
from sae.objectives.matryoshka import Matryoshka
from sae.objectives.reconstruction import Reconstruction
from sae.selection import Selection
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

BATCH, K, LATENTS = 512, 4, 192
PLAIN = {"reconstruction": Reconstruction()}
AUXK = PLAIN | {"auxk": AuxK(k=16)}
READOUT = torch.randn(50, 32, generator=torch.Generator().manual_seed(5))
READOUT *= torch.cat([torch.full((8,), 3.0), torch.full((24,), 0.3)])


@dataclass
class Family:
    """What is trained, on which data."""

    rule: Selection
    terms: dict = field(default_factory=lambda: AUXK)
    steps: int = 2500
    spread: float = Synthetic.spread
    normalization: Normalization = field(default_factory=Normalization)


FAMILIES = {
    "topk": Family(TopK(K)),
    "mutual": Family(MutualChoice(K)),
    "feature": Family(FeatureChoice(K)),
    "phased": Family(FeatureChoice(K, mutual_share=0.5)),
    "feature (own density)": Family(FeatureChoice(K, density="own")),
    "phased (own density)": Family(FeatureChoice(K, density="own", mutual_share=0.5)),
    "topk, no heavy tail": Family(TopK(K), spread=0.0),
    "mutual, no heavy tail": Family(MutualChoice(K), spread=0.0),
    "topk, no AuxK": Family(TopK(K), PLAIN, 1500),
    "gradient 0.5, no AuxK": Family(GradientTopK(K, beta=0.5), PLAIN, 1500),
    "gradient 2, no AuxK": Family(GradientTopK(K, beta=2.0), PLAIN, 1500),
    "topk, aux_zipf": Family(TopK(K), PLAIN | {"aux_zipf": AuxZipf(k=16)}),
    "jumprelu": Family(JumpReLU(), AUXK | {"l0": L0(target_l0=float(K))}, normalization=Normalization("scalar")),
    "relu": Family(ReLU(), PLAIN | {"l1": L1(target_l0=float(K))}),
    "gated": Family(Gated(), PLAIN | {"l1": L1(target_l0=float(K)), "gate": Gate()}),
    "signed_topk": Family(SignedTopK(K)),
    "groupmax": Family(GroupMax(K)),
    "matryoshka": Family(TopK(K), {"matryoshka": Matryoshka(), "auxk": AuxK(k=16)}),
}


def readout(x: Tensor) -> Tensor:
    """Gradients of the cross-entropy to tokens drawn from a linear readout that sees mostly the first 8 dimensions."""
    x = x.clone().requires_grad_()
    logits = x @ READOUT.T
    draw = torch.Generator().manual_seed(len(x))
    label = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
    torch.nn.functional.cross_entropy(logits, label, reduction="sum").backward()
    return x.grad


def trained(family: Family, seed: int) -> CoderTrainer:
    """Returns the trainer at its end."""
    truth, site = Synthetic(seed=seed, spread=family.spread), (Site("synthetic"),)
    config = CoderConfig(
        d_sae=LATENTS,
        selection=family.rule,
        objectives=family.terms,
        normalization=family.normalization,
        seed=seed,
    )
    x, _ = truth.sample(32_768, "statistics")
    found = measure({"synthetic": x}, site, site, MaskSpec(), Recipe(config.normalization, 0.0))
    optim = OptimConfig(lr=3e-3, decay_share=0.9)
    trainer = CoderTrainer(new_coder(config, found), family.terms, optim, Schedule(family.steps, 20 * BATCH))
    for step in range(family.steps):
        x, _ = truth.sample(BATCH, step)
        trainer.step(Batch(x, x, readout(x) if family.rule.gradient_loss else None), step)
    return trainer


def in_batches(trainer: CoderTrainer, x: Tensor) -> dict[str, float]:
    """Returns FVU and L0 of the trained coder on x, latents chosen batch by batch as in training."""
    outputs, l0 = [], []
    for rows in x.split(BATCH):
        trainer.chooser.begin(1.0, len(rows))
        with torch.no_grad():
            look = trainer.coder.look(rows)
            made = trainer.coder.run(look, trainer.chooser.whole_batch([look])[0].by_rule, rows)
        outputs.append(made.prediction)
        l0.append(float(made.latents.l0().mean()))
    return {"batch_fvu": fvu(x, torch.cat(outputs)), "batch_l0": statistics.mean(l0)}


def scores(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Returns the scores of one family, and of one that can look at gradients also with them, by label."""
    family = FAMILIES[name]
    trainer, truth = trained(family, seed), Synthetic(seed=seed, spread=family.spread)
    coder, (x, _) = trainer.trained(), truth.sample(8192, "test")
    found = {name: score(coder, truth)}
    if family.rule.batch_wide:
        found[name] |= in_batches(trainer, x)
    if family.rule.gradient_loss:
        coder.spec = coder.spec.with_(selection=replace(coder.spec.selection, inference="gradient"))
        found[f"{name} (gradients at inference)"] = score(coder, truth, gradients=readout(x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FAMILIES)}; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the scores here, by label and seed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small for more
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in options.names or FAMILIES:
        for seed in options.seeds:
            for label, figures in scores(name, seed).items():
                found.setdefault(label, {})[seed] = figures
                print(f"{label:48} seed {seed}  " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
