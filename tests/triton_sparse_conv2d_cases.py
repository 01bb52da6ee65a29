"""The sparse-input convolution on GPUs: what test_triton_interpreter.py and test_cuda.py run."""

import pytest
import torch

from oracle import sparse_randn
from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops import sparse_conv2d_triton
from tolerance import assert_sums_close
from triton_device import OnDevice

body = OnDevice(sparse_conv2d_triton)


@pytest.fixture
def sparse_way(monkeypatch):
    monkeypatch.setattr(sparse_conv2d_triton, "strict_float32", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(sparse_conv2d_triton, "MIN_PRODUCTS", 0)


def assert_as_reference(shape, O, kernel_size, stride, padding, *, active=0.1, channels_last=False, bias=True):
    """The forward against the reference in float64."""
    x = sparse_randn(*shape, active=active, dtype=torch.float32)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(O, shape[1], *kernel_size)
    tensors = (x, weight, torch.randn(O) if bias else None)
    y = body.sparse_conv2d(*tensors, stride, padding)
    exact, magnitude, terms = (
        reference.sparse_conv2d(*(None if t is None else change(t) for t in tensors), stride, padding)
        for change in (lambda t: t.double(), lambda t: t.double().abs(), lambda t: (t != 0).double())
    )
    assert_sums_close(y, exact, magnitude, terms, f"{shape} -> {O}, {kernel_size}")
    assert y.stride() == reference.sparse_conv2d(*tensors, stride, padding).stride()


@pytest.mark.usefixtures("sparse_way")
@pytest.mark.parametrize("channels_last", [False, True])
def test_sparse_conv2d_of_every_geometry(channels_last):
    assert_as_reference((2, 5, 6, 7), 9, (3, 3), [1, 1], [0, 0], channels_last=channels_last)
    assert_as_reference((2, 17, 5, 4), 3, (2, 3), [2, 1], [1, 2], channels_last=channels_last, bias=False)


@pytest.mark.usefixtures("sparse_way")
def test_sparse_conv2d_of_many_channels():
    assert_as_reference((1, 70, 3, 3), 70, (2, 2), [1, 1], [1, 1])


@pytest.mark.usefixtures("sparse_way")
@pytest.mark.parametrize("active", [0.0, 0.5, 1.0])
def test_sparse_conv2d_of_every_density(active):
    """Beyond DENSE_FROM the dense kernel writes the result."""
    assert_as_reference((2, 6, 4, 4), 8, (3, 3), [1, 1], [1, 1], active=active)
