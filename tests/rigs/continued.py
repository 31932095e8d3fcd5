"""One coder trained by ranks of some mesh, with checkpoints, that goes on from the newest one on whatever mesh."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rigs.children import Child, at_step, die, ranks
from rigs.sharing import cases, new_trainer, share

from sae.loading import hub
from sae.parallel import agreement
from sae.parallel.mesh import Shape, made
from sae.parallel.ranks import RanksConfig, process_group
from sae.training import checkpoint, restoring, saving
from sae.training.saving import Part, Saver

STEPS, EVERY = 24, 4
DEADLINE_S = 5.0


def train(name: str, folder: Path, shape: Shape, dtype: torch.dtype, first: Callable[[], object] | None) -> int:
    """The work of a rank: trains to the last step and saves the coder, from the newest checkpoint on."""
    torch.set_num_threads(1)
    if first:
        first()
    with process_group(RanksConfig(deadline_s=DEADLINE_S)):
        mesh, case = made(shape), cases()[name]
        trainer = new_trainer(case, STEPS, dtype, mesh)
        found = agreement.agreed(lambda: str(checkpoint.latest(folder) or ""))
        begun = 0
        if found:
            stored, values = restoring.load(Path(found))
            latents = trainer.coder.spec.d_sae / trainer.coder.whole.d_sae
            own = restoring.values_of_part(values["coders"][name], mesh.latents, latents)
            trainer.load_state(restoring.Held(stored["coder-0"], trainer.rows), own)
            begun = values["step"]
        saver = Saver(folder, keep=2)
        for step in range(begun, STEPS):
            if step > begun and step % EVERY == 0:
                tensors, values = trainer.state()
                told = {} if mesh.data.rank else {"coders": {name: values}}
                saver.save(step, {"coder-0": Part.of(tensors, mesh, trainer.rows)}, {}, told)
            trainer.step(share(case, trainer, None, step, mesh.team.world_size > 1), step)
        saver.wait()
        hub.save_together({folder / "coder": trainer.trained()}, mesh)
    return 0


def run(name: str, folder: Path, shape: Shape, dtype: torch.dtype, lost: Callable[[], object] | None = None) -> None:
    """Trains on a mesh; where a rank is `lost`, it is the last one, and all must end by it."""
    n = shape.sites * shape.data * shape.latents
    children = []
    for number, environment in enumerate(ranks(n) if n > 1 else [{}]):
        work = partial(train, name, folder, shape, dtype, lost if number == n - 1 else None)
        children.append(Child(folder.parent / "logs" / f"{folder.name}-{number}.txt", work, environment))
    codes = [child.wait() for child in children]
    wanted = [0] * n if lost is None else [1] * (n - 1) + [-9]
    assert codes == wanted, "\n".join(child.output for child in children)


def in_step(number: int) -> Callable[[], object]:
    """Returns what has a rank die at a step."""
    return partial(at_step, number, die)


def in_save(number: int) -> Callable[[], object]:
    """Returns what has a rank die when it has written its files of the checkpoint of a step."""
    return partial(_die_saving, number)


def _die_saving(number: int) -> None:
    original = saving._files

    def files(draft: Path, own: saving.Parts) -> dict:
        found = original(draft, own)
        if draft.name.endswith(f"{number:09d}"):
            die()
        return found

    saving._files = files
