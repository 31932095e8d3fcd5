"""What is passed to `train` in other forms than a config: a mapping or a file of one, and a model beside it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.arguments import wrong
from sae.base.errors import ConfigError
from sae.base.settings import decode, read_yaml
from sae.lm.models import DTYPES, LanguageModel, ModelConfig, as_language_model, load_language_model
from sae.training.config import TrainConfig

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike


def as_config(config: Any) -> TrainConfig:
    """Returns a config: as it is, of a mapping of its fields, or of a YAML file that holds them."""
    if isinstance(config, str | os.PathLike):
        config = read_yaml(Path(config).expanduser())
    if isinstance(config, dict):
        return decode(TrainConfig, config)
    if not isinstance(config, TrainConfig):
        raise wrong("config", config, "a TrainConfig, a mapping of its fields, or the path of a YAML file of them")
    return config


def with_model(
    config: TrainConfig, model: "ModelLike | None", tokenizer: "TokenizerLike | None", trust_remote_code: bool = False
) -> tuple[TrainConfig, LanguageModel | None]:
    """Returns a config of the model that is passed beside it, and that model, if it is loaded or its tokenizer is.

    The config says of a loaded model what finds it again, if anything does: name, commit and precision. ConfigError if
    it says that it is elsewhere, or in another precision.
    """
    if isinstance(model, dict):
        model = decode(ModelConfig, model, "model")
    if isinstance(model, ModelConfig):
        config, model = replace(config, model=model), None
    if isinstance(model, str | os.PathLike):
        config, model = replace(config, model=replace(config.model, name=os.fspath(model), revision=None)), None
    said = config.model
    if model is None:
        options = {**vars(said), "trust_remote_code": trust_remote_code, "tokenizer": tokenizer}
        return config, None if tokenizer is None else load_language_model(**options)
    lm = as_language_model(model, tokenizer)
    dtype = next((name for name, kind in DTYPES.items() if kind == lm.model.dtype), "auto")
    for field, wanted, there in (("dtype", said.dtype, dtype), ("device", said.device, str(lm.device))):
        if wanted != "auto" and not there.startswith(wanted):
            raise ConfigError(f"model.{field}: {wanted}, but the model that was passed has {there}; say auto")
    if said.kwargs not in ({}, lm.kwargs):
        raise ConfigError(f"model.kwargs: {', '.join(said.kwargs)} are for a model by name; leave them out")
    by_default = lm.device.type == "cpu" and dtype == "float32"
    dtype = said.dtype if by_default else dtype
    return replace(config, model=ModelConfig(lm.name, lm.revision, dtype, said.device, lm.kwargs)), lm
