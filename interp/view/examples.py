"""Windows of a latent as objects of a shell or a notebook, whose text shows where it fires."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from interp.records import Excerpt, Window
from interp.view import html
from interp.view.terminal import largest, window_line

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True, repr=False)
class Example:
    """A piece of text in which a latent fires; its text has guillemets around what fires."""

    window: Window
    kind: str
    """"strongest" (of all the text) or "sampled" (at random)."""
    scale: float
    """The largest activation that examples of the latent have, for colors."""
    decile: int = -1
    """0 (weakest) to 9 by the values of the uniform sample; -1 where that is not known."""
    split: str = ""
    """The part of the text that it is from, "explain", "valid" or "test"; "" where that is not known."""

    @property
    def text(self) -> str:
        """Returns the text as it is, without marks."""
        return self.window.text

    @property
    def tokens(self) -> list[str]:
        """Returns the text of every token; "" for one that is a part of a character only."""
        return self.window.pieces()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Returns every token as the tokenizer numbers it."""
        return self.window.tokens

    @property
    def activations(self) -> tuple[float, ...]:
        """Returns the activation at every token: 0 where it is silent, or the mask leaves the token out."""
        return self.window.activations

    @property
    def activation(self) -> float:
        """Returns the activation that is largest by magnitude."""
        return largest(self.window)

    def top(self, n: int = 5) -> list[tuple[str, float]]:
        """Returns up to n tokens that fire, with their activations, the largest by magnitude first."""
        fires = [pair for pair in zip(self.tokens, self.activations, strict=False) if pair[1]]
        return sorted(fires, key=lambda pair: -abs(pair[1]))[:n]

    def __repr__(self) -> str:
        return window_line(self.window, colors=False)

    def _repr_html_(self) -> str:
        return html.windows([self.window], self.scale)


class LatentExamples(Sequence[Example]):
    """Windows of a latent, those with the largest activations first."""

    def __init__(self, latent: int, examples: Sequence[Example]) -> None:
        self.latent = latent
        self._examples = sorted(examples, key=lambda example: -example.window.strength)

    def top(self, n: int = 5) -> "LatentExamples":
        """Returns the n examples with the largest activations."""
        return self[:n]

    def table(self) -> "pa.Table":
        """Returns a row for each: latent, kind, activation, text, tokens, token_ids, activations, decile and split."""
        import pyarrow as pa

        names = ("kind", "activation", "text", "tokens", "token_ids", "activations", "decile", "split")
        rows = [{"latent": self.latent} | {name: getattr(one, name) for name in names} for one in self]
        return pa.Table.from_pylist(rows)

    def to_pandas(self) -> "pd.DataFrame":
        """Returns `table` for pandas."""
        return self.table().to_pandas()

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "LatentExamples": ...
    def __getitem__(self, place: Any) -> Any:
        found = self._examples[place]
        return LatentExamples(self.latent, found) if isinstance(place, slice) else found

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return "\n".join([f"latent {self.latent}, {len(self)} examples", *map(repr, self)])

    def _repr_html_(self) -> str:
        scale = max((example.scale for example in self), default=0.0)
        return html.windows((example.window for example in self), scale)


def examples_of(latent: int, strongest: Sequence[Excerpt], sampled: Sequence[Excerpt]) -> LatentExamples:
    """Returns the windows that are kept of a latent."""
    scale = max((one.window.strength for one in (*strongest, *sampled)), default=0.0)
    kinds = (("strongest", strongest), ("sampled", sampled))
    found = [Example(one.window, kind, scale, one.decile, one.split) for kind, some in kinds for one in some]
    return LatentExamples(latent, found)
