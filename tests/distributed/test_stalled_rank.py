"""Ranks read the language model when their own lanes run dry, at different steps: none of it waits for another rank."""

import time
from functools import partial

import pytest
import torch
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config

from sae.base.files import load_tensors
from sae.base.settings import to_yaml

STALL_S = 3.0
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def stalled(folder, number, at):
    """Has rank `number` wait before it reads some of its blocks, and every rank write down when it reads."""
    from sae.parallel.ranks import rank
    from sae.stream.sources import LiveSource

    original, seen = LiveSource.read, []

    def read(self, block):
        seen.append(block)
        if rank() == number and len(seen) in at:
            time.sleep(STALL_S)
        with (folder / f"read-{rank()}.txt").open("a", encoding="utf-8") as log:
            log.write(f"{time.monotonic()} {block}\n")
        return original(self, block)

    LiveSource.read = read


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_stalls_ends_with_the_coder_of_one_that_does_not(tmp_path, tiny_model, tiny_text, number):
    changes = {
        "model.device": "auto",
        "model.kwargs": {"device_map": PLACES},
        "coder.selection": {"type": "mutual_choice", "k": 4},  # ranks agree on what each step keeps
        "activations.lanes": 8,
        "ranks.timeout_s": 120,
    }
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, changes)), encoding="utf-8")
    made = {}
    for name, at in (("even", ()), ("stalled", (5, 7))):
        argv = ["--config", str(config), "--run-dir", str(tmp_path / name)]
        (tmp_path / f"logs-{name}").mkdir()
        work = partial(sae_train, argv, partial(stalled, tmp_path / f"logs-{name}", number, at))
        began = time.monotonic()
        children = [Child(tmp_path / f"{name}-{i}.txt", work, environment) for i, environment in enumerate(ranks(2))]
        assert [child.wait() for child in children] == [0, 0], "".join(child.output for child in children)
        assert not at or time.monotonic() - began > STALL_S
        (coder,) = (tmp_path / name).rglob("sae.safetensors")
        made[name] = load_tensors(coder)
    read = [(tmp_path / "logs-stalled" / f"read-{i}.txt").read_text(encoding="utf-8").split() for i in range(2)]
    assert set(read[0][1::2]).isdisjoint(read[1][1::2]), "each reads blocks of its own lanes"
    assert made["even"].keys() == made["stalled"].keys()
    assert all(torch.equal(made["stalled"][key], x) for key, x in made["even"].items())
