"""The k-winners rows as a pytest-benchmark suite: ``pytest benchmarks/test_bench_k_winners.py``."""

import pytest

from layer_cases import k_winners_cases
from suite import IMPLEMENTATIONS, run


@pytest.mark.parametrize("role", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", list(k_winners_cases()), ids=str)
def test_k_winners(benchmark, case, role):
    run(benchmark, case, role)
