"""Changing what a language model computes at a site: splice a coder in, ablate, or replace by anything.

with splice(lm.model, coder): logits = lm.model(tokens).logits
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.activations import hooked
from sae.coder import SparseCoder
from sae.spec import Site


@contextmanager
def replace_at(
    model: nn.Module,
    site: Site,
    new: Callable[[Float[Tensor, "rows context d"]], Float[Tensor, "rows context d"]],
    keep: Bool[Tensor, "rows context"] | None = None,
) -> Iterator[None]:
    """While open, the tensor at `site` is `new(tensor)` at the positions in `keep` and untouched elsewhere."""

    def see(_: Site, x: Tensor) -> Tensor:
        made = new(x).to(x)
        return made if keep is None else torch.where(keep[..., None], made, x)

    with hooked(model, [site], see):
        yield


@contextmanager
def splice(
    model: nn.Module,
    coder: SparseCoder,
    keep: Bool[Tensor, "rows context"] | None = None,
    error: bool = False,
) -> Iterator[None]:
    """While open, the model computes with the coder's output in place of the activations it reconstructs.

    A coder that reads and writes one site replaces that tensor; one that writes elsewhere (a transcoder) replaces the
    tensor at the site it writes. With `error`, the difference between the original and the reconstruction is added
    back as a constant: the model's output is unchanged until latents are edited. `keep` limits it to some positions.
    """
    read, write = coder.spec.reads[0], coder.spec.writes[0]
    if read == write:
        with replace_at(model, read, lambda x: _output(coder, x, x if error else None), keep):
            yield
        return
    seen: dict[str, Tensor] = {}

    def remember(_: Site, x: Tensor) -> None:
        seen["input"] = x

    with (
        hooked(model, [read], remember),
        replace_at(model, write, lambda x: _output(coder, seen["input"], x if error else None), keep),
    ):
        yield


def _output(coder: SparseCoder, x: Tensor, original: Tensor | None) -> Tensor:
    """Returns the coder's output, or the original with the reconstruction's gradient path where the error is kept."""
    out = coder(x.float()).out
    return out if original is None else out + (original.to(out.device).float() - out).detach()
