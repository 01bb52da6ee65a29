import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import test_paper_train as t
from sparsekern.paper import __main__ as paper
from sparsekern.paper import (
    batchnorm,
    comparing,
    options,
    report,
    results,
    runs,
    scores,
    speech,
    speed,
    speed_tables,
    training,
)
from sparsekern.paper.datasets import DATA_SETS
from sparsekern.paper.networks import build, networks, published
from sparsekern.paper.results import ConfigurationMismatch, DamagedResult, Result
from sparsekern.paper.tables import Table
from sparsekern.paper.train import default_path, log_folder

TABLE1 = scores.COMMANDS["table1"]


class Small(t.Data):
    """Made as the real data set is."""

    def __init__(self, folder=None, **options):
        super().__init__()

    def noisy(self, eta, rows):
        return self.test_images[rows]


def made_up(configuration, epochs=2):
    """A run's result whose best epoch is the first, on test scores that follow the seed."""
    data_set = DATA_SETS[configuration.network.data_set]
    rows = []
    for epoch in range(1, epochs + 1):
        right = 9900 + configuration.seed - 40 * epoch - 100 * (configuration.group_size > 1)
        correct = {f"{eta:.2f}": right - int(3000 * eta) for eta in data_set.noise_levels}
        entry = {
            "epoch": epoch,
            "loss": 1 / epoch,
            "test_accuracy": right / 10000,
            "noise_score": sum(correct.values()),
            "correct": correct,
            "samples": 10000,
            "entropy": {"winners1": [epoch, 2.0], "winners": [0.5 * epoch, 2.0]},
            "train_seconds": 1.0,
            "test_seconds": 2.0,
        }
        rows.append(training._row(configuration, entry, {"device": "x", "threads": 1}))
    identity = {**training.asdict(configuration), "data": "made up"}
    return Result(identity, rows, {"device": "x"})


def gathered(folder, command=TABLE1, seeds=(42, 43, 44)):
    runs.gather(command.path(folder), command.configurations(list(seeds)), made_up, t.silent)
    return command.path(folder)


def test_seeds():
    assert options.seeds("42-44,50") == [42, 43, 44, 50]
    for text in ("a", "44-42", "42,", "", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="wants seeds such as 42-44,50, got"):
            options.seeds(text)


def test_a_table_gathers_each_run_once(tmp_path):
    path = gathered(tmp_path)
    before = path.read_bytes()
    said = []
    configurations = TABLE1.configurations([42, 44, 45])
    runs.gather(path, configurations, lambda c: None, said.append)
    assert path.read_bytes() == before
    assert said == ["9 of 27 runs are not finished"]
    asked = []
    runs.gather(path, configurations, lambda c: asked.append(c.seed) or made_up(c), t.silent)
    assert asked == [45] * 9
    by_run = runs.rows_by_run(results.read(path).rows)
    assert list(by_run) == [*networks("mnist"), "sparseCNN2-g16"]
    assert all(list(seeds) == ["42", "43", "44", "45"] for seeds in by_run.values())
    assert [row["epoch"] for row in by_run["denseCNN1"]["42"]] == ["1", "2"]


def test_a_table_refuses_another_configuration_and_other_data(tmp_path):
    path = gathered(tmp_path)
    [first, *_] = TABLE1.configurations([42])
    with pytest.raises(ConfigurationMismatch, match=r"network lr is 0\.01 there and 0\.5 here"):
        runs.gather(path, [replace(first, network=replace(first.network, lr=0.5))], made_up, t.silent)

    def on_other_data(configuration):
        result = made_up(configuration)
        return replace(result, configuration={**result.configuration, "data": "others"})

    with pytest.raises(ConfigurationMismatch, match="other data than those of denseCNN1, seed 7"):
        runs.gather(path, [replace(first, seed=7)], on_other_data, t.silent)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedResult):
        runs.gather(path, [first], made_up, t.silent)


