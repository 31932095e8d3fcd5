"""What coders train on of a batch that all coders of a run share."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.coder.coder import SparseCoder
from sae.lm.masking import norm_mask
from sae.lm.site import Site
from sae.stream.batch import ActivationBatch, TextBatch
from sae.stream.carrying import Carrier
from sae.stream.tensors import GRADIENTS
from sae.training.end_to_end import CleanPasses, splicer
from sae.training.planning import CoderPlan
from sae.training.preparing import Setting
from sae.training.step import Batch


class Shares:
    """One batch of a run, of which every coder gets its share; what several coders need of it is made once."""

    def __init__(self, batch: ActivationBatch, setting: Setting, carrier: Carrier) -> None:
        self.batch, self.carrier = batch, carrier
        self.whole: dict[str, Tensor] = {}
        self.usual: dict[str, Tensor] = {}
        self.passes = None if batch.text is None else _passes(batch.text, setting)

    def of(self, plan: CoderPlan, coder: SparseCoder) -> Batch:
        """Returns a coder's share of what was streamed: its sites side by side, without outliers."""
        batch = self.batch
        usual = self._usual(plan, coder)
        rows = None if usual.all() else usual.nonzero()[:, 0]

        def columns(tensors: dict[str, Tensor], sites: tuple[Site, ...], what: str = "") -> Tensor:
            parts = [self._rows(what + site.name, tensors[site.name], rows) for site in sites]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        x = columns(batch.activations, plan.reads)
        target = x if coder.spec.is_autoencoder else columns(batch.activations, plan.writes)
        if self.passes is not None:
            return Batch(x, target, None, *splicer(self.passes, usual, plan.writes))
        gradients = columns(batch.gradients, plan.writes, GRADIENTS) if coder.spec.selection.gradient_loss else None
        return Batch(x, target, gradients)

    def _usual(self, plan: CoderPlan, coder: SparseCoder) -> Bool[Tensor, "n"]:
        """Returns, on the CPU, which tokens are no outliers at the sites of a coder; asked once for the same limits.

        Without limits no device is waited for; else the one where activations are is, as their number sizes a step.
        """
        key = f"{[*plan.sites]} {coder.spec.mask.norm_limits}"
        if not coder.spec.mask.norm_limits:
            self.usual[key] = torch.ones(len(self.batch.blocks), dtype=torch.bool)
        if key not in self.usual:
            own = {name: self.batch.activations[name] for name in plan.sites}
            self.usual[key] = norm_mask(own, coder.spec.mask).cpu()
        return self.usual[key]

    def _rows(self, name: str, x: Float[Tensor, "n d"], rows: Int[Tensor, "m"] | None) -> Float[Tensor, "m d"]:
        """Returns some rows, or all, where coders are; they are picked where they lie.

        How many there are is so not asked of a device, and what several coders take whole is brought there once.
        """
        if rows is not None:
            return self.carrier(name, x[rows.to(x.device)]).float()
        if name not in self.whole:
            self.whole[name] = self.carrier(name, x).float()
        return self.whole[name]


def _passes(text: TextBatch, setting: Setting) -> CleanPasses:
    context, micro = text.tokens.shape[1], setting.micro_tokens
    rows = max(1, micro // context) if micro else len(text.tokens)
    return CleanPasses(setting.subject.measured_on["lm"], text, rows, [plan.writes for plan in setting.own])


def bad_blocks(batch: ActivationBatch) -> list[int]:
    """Returns which blocks of text the tokens are of that hold NaN or Inf."""
    bad = torch.stack([~torch.isfinite(x).all(1).cpu() for x in batch.activations.values()]).any(0)
    return batch.blocks[bad].unique().tolist()
