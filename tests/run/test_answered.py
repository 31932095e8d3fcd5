"""What a stage tells of its answers: shares of them, and the cost of what is left."""

import pytest

from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger, Usage
from interp.client.local.words import NAME
from interp.client.requests import Chat, Embed, Reply
from interp.run.answered import Answered, Share

PRICED = EndpointConfig(model="m", base_urls=("https://a/v1",), price_in=1.0, price_out=2.0)
QUESTION = Chat("judge", (("user", "?"),), 10)
NEW, STORED = Reply(text="a", tokens_in=1_000_000), Reply(text="a", tokens_in=1_000_000, cached=True)
FAILED = Reply(failure="parse", tokens_out=500_000)


def counted(latents, *replies, before=0.0):
    """Returns what is counted of a stage in which each latent got its replies."""
    ledger = Ledger({"judge": PRICED})
    ledger.start_from({"judge": {"usd": before}})
    told = Answered(ledger, {"judge": PRICED, "encoder": EndpointConfig(model=NAME, via="local")}, latents)
    for own in replies:
        share = Share(rows=1)
        for reply in own:
            told.take(share, QUESTION, reply)
            if not reply.cached:
                ledger.settle("judge", Usage(0, 0), Usage(reply.tokens_in, reply.tokens_out))
        told.end(1, share)
    return told


def test_shares_are_of_all_answers():
    figures = counted(10, [NEW, NEW], [FAILED, STORED]).figures()
    assert (figures["answers"], figures["cached_share"], figures["valid_share"]) == (4, 0.25, 0.75)


def test_what_is_expected_is_by_latents_that_were_paid_for():
    told = counted(10, [STORED, STORED], [STORED], [NEW, FAILED], [NEW, STORED], before=5.0)
    assert (told.done, told.reused) == (4, 2)
    assert told.figures()["usd"] == pytest.approx(5 + 3)  # USD 2 for the first that was asked anew, 1 for the second
    assert told.figures()["usd_expected"] == pytest.approx(5 + 1.5 * 8)


def test_latents_under_way_do_not_make_the_rest_dear():
    told = counted(100, [NEW])
    for _ in range(50):  # paid for, of latents that are not done yet
        told.ledger.settle("judge", Usage(0, 0), Usage(1_000_000, 0))
        told.take(Share(), QUESTION, NEW)
    assert told.figures()["usd_expected"] == pytest.approx(100)


def test_a_latent_without_questions_is_work_unless_its_row_was_there():
    assert Share(rows=0).reused
    assert not Share(rows=1).reused


def test_no_price_no_cost_and_no_model_nothing():
    free = Answered(Ledger({"judge": EndpointConfig(model="m", base_urls=("https://a/v1",))}), {}, 3)
    free.take(Share(), QUESTION, NEW)
    assert free.figures() == {"answers": 1, "cached_share": 0.0, "valid_share": 1.0}
    told = counted(3)
    told.take(Share(), Embed("encoder", ("a",)), Reply(vectors=((1.0,),)))
    assert told.figures() == {}
