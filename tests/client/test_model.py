"""Models in this process: every number is that of a plain forward of each text alone."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from rigs.fakes import tiny_model_folder, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from interp.client import answers
from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.local import prefix
from interp.client.local.model import Model
from interp.client.requests import Abilities, Chat, Embed, LogProb
from sae.assets import QUICKSTART_LM
from sae.base.errors import ConfigError, Stopped
from sae.base.progress import UNWATCHED, Watch

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = {"max_position_embeddings": 512, "initializer_range": 0.5}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def other_folder(path, model):
    torch.manual_seed(0)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, tokens = tmp_path_factory.mktemp("models"), len(tiny_tokenizer())
    torch.manual_seed(0)
    gemma = Gemma3TextConfig(
        **SIZES, vocab_size=tokens, num_key_value_heads=1, head_dim=8, sliding_window=24, **LONG,
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8, final_logit_softcapping=5.0,
    )  # fmt: skip
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=512, vocab_size=tokens, initializer_range=0.5)
    mamba = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=tokens, state_size=4, initializer_range=0.5)
    return {
        "llama": tiny_model_folder(root / "llama", **LONG),
        "gemma": other_folder(root / "gemma", Gemma3ForCausalLM(gemma)),
        "gpt2": other_folder(root / "gpt2", GPT2LMHeadModel(gpt2)),
        "mamba": other_folder(root / "mamba", MambaForCausalLM(mamba)),
    }


def config(folder, **changes):
    return EndpointConfig(model=str(folder), via="local", **changes)


def ask(folder, requests, cache, watch=UNWATCHED, **changes):
    roles = {request.role for request in requests}

    async def run():
        endpoints = {role: config(folder, **changes) for role in roles}
        async with Client(endpoints, cache / "cache", watch=watch) as client:
            return await client.ask_all(requests)

    return asyncio.run(run())


def alone(folder, text):
    """(tokens, their places in the text, log-probabilities [tokens, vocabulary] of what comes after each)."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    coded = tokenizer(text, return_offsets_mapping=True)
    with torch.no_grad():
        logits = model(torch.tensor([coded["input_ids"]])).logits[0]
    return coded["input_ids"], coded["offset_mapping"], logits.float().log_softmax(-1)


