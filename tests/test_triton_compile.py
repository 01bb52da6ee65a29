"""Every Triton kernel, in every configuration that the bodies choose, compiles for GPUs that are not there."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from sparsekern.ops import _triton, k_winners_triton, sparse_conv2d_triton, sparse_linear_triton
from sparsekern.ops import sparse_conv2d_channels_triton as by_channels
from triton_compile import ALLOWED_SPILLS, SHARED_MEMORY, compile_launch, distinct, float_atomics, launches, resources

META = torch.device("meta")
F32, BF16 = torch.float32, torch.bfloat16


def k_winners(rows, n, k, dtype, channels=None, inner=1, boosted=True):
    channels = n if channels is None else channels
    boost = (torch.empty(channels, device=META), torch.empty((), device=META)) if boosted else (None, None)
    x = torch.empty(rows, n, dtype=dtype, device=META)
    _, winners, counts = k_winners_triton.k_winners(x, k, *boost, channels, inner)
    k_winners_triton.k_winners_backward(x, winners)
    seen = torch.empty((), dtype=torch.int64, device=META)
    k_winners_triton.update_duty_cycle_(counts.new_empty(channels, dtype=F32), seen, counts, 1000, 1, 1)


def max_pool_k_winners2d(B, C, size, k, channels_last, dtype=F32):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(B, C, size, size, dtype=dtype, device=META).to(memory_format=memory_format)
    boost = torch.empty(C, device=META), torch.empty((), device=META)
    y, winners, offsets, _ = k_winners_triton.max_pool_k_winners2d(x, k, *boost, 2)
    k_winners_triton.max_pool_k_winners2d_backward(y, winners, offsets, size, size, channels_last)


def linear_forward(B, I, O, dtype, G, density):
    groups = -(-O // G)
    x, bias = torch.empty(B, I, dtype=dtype, device=META), torch.empty(O, dtype=dtype, device=META)
    weight = torch.empty(int(density * I) * groups, G, dtype=dtype, device=META)
    ccol, row = torch.empty(I + 1, dtype=torch.int32, device=META), weight.new_empty(len(weight), dtype=torch.int32)
    sparse_linear_triton.sparse_linear(x, weight, bias, ccol, row, O)
    if G == 1:
        support = torch.empty(I, -(-O // 32), 2, dtype=torch.int32, device=META)
        sparse_linear_triton.sparse_linear(x, weight, bias, ccol, row, O, support)
    return x, weight, ccol, row


def sparse_linear(B, I, O, dtype, G=1, density=0.4):
    """Forward and gradients; blocks are as many as the density asks for, wherever they are."""
    x, weight, ccol, row = linear_forward(B, I, O, dtype, G, density)
    grad_y = torch.empty(B, O, dtype=dtype, device=META)
    for at_nonzeros in (False, True):
        sparse_linear_triton.sparse_linear_backward(grad_y, x, weight, ccol, row, at_nonzeros, True, True, True)


def sparse_conv2d(B, C, O, size, kernel=5, stride=1, padding=0, channels_last=False):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(B, C, size, size, device=META).to(memory_format=memory_format)
    weight, where = torch.empty(O, C, kernel, kernel, device=META), ([stride, stride], [padding, padding])
    grad_y = sparse_conv2d_triton.sparse_conv2d(x, weight, torch.empty(O, device=META), *where)
    for at_nonzeros in (False, True):
        sparse_conv2d_triton.sparse_conv2d_backward(grad_y, x, weight, *where, at_nonzeros, True, True, True)


# What runs: the bodies' choices by rows, length, alignment, dtype and batch.
CASES = {
    "k_winners 64 x 1000": lambda: k_winners(64, 1000, 100, F32),
    "k_winners 64 x 33 bfloat16": lambda: k_winners(64, 33, 5, BF16),
    "k_winners 65536 x 1024": lambda: k_winners(65536, 1024, 100, F32, boosted=False),
    "k_winners 65536 x 1000 bfloat16": lambda: k_winners(65536, 1000, 100, BF16),
    "k_winners 8192 x 2048 float16": lambda: k_winners(8192, 2048, 100, torch.float16),
    "k_winners 64 x 4608, 32 channels": lambda: k_winners(64, 4608, 400, F32, 32, 144),
    "k_winners 8192 x 4095 bfloat16": lambda: k_winners(8192, 4095, 100, BF16),
    "k_winners 8192 x 8191": lambda: k_winners(8192, 8191, 100, F32),
    "k_winners 8192 x 8192 bfloat16": lambda: k_winners(8192, 8192, 100, BF16),
    "k_winners 64 x 12544, 64 channels": lambda: k_winners(64, 12544, 1200, F32, 64, 196),
    "k_winners 64 x 12544, channels last": lambda: k_winners(64, 12544, 1200, BF16, 64, 1),
    "k_winners 2048 x 131072": lambda: k_winners(2048, 131072, 64, F32, boosted=False),
    "k_winners 4096 x 131071 bfloat16": lambda: k_winners(4096, 131071, 20000, BF16),
    "k_winners 2 x 2**21": lambda: k_winners(2, 2**21, 64, F32),
    "pool 64 x 30 x 24 x 24": lambda: max_pool_k_winners2d(64, 30, 24, 400, False),
    "pool 64 x 32 x 24 x 24 bfloat16": lambda: max_pool_k_winners2d(64, 32, 24, 400, True, BF16),
    "linear 1 x 1600 -> 1000": lambda: sparse_linear(1, 1600, 1000, F32),
    "linear 3 x 1600 -> 1001 bfloat16": lambda: sparse_linear(3, 1600, 1001, BF16),
    "linear 32 x 1600 -> 1000": lambda: sparse_linear(32, 1600, 1000, F32),
    "linear 1 x 14336 -> 4096 bfloat16, d=1": lambda: sparse_linear(1, 14336, 4096, BF16, density=1.0),
    "linear 4096 x 131072 -> 4096 bfloat16, d=1": lambda: sparse_linear(4096, 131072, 4096, BF16, density=1.0),
    "linear 4096 x 16384 -> 777, d=1": lambda: sparse_linear(4096, 16384, 777, F32, density=1.0),
    "conv 1024 x 64 x 14 x 14 -> 64": lambda: sparse_conv2d(1024, 64, 64, 14),
    "conv 1024 x 64 x 14 x 14 -> 64, channels last": lambda: sparse_conv2d(1024, 64, 64, 14, channels_last=True),
    "conv 1024 x 30 x 12 x 12 -> 100": lambda: sparse_conv2d(1024, 30, 100, 12),
    "conv 1024 x 128 x 32 x 32 -> 256, 3 x 3, stride 2": lambda: sparse_conv2d(1024, 128, 256, 32, 3, 2, 1),
    "conv 64 x 512 x 28 x 28 -> 512, 1 x 1": lambda: sparse_conv2d(64, 512, 512, 28, 1, channels_last=True),
    "linear 16 x 1600 -> 1500, G=16": lambda: sparse_linear(16, 1600, 1500, F32, 16, 0.1),
    "linear 64 x 1600 -> 1000 bfloat16, G=24": lambda: sparse_linear(64, 1600, 1000, BF16, 24, 0.2),
    "linear 1024 x 4096 -> 16384, G=64": lambda: sparse_linear(1024, 4096, 16384, F32, 64, 0.1),
    "linear 1024 x 4096 -> 16384 bfloat16, G=64": lambda: sparse_linear(1024, 4096, 16384, BF16, 64, 0.1),
    "linear 1024 x 4096 -> 16384 float16, G=512": lambda: sparse_linear(1024, 4096, 16384, torch.float16, 512, 0.1),
    "linear 1024 x 4096 -> 16384, G=128": lambda: sparse_linear(1024, 4096, 16384, F32, 128, 0.1),
    "linear 32 x 1600 -> 1000, TF32": lambda: with_tf32(sparse_linear, 32, 1600, 1000, F32),
    "linear 4096 x 131072 -> 4096, d=1, TF32": lambda: with_tf32(sparse_linear, 4096, 131072, 4096, F32, 1, 1.0),
}


def with_tf32(function, *arguments):
    """As where PyTorch's products may take it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_linear_triton, "tf32_products", lambda: True)
        function(*arguments)


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """As many as an H200 has: the choices depend on it."""
    monkeypatch.setattr(_triton, "_multiprocessors", lambda index: 132)
    monkeypatch.setattr(_triton, "is_gpu", lambda x: True)
    monkeypatch.setattr(sparse_conv2d_triton, "strict_float32", lambda x: x.dtype == F32)


