"""Records of latents as lines of a terminal: what text of a data set or a model says stays text there."""

from collections.abc import Iterator

from interp.prompts.windows import spans, spelled
from interp.records import Facts, Together, Window
from interp.view.record import LatentRecord
from sae.base.visible import visible

BOLD, PLAIN = "\x1b[1;7m", "\x1b[0m"
OPEN, CLOSE = "\u00ab", "\u00bb"  # where a mark cannot be bold


def lines(record: LatentRecord, command: str, colors: bool) -> Iterator[str]:
    """Yields a record as lines.

    Args:
        record: the latent.
        command: what explains it; empty where nothing does, as of a run that was imported.
        colors: whether marks are bold; else they are guillemets.
    """
    yield title(record)
    if record.edited is not None:
        yield f"edited: {visible(record.edited)}"
    yield from firing(record)
    if not record.asked:
        yield "nothing explains what never fires" if record.dead else f"not explained yet; to explain it: {command}"
        return
    for label in record.labels:
        yield from ("", repr(label))
        yield from (f"  {score}" for score in label.scores)
    yield from (f"  {score}" for score in record.scores)
    if record.missing:
        yield "for more of it, look at more text: a larger --evidence.tokens and another --run-dir"
    if record.facts is None and command:
        yield f"no examples of it are kept here; to keep them: {command}"
    for name, some in (("strongest", record.strongest), ("sampled", record.sampled)):
        if some:
            yield from ("", f"{name} windows", *(window_line(one.window, colors) for one in some))


def title(record: LatentRecord) -> str:
    """Returns which latent it is, of how many."""
    return f"latent {record.latent}" + ("" if record.d_sae is None else f" of 0 to {record.d_sae - 1:,}")


def firing(record: LatentRecord) -> Iterator[str]:
    """Yields how often it fires, and what is known of it beside its windows."""
    facts = record.facts
    if record.fired is not None and record.tokens is not None:
        largest = f", largest activation {facts.largest:.3g}" if facts and record.fired else ""
        share = f" ({record.fired / max(1, record.tokens):.3%})"
        yield f"fires on {record.fired:,} of {record.tokens:,} tokens{share if record.fired else ''}{largest}"
    if facts is not None:
        yield from (f"  {name:11}{'  '.join(parts)}" for name, parts in told(facts).items() if parts)


def told(facts: Facts) -> dict[str, list[str]]:
    """Returns by name what is known of a latent beside its windows, each a few words."""
    return {
        "tokens": [f"{spelled(token)} {share:.0%}" for token, share in facts.top_tokens],
        "promotes": [spelled(token) for token in facts.promoted],
        "suppresses": [spelled(token) for token in facts.suppressed],
        "neighbors": [f"{latent} ({cosine:.2f})" for latent, cosine in facts.neighbors],
        "together": ["not kept"] if facts.together is None else [*map(beside, facts.together)],
    }


def beside(other: Together) -> str:
    """Returns in a few words a latent that fires together with one: at how many of its peaks, and how unusual it is."""
    return f"{other.latent} ({other.share:.0%}, {other.lift:.3g}x)"


def window_line(window: Window, colors: bool) -> str:
    """Returns a window on one line: its largest activation, and its text with the tokens that fire marked."""
    fires = [place for place, value in enumerate(window.activations) if value]
    begin, end = (BOLD, PLAIN) if colors else (OPEN, CLOSE)
    parts = (f"{begin}{visible(text)}{end}" if marked else visible(text) for text, marked in spans(window, fires))
    return f"  {largest(window):7.2f}  {''.join(parts)}"


def largest(window: Window) -> float:
    """Returns the activation of a window that is largest by magnitude, with its sign."""
    return max(window.activations, key=abs, default=0.0)
