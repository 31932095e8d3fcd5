"""What the language model takes in a run, against what is counted while it runs; coders are small beside it."""

from collections import Counter

import pytest
from rigs.fakes import tiny_config, tiny_model_folder
from torch.utils.flop_counter import FlopCounterMode

from sae.lm import replay
from sae.stream.rows import RowStream
from sae.training import flops
from sae.training.loop import Run
from sae.training.shaping import planned
from sae.training.trainer import CoderTrainer

SMALL = {"coder.d_sae": 8, "coder.selection": {"type": "topk", "k": 2}}
KL = {"coder.objectives": {"kl": {"type": "kl", "weight": 1.0}}, "eval.every_steps": 5}
GRADIENTS = {"coder.selection": {"type": "gradient_topk", "k": 2}}
TWO = {"activations.sites": ["layers.1", "layers.2"]}
TRANSCODERS = {"activations.sites": ["layers.1.mlp:input"], "activations.targets": ["layers.1.mlp"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose layers are most of it."""
    folder = tmp_path_factory.mktemp("layers")
    return tiny_model_folder(folder, hidden_size=64, intermediate_size=256, num_hidden_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{**KL, **TWO}, {**KL, **TWO, "micro_batch_tokens": 64}, KL, TWO, GRADIENTS, TRANSCODERS],
    ids=["end-to-end", "in micro-batches", "one site", "two sites", "by gradients", "transcoders"],
)
def test_flops_of_the_model_are_those_that_are_counted(changes, model, tiny_train, tiny_text, monkeypatch):
    counter, seen = FlopCounterMode(display=False), Counter()

    def counted(owner, name: str, label: str) -> None:
        original = getattr(owner, name)

        def call(*given, **options):
            before = counter.get_total_flops() - seen["trying"]
            try:
                return original(*given, **options)
            finally:
                seen[label] += counter.get_total_flops() - seen["trying"] - before

        monkeypatch.setattr(owner, name, call)

    counted(replay, "_can_replay", "trying")  # a few tokens, once a model
    counted(Run, "_evaluate", "evaluation")
    counted(CoderTrainer, "step", "end_to_end")
    counted(RowStream, "__next__", "reading")
    changes = {"tokens": 8 * 128, **SMALL, **changes}
    with counter:
        code, said = tiny_train(changes, model=model)
    assert code == 0, said
    config = tiny_config(model, tiny_text, changes)
    found = planned(config)
    models, plans = found.passes.models, found.plans
    evaluated = config.eval.tokens * (2 if config.eval.every_steps else 1)
    expected = {"evaluation": flops.evaluation(config, models, plans) * evaluated}
    if config.needs_rows:
        expected["reading"] = flops.reading(config, models) * config.tokens
        expected["end_to_end"] = flops.end_to_end(config, models, plans, 1) * config.tokens
    for label, value in expected.items():
        assert seen[label] == pytest.approx(value, rel=0.03), label
