"""What is so of every coder that others trained: its decoder is as long as it is."""

from typing import Any

from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection import Selection

Sites = tuple[Site, ...]


def released_spec(sizes: tuple[int, int, int], rule: Selection, sites: tuple[Sites, Sites], **more: Any) -> CoderSpec:
    """Returns the spec of a coder of (d_in, d_out, d_sae) and (reads, writes); `more` are fields of `CoderSpec`."""
    return CoderSpec(*sizes, rule, *sites, **{"decoder_norm": "free", **more})
