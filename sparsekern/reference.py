"""The functions of :mod:`sparsekern.functional` in plain PyTorch, differentiated by autograd: the oracle of every test.

The same names, arguments and errors; no kernel of sparsekern runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import _check
from sparsekern.ops import k_winners as _k_winners
from sparsekern.ops import k_winners_reference as _k_winners_reference
from sparsekern.ops import sparse_linear as _sparse_linear
from sparsekern.ops.sparse_conv2d import check_sparse_conv2d, pair
from sparsekern.ops.sparse_linear_reference import densify

__all__ = ["k_winners", "k_winners2d", "sparse_conv2d", "sparse_linear"]


def _rows(x, k, duty_cycle, boost_strength, channels, inner):
    y, _, counts = _k_winners_reference.k_winners(x, k, duty_cycle, boost_strength, channels, inner)
    return y, counts


def k_winners(x: Tensor, k: int, duty_cycle: Tensor | None = None, boost_strength: float = 0.0) -> Tensor:
    """See :func:`sparsekern.functional.k_winners`."""
    strength = _k_winners.strength_tensor("k_winners", boost_strength, x)
    return _k_winners.k_winners_counted(x, k, duty_cycle, strength, rows=_rows)[0]


def k_winners2d(
    x: Tensor, k: int, duty_cycle: Tensor | None = None, boost_strength: float = 0.0, local: bool = False
) -> Tensor:
    """See :func:`sparsekern.functional.k_winners2d`."""
    strength = _k_winners.strength_tensor("k_winners2d", boost_strength, x)
    return _k_winners.k_winners2d_counted(x, k, duty_cycle, strength, local, rows=_rows)[0]


def _grad_at_nonzeros(x: Tensor) -> Tensor:
    """x, whose gradient is dropped where x is zero."""
    return torch.where(x != 0, x, x.detach())


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    sparse_input_grad: bool = False,
) -> Tensor:
    """See :func:`sparsekern.functional.sparse_linear`."""
    _sparse_linear.check_sparse_linear(x, weight, ccol_indices, row_indices, out_features, bias)
    _sparse_linear.check_support(ccol_indices, row_indices, -(-out_features // weight.shape[1]))
    x, weight, bias = _check.autocast("sparse_linear", x, weight, bias)
    x = _grad_at_nonzeros(x) if sparse_input_grad else x
    return torch.nn.functional.linear(x, densify(weight, ccol_indices, row_indices, out_features), bias)


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    *,
    sparse_input_grad: bool = False,
) -> Tensor:
    """See :func:`sparsekern.functional.sparse_conv2d`."""
    stride, padding = pair("sparse_conv2d", "stride", stride, 1), pair("sparse_conv2d", "padding", padding, 0)
    check_sparse_conv2d(x, weight, bias, stride, padding)
    x, weight, bias = _check.autocast("sparse_conv2d", x, weight, bias)
    x = _grad_at_nonzeros(x) if sparse_input_grad else x
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding)
