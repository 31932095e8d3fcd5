"""One file by several ranks: the bytes that one process writes; one that fails leaves what was there."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from rigs.children import Child, ranks

from sae.base.files import save_tensors
from sae.base.tensorfile import Rows
from sae.parallel import shared_file
from sae.parallel.ranks import RanksConfig, own_share, process_group


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"W_enc": torch.randn(40, 11), "b_dec": torch.randn(11), "half": torch.randn(7).half(), "n": torch.tensor(3)}


def write(path: Path, failing: int = -1) -> int:
    """Each rank knows its own rows alone."""
    with process_group(RanksConfig(deadline_s=60)):
        share = own_share()
        rows = {name: Rows.of(x, share.of) for name, x in tensors(0).items()}
        rows = {name: row._replace(tensor=row.tensor.clone()) for name, row in rows.items()}
        if share.rank == failing:
            shared_file.write_rows = lambda place, rows: os.truncate("/nowhere", 0)
        shared_file.save_rows({path: rows}, first=not share.rank)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 2])
def test_the_bytes_are_those_of_one_process(tmp_path, n):
    path = tmp_path / "sae.safetensors"
    save_tensors(path, tensors(1))
    children = [Child(tmp_path / "logs" / env["RANK"], partial(write, path), env) for env in ranks(n)]
    assert [child.wait() for child in children] == [0] * n, [child.output for child in children]
    save_tensors(tmp_path / "alone", tensors(0))
    assert path.read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["alone", "logs", "sae.safetensors"]


def test_a_rank_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "sae.safetensors"
    save_tensors(path, tensors(1))
    before = path.read_bytes()
    children = [Child(tmp_path / "logs" / env["RANK"], partial(write, path, 1), env) for env in ranks(2)]
    assert all(child.wait() for child in children)
    assert "nowhere" in children[1].output
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["logs", "sae.safetensors"]


def test_alone_it_is_a_file_like_any_other(tmp_path):
    rows = {name: Rows.of(x, own_share().of) for name, x in tensors(0).items()}
    shared_file.save_rows({tmp_path / "one": rows}, first=True)
    save_tensors(tmp_path / "alone", tensors(0))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "alone").read_bytes()
