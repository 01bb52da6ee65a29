import csv

import pytest
import torch

import crossovers


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [([2.0] * 9, "1.00"), ([0.5] * 9, "none"), ([2.0, 1.5, 0.5] + [0.1] * 6, "0.15")],
)
def test_crossover_lies_between_two_measurements(speedups, expected):
    assert crossovers.crossover(speedups) == expected


def test_every_pass_of_both_layers_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(crossovers, "SECONDS", 0.0)
    monkeypatch.setattr(crossovers, "ACTIVE", (0.1,) * 9)
    path = tmp_path / "crossovers.csv"
    assert crossovers.main(["--only", "(density=0.1 group_size=16|conv 32).* B=1$", "--csv", str(path)]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"].split()[0], row["pass"], row["varied"]) for row in rows] == [
        (kind, *varied) for kind in ("linear", "conv") for varied in crossovers.PASSES
    ]
    assert all(float(row["active 0.1"]) > 0 and row["hardware"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 12
