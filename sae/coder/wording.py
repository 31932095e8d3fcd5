"""What a coder is, in words: the same in its repr, in a notebook, on its card and in the terminal."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sae.coder.spec import RELEASED, CoderSpec
from sae.lm.site import Site

MANY = 4  # sites that are named one by one
Description = list[tuple[str, str]]
L0 = ("advertised", "l0")  # what the table of releases or a file states


def kind(spec: CoderSpec) -> str:
    """Returns what people call such a coder."""
    if spec.cross_layer:
        return "cross-layer transcoder"
    if len(spec.reads) > 1:
        return "crosscoder"
    return "sparse autoencoder" if spec.is_autoencoder else "transcoder"


def places(sites: Sequence[Site]) -> str:
    """Returns the names of some sites, and of the models that they are of; "" of sites that are not known."""
    if not any(site.hook for site in sites):
        return ""
    models = {site.model for site in sites}
    names = ", ".join(site.name for site in sites[:MANY]) + (f", ... ({len(sites)})" if len(sites) > MANY else "")
    return f"{names} of {' and '.join(sorted(models))}" if models != {""} else names


def rule(spec: CoderSpec) -> str:
    """Returns the selection rule with its budget."""
    said = spec.to_json()["selection"]
    budget = f" of {said['k']}" if "k" in said else ""  # other fields are of training
    how = ", of h times decoder norm" if spec.select_by_decoder_norm else ""
    return f"{said['type']}{budget}{how}"


def summary(spec: CoderSpec, threshold: Tensor | None = None) -> str:
    """Returns a coder in one line: kind, sites, widths, rule, what is known of its quality, the way its weights lie."""
    where = places(spec.reads)
    if where and not spec.is_autoencoder:
        where = f"{places(spec.reads)} -> {places(spec.writes)}"
    widths = [spec.d_in, spec.d_sae, *([] if spec.is_autoencoder else [spec.d_out])]
    said = [f"{kind(spec)}{where and f' of {where}'}", " -> ".join(map(str, widths)), rule(spec)]
    found = list(spec.calibration[:MANY])
    if threshold is not None and threshold.device.type != "meta":
        found = [float(threshold.detach().float().mean())]
    said += [f"threshold {', '.join(f'{one:.3g}' for one in found)}"] if found else []
    known, advertised = dict(known_figures(spec)), figure(spec, *L0)
    fvu, l0 = known.get("FVU"), known.get("L0")
    said += [f"FVU {fvu:.4f}"] if fvu is not None else []
    said += (
        [f"L0 {l0:.1f}"] if l0 is not None else [f"L0 {advertised:g} (advertised)"] if advertised is not None else []
    )
    line = " ".join(", ".join([*said, "W_enc [d_sae, d_in]"]).split())
    return "".join(c if c.isprintable() else "?" for c in line)  # names are whatever a file says


def description(spec: CoderSpec) -> Description:
    """Returns what a coder is as (name, text) rows: the same on the card, in a notebook and in the terminal."""
    written = "what it reads" if spec.is_autoencoder else places(spec.writes)
    rows = [("reads", places(spec.reads) or "not known"), ("writes", written or "not known")]
    rows += [("latents", f"{spec.d_sae:,} (d_in {spec.d_in}, d_out {spec.d_out})")]
    rows += [("encoder", spec.encoder + (f", {spec.n_blocks} blocks" if spec.cross_layer else ""))]
    rows += [("selection", rule(spec)), ("pre-bias", spec.pre_bias), ("normalization", _normalization(spec))]
    if spec.skip:
        rows.append(("skip path", "x W_skip^T is added to the output"))
    if spec.context_length:
        rows.append(("context", f"{spec.context_length:,} tokens, BOS by {spec.bos}"))
    if "tokens" in spec.training:
        rows.append(("trained on", f"{spec.training['tokens']:,} tokens{_text(spec.training.get('text'))}"))
    if RELEASED in spec.training:
        source = spec.training[RELEASED]
        rows.append(("released at", f"{source['from']}, {source['file']} ({source['format']})"))
    l0 = figure(spec, *L0)
    return [*rows, *([("advertised L0", f"{l0:g}")] if l0 is not None else [])]


def known_figures(spec: CoderSpec) -> list[tuple[str, float]]:
    """Returns what is known of how well a coder does on held-out text, by name."""
    names = (("FVU", "reconstruction", "fvu"), ("L0", "reconstruction", "l0"), ("dead share", "density", "dead_share"))
    found = ((name, figure(spec, *where)) for name, *where in names)
    return [(name, value) for name, value in found if value is not None]


def figure(spec: CoderSpec, group: str, name: str) -> float | None:
    """Returns a figure among the metrics of a coder; None where it is not known, or no number."""
    found = spec.metrics.get(group)
    value = found.get(name) if isinstance(found, dict) else None
    return float(value) if isinstance(value, (int, float)) else None


def _normalization(spec: CoderSpec) -> str:
    how = spec.normalization
    if how.kind == "scalar":
        scales = sorted({how.scale * site.scale for site in spec.reads} or {how.scale})
        return f"scalar, times {', '.join(f'{scale:.6g}' for scale in scales)}"
    undone = "" if how.undone else ", not undone"
    return f"{how.kind}, eps {how.eps:g}{undone}" if how.kind in ("layer_norm", "l2") else how.kind


def _text(text: Any) -> str:
    return f" of {text['source']}" if isinstance(text, dict) and text.get("source") else ""
