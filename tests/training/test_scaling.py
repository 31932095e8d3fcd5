"""On a real layer the error falls with the active latents and with all latents (2406.04093, section 3)."""

import itertools
import math

import pytest

from sae.base.settings import decode
from sae.training.config import TrainConfig
from sae.training.run import train

KS, WIDTHS = (4, 8, 16, 32), (64, 128, 256, 512)


@pytest.mark.slow
def test_log_fvu_falls_with_log_k_and_with_log_n(tmp_path):
    coders = {f"k={k}": {"d_sae": 256, "selection": {"type": "topk", "k": k}} for k in KS}
    coders |= {f"n={n}": {"d_sae": n, "selection": {"type": "topk", "k": 16}} for n in WIDTHS}
    data = {
        "name": "scaling",
        "model": {"name": "quickstart"},
        "text": {"source": "quickstart", "context_length": 128},
        "activations": {"sites": ["layers.2"]},
        "grid": {"coder": coders},
        "tokens": 200 * 1024,
        "batch_tokens": 1024,
        "eval": {"tokens": 8192},
    }
    metrics = train(decode(TrainConfig, data), run_dir=tmp_path / "run").metrics
    log_fvu = {name.rpartition("/")[2]: math.log(found["reconstruction"]["fvu"]) for name, found in metrics.items()}
    for names in ([f"k={k}" for k in KS], [f"n={n}" for n in WIDTHS]):
        values = [log_fvu[name] for name in names]
        assert all(after < before - 0.02 for before, after in itertools.pairwise(values)), log_fvu
