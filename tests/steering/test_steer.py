"""Steering from prompt to result: a planted latent writes its token, a target KL is met, figures are what they say."""

import json
import math
import threading
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_lm, tiny_tokenizer
from rigs.steering import D, coder_of

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.metrics import kl_divergence
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.steering.hooks import Steering
from sae.steering.steer import Piece, streamed
from sae.steering.steered import Steered
from sae.steering.strengths import Largest

LAST = (Site("model.layers.2", width=D, model="tiny"),)


@cache
def planted():
    """Latents along the unembedding's rows of four tokens that these raise most of all, and as many random ones."""
    lm = tiny_lm()
    table = lm.model.get_output_embeddings().weight.float()
    products = table @ table.T / table.norm(dim=1, keepdim=True)
    own = products.diagonal().clone()
    margins = own - (products - 1e9 * torch.eye(len(table))).max(1).values
    ids = [token for token in margins.argsort(descending=True).tolist() if 36 <= token <= 96][:4]
    random = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    basis = torch.linalg.qr(table[ids].T).Q  # in so few dimensions what is random would raise them too
    rows = torch.cat([table[ids], random - random @ basis @ basis.T])
    rows = rows / rows.norm(dim=1, keepdim=True)
    coder = SparseCoder(CoderSpec(D, D, 8, TopK(2), LAST, LAST, mask=MaskSpec((0, 1, 2), 1))).requires_grad_(False)
    coder.W_dec.copy_(rows)
    coder.W_enc.copy_(rows)
    return lm, coder, ids


@pytest.mark.parametrize("letter", [0, *(pytest.param(letter, marks=pytest.mark.slow) for letter in (1, 2, 3))])
def test_a_planted_latent_writes_its_token_and_a_random_one_does_not(letter):
    lm, coder, ids = planted()
    for prompt in ("abc",):
        found = sae.steer(lm, coder, prompt, f"{letter}=200", new_tokens=20)
        assert found.steered_arm.ids.count(ids[letter]) > 0.9 * 20
        assert found.steered.count(lm.tokenizer.decode([ids[letter]])) > 0.9 * 20
        assert found.plain_arm.ids.count(ids[letter]) < 0.1 * 20
        for other in range(4, 8):
            random = sae.steer(lm, coder, prompt, f"{other}=200", new_tokens=20)
            assert random.steered_arm.ids.count(ids[letter]) < 0.1 * 20


def by_hand(lm, coder, latent, strength, tokens, n):
    """Greedy continuation, reading the whole row each time, with full codes and a hook of its own; and its logits."""

    def hook(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        codes = coder.encode_dense(x)
        edited = codes.clone()
        edited[:, 1:, latent] = strength
        new = x + coder.decode(edited, x) - coder.decode(codes, x)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    tokens = list(tokens)
    handle = lm.model.get_submodule(LAST[0].hook).register_forward_hook(hook) if strength is not None else None
    for _ in range(n):
        with torch.no_grad():
            logits = lm.model(torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1, : len(lm.tokenizer)].argmax()))
    if handle:
        handle.remove()
    return tokens, logits


def test_figures_are_those_of_a_model_edited_by_hand():
    lm, coder, _ = planted()
    found = sae.steer(lm, coder, "abc", "1=8", new_tokens=12)
    tokens = [0, *lm.tokenizer("abc", add_special_tokens=False)["input_ids"]]
    plain, _ = by_hand(lm, coder, 1, None, tokens, 12)
    steered, _ = by_hand(lm, coder, 1, 8.0, tokens, 12)
    assert list(found.plain_arm.ids) == plain[len(tokens) :]
    assert list(found.steered_arm.ids) == steered[len(tokens) :][: len(found.steered_arm.ids)]
    assert found.plain == lm.tokenizer.decode(found.plain_arm.ids)
    assert found.prompt == lm.tokenizer.decode(tokens)
    with torch.no_grad():
        clean = lm.model(torch.tensor([plain])).logits
        _, edited = by_hand(lm, coder, 1, 8.0, plain, 1)
    kl = kl_divergence(clean, edited, torch.ones(1, len(plain) - 1, dtype=torch.bool))[len(tokens) - 1 :]
    assert torch.tensor(found.kl) == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    for arm, row in ((found.plain_arm, plain), (found.steered_arm, steered)):
        with torch.no_grad():
            logs = lm.model(torch.tensor([row])).logits[0].log_softmax(-1)
        n = len(arm.ids)
        loss = -sum(float(logs[place - 1, row[place]]) for place in range(len(tokens), len(tokens) + n)) / n
        assert arm.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert arm.end == ("length" if n == 12 else "stop")
    read = len(tokens) + len(found.steered_arm.ids) - 1
    assert (found.tokens, found.masked, found.changed) == (read, 1, read - 1)


