"""Rows begin and end as the tokenizer begins and ends a text, whatever kind it is."""

import json

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_tokenizer
from rigs.real_tokenizers import KINDS
from transformers import BertConfig, BertModel

from interp.evidence.corpus import corpus_of_text
from sae.base.errors import ConfigError
from sae.lm.hooks import model_inputs
from sae.lm.masking import MaskSpec, token_mask
from sae.lm.models import LanguageModel
from sae.text.documents import TextConfig
from sae.text.packing import PADDING, Packer, added, context_only, token_ids
from sae.text.tokenizing import encode_texts, rows_made_from, special_ids, tokenize

AROUND = {
    "bert": (["[CLS]"], ["[SEP]"]),
    "albert": (["[CLS]"], ["[SEP]"]),
    "roberta": (["<s>"], ["</s>"]),
    "xlm_roberta": (["<s>"], ["</s>"]),
    "t5": ([], ["</s>"]),
    "xlnet": ([], ["<sep>", "<cls>"]),
    "xglm": (["</s>"], []),  # not its BOS; in older versions of transformers one behind, too
    "llama": (["<s>"], []),
    "gpt2": (["<|endoftext|>"], []),  # it adds nothing; its BOS is put there
    "gemma": (["<bos>"], []),
}
FIRST_TEXTS = ["some words of one text", "b", "and those of another one, which is longer"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_a_text_is_what_the_tokenizer_adds(kind):
    tokenizer = KINDS[kind]()
    before, behind = (tokenizer.convert_ids_to_tokens(side) for side in added(tokenizer))
    assert (before, behind) == AROUND[kind] or (kind == "xglm" and (before, behind) == (["</s>"], ["</s>"]))
    assert added(tokenizer, "none") == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_a_row_of_its_own_is_as_the_tokenizer_makes_it(kind):
    tokenizer, length = KINDS[kind](), 16
    packer = Packer(length, "one_per_row", "row", tokenizer)
    for number, ids in enumerate(encode_texts(tokenizer, FIRST_TEXTS)):
        packer.add(ids, number)
    found = packer.take(9)["tokens"]
    for row, text in zip(found.tolist(), FIRST_TEXTS, strict=True):
        wanted = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if kind == "gpt2":
            wanted = [tokenizer.bos_token_id, *wanted][:length]
        assert row == wanted + [PADDING] * (length - len(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_row_begins_and_ends_like_a_text_and_documents_lie_between(kind):
    tokenizer, length = KINDS[kind](), 12
    before, behind = added(tokenizer)
    between = behind or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    packer, stream = Packer(length, "packed", "row", tokenizer), []
    for number, ids in enumerate(encode_texts(tokenizer, FIRST_TEXTS)):
        packer.add(ids, number)
        stream += [*ids.tolist(), *between]
    packer.finish()
    rows = packer.take(99)
    body = length - len(before) - len(behind)
    assert len(rows["tokens"]) == len(stream) // body > 3
    for number, row in enumerate(rows["tokens"].tolist()):
        assert row == [*before, *stream[number * body :][:body], *behind]
    assert (rows["documents"].diff(dim=1) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_policy_document_each_is_as_the_tokenizer_makes_it(kind):
    tokenizer = KINDS[kind]()
    before, behind = added(tokenizer)
    packer, stream = Packer(7, "packed", "document", tokenizer), []
    for number, ids in enumerate(encode_texts(tokenizer, FIRST_TEXTS)):
        packer.add(ids, number)
        eos = [] if behind or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream += [*before, *ids.tolist(), *behind, *eos]
    packer.finish()
    assert packer.take(99)["tokens"].flatten().tolist() == stream[: len(stream) // 7 * 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "one_per_row"])
def test_text_that_spells_special_tokens_puts_none_into_a_row(tmp_path, kind, layout):
    tokenizer = KINDS[kind]()
    spelled = " ".join(tokenizer.all_special_tokens)
    source = write(tmp_path / "a.jsonl", [f"hello {spelled} there {number}" for number in range(40)])
    text = tokenize(TextConfig(str(source), context_length=24, layout=layout), tokenizer, {})
    before, behind = added(tokenizer)
    rows = text.train.tokens(list(range(text.train.n_rows)))
    unknown = tokenizer.unk_token_id if kind not in ("gpt2",) else None
    special = [number for number in special_ids(tokenizer) if number != unknown]
    counts = torch.isin(rows, torch.tensor(special)).sum(1)
    expected = len(before) + len(behind)
    if layout == "one_per_row":
        assert (counts == expected).all()
    else:  # and what ends a document, of which each has more than ten tokens
        ends = max(1, len(behind)) * 2
        assert ((counts >= expected) & (counts <= expected + ends)).all()


def test_rows_of_models_that_read_forward_keep_their_key():
    for kind in ("llama", "gpt2", "gemma"):
        tokenizer = KINDS[kind]()
        assert rows_made_from(TextConfig(), tokenizer).keys() == {"tokenizer", "text", "data"}
    assert not {"encoding", "roles"} & rows_made_from(TextConfig(), tokenizer)["text"].keys()
    for kind in ("bert", "roberta", "t5"):  # other rows than before
        assert rows_made_from(TextConfig(), KINDS[kind]())["added"] == list(added(KINDS[kind]()))


def test_a_row_without_room_for_text_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", ["some text"] * 40)
    with pytest.raises(ConfigError, match=r"text\.context_length: 2 leaves no room for text beside the 2 tokens"):
        tokenize(TextConfig(str(source), context_length=2), KINDS["bert"](), {})
    with pytest.raises(ConfigError, match=r"text\.context_length: 2 leaves no room"):
        corpus_of_text(TextConfig(str(source), context_length=2), KINDS["bert"](), {}, 1000)


def test_what_a_document_begins_and_ends_with_is_not_put_there_twice():
    tokenizer = KINDS["bert"]()
    for layout, bos in (("one_per_row", "row"), ("packed", "document")):
        packer = Packer(8, layout, bos, tokenizer)
        packer.add(np.array([2, 10, 11, 12, 13, 14, 15, 3]), 0)
        assert packer.finish() is None
        assert packer.take(1)["tokens"].tolist() == [[2, 10, 11, 12, 13, 14, 15, 3]]


def test_context_is_read_as_the_tokens_it_is():
    ids = np.array([0, 5, 1000])
    rows = torch.from_numpy(np.append(context_only(ids), [PADDING, 3]))
    assert token_ids(rows).tolist() == [0, 5, 1000, PADDING, 3]
    assert (rows[:3] < PADDING).all()


def test_an_encoder_sees_a_text_as_it_was_trained_to_and_neither_its_padding_nor_its_ends_count(tmp_path):
    tokenizer = KINDS["bert"]()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    lm = LanguageModel(model, tokenizer, "bert", None, False)
    source = write(tmp_path / "a.jsonl", FIRST_TEXTS * 12)
    config = TextConfig(str(source), context_length=48, layout="one_per_row", held_out_share=0.2)
    rows = tokenize(config, tokenizer, {}).train
    tokens = rows.tokens(list(range(rows.n_rows)))
    with torch.no_grad():
        found = model(**model_inputs(lm, tokens)).last_hidden_state
        for row, seen, document in zip(tokens, found, rows.documents(list(range(rows.n_rows)))[:, 0], strict=True):
            whole = tokenizer(FIRST_TEXTS[int(document) % 3], return_tensors="pt")
            length = whole["input_ids"].shape[1]
            assert torch.equal(row[:length].long(), whole["input_ids"][0])
            torch.testing.assert_close(seen[:length], model(**whole).last_hidden_state[0])
    keep = token_mask(tokens, MaskSpec(tuple(special_ids(tokenizer)), 0))
    assert torch.equal(keep, ~torch.isin(tokens, torch.tensor([PADDING, 2, 3])))


def test_evidence_is_of_such_rows_and_shows_the_text_alone(tmp_path):
    tokenizer = KINDS["bert"]()
    texts = [f"text number {number} " + "xyz "[number % 3 :] * (number % 29 + 9) for number in range(60)]
    source = write(tmp_path / "a.jsonl", texts)
    rows = corpus_of_text(TextConfig(str(source), context_length=32), tokenizer, {}, 10**6)
    for row in range(rows.n_rows):
        length, tokens = int(rows.length[row]), rows.tokens([row])[0]
        assert tokens[0] == tokenizer.cls_token_id
        assert tokens[length:].tolist() == [tokenizer.sep_token_id]
        shown = rows.span(row * 32 + rows.first, length - rows.first)
        assert not set(shown) & special_ids(tokenizer)
    together = rows.tokens([0, 1])
    assert ((together == tokenizer.sep_token_id).sum(1) == 1).all()


def test_a_tokenizer_that_adds_nothing_and_has_nothing_makes_rows_of_text_alone():
    assert added(tiny_tokenizer(bos=False, eos=False, pad=False)) == ([], [])
