"""Times of several functions side by side: equally warmed up, interleaved, median and spread."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP_SECONDS = 0.03  # of each function, and at least three calls
SAMPLE_SECONDS = 1e-2  # a sample is as many calls as last this long, so that the clock and a cold first call vanish
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of the samples, and their quartiles."""

    median: float
    low: float
    high: float
    samples: int


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Timing]:
    """Times the functions in rounds, each once a round, for about so many seconds in all (five rounds at least).

    Every second round runs backwards, so that no function always follows the same other one.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    estimates = {name: _warm_up(function, synchronize) for name, function in functions.items()}
    calls = {name: max(1, math.ceil(SAMPLE_SECONDS / estimate)) for name, estimate in estimates.items()}
    rounds = max(FEWEST_ROUNDS, int(seconds / sum(calls[name] * estimates[name] for name in functions)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    with _no_garbage_collection():
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                samples[name].append(_sample(functions[name], calls[name], synchronize))
    return {name: _timing(values) for name, values in samples.items()}


def _warm_up(function, synchronize) -> float:
    """Seconds of a call, the first ones left out."""
    start, calls, fastest = time.perf_counter(), 0, math.inf
    while calls < 3 or time.perf_counter() - start < WARM_UP_SECONDS:
        fastest = min(fastest, _sample(function, 1, synchronize))
        calls += 1
    return fastest


def _sample(function, calls: int, synchronize) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


def _timing(values: list[float]) -> Timing:
    ms = [1e3 * value for value in values]
    low, median, high = statistics.quantiles(ms, n=4, method="inclusive")
    return Timing(median, low, high, len(ms))


@contextlib.contextmanager
def _no_garbage_collection():
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
