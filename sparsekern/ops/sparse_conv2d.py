"""The sparse-input convolution ops: schema, shapes, autograd, and the public function (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops._library import define


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is that and not plainly contiguous as well, as the dense convolution decides."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _out_size(x, kernel_size, stride, padding):
    return [(x.shape[2 + d] + 2 * padding[d] - kernel_size[d]) // stride[d] + 1 for d in (0, 1)]


def _sparse_conv2d_fake(x, weight, bias, stride, padding):
    shape = (x.shape[0], weight.shape[0], *_out_size(x, weight.shape[2:], stride, padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


# x and grad_y are contiguous or channels-last; results have x's memory format (grad_weight: contiguous).
define(
    "sparse_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding) -> Tensor",
    reference=reference.sparse_conv2d,
    fake=_sparse_conv2d_fake,
)
define(
    "sparse_conv2d_grad_input(Tensor grad_y, Tensor x, Tensor weight, int[2] stride, int[2] padding,"
    " bool at_nonzeros) -> Tensor",
    reference=reference.sparse_conv2d_grad_input,
    fake=lambda grad_y, x, weight, stride, padding, at_nonzeros: torch.empty_like(x),
)
define(
    "sparse_conv2d_grad_weight(Tensor grad_y, Tensor x, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    reference=reference.sparse_conv2d_grad_weight,
    fake=lambda grad_y, x, kernel_size, stride, padding: x.new_empty((grad_y.shape[1], x.shape[1], *kernel_size)),
)
