"""What commands tell: JSON that every reader takes, colors where they are wanted, commands that a shell takes."""

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import running
from cli.telling import plain, report, say_next


@dataclasses.dataclass(frozen=True)
class Found:
    path: Path
    share: float


class Pair(NamedTuple):
    a: int
    b: float


def test_json_holds_what_python_may_hand_it(capsys):
    told = {
        "found": Found(Path("a/b"), math.nan),
        "numbers": [math.inf, -math.inf, 1.5, 2, True, None],
        "arrays": (np.float32(0.5), np.arange(3), torch.tensor([[1.0, math.nan]])),
        "pair": Pair(1, math.nan),
        3: {"text"},
        "mark": "\u00ab\ud800",
    }
    report("-", told, ["not this"])
    read = json.loads(capsys.readouterr().out, parse_constant=lambda name: f"no JSON: {name}")
    assert read == {
        "found": {"path": "a/b", "share": None},
        "numbers": [None, None, 1.5, 2, True, None],
        "arrays": [0.5, [0, 1, 2], [[1.0, None]]],
        "pair": [1, None],
        "3": ["text"],
        "mark": "\u00ab\ud800",
    }
    report(None, told, ["for", "people"])
    assert capsys.readouterr().out == "for\npeople\n"
    assert plain(Path) == str(Path)


def test_the_next_command_is_one_that_a_shell_takes(capsys):
    say = running.run(lambda argv: say_next(["sae-eval", Path("my runs/a")], ["sae-explain", "b"]) or 0, [])
    assert say == 0
    assert capsys.readouterr().err == "next         sae-eval 'my runs/a'\n             sae-explain b\n"
    assert running.run(lambda argv: say_next(["sae-eval", "a"]) or 0, ["-q"]) == 0
    assert capsys.readouterr().err == ""
