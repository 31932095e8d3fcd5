"""A group that the caller has joined by torch.distributed is used, and stays the caller's; what ranks say of it."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from rigs.children import Child, free_port

from sae.base.errors import ConfigError
from sae.parallel import ranks
from sae.parallel.agreement import agreed
from sae.parallel.collectives import total
from sae.parallel.judging import Peer
from sae.parallel.launch import Launch
from sae.parallel.ranks import described, process_group, rank


def join(method: str, number: int) -> int:
    """No variable says anything of the group."""
    dist.init_process_group("gloo", init_method=method, rank=number, world_size=2)
    for turn in range(2):
        with process_group():
            assert agreed(lambda turn=turn: [turn, rank()]) == [turn, 0]
            assert total(torch.tensor(1.0 + rank())) == 3.0
    dist.barrier()
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("kind", ["tcp", pytest.param("file", marks=pytest.mark.slow)])
def test_a_group_of_the_callers_is_used_and_left_to_the_caller(tmp_path, kind):
    method = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{tmp_path}/group"
    children = [Child(tmp_path / f"{i}.txt", partial(join, method, i)) for i in range(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]


def test_a_group_of_the_callers_for_gpus_alone_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ConfigError, match="sums GPU tensors alone; join it by"), process_group():
        pass


def test_the_line_on_the_ranks_names_their_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setattr(ranks, "launch", lambda: Launch(local_rank=3, world_size=4))
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    peers = [Peer.from_json(Peer.here(i, ranks._device()).to_json().encode()) for i in range(2)]
    line = described(Launch("srun"), peers)
    assert line == f"ranks        2 (srun) on 1 host ({peers[0].host}); card 1; cpu:gloo,cuda:nccl"
