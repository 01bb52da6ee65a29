"""The sparse linear op: result and every gradient against the float64 oracle, for any mask, input and layout."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from oracle import compare, run, sparse_randn
from sparsekern.nn.mask import draw_supports, mask_to_indices, supports_to_indices
from sparsekern.ops.sparse_linear import pack_support, plan_groups, plan_support, sparse_linear_prepared
from sparsekern.ops.sparse_linear_reference import densify
from tolerance import DTYPES, assert_same_bits, assert_sums_close

pytestmark = pytest.mark.usefixtures("nan_filled")
ops = torch.ops.sparsekern
GROUP_SIZES = (1, 3, 16, 17, 32)

# B, I, O, density of the weights, active fraction of the input. O is no multiple of most group sizes.
SHAPES = [
    (0, 16, 33, 0.5, 1.0),
    (1, 1, 1, 1.0, 1.0),
    (3, 15, 17, 0.2, 0.5),
    (64, 17, 31, 0.4, 0.3),
    (3, 33, 100, 1.0, 0.1),
    (1, 31, 16, 0.1, 1.0),
    (3, 100, 1, 0.5, 0.0),
    (1, 1000, 65, 0.05, 0.1),
    (3, 64, 1000, 0.3, 0.2),
    (64, 100, 150, 0.1, 0.15),
    (33, 130, 96, 0.02, 0.9),
    (200, 40, 48, 0.5, 0.2),
]


def any_mask(in_features, out_features, group_size, density):
    """Indices of a mask whose inputs and groups have very different numbers of weights, some none."""
    groups = -(-out_features // group_size)
    rates = density * torch.rand(groups, 1) * torch.rand(1, in_features) * 4
    mask = torch.rand(groups, in_features) < rates if density < 1 else torch.ones(groups, in_features, dtype=torch.bool)
    return mask_to_indices(mask.repeat_interleave(group_size, 0)[:out_features], group_size)


def drawn_mask(in_features, out_features, group_size, density):
    """Indices of a mask as the layer draws it: the same fan-in for all, inputs used nearly equally often."""
    fan_in, groups = max(1, round(density * in_features)), -(-out_features // group_size)
    return supports_to_indices(draw_supports(in_features, groups, fan_in), in_features)


def packed_weight(indices, out_features, group_size, dtype, draw=torch.randn):
    """Stored weights; the lanes of the last group past out_features are zero."""
    weight = draw(len(indices[1]), group_size)
    outputs = indices[1].long()[:, None] * group_size + torch.arange(group_size)
    return torch.where(outputs < out_features, weight, torch.zeros(())).to(dtype)


def bound(function, indices, out_features, sparse_input_grad):
    ccol_indices, row_indices = indices
    return functools.partial(function, ccol_indices=ccol_indices, row_indices=row_indices, out_features=out_features,
                             sparse_input_grad=sparse_input_grad)  # fmt: skip


def compare_case(x, weight, bias, indices, out_features, grad_y, sparse_input_grad, what):
    """The functional against the reference; and that what does not exist stays exactly zero."""
    function, reference = (
        bound(f, indices, out_features, sparse_input_grad)
        for f in (sk.functional.sparse_linear, sk.reference.sparse_linear)
    )
    got = compare(function, reference, {"x": x, "weight": weight, "bias": bias}, grad_y, what)
    lanes = densify(torch.ones_like(weight), *indices, out_features)
    assert got["grad_weight"].count_nonzero() == densify(got["grad_weight"], *indices, out_features).count_nonzero(), (
        what
    )
    assert lanes.shape == (out_features, x.shape[-1])
    if sparse_input_grad:
        assert not got["grad_x"][x == 0].any(), f"gradient at zeros of x, {what}"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_result_and_gradients(group_size, dtype):
    for i, (B, I, O, density, active) in enumerate(SHAPES):
        for mask, sparse_input_grad in ((any_mask, i % 2 == 0), (drawn_mask, i % 2 == 1)):
            indices = mask(I, O, group_size, density)
            compare_case(
                sparse_randn(B, I, active=active, dtype=dtype),
                packed_weight(indices, O, group_size, dtype),
                torch.randn(O).to(dtype) if i % 3 else None,
                indices,
                O,
                sparse_randn(B, O, active=1.0 if i % 2 else 0.1, dtype=dtype),
                sparse_input_grad,
                f"B={B} I={I} O={O} density={density} active={active} {mask.__name__} {sparse_input_grad=}",
            )


# The layers of the paper and one much larger than a cache, at the batches where the fastest way changes.
@pytest.mark.parametrize("group_size", [1, 16])
@pytest.mark.parametrize(("I", "O", "density"), [(1600, 1000, 0.4), (1600, 1500, 0.1), (800, 1000, 1.0)])
def test_layers_of_the_papers_size(I, O, density, group_size):
    indices = drawn_mask(I, O, group_size, density)
    cases = ((torch.float32, 1, 200), (torch.float32, 64, 200), (torch.float32, 64, I), (torch.bfloat16, 64, 200))
    for dtype, B, k in cases:
        compare_case(
            sk.reference.k_winners(torch.rand(B, I) + 0.1, k).to(dtype),
            packed_weight(indices, O, group_size, dtype),
            torch.randn(O).to(dtype),
            indices,
            O,
            sk.reference.k_winners(torch.randn(B, O).abs(), O // 10).to(dtype),
            B == 64,
            f"{B=} {k=} {dtype}",
        )


@pytest.mark.parametrize("group_size", [1, 16])
@pytest.mark.parametrize("B", [1000, 1024])
def test_large_batch(B, group_size):
    indices = drawn_mask(400, 300, group_size, 0.1)
    x, grad_y = sparse_randn(B, 400, active=0.125, dtype=torch.float32), torch.randn(B, 300)
    weight, bias = packed_weight(indices, 300, group_size, torch.float32), torch.randn(300)
    compare_case(x, weight, bias, indices, 300, grad_y, True, f"{B=}")
    compare_case(x + 1, weight, bias, indices, 300, grad_y, False, f"{B=}, dense")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 16, 17])
def test_sums_of_small_integers_are_exact(group_size, dtype):
    """No order of adding rounds, so the result is the exact sum rounded once to the dtype, bit for bit."""

    def integers(*shape):
        return torch.randint(-3, 4, shape).float()

    for B, I, O, active in ((1, 600, 100, 0.2), (3, 33, 50, 1.0), (64, 200, 65, 0.1), (64, 200, 65, 1.0)):
        indices = any_mask(I, O, group_size, 0.5)
        tensors = {
            "x": torch.where(torch.rand(B, I) < active, integers(B, I), torch.zeros(())).to(dtype),
            "weight": packed_weight(indices, O, group_size, dtype, integers),
            "bias": integers(O).to(dtype),
        }
        grad_y = integers(B, O).to(dtype)
        got = run(bound(sk.functional.sparse_linear, indices, O, False), tensors, grad_y)
        doubles = {name: t.double() for name, t in tensors.items()}
        exact = run(bound(sk.reference.sparse_linear, indices, O, False), doubles, grad_y.double())
        for name, wanted in exact.items():
            assert torch.equal(got[name], wanted.to(dtype)), f"{name}, {B=} {I=} {O=} {active=}"


@pytest.mark.parametrize("group_size", [1, 16])
def test_rows_of_very_different_activity(group_size):
    """All zero, one unit, a few, all active: in one batch."""
    I, O = 300, 130
    indices = drawn_mask(I, O, group_size, 0.2)
    rates = torch.tensor([0.0, 1.0, 0.0, 0.003, 0.1, 1.0, 0.0, 0.5]).repeat(9)[:, None]
    x = torch.where(torch.rand(72, I) < rates, torch.randn(72, I), torch.zeros(()))
    weight, bias = packed_weight(indices, O, group_size, torch.float32), torch.randn(O)
    for sparse_input_grad in (False, True):
        grad_y = torch.where(torch.rand(72, O) < rates.flip(0), torch.randn(72, O), torch.zeros(()))
        compare_case(x, weight, bias, indices, O, grad_y, sparse_input_grad, f"{sparse_input_grad=}")


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_masks_at_the_ends(group_size):
    """No weight at all, inputs and outputs without weights, one weight."""
    I, O = 40, 35
    for existing in ([], [(0, 0)], [(34, 39)], [(0, i) for i in range(40)], [(o, 7) for o in range(35)]):
        mask = torch.zeros(O, I, dtype=torch.bool)
        for o, i in existing:
            mask[o // group_size * group_size : (o // group_size + 1) * group_size, i] = True
        indices = mask_to_indices(mask, group_size)
        for B in (0, 1, 5, 64):
            x, grad_y = sparse_randn(B, I, active=0.5, dtype=torch.float32), torch.randn(B, O)
            weight, bias = packed_weight(indices, O, group_size, torch.float32), torch.randn(O)
            compare_case(x, weight, bias, indices, O, grad_y, True, f"{B=}, {len(existing)} weights")


@st.composite
def problems(draw):
    B, I, O, group_size = (draw(st.integers(low, high)) for low, high in ((0, 9), (1, 70), (1, 70), (1, 40)))
    density, active = (draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])) for _ in range(2))
    return B, I, O, group_size, density, active, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_any_problem(problem):
    B, I, O, group_size, density, active, dtype, seed = problem
    torch.manual_seed(seed)
    indices = any_mask(I, O, group_size, density)
    compare_case(
        sparse_randn(B, I, active=active, dtype=dtype),
        packed_weight(indices, O, group_size, dtype),
        torch.randn(O).to(dtype) if seed % 2 else None,
        indices,
        O,
        sparse_randn(B, O, active=0.5, dtype=dtype),
        seed % 3 == 0,
        str(problem),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 16])
def test_infinities_and_nan_reach_the_outputs(group_size, dtype):
    """What an existing weight multiplies is never lost: NaN is not taken for a zero, nor an infinity clipped."""
    I, O = 100, 50
    indices = drawn_mask(I, O, group_size, 0.3)
    weight = packed_weight(indices, O, group_size, dtype).abs()
    connected = densify(weight, *indices, O) != 0
    for B, value in itertools.product((1, 40), (math.nan, math.inf, -math.inf)):
        x = sparse_randn(B, I, active=0.2, dtype=dtype)
        x[-1, 17] = value
        y = bound(sk.functional.sparse_linear, indices, O, False)(x, weight)
        reached = y[-1][connected[:, 17]]
        assert len(reached)
        assert reached.isnan().all() if math.isnan(value) else (reached == value).all()
        assert y[:-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_subnormal_products_and_results(dtype):
    """Not bfloat16, whose dot products in hardware take subnormal numbers for zero, in PyTorch's own layers too."""
    indices = drawn_mask(64, 40, 1, 0.5)
    tiny = torch.finfo(dtype).smallest_normal
    x = sparse_randn(5, 64, active=0.3, dtype=dtype)
    weight = (torch.randn(len(indices[1]), 1) * tiny).to(dtype)
    compare_case(x, weight, None, indices, 40, torch.randn(5, 40).to(dtype), True, "subnormal weights")
    compare_case((x * tiny).to(dtype), weight * 0 + 1, None, indices, 40, torch.randn(5, 40).to(dtype), True, "inputs")


