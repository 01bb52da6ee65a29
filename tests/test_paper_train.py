import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekern.paper import __main__ as paper
from sparsekern.paper import checkpoint, mnist, results, training
from sparsekern.paper.datasets import DATA_SETS
from sparsekern.paper.networks import networks
from sparsekern.paper.results import ConfigurationMismatch
from sparsekern.paper.training import Configuration, Run

# Small, and with everything that a checkpoint must hold: momentum, boosting, dropout's generator, two epochs' batch sizes.
NETWORK = replace(networks("mnist")["sparseCNN1"], filters=[4], k=[60], hidden=20, winners=5, first=8, momentum=0.9,
                  dropout=0.2, batch_norm=True)  # fmt: skip
CONFIGURATION = Configuration(NETWORK)


class Data:
    """60 training and 20 test images, of classes that are easy to tell apart."""

    checksum = "made up"
    noise_levels = (0.0, 0.5)
    folder = "nowhere"

    def __init__(self, kill_at=None):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(60) % 10
        self.test_labels = torch.arange(20) % 10
        prototypes = torch.randn(10, 1, 28, 28, generator=generator)
        self.images = prototypes[self.labels] + 0.1 * torch.randn(60, 1, 28, 28, generator=generator)
        self.test_images = prototypes[self.test_labels]
        self.kill_at = kill_at
        self.asked = 0

    def __len__(self):
        return 60

    def batch(self, indices, rows=slice(None), generator=None):
        if self.asked == self.kill_at:
            raise KeyboardInterrupt
        self.asked += 1
        indices = indices[rows]
        return self.images[indices], self.labels[indices]

    def test_batches(self, eta, size):
        yield self.test_images * (1 - eta), self.test_labels


