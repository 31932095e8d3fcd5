"""The server as a whole: the page, its panels, and that none of them says more than it should."""

import json
from pathlib import Path

import pytest
from rigs.served import Plain, served_at

import sae
from interp.view.firing.prompting import prompt
from interp.view.notes import Notes
from sae.base.visible import visible
from sae.pages.marks import runs
from sae.steering.edits import as_edits
from sae.steering.steer import steer

TEXT = "one two three four"
HOSTILE = "</script><script>alert(1)</script>\u202e\x1b[31m'\"🙂"
TOKEN = "correct-horse-battery-staple"


def test_the_page_has_its_own_policy_as_a_header_too(ask):
    answer = ask.get("/")
    assert answer.status == 200
    assert answer.headers["content-security-policy"] == f"{Plain.policy}; frame-ancestors 'none'"
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.body.endswith(b"<p>page")


def test_blocks_are_given_by_name(ask):
    assert ask.get("/block/main").json == {"a": 1}
    assert ask.get("/block/0%2F3").json == ask.get("/block/0/3").json == {"b": 2}
    for name in ("other", "..%2F..%2Fetc%2Fpasswd", "%00", "x" * 5000):
        assert (ask.get(f"/block/{name}").status, list(ask.get(f"/block/{name}").json)) == (404, ["error"])


def test_what_is_not_there_and_what_is_not_meant_so(ask):
    assert (ask.get("/nothing").status, ask.get("/nothing").json) == (404, {"error": "not found"})
    for method, path in (
        ("DELETE", "/api/notes"),
        ("PUT", "/"),
        ("GET", "/api/prompt"),
        ("POST", "/block/main"),
        ("TRACE", "/"),
    ):
        assert ask(method, path, {} if method != "GET" else None).status == 405
    assert ask.get("/api/about/").status == 404


def test_about_says_what_there_is_and_no_path(ask, served):
    about = ask.get("/api/about").json
    assert (about["model"], about["d_sae"], about["site"], about["latents"]) == ("model", 48, "model.layers.1", 12)
    assert (about["chat"], about["why"], set(about["can"].values())) == (False, {}, {True})
    assert str(served.run.run_dir.parents[1]) not in json.dumps(about)


def test_a_prompt_is_answered_by_what_interp_prompt_says(ask, served):
    answer = ask.post("/api/prompt", {"text": TEXT}).json
    found = prompt(served.coder, served.lm, TEXT, served.run).to_json()
    assert answer == json.loads(json.dumps(found | {"model": "model"}))
    assert len(answer["tokens"]) > 4


def test_a_text_may_fill_the_model(ask, served):
    one = "a" if len(served.ids("ab")) - len(served.ids("a")) == 1 else " a"
    text = one * (served.context - len(served.ids("")))
    assert len(served.ids(text, 0)) == served.context
    for path in ("/api/prompt", "/api/test"):
        data = {"latent": 3} if "test" in path else {}
        assert ask.post(path, {**data, "text": text}).status == 200
        answer = ask.post(path, {**data, "text": text + one})
        most = served.context
        assert (answer.status, answer.json["error"]) == (400, f"text: {most + 1:,} tokens; at most {most:,} are taken")


def test_one_latent_is_tested_on_a_text(ask, served):
    found = sae.activations(served.lm, served.coder, TEXT)
    latent = int(found.latents.ids[found.latents.values.argmax()])
    answer = ask.post("/api/test", {"latent": latent, "text": TEXT}).json
    values = (found.of(latent) * found.mask)[0].tolist()
    assert answer["values"] == values
    assert any(values)
    assert abs(answer["values"][answer["position"]]) == abs(answer["largest"]) == max(map(abs, values))
    assert answer["runs"] == [[text, value] for text, value in runs(found.strings[0], values)]


def test_latents_are_found_by_words_and_by_meaning(ask, served):
    record = next(record for record in served.run if record.label and record.label.text)
    for by in ("words", "meaning"):
        answer = ask.post("/api/search", {"query": record.label.text, "by": by}).json
        assert answer["by"] == by
        assert record.latent in [one["latent"] for one in answer["found"]]
        assert all(one["run"] == 0 for one in answer["found"])


def lines(answer):
    return [json.loads(line) for line in answer.body.decode().splitlines()]


