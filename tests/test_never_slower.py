import csv

import pytest
import torch

import never_slower
from checking import WrongResult


@pytest.fixture
def short(monkeypatch):
    """Measurements of no length, which are right and fast enough."""
    monkeypatch.setattr(never_slower, "SECONDS", (0.0, 0.0))
    monkeypatch.setattr(never_slower, "FLOOR", 1e-9)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_grid_is_wide_and_always_the_same():
    cases = never_slower.grid(600)
    assert len({tuple(case.values()) for case in cases}) == 600
    assert cases == never_slower.grid(600)
    for name, options in {**never_slower.LINEAR, **never_slower.CONV}.items():
        if name != "shape":
            assert {str(option) for option in options} <= {case[name] for case in cases}


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("work", [never_slower.FORWARD, never_slower.TRAINING, never_slower.BEHIND_K_WINNERS])
def test_cases_are_what_they_say(layer, work):
    values = next(
        case
        for case in never_slower.grid(600)
        if (case["layer"], case["work"], case["batch"], case["active"]) == (layer, work, "4", "0.1")
    )
    case = never_slower.build(values)
    assert all((x != 0).float().mean() == pytest.approx(0.1, rel=0.1) for x in case.xs)
    assert case.dense.weight.shape == case.layer.to_dense().weight.shape
    never_slower.check(case)
    if work == never_slower.FORWARD:
        assert case.grads[0] is None


def test_goes_on_where_it_was_stopped(short, tmp_path, capsys):
    path = tmp_path / "grid.csv"
    assert never_slower.main(["--cases", "4", "--csv", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    path.write_text("\n".join(lines[:3]) + "\n")
    assert never_slower.main(["--cases", "4", "--csv", str(path)]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({tuple(row[name] for name in never_slower.NAMES) for row in rows}) == len(rows) == 4
    assert all(row["hardware"] and row["torch"] and row["threads"] == "1" for row in rows)
    assert "4 cases: 0 under" in capsys.readouterr().out


def test_begins_anew_for_another_commit(short, tmp_path):
    path = tmp_path / "grid.csv"
    never_slower.main(["--cases", "2", "--csv", str(path)])
    with open(path, newline="") as file:
        old = next(csv.DictReader(file))["commit"]
    path.write_text(path.read_text().replace(old, "another"))
    assert never_slower.main(["--cases", "2", "--csv", str(path)]) == 0
    with open(path, newline="") as file:
        assert [row["commit"] for row in csv.DictReader(file)] == [old] * 2


def test_a_slower_case_is_measured_again_and_fails_the_run(short, monkeypatch, capsys):
    monkeypatch.setattr(never_slower, "FLOOR", 1e9)
    assert never_slower.main(["--cases", "2"]) == 1
    out = capsys.readouterr().out
    assert "2 under" in out
    row = never_slower.measure(never_slower.build(never_slower.grid(2)[0]))
    assert row["measurements"] == "2"


def test_a_wrong_result_is_not_timed(short, monkeypatch, capsys):
    def wrong(case):
        raise WrongResult("y: 1 of 2 values are wrong")

    monkeypatch.setattr(never_slower, "check", wrong)
    assert never_slower.main(["--cases", "2"]) == 1
    assert capsys.readouterr().out.count("WRONG RESULT, not timed: ") == 2


@pytest.mark.parametrize("arguments", [["--cases", "1"], ["--cases", "many"], ["--threads", "0"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        never_slower.main(arguments)
    assert "wants a" in capsys.readouterr().err
