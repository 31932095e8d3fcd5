"""The shapes of the models that there are recipes for, as their config.json has them: what a dry run needs of one."""

from pathlib import Path

from transformers import CONFIG_MAPPING

GEMMA = {"head_dim": 256, "num_key_value_heads": 1, "num_attention_heads": 4, "vocab_size": 262_144}
GPT2 = {"vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_head": 12}
PYTHIA = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072}
QWEN = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936, "max_position_embeddings": 32_768}
SMOLLM = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152, "max_position_embeddings": 8192}


def _sized(hidden: int, layers: int, inner: int, tied: bool = True) -> dict:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner}
    return {**sizes, "tie_word_embeddings": tied}


CONFIGS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", _sized(576, 30, 1536) | SMOLLM),
    "openai-community/gpt2": ("gpt2", GPT2 | {"n_layer": 12}),
    "EleutherAI/pythia-160m-deduped": ("gpt_neox", PYTHIA | {"vocab_size": 50_304, "max_position_embeddings": 2048}),
    "google/gemma-2-2b": (
        "gemma2",
        _sized(2304, 26, 9216) | {"vocab_size": 256_000, "num_key_value_heads": 4, "num_attention_heads": 8},
    ),
    "google/gemma-3-270m": ("gemma3_text", _sized(640, 18, 2048) | GEMMA),
    "google/gemma-3-1b-pt": ("gemma3_text", _sized(1152, 26, 6912) | GEMMA),
    "meta-llama/Llama-3.1-8B": ("llama", _sized(4096, 32, 14_336, tied=False) | LLAMA),
    "meta-llama/Llama-3.2-1B": ("llama", _sized(2048, 16, 8192) | LLAMA),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", _sized(2048, 28, 6144) | QWEN | {"num_attention_heads": 16}),
    "Qwen/Qwen3-8B-Base": ("qwen3", _sized(4096, 36, 12_288, tied=False) | QWEN | {"num_attention_heads": 32}),
}


def model_folder(name: str, folder: Path) -> str:
    """Returns a folder that holds the config of a model on the hub, and no weights; a second one is like the first."""
    kind, settings = CONFIGS[name]
    CONFIG_MAPPING[kind](**settings).save_pretrained(folder)
    return str(folder)
