"""A coder wherever one is taken: itself, or where it is found."""

import os
from collections.abc import Mapping
from typing import TypeAlias

from sae.base.arguments import wrong
from sae.coder.coder import SparseCoder

CoderLike: TypeAlias = SparseCoder | str | os.PathLike[str]
TAKEN = "a SparseCoder, or the folder, hub id or released name of one"


def as_coder(coder: CoderLike, argument: str = "coder") -> SparseCoder:
    """Returns a coder as it is, or the one at an address (`sae.load`); TypeError, naming the argument, for others."""
    if isinstance(coder, SparseCoder):
        return coder
    if isinstance(coder, str | os.PathLike):
        return SparseCoder.from_pretrained(os.fspath(coder))
    raise wrong(argument, coder, TAKEN)


def as_coders(coders: CoderLike | Mapping[str, CoderLike]) -> dict[str, SparseCoder]:
    """Returns coders by name; of one alone, whose name is ""."""
    if isinstance(coders, Mapping):
        if not coders:
            raise ValueError("coders: there is none among them")
        return {name: as_coder(coder, f"coders.{name}") for name, coder in coders.items()}
    if not isinstance(coders, SparseCoder | str | os.PathLike):
        raise wrong("coders", coders, f"{TAKEN}, or a dict of them by name")
    return {"": as_coder(coders)}