def environment():
    """Of a process that finds this module."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def silent(_):
    pass


def run(folder, configuration=CONFIGURATION, data=None, **options):
    return Run(configuration, data or Data(), folder, report=silent, **options)


def result(run):
    """What must be the same bit for bit: weights, buffers, optimizer, generator and history without times."""
    history = [{k: v for k, v in entry.items() if not k.endswith("_seconds")} for entry in run.history]
    tensors = [*run.model.state_dict().values(), torch.get_rng_state()]
    tensors += [state["momentum_buffer"] for state in run.optimizer.state_dict()["state"].values()]
    return history, [tensor.clone() for tensor in tensors]


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    whole = run(tmp_path_factory.mktemp("whole"))
    whole.train(3)
    return result(whole)


def test_it_learns(uninterrupted):
    history, _ = uninterrupted
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["test_accuracy"] > 0.3


@pytest.mark.parametrize("kill_at", [0, 3, 7, 8, 9])  # 8 steps in the first epoch, then 1
@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, kill_at, checkpoint_every):
    killed = run(tmp_path, data=Data(kill_at), checkpoint_every=checkpoint_every)
    with pytest.raises(KeyboardInterrupt):
        killed.train(3)
    torch.manual_seed(999)
    resumed = run(tmp_path)
    done = kill_at if kill_at < 8 else 0
    assert (resumed.epoch, resumed.step) == (max(0, kill_at - 7), done // 2 * 2 if checkpoint_every else 0)
    resumed.train(3)
    assert_same(result(resumed), uninterrupted)


def test_more_epochs_go_on_from_the_finished_run(tmp_path, uninterrupted):
    run(tmp_path).train(1)
    run(tmp_path).train(2)
    longer = run(tmp_path)
    longer.train(3)
    assert_same(result(longer), uninterrupted)


def test_each_epoch_has_an_order_and_each_step_draws_of_its_own(tmp_path, monkeypatch):
    # PyTorch's CPU generator takes 32 bits of a seed: what tells seeds apart further up draws the same numbers.
    drawn, batch = [], Data.batch

    def drawing(self, indices, rows, generator):
        drawn.append((tuple(indices.tolist()), float(torch.rand((), generator=generator, dtype=torch.float64))))
        return batch(self, indices, rows)

    monkeypatch.setattr(Data, "batch", drawing)
    one_batch = Configuration(replace(NETWORK, first=60))
    run(tmp_path / "42", one_batch).train(3)
    run(tmp_path / "43", replace(one_batch, seed=43)).train(3)
    orders, numbers = (set(of_step) for of_step in zip(*drawn, strict=True))
    assert len(orders) == len(numbers) == 6


def test_ranks_and_epochs_drop_other_units(tmp_path):
    trained, numbers = run(tmp_path), set()
    for trained.epoch in range(3):
        for rank in range(4):
            torch.manual_seed(trained._seed("dropout", rank))
            numbers.add(float(torch.rand((), dtype=torch.float64)))
    assert len(numbers) == 12


def test_nothing_is_trained_twice(tmp_path):
    run(tmp_path).train(1)
    data = Data()
    assert len(run(tmp_path, data=data).train(1)) == 1
    assert data.asked == 0


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted):
    run(tmp_path).train(2)
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-1])
    resumed = run(tmp_path)
    assert resumed.epoch == 1
    resumed.train(3)
    assert_same(result(resumed), uninterrupted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 43}, "seed is 42 there and 43 here"),
        ({"group_size": 4}, "group_size is 1 there and 4 here"),
        ({"plain": True}, "plain is False there and True here"),
        ({"network": replace(NETWORK, lr=0.5)}, "network lr is 0.01 there and 0.5 here"),
    ],
)
def test_another_configuration_is_refused(tmp_path, changed, message):
    run(tmp_path).train(1)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(ConfigurationMismatch, match=message):
        run(tmp_path, replace(CONFIGURATION, **changed))
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_other_data_are_refused(tmp_path):
    run(tmp_path).train(1)
    data = Data()
    data.checksum = "others"
    with pytest.raises(ConfigurationMismatch, match="data is made up there and others here"):
        run(tmp_path, data=data)


def test_the_log_has_a_line_an_epoch(tmp_path):
    trained = run(tmp_path)
    trained.train(2)
    lines = [json.loads(line) for line in (tmp_path / training.LOG).read_text().splitlines()]
    assert lines == trained.history
    last = lines[-1]
    assert last["epoch"] == 2
    assert last["samples"] == 20
    assert last["noise_score"] == sum(last["correct"].values())
    assert last["test_accuracy"] == last["correct"]["0.00"] / 20
    assert set(last["entropy"]) == {"winners1", "winners"}
    for entropy, most in last["entropy"].values():
        assert 0 < entropy <= most * 1.001


def test_learning_rate_and_boost_strength_follow_the_epochs(tmp_path):
    trained = run(tmp_path)
    trained.train(3)
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.8**2)
    assert trained.model.winners.boost_strength == pytest.approx(1.5 * 0.85**3)


def test_plain_weights_that_do_not_exist_stay_zero(tmp_path):
    trained = run(tmp_path, replace(CONFIGURATION, plain=True))
    trained.train(2)
    hidden = trained.model.hidden
    assert (hidden.weight[~hidden.mask] == 0).all()
    assert (hidden.weight[hidden.mask] != 0).all()


KILLED = """
import os, signal, sys
from pathlib import Path
import test_paper_train as t
import torch

torch.set_num_threads(int(sys.argv[2]))  # the dense convolution's bits depend on it

class Deadly(t.Data):
    def batch(self, *asked_for):
        if self.asked == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(*asked_for)

