"""Whatever holds texts, chats or token ids is taken as what it says; anything else is refused in one line."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BatchEncoding

from sae.base.errors import ConfigError
from sae.text.given import as_document, as_documents

IDS = [5, 6, 7]
CHAT = [{"role": "user", "content": "abc"}]
ONE = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(5, 8),
    "array": np.array(IDS),
    "small integers": np.array(IDS, np.uint8),
    "objects": np.array(IDS, object),
    "numpy integers": [np.int64(5), np.int32(6), np.uint16(7)],
    "tensor": torch.tensor(IDS, dtype=torch.int32),
    "tensors of one number": list(torch.tensor(IDS)),
    "column": pd.Series(IDS),
    "batch of one": torch.tensor([IDS]),
    "list of one": [IDS],
    "tuple of one": (tuple(IDS),),
    "list of one array": [np.array(IDS)],
    "list of one tensor": [torch.tensor(IDS)],
    "tokenizer's": BatchEncoding({"input_ids": IDS}),
    "tokenizer's, padded": {"input_ids": torch.tensor([[0, *IDS]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
}


@pytest.mark.parametrize("way", ONE)
def test_token_ids_are_taken_from_all_that_holds_them(way):
    found = as_document("text", ONE[way])
    assert found == IDS
    assert all(type(token) is int for token in found)


def test_texts_and_chats_one_or_several():
    assert as_documents("text", "abc") == as_documents("text", np.array(["abc"])) == ["abc"]
    assert as_documents("text", ("abc", IDS, CHAT)) == ["abc", IDS, CHAT]
    assert as_documents("text", torch.tensor([IDS, IDS])) == [IDS, IDS]
    assert as_document("text", tuple(CHAT)) == as_document("text", CHAT[0]) == CHAT
    assert as_document("text", [{"from": "human", "value": "abc"}]) == CHAT


WRONG = {
    "1.0 was given": [1.0, 2.0],
    "True was given": [True, False],
    "5 was given": torch.tensor(5),
    "set was given": {1, 2},
    "None was given": None,
    "bytes was given": b"abc",
    "list was given; it takes one, not 2: a text, a chat": [IDS, IDS],
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_no_text_is_one_line(line):
    with pytest.raises(TypeError, match=f"^prompt: {line}[^\n]*token ids[^\n]*$"):
        as_document("prompt", WRONG[line])


def test_nothing_is_one_line():
    assert as_documents("prompt", []) == []
    with pytest.raises(ConfigError, match=re.escape("prompt: there are no tokens in torch.Tensor of shape [0]")):
        as_document("prompt", torch.zeros(0, dtype=torch.long))
