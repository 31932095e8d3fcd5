"""Where a coder reads and writes: a place in a language model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SECOND = "second"  # tag of the sites of a second model


@dataclass(frozen=True)
class Site:
    """A place in a language model: one side of one module."""

    hook: str
    """Module path as in `model.named_modules()`, e.g. "model.layers.15", or a TransformerLens name, such as
    "blocks.15.hook_resid_post", which says the side as well."""
    side: str = "output"
    """Which tensor of that module: "input" (its first argument), "output" (its first result) or, of a norm,
    "normalized" (what it makes before gain and bias)."""
    model: str = ""
    """Hub id or folder of the language model."""
    revision: str | None = None
    """Commit of the model on the hub."""
    heads: int | None = None
    """Number of attention heads concatenated in the tensor; None where it is not a concatenation."""
    tag: str = ""
    """Label of the model, where a coder reads two of them: "second" for the second, none for the first."""
    width: int = 0
    """Width of the tensor; 0 where it is not known."""
    scale: float = 1.0
    """Factor of this site under normalization "scalar", beside the coder's own."""
    weight: float = 1.0
    """Factor of this site's squared error in the training loss."""

    @property
    def name(self) -> str:
        """Returns the site as users type it: "model.layers.15" or "model.layers.15.mlp:input", and its tag if any."""
        return self.hook + (f":{self.side}" if self.side != "output" else "") + (f"@{self.tag}" if self.tag else "")

    @property
    def folder(self) -> str:
        """Returns the site as a file name."""
        return self.name.replace(":", "-")


def columns_of(sites: Sequence[Site]) -> list[slice]:
    """Returns the columns of each of some sites whose activations stand side by side."""
    if len(sites) == 1:  # whose width may not be known
        return [slice(None)]
    stops = list(itertools.accumulate(site.width for site in sites))
    return [slice(stop - site.width, stop) for site, stop in zip(sites, stops, strict=True)]


def tagged_columns(sites: Sequence[Site], tag: str) -> list[tuple[Site, slice]]:
    """Returns the sites with a tag, and the columns of each among all."""
    return [(site, part) for site, part in zip(sites, columns_of(sites), strict=True) if site.tag == tag]


def column_weights(sites: Sequence[Site]) -> Float[Tensor, "d_out"]:
    """Returns the weight of each column of written sites of known width, in float64."""
    weights = torch.tensor([site.weight for site in sites], dtype=torch.float64)
    return weights.repeat_interleave(torch.tensor([site.width for site in sites]))
