"""What a Hugging Face model in this process answers to each kind of request.

**Choices** are read from the whole vocabulary by the rule of `interp.client.answers`, **spans** by that of
`interp.client.spans`: servers differ in nothing but the rest of the vocabulary, which they do not show. Answers are
written greedily, or with Gumbel noise keyed by the request, so that a draw does not depend on what else is in its
batch.

A tokenizer without a chat template is given plain text: a system message as it is, then "User: ..." and "Assistant:";
what such a model goes on to write as the user is cut off. A prompt that is longer than the model's context is refused,
as a server would refuse it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from interp.client import answers
from interp.client.bodies import messages
from interp.client.config import EndpointConfig
from interp.client.local import pooling, prefix
from interp.client.requests import ROOM_FOR_THOUGHT, Abilities, Chat, Embed, LogProb, Reply, Request, cache_key
from interp.client.said import ends_in_thought
from interp.client.spans import OWN, tokens_in_span
from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.lm.files import local_folder
from sae.lm.models import LanguageModel, load_language_model

CONTEXT_CHARS = 16
"""Characters before a span that are tokenized with a choice, so that it is cut as it would be in the text."""
_NEXT_TURN = "\n\nUser:"


@dataclass(frozen=True)
class Spans:
    """A text to be read: of LogProb, and of Chat with choices, whose span is what comes after the prompt."""

    text: prefix.Text
    wanted: tuple[tuple[tuple[int, int], ...], ...] = ()
    """By span, (place, token) pairs: the log-probability of a token after a place."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be continued."""

    ids: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Texts:
    """Texts to be embedded."""

    mode: str
    ids: list[list[int]]


Ready = Spans | Prompt | Texts


def error_of_role(error: ConfigError, role: str) -> ConfigError:
    """Returns an error of a model's name as one of a role's model."""
    return ConfigError(str(error).replace("model.name", f"{role}.model", 1))


