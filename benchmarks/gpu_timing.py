"""Times of functions on a GPU: by device events, as called and as replays of a captured graph; on CPU by the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from report import OURS
from timing import Timing, interleaved

SAMPLE_MS = 1.0  # a sample is as many calls as last this long
ROUNDS = 15
GRAPHED = ", graph"


def on_gpu(device: str) -> bool:
    return device == "cuda"


def timings(functions: dict[tuple[str, str], Callable], device: str, graphs: bool = True) -> dict[tuple, Timing]:
    """Times each function by (role, name); with graphs also as (role, name + ", graph") where it can be captured."""
    functions = {key: function for key, function in functions.items() if runs(key, function)}
    if not on_gpu(device):
        return interleaved(functions, 0.05, device)
    timed = dict(functions)
    if graphs:
        for (role, name), function in functions.items():
            replay = captured(function)
            if replay is not None:
                timed[role, name + GRAPHED] = replay
    calls = {key: max(1, math.ceil(SAMPLE_MS / _sample(run, 3))) for key, run in timed.items()}
    samples: dict[tuple, list[float]] = {key: [] for key in timed}
    for i in range(ROUNDS):
        for key in list(timed) if i % 2 == 0 else reversed(timed):
            samples[key].append(_sample(timed[key], calls[key]))
    return {key: _timing(values) for key, values in samples.items()}


def runs(key: tuple[str, str], function: Callable) -> bool:
    """Calls it once: a rival that PyTorch cannot run (a dtype, a compilation, memory) is left out, and said why."""
    if key[0] == OURS:
        return True
    try:
        function()
    except Exception as error:
        print(f"  {' '.join(key)} left out: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        return False
    return True


def captured(function: Callable) -> Callable | None:
    """The replay of function captured as a CUDA graph, or None where it cannot be captured (it says why)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        print(f"  not captured as a graph: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph.replay


def _sample(run: Callable, calls: int) -> float:
    """Milliseconds of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / calls, 1e-6)


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
