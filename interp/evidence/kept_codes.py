"""What the first pass saw, kept for the second, which reads almost the same rows of a text of moderate size.

Blocks are kept as they come until they fill a fixed room; those that found none are computed again, to the same bits.
So neither a restart nor the number of ranks nor the size of the text changes what is found, only how long it takes.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from numpy import ndarray

from interp.evidence.codes import Coded, Codes, KeyedCodes

KEPT_BYTES = 2**28  # about two million tokens of 16 latents each; the second pass over the rest asks the model


class KeptCodes:
    """Codes of which a copy stays in memory, as far as there is room."""

    def __init__(self, codes: KeyedCodes) -> None:
        self.codes, self._kept, self._room = codes, dict[bytes, Coded](), KEPT_BYTES

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self.codes.d_sae

    def fingerprint(self) -> dict[str, Any]:
        """Returns what the codes depend on besides the corpus."""
        return self.codes.fingerprint()

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus, and keeps them if they fit."""
        coded = self.codes.read(rows)
        latents = coded.latents
        size = latents.offsets.nbytes + coded.rows.nbytes + coded.places.nbytes + 8 * latents.ids.numel()
        if size <= self._room:
            self._room -= size
            small = replace(
                latents,
                offsets=latents.offsets.cpu(),
                ids=latents.ids.to(torch.int32).cpu(),
                values=latents.values.float().cpu(),
            )
            self._kept[rows.tobytes()] = coded._replace(latents=small)
        return coded

    def again(self) -> Codes:
        """Returns the same codes to be read once more: what is kept is given away, all else computed."""
        return _Again(self.codes, self._kept)


class _Again:
    """Codes of which some are at hand."""

    def __init__(self, codes: Codes, kept: dict[bytes, Coded]) -> None:
        self._codes, self._kept = codes, kept

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self._codes.d_sae

    def read(self, rows: Int[ndarray, "rows"]) -> Coded:
        """Returns the codes of rows of the corpus; those that are kept if they were read just so before."""
        found = self._kept.pop(rows.tobytes(), None)
        if found is None:
            return self._codes.read(rows)
        return found._replace(latents=replace(found.latents, ids=found.latents.ids.long()))
