"""A coder before its first step: with fresh weights, or with those of a trained one."""

from pathlib import Path
from typing import Any

import torch

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.loading import hub
from sae.selection import Selection
from sae.training.config import CoderConfig
from sae.training.measuring import Statistics

SHAPES = ("d_in", "d_out", "d_sae", "encoder", "cross_layer", "skip")
STARTED_ALIKE = (*SHAPES, "pre_bias", "decoder_norm", "budget", "select_by_decoder_norm")


def new_coder(
    config: CoderConfig, found: Statistics, device: torch.device | str = "cpu", **described: Any
) -> SparseCoder:
    """Returns an untrained coder for activations with the measured statistics.

    `described` fills the fields of its spec that training does not need: context length, where it comes from.
    """
    spec = config.spec(
        found.reads, found.writes, found.normalization, mask=found.mask, variance=found.variance, **described
    )
    coder = SparseCoder(spec, device)
    if config.start_from:
        return _started(coder, Path(config.start_from))
    center, input_center = found.center.to(device), found.input_center.to(device)
    initialize(coder, center, config.seed, input_center=input_center, spread=found.input_spread)
    return coder


def _started(coder: SparseCoder, folder: Path) -> SparseCoder:
    """Returns the coder with the weights and the calibration of a trained one; scales were taken over when measuring.

    ConfigError names what makes them different coders.
    """
    trained, spec = hub.load(folder, coder.W_enc.device), coder.spec
    ours, theirs = (
        {
            **{name: getattr(s, name) for name in STARTED_ALIKE},
            "normalization.kind": s.normalization.kind,
            "selection.type": Selection.get_choice_name(type(s.selection)),
            "sites": [site.name for site in s.reads],
            "targets": [site.name for site in s.writes],
        }
        for s in (spec, trained.spec)
    )
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(f"coder.start_from: {folder} has {name} {theirs[name]}, but this run {value}")
    coder.spec = spec.with_(calibration=trained.spec.calibration)
    coder.load_state_dict(trained.state_dict())
    return coder
