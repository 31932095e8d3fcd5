"""What a rank of a mesh is said to hold, against what it holds."""

import json
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child, ranks

from sae.base.held import peak
from sae.coder.coder import SparseCoder
from sae.coder.cutting import empty_part
from sae.lm.site import Site
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.parallel.mesh import Shape, made
from sae.parallel.ranks import process_group, rank
from sae.selection.topk import TopK
from sae.training.config import ActivationConfig, CheckpointConfig, CoderConfig, TrainConfig
from sae.training.footprint import Part, Passes, footprint
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.trainer import CoderTrainer, Schedule

D, MANY, TOKENS, STEPS = 64, 2**20, 256, 3
READ = (Site("a", width=D),)


def plan_of(d_sae: int, read=READ) -> CoderPlan:
    coder = CoderConfig(
        d_sae=d_sae, selection=TopK(32), objectives={"reconstruction": Reconstruction(), "auxk": AuxK()}
    )
    return CoderPlan("coder", read, read, coder, OptimConfig())


def config_of(plan: CoderPlan) -> TrainConfig:
    return TrainConfig(
        tokens=STEPS * TOKENS,
        batch_tokens=TOKENS,
        micro_batch_tokens=0,
        coder=plan.coder,
        activations=ActivationConfig(lanes=8, dtype="float32"),
    )


def anonymous() -> int:
    """Returns the bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def measure(folder: Path, shape: Shape) -> int:
    """The work of a rank: leaves the most bytes that a coder and its steps took, above what was there before."""
    torch.set_num_threads(1)
    with process_group():
        mesh, plan = made(shape), plan_of(MANY)
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(0))
        float((x @ x.T).sum())  # what products need in any case
        before, most, ended = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.005):
                most[0] = max(most[0], anonymous())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        coder = empty_part(plan.spec.with_(variance=float(D)), mesh.latents)
        with torch.no_grad():
            coder.W_enc.normal_(generator=torch.Generator().manual_seed(rank()))
            coder.W_dec.copy_(coder.W_enc)
        trainer = CoderTrainer(
            coder, plan.coder.objectives, plan.optim, Schedule(STEPS, TOKENS), mesh
        )  # then AuxK acts
        for step in range(STEPS):
            figures = trainer.step(x, step)
        assert figures["dead_share"] > 0.9
        ended.set()
        watcher.join()
        (folder / f"{rank()}.json").write_text(json.dumps(most[0] - before))
    return 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory by kind is told by Linux")
def test_a_part_of_a_million_latents_takes_its_part_of_memory(tmp_path):
    taken = {}
    for n in (1, 4):
        folder, shape, plan = tmp_path / str(n), Shape(latents=n), plan_of(MANY)
        folder.mkdir()
        environments = ranks(n) if n > 1 else [{}]
        work = partial(measure, folder, shape)
        made = [Child(folder / f"{i}.txt", work, own) for i, own in enumerate(environments)]
        assert [child.wait() for child in made] == [0] * n, "".join(child.output for child in made)
        taken[n] = [json.loads((folder / f"{i}.json").read_text()) for i in range(n)]
        said = footprint(config_of(plan), Passes([]), [plan], shape, [0])
        expected = peak([said.coders + said.step])
        print(n, taken[n], expected)
        assert max(taken[n]) == pytest.approx(expected, rel=0.1)
    assert max(taken[4]) <= taken[1][0] / 3.5


def held(shape, groups=(0,), group=0, plans=None):
    plans = plans or [plan_of(4096)]
    config = replace(config_of(plans[0]), checkpoints=CheckpointConfig(every_steps=1))
    return footprint(config, Passes([]), plans, shape, list(groups), group).parts()


def test_parameters_of_a_part_are_those_of_a_coder():
    plan = plan_of(1000)
    assert Part.of(plan, Shape()) == (plan, sum(p.numel() for p in SparseCoder(plan.spec).parameters()), 1000)
    assert Part.of(plan, Shape(latents=3)).latents == 334  # as many as any


def test_parts_groups_and_copies_of_a_mesh():
    alone, data, latents = held(Shape()), held(Shape(data=4)), held(Shape(latents=4))
    assert data["coders"] == alone["coders"]
    assert latents["coders"] == pytest.approx(alone["coders"] / 4, rel=0.01)
    assert data["snapshot"] == pytest.approx(alone["snapshot"] / 4, abs=3)  # replicas share what they write
    assert latents["snapshot"] == pytest.approx(alone["snapshot"] / 4, rel=0.01)
    assert data["pool"] == latents["pool"]
    plans = [plan_of(4096), plan_of(1024), plan_of(1024)]
    large, small = (held(Shape(sites=2), (0, 1, 1), group, plans) for group in range(2))
    assert large["coders"] == alone["coders"]
    assert small["coders"] == pytest.approx(alone["coders"] / 2, rel=0.01)
    assert held(Shape(), (0, 0, 0), 0, plans)["coders"] == large["coders"] + small["coders"]
