"""A coder before its first step: with fresh weights, or with those of a trained one."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.cutting import empty_part, retold, tensors_of
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.loading import hub
from sae.parallel.ranks import ITSELF, Axis
from sae.selection import Selection
from sae.training.config import CoderConfig
from sae.training.measuring import Statistics

SHAPES = ("d_in", "d_out", "d_sae", "encoder", "cross_layer", "skip")
STARTED_ALIKE = (*SHAPES, "pre_bias", "decoder_norm", "budget", "select_by_decoder_norm")


class Begun(NamedTuple):
    """What a coder begins with: the same for every part of it."""

    spec: CoderSpec
    center: Float[Tensor, "d_out"]
    input_center: Float[Tensor, "d_in"]
    spread: float
    """Standard deviation of an input's component."""

    @classmethod
    def of(cls, config: CoderConfig, found: Statistics, **described: Any) -> "Begun":
        """Returns it for activations with the measured statistics.

        `described` fills the fields of the spec that training does not need: context length, where it comes from.
        """
        spec = config.spec(
            found.reads, found.writes, found.normalization, mask=found.mask, variance=found.variance, **described
        )
        return cls(spec, found.center.cpu(), found.input_center.cpu(), found.input_spread)


def new_coder(
    config: CoderConfig, found: Statistics, device: torch.device | str = "cpu", **described: Any
) -> SparseCoder:
    """Returns an untrained coder for activations with the measured statistics; `described` is that of its spec."""
    return new_part(config, Begun.of(config, found, **described), ITSELF, device)


def new_part(config: CoderConfig, begun: Begun, axis: Axis, device: torch.device | str) -> SparseCoder:
    """Returns what this rank holds of an untrained coder that is cut over ranks; alone, all of it."""
    coder = empty_part(begun.spec, axis, device)
    if config.start_from:
        return _started(coder, Path(config.start_from))
    center, input_center = begun.center.to(device), begun.input_center.to(device)
    initialize(coder, center, config.seed, input_center=input_center, spread=begun.spread)
    return coder


def _started(coder: SparseCoder, folder: Path) -> SparseCoder:
    """Returns the coder with the weights and the calibration of a trained one; scales were taken over when measuring.

    Of a part, its rows are read and no others; that the file is whole was seen when measuring. ConfigError names what
    makes them different coders.
    """
    trained = hub.load(folder, lazy=True) if coder.shard else hub.load(folder, coder.W_enc.device)
    ours, theirs = (
        {
            **{name: getattr(s, name) for name in STARTED_ALIKE},
            "normalization.kind": s.normalization.kind,
            "selection.type": Selection.get_choice_name(type(s.selection)),
            "sites": [site.name for site in s.reads],
            "targets": [site.name for site in s.writes],
        }
        for s in (coder.whole, trained.spec)
    )
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(f"coder.start_from: {folder} has {name} {theirs[name]}, but this run {value}")
    retold(coder, calibration=trained.spec.calibration)
    own = tensors_of(coder, trained.state_dict())
    coder.load_state_dict(own)
    return coder
