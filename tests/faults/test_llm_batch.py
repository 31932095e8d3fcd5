"""Row 29: a wave through the Batch API, on a double built from the published schema (there is no real one here)."""

import asyncio
import json
from dataclasses import replace

import pytest
from rigs.fake_llm import KEY, Answer, FakeLLM, broken, dropped, endpoint, error, impatient, no_quota

from interp.client.client import Client
from interp.client.remote import batch
from interp.client.requests import Chat, Embed
from sae.base.errors import Stopped
from sae.base.progress import UNWATCHED, Watch


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    impatient(monkeypatch)


def question(number, **asked):
    return Chat("judge", (("user", f"question {number}"),), **{"max_tokens": 50, **asked})


WAVE = [question(n) for n in range(12)]


def ask(fake, cache, wave=WAVE, faults=(), budget=None, watch=UNWATCHED, **changes):
    """Probes, then sets the faults and asks. Returns (replies, the ledger)."""

    async def run():
        config = endpoint(fake, **{"via": "batch", **changes})
        async with Client({"judge": config, "encoder": config}, cache / "cache", budget, watch, 0.01) as client:
            await client.abilities("judge")
            fake.faults.extend(faults)
            return await client.ask_all(wave), client.ledger

    return asyncio.run(run())


def echo(asked):
    return asked.text.upper()


def answered(replies, wave=WAVE):
    return [reply.text for reply in replies] == [request.messages[0][1].upper() for request in wave]


def test_a_wave_is_one_batch_and_is_answered_in_order(tmp_path):
    states = iter(["validating", "in_progress", "finalizing"])

    def script(made):
        made.status = next(states, "completed")
        if made.status == "completed":
            made.finish()

    with FakeLLM(echo, batch_script=script) as fake:
        replies, ledger = ask(fake, tmp_path)
        assert answered(replies)
        (made,) = fake.batches
        assert made.endpoint == "/v1/chat/completions"
        assert all(len(text) <= 64 for text in (*made.metadata, *made.metadata.values()))
        sent = made.requests()
        assert len({entry["custom_id"] for entry in sent}) == 12
        assert {entry["body"]["model"] for entry in sent} == {"fake"}
        assert not fake.asked("question")  # none went out live
        assert ledger.accounts["judge"].tokens_in >= 120
        again, _ = ask(fake, tmp_path)
        assert all(reply.cached for reply in again)
        live, _ = ask(fake, tmp_path, via="http")
        assert all(reply.cached for reply in live)  # the same question is the same, however it is asked
        assert len(fake.batches) == 1


def test_what_is_missing_is_asked_again_and_nothing_else(tmp_path):
    rounds = []

    def script(made):
        if made.status != "in_progress":
            return
        names = sorted(entry["custom_id"] for entry in made.requests())
        rounds.append(names)
        lost, expired, errors = names[:2], names[2:4], names[4:6]
        codes = {**dict.fromkeys(expired, -1), **dict.fromkeys(errors, 500)}
        if len(rounds) == 1:
            made.finish(keep=lambda name: name not in lost, fail=lambda name: codes.get(name, 0), junk=b'{"torn\n[]\n')
        else:
            made.finish()

    with FakeLLM(echo, batch_script=script) as fake:
        replies, _ = ask(fake, tmp_path)
        assert answered(replies)
        assert [len(names) for names in rounds] == [12, 6]
        assert set(rounds[1]) == set(rounds[0][:6])


def test_answers_may_hold_what_others_take_for_the_end_of_a_line(tmp_path):
    """A server may write its files with other ends of lines, a byte-order mark, and characters as they are."""
    odd = "one\u2028two\u0085three\u2029four"

    def script(made):
        made.finish()
        plain = [json.loads(line) for line in made.server.files[made.output_file_id].split(b"\n") if line]
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\r\n" for entry in plain)
        made.server.files[made.output_file_id] = text.encode("utf-8-sig")

    with FakeLLM(lambda _: odd, batch_script=script) as fake:
        replies, _ = ask(fake, tmp_path)
        assert [reply.text for reply in replies] == [odd] * len(WAVE)
        assert len(fake.batches) == 1  # paid once


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_batch_that_ends_early_keeps_what_it_has(status, tmp_path):
    def script(made):
        if made.status == "in_progress":
            first = len(fake.batches) == 1
            names = sorted(entry["custom_id"] for entry in made.requests())
            made.finish(status if first else "completed", keep=lambda name: not first or name in names[:5])

    with FakeLLM(echo, batch_script=script) as fake:
        replies, _ = ask(fake, tmp_path)
        assert answered(replies)
        assert [len(made.requests()) for made in fake.batches] == [12, 7]


