"""Checkpoints that ranks of any mesh have written are read by those of any other, each the rows that it holds."""

import pytest
import torch
from rigs.sharing import cases
from rigs.teams import pretended
from safetensors.torch import save_file

from sae.base.errors import DataError
from sae.lm.masking import MaskSpec
from sae.parallel.mesh import ALONE, Mesh, Shape
from sae.parallel.ranks import Share
from sae.training import restoring
from sae.training.beginning import Begun, new_part
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.saving import Part, _files
from sae.training.trainer import CoderTrainer, Schedule

SHAPES = [Shape(), Shape(data=2), Shape(latents=2), Shape(data=2, latents=3)]
CHOSEN = ["rule jumprelu", "rule feature_choice", "cross-layer topk", "scaled, glu, averaged"]


class Trainers:
    """Trainers of one kind of coder on any mesh."""

    def __init__(self, name: str) -> None:
        self.case = cases()[name]
        self.config = self.case.config()
        draw = torch.Generator().manual_seed(0)
        sites = {s.name: torch.randn(64, s.width, generator=draw) for s in (*self.case.reads, *self.case.writes)}
        recipe = Recipe(self.config.normalization)
        self.begun = Begun.of(self.config, measure(sites, self.case.reads, self.case.writes, MaskSpec(), recipe))
        self.whole = self.fresh(ALONE)
        first = 0
        for tensor in self.whole.state()[0].values():  # no two numbers are equal
            tensor.copy_(torch.arange(first, first + tensor.numel()).view(tensor.shape))
            first += tensor.numel()
        self._filled: dict[Shape, list[CoderTrainer]] = {}

    def fresh(self, mesh: Mesh) -> CoderTrainer:
        coder = new_part(self.config, self.begun, mesh.latents, "cpu")
        return CoderTrainer(coder, self.config.objectives, OptimConfig(**self.case.optim), Schedule(9, 900), mesh)

    def filled(self, shape: Shape) -> list[CoderTrainer]:
        """Returns those of all ranks of a mesh, to look at: each holds its rows of what the whole one holds."""
        if shape not in self._filled:
            self._filled[shape] = [self._with_rows(mesh) for mesh in pretended(shape)]
        return self._filled[shape]

    def _with_rows(self, mesh: Mesh) -> CoderTrainer:
        own, (tensors, values) = self.fresh(mesh), self.whole.state()
        cut = {}
        for name, tensor in tensors.items():
            rows = own.rows(name, tensor)
            cut[name] = torch.cat([tensor[piece.start : piece.stop] for piece in rows.pieces]) if rows else tensor
        own.load_state(cut, values)
        return own


def write(folder, every: list[CoderTrainer]) -> None:
    folder.mkdir()
    for trainer in every:
        _files(folder, {"coder-0": Part.of(trainer.state()[0], trainer.mesh, trainer.rows)})
    (folder / "state.json").write_text("{}")


