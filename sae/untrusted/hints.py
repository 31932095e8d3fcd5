"""What the user says of a coder where its files are silent, and the error that asks for it."""

from dataclasses import dataclass
from typing import Any

from sae.base.errors import ConfigError


@dataclass(frozen=True)
class Hints:
    """What the user says of a coder where its files are silent; None where nothing was said."""

    model: str | None = None
    """Hub id or folder of the language model."""
    site: str | None = None
    """Where it reads (module path or TransformerLens name); "READ->WRITTEN" of a transcoder."""
    pre_bias: str | None = None
    """none | decoder | own."""
    scale: float | None = None
    """Factor on its inputs, of a coder trained on scaled activations whose files leave it out."""
    processed: bool | None = None
    """Whether its activations were those of a TransformerLens model with centered writing weights."""
    normalization: str | None = None
    """What SAELens' config should say for normalize_activations, where a release is known to have it wrong."""
    format: str | None = None
    """Name of the format, of files that look like several."""


class Unsaid(ConfigError):
    """What the files of a coder do not say and the user has not said."""

    def __init__(self, field: str, choices: tuple[Any, ...], message: str) -> None:
        super().__init__(message)
        self.field, self.choices = field, choices
