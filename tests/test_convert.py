"""Whole models and single layers taken over from dense ones, and back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparsekern as sk


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
    )


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if not list(module.children())}


def test_sparsify_swaps_every_layer_and_says_what_stands_there_now():
    model = network()
    swapped = sk.sparsify_(model, density=0.25, group_size=4, sparse_input_grad=True)
    assert list(swapped) == ["0", "3", "5.0", "5.2"]
    assert swapped == {name: repr(model.get_submodule(name)) for name in swapped}
    assert type(model[0]) is sk.SparseConv2d
    for layer in (model[3], model[5][0], model[5][2]):
        assert type(layer) is sk.SparseLinear
        assert (layer.group_size, layer.sparse_input_grad) == (4, True)
        assert (layer.mask.sum(1) == round(0.25 * layer.in_features)).all()
    assert model[0].sparse_input_grad
    assert model[5][2].bias is None


def test_at_density_1_the_model_computes_the_same_and_densify_goes_back():
    model = network()
    x = torch.randn(5, 1, 4, 4)
    state, y, layers = copy.deepcopy(model.state_dict()), model(x), kinds(model)
    sk.sparsify_(model, density=1.0)
    torch.testing.assert_close(model(x), y)
    assert list(sk.densify_(model)) == ["0", "3", "5.0", "5.2"]
    assert kinds(model) == layers
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_sparse_and_densified_model_compute_the_same():
    model = network()
    sk.sparsify_(model, density=0.3)
    x = torch.randn(5, 1, 4, 4)
    y = model(x)
    swapped = sk.densify_(model)
    assert swapped == {name: repr(model.get_submodule(name)) for name in swapped}
    torch.testing.assert_close(model(x), y)
    assert sk.densify_(model) == {}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["3"], ["0", "5.0", "5.2"]),
        ("5", ["0", "3"]),  # with all that is below
        ({"0", "5.2"}, ["3", "5.0"]),
        (lambda name, module: isinstance(module, nn.Conv2d) or module.in_features == 8, ["3", "5.0"]),
    ],
)
def test_skip(skip, left):
    if callable(skip):
        wanted = skip

        def skip(name, module):
            return isinstance(module, (nn.Linear, nn.Conv2d)) and wanted(name, module)

    assert list(sk.sparsify_(network(), density=0.5, skip=skip)) == left


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "density in .0, 1., got 0", {"density": 0.0}),
        (ValueError, "density in .0, 1., got 1.5", {"density": 1.5}),
        (TypeError, "a number for density, got True", {"density": True}),
        (ValueError, "group_size at least 1, got 0", {"density": 0.5, "group_size": 0}),
        (ValueError, r"names of submodules in skip, got \['4.1', 'head'\]", {"density": 0.5, "skip": ["head", "4.1"]}),
    ],
)
def test_bad_arguments_change_nothing(error, message, arguments):
    model = network()
    before, state = kinds(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sk.sparsify_(model, **arguments)
    assert kinds(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(1, 1, 3)])
def test_a_single_layer_is_refused(layer):
    with pytest.raises(
        TypeError, match=f"sparsify_: wants a model that contains layers, got a single {type(layer).__name__}"
    ):
        sk.sparsify_(layer, density=0.5)


def test_layers_that_no_sparse_layer_computes_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "subclass": Scaled(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "reflecting": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "same_even": nn.Conv2d(4, 4, 2, padding="same"),
            "same": nn.Conv2d(4, 4, 3, padding="same"),
            "valid": nn.Conv2d(4, 4, 2, padding="valid"),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    x = torch.randn(2, 4, 6, 6)
    same, valid = model["same"](x), model["valid"](x)
    swapped = sk.sparsify_(model, density=0.5, skip=["reflecting"])
    assert list(swapped) == ["same", "valid"]
    assert swapped.left_alone == {
        "subclass": "it is a Scaled",
        "normed": "it is a ParametrizedLinear",
        "grouped": "it has groups",
        "dilated": "it is dilated",
        "same_even": "it pads its two sides differently",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear",
    }
    torch.testing.assert_close(model["same"](x), same)
    torch.testing.assert_close(model["valid"](x), valid)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_hooks_compute_is_not_lost():
    model = nn.ModuleDict(
        {
            "weight_norm": nn.utils.weight_norm(nn.Linear(4, 4)),
            "spectral_norm": nn.utils.spectral_norm(nn.Linear(4, 4)),
            "hook": nn.Linear(4, 4),
            "backward": nn.Linear(4, 4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "empty": nn.Linear(0, 4),
            "none": nn.Linear(4, 0),
            "plain": nn.Linear(4, 4),
        }
    )
    model["hook"].register_forward_hook(lambda module, args, y: 2 * y)
    model["backward"].register_full_backward_hook(lambda module, grad_x, grad_y: None)
    before = kinds(model)
    swapped = sk.sparsify_(model, density=0.5)
    assert list(swapped) == ["plain"]
    hooks = ["weight_norm", "spectral_norm", "hook", "backward"]
    assert swapped.left_alone == {
        **dict.fromkeys(hooks, "it has hooks"),
        "complex": "it is of torch.complex64",
        "empty": "it has no weights",
        "none": "it has no weights",
    }
    assert kinds(model) == before | {"plain": sk.SparseLinear}


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
def test_a_transformer_computes_by_its_sparse_layers(activation):
    """In eval mode PyTorch's encoder would read the weights of linear1 and linear2 itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=activation != torch.tanh).eval()
    paths = [layer.activation_relu_or_gelu for layer in model.layers]
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding)[~padding]
    assert len(sk.sparsify_(model, density=1.0)) == 4
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], wanted)
    sk.densify_(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == paths
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], wanted)


