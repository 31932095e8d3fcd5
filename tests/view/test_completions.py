"""OpenAI's protocol by OpenAI's own client: a model as it is, and steered."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from rigs.served import served_at

from sae.steering.generation import generate
from sae.steering.steer import steer

EDIT = "8=60, 17:add=30"
PROMPT = "one two three"


@pytest.fixture(scope="module")
def client(ask):
    with openai.OpenAI(base_url=f"{ask.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def complete(client, served):
    def made(prompt=PROMPT, **options):
        options = {"temperature": 0, "max_tokens": 6, **options}
        return client.completions.create(model=served.name, prompt=prompt, **options)

    return made


def direct(served, ids):
    """Log-probabilities of each next token, by transformers alone."""
    with torch.no_grad():
        return served.lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_the_model_is_listed(client, served):
    assert [model.id for model in client.models.list()] == [served.name] == ["model"]
    assert client.models.retrieve(served.name).id == served.name
    with pytest.raises(openai.NotFoundError, match="only model is served"):
        client.models.retrieve("other")


def test_an_answer_is_what_is_written_without_a_server(complete, served):
    ids = served.ids(PROMPT)
    wrote = list(generate(served.lm, ids, new_tokens=6))
    answer = complete()
    assert answer.choices[0].text == "".join(step.text for step in wrote)
    assert answer.choices[0].finish_reason == wrote[-1].end
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(wrote))
    assert answer.steer is None


def test_the_edit_changes_the_answer_as_sae_steer_does(complete, client, served):
    expected = steer(served.lm, served.coder, PROMPT, EDIT, new_tokens=6)
    plain, steered = complete(), complete(extra_body={"steer": EDIT})
    assert plain.choices[0].text == expected.plain
    assert steered.choices[0].text == expected.steered != expected.plain
    assert steered.steer == EDIT
    named = client.completions.create(model=f"{served.name}+{EDIT}", prompt=PROMPT, temperature=0, max_tokens=6)
    assert named.choices[0].text == expected.steered
    objects = [{"latent": 8, "strength": 60}, {"latent": 17, "how": "add", "strength": 30}]
    assert complete(extra_body={"steer": objects}).choices[0].text == expected.steered


def test_a_stream_says_the_same(complete, served):
    for options in ({}, {"extra_body": {"steer": EDIT}}, {"temperature": 1, "seed": 3}):
        whole = complete(logprobs=2, **options)
        chunks = list(complete(logprobs=2, stream=True, stream_options={"include_usage": True}, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
        told = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [item for one in told for item in getattr(one, name)]
            assert parts == getattr(whole.choices[0].logprobs, name)


def test_a_stream_ends_as_clients_expect(ask, served):
    data = {"model": served.name, "prompt": PROMPT, "stream": True, "max_tokens": 2}
    answer = ask.post("/v1/completions", data)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("edit", [None, EDIT])
def test_logprobs_of_a_prompt_are_those_of_a_direct_pass(complete, served, edit):
    ids = served.ids(PROMPT)
    told = complete(ids, echo=True, logprobs=1, max_tokens=1, extra_body={"steer": edit}).choices[0].logprobs
    assert len(told.token_logprobs) == len(ids) + 1  # what lm-eval counts on
    assert told.token_logprobs[0] is None
    if edit is None:
        logs = direct(served, ids)
        expected = [float(logs[place, token]) for place, token in enumerate(ids[1:])]
        assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-5)
        assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(logs.amax(-1).tolist(), abs=1e-5)
    else:
        steps = list(generate(served.lm, ids, served.steering, _ready(served, edit), new_tokens=1, echo=True))
        assert told.token_logprobs == [step.logprob for step in steps]
        plain = complete(ids, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
        assert told.token_logprobs[2:] != plain.token_logprobs[2:]


def _ready(served, text):
    from sae.steering.edits import as_edits

    found = []

    def steps():
        found.append((yield from served.ready(as_edits(text))))

    assert not list(steps()), "of values nothing is measured"
    return found[0]


def test_a_token_that_ends_the_answer_is_counted_among_the_logprobs(complete, served, monkeypatch):
    monkeypatch.setattr("sae.lm.generation.ends_of", lambda lm: set(range(len(lm.tokenizer))))
    ids = served.ids(PROMPT)
    answer = complete(ids, echo=True, logprobs=1, max_tokens=5).choices[0]
    assert (len(answer.logprobs.token_logprobs), answer.finish_reason) == (len(ids) + 1, "stop")


def test_nothing_is_written_where_nothing_is_asked_for(complete, served):
    ids = served.ids(PROMPT)
    answer = complete(ids, echo=True, logprobs=0, max_tokens=0)
    assert len(answer.choices[0].logprobs.tokens) == len(ids)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (0, "length")
    assert complete(echo=True, max_tokens=0).choices[0].text == PROMPT


def test_several_texts_are_as_each_by_itself(complete, served):
    texts = [PROMPT, "four", "one two three four five six seven"]
    options = {"logprobs": 1, "echo": True, "max_tokens": 3}
    together = complete(texts, **options).choices
    assert [choice.index for choice in together] == [0, 1, 2]
    for text, choice in zip(texts, together, strict=True):
        alone = complete(text, **options).choices[0]
        assert (choice.text, choice.logprobs) == (alone.text, alone.logprobs)
    ids = [served.ids(text) for text in texts]
    for choice, alone in zip(complete(ids, **options).choices, together, strict=True):
        assert choice.logprobs.token_logprobs == alone.logprobs.token_logprobs


def test_draws_depend_on_the_seed_alone(complete):
    options = {"temperature": 1.5, "max_tokens": 8}
    texts = [choice.text for choice in complete(n=3, seed=5, **options).choices]
    assert texts == [choice.text for choice in complete(n=3, seed=5, **options).choices]
    assert len(set(texts)) == 3
    assert complete(seed=5, **options).choices[0].text == texts[0]
    assert complete(seed=6, **options).choices[0].text != texts[0]


def test_it_ends_before_a_stop_text(complete):
    whole = complete(max_tokens=12).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = complete(max_tokens=12, stop=[stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_many_at_once_are_as_one_after_the_other(complete, served):
    asked = [
        {"prompt": text, "extra_body": {"steer": edit}, "temperature": heat, "seed": 3, "logprobs": 1, "echo": True}
        for text in (PROMPT, "four five")
        for edit in (None, EDIT, "3=90 in answer", "8:scale=9 if 3>0")
        for heat in (0, 1)
    ]

    def answer(options):
        found = complete(**options).choices[0]
        return found.text, found.logprobs.token_logprobs

    alone = [answer(options) for options in asked]
    assert len({str(found) for found in alone}) > 8
    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(2):
            assert list(pool.map(answer, asked)) == alone
    with torch.no_grad():
        again = served.lm.model(torch.tensor([served.ids(PROMPT)])).logits
    assert torch.equal(again[0].log_softmax(-1), direct(served, served.ids(PROMPT)))  # no hook is left


def test_errors_have_the_form_of_the_protocol(complete, client, ask, served):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(temperature=3)
    error = caught.value
    assert (error.param, error.type, error.status_code) == ("temperature", "invalid_request_error", 400)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="together"):
        complete([1] * 5000)
    with pytest.raises(openai.BadRequestError, match="not the id of a token"):
        complete([1, 10**6])
    with pytest.raises(openai.BadRequestError, match="latent: 999"):
        complete(extra_body={"steer": "999=4"})
    with pytest.raises(openai.BadRequestError, match="no strength"):
        complete(extra_body={"steer": "9"})
    for body in (b"{", b"[" * 100_000, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff"):
        answer = ask("POST", "/v1/completions", body)
        assert answer.status == 400
        assert answer.json["error"]["message"] == "the request is not valid JSON"
    assert ask.get("/v1/completions").status == 405
    assert ask.get("/v1/nothing").json["error"]["type"] == "not_found_error"
    assert ask.post("/v1/completions", {}, Origin="http://evil.example").status == 403


def test_what_breaks_in_the_middle_of_a_stream_is_told_in_it(complete, served, monkeypatch, caplog):
    def breaks(*_args, **_how):
        yield from list(generate(served.lm, served.ids(PROMPT), new_tokens=2))
        raise KeyError(str(served.run.run_dir))

    monkeypatch.setattr("interp.view.serving.served.generate", breaks)
    with pytest.raises(openai.APIError, match="internal error") as caught:
        list(complete(stream=True))
    assert str(served.run.run_dir) not in str(caught.value) + caplog.text
    assert "KeyError" in caplog.text


def test_a_token_is_the_key(served):
    token = "correct-horse-battery-staple"
    with served_at(served, token) as ask:
        for key in ("wrong", token):
            with openai.OpenAI(base_url=f"{ask.url}/v1", api_key=key, max_retries=0) as client:
                if key == token:
                    assert client.completions.create(model=served.name, prompt=PROMPT, max_tokens=1).choices
                else:
                    with pytest.raises(openai.AuthenticationError) as caught:
                        client.models.list()
                    assert caught.value.code == "invalid_api_key"


class TestChat:
    TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}]

    @pytest.fixture
    def chat(self, client, served, monkeypatch):
        monkeypatch.setattr(served.lm.tokenizer, "chat_template", self.TEMPLATE)

        def made(messages=self.TALK, **options):
            options = {"temperature": 0, "max_tokens": 6, **options}
            return client.chat.completions.create(model=served.name, messages=messages, **options)

        return made

    def test_messages_go_through_the_models_template(self, chat, served):
        ids = served.ids(self.TALK)
        assert "be brief" in served.lm.tokenizer.decode(ids)
        for edit in (None, EDIT):
            edits = _ready(served, edit) if edit else ()
            wrote = list(generate(served.lm, ids, served.steering, edits, new_tokens=6))
            answer = chat(extra_body={"steer": edit})
            assert answer.choices[0].message.content == "".join(step.text for step in wrote)
            assert answer.usage.prompt_tokens == len(ids)
        assert chat([{"role": "developer", "content": "be brief"}, self.TALK[1]]).choices[0] == chat().choices[0]

    def test_a_stream_says_the_same(self, chat):
        whole = chat(logprobs=True, top_logprobs=3, extra_body={"steer": EDIT})
        chunks = list(chat(logprobs=True, top_logprobs=3, stream=True, extra_body={"steer": EDIT}))
        assert chunks[0].choices[0].delta.role == "assistant"
        told = [chunk.choices[0] for chunk in chunks]
        assert "".join(one.delta.content or "" for one in told) == whole.choices[0].message.content
        assert told[-1].finish_reason == whole.choices[0].finish_reason
        tokens = [token for one in told if one.logprobs for token in one.logprobs.content]
        assert tokens == whole.choices[0].logprobs.content
        assert [len(token.top_logprobs) for token in tokens] == [3] * len(tokens)
        assert all(token.logprob <= token.top_logprobs[0].logprob for token in tokens)

    def test_as_much_is_written_as_there_is_room_for(self, chat, served):
        answer = chat(max_tokens=None)
        room = served.context - answer.usage.prompt_tokens
        assert 6 < answer.usage.completion_tokens <= room

    def test_a_model_without_a_template_says_so(self, client, served):
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model=served.name, messages=self.TALK)


def test_a_stream_of_nothing_ends_as_an_answer_of_nothing(complete):
    pieces = list(complete([PROMPT, "four"], max_tokens=0, stream=True))
    assert [(one.choices[0].index, one.choices[0].text, one.choices[0].finish_reason) for one in pieces] == [
        (0, "", "length"),
        (1, "", "length"),
    ]


def test_a_model_that_predicts_no_numbers_is_told(complete, client, served, monkeypatch):
    def broken(row, tokens, last=1):
        return torch.full((last, len(served.lm.tokenizer)), torch.nan)

    monkeypatch.setattr("sae.lm.reading.Row.read", broken)
    with pytest.raises(openai.BadRequestError, match="predicts no numbers here"):
        complete(max_tokens=1)
