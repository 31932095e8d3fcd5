"""What coders of models as TransformerLens loads them leave open: centered activations, and pairs of sites."""

from sae.coder.normalization import Normalization
from sae.formats._specs import unsaid_sites
from sae.lm.site import Site
from sae.lm.sites import is_centered, on_stream, parse_pair
from sae.untrusted.places import Place


def centering(place: Place, hook: str, model: str) -> Normalization:
    """Returns "center" if a coder of a model as TransformerLens loads it read activations without their mean.

    That depends on the hook and on the model's norms; of a model that is not known the user must say it.
    """
    raw, centered = Normalization(), Normalization("center")
    if not on_stream(hook):
        return raw
    known = [is_centered(name) for name in (place.hints.model, model) if name]
    found = next((answer for answer in known if answer is not None), None)
    if found is None:
        why = f"TransformerLens centers what is written to the stream if {model or 'the model'} has layer norms"
        found = place.required_hint("processed", why, "True or False", (True, False))
    return centered if found else raw


def hinted_pair(place: Place, model: str) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Returns where a transcoder reads and writes, as far as the user says it."""
    said = place.site_hint("a transcoder reads one place and writes another", "'READ->WRITTEN'")
    read, written = unsaid_sites(model)
    return ((read,), (written,)) if said is None else parse_pair(said, model)
