"""The sparse linear layer in plain PyTorch: the oracle of the tests, and the body where no kernel serves.

The weight is stored in blocks of ``group_size`` outputs by one input, in compressed-sparse-column order: PyTorch's
``sparse_bsc`` layout with blocks of (group_size, 1). ``ccol_indices[i]:ccol_indices[i + 1]`` are the blocks of input i;
``row_indices[b]`` is block b's group of outputs, ascending within an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops.grad_bias_reference import grad_bias as sum_grad_bias


def block_inputs(ccol_indices: Tensor, blocks: int) -> Tensor:
    """The input of each block: int64 (blocks,)."""
    counts = ccol_indices.diff()
    inputs = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(inputs, counts, output_size=blocks)  # a size that no value decides: traceable


def densify(
    weight: Tensor,  # (blocks, G)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    out_features: int,
) -> Tensor:
    """Lays stored values out as a dense ``(out_features, in_features)`` tensor, differentiably."""
    in_features, group_size = len(ccol_indices) - 1, weight.shape[1]
    groups = -(-out_features // group_size)
    dense = weight.new_zeros(in_features, groups, group_size)
    dense = dense.index_put((block_inputs(ccol_indices, len(row_indices)), row_indices.long()), weight)
    return dense.view(in_features, groups * group_size)[:, :out_features].t()


def compress(
    dense: Tensor,  # (O, I)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    group_size: int,
) -> Tensor:
    """The inverse of :func:`densify`: the existing blocks of a dense tensor, ``(blocks, group_size)``."""
    out_features, in_features = dense.shape
    padded = torch.nn.functional.pad(dense.t(), (0, -out_features % group_size))
    return padded.reshape(in_features, -1, group_size)[block_inputs(ccol_indices, len(row_indices)), row_indices.long()]


def sparse_linear(
    x: Tensor,  # (B, I)
    weight: Tensor,  # (blocks, G)
    bias: Tensor | None,  # (O,)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    out_features: int,
    support_bits: Tensor | None = None,  # not needed here
    support_plan: Tensor | None = None,  # not needed here
) -> Tensor:
    return torch.nn.functional.linear(x, densify(weight, ccol_indices, row_indices, out_features), bias)


def sparse_linear_backward(
    grad_y: Tensor,  # (B, O)
    x: Tensor,  # (B, I)
    weight: Tensor,  # (blocks, G)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    at_nonzeros: bool,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
    support_bits: Tensor | None = None,  # not needed here
    support_plan: Tensor | None = None,  # not needed here
) -> tuple[Tensor, Tensor, Tensor]:
    stored = weight.shape
    if len(row_indices) != len(weight):  # of single outputs
        weight = weight.reshape(-1, 1)
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if want_input:
        grad_x = grad_y @ densify(weight, ccol_indices, row_indices, grad_y.shape[1])
        if at_nonzeros:
            grad_x = torch.where(x != 0, grad_x, torch.zeros((), dtype=x.dtype, device=x.device))
    if want_weight:
        grad_weight = compress(grad_y.t() @ x, ccol_indices, row_indices, weight.shape[1]).view(stored)
    if want_bias:
        grad_bias = sum_grad_bias(grad_y)
    return grad_x, grad_weight, grad_bias
