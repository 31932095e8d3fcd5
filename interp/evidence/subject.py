"""The subject: the language model that a coder reads, and the coder, loaded when first needed."""

from collections.abc import Callable

from sae.coder.coder import SparseCoder
from sae.lm.models import ONE_AT_A_TIME, LanguageModel


class Subject:
    """A language model and a coder of its activations."""

    def __init__(self, coder: SparseCoder, load: Callable[[], LanguageModel]) -> None:
        self.coder, self._load = coder, load
        self._lm: LanguageModel | None = None
        self.lock = ONE_AT_A_TIME

    @property
    def lm(self) -> LanguageModel:
        """Returns the language model."""
        with self.lock:
            if self._lm is None:
                self._lm = self._load()
            return self._lm
