"""Every metric, defined once. Sums run over all tokens in float64 and one ratio is formed at the end.

With x the target, x^ the reconstruction and e = x - x^ over the unmasked tokens:

    FVU = sum|e|^2 / sum|x - mean|^2        EV = 1 - FVU
    NMSE_t = |e_t|^2 / |x_t|^2               (per token, no centering; mean and median are reported)
    bias  = E|x^|^2 / E<x, x^>               (1 is unbiased, below 1 is shrinkage)
    CE recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)       KL score = 1 - KL_spliced / KL_zero
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base.sums import in_float64
from sae.kernels.codes import SparseLatents
from sae.lm.hooks import kept_logits

DENSITY_BINS = tuple(range(-7, 1))


def fvu(x: Float[Tensor, "n d"], out: Float[Tensor, "n d"]) -> float:
    """Returns the fraction of variance unexplained, sum|x - out|^2 / sum|x - mean|^2, in float64."""
    x, out = in_float64(x.detach()), in_float64(out.detach())
    return float((x - out).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-300))


class Moments:
    """Streaming sums of vectors of width d, for their variance about the mean over all tokens."""

    def __init__(self, d: int) -> None:
        self.count = torch.zeros(1, dtype=torch.int64)
        self.total, self.squares = torch.zeros(2, d, dtype=torch.float64)

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Takes in rows x."""
        self.count += len(x)
        self.total += in_float64(x).sum(0).cpu()
        self.squares += in_float64(x).square().sum(0).cpu()

    def sums(self) -> list[Tensor]:
        """Returns all that was added up, itself: what several have taken in is the sum of theirs."""
        return [self.count, self.total, self.squares]

    @property
    def n(self) -> int:
        """Returns the number of rows."""
        return int(self.count)

    @property
    def mean(self) -> Float[Tensor, "d"]:
        """Returns the mean row."""
        return self.total / max(1, self.n)

    @property
    def square(self) -> Float[Tensor, "d"]:
        """Returns the mean square of each coordinate."""
        return self.squares / max(1, self.n)

    @property
    def variance(self) -> float:
        """Returns sum|x - mean|^2 / n."""
        return max(0.0, float(self.square.sum() - self.mean.square().sum()))