def test_what_never_comes_back_is_given_up(tmp_path):
    with FakeLLM(echo, batch_script=lambda made: made.finish("expired", keep=lambda _: False)) as fake:
        replies, ledger = ask(fake, tmp_path)
        assert {reply.failure for reply in replies} == {"expired"}
        assert len(fake.batches) == batch.MAX_ROUNDS
        assert ledger.accounts["judge"].failures == {"expired": 12}
        fake.batch_script = lambda made: made.finish()
        assert answered(ask(fake, tmp_path)[0])  # another day it does


BROKEN_LINES = [
    {"choices": [{"message": {"content": ""}, "finish_reason": "error"}]},
    {"choices": [{"message": {"content": "half"}, "finish_reason": "stop", "error": {"message": "died"}}]},
    {"choices": [{"message": {"content": "half"}, "finish_reason": None}]},
    {"choices": [{"message": "half"}]},
    {"error": "died"},
    ["half"],
    None,
]


@pytest.mark.parametrize("body", BROKEN_LINES)
def test_an_error_within_a_line_is_asked_again_and_is_no_answer(body, tmp_path):
    def script(made):
        made.finish()
        if made is fake.batches[0]:
            lines = [json.loads(line) for line in fake.files[made.output_file_id].splitlines()]
            for line in lines[:4]:
                line["response"]["body"] = body
            fake.files[made.output_file_id] = "\n".join(map(json.dumps, lines)).encode()

    with FakeLLM(echo, batch_script=script) as fake:
        assert answered(ask(fake, tmp_path)[0])
        assert [len(made.requests()) for made in fake.batches] == [12, 4]


def test_an_answer_that_cannot_be_read_once_it_is_asked_for_is_asked_for_again(tmp_path):
    def bad(made):
        made.finish()
        if made is fake.batches[0]:
            raw = fake.files[made.output_file_id]
            fake.files[made.output_file_id] = raw.replace(b'"index": 1', b'"index": 0')

    stop, wave = [], [Embed("encoder", (f"text {n}", "b")) for n in range(4)]
    with FakeLLM(echo, batch_script=lambda _: stop.append(1)) as fake:
        with pytest.raises(Stopped):
            ask(fake, tmp_path, wave, watch=Watch(lambda: bool(stop)))
        fake.batch_script = bad
        assert ask(fake, tmp_path, wave[:1])[0][0].ok  # the rest is stored as it came
        assert all(reply.ok for reply in ask(fake, tmp_path, wave)[0])


def test_a_refusal_is_final_and_shows_no_key(tmp_path):
    with FakeLLM(echo, batch_script=lambda made: made.finish(fail=lambda _: 400)) as fake:
        replies, _ = ask(fake, tmp_path)
        assert {reply.failure for reply in replies} == {"bad_request"}
        assert len(fake.batches) == 1
        ask(fake, tmp_path)
        assert len(fake.batches) == 1
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in repr(replies) + stored.decode("latin-1")


def test_a_line_that_is_refused_like_a_key_is_one_text_unless_all_are(tmp_path):
    def some(made):
        first = min(entry["custom_id"] for entry in made.requests())
        made.finish(fail=lambda name: 403 if name == first or alone else 0)

    alone = False
    with FakeLLM(echo, batch_script=some) as fake:
        replies, _ = ask(fake, tmp_path / "one")
        assert sorted(reply.failure for reply in replies) == [""] * 11 + ["refused"]
        assert {reply.cut_off for reply in replies} == {""}
        alone = True
        replies, _ = ask(fake, tmp_path / "all")
    assert {reply.failure for reply in replies} == {"quota"}
    assert all(reply.cut_off for reply in replies)


