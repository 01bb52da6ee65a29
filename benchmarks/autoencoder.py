"""A TopK sparse autoencoder, where most people meet k-winners: encoder product, k-winners, sparse decoder.

Checked, then timed: forward, forward + backward, and whole training steps, and the memory that each needs at its peak,
against the same autoencoder in plain PyTorch: dense decoder (as called and compiled) and decoder by embedding_bag.

python benchmarks/autoencoder.py [--device cpu] [--csv FILE]   (cpu: a tiny one, to see that everything runs)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from checking import WrongResult
from gpu_cases import TORCH, error_of
from gpu_report import gpu_environment, lines
from gpu_timing import on_gpu, runs, timings
from report import DENSE, OURS, Result, caption, write_csv

FORWARD, BACKWARD, STEP = "forward", "forward + backward", "training step"


class SparseAutoencoder(nn.Module):
    """``decode(k_winners(encode(x)))``: the codes are dense tensors, mostly zero, and the decoder finds the zeros."""

    def __init__(self, width: int, codes: int, k: int, **factory):
        super().__init__()
        self.k = k
        self.encode = nn.Linear(width, codes, **factory)
        self.decode = sk.SparseLinear(
            codes, width, density=1, group_size=width, sparse_input_grad=True, **factory
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # (B, width)
        return self.decode(sk.functional.k_winners(self.encode(x), self.k))


class PlainAutoencoder(nn.Module):
    """The same with ``topk`` and a dense decoder, or one that adds up rows by ``embedding_bag``."""

    def __init__(self, like: SparseAutoencoder, by_rows: bool):
        super().__init__()
        self.k, self.by_rows = like.k, by_rows
        self.encode = nn.Linear(like.encode.in_features, like.encode.out_features, device="meta")
        self.encode.weight = nn.Parameter(like.encode.weight.detach().clone())
        self.encode.bias = nn.Parameter(like.encode.bias.detach().clone())
        rows = like.decode.weight.detach().view(like.decode.in_features, like.decode.out_features)
        self.dictionary = nn.Parameter(rows.clone() if by_rows else rows.t().contiguous())
        self.bias = nn.Parameter(like.decode.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encode(x)
        values, index = codes.topk(self.k, sorted=False)
        if self.by_rows:
            return F.embedding_bag(index, self.dictionary, per_sample_weights=values, mode="sum") + self.bias
        return F.linear(torch.zeros_like(codes).scatter(1, index, values), self.dictionary, self.bias)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a wrong result, or 2 where nothing could be run."""
    arguments = parse(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("autoencoder: no GPU that PyTorch can use; --device cpu rehearses", file=sys.stderr)
        return 2
    where = gpu_environment(device, str(settings(device)[-1]).removeprefix("torch."))
    print(caption(where), flush=True)
    results = []
    try:
        for result in measured(device, arguments.compile):
            results.append(result)
            print(f"\n{result.case}, {result.work}, B={result.batch}\n" + "\n".join(lines(result)), flush=True)
    except WrongResult as wrong:
        print(f"WRONG RESULT, not timed: {wrong}", file=sys.stderr)
        return 1
    if arguments.csv:
        write_csv(arguments.csv, results, where)
    return 0


def settings(device: str) -> tuple[int, int, int, int, torch.dtype]:
    """(B, width, codes, k, dtype): a tiny one where it is rehearsed."""
    return (4096, 4096, 131072, 64, torch.bfloat16) if device == "cuda" else (4, 32, 256, 8, torch.float32)


def measured(device: str, compiled: bool) -> Iterator[Result]:
    """Checks the autoencoder, then times each kind of work."""
    B, width, codes, k, dtype = settings(device)
    torch.manual_seed(0)
    model = SparseAutoencoder(width, codes, k, device=device, dtype=dtype)
    x = torch.randn(B, width, device=device).to(dtype)
    error = check(model, x)
    name = f"TopK autoencoder {width}->{codes}->{width}, k={k}, {str(dtype).removeprefix('torch.')}"
    for work in (FORWARD, BACKWARD, STEP):
        result = Result(name, work, B, codes / k, error)
        for key, build in rivals(model, compiled and on_gpu(device)).items():
            result.timings.update(measure(key, build, x, work, device))
        yield result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every timing here")
    return parser.parse_args(argv)


def rivals(model: SparseAutoencoder, compiled: bool) -> dict:
    """What builds each implementation: one at a time is in memory."""
    builds = {
        (OURS, "eager"): lambda: model,
        (DENSE, "eager"): lambda: PlainAutoencoder(model, by_rows=False),
        (TORCH, "embedding_bag"): lambda: PlainAutoencoder(model, by_rows=True),
    }
    if compiled:
        builds[DENSE, "compile"] = lambda: torch.compile(PlainAutoencoder(model, by_rows=False))
    return builds


def measure(key: tuple[str, str], build: Callable[[], nn.Module], x: Tensor, work: str, device: str) -> dict:
    """Its timing; on a GPU its name says how much memory the work needs beyond weights and x. Nothing if it cannot run."""
    module = build()
    optimizer = torch.optim.Adam(module.parameters(), 1e-5, fused=True) if work == STEP else None
    function = partial(_work, module, optimizer, x, work)
    needed = ""
    with torch.set_grad_enabled(work != FORWARD):
        if not runs(key, function):
            return {}
        if on_gpu(device):
            function()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            torch.cuda.synchronize()
            needed = f" ({(torch.cuda.max_memory_allocated() - held) / 2**30:.1f} GiB)"
        timed = timings({key: function}, device, graphs=False)
    module.zero_grad()
    torch.compiler.reset()
    return {(key[0], key[1] + needed): timed[key]}


def _work(module: nn.Module, optimizer, x: Tensor, work: str) -> None:
    if work == FORWARD:
        module(x)
        return
    module.zero_grad()
    F.mse_loss(module(x), x).backward()
    if optimizer is not None:
        optimizer.step()


def check(model: SparseAutoencoder, x: Tensor) -> float:
    """The reconstruction and the dictionary's gradient, from the codes that the model itself chose."""
    codes = sk.functional.k_winners(model.encode(x), model.k).detach().requires_grad_()
    y = model.decode(codes)
    grad_y = torch.randn_like(y)
    grad_codes, grad_rows = torch.autograd.grad(y, (codes, model.decode.weight), grad_y)
    rows = model.decode.weight.detach().view(codes.shape[1], -1)
    few = codes.detach()[:4]
    error = error_of(y[:4].detach(), few.double() @ rows.double() + model.decode.bias.detach().double(), "autoencoder")
    wanted = torch.where(few != 0, grad_y[:4].double() @ rows.double().t(), 0)
    error = max(error, error_of(grad_codes[:4], wanted, "gradient of the codes"))
    used = few[0].nonzero().flatten()[:4]
    wanted = codes.detach()[:, used].double().t() @ grad_y.double()
    return max(error, error_of(grad_rows.view_as(rows)[used], wanted, "gradient of the dictionary"))


if __name__ == "__main__":
    sys.exit(main())