t.run(Path(sys.argv[1]), data=Deadly(), checkpoint_every=2).train(3)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path, uninterrupted):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    process = subprocess.run(arguments, cwd=Path(__file__).parent, timeout=120)
    assert process.returncode == -signal.SIGKILL
    resumed = run(tmp_path)
    assert (resumed.epoch, resumed.step) == (0, 4)
    resumed.train(3)
    assert_same(result(resumed), uninterrupted)


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Runs the command in an empty folder, on small data."""
    made = []

    def small(folder, *, seed, fetch, device):
        made.append((folder, seed, fetch, device))
        return Data()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATA_SETS, "mnist", small)
    return made


def test_command(command_line, capsys):
    arguments = ["train", "sparseCNN1", "--epochs", "2", "--data", "here", "--seed", "7"]
    assert paper.main(arguments) == 0
    assert command_line == [(Path("here"), 7, False, "cpu")]
    out = capsys.readouterr().out
    assert "sparseCNN1: filters [30]" in out
    assert "log: runs/mnist/sparseCNN1-seed7/log.jsonl" in out
    assert "noise score" in out
    log = Path("runs/mnist/sparseCNN1-seed7/log.jsonl")
    rows = results.read(Path("runs/mnist/sparseCNN1-seed7.csv")).rows
    for entry, row in zip(map(json.loads, log.read_text().splitlines()), rows, strict=True):
        assert (row["run"], row["seed"], row["epoch"]) == ("sparseCNN1", "7", str(entry["epoch"]))
        assert float(row["test_accuracy"]) == entry["test_accuracy"]
        assert sum(int(row[f"correct {eta}"]) for eta in ("0.00", "0.50")) == entry["noise_score"]
        assert float(row["entropy winners"]) == entry["entropy"]["winners"][0]
    assert paper.main(arguments) == 0
    out = capsys.readouterr().out
    assert "from runs/mnist/sparseCNN1-seed7.csv" in out
    assert "loss" not in out


def test_command_writes_a_damaged_result_anew(command_line, capsys):
    arguments = ["train", "sparseCNN1", "--epochs", "1", "--out", "o.csv"]
    assert paper.main(arguments) == 0
    rows = results.read(Path("o.csv")).rows
    Path("o.csv").write_bytes(Path("o.csv").read_bytes()[:-1])
    assert paper.main(arguments) == 0
    assert "made anew" in capsys.readouterr().out
    assert results.read(Path("o.csv")).rows == rows  # times too: they are the checkpoint's, nothing was trained


def test_command_for_twins(command_line):
    for option in ("--plain", "--dense"):
        assert paper.main(["train", "denseCNN2SP3", "--epochs", "1", "--group-size", "16", option]) == 0
    assert sorted(p.name for p in Path("runs/mnist").glob("*.csv")) == [
        "denseCNN2SP3-dense-g16-seed42.csv",
        "denseCNN2SP3-plain-g16-seed42.csv",
    ]
    with pytest.raises(SystemExit):
        paper.main(["train", "denseCNN2SP3", "--plain", "--dense"])


def test_two_commands_do_not_train_in_one_folder(command_line, capsys):
    pytest.importorskip("fcntl")
    arguments = ["train", "sparseCNN1", "--epochs", "1", "--out", "o.csv"]
    with checkpoint.alone_in(Path("o")):
        assert paper.main(arguments) == 1
    assert "another process is training in o\n" in capsys.readouterr().err
    assert not any(Path("o").iterdir())
    assert paper.main(arguments) == 0


def test_command_says_what_is_wrong(command_line, capsys):
    assert paper.main(["train", "sparseCNN1", "--epochs", "1", "--out", "o.csv"]) == 0
    assert paper.main(["train", "sparseCNN1", "--epochs", "1", "--out", "o.csv", "--seed", "1"]) == 1
    assert "seed is 42 there and 1 here" in capsys.readouterr().err
    assert paper.main(["train", "noSuchCNN"]) == 1
    assert "wants one of denseCNN1, denseCNN2" in capsys.readouterr().err
    assert paper.main(["train", "sparseCNN1", "--out", "o"]) == 1
    assert "wants a name that ends in .csv for --out, got o" in capsys.readouterr().err


def test_command_without_data_says_how_to_get_them(tmp_path, capsys):
    assert paper.main(["train", "sparseCNN1", "--data", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert "--download" in err
    assert all(name in err for name in mnist.FILES)


@pytest.fixture(scope="module")
def real_data():
    if not mnist.default_folder().is_dir():
        pytest.skip(f"no MNIST in {mnist.default_folder()}")
    return mnist.Mnist()


def test_sparse_cnn2_learns_mnist(tmp_path, real_data):
    """A first look at 2,400 digits tells the ten classes apart, and 30 % of noise costs only a part of that."""
    data = copy.copy(real_data)
    data.images, data.labels = data.images[:2400], data.labels[:2400]
    data.test_images, data.test_labels = data.test_images[:400], data.test_labels[:400]
    data.pixel_order = data.pixel_order[:400]
    data.noise_levels = (0.0, 0.3)
    network = replace(networks("mnist")["sparseCNN2"], first=16, lr=0.05)
    [entry] = Run(Configuration(network), data, tmp_path).train(1)
    assert entry["test_accuracy"] > 0.7
    assert entry["correct"]["0.30"] > 200


@pytest.mark.slow
def test_sparse_cnn2_learns_mnist_in_one_epoch(tmp_path, real_data):
    [entry] = Run(Configuration(networks("mnist")["sparseCNN2"]), real_data, tmp_path).train(1)
    assert entry["test_accuracy"] > 0.975
    assert entry["noise_score"] > 85_000
