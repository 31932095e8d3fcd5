"""What is served: a run with its coder and model, and what both say of a text. All of it runs in the model's thread."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request

from interp.view.explained import ExplainedRun
from interp.view.serving.asked import Asked
from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused, one_line
from interp.view.serving.turns import Steps
from sae.base.errors import ConfigError
from sae.base.paths import model_elsewhere
from sae.base.seeding import keyed_hash
from sae.coder.coder import SparseCoder
from sae.lm.generation import Step
from sae.lm.models import LanguageModel
from sae.steering.edits import Edit
from sae.steering.generation import generate, prompt_tokens
from sae.steering.hooks import Steering
from sae.steering.strengths import Largest, ready
from sae.text.decode import Decoder
from sae.text.packing import added

READY = 64  # edits whose strengths are kept


class Began(NamedTuple):
    """A prompt was read."""

    tokens: int


class Wrote(NamedTuple):
    """One token, of the prompt or written."""

    answer: int
    """The number of the answer that it belongs to."""
    step: Step


@dataclass
class Served:
    """A coder with its model, loaded, and the run that is explained of it."""

    run: ExplainedRun | None
    """None where nothing is explained: there is no page then."""
    coder: SparseCoder
    lm: LanguageModel
    limits: Limits = field(default_factory=Limits)
    _ready: dict[tuple[Edit, ...], list[Edit]] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """Returns what the model is called, without where it lies."""
        return model_elsewhere(self.lm.name)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Returns the folders of this machine that no answer tells."""
        own = [getattr(of, "name_or_path", "") for of in (self.lm.model, self.lm.tokenizer)]
        paths = [Path.cwd(), Path.home(), *(Path(name) for name in (self.lm.name, *own) if name)]
        paths += [self.run.run_dir] if self.run else []
        local = [path for path in paths if path.expanduser().is_dir()]
        names = {str(path) for path in local} | {str(path.expanduser().resolve()) for path in local}
        return tuple(name for name in names if len(name) > 1)

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self.coder.spec.d_sae

    @cached_property
    def context(self) -> int:
        """Returns the most tokens of a text and its continuation."""
        return min(self.lm.context or self.limits.tokens, self.limits.tokens)

    @property
    def chats(self) -> bool:
        """Returns whether the model has a template for chats."""
        return bool(getattr(self.lm.tokenizer, "chat_template", None))

    @cached_property
    def steering(self) -> Steering:
        """Returns the coder made ready to change the model; ConfigError if it cannot."""
        return Steering(self.lm, self.coder)

    @cached_property
    def unsteerable(self) -> str:
        """Returns why latents cannot be edited, "" if they can."""
        try:
            _ = self.steering
        except ConfigError as error:
            return one_line(str(error), self.places)
        return ""

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.lm.tokenizer)

    def warm(self) -> None:
        """Does once what would make the first question slow."""
        _ = self.unsteerable
        if self.run:
            self.run.searcher.find("a")
        for _ in generate(self.lm, self.ids("a"), new_tokens=1) if self.lm.is_causal else ():
            pass

    def piece(self, token: int) -> str:
        """Returns the text of a token as it is behind others."""
        return self._decoder.piece(token)

    def largest(self, edits: Sequence[Edit]) -> Largest:
        """Returns the largest activations of edited latents, of those of which the run's evidence tells it."""
        known = self.run.largest({edit.latent for edit in edits}) if self.run else {}
        return Largest(known, "in the evidence of the run")

    def ready(self, edits: tuple[Edit, ...]) -> Generator[None, None, list[Edit]]:
        """Returns edits with strengths as values; those of the same edits are found once. Yields while it measures."""
        if edits not in self._ready:
            found = yield from ready(self.steering, edits, self.largest(edits))
            while len(self._ready) >= READY:
                del self._ready[next(iter(self._ready))]
            self._ready[edits] = [one.at(1.0) for one in found]
        return self._ready[edits]

    def ids(self, prompt: Any, new_tokens: int = 1, chat: bool = False) -> list[int]:
        """Returns the tokens of a text, of messages, of a text as what a user says (`chat`), or token ids as they are;
        Refused if there is no room for `new_tokens` behind them.
        """
        ids = prompt_tokens(self.lm, prompt, self.coder.spec.bos, chat)
        if len(ids) + new_tokens > self.context:
            said = f"prompt: {len(ids):,} tokens and {new_tokens:,} new ones; {self.context:,} are taken together"
            alone = f"text: {len(ids):,} tokens; at most {self.context:,} are taken"
            raise Refused(400, said if new_tokens else alone)
        return ids

    def written(self, wanted: Asked) -> Steps:
        """Yields how many tokens the prompts have, then token after token of every answer."""
        rows = [self.ids(prompt, 1 if wanted.new_tokens is None else wanted.new_tokens) for prompt in wanted.prompts]
        if any(edit.strength is None and edit.how != "ablate" for edit in wanted.edits):
            raise Refused(400, "steer: an edit has no strength, as in 508=4", field="steer")
        steering, edits = (self.steering, (yield from self.ready(wanted.edits))) if wanted.edits else (None, [])
        before = added(self.lm.tokenizer, self.coder.spec.bos)[0]
        yield Began(sum(map(len, rows)))
        for number, ids in enumerate(rows):
            most = wanted.new_tokens
            most = min(self.limits.new_tokens, self.context - len(ids)) if most is None else most
            for choice in range(wanted.n):
                steps = generate(
                    self.lm,
                    ids,
                    steering,
                    edits,
                    new_tokens=most,
                    temperature=wanted.temperature,
                    top_p=wanted.top_p,
                    stop=wanted.stop,
                    seed=_seed(wanted.seed, number, choice),
                    top=wanted.top,
                    echo=wanted.echo,
                )
                hidden = len(before) if isinstance(wanted.prompts[number], str) and wanted.echo else 0
                for place, step in enumerate(steps):  # what stands before a text is no part of it
                    text = "" if place < hidden else step.text
                    yield Wrote(number * wanted.n + choice, step._replace(text=text))


async def body_of(request: Request) -> Any:
    """Returns the JSON of a request; Refused (400) if it is none."""
    body = await request.body()
    try:
        text = body.decode("utf-8-sig")  # json.loads would take other encodings, and halves of characters in them
        data = json.loads(text, parse_constant=_no_number)
        if "\\ud" in text.lower():  # halves of characters, which no text has
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not valid JSON") from None
    return data


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _seed(seed: int, number: int, choice: int) -> int:
    """Returns the seed of an answer: that of the request for the first one."""
    if not number and not choice:
        return seed
    return int.from_bytes(keyed_hash(seed, "answer", number, choice, size=7), "little")
