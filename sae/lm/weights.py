"""Reads a model's weights: into the class with a head that predicts the next token, if there is one and it does.

A checkpoint says which class wrote it, if at all, but not what that class does; so the model is asked (`probing.py`).
What the checkpoint lacks would be drawn at random: it is refused, if anything that is read or measured depends on it.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sae.base.errors import ConfigError, nearest
from sae.lm.devices import MAP
from sae.lm.placement import out_of_reach
from sae.lm.probing import Nature, depended_on, nature_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

HEADS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
BASE, MASKED, ENCODER = "AutoModel", "AutoModelForMaskedLM", "AutoModelForTextEncoding"
SHOWN = 4


def read_model(
    name: str, config: "PretrainedConfig", path: str, device: "torch.device", **options: Any
) -> "tuple[PreTrainedModel, Nature]":
    """Returns the model in a folder or on the hub, frozen and in evaluation mode, and what it was found to be.

    With a head, if its class has one, its files too, and the model does not look ahead; else without. `options` go to
    transformers. ConfigError names tensors that are missing or of another shape, or says why it cannot read text.
    """
    written, classes = getattr(config, "architectures", None) or [], auto_classes(config)
    for i, auto in enumerate(classes):
        if isinstance(options.get("device_map"), dict):
            check_parts(auto, config, options["device_map"], options.get("trust_remote_code", False))
        model, lacks = read(auto, name, path, **options)
        if "device_map" not in options:
            model = model.to(device)  # type: ignore[arg-type]
        model.eval().requires_grad_(False)
        own, last, head = type(model).__name__ in written, i == len(classes) - 1, auto.__name__ != BASE
        if lacks and head and not own and not last:
            continue  # the head, most likely
        refuse_missing(name, (key for key, x in model.named_parameters() if x.is_meta and key in lacks))
        if isinstance(options.get("device_map"), dict | str) and out_of_reach(model):
            raise ConfigError(f"{MAP}: the installed versions run no model that is on disk alone; keep a part on cpu")
        nature = understood(model, name)
        refuse_missing(name, depended_on(model, lacks))
        if last or (own or not nature.looks_ahead if head else nature.looks_ahead):
            log.info("model: %s (%s) %s", name, type(model).__name__, described(nature))
            return model, nature
    raise AssertionError("the last class is taken")


def check_parts(auto: Any, config: "PretrainedConfig", places: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raises what `check_map` does before anything is read, of a model that is made without weights for it.

    Of one whose own code cannot do so, accelerate says it later.
    """
    import torch

    try:
        with torch.device("meta"):
            made = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # anything that a model's own code may raise
        return
    check_map(made, places)


def check_map(made: "torch.nn.Module", places: Mapping[str, Any]) -> None:
    """Raises ConfigError for a device map that names what is no part of a model, or leaves a part out."""
    weights = [name for name, _ in made.named_parameters()]
    known = {name for name, _ in made.named_modules()}.union(weights)
    if wrong := [path for path in places if path not in known]:
        close = nearest(wrong[0], known)
        raise ConfigError(f"{MAP}: {wrong[0]!r} is no module of {type(made).__name__}.{close}")
    tied = getattr(made, "all_tied_weights_keys", None) or {}
    parts = ["" if path == "" else f"{path}." for path in places]
    left = [name for name in weights if name not in tied and not any(f"{name}.".startswith(part) for part in parts)]
    if left and not getattr(made, "_no_placement_params", None):
        raise ConfigError(f"{MAP}: it does not say where these go: {_some(left)}")


def understood(model: "PreTrainedModel", name: str) -> Nature:
    """Returns what a model is found to be; ConfigError, with its name, if it cannot read text."""
    try:
        return nature_of(model)
    except Exception as error:
        why = f"could not read a few tokens of text: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"model.name: {name!r} ({type(model).__name__}) {why}") from error


def described(nature: Nature) -> str:
    """Returns what a model was found to be, in words."""
    if nature.predicts:
        return "predicts the next token"
    if nature.looks_ahead:
        return "looks ahead: an encoder, of which no next-token loss is measured"
    return "sees what came before, but its files hold no head: no next-token loss is measured"


def auto_classes(config: "PretrainedConfig") -> list[Any]:
    """Returns transformers' auto classes for a config in the order in which they are to be tried.

    Those with a head come first, that of the class which wrote the files before others. A family with a
    masked-language head is tried as an encoder before, unless the config says that it is a decoder. ConfigError if
    there is none.
    """
    import transformers

    written = getattr(config, "architectures", None) or []
    found = {name: getattr(transformers, name, None) for name in (*HEADS, BASE, MASKED, ENCODER)}
    names = {name: _class_name(auto, config) for name, auto in found.items() if auto}
    heads = sorted((name for name in HEADS if names.get(name)), key=lambda name: names[name] not in written)
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    if names.get(ENCODER) in written and names[ENCODER] != names[BASE]:  # saved without its decoder
        return [found[ENCODER]]
    if getattr(config, "is_encoder_decoder", False) or (names[BASE] in written and not tied) or not heads:
        if not names[BASE]:
            kind = config.model_type
            raise ConfigError(f"model.name: transformers has no class that reads text for models of type {kind!r}")
        return [found[BASE]]  # of an encoder and a decoder the first is read; an untied head is not in a base's files
    encoder = [BASE] if names.get(MASKED) and not getattr(config, "is_decoder", False) else []
    return [found[name] for name in (*encoder, *heads, *([BASE] if names[BASE] else []))]


def _class_name(auto: Any, config: "PretrainedConfig") -> str:
    """Returns the class that an auto class makes of a config, "" if none: its own code's or one of transformers'."""
    own = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if own:
        return str(own).rpartition(".")[2]
    known = auto._model_mapping.get(type(config), None)
    several = [kind.__name__ for kind in (known if isinstance(known, tuple) else (known,)) if kind]
    written = [name for name in several if name in (getattr(config, "architectures", None) or [])]
    return [*written, *several, ""][0]


def read(auto: Any, name: str, path: str, **options: Any) -> "tuple[PreTrainedModel, set[str]]":
    """Returns a model as an auto class reads it, and the names of the tensors that its files lack.

    What the files have too much is logged. ConfigError for tensors of another shape.
    """
    with _no_report():
        model, info = auto.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if info["mismatched_keys"]:
        shown = [f"{key} {list(there)}, not {list(wanted)}" for key, there, wanted in sorted(info["mismatched_keys"])]
        raise ConfigError(f"model.name: {name!r} has tensors of other shapes than its config says: {_some(shown)}")
    if info["unexpected_keys"]:
        log.info("model: %s does not use %s", type(model).__name__, _some(sorted(info["unexpected_keys"])))
    made = model._keys_to_ignore_on_load_missing or ()  # by the class itself, and named as in the class with a head
    missing = (
        key for key in info["missing_keys"] if not re.search("|".join(made) or "$^", f"{model.base_model_prefix}.{key}")
    )
    return model, set(missing)


def refuse_missing(name: str, missing: Iterable[str]) -> None:
    """Raises ConfigError if tensors are missing that would be random."""
    if missing := sorted(missing):
        raise ConfigError(f"model.name: the files of {name!r} lack tensors, which would be random: {_some(missing)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@contextmanager
def _no_report() -> Iterator[None]:
    """While open, transformers prints no table of what a checkpoint lacks and has too much: it is said here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
