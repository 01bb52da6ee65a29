"""The convolution of sparse pixels in float32, and its transpose, which is the gradient of the input.

Each pixel's active channels are listed, and each pixel of the result adds their weight rows, which stay in L1 since all
programs go through the taps in one order. How sparse x is does not reach the host: beyond ``DENSE_FROM`` the sparse kernel
leaves the work to a dense one of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import cdiv, dot, next_power_of_2

# Density of x from which on the dense kernel works. Not measured: each product reads its weight from L1, 32 numbers a clock
# and multiprocessor, where the dense kernel multiplies 128 pairs.
DENSE_FROM = 0.25


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
def input_pixels(p, out_pixels, kh, kw, H, W, OH, OW, SH, SW, PH, PW, TRANSPOSED: tl.constexpr):
    """(the pixel of x that tap (kh, kw) adds to each pixel of the result, whether there is one)."""
    b = p // (OH * OW)
    h = p // OW % OH
    w = p % OW
    if TRANSPOSED:
        h += PH - kh
        w += PW - kw
        inside = (h >= 0) & (h % SH == 0) & (w >= 0) & (w % SW == 0)
        h = h // SH
        w = w // SW
    else:
        h = h * SH - PH + kh
        w = w * SW - PW + kw
        inside = (h >= 0) & (w >= 0)
    return (b * H + h) * W + w, inside & (h < H) & (w < W) & (p < out_pixels)


@triton.jit
def store_pixels(
    y_ptr, bias_ptr, where_ptr, acc, p, o, out_pixels, O, out_area, stride_yb, stride_yo, stride_yp,
    BIAS: tl.constexpr, WHERE: tl.constexpr,
):  # fmt: skip
    """With WHERE, zero where the tensor of y's strides is zero."""
    if BIAS:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0)[None, :]
    at = (p // out_area).to(tl.int64) * stride_yb + (p % out_area).to(tl.int64) * stride_yp
    at = at[:, None] + o.to(tl.int64)[None, :] * stride_yo
    mask = (p < out_pixels)[:, None] & (o < O)[None, :]
    if WHERE:
        acc = tl.where(tl.load(where_ptr + at, mask=mask, other=0.0) != 0, acc, 0.0)
    tl.store(y_ptr + at, acc, mask=mask)


@triton.jit
def _sparse_conv2d_kernel(
    channels_ptr,  # (C, pixels)
    values_ptr,  # (C, pixels)
    counts_ptr,  # (pixels,)
    total_ptr,  # ()
    weight_ptr,  # (KH, KW, C, O)
    bias_ptr,  # (O,)
    where_ptr,  # as y
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
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    WHERE: tl.constexpr,
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
            kh, kw = tap // KW, tap % KW
            pixel, inside = input_pixels(p, out_pixels, kh, kw, H, W, OH, OW, SH, SW, PH, PW, TRANSPOSED)
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
        store_pixels(
            y_ptr, bias_ptr, where_ptr, acc, p, o, out_pixels, O, OH * OW, stride_yb, stride_yo, stride_yp, BIAS, WHERE
        )  # fmt: skip


@triton.jit
def _dense_conv2d_kernel(
    x_ptr,  # (B, C, H, W) by its strides
    total_ptr,  # ()
    weight_ptr,  # (KH, KW, C, O)
    bias_ptr,  # (O,)
    where_ptr,  # as y
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
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    WHERE: tl.constexpr,
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
            kh, kw = tap // KW, tap % KW
            pixel, inside = input_pixels(p, out_pixels, kh, kw, H, W, OH, OW, SH, SW, PH, PW, TRANSPOSED)
            at = (pixel // (H * W)).to(tl.int64) * stride_xb + (pixel % (H * W)).to(tl.int64) * stride_xp
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                x_mask = inside[:, None] & (c < C)[None, :]
                x = tl.load(x_ptr + at[:, None] + c.to(tl.int64)[None, :] * stride_xc, mask=x_mask, other=0.0)
                w_mask = (c < C)[:, None] & (o < O)[None, :]
                w = tl.load(weight_ptr + (tap * C + c)[:, None] * O + o[None, :], mask=w_mask, other=0.0)
                acc = dot(x, w, acc)
        store_pixels(
            y_ptr, bias_ptr, where_ptr, acc, p, o, out_pixels, O, OH * OW, stride_yb, stride_yo, stride_yp, BIAS, WHERE
        )  # fmt: skip


def pixel_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, channel, pixel) of a contiguous or channels-last tensor."""
    return t.stride(0), t.stride(1), 1 if t.is_contiguous() else t.shape[1]


def pixel_lists(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(channels, values, counts, total): see the kernel."""
    B, C, H, W = x.shape
    pixels = B * H * W
    channels = torch.empty((C, pixels), dtype=torch.int32, device=x.device)
    values = torch.empty((C, pixels), dtype=torch.float32, device=x.device)
    counts = torch.empty(pixels, dtype=torch.int32, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    block_c = min(max(next_power_of_2(C), 16), 64)
    _pixel_lists_kernel[(cdiv(pixels, 32),)](
        x,
        channels,
        values,
        counts,
        total,
        pixels,
        C,
        H * W,
        *pixel_strides(x),
        BLOCK_P=32,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return channels, values, counts, total


def convolve(
    x: Tensor,  # (B, C, H, W)
    taps: Tensor,  # (KH, KW, C, O)
    bias: Tensor | None,  # (O,)
    stride: list[int],
    padding: list[int],
    y: Tensor,  # (B, O, OH, OW)
    *,
    transposed: bool = False,
    where: Tensor | None = None,  # (B, O, OH, OW) of y's strides
) -> Tensor:
    """Writes and returns y, of the transposed convolution if asked, and only where the other tensor is not zero."""
    lists = pixel_lists(x)
    *_, counts, total = lists
    limit = int(DENSE_FROM * x.numel())
    _, C, H, W = x.shape
    B, O, OH, OW = y.shape
    KH, KW = taps.shape[:2]
    out_pixels = B * OH * OW
    tensors = taps, y if bias is None else bias, y if where is None else where, y
    sizes = out_pixels, O, H, W, OH, OW
    constants = {"C": C, "KH": KH, "KW": KW, "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1]}
    constants |= {"TRANSPOSED": transposed, "BIAS": bias is not None, "WHERE": where is not None}
    constants["BLOCK_O"] = block_o = min(max(next_power_of_2(O), 16), 64)
    _sparse_conv2d_kernel[(cdiv(out_pixels, 16), cdiv(O, block_o))](
        *lists, *tensors, limit, len(counts), *sizes, *pixel_strides(y), **constants,
        UNROLL=2, BLOCK_P=16, num_warps=4,
    )  # fmt: skip
    _dense_conv2d_kernel[(cdiv(out_pixels, 64), cdiv(O, block_o))](
        x, total, *tensors, limit, *sizes, *pixel_strides(x), *pixel_strides(y), **constants,
        BLOCK_P=64, BLOCK_C=16, num_warps=8,
    )  # fmt: skip
    return y
