"""The dense-weight layer behind very sparse codes (a TopK autoencoder's decoder) at large batch: row gathers.

A few of very many inputs are active in each sample, so each sample's active inputs are listed, and the forward adds their
weight rows; the gradient of the weight goes by input, over a counting sort of the active units, with no temporary for each
of them. How sparse x is does not reach the host: lists have room for what pays, and where a list overflows, a flag on the
device makes the gathering kernels leave the work to a dense product, which otherwise returns at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import cdiv, dot, multiprocessors, narrow, next_power_of_2, widen

# Where gathers end to pay, as inputs for each active one: a gathered row costs its bytes at 4.8 TB/s, a dense one 2 O
# operations at 790 TFLOP/s (bfloat16; TF32 half of that, for twice the bytes) or 60 (float32), which breaks even at 165 and
# 25; a list has room for some more.
INPUTS_AN_ACTIVE_ONE, INPUTS_AN_ACTIVE_ONE_TENSOR_CORES = 16, 64
TILE_I = 32  # inputs whose active samples one program sorts


@triton.jit
def _row_lists_kernel(
    x_ptr,  # (B, I)
    lists_ptr,  # (B, capacity) int32: each sample's active inputs, ascending
    counts_ptr,  # (B,) int32
    flag_ptr,  # () int32, zero before
    I,
    capacity,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    x_ptr += b * I
    lists_ptr += b * capacity
    count = tl.full((), 0, tl.int32)
    for start in range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = (widen(tl.load(x_ptr + i, mask=i < I, other=0.0)) != 0).to(tl.int32)
        slot = count + tl.cumsum(active, 0) - 1
        tl.store(lists_ptr + slot, i, mask=(active != 0) & (slot < capacity))
        count += tl.sum(active)
    tl.store(counts_ptr + b, count)
    if count > capacity:
        tl.atomic_max(flag_ptr, 1, sem="relaxed")


@triton.jit
def _gather_forward_kernel(
    x_ptr,  # (B, I)
    rows_ptr,  # (I, O)
    bias_ptr,  # (O,)
    lists_ptr,  # (B, capacity)
    counts_ptr,  # (B,)
    flag_ptr,  # ()
    y_ptr,  # (B, O)
    I,
    O,
    capacity,
    BIAS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    if tl.load(flag_ptr) == 0:
        b = tl.program_id(0).to(tl.int64)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        count = tl.load(counts_ptr + b)
        acc = tl.zeros((UNROLL, BLOCK_O), tl.float32)
        for start in range(0, count, UNROLL):
            j = start + tl.arange(0, UNROLL)
            i = tl.load(lists_ptr + b * capacity + j, mask=j < count, other=0).to(tl.int64)
            x = widen(tl.load(x_ptr + b * I + i, mask=j < count, other=0.0))
            mask = (j < count)[:, None] & (o < O)[None, :]
            acc += x[:, None] * widen(tl.load(rows_ptr + i[:, None] * O + o[None, :], mask=mask, other=0.0))
        y = tl.sum(acc, 0)
        if BIAS:
            y += widen(tl.load(bias_ptr + o, mask=o < O, other=0.0))
        tl.store(y_ptr + b * O + o, narrow(y, y_ptr.dtype.element_ty), mask=o < O)


@triton.jit
def _gather_grad_input_kernel(
    grad_y_ptr,  # (B, O)
    rows_ptr,  # (I, O)
    lists_ptr,  # (B, capacity)
    counts_ptr,  # (B,)
    flag_ptr,  # ()
    grad_x_ptr,  # (B, I), zero before
    I,
    O,
    capacity,
    UNROLL: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (sample, UNROLL active inputs and every stride-th after them)."""
    if tl.load(flag_ptr) == 0:
        b = tl.program_id(0).to(tl.int64)
        count = tl.load(counts_ptr + b)
        for start in range(tl.program_id(1) * UNROLL, count, tl.num_programs(1) * UNROLL):
            j = start + tl.arange(0, UNROLL)
            i = tl.load(lists_ptr + b * capacity + j, mask=j < count, other=0).to(tl.int64)
            acc = tl.zeros((UNROLL, BLOCK_O), tl.float32)
            for first in range(0, O, BLOCK_O):
                o = first + tl.arange(0, BLOCK_O)
                grad_y = widen(tl.load(grad_y_ptr + b * O + o, mask=o < O, other=0.0))
                mask = (j < count)[:, None] & (o < O)[None, :]
                acc += grad_y[None, :] * widen(tl.load(rows_ptr + i[:, None] * O + o[None, :], mask=mask, other=0.0))
            grad_x = narrow(tl.sum(acc, 1), grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + b * I + i, grad_x, mask=j < count)


