import csv
import shutil

import pytest
import torch

import roofline
from checking import Checked


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bounds_are_the_longest_way_through_each_resource():
    peaks = {"flops": 2e9, "L1": 8e9, "L2": 4e9, "beyond": 1e9}
    small = Checked(products=2_000_000, moved=8_000, held=8_000)
    assert roofline.lower_bounds(small, 2, peaks) == ("L1", (1.0, 0.5, pytest.approx(0.0005)))
    large = Checked(products=0, moved=2 * 10**6, held=2 * 10**9)
    assert roofline.lower_bounds(large, 2, peaks) == ("beyond", (0.0, 0.0, 1.0))


@pytest.mark.skipif(shutil.which("cc") is None, reason="the peaks are compiled")
def test_writes_a_line_for_each_kernel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    monkeypatch.setattr(roofline, "TRIES", 1)
    path = tmp_path / "roofline.csv"
    assert roofline.main(["--only", "1500 d=0.1 k=200 G=16, forward, B=1$|k-winners n=1000", "--csv", str(path)]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["work"] for row in rows] == ["training forward", "forward"]
    assert rows[0]["MB moved"] == f"{64 * 1000 * 8 / 1e6:.3g}"  # read and written once
    assert float(rows[1]["M products"]) == pytest.approx(200 * 0.1 * 1500 / 1e6, rel=0.05)
    assert "GFLOP/s" in rows[0]["peaks"]
    assert len(capsys.readouterr().out.splitlines()) == 5