STRIDED = {
    "transposed": lambda: torch.randn(40, 6).t(),
    "every second": lambda: torch.randn(6, 80)[:, ::2],
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "offset by one": lambda: torch.randn(241)[1:].view(6, 40),
    "extra dimensions": lambda: torch.randn(2, 1, 3, 40),
    "no batch dimension": lambda: torch.randn(40),
    "empty dimension": lambda: torch.randn(2, 0, 40),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_layout(layout):
    x = STRIDED[layout]()
    indices = drawn_mask(40, 33, 16, 0.3)
    weight, bias = packed_weight(indices, 33, 16, torch.float32), torch.randn(33)
    compare_case(x, weight, bias, indices, 33, torch.randn(*x.shape[:-1], 33), False, layout)
    function = bound(sk.functional.sparse_linear, indices, 33, True)
    x = x.detach().requires_grad_()
    (grad_x,) = torch.autograd.grad(function(x, weight, bias=bias).sum(), x)  # an expanded gradient
    wanted = (densify(weight, *indices, 33).sum(0) * (x.detach() != 0)).expand(x.shape)
    magnitude = densify(weight, *indices, 33).abs().sum(0).double().expand(x.shape)
    assert_sums_close(grad_x, wanted.double(), 2 * magnitude, torch.full_like(magnitude, 33), layout)


def test_weight_and_bias_that_are_strided_or_offset():
    indices = drawn_mask(40, 33, 16, 0.3)
    weight, bias, x = packed_weight(indices, 33, 16, torch.float32), torch.randn(66)[::2], torch.randn(5, 40)
    function = bound(sk.functional.sparse_linear, indices, 33, False)
    wanted = function(x, weight, bias=bias.contiguous())
    assert_same_bits(function(x, weight.t().contiguous().t(), bias=bias), wanted, "strided")
    offset = torch.cat([torch.zeros(1), weight.flatten()])[1:].view_as(weight)
    assert_same_bits(function(x, offset, bias=bias), wanted, "offset by one element")


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "none"])
def test_only_the_gradients_that_are_asked_for(wanted):
    indices = drawn_mask(40, 33, 3, 0.3)
    tensors = {"x": torch.randn(4, 40), "weight": packed_weight(indices, 33, 3, torch.float32), "bias": torch.randn(33)}
    everything = run(bound(sk.functional.sparse_linear, indices, 33, False), tensors, torch.ones(4, 33))
    if wanted != "none":
        tensors[wanted].requires_grad_()
    y = bound(sk.functional.sparse_linear, indices, 33, False)(**tensors)
    assert_same_bits(y.detach(), everything["y"], "y")
    assert y.requires_grad == (wanted != "none")
    if wanted != "none":
        y.backward(torch.ones(4, 33))
        assert_same_bits(tensors[wanted].grad, everything[f"grad_{wanted}"], wanted)


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_gradcheck(group_size):
    I, O = 7, 18
    indices = any_mask(I, O, group_size, 0.5)
    weight = packed_weight(indices, O, group_size, torch.float64).requires_grad_()
    x = sparse_randn(2, I, active=0.5, dtype=torch.float64).requires_grad_()
    bias = torch.randn(O, dtype=torch.float64, requires_grad=True)
    function = bound(sk.functional.sparse_linear, indices, O, False)
    assert torch.autograd.gradcheck(lambda x, w, b: function(x, w, bias=b), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda x, w, b: function(x, w, bias=b), (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_the_dense_layer_does(dtype):
    layer, x = sk.SparseLinear(40, 33, density=0.3), torch.randn(4, 40)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    wanted = sk.functional.sparse_linear(
        x.to(dtype), layer.weight.to(dtype), layer.ccol_indices, layer.row_indices, 33, layer.bias.to(dtype)
    )
    assert_same_bits(y, wanted, "autocast")
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("group_size", [1, 16])
@pytest.mark.parametrize("B", [1, 3, 70, 100])
def test_threads_do_not_change_a_bit(threads, B, group_size):
    indices = drawn_mask(300, 500, group_size, 0.2)
    tensors = {
        "x": sparse_randn(B, 300, active=0.15, dtype=torch.float32),
        "weight": packed_weight(indices, 500, group_size, torch.float32),
        "bias": torch.randn(500),
    }
    grad_y = sparse_randn(B, 500, active=0.2, dtype=torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run(bound(sk.functional.sparse_linear, indices, 500, True), tensors, grad_y))
    for result in results[1:]:
        for name, wanted in results[0].items():
            assert_same_bits(result[name], wanted, name)


def test_opcheck():
    for B, group_size, dtype in ((3, 1, torch.float32), (0, 16, torch.float32), (5, 3, torch.bfloat16)):
        I, O = 20, 33
        indices = drawn_mask(I, O, group_size, 0.3)
        x, grad_y = sparse_randn(B, I, active=0.5, dtype=dtype), torch.randn(B, O).to(dtype)
        weight, bias = packed_weight(indices, O, group_size, dtype), torch.randn(O).to(dtype)
        torch.library.opcheck(ops.sparse_linear.default, (x, weight, bias, *indices, O))
        torch.library.opcheck(ops.sparse_linear.default, (x, weight, None, *indices, O))
        for wanted in ((True, True, True), (False, True, False)):
            torch.library.opcheck(ops.sparse_linear_backward.default, (grad_y, x, weight, *indices, True, *wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "I", "O"), [(64, 97, 273), (65, 300, 500), (100, 96, 256), (150, 95, 15)])
def test_one_sample_in_each_lane(threads, B, I, O, dtype):
    """Few weights and many rows, with what a layer prepares: whole and broken parts of samples, inputs and outputs."""
    for density, mask, biased in itertools.product((0.1, 0.2), (any_mask, drawn_mask), (True, False)):
        indices = mask(I, O, 1, density)
        tensors = {
            "x": sparse_randn(B, I, active=0.9, dtype=dtype),
            "weight": packed_weight(indices, O, 1, dtype),
        }
        if biased:
            tensors["bias"] = torch.randn(O).to(dtype)
        bits = pack_support(*indices, O, 1)
        plan = plan_support(*indices, O, bits)
        function = functools.partial(sparse_linear_prepared, others=(*indices, O, False, bits, plan))
        reference = bound(sk.reference.sparse_linear, indices, O, False)
        if not biased:
            function, reference = (functools.partial(f, bias=None) for f in (function, reference))
        compare(function, reference, tensors, torch.randn(B, O).to(dtype), f"{density=} {mask.__name__} {biased=}")
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(function(**tensors))
            assert_same_bits(results[-1], results[0], f"{count} threads")


def test_the_plan_of_a_support():
    """Each weight once, at the input and output that it has, in the order of the plan."""
    I, O = 200, 300
    ccol, rows = any_mask(I, O, 1, 0.15)
    bits = torch.zeros(I, 5, dtype=torch.int64)  # whatever is in it
    plan = plan_support(ccol, rows, O, bits).tolist()
    cells = plan[:7]  # two parts of the outputs times three of the inputs
    entries = cells[-1]
    starts, plan = plan[7 : 8 + entries], plan[8 + entries :]
    output, inputs, source = plan[:entries], plan[entries : entries + len(rows)], plan[entries + len(rows) :]
    places = []
    for cell in range(6):
        counts = [starts[e + 1] - starts[e] for e in range(cells[cell], cells[cell + 1])]
        assert counts == sorted(counts)
        for e in range(cells[cell], cells[cell + 1]):
            places += [
                (cell % 3 * 96 + inputs[k], cell // 3 * 256 + output[e]) for k in range(starts[e], starts[e + 1])
            ]
    wanted = [(i, o) for i in range(I) for o in rows[ccol[i] : ccol[i + 1]].tolist()]
    assert [wanted[k] for k in source] == places
    assert sorted(source) == list(range(len(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "I", "O", "G"),
    [
        (2, 97, 273, 16),
        (17, 300, 500, 16),
        (64, 96, 256, 32),
        (140, 95, 15, 16),
        (33, 200, 100, 48),
        (140, 2500, 1601, 16),
    ],
)
def test_by_groups(threads, B, I, O, G, dtype):
    """Dense inputs of layers with groups of whole registers, with what a layer prepares: whole and broken parts of all."""
    for density, mask, at_nonzeros in itertools.product((0.1, 0.25), (any_mask, drawn_mask), (False, True)):
        indices = mask(I, O, G, density)
        tensors = {
            "x": sparse_randn(B, I, active=0.9, dtype=dtype),
            "weight": packed_weight(indices, O, G, dtype),
            "bias": torch.randn(O).to(dtype),
        }
        plan = plan_groups(*indices, -(-O // G))
        function = functools.partial(sparse_linear_prepared, others=(*indices, O, at_nonzeros, None, plan))
        reference = bound(sk.reference.sparse_linear, indices, O, at_nonzeros)
        compare(function, reference, tensors, torch.randn(B, O).to(dtype), f"{density=} {mask.__name__} {at_nonzeros=}")
        results = []
        for count in (1, 2, 5):
            threads(count)
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            y = function(**dict(zip(tensors, leaves, strict=True)))
            results.append((y, *torch.autograd.grad(y.sum(), leaves)))
            for got, first in zip(results[-1], results[0], strict=True):
                assert_same_bits(got, first, f"{count} threads")


def test_weights_of_outputs_that_do_not_exist_count_nowhere():
    """The last group is smaller, and its unused lanes may hold anything."""
    I, O, G, B = 40, 20, 16, 8
    ccol, rows = drawn_mask(I, O, G, 0.5)
    weight = packed_weight((ccol, rows), O, G, torch.float32)
    weight[rows == 1, O - G :] = torch.nan
    x = torch.full((B, I), torch.inf).requires_grad_()
    grad_y = torch.ones(B, O)
    plan = plan_groups(ccol, rows, 2)
    y = sparse_linear_prepared(x, weight.requires_grad_(), None, (ccol, rows, O, False, None, plan))
    grad_x, grad = torch.autograd.grad(y, (x, weight), grad_y)
    assert grad_x.isfinite().all()
    assert (grad[rows == 1, O - G :] == 0).all()


def test_the_groups_of_a_support():
    """Each block once, by its group and by rising input."""
    ccol, rows = any_mask(70, 90, 16, 0.4)
    groups, blocks = 6, len(rows)
    plan = plan_groups(ccol, rows, groups)
    assert plan.dtype == torch.int32
    starts, inputs, source = plan.split((groups + 1, blocks, blocks))
    of_block = torch.repeat_interleave(torch.arange(70), ccol.diff().long())
    assert source.sort().values.tolist() == list(range(blocks))
    for g in range(groups):
        part = slice(starts[g], starts[g + 1])
        assert (rows[source[part].long()] == g).all()
        assert inputs[part].tolist() == of_block[source[part].long()].tolist() == sorted(inputs[part].tolist())
    assert plan_groups(*drawn_mask(70, 90, 16, 0.95), groups) is None


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_a_layer_of_small_groups(shape):
    """Its kernels take its weights as those of single outputs: results, gradients of both and second derivatives."""
    layer = sk.SparseLinear(48, 24, density=0.4, group_size=4, dtype=torch.float64)
    dense = layer.to_dense()
    x, grad_y = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 24, dtype=torch.float64)
    results = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        first = torch.autograd.grad(y, (leaf, module.weight, module.bias), grad_y, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), module.weight)[0]
        weights = [first[1], second] if module is dense else [layer.densify(t) for t in (first[1], second)]
        results.append([y, first[0], first[2], *(t * layer.mask for t in weights)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 2, 70, 130])
@pytest.mark.parametrize("sparse_input_grad", [False, True])
def test_lanes_that_no_output_uses_get_no_gradient_from_infinite_inputs(B, dtype, sparse_input_grad):
    layer = sk.SparseLinear(40, 20, density=0.5, group_size=16, sparse_input_grad=sparse_input_grad, dtype=dtype)
    x = torch.randn(B, 40, dtype=dtype).relu()
    x[0] = torch.inf
    layer(x.requires_grad_()).sum().backward()
    assert (layer.weight.grad[layer.row_indices == 1, 4:] == 0).all()
    assert layer.weight.grad[layer.row_indices == 1, :4].isinf().any()
    assert x.grad.isfinite().all()