@triton.jit
def _column_lists_kernel(
    x_ptr,  # (B, I)
    lists_ptr,  # (tiles, capacity) int32: the active samples of each input of the tile, one input after the other
    begins_ptr,  # (I,) int32: where an input's samples begin in its tile's list
    counts_ptr,  # (I,) int32
    flag_ptr,  # () int32, zero before
    B,
    I,
    capacity,
    BLOCK_B: tl.constexpr,
    TILE_I: tl.constexpr,
):
    """A counting sort: the second pass finds the tile's columns in cache."""
    tile = tl.program_id(0)
    i = tile * TILE_I + tl.arange(0, TILE_I)
    counts = tl.zeros((TILE_I,), tl.int32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (b < B)[:, None] & (i < I)[None, :]
        x = tl.load(x_ptr + b[:, None] * I + i[None, :], mask=mask, other=0.0)
        counts += tl.sum((widen(x) != 0).to(tl.int32), 0)
    begins = tl.cumsum(counts, 0) - counts
    tl.store(begins_ptr + i, begins, mask=i < I)
    tl.store(counts_ptr + i, counts, mask=i < I)
    if tl.sum(counts) > capacity:
        tl.atomic_max(flag_ptr, 1, sem="relaxed")
    else:
        lists_ptr += tile.to(tl.int64) * capacity
        slots = begins
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            mask = (b < B)[:, None] & (i < I)[None, :]
            x = tl.load(x_ptr + b.to(tl.int64)[:, None] * I + i[None, :], mask=mask, other=0.0)
            active = (widen(x) != 0).to(tl.int32)
            slot = slots[None, :] + tl.cumsum(active, 0) - 1
            tl.store(lists_ptr + slot, tl.broadcast_to(b[:, None], (BLOCK_B, TILE_I)), mask=active != 0)
            slots += tl.sum(active, 0)


@triton.jit
def _gather_grad_weight_kernel(
    grad_y_ptr,  # (B, O)
    x_ptr,  # (B, I)
    lists_ptr,  # (tiles, capacity)
    begins_ptr,  # (I,)
    counts_ptr,  # (I,)
    flag_ptr,  # ()
    grad_rows_ptr,  # (I, O)
    I,
    O,
    capacity,
    TILE_I: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (input, tile of outputs): the sum over the samples that have the input."""
    if tl.load(flag_ptr) == 0:
        i = tl.program_id(0).to(tl.int64)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        count = tl.load(counts_ptr + i)
        lists_ptr += i // TILE_I * capacity + tl.load(begins_ptr + i)
        acc = tl.zeros((UNROLL, BLOCK_O), tl.float32)
        for start in range(0, count, UNROLL):
            j = start + tl.arange(0, UNROLL)
            b = tl.load(lists_ptr + j, mask=j < count, other=0).to(tl.int64)
            x = widen(tl.load(x_ptr + b * I + i, mask=j < count, other=0.0))
            mask = (j < count)[:, None] & (o < O)[None, :]
            acc += x[:, None] * widen(tl.load(grad_y_ptr + b[:, None] * O + o[None, :], mask=mask, other=0.0))
        grad = narrow(tl.sum(acc, 0), grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + i * O + o, grad, mask=o < O)


@triton.jit
def _dense_if_kernel(
    flag_ptr,  # ()
    a_ptr,  # (M, K) by its strides
    b_ptr,  # (K, N) by its strides
    bias_ptr,  # (N,)
    where_ptr,  # (M, N): results count where it is not zero
    c_ptr,  # (M, N)
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BIAS: tl.constexpr,
    WHERE: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = a @ b if the flag is set: tiles pid, pid + programs, ...; programs that only look at it take time too."""
    if tl.load(flag_ptr) != 0:
        tiles_m = tl.cdiv(M, BLOCK_M)
        for tile in range(tl.program_id(0), tiles_m * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            n = (tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, K, BLOCK_K):
                k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                a_mask = (m < M)[:, None] & (k < K)[None, :]
                b_mask = (k < K)[:, None] & (n < N)[None, :]
                a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=a_mask, other=0.0)
                b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_mask, other=0.0)
                acc = dot(a, b, acc, TF32)
            at = m[:, None] * N + n[None, :]
            mask = (m < M)[:, None] & (n < N)[None, :]
            if BIAS:
                acc += widen(tl.load(bias_ptr + n, mask=n < N, other=0.0))[None, :]
            if WHERE:
                mask = mask & (widen(tl.load(where_ptr + at, mask=mask, other=0.0)) != 0)
            tl.store(c_ptr + at, narrow(acc, c_ptr.dtype.element_ty), mask=mask)


def dense_if(
    flag, a: Tensor, b: Tensor, c: Tensor, tf32: bool, bias: Tensor | None = None, where: Tensor | None = None
) -> None:
    M, N = c.shape
    wide = c.dtype != torch.float32  # float32 does without tensor cores, or takes twice the memory
    block_m, block_n = (128, 128) if wide or tf32 else (64, 64)
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    _dense_if_kernel[(min(tiles, 2 * multiprocessors(c)),)](
        flag,
        a,
        b,
        c if bias is None else bias,
        c if where is None else where,
        c,
        M,
        N,
        a.shape[1],
        *a.stride(),
        *b.stride(),
        BIAS=bias is not None,
        WHERE=where is not None,
        TF32=tf32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if wide else 32 if tf32 else 16,
        num_warps=8 if wide or tf32 else 4,
        num_stages=3,
    )


def gather_config(O: int, dtype: torch.dtype) -> dict:
    """Rows as wide as four warps load in 16-byte pieces: each thread's sums stay its own."""
    block_o = 512 if dtype == torch.float32 else 1024
    return {"BLOCK_O": min(next_power_of_2(max(O, 128)), block_o), "num_warps": 4}


def inputs_an_active_one(dtype: torch.dtype, tf32: bool) -> int:
    return INPUTS_AN_ACTIVE_ONE if dtype == torch.float32 and not tf32 else INPUTS_AN_ACTIVE_ONE_TENSOR_CORES


def row_lists(x: Tensor, tf32: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(lists, counts, flag)."""
    B, I = x.shape
    lists = torch.empty((B, cdiv(I, inputs_an_active_one(x.dtype, tf32))), dtype=torch.int32, device=x.device)
    counts = torch.empty(B, dtype=torch.int32, device=x.device)
    flag = torch.zeros((), dtype=torch.int32, device=x.device)
    _row_lists_kernel[(B,)](x, lists, counts, flag, I, lists.shape[1], BLOCK=4096, num_warps=8)
    return lists, counts, flag


def forward(x: Tensor, rows: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    B, I = x.shape
    O = rows.shape[1]
    lists, counts, flag = row_lists(x, tf32)
    y = torch.empty((B, O), dtype=x.dtype, device=x.device)
    config = gather_config(O, x.dtype)
    _gather_forward_kernel[(B, cdiv(O, config["BLOCK_O"]))](
        x,
        rows,
        y if bias is None else bias,
        lists,
        counts,
        flag,
        y,
        I,
        O,
        lists.shape[1],
        BIAS=bias is not None,
        UNROLL=8,
        **config,
    )
    dense_if(flag, x, rows, y, tf32, bias)
    return y


def grad_input(grad_y: Tensor, x: Tensor, rows: Tensor, tf32: bool) -> Tensor:
    """Where x is not zero; zero elsewhere."""
    B, I = x.shape
    O = rows.shape[1]
    lists, counts, flag = row_lists(x, tf32)
    grad_x = torch.zeros_like(x)
    _gather_grad_input_kernel[(B, 4)](
        grad_y,
        rows,
        lists,
        counts,
        flag,
        grad_x,
        I,
        O,
        lists.shape[1],
        UNROLL=8,
        **gather_config(O, x.dtype),
    )
    dense_if(flag, grad_y, rows.t(), grad_x, tf32, where=x)
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, tf32: bool) -> Tensor:
    """(I, O)."""
    B, I = x.shape
    O = grad_y.shape[1]
    tiles = cdiv(I, TILE_I)
    capacity = cdiv(TILE_I * B, inputs_an_active_one(x.dtype, tf32))
    lists = torch.empty((tiles, capacity), dtype=torch.int32, device=x.device)
    begins, counts = torch.empty((2, I), dtype=torch.int32, device=x.device)
    flag = torch.zeros((), dtype=torch.int32, device=x.device)
    _column_lists_kernel[(tiles,)](
        x, lists, begins, counts, flag, B, I, capacity, BLOCK_B=64, TILE_I=TILE_I, num_warps=4
    )
    grad_rows = torch.empty((I, O), dtype=x.dtype, device=x.device)
    config = gather_config(O, x.dtype)
    _gather_grad_weight_kernel[(I, cdiv(O, config["BLOCK_O"]))](
        grad_y,
        x,
        lists,
        begins,
        counts,
        flag,
        grad_rows,
        I,
        O,
        capacity,
        TILE_I=TILE_I,
        UNROLL=4,
        **config,
    )
    dense_if(flag, x.t(), grad_y, grad_rows, tf32)
    return grad_rows
