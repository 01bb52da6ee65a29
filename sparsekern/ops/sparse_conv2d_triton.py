"""The sparse-input convolution on GPUs.

Where float32 is asked for strictly (TF32 off) the tensor cores are out, and what is left are as many multiplications as
x has non-zeros: each pixel's active channels are listed, and each output pixel adds their weight rows, which stay in L1
since all programs go through the taps in one order. Everything else, the gradients included, is cuDNN's: at a tenth of the
products, tensor cores are still faster. How sparse x is does not reach the host: beyond ``DENSE_FROM`` the sparse kernel
leaves the work to a dense one of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops._triton import cdiv, dot, next_power_of_2, on_device

DENSE_FROM = 0.25  # density of x from which on the dense kernel works
MIN_PRODUCTS = 2**30  # of the dense convolution: below, a launch or two decide, and cuDNN needs one


@triton.jit
def _pixel_lists_kernel(
    x_ptr,  # (B, C, H, W) by its strides
    channels_ptr,  # (C, pixels) int32: the j-th active channel of each pixel
    values_ptr,  # (C, pixels) float32
    counts_ptr,  # (pixels,) int32
    total_ptr,  # () int32, zero before
    pixels,
    C,
    area,  # H W
    stride_b,
    stride_c,
    stride_p,  # of a pixel: H and W are one dimension in memory
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = (p // area).to(tl.int64) * stride_b + (p % area).to(tl.int64) * stride_p
    counts = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (p < pixels)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + at[:, None] + c.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0)
        active = (x != 0).to(tl.int32)
        slot = (counts[:, None] + tl.cumsum(active, 1) - 1).to(tl.int64) * pixels + p[:, None]
        tl.store(channels_ptr + slot, tl.broadcast_to(c[None, :], (BLOCK_P, BLOCK_C)), mask=active != 0)
        tl.store(values_ptr + slot, x, mask=active != 0)
        counts += tl.sum(active, 1)
    tl.store(counts_ptr + p, counts, mask=p < pixels)
    tl.atomic_add(total_ptr, tl.sum(counts).to(tl.int64), sem="relaxed")


@triton.jit
def input_pixels(p, out_pixels, kh, kw, H, W, OH, OW, SH, SW, PH, PW):
    """(the input pixel under tap (kh, kw) of each output pixel, whether there is one)."""
    b = p // (OH * OW)
    ih = p // OW % OH * SH - PH + kh
    iw = p % OW * SW - PW + kw
    inside = (p < out_pixels) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    return (b * H + ih) * W + iw, inside


@triton.jit
def store_pixels(
    y_ptr, bias_ptr, acc, p, o, out_pixels, O, out_area, stride_yb, stride_yo, stride_yp, BIAS: tl.constexpr
):
    if BIAS:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0)[None, :]
    at = (p // out_area).to(tl.int64) * stride_yb + (p % out_area).to(tl.int64) * stride_yp
    mask = (p < out_pixels)[:, None] & (o < O)[None, :]
    tl.store(y_ptr + at[:, None] + o.to(tl.int64)[None, :] * stride_yo, acc, mask=mask)


@triton.jit
def _sparse_conv2d_kernel(
    channels_ptr,  # (C, pixels)
    values_ptr,  # (C, pixels)
    counts_ptr,  # (pixels,)
    total_ptr,  # ()
    weight_ptr,  # (KH, KW, C, O)
    bias_ptr,  # (O,)
    y_ptr,  # (B, O, OH, OW) by its strides
    limit,
    pixels,
    out_pixels,
    O,
    H,
    W,
    OH,
    OW,
    stride_yb,
    stride_yo,
    stride_yp,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BIAS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (tile of output pixels, tile of outputs), if x is sparse enough."""
    if tl.load(total_ptr) <= limit:
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for tap in range(0, KH * KW):
            pixel, inside = input_pixels(p, out_pixels, tap // KW, tap % KW, H, W, OH, OW, SH, SW, PH, PW)
            count = tl.load(counts_ptr + pixel, mask=inside, other=0)
            for start in range(0, tl.max(count), UNROLL):
                for step in tl.static_range(UNROLL):
                    j = start + step
                    live = j < count
                    c = tl.load(channels_ptr + tl.full((), j, tl.int64) * pixels + pixel, mask=live, other=0)
                    x = tl.load(values_ptr + tl.full((), j, tl.int64) * pixels + pixel, mask=live, other=0.0)
                    row = (tap * C + c) * O
                    mask = live[:, None] & (o < O)[None, :]
                    acc += x[:, None] * tl.load(weight_ptr + row[:, None] + o[None, :], mask=mask, other=0.0)
        store_pixels(y_ptr, bias_ptr, acc, p, o, out_pixels, O, OH * OW, stride_yb, stride_yo, stride_yp, BIAS)


@triton.jit
def _dense_conv2d_kernel(
    x_ptr,  # (B, C, H, W) by its strides
    total_ptr,  # ()
    weight_ptr,  # (KH, KW, C, O)
    bias_ptr,  # (O,)
    y_ptr,  # (B, O, OH, OW) by its strides
    limit,
    out_pixels,
    O,
    H,
    W,
    OH,
    OW,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_yb,
    stride_yo,
    stride_yp,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same if x is not sparse enough."""
    if tl.load(total_ptr) > limit:
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for tap in range(0, KH * KW):
            pixel, inside = input_pixels(p, out_pixels, tap // KW, tap % KW, H, W, OH, OW, SH, SW, PH, PW)
            at = (pixel // (H * W)).to(tl.int64) * stride_xb + (pixel % (H * W)).to(tl.int64) * stride_xp
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                x_mask = inside[:, None] & (c < C)[None, :]
                x = tl.load(x_ptr + at[:, None] + c.to(tl.int64)[None, :] * stride_xc, mask=x_mask, other=0.0)
                w_mask = (c < C)[:, None] & (o < O)[None, :]
                w = tl.load(weight_ptr + (tap * C + c)[:, None] * O + o[None, :], mask=w_mask, other=0.0)
                acc = dot(x, w, acc)
        store_pixels(y_ptr, bias_ptr, acc, p, o, out_pixels, O, OH * OW, stride_yb, stride_yo, stride_yp, BIAS)


def strict_float32(x: Tensor) -> bool:
    """Whether x is float32 and convolutions may not round it to TF32; "none" leaves it to the wider setting."""
    if x.dtype != torch.float32:
        return False
    backends = torch.backends
    settings = (level.fp32_precision for level in (backends.cudnn.conv, backends.cudnn, backends))
    return next((setting for setting in settings if setting != "none"), "ieee") != "tf32"


def way(x: Tensor, weight: Tensor, out_area: int) -> str:
    """Which way is the fastest: "sparse" or "dense"."""
    products = x.shape[0] * out_area * weight.numel()
    few = (
        max(x.shape[0] * max(x.shape[2] * x.shape[3], out_area), weight.numel()) < 2**31
    )  # pixels and weights in int32
    return "sparse" if strict_float32(x) and products >= MIN_PRODUCTS and few else "dense"


def _pixel_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, channel, pixel) of a contiguous or channels-last tensor."""
    return t.stride(0), t.stride(1), 1 if t.is_contiguous() else t.shape[1]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, y: Tensor) -> Tensor:
    B, C, H, W = x.shape
    O, _, KH, KW = weight.shape
    OH, OW = y.shape[2:]
    pixels, out_pixels = B * H * W, B * OH * OW
    channels = torch.empty((C, pixels), dtype=torch.int32, device=x.device)
    values = torch.empty((C, pixels), dtype=torch.float32, device=x.device)
    counts = torch.empty(pixels, dtype=torch.int32, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    _pixel_lists_kernel[(cdiv(pixels, 32),)](
        x,
        channels,
        values,
        counts,
        total,
        pixels,
        C,
        H * W,
        *_pixel_strides(x),
        BLOCK_P=32,
        BLOCK_C=min(max(next_power_of_2(C), 16), 64),
        num_warps=4,
    )
    taps_first = weight.permute(2, 3, 1, 0).contiguous()
    limit = int(DENSE_FROM * x.numel())
    sizes = out_pixels, O, H, W, OH, OW
    constants = {"C": C, "KH": KH, "KW": KW, "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1]}
    constants["BIAS"] = bias is not None
    bias = y if bias is None else bias
    block_o = min(max(next_power_of_2(O), 16), 64)
    _sparse_conv2d_kernel[(cdiv(out_pixels, 16), cdiv(O, block_o))](
        channels,
        values,
        counts,
        total,
        taps_first,
        bias,
        y,
        limit,
        pixels,
        *sizes,
        *_pixel_strides(y),
        **constants,
        UNROLL=2,
        BLOCK_P=16,
        BLOCK_O=block_o,
        num_warps=4,
    )
    _dense_conv2d_kernel[(cdiv(out_pixels, 64), cdiv(O, block_o))](
        x,
        total,
        taps_first,
        bias,
        y,
        limit,
        *sizes,
        *_pixel_strides(x),
        *_pixel_strides(y),
        **constants,
        BLOCK_P=64,
        BLOCK_O=block_o,
        BLOCK_C=16,
        num_warps=8,
    )
    return y


def sparse_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    bias: Tensor | None,  # (O,)
    stride: list[int],
    padding: list[int],
) -> Tensor:
    size = [(x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // stride[d] + 1 for d in (0, 1)]
    if x.numel() == 0 or way(x, weight, size[0] * size[1]) == "dense":
        return reference.sparse_conv2d(x, weight, bias, stride, padding)
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], *size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    with on_device(x):
        return _forward(x, weight, bias, stride, padding, y)


def sparse_conv2d_grad_input(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    stride: list[int],
    padding: list[int],
    at_nonzeros: bool,
) -> Tensor:
    grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad_y, stride, padding)
    return grad_x.masked_fill_(x == 0, 0) if at_nonzeros else grad_x


def sparse_conv2d_grad_weight(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return reference.sparse_conv2d_grad_weight(grad_y, x, kernel_size, stride, padding)
