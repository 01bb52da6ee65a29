"""Every tolerance of the tests, and where it comes from.

A kernel's sum of n products may differ from the exact one by at most ``gamma(n + 1) * magnitude``, whatever the order
in which it adds (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): n roundings of products and n of
additions meet any one term at most n + 1 times, the bias included; magnitude is the same sum of absolute values. The
result is then rounded once more, to the output's dtype. Selections, copies and counts are exact: no tolerance.
"""

import torch
from torch import Tensor

# Half the distance of 1 to the next number: what one rounding may change, relatively.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Half the distance between subnormal numbers: what one rounding near zero may change, absolutely.
SMALLEST_HALF_STEP = {
    torch.float64: 2.0**-1075,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}
DTYPES = tuple(UNIT_ROUNDOFF)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: bfloat16 and float16 are storage only."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gamma(n: Tensor, dtype: torch.dtype) -> Tensor:
    """n u / (1 - n u): the relative error that n roundings to dtype can build up."""
    nu = n.double() * UNIT_ROUNDOFF[dtype]
    return nu / (1 - nu)


def sum_tolerance(exact: Tensor, magnitude: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum of products may differ by from the float64 oracle, for each element.

    Args:
        exact: the oracle's result, float64.
        magnitude: the same sum over absolute values, float64.
        terms: how many products (and the bias) each sum has that are not zero.
        dtype: of the kernel's inputs and output.
    """
    # The oracle adds in float64 too, in another order; products in float64 of narrower numbers are exact.
    summed = (gamma(terms + 1, accumulator(dtype)) + gamma(terms + 1, torch.float64)) * magnitude
    # Where products underflow, each may lose half a step of the accumulator's.
    summed = summed + terms * SMALLEST_HALF_STEP[accumulator(dtype)]
    return summed + UNIT_ROUNDOFF[dtype] * (exact.abs() + summed) + SMALLEST_HALF_STEP[dtype]


# Equation 6 in float32: (1 - B/T), its product with d, the rate's share and their sum: four roundings of a result in
# [0, 1]; a kernel in float64 that rounds once stays well within.
DUTY_CYCLE = 4 * UNIT_ROUNDOFF[torch.float32]


def assert_sums_close(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: Tensor, what: str) -> None:
    """Fails where a sum leaves its tolerance, and says where it is worst; NaN and infinities must agree."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, wants {tuple(exact.shape)}"
    finite = exact.isfinite() & (exact.abs() <= torch.finfo(actual.dtype).max)
    error = (actual.double() - exact).abs()
    allowed = sum_tolerance(exact, magnitude, terms, actual.dtype)
    wrong = torch.where(
        finite, ~(error <= allowed), ~(actual == exact.to(actual.dtype)) & ~(actual.isnan() & exact.isnan())
    )
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} sums ({actual.dtype}) leave their tolerance; at {at} got "
            f"{float(actual[at])!r}, wants {float(exact[at])!r} +- {float(allowed[at]):.3g}"
        )


def assert_same_bits(actual: Tensor, wanted: Tensor, what: str) -> None:
    """Fails where two tensors differ in a bit: signs of zero and payloads of NaN count."""
    assert actual.dtype == wanted.dtype, f"{what}: {actual.dtype}, wants {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{what}: shape {tuple(actual.shape)}, wants {tuple(wanted.shape)}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differ = actual.contiguous().view(integer) != wanted.contiguous().view(integer)
    if differ.any():
        at = tuple(int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ; at {at} got {actual[at].item()!r}, "
            f"wants {wanted[at].item()!r}"
        )
