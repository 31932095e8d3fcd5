"""Whole steps by the kernels for cards, interpreted: `test_cuda.py` has a process run this."""

import pytest
import torch
from rigs.step_parity import CASES, IN_FLOAT32, INTERPRETED, MICRO, SPARSE, assert_near, right, steps

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from sae.kernels import cuda
from sae.kernels.cuda import dealing, largest


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_kernels_for_cards_in_float32(name, monkeypatch):
    monkeypatch.setattr(cuda, "takes", lambda *tensors: all(t is None or t.dtype in cuda.DTYPES for t in tensors))
    monkeypatch.setattr(largest, "HELD", 64)
    monkeypatch.setattr(dealing, "PIECE", 8)
    found = steps(CASES[name], ("triton", cuda), torch.float32, micro=MICRO, share=SPARSE)
    assert_near(found, right(name, MICRO, True), IN_FLOAT32)
