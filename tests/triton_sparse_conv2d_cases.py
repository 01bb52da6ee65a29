"""The sparse-input convolution on GPUs: what test_triton_interpreter.py and test_cuda.py run."""

import pytest
import torch

from oracle import sparse_randn
from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops import sparse_conv2d_triton
from tolerance import assert_sums_close
from triton_device import DEVICE, OnDevice

body = OnDevice(sparse_conv2d_triton)


@pytest.fixture
def sparse_way(monkeypatch):
    monkeypatch.setattr(sparse_conv2d_triton, "strict_float32", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(sparse_conv2d_triton, "MIN_PRODUCTS", 0)


def assert_as_reference(
    shape, O, kernel_size, stride, padding, *, active=0.1, channels_last=False, bias=True, dtype=torch.float32
):
    """The forward and both gradients against the reference in float64."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = sparse_randn(*shape, active=active, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(O, shape[1], *kernel_size).to(dtype)
    bias = torch.randn(O).to(dtype) if bias else None
    where = stride, padding
    size = reference.sparse_conv2d(x, weight, None, *where).shape
    grad_y = sparse_randn(*size, active=active, dtype=dtype).contiguous(memory_format=memory_format)

    def gradients(ops, c, at_nonzeros):
        return ops.sparse_conv2d_backward(c(grad_y), c(x), c(weight), *where, at_nonzeros, True, True, True)

    functions = {
        "y": lambda ops, c: ops.sparse_conv2d(c(x), c(weight), None if bias is None else c(bias), *where),
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
        what = f"{name}, {shape} -> {O}, {kernel_size} {stride} {padding} {dtype}"
        assert got.dtype == dtype, what
        assert_sums_close(got, exact, magnitude, terms, what)
        like = {
            "y": reference.sparse_conv2d(x, weight, bias, *where),
            "grad_weight": weight,
            "grad_bias": weight[:, 0, 0, 0].clone(),
        }.get(name, x)
        assert got.stride() == like.stride() or got.numel() == 0, what


@pytest.mark.usefixtures("sparse_way")
@pytest.mark.parametrize("channels_last", [False, True])
def test_sparse_conv2d_of_every_geometry(channels_last):
    assert_as_reference((2, 5, 6, 7), 9, (3, 3), [1, 1], [0, 0], channels_last=channels_last)
    assert_as_reference((2, 17, 5, 4), 3, (2, 3), [2, 1], [1, 2], channels_last=channels_last, bias=False)
    assert_as_reference((1, 3, 7, 8), 4, (2, 2), [3, 2], [2, 0], channels_last=channels_last)  # padding beyond the taps


@pytest.mark.usefixtures("sparse_way")
def test_sparse_conv2d_of_many_channels():
    assert_as_reference((1, 70, 3, 3), 70, (2, 2), [1, 1], [1, 1])
    assert_as_reference((1, 4, 3, 3), 64, (2, 2), [1, 1], [0, 0], channels_last=True)  # a whole tile of outputs


@pytest.mark.usefixtures("sparse_way")
@pytest.mark.parametrize("active", [0.0, 0.5, 1.0])
def test_sparse_conv2d_of_every_density(active):
    """Beyond DENSE_FROM the dense kernels write the results."""
    assert_as_reference((2, 6, 4, 4), 8, (3, 3), [1, 1], [1, 1], active=active)


# Without cuDNN, whose transforms err by more than sums of products do, CUDA adds up gradients in 16 bits.
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16][: 1 if DEVICE == "cuda" else 3], ids=str
)
def test_sparse_conv2d_by_the_dense_kernels(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert_as_reference((2, 6, 5, 4), 8, (3, 3), [1, 1], [0, 0], dtype=dtype)
    assert_as_reference((2, 6, 5, 4), 8, (2, 3), [2, 1], [1, 0], dtype=dtype, channels_last=True, bias=False)


@pytest.mark.usefixtures("sparse_way")
def test_sparse_conv2d_of_no_images():
    assert_as_reference((0, 6, 4, 4), 8, (3, 3), [1, 1], [1, 1])


def test_sparse_conv2d_way():
    """Sparse only where float32 is strict, enough is to be won, and int32 numbers all pixels."""
    pixels, weight, size = torch.empty(1024, 64, 14, 14, device="meta"), torch.Size((64, 64, 5, 5)), [10, 10]
    way = sparse_conv2d_triton.way
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert way(pixels, weight, size, [0, 0]) == "dense"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert way(pixels, weight, size, [0, 0]) == "sparse"
        assert way(pixels.bfloat16(), weight, size, [0, 0]) == "dense"
        assert way(pixels[:64], weight, size, [0, 0]) == "dense"
        assert way(pixels, weight, size, [2**10, 2**10]) == "dense"
        assert way(torch.empty(2**18, 64, 14, 14, device="meta"), weight, size, [0, 0]) == "dense"
        assert way(pixels[:, :1], torch.Size((2**19, 1, 1, 1)), [14, 14], [0, 0]) == "dense"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