def test_table1_from_its_file(tmp_path, capsys):
    gathered(tmp_path)
    assert paper.main(["table1", "--finished", "--seeds", "42-44", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("sparseCNN2  ")]
    cells = re.split(r"\s{2,}", line)
    best = [9900 + seed - 40 for seed in (42, 43, 44)]
    noise = sum(best[1] - int(150 * level) for level in range(11))
    assert cells[:4] == ["sparseCNN2", "3", f"{best[1] / 100:.2f} ± 0.01", "99.09 ± 0.05"]
    assert cells[4] == f"{(best[1] / 100 - 99.09) / 0.05:+.1f}"
    assert cells[5:7] == [f"{noise:,} ± 11", "103,764 ± 1,125"]
    assert cells[8] == f"{(best[1] - 40) / 100:.2f} ± 0.01"
    assert "sparseCNN2DSW < denseCNN1 < denseCNN2" in out  # the paper's order
    pytest.importorskip("scipy")
    [line] = [line for line in out.splitlines() if line.startswith("sparseCNN2 G=16: test, best epoch")]
    assert re.split(r"\s{2,}", line)[3] == "-1.00"
    assert f"From {tmp_path}/table1.csv" in out


def test_rows_are_in_the_order_of_the_paper_whenever_they_were_gathered(tmp_path):
    configurations = TABLE1.configurations([43, 42])
    for gathered in (configurations[-3:], configurations):
        runs.gather(TABLE1.path(tmp_path), gathered, made_up, t.silent)
    by_run = TABLE1.rows_by_run(tmp_path)
    assert list(by_run) == [*networks("mnist"), "sparseCNN2-g16"]
    assert all(list(seeds) == ["42", "43"] for seeds in by_run.values())


def test_published_scores_are_those_of_the_networks():
    for data_set in ("mnist", "speech"):
        assert list(published(data_set)) == list(networks(data_set))
    assert published("gaussian") == {}


def rewritten(path, change):
    """A table's file with its rows changed."""
    table = results.read(path)
    results.write(path, replace(table, rows=[{**row, **change(row)} for row in table.rows]))


def test_speech_tables_say_what_they_were_tested_on(tmp_path, capsys):
    pytest.importorskip("scipy")
    table2 = scores.COMMANDS["table2"]
    path = gathered(tmp_path, table2)

    def shown(change):
        rewritten(path, change)
        assert paper.main(["table2", "--finished", "--out", str(tmp_path)]) == 0
        return capsys.readouterr().out

    whole = shown(lambda row: {"samples": 2552, "validation_accuracy": 0.5})
    assert "score on the validation list" in whole
    assert "off by" in whole
    assert "One clip" not in whole
    part = results.read(path)
    results.write(path, replace(part, configuration={**part.configuration, "data": speech.PART_MD5}))
    said = shown(lambda row: {"samples": 507, "validation_accuracy": row["test_accuracy"]})
    assert "its 507 validation clips" in said
    assert "One clip is 0.2 points" in said
    assert "on the clips that are the test set too" in said
    assert "off by" not in said.lower()
    # A seed's scores are those of the dense networks; the paper's gain is none here.
    assert (
        "Test score: of 4 comparisons, 0 higher and 0 lower by more than the combined standard error, 4 within" in said
    )
    assert "Noise score: of 4 comparisons" in said
    assert "higher, is not seen here" in said

    def robust(row):
        gain = 300 * ("sparse" in row["run"].lower() and row["epoch"] == "2")
        return {"noise_score": int(row["noise_score"]) + gain}

    assert "all of 4 higher, is seen here too" in shown(robust)


def test_orders_say_what_the_spread_leaves_open():
    scores = {"c": (3.0, 0.1), "a": (1.0, 0.1), "b": (1.1, 0.1), "d": (9.0, float("nan"))}
    assert comparing.in_order(scores) == "a ~ b < c ? d"
    assert "single run" in comparing.marks("c ? d")
    assert comparing.marks("a < b") == ""


def test_few_runs_cannot_decide():
    difference = comparing.Difference("", "test", ".2f", [1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert "3 and 3 runs the rank-sum p cannot fall below 0.1, so that it cannot decide" in comparing.power(
        [difference]
    )
    stats = pytest.importorskip("scipy").stats
    assert stats.mannwhitneyu([1, 2, 3], [4, 5, 6]).pvalue == pytest.approx(0.1)
    more = comparing.Difference("", "test", ".2f", [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5])
    assert "cannot decide" not in comparing.power([more])
    assert "2 tests" in comparing.power([more])
    low, _ = more.interval()
    assert (
        comparing.ruled_out([more])
        == f"The 95 % intervals all rule out a loss of more than {-low:.2f} points in the test score."
    )


def test_a_difference_of_seeds_that_score_alike():
    pytest.importorskip("scipy")
    difference = comparing.Difference("what", "test", ".2f", [2.0, 2.0], [1.0, 1.0])
    assert difference.cells()[:6] == ["what", "1.00", "2.00", "+1.00", "+1.00 to +1.00", "-"]


def test_scores_on_another_test_set_are_in_percent():
    ours, theirs = runs.noise_unit(500, published("speech")["sparseCNN2"], 11)
    assert ours(2750, 55) == "50.0 ± 1.0 %"
    assert theirs(11233, 1013) == "40.0 ± 3.6 %"


def test_minutes_of_runs():
    epochs = [{"train_seconds": "90", "test_seconds": "30"}, {"train_seconds": "45.5", "test_seconds": "14.5"}]
    assert runs.minutes({"1": epochs, "2": epochs[:1]}) == [3, 2]


def test_a_table_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATA_SETS, "mnist", Small)
    monkeypatch.setattr(scores, "networks", lambda data_set: {"sparseCNN1": replace(t.NETWORK, epochs=2)})
    monkeypatch.setitem(paper.COMMANDS, "table1", replace(TABLE1, grouped=()))
    assert paper.main(["table1", "--finished", "--seeds", "1"]) == 1
    assert (
        "there is no docs/results/table1.csv; `python -m sparsekern.paper table1` makes it" in capsys.readouterr().err
    )
    assert paper.main(["table1", "--seeds", "1-2"]) == 0
    assert "2 runs added to docs/results/table1.csv" in capsys.readouterr().out
    assert {path.name for path in Path("runs/mnist").glob("*.csv")} == {"sparseCNN1-seed1.csv", "sparseCNN1-seed2.csv"}


def test_gaussian_has_a_table_and_a_plot(tmp_path, capsys):
    gathered(tmp_path, scores.COMMANDS["gaussian"])
    assert paper.main(["gaussian", "--finished", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "k-winners-boosted" in out
    assert (tmp_path / "gaussian.png").exists()
    assert (tmp_path / "gaussian.svg").exists()


def test_batch_norm_by_both_statistics(tmp_path, monkeypatch, capsys):
    network = replace(networks("gaussian")["batch-norm"], filters=[4], k=[576], hidden=20, winners=20, epochs=2)
    monkeypatch.setattr(batchnorm, "networks", lambda data_set: {"batch-norm": network})
    monkeypatch.setitem(DATA_SETS, "gaussian", Small)
    folders = ["--seeds", "42", "--runs", str(tmp_path), "--out", str(tmp_path)]
    assert paper.main(["batchnorm", *folders]) == 0
    assert "each test batch of 250" in capsys.readouterr().out
    rows = results.read(tmp_path / "batchnorm.csv").rows
    assert [row["s"] for row in rows] == ["0.00", "0.50"]
    run = results.read(tmp_path / "gaussian/batch-norm-seed42.csv").rows[-1]
    assert [row["running"] for row in rows] == [run["correct 0.00"], run["correct 0.50"]]
    before = (tmp_path / "batchnorm.csv").read_bytes()
    assert paper.main(["batchnorm", "--finished", *folders]) == 0
    assert (tmp_path / "batchnorm.csv").read_bytes() == before


def test_batch_statistics_are_those_of_training_mode():
    torch.manual_seed(0)
    model = build(t.NETWORK)
    x = torch.randn(8, 1, 28, 28) + 1
    theirs = batchnorm.by_batch_statistics(model).eval()(x)
    assert not torch.equal(theirs, model.eval()(x))
    for layer in batchnorm.norms(model).values():
        layer.train()
    torch.testing.assert_close(theirs, model(x))


def test_entropy_and_report(tmp_path, capsys):
    gathered(tmp_path)
    assert paper.main(["entropy", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "entropy-table1.svg").exists()
    document = tmp_path / "results.md"
    pytest.importorskip("scipy")
    assert paper.main(["report", "--results", str(tmp_path), "--out", str(document)]) == 0
    text = document.read_text()
    assert "| sparseCNN2 | 3 |" in text
    assert "![entropy-table1](entropy-table1.png)\n\n[entropy-table1.svg](entropy-table1.svg)\n\nTable 1" in text
    assert f"From {tmp_path}/table1.csv" in text.partition("entropy-table1.svg")[2]
    assert "`python -m sparsekern.paper table1`" in text
    assert "speed: left out" in capsys.readouterr().out


def test_the_committed_document_is_that_of_the_committed_results(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(Path(__file__).parents[1])
    written = Path("docs/results.md").read_text()
    assert report.document(results.FOLDER, Path("docs"), t.silent) == written, "run: python -m sparsekern.paper report"


def test_figure5(tmp_path, monkeypatch):
    gathered(tmp_path)
    monkeypatch.setattr("sparsekern.paper.figure5.Mnist", Small)
    assert paper.main(["figure5", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figure5.png").exists()


def test_table3(capsys):
    assert paper.main(["table3"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"density +1\.0 +1\.0 +0\.3 +0\.3 +0\.3 +1\.0 +1\.0 +0\.3\n", out)
    assert "networks.toml" in out


def test_speed(tmp_path, monkeypatch, capsys):
    small = {"sparseCNN1": t.NETWORK}
    monkeypatch.setattr(speed, "networks", lambda data_set: small)
    monkeypatch.setattr(speed, "load_data", lambda *_: t.Data())
    monkeypatch.setattr(speed, "ROUNDS", {"training step": 2, "inference": 2})
    assert paper.main(["speed", "--steps", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Section 4.3, MNIST: times" in out
    [line] = [line for line in out.splitlines() if line.startswith("sparseCNN1: training step, batch 64")][:1]
    assert len(re.findall(r"\d ± \d+\.\d\dx", line)) == 4
    times = results.read(speed.times_path(tmp_path))
    assert times.environment["date"] == results.today()
    assert times.environment["commit"] == results.commit()
    rows = results.read(speed.products_path(tmp_path)).rows
    [hidden, *_] = [row for row in rows if row["layer"] == "hidden"]
    assert int(hidden["dense"]) == 4 * 12 * 12 * 20
    fan_in = round(0.3 * 4 * 12 * 12)
    assert float(hidden["training"]) <= 60 * 20
    assert float(hidden["training"]) == pytest.approx(60 * 20 * fan_in / 576, rel=0.3)
    assert float(hidden["inference"]) == pytest.approx(1.5 * float(hidden["training"]), rel=0.1)
    torch.manual_seed(1)
    assert {row["weights"] for row in rows} == {"2 steps, seed 42"}
    arguments = argparse.Namespace(seeds=[42], runs=tmp_path, device="cpu")
    path = default_path(training.Configuration(t.NETWORK, 42), tmp_path)
    t.run(log_folder(path), training.Configuration(t.NETWORK, 42))._save()
    assert not speed.could_be_trained(rows, arguments)
    path.touch()
    assert speed.could_be_trained(rows, arguments)
    assert not speed.could_be_trained([{**row, "weights": "15 epochs, seed 42"} for row in rows], arguments)
    assert paper.main(["speed", "--steps", "2", "--out", str(tmp_path)]) == 0  # from the files
    assert paper.main(["speed", "--steps", "3", "--out", str(tmp_path)]) == 1


def test_networks_that_are_dense_in_every_variant():
    for data_set, names in (("mnist", ["denseCNN1", "denseCNN2"]), ("speech", ["denseCNN2", "denseCNN2-dropout"])):
        assert [name for name, network in networks(data_set).items() if speed_tables.is_dense(network)] == names


def test_speed_counts_on_a_finished_run(tmp_path, monkeypatch):
    network = replace(t.NETWORK, epochs=2)
    data, said = t.Data(), []
    for seed, epochs in ((42, 1), (43, 2)):
        configuration = training.Configuration(network, seed)
        path = default_path(configuration, tmp_path)
        trained = t.run(log_folder(path), configuration)
        trained.train(epochs)
        if epochs == network.epochs:
            trained.write_result(path)
    arguments = argparse.Namespace(seeds=[42, 43], runs=tmp_path, device="cpu", steps=1)
    model, weights = speed.trained(network, data, arguments, said.append)
    assert weights == "2 epochs, seed 43"
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.model.state_dict().values(), strict=True)
    )
    assert said == []
    rows = speed.count(network, data, arguments, said.append)
    assert [row["layer"] for row in rows] == ["conv1", "hidden", "output"]
    monkeypatch.setattr(runs, "build", lambda network, **options: torch.nn.Linear(2, 3))
    assert runs.finished_model(configuration, data, tmp_path, said.append) is None
    assert "another version of sparsekern" in said[0]
    data.checksum = "others"
    with pytest.raises(ConfigurationMismatch, match="data is made up there and others here"):
        runs.finished_model(configuration, data, tmp_path)


def test_a_table_in_markdown():
    table = Table("Title", ["a", "b"], [["x", "1"]], ["Note."])
    assert table.markdown() == "**Title**\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\nNote."


def test_tables_of_the_few_runs_that_are_there(tmp_path, capsys):
    """One seed has no deviation, and the fast layout alone nothing to be compared with."""
    [run] = [c for c in scores.COMMANDS["table2"].configurations([42]) if c.label == "sparseCNN2-g16"]
    runs.gather(scores.COMMANDS["table2"].path(tmp_path), [run], made_up, t.silent)
    assert paper.main(["table2", "--finished", "--seeds", "42", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("sparseCNN2 G=16")]
    assert "±" not in line
    assert re.search(r"\d %", line)
    assert "nan" not in out
    assert "fast layout" not in out