def test_without_an_edit_both_say_the_same_to_the_bit():
    lm, coder, _ = planted()
    for edits in ("", "1:scale=1", "2:add=0 if 1>0"):
        found = sae.steer(lm, coder, "abc", edits, new_tokens=15, temperature=0.8, seed=4)
        assert found.steered_arm == found.plain_arm
        assert set(found.kl) == {0.0}
        assert found.changed == 0


@pytest.mark.parametrize("edits", ["1", "1:add", "5=-1", "1=2, 6:add=1 in answer"])
@pytest.mark.parametrize("kl", [0.1, 0.5, 2.0])
def test_a_target_kl_is_met_within_ten_percent(edits, kl):
    lm, coder, _ = planted()
    found = sae.steer(lm, coder, "abc", edits, new_tokens=10, kl=kl)
    assert abs(found.mean_kl - kl) <= 0.1 * kl
    again = sae.steer(lm, coder, "abc", [one.at(1.0) for one in found.strengths], new_tokens=10)
    assert again.mean_kl == found.mean_kl
    assert again.steered_arm == found.steered_arm
    assert found.strengths[0].value is not None
    assert found.monotone is not None
    if edits == "5=-1":
        assert found.strengths[0].value < 0, "the sign that was said is kept"


def test_a_target_that_cannot_be_reached_names_the_nearest():
    lm, coder, _ = planted()
    with pytest.raises(ConfigError, match=r"^kl: 500 nats cannot be reached; the nearest is [\d.e+]+, with 1=\S+$"):
        sae.steer(lm, coder, "abc", "1", new_tokens=5, kl=500)


def test_what_is_not_monotone_is_said():
    lm, coder, _ = planted()
    latent = next(n for n in range(8) if not sae.steer(lm, coder, "abc", f"{n}:ablate", new_tokens=8).mean_kl < 0.02)
    found = sae.steer(lm, coder, "abc", str(latent), new_tokens=8, kl=3.0)
    assert found.monotone in (True, False)
    told = Steered(**{**vars(found), "monotone": False})
    assert "does not rise steadily" in str(told)
    assert "does not rise steadily" in told.to_json()["note"]
    assert "does not rise steadily" not in str(Steered(**{**vars(found), "monotone": True}))


def test_units_are_resolved_from_what_is_given_else_measured_and_said(monkeypatch):
    lm, coder, _ = planted()
    given = sae.steer(lm, coder, "abc", "1=2x", new_tokens=3, largest={1: 4.0})
    (strength,) = given.strengths
    assert (strength.value, strength.largest, strength.source) == (8.0, 4.0, "as given")
    assert str(strength) == "1=8 (clamped; 2 of its largest activation, 4 as given)"
    assert sae.steer(lm, coder, "abc", "1=8", new_tokens=3).steered == given.steered
    named = sae.steer(lm, coder, "abc", "1=8", new_tokens=3, largest=Largest({1: 4.0}, "in the evidence"))
    assert "2 of its largest activation, 4 in the evidence" in str(named)

    rows = torch.arange(3, 243).reshape(8, 30)
    monkeypatch.setattr("sae.steering.strengths.documents", lambda _: iter(()))
    monkeypatch.setattr("sae.steering.strengths.rows_of_documents", lambda *_: rows)
    measured = sae.steer(lm, coder, "abc", "1=2x", new_tokens=3)
    x = sae.activations(lm, coder, rows.tolist())
    largest = float(x.of(1)[:, 1:].abs().max())
    assert measured.strengths[0].largest == pytest.approx(largest, rel=1e-5)
    assert measured.strengths[0].value == pytest.approx(2 * largest, rel=1e-5)
    assert "on 240 tokens of Python's documentation" in str(measured)
    once = Steering(lm, coder)
    first = list(streamed(once, "abc", "1=2x", new_tokens=3))[-1]
    monkeypatch.setattr("sae.steering.strengths.rows_of_documents", None)
    assert list(streamed(once, "abc", "1=2x", new_tokens=3))[-1] == first  # nobody reads the text again
    assert "its largest activation is not known" in str(list(streamed(once, "abc", "1=8", new_tokens=3))[-1])
    monkeypatch.setattr("sae.steering.strengths.rows_of_documents", lambda *_: rows)
    coder = coder_of("relu")
    with torch.no_grad():
        coder.b_enc[7] = -1e6
    with pytest.raises(ConfigError, match=r"^edits: 7=2x: latent 7 fires nowhere \(on 240 tokens of .*; say a value$"):
        sae.steer(lm, coder, "abc", "7=2x")


