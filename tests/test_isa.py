"""Instruction sets, threads and runs: the same bits where promised, and the oracle's sums everywhere."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from oracle import compare, run, sparse_randn
from sparsekern.nn.mask import draw_supports, supports_to_indices
from sparsekern.ops import _library, k_winners_reference
from tolerance import DTYPES, assert_same_bits

C = _library._C
CAPABILITIES = {"baseline": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.skipif(C is None, reason="the CPU kernels are not built"),
]


@pytest.fixture(params=CAPABILITIES)
def instruction_set(request):
    """The kernels of each instruction set in turn; then those that PyTorch uses again."""
    serves = C.set_cpu_capability(CAPABILITIES[request.param])
    try:
        if serves != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield serves
    finally:
        C.set_cpu_capability(torch.backends.cpu.get_cpu_capability())


def k_winners_cases():
    """Rows of many lengths, of whole numbers (ties) and of normal ones, boosted and not."""
    for dtype in DTYPES:
        for n, k in ((1, 1), (15, 4), (16, 16), (33, 5), (300, 30), (1500, 225), (12544, 1254)):
            for x in (torch.randn(5, n), torch.randint(-3, 4, (5, n)), torch.full((5, n), -torch.inf)):
                yield x.to(dtype), k, None, None, n, 1
                yield x.to(dtype), k, torch.rand(n), torch.tensor(1.5), n, 1
        images = torch.randint(-3, 4, (3, 1600)).to(dtype)
        yield images, 160, torch.rand(64), torch.tensor(1.0), 64, 25
        yield images, 160, torch.rand(64), torch.tensor(1.0), 64, 1


def test_k_winners_to_the_bit(instruction_set):
    for i, case in enumerate(k_winners_cases()):
        wanted = k_winners_reference.k_winners(*case)
        got = torch.ops.sparsekern.k_winners(*case)
        for name, g, w in zip(("y", "winners", "counts"), got, wanted, strict=True):
            assert_same_bits(g, w, f"{name}, case {i}, {instruction_set}")
        grad = torch.ops.sparsekern.k_winners_backward(case[0], got[1])
        assert_same_bits(grad, wanted[0], f"gradient, case {i}, {instruction_set}")


def linear_case(B, I, O, density, group_size, active, dtype, draw=torch.randn):
    groups = -(-O // group_size)
    indices = supports_to_indices(draw_supports(I, groups, max(1, round(density * I))), I)
    lanes = indices[1][:, None] * group_size + torch.arange(group_size) < O
    tensors = {
        "x": sparse_randn(B, I, active=active, dtype=dtype),
        "weight": (draw(len(lanes), group_size) * lanes).to(dtype),
        "bias": draw(O).to(dtype),
    }

    def bound(function):
        return lambda x, weight, bias: function(x, weight, *indices, O, bias, sparse_input_grad=B % 2 == 0)

    return bound, tensors, sparse_randn(B, O, active=0.3, dtype=dtype)


LINEAR = [
    (1, 100, 65, 0.2, 1, 0.1),
    (3, 33, 17, 0.5, 16, 1.0),
    (64, 130, 96, 0.1, 16, 0.2),
    (7, 300, 500, 0.1, 1, 0.1),
    (70, 64, 40, 0.3, 3, 0.9),
    (130, 200, 150, 0.3, 16, 1.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear_by_the_oracle(instruction_set, dtype):
    for case in LINEAR:
        bound, tensors, grad_y = linear_case(*case, dtype)
        functions = bound(sk.functional.sparse_linear), bound(sk.reference.sparse_linear)
        compare(*functions, tensors, grad_y, f"{case}, {instruction_set}")


# B, I, O, density: every way of the layer, which on AVX-512 keeps its support as a bitmap too.
LAYERS = [
    (1, 100, 63, 0.2),
    (3, 64, 65, 0.5),
    (1, 33, 200, 1.0),
    (8, 90, 129, 0.06),
    (17, 70, 64, 0.3),
    (64, 130, 50, 0.9),
    (40, 20, 300, 1.0),
]


@pytest.mark.parametrize("active", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_linear_layers_by_the_oracle(instruction_set, dtype, active):
    for B, I, O, density in LAYERS:
        layer = sk.SparseLinear(I, O, density=density, dtype=dtype)

        def sparse(layer, x, weight, bias):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        def dense(layer, x, weight, bias):
            return torch.nn.functional.linear(x, layer.densify(weight), bias)

        x, grad_y = (sparse_randn(B, n, active=active, dtype=dtype) for n in (I, O))
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        functions = (functools.partial(function, layer) for function in (sparse, dense))
        compare(*functions, tensors, grad_y, f"{B=} {I=} {O=} {density=} {active=}, {instruction_set}")


def conv_case(B, C, size, O, kernel, stride, padding, active, dtype, memory_format):
    tensors = {
        "x": sparse_randn(B, C, size, size, active=active, dtype=dtype).to(memory_format=memory_format),
        "weight": torch.randn(O, C, kernel, kernel).to(dtype),
        "bias": torch.randn(O).to(dtype),
    }

    def bound(function):
        return lambda x, weight, bias: function(x, weight, bias, stride, padding, sparse_input_grad=B % 2 == 0)

    out = (size + 2 * padding - kernel) // stride + 1
    return bound, tensors, sparse_randn(B, O, out, out, active=0.2, dtype=dtype)


CONV = [
    (1, 17, 7, 33, 3, 1, 1, 0.04),  # these two by the kernels,
    (2, 64, 8, 64, 5, 1, 0, 0.05),
    (3, 5, 9, 20, 3, 2, 1, 0.3),
    (2, 33, 5, 15, 1, 1, 0, 0.2),  # PyTorch's dense convolution, in part or as a whole
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_conv2d_by_the_oracle(instruction_set, dtype, memory_format):
    for case in CONV:
        bound, tensors, grad_y = conv_case(*case, dtype, memory_format)
        functions = bound(sk.functional.sparse_conv2d), bound(sk.reference.sparse_conv2d)
        compare(*functions, tensors, grad_y, f"{case}, {instruction_set}")


def steps():
    """Result and gradients of every op, by name: what must not depend on threads, run or place in memory."""
    torch.manual_seed(0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randint(-9, 10, (130, 999)).to(dtype).requires_grad_()
        layer = sk.KWinners(999, 100)
        layer(x)
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn(130, 999).to(dtype))
        results |= {f"k_winners {dtype}": y.detach(), f"grad {dtype}": grad, f"duty cycle {dtype}": layer.duty_cycle}
        for case in LINEAR:
            bound, tensors, grad_y = linear_case(*case, dtype)
            got = run(bound(sk.functional.sparse_linear), tensors, grad_y)
            results |= {f"linear {case} {dtype} {name}": value for name, value in got.items()}
        for case in CONV[:2]:  # the bits of PyTorch's dense convolution do depend on the number of threads
            for form in FORMATS:
                bound, tensors, grad_y = conv_case(*case, dtype, form)
                got = run(bound(sk.functional.sparse_conv2d), tensors, grad_y)
                results |= {f"conv {case} {dtype} {form} {name}": value for name, value in got.items()}
    return results


def test_threads_and_runs_give_the_same_bits(instruction_set, threads):
    threads(1)
    wanted = steps()
    for count in (1, 2, 3):
        threads(count)
        got = steps()
        for name, value in wanted.items():
            assert_same_bits(got[name], value, f"{name}, {count} threads, {instruction_set}")


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_environment_chooses_and_info_says_so(capability):
    """ATEN_CPU_CAPABILITY lowers PyTorch's instruction set and with it ours."""
    program = "import torch, sparsekern.info as i; i.main(); print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    *printed, theirs = done.stdout.splitlines()
    line = next(line for line in printed if line.startswith("cpu bodies"))
    if theirs.lower() != capability:
        pytest.skip(f"PyTorch has no {capability} here, and uses {theirs}")
    ours = "baseline" if capability == "default" else capability
    assert f"C++ kernels, {ours} (set by ATEN_CPU_CAPABILITY)" in line
