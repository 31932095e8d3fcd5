"""e2e_sae's coders, by hook in one file."""

import numpy as np
import torch
import yaml
from rigs.format_files import D_IN, D_SAE, Draw, relu

HOOK = "blocks.6.hook_resid_pre"


def write(folder, hooks=(HOOK,), model="gpt2-small", centered=True, **more):
    tensors, wanted = {}, {}
    for seed, hook in enumerate(hooks):
        draw, name = Draw(seed), hook.replace(".", "-")
        parts = [draw(D_SAE, D_IN), draw(D_SAE), draw(D_IN, D_SAE), draw(D_IN)]
        names = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
        tensors |= {f"{name}.{part}": torch.from_numpy(array) for part, array in zip(names, parts, strict=True)}
        arrays = [array.astype(np.float64) for array in parts]
        wanted[hook] = lambda x, arrays=arrays: reference(x, centered, *arrays)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **more}, folder / "samples_400000.pt")
    config = {"tlens_model_name": model, "tlens_model_path": None, "saes": {"sae_positions": list(hooks)}}
    data = {"dataset_name": "openwebtext", "n_ctx": 1024}
    (folder / "final_config.yaml").write_text(yaml.safe_dump({**config, "train_data": data}))
    return folder, wanted


def reference(x, centered, W_enc, b_enc, W_dec, b_dec):
    mean = x.mean(1, keepdims=True) if centered else 0
    h = (x - mean) @ W_enc.T + b_enc
    columns = W_dec / np.linalg.norm(W_dec, axis=0)
    return relu(h), relu(h) @ columns.T + b_dec + mean, np.abs(h).min(1)
