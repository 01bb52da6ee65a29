"""The sparse linear ops: schema, shapes, autograd, and the public function (sections 3.1 and 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import sparse_linear_reference as reference
from sparsekern.ops._library import define

define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor ccol_indices, Tensor row_indices, int out_features)"
    " -> Tensor",
    reference=reference.sparse_linear,
    fake=lambda x, weight, bias, ccol_indices, row_indices, out_features: x.new_empty((x.shape[0], out_features)),
)
define(
    "sparse_linear_grad_input(Tensor grad_y, Tensor x, Tensor weight, Tensor ccol_indices, Tensor row_indices,"
    " bool at_nonzeros) -> Tensor",
    reference=reference.sparse_linear_grad_input,
    fake=lambda grad_y, x, weight, ccol_indices, row_indices, at_nonzeros: torch.empty_like(x),
)
define(
    "sparse_linear_grad_weight(Tensor grad_y, Tensor x, Tensor ccol_indices, Tensor row_indices, int group_size)"
    " -> Tensor",
    reference=reference.sparse_linear_grad_weight,
    fake=lambda grad_y, x, ccol_indices, row_indices, group_size: x.new_empty((row_indices.shape[0], group_size)),
)
