"""Every family over two ranks: the choice is that of one rank, and a killed run of both continues bit for bit."""

from functools import partial

import pytest
from rigs.children import Child, at_step, die, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, lines

from sae.base.settings import to_yaml

pytestmark = pytest.mark.slow

SHORT = {"tokens": 12 * 128}  # latents are dead from step 3 on, and a checkpoint is written at step 5
GRID = {
    "mutual": {"selection": {"type": "mutual_choice", "k": 4}},
    "feature": {"selection": {"type": "feature_choice", "k": 4, "mutual_share": 0.3}},
    "gradient": {"selection": {"type": "gradient_topk", "k": 4}},
    "jumprelu": {"selection": {"type": "jumprelu"}, "objectives": {"l0": {"type": "l0", "target_l0": 4}}},
    "zipf": {"objectives": {"aux_zipf": {"type": "aux_zipf"}, "matryoshka": {"type": "matryoshka"}}},
}
FAMILIES = {
    "rules": {"grid": {"coder": GRID}},
    "cross_layer": {
        "activations.sites": ["layers.*.mlp:input"],
        "activations.targets": ["layers.*.mlp"],
        "grid": {"coder": {name: GRID[name] for name in ("mutual", "feature")}},
        "coder.layout": "cross_layer",
    },
    "end_to_end": {"coder.objectives.kl": {"type": "kl"}, "coder.selection": {"type": "mutual_choice", "k": 4}},
}


@pytest.fixture(params=FAMILIES)
def runs(request, tmp_path, tiny_model, tiny_text):
    """Returns (name, number of ranks, step at which all are killed) -> exit codes; resumes a run that is there."""
    config = tmp_path / "config.yaml"
    config.write_text(
        to_yaml(tiny_config(tiny_model, tiny_text, {**SHORT, **FAMILIES[request.param]})), encoding="utf-8"
    )

    def run(name, n_ranks, killed_at=None):
        folder = tmp_path / name
        argv = ["--resume", str(folder)] if folder.exists() else ["--config", str(config), "--run-dir", str(folder)]
        first = partial(at_step, killed_at, die) if killed_at else None
        environments = ranks(n_ranks) if n_ranks > 1 else [{}]
        made = [
            Child(tmp_path / "log" / f"{name}-{rank}.txt", partial(sae_train, argv, first), environment)
            for rank, environment in enumerate(environments)
        ]
        codes = [child.wait() for child in made]
        return codes, "".join(child.output for child in made)

    run.folder = tmp_path
    return run


def test_two_ranks_choose_as_one_and_continue_after_a_kill(runs):
    for name, n_ranks in (("one", 1), ("two", 2)):
        codes, output = runs(name, n_ranks)
        assert codes == [0] * n_ranks, output
    one, two = lines(runs.folder / "one"), lines(runs.folder / "two")
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a["tokens"] == b["tokens"]
        for name in ("fvu", "l0", "dead_share", "loss"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-3), (a["step"], a["coder"], name)
        if a["step"] == 1:  # of the same weights: not only alike, but the same choice
            for name in (name for name in a if name.startswith(("fvu", "l0", "threshold", "zipf", "gradient_effect"))):
                assert b[name] == pytest.approx(a[name], rel=1e-5), (a["coder"], name)
    assert runs("killed", 2, killed_at=8)[0] == [-9, -9]
    codes, output = runs("killed", 2)
    assert codes == [0, 0], output
    assert_equal(runs.folder / "killed", runs.folder / "two")
