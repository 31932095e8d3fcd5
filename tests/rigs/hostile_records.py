"""A record of a latent in which every text is hostile: markup, ends of tags, codes of terminals, the unseen."""

from dataclasses import replace

from interp.records import Excerpt, Seen, Window
from interp.view.record import Label, LatentRecord

HOSTILE = "</script><script>alert(1)</script>\"'<!-- \u202e\u200b\x7f\x1b[2J \U0001f600 <<x>>"


def hostile(record: LatentRecord) -> LatentRecord:
    """Returns a record that says hostile text wherever it says text of strangers."""
    window = Window(0, 0, (1, 2), HOSTILE + "x", (0, len(HOSTILE), len(HOSTILE) + 1), (2.0, 0.0), 0)
    seen = Seen((window,), 1.0, "active", 3, None, HOSTILE)
    scores = [score for label in record.labels for score in label.scores]
    found = [
        replace(one, scorer=HOSTILE, reason=HOSTILE, windows=(seen,), asked=((HOSTILE, HOSTILE),)) for one in scores
    ]
    label = Label(HOSTILE, HOSTILE, HOSTILE, "ok", HOSTILE, tuple(found[:1]), ((HOSTILE, HOSTILE),))
    named = {"promoted": (HOSTILE,), "suppressed": (HOSTILE,), "top_tokens": ((HOSTILE, 0.5),)}
    facts = replace(record.facts, **named) if record.facts else None
    return replace(record, labels=(label,), facts=facts, missing=HOSTILE, strongest=(Excerpt(window),))
