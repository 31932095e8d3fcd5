"""Tokens -> text: a window is decoded whole, and every token knows which characters of it are its own."""

from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "\ufffd"  # what a part of a character is decoded to
LONGEST = 8  # tokens of one character, at most
BEFORE = "a"  # some tokenizers leave out the space of a first token, so others are looked at behind this


class Decoder:
    """Decodes windows. A token in the middle of a character owns no text; the last one of a character owns it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = list(tokenizer.encode(BEFORE, add_special_tokens=False))
        self._piece = cache(self._alone)

    def text(self, tokens: list[int]) -> str:
        """Returns the text of some tokens, spaces as they are."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def piece(self, token: int, first: bool = False) -> str:
        """Returns the text of one token as it is behind others, with its space if it has one, or as the first."""
        return self._piece(token, first)

    def _alone(self, token: int, first: bool) -> str:
        before = [] if first else self._before
        return self.text([*before, token]).removeprefix(self.text(before))

    def window(self, tokens: list[int]) -> tuple[str, tuple[int, ...]]:
        """Returns (text, bounds): token i is text[bounds[i] : bounds[i + 1]]."""
        whole, bounds = self.text(tokens), [0]
        pieces = [self._piece(token, not i) for i, token in enumerate(tokens)]
        if "".join(pieces) == whole:  # as of almost all: nothing is to be looked for
            return whole, tuple(accumulate(map(len, pieces), initial=0))
        for i, piece in enumerate(pieces):
            start = bounds[-1]
            if whole.startswith(piece, start):
                bounds.append(start + len(piece))
            else:  # a part of a character, or not as it is by itself
                bounds.append(max(start, _common(whole, self.text(tokens[: i + 1]))))
        bounds[-1] = len(whole)
        return whole, tuple(bounds)


class Growing:
    """The text of tokens that come one by one: of each what no later one changes, so a whole character at a time."""

    def __init__(self, decoder: Decoder, before: list[int]) -> None:
        """Begins behind tokens whose text is there already."""
        self._decoder, self._tokens, self._told = decoder, list(before), len(before)
        self._start = 0  # from here on is decoded: a token's text depends on the few before it

    def add(self, token: int) -> str:
        """Returns the text that a token adds; what is not yet a character comes with a later one."""
        self._tokens.append(token)
        return "" if self._whole().endswith(UNKNOWN) and len(self._tokens) - self._told < LONGEST else self.rest()

    def rest(self) -> str:
        """Returns what was not told yet."""
        told = self._decoder.text(self._tokens[self._start : self._told])
        text = self._whole()[len(told) :]
        self._start, self._told = self._told, len(self._tokens)
        return text

    def _whole(self) -> str:
        return self._decoder.text(self._tokens[self._start :])


def _common(a: str, b: str) -> int:
    """The length of what two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
