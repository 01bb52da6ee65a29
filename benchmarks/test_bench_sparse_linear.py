"""The SparseLinear rows as a pytest-benchmark suite: ``pytest benchmarks/test_bench_sparse_linear.py``."""

import pytest

from layer_cases import linear_cases
from suite import IMPLEMENTATIONS, run


@pytest.mark.parametrize("role", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", list(linear_cases()), ids=str)
def test_sparse_linear(benchmark, case, role):
    run(benchmark, case, role)