def assert_read_back(trainers: Trainers, written: Shape, read: list[Shape], folder) -> None:
    write(folder, trainers.filled(written))
    stored = restoring.load(folder)[0]["coder-0"]
    for shape in read:
        for filled in trainers.filled(shape):
            found, wanted = trainers.fresh(filled.mesh), filled.state()
            found.load_state(restoring.Held(stored, found.rows), wanted[1])
            state = found.state()
            assert (state[0].keys(), state[1]) == (wanted[0].keys(), wanted[1])
            for name, tensor in wanted[0].items():
                assert state[0][name].dtype == tensor.dtype
                assert torch.equal(state[0][name], tensor), (shape, name)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_any_mesh_has_written_any_other_reads(name, tmp_path):
    trainers = Trainers(name)
    for number, shape in enumerate(SHAPES):
        assert_read_back(trainers, shape, SHAPES, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_also_where_ranks_hold_nothing(name, tmp_path):
    trainers, many = Trainers(name), Shape(latents=200)  # of 190, or of 61 in a block
    assert_read_back(trainers, many, SHAPES, tmp_path / "a")
    assert_read_back(trainers, Shape(latents=2), [many], tmp_path / "b")


def test_one_process_reads_what_it_always_wrote(tmp_path):
    """Checkpoints of older versions have the first row of each part, or are whole."""
    x = torch.arange(22.0).view(11, 2)
    for number, rows in enumerate((slice(0, 5), slice(5, 11))):
        scalar = torch.tensor([3.0])[number:]
        told = {"x": f'{{"first": {rows.start}, "shape": [11, 2]}}', "s": f'{{"first": {number}, "shape": []}}'}
        name = f"coder-0.part-{number + 1:05d}-of-00002.safetensors"
        save_file({"x": x[rows].clone(), "s": scalar}, tmp_path / name, told)
    save_file({"x": x, "s": torch.tensor(3.0)}, tmp_path / "coder-1.safetensors")
    (tmp_path / "state.json").write_text('{"step": 4}')
    stored, values = restoring.load(tmp_path)
    assert values == {"step": 4}
    for group in stored.values():
        assert torch.equal(group["x"], x)
        assert torch.equal(group["s"], torch.tensor(3.0))
        assert torch.equal(group.rows("x", [range(3, 7), range(0, 1)]), torch.cat([x[3:7], x[:1]]))


def test_rows_that_no_file_has_are_named(tmp_path):
    name = "coder-0.part-00001-of-00002.safetensors"
    save_file({"x": torch.zeros(5, 2)}, tmp_path / name, {"x": '{"rows": [[0, 3], [4, 6]], "shape": [6, 2]}'})
    with pytest.raises(DataError, match="rows of x are missing"):
        restoring.load(tmp_path)


def test_of_other_parts_values_the_entries_kept_are_those_of_as_many_latents():
    told = [{"step": 3, "heard": [{"per_token": own, "everywhere": 12.0}] * 2} for own in (2.0, 10.0)]
    assert [restoring.values_of_part(told, Share(rank, 2), 0.5) for rank in (0, 1)] == told
    heard = [{"per_token": 3.0, "everywhere": 12.0}] * 2
    assert restoring.values_of_part(told, Share(1, 4), 0.25) == {"step": 3, "heard": heard}
    assert restoring.values_of_part(told, Share(), 1.0)["heard"][0]["per_token"] == 12.0
    assert restoring.values_of_part({"step": 3}, Share(1, 2), 0.5) == {"step": 3}


def test_a_rank_looks_at_its_rows_alone(tmp_path, monkeypatch):
    """What is read is what it keeps, and beside it what every rank has."""
    trainers = Trainers("rule topk")
    write(tmp_path / "a", trainers.filled(Shape(data=3)))
    stored, looked = restoring.load(tmp_path / "a")[0]["coder-0"], []
    original = restoring.Stored.rows
    monkeypatch.setattr(
        restoring.Stored, "rows", lambda *args: looked.append(original(*args).nbytes) or original(*args)
    )
    mesh = pretended(Shape(latents=4))[2]
    own = trainers.fresh(mesh)
    own.load_state(restoring.Held(stored, own.rows), trainers.whole.state()[1])
    assert sum(looked) == sum(tensor.nbytes for tensor in own.state()[0].values())


@pytest.mark.parametrize("name", CHOSEN)
def test_every_row_is_copied_and_written_by_one_rank(name):
    trainers = Trainers(name)
    for shape in SHAPES:
        parts = [Part.of(own.state()[0], own.mesh, own.rows).tensors for own in trainers.filled(shape)]
        for key, tensor in trainers.whole.state()[0].items():
            rows = [row for part in parts for piece in part[key].pieces for row in piece]
            assert sorted(rows) == list(range(len(tensor) if tensor.dim() else 1)), (shape, key)
            sizes = [part[key].tensor.numel() for part in parts]
            assert sum(sizes) == tensor.numel()
            assert max(sizes) <= 2 * tensor.numel() / len(parts) + tensor.stride(0) if tensor.dim() else True
