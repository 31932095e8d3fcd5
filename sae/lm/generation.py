"""What a model writes after a prompt, token by token."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import arguments
from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.base.settings import at_least
from sae.base.sums import in_float64
from sae.lm.models import LanguageModel
from sae.lm.reading import During, Row
from sae.text.decode import Decoder, Growing

BEFORE = 16  # tokens of a prompt that a continuation is decoded behind


class Step(NamedTuple):
    """A token that was written, or of the prompt."""

    token: int
    text: str
    """What can be shown from here on: empty in the middle of a character, or of what may become a stop text."""
    logprob: float | None
    """Of the token, in nats, by the model as it is read, at temperature 1; None for the first of a row."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there with theirs, as many as were asked for."""
    prompt: bool = False
    end: str = ""
    """Of the last one: "stop" (an end token or a stop text, of which no text is shown) or "length"."""


def generate(
    lm: LanguageModel,
    tokens: Sequence[int],
    during: During | None = None,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    top: int = 0,
    echo: bool = False,
) -> Iterator[Step]:
    """Yields what a model writes after a prompt of token ids, token by token, until it ends or there are `new_tokens`.

    At temperature 0 the likeliest token, else one drawn at that temperature from the fewest likeliest ones that have
    `top_p` of the probability. Draws depend on the seed and on how many tokens were written before: two rows with the
    same seed have the same. It ends with a token by which the model ends, or before a text of `stop`. With `echo` the
    prompt's tokens come first. The model is held during each step alone, and nothing is read ahead; whoever loses
    interest closes the iterator.

    ConfigError if a value is not allowed, or the model has no positions for so many tokens.
    """
    check_writing(lm, len(tokens), new_tokens, temperature, top_p)
    how = {"new_tokens": new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "top": top}
    return written(lm, tokens, during, stop=stop, echo=echo, **how)


def check_drawing(new_tokens: int, temperature: float, top_p: float, least: int = 0) -> None:
    """Raises ConfigError or TypeError naming the value that cannot be, whatever the model."""
    arguments.whole("new_tokens", new_tokens, least)
    at_least("temperature", arguments.number("temperature", temperature), 0)
    if not 0 < arguments.number("top_p", top_p) <= 1:
        raise ConfigError(f"top_p: {top_p} is not above 0 and at most 1")


def check_writing(lm: LanguageModel, prompt: int, new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError naming what cannot be: a value, a model that predicts nothing, more tokens than it reads."""
    check_drawing(new_tokens, temperature, top_p)
    if not lm.is_causal:
        raise ConfigError(f"lm: {lm.name} does not predict the next token, so it writes nothing")
    if not prompt:
        raise ConfigError("prompt: it holds no tokens, so there is nothing to go on from")
    most = lm.context or math.inf  # behind it a model may go on, but writes nothing of use
    if prompt + min(new_tokens, 1) > most:
        raise ConfigError(f"prompt: {prompt} tokens leave no room for new ones; {lm.name} takes {most} in all")
    if prompt + new_tokens > most:
        raise ConfigError(
            f"new_tokens: {new_tokens} behind a prompt of {prompt} are more than {lm.name} takes ({most} in all); "
            f"at most {most - prompt} are allowed"
        )


def written(
    lm: LanguageModel,
    tokens: Sequence[int],
    during: During | None = None,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    top: int = 0,
    echo: bool = False,
) -> Iterator[Step]:
    """As `generate`, of values that have been checked."""
    row, tokens = Row(lm, during), list(tokens)
    text, ends, watch = Growing(Decoder(lm.tokenizer), tokens[-BEFORE:]), ends_of(lm), Stops(stop)
    logits = row.read(tokens, len(tokens) if echo else 1)
    if echo:
        yield from _echoed(lm, tokens, logits, top, "" if new_tokens else "length")
    for number in range(new_tokens):
        last = logits[-1]
        token = drawn(last[: len(lm.tokenizer)], temperature, top_p, seed, number)
        logprob, likeliest = logprobs_of(last, token, top)
        ended = token in ends
        shown = watch.add("" if ended else text.add(token))
        if ended or watch.met or number + 1 == new_tokens:
            rest = "" if watch.met else watch.rest(text.rest())
            yield Step(token, shown + rest, logprob, likeliest, end="stop" if ended or watch.met else "length")
            return
        yield Step(token, shown, logprob, likeliest)
        logits = row.read([token])


def _echoed(lm: LanguageModel, tokens: list[int], logits: Tensor, top: int, end: str) -> Iterator[Step]:
    """Yields the tokens of a prompt, of which the logits of each are those of the next."""
    text = Growing(Decoder(lm.tokenizer), [])
    for place, token in enumerate(tokens):
        logprob, likeliest = logprobs_of(logits[place - 1], token, top) if place else (None, ())
        is_last = place + 1 == len(tokens)
        shown = text.add(token) + (text.rest() if is_last else "")
        yield Step(token, shown, logprob, likeliest, True, end if is_last else "")


def drawn(logits: Float[Tensor, "vocabulary"], temperature: float, top_p: float, seed: int, number: int) -> int:
    """Returns the token that is written: the likeliest, or one drawn with the noise that (seed, number) gives.

    The largest of logits / temperature plus Gumbel noise, so that of two distributions under the same noise the draws
    differ about as rarely as the distributions do.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = in_float64(logits) / temperature
    if top_p < 1:
        order = scaled.sort(descending=True)
        before = order.values.softmax(0).cumsum(0) - order.values.softmax(0)
        scaled[order.indices[before >= top_p]] = -torch.inf
    noise = torch.rand(len(scaled), generator=generator(seed, "written", number), dtype=torch.float64)
    return int((scaled - noise.clamp_min(1e-300).log().neg().log().to(scaled)).argmax())


def logprobs_of(
    logits: Float[Tensor, "vocabulary"], token: int, top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Returns the log probability of a token, and the `top` likeliest with theirs, in nats; ConfigError if none is."""
    logs = logits.log_softmax(0)
    best, logprob = logs.topk(min(top, len(logs))), float(logs[token])
    if math.isnan(logprob):  # else any token would be as good, and nobody told
        raise ConfigError("lm: it predicts no numbers here; where latents are edited, lessen their strength")
    return logprob, tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def ends_of(lm: LanguageModel) -> set[int]:
    """Returns the tokens by which a model ends what it writes, of its generation config and its tokenizer."""
    said = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    own: Any = lm.tokenizer.eos_token_id
    return {token for token in (*(said if isinstance(said, list | tuple) else [said]), own) if token is not None}


class Stops:
    """Texts before which a continuation ends: holds back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.met, self._held = [text for text in texts if text], False, ""

    def add(self, text: str) -> str:
        """Returns what can be shown now that a text has been added."""
        held = self._held + text
        places = [place for place in (held.find(one) for one in self.texts) if place >= 0]
        if places:
            self.met = True
            return held[: min(places)]
        ends = (n for one in self.texts for n in range(1, len(one)) if held.endswith(one[:n]))
        cut = len(held) - max(ends, default=0)
        self._held = held[cut:]
        return held[:cut]

    def rest(self, text: str) -> str:
        """Returns what was held back, and a last text, where no stop text came of it."""
        shown = self.add(text)
        return shown if self.met else shown + self._held
