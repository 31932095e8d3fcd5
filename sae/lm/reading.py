"""One row of tokens as a model reads it on: the new ones alone, where it keeps what it has read (its KV cache).

Whether a model can do so is measured once: a few tokens read in one pass and in several must give the same. Of one that
cannot, every step reads the whole row again, which is said.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.lm.calls import probed
from sae.lm.models import ONE_AT_A_TIME, LanguageModel
from sae.lm.probing import plain_ids

log = logging.getLogger(__name__)
CACHES = ("cache", "past_key_values", "cache_params", "state")  # what models call what they return, and take again
AGREES = {torch.float32: 1e-3, torch.float64: 1e-6}  # of logits read in one pass and in several; 0.1 below float32

During: TypeAlias = Callable[[Int[Tensor, "1 n"], int], AbstractContextManager[None]]
"""From the tokens of one pass and the place of the first to what is open while the model reads them."""


class Row:
    """One row of tokens as a model reads it, from where it stopped. What was open in its passes touches no other row.

    Args:
        lm: the model.
        during: what is open while tokens are read: hooks that edit.
        keeps: whether the model keeps what it has read, for a row that goes on; where it can.
    """

    def __init__(self, lm: LanguageModel, during: During | None = None, keeps: bool = True) -> None:
        self.lm, self.during = lm, during or (lambda tokens, start: nullcontext())
        self.cache = cache_of(lm) if keeps else ""
        self._kept: Any = None
        self._read = torch.zeros(1, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, tokens: Sequence[int], last: int = 1) -> Float[Tensor, "last vocabulary"]:
        """Reads on, and returns the logits in float32 at the `last` of these tokens."""
        new = torch.tensor([list(tokens)])
        whole = torch.cat([self._read, new], dim=1)
        given, start = (new, self._read.shape[1]) if self.cache else (whole, 0)
        more: dict[str, Any] = {"use_cache": bool(self.cache)}
        if self._kept is not None:
            more[self.cache] = self._kept
        with ONE_AT_A_TIME, self.during(given, start), seen_last(self.lm.model, last):
            found = self.lm.model(input_ids=given.to(self.lm.device), **more)
        self._kept, self._read = found[self.cache] if self.cache else None, whole
        return found.logits[0, -last:].float()


@contextmanager
def seen_last(model: Any, last: int) -> Iterator[None]:
    """While open, the unembedding sees the last positions alone: all would take gigabytes with a large vocabulary."""
    unembedding = model.get_output_embeddings()
    with ExitStack() as stack:
        if unembedding is not None:
            narrow = unembedding.register_forward_pre_hook(
                lambda _, args: (args[0][:, -last:], *args[1:]) if args else None
            )
            stack.callback(narrow.remove)
        yield


_caches: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def cache_of(lm: LanguageModel) -> str:
    """Returns by which name a model returns and takes what it has read, "" of one that cannot; measured once."""
    with ONE_AT_A_TIME:
        if lm.model not in _caches:
            probed.add(id(lm.model))
            try:
                _caches[lm.model] = _measured(lm.model)
            finally:
                probed.discard(id(lm.model))
            if not _caches[lm.model]:
                log.warning("%s cannot go on from what it has read; every token reads the whole row again", lm.name)
        return _caches[lm.model]


@torch.no_grad()
def _measured(model: Any) -> str:
    ids = plain_ids(model)
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0, -2:].float()
        found = model(input_ids=ids[:, :-2], use_cache=True)
        name = next((name for name in CACHES if name in found), "")
        parts = []
        for place in (-2, -1) if name else ():
            new = ids[:, place : place + 1 or None]
            found = model(input_ids=new, use_cache=True, **{name: found[name]})
            parts.append(found.logits[0, -1].float())
    except Exception:  # anything that a model's own code may raise
        return ""
    most = AGREES.get(next(model.parameters()).dtype, 0.1) * whole.norm()
    return name if parts and float((torch.stack(parts) - whole).norm()) <= most else ""
