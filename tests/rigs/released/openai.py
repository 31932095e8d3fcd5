"""OpenAI's coders of GPT-2 small, as they were released."""

import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, top

K = 4


def write(root, path="resid_post_mlp_v5_32k/autoencoders/6.pt", activation="TopK", **more):
    draw = Draw()
    tensors = {
        "pre_bias": torch.from_numpy(draw(D_IN)),
        "encoder.weight": torch.from_numpy(draw(D_SAE, D_IN)),
        "latent_bias": torch.from_numpy(draw(D_SAE)),
        "decoder.weight": torch.from_numpy(draw(D_IN, D_SAE)),
    }
    said = {"activation": activation, "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    if activation != "TopK":
        said = {"activation": activation, "activation_state_dict": {}} if activation else {}
    statistics = {
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **statistics, **said, **more}, root / path)
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return root / path, lambda x: reference(x, arrays, activation)


def reference(x, t, activation):
    mean, std = 0, 1
    if activation == "TopK":
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        x = (x - mean) / (std + 1e-5)
    h = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    acts, margin = top(h, K) if activation == "TopK" else (h, abs(h).min(1))
    acts = relu(acts)
    return acts, (acts @ t["decoder.weight"].T + t["pre_bias"]) * std + mean, margin