class Model:
    """A model, loaded now or before (`lm`); ConfigError in one line, naming the role's field, if it cannot be had."""

    def __init__(self, config: EndpointConfig, role: str, lm: LanguageModel | None = None) -> None:
        try:
            lm = lm or load_language_model(config.model)
            self.source = (None if lm.given else local_folder(config.model)) or config.model
        except ConfigError as error:
            raise error_of_role(error, role) from error
        self.config, self.causal = config, lm.is_causal
        self.lm: Any = lm.model
        self.tokenizer: Any = lm.tokenizer
        self.context = min(_context(self.lm.config, self.tokenizer), lm.positions or 2**30)
        self.budget = prefix.token_budget(self.lm.config.get_text_config().vocab_size, lm.device)
        self.where = "local " + json.dumps(lm.fingerprint(), sort_keys=True)
        self.pieces: list[str] = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.words, self.first = lru_cache(64)(self._words), lru_cache(4096)(self._first)
        self.ends: set[int] = self._take_over_generation() if self.causal else set()
        self.abilities = self._abilities() if self.causal else Abilities()

    def prepared(self, request: Request) -> Ready | Reply:
        """Returns what a request needs computed, or the reply where it cannot be answered."""
        if isinstance(request, Embed):
            return Texts(*pooling.prepared(self.tokenizer, self.source, request.texts, self.context))
        if not self.causal:
            return Reply(failure="unsupported", detail=f"{self.config.model} predicts no next token")
        if isinstance(request, LogProb):
            ready = self._spans(request)
            length = len(ready.text.ids) if isinstance(ready, Spans) else 0
        else:
            ids = self._chat_ids(request)
            limit = 0 if request.choices else request.max_tokens + self.abilities.thinking_tokens
            ready = Spans(prefix.Text(ids, (len(ids) - 1,))) if request.choices else Prompt(ids, limit)
            length = len(ids) + limit
        if length > self.context:
            return Reply(failure="bad_request", detail=f"{length} tokens are more than the context of {self.context}")
        return ready

    def replies(self, batch: Sequence[tuple[Request, Ready]]) -> list[Reply]:
        """Returns the replies to prepared requests of one kind."""
        kind = batch[0][1]
        if isinstance(kind, Spans):
            rows = prefix.distributions(self.lm, [ready.text for _, ready in batch if isinstance(ready, Spans)])
            return [self._read(*asked, logprobs) for asked, logprobs in zip(batch, rows, strict=True)]
        if isinstance(kind, Texts):
            return [pooling.embedded(self.lm, self.tokenizer, r.mode, r.ids, self.budget) for _, r in batch]  # type: ignore[union-attr]
        return self._generate(batch)  # type: ignore[arg-type]

    def _take_over_generation(self) -> set[int]:
        """Returns the tokens that end an answer; all else that the model's authors recommend would bend the draws."""
        from transformers import GenerationConfig

        told = getattr(self.lm.generation_config, "eos_token_id", None)
        told = self.tokenizer.eos_token_id if told is None else told
        ends: set[int] = {told} if isinstance(told, int) else set(told or ())
        pad = self.tokenizer.pad_token_id
        self.filler = pad if pad is not None else min(ends, default=0)
        self.lm.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=self.filler)
        return ends

    def _abilities(self) -> Abilities:
        """All is known of a model in this process, and nothing needs to be probed."""
        import jinja2

        system = True
        if self.tokenizer.chat_template:
            try:
                self._render([("system", "a"), ("user", "b")])
            except jinja2.TemplateError:
                system = False
        thinks = ends_in_thought(self._render([("user", "b")]))
        thinking = self.config.thinking_tokens or (ROOM_FOR_THOUGHT if thinks else 0)
        top = len(self.pieces)
        return Abilities(
            choices=not thinking,
            top=top,
            prompt_logprobs=True,
            prompt_top=top,
            system=system,
            thinking_tokens=thinking,
        )

    def _chat_ids(self, request: Chat) -> tuple[int, ...]:
        text = self._render([(turn["role"], turn["content"]) for turn in messages(request, self.abilities)])
        plain = not self.tokenizer.chat_template
        return tuple(self.tokenizer(text, add_special_tokens=plain, split_special_tokens=plain)["input_ids"])

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Returns a conversation as text, up to where the answer begins."""
        if self.tokenizer.chat_template:
            turns_of = [{"role": role, "content": content} for role, content in turns]
            options = {"add_generation_prompt": True, "tokenize": False}
            thinks = bool(self.config.thinking_tokens)
            return self.tokenizer.apply_chat_template(turns_of, enable_thinking=thinks, **options)
        said = [content if role == "system" else f"{role.capitalize()}: {content}" for role, content in turns]
        return "\n\n".join([*said, "Assistant:"])

    def _spans(self, request: LogProb) -> Spans | Reply:
        """Returns the text as tokens, with the log-probabilities that each span needs."""
        if not self.tokenizer.is_fast:
            return Reply(failure="unsupported", detail=f"the tokenizer of {self.config.model} tells no offsets")
        options = dict.fromkeys(("return_offsets_mapping", "return_special_tokens_mask", "split_special_tokens"), True)
        coded = self.tokenizer(request.text, **options)
        ids, own = list(coded["input_ids"]), coded["special_tokens_mask"]
        while ids and own[len(ids) - 1] and len(ids) > 1:  # an end that it puts after every text
            ids.pop()
        spots = [OWN if special else place for special, place in zip(own, coded["offset_mapping"], strict=True)]
        wanted: list[tuple[tuple[int, int], ...]] = []
        for start, end in request.spans:
            if request.choices:
                place = next(iter(tokens_in_span(spots[: len(ids)], (start, len(request.text) + 1))), len(ids)) - 1
                before = request.text[max(0, start - CONTEXT_CHARS) : start]
                wanted.append(tuple((place, self.first(before, choice)) for choice in request.choices))
            else:
                inside = tokens_in_span(spots[: len(ids)], (start, end))
                wanted.append(tuple((token - 1, ids[token]) for token in inside if token))
        places = sorted({place for row in wanted for place, _ in row})
        if places and places[0] < 0:
            return Reply(failure="unsupported", detail="nothing stands before the first token")
        if not places:
            return Reply(logprobs=((0.0,),) * len(wanted), counts=(0,) * len(wanted))
        return Spans(prefix.Text(tuple(ids), tuple(places)), tuple(wanted))

    def _read(self, request: Request, ready: Ready, logprobs: Tensor) -> Reply:
        assert isinstance(ready, Spans)
        tokens = len(ready.text.ids)
        if isinstance(request, Chat):
            words = self.words(request.choices)
            found = {word: float(logprobs[0, ids].exp().sum()) for word, ids in words.items()}
            return Reply(probabilities=found, tokens_in=tokens, tokens_out=1)
        row_of = {place: row for row, place in enumerate(ready.text.places)}
        values = [[float(logprobs[row_of[place], token]) for place, token in span] for span in ready.wanted]
        if isinstance(request, LogProb) and request.choices:
            return Reply(logprobs=tuple(map(tuple, values)), tokens_in=tokens)
        sums = tuple((math.fsum(row),) for row in values)
        return Reply(logprobs=sums, counts=tuple(map(len, values)), tokens_in=tokens)

    def _generate(self, batch: Sequence[tuple[Chat, Prompt]]) -> list[Reply]:
        """Returns written answers, of one limit. Rows are padded on the left, as generation wants it."""
        width = max(len(ready.ids) for _, ready in batch)
        ids = torch.full((len(batch), width), self.filler)
        mask = torch.zeros_like(ids)
        for row, (_, ready) in enumerate(batch):
            ids[row, width - len(ready.ids) :] = torch.tensor(ready.ids)
            mask[row, width - len(ready.ids) :] = 1
        keys = [cache_key(request, self.config.model, self.where, self.abilities) for request, _ in batch]
        noise = _Noise([request.temperature for request, _ in batch], keys, width)
        inputs = {"input_ids": ids.to(self.lm.device), "attention_mask": mask.to(self.lm.device)}
        with torch.inference_mode():
            out = self.lm.generate(
                **inputs, max_new_tokens=batch[0][1].limit, do_sample=False, logits_processor=[noise]
            )
        rows = out[:, width:].tolist()
        return [self._written(request, ready, row) for (request, ready), row in zip(batch, rows, strict=True)]

    def _written(self, request: Chat, ready: Prompt, ids: list[int]) -> Reply:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        finish = "length" if end is None else "stop"
        if not self.tokenizer.chat_template and _NEXT_TURN in text:
            text, finish = text.split(_NEXT_TURN)[0], "stop"
        body = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        reply = answers.read(request, self.abilities, body)
        return replace(reply, tokens_in=len(ready.ids), tokens_out=len(ids[:end]))

    def _words(self, choices: tuple[str, ...]) -> dict[str, list[int]]:
        """Returns the tokens that speak for each of the words."""
        spoken: dict[str, list[int]] = {choice: [] for choice in choices}
        for token, piece in enumerate(self.pieces):
            choice = answers.choice_of(piece, choices)
            if choice is not None:
                spoken[choice].append(token)
        return spoken

    def _first(self, before: str, choice: str) -> int:
        """Returns the first token of a word that follows a text."""
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": True}
        coded = self.tokenizer(before + choice, **options)
        whole = (len(before), len(before) + len(choice))
        return coded["input_ids"][tokens_in_span(coded["offset_mapping"], whole)[0]]


class _Noise:
    """Turns the most likely token into a draw: argmax(logits / temperature + Gumbel noise) is one of the softmax."""

    def __init__(self, temperatures: list[float], keys: list[str], width: int) -> None:
        self.temperatures, self.keys, self.width = temperatures, keys, width

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [rows, vocabulary] whose largest is the draw; those of temperature 0 as they are."""
        scores = scores.float().clone()
        for row, temperature in enumerate(self.temperatures):
            if temperature > 0:
                draw = generator(0, "answer", self.keys[row], ids.shape[1] - self.width)
                uniform = torch.rand(scores.shape[1], generator=draw, dtype=torch.float64).clamp_min(1e-300)
                scores[row] = scores[row] / temperature - torch.log(-torch.log(uniform)).to(scores)
        return scores


def _context(config: Any, tokenizer: Any) -> int:
    """Returns how many tokens the model takes."""
    text = config.get_text_config()
    told = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return min(told or 2**30, tokenizer.model_max_length)
