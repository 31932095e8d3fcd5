"""What the drivers share. It runs in every library's environment, so it imports torch and safetensors alone.

NAME/coder/              a coder, saved by the library or by us
NAME/x.safetensors       activations x [tokens, d_in]
NAME/theirs.safetensors  what the library makes of them: acts [tokens, d_sae], out [tokens, d_out]
NAME/about.json          "hints", what `sae.load` must be told beside the files; "folded", whether the library
                         divides decoders by their norms when it loads them
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, D_OUT, K, TOKENS = 24, 96, 20, 7, 512
WIDE = ("threshold", "topk_threshold")  # parameters that must be positive
LOGS = ("r_mag", "log_threshold")


def draw(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, seed=0):
    """Fills a coder's floating-point tensors: pre-activations of about 1, decoder rows of norms 0.5 to 1.5."""
    for number, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        last, drawn = name.rpartition(".")[2], draw(*tensor.shape, seed=100 * seed + number)
        if not tensor.is_floating_point():
            continue
        if last in WIDE:
            drawn = 0.2 + drawn.abs()
        elif last in LOGS:
            drawn = 0.3 * drawn
        elif tensor.ndim > 1:
            drawn = drawn / D_IN**0.5
            if "dec" in name and D_SAE in tensor.shape:
                size = [D_SAE if axis == tensor.shape.index(D_SAE) else 1 for axis in range(tensor.ndim)]
                drawn = drawn * (0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(seed))).view(size)
        tensor.data.copy_(drawn)
    return module


def store(folder, x, acts, out, folded=False, **hints):
    """Writes what a library makes of activations."""
    plain = {"x": x, "acts": acts, "out": out}
    plain = {name: tensor.detach().to_dense().float().contiguous() for name, tensor in plain.items()}
    save_file({"x": plain.pop("x")}, folder / "x.safetensors")
    save_file(plain, folder / "theirs.safetensors")
    (folder / "about.json").write_text(json.dumps({"hints": hints, "folded": folded}))


def activations(folder):
    """Returns the activations that another process left."""
    return load_file(folder / "x.safetensors")["x"]


def run(make, load):
    """Runs `make(folder)`, or `load(folder)` for every coder of ours in a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("make", "load"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        if args.what == "make":
            make(args.folder)
        else:
            for folder in sorted(path for path in args.folder.iterdir() if path.is_dir()):
                x = activations(folder)
                store(folder, x, *load(folder / "coder", x))
