"""Row-sparse Adam: a step changes only the latents that it has touched. This is other mathematics than Adam's.

A latent that is 0 in the codes of every token of the step, those of AuxK included, keeps its weights, biases and
moments, as in torch.optim.SparseAdam ("lazy Adam"); the bias correction counts all steps. In Adam a silent latent goes
on moving along the mean of its last gradients while both moments decay. So a latent that a share p of the steps touch,
with gradients of one size, moves by about 1 rate each time here, and by 1 / sqrt(p) in Adam: rare latents learn more
slowly, and a learning rate found for Adam need not be the right one.

What it saves is the traffic of rows that stay: much where a batch touches few of the latents, nothing where it touches
all. Over ranks, a latent is touched if it is on any of them. Biases of inputs and outputs, and a skip, move as in Adam.
"""

from dataclasses import dataclass
from typing import ClassVar

from sae.optimizers import Optimizer


@Optimizer.register_subclass("sparse_adam")
@dataclass(frozen=True)
class SparseAdam(Optimizer):
    """Adam of the latents that a step has touched; the others rest."""

    lazy: ClassVar[bool] = True
