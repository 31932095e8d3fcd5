"""What a text shows: the codes of the model's own activations, their labels and effects, and hostile text as text."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rigs.fakes import tiny_lm, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import interp
import sae
from interp.evidence.effects import DirectEffects, Entries
from interp.view.explained import ExplainedRun
from interp.view.firing.table import lines
from interp.view.widths import columns
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.evaluation.activations import activations
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import SECOND, Site
from sae.selection.gradient_topk import GradientTopK
from sae.selection.topk import TopK

D, D_SAE, BOS = 16, 64, 0
TEXT = "the cat sat, the dog ran"
HOSTILE = (
    "</script><img src=x onerror=alert(1)> \u202eevil\u200b \x1b[31m \U0001f468\u200d\U0001f469 \u0000\" ' &amp; ```"
)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def coder(*sites, selection=None, **spec):
    torch.manual_seed(0)
    sites = sites or (Site("model.layers.1", model="tiny", width=D),)
    d = sum(site.width for site in sites)
    mask = MaskSpec((0, 1, 2), 1)
    made = SparseCoder(CoderSpec(d, d, D_SAE, selection or TopK(4), sites, sites, pre_bias="none", mask=mask, **spec))
    initialize(made, torch.zeros(d), 0)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def found(lm):
    return interp.prompt(coder(), lm, TEXT, top=D_SAE)


def dense_of(lm, made, ids):
    site = made.spec.reads[0]
    x = capture(lm, [site], torch.tensor([ids]))[site.name]
    dense = made.encode_dense(x)[0]
    dense[0] = 0  # the first token does not count
    return dense


def test_values_are_the_codes_of_the_full_context_at_tokens_that_count(lm, found):
    made = coder()
    dense = dense_of(lm, made, list(found.token_ids))
    assert found.tokens == ("<s>", *TEXT)
    assert found.mask == (False, *[True] * len(TEXT))
    told = torch.zeros_like(dense)
    for one in found.latents:
        told[list(one.positions), one.latent] = torch.tensor(one.values)
        assert one.value == float(dense[:, one.latent].max()) == one.values[one.positions.index(one.position)]
        assert one.fires == int((dense[:, one.latent] > 0).sum())
    assert torch.equal(told, dense)
    assert found.at(0) == []
    for position in (1, 7, len(TEXT), -1):
        some = found.at(position)
        wanted = dense[position].nonzero()[:, 0]
        assert {one.latent: one.value for one in some} == {int(i): float(dense[position, i]) for i in wanted}
        assert [one.value for one in some] == sorted((one.value for one in some), reverse=True)
    latent = found.latents[0].latent
    assert [one.position for one in found.of(latent)] == dense[:, latent].nonzero()[:, 0].tolist()
    silent = next(i for i in range(D_SAE) if not dense[:, i].any())
    assert found.of(silent) == []


def test_effects_are_those_on_the_token_that_follows(lm, found):
    made, ids = coder(), torch.tensor([found.token_ids])
    direct = DirectEffects(lm, made)
    direct.run(lm, list(made.spec.reads), ids)
    measured = direct.measured()
    logits = lm.model(ids).logits[0, :, : len(lm.tokenizer)]
    last = int(logits[-1].argmax())
    after = torch.tensor([*found.token_ids[1:], last])
    assert found.follows == (*found.tokens[1:], found.follows[-1])
    centered = (logits - logits.mean(-1, keepdim=True))[torch.arange(len(after)), after]
    assert found.logits == pytest.approx(centered.tolist(), abs=1e-3)
    for one in found.latents:
        places = torch.tensor(one.positions)
        entries = Entries(places, torch.full_like(places, one.latent), torch.tensor(one.values))
        assert one.effects == pytest.approx(measured.on(entries, after[places]).tolist(), abs=1e-4)
        assert one.effect == max(one.effects, key=abs)
        assert len(one.raised) == len(one.lowered) == 5
        assert [value for _, value in one.raised] == sorted((value for _, value in one.raised), reverse=True)
    assert [one.effect for one in found.at(5)] == [dict(_by_position(found, 5))[one.latent] for one in found.at(5)]


def _by_position(found, position):
    for one in found.latents:
        if position in one.positions:
            yield one.latent, one.effects[one.positions.index(position)]


def test_orders(lm, found):
    for by, key in (("value", "value"), ("fires", "fires"), ("effect", "effect")):
        sizes = [abs(getattr(one, key)) for one in found.top(100, by)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == len(found.latents)
    assert interp.prompt(coder(), lm, TEXT).top() == list(found.latents[:20])
    with pytest.raises(ConfigError, match="by: 'sise' is not one of value, fires, effect"):
        found.top(3, "sise")


def test_a_table_and_json_hold_the_same(found):
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    frame = found.to_pandas()
    entries = [(position, *entry) for position, some in enumerate(data["at"]) for entry in some]
    assert [tuple(row) for row in frame[["position", "latent", "value", "effect"]].itertuples(index=False)] == entries
    assert len(entries) == sum(one.fires for one in found.latents)
    assert (frame["token"] == [found.tokens[position] for position in frame["position"]]).all()
    by_id = {one["latent"]: one for one in data["latents"]}
    for one in found.latents:
        own = by_id[one.latent]
        assert (own["value"], own["position"], own["fires"], own["effect"]) == (
            one.value,
            one.position,
            one.fires,
            one.effect,
        )
        assert own["raised"] == [list(pair) for pair in one.raised]
    assert (data["tokens"], data["mask"], data["shown_with"]) == (
        list(found.tokens),
        list(found.mask),
        list(range(len(found.tokens))),
    )


def test_those_that_come_first_by_any_order_have_their_effects_told(lm):
    found = interp.prompt(coder(), lm, TEXT, top=3)
    told = {one.latent for one in found.latents if one.raised}
    assert told == {one.latent for by in ("value", "fires", "effect") for one in found.top(3, by)}
    assert {one["latent"] for one in found.to_json()["latents"]} == told
    assert len(found.top()) == 3 < len(told) < len(found.latents)


def test_only_some_latents(lm, found):
    ids = [found.latents[0].latent, found.latents[2].latent]
    some = interp.prompt(coder(), lm, TEXT, latents=ids).latents
    wanted = [one for one in found.latents if one.latent in ids]
    assert [(one.latent, one.positions, one.values) for one in some] == [
        (one.latent, one.positions, one.values) for one in wanted
    ]
    assert all(one.raised for one in some)
    with pytest.raises(ConfigError, match="64 is out of range; the coder has latents 0 to 63"):
        interp.prompt(coder(), lm, TEXT, latents=D_SAE)


def test_labels_are_those_of_an_explained_run(explained_coder):
    folder = explained_coder
    run = ExplainedRun(folder / "explain")
    texts = {record.latent: record.label.text for record in run if record.label and record.label.text}
    assert texts
    found = interp.prompt(folder, None, "abcdefgh " * 5, run=folder)
    assert {one.latent: one.label for one in found.latents} == {
        one.latent: texts.get(one.latent) for one in found.latents
    }
    assert any(one.label for one in found.latents)
    assert found.to_json()["labels"] == {str(one.latent): one.label for one in found.latents if one.label}
    assert interp.prompt(folder, None, "abc", run=run).latents == interp.prompt(folder, None, "abc", run).latents
    with pytest.raises(TypeError, match="run: 7 was given; it takes an explained run or its folder"):
        interp.prompt(folder, None, "abc", run=7)


def test_labels_of_another_coder_are_refused_or_doubted(explained_coder, caplog):
    own, run = sae.load(explained_coder), interp.results(explained_coder)
    interp.prompt(own, None, "abc", run)
    assert not caplog.records
    other = sae.load(explained_coder)
    other.W_dec.data += 1
    for _ in range(2):
        interp.prompt(other, None, "abc", run)
    assert [record.message.partition(" is of ")[2] for record in caplog.records] == [
        "a coder with other weights; its labels may not fit these latents"
    ]
    with pytest.raises(ConfigError, match=rf"^run: .* is of a coder of 48 latents; this one has {D_SAE}$"):
        interp.prompt(coder(), tiny_lm(), "abc", run)


def test_a_chat_goes_through_the_template(lm):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chatty = LanguageModel(lm.model, tokenizer, "tiny", None, True)
    chat = [{"role": "user", "content": "hi"}]
    found = interp.prompt(coder(), chatty, "hi", chat=True)
    assert "".join(found.tokens).endswith("<user>hi")
    assert found.latents == interp.prompt(coder(), chatty, chat).latents
    with pytest.raises(ConfigError, match="no chat template; give plain text"):
        interp.prompt(coder(), lm, "hi", chat=True)


def test_several_sites_and_two_models(lm):
    sites = tuple(Site(f"model.layers.{n}", width=D) for n in (0, 1))
    found = interp.prompt(coder(*sites), lm, TEXT)
    assert found.site == "model.layers.0, model.layers.1"
    assert not found.no_effects
    other = tiny_lm(seed=2)
    pair = coder(Site("model.layers.1", width=D), Site("model.layers.1", width=D, tag=SECOND))
    found = interp.prompt(pair, lm, TEXT, second=other)
    wanted = activations(lm, pair, TEXT, second=other)
    assert {one.latent for one in found.latents} == {row.latent for row in wanted.top(D_SAE)}
    assert found.latents[0].effects


def test_what_does_not_reach_the_logits_says_why(lm):
    site = Site("model.layers.1.mlp", "input", width=D)
    found = interp.prompt(coder(site), lm, TEXT)
    assert found.no_effects == "what is written at model.layers.1.mlp:input does not reach the residual stream linearly"
    assert all(one.effect is None and one.effects is None and one.raised == () for one in found.latents)
    assert found.follows[-1] is None
    assert set(found.logits) == {None}
    assert found.no_effects in str(found).replace("\n", " ")
    assert found.no_effects in found._repr_html_()
    assert json.loads(json.dumps(found.to_json()))["at"][3][0][2] is None


@pytest.mark.parametrize("room", [20, 40, 80, 200])
def test_the_table_fits_its_terminal(found, room):
    told = list(lines(found, found.top(5), room))
    assert max(map(columns, told)) <= max(room, 24)
    assert sum(re.match(r" +\d+ +\d+\.\d", line) is not None for line in told) == 5
    assert f"and {len(found.latents) - 5} more" in told
    if room >= 80:
        best = found.latents[0]
        [line] = [line for line in told if re.match(rf" +{best.latent} +{best.value:.2f} ", line)]
        assert f"\u00ab{found.tokens[best.position].strip() or ' '}\u00bb" in line


def test_repr_is_one_line_and_print_is_the_table(found):
    assert repr(found) == found.title()
    assert str(found) == "\n".join(lines(found, found.top()))
    assert f"{len(found.tokens)} tokens, 1 of them masked; {len(found.latents)} latents fire" in repr(found)


class Text(HTMLParser):
    """What of a page is text, and which tags there are."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)


