"""A coder that stays on disk: the memory of a process that encodes, decodes and saves with a file larger than that."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import sae
from sae.base.files import write_json
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.selection.topk import TopK

D, D_SAE, BLOCK = 256, 180_000, 4096
READER = """
import ctypes, json, mmap, re, sys, threading
from pathlib import Path
import torch
import sae

def memory():
    kinds = dict(re.findall(r"(Rss\\w+):\\s+(\\d+) kB", Path("/proc/self/status").read_text()))
    return {"own": 1024 * int(kinds["RssAnon"]), "mapped": 1024 * (int(kinds["RssFile"]) + int(kinds["RssShmem"]))}

def drop_pages(tensor):  # what was changed in them would be lost; the kernel does so when it is short of memory
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0

torch.set_num_threads(1)
x = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
dtype, folder = sys.argv[2], Path(sys.argv[1])
sae.load(folder / "small", device_map="disk", dtype=dtype)(x)  # what is imported on the way
peaks, done = {}, threading.Event()
def watch():
    while not done.wait(0.002):
        for kind, value in memory().items():
            key = f"{doing} {kind}"
            peaks[key] = max(value - before[kind], peaks.get(key, 0))
before, doing = memory(), "run"
watcher = threading.Thread(target=watch)
watcher.start()
coder = sae.load(folder / "large", device_map="disk", dtype=dtype)
out, latents = coder(x)
read = memory()
for tensor in (coder.W_enc, coder.W_dec):
    drop_pages(tensor)
dropped = read["mapped"] - memory()["mapped"]
again = coder(x)
doing = "save"
sae.save(coder, folder / "copy")
done.set()
watcher.join()
assert torch.equal(again.out, out) and torch.equal(again.latents.ids, latents.ids)
found = {"ids": latents.ids.tolist(), "sum": float(out.double().sum())}
print(json.dumps({"peaks": peaks, "dropped": dropped, **found}))
"""


def rows(number, count, seed):
    """Random rows of a block of a matrix, the same whenever they are asked for."""
    return np.random.default_rng((seed, number)).standard_normal((count, D), dtype=np.float32)


def written(folder, d_sae):
    """Writes a coder block by block; returns the size of its file."""
    spec, header, size = CoderSpec(D, D, d_sae, TopK(8)), {}, 0
    tensors = SparseCoder(spec, "meta").state_dict()
    for name, tensor in tensors.items():
        start, size = size, size + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "sae.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for seed, tensor in enumerate(tensors.values()):
            if tensor.dim() < 2:
                file.write(np.zeros(tensor.numel(), np.float32).tobytes())
                continue
            for number, first in enumerate(range(0, len(tensor), BLOCK)):
                file.write(rows(number, min(BLOCK, len(tensor) - first), seed).tobytes())
    write_json(folder / "cfg.json", spec.to_json())
    return size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory by kind is told by Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_file(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    size = written(tmp_path / "large", D_SAE)
    written(tmp_path / "small", 3000)
    assert size > 256 * 2**20
    code = [sys.executable, "-c", READER, str(tmp_path), dtype]
    found = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    print(dtype, size, found["peaks"], found["dropped"])
    assert found["peaks"]["run own"] < size / 6
    assert found["peaks"]["save own"] < size / 6
    assert found["dropped"] > size / 2, "pages of the file, which the kernel may have back whenever it wants"
    for name, tensor in sae.load(tmp_path / "large", lazy=True).state_dict().items():
        assert torch.equal(sae.load(tmp_path / "copy", lazy=True).state_dict()[name], tensor), "as it is stored"
    if dtype == "float32":
        whole, x = sae.load(tmp_path / "large"), torch.randn(300, D, generator=torch.Generator().manual_seed(1))
        expected = whole(x)
        assert found["ids"] == expected.latents.ids.tolist()
        assert found["sum"] == pytest.approx(float(expected.out.double().sum()), rel=1e-4)
