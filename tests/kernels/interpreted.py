"""The kernels for cards, interpreted: `test_cuda.py` has a process run this, as Triton must be told before its import.

It shows what is computed. It has one program after the other, on numpy, and so shows no race, no use of what is beyond
the end, no overflow and no want of registers: `tests/gpu/test_kernels.py` does, on a card.
"""

import pytest
from rigs.kernel_contract import *  # noqa: F403
from rigs.kernel_contract import INTERPRETED

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from sae.kernels import cuda
from sae.kernels.cuda import dealing, largest


@pytest.fixture
def path(monkeypatch):
    """The path with sizes at which a few numbers are several groups of groups, and several pieces."""
    monkeypatch.setattr(largest, "HELD", 64)
    monkeypatch.setattr(dealing, "PIECE", 2)
    return cuda


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def large():
    return False
