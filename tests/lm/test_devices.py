"""A rank spreads its model over GPUs of its own, which it counts from 0; what is not there is one line."""

import re
from types import SimpleNamespace

import pytest
import torch
from rigs.fakes import tiny_model_folder

from sae.base.errors import ConfigError
from sae.lm.devices import spread
from sae.lm.models import load_language_model
from sae.parallel import ranks
from sae.parallel.judging import Peer
from sae.parallel.launch import Launch
from sae.parallel.ranks import described, shared_out

GIB = 2**30
EIGHT = tuple("abcdefgh")


def peers(*sees, hosts=()):
    return [Peer(i, hosts[i] if hosts else "n1", i, "card", tuple(each)) for i, each in enumerate(sees)]


@pytest.mark.parametrize(
    ("sees", "wanted"),
    [
        ([EIGHT] * 8, [[i] for i in range(8)]),
        ([EIGHT] * 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([EIGHT] * 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (["ab", "cd"], [[0, 1], [0, 1]]),  # as srun --gpus-per-task 2 shows them
        (["a", "b"], [[0], [0]]),
        (["ab", "ab", "xy", "xy"], [[0], [1], [0], [1]]),  # two hosts
        (["ab", "ab", "ab"], [[0], [1], [0]]),
        (["", ""], [[0], [0]]),
    ],
)
def test_ranks_share_out_the_gpus_that_several_are_shown(sees, wanted):
    found = peers(*sees)
    assert [list(shared_out(found, i)) for i in range(len(found))] == wanted
    assert [Peer.from_json(peer.to_json()) for peer in found] == found


@pytest.fixture
def cards(monkeypatch):
    """Pretends that this host has eight GPUs; returns what makes this process one of several ranks there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((10 + number) * GIB, 80 * GIB))
    monkeypatch.setattr("sae.lm.devices.psutil.virtual_memory", lambda: SimpleNamespace(available=200 * GIB))
    monkeypatch.setattr(ranks, "launch", Launch)

    def join(number, n):
        found = peers(*[EIGHT] * n)
        monkeypatch.setattr(ranks, "rank", lambda: number)
        monkeypatch.setattr(ranks, "world_size", lambda: n)
        monkeypatch.setattr(ranks, "_joined", SimpleNamespace(peers=found, gpus=shared_out(found, number)))

    return join


def test_numbers_count_the_gpus_of_a_rank(cards):
    said = {"device_map": {"a": 0, "b": "cuda:3", "c": "cpu", "d": "disk"}, "max_memory": {"1": "9GiB", "cpu": 5}}
    alone = spread(said)
    assert alone["device_map"] == {"a": 0, "b": 3, "c": "cpu", "d": "disk"}
    assert alone["max_memory"] == {1: "9GiB", "cpu": 5}
    cards(1, 2)
    assert spread(said)["device_map"] == {"a": 4, "b": 7, "c": "cpu", "d": "disk"}
    assert spread(said)["max_memory"] == {5: "9GiB", "cpu": 5}
    assert spread({"device_map": "cuda"})["device_map"] == {"": 4}
    with pytest.raises(ConfigError, match=r"^model\.kwargs\.device_map: 4 is not there; this process has GPUs 0 to 3"):
        spread({"device_map": {"": 4}})


def test_a_rank_takes_its_part_of_the_memory_where_others_are(cards):
    assert "max_memory" not in spread({"device_map": "auto"}), "all of it is transformers' to share out"
    cards(1, 4)
    free = spread({"device_map": "auto"})["max_memory"]
    assert {name: round(size / GIB, 2) for name, size in free.items()} == {2: 10.8, 3: 11.7, "cpu": 45.0}
    assert spread({"device_map": "auto", "max_memory": {0: "1GiB"}})["max_memory"] == {2: "1GiB"}


def test_the_first_line_says_how_many_gpus_a_rank_has(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    assert "; card, 4 a rank; nccl" in described(Launch("srun"), peers(EIGHT, EIGHT))
    assert "; card; nccl" in described(Launch("srun"), peers(*[EIGHT] * 8))


def test_ranks_write_to_folders_of_their_own(cards, tmp_path):
    said = {"device_map": "auto", "offload_folder": str(tmp_path / "away")}
    assert spread(said)["offload_folder"] == str(tmp_path / "away")
    cards(1, 2)
    assert spread(said)["offload_folder"] == str(tmp_path / "away" / "rank-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^model\.kwargs\.offload_folder: .*file/rank-1 cannot be written to: "):
        spread({**said, "offload_folder": str(tmp_path / "file")})


PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
REST = dict.fromkeys(PARTS, "cpu")


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"device_map": {"": 0}}, "device_map: 0 is not there; this process has no GPU, beside cpu and disk"),
        ({"device_map": "auto", "max_memory": {"1": 5}}, "max_memory: '1' is not there; this process has no GPU"),
        (
            {"device_map": {"model.layer": "disk"}},
            "device_map: 'model.layer' is no module of LlamaForCausalLM. Did",
        ),
        ({"device_map": {"model": "cpu"}}, "device_map: it does not say where these go: lm_head.weight"),
        ({"device_map": {"model.layers.1": "disk"}}, "device_map: it does not say where these go: model.embed"),
    ],
)
def test_a_map_that_cannot_be_is_one_line_before_weights_are_read(kwargs, told, tmp_path):
    folder = tiny_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'model.kwargs.{told}')}"):
        load_language_model(folder, kwargs=kwargs)


def test_a_tensor_that_is_to_be_read_from_disk_must_be_there(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_model_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model\.name: the files of .* lack tensors, which would be random: "):
        load_language_model(folder, kwargs={"device_map": {**REST, "model.layers": "disk"}})


@pytest.mark.parametrize("device", ["xpu", "npu:1", "mps"])
def test_other_accelerators_are_looked_for(device):
    with pytest.raises(ConfigError, match=rf"^model\.kwargs\.device_map: '{device}' is not available here"):
        spread({"device_map": device})
