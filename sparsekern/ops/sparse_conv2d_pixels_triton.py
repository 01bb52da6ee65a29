"""The convolution of sparse pixels in float32, and its transpose, which is the gradient of the input.

Each pixel's active channels are listed, and each pixel of the result adds their weight rows, which stay in L1 since all
programs go through the taps in one order. A step of the loop, eight products a thread, takes 30 instructions: 7.5 cycles
of a multiprocessor, as many as L1 takes for the weights. Few pixels a program wait the least for the longest of their
lists. How sparse x is does not reach the host: beyond ``DENSE_FROM`` the sparse kernel leaves the work to a dense one of
its own. All tensors have less than 2^31 elements here.
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
    entries_ptr,  # (pixels, C) int64: each pixel's active channels, as their weights' offset above the value's bits
    counts_ptr,  # (pixels,) int32
    total_ptr,  # () int64, zero before
    pixels,
    C,
    O,
    area,  # H W
    stride_b,
    stride_c,
    stride_p,  # of a pixel: H and W are one dimension in memory
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = p // area * stride_b + p % area * stride_p
    counts = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (p < pixels)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + (at[:, None] + c[None, :] * stride_c), mask=mask, other=0.0)
        active = (x != 0).to(tl.int32)
        slot = p[:, None] * C + counts[:, None] + tl.cumsum(active, 1) - 1
        row = (c * O).to(tl.int64)[None, :] << 32
        bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(entries_ptr + slot, row | bits, mask=active != 0)
        counts += tl.sum(active, 1)
    tl.store(counts_ptr + p, counts, mask=p < pixels)
    tl.atomic_add(total_ptr, tl.sum(counts).to(tl.int64), sem="relaxed")


@triton.jit
def input_index(at, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(the row or column of x that a tap adds to row or column `at` of the result, whether there is one)."""
    if TRANSPOSED:
        i = at + PADDING - tap
        inside = (i >= 0) & (i % STRIDE == 0)
        i = i // STRIDE
    else:
        i = at * STRIDE - PADDING + tap
        inside = i >= 0
    return i, inside & (i < size)


@triton.jit
def store_pixels(
    y_ptr, bias_ptr, where_ptr, acc, p, o, out_pixels, O, out_area, stride_yb, stride_yo, stride_yp,
    BIAS: tl.constexpr, WHERE: tl.constexpr,
):  # fmt: skip
    """With WHERE, zero where the tensor of y's strides is zero."""
    if BIAS:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0)[None, :]
    at = p // out_area * stride_yb + p % out_area * stride_yp
    at = at[:, None] + o[None, :] * stride_yo
    mask = (p < out_pixels)[:, None] & (o < O)[None, :]
    if WHERE:
        acc = tl.where(tl.load(where_ptr + at, mask=mask, other=0.0) != 0, acc, 0.0)
    tl.store(y_ptr + at, acc, mask=mask)


