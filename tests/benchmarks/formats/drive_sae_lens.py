"""sae-lens: every architecture it saves, what training leaves behind, and coders of ours."""

import json
import warnings

import torch
from common import D_IN, D_OUT, D_SAE, TOKENS, K, draw, randomize, run, store
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

warnings.simplefilter("ignore")
RESIDUAL, WEIGHTS, HEADS = "blocks.1.hook_resid_post", "sae_weights.safetensors", 3
WRITTEN = [f"blocks.1.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")]
UNCHANGED = [f"blocks.1.{name}" for name in ("ln1.hook_normalized", "ln2.hook_normalized", "mlp.hook_post")]
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
INFERENCE = {
    "standard": ("standard", {}),
    "standard, no pre-bias": ("standard", {"apply_b_dec_to_input": False}),
    "standard, layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard, constant_norm_rescale": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "gated": ("gated", {}),
    "topk": ("topk", {"k": K}),
    "topk, most latents": ("topk", {"k": D_SAE * 2 // 3}),  # of which some are not positive
    "topk, rescaled by decoder norm": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": K}),
    "abstopk, rescaled by decoder norm": ("abstopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 6}),
    "matching_pursuit, no pre-bias": ("matching_pursuit", {"residual_threshold": 0.5, "apply_b_dec_to_input": False}),
    **{
        name if kind == "none" else f"{name}, {kind}": (
            name,
            {"d_out": D_OUT, "apply_b_dec_to_input": False, "normalize_activations": kind},
        )
        for name in TRANSCODERS
        for kind in ("none", "layer_norm", "constant_norm_rescale")
    },
}
OLD = {  # what versions 1 to 5 said otherwise
    "version 5": {"architecture": "standard", "activation_fn": "relu", "apply_b_dec_to_input": False},
    "version 5, gated": {"architecture": "gated", "activation_fn": "relu"},
    "version 5, jumprelu": {"architecture": "jumprelu", "activation_fn": "relu", "apply_b_dec_to_input": False},
    "version 5, topk": {"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
    "version 3, topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "none"},
    "version 3, layer_norm": {"activation_fn_str": "relu", "normalize_activations": "layer_norm"},
    "version 1, hook_point": {"normalize_activations": False},
}
TRAINING = {
    "standard": {},
    "gated": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "jumprelu": {},
    "batchtopk": {"k": 6.5},
    "matryoshka_batchtopk": {"k": 6.5, "matryoshka_widths": [10, D_SAE]},
    "matching_pursuit": {},
}


def coder_of(classes, options, hook=RESIDUAL, d_in=D_IN, d_sae=D_SAE, **metadata):
    """A random coder of a class."""
    kind, config = classes
    written = {"hook_name_out": "blocks.1.hook_mlp_out"} if "d_out" in options else {}
    about = SAEMetadata(model_name="gpt2-small", hook_name=hook, **written, **metadata)
    return randomize(kind(config(d_in=d_in, d_sae=d_sae, metadata=about, **options)))


def make(folder):
    """Saves one coder of each kind with what it makes of activations."""
    x = 1.5 * draw(TOKENS, D_IN, seed=7)
    for name, (architecture, options) in INFERENCE.items():
        sae = coder_of(get_sae_class(architecture), options)
        sae.save_model(folder / name / "coder")
        store(folder / name, x, sae.encode(x), sae(x))
    for name, config in OLD.items():
        old(folder / name, config, x)
    heads(folder / "standard, hook_z")
    centered(folder / "standard, centered model")
    for architecture, options in TRAINING.items():
        trained(folder, architecture, options, x)
    temporal(folder / "temporal")


def old(folder, config, x):
    """A coder in an old layout, which SAELens 6 reads and does not write."""
    kind = config.get("architecture", "standard").replace("topk", "standard")
    sae = coder_of(get_sae_class(kind), {})
    (folder / "coder").mkdir(parents=True)
    ones = {"scaling_factor": torch.ones(D_SAE)} if "architecture" not in config else {}
    save_file({name: t.contiguous() for name, t in sae.state_dict().items()} | ones, folder / "coder" / WEIGHTS)
    hook = "hook_name" if "architecture" in config else "hook_point"
    about = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", hook: RESIDUAL}
    (folder / "coder" / "cfg.json").write_text(json.dumps({**about, "hook_head_index": None, **config}))
    sae = SAE.load_from_disk(folder / "coder")
    store(folder, x, sae.encode(x), sae(x))


def heads(folder):
    """A coder of heads, which SAELens is given apart and we side by side."""
    z = draw(TOKENS, HEADS, D_IN // HEADS, seed=8)
    sae = coder_of(get_sae_class("standard"), {"reshape_activations": "hook_z"}, "blocks.1.attn.hook_z")
    sae.save_model(folder / "coder")
    store(folder, z.flatten(1), sae.encode(z), sae(z).flatten(1))


def centered(folder):
    """A coder of a model whose writing weights TransformerLens centers; we read the model as it is."""
    config = {"n_layers": 2, "d_model": D_IN, "n_ctx": 16, "d_head": 8, "d_vocab": 60, "act_fn": "gelu", "seed": 0}
    config["dtype"] = torch.float64  # that the two differ in little else
    raw, processed = (HookedTransformer(HookedTransformerConfig(**config)) for _ in range(2))
    randomize(raw)
    for name, tensor in raw.state_dict().items():  # masks are no weights
        if name.endswith(("mask", "IGNORE")):
            tensor.copy_(processed.state_dict()[name])
    state = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    processed.load_and_process_state_dict(state, center_writing_weights=True)
    tokens = torch.randint(60, (32, 16), generator=torch.Generator().manual_seed(0))
    seen, given = (model.run_with_cache(tokens)[1] for model in (raw, processed))
    for hook in WRITTEN:  # what our reader takes for granted
        mean = seen[hook].mean(-1, keepdim=True)
        assert mean.abs().max() > 0.1, f"{hook}: there is nothing to center"
        torch.testing.assert_close(given[hook], seen[hook] - mean, rtol=0, atol=1e-5)
    for hook in UNCHANGED:
        torch.testing.assert_close(given[hook], seen[hook], rtol=0, atol=1e-5)
    x, theirs = (found[RESIDUAL].flatten(0, 1).float() for found in (seen, given))
    sae = coder_of(get_sae_class("standard"), {}, model_from_pretrained_kwargs={"center_writing_weights": True})
    sae.save_model(folder / "coder")
    store(folder, x, sae.encode(theirs), sae(theirs) + x.mean(1, keepdim=True))


def trained(folder, architecture, options, x):
    """What training saves: for inference, and, where inputs were scaled or whitened, on its way."""
    inference = SAE.load_from_disk
    for normalizes in ("none", "expected_average_only_in", "covariance_whitening"):
        if normalizes == "covariance_whitening" and architecture == "matching_pursuit":
            continue
        sae = coder_of(get_sae_training_class(architecture), {**options, "normalize_activations": normalizes})
        scaler = ActivationScaler()
        if normalizes == "expected_average_only_in":
            scaler.scaling_factor = 0.7
        elif normalizes == "covariance_whitening":
            matrix = torch.linalg.qr(draw(D_IN, D_IN, seed=9).double())[0] * torch.linspace(0.5, 1.5, D_IN).double()
            scaler.whitening = ActivationWhitening(draw(D_IN, seed=10).double(), matrix, torch.linalg.inv(matrix))
        place = folder / f"{architecture}, checkpoint, {normalizes}"
        sae.save_model(place / "coder")
        scaler.save(str(place / "coder" / "activation_scaler.json"))
        last = folder / f"{architecture}, trained, {normalizes}"
        saved = inference_of(sae, last / "scaled", "none")  # of inputs as they came to it in training
        y = scaler.scale(x)
        store(place, x, saved.encode(y), scaler.unscale(saved.decode(saved.encode(y))))
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            how = scaler.whitening
            sae.fold_activation_whitening(how.mean, how.matrix, how.inverse_matrix)
        sae.save_inference_model(last / "coder")
        final = inference(last / "coder")
        store(last, x, final.encode(x), final(x))


def inference_of(sae, folder, normalizes):
    """The inference coder that a coder in training would be saved as, of normalized inputs."""
    sae.save_inference_model(folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "normalize_activations": normalizes}))
    return SAE.load_from_disk(folder)


def temporal(folder):
    """A kind that looks at the context, which we refuse."""
    kind, config = get_sae_class("temporal")
    sae = kind(config(d_in=128, d_sae=256, n_heads=2, metadata=SAEMetadata(hook_name=RESIDUAL)))
    sae.save_model(folder / "coder")


def load(folder, x):
    """What SAELens makes of a coder of ours."""
    sae = SAE.load_from_disk(folder)
    if sae.cfg.reshape_activations == "hook_z":
        x = x.unflatten(1, (HEADS, -1))
    return sae.encode(x), sae(x).flatten(1)


if __name__ == "__main__":
    run(make, load)