def selections():
    """Every length of block, for few rows and for many; loads one by one where rows are long and not aligned."""
    for n in (*(2**i for i in range(5, 14)), 4095, 8191):
        for rows in (64, 65536):
            x, counts = torch.empty(rows, n, device=META), torch.empty(n + 1, dtype=torch.int64, device=META)
            k_winners_triton.select_rows(x, n // 10, counts.float(), n, 1, counts)


def long_selections():
    """Candidates in registers, of every size, and beyond; one program a row, and several."""
    for k in (8, 64, 300, 800, 2000, 20000):
        for rows in (2, 4096):
            k_winners(rows, 131072 - k % 3, k, F32)


def tiles():
    """Every tile of samples and of a group's lanes."""
    for dtype in (F32, BF16):
        for B in (16, 32, 64, 128):
            for G in (16, 32, 64, 128):
                linear_forward(B, 1024, 1024, dtype, G, 0.1)


def tiles_in_tf32():
    """The same, of numbers twice as wide as what tensor cores otherwise take."""
    for B in (16, 32, 64, 128):
        for G in (16, 32, 64, 128):
            with_tf32(linear_forward, B, 1024, 1024, F32, G, 0.1)


def rows_parts():
    """One sample and several, packed weights and laid out, parts of every length."""
    for dtype in (F32, BF16):
        for B in (1, 2, 32):
            for I in (512, 65536):
                linear_forward(B, I, 1024, dtype, 1, 0.1)


def patches():
    """Every number of weights of an output channel that a program holds."""
    for C, kernel in ((16, 1), (16, 3), (16, 5), (32, 5), (64, 5)):
        for O in (1, 64):
            x, grad_y = torch.empty(8, C, 64, 64, device=META), torch.empty(8, O, 32, 32, device=META)
            shape = torch.Size((O, C, kernel, kernel))
            by_channels.grad_weight(grad_y, x, shape, [2, 2], [kernel // 2] * 2)


SWEEPS = (selections, long_selections, tiles, tiles_in_tf32, rows_parts, patches)


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in SHARED_MEMORY]
)
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.__name__)
def test_every_configuration_compiles(sweep, capability, tmp_path):
    with launches() as seen:
        sweep()
    assert_fits(seen, capability, tmp_path, sweep.__name__)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("case", CASES)
