"""Which latents fire where in a text: by the codes of what the model computes, and the mask of training."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from rigs.fakes import tiny_lm, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import RELEASED, CoderSpec
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.selection.gradient_topk import GradientTopK
from sae.selection.topk import TopK

D, BOS = 16, 0
ONE, TWO = (Site(f"model.layers.{n}", model="tiny", width=D) for n in (0, 1))
MASK = MaskSpec((0, 1, 2), 1)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def coder(reads=(ONE,), writes=(ONE,), mask=MASK, selection=None, **spec):
    torch.manual_seed(0)
    sides = {"d_in": D * len(reads), "d_out": D * len(writes), "reads": reads, "writes": writes}
    made = SparseCoder(CoderSpec(**sides, d_sae=32, selection=selection or TopK(4), pre_bias="none", mask=mask, **spec))
    initialize(made, torch.zeros(D * len(reads)), 0)
    return made.requires_grad_(False)


def test_they_are_the_codes_of_what_the_model_computes(lm):
    made, ids = coder(), [5, 6, 7, 8]
    found = sae.activations(lm, made, [BOS, *ids])
    x = capture(lm, [ONE], torch.tensor([[BOS, *ids]]))[ONE.name]
    dense = made.encode(x).to_dense()
    torch.testing.assert_close(found.latents.to_dense(), dense)
    assert found.tokens.tolist() == [[BOS, *ids]]
    assert found.mask.tolist() == [[False, True, True, True, True]]
    for latent in (0, 7, 31):
        assert torch.equal(found.of(latent), found.latents.to_dense()[..., latent])


def test_the_top_is_over_tokens_that_count_and_says_where(lm):
    text = "abc def"
    found = sae.activations(lm, coder(), text)
    dense = found.latents.to_dense()[0]
    dense[~found.mask[0]] = 0
    wanted = sorted(((float(v), i) for i, v in enumerate(dense.amax(0)) if v > 0), reverse=True)
    top = found.top(100)
    assert [(row.value, row.latent) for row in top] == wanted
    assert found.top(3) == top[:3]
    for row in top:
        assert row.position == int(dense[:, row.latent].argmax()) > 0
        assert row.fires == int((dense[:, row.latent] > 0).sum())
        assert row.token == text[row.position - 1]
        assert row.where.replace("«", "").replace("»", "") in f"<s>{text}"
        assert f"«{row.token.strip()}»" in row.where


def test_bos_and_sinks_are_marked_and_come_nowhere_first(lm):
    x = capture(lm, [ONE], torch.tensor([[BOS, 5, 6, 7, 8]]))[ONE.name][0].norm(dim=1)
    limit = float(x[1:].sort().values[-2])
    found = sae.activations(lm, coder(mask=replace(MASK, norm_limits={ONE.name: limit})), [BOS, 5, 6, 7, 8])
    assert found.mask.tolist() == [[False, *(x[1:] <= limit).tolist()]]
    assert not found.mask.all(1)
    assert all(found.mask[row.row, row.position] for row in found.top(32))
    assert "2 of them masked" in repr(found)


def test_a_limit_at_a_site_that_is_written_counts_as_in_training(lm):
    mask = replace(MASK, norm_limits={TWO.name: 1e-9})
    found = sae.activations(lm, coder((ONE,), (TWO,), mask), "abc")
    assert not found.mask.any()
    assert found.top() == []
    assert repr(found.top()) == "no latent fires at a token that counts"


def test_a_coder_of_others_has_the_special_tokens_masked(lm):
    made = coder(mask=MaskSpec(skip_positions=0), training={RELEASED: {"format": "saelens"}})
    assert sae.activations(lm, made, "ab").mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("reads", "writes", "options"),
    [((ONE,), (TWO,), {}), ((ONE, TWO), (ONE, TWO), {}), ((ONE, TWO), (ONE, TWO), {"cross_layer": True})],
    ids=["transcoder", "crosscoder", "cross-layer"],
)
def test_coders_of_other_sites_read_theirs(lm, reads, writes, options):
    made = coder(reads, writes, **options)
    found = sae.activations(lm, made, "ab cd")
    seen = capture(lm, list(reads), found.tokens)
    wanted = made.encode(torch.cat([seen[site.name] for site in reads], -1))
    torch.testing.assert_close(found.latents.to_dense(), wanted.to_dense())


def test_one_that_looks_at_gradients_is_refused(lm):
    made = coder(selection=GradientTopK(4, inference="gradient"))
    with pytest.raises(ConfigError, match=r"^coder: its selection looks at gradients of what follows"):
        sae.activations(lm, made, "ab")


def test_text_comes_in_many_forms(lm):
    made, ids = coder(), lm.tokenizer("abc", add_special_tokens=False).input_ids
    whole = [BOS, *ids]
    padded = lm.tokenizer(["abc", "a"], padding=True, return_tensors="pt", padding_side="left")
    forms = {
        "a text": ("abc", [whole]),
        "texts": (["abc", "a"], [whole, [*whole[:2], -1, -1]]),
        "ids": (ids, [ids]),
        "rows of ids": ([ids, ids[:1]], [ids, [ids[0], -1, -1]]),
        "a tensor": (torch.tensor([ids, ids]), [ids, ids]),
        "an array": (torch.tensor(ids).numpy(), [ids]),
        "a tokenizer's": (lm.tokenizer("abc", add_special_tokens=False), [ids]),
        "with padding": (padded, [ids, [ids[0], -1, -1]]),
    }
    for name, (given, wanted) in forms.items():
        assert sae.activations(lm, made, given).tokens.tolist() == wanted, name
    assert sae.activations(lm, coder(bos="none"), "abc").tokens.tolist() == [ids]


def test_a_chat_is_written_by_the_template_and_masked_by_the_roles_of_training(lm):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    made = coder(training={"text": {"roles": ["assistant"]}})
    for given in (chat, [chat]):
        found = sae.activations(replace(lm, tokenizer=tokenizer), made, given)
        assert "".join(found.strings[0]) == "<s><user>ab<assistant>cd"
        counted = [text for text, kept in zip(found.strings[0], found.mask[0], strict=True) if kept]
        assert "".join(counted) == "cd"


@pytest.mark.parametrize("given", [None, 3, [1.5], torch.zeros(2), {"a": 1}, ["a", 5]])
def test_what_is_no_text_is_one_line(lm, given):
    with pytest.raises(TypeError, match=r"^text: .* was given; it takes a text, a chat"):
        sae.activations(lm, coder(), given)


def test_no_tokens_and_too_many_are_one_line(lm):
    with pytest.raises(ValueError, match=r"^text: there are no tokens in list$"):
        sae.activations(lm, coder(), [])
    with pytest.raises(ConfigError, match=r"^text: it holds token id 999;"):
        sae.activations(lm, coder(), [999])
    config = LlamaConfig(**{**lm.model.config.to_dict(), "max_position_embeddings": 4})
    short = LanguageModel(LlamaForCausalLM(config).eval(), lm.tokenizer, "short", None, True, positions=4)
    with pytest.raises(ConfigError, match=r"^text: 6 is more than short has positions for; at most 4"):
        sae.activations(short, coder(), "abcde")


def test_latents_and_counts_out_of_range_are_one_line(lm):
    found = sae.activations(lm, coder(), "ab")
    with pytest.raises(ValueError, match=r"^latent: 32 is none of this coder's 32$"):
        found.of(32)
    with pytest.raises(TypeError, match=r"^n: the text 'five' was given; it takes a whole number$"):
        found.top("five")


def test_it_is_shown_as_a_table_and_taken_by_pandas(lm):
    found = sae.activations(lm, coder(), "a<b>c")
    head, names, *rows = repr(found).splitlines()
    assert re.fullmatch(r"model\.layers\.0 of tiny: 1 row, 6 tokens, 1 of them masked, L0 4\.0", head)
    assert names.split() == ["latent", "value", "fires", "row", "position", "token", "where"]
    assert len(rows) == 5
    page = found._repr_html_()
    assert page.count("<tr>") == 6
    assert "<b>" not in page
    assert "&lt;" in page
    frame = pd.DataFrame(found.top(5))
    assert list(frame.columns) == names.split()
    assert frame.latent.tolist() == [row.latent for row in found.top(5)]
