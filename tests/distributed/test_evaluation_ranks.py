"""What ranks measure while they train, and as sae-eval, is what one process measures of the same coders."""

import json
from functools import partial

import pytest
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_figures, lines

from sae.base.settings import to_yaml

pytestmark = pytest.mark.slow


def sae_eval(argv: list[str]) -> int:
    """The work of a child that runs sae-eval, a row of text a pass."""
    import torch

    import sae.evaluation.evaluation
    from cli.evaluate import main

    torch.set_num_threads(1)
    sae.evaluation.evaluation.PASS_LOGITS = 1
    return main(argv)


def a_row_a_pass() -> None:
    import sae.evaluation.evaluation

    sae.evaluation.evaluation.PASS_LOGITS = 1


def run(work, folder, name: str, n: int) -> str:
    """Runs it on so many ranks, and returns what the first one printed; the others print nothing."""
    children = [
        Child(folder / f"{name}-{rank}.txt", work, environment)
        for rank, environment in enumerate(ranks(n) if n > 1 else [{}])
    ]
    assert [child.wait() for child in children] == [0] * n, "".join(child.output for child in children)
    for other in children[1:]:
        assert "FVU" not in other.output, other.output
    return children[0].output


@pytest.mark.parametrize("n", [2, 3])
def test_figures_of_ranks_are_those_of_one(tmp_path, tiny_model, tiny_text, n):
    grid = {"grid": {"coder.selection.k": [2, 4]}, "tokens": 8 * 128, "eval.every_steps": 5}
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, grid)), encoding="utf-8")
    argv = ["--config", str(config), "--run-dir", str(folder)]
    told = run(partial(sae_train, argv, a_row_a_pass), tmp_path, "train", n)
    assert "CE clean" in told
    midway = [line for line in lines(folder) if "held_out" in line]
    assert [(line["step"], line["coder"]) for line in midway] == [(5, f"model.layers.1/k={k}") for k in (2, 4)]
    found = {"in training": json.loads((folder / "evaluation.json").read_text())}
    for name, many in (("one", 1), ("several", n)):
        told = run(partial(sae_eval, [str(folder), "--tokens", "256"]), tmp_path, name, many)
        assert told.count("CE clean") == 2
        figures = json.loads((folder / "sae-eval.json").read_text())
        found[name] = {coder.removeprefix("coders/"): part for coder, part in figures.items()}
    for of in found["in training"].values():
        assert of.pop("training")["steps"] == 8
    one = found.pop("one")
    for who, figures in found.items():
        assert_figures(figures, one, who)
