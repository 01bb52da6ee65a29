"""What a GPU asks of the layers and can be shown without one: no value is ever read, so nothing waits for the device.

On the meta device, where tensors have no values, whatever reads one raises: ``.item()``, ``bool(tensor)``, ``nonzero``,
copies to the CPU. To the layers it is a GPU: they only ever ask whether a tensor is on a CPU.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def network():
    """Every layer, and every form of pooling, in one network: (B, 1, 16, 16) -> (B, 10)."""
    return nn.Sequential(
        sk.KWinners2d(16, 40, conv=nn.Conv2d(1, 16, 3), norm=nn.BatchNorm2d(16, affine=False), max_pool=2),
        sk.SparseConv2d(16, 8, 3, padding=1, sparse_input_grad=True),
        sk.KWinners2d(8, 30, max_pool=2),
        sk.SparseConv2d(8, 8, (2, 1), density=0.5),
        sk.KWinners2d(8, 2, local=True),
        nn.Flatten(),
        sk.SparseLinear(8 * 2 * 3, 32, density=0.4, sparse_input_grad=True),
        sk.KWinners(32, 8),
        sk.SparseLinear(32, 40, density=0.25, group_size=16, sparse_input_grad=True),
        sk.KWinners(40, 8),
        sk.SparseLinear(40, 10, density=0.5, group_size=4),
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(dtype, compiled):
    model = network().to("meta", dtype)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, labels = torch.randn(3, 1, 16, 16, dtype=dtype, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(run(x), labels).backward()
        optimizer.step()
    sk.step_boost_strength(model)
    assert all(p.grad.is_meta for p in model.parameters())
    assert model.eval()(x).shape == (3, 10)


def test_a_layer_that_reads_a_value_is_found():
    class Reads(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="meta"):
        Reads()(torch.randn(3, device="meta"))
