"""What a run is of and what it amounts to, as the page of its latents begins with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.evidence.tally import bin_edges
from interp.run.rundir import ENVIRONMENT
from interp.view.explained import ExplainedRun
from interp.view.record import Spread
from interp.view.reporting.blocks import LONGEST_LISTED, LONGEST_NAME, rounded, shown_text
from sae.base.files import read_json
from sae.base.paths import told_elsewhere

FACTS = ("coder", "model", "site", "text", "baseline", "seed")
SEEN = ("tokens_counted", "documents", "sections", "context_length", "alive")


def about(run: ExplainedRun) -> dict[str, Any]:
    """Returns what a run is of and amounts to, as plain values."""
    summary, environment = run.summary, run.run_dir / ENVIRONMENT
    known = read_json(environment) if environment.is_file() else {}
    seen, nulls = summary.get("text_seen", {}), run.nulls
    return {
        "folder": shown_text(told_elsewhere(str(run.run_dir))),
        "facts": {name: shown_text(told_elsewhere(str(summary[name])), LONGEST_NAME) for name in _there(summary)},
        "seen": {name: seen[name] for name in SEEN if name in seen},
        "d_sae": run.d_sae,
        "tokens": run.journals.evidence.tokens if run.journals.evidence else None,
        "digest": known.get("coder", ""),
        "packages": known.get("packages", {}),
        "explanations": {shown_text(name): counts for name, counts in summary["explanations"].items()},
        "failures": _said(summary["failures"]),
        "summary": [_summed(one, nulls) for one in summary["scores"]],
        "spent": summary["spent"],
        "edges": bin_edges(),
        "notes": {latent: {"label": shown_text(text, LONGEST_LISTED)} for latent, text in run.notes.labels().items()},
    }


def _there(summary: Mapping[str, Any]) -> list[str]:
    return [name for name in FACTS if summary.get(name) not in (None, "none")]


def _summed(one: Mapping[str, Any], spreads: Mapping[tuple[str, str], Spread]) -> dict[str, Any]:
    """What scores amount to, with those of other latents' labels, of which the mean is the null."""
    figures = {name: [rounded(part) for part in one[name].values()] for name in ("mean", "null", "lift")}
    spread = spreads.get((one["explainer"], one["scorer"]))
    nulls = sorted(spread.null) if spread and one["explainer"] else []
    named = {name: shown_text(one[name]) for name in ("explainer", "scorer", "headline")}
    missing = {
        kind: {**said, "first": shown_text(said["first"], LONGEST_LISTED)} for kind, said in one["invalid"].items()
    }
    counts = {name: one[name] for name in ("latents", "statuses", "coverage")}
    return {**named, **figures, **counts, "invalid": missing, "nulls": [rounded(value) for value in nulls]}


def _said(failures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(shown_text(name)): [
            [shown_text(kind), one["latents"], shown_text(one["first"], LONGEST_LISTED)] for kind, one in of.items()
        ]
        for name, of in failures.items()
    }


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns short names that tell folders apart: the ends of their paths in which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    shared = next((i for i, some in enumerate(zip(*parts, strict=False)) if len(set(some)) > 1), None)
    if len(folders) == 1 or shared is None:
        return [_name(some) for some in parts]
    return ["/".join(part for part in some[shared:] if part != "explain") or "explain" for some in parts]


def _name(parts: Sequence[str]) -> str:
    """The last two parts of a path, without the folder that every explained run has."""
    return "/".join([part for part in parts if part != "explain"][-2:])
