"""Checkpoints written in the background, by one rank or several: what lies in the folder, and what is read back."""

import errno
import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child, ranks
from rigs.runs import checkpoints, files
from safetensors.torch import load_file

from sae.base.errors import DataError
from sae.base.files import read_json, sha256_file, verify
from sae.parallel.agreement import PeerError
from sae.parallel.ranks import RanksConfig, process_group
from sae.training import restoring, saving
from sae.training.saving import Part, Parts, Saver

STEP = "step-000000007"


def state() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    coder = {
        "weight": torch.randn(11, 5),
        "half": torch.randn(5, 3).bfloat16(),
        "step": torch.tensor(3.0),
        "few": torch.arange(2),
        "none": torch.zeros(0, 4),
        "flat": torch.randn(7, dtype=torch.float64),
    }
    return {"coder-0": coder, "coder-1": {"weight": torch.randn(4)}, "stream": {"position": torch.arange(64)}}


def parts(tensors: dict[str, dict[str, torch.Tensor]]) -> Parts:
    return {name: Part.of(group) for name, group in tensors.items()}


def save(run: Path, step: int, **how) -> None:
    saver = Saver(run, keep=2)
    saver.save(step, parts(state()), {"bad_steps": step}, **how)
    saver.wait()
    assert saver.newest == run / "checkpoints" / f"step-{step:09d}"


def assert_restored(run: Path) -> None:
    tensors, values = restoring.load(run / "checkpoints" / STEP)
    assert values == {"bad_steps": 7, "step": 7}
    wanted = state()
    assert tensors.keys() == wanted.keys()
    for group, names in wanted.items():
        assert set(tensors[group]) == set(names)
        for name, tensor in names.items():
            found = tensors[group][name]
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(found, tensor)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_writes_the_files_it_always_wrote(tmp_path, training):
    save(tmp_path, 7, training=training)
    folder = tmp_path / "checkpoints" / STEP
    groups = ["coder-0.safetensors", "coder-1.safetensors", "stream.safetensors"]
    assert files(tmp_path) == {f"checkpoints/{STEP}/{n}" for n in [*groups, "state.json", "manifest.json", "COMPLETE"]}
    recorded = read_json(folder / "manifest.json")["files"]
    assert recorded.keys() == {*groups, "state.json"}
    for name, told in recorded.items():
        assert told == {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    assert load_file(folder / "coder-0.safetensors").keys() == state()["coder-0"].keys()
    verify(folder)
    assert_restored(tmp_path)


def save_as_rank(run: Path) -> int:
    with process_group(RanksConfig(deadline_s=60)):
        save(run, 7)
    return 0


def test_three_ranks_write_their_rows_and_any_number_reads_them(tmp_path):
    children = [Child(tmp_path / f"{env['RANK']}.txt", partial(save_as_rank, tmp_path), env) for env in ranks(3)]
    assert [child.wait() for child in children] == [0, 0, 0], [child.output for child in children]
    folder = tmp_path / "checkpoints" / STEP
    parts = sorted(path.name for path in folder.glob("coder-0*"))
    assert parts == [f"coder-0.part-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    sizes = [(folder / part).stat().st_size for part in parts]
    assert max(sizes) < 1.3 * min(sizes)
    verify(folder)
    assert_restored(tmp_path)
    (folder / parts[1]).unlink()
    with pytest.raises(DataError, match=f"{STEP}: rows of .* are missing"):
        restoring.load(folder)


def test_it_is_the_state_of_the_step_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    """The write is held up until the training has moved on; the next checkpoint waits for it."""
    moved_on, original = threading.Event(), saving._files
    monkeypatch.setattr(saving, "_files", lambda *args: moved_on.wait() and original(*args))
    saver, tensors, values = Saver(tmp_path, keep=2), state(), {"bad_steps": 7, "lists": [1]}
    saver.make_room(parts(tensors))
    saver.save(7, parts(tensors), values)
    assert (checkpoints(tmp_path), saver.newest, saver.failed) == ([], None, False)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    values["lists"].append(2)
    threading.Timer(0.05, moved_on.set).start()
    saver.save(8, parts(tensors), {})
    assert checkpoints(tmp_path)[0] == 7
    saver.wait()
    assert checkpoints(tmp_path) == [7, 8]
    read, told = restoring.load(tmp_path / "checkpoints" / STEP)
    assert torch.equal(read["coder-0"]["weight"], state()["coder-0"]["weight"])
    assert told["lists"] == [1]


def test_the_memory_for_copies_is_taken_once(tmp_path):
    saver = Saver(tmp_path, keep=2)
    saver.make_room(parts(state()))
    saver.wait()
    before = {key: tensor.data_ptr() for key, tensor in saver.copy.held.items()}
    for step in (1, 2):
        saver.save(step, parts(state()), {})
        saver.wait()
    assert {key: tensor.data_ptr() for key, tensor in saver.copy.held.items()} == before


def no_room(draft: Path, own: object) -> None:
    raise OSError(errno.ENOSPC, f"cannot write {draft.name}: {os.strerror(errno.ENOSPC)}")


def test_what_goes_wrong_is_raised_when_it_is_waited_for_and_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 7)
    before = files(tmp_path)
    monkeypatch.setattr(saving, "_files", no_room)
    saver = Saver(tmp_path, keep=2)
    saver.save(8, parts(state()), {})
    with pytest.raises(OSError, match="No space left") as caught:
        saver.save(9, parts(state()), {})
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == before
    assert not saver.failed


def save_without_room(run: Path, failing: int) -> int:
    """Exits with 10 if this rank tells the error, 20 if it only ends with the others."""
    with process_group(RanksConfig(deadline_s=60)):
        save(run, 7)
        if int(os.environ["RANK"]) == failing:
            saving._files = no_room
        saver = Saver(run, keep=1)
        saver.save(8, parts(state()), {})
        try:
            saver.wait()
        except OSError as error:
            print(error.errno, error.strerror)
            return 10
        except PeerError:
            return 20
    return 0


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_rank_without_room_is_named_and_the_earlier_checkpoint_stays(tmp_path, failing):
    work = partial(save_without_room, tmp_path, failing)
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [10, 20], [child.output for child in children]
    pid = children[failing].process.pid
    assert f"{errno.ENOSPC} rank {failing} (" in children[0].output
    assert f", pid {pid}): cannot write " in children[0].output
    assert os.listdir(tmp_path / "checkpoints") == [STEP]
    assert_restored(tmp_path)


def test_a_part_tells_which_rows_of_what_it_holds(tmp_path):
    children = [Child(tmp_path / f"{env['RANK']}.txt", partial(save_as_rank, tmp_path), env) for env in ranks(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    with open(tmp_path / "checkpoints" / STEP / "coder-0.part-00002-of-00002.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert json.loads(header["__metadata__"]["weight"]) == {"rows": [[5, 11]], "shape": [11, 5]}
    assert header["weight"]["shape"] == [6, 5]
