"""From what users type to the modules of a model: paths, suffixes, globs and TransformerLens names."""

import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase

from torch import nn

from sae.base.errors import ConfigError, nearest
from sae.lm.heads import heads_at
from sae.lm.layer import NAMES, Place
from sae.lm.residual import residual_of
from sae.lm.site import Site

WRAPPERS = ("model", "language_model", "text_model")
SIDES = ("output", "input", "normalized")
ALIAS = re.compile(r"blocks\.(\d+|\*)\.(.+)|hook_embed")
ALIASES = tuple(NAMES)
"""What may follow "blocks.L." in a TransformerLens name."""


def find_module(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """Returns the module of a site and the side of it; ConfigError if this model has none of that name, or several.

    As in `resolve`, the end of a module path will do where it is unique: coders of others may be named below the base
    model ("layers.3.mlp").
    """
    with suppress(AttributeError):
        return model.get_submodule(site.hook), site.side
    alias = ALIAS.fullmatch(site.hook)
    try:
        found = _matches(site.hook, model)
    except ConfigError as error:
        raise ConfigError(f"activations.sites: {error}") from None
    if len(found) > 1:
        raise ConfigError(f"activations.sites: {site.hook!r} means {len(found)} modules; write one in full")
    [(path, side)] = found
    return model.get_submodule(path), side if alias else site.side


def parse_site(text: str, model: str, width: int = 0) -> Site:
    """Returns the site that a user means by "blocks.3.hook_resid_mid" or "model.layers.3.mlp:input"."""
    hook, _, side = text.strip().partition(":")
    if side and side not in SIDES:
        raise ConfigError(
            f"site: {text!r} ends in {side!r}; the side is one of {', '.join(SIDES)}.{nearest(side, SIDES)}"
        )
    return Site(hook, side or "output", model, width=width)


def parse_pair(text: str, model: str) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Returns (reads, writes) of "READ->WRITTEN"; ConfigError if it names but one place."""
    read, arrow, written = text.partition("->")
    if not (read and arrow and written):
        raise ConfigError(f"site: {text!r} is not READ->WRITTEN, where a transcoder reads and where it writes")
    return (parse_site(read, model),), (parse_site(written, model),)


def resolve_sites(
    model: nn.Module,
    typed: Iterable[str],
    name: str = "",
    revision: str | None = None,
    field: str = "activations.sites",
) -> list[Site]:
    """Returns the sites meant by what was typed, in order, each once.

    "model.layers.3", a suffix of it that is unique ("layers.3"), a glob ("layers.*.mlp") or a TransformerLens name
    ("blocks.3.hook_resid_post"); ":input" or ":output" picks the side. ConfigError names `field` and lists the nearest
    module paths.
    """
    sites: dict[str, Site] = {}
    for text in typed:
        try:
            matches = _matches(text, model)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
        for hook, side in matches:
            site = Site(hook, side, name, revision, heads_at(model, hook, side))
            sites.setdefault(site.name, site)
    return list(sites.values())


def _matches(text: str, model: nn.Module) -> list[Place]:
    path, colon, side = text.partition(":")
    modules = [name for name, _ in model.named_modules() if name]
    alias = ALIAS.fullmatch(path) if path not in modules else None
    if colon and (alias or side not in SIDES):
        allowed = "a TransformerLens name says its side" if alias else f"the side is one of {', '.join(SIDES)}"
        raise ConfigError(f"{text!r} ends in {side!r}; {allowed}")
    if alias:
        return _aliased(text, alias[1], alias[2], model)
    side = side or "output"
    if path in modules:
        return [(path, side)]
    found = [name for name in modules if fits(name, path)]
    if not found:  # others' files and older versions wrap the same layers otherwise
        wrappers = {*WRAPPERS, getattr(model, "base_model_prefix", "")}
        wanted = _unwrapped(path, wrappers)
        found = [name for name in modules if fnmatchcase(_unwrapped(name, wrappers), wanted) and fits(name, wanted)]
    if not found:
        raise ConfigError(f"no module {path!r} in this model.{_closest(path, modules)}")
    if not any(character in path for character in "*?[") and len(found) > 1:
        raise ConfigError(f"{path!r} is ambiguous: {', '.join(found[:5])}; write one in full")
    return [(name, side) for name in found]


def _unwrapped(path: str, wrappers: set[str]) -> str:
    """Returns a module path without those parts that only hold a model, or nothing if there is no other."""
    return ".".join(part for part in path.split(".") if part not in wrappers)


def fits(name: str, pattern: str) -> bool:
    """Whether the end of a module path is what the pattern says; "*" stands for one part of it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def _aliased(text: str, layer: str | None, name: str | None, model: nn.Module) -> list[Place]:
    """Returns the places of a TransformerLens name; without a layer, of "hook_embed"."""
    if name and name not in ALIASES:
        raise ConfigError(f"{text!r} is not a known name.{nearest(name, ALIASES)}")
    try:
        stream = residual_of(model)
    except ConfigError as error:
        raise ConfigError(f"{text!r}: {error}") from None
    if not stream.layers:
        raise ConfigError(
            f"{text!r}: this model has no one list of layers, each given what the one before it made "
            f"({stream.unlayered}); write the module path"
        )
    layers = stream.layers
    numbers = range(len(layers)) if layer == "*" else [int(layer or 0)]
    if numbers[-1] >= len(layers):
        last = f"{layers[0].rpartition('.')[0]}.{numbers[-1]}"
        raise ConfigError(f"{text!r}: none of {last} is in this model; its layers are 0 to {len(layers) - 1}")
    found = [stream.places[number, name] for number in numbers] if name else [stream.embedding]
    for place in found:
        if isinstance(place, str):
            raise ConfigError(f"{text!r}: {place}")
    return found  # type: ignore[return-value]


def _closest(path: str, modules: list[str]) -> str:
    """Returns nearest names, also comparing with the ends of the paths, since users type suffixes."""
    depth = path.count(".") + 1
    ends = {".".join(name.split(".")[-depth:]): name for name in reversed(modules)}
    return nearest(path, [*modules, *ends], count=3)


# TransformerLens' short names of the models for which coders have been released, by hub id.
MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "pythia-160m-deduped": "EleutherAI/pythia-160m-deduped",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
}


STREAM = re.compile(r"(blocks\.\d+\.)?hook_(resid_\w+|mlp_out|attn_out|mlp_in|attn_in|embed|pos_embed)")
LAYER_NORMS = re.compile(
    r"gpt-?2|gpt-?neo|gpt-j|pythia|tiny-?stories|opt-\d|bloom|gelu-\dl|attn-only|solu-", re.IGNORECASE
)
RMS_NORMS = re.compile(
    r"llama|gemma|mi[sx]tral|qwen|gpt-oss|phi-?3|apertus|olmo-?[23]|olmoe|deepseek|yi-|smollm|granite|falcon-?3|glm",
    re.IGNORECASE,
)


def on_stream(hook: str) -> bool:
    """Returns whether a TransformerLens name is of the residual stream, or of what is written to it."""
    return STREAM.fullmatch(hook) is not None


def is_centered(model: str) -> bool | None:
    """Returns whether TransformerLens, as it loads a model by default, centers what is written to its stream.

    It does where the model has layer norms, which take the mean out anyway. None for a model that is not known.
    """
    return True if LAYER_NORMS.search(model) else False if RMS_NORMS.search(model) else None


def model_id(name: str) -> str:
    """Returns the hub id of a model that goes by its TransformerLens name; any other name as it is."""
    return MODELS.get(name, name)
