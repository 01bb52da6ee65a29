"""The SparseConv2d rows as a pytest-benchmark suite: ``pytest benchmarks/test_bench_sparse_conv2d.py``."""

import pytest

from layer_cases import conv_cases
from suite import IMPLEMENTATIONS, run


@pytest.mark.parametrize("role", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", list(conv_cases()), ids=str)
def test_sparse_conv2d(benchmark, case, role):
    run(benchmark, case, role)
