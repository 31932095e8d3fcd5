"""Intervention on a small model with a latent that promotes known tokens, read by a reader that counts them."""

import re

import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.interp_lms import subject_lm
from rigs.planted import FACTS, run

from interp.client.requests import Abilities, LogProb, Reply
from interp.evidence.subject import Subject
from interp.prompts.reading import amplified_passage
from interp.records import ACTIVE, Examples, Explanation, Item, Task, Window
from interp.scorers import Trial
from interp.scorers.intervention import LEAST_PROMPTS, LEAST_TOKENS, Intervention, prompt
from interp.scoring.steering import _drawn, steered
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.metrics import kl_divergence
from sae.lm.site import Site
from sae.selection.topk import TopK

READER = Abilities(prompt_logprobs=True)
LETTERS = "qxzj"  # latent i promotes the i-th
D = 16
LAST = (Site("model.layers.2", width=D),)


def subject(lm=None, sites=LAST, rows=None, bos="row"):
    """A coder whose latents' directions are rows of the unembedding: each promotes one letter."""
    lm = lm or tiny_lm()
    if rows is None:
        ids = lm.tokenizer.convert_tokens_to_ids(list(LETTERS))
        rows = lm.model.get_output_embeddings().weight[ids].float()
        rows = torch.cat([rows] * len(sites), dim=1)
    spec = CoderSpec(rows.shape[1], rows.shape[1], len(rows), TopK(1), sites, sites, pre_bias="none", bos=bos)
    coder = SparseCoder(spec)
    with torch.no_grad():
        coder.W_dec.copy_(rows)
    return Subject(coder, lambda: lm)


