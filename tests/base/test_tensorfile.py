"""Files of tensors: the bytes are the library's, whoever of several processes has written which rows."""

import hashlib
import os
from functools import partial

import numpy as np
import pytest
import torch
from rigs.children import Child
from safetensors.torch import load_file, save_file

from sae.base import tensorfile
from sae.base.tensorfile import DTYPES, Rows, begin_rows, write_rows, write_tensors
from sae.parallel.ranks import Share


def one_of_each() -> dict[str, torch.Tensor]:
    plain = torch.arange(15).view(3, 5)
    found = {f"{name} ä\n": plain.to(dtype) for dtype, name in DTYPES.items()}
    return found | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "T": plain.T.float(), "b": torch.ones(7)}


@pytest.mark.parametrize("metadata", [None, {"format": 'pt "\u2028\x7f\t'}])
def test_the_bytes_are_those_of_the_library(tmp_path, monkeypatch, metadata):
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", 16)
    tensors = one_of_each()
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "theirs", metadata)
    told = write_tensors(tmp_path / "ours", tensors, metadata)
    written = (tmp_path / "ours").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    assert told == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}


def test_tensors_of_any_stride_are_written_as_what_they_hold(tmp_path):
    tensors = {
        "one": torch.zeros(()).expand(1),
        "none": torch.from_numpy(np.zeros(4, np.int64)[:0]),
        "none of many": torch.zeros(1, dtype=torch.int64).expand(0),
        "column": torch.arange(12.0).view(3, 4)[:, 1],
        "spread": torch.tensor([7]).expand(5),
        "one of a column": torch.arange(12).view(3, 4)[:1, 1],
    }
    write_tensors(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def write_own(path, rank: int) -> int:
    write_rows(path, {name: Rows.of(x, Share(rank, 3).of) for name, x in one_of_each().items()})
    return 0


@pytest.mark.slow
def test_three_processes_write_their_rows_of_one_file(tmp_path):
    tensors, path = one_of_each(), tmp_path / "together"
    begin_rows(path, {name: Rows.of(x, Share(2, 3).of) for name, x in tensors.items()})
    children = [Child(tmp_path / f"{rank}.txt", partial(write_own, path, rank)) for rank in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0], [child.output for child in children]
    write_tensors(tmp_path / "alone", tensors)
    assert path.read_bytes() == (tmp_path / "alone").read_bytes()


def test_rows_are_written_without_reading_what_others_write_beside_them(tmp_path, monkeypatch):
    path, opened = tmp_path / "file", []
    begin_rows(path, {name: Rows.of(x, Share(0, 3).of) for name, x in one_of_each().items()})
    size, plain = path.stat().st_size, os.open
    monkeypatch.setattr(os, "open", lambda at, flags, *rest: opened.append(flags) or plain(at, flags, *rest))
    write_own(path, 1)
    assert [flags & os.O_ACCMODE for flags in opened] == [os.O_WRONLY]
    assert path.stat().st_size == size
