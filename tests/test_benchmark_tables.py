import csv

import pytest
import torch

import gpu_cases
import gpu_tables
import tables
from compare_dense import all_cases
from report import ENVIRONMENT, Result, environment, write_csv
from timing import Timing


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A folder of results in which every case is three times as fast as dense."""
    ours, dense = Timing(1.0, 0.9, 1.1, 5), Timing(3.0, 2.9, 3.1, 5)
    results = [
        Result(case.name, case.work, case.batch, 10.0, 1e-7, {("sparsekern", "a"): ours, ("dense", "b"): dense})
        for case in all_cases()
    ]
    for threads in ("1", "2"):
        where = {**environment("cpu", torch.float32), "threads": threads}
        write_csv(tmp_path / f"compare_dense_{threads}.csv", results, where)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return results


def test_documents_are_in_step_with_the_results():
    assert tables.main(["--check"]) == 0


def test_every_target_belongs_to_a_case():
    cases = {(case.name, case.work, case.batch) for case in all_cases()}
    assert set(tables.TARGETS) <= cases


def test_tables_of_the_results(measured):
    readme = tables.readme_tables()["speed table"]
    assert "2 threads, float32" in readme
    assert readme.count("3.00x") == len([r for r in measured if r.batch == 64]) + 1  # and the decode
    table = tables.performance_tables()["compare_dense"]
    assert "1 thread, float32" in table
    assert "3x reached" in table
    assert "4x missed" in table
    assert table.count("\n") > 2 * len(measured)


def test_missed_targets_are_named(measured):
    missed = list(tables.missed())
    assert "1 thread, speech sparseCNN2 G=1, inference, B=1: 3.00x over dense, target 4x" in missed
    assert not any("training step" in line for line in missed)


def test_check_finds_a_stale_document(measured, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    marked = {
        "README.md": ["speed table", "GPU table"],
        "docs/performance.md": ["compare_dense", "compare_dense on Zen 4", "roofline", "never_slower"],
    }
    for document, names in marked.items():
        text = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names)
        (tmp_path / document).write_text(f"before\n{text}after\n")
    assert tables.main(["--check"]) == 1
    assert (
        "out of step with benchmarks/results: README.md, docs/performance.md, docs/speed.png" in capsys.readouterr().out
    )
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    assert (tmp_path / "README.md").read_text().startswith("before\n<!-- speed table: begin -->\n![Speed-up")
    assert (tmp_path / "README.md").read_text().endswith("<!-- GPU table: begin -->\n<!-- GPU table: end -->\nafter\n")


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match=r"wants the markers <!-- a: begin --> and <!-- a: end --> once each"):
        tables.filled("no markers", {"a": "b"})


def test_gpu_table_of_the_results(tmp_path, monkeypatch):
    """Each way of calling against the rivals that were called so; every target's row is one that gpu.py measures."""

    def milliseconds(value):
        return Timing(value, value, value, 15)

    path = tmp_path / "gpu.csv"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.readme_tables()["GPU table"] == ""
    times = {("sparsekern", "eager"): 0.02, ("sparsekern", "eager, graph"): 0.005, ("dense", "eager"): 0.05}
    times |= {("dense", "compile"): 0.04, ("dense", "eager, graph"): 0.01, ("TF32", "eager"): 0.01}
    timed = {key: milliseconds(value) for key, value in times.items()}
    name = "conv 64->64 5x5 on 14x14, 10% active, float32, B=1024"
    results = [Result(name, "", 1024, 10.0, 1e-7, timed), Result("mnist sparseCNN2 G=1", "inference", 1, 4.6, 0, timed)]
    write_csv(path, results, {**environment("cpu", torch.float32), "hardware": "a GPU"})
    table = tables.readme_tables()["GPU table"]
    assert f"| {name} |  | in a graph | 5.0 | 2.00x |  |  |  |  | 2x reached |" in table
    assert f"| {name} |  | eagerly | 20.0 | 2.00x |  |  | 0.50x |  | 2x reached |" in table
    assert "| mnist sparseCNN2 G=1, B=1 | inference | eagerly | 20.0 | 2.00x |" in table
    assert "a GPU" in table
    assert set(gpu_tables.TARGETS) <= set(gpu_cases.CASES)


def test_the_grids_outcome_is_counted(tmp_path, monkeypatch):
    """Each case by the first thing that slower ones have in common; below 0.95x is slower."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.slower_in_short() == tables.never_slower_table() == ""
    columns = ["layer", "shape", "active", "batch", "dtype", "work", "speedup", *ENVIRONMENT]
    where = {**environment("cpu", torch.float32), "threads": "1", "commit": "abc+"}
    cases = [
        ("linear", "64x64", "0.1", "1", "bfloat16", "training", "0.8"),
        ("conv", "1x32x5x28x1x0", "1.0", "4", "float32", "training", "0.7"),
        ("conv", "1x32x5x28x1x0", "0.6", "64", "float32", "training", "0.94"),
        ("linear", "784x128", "0.1", "64", "float32", "forward", "0.95"),
    ]
    (tmp_path / "zen4").mkdir()
    for folder, rows in (".", cases), ("zen4", cases[:1]):
        with open(tmp_path / folder / "never_slower.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**where, **dict(zip(columns, case, strict=False))} for case in rows)
    short = " ".join(tables.slower_in_short().split())
    assert (
        "on one thread, 3 are below 0.95x of the dense layer's speed, the lowest at 0.70x: 64 x 64 layers (1)" in short
    )
    assert "training steps of 1 to 4 samples (1), convolutions whose input is mostly active (1). [" in short
    table = tables.never_slower_table()
    assert "| all else | 1 | 0.95x | 0.95x | 0 |" in table
    assert "commit abc with changes The same cases on Zen 4 (" in " ".join(table.split())
    assert " ".join(table.split()).endswith("lowest at 0.80x: 64 x 64 layers (1).")


def test_the_forms_of_dense_are_those_of_the_results(measured):
    assert tables.forms(measured) == "the faster of as written and channels-last (not compiled)"
    measured[0].timings["dense", "dense compiled"] = Timing(1.0, 1.0, 1.0, 5)
    assert tables.forms(measured) == "the fastest of as written, channels-last and compiled"