def test_frozen_parameters_stay_frozen():
    model = network()
    frozen = {"0.weight", "3.weight", "3.bias", "5.0.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for swap in (lambda model: sk.sparsify_(model, density=0.5), sk.densify_):
        swap(model)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_what_is_computed_from_parameters_can_be_trained(norm):
    layer = sk.SparseLinear.from_dense(norm(nn.Linear(6, 4)), density=0.5)
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_a_layer_in_several_places_is_swapped_in_all():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert list(sk.sparsify_(model, density=0.5)) == ["a", "b.0"]
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is sk.SparseLinear
    assert list(sk.densify_(model)) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_kept(dtype):
    model = network().to(dtype).eval()
    sk.sparsify_(model, density=0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    sk.densify_(model.train())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [1, 3, 8, 16])
def test_from_dense_by_density_keeps_the_largest_magnitudes(group_size, bias):
    torch.manual_seed(1)
    linear = nn.Linear(20, 8, bias)
    layer = sk.SparseLinear.from_dense(linear, density=0.25, group_size=group_size)
    assert (layer.mask.sum(1) == 5).all()
    kept, weight = layer.densify(layer.weight).detach(), linear.weight.detach()
    assert torch.equal(kept, weight * layer.mask)
    for first in range(0, 8, group_size):
        rows = slice(first, first + group_size)
        norms, mask = weight[rows].double().norm(dim=0), layer.mask[first]
        assert (layer.mask[rows] == mask).all()
        assert norms[mask].min() >= norms[~mask].max()
    assert (layer.bias is not None) == bias
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, kept, linear.bias))


def test_from_dense_breaks_ties_by_index_and_copies():
    linear = nn.Linear(4, 1)
    nn.init.constant_(linear.weight, -0.5)
    layer = sk.SparseLinear.from_dense(linear, density=0.5)
    assert layer.mask.tolist() == [[True, True, False, False]]
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    assert layer.weight.flatten().tolist() == [-0.5, -0.5]
    assert layer.bias != 0


def test_from_dense_takes_any_mask():
    """Rows of different fan-in, an output and an input without weights, and a kept weight that is zero."""
    linear = nn.Linear(5, 4)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    with torch.no_grad():
        linear.weight[3, 3] = 0
    layer = sk.SparseLinear.from_dense(linear, mask=mask)
    assert torch.equal(layer.mask, mask)
    assert layer.fan_in is None
    assert layer.density == mask.double().mean()
    x = torch.randn(3, 5)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, linear.weight * mask, linear.bias))
    y.square().sum().backward()
    assert layer.densify(layer.weight.grad)[3, 3] != 0
    back = layer.to_dense()
    assert torch.equal(back.weight, linear.weight * mask)
    assert torch.equal(back.bias, linear.bias)


def test_from_dense_with_no_weight_at_all_gives_the_bias():
    linear = nn.Linear(5, 4)
    layer = sk.SparseLinear.from_dense(linear, mask=torch.zeros(4, 5, dtype=torch.bool))
    y = layer(torch.randn(3, 5))
    assert torch.equal(y, linear.bias.expand(3, 4))
    y.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))


def test_a_pruned_layer_keeps_its_pattern():
    linear = prune.l1_unstructured(nn.Linear(30, 10), "weight", amount=0.8)
    mask = linear.weight_mask.bool()
    prune.remove(linear, "weight")
    layer = sk.SparseLinear.from_dense(linear, mask=mask)
    x = torch.randn(4, 30)
    assert int(layer.mask.sum()) == 60
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "exactly one of density and mask, got none", {}),
        (ValueError, "exactly one of density and mask, got both", {"density": 0.5, "mask": torch.ones(4, 6).bool()}),
        (ValueError, r"mask of shape \(4, 6\), got \(6, 4\)", {"mask": torch.ones(6, 4).bool()}),
        (ValueError, r"mask of shape \(4, 6\), got \(6,\)", {"mask": torch.ones(6).bool()}),
        (TypeError, "a bool tensor for mask, got torch.float32", {"mask": torch.ones(4, 6)}),
        (TypeError, "a bool tensor for mask, got list", {"mask": [[True] * 6] * 4}),
        (ValueError, "density in .0, 1., got 2", {"density": 2}),
        (ValueError, "group_size at least 1, got -1", {"density": 0.5, "group_size": -1}),
        (
            ValueError,
            "alike within each group of 2, got row 3 different from row 2",
            {"mask": torch.tensor([1, 1, 1, 0]).bool()[:, None].expand(4, 6), "group_size": 2},
        ),
    ],
)
def test_from_dense_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        sk.SparseLinear.from_dense(nn.Linear(6, 4), **arguments)


def test_from_dense_wants_the_dense_layer():
    with pytest.raises(TypeError, match=r"SparseLinear.from_dense: wants an nn.Linear, got Conv2d"):
        sk.SparseLinear.from_dense(nn.Conv2d(1, 1, 1), density=0.5)
    with pytest.raises(TypeError, match=r"SparseConv2d.from_dense: wants an nn.Conv2d, got Linear"):
        sk.SparseConv2d.from_dense(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"groups=1.*got groups=2"):
        sk.SparseConv2d.from_dense(nn.Conv2d(2, 2, 1, groups=2))


def test_to_dense_of_a_convolution_with_a_mask():
    torch.manual_seed(0)
    layer = sk.SparseConv2d(3, 4, 3, padding=1, density=0.4, bias=False).eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert not dense.training
    assert ((dense.weight != 0).sum((1, 2, 3)) == round(0.4 * 27)).all()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), dense(x))
