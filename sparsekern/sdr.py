"""The theory of sparse distributed representations (section 2): how likely a random vector matches a prototype.

A prototype has s non-zero components of n, an input has a, and they match where their product reaches a threshold. For
binary vectors the probability of a false match is exact; for scalar ones it is simulated.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from sparsekern.ops import _check

CHUNK = 1 << 15  # trials that are simulated at a time: their random numbers fit the caches


def matches(prototype: Tensor, x: Tensor, theta: float) -> Tensor:
    """Whether inputs match a prototype: ``prototype . x >= theta`` (equation 1).

    Args:
        prototype: (n,), binary or scalar.
        x: (..., n).
        theta: the threshold.

    Returns:
        Bool (...).
    """
    if prototype.dim() != 1 or x.dim() == 0 or x.shape[-1] != len(prototype):
        raise ValueError(
            f"sdr.matches: wants a prototype (n,) and x (..., n), got {tuple(prototype.shape)} and {tuple(x.shape)}"
        )
    return (x * prototype).sum(-1) >= theta


def overlap_count(n: int, a: int, s: int, b: int) -> int:
    """How many binary vectors with a active bits of n share exactly b with a prototype of s active bits (equation 2)."""
    _check_sizes("sdr.overlap_count", n, a, s)
    return comb(s, b) * comb(n - s, a - b) if 0 <= b <= min(a, s) else 0


def match_probability(n: int, a: int, s: int, theta: int) -> float:
    """Probability that a random binary vector matches a prototype (equation 3), exact but for one rounding.

    Args:
        n: dimension.
        a: active bits of the random vector, all such vectors being equally likely.
        s: active bits of the prototype.
        theta: the vector matches where it shares at least this many active bits with the prototype.
    """
    _check_sizes("sdr.match_probability", n, a, s)
    _check_theta("sdr.match_probability", theta)
    matching = sum(overlap_count(n, a, s, b) for b in range(max(theta, 0), min(a, s) + 1))
    return matching / comb(n, a)  # integers: Python rounds their quotient once


def scalar_threshold(s: int) -> float:
    """Half of the mean product of a scalar prototype with itself (section 2): its s components are in [-1/s, 1/s]."""
    _check.integer("sdr.scalar_threshold", "s", s, 1)
    return s * _mean_square(1 / s) / 2


def simulate_binary(n: int, a: int, s: int, theta: int, *, trials: int = 1_000_000, generator=None) -> float:
    """The fraction of random binary vectors that match a prototype: equation 3 by trial.

    Args:
        n, a, s, theta: as in :func:`match_probability`.
        trials: random vectors.
        generator: of the random numbers; torch's default one if None.
    """
    _check_sizes("sdr.simulate_binary", n, a, s)
    _check_theta("sdr.simulate_binary", theta)
    _check.integer("sdr.simulate_binary", "trials", trials, 1)
    found = sum(int((_active(n, a, s, size, generator).sum(1) >= theta).sum()) for size in _chunks(trials))
    return found / trials


def simulate_scalar(
    n: int,
    a: int,
    s: int = 32,
    *,
    scale: float = 1.0,
    theta: float | None = None,
    trials: int = 1_000_000,
    generator=None,
) -> float:
    """The fraction of random scalar vectors that match a random prototype (equation 4), by trial.

    The prototype's s non-zero components are uniform in [-1/s, 1/s], those of the input in ``scale * [0, 2/s]`` (equation
    5); every trial draws both.

    Args:
        n: dimension.
        a: non-zero components of the input.
        s: non-zero components of the prototype.
        scale: S, of the input.
        theta: threshold of the product; :func:`scalar_threshold` by default.
        trials: pairs of vectors.
        generator: of the random numbers; torch's default one if None.
    """
    _check_sizes("sdr.simulate_scalar", n, a, s)
    _check_scalar("sdr.simulate_scalar", s, trials)
    theta = scalar_threshold(s) if theta is None else theta
    found = 0
    for size in _chunks(trials):
        active = _active(n, a, s, size, generator)
        prototype = torch.empty(size, s).uniform_(-1 / s, 1 / s, generator=generator)
        x = torch.empty(size, s).uniform_(0, scale * 2 / s, generator=generator)
        found += int(((prototype * x * active).sum(1) >= theta).sum())
    return found / trials


def scalar_match_by_overlap(
    s: int = 32, *, scale: float = 1.0, theta: float | None = None, trials: int = 100_000, generator=None
) -> list[float]:
    """The probability that scalar vectors match where exactly b non-zero components meet, for b = 0..s, by trial.

    Args:
        s, scale, theta, generator: as in :func:`simulate_scalar`.
        trials: for each b.
    """
    _check_scalar("sdr.scalar_match_by_overlap", s, trials)
    theta = scalar_threshold(s) if theta is None else theta
    found = torch.zeros(s, dtype=torch.int64)
    for size in _chunks(trials):
        prototype = torch.empty(size, s).uniform_(-1 / s, 1 / s, generator=generator)
        x = torch.empty(size, s).uniform_(0, scale * 2 / s, generator=generator)
        found += ((prototype * x).cumsum(1) >= theta).sum(0)  # column b - 1: the product over b components
    return [float(theta <= 0), *(found / trials).tolist()]


def scalar_match_probability(n: int, a: int, by_overlap: list[float]) -> float:
    """Probability that random scalar vectors match: what :func:`simulate_scalar` finds, without trials that never match.

    The probability of each overlap is exact (equation 2), so that very small probabilities come out too.

    Args:
        n, a: as in :func:`simulate_scalar`.
        by_overlap: from :func:`scalar_match_by_overlap`, which gives s its value.
    """
    s = len(by_overlap) - 1
    _check_sizes("sdr.scalar_match_probability", n, a, s)
    vectors = comb(n, a)
    return sum(overlap_count(n, a, s, b) / vectors * match for b, match in enumerate(by_overlap))


def _active(n: int, a: int, s: int, trials: int, generator) -> Tensor:
    """Which of a prototype's s positions are active in random vectors with a active bits of n: bool (trials, s).

    Selection sampling: each position in turn is active with the probability (active bits left) / (positions left), which
    makes every set of a positions equally likely. Those past the prototype's do not matter and are not drawn.
    """
    left = torch.full((trials,), a)
    active = torch.empty(trials, s, dtype=torch.bool)
    for i in range(s):
        chosen = torch.rand(trials, generator=generator, dtype=torch.float64) * (n - i) < left
        active[:, i] = chosen
        left -= chosen.long()
    return active


def _chunks(trials: int) -> list[int]:
    return [min(CHUNK, trials - start) for start in range(0, trials, CHUNK)]


def _mean_square(bound: float) -> float:
    """E[x^2] of x uniform in [-bound, bound]."""
    return bound * bound / 3


def _check_sizes(op: str, n: int, a: int, s: int) -> None:
    if not (0 <= a <= n and 0 <= s <= n):
        raise ValueError(f"{op}: wants a and s in 0..n, got n={n}, a={a}, s={s}")
    for name, value in (("n", n), ("a", a), ("s", s)):
        _check.integer(op, name, value, 0)


def _check_theta(op: str, theta: int) -> None:
    if isinstance(theta, bool) or not isinstance(theta, int):
        raise TypeError(f"{op}: wants an integer theta, got {theta!r}")


def _check_scalar(op: str, s: int, trials: int) -> None:
    """A prototype without components would have them within 1 / 0."""
    _check.integer(op, "s", s, 1)
    _check.integer(op, "trials", trials, 1)
