"""Offsets beyond 2^31: the last program alone, on tensors of which only the pages that it touches ever exist."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsekern.ops import k_winners_long_triton as long
from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops import k_winners_triton as body
from sparsekern.ops import sparse_linear_dictionary_triton as by_gathers
from tolerance import assert_same_bits

N = 2048
ROWS = 2**31 // N + 1  # the last one begins at element 2^31
BF16 = torch.bfloat16


@pytest.fixture
def last_program(monkeypatch):
    """Program 0 of what is launched is the last row's; results are where they are, as all is on CPU."""

    def program_id(builder, axis):
        first = ROWS - 1 if axis == 0 else 0
        return interpreter.TensorHandle(np.array([builder.grid_idx[axis] + first], dtype=np.int32), tl.int32)

    monkeypatch.setattr(type(interpreter.interpreter_builder), "create_get_program_id", program_id)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def rows_of(n, dtype, last):
    t = torch.empty(ROWS, n, dtype=dtype)
    t[-1] = last
    return t


@pytest.fixture
def x():
    return rows_of(N, BF16, torch.randn(N))


def winners():
    return torch.empty(ROWS, N // 8, dtype=torch.uint8)


def assert_last_row(x, y, bits):
    wanted, wanted_bits, _ = reference.k_winners(x[-1:], 100, None, None, N, 1)
    assert_same_bits(y[-1:], wanted, "y")
    assert_same_bits(bits[-1:], wanted_bits, "winners")


def test_offsets_of_k_winners(last_program, x):
    y, bits, counts = torch.empty_like(x), winners(), torch.zeros(N + 1, dtype=torch.int64)
    config = body.selection_config(ROWS, N, 132) | {"COUNT_IN_REGISTERS": False, "PREFETCH": False}
    constants = {"N": N, "CHANNELS": N, "INNER": 1, "BOOST": False, "STORE_Y": True}
    body._k_winners_kernel[(1,)](
        x, counts, y, bits.view(torch.int16), counts, ROWS, 100, *body.normal_guess(100, N), **constants, **config
    )
    assert_last_row(x, y, bits)


def test_offsets_of_long_rows(last_program, x):
    y, bits, counts = torch.empty_like(x), winners(), torch.zeros(N + 1, dtype=torch.int64)
    rank, capacity = long.sample_plan(100, N)
    keys, units = (torch.empty(ROWS, capacity, dtype=torch.int32) for _ in range(2))
    found = torch.empty(ROWS, dtype=torch.int32)
    constants = {"N": N, "CHANNELS": N, "INNER": 1, "BOOST": False, "STORE_Y": True}
    sizes = rank, capacity, 1, N
    long._compact_kernel[(1,)](
        x, counts, y, bits.view(torch.int16), keys, units, found, *sizes, **constants,
        SHARED_ROW=False, PREFETCH=True, SAMPLE=long.SAMPLE, CHUNK=4096,
    )  # fmt: skip
    assert 100 <= found[-1] <= capacity
    long._select_candidates_kernel[(1,)](
        x, counts, y, bits.view(torch.int32), counts, keys, units, found, 100, capacity, **constants,
        REGISTERS=0, CHUNK=512,
    )  # fmt: skip
    assert_last_row(x, y, bits)


def test_offsets_of_k_winners_gradient(last_program, x):
    bits = winners()
    bits[-1] = torch.randint(256, (N // 8,), dtype=torch.uint8)
    grad_x = torch.empty_like(x)
    body._k_winners_backward_kernel[(1,)](x, bits, grad_x, ROWS, N, 1, BLOCK_R=1, BLOCK_N=N)
    assert_same_bits(grad_x[-1:], reference.k_winners_backward(x[-1:], bits[-1:]), "grad_x")


def test_offsets_of_sparse_linear(last_program):
    """A sample's list of a dictionary's active inputs, and their rows."""
    x = rows_of(N, BF16, 0)
    x[-1, 5] = x[-1, 2000] = 1
    lists, counts = torch.empty(ROWS, N // 64, dtype=torch.int32), torch.empty(ROWS, dtype=torch.int32)
    flag, rows = torch.zeros((), dtype=torch.int32), torch.randn(N, N).to(BF16)
    by_gathers._row_lists_kernel[(1,)](x, lists, counts, flag, N, lists.shape[1], BLOCK=N)
    assert counts[-1] == 2
    assert lists[-1, :2].tolist() == [5, 2000]
    y = torch.empty(ROWS, N, dtype=BF16)
    by_gathers._gather_forward_kernel[(1, 1)](
        x, rows, y, lists, counts, flag, y, N, N, lists.shape[1], BIAS=False, UNROLL=2, BLOCK_O=N
    )
    assert_same_bits(y[-1], (rows[5].float() + rows[2000].float()).to(BF16), "y")
