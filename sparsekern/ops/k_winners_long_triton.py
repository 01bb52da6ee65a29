"""k-winners of rows too long for registers: guess a threshold, compact what reaches it, select among that.

The guess is an order statistic of a sample of the row, low enough that the k winners reach it (but for one row in
millions), and high enough that little else does. The first kernel reads x once, by several programs a row where there
are few rows, zeroes the output and compacts the candidates; the second selects exactly among them and writes only the
winners. Where the guess fails, many equal values for instance, the second searches the whole row: slower, but as exact.
Candidates come in any order, since selection goes by their keys and places alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import KEY_HIGH, KEY_LOW, cdiv, float_key, multiprocessors, next_power_of_2, widen
from sparsekern.ops.k_winners_triton import key_span, next_probe, search_keys, search_ties, unit_places

CHUNK = 4096
SAMPLE = 2048  # another size than CHUNK, or the compiler lays both out alike, at more registers
SELECT_CHUNK = 2048
REGISTERS_CANDIDATES = 4096


@triton.jit
def unit_keys(x_ptr, factors_ptr, u, valid, CHANNELS: tl.constexpr, INNER: tl.constexpr, BOOST: tl.constexpr):
    """The keys of units u of the row that x_ptr points to."""
    return keys_of(tl.load(x_ptr + u, mask=valid, other=0.0), factors_ptr, u, valid, CHANNELS, INNER, BOOST)


@triton.jit
def keys_of(x, factors_ptr, u, valid, CHANNELS: tl.constexpr, INNER: tl.constexpr, BOOST: tl.constexpr):
    boosted = widen(x)
    if BOOST:
        boosted = boosted * tl.load(factors_ptr + u // INNER % CHANNELS, mask=valid, other=1.0)
    return tl.where(valid, float_key(boosted), KEY_LOW)


@triton.jit(do_not_specialize=["rank", "capacity", "splits"])
def _compact_kernel(
    x_ptr,  # (rows, N)
    factors_ptr,  # (CHANNELS,) float32
    y_ptr,  # (rows, N): zeroed
    winners_ptr,  # (rows, words) int16: zeroed
    keys_ptr,  # (rows, capacity) int32: of the candidates
    units_ptr,  # (rows, capacity) int32
    guesses_ptr,  # (rows,) int32
    found_ptr,  # (rows,) int32, zero before: the number of candidates, also where they are more than the capacity
    rank,
    capacity,
    splits,
    part_length,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    BOOST: tl.constexpr,
    STORE_Y: tl.constexpr,
    SHARED_ROW: tl.constexpr,
    PREFETCH: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (row, part): compacts the candidates among units part * part_length, ...; parts are whole chunks."""
    WORDS: tl.constexpr = (N + 15) // 16
    row = (tl.program_id(0) // splits).to(tl.int64)
    begin = tl.program_id(0) % splits * part_length
    x_ptr += row * N
    y_ptr += row * N
    winners_ptr += row * WORDS
    # 16 runs, evenly spread: the same for all parts, and so the same guess.
    i = tl.arange(0, SAMPLE)
    sample = i // (SAMPLE // 16) * (N // 16) + i % (SAMPLE // 16)
    sampled = unit_keys(x_ptr, factors_ptr, sample, sample < N, CHANNELS, INNER, BOOST)
    probe = tl.full((), 2, tl.int32)
    nothing = tl.full((), 0, tl.float32)
    guess, _, _ = search_keys(sampled, rank, SAMPLE, tl.min(sampled), tl.max(sampled) + 1, probe, nothing, nothing)
    tl.store(guesses_ptr + row, guess)
    base = tl.full((), 0, tl.int32)
    if PREFETCH:
        u = begin + tl.arange(0, CHUNK)
        x_next = tl.load(x_ptr + u, mask=u < N, other=0.0)
    for start in range(begin, tl.minimum(begin + part_length, N), CHUNK):
        u = start + tl.arange(0, CHUNK)
        valid = u < N
        if PREFETCH:  # the next chunk is on its way while this one is compacted
            x = x_next
            x_next = tl.load(x_ptr + u + CHUNK, mask=u + CHUNK < N, other=0.0)
        else:
            x = tl.load(x_ptr + u, mask=valid, other=0.0)
        key = keys_of(x, factors_ptr, u, valid, CHANNELS, INNER, BOOST)
        if STORE_Y:
            tl.store(y_ptr + u, tl.zeros((CHUNK,), y_ptr.dtype.element_ty), mask=valid)
        word = start // 16 + tl.arange(0, CHUNK // 16)
        tl.store(winners_ptr + word, tl.zeros((CHUNK // 16,), tl.int16), mask=word < WORDS)
        candidate = (valid & (key >= guess)).to(tl.int32)
        within = tl.cumsum(candidate, 0)
        count = tl.sum(candidate)
        if SHARED_ROW:
            base = tl.atomic_add(found_ptr + row, count, sem="relaxed")
        slot = base + within - 1
        fits = (candidate != 0) & (slot < capacity)
        tl.store(keys_ptr + row * capacity + slot, key, mask=fits)
        tl.store(units_ptr + row * capacity + slot, u, mask=fits)
        base += count
    if not SHARED_ROW:
        tl.store(found_ptr + row, base)


@triton.jit
def load_keys(
    x_ptr, factors_ptr, keys_ptr, units_ptr, from_x, start, length, CHANNELS: tl.constexpr, INNER: tl.constexpr,
    BOOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys and units start, ... of the candidates, or of the whole row."""
    i = start + tl.arange(0, CHUNK)
    valid = i < length
    if from_x:
        key = unit_keys(x_ptr, factors_ptr, i, valid, CHANNELS, INNER, BOOST)
        unit = i
    else:
        key = tl.load(keys_ptr + i, mask=valid, other=KEY_LOW)
        unit = tl.load(units_ptr + i, mask=valid, other=0)
    return key, unit


@triton.jit
def write_winners(
    x_ptr, y_ptr, winners_ptr, counts_ptr, row, unit, won, N: tl.constexpr, CHANNELS: tl.constexpr,
    INNER: tl.constexpr, STORE_Y: tl.constexpr,
):  # fmt: skip
    """Writes the winners among the units over the zeros, and counts them."""
    if STORE_Y:
        tl.store(y_ptr + unit, tl.load(x_ptr + unit, mask=won, other=0.0), mask=won)
    byte = row * ((N + 15) // 16 * 2) + unit // 8  # rows need not begin at whole 32-bit words
    bit = (byte % 4).to(tl.int32) * 8 + unit % 8
    one = tl.full(unit.shape, 1, tl.int32)
    tl.atomic_or(winners_ptr + byte // 4, one << bit, mask=won, sem="relaxed")
    tl.atomic_add(counts_ptr + unit // INNER % CHANNELS, won.to(tl.int64), mask=won, sem="relaxed")


@triton.jit(do_not_specialize=["k", "capacity"])
def _select_candidates_kernel(
    x_ptr,  # (rows, N)
    factors_ptr,  # (CHANNELS,) float32
    y_ptr,  # (rows, N)
    winners_ptr,  # the bits as int32
    counts_ptr,  # (CHANNELS + 1,) int64
    keys_ptr,  # (rows, capacity) int32
    units_ptr,  # (rows, capacity) int32
    guesses_ptr,  # (rows,) int32
    found_ptr,  # (rows,) int32
    k,
    capacity,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    BOOST: tl.constexpr,
    STORE_Y: tl.constexpr,
    REGISTERS: tl.constexpr,  # candidates that are held in registers, 0 for none
    CHUNK: tl.constexpr,
    PLACE_BITS: tl.constexpr,  # N places are numbered in
):
    OUTER: tl.constexpr = (N + CHANNELS * INNER - 1) // (CHANNELS * INNER)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * N
    y_ptr += row * N
    keys_ptr += row * capacity
    units_ptr += row * capacity
    found = tl.load(found_ptr + row)
    from_x = (found < k) | (found > capacity)
    by_passes = True
    if REGISTERS > 0:
        by_passes = from_x
        if not from_x:
            key, unit = load_keys(
                x_ptr, factors_ptr, keys_ptr, units_ptr, False, 0, found, CHANNELS, INNER, BOOST, REGISTERS
            )
            valid = tl.arange(0, REGISTERS) < found
            lowest = tl.min(tl.where(valid, key, KEY_HIGH))
            probe = tl.full((), 2, tl.int32)
            nothing = tl.full((), 0, tl.float32)
            t, reached, above = search_keys(key, k, found, lowest, tl.max(key) + 1, probe, nothing, nothing)
            place = unit_places(unit, CHANNELS, INNER, OUTER)
            last = tl.full((), N, tl.int32)
            if reached != k:
                last = search_ties(key == t, place, k - above, N)
            won = (key > t) | ((key == t) & (place <= last))
            write_winners(x_ptr, y_ptr, winners_ptr, counts_ptr, row, unit, won, N, CHANNELS, INNER, STORE_Y)
    if by_passes:
        length = tl.where(from_x, N, found)
        # How many keys reach the guess is known. Where they are far too many, most of them may be equal: the zeros of a
        # row with fewer than k positive units, say. Then the next key tells.
        guess, enough = tl.load(guesses_ptr + row), found >= k
        lo = tl.where(enough, guess, KEY_LOW + 1)
        hi = tl.where(enough, KEY_HIGH, guess)
        count_lo = tl.where(enough, found, length)
        count_hi = tl.where(enough, 0, found)
        next_first = enough & from_x
        probe = tl.full((), 2, tl.int32)
        nothing = tl.full((), 0, tl.float32)
        while (count_lo != k) & (key_span(lo, hi) > 1):
            t = tl.where(next_first & (probe == 2), lo + 1, next_probe(lo, hi, count_lo, count_hi, k, probe, nothing))
            count = tl.full((), 0, tl.int32)
            for start in range(0, length, CHUNK):
                key, unit = load_keys(
                    x_ptr, factors_ptr, keys_ptr, units_ptr, from_x, start, length, CHANNELS, INNER, BOOST, CHUNK
                )
                count += tl.sum((key >= t).to(tl.int32))
            enough = count >= k
            lo = tl.where(enough, t, lo)
            count_lo = tl.where(enough, count, count_lo)
            hi = tl.where(enough, hi, t)
            count_hi = tl.where(enough, count_hi, count)
            probe += 1
        # The winners' last place: that of the need-th tied unit at or after place `last`. Tied units are counted in 512
        # bins of the 2**bits places in question, and the bin that has it in it is what is left.
        need = k - count_hi
        last = tl.full((), 0, tl.int32)
        bits = tl.full((), PLACE_BITS, tl.int32)
        while (count_lo != k) & (bits > 0):
            shift = tl.maximum(bits - 9, 0)
            ties = tl.zeros((512,), tl.int32)
            for start in range(0, length, CHUNK):
                key, unit = load_keys(
                    x_ptr, factors_ptr, keys_ptr, units_ptr, from_x, start, length, CHANNELS, INNER, BOOST, CHUNK
                )
                from_last = unit_places(unit, CHANNELS, INNER, OUTER) - last
                in_question = (key == lo) & (from_last >= 0) & ((from_last >> bits) == 0)
                ties += tl.histogram(tl.where(in_question, from_last >> shift, 0), 512, mask=in_question)
            passed = tl.cumsum(ties, 0) < need
            last += tl.sum(passed.to(tl.int32)) << shift
            need -= tl.sum(tl.where(passed, ties, 0))
            bits = shift
        last = tl.where(count_lo == k, N, last)
        for start in range(0, length, CHUNK):
            key, unit = load_keys(
                x_ptr, factors_ptr, keys_ptr, units_ptr, from_x, start, length, CHANNELS, INNER, BOOST, CHUNK
            )
            place = unit_places(unit, CHANNELS, INNER, OUTER)
            won = (key > lo) | ((key == lo) & (place <= last))
            write_winners(x_ptr, y_ptr, winners_ptr, counts_ptr, row, unit, won, N, CHANNELS, INNER, STORE_Y)


def sample_plan(k: int, n: int) -> tuple[int, int]:
    """(rank of the guess in the sample, capacity for candidates).

    The sample holds about e = k m / n of the k winners, and the guess is too high only if it holds `rank` of them: 5
    standard deviations above e and 6 more, for where e is so small that a normal law would mislead. About rank n / m
    units reach the guess; the capacity allows 6 standard deviations more.
    """
    m = SAMPLE
    e = k * m / n
    rank = math.ceil(e + 5 * math.sqrt(e) + 6)
    if rank >= m:
        return m, n  # the lowest of the sample; what lies below fails the guess, or is few
    return rank, min(n, math.ceil(n / m * (rank + 6 * math.sqrt(rank))))


def select_long_rows(x, k, factors, channels, inner, counts, *, store_y=True) -> tuple[Tensor | None, Tensor]:
    """(y, winners) of rows of more than REGISTERS_N units, their wins added to counts."""
    rows, n = x.shape
    y = torch.empty_like(x) if store_y else None
    size = rows * cdiv(n, 16) * 2
    winners = torch.empty(cdiv(size, 4) * 4, dtype=torch.uint8, device=x.device)  # whole 32-bit words
    aligned = n % 4 == 0  # values are loaded four at a time
    rank, capacity = sample_plan(k, n)
    splits = max(1, min(cdiv(n, CHUNK), cdiv(4 * multiprocessors(x), rows)))
    part_length = cdiv(cdiv(n, CHUNK), splits) * CHUNK
    keys = torch.empty((2, rows, capacity), dtype=torch.int32, device=x.device)
    found = torch.zeros(rows, dtype=torch.int32, device=x.device)
    guesses = torch.empty_like(found)
    constants = {"N": n, "CHANNELS": channels, "INNER": inner, "BOOST": factors is not None, "STORE_Y": store_y}
    factors = counts if factors is None else factors
    output = x if y is None else y
    _compact_kernel[(rows * splits,)](
        x,
        factors,
        output,
        winners.view(torch.int16),
        keys[0],
        keys[1],
        guesses,
        found,
        rank,
        capacity,
        splits,
        part_length,
        **constants,
        SHARED_ROW=splits > 1,
        PREFETCH=x.dtype == torch.float32 and aligned,  # else it takes registers that halve the programs at work
        SAMPLE=SAMPLE,
        CHUNK=CHUNK,
        num_warps=8,
        maxnreg=128 if aligned else None,  # two programs on a multiprocessor
    )
    registers = next_power_of_2(max(capacity, 512)) if capacity <= REGISTERS_CANDIDATES else 0
    _select_candidates_kernel[(rows,)](
        x,
        factors,
        output,
        winners.view(torch.int32),
        counts,
        keys[0],
        keys[1],
        guesses,
        found,
        k,
        capacity,
        **constants,
        REGISTERS=registers,
        CHUNK=SELECT_CHUNK,
        PLACE_BITS=(n - 1).bit_length(),
        num_warps=4 if 0 < registers <= 2048 else 8,
    )
    return y, winners[:size].view(rows, -1)
