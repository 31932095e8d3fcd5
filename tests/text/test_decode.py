"""A window's text is that of its tokens together, and every token has its own part of it."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rigs.fakes import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae.assets import QUICKSTART_LM
from sae.text.decode import Decoder

PIECES = ["▁", "▁the", "▁a", "re", "▁re", "s", "a", "e", "h", "r", "t", "n", "b", "c", "▁▁", "é", "日"]


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2: a space at the start that decoding takes away again, and unknown characters in bytes."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {name: i for i, name in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *PIECES])}
    merges = [("▁", "a"), ("r", "e"), ("▁", "re"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def wordpiece_like() -> PreTrainedTokenizerFast:
    """As BERT: pieces of a word begin with ##, and words are joined by spaces."""
    words = ["[UNK]", "a", "the", "walk", "##ing", "##s", "token", "##ize", "b"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {
    "quickstart": cache(lambda: AutoTokenizer.from_pretrained(QUICKSTART_LM)),
    "bytes": cache(tiny_tokenizer),
    "sentencepiece": sentencepiece_like,
    "wordpiece": wordpiece_like,
    "words": cache(lambda: tiny_tokenizer(words=("a", "the", "walk", "s"))),
}
TEXT = st.text(max_size=40) | st.text(st.sampled_from("a é日🙂\u200d\ufffd\n\t ▁#e\u0301"), max_size=30)


def check(decoder: Decoder, tokens: list[int]) -> list[str]:
    text, bounds = decoder.window(tokens)
    assert text == decoder.text(tokens)
    assert len(bounds) == len(tokens) + 1
    assert bounds[0] == 0
    assert bounds[-1] == len(text)
    assert all(a <= b for a, b in pairwise(bounds))
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert "".join(pieces) == text
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(TEXT, st.integers(0, 12), st.integers(1, 32))
@example("naïve 日本語 🙂🙂 the end", 3, 9)
@example("\ufffd\ufffd a\ufffd", 0, 32)
def test_pieces_make_up_the_text(name, text, start, n):
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer.encode(text, add_special_tokens=False)[start : start + n]
    check(Decoder(tokenizer), tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=32))
def test_any_tokens_do(name, tokens):
    """Also such as no text gives: bytes that are no UTF-8, special tokens."""
    tokenizer = TOKENIZERS[name]()
    check(Decoder(tokenizer), [token % len(tokenizer) for token in tokens])


@pytest.mark.parametrize("name", ["quickstart", "bytes", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("abe hé日🙂"), min_size=1, max_size=20))
def test_the_last_token_of_a_character_owns_it(name, text):
    """Every prefix of tokens that ends with a whole character ends where that character does."""
    tokenizer = TOKENIZERS[name]()
    decoder = Decoder(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole, bounds = decoder.window(tokens)
    for i in range(1, len(tokens)):
        prefix = decoder.text(tokens[:i])
        if whole.startswith(prefix) and "\ufffd" not in prefix:
            assert bounds[i] == len(prefix)
        elif prefix.endswith("\ufffd"):
            assert bounds[i] == max(bounds[i - 1], len(prefix.rstrip("\ufffd")))


def test_characters_of_several_tokens():
    decoder = Decoder(tiny_tokenizer())
    tokens = decoder.tokenizer.encode("aé🙂b", add_special_tokens=False)
    assert check(decoder, tokens) == ["a", "", "é", "", "", "", "🙂", "b"]
    assert check(decoder, tokens[2:]) == ["\ufffd", "", "", "", "🙂", "b"]  # begun before the window
    assert check(decoder, tokens[:5]) == ["a", "", "é", "\ufffd", ""]  # ended behind it


def test_the_space_of_a_word_is_its_own():
    decoder = Decoder(sentencepiece_like())
    tokens = decoder.tokenizer.encode("a re a the res", add_special_tokens=False)
    pieces = check(decoder, tokens)
    assert pieces[:3] == ["a", " re", " a"]  # the first has none
    assert check(decoder, tokens[1:])[:2] == ["re", " a"]
    assert decoder.piece(tokens[1]) == " re"
    decoder = Decoder(wordpiece_like())
    assert check(decoder, decoder.tokenizer.encode("walking the tokens")) == ["walk", "ing", " the", " token", "s"]
    assert decoder.piece(decoder.tokenizer.convert_tokens_to_ids("##ing")) == "ing"


def test_spaces_and_line_breaks_stay():
    decoder = Decoder(AutoTokenizer.from_pretrained(QUICKSTART_LM))
    text = "  def f(x) :\n\n\treturn 'n't  , .'\n"
    tokens = decoder.tokenizer.encode(text, add_special_tokens=False)
    assert decoder.window(tokens)[0] == text


def test_whole_characters_are_decoded_once(monkeypatch):
    decoder = Decoder(AutoTokenizer.from_pretrained(QUICKSTART_LM))
    tokens = decoder.tokenizer.encode("Return the number of elements along the axis.", add_special_tokens=False)
    decoder.window(tokens)
    calls, plain = [], decoder.text
    monkeypatch.setattr(decoder, "text", lambda tokens: calls.append(1) or plain(tokens))
    decoder.window(tokens)
    assert len(calls) == 1


def test_no_tokens_are_no_text():
    assert Decoder(tiny_tokenizer()).window([]) == ("", (0,))
