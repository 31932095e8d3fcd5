"""A language model that is passed beside a config: what the config says of it then, and the model if it is loaded."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from sae.base.errors import ConfigError
from sae.base.settings import decode
from sae.lm.models import DTYPES, LanguageModel, ModelConfig, as_language_model, load_language_model

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike


def passed_model(
    said: ModelConfig,
    model: "ModelLike | None",
    tokenizer: "TokenizerLike | None" = None,
    trust_remote_code: bool = False,
) -> tuple[ModelConfig, LanguageModel | None]:
    """Returns what a config is to say of its model, and the model, if it is loaded or its tokenizer is.

    Of a loaded model that is what finds it again, if anything does: name, commit and precision. ConfigError if the
    config has `said` that it is elsewhere, or in another precision.
    """
    if isinstance(model, dict):
        model = decode(ModelConfig, model, "model")
    if isinstance(model, ModelConfig):
        said, model = model, None
    if isinstance(model, str | os.PathLike):
        said, model = replace(said, name=os.fspath(model), revision=None), None
    if model is None:
        options = {**vars(said), "trust_remote_code": trust_remote_code, "tokenizer": tokenizer}
        return said, None if tokenizer is None else load_language_model(**options)
    lm = as_language_model(model, tokenizer)
    dtype = next((name for name, kind in DTYPES.items() if kind == lm.model.dtype), "auto")
    for field, wanted, there in (("dtype", said.dtype, dtype), ("device", said.device, str(lm.device))):
        if wanted != "auto" and not there.startswith(wanted):
            raise ConfigError(f"model.{field}: {wanted}, but the model that was passed has {there}; say auto")
    if said.kwargs not in ({}, lm.kwargs):
        raise ConfigError(f"model.kwargs: {', '.join(said.kwargs)} are for a model by name; leave them out")
    by_default = lm.device.type == "cpu" and dtype == "float32"
    dtype = said.dtype if by_default else dtype
    return ModelConfig(lm.name, lm.revision, dtype, said.device, lm.kwargs), lm
