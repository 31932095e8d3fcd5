"""What is passed to `train` in other forms than a config: a mapping or a file of one, and a model beside it."""

import os
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from sae.base.arguments import wrong
from sae.base.errors import ConfigError, nearest
from sae.base.paths import near
from sae.base.settings import decode, encode, read_yaml
from sae.base.shipped import configs
from sae.lm.models import LanguageModel
from sae.lm.passed import passed_model
from sae.training.config import TrainConfig

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike


def as_config(config: Any) -> TrainConfig:
    """Returns a config: as it is, of a mapping of its fields, or of a YAML file that holds them."""
    if isinstance(config, str | os.PathLike):
        path = Path(config).expanduser()
        if not path.is_file():
            recipes = configs("families") | configs("models")
            way = nearest(path.stem, recipes) or near(path)
            way = f" sae-train --config {config} --print-config prints that recipe" if path.name in recipes else way
            raise ConfigError(f"config: no such file: {config}.{way}")
        config = read_yaml(path)
    if isinstance(config, dict):
        return decode(TrainConfig, config)
    if not isinstance(config, TrainConfig):
        raise wrong("config", config, "a TrainConfig, a mapping of its fields, or the path of a YAML file of them")
    kinds = get_type_hints(TrainConfig)
    parts = {name: part for name, part in vars(config).items() if isinstance(part, dict) and is_dataclass(kinds[name])}
    config = replace(config, **{name: decode(kinds[name], part, name) for name, part in parts.items()})
    return decode(TrainConfig, encode(config))  # whose fields are then of their types


def with_activations(config: TrainConfig, activations: Any) -> tuple[TrainConfig, Any]:
    """Returns a config that reads the activations passed beside it, and these, unless the config names their path."""
    if activations is None:
        return config, None
    path = os.fspath(activations) if isinstance(activations, str | os.PathLike) else ""
    config = replace(config, activations=replace(config.activations, source="tensors", path=path))
    return config, None if path else activations


def with_model(
    config: TrainConfig, model: "ModelLike | None", tokenizer: "TokenizerLike | None", trust_remote_code: bool = False
) -> tuple[TrainConfig, LanguageModel | None]:
    """Returns a config of the model that is passed beside it, and that model as `sae.lm.passed.passed_model` does."""
    said, lm = passed_model(config.model, model, tokenizer, trust_remote_code)
    return replace(config, model=said), lm
