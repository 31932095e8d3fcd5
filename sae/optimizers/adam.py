"""Adam (Kingma 2015, arXiv 1412.6980, algorithm 1), its moments in the precision of the weights."""

from dataclasses import dataclass

from sae.optimizers import Optimizer


@Optimizer.register_subclass("adam")
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam."""
