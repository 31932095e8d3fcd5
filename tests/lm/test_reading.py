"""A row that is read on: with the cache as without, of models that keep nothing too, one row beside another."""

import logging

import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.tiny_lms import tiny_lm as tiny_model
from torch import nn

from sae.lm import reading
from sae.lm.models import LanguageModel
from sae.lm.reading import Row, cache_of

ROW = [5, 40, 41, 42, 50, 61, 62, 70, 71, 45, 80, 33]


def model_of(kind, **options):
    return LanguageModel(tiny_model(kind, **options).double(), tiny_lm().tokenizer, kind, None, True)


def test_logits_are_those_of_the_model_at_the_last_tokens():
    lm = tiny_lm()
    with torch.no_grad():
        whole = lm.model(torch.tensor([ROW])).logits[0]
    for keeps in (True, False):
        assert torch.allclose(Row(lm, keeps=keeps).read(ROW, 5), whole[-5:], atol=1e-5)
    row = Row(lm)
    parts = [row.read(ROW[:4], 4), row.read(ROW[4:7], 3), row.read(ROW[7:8]), row.read(ROW[8:], 4)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)
    assert not lm.model.get_output_embeddings()._forward_pre_hooks


def test_a_window_that_slides_over_what_is_kept_gives_the_same():
    lm = model_of("mistral", sliding_window=4)
    row = Row(lm)
    steps = torch.cat([row.read(ROW[:6], 6), *(row.read([token]) for token in ROW[6:])])
    assert torch.allclose(steps, Row(lm, keeps=False).read(ROW, len(ROW)), atol=1e-5, rtol=1e-4)


class Forgetful(nn.Module):
    """A model whose cache is not what it says, or that has none."""

    def __init__(self, model, wrong):
        super().__init__()
        self.inner, self.config, self.wrong = model, model.config, wrong
        self.get_output_embeddings, self.get_input_embeddings = model.get_output_embeddings, model.get_input_embeddings

    def forward(self, input_ids, use_cache=False, past_key_values=None, **_):
        found = self.inner(input_ids=input_ids, use_cache=False)
        if self.wrong and use_cache:
            found["past_key_values"] = (1,)
        return found


@pytest.mark.parametrize("wrong", [False, True])
def test_what_cannot_go_on_reads_all_of_it_again_and_says_so(wrong, caplog):
    plain = model_of("llama")
    lm = LanguageModel(Forgetful(plain.model, wrong), plain.tokenizer, "forgetful", None, True)
    with caplog.at_level(logging.WARNING):
        assert cache_of(lm) == ""
        assert cache_of(lm) == ""
    told = [record.message for record in caplog.records if record.name == reading.__name__]
    assert told == ["forgetful cannot go on from what it has read; every token reads the whole row again"]
    starts = []

    def during(tokens, start):
        starts.append((tokens.shape[1], start))
        return reading.nullcontext()

    row = Row(lm, during)
    steps = torch.cat([row.read(ROW[:4], 4), *(row.read([token]) for token in ROW[4:])])
    assert torch.equal(steps[-1:], Row(plain, keeps=False).read(ROW))
    assert starts == [(n, 0) for n in range(4, len(ROW) + 1)]


def test_rows_know_nothing_of_each_other():
    lm = tiny_lm()
    wanted = []
    for tokens in (ROW, ROW[::-1]):
        row = Row(lm)
        wanted.append(torch.cat([row.read([token]) for token in tokens]))
    one, other = Row(lm), Row(lm)
    found = [(one.read([a]), other.read([b])) for a, b in zip(ROW, ROW[::-1], strict=True)]
    for mine, theirs in zip(wanted, zip(*found, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(theirs))


def test_what_fails_leaves_nothing_open():
    lm = tiny_lm()

    class Broken(Exception):
        pass

    def during(tokens, start):
        raise Broken

    with pytest.raises(Broken):
        Row(lm, during).read(ROW)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.model.modules())