class Reconstruction:
    """Streaming reconstruction metrics of one coder of d_sae latents, whose targets have width d."""

    def __init__(self, d_sae: int, d: int) -> None:
        self.target, self.errors = Moments(d), Moments(d)
        self.scalars = torch.zeros(4, dtype=torch.float64)
        """Over tokens: cosines, ratios of norms, |out|^2, <target, out>."""
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """At how many tokens each latent fires."""
        self.nmse: list[Tensor] = []
        """By token, in the order in which they come."""

    def sums(self) -> list[Tensor]:
        """Returns all that was added up, itself; `nmse` is not among it."""
        return [*self.target.sums(), *self.errors.sums(), self.scalars, self.fired]

    def update(self, x: Float[Tensor, "n d"], out: Float[Tensor, "n d"], latents: SparseLatents) -> None:
        """Takes in n tokens."""
        x, out = in_float64(x), in_float64(out)
        self.target.update(x)
        errors, norms, out_norms = (x - out).square().sum(1), x.norm(dim=1), out.norm(dim=1)
        self.errors.update(x - out)
        cosine = ((x * out).sum(1) / (norms * out_norms).clamp_min(1e-30)).sum()
        ratio = (out_norms / norms.clamp_min(1e-30)).sum()
        self.scalars += torch.stack([cosine, ratio, out_norms.square().sum(), (x * out).sum()]).cpu()
        self.nmse.append((errors / norms.square().clamp_min(1e-30)).float().cpu())
        self.fired += latents.fired().cpu()

    def fvu(self, columns: slice = slice(None)) -> float | None:
        """Returns the FVU, or that of some columns; of constant targets None, for it has no value."""
        if not self.target.n:
            return None
        square, mean = self.target.square[columns], self.target.mean[columns]
        variance, floor = float((square - mean.square()).sum()), 1e-12 * max(float(square.sum()), 1e-300)
        return float(self.errors.square[columns].sum()) / variance if variance > floor else None

    def result(self) -> dict[str, Any]:
        """Returns the metrics as plain numbers; FVU of constant targets is None, for it has no value."""
        n, nmse = max(1, self.target.n), torch.cat(self.nmse) if self.nmse else torch.zeros(1)
        value, (cosine, ratio, out_square, cross) = self.fvu(), self.scalars.tolist()
        return {
            "tokens": self.target.n,
            "fvu": value,
            "ev": None if value is None else 1 - value,
            "mse": float(self.errors.square.sum()),
            "nmse_mean": float(nmse.double().mean()),
            "nmse_median": float(nmse.median()),
            "l0": int(self.fired.sum()) / n,
            "cosine": cosine / n,
            "norm_ratio": ratio / n,
            "reconstruction_bias": out_square / cross if cross else None,
        }

    def density(self) -> dict[str, Any]:
        """Returns the dead share with the tokens it was counted over, and a histogram of log10 firing density."""
        n, fired = max(1, self.target.n), self.fired.double()
        dead = int((fired == 0).sum())
        logs = (fired[fired > 0] / n).log10()
        counts = torch.histogram(logs, torch.tensor([float(b) for b in DENSITY_BINS]).double()).hist
        return {
            "dead_share": dead / max(1, len(fired)),
            "counted_over_tokens": self.target.n,
            "log10_density_edges": list(DENSITY_BINS),
            "log10_density_counts": [int(c) for c in counts],
            "dense_share_1_percent": float((fired / n > 0.01).double().mean()) if fired.numel() else 0.0,
            "dense_share_10_percent": float((fired / n > 0.1).double().mean()) if fired.numel() else 0.0,
        }


def head_shares(decoder: Float[Tensor, "d_sae d"], heads: int, alive: Bool[Tensor, "d_sae"]) -> dict[str, Any]:
    """Returns how latents on concatenated head outputs spread over the heads (Kissane 2024, arXiv 2406.17759).

    A latent's share in head h is |W_dec_i[h]| / sum over heads of it. mean_share is the mean over live latents by head,
    dominant the share of live latents with more than half in one head, heads_per_latent their mean effective number of
    heads (one over the sum of squared shares). Where the columns are not so many heads of one width, `not_available`
    says so: a figure beside the others is no reason to lose them.
    """
    if decoder.shape[1] % heads:
        return {"not_available": f"{decoder.shape[1]} columns are not {heads} heads of one width"}
    parts = in_float64(decoder.detach()[alive.to(decoder.device)]).unflatten(1, (heads, -1)).norm(dim=2)
    shares = parts / parts.sum(1, keepdim=True).clamp_min(1e-30)
    if not len(shares):
        return {"mean_share": [0.0] * heads, "dominant": None, "heads_per_latent": None}
    return {
        "mean_share": [float(share) for share in shares.mean(0)],
        "dominant": float((shares.max(1).values > 0.5).double().mean()),
        "heads_per_latent": float((1 / shares.square().sum(1).clamp_min(1e-30)).mean()),
    }


def kl_divergence(
    clean: Float[Tensor, "rows context vocabulary"],
    patched: Float[Tensor, "rows context vocabulary"],
    keep: Bool[Tensor, "rows context_1"],
) -> Float[Tensor, "kept"]:
    """Returns KL(clean || patched) in nats over the vocabulary at the kept positions, the last one left out."""
    return torch.cat([kl_of(*part) for part in kept_logits(keep, clean, patched)])


def kl_of(clean: Float[Tensor, "n vocabulary"], patched: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n"]:
    """Returns KL(clean || patched) in nats of each row of logits."""
    p, q = clean.log_softmax(-1), patched.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def loss_recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """Returns (ablated - spliced) / (ablated - clean), or None where ablation does no harm: no ratio then."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > 1e-9 else None
