"""k-winners: every body selects exactly as the reference does, and passes winners and gradients bit for bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops.k_winners_reference import unpack_winners
from tolerance import DTYPES, DUTY_CYCLE, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled")
ops = torch.ops.sparsekern
SIZES = (1, 15, 16, 17, 31, 33, 1000, 1500)
BATCHES = (0, 1, 3, 64)


def near_one(rows, n, dtype):
    """Numbers whose neighbours in the order differ in the last bits alone."""
    steps = torch.randint(0, 8, (rows, n)).to(dtype)
    return 1 + steps * torch.finfo(dtype).eps


def specials(rows, n, dtype):
    """NaN of either sign, infinities, both zeros, the ends of the range and numbers below the normal ones."""
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal / 4
    values = [
        math.nan,
        math.inf,
        -math.inf,
        0.0,
        -0.0,
        info.max,
        info.min,
        subnormal,
        -subnormal,
        2 * subnormal,
        1.0,
        -1.0,
    ]
    table = torch.tensor(values, dtype=dtype)
    return torch.cat([table, -table[:1]])[torch.randint(len(values) + 1, (rows, n))]


VALUES = {
    "normal": lambda rows, n, dtype: torch.randn(rows, n, dtype=torch.float64).to(dtype),
    "ties": lambda rows, n, dtype: torch.randint(-2, 3, (rows, n)).to(dtype),
    "equal": lambda rows, n, dtype: torch.full((rows, n), -1.5, dtype=dtype),
    "zeros of both signs": lambda rows, n, dtype: (
        torch.zeros(rows, n, dtype=dtype) * torch.randn(rows, n).sign().to(dtype)
    ),
    "minus infinity": lambda rows, n, dtype: torch.full((rows, n), -math.inf, dtype=dtype),
    "near one": near_one,
    "specials": specials,
    "mostly one NaN": lambda rows, n, dtype: torch.where(torch.rand(rows, n) < 0.7, math.nan, torch.randn(rows, n)).to(
        dtype
    ),
    "ascending": lambda rows, n, dtype: torch.arange(n, dtype=dtype).expand(rows, n).contiguous(),
    "descending": lambda rows, n, dtype: -torch.arange(n, dtype=dtype).expand(rows, n).contiguous(),
}


def assert_as_reference(x, k, duty_cycle=None, boost_strength=None, channels=None, inner=1, what=""):
    channels = x.shape[1] if channels is None else channels
    strength = None if boost_strength is None else torch.tensor(boost_strength)
    arguments = (x, k, duty_cycle, strength, channels, inner)
    y, winners, counts = ops.k_winners(*arguments)
    wanted_y, wanted_winners, wanted_counts = reference.k_winners(*arguments)
    n = x.shape[1]
    assert winners.shape == wanted_winners.shape
    assert_same_bits(unpack_winners(winners, n), unpack_winners(wanted_winners, n), f"winners, {what}")
    assert_same_bits(y, wanted_y, f"y, {what}")
    assert_same_bits(counts, wanted_counts, f"counts, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(n, dtype):
    for rows, k in itertools.product(BATCHES, sorted({0, 1, n // 10, n - 1, n})):
        x = VALUES["normal"](rows, n, dtype)
        assert_as_reference(x, k, what=f"B={rows} n={n} k={k}")
        assert_as_reference(x, k, torch.rand(n), 1.5, what=f"B={rows} n={n} k={k}, boosted")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_every_kind_of_value(values, dtype):
    for n, boosted in itertools.product((5, 16, 33, 300), (False, True)):
        x = VALUES[values](7, n, dtype)
        boost = (torch.rand(n), 2.0) if boosted else (None, None)
        for k in (1, n // 3, n // 2, n - 1, n):
            assert_as_reference(x, k, *boost, what=f"n={n} k={k} boosted={boosted}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4608, 12544, 40_000])
def test_long_rows(n, dtype):
    for values, k in (("normal", n // 10), ("ties", n // 10), ("normal", 1), ("specials", n // 2), ("equal", n - 1)):
        assert_as_reference(VALUES[values](3, n, dtype), k, torch.rand(n), 1.0, what=f"{values}, n={n} k={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "locations"), [(1, 1), (3, 25), (64, 9), (30, 144), (7, 1), (1, 40)])
def test_channels_share_a_boost_and_a_count(channels, locations, dtype):
    n, duty_cycle = channels * locations, torch.rand(channels)
    for values in ("normal", "ties", "specials"):
        x = VALUES[values](5, n, dtype)
        for k in sorted({1, n // 7, n // 2}):
            assert_as_reference(x, k, duty_cycle, 1.0, channels, locations, what=f"{values}, k={k}, (C, H, W)")
            assert_as_reference(x, k, duty_cycle, 1.0, channels, 1, what=f"{values}, k={k}, (H, W, C)")
            assert_as_reference(x, k, None, None, channels, 1, what=f"{values}, k={k}, (H, W, C), not boosted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("boost_strength", [0.0, 1e-6, 1.0, 30.0, 1000.0])
def test_boosts_of_every_strength(boost_strength, dtype):
    """Up to where the factors overflow and vanish: a zero times an infinite factor is NaN, and wins."""
    n = 100
    for values in ("normal", "ties", "near one", "specials"):
        for duty_cycle in (torch.rand(n), torch.zeros(n), torch.ones(n), torch.randint(0, 2, (n,)).float()):
            x = VALUES[values](4, n, dtype)
            assert_as_reference(x, 20, duty_cycle, boost_strength, what=f"{values}")


@st.composite
def problems(draw):
    """Rows of awkward floats with many ties, k, and perhaps a boost."""
    n = draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    number = st.floats(width=16, allow_nan=True, allow_infinity=True, allow_subnormal=True)
    pool = draw(st.lists(number, min_size=1, max_size=8))
    rows = draw(st.lists(st.lists(st.sampled_from(pool), min_size=n, max_size=n), min_size=1, max_size=3))
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    duty_cycle = None
    if draw(st.booleans()):
        duty_cycle = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n)))
    return x, draw(st.integers(0, n)), duty_cycle


@settings(deadline=None, max_examples=300)
@given(problems())
def test_properties_of_a_selection(problem):
    x, k, duty_cycle = problem
    rows, n = x.shape
    strength = None if duty_cycle is None else torch.tensor(1.0)
    y, winners, counts = ops.k_winners(x, k, duty_cycle, strength, n, 1)
    won = unpack_winners(winners, n)
    assert (won.sum(1) == k).all()
    assert counts.tolist() == [*won.sum(0).tolist(), rows]
    assert_same_bits(y, torch.where(won, x, torch.zeros_like(x)), "kept values are x itself, all else is +0")
    boosted = x.to(torch.promote_types(x.dtype, torch.float32))
    if duty_cycle is not None:
        boosted = boosted * torch.exp(k / n - duty_cycle.double()).float()
    for row in range(rows):
        # Larger first, NaN before all, the lower index first among equals.
        keys = [(not math.isnan(v), 0.0 if math.isnan(v) else -v, i) for i, v in enumerate(boosted[row].tolist())]
        assert won[row].nonzero().flatten().tolist() == sorted(key[2] for key in sorted(keys)[:k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_gradient_passes_the_winners(n, dtype):
    for rows, k in itertools.product(BATCHES, sorted({0, 1, n // 3, n})):
        x = VALUES["ties"](rows, n, dtype).requires_grad_()
        grad_y = VALUES["specials"](rows, n, dtype)
        _, winners, _ = ops.k_winners(x.detach(), k, None, None, n, 1)
        wanted = torch.where(unpack_winners(winners, n), grad_y, torch.zeros_like(grad_y))
        assert_same_bits(ops.k_winners_backward(grad_y, winners), wanted, f"B={rows} k={k}")
        (grad_x,) = torch.autograd.grad(sk.functional.k_winners(x, k), x, grad_y)
        assert_same_bits(grad_x, wanted, f"through autograd, B={rows} k={k}")


def test_gradient_that_is_expanded_or_strided():
    x = torch.randn(6, 50, requires_grad=True)
    won = sk.reference.k_winners(x, 5) != 0
    (grad_x,) = torch.autograd.grad(sk.functional.k_winners(x, 5).sum(), x)
    assert_same_bits(grad_x, won.float(), "expanded")
    grad_y = torch.randn(50, 6).t()
    (grad_x,) = torch.autograd.grad(sk.functional.k_winners(x, 5), x, grad_y)
    assert_same_bits(grad_x, torch.where(won, grad_y, torch.zeros(())), "strided")


@pytest.mark.parametrize("boost_strength", [0.0, 1.0])
def test_gradcheck(boost_strength):
    x = torch.randperm(60).double().view(3, 20).requires_grad_()  # well apart: no step changes a winner
    duty_cycle = torch.rand(20)
    assert torch.autograd.gradcheck(lambda x: sk.functional.k_winners(x, 7, duty_cycle, boost_strength), x)
    assert torch.autograd.gradgradcheck(lambda x: sk.functional.k_winners(x, 7, duty_cycle, boost_strength), x)
    images = torch.randperm(48).double().view(2, 3, 2, 4).requires_grad_()
    duty_cycle_2d = torch.rand(3)
    assert torch.autograd.gradcheck(lambda x: sk.functional.k_winners2d(x, 9, duty_cycle_2d, boost_strength), images)


STRIDED = {
    "transposed": lambda: torch.randn(40, 6).t(),
    "every second": lambda: torch.randn(6, 80)[:, ::2],
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "offset by one": lambda: torch.randn(241)[1:].view(6, 40),
    "rows apart": lambda: torch.randn(6, 41)[:, :40],
    "extra dimensions": lambda: torch.randn(2, 1, 3, 40),
    "no batch dimension": lambda: torch.randn(40),
    "empty dimension": lambda: torch.randn(2, 0, 40),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_layout(layout):
    x = STRIDED[layout]()
    duty_cycle = torch.rand(40)
    y = sk.functional.k_winners(x, 6, duty_cycle, 1.0)
    wanted = reference.k_winners(x.reshape(-1, 40).clone(), 6, duty_cycle, torch.tensor(1.0), 40, 1)[0]
    assert_same_bits(y, wanted.view(x.shape), layout)
    assert ((y != 0).sum(-1) == 6).all()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "one location", "one channel", "empty"])
def test_feature_maps(layout, local):
    shapes = {"one location": (3, 8, 1, 1), "one channel": (3, 1, 4, 5), "empty": (0, 8, 4, 5)}
    x = torch.randint(-9, 10, shapes.get(layout, (3, 8, 4, 5))).float()  # integers: many ties
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "strided":
        x = x.transpose(2, 3)
    B, C, H, W = x.shape
    k, duty_cycle = min(4, C if local else C * H * W), torch.rand(C)
    y = sk.functional.k_winners2d(x, k, duty_cycle, 1.0, local=local)
    rows = x.permute(0, 2, 3, 1).reshape(-1, C).contiguous() if local else x.reshape(B, C * H * W).contiguous()
    wanted = reference.k_winners(rows, k, duty_cycle, torch.tensor(1.0), C, 1 if local else H * W)[0]
    wanted = wanted.view(B, H, W, C).permute(0, 3, 1, 2) if local else wanted.view(B, C, H, W)
    assert_same_bits(y, wanted, layout)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format)
    y = sk.functional.k_winners2d(x.requires_grad_(), k, duty_cycle, 1.0, local=local)
    grad_y = torch.rand_like(x) + 1
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    won = sk.reference.k_winners2d(x.detach() + 100, k, duty_cycle, 0.0, local=local) != 0
    if layout != "empty":
        assert int((grad_x != 0).sum()) == int(won.sum()) == (B * H * W * k if local else B * k)
    assert_same_bits(grad_x[grad_x != 0], grad_y[grad_x != 0], "gradient")


def equation_6(duty_cycle, rates, rows, seen, period):
    """d (1 - B/T) + rate B/T with T = max(B, min(period, rows seen so far including these)), in float64."""
    window = max(rows, min(period, seen + rows))
    return [d * (1 - rows / window) + rate * (rows / window) for d, rate in zip(duty_cycle, rates, strict=True)]


@pytest.mark.parametrize("period", [1, 10, 25, 1000])
def test_duty_cycle_follows_equation_6_over_many_batches(period):
    C, duty_cycle, seen = 37, torch.zeros(37), torch.zeros((), dtype=torch.int64)
    wanted = [0.0] * C
    for step, rows in enumerate([1, 8, 3, 64, 0, 2, 16]):
        wins = torch.randint(0, rows + 1, (C,))
        before = torch.tensor(wanted)
        if rows:
            wanted = equation_6(wanted, (wins.double() / rows).tolist(), rows, int(seen), period)
        ops.update_duty_cycle_(duty_cycle, seen, torch.cat([wins, torch.tensor([rows])]), period, 1, 1)
        torch.testing.assert_close(duty_cycle, torch.tensor(wanted), rtol=0, atol=(step + 1) * DUTY_CYCLE)
        if rows == 0:
            torch.testing.assert_close(duty_cycle, before, rtol=0, atol=(step + 1) * DUTY_CYCLE)
    assert seen == 94


def test_duty_cycle_of_channels_is_averaged_over_locations():
    duty_cycle, seen = torch.tensor([0.5, 0.25]), torch.tensor(6)
    ops.update_duty_cycle_(duty_cycle, seen, torch.tensor([6, 2, 2]), 1000, 1, 4)
    # T = 8, B = 2: 0.5 * 3/4 + (6 / 8) * 1/4 and 0.25 * 3/4 + (2 / 8) * 1/4
    assert duty_cycle.tolist() == [0.5625, 0.25]
    assert seen == 8
    # By location: 8 rows are 2 samples of 4 locations each.
    ops.update_duty_cycle_(duty_cycle, seen, torch.tensor([8, 0, 8]), 4, 4, 4)
    assert duty_cycle.tolist() == [0.5625 / 2 + 0.5, 0.125]
    assert seen == 10


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer_counts_wins_of_its_channels(local, memory_format):
    layer = sk.KWinners2d(4, density=0.25, local=local, duty_cycle_period=5, boost_strength=1.0)
    duty_cycle, seen = [0.0] * 4, 0
    for step, batch in enumerate([2, 7, 1]):
        x = (torch.rand(batch, 4, 3, 5) + 0.5).to(memory_format=memory_format)
        y = layer(x)
        rates = (y != 0).double().mean((0, 2, 3)).tolist()
        assert sum(rates) == pytest.approx(1)
        duty_cycle = equation_6(duty_cycle, rates, batch, seen, 5)
        seen += batch
        torch.testing.assert_close(layer.duty_cycle, torch.tensor(duty_cycle), rtol=0, atol=(step + 1) * DUTY_CYCLE)
    assert layer.samples_seen == seen


def test_opcheck():
    duty_cycle = torch.rand(20)
    for x in (torch.randn(3, 20), torch.randn(0, 20), torch.randn(2, 20, dtype=torch.bfloat16)):
        torch.library.opcheck(ops.k_winners.default, (x, 4, duty_cycle, torch.tensor(1.0), 20, 1))
        torch.library.opcheck(ops.k_winners.default, (x, 4, None, None, 5, 4))
        _, winners, counts = ops.k_winners(x, 4, None, None, 20, 1)
        torch.library.opcheck(ops.k_winners_backward.default, (x, winners))
        torch.library.opcheck(ops.update_duty_cycle_.default, (duty_cycle, torch.tensor(5), counts, 1000, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(threads, dtype):
    x, duty_cycle = VALUES["ties"](130, 999, dtype), torch.rand(999)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(ops.k_winners(x, 100, duty_cycle, torch.tensor(1.0), 999, 1))
    for result in results[1:]:
        for name, got, wanted in zip(("y", "winners", "counts"), result, results[0], strict=True):
            assert_same_bits(got, wanted, name)
