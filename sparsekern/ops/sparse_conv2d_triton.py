"""The sparse-input convolution on GPUs: which way is the fastest, by shapes alone, as no count of zeros reaches the host.

Where float32 is asked for strictly (TF32 off) the tensor cores are out, and what is left are as many multiplications as
there are non-zeros: of x in the forward, of the incoming gradient in both gradients.

- by pixels (``sparse_conv2d_pixels_triton.py``): the forward and the gradient of the input.
- by channels (``sparse_conv2d_channels_triton.py``): the gradient of the weight.
- dense, by cuDNN: everything else. At a tenth of the products, tensor cores are still faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import sparse_conv2d_channels_triton as by_channels
from sparsekern.ops import sparse_conv2d_pixels_triton as by_pixels
from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops._triton import allows_tf32, on_device
from sparsekern.ops.grad_bias_reference import grad_bias as sum_grad_bias

# Of the dense convolution. Not measured: below, at 60 TFLOP/s, cuDNN's one launch takes less than 40 us, and three to five
# launches of 3 us with lists to write and read in between leave too little to win.
MIN_PRODUCTS = 2**30
MAX_SIZE = 2**31 - 2**24  # of every tensor: elements are numbered in int32, of whole tiles
MAX_CHANNELS = 2**18  # tiles of them are the second dimension of a grid


def strict_float32(x: Tensor) -> bool:
    """Whether x is float32 and convolutions may not round it to TF32."""
    return x.dtype == torch.float32 and not allows_tf32(torch.backends.cudnn.conv, torch.backends.cudnn)


def way(x: Tensor, weight_shape: torch.Size, out_size: list[int], padding: list[int]) -> str:
    """Which way is the fastest, for gradients too: "sparse" or "dense"."""
    B, C, H, W = x.shape
    out_pixels, weights = B * out_size[0] * out_size[1], weight_shape.numel()
    sizes = C * B * (H + 2 * padding[0]) * (W + 2 * padding[1]), weight_shape[0] * out_pixels, weights
    numbered = max(sizes) < MAX_SIZE and max(weight_shape[:2]) < MAX_CHANNELS
    return "sparse" if strict_float32(x) and numbered and out_pixels * weights >= MIN_PRODUCTS else "dense"


def sparse_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    bias: Tensor | None,  # (O,)
    stride: list[int],
    padding: list[int],
) -> Tensor:
    size = [(x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // stride[d] + 1 for d in (0, 1)]
    if x.numel() == 0 or way(x, weight.shape, size, padding) == "dense":
        return reference.sparse_conv2d(x, weight, bias, stride, padding).contiguous(
            memory_format=reference.memory_format(x)
        )
    shape = (x.shape[0], weight.shape[0], *size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))
    with on_device(x):
        return by_pixels.convolve(x, weight.permute(2, 3, 1, 0).contiguous(), bias, stride, padding, y)


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
    wanted = (want_input, want_weight, want_bias)
    if x.numel() == 0 or way(x, weight.shape, grad_y.shape[2:], padding) == "dense":
        return reference.sparse_conv2d_backward(grad_y, x, weight, stride, padding, at_nonzeros, *wanted)
    grad_x, grad_weight, grad_bias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    with on_device(x):
        if want_input:
            taps, grad_x = weight.permute(2, 3, 0, 1).contiguous(), torch.empty_like(x)
            where = x if at_nonzeros else None
            by_pixels.convolve(grad_y, taps, None, stride, padding, grad_x, transposed=True, where=where)
        if want_weight:
            grad_weight = by_channels.grad_weight(grad_y, x, weight.shape, stride, padding)
            grad_weight = grad_weight.contiguous(memory_format=reference.memory_format(weight))
        if want_bias:
            grad_bias = sum_grad_bias(grad_y)
    return grad_x, grad_weight, grad_bias