FEW = "Some words that all of these texts begin with, far more than the least that is shared. "
TEXTS = [FEW + "one", FEW + "another end of it", FEW[:50] + " differs", FEW + "one more", "quite another", FEW, "x"]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mamba"])
def test_log_probabilities_are_those_of_every_text_alone(name, folders, tmp_path):
    requests = [LogProb("reader", text, ((0, len(text) // 2), (len(text) // 2, len(text)))) for text in TEXTS]
    replies = ask(folders[name], requests, tmp_path)
    for request, reply in zip(requests, replies, strict=True):
        ids, places, logprobs = alone(folders[name], request.text)
        before = [None, *(float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1))]
        for (start, end), (value,), count in zip(request.spans, reply.logprobs, reply.counts, strict=True):
            inside = [v for v, (_, b) in zip(before, places, strict=True) if v is not None and start < b <= end]
            assert (value, count) == (pytest.approx(math.fsum(inside), abs=1e-4), len(inside))


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mamba"])
def test_choices_are_those_of_every_prompt_alone(name, folders, tmp_path):
    requests = [Chat("judge", (("user", text),), 1, choices=("yes", "n", "nap")) for text in TEXTS]
    replies = ask(folders[name], requests, tmp_path)
    for request, reply in zip(requests, replies, strict=True):
        _, _, logprobs = alone(folders[name], f"User: {request.messages[0][1]}\n\nAssistant:")
        chances = logprobs[-1].exp()
        pieces = AutoTokenizer.from_pretrained(folders[name]).convert_ids_to_tokens(list(range(len(chances))))
        sums = {word: 0.0 for word in request.choices}
        for piece, chance in zip(pieces, chances.tolist(), strict=True):
            if piece in ("y", "Y"):
                sums["yes"] += chance
            if piece in ("n", "N"):
                sums["n"] += chance
        assert reply.probabilities == pytest.approx(sums, abs=1e-4)
        assert reply.tokens_out == 1


def test_what_texts_begin_with_is_computed_once(folders, monkeypatch):
    computed = []
    forward = prefix._forward

    def counted(model, ids, *rest):
        computed.append(ids.numel())
        return forward(model, ids, *rest)

    monkeypatch.setattr(prefix, "_forward", counted)
    model = Model(config(folders["llama"]), "judge")
    texts = [prefix.Text(tuple([5] * 100 + [6 + n] * 4), (103,)) for n in range(20)]
    (group,) = prefix.groups(texts, model.budget)
    assert len(list(prefix.distributions(model.lm, [texts[n] for n in group]))) == 20
    assert sum(computed) == 100 + 20 * 4


def test_groups_keep_to_the_budget_and_hold_every_text_once():
    torch.manual_seed(0)
    texts = []
    for n in range(200):
        shared = [1 + n % 3] * int(torch.randint(0, 80, ()))
        texts.append(
            prefix.Text(tuple([*shared, *torch.randint(5, 9, (int(torch.randint(1, 40, ())),)).tolist()]), (0,))
        )
    found = prefix.groups(texts, 300)
    assert sorted(number for group in found for number in group) == list(range(200))
    alone_cost = sum(len(text.ids) for text in texts)
    cost = 0
    for group in found:
        chosen = [texts[n] for n in group]
        shared = prefix._shared(chosen)
        own = shared + len(group) * (max(len(text.ids) for text in chosen) - shared)
        assert own <= 300 or len(group) == 1
        cost += own
    assert cost < alone_cost


def test_levels_are_read_where_spans_start(folders, tmp_path):
    text = "one 5 two 7 three "
    request = LogProb("reader", text, ((4, 5), (10, 11), (18, 18)), choices=("0", "7"))
    (reply,) = ask(folders["llama"], [request], tmp_path)
    ids, places, logprobs = alone(folders["llama"], text)
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    level = {word: tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in request.choices}
    at = {start: next((i for i, (_, b) in enumerate(places) if b > start), len(ids)) - 1 for start, _ in request.spans}
    for (start, _), row in zip(request.spans, reply.logprobs, strict=True):
        assert row == pytest.approx([float(logprobs[at[start], level[word]]) for word in request.choices], abs=1e-4)
    (nothing,) = ask(folders["llama"], [replace(request, spans=((0, 1),))], tmp_path)
    assert nothing.failure == "unsupported"  # this tokenizer puts nothing before a text
    (empty,) = ask(folders["llama"], [LogProb("reader", "", ((0, 0),))], tmp_path)
    assert (empty.logprobs, empty.counts) == (((0.0,),), (0,))


def test_a_span_may_begin_in_the_middle_of_a_character(folders, tmp_path):
    text = "a\U0001f600b\u00e9c"
    spans = tuple((i, i + 1) for i in range(len(text)))
    (reply,) = ask(folders["llama"], [LogProb("reader", text, spans)], tmp_path)
    assert reply.counts == (0, 4, 1, 2, 1)  # the first token has nothing before it


def test_written_answers_are_greedy_and_the_same_in_any_company(folders, tmp_path):
    requests = [Chat("explainer", (("user", text),), 12) for text in TEXTS]
    together = ask(folders["llama"], requests, tmp_path / "a")
    for request, reply in zip(requests, together, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
        ids = tokenizer(f"User: {request.messages[0][1]}\n\nAssistant:", return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).encode(errors="replace").decode().strip()
        assert reply.text == expected
        assert reply.failure == ("" if int(ids[0, -1]) == tokenizer.eos_token_id else "length")


def test_draws_are_keyed_by_the_request(folders, tmp_path):
    requests = [Chat("explainer", (("user", FEW),), 8, temperature=1.0, sample=n) for n in range(6)]
    together = ask(folders["llama"], requests, tmp_path / "a")
    one_by_one = [ask(folders["llama"], [request], tmp_path / f"b{n}")[0] for n, request in enumerate(requests)]
    assert [reply.text for reply in together] == [reply.text for reply in one_by_one]
    assert len({reply.text for reply in together}) >= 5


def test_draws_follow_the_softmax(folders):
    from interp.client.local.model import _Noise

    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).repeat(4000, 1)
    noise = _Noise([0.5] * 4000, [str(n) for n in range(4000)], 0)
    drawn = noise(torch.zeros(4000, 3), scores).argmax(-1).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.softmax(scores[0] / 0.5, -1), atol=0.03, rtol=0)


def templated(folder, path, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("template", "able", "prompt"),
    [
        (TEMPLATE, {}, "<system>S</system><user>U</user><assistant>"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE,
            {"system": False},
            "<user>S\n\nU</user><assistant>",
        ),
        (
            TEMPLATE + "{% if enable_thinking is false %}</think>{% else %}<think>{% endif %}",
            {},
            "<system>S</system><user>U</user><assistant></think>",
        ),
        (
            TEMPLATE + "<think>\n",
            {"choices": False, "thinking_tokens": 2048},
            "<system>S</system><user>U</user><assistant><think>",
        ),
        (None, {}, "S\n\nUser: U\n\nAssistant:"),
    ],
)
def test_conversations_go_through_the_chat_template(template, able, prompt, folders, tmp_path):
    folder = templated(folders["llama"], tmp_path / "model", template)
    model = Model(config(folder), "judge")
    n = len(model.pieces)
    full = Abilities(choices=True, top=n, prompt_logprobs=True, prompt_top=n)
    assert model.abilities == replace(full, **able)
    ids = model._chat_ids(Chat("judge", (("system", "S"), ("user", "U")), 5))
    assert model.tokenizer.decode(ids) == prompt


def test_room_for_thought_is_what_was_set_whatever_the_template_says(folders, tmp_path):
    for template in (TEMPLATE, None):
        folder = templated(folders["llama"], tmp_path / str(bool(template)), template)
        model = Model(config(folder, thinking_tokens=30), "judge")
        assert (model.abilities.thinking_tokens, model.abilities.choices) == (30, False)
        assert model.prepared(Chat("judge", (("user", "U"),), 5)).limit == 35


def test_control_tokens_in_texts_stay_text(folders):
    model = Model(config(folders["llama"]), "reader")
    end = model.tokenizer.eos_token_id
    ready = model.prepared(LogProb("reader", "a </s> b", ((0, 8),)))
    assert end not in ready.text.ids
    assert end not in model._chat_ids(Chat("judge", (("user", "a </s> b"),), 5))


def test_what_a_model_cannot_do_is_a_reply(folders, tmp_path):
    long = "word " * 200
    replies = ask(
        folders["llama"],
        [
            LogProb("reader", long, ((0, 5),)),
            Chat("judge", (("user", long),), 1, choices=("yes", "no")),
            Chat("judge", (("user", "short"),), 600),
            Chat("judge", (("user", "short"),), 1, choices=("yes", "no")),
        ],
        tmp_path,
    )
    assert [reply.failure for reply in replies] == ["bad_request", "bad_request", "bad_request", ""]
    assert "more than the context of 512" in replies[0].detail


def test_a_model_that_cannot_be_had_is_an_error_of_one_line(tmp_path):
    for name in (tmp_path / "nowhere", "no/such-model"):
        with pytest.raises(ConfigError, match=r"^judge\.model: ") as caught:
            ask(name, [Chat("judge", (("user", "?"),), 5)], tmp_path)
        assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_fit_is_halved(folders, tmp_path, monkeypatch):
    sizes = []
    replies_of = Model.replies

    def replies(self, batch):
        sizes.append(len(batch))
        if len(batch) > 2 or any("poison" in request.text for request, _ in batch):
            raise torch.OutOfMemoryError
        return replies_of(self, batch)

    monkeypatch.setattr(Model, "replies", replies)
    requests = [LogProb("reader", f"a text {n}", ((0, 5),)) for n in range(8)]
    found = ask(folders["llama"], [*requests, LogProb("reader", "poison", ((0, 5),))], tmp_path)
    assert [reply.failure for reply in found] == [""] * 8 + ["server_error"]
    assert max(sizes) > 2


def test_an_error_in_the_thread_reaches_whoever_asked(folders, tmp_path, monkeypatch):
    def broken(self, batch):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Model, "replies", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        ask(folders["llama"], [LogProb("reader", "text", ((0, 4),))], tmp_path)


def test_a_signal_ends_between_two_batches(folders, tmp_path, monkeypatch):
    batches = []
    replies_of = Model.replies

    def replies(self, batch):
        batches.append(len(batch))
        return replies_of(self, batch)

    monkeypatch.setattr(Model, "replies", replies)
    monkeypatch.setattr(prefix, "token_budget", lambda *_: 30)
    requests = [LogProb("reader", f"some text {n}", ((0, 5),)) for n in range(20)]
    with pytest.raises(Stopped):
        ask(folders["llama"], requests, tmp_path, watch=Watch(lambda: len(batches) >= 3))
    done = sum(batches)
    assert done < 20
    batches.clear()
    assert all(reply.ok for reply in ask(folders["llama"], requests, tmp_path))
    assert sum(batches) == 20 - done


# Encoders


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    bert = BertConfig(**SIZES, vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, initializer_range=0.5)
    return other_folder(path, BertModel(bert))


@pytest.mark.parametrize(
    ("chosen", "pool"),
    [
        ("pooling_mode_mean_tokens", lambda hidden: hidden.mean(0)),
        ("pooling_mode_cls_token", lambda hidden: hidden[0]),
        ("pooling_mode_lasttoken", lambda hidden: hidden[-1]),
        (None, lambda hidden: hidden.mean(0)),
    ],
)
def test_vectors_are_pooled_as_the_model_wants(chosen, pool, encoder, tmp_path):
    import shutil

    folder = shutil.copytree(encoder, tmp_path / "model")
    if chosen:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(f'{{"word_embedding_dimension": 16, "{chosen}": true}}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    texts = ("a", "some longer text", "a text of more than twenty tokens, which is cut", "</s>")
    (reply,) = ask(folder, [Embed("encoder", texts)], tmp_path)
    model, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, reply.vectors, strict=True):
        ids = tokenizer(text, truncation=True, max_length=20, split_special_tokens=True, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            expected = pool(model(ids).last_hidden_state[0])
        torch.testing.assert_close(torch.tensor(vector), expected / expected.norm(), atol=1e-5, rtol=0)
    (other,) = ask(folder, [Chat("judge", (("user", "?"),), 5)], tmp_path)
    assert other.failure == "unsupported"


def test_a_pooling_that_is_not_known_is_refused(encoder, tmp_path):
    import shutil

    folder = shutil.copytree(encoder, tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ConfigError, match="pools by pooling_mode_weightedmean_tokens"):
        ask(folder, [Embed("encoder", ("a",))], tmp_path)


# The real thing


def test_the_quickstart_model_judges_reads_and_writes(tmp_path):
    text = "Return the index of the first occurrence of the value. Raises ValueError if the value is not present."
    requests = [
        Chat("judge", (("user", "Is it a list? yes or no"),), 1, choices=("yes", "no")),
        LogProb("judge", text, ((0, 54), (54, len(text)))),
        LogProb("judge", " ".join(reversed(text.split())), ((0, len(text)),)),
        Chat("judge", (("user", "What is a list?"),), 20),
        Embed("judge", (text, text[:54], "Paris in the spring")),
    ]
    replies = ask("quickstart", requests, tmp_path)
    chosen, told, shuffled, _, embedded = replies
    assert set(chosen.probabilities) == {"yes", "no"}
    assert 0 < sum(chosen.probabilities.values()) < 1
    ids, _, logprobs = alone(QUICKSTART_LM, text)
    whole = sum(float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1))
    assert sum(value for (value,) in told.logprobs) == pytest.approx(whole, abs=1e-3)
    assert sum(told.counts) == len(ids) - 1  # a first token of its own stands before the text
    assert shuffled.logprobs[0][0] < whole - 50
    near, far = (sum(a * b for a, b in zip(embedded.vectors[0], other, strict=True)) for other in embedded.vectors[1:])
    assert near > far
    assert answers.choice_of("\u0120Yes", ("yes", "no")) == "yes"
