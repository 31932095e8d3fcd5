"""Temporal SAEs as their authors release them: told apart, and refused with the reason."""

import pytest
import torch
from rigs.format_files import D_IN, D_SAE
from safetensors.torch import save_file

import sae
from sae.base.errors import ConfigError


def test_a_temporal_coder_is_refused_with_the_reason(tmp_path):
    tensors = {"D": torch.randn(D_SAE, D_IN), "b": torch.randn(1, D_IN), "attn_layers.0.q.weight": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "latest_ckpt.safetensors")
    (tmp_path / "conf.yaml").write_text("layer: 12\n")
    with pytest.raises(ConfigError, match=r"latest_ckpt\.safetensors is a temporal SAE, whose codes depend"):
        sae.load(tmp_path)


def test_a_checkpoint_of_something_else_is_no_temporal_coder(tmp_path):
    save_file({"D": torch.randn(D_SAE, D_IN)}, tmp_path / "latest_ckpt.safetensors")
    with pytest.raises(ConfigError, match=r"is in no known format; it holds D \[20, 6\]"):
        sae.load(tmp_path)
