"""What is passed to `train` in other forms than a config: a mapping or a file of one, and a model beside it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.base.arguments import wrong
from sae.base.settings import decode, read_yaml
from sae.lm.models import LanguageModel
from sae.lm.passed import passed_model
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
    """Returns a config of the model that is passed beside it, and that model as `sae.lm.passed.passed_model` does."""
    said, lm = passed_model(config.model, model, tokenizer, trust_remote_code)
    return replace(config, model=said), lm
