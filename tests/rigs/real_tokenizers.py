"""The tokenizers of well-known models as transformers makes them, with vocabularies of a few letters."""

import string
from collections.abc import Callable

from tokenizers import pre_tokenizers
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
    T5Tokenizer,
    XGLMTokenizer,
    XLMRobertaTokenizer,
    XLNetTokenizer,
)

LETTERS = [*string.ascii_lowercase, *string.digits, *"[]<>/|.,!? _"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE = "\u2581"


def _numbered(special: list[str], *others: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys([*special, *others]))}


def _scored(special: list[str]) -> list[tuple[str, float]]:
    return [*((token, 0.0) for token in special), *((letter, -2.0) for letter in [SPACE, *LETTERS])]


def _bert() -> PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(_numbered(special, *LETTERS, *(f"##{letter}" for letter in LETTERS)))


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bert": _bert,
    "albert": lambda: AlbertTokenizer(_scored(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"])),
    "roberta": lambda: RobertaTokenizer(_numbered(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], *BYTES), []),
    "xlm_roberta": lambda: XLMRobertaTokenizer(_scored(["<s>", "<pad>", "</s>", "<unk>"])),
    "t5": lambda: T5Tokenizer(_scored(["<pad>", "</s>", "<unk>"]), extra_ids=0),
    "xlnet": lambda: XLNetTokenizer(_scored(["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"])),
    "xglm": lambda: XGLMTokenizer(_scored(["<s>", "<pad>", "</s>", "<unk>"])),
    "llama": lambda: LlamaTokenizer(_numbered(["<unk>", "<s>", "</s>"], SPACE, *LETTERS), [], add_bos_token=True),
    "gpt2": lambda: GPT2Tokenizer(_numbered(["<|endoftext|>"], *BYTES), []),
    "gemma": lambda: GemmaTokenizer(
        _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], SPACE, *LETTERS), [], add_bos_token=True
    ),
}
