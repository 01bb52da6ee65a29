"""The GPU benchmarks, rehearsed on CPU at tiny sizes: they check what they time, and write what they found."""

import csv

import pytest
import torch

import autoencoder
import gpu
import gpu_cases
import gpu_crossovers
import gpu_timing
from checking import WrongResult


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_gpu_rows(tmp_path):
    path = tmp_path / "gpu.csv"
    some = "fused|FFN|decode.*backward|10% active, float32, B=64"
    assert gpu.main(["--device", "cpu", "--only", some, "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert {row["case"] for row in rows} >= {"k-winners fused, 1024 x 1000 float32"}
    assert {"sparsekern", "dense", "torch"} <= {row["role"] for row in rows}
    assert all(float(row["ms"]) > 0 for row in rows)


def test_a_row_that_fails_costs_itself_alone(monkeypatch, tmp_path, capsys):
    """So does one that there is no time for; what was measured is written."""

    def broken(*_):
        raise ValueError("no such thing")

    path = tmp_path / "gpu.csv"
    rows = {"broken": broken, "fused": gpu_cases.k_winners_fused}
    monkeypatch.setattr(gpu, "CASES", rows)
    arguments = ["--device", "cpu", "--only", "broken|fused", "--commit", "abc", "--csv", str(path)]
    assert gpu.main(arguments) == 1
    assert "broken: ValueError" in capsys.readouterr().out
    assert {row["case"] for row in rows_of(path)} == {"fused"}
    assert {row["commit"] for row in rows_of(path)} == {"abc"}
    assert gpu.main([*arguments, "--seconds", "-1"]) == 1
    assert "fused: no time left" in capsys.readouterr().out


def test_rivals_that_cannot_run_are_left_out(capsys):
    def unsupported():
        raise RuntimeError("not implemented for 'BFloat16'")

    functions = {("sparsekern", "eager"): lambda: torch.rand(3), ("dense", "eager"): unsupported}
    assert set(gpu_timing.timings(functions, "cpu")) == {("sparsekern", "eager")}
    assert "dense eager left out: RuntimeError" in capsys.readouterr().out


def test_no_such_row():
    assert gpu.main(["--device", "cpu", "--only", "nothing is called so"]) == 2


def test_autoencoder(tmp_path):
    path = tmp_path / "autoencoder.csv"
    assert autoencoder.main(["--device", "cpu", "--csv", str(path)]) == 0
    assert {row["work"] for row in rows_of(path)} == {"forward", "forward + backward", "training step"}


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    def wrong(*_):
        raise WrongResult("off")

    monkeypatch.setitem(gpu.CASES, "a wrong row", wrong)
    assert gpu.main(["--device", "cpu", "--only", "a wrong row"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out
    exact = torch.ones(4, dtype=torch.float64)
    assert gpu_cases.error_of(exact.float(), exact, "ones") == 0
    for value in (1.01, float("nan")):
        with pytest.raises(WrongResult, match="ones"):
            gpu_cases.error_of((exact * value).float(), exact, "ones")
    x = torch.randn(2, 10)
    with pytest.raises(WrongResult, match="largest"):
        gpu_cases.same_winners(torch.where(x < 0, x, 0), x, 3, "smallest")


def test_crossovers(capsys):
    assert gpu_crossovers.main(["--device", "cpu"]) == 0
    assert "of dense" in capsys.readouterr().out


def test_a_crossover_that_fails_costs_itself_alone(monkeypatch, capsys):
    def broken(*_):
        raise WrongResult("off")

    monkeypatch.setattr(gpu_crossovers, "convolution_row", broken)
    assert gpu_crossovers.main(["--device", "cpu", "--only", "active=0.1|float32 B=2"]) == 1
    printed = capsys.readouterr().out
    assert "active=0.1: WrongResult" in printed
    assert "of dense" in printed
    assert gpu_crossovers.main(["--device", "cpu", "--only", "float32 B=2", "--seconds", "-1"]) == 1
    assert "no time left" in capsys.readouterr().out


def test_ways_of_the_crossovers(monkeypatch):
    monkeypatch.setattr(gpu_crossovers, "on_gpu", lambda device: True)
    assert gpu_crossovers.ways(64, 0.1, 16, "cuda") == ["rows", "dense", "groups"]
    assert gpu_crossovers.ways(256, 1.0, 16, "cuda") == ["dense"]


def test_the_autoencoder_has_its_time():
    """What is compiled longest comes last."""
    names = list(gpu.every_row(gpu.parse(["--device", "cpu"])))
    assert names.index(gpu.AUTOENCODER) == len(gpu_cases.CASES)
    assert names[-2:] == list(gpu.COMPILED)