def test_a_question_that_stands_twice_in_a_file_has_the_answer_among_its_lines(tmp_path):
    def script(made):
        lines = [{"custom_id": entry["custom_id"], "error": {"code": "lost"}} for entry in made.requests()]
        made.finish(junk=b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    with FakeLLM(echo, batch_script=script) as fake:
        assert answered(ask(fake, tmp_path)[0])
        assert len(fake.batches) == 1


def test_a_wave_is_cut_by_lines_and_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_LINES", 5)
    with FakeLLM(echo) as fake:
        assert answered(ask(fake, tmp_path)[0])
        assert [len(made.requests()) for made in fake.batches] == [5, 5, 2]
        monkeypatch.setattr(batch, "MAX_BYTES", 700)
        assert answered(ask(fake, tmp_path, model="b")[0])
        assert len(fake.batches) > 3 + 3
        assert all(len(fake.files[made.input_file_id]) <= 700 for made in fake.batches[3:])
        long = question("x" * 2000)
        assert answered(ask(fake, tmp_path, [long], model="b")[0], [long])  # longer than a file: let the server say so


def test_a_crash_after_the_batch_was_made_finds_it_by_its_id(tmp_path):
    stop = []

    def script(made):
        stop.append(1)

    with FakeLLM(echo, batch_script=script) as fake:
        with pytest.raises(Stopped, match="1 batches stay open; the same command collects them"):
            ask(fake, tmp_path, watch=Watch(lambda: bool(stop)))
        fake.batch_script = lambda made: made.finish()
        assert answered(ask(fake, tmp_path)[0])
        assert len(fake.batches) == 1


def test_a_crash_before_the_id_was_stored_finds_it_by_its_mark(tmp_path, monkeypatch):
    class Crash(BaseException):
        pass

    async def crash(self, facts):
        if any(name.startswith("batch ") for name in facts):
            raise Crash
        await note(self, facts)

    note = batch.Cache.note
    with FakeLLM(echo) as fake:
        monkeypatch.setattr(batch.Cache, "note", crash)
        with pytest.raises(Crash):
            ask(fake, tmp_path)
        monkeypatch.setattr(batch.Cache, "note", note)
        more = [*WAVE, question("more")]  # a wave that is not the same, but overlaps
        assert answered(ask(fake, tmp_path, more)[0], more)
        assert [len(made.requests()) for made in fake.batches] == [12, 1]
        (tmp_path / "other").mkdir()
        assert answered(ask(fake, tmp_path / "other")[0])  # another cache file: not its batches
        assert len(fake.batches) == 3


def test_a_submission_whose_answer_is_lost_is_not_repeated(tmp_path):
    with FakeLLM(echo) as fake:
        assert answered(ask(fake, tmp_path, faults=[replace(dropped(), after=True)])[0])
        assert len(fake.batches) == 1


def test_errors_around_a_batch_are_tried_again_or_told(tmp_path):
    with FakeLLM(echo) as fake:
        assert answered(ask(fake, tmp_path, faults=[broken(), error(429, "slow", Retry_After="0")])[0])
        replies, _ = ask(fake, tmp_path, [question("new")], faults=[no_quota()])
        assert [reply.failure for reply in replies] == ["quota"]
        assert KEY not in replies[0].detail
        assert ask(fake, tmp_path, [question("new")])[0][0].ok


def test_a_batch_that_is_refused_is_told(tmp_path):
    def script(made):
        made.status = "failed"
        made.errors = [{"code": "invalid_request", "message": f"no access with {KEY}"}]

    with FakeLLM(echo, batch_script=script) as fake:
        replies, _ = ask(fake, tmp_path)
        assert len(fake.batches) == 1
    assert {reply.failure for reply in replies} == {"server_error"}
    assert "invalid_request: no access with ***" in replies[0].detail


def test_a_full_queue_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_LINES", 4)
    under_way = []

    def script(made):
        if made.status != "in_progress":
            return
        under_way.append(made.id)
        first = fake.batches[0]
        if made is not first and first.status == "in_progress":
            made.status, made.errors = "failed", [{"code": "token_limit_exceeded", "message": "queue full"}]
        elif made is not first or len(under_way) > 5:
            made.finish()

    with FakeLLM(echo, batch_script=script) as fake:
        assert answered(ask(fake, tmp_path)[0])
        assert [made.status for made in fake.batches].count("failed") == 2


def test_a_queue_that_stays_full_is_a_quota(tmp_path):
    def script(made):
        made.status, made.errors = "failed", [{"code": "token_limit_exceeded", "message": "queue full"}]

    with FakeLLM(echo, batch_script=script) as fake:
        replies, _ = ask(fake, tmp_path)
    assert {reply.failure for reply in replies} == {"quota"}


def test_a_budget_cuts_a_wave_before_it_is_sent(tmp_path):
    with FakeLLM(lambda asked: Answer("HI", usage=(100, 50))) as fake:
        replies, ledger = ask(fake, tmp_path, budget=0.0036, price_in=1.0, price_out=2.0)
        sent = len(fake.batches[0].requests())
        assert 0 < sent < 12
        assert [reply.failure for reply in replies].count("budget") == 12 - sent
        assert ledger.usd <= 0.0036
        replies, ledger = ask(fake, tmp_path, budget=1.0, price_in=1.0, price_out=2.0)
    assert all(reply.ok for reply in replies)
    assert ledger.accounts["judge"].cached == sent
    assert ledger._reserved == pytest.approx(0.0)


def test_vectors_come_in_batches_too_and_one_question_goes_live(tmp_path):
    async def run():
        config = endpoint(fake, via="batch")
        async with Client({"judge": config, "encoder": config}, tmp_path / "cache", poll_s=0.01) as client:
            both = await client.ask_all([Embed("encoder", ("a", "bb")), *WAVE[:2], Embed("encoder", ("ccc",))])
            return both, await client.ask(question("live"))

    with FakeLLM(echo) as fake:
        (first, *said, last), live = asyncio.run(run())
        assert sorted(made.endpoint for made in fake.batches) == ["/v1/chat/completions", "/v1/embeddings"]
    assert [vector[0] for vector in (*first.vectors, *last.vectors)] == [1.0, 2.0, 3.0]
    assert answered(said, WAVE[:2])
    assert live.text == "QUESTION LIVE"
