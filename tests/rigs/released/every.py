"""Coders of every format as they are released: {"format kind": what writes one below a folder}."""

from collections.abc import Callable
from pathlib import Path

import torch
from rigs.hub_coders import native
from rigs.released import (
    circuit_tracer,
    cross_layer_transcoder,
    crosscoder_diff,
    dictionary_learning,
    dunefsky,
    e2e_sae,
    gemma_scope,
    gemma_scope_2,
    kissane,
    linear_pair,
    llama_scope,
    openai,
    openmoss,
    qwen_scope,
    saelens,
    sparsify,
)
from safetensors.torch import save_file

from sae.formats.sparsify import write as write_for_sparsify

PATH = "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"


def temporal(root: Path) -> None:
    tensors = {"D": torch.randn(20, 6), "b": torch.randn(1, 6), "attn_layers.0.q.weight": torch.randn(4, 4)}
    root.mkdir(exist_ok=True)
    save_file(tensors, root / "latest_ckpt.safetensors")
    (root / "conf.yaml").write_text("layer: 12\n")


EVERY: dict[str, Callable[[Path], object]] = {
    "native": lambda root: native(root / "x"),
    "saelens": lambda root: saelens.saved(root, saelens.config6("jumprelu"), saelens.drawn("jumprelu")),
    "saelens old": lambda root: saelens.saved(root, saelens.config3(), saelens.drawn("standard")),
    "sparsify": sparsify.release,
    "sparsify transcoder": lambda root: sparsify.release(root, "layers.1.mlp", config=sparsify.SKIP),
    "sparsify old": lambda root: sparsify.release(root, old=("activation", "transcode"), config={"signed": True}),
    "sparsify written": lambda root: write_for_sparsify(root / "x", sparsify.coder()),
    **{
        f"dictionary_learning {kind}": lambda root, kind=kind: dictionary_learning.write(root, kind)
        for kind in dictionary_learning.SHAPES
    },
    "circuit_tracer": circuit_tracer.write,
    "circuit_tracer jumprelu": lambda root: circuit_tracer.write(root, "jumprelu", config=None, skip=True),
    "circuit_tracer turned": lambda root: circuit_tracer.write(root, turned=True),
    "cross_layer_transcoder": cross_layer_transcoder.write,
    "cross_layer_transcoder relu": lambda root: cross_layer_transcoder.write(root, jumps=False, skip=True, config=""),
    "gemma_scope": lambda root: gemma_scope.write(root, PATH),
    "gemma_scope_2": lambda root: gemma_scope_2.write(root, "resid_post/layer_17_width_16k_l0_big"),
    "gemma_scope_2 transcoder": lambda root: gemma_scope_2.write(
        root, "x", gemma_scope_2.config_of(17, "transcoder"), affine=True
    ),
    "gemma_scope_2 clt": lambda root: gemma_scope_2.write_layers(root, "clt/width_262k_l0_big_affine", affine=True),
    "gemma_scope_2 crosscoder": lambda root: gemma_scope_2.write_layers(
        root, "crosscoder/layer_1_2_3_width_65k_l0_big"
    ),
    "llama_scope": llama_scope.release,
    "llama_scope pruned": lambda root: llama_scope.release(root, llama_scope.TRANSCODER, file="pruned"),
    "openmoss": openmoss.release,
    "openmoss linear": lambda root: openmoss.release(root, linear=True, sae_type="left out"),
    "openmoss transcoder": lambda root: openmoss.release(root, openmoss.TRANSCODER),
    "openmoss crosscoder": lambda root: openmoss.release(root, openmoss.CROSSCODER, act_fn="relu"),
    "openmoss clt": lambda root: openmoss.release(root, openmoss.CLT),
    "openmoss lorsa": lambda root: openmoss.release(root, sae_type="lorsa"),
    "openai": openai.write,
    "openai relu": lambda root: openai.write(root, "mlp_post_act/autoencoders/2.pt", "ReLU"),
    "linear_pair": linear_pair.write,
    "linear_pair qresearch": lambda root: linear_pair.write(root, "X-SAE-l19.pt", linear_pair.QRESEARCH),
    "qwen_scope": qwen_scope.write,
    "kissane": kissane.write,
    "dunefsky": dunefsky.write,
    "dunefsky gz": lambda root: dunefsky.write(root, ".pkl.gz"),
    "dunefsky autoencoder": lambda root: dunefsky.write(root, is_transcoder=False),
    "e2e_sae": e2e_sae.write,
    "crosscoder_diff": crosscoder_diff.write,
    "crosscoder_diff hub": lambda root: crosscoder_diff.write(root, ("cc_weights.pt", "cfg.json")),
    "temporal": temporal,
}