def test_measuring_is_done_in_steps_so_that_others_have_their_turn(monkeypatch):
    lm, coder, _ = planted()
    there = threading.Event()

    def text(_):
        there.wait(10)
        yield from ((str(number), "abcdefgh" * 100) for number in range(5))

    monkeypatch.setattr("sae.steering.strengths.documents", text)
    steps = streamed(Steering(lm, coder), "abc", "1=2x", new_tokens=3)
    assert [next(steps) for _ in range(3)] == [None] * 3, "while the text is looked for"
    there.set()
    told = list(steps)
    assert told[-1].strengths[0].source.startswith("on 1,280 tokens of ")
    assert told.count(None) >= 5, "between the passes, a row each"


def test_a_largest_activation_is_measured_on_the_text_of_training_read_as_there(tmp_path):
    lm, coder, _ = planted()
    texts = ["abcdefgh" * 4, "hgfedcba" * 4]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in texts))
    said = {"text": {"source": str(tmp_path / "t.jsonl"), "column": "said"}}
    coder = coder.with_spec(coder.spec.with_(training=said, mask=MaskSpec((0, 1, 2), 1)))
    (strength,) = sae.steer(lm, coder, "abc", "1=2x", new_tokens=2).strengths
    assert strength.source.endswith("/t.jsonl")
    assert strength.largest > 0


def test_bad_input_is_one_line_before_a_model_is_loaded():
    _, coder, _ = planted()
    nowhere = "no/such-model"  # offline: loading it would fail otherwise
    cases = {
        r"^latent: 8 is not one of this coder's; allowed are 0 to 7$": {"edits": "8=1"},
        r"^edits.how: 'clip' is not one of": {"edits": "1:clip=1"},
        r"^edits.strength: clamp of latent 1 needs one, or kl, which finds it$": {"edits": "1"},
        r"^kl: -1 is not above 0$": {"edits": "1", "kl": -1},
        r"^kl: there is no strength that could be found": {"edits": "1:ablate", "kl": 1.0},
    }
    for told, more in cases.items():
        with pytest.raises(ConfigError, match=told):
            sae.steer(nowhere, coder, "abc", **more)
    lm, coder, _ = planted()
    others = {
        r"^prompt: 2101 tokens leave no room for new ones; tiny takes 2048 in all$": {"prompt": "a" * 2100},
        r"^new_tokens: 2045 behind a prompt of 4 are .* \(2048 in all\); at most 2044 are allowed$": {
            "new_tokens": 2045
        },
        r"^temperature: -1 is too small": {"temperature": -1},
        r"^top_p: 0 is not above 0 and at most 1$": {"top_p": 0},
    }
    for told, more in others.items():
        with pytest.raises(ConfigError, match=told):
            sae.steer(lm, coder, **{"prompt": "abc", "edits": "1=1", **more})


