"""What a model writes: as transformers' generate does, drawn by its probabilities, ended where it is to end."""

import math

import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.tiny_lms import tiny_lm as tiny_model

from sae.base.errors import ConfigError
from sae.lm.generation import Stops, drawn, ends_of, generate
from sae.lm.models import LanguageModel
from sae.text.decode import Decoder, Growing

PROMPT = [0, 40, 41, 42, 50]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_the_likeliest_tokens_are_those_of_generate(kind):
    model = tiny_model(kind, vocab_size=259)
    lm = LanguageModel(model, tiny_lm().tokenizer, kind, None, True)
    ids = torch.tensor([PROMPT])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0].tolist()
    steps = list(generate(lm, PROMPT, new_tokens=20))
    assert PROMPT + [step.token for step in steps] == wanted
    assert steps[-1].end == ("stop" if steps[-1].token in ends_of(lm) else "length")
    assert {step.end for step in steps[:-1]} <= {""}


def test_log_probabilities_are_the_model_s_and_the_prompt_s_come_on_request(lm):
    steps = list(generate(lm, PROMPT, new_tokens=6, top=3, echo=True))
    ids = [step.token for step in steps]
    with torch.no_grad():
        logs = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [step.prompt for step in steps] == [True] * len(PROMPT) + [False] * (len(ids) - len(PROMPT))
    assert steps[0].logprob is None
    assert steps[0].top == ()
    for place in range(1, len(ids)):
        assert steps[place].logprob == pytest.approx(float(logs[place - 1, ids[place]]), abs=1e-4)
        best = logs[place - 1].topk(3)
        assert [token for token, _ in steps[place].top] == best.indices.tolist()
        assert [value for _, value in steps[place].top] == pytest.approx(best.values.tolist(), abs=1e-4)
    (*_, last) = only = list(generate(lm, PROMPT, new_tokens=0, echo=True))
    assert [step.token for step in only] == PROMPT
    assert last.end == "length"
    assert list(generate(lm, PROMPT, new_tokens=0)) == []


def test_draws_follow_the_probabilities_of_what_is_kept(lm):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    n = 2000
    for temperature, top_p, kept in ((1.0, 1.0, 5), (0.5, 1.0, 5), (1.0, 0.8, 2), (2.0, 1e-9, 1)):
        found = (
            torch.bincount(torch.tensor([drawn(logits, temperature, top_p, 3, i) for i in range(n)]), minlength=5) / n
        )
        wanted = (logits / temperature).softmax(0)
        wanted[kept:] = 0
        assert (found - wanted / wanted.sum()).abs().max() < 4 * math.sqrt(0.25 / n)
    assert drawn(logits, 0.0, 1.0, 3, 0) == 0
    near = logits + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1])
    assert sum(drawn(logits, 1.0, 1.0, 3, i) != drawn(near, 1.0, 1.0, 3, i) for i in range(1000)) < 10, "one noise"


def test_drawing_is_repeatable_and_leaves_the_generator_alone(lm):
    before = torch.get_rng_state()
    runs = [[s.token for s in generate(lm, PROMPT, new_tokens=12, temperature=1.0, seed=seed)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_end_it_and_are_never_shown(lm):
    whole = "".join(step.text for step in generate(lm, PROMPT, new_tokens=20))
    for start in (3, 6, 9):
        stop = whole[start : start + 2]
        steps = list(generate(lm, PROMPT, new_tokens=20, stop=(stop, "never")))
        assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
        assert steps[-1].end == "stop"
        assert len(steps) < 20
    held = list(generate(lm, PROMPT, new_tokens=20, stop=(whole[-1] + "!",)))
    assert "".join(step.text for step in held) == whole, "what was held back comes in the end"


def test_what_may_become_a_stop_text_is_held_back():
    for pieces in ("ab<", "|e", "nd|", ">c"), ("ab<|en", "d", "|>"), ("ab<|end|>",), ("a", "b", *"<|end|>"):
        stops = Stops(["<|end|>", ""])
        assert "".join(stops.add(piece) for piece in pieces if not stops.met) == "ab"
        assert stops.met
    stops = Stops(["<|end|>"])
    assert [stops.add("a<|e"), stops.add("x"), stops.add("<|"), stops.rest("")] == ["a", "<|ex", "", "<|"]


def test_the_model_ends_by_its_own_tokens(lm):
    first = next(generate(lm, PROMPT, new_tokens=1)).token
    ended = LanguageModel(lm.model, lm.tokenizer, "tiny", None, True)
    before, lm.model.generation_config.eos_token_id = lm.model.generation_config.eos_token_id, [first, 7]
    try:
        assert ends_of(ended) == {first, 7, lm.tokenizer.eos_token_id}
        (step,) = generate(ended, PROMPT, new_tokens=9)
        assert (step.token, step.text, step.end) == (first, "", "stop")
    finally:
        lm.model.generation_config.eos_token_id = before


def test_two_that_take_turns_do_not_mix_and_one_may_be_left(lm):
    alone = [[s.token for s in generate(lm, p, new_tokens=8, temperature=1.0, seed=2)] for p in (PROMPT, PROMPT[:3])]
    pair = [generate(lm, p, new_tokens=8, temperature=1.0, seed=2) for p in (PROMPT, PROMPT[:3])]
    left = generate(lm, [0, 99], new_tokens=8)
    next(left)
    left.close()
    found = [(a.token, b.token) for a, b in zip(*pair, strict=True)]
    assert [list(column) for column in zip(*found, strict=True)] == alone


def test_texts_come_in_whole_characters(lm):
    text = "naïve 🙂 日本\u00a0語 e\u0301"
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]  # a token a byte
    grows = Growing(Decoder(lm.tokenizer), [])
    parts = [grows.add(token) for token in ids]
    assert "".join(parts) + grows.rest() == text
    assert not any("\ufffd" in part for part in parts)
    broken = Growing(Decoder(lm.tokenizer), [])
    parts = [broken.add(token) for token in ids[7:8] * 20]
    assert len("".join(parts) + broken.rest()) == 20, "what never becomes a character is shown all the same"


def test_wrong_values_are_one_line(lm):
    wrong = {
        "new_tokens: -1 is too small": {"new_tokens": -1},
        "temperature: -0.5 is too small": {"temperature": -0.5},
        "top_p: 1.5 is not above 0 and at most 1": {"top_p": 1.5},
    }
    for told, more in wrong.items():
        with pytest.raises(ConfigError, match=f"^{told}"):
            generate(lm, PROMPT, **{"new_tokens": 3, **more})
    with pytest.raises(ConfigError, match=r"^prompt: it holds no tokens"):
        generate(lm, [], new_tokens=3)
    encoder = LanguageModel(lm.model, lm.tokenizer, "tiny", None, False)
    with pytest.raises(ConfigError, match=r"^lm: tiny does not predict the next token"):
        generate(encoder, PROMPT, new_tokens=3)
