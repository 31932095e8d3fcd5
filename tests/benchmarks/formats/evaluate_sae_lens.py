"""A coder of ours, measured by SAELens' own evaluation: through `sae.as_saelens`, from the exported file, and by us.

    PYTHONPATH=../../.. PYTHON evaluate_sae_lens.py --model FOLDER [--layer 15]

PYTHON is that of an environment with sae-lens and with what our package imports (draccus, jaxtyping). Of each kind of
coder, `run_evals` measures the adapter and what `SAE.load_from_disk` makes of our export, on the same tokens of one
model hooked by TransformerLens. What the definitions have in common (CE, squared error, explained variance, L0, cosine)
is compared with our own figures of the same Hugging Face model, and the adapter is attached to a small
HookedSAETransformer by `run_with_saes`. Coders are made of activations, not trained. Prints a table; exits with 1 where
any two figures differ by more than 1e-4, relative to max(1, |b|), or more than this share of all (token, latent) pairs
that fire is another: a tie within rounding falls as it will, and is one token of some latent's density.
"""

import argparse
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformerConfig

import sae
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.coder.splicing import splice
from sae.evaluation.metrics import Reconstruction
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.gated import Gated
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.topk import TopK

warnings.simplefilter("ignore")
LIMIT, CONTEXT, D_SAE, K, ROWS = 1e-4, 128, 2048, 32, 8
GROUPS = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_sae", "kl_div_with_ablation"),
    "model_performance_preservation": ("ce_loss_with_sae", "ce_loss_without_sae", "ce_loss_with_ablation"),
    "reconstruction_quality": ("explained_variance", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
}


def coders(acts, site):
    """Returns one coder of each kind that is worth a row: made of activations, so that reconstructions are sensible."""
    mean, size = acts.mean(0), acts.norm(dim=1).median()
    kinds = {
        "topk": (TopK(K), {}),
        "topk, scaled": (TopK(K), {"normalization": Normalization("scalar", float(acts.shape[1] ** 0.5 / size))}),
        "topk, layer_norm": (TopK(K), {"normalization": Normalization("layer_norm", eps=1e-5, undo_eps=False)}),
        "relu": (ReLU(), {}),
        "jumprelu": (JumpReLU(), {}),
        "gated": (Gated(), {}),
    }
    for name, (rule, options) in kinds.items():
        d = acts.shape[1]
        how = {"mask": MaskSpec(()), "context_length": CONTEXT, **options}
        coder = SparseCoder(CoderSpec(d, d, D_SAE, rule, (site,), (site,), **how)).requires_grad_(False)
        y = coder.spec.normalize(acts)[0]
        initialize(coder, y.mean(0) if options else mean, 0)
        rows = (y - y.mean(0))[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:D_SAE]]
        rows = rows / rows.norm(dim=1, keepdim=True)
        coder.W_enc.data.copy_(rows)
        coder.W_dec.data.copy_(rows)
        if not isinstance(rule, TopK):
            h = coder.preactivations(coder.centered(acts)[0])
            cut = h.topk(K, dim=1).values[:, -1].median()  # about K latents fire
            if isinstance(rule, JumpReLU):
                coder.threshold.data.fill_(float(cut))
            else:
                coder.b_enc.data.sub_(cut)
                for bias in (tensor for tensor_name, tensor in coder.named_parameters() if tensor_name == "b_mag"):
                    bias.data.sub_(cut / 2)
        yield name, coder


def ours(coder, lm, tokens):
    """Returns our own figures on the same tokens, none of them left out."""
    found = Reconstruction(coder.spec.d_sae, coder.spec.d_out)
    losses = {"ce_loss_without_sae": [], "ce_loss_with_sae": []}
    half = len(tokens) // 2
    for rows in tokens[half:]:
        x = capture(lm, list(coder.spec.reads), rows)[coder.spec.reads[0].name].flatten(0, -2).float()
        out, latents = coder(x)
        found.update(x, out, latents)
    for rows in tokens[:half]:
        for name, open_ in (("ce_loss_without_sae", nullcontext()), ("ce_loss_with_sae", splice(lm.model, coder))):
            with open_:
                logits = lm.model(rows).logits[:, :-1]
            losses[name].append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))
    r = found.result()
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return {"mse": r["mse"], "explained_variance": r["ev"], "l0": r["l0"], "cossim": r["cosine"], **means}


