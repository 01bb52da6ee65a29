"""Which way of the sparse linear layer's forward, and of the convolution's passes, is the fastest on this GPU.

The constants of sparsekern/ops/sparse_linear_triton.py (ROWS_B, ROWS_BYTES, GROUPS_DENSITY) and of the
sparse_conv2d_*triton.py (MIN_PRODUCTS, DENSE_FROM) are set from what it prints: each way is forced in turn, the linear
ones checked against the dense layer, and timed in a CUDA graph beside it. A convolution's "dense" is cuDNN.

python benchmarks/gpu_crossovers.py [--device cpu] [--only PATTERN] [--seconds S]   (cpu: a rehearsal, without the ways)
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

import sparsekern as sk
from arguments import ONLY, no_gpu, nothing_to_run
from gpu_cases import BF16, F32, error_of, sparse_rows
from gpu_timing import GRAPHED, on_gpu, timings

# (in features, out features, density, group size): the paper's, a language model's, and groups of several densities.
SHAPES = (
    (1600, 1000, 0.4, 1),
    (4096, 4096, 0.1, 1),
    (1024, 1024, 1.0, 1024),
    (4096, 4096, 1.0, 4096),
    (1600, 1500, 0.1, 16),
    (4096, 4096, 0.25, 32),
    (4096, 16384, 0.1, 64),
)
# (in channels, out channels, kernel, side of the map).
CONVOLUTIONS = ((64, 64, 5, 14), (32, 64, 5, 12), (128, 128, 3, 28))
BATCHES = (1, 8, 32, 64, 256, 1024)
CONVOLVED = (16, 64, 256, 1024)
DENSITIES = (0.03, 0.1, 0.25, 1.0)
ACTIVE = 0.1
DENSE = ("dense layer", "eager")
ROWS_B = 64  # of larger batches the rows' tiles, one for all samples, take minutes to compile and spill


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a row could not be run, or 2 where nothing could."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses (default: cuda)")
    parser.add_argument("--only", **ONLY)
    parser.add_argument("--seconds", type=float, default=240, help="after which no row is begun (default: 240)")
    arguments = parser.parse_args(argv)
    if no_gpu("gpu_crossovers", arguments.device):
        return 2
    chosen = {name: measure for name, measure in rows(arguments.device).items() if arguments.only.search(name)}
    if nothing_to_run("gpu_crossovers", arguments.only, list(chosen)):
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    failed, began = [], time.perf_counter()
    for name, row in chosen.items():
        if time.perf_counter() - began > arguments.seconds:
            failed.append(f"{name}: no time left")
        else:
            measure(name, row, failed)
            if on_gpu(arguments.device):
                torch.cuda.empty_cache()
    print("\n".join(["every row was measured"] if not failed else ["NOT MEASURED:", *failed]))
    return 1 if failed else 0


def measure(name: str, row: Callable[[], str], failed: list[str]) -> None:
    """Prints the row, or why there is none, which is appended to failed."""
    try:
        print(f"{name:<42}" + row(), flush=True)
    except Exception as error:  # a wrong result, no memory: the other rows are to be had all the same
        print(f"{name}\n{traceback.format_exc()}", flush=True)
        failed.append(f"{name}: {type(error).__name__}")


def rows(device: str) -> dict[str, Callable[[], str]]:
    """What measures each row, by name; the convolutions first, whose constants were never measured."""
    real, found = device == "cuda", {}
    for shape in CONVOLUTIONS if real else [(3, 4, 3, 6)]:
        for B in CONVOLVED if real else (2,):
            for active in DENSITIES:
                name = "conv {0}->{1} {2}x{2} on {3}x{3}".format(*shape) + f" B={B} active={active}"
                found[name] = partial(convolution_row, B, *shape, active, device)
    for shape in SHAPES if real else [(32, 48, 0.25, 16)]:
        for dtype in (F32, BF16):
            for B in BATCHES if real else (2,):
                name = "{}->{} d={} G={}".format(*shape) + f" {str(dtype).removeprefix('torch.')} B={B}"
                found[name] = partial(row, B, *shape, dtype, device)
    return found


def convolution_row(B: int, C: int, O: int, K: int, size: int, active: float, device: str) -> str:
    """Every pass each way, x and the incoming gradient as sparse as each other."""
    torch.manual_seed(0)
    out = size - K + 1
    x = sparse_rows(B, C * size * size, max(1, int(active * C * size * size)), F32, device).view(B, C, size, size)
    grad_y = sparse_rows(B, O * out * out, max(1, int(active * O * out * out)), F32, device).view(B, O, out, out)
    weight, ops, where = torch.randn(O, C, K, K, device=device), torch.ops.sparsekern, ([1, 1], [0, 0])
    backward = partial(ops.sparse_conv2d_backward, grad_y, x, weight, *where, False)
    calls = {
        "forward": lambda: ops.sparse_conv2d(x, weight, None, *where),
        "grad_input": lambda: backward(True, False, False)[0],
        "grad_weight": lambda: backward(False, True, False)[1],
    }
    chosen = ["sparse", "dense"] if on_gpu(device) else ["as chosen"]
    functions = {(way, name): partial(run_forced, way, call) for name, call in calls.items() for way in chosen}
    measured = timings(functions, device)
    return "  ".join(
        f"{role} {name.removesuffix(GRAPHED)} {1e3 * t.median:.1f} us"
        for (role, name), t in measured.items()
        if name.endswith(GRAPHED) or not on_gpu(device)
    )


def row(B: int, I: int, O: int, density: float, group_size: int, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    layer = sk.SparseLinear(I, O, density=density, group_size=group_size, device=device, dtype=dtype)
    x = sparse_rows(B, I, max(1, int(ACTIVE * I)), dtype, device)
    dense = layer.to_dense()
    wanted = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    functions = {DENSE: partial(dense, x)}
    for way in ways(B, density, group_size, device):
        functions[way, "eager"] = partial(run_forced, way, layer, x)
        error_of(functions[way, "eager"](), wanted, way)
    with torch.no_grad():
        measured = timings(functions, device)
    times = {role: t.median for (role, name), t in measured.items() if name.endswith(GRAPHED) or not on_gpu(device)}
    best = min((role for role in times if role != DENSE[0]), key=times.get)
    chosen = f"best {best}, {times[DENSE[0]] / times[best]:.2f}x of dense"
    return "  ".join(f"{role} {1e3 * t:.1f} us" for role, t in times.items()) + f"  {chosen}"


def ways(B: int, density: float, group_size: int, device: str) -> list[str]:
    if not on_gpu(device):
        return ["as chosen"]
    return [*["rows"][: B <= ROWS_B], "dense", *["groups"][: group_size >= 16 and density < 1]]


def run_forced(way: str, function: Callable, *arguments) -> torch.Tensor:
    with torch.no_grad(), forced(way):
        return function(*arguments)


@contextlib.contextmanager
def forced(way: str):
    if way == "as chosen":
        yield
        return
    from sparsekern.ops import sparse_conv2d_triton, sparse_linear_triton

    choices = (sparse_linear_triton, "forward_way"), (sparse_conv2d_triton, "way")
    with contextlib.ExitStack() as changed:
        for module, name in choices:
            changed.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, lambda *_: way)
        yield


if __name__ == "__main__":
    sys.exit(main())
