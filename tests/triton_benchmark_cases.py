"""The GPU benchmarks with the GPU's bodies, on CPU under Triton's interpreter: what test_triton_interpreter.py runs.

All is as on a GPU, but that sizes are tiny, graphs are not captured and nothing is compiled.
"""

import pytest
import torch

import autoencoder
import gpu
import gpu_cases
import gpu_crossovers
import gpu_report
import gpu_timing
from report import read_csv
from sparsekern.ops import _library
from triton_dispatch_cases import registered_for_cpu


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (autoencoder, gpu, gpu_cases, gpu_crossovers, gpu_report, gpu_timing):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(gpu_timing, "ROUNDS", 2)
    monkeypatch.setattr(gpu_timing, "captured", lambda function: function)
    monkeypatch.setattr(gpu_timing, "_sample", lambda run, calls: 1.0 if run() is None else 2.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)
    with registered_for_cpu(_library.triton_body):
        yield


ROWS = "fused|selection 64 x|FFN"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gpu_benchmarks(tmp_path, capsys):
    path = tmp_path / "gpu.csv"
    assert gpu.main(["--device", "cpu", "--only", ROWS, "--csv", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert "not captured" not in printed
    results, where = read_csv(path)
    assert where["kernels"].startswith("Triton")
    assert {name for result in results for _, name in result.timings} >= {
        "eager",
        "eager, graph",
        "selection alone, graph",
    }


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gpu_benchmarks_of_the_crossovers(capsys):
    assert gpu_crossovers.main(["--device", "cpu", "--only", "bfloat16|active=0.1$"]) == 0
    printed = capsys.readouterr().out
    for what in ("groups ", "sparse grad_weight ", "dense grad_input "):
        assert what in printed
