"""k-winners on GPUs. Rows of up to ``REGISTERS_N`` units are selected in registers, boost, bits and counts included;
longer rows in ``k_winners_long_triton.py``. Selection is exact: it searches the k-th largest order-preserving integer key
by counting, and among equal keys the last winner's place in channel-major order."""

from __future__ import annotations

import functools
import math
import statistics

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops._triton import (
    KEY_HIGH,
    KEY_LOW,
    cdiv,
    float_key,
    multiprocessors,
    next_power_of_2,
    on_device,
    widen,
)

REGISTERS_N = 8192  # 16 or 32 units a thread; rows of 16384 spill whatever the number of warps
MAX_N = 2**31 - 2**24  # units are numbered in int32, of whole blocks
COUNTED_N = 2048  # up to here a program also keeps its wins of each unit in registers


@triton.jit
def key_span(lo, hi):
    """hi - lo, which may take all 32 bits."""
    return hi.to(tl.uint32, bitcast=True) - lo.to(tl.uint32, bitcast=True)


@triton.jit
def next_probe(lo, hi, count_lo, count_hi, k, probe, value):
    """A key strictly between lo and hi: first `value`'s, twice, where it lies there; then by regula falsi, but every third
    time the middle, so that no data takes more than 3 * 32 probes."""
    span = key_span(lo, hi)
    fraction = (count_lo - k).to(tl.float32) / (count_lo - count_hi).to(tl.float32)
    step = (span.to(tl.float32) * fraction).to(tl.uint32)
    step = tl.where(probe % 3 == 2, span >> 1, step)
    step = tl.minimum(tl.maximum(step, 1), span - 1)
    guessed = float_key(value)
    use_guess = (probe < 2) & (guessed > lo) & (guessed < hi)
    return tl.where(use_guess, guessed, (lo.to(tl.uint32, bitcast=True) + step).to(tl.int32, bitcast=True))


@triton.jit
def search_keys(key, k, n, lo, hi, probe, guess, guess_step):
    """The k-th largest of n keys: (threshold, how many keys reach it, how many are above it if more than k reach it).

    All keys reach lo, none hi. Ends early at a threshold which exactly k keys reach. If the first probe is number 0,
    `guess` is tried first and `guess_step`, in the floats' unit an element, turns its count into the second try.
    """
    count_lo = tl.full((), 0, tl.int32) + n  # >= k keys reach lo
    count_hi = tl.full((), 0, tl.int32)  # < k keys reach hi
    value = guess
    one = tl.minimum(
        k, 1
    )  # not the constant: LLVM would pack the comparisons into words and count bits, at twice the cost
    while (count_lo != k) & (key_span(lo, hi) > 1):
        t = next_probe(lo, hi, count_lo, count_hi, k, probe, value)
        count = tl.sum(tl.where(key >= t, one, 0))
        enough = count >= k
        # The second try aims a little past the threshold, so that the two bracket it.
        excess = (count - k).to(tl.float32)
        overshoot = 2.0 + 0.1 * tl.abs(excess)
        value = value + guess_step * tl.where(enough, excess + overshoot, excess - overshoot)
        lo = tl.where(enough, t, lo)
        count_lo = tl.where(enough, count, count_lo)
        hi = tl.where(enough, hi, t)
        count_hi = tl.where(enough, count_hi, count)
        probe += 1
    return lo, count_lo, count_hi


@triton.jit
def search_ties(tied, place, need, n):
    """The largest place among the first `need` tied units."""
    lo = tl.full((), -1, tl.int32)  # fewer than need are at or before lo
    hi = tl.full((), 0, tl.int32) + n - 1
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        enough = tl.sum((tied & (place <= middle)).to(tl.int32)) >= need
        lo = tl.where(enough, lo, middle)
        hi = tl.where(enough, middle, hi)
    return hi


@triton.jit
def unit_places(u, channels, inner, outer):
    """The place of unit u in channel-major order; `outer` units of each channel and inner position."""
    channel = u // inner % channels
    return channel * (outer * inner) + u // (inner * channels) * inner + u % inner


