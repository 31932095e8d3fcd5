"""What people look at, as journals keep it and read it again: windows in columns, activations where there are any.

    {"section": [.], "start": [.], "peak": [.], "text": [.], "lengths": [[.]], "at": [[.]], "values": [[.]]}

`lengths` are the characters of every token, `at` the tokens on which the latent fires and `values` its activations
there, in the fewest digits that read back as the same float32. Older rows hold windows one by one, field by field.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from interp.client.requests import Chat, LogProb, Request
from interp.records import Excerpt, Facts, Judgement, Seen, Task, Together, Window
from interp.scoring.misses import worth_seeing

Columns = dict[str, list[Any]]
LONGEST = 4000  # characters of a message that are kept
FEW = 4  # texts that are kept of a question about many


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


def seen_kept(tasks: Sequence[Task], judgements: Sequence[Judgement], misses: Sequence[float | None]) -> Columns:
    """Returns some of what was judged as columns, what is worth most first, as far as there is a text to look at; what
    the row has of every task is not repeated.
    """
    there = [i for i, task in enumerate(tasks) if task.text or any(item.window.text for item in task.items)]
    found = worth_seeing([tasks[i] for i in there], [judgements[i] for i in there], [misses[i] for i in there])
    chosen = [there[i] for i in found]
    items = [tasks[i].items for i in chosen]
    kept = {"task": chosen, "miss": [misses[i] for i in chosen], "windows": [len(some) for some in items]}
    kept |= _kept([item.window for some in items for item in some])
    kept["marks"] = [list(some[0].marks) if len(some) == 1 else [] for some in items]
    if any(tasks[i].text for i in chosen):
        kept |= {"amplified": [tasks[i].text for i in chosen], "clean": [tasks[i].clean for i in chosen]}
    return kept


def seen_of(row: Mapping[str, Any]) -> tuple[Seen, ...]:
    """Returns what `seen_kept` wrote into the row of a score; nothing of one by an older version, and of a null."""
    kept = row.get("seen")
    if not kept:
        return ()
    windows, tasks, found = iter(_windows(kept)), row["tasks"], []
    nothing = [""] * len(kept["task"])
    passages = zip(kept.get("amplified", nothing), kept.get("clean", nothing), strict=True)
    for i, miss, n, marks, (text, clean) in zip(
        kept["task"], kept["miss"], kept["windows"], kept["marks"], passages, strict=True
    ):
        found.append(
            Seen(
                tuple(next(windows) for _ in range(n)),
                tasks["truth"][i],
                tasks["tier"][i],
                tasks["decile"][i],
                row["values"][i],
                row["reasons"].get(str(i), ""),
                miss,
                tuple(marks),
                tuple(row["levels"][i]) if row["levels"] else (),
                text,
                clean,
            )
        )
    return tuple(found)


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
