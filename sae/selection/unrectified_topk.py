"""Unrectified TopK: each token keeps its k largest pre-activations as they are, negative ones too.

circuit-tracer's transcoders choose so. It differs from `topk` where fewer than k pre-activations are positive.
"""

from dataclasses import dataclass
from typing import ClassVar

from sae.selection import Selection
from sae.selection.topk import TopK


@Selection.register_subclass("unrectified_topk")
@dataclass(frozen=True)
class UnrectifiedTopK(TopK):
    """Keeps the k largest of every token, without ReLU."""

    signed: ClassVar[bool] = True
