"""Shared set-up: shapes in signatures are checked while tests run, the network is closed, randomness is seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLCONFIGDIR", os.path.join(os.environ.get("TMPDIR", "/tmp"), "matplotlib"))

from jaxtyping import install_import_hook

install_import_hook(
    ["sae.coder", "sae.kernels", "sae.selection", "sae.objectives", "sae.metrics", "sae.spec", "sae.normalization"],
    "beartype.beartype",
)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
