"""Which way of the sparse linear layer's forward is the fastest on this GPU, by shape, batch and dtype.

The constants of sparsekern/ops/sparse_linear_triton.py (ROWS_B, GROUPS_DENSITY) are set from what it prints: each way is
forced in turn, checked against the others, and timed in a CUDA graph beside the dense layer.

python benchmarks/gpu_crossovers.py [--device cpu] [--only PATTERN]   (cpu: a rehearsal, without the ways)
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from functools import partial

import torch
from torch.nn import functional as F

import sparsekern as sk
from gpu_cases import BF16, F32, error_of, sparse_rows
from gpu_timing import GRAPHED, timings

# (in features, out features, density, group size): the paper's, a language model's, and groups of several densities.
SHAPES = (
    (1600, 1000, 0.4, 1),
    (4096, 4096, 0.1, 1),
    (4096, 4096, 1.0, 4096),
    (1600, 1500, 0.1, 16),
    (4096, 4096, 0.25, 32),
    (4096, 16384, 0.1, 64),
)
BATCHES = (1, 8, 32, 64, 256, 1024)
ACTIVE = 0.1
DENSE = ("dense layer", "eager")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="PATTERN")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_crossovers: no GPU that PyTorch can use; --device cpu rehearses", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    for shape in SHAPES if arguments.device == "cuda" else [(32, 48, 0.25, 16)]:
        for dtype in (F32, BF16):
            for B in BATCHES if arguments.device == "cuda" else (2,):
                name = "{}->{} d={} G={}".format(*shape) + f" {str(dtype).removeprefix('torch.')} B={B}"
                if arguments.only.search(name):
                    print(f"{name:<42}" + row(B, *shape, dtype, arguments.device), flush=True)
    return 0


def row(B: int, I: int, O: int, density: float, group_size: int, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    layer = sk.SparseLinear(I, O, density=density, group_size=group_size, device=device, dtype=dtype)
    x = sparse_rows(B, I, max(1, int(ACTIVE * I)), dtype, device)
    dense = layer.to_dense()
    wanted = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    functions = {DENSE: partial(dense, x)}
    for way in ways(density, group_size, device):
        functions[way, "eager"] = partial(run_forced, way, layer, x)
        error_of(functions[way, "eager"](), wanted, way)
    with torch.no_grad():
        measured = timings(functions, device)
    times = {role: t.median for (role, name), t in measured.items() if name.endswith(GRAPHED) or device == "cpu"}
    best = min((role for role in times if role != DENSE[0]), key=times.get)
    chosen = f"best {best}, {times[DENSE[0]] / times[best]:.2f}x of dense"
    return "  ".join(f"{role} {1e3 * t:.1f} us" for role, t in times.items()) + f"  {chosen}"


def ways(density: float, group_size: int, device: str) -> list[str]:
    if device != "cuda":
        return ["as chosen"]
    return ["rows", "dense", *(["groups"] if group_size >= 16 and density < 1 else [])]


def run_forced(way: str, layer: sk.SparseLinear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), forced(way):
        return layer(x)


@contextlib.contextmanager
def forced(way: str):
    if way == "as chosen":
        yield
        return
    from sparsekern.ops import sparse_linear_triton as body

    before = body.forward_way
    body.forward_way = lambda *_: way
    try:
        yield
    finally:
        body.forward_way = before


if __name__ == "__main__":
    sys.exit(main())
