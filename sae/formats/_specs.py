"""What is so of every coder that others trained: its decoder is as long as it is."""

from typing import Any

from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection import Selection

Sites = tuple[Site, ...]


def unsaid_sites(model: str, width: int = 0) -> tuple[Site, Site]:
    """Returns where a transcoder reads and writes if nobody says it: at two places of no name."""
    return Site("", "input", model, width=width), Site("", "output", model, width=width)


def released_spec(sizes: tuple[int, int, int], rule: Selection, sites: tuple[Sites, Sites], **more: Any) -> CoderSpec:
    """Returns the spec of a coder of (d_in, d_out, d_sae) and (reads, writes); `more` are fields of `CoderSpec`."""
    return CoderSpec(*sizes, rule, *sites, **{"decoder_norm": "free", **more})
