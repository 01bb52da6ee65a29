"""The sparse linear layer on GPUs: what test_triton_interpreter.py and test_cuda.py run."""

import pytest
import torch

import sparsekern as sk
from oracle import sparse_randn
from sparsekern.ops import sparse_linear_reference as reference
from sparsekern.ops import sparse_linear_triton
from sparsekern.ops.sparse_linear import pack_words
from tolerance import assert_same_bits, assert_sums_close
from triton_device import OnDevice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
body = OnDevice(sparse_linear_triton)


def assert_as_reference(B, I, O, G=1, density=0.4, dtype=torch.float32, active=0.3, bias=True):
    """The forward and both gradients against the reference in float64."""
    layer = sk.SparseLinear(I, O, density=density, group_size=G)
    x, grad_y = sparse_randn(B, I, active=active, dtype=dtype), sparse_randn(B, O, active=0.5, dtype=dtype)
    weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype) if bias else None
    indices = layer.ccol_indices, layer.row_indices

    def gradients(ops, c, at_nonzeros):
        return ops.sparse_linear_backward(c(grad_y), c(x), c(weight), *indices, at_nonzeros, True, True, True)

    functions = {
        "y": lambda ops, c: ops.sparse_linear(c(x), c(weight), None if bias is None else c(bias), *indices, O),
        "grad_x": lambda ops, c: gradients(ops, c, False)[0],
        "grad_x at non-zeros": lambda ops, c: gradients(ops, c, True)[0],
        "grad_weight": lambda ops, c: gradients(ops, c, True)[1],
        "grad_bias": lambda ops, c: gradients(ops, c, True)[2],
    }
    for name, function in functions.items():
        got = function(body, lambda t: t)
        exact, magnitude, terms = (
            function(reference, change)
            for change in (lambda t: t.double(), lambda t: t.double().abs(), lambda t: (t != 0).double())
        )
        what = f"{name}, {B} x {I} -> {O}, G={G} density={density} {dtype}"
        assert got.dtype == dtype, what
        assert_sums_close(got, exact, magnitude, terms, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_sparse_linear_of_small_batches(B, dtype, monkeypatch):
    monkeypatch.setattr(sparse_linear_triton, "ROWS_BYTES", 0)
    assert_as_reference(B, 33, 50, dtype=dtype)
    assert_as_reference(B, 70, 37, G=16, density=0.8, dtype=dtype, bias=False)
    assert_as_reference(B, 16, 130, density=1.0, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_sparse_linear_of_packed_rows(B, dtype):
    """Bits of the support instead of a dense layout: the same sums, bit for bit."""
    layer = sk.SparseLinear(37, 70, density=0.4)
    x, weight = sparse_randn(B, 37, active=0.5, dtype=dtype), layer.weight.detach().to(dtype)
    indices = layer.ccol_indices, layer.row_indices
    y = body.sparse_linear(x, weight, None, *indices, 70)
    assert_same_bits(body.sparse_linear(x, weight, None, *indices, 70, pack_words(*indices, 70)), y, f"B={B}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear_of_groups(dtype):
    assert_as_reference(3, 70, 37, G=16, density=0.2, dtype=dtype)
    assert_as_reference(37, 33, 50, G=24, density=0.1, dtype=dtype, bias=False)
    assert_as_reference(2, 20, 300, G=200, density=0.1, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", [0.01, 0.5])
def test_sparse_linear_of_dictionaries(active, dtype, monkeypatch):
    """Lists that hold the active inputs, and lists that overflow: the dense product must take over."""
    monkeypatch.setattr(sparse_linear_triton, "DICTIONARY_I", 64)
    for name in ("INPUTS_AN_ACTIVE_ONE", "INPUTS_AN_ACTIVE_ONE_TENSOR_CORES"):
        monkeypatch.setattr(sparse_linear_triton.by_gathers, name, 8)
    assert_as_reference(35, 70, 5, density=1.0, dtype=dtype, active=active)


def test_sparse_linear_way(monkeypatch):
    """By batch, bytes, groups, and what the dense product may round to."""
    way, F32, BF16 = sparse_linear_triton.forward_way, torch.float32, torch.bfloat16
    monkeypatch.setattr(sparse_linear_triton, "tf32_products", lambda: False)
    assert way(1, 1600, 1000, 640_000, 1, F32) == "rows"
    assert way(64, 1600, 1000, 640_000, 1, F32) == "dense"
    assert way(1, 4096, 4096, 4096, 4096, BF16) == "rows"
    assert way(1, 1024, 1024, 1024, 1024, BF16) == "dense"  # one launch against three
    assert way(64, 131072, 4096, 131072, 4096, BF16) == "gathers"
    assert way(64, 1600, 1024, 1600 * 26, 16, F32) == "groups"
    assert way(64, 1600, 1024, 1600 * 26, 16, BF16) == "dense"
    monkeypatch.setattr(sparse_linear_triton, "tf32_products", lambda: True)
    assert way(64, 1600, 1024, 1600 * 26, 16, F32) == "dense"


def test_sparse_linear_with_tf32(monkeypatch):
    """As PyTorch's dense products."""
    assert not sparse_linear_triton.tf32_products()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert sparse_linear_triton.tf32_products()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not sparse_linear_triton.tf32_products()


def test_sparse_linear_with_dense_and_empty_input():
    for active in (0.0, 1.0):
        assert_as_reference(2, 40, 20, active=active)
    assert_as_reference(0, 8, 5)


def test_sparse_linear_of_large_batches():
    assert_as_reference(40, 33, 20, dtype=torch.float32)
    assert_as_reference(40, 33, 20, G=16, density=0.7)
