"""What passes between text, model and coder: the tokens of one pass, and one batch of them."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm.replay import Made, Stretch

LANES = 64
"""How many there are unless a run says otherwise."""


@dataclass(frozen=True)
class Block:
    """The unmasked tokens of one pass of the language model."""

    activations: dict[str, Float[Tensor, "n _d"]]
    """By site name."""
    gradients: dict[str, Float[Tensor, "n _d"]]
    """By site name; empty unless asked for."""

    def __len__(self) -> int:
        return len(next(iter(self.activations.values())))


@dataclass(frozen=True)
class ActivationBatch:
    """This rank's share of one batch."""

    activations: dict[str, Float[Tensor, "n _d"]]
    """By site name; rows of all sites belong to the same tokens."""
    gradients: dict[str, Float[Tensor, "n _d"]]
    """By site name; empty unless captured."""
    blocks: Int[Tensor, "n"]
    """The block each row comes from, to name the rows of a bad batch."""
    text: "TextBatch | None" = None
    """The rows of text, where batches are whole rows."""


@dataclass(frozen=True)
class TextBatch:
    """The rows that a batch of activations comes from."""

    tokens: Int[Tensor, "rows context"]
    keep: Bool[Tensor, "rows context"]
    """Which positions are in the batch, in the order of its activations."""
    made: dict[Stretch, Made] = field(default_factory=dict)
    """What the model has made of them up to each site, and to the last (`sae/lm/replay.py`)."""