@triton.jit
def add_wins(counts_ptr, channel, won, N: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds a row's wins; of channels with many units, by a histogram first, so that few atomics meet at one address."""
    if CHANNELS <= 1024 and CHANNELS * 8 <= N:
        BINS: tl.constexpr = triton.next_power_of_2(CHANNELS)
        wins = tl.histogram(channel, BINS, mask=won)
        c = tl.arange(0, BINS)
        tl.atomic_add(counts_ptr + c, wins.to(tl.int64), mask=wins > 0, sem="relaxed")
    else:
        tl.atomic_add(counts_ptr + channel, won.to(tl.int64), mask=won, sem="relaxed")


@triton.jit(do_not_specialize=["k", "rows"])
def _prepare_kernel(
    duty_cycle_ptr,  # (channels,) float32
    strength_ptr,  # () float32
    factors_ptr,  # (channels,) float32
    counts_ptr,  # (channels + 1,) int64
    channels,
    k,
    n,
    rows,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Boost factors, taken in float64 and rounded once, and counts set to zero, the last to the number of rows."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if BOOST:
        duty_cycle = tl.load(duty_cycle_ptr + c, mask=c < channels, other=0.0).to(tl.float64)
        target = tl.full((), k, tl.float64) / tl.full((), n, tl.float64)
        exponent = tl.load(strength_ptr).to(tl.float64) * (target - duty_cycle)
        exponent = tl.where(exponent > 88, 88.0, exponent)  # as the reference; NaN stays
        exponent = tl.where(exponent < -87, -87.0, exponent)
        tl.store(factors_ptr + c, tl.exp(exponent).to(tl.float32), mask=c < channels)
    first = tl.where(c == channels, rows, 0).to(tl.int64)
    tl.store(counts_ptr + c, first, mask=c <= channels)


@triton.jit(do_not_specialize=["rows", "k"])  # a last, smaller batch needs no other kernel
def _k_winners_kernel(
    x_ptr,  # (rows, N)
    factors_ptr,  # (CHANNELS,) float32
    y_ptr,  # (rows, N)
    winners_ptr,  # (rows, words) int16
    counts_ptr,  # (CHANNELS + 1,) int64
    rows,
    k,
    z,
    step,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    BOOST: tl.constexpr,
    STORE_Y: tl.constexpr,
    COUNT_IN_REGISTERS: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows pid, pid + programs, ...; with PREFETCH the next row is loaded while this one is searched.

    The row length is a constant: masks fold away where it fills the block, and loads are as wide as it allows.
    """
    WORDS: tl.constexpr = (N + 15) // 16
    OUTER: tl.constexpr = (N + CHANNELS * INNER - 1) // (CHANNELS * INNER)
    u = tl.arange(0, BLOCK_N)
    valid = u < N
    word = tl.arange(0, BLOCK_N // 16)
    bit = tl.arange(0, 16)
    channel = u // INNER % CHANNELS
    if COUNT_IN_REGISTERS:
        wins = tl.zeros((BLOCK_N,), tl.int32)
    stride_x, stride_winners = tl.full((), N, tl.int64), tl.full((), WORDS, tl.int64)
    if PREFETCH:
        x_next = tl.load(x_ptr + tl.program_id(0) * stride_x + u, mask=valid, other=0.0)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        if PREFETCH:
            x = x_next
            following = tl.minimum(row + tl.num_programs(0), rows - 1)
            x_next = tl.load(x_ptr + following * stride_x + u, mask=valid, other=0.0)
        else:
            x = tl.load(x_ptr + row * stride_x + u, mask=valid, other=0.0)
        boosted = widen(x)
        if BOOST:  # read again for each row, from L1: registers are what limits how many rows are in flight
            boosted = boosted * tl.load(factors_ptr + channel, mask=valid, other=1.0)
        # Lanes without a unit hold zero and so add nothing.
        mean = tl.sum(boosted) / N
        deviation = tl.sqrt(tl.maximum(tl.sum(boosted * boosted) / N - mean * mean, 0.0))
        key = tl.where(valid, float_key(boosted), KEY_LOW)
        lo, hi = tl.full((), KEY_LOW + 1, tl.int32), tl.full((), KEY_HIGH, tl.int32)
        first = tl.full((), 0, tl.int32)
        t, reached, above = search_keys(key, k, N, lo, hi, first, mean + z * deviation, step * deviation)
        if reached == k:
            won = key >= t
        else:
            tied = key == t
            place = unit_places(u, CHANNELS, INNER, OUTER)
            last = search_ties(tied, place, k - above, N)
            won = (key > t) | (tied & (place <= last))
        if STORE_Y:
            tl.store(y_ptr + row * stride_x + u, tl.where(won, x, 0.0), mask=valid)
        bits = tl.sum(tl.reshape(won.to(tl.int32), (BLOCK_N // 16, 16)) << bit[None, :], axis=1)
        tl.store(winners_ptr + row * stride_winners + word, bits.to(tl.int16), mask=word < WORDS)
        if COUNT_IN_REGISTERS:
            wins += won.to(tl.int32)
        else:
            add_wins(counts_ptr, channel, won, N, CHANNELS)
    if COUNT_IN_REGISTERS:
        tl.atomic_add(counts_ptr + channel, wins.to(tl.int64), mask=wins > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "tiles"])
def _k_winners_backward_kernel(
    grad_y_ptr,  # (rows, n)
    winners_ptr,  # (rows, 2 * words) uint8
    grad_x_ptr,  # (rows, n)
    rows,
    n,
    tiles,  # of a row
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    u = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < rows) & (u < n)
    byte = tl.load(winners_ptr + row * ((n + 15) // 16 * 2) + u // 8, mask=valid, other=0)
    won = ((byte.to(tl.int32) >> (u % 8)) & 1) != 0
    grad = tl.load(grad_y_ptr + row * n + u, mask=valid & won, other=0.0)  # losers' gradients are not even read
    tl.store(grad_x_ptr + row * n + u, grad, mask=valid)


@triton.jit(do_not_specialize=["channels", "period", "rows_per_sample", "locations"])
def _update_duty_cycle_kernel(
    duty_cycle_ptr,  # (channels,) float32
    samples_seen_ptr,  # () int64
    counts_ptr,  # (channels + 1,) int64
    channels,
    period,
    rows_per_sample,
    locations,
    DUTY: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    samples = tl.load(counts_ptr + channels) // rows_per_sample
    seen = tl.load(samples_seen_ptr) + samples
    if DUTY:
        window = tl.maximum(tl.maximum(samples, tl.minimum(seen, period)), 1).to(tl.float64)
        kept = 1.0 - samples.to(tl.float64) / window
        duty_cycle = tl.load(duty_cycle_ptr + c, mask=c < channels, other=0.0).to(tl.float64)
        wins = tl.load(counts_ptr + c, mask=c < channels, other=0).to(tl.float64)
        updated = duty_cycle * kept + wins / (locations * window)
        tl.store(duty_cycle_ptr + c, updated.to(tl.float32), mask=c < channels)
    if SEEN:
        tl.debug_barrier()  # every thread has read it
        tl.store(samples_seen_ptr, seen)


@functools.lru_cache(maxsize=1024)
def normal_guess(k: int, n: int) -> tuple[float, float]:
    """Where the k-th largest of n normal values lies, and how far apart they lie there, in standard deviations."""
    z = statistics.NormalDist().inv_cdf(1 - min(max(k / n, 0.5 / n), 1 - 0.5 / n))
    return z, math.sqrt(2 * math.pi) * math.exp(z * z / 2) / n


def selection_config(rows: int, n: int, sms: int) -> dict:
    """Few rows want the latency of one row: a thread holds 8 units. Many want the fewest instructions: 32 units a thread,
    and up to 1024 units one warp a row, which counts without barriers."""
    block_n = next_power_of_2(max(n, 32))
    many = rows > 8 * sms
    warps = max(1, min(16, block_n // (1024 if many else 256)))
    if n % 4 and block_n >= 4096:
        warps = block_n // 256  # rows that are not aligned are loaded one by one: their addresses take registers
    return {
        "BLOCK_N": block_n,
        "COUNT_IN_REGISTERS": many and block_n <= COUNTED_N,
        "PREFETCH": many and block_n <= COUNTED_N,
        "num_warps": warps,
    }


def prepare(x, k, duty_cycle, boost_strength, channels) -> tuple[Tensor | None, Tensor]:
    """(boost factors or None, counts: zeros and the number of rows)."""
    rows, n = x.shape
    boost = duty_cycle is not None and boost_strength is not None
    factors = torch.empty(channels, dtype=torch.float32, device=x.device) if boost else None
    counts = torch.empty(channels + 1, dtype=torch.int64, device=x.device)
    _prepare_kernel[(cdiv(channels + 1, 256),)](
        duty_cycle if boost else counts,
        boost_strength if boost else counts,
        factors if boost else counts,
        counts,
        channels,
        k,
        n,
        rows,
        BOOST=boost,
        BLOCK=256,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return factors, counts


def select_rows(x, k, factors, channels, inner, counts, *, store_y=True) -> tuple[Tensor | None, Tensor]:
    """(y, winners) of rows of up to REGISTERS_N units, their wins added to counts."""
    rows, n = x.shape
    y = torch.empty_like(x) if store_y else None
    winners = torch.empty((rows, cdiv(n, 16) * 2), dtype=torch.uint8, device=x.device)
    sms = multiprocessors(x)
    config = selection_config(rows, n, sms)
    programs = min(rows, sms * max(1, 8 // config["num_warps"])) if config["PREFETCH"] else rows
    _k_winners_kernel[(programs,)](
        x,
        counts if factors is None else factors,
        y if store_y else x,
        winners.view(torch.int16),
        counts,
        rows,
        k,
        *normal_guess(k, n),
        N=n,
        CHANNELS=channels,
        INNER=inner,
        BOOST=factors is not None,
        STORE_Y=store_y,
        **config,
    )
    return y, winners


def k_winners(
    x: Tensor,  # (rows, n)
    k: int,
    duty_cycle: Tensor | None,  # (channels,)
    boost_strength: Tensor | None,  # () float32
    channels: int,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    if x.dtype == torch.float64 or n > MAX_N:
        return reference.k_winners(x, k, duty_cycle, boost_strength, channels, inner)
    with on_device(x):
        factors, counts = prepare(x, k, duty_cycle, boost_strength, channels)
        if rows == 0 or n == 0 or k == 0:
            winners = torch.zeros((rows, cdiv(n, 16) * 2), dtype=torch.uint8, device=x.device)
            return torch.zeros_like(x), winners, counts
        if n <= REGISTERS_N:
            y, winners = select_rows(x, k, factors, channels, inner, counts)
        else:
            from sparsekern.ops.k_winners_long_triton import select_long_rows

            y, winners = select_long_rows(x, k, factors, channels, inner, counts)
    return y, winners, counts


def k_winners_backward(
    grad_y: Tensor,  # (rows, n)
    winners: Tensor,  # (rows, 2 * ceil(n / 16)) uint8
) -> Tensor:
    rows, n = grad_y.shape
    grad_x = torch.empty_like(grad_y)
    if grad_y.numel() == 0:
        return grad_x
    block_n = min(next_power_of_2(max(n, 16)), 2048)
    block_r = 2048 // block_n
    with on_device(grad_y):
        tiles = cdiv(n, block_n)
        _k_winners_backward_kernel[(cdiv(rows, block_r) * tiles,)](
            grad_y, winners, grad_x, rows, n, tiles, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4
        )
    return grad_x


def max_pool_k_winners2d(
    x: Tensor,  # (B, C, H, W)
    k: int,
    duty_cycle: Tensor | None,  # (C,)
    boost_strength: Tensor | None,  # () float32
    pool: int,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sparsekern.ops import k_winners_pool_triton as pooling

    return pooling.max_pool_k_winners2d(x, k, duty_cycle, boost_strength, pool, contiguous)


def max_pool_k_winners2d_backward(
    grad_y: Tensor,  # (B, C, P, Q)
    winners: Tensor,  # (B, 2 * ceil(C * P * Q / 16)) uint8
    offsets: Tensor,  # (B, k) int32
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    from sparsekern.ops import k_winners_pool_triton as pooling

    return pooling.max_pool_k_winners2d_backward(grad_y, winners, offsets, height, width, channels_last)


def update_duty_cycle_(
    duty_cycle: Tensor,  # (channels,) float32
    samples_seen: Tensor,  # () int64
    counts: Tensor,  # (channels + 1,) int64, the number of rows last
    period: int,
    rows_per_sample: int,
    locations: int,
) -> None:
    channels = len(duty_cycle)
    args = duty_cycle, samples_seen, counts, channels, period, rows_per_sample, locations
    one = channels <= 2048  # a single program may overwrite what it has read; several need a second launch for that
    block = next_power_of_2(max(channels, 128)) if one else 1024
    warps = max(block // 64, 4)  # divisions of float64 take many registers: two a thread
    with on_device(duty_cycle):
        programs = (max(1, cdiv(channels, block)),)
        _update_duty_cycle_kernel[programs](*args, DUTY=True, SEEN=one, BLOCK=block, num_warps=warps)
        if not one:
            _update_duty_cycle_kernel[(1,)](*args, DUTY=False, SEEN=True, BLOCK=128)
