"""How long rows may be is asked of the model, and told in one line before anything long."""

import logging
from pathlib import Path

import pytest
import torch
from rigs.fakes import tiny_config, tiny_model_folder, tiny_text_folder, tiny_tokenizer
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTJConfig,
    LEDConfig,
    LlamaConfig,
    LongformerConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from sae.base.errors import ConfigError
from sae.lm.generation import generate
from sae.lm.models import LanguageModel, load_language_model
from sae.lm.probing import _last_reaches_others, nature_of, positions_of
from sae.training.estimate import estimate
from sae.training.run import train

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
TABLES = {
    "gpt2": (AutoModelForCausalLM, GPT2Config(**GPT), 40),
    "gptj": (AutoModelForCausalLM, GPTJConfig(**GPT, rotary_dim=4), 40),
    "opt": (
        AutoModelForCausalLM,
        OPTConfig(**{**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}, max_position_embeddings=40),
        40,
    ),
    "bert": (AutoModel, BertConfig(**SIZES, max_position_embeddings=40), 40),
    "roberta": (AutoModel, RobertaConfig(**SIZES, max_position_embeddings=42), 40),
    "longformer": (AutoModel, LongformerConfig(**SIZES, max_position_embeddings=42, attention_window=16), 40),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, max_position_embeddings=40), None),
    "t5": (AutoModel, T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), None),
    "xlnet": (AutoModel, XLNetConfig(vocab_size=300, d_model=16, n_layer=2, n_head=2, d_inner=32), None),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_longest_row_is_what_the_model_can_run(name):
    auto, config, longest = TABLES[name]
    model = auto.from_config(config).eval()
    assert nature_of(model).positions == positions_of(model) == longest
    if longest:
        model(torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "mixtral"])
def test_coarse_numbers_hide_no_look_ahead(name, dtype):
    torch.manual_seed(0)  # fresh weights look ahead by less than bfloat16 rounds
    auto, config, _ = TABLES.get(name) or (
        AutoModelForCausalLM,
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        None,
    )
    model = auto.from_config(config).to(dtype).eval()
    looks_ahead = name in ("bert", "roberta")
    assert nature_of(model).looks_ahead == looks_ahead
    assert _last_reaches_others(model, torch.tensor([[5, 9, 7, 8]])) == looks_ahead
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_longest_row_of_an_encoder_is_known_where_the_model_pads_and_tried_with_tokens_that_count():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 16}
    led = AutoModel.from_config(
        LEDConfig(vocab_size=300, d_model=16, **sizes, **heads, max_encoder_position_embeddings=48)
    )
    assert nature_of(led.eval()).positions == 48
    roberta = AutoModel.from_config(RobertaConfig(**SIZES, max_position_embeddings=42, pad_token_id=0)).eval()
    lm = LanguageModel(roberta, tiny_tokenizer(), "roberta", None, is_causal=False)  # whose table was not found
    with pytest.raises(ConfigError, match=r"text\.context_length: 48 is more than roberta has positions for"):
        lm.check_context(48)


def test_it_is_known_of_a_model_without_weights():
    with FakeTensorMode():
        assert positions_of(AutoModelForCausalLM.from_config(GPT2Config(**GPT))) == 40
        assert positions_of(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))) is None


def gpt2_folder(path, **options):
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(**{**GPT, "vocab_size": len(tokenizer), **ids, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_rows_longer_than_the_table_are_refused_before_any_text_is_read(tmp_path):
    name = gpt2_folder(tmp_path / "m")
    lm = load_language_model(name)
    lm.check_context(40)
    refusal = r"^text\.context_length: 64 is more than .* has positions for; at most 40 are allowed$"
    with pytest.raises(ConfigError, match=refusal):
        lm.check_context(64)
    changes = {"text.context_length": 64, "activations.sites": ["transformer.h.1"], "run_dir": str(tmp_path / "run")}
    config = tiny_config(Path(name), tiny_text_folder(tmp_path / "text"), changes)
    with pytest.raises(ConfigError, match=refusal):
        estimate(config)
    with pytest.raises(ConfigError, match=refusal):
        train(config)
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_rows_longer_than_training_saw_are_tried_and_warned_of_and_none_are_written(tmp_path, caplog):
    lm = load_language_model(str(tiny_model_folder(tmp_path / "m")))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        lm.check_context(64)
        assert not caplog.messages
        lm.check_context(65)
    (line,) = caplog.messages
    assert line.startswith("text.context_length: 65 is more than")
    assert line.endswith("was trained on (64)")
    next(generate(lm, [5] * 63, new_tokens=1))
    with pytest.raises(ConfigError, match=r"new_tokens: 2 behind a prompt of 63 are more than .* \(64 in all\)"):
        next(generate(lm, [5] * 63, new_tokens=2))
    config = MptConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, max_seq_len=40)
    mpt = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer(), "mpt", None, True)
    mpt.check_context(40)
    with pytest.raises(ConfigError, match=r"text\.context_length: 48 is more than mpt has positions for; at most 40"):
        mpt.check_context(48)


def test_a_tokenizer_of_another_model_is_refused_and_tokens_that_no_text_holds_are_not(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.name: the model of .* 100 tokens, .* the id 258; they do not"):
        load_language_model(str(tiny_model_folder(tmp_path / "m", vocab_size=100)))
    more = tiny_tokenizer(additional_special_tokens=["<image>"])
    lm = load_language_model(str(tiny_model_folder(tmp_path / "n", more, vocab_size=len(more) - 1)))
    assert AutoConfig.from_pretrained(tmp_path / "n").vocab_size < len(lm.tokenizer)
