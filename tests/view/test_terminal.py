"""A latent on a terminal: every figure of its record is there, and text of strangers steers nothing."""

import re
import unicodedata
from dataclasses import replace

import pytest

from interp.records import Excerpt, Facts, Together, Window
from interp.run.tables import COLUMNS, Told
from interp.view.record import Label, LatentRecord, score_of
from interp.view.terminal import BOLD, PLAIN, lines

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\b\u202e\u2028x\nlatent 9 of 0 to 9\tend"
FACTS = Facts(
    1234,
    100_000,
    {},
    5.25,
    (),
    (),
    (("the", 0.75),),
    ("up",),
    ("down",),
    ((17, 0.5),),
    (Together(21, 0.625, 12.345, 160),),
)
COMMAND = "sae-explain --config F --latents 3"


def window(*pieces, fires=()):
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + len(piece))
    values = tuple(2.5 if i in fires else 0.0 for i in range(len(pieces)))
    return Window(0, 0, tuple(range(len(pieces))), "".join(pieces), tuple(bounds), values, 0)


def told(**row):
    known = {"latent": 3, "headline": "balanced_accuracy", "status": "ok"}
    return score_of(Told(dict.fromkeys(COLUMNS) | known | row, {}, {}, {}))


SCORED = told(scorer="detection[rule]", score=0.9, score_low=0.8, score_high=0.95, null=0.5, lift=0.4, n=40)
LABEL = Label("token_lookup", "", 'fires on the tokens ">>>"', "ok", "", (SCORED,))
SHOWN = Excerpt(window("a ", "cat", " sat", fires=(1, 2)))
RECORD = LatentRecord(3, 2048, True, 1234, 100_000, FACTS, "", (SHOWN,), (Excerpt(window("b")),), (LABEL,))


def test_all_that_is_known_is_told():
    text = "\n".join(lines(RECORD, COMMAND, colors=False))
    for part in (
        "latent 3 of 0 to 2,047",
        "fires on 1,234 of 100,000 tokens (1.234%), largest activation 5.25",
        '"the" 75%',
        '"up"',
        '"down"',
        "  neighbors  17 (0.50)",
        "  together   21 (62%, 12.3x)",
        'token_lookup: fires on the tokens ">>>"',
        "  detection[rule]: balanced accuracy 0.900 (0.800 to 0.950), null 0.500, lift 0.400, n 40",
        "     2.50  a «cat sat»",
    ):
        assert part in text
    assert COMMAND not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"facts": replace(FACTS, together=None)}, "  together   not kept"),
        ({"asked": False, "labels": (), "facts": None}, f"not explained yet; to explain it: {COMMAND}"),
        ({"asked": False, "labels": (), "facts": None, "fired": 0}, "nothing explains what never fires"),
        ({"facts": None, "strongest": (), "sampled": ()}, f"no examples of it are kept here; to keep them: {COMMAND}"),
        (
            {"missing": "x", "labels": (Label("llm", "gpt", None, "insufficient", "insufficient: 4 windows", ()),)},
            "llm (gpt): insufficient: 4 windows",
        ),
        ({"labels": (Label("llm", "gpt", None, "failed", "1 timeout", ()),)}, "llm (gpt): failed: 1 timeout"),
        (
            {"labels": (replace(LABEL, scores=(told(scorer="x", status="failed", reason="9 no_mass"),)),)},
            "  x: no score, failed: 9 no_mass",
        ),
    ],
)
def test_what_is_not_there_is_said_in_one_line(changes, said):
    assert said in list(lines(replace(RECORD, **changes), COMMAND, colors=False))


@pytest.mark.parametrize("colors", [True, False])
def test_text_of_strangers_steers_no_terminal(colors):
    score = told(scorer=f"detection[{HOSTILE}]", status="failed", reason=HOSTILE)
    label = Label(HOSTILE, HOSTILE, HOSTILE, "ok", "", (score,))
    facts = replace(FACTS, top_tokens=((HOSTILE, 0.5),), promoted=(HOSTILE,), suppressed=(HOSTILE,))
    seen = Excerpt(window(HOSTILE, HOSTILE, fires=(1,)))
    failed = Label("other", HOSTILE, None, "failed", HOSTILE, ())
    record = replace(RECORD, labels=(label, failed), facts=facts, strongest=(seen,), sampled=(seen,))
    told_lines = list(lines(record, COMMAND, colors))
    assert len(told_lines) == len(
        list(lines(replace(RECORD, labels=(LABEL, replace(LABEL, scores=()))), COMMAND, colors))
    )
    for line in told_lines:
        rest = line.replace(BOLD, "").replace(PLAIN, "") if colors else line
        assert not [c for c in rest if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
    assert "\n".join(told_lines).count("latent 3 of") == 1


def test_marks_are_bold_where_they_can_be():
    (line,) = [line for line in lines(RECORD, COMMAND, colors=True) if "cat" in line]
    assert re.fullmatch(rf" +2\.50  a {re.escape(BOLD)}cat sat{re.escape(PLAIN)}", line)
