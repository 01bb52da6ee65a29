import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.paper.networks import build, networks
from sparsekern.paper.plain import PlainKWinners, PlainKWinners2d, rezero_

ALL = [network for data_set in ("mnist", "speech") for network in networks(data_set).values()]


def name(network):
    return f"{network.data_set}-{network.name}"


def test_the_table_has_the_papers_networks():
    assert list(networks("mnist")) == [
        "denseCNN1", "denseCNN2", "sparseCNN1", "sparseCNN2", "denseCNN2SP3", "sparseCNN2D3", "sparseCNN2W1",
        "sparseCNN2DSW",
    ]  # fmt: skip
    assert list(networks("speech")) == ["denseCNN2", "denseCNN2-dropout", "sparseCNN2", "superSparseCNN2"]
    net = networks("mnist")["sparseCNN2"]
    assert (net.filters, net.k, net.hidden, net.winners, net.density) == ([32, 64], [400, 300], 700, 100, 0.3)
    assert (net.momentum, net.first, net.batch, net.epochs, net.lr, net.lr_factor) == (0, 4, 64, 10, 0.02, 0.8)


@pytest.mark.parametrize("network", ALL, ids=name)
@pytest.mark.parametrize("kind", ["sparse", "plain", "dense"])
def test_every_network_runs_and_its_gradient_reaches_every_parameter(network, kind):
    torch.manual_seed(0)
    model = build(network, plain=kind == "plain", dense=kind == "dense")
    y = model(torch.randn(4, 1, network.input, network.input))
    assert y.shape == (4, 10)
    torch.testing.assert_close(y.exp().sum(1), torch.ones(4))
    F.nll_loss(y, torch.arange(4)).backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        # A bias before a batch norm without shift moves nothing; its gradient is rounding.
        assert parameter.grad.abs().max() > 0
    model.eval()
    assert model(torch.randn(2, 1, network.input, network.input)).isfinite().all()


@pytest.mark.parametrize("network", ALL, ids=name)
def test_units_winners_and_weights_are_the_tables(network):
    model = build(network)
    units = [f * s * s for f, s in zip(network.filters, network.map_sizes(), strict=True)]
    for i, (k, n) in enumerate(zip(network.k, units, strict=True), 1):
        layer = model.get_submodule(f"winners{i}")
        assert isinstance(layer, nn.ReLU) if k == n else layer.k == k
        conv = layer.conv if i == 1 and isinstance(layer, sk.KWinners2d) else model.get_submodule(f"conv{i}")
        assert isinstance(conv, sk.SparseConv2d) == (i > 1 and network.k[0] < units[0])
    if network.density == 1:
        assert type(model.hidden) is nn.Linear
    else:
        assert model.hidden.mask.float().mean() == pytest.approx(network.density, abs=1e-3)
        assert model.hidden.sparse_input_grad == (network.k[-1] < units[-1])
    assert model.hidden.in_features == units[-1]
    counts = [type(m) for m in model.modules()]
    assert counts.count(nn.BatchNorm2d) == len(units) * network.batch_norm
    assert counts.count(nn.BatchNorm1d) == network.batch_norm
    assert counts.count(nn.Dropout) == (network.dropout > 0)
    assert all(m.weight is None for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def test_the_dense_twin_has_the_same_widths_and_only_dense_layers():
    model = build(networks("mnist")["sparseCNN2"], dense=True)
    assert not any(type(m).__module__.startswith("sparsekern") for m in model.modules())
    assert model.hidden.weight.shape == (700, 1024)


def test_plain_and_dense_exclude_each_other():
    with pytest.raises(ValueError, match="at most one"):
        build(networks("mnist")["sparseCNN2"], plain=True, dense=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("network", ALL, ids=name)
def test_every_win_is_counted(network, memory_format):
    """In float32, as the networks run: the fused passes count what the twin test, in float64, does not reach."""
    torch.manual_seed(0)
    model = build(network).to(memory_format=memory_format)
    model(torch.randn(4, 1, network.input, network.input))
    for layer in model.modules():
        if isinstance(layer, (sk.KWinners, sk.KWinners2d)):
            n = layer.n if isinstance(layer, sk.KWinners) else layer._units
            rounding = len(layer.duty_cycle) * 2**-24  # of their sum in float32
            assert layer.duty_cycle.mean().item() == pytest.approx(layer.k / n, rel=rounding)


@pytest.mark.parametrize("group_size", [1, 16])
def test_the_plain_twin_takes_the_same_steps(group_size):
    """Three steps from the same weights agree to rounding, duty cycles and evaluation included."""
    network = networks("mnist")["sparseCNN2"]
    models, outputs = [], []
    for plain in (False, True):
        torch.manual_seed(1)
        model = build(network, group_size=group_size, plain=plain).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        torch.manual_seed(2)
        for _ in range(3):
            x, labels = torch.randn(4, 1, 28, 28, dtype=torch.float64), torch.randint(10, (4,))
            optimizer.zero_grad()
            F.nll_loss(model(x), labels).backward()
            optimizer.step()
            rezero_(model)
        models.append(model)
        outputs.append(model.eval()(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    sparse, plain = models
    torch.testing.assert_close(sparse.hidden.densify(sparse.hidden.weight), plain.hidden.weight)
    torch.testing.assert_close(sparse.conv2.weight, plain.conv2.weight)
    for layer in ("winners1", "winners2", "winners"):
        torch.testing.assert_close(sparse.get_submodule(layer).duty_cycle, plain.get_submodule(layer).duty_cycle)
        assert sparse.get_submodule(layer).samples_seen == plain.get_submodule(layer).samples_seen == 12


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_k_winners_is_k_winners(channels_last):
    torch.manual_seed(0)
    pairs = [
        (sk.KWinners(20, 5, boost_strength=2.0), PlainKWinners(20, 5, boost_strength=2.0), torch.randn(6, 20)),
        (sk.KWinners2d(3, 7), PlainKWinners2d(3, 7), torch.randn(6, 3, 4, 4)),
    ]
    for layer, plain, x in pairs:
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            assert torch.equal(layer(x), plain(x))
            torch.testing.assert_close(layer.duty_cycle, plain.duty_cycle)
        assert torch.equal(layer.eval()(x), plain.eval()(x))
