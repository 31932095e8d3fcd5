"""The language model: a hub id, a local folder, a .gguf file or the embedded quickstart model."""

import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import draccus
import torch

from sae.base.arguments import wrong
from sae.base.errors import ConfigError
from sae.base.paths import from_anywhere
from sae.base.settings import choose, decode
from sae.lm import objects, options, placement, probing, weights
from sae.lm.devices import resolve_device
from sae.lm.files import NAMELESS, commit_of, load_config, load_tokenizer, local_folder, readable_errors
from sae.text.tokenizing import special_ids, tokenizer_digest

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Pipeline, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    ModelLike: TypeAlias = "LanguageModel | ModelConfig | dict[str, Any] | torch.nn.Module | Pipeline | Path | str"
    TokenizerLike = PreTrainedTokenizerBase | ProcessorMixin | Path | str

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """The language model whose activations are read."""

    name: str = "quickstart"
    """"quickstart" (the model shipped with this package), a Hugging Face hub id, a folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "auto"
    """Precision of the model: auto (float32 on CPU, the checkpoint's on GPU), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (a GPU if there is one, its own for each rank), cpu, cuda, cuda:1 ..., or mps, of Apple."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What else transformers' from_pretrained is given: device_map (auto spreads the model over this rank's GPUs, CPU
    memory and disk), max_memory, offload_folder, quantization_config, attn_implementation, variant."""

    def __post_init__(self) -> None:
        kwargs = options.plain(self.kwargs)
        for name in ("dtype", "torch_dtype"):  # which has a field of its own
            if self.dtype == "auto" and isinstance(kwargs, dict) and isinstance(kwargs.get(name), str):
                object.__setattr__(self, "dtype", kwargs[name])
            if isinstance(kwargs, dict) and kwargs.get(name) == options.plain(self.dtype):
                del kwargs[name]
        for name, value in (("kwargs", kwargs), ("dtype", self.dtype), ("device", self.device)):
            object.__setattr__(self, name, options.plain(value))

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("model.dtype", self.dtype, ("auto", *DTYPES))
        options.check(self.kwargs, self.dtype, self.device)


@draccus.encode.register(ModelConfig)  # type: ignore[attr-defined]
def _encoded(model: ModelConfig, declared_type: Any = None) -> dict[str, Any]:
    """Returns a config as files have it; without kwargs, as those of older versions."""
    return {name: value for name, value in vars(model).items() if name != "kwargs" or value}


ONE_AT_A_TIME = threading.RLock()
"""Held by whoever runs a language model: hooks belong to it and not to a thread, so that reading ahead must not meet an
evaluation."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer, frozen and in evaluation mode."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    revision: str | None
    is_causal: bool
    """Whether it predicts the next token, so that cross-entropy and splicing can be measured."""
    positions: int | None = None
    """The longest row that its table of positions allows; None where it has none."""
    given: bool = False
    """Whether it was loaded by somebody else, so that its name need not lead to the same weights."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What it was loaded with beside."""

    @property
    def device(self) -> torch.device:
        """Returns where its inputs go."""
        return placement.input_device(self.model)

    @property
    def trained_length(self) -> int | None:
        """Returns the longest row that its config says it was trained on, None where it does not say."""
        text = self.model.config.get_text_config()
        names = ("max_position_embeddings", "max_seq_len", "max_encoder_position_embeddings")
        return next(filter(None, (getattr(text, name, None) for name in names)), None)

    @property
    def context(self) -> int | None:
        """Returns the longest row, of a text and what is written behind it, that it is of use for; None: any."""
        return self.positions or self.trained_length

    def check_context(self, length: int, field: str = "text.context_length") -> None:
        """Raises ConfigError if the model cannot read rows of a length; warns where it was trained on shorter ones.

        Both name the field that says the length.

        Where only the config says so, and no table of positions, it is tried.
        """
        most, trained = self.positions or length, self.trained_length or length
        if length > trained and length <= most and self.tokenizer is not None:
            try:
                with torch.no_grad():
                    ids = probing.plain_ids(self.model, length)  # tokens of padding may have no positions
                    there = None if self.is_causal else torch.ones_like(ids)
                    probing.reader_of(self.model)(**probing.inputs_of(ids, there))
            except (RuntimeError, IndexError, ValueError):
                most = trained
        if length > most:
            raise ConfigError(
                f"{field}: {length} is more than {self.name} has positions for; at most {most} are allowed"
            )
        if length > trained:
            log.warning("%s: %d is more than %s was trained on (%d)", field, length, self.name, trained)

    def source(self) -> dict[str, Any]:
        """Returns which model it is: name and revision."""
        return {"model": self.name, "revision": self.revision}

    def fingerprint(self) -> dict[str, Any]:
        """Returns what decides its activations: name, revision, precision, and hashes of config, weights, tokenizer.

        Of what it was loaded with, that which changes them: where it lies does not.
        """
        weights = next(self.model.parameters())
        return {
            **self.source(),
            **{name: self.kwargs[name] for name in options.CHANGING if name in self.kwargs},
            "config": _config_digest(self.model.config),
            "weights": _weights_digest(self.model),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
        }


def _config_digest(config: "PretrainedConfig") -> str:
    """Returns a hash of what the model computes by; where it was loaded from, and by which version, does not count."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    settings = {key: value for key, value in config.to_dict().items() if key not in volatile}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights_digest(model: "PreTrainedModel") -> str:
    """Returns a hash over a sample of every weight: other weights under the same name must not share a cache."""
    digest = hashlib.sha256()
    for name, parameter in placement.named_weights(model):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_language_model(
    name: "ModelLike",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tokenizer: "TokenizerLike | None" = None,
    kwargs: dict[str, Any] | None = None,
) -> LanguageModel:
    """Returns the model called `name`, loaded for reading activations, or the one that is given instead of a name.

    A name is a hub id, a folder, a .gguf file or "quickstart". A loaded model of transformers, also as a pipeline or
    with peft's adapters, is taken as it is, in its precision and where it lies; it is put into evaluation mode, and its
    weights take no gradients from then on. `tokenizer` is an object or a name; by default that of the model's name.
    `kwargs` are those of `ModelConfig`.

    Raises ConfigError in one line if it cannot be had: no such folder, a hub id that is not cached while offline, or a
    model that ships code of its own, which runs only if the user typed `--trust-remote-code`; TypeError for what is
    neither a name nor a model.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        said = {"revision": revision, "dtype": dtype, "device": device, "kwargs": kwargs}
        for argument, value in said.items():
            if value not in (None, "auto"):
                raise ConfigError(f"{argument}: {value!r} is for a model by name; the one given is loaded already")
        return as_language_model(name, tokenizer)
    said = ModelConfig(name, revision, dtype, device, kwargs or {})
    said.validate()
    where = resolve_device(said.device)
    more = options.ready(said.kwargs)
    if "quantization_config" in more:  # what is quantized is made where it stays
        more = {"device_map": {"": where}, **more}
    folder = local_folder(name)
    config = load_config(name, revision, trust_remote_code)
    tokenizer = as_tokenizer(tokenizer) if tokenizer else load_tokenizer(name, revision, trust_remote_code)
    chosen: Any = DTYPES.get(said.dtype) or (torch.float32 if where.type == "cpu" else "auto")
    with readable_errors(name):
        model, nature = weights.read_model(
            name,
            config,
            str(folder or name),
            where,
            revision=None if folder else revision,
            dtype=chosen,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **more,
        )
    _check_vocabulary(name, model, tokenizer)
    commit = None if folder else commit_of(name, revision)
    return LanguageModel(
        model, tokenizer, name, commit or revision, nature.predicts, nature.positions, kwargs=said.kwargs
    )


def as_language_model(
    model: "ModelLike", tokenizer: "TokenizerLike | None" = None, device: str = "auto"
) -> LanguageModel:
    """Returns the language model that is meant: ours as it is, what is loaded, or what has a name, put on a device.

    Arguments and errors are as those of `load_language_model`.
    """
    if isinstance(model, LanguageModel):
        return replace(model, tokenizer=as_tokenizer(tokenizer)) if tokenizer else model
    if isinstance(model, dict):
        model = decode(ModelConfig, model, "model")
    if isinstance(model, ModelConfig):
        model.validate()
        own = model.device if device == "auto" or model.kwargs else device
        return load_language_model(
            model.name, model.revision, model.dtype, own, tokenizer=tokenizer, kwargs=model.kwargs
        )
    if isinstance(model, str | os.PathLike):
        return load_language_model(model, device=device, tokenizer=tokenizer)
    held, beside = objects.inside(model)
    config = held.config
    name = from_anywhere(getattr(config, "_name_or_path", "")) or f"{NAMELESS}{type(held).__name__}"
    revision = getattr(config, "_commit_hash", None)
    tokenizer = tokenizer or beside
    if tokenizer is None and name.startswith(NAMELESS):
        raise ConfigError(f"tokenizer: the {type(held).__name__} that was given has no name to find one by; pass it")
    try:
        own = as_tokenizer(tokenizer or name, revision if tokenizer is None else None)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.name", "tokenizer", 1)) from error
    if held.training or any(weights.requires_grad for weights in held.parameters()):
        log.info("model: %s is in evaluation mode from here on, and its weights take no gradients", name)
        held.eval().requires_grad_(False)
    nature = weights.understood(held, name)
    _check_vocabulary(name, held, own)
    return LanguageModel(held, own, name, revision, nature.predicts, nature.positions, given=True)


def module_of(model: "LanguageModel | torch.nn.Module") -> torch.nn.Module:
    """Returns the modules of a loaded model, ours or transformers'; TypeError for a name: who would hold the model?"""
    if isinstance(model, LanguageModel):
        return model.model
    if not isinstance(model, torch.nn.Module):
        raise wrong("model", model, "a loaded model, of transformers or of sae.load_language_model")
    return objects.unwrapped(model)


def as_tokenizer(tokenizer: "TokenizerLike", revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Returns a tokenizer: an object as it is, of a processor the one inside, or that of a model's name."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(os.fspath(tokenizer), revision)
    own = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not isinstance(own, PreTrainedTokenizerBase):
        raise wrong("tokenizer", tokenizer, "a name, a folder, or a tokenizer of transformers")
    return own


def _check_vocabulary(name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer with tokens of which the model has no embedding; those that text never holds may be."""
    rows = probing.vocabulary_of(model)
    added: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unused = special_ids(tokenizer).difference(added)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: -1 if item[1] in unused else item[1])
    if number >= rows:
        raise ConfigError(
            f"model.name: the model of {name!r} has embeddings of {rows} tokens, but its tokenizer gives {token!r} the "
            f"id {number}; they do not belong together"
        )


def untrained(model: ModelConfig, trust_remote_code: bool = False) -> LanguageModel:
    """Returns the architecture of a model with weights that mean nothing, for shapes; it has no tokenizer.

    Whether it predicts the next token is not known of it; the class that would be tried first is taken at its word.
    """
    config = load_config(model.name, model.revision, trust_remote_code)
    auto = weights.auto_classes(config)[0]
    with readable_errors(model.name):
        made = auto.from_config(config, trust_remote_code=trust_remote_code).eval()
        positions = probing.positions_of(made)
    if isinstance(places := model.kwargs.get("device_map"), dict):
        weights.check_map(made, places)
    causal = auto.__name__ != weights.BASE
    return LanguageModel(made, None, model.name, model.revision, causal, positions)  # type: ignore[arg-type]
