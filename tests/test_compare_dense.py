import csv
import itertools
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import checking
import compare_dense
import crossovers
import gpu
import gpu_crossovers
import roofline
import sparsekern as sk
from cases import Case, Options, Prepared
from checking import Call, DenseReference, WrongResult, check_k_winners, gamma
from layer_cases import linear_implementations, prepare
from report import COLUMNS, DENSE, OURS, Result, cells, read_csv, table_lines, write_csv
from timing import Timing, interleaved


class WrongLinear(sk.SparseLinear):
    """Right but for one value, which is off by a thousandth."""

    def forward(self, x):
        y = super().forward(x)
        return y + 1e-3 * torch.nn.functional.one_hot(torch.tensor(3), y.shape[-1])


def tiny_linear(layer_type: type, training: bool, options: Options) -> Prepared:
    torch.manual_seed(0)
    layer = layer_type(32, 24, density=0.25, sparse_input_grad=True).to(dtype=options.dtype)
    xs = sk.KWinners(32, 6)(torch.randn(2, 5, 32, dtype=options.dtype))
    pool = [(x, sk.KWinners(24, 6)(torch.randn(5, 24, dtype=options.dtype)) if training else None) for x in xs]
    return prepare(linear_implementations(layer, options, training), layer, pool, training)


def tiny_case(name="tiny linear", layer_type=sk.SparseLinear, training=False):
    work = "forward + backward" if training else "forward"
    return Case(name, work, 5, partial(tiny_linear, layer_type, training))