def test_hostile_text_is_text_everywhere(lm):
    found = interp.prompt(coder(), lm, HOSTILE)
    page = Text(found._repr_html_())
    assert page.tags <= {"div", "span", "mark", "pre", "table", "thead", "tbody", "tr", "th", "td"}
    assert "</script><img src=x onerror=alert(1)>" in page.text
    everything = "".join([str(found), page.text, *found.tokens, json.dumps(found.to_json(), ensure_ascii=False)])
    for unseen in ("\u202e", "\u200b", "\x1b", "\x00"):
        assert unseen not in everything
    assert "\\u{202e}" in "".join(found.tokens)
    assert "".join(found.tokens).count("\U0001f468") == 1, "a character of four tokens is told once"
    place = next(i for i, piece in enumerate(found.tokens) if piece == "\U0001f468")
    assert found.to_json()["shown_with"][place - 3 : place + 1] == [place] * 4
    for one in found.latents:  # also where the latent fires most in the middle of a character
        assert list(lines(found, [one], 90))


def test_a_token_of_a_megabyte_is_cut():
    word = "x" * 10**6
    tokenizer = tiny_tokenizer(words=("a", word))
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.5)).eval()
    lm = LanguageModel(model.requires_grad_(False), tokenizer, "tiny", None, True)
    found = interp.prompt(coder(), lm, f"a {word} a", top=2)
    assert max(map(columns, lines(found, found.top(), 80))) <= 80


