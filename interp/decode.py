"""Tokens -> text: a window is decoded whole, and every token knows which characters of it are its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"


class Decoder:
    """Decodes windows. A token in the middle of a character owns no text; the last one of a character owns it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def text(self, tokens: list[int]) -> str:
        """Returns the text of some tokens, spaces as they are."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def piece(self, token: int) -> str:
        """Returns the text of one token by itself."""
        if token not in self._pieces:
            self._pieces[token] = self.text([token])
        return self._pieces[token]

    def window(self, tokens: list[int]) -> tuple[str, tuple[int, ...]]:
        """Returns (text, bounds): token i is text[bounds[i] : bounds[i + 1]]."""
        whole = self.text(tokens)
        pieces = [self.piece(token) for token in tokens]
        if "".join(pieces) == whole and BROKEN not in whole:
            bounds = [0]
            for piece in pieces:
                bounds.append(bounds[-1] + len(piece))
            return whole, tuple(bounds)
        bounds = [_common(whole, self.text(tokens[:i]).rstrip(BROKEN)) for i in range(len(tokens))]
        bounds = [*bounds, len(whole)]
        for i in range(1, len(bounds)):
            bounds[i] = max(bounds[i], bounds[i - 1])
        return whole, tuple(bounds)


def _common(a: str, b: str) -> int:
    """The length of what two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
