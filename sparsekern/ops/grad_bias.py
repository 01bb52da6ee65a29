"""The op of a bias's gradient, which the layers with weights share.

PyTorch's own sum over rows rounds differently with the number of threads (37 float32 columns of 1000 rows, for one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import grad_bias_reference as reference
from sparsekern.ops._library import define

define(
    "grad_bias(Tensor grad_y) -> Tensor",
    reference=reference.grad_bias,
    fake=lambda grad_y: grad_y.new_empty((grad_y.shape[1],)),
)


_grad_bias = torch.ops.sparsekern.grad_bias.default


def grad_bias(
    grad_y: Tensor,  # (B, O) or (B, O, H, W)
    twice: bool,
) -> Tensor:
    """The sum over all but the channels, (O,); differentiable again if twice."""
    return reference.grad_bias(grad_y) if twice else _grad_bias(grad_y)
