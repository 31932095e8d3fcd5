"""The sparse products by library kernels that read each row once and never build an [nnz, d] tensor.

Measured on two CPU cores (1,024 tokens, d 576, 4,096 latents, k 32): 0.7 ms for `spmm`, 1.1 ms for `sddmm`, against
25-40 ms by gather or by dense products.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import reference

SAMPLED_DTYPES = (torch.float32, torch.float64)

with warnings.catch_warnings():  # torch says once per process that compressed rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], size=(0, 0))


def spmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    dense: Float[Tensor, "m d"],
) -> Float[Tensor, "rows d"]:
    """Returns the sparse matrix times `dense`: a weighted sum of rows, which is what an embedding bag computes."""
    if columns.numel() == 0:
        return dense.new_zeros(offsets.numel() - 1, dense.shape[1])
    return F.embedding_bag(
        columns, dense, offsets, mode="sum", per_sample_weights=values.to(dense.dtype), include_last_offset=True
    )


def sddmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns <a_i, b_j> for every entry (i, j) of the support."""
    if columns.numel() == 0 or a.dtype not in SAMPLED_DTYPES:
        return reference.sddmm(offsets, columns, a, b)
    pattern = torch.sparse_csr_tensor(
        offsets, columns, a.new_zeros(columns.numel()), size=(len(a), len(b)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