@triton.jit
def _sparse_conv2d_kernel(
    entries_ptr,  # (pixels, C)
    counts_ptr,  # (pixels,)
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
    WHOLE: tl.constexpr,  # tiles of outputs have no end that is missing
    ALIGNED: tl.constexpr,  # bytes: weights' rows are multiples of it
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (tile of output pixels, tile of outputs), if x is sparse enough."""
    if tl.load(total_ptr) <= limit:
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for kh in range(0, KH):
            h, inside_h = input_index(p // OW % OH, kh, H, SH, PH, TRANSPOSED)
            inside_h = inside_h & (p < out_pixels)
            first = (p // (OH * OW) * H + h) * W
            for kw in range(0, KW):
                w, inside_w = input_index(p % OW, kw, W, SW, PW, TRANSPOSED)
                count = tl.load(counts_ptr + (first + w), mask=inside_h & inside_w, other=0)
                entries = entries_ptr + (first + w) * C
                weights = (weight_ptr + (kh * KW + kw) * C * O + o)[None, :]
                for start in range(0, tl.max(count), UNROLL):
                    at = entries + start
                    for step in tl.static_range(UNROLL):
                        live = start + step < count
                        entry = tl.load(at + step, mask=live, other=0)
                        x = entry.to(tl.int32).to(tl.float32, bitcast=True)
                        row = (entry >> 32).to(tl.int32)
                        mask = live[:, None] if WHOLE else live[:, None] & (o < O)[None, :]
                        at_row = tl.multiple_of(weights + row[:, None], (1, ALIGNED))
                        acc += x[:, None] * tl.load(at_row, mask=mask, other=0.0)
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
            h, inside_h = input_index(p // OW % OH, tap // KW, H, SH, PH, TRANSPOSED)
            w, inside_w = input_index(p % OW, tap % KW, W, SW, PW, TRANSPOSED)
            inside = inside_h & inside_w & (p < out_pixels)
            at = p // (OH * OW) * stride_xb + (h * W + w) * stride_xp
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                x_mask = inside[:, None] & (c < C)[None, :]
                x = tl.load(x_ptr + (at[:, None] + c[None, :] * stride_xc), mask=x_mask, other=0.0)
                weight_mask = (c < C)[:, None] & (o < O)[None, :]
                weight = tl.load(weight_ptr + (tap * C + c)[:, None] * O + o[None, :], mask=weight_mask, other=0.0)
                acc = dot(x, weight, acc)
        store_pixels(
            y_ptr, bias_ptr, where_ptr, acc, p, o, out_pixels, O, OH * OW, stride_yb, stride_yo, stride_yp, BIAS, WHERE
        )  # fmt: skip


def pixel_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, channel, pixel) of a contiguous or channels-last tensor."""
    return t.stride(0), t.stride(1), 1 if t.is_contiguous() else t.shape[1]


def pixel_lists(x: Tensor, O: int) -> tuple[Tensor, Tensor, Tensor]:
    """(entries, counts, total): see the kernel."""
    B, C, H, W = x.shape
    pixels = B * H * W
    entries = torch.empty((pixels, C), dtype=torch.int64, device=x.device)
    counts = torch.empty(pixels, dtype=torch.int32, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    block_c = min(max(next_power_of_2(C), 16), 64)
    _pixel_lists_kernel[(cdiv(pixels, 32),)](
        x,
        entries,
        counts,
        total,
        pixels,
        C,
        O,
        H * W,
        *pixel_strides(x),
        BLOCK_P=32,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return entries, counts, total


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
    B, O, OH, OW = y.shape
    _, C, H, W = x.shape
    entries, counts, total = pixel_lists(x, O)
    limit = int(DENSE_FROM * x.numel())
    KH, KW = taps.shape[:2]
    out_pixels = B * OH * OW
    tensors = taps, y if bias is None else bias, y if where is None else where, y
    sizes = out_pixels, O, H, W, OH, OW
    constants = {"C": C, "KH": KH, "KW": KW, "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1]}
    constants |= {"TRANSPOSED": transposed, "BIAS": bias is not None, "WHERE": where is not None}
    constants["BLOCK_O"] = block_o = min(max(next_power_of_2(O), 16), 64)
    block_p = 256 // block_o
    _sparse_conv2d_kernel[(cdiv(out_pixels, block_p), cdiv(O, block_o))](
        entries, counts, total, *tensors, limit, *sizes, *pixel_strides(y), **constants,
        WHOLE=O % block_o == 0, ALIGNED=16 if O % 4 == 0 else 4, UNROLL=2, BLOCK_P=block_p, num_warps=1,
    )  # fmt: skip
    # 64 sums a thread read 8 numbers from shared memory for 64 products; where channels are far apart, addresses take the
    # registers of half of the sums.
    block_p = 128 if x.stride(1) == 1 else 64
    _dense_conv2d_kernel[(cdiv(out_pixels, block_p), cdiv(O, block_o))](
        x, total, *tensors, limit, *sizes, *pixel_strides(x), *pixel_strides(y), **constants,
        BLOCK_P=block_p, BLOCK_C=16, num_warps=4,
    )  # fmt: skip
    return y
