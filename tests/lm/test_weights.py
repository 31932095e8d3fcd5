"""A model is read with its head where it has one, asked what it is, and refused where its files are not whole."""

import json
import logging

import pytest
import torch
from rigs.fakes import Rows, tiny_model_folder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import evaluate
from sae.lm.hooks import capture
from sae.lm.models import load_language_model
from sae.lm.site import Site
from sae.lm.sites import resolve_sites
from sae.selection.topk import TopK
from sae.text.packing import PADDING

TOKENIZER = tiny_tokenizer()
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": len(TOKENIZER), "num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 28, "patch_size": 14}
BERT = {**SIZES, "vocab_size": len(TOKENIZER), "max_position_embeddings": 64}


def saved(folder, model, **changes):
    """Saves a random model with a tokenizer; `changes` go into its config, None takes an entry out."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(folder)


def without(folder, *names):
    """Takes tensors out of a saved model."""
    path = f"{folder}/model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k not in names}, path, {"format": "pt"})
    return folder


def llava():
    vision = {**VISION, **IMAGE, "model_type": "clip_vision_model", "projection_dim": 16}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config={**TEXT, "model_type": "llama"}, image_token_id=5)
    )


def mistral_3():
    vision = {**VISION, **IMAGE, "model_type": "pixtral", "head_dim": 8}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=vision, text_config={**TEXT, "model_type": "mistral"}, image_token_id=5)
    )


def qwen_2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids)
    )


def two_directions(architecture):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return architecture(Gemma3TextConfig(**TEXT, **ids, use_bidirectional_attention=True))


@pytest.mark.parametrize("make", [llava, mistral_3, qwen_2_5_vl])
def test_a_model_of_images_and_text_predicts_the_next_token_of_text(tmp_path, make):
    lm = load_language_model(saved(tmp_path / "m", make()))
    assert lm.is_causal
    (site,) = resolve_sites(lm.model, ["model.language_model.layers.1"])
    for written in ("model.layers.1", "language_model.model.layers.1", "language_model.layers.1", "layers.1"):
        assert resolve_sites(lm.model, [written]) == [site], "whichever way a checkpoint wraps them"
    assert len(resolve_sites(lm.model, ["model.layers.*.mlp"])) == 2
    coder = SparseCoder(CoderSpec(16, 16, 32, TopK(4), (site,), (site,)))
    loss = evaluate(coder, lm, Rows(torch.randint(9, 200, (2, 16))))["loss"]
    assert loss["ce_clean"] > 0
    assert loss["kl_zero"] > 0


@pytest.mark.parametrize("architectures", [None, ["BertModel"], ["BertLMHeadModel"]])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertLMHeadModel])
def test_a_bert_is_an_encoder_whatever_its_config_calls_it_and_does_not_read_padding(tmp_path, kind, architectures):
    lm = load_language_model(saved(tmp_path / "m", kind(BertConfig(**BERT)), architectures=architectures))
    assert not lm.is_causal
    tokens = torch.randint(3, 200, (1, 9))
    padded = torch.cat([tokens, torch.full((1, 4), PADDING)], dim=1)
    (site,) = resolve_sites(lm.model, ["encoder.layer.1"])
    assert resolve_sites(lm.model, ["bert.encoder.layer.1"]) == [site]
    found = capture(lm, [site], padded)[site.name][:, :9]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "m")(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


DECODER = BertConfig(**BERT, is_decoder=True)
LLAMA = LlamaConfig(**TEXT)
TIED = GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2, n_positions=64)
MAMBA = JambaConfig(
    **{**SIZES, "vocab_size": len(TOKENIZER)},
    attn_layer_offset=5,
    num_experts=2,
    use_mamba_kernels=False,
    mamba_d_state=4,
)
XLNET = XLNetConfig(vocab_size=len(TOKENIZER), d_model=16, n_layer=2, n_head=2, d_inner=32)


@pytest.mark.parametrize(
    ("make", "changes", "kind", "causal"),
    [
        (lambda: LlamaForCausalLM(LLAMA), {"architectures": None}, "LlamaForCausalLM", True),
        (lambda: LlamaModel(LLAMA), {}, "LlamaModel", False),  # its files hold no head
        (lambda: LlamaModel(LLAMA), {"architectures": None}, "LlamaModel", False),
        (lambda: GPT2Model(TIED), {}, "GPT2LMHeadModel", True),  # whose head are its embeddings
        (lambda: BertLMHeadModel(DECODER), {}, "BertLMHeadModel", True),
        (lambda: BertLMHeadModel(DECODER), {"architectures": ["BertForMaskedLM"]}, "BertLMHeadModel", True),
        (lambda: XLNetLMHeadModel(XLNET), {}, "XLNetLMHeadModel", False),
        (lambda: JambaForCausalLM(MAMBA), {}, "JambaForCausalLM", True),  # without attention there is no cache to ask
        (lambda: two_directions(Gemma3ForCausalLM), {}, "Gemma3ForCausalLM", False),
        (lambda: two_directions(Gemma3ForCausalLM), {"architectures": ["Gemma3TextModel"]}, "Gemma3TextModel", False),
    ],
)
def test_what_a_model_does_decides_and_not_its_name(tmp_path, caplog, make, changes, kind, causal):
    with caplog.at_level(logging.INFO):
        lm = load_language_model(saved(tmp_path / "m", make(), **changes))
    assert (type(lm.model).__name__, lm.is_causal) == (kind, causal)
    (line,) = [line for line in caplog.messages if line.startswith("model: ") and f"({kind})" in line]
    assert ("predicts the next token" in line) == causal


@pytest.mark.parametrize("rows", ["equal", "nearly equal", "zero"])
def test_an_encoder_is_known_by_tokens_that_differ_where_its_vocabulary_was_padded(tmp_path, rows):
    model = BertForMaskedLM(BertConfig(**BERT))
    model.resize_token_embeddings(3 * len(TOKENIZER), mean_resizing=rows == "nearly equal")
    added = model.get_input_embeddings().weight.data[len(TOKENIZER) :]
    if rows != "nearly equal":
        added[:] = added[0].clone() if rows == "equal" else 0
    lm = load_language_model(saved(tmp_path / "m", model))
    assert (type(lm.model).__name__, lm.is_causal) == ("BertModel", False)


def test_a_model_of_one_embedding_for_all_tokens_is_refused(tmp_path):
    model = LlamaForCausalLM(LLAMA)
    model.get_input_embeddings().weight.data[:] = 1
    with pytest.raises(ConfigError, match=r"^model\.name: .*embeddings of all tokens are alike"):
        load_language_model(saved(tmp_path / "m", model))


def test_the_encoder_of_an_encoder_and_a_decoder_is_read_and_its_decoder_refused(tmp_path):
    config = T5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    lm, tokens = load_language_model(saved(tmp_path / "m", T5ForConditionalGeneration(config))), torch.ones(1, 4)
    assert not lm.is_causal
    assert capture(lm, [Site("encoder.block.1.layer.1")], tokens.long())["encoder.block.1.layer.1"].shape == (1, 4, 16)
    with pytest.raises(ConfigError, match=r"decoder\.block\.1 never ran .*encoder and decoder \(model\.name\)"):
        capture(lm, [Site("decoder.block.1")], tokens.long())
    alone = T5EncoderModel(config)
    lm = load_language_model(saved(tmp_path / "alone", alone))
    assert type(lm.model) is T5EncoderModel
    site = Site("encoder.block.1")
    with torch.no_grad():
        alone.eval().encoder.block[1].register_forward_hook(lambda _, given, made: expected.append(made[0]))
        expected: list[torch.Tensor] = []
        alone(tokens.long())
    torch.testing.assert_close(capture(lm, [site], tokens.long())[site.name], expected[0])


def test_positions_that_a_class_computes_are_in_no_file_and_not_missing(tmp_path):
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0}
    config = MarianConfig(vocab_size=len(TOKENIZER), d_model=16, **layers, **ids, max_position_embeddings=64)
    folder = saved(tmp_path / "m", MarianMTModel(config))
    assert "model.encoder.embed_positions.weight" not in load_file(f"{folder}/model.safetensors")
    one, other = (load_language_model(folder).model.encoder.embed_positions.weight for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one, MarianMTModel(config).model.encoder.embed_positions.weight)


def test_a_model_that_needs_more_than_text_is_one_line(tmp_path):
    folder = saved(tmp_path / "m", ViTModel(ViTConfig(**SIZES, **IMAGE)))
    with pytest.raises(ConfigError, match=r"^model\.name: '.*' \(ViTModel\) could not read a few tokens of text: "):
        load_language_model(folder)
    decoder = {"is_decoder": True, "add_cross_attention": True}
    two = {"encoder": {**BERT, "model_type": "bert"}, "decoder": {**BERT, **decoder, "model_type": "bert"}}
    folder = saved(tmp_path / "n", EncoderDecoderModel(EncoderDecoderConfig(**two)))
    with pytest.raises(ConfigError, match=r"^model\.name: transformers has no class .* of type 'encoder-decoder'$"):
        load_language_model(folder)


@pytest.mark.parametrize(
    ("make", "gone"),
    [
        (lambda: LlamaForCausalLM(LLAMA), "model.layers.1.mlp.up_proj.weight"),
        (lambda: LlamaForCausalLM(LLAMA), "lm_head.weight"),
        (lambda: LlamaForCausalLM(LLAMA), "model.norm.weight"),
        (lambda: BertModel(BertConfig(**BERT)), "encoder.layer.0.output.dense.bias"),
        (lambda: MixtralForCausalLM(MixtralConfig(**TEXT)), "model.layers.1.mlp.gate.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path, make, gone):
    folder = saved(tmp_path / "m", make())
    without(folder, gone, gone.replace("mlp.gate", "block_sparse_moe.gate"))
    with pytest.raises(ConfigError, match=rf"^model\.name: the files of .* lack tensors, .*: {gone}$"):
        load_language_model(folder)


def test_what_only_chooses_an_expert_is_missed_though_no_gradient_leads_to_it(tmp_path):
    sizes = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 0}
    folder = saved(tmp_path / "m", Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**TEXT, **sizes)))
    load_language_model(folder)
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    assert bias in load_file(f"{folder}/model.safetensors")
    with pytest.raises(ConfigError, match=r"lack tensors, .*: model\.layers\.1\.mlp\S+\.e_score_correction_bias$"):
        load_language_model(without(folder, bias))


def test_what_nothing_depends_on_may_be_missing_and_two_loads_are_equal(tmp_path):
    bert = without(saved(tmp_path / "b", BertModel(BertConfig(**BERT))), "pooler.dense.weight", "pooler.dense.bias")
    qwen = qwen_2_5_vl()
    eyes = [name for name in qwen.state_dict() if "visual" in name]
    folder = saved(tmp_path / "q", qwen)
    without(folder, *eyes, *(name.removeprefix("model.") for name in eyes))
    tokens = torch.randint(9, 200, (1, 6))
    for name in (bert, folder):
        one, other = (load_language_model(name).model(tokens)[0] for _ in range(2))
        assert torch.equal(one, other)


def test_other_shapes_and_tensors_too_many_are_told(tmp_path, caplog):
    folder = saved(tmp_path / "m", LlamaForCausalLM(LLAMA), intermediate_size=48)
    with pytest.raises(ConfigError, match=r"other shapes .*down_proj\.weight \[16, 32\], not \[16, 48\].* and 2 more$"):
        load_language_model(folder)
    folder = saved(tmp_path / "n", LlamaForCausalLM(LLAMA))
    path = f"{folder}/model.safetensors"
    save_file({**load_file(path), "extra.weight": torch.ones(2)}, path, {"format": "pt"})
    with caplog.at_level(logging.INFO):
        load_language_model(folder)
    assert "model: LlamaForCausalLM does not use extra.weight" in caplog.messages
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("fault", ["truncated", "shard", "nan"])
def test_damaged_weights_are_one_line(tmp_path, fault):
    folder = tiny_model_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "nan":
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"][:] = torch.nan
        save_file(tensors, path, {"format": "pt"})
    else:
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
        path.unlink()
        sorted(folder.glob("model-0*"))[1].unlink()
    why = {"truncated": "could not be loaded", "shard": "model-00002", "nan": "NaN"}[fault]
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{why}"):
        load_language_model(str(folder))


def test_an_adapter_is_no_model_even_beside_one(tmp_path):
    folder = tiny_model_folder(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model\.name: the folder .* holds an adapter; merge it into its model"):
        load_language_model(str(folder))
