"""Whole steps by each path are the reference's in float64: every rule, loss term and kind of coder, ties included."""

import pytest
import torch
from rigs.step_parity import CASES, DENSE, IN_FLOAT32, MICRO, SPARSE, assert_near, right, steps

from sae.kernels import dispatch, native, segmented

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("micro", [0, MICRO])
@pytest.mark.parametrize("share", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CASES)
def test_operators_of_torch_in_float64(name, tied, share, micro):
    found = steps(CASES[name], ("torch", segmented), torch.float64, micro=micro, tied=tied, share=share)
    assert_near(found, right(name, micro, tied), CASES[name].within)


@pytest.mark.parametrize("micro", [0, MICRO])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_native_kernels_in_float32(name, micro):
    if dispatch.missing("native"):
        pytest.skip(dispatch.missing("native"))
    found = steps(CASES[name], ("native", native), torch.float32, micro=micro, share=SPARSE)
    assert_near(found, right(name, micro, True), IN_FLOAT32)
