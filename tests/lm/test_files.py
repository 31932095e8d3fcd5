"""A .gguf file is a model like any other: read once, dequantized, cached by its content."""

import gguf
import pytest
import torch
from rigs.fakes import tiny_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sae.base.errors import ConfigError
from sae.lm.files import load_config, loading_bars
from sae.lm.models import load_language_model

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder, path, gone=""):
    """Writes a saved Llama as llama.cpp would: its names, and query and key rows in its rotary order.

    Without the tensor `gone`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_scores([0.0] * len(words))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{name}" for name, short in NAMES.items()}
    state = model.state_dict()
    for short, name in tensors.items():
        weight = state[f"{name}.weight"].float()
        if name.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if short != gone:
            writer.add_tensor(f"{short}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_it_computes_what_the_original_does_and_is_converted_once(tmp_path, monkeypatch):
    path = tmp_path / "tiny model.gguf"
    original = write_gguf(tiny_model_folder(tmp_path / "original"), path)
    assert load_config(str(path)).hidden_size == 16
    assert not (tmp_path / "cache" / "models").exists(), "reading the header converts nothing"
    loaded = load_language_model(str(path))
    tokens = torch.randint(3, 100, (2, 9))
    torch.testing.assert_close(loaded.model(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-5)
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    load_language_model(str(path))
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_a_file_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not one at all" * 10)
    with pytest.raises(ConfigError, match=r"model\.name: .*broken\.gguf"):
        load_language_model(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        load_language_model(str(tmp_path / "absent.gguf"))


def test_a_tensor_that_the_file_lacks_is_named_and_nothing_is_kept(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_folder(tmp_path / "original"), path, gone="blk.1.ffn_up")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"^model\.name: .*tiny\.gguf' lack tensors, .*layers\.1\.mlp\.up_proj\.weight$"
        ):
            load_language_model(str(path))


@pytest.mark.parametrize(("seen", "wanted", "shown"), [(True, True, True), (True, False, False), (False, True, False)])
def test_loaders_show_bars_where_they_are_seen_and_wanted(monkeypatch, seen, wanted, shown):
    monkeypatch.setattr("sae.lm.files.watched", lambda: seen)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    with loading_bars(wanted), loading_bars():
        assert transformers_logging.is_progress_bar_enabled() == shown
    assert transformers_logging.is_progress_bar_enabled()