def shown(latent, lm, n=30, length=20):
    """Windows of random letters that fire from some token on."""
    draw = torch.Generator().manual_seed(latent)
    items = []
    for number in range(n):
        tokens = tuple(torch.randint(60, 90, (length,), generator=draw).tolist())
        first = int(torch.randint(6, length, (1,), generator=draw))
        values = tuple(float(place == first) for place in range(length))
        text = lm.tokenizer.decode(tokens)
        items.append(Item(Window(number // 2, 0, tokens, text, tuple(range(length + 1)), values, first), ACTIVE))
    return Examples(latent, FACTS, test=tuple(items))


def counting_reader(request: LogProb) -> Reply:
    """Finds a letter the likelier the more often the passage has it."""
    start, stop = request.spans[0]
    passage = re.findall(r"^Passage: (.*)$", request.text[:start], re.MULTILINE)[-1]
    letter = request.text[start:stop][-1]
    return Reply(logprobs=((-20.0 + 2 * passage.count(letter),),), counts=(3,))


def says(latent):
    return Explanation(latent, f"the letter {LETTERS[latent]}", "planted")


@pytest.mark.parametrize(
    "sites",
    [
        LAST,
        (Site("model.layers.2.mlp", width=D), *LAST),
    ],
    ids=["one site", "two sites"],
)
def test_the_right_explanation_is_likelier_and_shuffled_ones_are_not(sites):
    lm = tiny_lm()
    given, scorer = subject(lm, sites), Intervention(kl=3.0, prompts=16)
    right, wrong = [], []
    for latent in range(len(LETTERS)):
        examples = shown(latent, lm)
        prepared = scorer.prepare(examples, given)
        score, found, requests = run(scorer, says(latent), examples, READER, counting_reader, prepared=prepared)
        assert len(found) == 16
        assert len(requests) == 32
        assert score.coverage == 1
        assert score.measures["nats"].low > 0
        right.append(score.measures["nats"].value)
        others = [says(other) for other in range(len(LETTERS)) if other != latent]
        wrong += [
            run(scorer, other, examples, READER, counting_reader, prepared=prepared)[0].measures["nats"].value
            for other in others
        ]
    assert min(right) > 1
    assert max(wrong) < 0.5 * min(right)


def test_the_kl_is_the_target_measured_prompt_by_prompt():
    lm = tiny_lm()
    scorer = Intervention(kl=0.5, prompts=12)
    given, examples = subject(lm, bos="none"), shown(1, lm)
    prepared = scorer.prepare(examples, given)
    row = given.coder.W_dec[1].detach()
    total = []
    for item in examples.test[:12]:
        ids = torch.tensor([prompt(item.window)])
        clean = lm.model(ids).logits

        def change(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            out = out.clone()
            out[:, -1] += prepared["strength"] * row
            return out

        handle = lm.model.model.layers[2].register_forward_hook(change)
        amplified_logits = lm.model(ids).logits
        handle.remove()
        pair = (logits[:, [-1, -1]] for logits in (clean, amplified_logits))
        total.append(float(kl_divergence(*pair, torch.ones(1, 1, dtype=torch.bool))[0]))
    assert prepared["kl"] == pytest.approx(sum(total) / 12, rel=1e-3)
    assert abs(prepared["kl"] - 0.5) <= 0.05


@pytest.mark.parametrize("bos", ["row", "none"])
def test_passages_begin_with_the_prompt_and_are_the_same_each_time(bos):
    lm = tiny_lm()
    given, examples = subject(lm, bos=bos), shown(0, lm)
    scorer = Intervention(prompts=6, new_tokens=5)
    first, again = (scorer.prepare(examples, given) for _ in range(2))
    assert first == again
    assert first["passages"]
    for item, passage in zip(examples.test, first["passages"], strict=False):
        start = lm.tokenizer.decode(prompt(item.window))
        assert passage["section"] == item.window.section
        for arm in ("clean", "amplified"):
            assert passage[arm].startswith(start)
            assert not re.search(r"<s>|</s>|<pad>", passage[arm])
    assert any(passage["clean"] != passage["amplified"] for passage in first["passages"])
    assert scorer.prepare(shown(1, lm), given)["passages"] != first["passages"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_a_prompt_is_continued_alike_in_any_company(family):
    lm = subject_lm(family)
    layers = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1"}
    site = Site(layers.get(family, "model.layers.1"), width=D)
    given = subject(lm, (site,), torch.randn(2, D))
    prompts = [[40, 41, 42, 43], [50, 51, 52, 53, 54, 55, 56, 57], [60, 61, 62, 63, 64]]
    together = steered(given, 0, prompts, 0.5, 4)
    assert together is not None
    assert together.matched.reached
    decode = lm.tokenizer.decode
    for place, tokens in enumerate(prompts):  # one at a time, by hand, with the same random numbers
        draws = 1 - torch.rand(4, len(prompts), generator=_source())
        for arm, texts in ((0.0, together.clean), (together.matched.strength, together.amplified)):
            ids, start = [0, *tokens], len(tokens)
            for draw in draws[:, place]:
                ids.append(_continued(lm, site, arm * given.coder.W_dec[0].detach(), ids, start, draw))
            assert decode(ids[1:]) == texts[place]


def _source():
    from sae.base.seeding import generator

    return generator(0, "steering", 0)


def _continued(lm, site, change, ids, start, draw):
    def hook(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        first = first.clone()
        first[:, start:] += change.to(first)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    handle = lm.model.get_submodule(site.hook).register_forward_hook(hook)
    logits = lm.model(torch.tensor([ids])).logits[0, -1].float()
    handle.remove()
    logits[[0, 1, 2]] = -torch.inf
    return int((logits.softmax(0).double().cumsum(0) < draw).sum())


def test_draws_follow_the_probabilities_and_special_tokens_have_none():
    lm = tiny_lm()
    logits = torch.randn(1, 300)  # some are beyond the vocabulary
    n = 20_000
    draws = (torch.arange(n) + 0.5) / n
    found = torch.bincount(_drawn(lm, logits.repeat(n, 1), draws), minlength=300) / n
    allowed = logits[0].clone()
    allowed[:3] = allowed[len(lm.tokenizer) :] = -torch.inf
    assert (found - allowed.softmax(0)).abs().max() < 2e-4
    assert found[:3].sum() == found[len(lm.tokenizer) :].sum() == 0
    assert _drawn(lm, logits.clone(), torch.tensor([1.0])).item() < len(lm.tokenizer)


def test_a_prompt_ends_before_the_first_firing_but_that_of_its_first_token():
    def window(*values):
        return Window(0, 0, tuple(range(len(values))), "", tuple([0] * (len(values) + 1)), tuple(map(float, values)), 0)

    assert prompt(window(0, 0, 3, 0)) == (0, 1)
    assert prompt(window(5, 0, 0, -3)) == (0, 1, 2)
    assert prompt(window(5, 0, 0, 0)) == ()
    assert prompt(window(0, 0, 0)) == ()


def test_what_cannot_be_done_is_said_and_judges_nothing():
    lm = tiny_lm()
    scorer, examples = Intervention(), shown(0, lm)
    few = Examples(0, FACTS, test=examples.test[: LEAST_PROMPTS - 1])
    assert scorer.prepare(few, subject(lm)) == {"missing": f"insufficient: {LEAST_PROMPTS - 1} prompts"}
    early = [item.window.__class__(**{**vars(item.window), "activations": (0.0,) * (LEAST_TOKENS - 1) + (1.0,) * 17})
             for item in examples.test]  # fmt: skip
    short = Examples(0, FACTS, test=tuple(Item(window, ACTIVE) for window in early))
    assert scorer.prepare(short, subject(lm)) == {"missing": "insufficient: 0 prompts"}
    assert scorer.prepare(examples, subject(lm, rows=torch.zeros(1, D))) == {"missing": "the latent writes nothing"}
    far = Intervention(kl=500.0).prepare(examples, subject(lm))
    assert re.match(r"no strength gives a KL of 500 nats; the nearest is \d", far["missing"])
    assert "passages" not in far
    for prepared in (far, {"missing": "x"}, {}):
        assert scorer.tasks(examples, "test", prepared) == []
    encoder = type(lm)(lm.model, lm.tokenizer, "tiny", None, False)
    assert scorer.prepare(examples, subject(encoder)) == {"missing": "the model predicts no next token"}
    done = scorer.prepare(examples, subject(lm))
    assert scorer.tasks(examples, "valid", done) == []
    assert len(scorer.tasks(examples, "test", done)) == scorer.prompts


def test_missing_answers_are_in_no_figure():
    scorer = Intervention()
    tasks = [Task((), 1.0, section=number, text="zz", clean="z") for number in range(6)]
    requests = scorer.requests(Trial(says(2), tasks, READER))
    replies = [counting_reader(request) for request in requests]
    replies[1], replies[4] = Reply(failure="timeout"), Reply(logprobs=((0.0,),), counts=(0,))
    found = scorer.judgements(Trial(says(2), tasks, READER), replies)
    score = scorer.score(tasks, found, FACTS)
    assert score.measures["nats"].value == 2
    assert score.n == 4
    assert score.invalid == {"empty": 1, "timeout": 1}
    assert scorer.score([], [], FACTS).measures["nats"].value is None


def test_the_reader_is_asked_about_the_explanation_alone():
    framed = amplified_passage('a\n"\n\nPassage: b<|im_end|>', "the\nsea")
    ((start, stop),) = framed.spans
    assert framed.text[start:stop] == "the sea"
    assert stop == len(framed.text)
    assert framed.text.count("\n") == amplified_passage("a", "b").text.count("\n")
    assert "<|im_end|>" not in framed.text


@pytest.mark.parametrize(("field", "value"), [("kl", 0.0), ("prompts", 1), ("new_tokens", 0)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"scorers\.intervention\.{field}: {value}"):
        Intervention(**{field: value}).validate()
    Intervention().validate()
