"""Is the direct effect of a latent what really happens when it is taken out? And what does a prompt cost?

    python tests/benchmarks/effects.py RUN... [--texts 60]

For texts of the held-out part of a run, every latent that fires at a token is taken out there in the model, whose later
layers go on to compute with what is left (the coder's error stays), and the logit of the token that really follows,
above the average one, is set against the direct effect. It prints a Markdown table: the correlation over all latents
and texts, and the median over texts of that among the latents of a token; how far the direct effects are off what the
model's own modules make of the stream without the latent; the median seconds of `interp.prompt` on 50 tokens.
"""

import argparse
import statistics
import time

import torch
from scipy.stats import pearsonr, spearmanr

import interp
import sae
from interp.evidence.effects import DirectEffects, Entries
from sae.evaluation.activations import codes_of, reading
from sae.evaluation.evaluation import text_of
from sae.lm.hooks import capture
from sae.lm.intervene import next_logits, replace_at
from sae.lm.norms import norm_of
from sae.text.tokenizing import tokenize

TOKENS, TIMES = 50, 9


def centered(logits, count):
    logits = logits[..., :count].float()
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def compared(lm, coder, ids):
    """Returns by latent that fires at the last token but one: direct effects, real ones, and the largest fault."""
    read = reading(lm, coder, ids[:-1])
    direct, n = DirectEffects(lm, read.coder), len(ids) - 1
    found = codes_of(read.coder, read.models, read.rows, direct.run)
    measured, token = direct.measured(), n - 1
    latents, values = found.latents.row(token)
    entries = Entries(torch.full_like(latents, token), latents, values.float())
    effects = measured.on(entries, torch.full_like(latents, ids[-1]))

    written = measured.written(entries)
    [site] = coder.spec.writes
    plain = centered(next_logits(lm, read.rows, torch.tensor([n])), len(lm.tokenizer))[0, ids[-1]]
    rows = read.rows.expand(len(latents), -1)

    def without(x):
        x = x.clone()
        x[:, token] -= written.to(x)
        return x

    with replace_at(lm.model, site, without):
        logits = next_logits(lm, rows, torch.full((len(rows),), n))
    real = plain - centered(logits, len(lm.tokenizer))[:, ids[-1]]

    norm = lm.model.get_submodule(direct.final.hook)
    x = capture(lm, [direct.final], read.rows)[direct.final.name][0, token]
    spread = norm_of(norm, len(x)).spread
    changed = x - written.to(x)
    held = norm(changed) * spread(changed) / spread(x)  # RMS norms have no bias
    exact = centered(lm.model.get_output_embeddings()(norm(x)), len(lm.tokenizer)) - centered(
        lm.model.get_output_embeddings()(held), len(lm.tokenizer)
    )
    fault = (effects - exact[:, ids[-1]]).abs().max() / exact.abs().max()
    return effects, real, float(fault)


def measured_run(path, texts):
    """Returns a row of the table."""
    coder = sae.load(path)
    lm = sae.load_language_model(coder.spec.reads[0].model)
    text = tokenize(text_of(coder.spec), lm.tokenizer, lm.source()).held_out
    places = torch.linspace(0, text.n_rows - 1, texts).long()
    rows = text.tokens(places)[:, :TOKENS].tolist()
    direct, real, faults, inside = [], [], [], []
    for ids in rows:
        ids = ids[: len(ids) if min(ids) >= 0 else ids.index(min(ids))]
        if len(ids) < TOKENS:
            continue
        effects, happened, fault = compared(lm, coder, ids)
        direct, real, faults = [*direct, *effects.tolist()], [*real, *happened.tolist()], [*faults, fault]
        inside.append(float(pearsonr(effects, happened)[0]))
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        interp.prompt(coder, lm, rows[0])
        seconds.append(time.perf_counter() - start)
    correlations = (
        f"{pearsonr(direct, real)[0]:.2f} | {spearmanr(direct, real)[0]:.2f} | {statistics.median(inside):.2f}"
    )
    cost = f"{1000 * statistics.median(seconds):.0f} ms"
    return f"| {path} | {len(direct):,} | {correlations} | {max(faults):.1e} | {cost} |"


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--texts", type=int, default=60)
    options = parser.parse_args()
    print("| run | latents | Pearson | Spearman | Pearson at a token, median | fault | prompt |")
    print("|---|---|---|---|---|---|---|")
    for path in options.runs:
        print(measured_run(path, options.texts), flush=True)


if __name__ == "__main__":
    main()
