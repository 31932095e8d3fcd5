"""Tokens -> text: a window is decoded whole, and every token knows which characters of it are its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = "a"  # some tokenizers leave out the space of a first token, so others are looked at behind this


class Decoder:
    """Decodes windows. A token in the middle of a character owns no text; the last one of a character owns it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = list(tokenizer.encode(BEFORE, add_special_tokens=False))
        self._pieces: dict[tuple[int, bool], str] = {}

    def text(self, tokens: list[int]) -> str:
        """Returns the text of some tokens, spaces as they are."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def piece(self, token: int, first: bool = False) -> str:
        """Returns the text of one token as it is behind others, with its space if it has one, or as the first."""
        if (token, first) not in self._pieces:
            before = [] if first else self._before
            self._pieces[token, first] = self.text([*before, token]).removeprefix(self.text(before))
        return self._pieces[token, first]

    def window(self, tokens: list[int]) -> tuple[str, tuple[int, ...]]:
        """Returns (text, bounds): token i is text[bounds[i] : bounds[i + 1]]."""
        whole, bounds = self.text(tokens), [0]
        for i, token in enumerate(tokens):
            start, piece = bounds[-1], self.piece(token, first=not i)
            if whole.startswith(piece, start):
                bounds.append(start + len(piece))
            else:  # a part of a character, or not as it is by itself
                bounds.append(max(start, _common(whole, self.text(tokens[: i + 1]))))
        bounds[-1] = len(whole)
        return whole, tuple(bounds)


def _common(a: str, b: str) -> int:
    """The length of what two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
