"""Runs a case of the comparison under pytest-benchmark: a group for each case, the rivals side by side in it."""

from __future__ import annotations

from functools import lru_cache

import torch

from cases import Case, Options, Prepared
from report import DENSE, OURS

IMPLEMENTATIONS = (OURS, DENSE)  # the first implementation of each


@lru_cache(maxsize=1)
def checked(case: Case) -> Prepared:
    """The case, ready; a wrong result raises before anything is timed."""
    prepared = case.prepare(Options())
    prepared.check()
    return prepared


def run(benchmark, case: Case, role: str) -> None:
    prepared = checked(case)
    name, function = next((name, f) for (r, name), f in prepared.functions.items() if r == role)
    benchmark.group = str(case)
    benchmark.extra_info["implementation"] = name
    with torch.inference_mode(not prepared.training):
        benchmark(function)
