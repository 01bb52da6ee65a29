"""``sk.profile``: products by hand, and a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk


def test_products_of_linear_layers_by_hand():
    sparse = sk.SparseLinear.from_dense(
        nn.Linear(4, 2), mask=torch.tensor([[True, True, False, False], [False, True, True, False]])
    )
    with torch.no_grad():
        sparse.weight.fill_(2.0)
    # Inputs 0, 1 of the first row meet 1 + 2 weights; input 3 of the second meets none.
    x = torch.tensor([[5.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    [layer] = sk.profile(nn.Sequential(sparse), x, repeats=1, show=False).layers
    assert (layer.name, layer.kind, layer.shape) == ("0", "SparseLinear", (2, 4))
    assert (layer.dense_products, layer.products) == (16, 3)
    assert layer.savings == pytest.approx(16 / 3)
    assert layer.active == 3 / 8
    with torch.no_grad():
        sparse.weight[0] = 0  # it exists, but is zero
    assert sk.profile(nn.Sequential(sparse), x, repeats=1, show=False).layers[0].products == 2


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), ((1, 2), (2, 0))])
@pytest.mark.parametrize("kind", [nn.Conv2d, sk.SparseConv2d])
def test_products_of_convolutions(kind, stride, padding):
    torch.manual_seed(0)
    conv = kind(2, 3, 3, stride, padding)
    with torch.no_grad():
        conv.weight[0, 1] = 0
    x = torch.randn(2, 2, 5, 6).relu()
    y = conv(x)
    patches = nn.functional.unfold(x, 3, padding=padding, stride=stride)  # (B, C * 9, places)
    weights = (conv.weight != 0).flatten(1)
    wanted = ((patches != 0)[:, None] & weights[None, :, :, None]).sum()
    [layer] = sk.profile(nn.Sequential(conv), x, repeats=1, show=False).layers
    assert layer.products == wanted
    assert layer.dense_products == y.numel() * 18
    assert layer.kind == kind.__name__


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        sk.KWinners2d(4, density=0.25),
        nn.Flatten(),
        sk.SparseLinear(64, 32, density=0.5, group_size=4),
        sk.KWinners(32, 4),
        nn.Dropout(0.5),
        nn.Linear(32, 10),
    )


def test_layers_get_the_input_that_they_really_get(model):
    x = torch.randn(3, 1, 6, 6)
    layers = {layer.name: layer for layer in sk.profile(model, x, repeats=2, show=False).layers}
    assert list(layers) == ["0", "1", "3", "4", "6"]
    # In eval mode 1.5 times as many win, and dropout drops nothing.
    assert layers["3"].active == 24 / 64
    assert layers["6"].active == 6 / 32
    assert layers["6"].products == 3 * 6 * 10
    assert (layers["3"].dense_products, layers["3"].products <= 3 * 24 * 32) == (3 * 64 * 32, True)
    assert (layers["1"].products, layers["1"].savings) == (0, 1.0)
    for layer in layers.values():
        assert layer.dense_ms > 0
        assert layer.sparse_ms > 0
        assert layer.speedup == layer.dense_ms / layer.sparse_ms
        assert layer.realised == pytest.approx(layer.speedup / layer.savings)
    assert layers["0"].speedup == layers["6"].speedup == 1


def test_what_changes_later_is_measured_as_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            x.zero_()
            return y

    model, x = Model(), torch.ones(2, 4)
    [layer] = sk.profile(model, x, repeats=1, show=False).layers
    assert (layer.active, layer.products) == (1, 2 * 16)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), sk.SparseLinear(4, 3, density=0.5)])
def test_an_input_by_name(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t):
            return self.layer(**{"input" if isinstance(layer, nn.Linear) else "x": t})

    [profiled] = sk.profile(Model(), torch.ones(2, 4), repeats=1, show=False).layers
    assert profiled.shape == (2, 4)


@pytest.mark.parametrize("conv", [None, nn.Conv2d(2, 4, 3), sk.SparseConv2d(2, 4, 3)])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(4, affine=False)])
@pytest.mark.parametrize("pool", [1, 2])
def test_the_dense_layer_does_what_else_k_winners_does(conv, norm, pool):
    from sparsekern.profile import _dense_counterpart

    x = torch.randn(3, 4 if conv is None else 2, 8, 8)
    layer = sk.KWinners2d(4, density=1.0, conv=conv, norm=norm, max_pool=pool).eval()
    torch.testing.assert_close(_dense_counterpart(layer)(x), layer(x))


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"profile: wants an nn\.Module, got int"):
        sk.profile(3, torch.ones(2))


def test_model_is_left_as_it_was(model):
    model[3].eval()
    model.register_forward_pre_hook(lambda module, args: None)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    sk.profile(model, torch.randn(2, 1, 6, 6, generator=torch.Generator()), repeats=1, show=False)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [1] + [0] * 7
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_model_is_left_as_it_was_where_it_fails(model):
    with pytest.raises(ValueError, match="sparse_linear: wants x of shape"):
        sk.profile(model, torch.randn(2, 1, 9, 9), show=False)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_called_twice_has_two_rows():
    layer = sk.SparseLinear(6, 6, density=0.5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    names = [p.name for p in sk.profile(model, torch.randn(2, 6), repeats=1, show=False).layers]
    assert names == ["0", "0"]


def test_table(model, capsys):
    profile = sk.profile(model, torch.randn(3, 1, 6, 6), repeats=1)
    printed = capsys.readouterr().out
    assert printed == str(profile) + "\n"
    header, rule, *rows = printed.splitlines()
    for column in ("dense products", "products", "savings", "dense ms", "sparse ms", "speed-up", "realised"):
        assert column in header
    assert set(rule) == {"-"}
    assert [row.split()[1] for row in rows] == ["Conv2d", "KWinners2d", "SparseLinear", "KWinners", "Linear"]
    assert len({len(row) for row in (header, *rows)}) == 1
    assert "3x64" in rows[2]
    sk.profile(model, torch.randn(3, 1, 6, 6), repeats=1, show=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_an_empty_batch(model, dtype):
    profile = sk.profile(model.to(dtype), torch.randn(0, 1, 6, 6, dtype=dtype), repeats=1, show=False)
    assert [layer.products for layer in profile.layers] == [0] * 5
    assert [layer.active for layer in profile.layers] == [0] * 5
    assert str(profile)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_repeats_must_be_a_positive_integer(model, repeats):
    with pytest.raises(ValueError, match="profile: wants repeats of at least 1"):
        sk.profile(model, torch.randn(1, 1, 6, 6), repeats=repeats)


def test_a_model_without_such_layers_is_told_apart(capsys):
    assert sk.profile(nn.Sequential(nn.ReLU()), torch.randn(2, 3)).layers == []
    assert capsys.readouterr().out.startswith(
        "nothing to profile: the model called none of Linear, Conv2d, SparseLinear"
    )
