"""What people look at, as journals keep it and read it again: windows in columns, activations where there are any.

    {"section": [.], "start": [.], "peak": [.], "text": [.], "lengths": [[.]], "at": [[.]], "values": [[.]]}

`lengths` are the characters of every token, `at` the tokens on which the latent fires and `values` its activations
there, in the fewest digits that read back as the same float32. Older rows hold windows one by one, field by field.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from interp.client.requests import Chat, LogProb, Request
from interp.records import Excerpt, Facts, Judgement, Seen, Task, Together, Window
from interp.scorers import Scorer
from interp.scoring.misses import worth_seeing

Columns = dict[str, list[Any]]
LONGEST = 4000  # characters of a message that are kept
FEW = 4  # texts that are kept of a question about many
LEVEL_DIGITS = 3  # behind the point, of levels from 0 to 9
RARE = ("reason", "marks", "levels", "text", "clean")  # columns that are left out where none has one


def excerpts_kept(some: Sequence[Excerpt]) -> Columns:
    """Returns excerpts as columns."""
    windows = _kept([one.window for one in some])
    tokens = [list(one.window.tokens) for one in some]
    return windows | {"tokens": tokens, "decile": [one.decile for one in some], "split": [one.split for one in some]}


def excerpts_of(data: Columns | list[dict[str, Any]]) -> tuple[Excerpt, ...]:
    """Returns what `excerpts_kept` wrote, or what older versions did."""
    if isinstance(data, list):
        return tuple(Excerpt(_older(one)) for one in data)
    return tuple(map(Excerpt, _windows(data, data["tokens"]), data["decile"], data["split"]))


def seen_kept(
    scorer: Scorer, tasks: Sequence[Task], judgements: Sequence[Judgement], misses: Sequence[float | None]
) -> Columns:
    """Returns some of what was judged as columns, what is worth most first, as far as there is a text to look at."""
    there = [i for i, task in enumerate(tasks) if task.text or any(item.window.text for item in task.items)]
    worth = worth_seeing([tasks[i] for i in there], [judgements[i] for i in there], [misses[i] for i in there])
    chosen = [(tasks[i], judgements[i], misses[i]) for i in (there[place] for place in worth)]
    columns: Columns = {
        "truth": [task.truth for task, _, _ in chosen],
        "tier": [task.tier for task, _, _ in chosen],
        "decile": [task.decile for task, _, _ in chosen],
        "value": [found.value for _, found, _ in chosen],
        "reason": [found.reason for _, found, _ in chosen],
        "miss": [miss for _, _, miss in chosen],
        "marks": [list(scorer.marks(task.items[0])) if len(task.items) == 1 else [] for task, _, _ in chosen],
        "levels": [[round(level, LEVEL_DIGITS) for level in found.levels] for _, found, _ in chosen],
        "text": [task.text for task, _, _ in chosen],
        "clean": [task.clean for task, _, _ in chosen],
    }
    told = {name: column for name, column in columns.items() if name not in RARE or any(column)}
    windows = [item.window for task, _, _ in chosen for item in task.items]
    return told | {"windows": [len(task.items) for task, _, _ in chosen], "of": _kept(windows)}


def seen_of(row: Mapping[str, Any]) -> tuple[Seen, ...]:
    """Returns what `seen_kept` wrote into the row of a score; nothing of one by an older version, and of a null."""
    kept = row.get("seen")
    if not kept:
        return ()
    windows, n = iter(_windows(kept["of"])), len(kept["windows"])
    of = [tuple(islice(windows, many)) for many in kept["windows"]]
    marks, levels = ([tuple(one) for one in kept.get(name, ((),) * n)] for name in ("marks", "levels"))
    passages = [kept.get(name, ("",) * n) for name in ("text", "clean")]
    named = [kept[name] for name in ("truth", "tier", "decile", "value")]
    return tuple(map(Seen, of, *named, kept.get("reason", ("",) * n), kept["miss"], marks, levels, *passages))


def asked_kept(requests: Sequence[Request]) -> list[list[str]]:
    """Returns the first of the questions as it goes out, as (role, text) pairs, each as long as it is of use."""
    return [[role, cut(text)] for request in requests[:1] for role, text in messages_of(request)]


def asked_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Returns what `asked_kept` wrote into a row; nothing where nobody was asked."""
    return tuple((role, text) for role, text in row.get("asked", ()))


def messages_of(request: Request) -> list[tuple[str, str]]:
    """Returns what a question says, as (role, text) pairs; of one about many texts the first of them."""
    if isinstance(request, Chat):
        return list(request.messages)
    texts = (request.text,) if isinstance(request, LogProb) else request.texts
    more = [("text", f"... and {len(texts) - FEW:,} more")] if len(texts) > FEW else []
    return [("text", text) for text in texts[:FEW]] + more


def facts_of(data: dict[str, Any]) -> Facts:
    """Returns the facts that a journal holds as plain JSON."""
    pairs = {name: tuple(map(tuple, data[name])) for name in ("top_tokens", "neighbors")}
    lists = {name: tuple(data[name]) for name in ("histogram", "positions", "promoted", "suppressed")}
    together = data.get("together")
    return Facts(**{**data, **lists, **pairs, "together": together and tuple(Together(*one) for one in together)})


def _kept(windows: Sequence[Window]) -> Columns:
    fires = [[place for place, value in enumerate(window.activations) if value] for window in windows]
    return {
        "section": [window.section for window in windows],
        "start": [window.start for window in windows],
        "peak": [window.peak for window in windows],
        "text": [window.text for window in windows],
        "lengths": [[b - a for a, b in pairwise(window.bounds)] for window in windows],
        "at": fires,
        "values": [_shortest(window.activations[i] for i in some) for window, some in zip(windows, fires, strict=True)],
    }


def _windows(data: Columns, tokens: Sequence[Sequence[int]] | None = None) -> list[Window]:
    found = []
    columns = (data[name] for name in ("section", "start", "peak", "text", "lengths", "at", "values"))
    for ids, (section, start, peak, text, lengths, at, values) in zip(
        tokens or [()] * len(data["text"]), zip(*columns, strict=True), strict=True
    ):
        activations = [0.0] * len(lengths)
        for place, value in zip(at, np.array(values, np.float32).tolist(), strict=True):
            activations[place] = value
        bounds = tuple(accumulate(lengths, initial=0))
        found.append(Window(section, start, tuple(ids), text, bounds, tuple(activations), peak))
    return found


def _older(data: dict[str, Any]) -> Window:
    fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in data.items()}
    return Window(**fields)


def _shortest(values: Iterable[float]) -> list[float]:
    """Returns values of float32 in the fewest digits that read back as the same."""
    return [float(str(value)) for value in np.array(list(values), np.float32)]


def cut(text: str) -> str:
    """Returns a text as it is, or where it is very long its beginning and its end."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} [... {len(text) - LONGEST:,} characters ...] {text[-LONGEST // 2 :]}"
