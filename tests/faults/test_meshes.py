"""A rank that is killed in a step or while saving, on a mesh, and the run that goes on, on the same or on another."""

import pytest
import torch
from rigs.continued import EVERY, STEPS, in_save, in_step, run
from rigs.runs import checkpoints

import sae
from sae.parallel.mesh import Shape

pytestmark = pytest.mark.slow
FAMILIES = ["rule topk", "rule feature_choice", "cross-layer topk", "rule jumprelu"]
LOST = [in_step(7), in_save(2 * EVERY), in_step(14)]
"""One after the other: what a mesh has written, the next one reads."""


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "coder").iterdir()}


@pytest.mark.parametrize("name", FAMILIES)
def test_killed_and_resumed_on_the_same_mesh_the_coder_is_the_same_byte_for_byte(tmp_path, name):
    shape = Shape(latents=2)
    run(name, tmp_path / "whole", shape, torch.float32)
    for lost in LOST[:2]:
        run(name, tmp_path / "killed", shape, torch.float32, lost)
    assert checkpoints(tmp_path / "killed") == [EVERY], "that of the step at which a rank died is not there"
    run(name, tmp_path / "killed", shape, torch.float32)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    coder = sae.load(tmp_path / "killed" / "coder")
    sae.save(coder, tmp_path / "alone" / "coder")
    assert files(tmp_path / "alone") == files(tmp_path / "killed"), "what ranks write together is what one writes"


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_killed_and_resumed_on_other_meshes_it_is_the_coder_of_one_process(tmp_path, name, dtype, within):
    run(name, tmp_path / "one", Shape(), dtype)
    meshes = [Shape(data=2), Shape(latents=2), Shape(data=2, latents=2)]
    for shape, lost in zip(meshes, LOST, strict=True):
        run(name, tmp_path / "many", shape, dtype, lost)
    run(name, tmp_path / "many", Shape(), dtype)
    assert checkpoints(tmp_path / "many")[-1] == STEPS - EVERY
    one, many = (sae.load(tmp_path / run / "coder", dtype="auto").state_dict() for run in ("one", "many"))
    for key, wanted in one.items():
        size = wanted.abs().amax().clamp_min(1e-3)
        assert float(((many[key] - wanted).abs() / size).amax()) <= within, key
