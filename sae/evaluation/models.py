"""The language models that coders are read in: those given, else those that their specs name; whether they fit."""

from typing import TYPE_CHECKING

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.lm.hooks import site_widths, sites_of_model
from sae.lm.models import LanguageModel, ModelConfig, as_language_model
from sae.lm.site import SECOND

if TYPE_CHECKING:
    from sae.lm.models import ModelLike


def models_of(
    coders: dict[str, SparseCoder], lm: "ModelLike | None" = None, second: "ModelLike | None" = None
) -> dict[str, LanguageModel]:
    """Returns the language models that coders read by the tags of their sites: those given, else those they name.

    ConfigError for a coder of no known site, or of a site that is not there or has another width; and if a name leads
    to other weights than those of the model object that the coder was trained on.
    """
    check_placed(coders)
    first = next(iter(coders.values()))
    sites, device = {"": first.spec.reads[0]}, str(first.device)
    sites |= {site.tag: site for coder in coders.values() for site in coder.spec.reads if site.tag}
    models = {}
    for tag, given in (("", lm), (SECOND, second)):
        if tag in sites:
            named = ModelConfig(sites[tag].model, sites[tag].revision)
            if given is None and not named.name:
                which = "second" if tag else "lm"
                raise ConfigError(f"{which}: the coder's spec names no model; pass it, or activations=...")
            models[tag] = as_language_model(named if given is None else given, device=device)
            if given is None:
                _check_weights(coders, tag, models[tag])
    _check_widths(coders, models)
    return models


def check_placed(coders: dict[str, SparseCoder]) -> None:
    """Raises ConfigError for a coder of no known site."""
    for name, coder in coders.items():
        if not coder.spec.is_placed:
            raise ConfigError(f"coder {name}: its spec names no site to read; set spec.reads and spec.writes")


def _check_weights(coders: dict[str, SparseCoder], tag: str, lm: LanguageModel) -> None:
    """Refuses a name that leads to other weights than those of the object that a coder was trained on."""
    for name, coder in coders.items():
        then = coder.spec.training.get("weights", {}).get(tag)
        if then and then != lm.fingerprint()["weights"]:
            raise ConfigError(
                f"coder {name}: it was trained on a loaded model, whose weights are not those of {lm.name}; pass it"
            )


def _check_widths(coders: dict[str, SparseCoder], models: dict[str, LanguageModel]) -> None:
    for name, coder in coders.items():
        sides = ((coder.spec.reads, coder.spec.d_in), (coder.spec.writes, coder.spec.d_out))
        for sites, total in sides:
            found = {}
            for tag, lm in models.items():
                found |= site_widths(lm, sites_of_model(sites, tag)) if sites_of_model(sites, tag) else {}
            for site in sites:
                width = site.width or total
                if found[site.name] != width:
                    of = f"{models[site.tag].name} it has {found[site.name]}"
                    raise ConfigError(f"coder{name and f' {name}'}: takes {site.name} to have width {width}; in {of}")
