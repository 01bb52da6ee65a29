import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import test_paper_train as t
from sparsekern.paper import checkpoint
from sparsekern.paper.distributed import GlobalBatchNorm

SCRIPT = """
import sys
from pathlib import Path
import torch
import test_paper_distributed as t
from sparsekern.paper import distributed

torch.set_num_threads(1)
with distributed.process_group("cpu"):
    for epochs in (1, 2):  # the second time from the checkpoint of the first
        t.train(Path(sys.argv[1]), epochs)
"""
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


def train(folder, epochs):
    network = replace(t.NETWORK, dropout=0.0, first=7)  # batches that two ranks cannot halve
    t.run(folder, replace(t.CONFIGURATION, network=network)).train(epochs)


def test_two_ranks_train_what_one_process_trains_on_the_same_global_batch(tmp_path):
    train(tmp_path / "one", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "two")],
        env={**t.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one["model"].items():
        # Sums over a batch, in another order in each of some 20 steps.
        assert torch.allclose(tensor.double(), two["model"][name].double(), rtol=1e-4, atol=1e-5), name
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["correct"] == theirs["correct"]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2)])
def test_global_batch_norm_on_one_rank_is_batch_norm(shape):
    norm = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    theirs = norm(5, affine=False)
    ours = GlobalBatchNorm(norm(5, affine=False))
    for _ in range(3):
        x = torch.randn(shape) * 2 + 1
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
    for name, buffer in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], buffer, atol=1e-6)