def test_bad_input_is_one_line(lm):
    gradients = coder(selection=GradientTopK(4, inference="gradient"))
    with pytest.raises(ConfigError, match="selection looks at gradients"):
        interp.prompt(gradients, lm, TEXT)
    with pytest.raises(ConfigError, match="text: it is empty"):
        interp.prompt(coder(), lm, "")
    with pytest.raises(TypeError, match="it takes one, not 2: a text"):
        interp.prompt(coder(), lm, ["one", "two"])
    with pytest.raises(ConfigError, match="names no model"):
        interp.prompt(coder(Site("model.layers.1", width=D)), None, TEXT)
    with pytest.raises(ConfigError, match="names no site"):
        interp.prompt(coder(Site("", width=D)), lm, TEXT)
    short = tiny_lm(max_position_embeddings=8)
    with pytest.raises(ConfigError, match="text: 25 tokens; tiny was trained on at most 8 together"):
        interp.prompt(coder(), short, TEXT)
    with pytest.raises(ValueError, match="top: 0 is too small"):
        interp.prompt(coder(), lm, TEXT, top=0)


def test_a_text_of_masked_tokens_fires_nothing(lm):
    found = interp.prompt(coder(), lm, [BOS, 1])
    assert found.latents == ()
    assert "no latent fires at a token that counts" in str(found)
    assert found._repr_html_()
    assert found.to_pandas().empty
