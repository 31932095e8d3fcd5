"""Records of latents as lines of a terminal: what text of a data set or a model says stays text there."""

from collections.abc import Iterator, Sequence
from typing import Any

from interp.prompts.windows import spans, spelled, visible
from interp.records import Facts, Measure, Window
from interp.run.reasons import why
from interp.run.tables import Told
from interp.run.telling import with_interval
from interp.view.record import Label, LatentRecord

BOLD, PLAIN = "\x1b[1;7m", "\x1b[0m"
OPEN, CLOSE = "\u00ab", "\u00bb"  # where a mark cannot be bold


def lines(record: LatentRecord, command: str, colors: bool) -> Iterator[str]:
    """Yields a record as lines.

    Args:
        record: the latent.
        command: what explains it; empty where nothing does, as of a run that was imported.
        colors: whether marks are bold; else they are guillemets.
    """
    of = "" if record.d_sae is None else f" of 0 to {record.d_sae - 1:,}"
    yield f"latent {record.latent}{of}"
    yield from _firing(record)
    if not record.asked:
        yield "nothing explains what never fires" if record.dead else f"not explained yet; to explain it: {command}"
        return
    for label in record.labels:
        yield from _label(label)
    yield from (_score(one) for one in record.scores)
    if record.missing:
        yield "for more of it, look at more text: a larger --evidence.tokens and another --run-dir"
    if record.facts is None and command:
        yield f"no examples of it are kept here; to keep them: {command}"
    for name, windows in (("strongest", record.strongest), ("sampled", record.sampled)):
        if windows:
            yield from ("", f"{name} windows", *(_window(window, colors) for window in windows))


def _firing(record: LatentRecord) -> Iterator[str]:
    facts = record.facts
    if record.fired is not None and record.tokens is not None:
        largest = f", largest activation {facts.largest:.3g}" if facts and record.fired else ""
        share = f" ({record.fired / max(1, record.tokens):.3%})"
        yield f"fires on {record.fired:,} of {record.tokens:,} tokens{share if record.fired else ''}{largest}"
    if facts is not None:
        yield from _facts(facts)


def _facts(facts: Facts) -> Iterator[str]:
    told = {
        "tokens": [f"{spelled(token)} {share:.0%}" for token, share in facts.top_tokens],
        "promotes": [spelled(token) for token in facts.promoted],
        "suppresses": [spelled(token) for token in facts.suppressed],
        "neighbors": [f"{latent} ({cosine:.2f})" for latent, cosine in facts.neighbors],
    }
    yield from (f"  {name:11}{'  '.join(parts)}" for name, parts in told.items() if parts)


def _label(label: Label) -> Iterator[str]:
    by = f" ({visible(label.by)})" if label.by else ""
    yield ""
    if label.text is None:
        yield f"{visible(label.explainer)}{by}: {visible(why(label.status, label.reason))}"
        return
    yield f"{visible(label.explainer)}{by}: {visible(label.text)}"
    yield from (_score(one) for one in label.scores)


def _score(one: Told) -> str:
    row = one.row
    if row["score"] is None:
        return f"  {visible(row['scorer'])}: no score, {visible(why(row['status'], row['reason']))}"
    figures = {"": _measure(row, "score"), ", null ": _measure(row, "null"), ", lift ": _measure(row, "lift")}
    told = "".join(f"{name}{with_interval(found)}" for name, found in figures.items())
    partly = f", {visible(row['reason'])} missing" if row["reason"] else ""
    return f"  {visible(row['scorer'])}: {row['headline'].replace('_', ' ')} {told}, n {row['n']}{partly}"


def _measure(row: dict[str, Any], name: str) -> Measure:
    return Measure(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))


def _window(window: Window, colors: bool) -> str:
    fires = [place for place, value in enumerate(window.activations) if value]
    begin, end = (BOLD, PLAIN) if colors else (OPEN, CLOSE)
    parts = (f"{begin}{visible(text)}{end}" if marked else visible(text) for text, marked in spans(window, fires))
    return f"  {_peak(window.activations):7.2f}  {''.join(parts)}"


def _peak(activations: Sequence[float]) -> float:
    return max(activations, key=abs, default=0.0)
