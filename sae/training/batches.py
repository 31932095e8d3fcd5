"""What a coder trains on of a batch that all coders of a run share."""

import torch
from torch import Tensor

from sae.coder.coder import SparseCoder
from sae.lm.masking import norm_mask
from sae.lm.site import Site
from sae.stream.batch import ActivationBatch
from sae.training.end_to_end import splicer
from sae.training.planning import CoderPlan
from sae.training.preparing import Setting
from sae.training.trainer import Batch


def share_of(batch: ActivationBatch, plan: CoderPlan, coder: SparseCoder, setting: Setting) -> Batch:
    """Returns a coder's share of what was streamed: its sites side by side, without outliers."""
    usual = norm_mask({name: batch.activations[name] for name in plan.sites}, coder.spec.mask)
    device = coder.W_enc.device

    def columns(tensors: dict[str, Tensor], sites: tuple[Site, ...]) -> Tensor:
        parts = [tensors[site.name].to(device).float() for site in sites]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[usual.to(device)]

    x = columns(batch.activations, plan.reads)
    target = x if coder.spec.is_autoencoder else columns(batch.activations, plan.writes)
    if batch.text is not None:
        context, micro = batch.text.tokens.shape[1], setting.micro_tokens
        rows = max(1, micro // context) if micro else len(batch.text.tokens)
        lm = setting.subject.measured_on["lm"]
        return Batch(x, target, None, *splicer(lm, batch.text, usual, coder.spec.writes, rows))
    gradients = columns(batch.gradients, plan.writes) if coder.spec.selection.gradient_loss else None
    return Batch(x, target, gradients)


def bad_blocks(batch: ActivationBatch) -> list[int]:
    """Returns which blocks of text the tokens are of that hold NaN or Inf."""
    bad = torch.stack([~torch.isfinite(x).all(1).cpu() for x in batch.activations.values()]).any(0)
    return batch.blocks[bad].unique().tolist()
