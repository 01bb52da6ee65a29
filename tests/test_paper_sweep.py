import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import test_paper_tables as tables
import test_paper_train as t
from sparsekern.paper import __main__ as paper
from sparsekern.paper import results, scores, sweep, training
from sparsekern.paper.train import default_path, log_folder

TABLE1 = scores.COMMANDS["table1"]


@pytest.fixture
def sweeper(tmp_path, monkeypatch, capfd):
    """Runs a sweep of table1 over seed 42 with these options for Snakemake; returns its status and what it printed."""
    pytest.importorskip("snakemake")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", t.environment()["PYTHONPATH"])

    def start(*options):
        capfd.readouterr()
        status = paper.main(["sweep", "table1", "--seeds", "42", "--data", "nowhere", "--snakemake", *options])
        return status, "".join(capfd.readouterr())

    return start


class Held(t.Data):
    """Stops in its third epoch, until there is a file named go."""

    def __init__(self, folder=None, **options):
        super().__init__()

    def batch(self, *asked_for):
        if self.asked == 16:  # the first epoch's 15 batches of 4 and the second one's one are done
            while not Path("go").exists():
                time.sleep(0.05)
        return super().batch(*asked_for)


HOLDING = """
import sys
if sys.orig_argv[1:4] == ["-m", "sparsekern.paper", "train"]:
    import test_paper_sweep
    from sparsekern.paper.datasets import DATA_SETS
    DATA_SETS["mnist"] = test_paper_sweep.Held
"""


def test_a_killed_sweep_goes_on_where_it_was(sweeper, tmp_path, monkeypatch):
    [run] = [c for c in TABLE1.configurations([42]) if c.label == "sparseCNN1"]
    finish(c for c in TABLE1.configurations([42]) if c != run)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HOLDING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}")
    log = log_folder(default_path(run)) / training.LOG
    command = [sys.executable, "-m", "sparsekern.paper", "sweep", "table1", "--seeds", "42"]
    with open("said.txt", "w") as said:
        process = subprocess.Popen(command, start_new_session=True, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert process.poll() is None, Path("said.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not default_path(run).exists()
    Path("go").touch()
    status, said = sweeper()
    assert status == 0, said
    assert "resuming after 2 epochs and 0 steps" in default_path(run).with_suffix(".txt").read_text()
    assert len(results.read(default_path(run)).rows) == run.network.epochs


def finish(configurations):
    for configuration in configurations:
        result = tables.made_up(configuration)
        results.write(default_path(configuration), result)


def test_a_sweep_runs_what_is_not_finished_and_one_failed_run_does_not_stop_the_others(sweeper):
    configurations = TABLE1.configurations([42])
    finish(configurations[1:])
    damaged = default_path(configurations[3])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    status, said = sweeper()
    assert status == 1
    for configuration in (configurations[0], configurations[3]):
        log = default_path(configuration).with_suffix(".txt")
        assert "mnist: wants" in log.read_text()
    assert len(list(Path("runs/mnist").glob("*.txt"))) == 2
    assert "set aside" in said


def test_a_sweep_refuses_results_of_another_configuration(sweeper):
    configurations = TABLE1.configurations([42])
    finish([replace(configurations[0], network=replace(configurations[0].network, lr=0.5))])
    before = default_path(configurations[0]).read_bytes()
    status, said = sweeper()
    assert status == 1
    assert "network lr is 0.5 there and 0.01 here" in said
    assert default_path(configurations[0]).read_bytes() == before


def test_a_sweep_command():
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    arguments = parser.parse_args(
        ["table1", "gaussian", "--jobs", "3", "--threads", "2", "--snakemake", "--executor", "slurm"]
    )
    command = sweep.snakemake_command(arguments)
    assert command[-2:] == ["--executor", "slurm"]
    assert command[command.index("--cores") + 1] == "6"
    assert command[command.index("--jobs") + 1] == "3"  # which an executor of a cluster wants
    assert 'tables=["table1", "gaussian"]' in command
    assert "seeds=[]" in command
    assert "--keep-going" in command
