"""Matching pursuit's constants: when a token is done. How latents are chosen is the encoder's, of the same name."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from sae.base.errors import ConfigError
from sae.selection import Factors, Owned, Selection


@Selection.register_subclass("matching_pursuit")
@dataclass(frozen=True)
class MatchingPursuit(Selection):
    """Stops by the residual, or after a number of steps."""

    encoder: ClassVar[str | None] = "matching_pursuit"
    residual_threshold: float = 1e-2
    """A token is done when the norm of its residual falls below this; 0 for never."""
    max_iterations: int | None = None
    """Most steps; None for as many as the input has components."""
    stop_on_duplicate_support: bool = True
    """Whether a token is done when a step adds no new latent."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if the number of steps or the threshold is out of range."""
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigError(f"selection.max_iterations: {self.max_iterations} must be at least 1")
        if self.residual_threshold < 0:
            raise ConfigError(f"selection.residual_threshold: {self.residual_threshold} must not be negative")

    def rescaled(self, own: dict[str, Tensor], calibration: tuple[float, ...], by: Factors) -> Owned:
        """Returns the rule for residuals in the units of latents, which have one factor as long as decoders stay."""
        return replace(self, residual_threshold=self.residual_threshold * by.one), own, calibration
