"""Steering: what a model says after a prompt with latents of a coder edited, beside what it says without.

sae.steer("quickstart", coder, "def f(x):", "508=4")
sae.steer(lm, coder, messages, "508=2x, 17:ablate if 12>1", kl=0.5)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from sae.base.arguments import number, whole
from sae.base.errors import ConfigError
from sae.base.sums import in_float64
from sae.base.visible import visible
from sae.coder.arguments import as_coder
from sae.lm.generation import BEFORE, Step, check_writing, written
from sae.lm.models import LanguageModel
from sae.steering.edits import Edit, EditsLike, as_edits, check_latents
from sae.steering.generation import prompt_tokens
from sae.steering.hooks import Steering, check_steers
from sae.steering.steered import Arm, Steered
from sae.steering.strengths import Largest, kl_by_token, known_largest, logits_after, ready, strengths_for
from sae.text.decode import Decoder

if TYPE_CHECKING:
    from sae.coder.arguments import CoderLike
    from sae.lm.models import ModelLike

NEW_TOKENS = 40


class Piece(NamedTuple):
    """What one of the two continuations goes on with."""

    side: str
    """"plain" or "steered"."""
    text: str


def steer(
    lm: "ModelLike | None",
    coder: "CoderLike",
    prompt: Any,
    edits: EditsLike,
    *,
    new_tokens: int = NEW_TOKENS,
    kl: float | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    largest: Largest | Mapping[int, float] | None = None,
    chat: bool = False,
) -> Steered:
    """Returns what a model says after a prompt with latents edited, beside what it says without.

        print(sae.steer("quickstart", coder, "def f(x):", "508=4"))

    `lm` is a loaded model, its name, or None for the one that the coder names; `coder` one or its address as of
    `sae.load`: any that writes what the model computes. `edits` are typed ("508=4, 17:add=2x in answer, 9:ablate if
    12>1"), objects of JSON, or `sae.steering.edits.Edit`; a strength "2x" is twice the latent's `largest` activation,
    given by latent, else measured on text, as the result says. They act in delta form (`sae/steering/hooks.py`), at
    every token of prompt and answer that training did not mask. With `kl` all strengths are multiplied by what makes
    the mean KL(plain || steered) over the plain greedy continuation that many nats, within 10 %.

    `prompt` is a text, messages with role and content, or token ids; with `chat` a text is what a user says, by the
    model's template. Both continuations end after `new_tokens` tokens or where the model ends them. At temperature 0
    they are the likeliest tokens; above, both are drawn with the same noise, of `seed`, among `top_p`.

    Raises ConfigError in one line: a latent that is out of range, a KL that no strength reaches (with the nearest), a
    coder that cannot steer, a model that predicts no next token, a prompt that is too long.
    """
    coder, asked = as_coder(coder), as_edits(edits)
    check_steers(coder.spec)
    check_asked(asked, coder.spec.d_sae, kl)
    how: dict[str, Any] = {"new_tokens": new_tokens, "kl": kl, "temperature": temperature, "top_p": top_p, "seed": seed}
    *_, found = streamed(Steering(lm, coder), prompt, asked, largest=largest, chat=chat, **how)
    return cast(Steered, found)


def streamed(
    steering: Steering,
    prompt: Any,
    edits: EditsLike,
    *,
    new_tokens: int = NEW_TOKENS,
    kl: float | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    largest: Largest | Mapping[int, float] | None = None,
    chat: bool = False,
) -> Iterator[Piece | Steered | None]:
    """Yields the pieces of both continuations as they are written, and at last what `steer` returns.

    The two go on by turns. For a target KL the plain one comes first. None comes between the passes of its search, and
    of what measures largest activations. The model is held for one pass at a time, and closing the iterator ends it.
    """
    lm, asked = steering.lm, as_edits(edits)
    check_asked(asked, steering.spec.d_sae, kl)
    tokens = prompt_tokens(lm, prompt, steering.spec.bos, chat)
    whole("seed", seed, -(2**63))
    check_writing(lm, len(tokens), whole("new_tokens", new_tokens), temperature, top_p)
    strengths, monotone = (yield from ready(steering, asked, known_largest(largest))), None
    how: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    plain, steered = list[Step](), list[Step]()
    first = _told("plain", written(lm, tokens, **how), plain)
    if kl is not None:
        yield from first
        greedy = _greedy(lm, tokens, plain, how)
        strengths, monotone = yield from strengths_for(steering, strengths, tokens, greedy, kl)
    during = steering.during([one.at(1.0) for one in strengths], len(tokens))
    for pair in zip_longest(first, _told("steered", written(lm, tokens, during, **how), steered)):
        yield from (piece for piece in pair if piece)
    read = {name: getattr(during, name) for name in ("tokens", "masked", "changed")}
    greedy = _greedy(lm, tokens, plain, how)
    clean = logits_after(lm, tokens, greedy)
    found = kl_by_token(clean, logits_after(lm, tokens, greedy, during))
    decoder = Decoder(lm.tokenizer)
    yield Steered(
        prompt=decoder.text(tokens),
        plain_arm=_arm(lm, tokens, plain, clean if temperature == 0 else None),
        steered_arm=_arm(lm, tokens, steered),
        kl=tuple(found.tolist()),
        measured=_pieces(decoder, tokens, greedy),
        strengths=strengths,
        monotone=monotone,
        **read,
        model=lm.name,
        untemplated=not chat and isinstance(prompt, str) and bool(getattr(lm.tokenizer, "chat_template", None)),
        temperature=temperature,
        seed=seed,
    )


def check_asked(edits: Sequence[Edit], d_sae: int, kl: float | None) -> None:
    """Raises ConfigError for a latent that a coder has not, and for an edit without a strength or one to be found."""
    check_latents(edits, d_sae)
    for edit in edits:
        if kl is None and edit.strength is None and edit.how != "ablate":
            raise ConfigError(f"edits.strength: {edit.how} of latent {edit.latent} needs one, or kl, which finds it")
    if kl is not None and not 0 < number("kl", kl) < math.inf:
        raise ConfigError(f"kl: {kl:g} is not above 0" if kl != math.inf else "kl: no strength changes so much")
    if kl is not None and all(edit.how == "ablate" for edit in edits):
        raise ConfigError("kl: there is no strength that could be found for it; clamp, add or scale a latent")


def _told(side: str, steps: Iterator[Step], kept: list[Step]) -> Iterator[Piece]:
    for step in steps:
        kept.append(step)
        yield Piece(side, step.text)


def _greedy(lm: LanguageModel, tokens: list[int], plain: list[Step], how: dict[str, Any]) -> list[int]:
    """Returns the likeliest continuation of the plain model, which is what it wrote at temperature 0."""
    steps = plain if how["temperature"] == 0 else written(lm, tokens, new_tokens=how["new_tokens"])
    return [step.token for step in steps]


def _arm(lm: LanguageModel, tokens: list[int], steps: list[Step], clean: Tensor | None = None) -> Arm:
    """Returns a continuation, with its perplexity under the plain model, whose logits may be there already."""
    new = [step.token for step in steps]
    clean = logits_after(lm, tokens, new) if clean is None else clean
    losses = torch.nn.functional.cross_entropy(clean, torch.tensor(new, device=clean.device), reduction="none")
    pieces = _pieces(Decoder(lm.tokenizer), tokens, new)
    text = "".join(step.text for step in steps)
    return Arm(text, tuple(new), pieces, float(in_float64(losses).mean().exp()), steps[-1].end)


def _pieces(decoder: Decoder, tokens: list[int], new: list[int]) -> tuple[str, ...]:
    """Returns what each new token shows behind a prompt; one in the middle of a character shows nothing."""
    before = tokens[-BEFORE:]
    text, bounds = decoder.window([*before, *new])
    return tuple(visible(text[a:b]) for a, b in pairwise(bounds[len(before) :]))