@pytest.fixture
def tiny(monkeypatch):
    """Two tiny cases in place of the real ones, a few milliseconds each."""
    cases = [tiny_case(), tiny_case(training=True)]
    monkeypatch.setattr(compare_dense, "all_cases", lambda: cases)
    monkeypatch.setattr(compare_dense, "SECONDS", {"quick": 0.01, "full": 0.01})
    return cases


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_prints_a_row_for_each_case(tiny, capsys, dtype):
    assert compare_dense.main(["--dtype", dtype]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert dtype in lines[0]
    assert lines[4].split()[:4] == ["layer", "or", "network", "B"]
    assert lines[6] == "tiny linear"
    assert re.match(r"  forward +5 .*\dx", lines[7])
    assert re.match(r"  forward \+ backward +5 .*\dx", lines[8])
    assert len(lines) == 9


def test_csv_says_where_it_was_measured(tiny, tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    threads = torch.get_num_threads()
    try:
        assert compare_dense.main(["--threads", "1", "--csv", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["threads"] for row in rows} == {"1"}
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert all(row["hardware"] and row["date"] for row in rows)
    assert {(row["role"], row["implementation"]) for row in rows if row["work"] == "forward"} == {
        ("sparsekern", "sparsekern"), ("dense", "F.linear"), ("bf16", "F.linear bf16"), ("CSR", "torch.sparse CSR"),
    }  # fmt: skip
    assert all(float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"]) for row in rows)


def test_a_wrong_result_fails_the_run_and_is_never_timed(tiny, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr(compare_dense, "interleaved", lambda f, *a: timed.append(f) or interleaved(f, *a))
    tiny.insert(0, tiny_case("the wrong one", WrongLinear))
    assert compare_dense.main([]) == 1
    assert len(timed) == 2  # those that are right, still
    out, err = capsys.readouterr()
    assert "the wrong one" not in out
    assert "WRONG RESULT, not timed: the wrong one, forward, B=5: y: 5 of 120 values are wrong" in err


def test_only_picks_by_pattern(tiny, capsys):
    assert compare_dense.main(["--only", r"backward, B=5"]) == 0
    assert "forward + backward" in capsys.readouterr().out.splitlines()[-1]
    assert compare_dense.main(["--only", "no such"]) == 2
    assert "no row matches 'no such'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--only", "("], ["--threads", "0"], ["--dtype", "int8"], ["--device", "abacus"], ["--quick", "--full"]],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_dense.main(arguments)
    assert capsys.readouterr().err


def test_full_has_the_compiled_rivals(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    (result,) = compare_dense.run(tiny[:1], Options(compiled=True), True, [], [])
    assert {(DENSE, "F.linear compiled"), ("bf16", "F.linear bf16 compiled")} <= set(result.timings)


def test_the_cases_are_those_promised():
    names = [str(case) for case in compare_dense.all_cases()]
    assert len(names) == len(set(names)) == 42
    for batch in (1, 64, 1024):
        assert f"linear 1600->1500 d=0.1 k=200 G=16, forward, B={batch}" in names
    for network in ("mnist sparseCNN2 G=1", "mnist sparseCNN2 G=16", "speech sparseCNN2 G=1"):
        assert {f"{network}, training step, B=64", f"{network}, inference, B=1", f"{network}, inference, B=64"} <= {
            *names
        }


def test_plot_is_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.png"
    assert compare_dense.main(["--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def result():
    timings = {
        (OURS, "sparsekern"): Timing(2.0, 1.9, 2.1, 5),
        (OURS, "sparsekern channels-last"): Timing(1.0, 0.9, 1.1, 5),
        ("dense", "dense"): Timing(4.0, 4.0, 4.0, 5),
        ("dense", "dense channels-last"): Timing(3.0, 3.0, 3.0, 5),
        ("plain", "plain"): Timing(0.5, 0.5, 0.5, 5),
        ("bf16", "bf16"): Timing(10.0, 10.0, 10.0, 5),
    }
    return Result("net", "inference", 64, 6.0, 3e-7, timings)


def test_table_compares_the_best_of_each_role():
    assert cells(result()) == ["net", "inference", "64", "3 ±0%", "1 ±10%", "3.00x", "6.0x", "0.50", "3e-07"]
    assert cells(replace(result(), savings=None))[6:8] == ["", ""]
    header, heading, row = table_lines([result(), result()][:1])
    assert heading == "\nnet"
    assert row.split()[-2:] == ["0.50x", "10.00x"]  # over plain, over bf16
    assert len(row) == len(header) - len("  over CSR") - 2


def test_csv_round_trip(tmp_path):
    where = {name: name for name in COLUMNS[11:]}
    write_csv(tmp_path / "a.csv", [result()], where)
    assert read_csv(tmp_path / "a.csv") == ([result()], where)


def test_times_are_interleaved_and_every_function_is_warmed_up():
    calls = []
    timings = interleaved({name: partial(calls.append, name) for name in "ab"}, 0.0, "cpu")
    assert set(timings) == {"a", "b"}
    assert timings["a"].samples == 5
    assert timings["a"].low <= timings["a"].median <= timings["a"].high
    changes = sum(x != y for x, y in itertools.pairwise(calls))
    assert changes == 7  # a warms up, b warms up, then ab ba ab ba ab


def test_gamma_is_that_of_the_dtype_that_sums():
    assert gamma(torch.tensor(100.0), torch.float32) == pytest.approx(100 * 2**-24, rel=1e-4)
    assert gamma(torch.tensor(100.0), torch.bfloat16) == pytest.approx(100 * 2**-24, rel=1e-4)
    assert gamma(torch.tensor(100.0), torch.float64) == pytest.approx(100 * 2**-53, rel=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        sk.SparseLinear(16, 8, density=0.5, group_size=3),
        sk.SparseConv2d(2, 3, 3, stride=2, padding=1, sparse_input_grad=True),
        nn.Linear(16, 8, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("wrong", [None, "y", "grad_x", "grad_weight"])
def test_the_check_finds_a_wrong_value_in_every_result(layer, wrong):
    torch.manual_seed(0)
    x = torch.randn((4, 2, 7, 7) if isinstance(layer, sk.SparseConv2d) else (4, 16))
    x = (x * (torch.rand_like(x) < 0.5)).requires_grad_()
    y = layer(x)
    grad_y = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, *layer.parameters()), grad_y)
    call = Call(x, y.detach(), grad_y, *gradients)
    if wrong is None:
        checked = DenseReference(layer).check(call)
        assert 0 < checked.error < 1e-6
        assert 0 < checked.products < checked.dense_products
        return
    setattr(call, wrong, getattr(call, wrong).clone())
    getattr(call, wrong).flatten()[0] = math.nan if wrong == "y" else getattr(call, wrong).flatten()[0] + 1e-4
    with pytest.raises(WrongResult, match=f"{wrong}: 1 of "):
        DenseReference(layer).check(call)


def test_the_check_finds_a_wrong_gradient_behind_pooling():
    layer, x = sk.KWinners2d(5, 9, max_pool=2), torch.randn(6, 5, 7, 6, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    call = Call(x.detach(), y.detach(), grad_y, grad_x)
    check_k_winners(layer, call, torch.zeros(5))
    call.grad_x = grad_x.flip(-1)
    with pytest.raises(WrongResult, match="gradient"):
        check_k_winners(layer, call, torch.zeros(5))


@pytest.mark.parametrize("layer", [sk.KWinners(20, 5), sk.KWinners2d(5, 9), sk.KWinners2d(5, 2, local=True)])
def test_the_check_finds_a_wrong_winner(layer):
    torch.manual_seed(0)
    x = torch.randn((6, 20) if isinstance(layer, sk.KWinners) else (6, 5, 3, 3))
    for _ in range(3):
        duty_cycle = layer.duty_cycle.clone()
        y = layer(x)
        check_k_winners(layer, Call(x, y), duty_cycle)
    for message, wrong in (
        ("winners in each row", torch.zeros_like(y)),
        ("value was changed", torch.where(y != 0, y * 1.001, y)),
        ("loser is above", layer(-x) * -1),
    ):
        with pytest.raises(WrongResult, match=message):
            check_k_winners(layer, Call(x, wrong), duty_cycle)


@pytest.mark.parametrize("wrong", [None, "value", "gradient"])
def test_batch_norm_before_k_winners_is_checked(wrong):
    torch.manual_seed(0)
    layer = sk.KWinners2d(8, 40, norm=torch.nn.BatchNorm2d(8, affine=False), max_pool=2)
    x, duty_cycle = torch.randn(4, 8, 12, 12, requires_grad=True), layer.duty_cycle.clone()
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    call = checking.Call(x.detach(), y.detach().clone())
    call.grad_y, call.grad_x = grad_y, x.grad.clone()
    if wrong == "value":
        call.y.view(-1)[call.y.abs().argmax()] *= 1 + 1e-4
    if wrong == "gradient":
        call.grad_x.view(-1)[5] += 1e-4
    if wrong is None:
        checking.check_k_winners(layer, call, duty_cycle)
    else:
        with pytest.raises(checking.WrongResult, match=f"batch norm.*{wrong if wrong == 'gradient' else 'winner'}"):
            checking.check_k_winners(layer, call, duty_cycle)


@pytest.mark.parametrize(
    "program", [compare_dense, crossovers, roofline, gpu, gpu_crossovers], ids=lambda p: p.__name__
)
def test_a_pattern_that_is_none_or_matches_nothing_is_named(program, capsys):
    device = ["--device", "cpu"] if program in (gpu, gpu_crossovers) else []
    assert program.main([*device, "--only", "no such row"]) == 2
    assert f"{program.__name__}: no row matches 'no such row'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program.main([*device, "--only", "("])
    assert "argument --only: no regular expression: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [compare_dense, gpu, gpu_crossovers], ids=lambda p: p.__name__)
def test_without_a_gpu_it_says_so(program, capsys):
    assert program.main(["--device", "cuda"]) == 2
    assert "no GPU that PyTorch can use" in capsys.readouterr().err
