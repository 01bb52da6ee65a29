from fractions import Fraction
from itertools import combinations, pairwise
from math import sqrt

import pytest
import torch

import sparsekern as sk
from sparsekern import sdr


def test_matches_is_a_product_at_a_threshold():
    prototype = torch.tensor([1.0, 0, 1, 1])
    x = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [0.5, 0, 0.5, 1]])
    assert sdr.matches(prototype, x, 2).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"sdr.matches: wants a prototype \(n,\)"):
        sdr.matches(prototype, x[:, :3], 2)


def test_overlap_count_by_hand():
    # A prototype of 2 active bits of 5: of the 10 vectors with 3 active bits, 1 shares none, 6 share one, 3 share two.
    assert [sdr.overlap_count(5, 3, 2, b) for b in range(-1, 5)] == [0, 1, 6, 3, 0, 0]


def test_match_probability_by_hand():
    assert sk.sdr.match_probability(5, 3, 2, 0) == 1
    assert sk.sdr.match_probability(5, 3, 2, 1) == 9 / 10
    assert sk.sdr.match_probability(5, 3, 2, 2) == 3 / 10
    assert sk.sdr.match_probability(5, 3, 2, 3) == 0
    assert sk.sdr.match_probability(49, 6, 6, 6) == 1 / 13_983_816  # a lottery's jackpot
    assert sk.sdr.match_probability(4, 0, 4, 0) == 1
    assert sk.sdr.match_probability(4, 0, 4, 1) == 0


@pytest.mark.parametrize(("n", "a", "s"), [(7, 3, 4), (8, 5, 5), (9, 1, 8), (6, 6, 3)])
def test_match_probability_counts_every_vector(n, a, s):
    overlaps = [sum(i < s for i in active) for active in combinations(range(n), a)]
    for theta in range(s + 2):
        assert sdr.match_probability(n, a, s, theta) == float(
            Fraction(sum(b >= theta for b in overlaps), len(overlaps))
        )


def test_match_probability_of_figure_2():
    # Half of the bits active: by symmetry P(overlap >= 12 of 24) = (1 + P(overlap = 12)) / 2.
    n = 3500
    middle = sdr.overlap_count(n, n // 2, 24, 12) / sum(sdr.overlap_count(n, n // 2, 24, b) for b in range(25))
    assert sdr.match_probability(n, n // 2, 24, 12) == pytest.approx((1 + middle) / 2, rel=1e-14)
    falling = [sdr.match_probability(n, 64, 24, 12) for n in range(300, 3501, 200)]
    assert all(later < earlier for earlier, later in pairwise(falling))
    assert 0 < falling[-1] < 1e-14


@pytest.mark.parametrize(("n", "a", "s", "theta"), [(300, 128, 24, 12), (50, 10, 8, 2), (30, 30, 5, 5), (30, 0, 5, 1)])
def test_simulation_agrees_with_the_exact_probability(n, a, s, theta):
    trials = 100_000
    exact = sdr.match_probability(n, a, s, theta)
    found = sdr.simulate_binary(n, a, s, theta, trials=trials, generator=torch.Generator().manual_seed(0))
    assert abs(found - exact) <= 4 * sqrt(exact * (1 - exact) / trials)


def test_scalar_threshold_by_hand():
    # E[x^2] of x uniform in [-1/2, 1/2] is 1/12; two of them, halved.
    assert sdr.scalar_threshold(2) == pytest.approx(1 / 12)
    w = torch.empty(100_000, 32).uniform_(-1 / 32, 1 / 32, generator=torch.Generator().manual_seed(0))
    assert sdr.scalar_threshold(32) == pytest.approx(float((w * w).sum(1).mean()) / 2, rel=0.01)


def test_scalar_simulation_agrees_with_whole_vectors():
    n, a, s, scale, trials = 60, 40, 8, 2.0, 40_000
    generator = torch.Generator().manual_seed(1)
    w = torch.empty(trials, s).uniform_(-1 / s, 1 / s, generator=generator)
    x = torch.empty(trials, n).uniform_(0, scale * 2 / s, generator=generator)
    x *= torch.rand(trials, n, generator=generator).argsort(1) < a
    whole = float(((x[:, :s] * w).sum(1) >= sdr.scalar_threshold(s)).double().mean())
    found = sdr.simulate_scalar(n, a, s, scale=scale, trials=trials, generator=generator)
    assert 0.1 < whole < 0.5
    assert found == pytest.approx(whole, abs=5 * sqrt(2 * whole * (1 - whole) / trials))


def test_scalar_probability_agrees_with_its_simulation():
    generator = torch.Generator().manual_seed(2)
    by_overlap = sdr.scalar_match_by_overlap(8, scale=2.0, trials=50_000, generator=generator)
    assert len(by_overlap) == 9
    assert by_overlap[0] == 0
    found = sdr.simulate_scalar(60, 40, 8, scale=2.0, trials=50_000, generator=generator)
    assert sdr.scalar_match_probability(60, 40, by_overlap) == pytest.approx(found, abs=0.01)
    assert sdr.scalar_match_probability(60, 0, by_overlap) == 0
    assert sdr.scalar_match_probability(60, 60, by_overlap) == by_overlap[-1]


def test_simulations_follow_their_generator():
    def both():
        generator = torch.Generator().manual_seed(5)
        return [f(100, 50, 8, trials=1000, generator=generator, theta=t) for f, t in
                ((sdr.simulate_binary, 4), (sdr.simulate_scalar, 0.01))]  # fmt: skip

    assert both() == both()


@pytest.mark.parametrize("call", [
    lambda: sdr.match_probability(10, 11, 2, 1),
    lambda: sdr.match_probability(10, 2, -1, 1),
    lambda: sdr.simulate_binary(10, 2, 11, 1),
    lambda: sdr.simulate_scalar(10, 2, 11),
])  # fmt: skip
def test_impossible_sizes_are_refused(call):
    with pytest.raises(ValueError, match=r"sdr\.\w+: wants a and s in 0..n, got n=10"):
        call()


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match="wants trials at least 1, got 0"):
        sdr.simulate_binary(10, 2, 2, 1, trials=0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "match_probability: wants an integer theta, got 2.5", lambda: sdr.match_probability(9, 3, 3, 2.5)),
        (TypeError, "simulate_binary: wants an integer theta, got 2.5", lambda: sdr.simulate_binary(9, 3, 3, 2.5)),
        (TypeError, "match_probability: wants an integer a .*, got 3.0", lambda: sdr.match_probability(9, 3.0, 3, 2)),
        (
            TypeError,
            "simulate_binary: wants an integer trials at least 1, got 10000.0",
            lambda: sdr.simulate_binary(9, 3, 3, 2, trials=1e4),
        ),
        (
            TypeError,
            "simulate_scalar: wants an integer trials at least 1, got 10000.0",
            lambda: sdr.simulate_scalar(9, 3, 3, trials=1e4),
        ),
        (ValueError, "simulate_scalar: wants s at least 1, got 0", lambda: sdr.simulate_scalar(9, 3, 0)),
        (ValueError, "scalar_match_by_overlap: wants s at least 1, got 0", lambda: sdr.scalar_match_by_overlap(0)),
        (ValueError, "scalar_threshold: wants s at least 1, got 0", lambda: sdr.scalar_threshold(0)),
    ],
)
def test_what_cannot_be_is_refused(error, message, call):
    with pytest.raises(error, match=f"sdr.{message}"):
        call()
