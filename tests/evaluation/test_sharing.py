"""Ranks that share the passes of an evaluation: every figure is that of one process, and none is left waiting."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child
from rigs.children import ranks as as_ranks
from rigs.fakes import sampled_rows, tiny_lm
from rigs.runs import assert_figures

import sae.evaluation.evaluation
from sae.base.errors import Stopped
from sae.base.progress import Watch
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import evaluate, evaluate_all
from sae.lm.hooks import capture
from sae.lm.masking import MaskSpec
from sae.lm.site import SECOND, Site
from sae.parallel import agreement, ranks
from sae.selection.gradient_topk import GradientTopK
from sae.selection.topk import TopK

D, CONTEXT = 16, 12
HERE = Site("model.layers.1", model="tiny", width=D)
MLP = Site("model.layers.1.mlp", model="tiny", width=D)


def coder(reads=(HERE,), writes=(HERE,), rule=None, **spec) -> SparseCoder:
    """Returns an untrained coder; at the tokens with outliers by norm its figures are others."""
    widths = len(reads) * D, len(writes) * D
    settings = {"pre_bias": "none", "mask": MaskSpec((0, 1, 2), 1), **spec}
    made = SparseCoder(CoderSpec(*widths, 48, rule or TopK(4), reads=reads, writes=writes, **settings))
    initialize(made, torch.zeros(widths[0]), 0)
    if made.spec.skip:
        with torch.no_grad():
            made.W_skip.copy_(torch.eye(D) / 2)
    return made


def cases(lm, tokens=240):
    """Returns, by name, what is evaluated: each figure that there is, more ranks than passes, and stored vectors."""
    rows = sampled_rows(lm, CONTEXT)
    heads = Site("model.layers.1.self_attn.o_proj", "input", "tiny", heads=2, width=D)
    second = Site(HERE.hook, model="tiny", tag=SECOND, width=D)
    every = {
        "norms": coder(mask=MaskSpec((0, 1, 2), 1, {HERE.name: _usual_norm(lm, rows)})),
        "skip": coder((Site(MLP.hook, "input", "tiny", width=D),), (MLP,), skip=True),
        "of the mlp": coder((MLP,), (MLP,)),
        "two sites": coder((HERE, MLP), (HERE, MLP)),
        "heads": coder((heads,), (heads,)),
    }
    ahead = coder(rule=GradientTopK(4), calibration=(0.1,))
    torch.manual_seed(5)
    stored = {HERE.name: torch.randn(700, D)}
    return {
        "every figure": {"coders": every, "tokens": tokens, "nulls": True, "lm": lm, "rows": rows},
        "with gradients": {"coders": {"": ahead}, "tokens": 240, "lm": lm, "rows": rows},
        "two models": {
            "coders": {"": coder((HERE, second), (HERE, second))},
            "tokens": 240,
            "lm": lm,
            "rows": rows,
            "second": tiny_lm(7),
        },
        "one pass": {"coders": {"": coder()}, "tokens": 1, "nulls": False, "lm": lm, "rows": rows},
        "stored": {"coders": {"": coder()}, "tokens": 600, "nulls": True, "activations": stored},
    }


def _usual_norm(lm, rows) -> float:
    """Returns a norm that one token in five exceeds."""
    x = capture(lm, [HERE], rows.data)[HERE.name]
    return float(x[rows.data > 2].norm(dim=1).quantile(0.8))


def found_by_ranks(names: list[str], tokens: int, folder: Path) -> int:
    """The work of a rank: it evaluates, and writes down what it has found and how many passes it has made."""
    torch.set_num_threads(1)
    sae.evaluation.evaluation.PASS_LOGITS = 1  # a row a pass
    sae.evaluation.figures.BLOCK = 64
    lm, shown, found = tiny_lm(), [], {}
    with ranks.process_group():
        share = ranks.own_share()
        for name, case in cases(lm, tokens).items():
            if name in names:
                found[name] = evaluate_all(watch=Watch(display=shown.append), share=share, **case)
        if share.rank == 0:  # what a callback may do: the others are not there
            found["alone"] = evaluate(coder(), lm, sampled_rows(lm, CONTEXT), 100)
        with agreement.together():
            pass
        found["shown"] = [f"{at.what} {at.n}/{at.total}" for at in shown if at.done]
        (folder / f"{share.rank}.json").write_text(json.dumps(found))
    return 0


def run(work, folder: Path, n: int, *arguments) -> list[int]:
    """Returns the exit code of every rank."""
    children = [
        Child(folder / f"log-{rank}.txt", partial(work, *arguments, folder), environment)
        for rank, environment in enumerate(as_ranks(n))
    ]
    codes = [child.wait() for child in children]
    print("".join(child.output for child in children))
    return codes


def check(tmp_path, monkeypatch, n: int, names: list[str], tokens: int = 240) -> None:
    monkeypatch.setattr("sae.evaluation.evaluation.PASS_LOGITS", 1)
    monkeypatch.setattr("sae.evaluation.figures.BLOCK", 64)
    assert run(found_by_ranks, tmp_path, n, names, tokens) == [0] * n
    lm = tiny_lm()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    assert_figures(told[0].pop("alone"), evaluate(coder(), lm, sampled_rows(lm, CONTEXT), 100))
    shown = [rank.pop("shown") for rank in told]
    assert len(shown[0]) == len(names)
    assert shown[1:] == [[]] * (n - 1)
    for name, case in cases(lm, tokens).items():
        if name in names:
            wanted = json.loads(json.dumps(evaluate_all(watch=Watch(display=False), **case)))
            for rank in told:
                assert_figures(rank[name], wanted, name)


def test_two_ranks_find_every_figure_of_one(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, 2, ["every figure"], 60)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_find_what_one_finds(tmp_path, monkeypatch, n):
    check(tmp_path, monkeypatch, n, list(cases(tiny_lm())))


def breaks(how: str, folder: Path) -> int:
    """The work of a rank of which the second one fails, or is asked to stop, at its second pass."""
    torch.set_num_threads(1)
    sae.evaluation.evaluation.PASS_LOGITS = 1
    lm, looks = tiny_lm(), []

    def asked() -> bool:
        looks.append(None)
        if ranks.rank() == 1 and len(looks) == 2:
            if how == "error":
                raise ZeroDivisionError("at a pass")
            return True
        return False

    with ranks.process_group():
        try:
            watch, share, rows = Watch(asked, display=False), ranks.own_share(), sampled_rows(lm, CONTEXT)
            evaluate_all({"": coder()}, watch, 240, share=share, lm=lm, rows=rows)
        except Stopped as stopped:
            print(f"stopped {stopped}")
            return 75
        except (agreement.PeerError, ZeroDivisionError) as error:
            print(error)
            return 1
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("error", 1), ("stop", 75)])
def test_what_ends_one_rank_ends_all(tmp_path, how, code):
    assert run(breaks, tmp_path, 3, how) == [code] * 3
    told = [(tmp_path / f"log-{rank}.txt").read_text() for rank in range(3)]
    own, other = ("at a pass", "another rank failed") if how == "error" else ("during evaluation", "with another rank")
    assert [own in told[1], other in told[0], other in told[2]] == [True] * 3


def test_alone_nothing_is_shared(monkeypatch):
    """A callback of rank 0 evaluates, and the others know nothing of it."""
    for name in ("total_", "gathered", "collected"):
        monkeypatch.setattr(f"sae.parallel.collectives.{name}", None)
    for name in ("together", "agreed"):
        monkeypatch.setattr(f"sae.parallel.agreement.{name}", None)
    lm = tiny_lm()
    assert evaluate(coder(), lm, sampled_rows(lm, CONTEXT), 100, nulls=True)["nulls"]