@pytest.mark.parametrize("kl", [None, 0.3])
def test_steering_is_streamed_and_ends_with_what_sae_steer_says(ask, served, kl):
    edits = [{"latent": 8, "how": "add", "strength": 60}]
    data = {"prompt": TEXT, "edits": edits, "new_tokens": 5, "kl": kl}
    *pieces, last = lines(ask.post("/api/steer", data))
    known = served.largest(as_edits(edits))
    expected = steer(served.lm, served.coder, TEXT, edits, new_tokens=5, kl=kl, largest=known)
    for side in ("plain", "steered"):
        assert "".join(piece["text"] for piece in pieces if piece["side"] == side) == visible(getattr(expected, side))
    done = last["done"]
    assert {done[side] == visible(getattr(expected, side)) for side in ("plain", "steered")} == {True}
    assert done["kl"] == list(expected.kl)
    assert done["mean_kl"] == expected.mean_kl
    assert done["edits"] == [str(one) for one in expected.strengths]
    assert done["model"] == "model"
    assert str(Path(served.lm.name).parent) not in json.dumps([pieces, last])
    if kl:
        assert expected.mean_kl == pytest.approx(kl, rel=0.1)


def test_steering_that_cannot_be_is_refused_before_a_stream_begins(ask):
    for change, said in (
        ({"edits": [{"latent": 99, "strength": 1}]}, "edits: latent: 99"),
        ({"edits": [{"latent": 9, "how": "push", "strength": 1}]}, "edits.how: 'push'"),
        ({"edits": [{"latent": 9}]}, "needs one, or kl"),
        ({"kl": -1}, "kl: it is no number from 0 to 100"),
        ({"new_tokens": 10**6}, "new_tokens: it is no whole number from 1 to 1024"),
        ({"prompt": "x" * 30_000}, "at most 20000"),
        ({"prompt": "one " * 4000}, "taken together"),
        ({"chat": True}, "chat template"),
        ({"hack": 1}, "hack: no such field"),
    ):
        answer = ask.post("/api/steer", {"prompt": TEXT, "edits": [{"latent": 9, "strength": 1}], **change})
        assert answer.status == 400
        assert said in answer.json["error"]


@pytest.mark.parametrize(
    ("path", "data", "said"),
    [
        ("prompt", {"text": 5}, "text: it is no text"),
        ("prompt", {"text": ""}, "text: it is empty"),
        ("prompt", {"text": TEXT, "run": 1}, "run: there is one"),
        ("prompt", {"text": TEXT, "chat": "yes"}, "chat: it is neither"),
        ("test", {"latent": 48, "text": TEXT}, "latent: it is no whole number from 0 to 47"),
        ("test", {"latent": True, "text": TEXT}, "latent: "),
        ("search", {"query": ""}, "query: it is no text of 1 to"),
        ("search", {"query": "x", "by": "smell"}, "by: it is none of words, meaning"),
        ("search", {"query": "x", "limit": 0}, "limit: "),
        ("notes", {"latent": -1, "bookmark": True}, "latent: "),
        ("notes", {"latent": 1, "label": 7}, "label: it is no text"),
        ("notes", [], "the request is no JSON object"),
    ],
)
def test_bad_input_is_one_line(ask, path, data, said):
    answer = ask.post(f"/api/{path}", data)
    assert answer.status == 400
    assert said in answer.json["error"]
    assert "\n" not in answer.json["error"]


def test_notes_are_kept_and_nobodys_are_overwritten_unseen(ask, served):
    assert ask.post("/api/notes", {"latent": 3, "bookmark": True, "label": HOSTILE, "was": None}).status == 200
    (note,) = ask.get("/api/notes").json["notes"]
    assert (note["latent"], note["bookmark"], note["label"], note["history"]) == (3, True, HOSTILE, 1)
    assert "\u202e" not in note["shown"]
    refused = ask.post("/api/notes", {"latent": 3, "label": "mine", "was": None})
    assert (refused.status, refused.json["notes"]) == (409, [note])
    assert ask.post("/api/notes", {"latent": 3, "label": "mine", "was": HOSTILE}).status == 200
    assert Notes(served.run.run_dir).labels() == {3: "mine"}
    found = ask.post("/api/search", {"query": "mine"}).json["found"]
    assert [one["latent"] for one in found] == [3]
    assert ask.post("/api/notes", {"latent": 3, "label": None, "bookmark": False}).json == {"notes": []}