def test_compiles(case, capability, tmp_path):
    with launches() as seen:
        CASES[case]()
    assert_fits(seen, capability, tmp_path, case)


LARGE = {
    "groups": lambda: linear_forward(1, 64, 2**21, BF16, 16, 0.1),
    "inputs": lambda: sparse_linear(1, 2**25, 8, F32),
    "a dictionary": lambda: sparse_linear(64, 2**24, 8, F32, density=1.0),
    "a pooled map": lambda: max_pool_k_winners2d(1, 64, 2048, 400, False),
}


@pytest.mark.parametrize("case", LARGE)
def test_launches_of_large_sizes(case):
    """Only the first dimension of a grid may be larger than 65535; launches() asserts it."""
    with launches() as seen:
        LARGE[case]()
    assert seen


def assert_fits(seen, capability, tmp_path, case):
    assert seen
    for kernel, named, options in distinct(seen):
        compiled = compile_launch(kernel, named, options, capability)
        used = resources(compiled, tmp_path)
        print(f"sm_{capability} {case}: {kernel.__name__} {used}")
        assert used["spills"] <= ALLOWED_SPILLS, f"{kernel.__name__}: {used}"
        assert used["shared"] <= SHARED_MEMORY[capability], f"{kernel.__name__}: {used}"
        assert not float_atomics(compiled), kernel.__name__


@triton.jit
def _add_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(sums_ptr + i % 2, tl.load(x_ptr + i), sem="relaxed")


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.int32, torch.int64], ids=str)
def test_float_atomics_are_found(dtype):
    with launches() as seen:
        _add_kernel[(1,)](*torch.empty(2, 64, dtype=dtype, device=META), BLOCK=64)
    assert bool(float_atomics(compile_launch(*seen[0], 90))) == dtype.is_floating_point
