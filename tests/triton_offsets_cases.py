"""Offsets beyond 2^31: the last program alone, on tensors of which only the pages that it touches ever exist."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsekern.ops import k_winners_long_triton as long
from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops import k_winners_triton as body
from sparsekern.ops import sparse_conv2d_channels_triton as by_channels
from sparsekern.ops import sparse_linear_dictionary_triton as by_gathers
from tolerance import assert_same_bits

N = 2048
ROWS = 2**31 // N + 1  # the last one begins at element 2^31
BF16 = torch.bfloat16


@pytest.fixture(params=[ROWS - 1])
def last_program(monkeypatch, request):
    """Program 0 of what is launched is the last row's; results are where they are, as all is on CPU."""

    def program_id(builder, axis):
        first = request.param if axis == 0 else 0
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
    guesses, found = (torch.empty(ROWS, dtype=torch.int32) for _ in range(2))
    constants = {"N": N, "CHANNELS": N, "INNER": 1, "BOOST": False, "STORE_Y": True}
    sizes = rank, capacity, 1, N
    long._compact_kernel[(1,)](
        x, counts, y, bits.view(torch.int16), keys, units, guesses, found, *sizes, **constants,
        SHARED_ROW=False, PREFETCH=True, SAMPLE=long.SAMPLE, CHUNK=4096,
    )  # fmt: skip
    assert 100 <= found[-1] <= capacity
    long._select_candidates_kernel[(1,)](
        x, counts, y, bits.view(torch.int32), counts, keys, units, guesses, found, 100, capacity, **constants,
        REGISTERS=0, CHUNK=512, PLACE_BITS=11,
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


# Maps of 17 channels and one pixel: what belongs to channel 16 begins at element 2^31. Bytes are the smallest numbers.
PIXELS, C = 2**27 + 1, 17
ONE_PIXEL = {"KW": 1, "SH": 1, "SW": 1}


def last_pixel_of(pixels):
    """(pixels, C, 1, 1), all channels of the last pixel active."""
    x = torch.empty(pixels, C, 1, 1, dtype=torch.int8)
    x[-1, :, 0, 0] = torch.arange(1, C + 1)
    return x


@pytest.mark.parametrize("last_program", [1], indirect=True)
def test_offsets_of_channels(last_program):
    """The last position in the lists of 17 output channels; its patch at the end of x."""
    part = PIXELS - 1  # of the first program, which does not run
    grad_y, total = last_pixel_of(PIXELS), torch.zeros((), dtype=torch.int64)
    pixels, values = (torch.empty(C, PIXELS, dtype=torch.int8) for _ in range(2))
    counts = torch.empty(2, C, dtype=torch.int32)
    by_channels._channel_lists_kernel[(1, 1)](
        grad_y, pixels, values, counts, total, PIXELS, part, C, 1, 1, 1, 1, C, 1, 1, SH=1, SW=1, BLOCK_P=4, BLOCK_O=32
    )
    assert counts[1].tolist() == [1] * C
    assert_same_bits(values[:, -1], grad_y[-1].flatten(), "values")
    x, sums = torch.randn(8, 16), torch.empty(2, C, 16)
    pixels[:, -1] = 5
    sizes = {"C": 16, "KW": 1, "BLOCK_O": 32, "BLOCK_E": 16}
    by_channels._sparse_grad_weight_kernel[(1, 1, 1)](
        x, pixels, values, counts, total, sums, C, PIXELS, part, C, 16, 1, **sizes
    )
    assert_same_bits(sums[1], grad_y[-1, :, 0].float() * x[5], "sums")
    x, sums = last_pixel_of(PIXELS), torch.empty(2, 1, C)
    pixels, values = torch.tensor([[0, PIXELS - 1]], dtype=torch.int32), torch.ones(1, 2)
    by_channels._sparse_grad_weight_kernel[(1, 1, 1)](
        x, pixels, values, counts[:, :1].contiguous(), total, sums, C, 2, 1, 1, C, 1, **sizes | {"C": C, "BLOCK_E": 32}
    )
    assert_same_bits(sums[1, 0], x[-1].flatten().float(), "sums of the last pixel")
