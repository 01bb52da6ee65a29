"""The sparse-input convolution in plain PyTorch: the oracle of the tests, and the body where no kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active

from sparsekern.ops.grad_bias_reference import grad_bias as sum_grad_bias


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is that and not plainly contiguous as well, as the dense convolution decides.

    vmap cannot tell (see ``_check.is_channels_last``).
    """
    if x.is_contiguous() or are_transforms_active() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def sparse_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    bias: Tensor | None,  # (O,)
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding)


def sparse_conv2d_backward(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    stride: list[int],
    padding: list[int],
    at_nonzeros: bool,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad_y, x, weight)
    if x.dtype == torch.float16 and x.device.type == "cpu":  # PyTorch would sum in float16 there
        tensors = [t.float() for t in tensors]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *tensors, None, stride, padding, (1, 1), False, (0, 0), 1, (want_input, want_weight, False)
    )
    if want_input and at_nonzeros:
        grad_x = torch.where(x != 0, grad_x, torch.zeros((), dtype=grad_x.dtype, device=x.device))
    return (
        grad_x.to(x.dtype).contiguous(memory_format=memory_format(x)) if want_input else x.new_empty(0),
        grad_weight.to(x.dtype).contiguous(memory_format=memory_format(weight)) if want_weight else x.new_empty(0),
        sum_grad_bias(grad_y) if want_bias else x.new_empty(0),
    )
