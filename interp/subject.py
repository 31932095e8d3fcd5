"""The subject: the language model that a coder reads, and the coder, loaded when first needed."""

import threading
from collections.abc import Callable
from functools import cached_property

from sae.coder import SparseCoder
from sae.models import LanguageModel


class Subject:
    """A language model and a coder of its activations."""

    def __init__(self, coder: SparseCoder, load: Callable[[], LanguageModel]) -> None:
        self.coder, self._load = coder, load
        self.lock = threading.RLock()
        """Held by whoever runs the model: hooks belong to it, not to a thread."""

    @cached_property
    def lm(self) -> LanguageModel:
        """Returns the language model."""
        with self.lock:
            return self._load()
