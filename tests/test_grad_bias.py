"""The gradient of a bias: sums within their tolerance, and the same bits with every number of threads."""

import itertools

import pytest
import torch

from sparsekern.ops import _library
from tolerance import DTYPES, assert_same_bits, assert_sums_close

pytestmark = pytest.mark.usefixtures("nan_filled")
MATRICES = list(itertools.product((0, 1, 3, 64, 255, 256, 257, 1000), (1, 15, 16, 17, 37, 64, 65, 130, 1025, 2100)))
IMAGES = [(0, 3, 2, 2), (1, 1, 1, 1), (3, 5, 1, 1), (2, 17, 3, 5), (300, 3, 2, 4), (4, 37, 8, 8), (2, 64, 9, 15)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def grad_bias(grad_y):
    """As the backward passes of the layers with weights take it, of one input."""
    ops, wanted = torch.ops.sparsekern, (False, False, True)
    x = grad_y.new_zeros(len(grad_y), 1, *grad_y.shape[2:])
    if grad_y.dim() == 4:
        weight = grad_y.new_zeros(grad_y.shape[1], 1, 1, 1)
        return ops.sparse_conv2d_backward(grad_y, x, weight, [1, 1], [0, 0], False, *wanted)[2]
    indices = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([], dtype=torch.int32)
    return ops.sparse_linear_backward(grad_y, x, grad_y.new_zeros(0, 1), *indices, False, *wanted)[2]


def everything(dtype):
    for shape in MATRICES:
        yield torch.randn(shape).to(dtype)
    for shape, form in itertools.product(IMAGES, FORMATS):
        yield torch.randn(shape).to(dtype).to(memory_format=form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype):
    for grad_y in everything(dtype):
        axes = (0, *range(2, grad_y.dim()))
        exact, magnitude = grad_y.double().sum(axes), grad_y.double().abs().sum(axes)
        terms = torch.full_like(exact, grad_y.numel() // grad_y.shape[1])
        assert_sums_close(grad_bias(grad_y), exact, magnitude, terms, f"{tuple(grad_y.shape)} {grad_y.stride()}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_summed_exactly(dtype):
    for grad_y in everything(torch.float32):
        grad_y = grad_y.round()
        axes = (0, *range(2, grad_y.dim()))
        assert torch.equal(grad_bias(grad_y.to(dtype)), grad_y.double().sum(axes).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(threads, dtype):
    cases = [torch.randn(1000, 37), torch.randn(40000, 1), torch.randn(3000, 1100), torch.randn(20000, 33)]
    cases += [torch.randn(3, 1, 200, 200), torch.randn(200, 37, 5, 5), torch.randn(200, 37, 5, 5)]
    cases[-1] = cases[-1].to(memory_format=torch.channels_last)
    for grad_y in (case.to(dtype) for case in cases):
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(grad_bias(grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0], f"{tuple(grad_y.shape)}")


@pytest.mark.skipif(_library._C is None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_instruction_set_gives_the_same_bits(capability):
    """The order of the additions is that of the lanes, which all have sixteen of."""
    grad_y = [torch.randn(1000, 37), torch.randn(300, 2100), torch.randn(4, 37, 9, 8)]
    wanted = [grad_bias(t) for t in grad_y]
    try:
        _library._C.set_cpu_capability(capability)
        got = [grad_bias(t) for t in grad_y]
    finally:
        _library._C.set_cpu_capability(torch.backends.cpu.get_cpu_capability())
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one, other, capability)


def test_strided_gradients():
    for grad_y in (torch.randn(40, 30).t(), torch.randn(30, 80)[:, ::2], torch.ones(1, 40).expand(30, 40)):
        assert_same_bits(grad_bias(grad_y), grad_bias(grad_y.contiguous()), "matrix")
    image = torch.randn(3, 8, 6, 5)
    for grad_y in (image.transpose(2, 3), image[:, ::2], image.to(memory_format=torch.channels_last)[..., :3]):
        assert_same_bits(grad_bias(grad_y), grad_bias(grad_y.contiguous()), "image")
