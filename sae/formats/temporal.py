"""Temporal SAEs (canrager/temporalSAEs): `latest_ckpt.safetensors` beside `conf.yaml`. Told apart, and refused.

Their codes depend on the whole context by attention, so that no map from one activation to codes is theirs.
"""

from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.untrusted.places import Place

WEIGHTS = r"latest_ckpt\.safetensors"
WHY = "is a temporal SAE, whose codes depend on the whole context; a coder here maps each activation by itself"


def detect(place: Place) -> bool:
    """Returns whether there is a dictionary beside layers of attention."""
    names = place.shapes()
    return "D" in names and any(name.startswith("attn_layers.") for name in names)


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Raises ConfigError with the reason."""
    raise ConfigError(f"architecture: {place} {WHY}")
