"""From what users type to the modules of a model: paths, suffixes, globs and TransformerLens names."""

import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase

from torch import nn

from sae.base.errors import ConfigError, nearest
from sae.lm.site import Site

SIDES = ("output", "input", "normalized")
LAYER_LISTS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "encoder.layer",
    "layers",
    "h",
)
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "output.dense")
MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")

# TransformerLens name after "blocks.L." -> (candidate paths below the layer, side); the first that exists is meant.
# Some models add a norm after attention and MLP: what reaches the residual stream is that norm's output.
ALIASES: dict[str, tuple[tuple[str, ...], str]] = {
    "hook_resid_pre": (("",), "input"),
    "hook_resid_post": (("",), "output"),
    "hook_resid_mid": (("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "input"),
    "hook_mlp_out": (("post_feedforward_layernorm", "post_mlp_layernorm", "mlp", "feed_forward"), "output"),
    "hook_attn_out": (("post_self_attn_layernorm", *ATTENTION), "output"),
    "hook_mlp_in": (("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "input"),
    "ln1.hook_normalized": (("input_layernorm", "ln_1"), "normalized"),
    "ln2.hook_normalized": (("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "normalized"),
    "mlp.hook_in": (("mlp", "feed_forward"), "input"),
    "mlp.hook_out": (("mlp", "feed_forward"), "output"),
    "attn.hook_z": (tuple(f"{a}.{o}" for a in ATTENTION for o in ATTENTION_OUT), "input"),
    "mlp.hook_post": (tuple(f"mlp.{name}" for name in MLP_OUT), "input"),
}


ALIAS = re.compile(r"blocks\.(\d+|\*)\.(.+)")
EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "embed_tokens", "wte", "embed_in")


def find_module(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """Returns the module of a site and the side of it; ConfigError if this model has none of that name, or several.

    As in `resolve`, the end of a module path will do where it is unique: coders of others may be named below the base
    model ("layers.3.mlp").
    """
    alias = ALIAS.fullmatch(site.hook) or site.hook == "hook_embed"
    if not alias:
        with suppress(AttributeError):
            return model.get_submodule(site.hook), site.side
    try:
        found = _matches(site.hook, {path: module for path, module in model.named_modules() if path})
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
    modules = {path: module for path, module in model.named_modules() if path}
    sites: dict[str, Site] = {}
    for text in typed:
        try:
            matches = _matches(text, modules)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
        for hook, side in matches:
            site = Site(hook, side, name, revision, _heads(model, hook, side))
            sites.setdefault(site.name, site)
    return list(sites.values())


def _matches(text: str, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    path, _, side = text.partition(":")
    side = side or "output"
    if side not in SIDES:
        raise ConfigError(f"{text!r} ends in {side!r}; the side is one of {', '.join(SIDES)}")
    alias = ALIAS.fullmatch(path)
    if alias and path not in modules:
        return _aliased(text, alias[1], alias[2], modules)
    if path == "hook_embed":
        found = [name for name in EMBEDDINGS if name in modules]
        if not found:
            raise ConfigError(f"{text!r}: this model has no known embedding; write the module path")
        return [(found[0], "output")]
    if path in modules:
        return [(path, side)]
    found = [name for name in modules if _fits(name, path)]
    if not found:
        raise ConfigError(f"no module {path!r} in this model.{_closest(path, modules)}")
    if not any(character in path for character in "*?[") and len(found) > 1:
        raise ConfigError(f"{path!r} is ambiguous: {', '.join(found[:5])}; write one in full")
    return [(name, side) for name in found]


def _fits(name: str, pattern: str) -> bool:
    """Whether the end of a module path is what the pattern says; "*" stands for one part of it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def _aliased(text: str, layer: str, hook: str, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    if hook not in ALIASES:
        raise ConfigError(f"{text!r} is not a known name.{nearest(hook, ALIASES)}")
    lists = [name for name in LAYER_LISTS if isinstance(modules.get(name), nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{text!r}: this model has no known list of layers; write the module path")
    layers = range(len(modules[lists[0]])) if layer == "*" else [int(layer)]  # type: ignore[arg-type]
    paths, side = ALIASES[hook]
    if side == "input" and "ln_2" in paths and getattr(modules[f"{lists[0]}.0"], "use_parallel_residual", False):
        raise ConfigError(f"{text!r}: attention and MLP of this model read the same stream; nothing lies between them")
    if f"{lists[0]}.0.post_feedforward_layernorm" in modules:  # Gemma 2 and 3, OLMo 2 and 3
        if hook == "hook_attn_out":
            paths = ("post_attention_layernorm",)  # elsewhere this name is the norm before the MLP
        elif hook == "hook_resid_mid" and f"{lists[0]}.0.pre_feedforward_layernorm" not in modules:
            paths = ("mlp",)  # OLMo has no norm before it
    found = []
    for number in layers:
        candidates = [f"{lists[0]}.{number}.{path}".rstrip(".") for path in paths]
        hits = [candidate for candidate in candidates if candidate in modules]
        if not hits:
            raise ConfigError(f"{text!r}: none of {', '.join(candidates[:4])} is in this model")
        found.append((hits[0], side))
    return found


def _closest(path: str, modules: dict[str, nn.Module]) -> str:
    """Returns nearest names, also comparing with the ends of the paths, since users type suffixes."""
    depth = path.count(".") + 1
    ends = {".".join(name.split(".")[-depth:]): name for name in reversed(modules)}
    return nearest(path, [*modules, *ends], count=3)


def _heads(model: nn.Module, hook: str, side: str) -> int | None:
    """Returns the number of heads if the site is the concatenation of head outputs (input of the output projection)."""
    config = getattr(model, "config", None)
    is_out = hook.endswith(tuple(f"{attention}.{out}" for attention in ATTENTION for out in ATTENTION_OUT))
    return getattr(config, "num_attention_heads", None) if side == "input" and is_out else None


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