def test_no_answer_and_no_log_tells_of_this_machine(ask, served, caplog, monkeypatch):
    monkeypatch.setattr("interp.view.serving.panels.fires_on", lambda *_args, **_how: 1 / 0)
    answers = [ask.post("/api/prompt", {"text": HOSTILE}), ask.get("/api/about"), ask.get("/x")]
    assert answers[0].status == 500
    assert "ZeroDivisionError" in caplog.text
    told = b"".join(answer.body for answer in answers).decode()
    for secret in (str(served.run.run_dir), served.lm.name, HOSTILE, "ZeroDivision"):
        assert secret not in told
    assert HOSTILE not in caplog.text


def test_a_token_opens_the_page_by_a_form_alone(served):
    with served_at(served, TOKEN) as ask:
        form = ask.get("/")
        assert form.status == 401
        assert b'<form method="post" action="login">' in form.body
        assert "form-action 'self'" in form.headers["content-security-policy"]
        assert ask.get("/api/about").json["error"].startswith("the token in SAE_VIEW_TOKEN is needed")
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Origin": ask.url}
        wrong = ask("POST", "/login", b"token=wrong", headers)
        assert wrong.status == 401
        assert b"not the token" in wrong.body
        right = ask("POST", "/login", f"token={TOKEN}".encode(), headers)
        assert (right.status, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"].split(";")[0]
        assert ask.get("/", Cookie=cookie).body.endswith(b"<p>page")
        assert ask.get("/api/about", Cookie=cookie).status == 200
        for answer in (form, wrong, right):
            assert TOKEN not in str(answer.headers) + answer.body.decode()


BROKEN = [
    b'{"text": "a\xed\xa0\x80"}',
    b'{"text": "a\\uD800"}',
    b'{"\\udfff": "a"}',
    '{"text": "a\\ud800"}'.encode("utf-16"),
    '{"text": "a"}'.encode("utf-32-le"),
    b'{"text": NaN}',
    b'{"text": ' + b"[" * 100_000,
    b'{"text": ' + b"9" * 5000 + b"}",
    b"",
]


@pytest.mark.parametrize("body", BROKEN)
def test_what_is_no_json_of_whole_characters_is_one_line(ask, body):
    for path in ("/api/prompt", "/api/notes", "/v1/completions"):
        answer = ask.post(path, body)
        assert answer.status == 400
        assert b"the request is not valid JSON" in answer.body


def test_a_prompt_tells_edited_labels(ask, served):
    latent = ask.post("/api/prompt", {"text": TEXT}).json["latents"][0]["latent"]
    before = ask.post("/api/prompt", {"text": TEXT}).json["labels"].get(str(latent))
    ask.post("/api/notes", {"latent": latent, "label": HOSTILE})
    answer = ask.post("/api/prompt", {"text": TEXT}).json
    assert answer["latents"][0]["label"] == answer["labels"][str(latent)] == visible(HOSTILE)
    ask.post("/api/notes", {"latent": latent, "label": None})
    assert ask.post("/api/prompt", {"text": TEXT}).json["labels"].get(str(latent)) == before


@pytest.mark.parametrize("edits", ["8=1e300", "8:add=1e38x", "8:scale=1e308", "9" * 4500 + "=1", "8=1 if 9<1e999"])
def test_numbers_that_no_model_holds_are_one_line(ask, edits):
    for path, data in (
        ("/api/steer", {"prompt": TEXT, "edits": edits}),
        ("/v1/completions", {"prompt": TEXT, "steer": edits}),
    ):
        answer = ask.post(path, data)
        assert (answer.status, b"internal" in answer.body) == (400, False)
    assert ask.post("/v1/completions", {"prompt": TEXT, "steer": {"latent": 8, "strength": 10**400}}).status == 400


def test_a_target_that_is_hardly_a_number_cannot_be_reached(ask):
    *_, last = lines(ask.post("/api/steer", {"prompt": TEXT, "edits": "8", "kl": 5e-324, "new_tokens": 2}))
    assert "cannot be reached" in last["error"]


def test_no_error_tells_where_the_tokenizer_lies(ask, served):
    answer = ask.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status == 400
    assert "chat template" in answer.json["error"]["message"]
    assert "/" not in answer.json["error"]["message"]