def theirs(coder, model, text, batches):
    """Returns SAELens' (figures of what stands for its SAE, densities, tokens read: for losses, then for the rest)."""
    how = {"dataset": text, "streaming": False, "context_size": CONTEXT, "store_batch_size_prompts": ROWS}
    store = ActivationsStore.from_sae(model, coder, device="cpu", **how)
    read, tokens = store.get_batch_tokens, []
    store.get_batch_tokens = lambda *given: tokens.append(read(*given)) or tokens[-1]
    config = get_eval_everything_config(ROWS, batches, batches)
    figures, of_latents = run_evals(coder, store, model, ActivationScaler(), config, exclude_special_tokens=False)
    flat = {name: figures[group][name] for group, names in GROUPS.items() for name in names}
    density = torch.tensor(of_latents["feature_density"])
    return {**flat, "encoder norms": torch.tensor(of_latents["encoder_norm"])}, density, tokens


def differ(a, b):
    """Returns the largest difference of two figures, relative to max(1, |b|)."""
    a, b = (torch.as_tensor(one, dtype=torch.float64) for one in (a, b))
    return float(((a - b).abs() / b.abs().clamp_min(1)).max())


def attached(coder):
    """Returns how far codes are from our own, and logits with the error added from the model's, inside a model."""
    how = {"n_layers": 2, "d_head": 8, "n_ctx": 32, "d_vocab": 60, "act_fn": "gelu", "seed": 0}
    model = HookedSAETransformer(HookedTransformerConfig(d_model=coder.spec.d_in, **how))
    tokens, site = torch.arange(32)[None], "blocks.0.hook_resid_post"
    adapter = sae.as_saelens(coder, hook_name=site)
    bare = model.run_with_cache(tokens, names_filter=[site])[1][site]
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[adapter])
    with_error = model.run_with_saes(tokens, saes=[adapter], use_error_term=True)
    assert differ(logits, with_error) > LIMIT
    return max(
        differ(cache[f"{site}.hook_sae_acts_post"], adapter.coder.encode(bare).to_dense()),
        differ(with_error, model(tokens)),
    )


@torch.no_grad()
def main():
    """Prints one row for each kind of coder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of a language model")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--batches", type=int, default=4, help=f"of {ROWS} rows of {CONTEXT} tokens")
    parser.add_argument("--only", help="one kind of coder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("AutoModelForCausalLM", args.model, "cpu")
    lm = sae.load_language_model(args.model)
    text = Dataset.from_dict({"text": [topic for _, topic in sorted(topics.items())]})
    site = Site(f"model.layers.{args.layer}", model=args.model)
    sample = lm.tokenizer(" ".join(text["text"]), return_tensors="pt").input_ids[:, : 48 * CONTEXT].reshape(48, CONTEXT)
    acts = capture(lm, [site], sample)[site.name][:, 1:].flatten(0, 1).float()
    worst = 0.0
    columns = "adapter - exported | adapter - ours | attached | chosen otherwise"
    print(f"| coder | CE clean, with it | explained variance | L0 | {columns} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, coder in coders(acts, site):
        if args.only not in (None, name):
            continue
        adapter = sae.as_saelens(coder)
        assert "sae_lens" not in type(adapter).__module__
        with tempfile.TemporaryDirectory() as folder:
            adapter.save_model(folder)
            exported = SAE.load_from_disk(folder)
        a, density, tokens = theirs(adapter, model, text, args.batches)
        b, of_exported, again = theirs(exported, model, text, args.batches)
        assert all(map(torch.equal, tokens, again))
        c = ours(coder, lm, tokens)
        gaps = [max(differ(a[key], b[key]) for key in a), max(differ(a[key], c[key]) for key in c)]
        gaps += [attached(coder), float((density - of_exported).abs().sum() / (2 * density.sum()))]
        worst = max(worst, *gaps)
        ce = f"{a['ce_loss_without_sae']:.4f}, {a['ce_loss_with_sae']:.4f}"
        figures = f"{a['explained_variance']:.4f} | {a['l0']:.1f}"
        print(f"| {name} | {ce} | {figures} | {' | '.join(f'{gap:.1e}' for gap in gaps)} |", flush=True)
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
