"""What a coder and its model are called on Neuronpedia: as they are known there, or names made of what the coder is.

model_id   "gemma-2-2b"         the name of the model without its owner
source_id  "20-res-topk-16k"    LAYER-SET: the layer that is written, and what its coders have in common
set        "res-topk-16k"       place, rule and width; what follows "__" in a source id is of that source alone
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sae.base.errors import ConfigError
from sae.base.visible import visible
from sae.coder.spec import CoderSpec
from sae.coder.wording import kind as kind_of
from sae.lm.residual import ResidualStream
from sae.lm.site import Site
from sae.selection import Selection

ID = re.compile(r"(?!\.)[A-Za-z0-9._-]+(?<!\.)")
SOURCE = re.compile(r"(\d+|e)-[A-Za-z0-9_-][A-Za-z0-9._-]*(?<!\.)")
LONGEST = 128
PLACES = {"attn_out": "att", "z": "att", "mlp_out": "mlp", "mlp_in": "mlp", "out": "mlp", "in": "mlp", "post": "mlp"}


def check_ids(model_id: str, source_id: str) -> None:
    """Raises ConfigError for what is no id there, or no name of a folder here; "" is none that was given."""
    if model_id and (not ID.fullmatch(model_id) or len(model_id) > LONGEST):
        raise _refused("--model-id", model_id, "letters, digits, . _ and -, such as gemma-2-2b")
    if source_id and (not SOURCE.fullmatch(source_id) or len(source_id) > LONGEST):
        raise _refused("--source-id", source_id, "LAYER-SET of letters, digits, . _ and -, such as 20-my-res-16k")


@dataclass(frozen=True)
class Names:
    """What a source, its set and its model are called."""

    model_id: str
    source_id: str

    def __post_init__(self) -> None:
        """Raises ConfigError for what is no id."""
        check_ids(self.model_id or "-", self.source_id or "-")

    @property
    def set(self) -> str:
        """Returns the name of the set of sources: of all layers of one kind."""
        return self.source_id.partition("-")[2].partition("__")[0]

    @property
    def release(self) -> str:
        """Returns the name of what is released together."""
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{self.model_id}-{self.set}").strip("-").lower()


def names_of(
    spec: CoderSpec, model: str, stream: ResidualStream, model_id: str = "", source_id: str = "", known: str = ""
) -> Names:
    """Returns the names of a coder: as given, else as `known` there ("model/source"), else made of what it is.

    `model` is what its language model is called here, and `stream` tells its places. ConfigError for what is no id.
    """
    there = known.partition("/")
    made = re.sub(r"[^a-z0-9._-]+", "-", Path(model).name.lower()).strip(".-")
    return Names(model_id or there[0] or made or "model", source_id or there[2] or _source(spec, stream))


def hook_of(site: Site, stream: ResidualStream) -> tuple[int, str] | None:
    """Returns a site as (layer, TransformerLens' name), such as (20, "hook_resid_post"); None where it has none."""
    place = site.hook, site.side
    found = [key for key, there in stream.places.items() if there == place]
    found.sort(key=lambda key: (key[1] == "hook_resid_pre", key[1] != "hook_resid_post"))  # the end of a layer first
    return found[0] if found else None


def _source(spec: CoderSpec, stream: ResidualStream) -> str:
    site = spec.writes[0]
    found = hook_of(site, stream)
    number = re.search(r"\.(\d+)(\.|$)", site.hook)
    layer = str(found[0]) if found else number[1] if number else "0"
    hook = found[1].rpartition(".")[2].removeprefix("hook_") if found else ""
    said = kind_of(spec)
    kind = {"sparse autoencoder": PLACES.get(hook, "res"), "cross-layer transcoder": "clt"}.get(said, said)
    selection = re.sub(r"[^a-z0-9]+", "", Selection.get_choice_name(type(spec.selection)))
    return f"{layer}-{kind}-{selection}-{_width(spec.d_sae)}"


def _width(d_sae: int) -> str:
    return str(d_sae) if d_sae < 1000 else f"{d_sae // 1000}k" if d_sae < 10**6 else f"{d_sae // 10**6}m"


def _refused(option: str, value: str, allowed: str) -> ConfigError:
    return ConfigError(f"{option}: {visible(value)!r} is no id of Neuronpedia's: {allowed}")