def test_both_arms_are_drawn_with_the_same_noise_and_again_the_same():
    lm, coder, _ = planted()
    first, again, other = (
        sae.steer(lm, coder, "abc", "1:add=0.001", new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.plain != other.plain
    pairs = list(zip(first.plain_arm.ids, first.steered_arm.ids, strict=True))
    assert sum(a == b for a, b in pairs) > 20, "so small an edit changes few draws"
    assert len(first.kl) == len(first.measured)
    assert first.measured != first.plain_arm.pieces, "of the greedy continuation"


def test_messages_go_through_the_template():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last or add_generation_prompt %}"
        "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    lm, coder, _ = planted()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chatty = LanguageModel(lm.model, tokenizer, "tiny", None, True)
    found = sae.steer(chatty, coder, "hi", "1=1", new_tokens=2, chat=True)
    assert found.prompt == "<s>[user]hi\n[assistant]"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert sae.steer(chatty, coder, messages, "1=1", new_tokens=2).prompt == "<s>[system]s\n[user]hi\n[assistant]"
    begun = [*messages, {"role": "assistant", "content": "So"}]
    assert sae.steer(chatty, coder, begun, "1=1", new_tokens=2).prompt == "<s>[system]s\n[user]hi\n[assistant]So"
    plain = sae.steer(chatty, coder, "hi", "1=1", new_tokens=2)
    assert plain.prompt == "<s>hi"
    assert plain.note == "the prompt was read as plain text, though the model has a template for chats (chat)"
    assert str(plain).count(plain.note) == 1
    assert plain.to_json()["note"] == plain.note
    for ids in (found, sae.steer(chatty, coder, [0, 40], "1=1", new_tokens=2), sae.steer(lm, coder, "hi", "1=1")):
        assert not ids.note
    with pytest.raises(ConfigError, match=r"^prompt: a message spells '</s>'"):
        sae.steer(chatty, coder, "hi</s>", "1=1", chat=True)
    with pytest.raises(ConfigError, match=r"^prompt: .* has no chat template"):
        sae.steer(lm, coder, "hi", "1=1", chat=True)


def test_the_stream_gives_the_pieces_of_the_result_and_users_do_not_mix():
    lm, coder, _ = planted()
    steering = Steering(lm, coder)
    prompts = (("abc", "1=8"), ("hello", "2=20 if 5>0"), ("q", "3:add=5 in answer"))
    streams = [streamed(steering, prompt, edits, new_tokens=9) for prompt, edits in prompts]
    got: list[list] = [[] for _ in streams]
    running = dict(enumerate(streams))
    while running:  # a step of one, a step of the next
        for number in list(running):
            piece = next(running[number], None)
            if piece is None:
                del running[number]
            else:
                got[number].append(piece)
    for pieces, (prompt, edits) in zip(got, prompts, strict=True):
        alone = sae.steer(lm, coder, prompt, edits, new_tokens=9)
        *parts, result = pieces
        assert result == alone
        for side in ("plain", "steered"):
            text = "".join(piece.text for piece in parts if isinstance(piece, Piece) and piece.side == side)
            assert text == getattr(alone, side)
    halves = streamed(steering, "abc", "1=8", new_tokens=9)
    next(halves)
    halves.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()), "nothing is left behind"
    searching = list(streamed(steering, "abc", "1", new_tokens=3, kl=0.5))
    assert None in searching, "others may have a turn between the passes of a search"


def test_what_is_not_one_prompt_or_one_number_is_one_line():
    lm, coder, _ = planted()
    kinds = {
        r"^prompt: list was given; it takes one, not 2: a text, a chat .* token ids$": {"prompt": ["abc", "def"]},
        r"^prompt: tuple was given; it takes one, not 2": {"prompt": ("abc", "def")},
        r"^prompt: there are no tokens in list$": {"prompt": []},
        r"^prompt: list was given; it takes one, not 2": {"prompt": [[3, 4], [5]]},
        r"^prompt: True was given": {"prompt": [True, False]},
        r"^kl: the text '0.5' was given; it takes a number$": {"edits": "1", "kl": "0.5"},
        r"^kl: no strength changes so much$": {"edits": "1", "kl": math.inf},
        r"^temperature: the text '1' was given": {"temperature": "1"},
        r"^top_p: True was given": {"top_p": True},
        r"^largest: 3.0 was given; it takes largest activations by latent": {"largest": 3.0},
        r"^largest: the text 'a' was given; it takes a number$": {"edits": "1=2x", "largest": {1: "a"}},
        r"^edits.strength: 1e\+300 is not a number up to ": {"edits": "1=1e300"},
    }
    for told, more in kinds.items():
        with pytest.raises((ConfigError, TypeError), match=told):
            sae.steer(lm, coder, **{"prompt": "abc", "edits": "1=1", **more})


