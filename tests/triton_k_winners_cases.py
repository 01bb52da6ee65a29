"""k-winners on GPUs: what test_triton_interpreter.py and test_cuda.py run."""

import pytest
import torch

from sparsekern.ops import k_winners_long_triton as long
from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops import k_winners_triton
from test_k_winners import VALUES
from tolerance import DUTY_CYCLE, assert_same_bits
from triton_device import OnDevice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
body = OnDevice(k_winners_triton)


def assert_as_reference(x, k, boosted=False, channels=None, inner=1, what=""):
    channels = x.shape[1] if channels is None else channels
    boost = (torch.rand(channels), torch.tensor(1.5)) if boosted else (None, None)
    arguments = (x, k, *boost, channels, inner)
    y, winners, counts = body.k_winners(*arguments)
    wanted_y, wanted_winners, wanted_counts = reference.k_winners(*arguments)
    assert_same_bits(winners, wanted_winners, f"winners, {what}")
    assert_same_bits(y, wanted_y, f"y, {what}")
    assert_same_bits(counts, wanted_counts, f"counts, {what}")


@pytest.fixture
def short_rows_are_long(monkeypatch):
    monkeypatch.setattr(k_winners_triton, "REGISTERS_N", 64)
    monkeypatch.setattr(long, "CHUNK", 128)
    monkeypatch.setattr(long, "SAMPLE", 64)
    monkeypatch.setattr(long, "SELECT_CHUNK", 256)


@pytest.fixture
def many_rows(monkeypatch):
    """Persistent programs that prefetch, as if the device had one multiprocessor only."""
    monkeypatch.setattr(k_winners_triton, "multiprocessors", lambda x: 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 33, 1000])
def test_k_winners_of_every_size(n, dtype):
    for k in sorted({0, 1, n // 10, n - 1, n}):
        assert_as_reference(VALUES["normal"](2, n, dtype), k, k % 2 == 0, what=f"n={n} k={k}")
    assert_as_reference(torch.empty(0, n, dtype=dtype), n // 2, what="no rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_k_winners_of_every_kind_of_value(values, dtype):
    for k, boosted in ((1, True), (11, False), (32, True)):
        assert_as_reference(VALUES[values](2, 33, dtype), k, boosted, what=f"k={k} boosted={boosted}")


def test_k_winners_of_products_that_underflow():
    """They are zeros, whatever their signs, and tie with all zeros."""
    x = torch.tensor([0.0, -0.0, 1, -1, 2, -2]).mul(2.0**-149)[torch.randint(6, (8, 40))]
    boost = torch.rand(40) * 2, torch.tensor(3.0)  # factors from 0.004 to 1.1
    for k in (1, 10, 30):
        (y, winners, _), wanted = (ops.k_winners(x, k, *boost, 40, 1) for ops in (body, reference))
        assert_same_bits(winners, wanted[1], f"winners, k={k}")
        assert_same_bits(y, wanted[0], f"y, k={k}")


@pytest.mark.usefixtures("many_rows")
def test_k_winners_of_more_rows_than_programs():
    for n in (16, 33):
        assert_as_reference(VALUES["ties"](20, n, torch.float32), 5, True, what=f"n={n}")


@pytest.mark.parametrize("inner", [1, 25])
def test_k_winners_by_channel(inner):
    """Channel-major ties of (B, C, H, W) and of channels-last rows."""
    for values in ("normal", "ties", "equal"):
        assert_as_reference(VALUES[values](2, 75, torch.float32), 20, True, 3, inner, values)


@pytest.mark.usefixtures("short_rows_are_long")
@pytest.mark.parametrize("values", ["normal", "ties", "specials", "equal", "ascending", "minus infinity"])
def test_k_winners_of_long_rows(values):
    for n, k, channels, inner in ((300, 30, 300, 1), (301, 1, 301, 1), (300, 299, 3, 100), (300, 60, 3, 1)):
        assert_as_reference(VALUES[values](2, n, torch.float32), k, k > 1, channels, inner, f"n={n} k={k}")


@pytest.mark.usefixtures("short_rows_are_long")
def test_k_winners_of_long_rows_behind_relu():
    """Fewer positive units than winners: ties among the zeros, in places that two rounds of bins narrow down."""
    x = torch.randn(3, 2000).relu() * (torch.rand(3, 2000) < torch.tensor([[0.05], [0.3], [0.0]]))
    for channels, inner in ((2000, 1), (4, 500), (4, 1)):
        assert_as_reference(x, 333, False, channels, inner, f"{channels} channels")


@pytest.mark.usefixtures("short_rows_are_long", "many_rows")
def test_k_winners_of_long_rows_by_one_program_each(monkeypatch):
    for registers in (4096, 0):
        monkeypatch.setattr(long, "REGISTERS_CANDIDATES", registers)
        for values, dtype in (("normal", torch.bfloat16), ("ties", torch.float16), ("specials", torch.float32)):
            assert_as_reference(VALUES[values](5, 700, dtype), 20, True, what=f"{values}, {registers}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k_winners_gradient(dtype):
    for rows, n in ((0, 5), (3, 1), (5, 33), (2, 3000)):
        grad_y = VALUES["specials"](rows, n, dtype)
        winners = reference.pack_winners(torch.rand(rows, n) < 0.3)
        assert_same_bits(
            body.k_winners_backward(grad_y, winners), reference.k_winners_backward(grad_y, winners), f"{rows} x {n}"
        )


@pytest.mark.parametrize("channels", [1, 100, 5000])
@pytest.mark.parametrize("rows", [0, 30])
def test_k_winners_duty_cycle(channels, rows):
    start = torch.rand(channels), torch.tensor(990)
    counts = torch.randint(0, rows + 1, (channels + 1,))
    counts[-1] = rows
    duty_cycle, seen = (t.clone() for t in start)
    body.update_duty_cycle_(duty_cycle, seen, counts, 1000, 2, 3)
    wanted, wanted_seen = (t.clone() for t in start)
    reference.update_duty_cycle_(wanted, wanted_seen, counts, 1000, 2, 3)
    assert (duty_cycle - wanted).abs().max() <= DUTY_CYCLE
    assert seen == wanted_seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels_last", "contiguous"), [(False, False), (True, False), (True, True)])
def test_k_winners_of_a_pooled_map(channels_last, contiguous, dtype):
    for values, shape, pool, k in (("ties", (2, 5, 6, 7), 2, 4), ("specials", (2, 3, 7, 9), 3, 9)):
        x = VALUES[values](shape[0], shape[1] * shape[2] * shape[3], dtype).view(shape)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        arguments = (k, torch.rand(shape[1]), torch.tensor(1.5), pool, contiguous)
        got, wanted = (ops.max_pool_k_winners2d(x, *arguments) for ops in (body, reference))
        for name, a, b in zip(("y", "winners", "offsets", "counts"), got, wanted, strict=True):
            assert_same_bits(a, b, f"{name}, {values}")
        assert got[0].stride() == wanted[0].stride()
        y, winners, offsets, _ = wanted
        grad_y = torch.empty_like(y).copy_(torch.randn(y.shape))
        grads = [
            ops.max_pool_k_winners2d_backward(grad_y, winners, offsets, *shape[2:], channels_last)
            for ops in (body, reference)
        ]
        assert_same_bits(*grads, f"gradient, {values}")
