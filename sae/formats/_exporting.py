"""Exporting without loss: what a target format cannot say is named, before anything is written."""

from collections.abc import Collection
from typing import Any

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec

PLAIN: dict[str, Collection[Any]] = {
    "encoder": ("linear",),
    "pre_bias": ("none",),
    "normalization": ("none",),
    "selection": (),
    "cross_layer": (False,),
    "select_by_decoder_norm": (False,),
    "skip": (False,),
    "sites": (1,),
}
"""What the simplest target can say: a linear encoder of one site, as it is. Targets say more by `check`'s arguments."""


FOLDS = {"pre_bias": "fold_pre_bias()", "select_by_decoder_norm": "fold_decoder_norm()"}


def rule_of(spec: CoderSpec) -> tuple[str, dict[str, Any]]:
    """Returns the registered name of a coder's selection rule, which formats have a table for, and its constants."""
    constants = dict(spec.to_json()["selection"])
    return constants.pop("type"), constants


def check_expressible(target: str, spec: CoderSpec, **more: Collection[Any]) -> None:
    """Raises ConfigError naming what of a coder the format `target` cannot say; `more` adds to what PLAIN allows."""
    found = {
        **{name: getattr(spec, name, None) for name in PLAIN},
        "normalization": spec.normalization.kind,
        "selection": rule_of(spec)[0],
        "sites": max(1, len(spec.reads), len(spec.writes)),
    }
    for name, value in found.items():
        allowed = {*PLAIN[name], *more.get(name, ())}
        if value not in allowed:
            can = ", ".join(sorted(map(str, allowed))) or "nothing of that kind"
            how = f"; coder.{FOLDS[name]} writes the same map without it" if name in FOLDS else ""
            raise ConfigError(f"{name}: {target} cannot say {value!r}, which would be lost; it can say {can}{how}")


def only(target: str, name: str, said: Any, allowed: Any) -> None:
    """Raises ConfigError unless a field has the one value that a format can say."""
    if said != allowed:
        raise ConfigError(f"{name}: {target} cannot say {said!r}, which would be lost; it can say {allowed!r}")