def test_an_edit_that_overflows_the_model_is_an_error_and_ends_no_search():
    lm, coder, _ = planted()
    half = LanguageModel(deepcopy(lm.model).half(), lm.tokenizer, "tiny", None, True)
    with pytest.raises(ConfigError, match=r"^lm: it predicts no numbers here; where latents are edited, lessen"):
        sae.steer(half, coder, "abc", "1=1e30", new_tokens=3)
    with pytest.raises(ConfigError, match=r"^kl: 500 nats cannot be reached; the nearest is [\d.]+, with 1="):
        sae.steer(half, coder, "abc", "1", new_tokens=3, kl=500)


def test_units_and_how_are_said_of_every_edit():
    lm, coder, _ = planted()
    found = sae.steer(lm, coder, "abc", "1=8, 2:add=1, 3:scale=2, 4:ablate", new_tokens=2, largest={2: 4.0})
    own = "in its own units; its largest activation is not known"
    assert [str(one) for one in found.strengths] == [
        f"1=8 (clamped; {own})",
        "2:add=1 (0.25 of its largest activation, 4 as given)",
        "3:scale=2",
        "4:ablate",
    ]


HOSTILE = "<script>alert(1)</script>\u202e\u200b\x1b[31m"


def test_the_result_is_shown_as_text_whatever_it_says():
    lm, coder, _ = planted()
    found = sae.steer(lm, coder, HOSTILE, "1=8", new_tokens=6)
    arm = found.plain_arm.__class__(HOSTILE, (5, 6), ("<b>", "\\u{202e}"), 2.0, "stop")
    shown = Steered(**{**vars(found), "plain_arm": arm, "measured": arm.pieces, "kl": (0.5, 2.0)})
    page = shown._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    for text in (str(shown), repr(shown), page):
        assert not {"\u202e", "\u200b", "\x1b"} & set(text)
    assert "KL(plain || steered)" in page
    assert page.count("<mark") == 2
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["kl"] == list(found.kl)
    assert data["steered"] == found.steered
    assert data["mean_kl"] == found.mean_kl
    assert data["edits"] == [str(found.strengths[0])]
    assert data["strengths"][0]["strength"] == 8
    assert len(data["tokens"]) == len(data["kl"]) == 6


@pytest.mark.parametrize(
    ("told", "more"),
    [
        (
            r"^prompt: torch.Tensor of shape \[2, 1\] was given; it takes one, not 2",
            {"prompt": torch.tensor([[5], [6]])},
        ),
        (r"^prompt: None was given", {"prompt": None}),
        (r"^kl: the text '0.5' was given; it takes a number$", {"edits": "1", "kl": "0.5"}),
        (r"^kl: no strength changes so much$", {"edits": "1", "kl": float("inf")}),
        (r"^temperature: the text '1' was given; it takes a number$", {"temperature": "1"}),
        (r"^top_p: None was given; it takes a number$", {"top_p": None}),
        (r"^seed: the text 'x' was given; it takes a whole number$", {"seed": "x"}),
        (r"^largest: ", {"largest": 3}),
        (r"^edits.latent: '1' is not the id of a latent", {"edits": {"latent": "1", "strength": 2}}),
        (r"^edits.latent: True is not the id of a latent", {"edits": {"latent": True, "strength": 2}}),
        (r"^edits.strength: '2x' is of clamp and add; scale takes", {"edits": "1:scale=2x"}),
        (r"^edits.unit: 'largest' is of clamp", {"edits": {"latent": 1, "how": "ablate", "unit": "largest"}}),
    ],
)
def test_values_of_another_kind_are_one_line(told, more):
    lm, coder, _ = planted()
    with pytest.raises((ConfigError, TypeError), match=told):
        sae.steer(lm, coder, **{"prompt": "abc", "edits": "1=1", "new_tokens": 2, **more})


def test_numbers_and_token_ids_may_be_those_of_numpy_and_torch():
    lm, coder, _ = planted()
    wanted = sae.steer(lm, coder, [5, 6], [{"latent": 1, "strength": 2.0}], new_tokens=2)
    edit = {"latent": np.int64(1), "strength": np.float32(2)}
    for ids in (np.array([5, 6]), torch.tensor([5, 6]), [np.int64(5), np.int32(6)], (5, 6)):
        found = sae.steer(lm, coder, ids, edit, new_tokens=np.int64(2))
        assert found == wanted
        json.dumps(found.to_json())
