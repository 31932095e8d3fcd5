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


def properties(spec: CoderSpec) -> dict[str, Any]:
    """Returns what a coder is as a map, a word or number a property: the keys of PLAIN."""
    named = {
        name: getattr(spec, name) for name in ("encoder", "pre_bias", "cross_layer", "select_by_decoder_norm", "skip")
    }
    rule = type(spec.selection)
    return {
        **named,
        "normalization": spec.normalization.kind,
        "selection": rule.get_choice_name(rule),
        "sites": max(1, len(spec.reads), len(spec.writes)),
    }


def check_expressible(target: str, spec: CoderSpec, **more: Collection[Any]) -> None:
    """Raises ConfigError naming what of a coder the format `target` cannot say; `more` adds to what PLAIN allows."""
    for name, value in properties(spec).items():
        allowed = {*PLAIN[name], *more.get(name, ())}
        if value not in allowed:
            can = ", ".join(sorted(map(str, allowed))) or "nothing of that kind"
            how = f"; coder.{FOLDS[name]} writes the same map without it" if name in FOLDS else ""
            raise ConfigError(f"{name}: {target} cannot say {value!r}, which would be lost; it can say {can}{how}")
