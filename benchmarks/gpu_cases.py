"""The GPU rows: what is built, how it is checked, what it is compared with. ``scale`` 1 is the real size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsekern as sk
from checking import WrongResult
from gpu_timing import on_gpu
from report import DENSE, OURS
from sparsekern.paper.plain import PlainKWinners

F32, BF16 = torch.float32, torch.bfloat16
# Relative to the norm of the float64 result: roundings of sums of thousands, and of storage for bfloat16.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TORCH = "torch"


@dataclass
class Row:
    """One row, ready to run: functions by (role, name); the errors found; bytes that must move, where they decide."""

    functions: dict[tuple[str, str], Callable[[], object]]
    error: float
    savings: float | None = None
    bytes: int | None = None
    calls: int = 1  # of a function's one: times are divided by it
    graphs: bool = True
    training: bool = False
    extra: dict[str, str] = field(default_factory=dict)


def error_of(got: Tensor, wanted: Tensor, what: str) -> float:
    """||got - wanted|| / ||wanted||, within what the dtype of got allows."""
    wanted = wanted.detach()
    difference, norm = (got.detach().double() - wanted).norm(), wanted.norm()
    error = float(difference / norm.clamp(min=torch.finfo(torch.float64).tiny))
    if not error <= ALLOWED[got.dtype]:
        raise WrongResult(f"{what}: off by {error:.2g} of the norm, allowed {ALLOWED[got.dtype]:.0e}")
    return error


def same_winners(y: Tensor, x: Tensor, k: int, what: str) -> None:
    """k winners a row, passed bit for bit, and no loser above a winner."""
    won = y != 0
    smallest = torch.where(won, x, torch.inf).amin(1)
    largest = torch.where(won, -torch.inf, x).amax(1)
    if not ((won.sum(1) == k).all() and torch.equal(y, torch.where(won, x, 0)) and (smallest >= largest).all()):
        raise WrongResult(f"{what}: not the k largest of each row")


def sparse_rows(B: int, n: int, k: int, dtype: torch.dtype, device: str) -> Tensor:
    """B rows of n of which k random ones are not zero."""
    chosen = torch.rand(B, n, device=device).argsort(1)[:, :k] if n * B < 2**28 else None
    if chosen is None:  # too much to sort
        chosen = torch.randint(n // k, (B, k), device=device) + torch.arange(k, device=device) * (n // k)
    values = torch.randn(B, k, device=device).abs().add(0.1).to(dtype)
    return torch.zeros(B, n, dtype=dtype, device=device).scatter_(1, chosen, values)


def k_winners_fused(device: str, scale: float, compiled: bool) -> Row:
    B, n = max(4, int(1024 * scale)), 1000
    k, x = n // 10, torch.randn(B, n, device=device)
    ours, plain = (kind(n, k).to(device).train() for kind in (sk.KWinners, PlainKWinners))
    for layer in (ours, plain):
        layer.duty_cycle.uniform_(0, 0.2)
    _check_boosted(ours.eval(), x)
    ours.train()
    functions = {(OURS, "eager"): partial(ours, x), (TORCH, "eager"): partial(plain, x)}
    if compiled:
        functions[TORCH, "compile"] = partial(torch.compile(plain), x)
    return Row(functions, 0.0, bytes=2 * x.nbytes, training=True)


def _check_boosted(layer: sk.KWinners, x: Tensor) -> None:
    """Algorithm 1, to the rounding of the factors."""
    k = layer._k(layer.n)
    factors = torch.exp(layer.boost_strength.double() * (k / layer.n - layer.duty_cycle.double())).float()
    y, boosted = layer(x), x * factors
    won = torch.where(y == x, boosted, 0)
    if not torch.equal(y[y != 0], x[y != 0]):
        raise WrongResult("k-winners: a winner's value was changed")
    same_winners(won, boosted, k, "k-winners")


def selection(B: int, n: int, k: int, device: str, scale: float, compiled: bool) -> Row:
    B, n = max(4, int(B * scale)), max(256, int(n * min(1, 8 * scale)))
    k, x = min(k, n // 4), torch.randn(B, n, device=device)
    same_winners(sk.functional.k_winners(x, k), x, k, f"selection {B} x {n}")
    functions = {
        (OURS, "output, bits and counts"): lambda: sk.functional.k_winners(x, k),
        (TORCH, "topk"): lambda: torch.topk(x, k, sorted=False),
    }
    if on_gpu(device):
        functions[OURS, "selection alone"] = lambda: select_alone(x, k)
    return Row(functions, 0.0, bytes=x.nbytes)


def select_alone(x: Tensor, k: int) -> Tensor:
    """The winners as bits, without an output."""
    from sparsekern.ops import k_winners_long_triton, k_winners_triton

    n = x.shape[1]
    _, counts = k_winners_triton.prepare(x, k, None, None, n)
    short = n <= k_winners_triton.REGISTERS_N
    select = k_winners_triton.select_rows if short else k_winners_long_triton.select_long_rows
    return select(x, k, None, n, 1, counts, store_y=False)[1]


def linear_and_k_winners(B: int, device: str, scale: float, compiled: bool) -> Row:
    """As the paper's network has them: what the layer gets has k non-zeros, and k-winners follow."""
    I, O = (1600, 1000) if scale == 1 else (160, 100)
    x = sparse_rows(B, I, I // 8, F32, device)
    layer = sk.SparseLinear(I, O, density=0.4, device=device)
    winners, plain = (kind(O, O // 10).to(device).train() for kind in (sk.KWinners, PlainKWinners))
    dense = layer.to_dense()
    error = error_of(layer(x), F.linear(x.double(), dense.weight.double(), dense.bias.double()), f"linear B={B}")
    functions = {
        (OURS, "eager"): lambda: winners(layer(x)),
        (TORCH, "eager"): lambda: plain(dense(x)),
    }
    if compiled:
        functions[TORCH, "compile"] = partial(torch.compile(torch.nn.Sequential(dense, plain)), x)
    return Row(functions, error, savings=20.0, training=True)


# One sample reads a few rows of the weight, which would stay in the second-level cache if it came again.
INPUTS_IN_TURN = 16


def linear(B, I, O, density, group_size, active, dtype, device: str, scale: float, compiled: bool) -> Row:
    """A layer alone, against the dense one of the same dtype; what else the dense one might run in is shown."""
    if scale < 1:
        B, I, O = max(1, int(B * scale)), int(I * max(scale, 1 / 32)), int(O * max(scale, 1 / 32))
        group_size = min(group_size, O)
    calls = INPUTS_IN_TURN if B == 1 and active < 1 else 1
    xs = [sparse_rows(B, I, max(1, int(active * I)), dtype, device) for _ in range(calls)] if active < 1 else []
    xs = xs or [torch.randn(B, I, device=device, dtype=dtype)]
    layer = sk.SparseLinear(I, O, density=density, group_size=group_size, device=device, dtype=dtype)
    dense = layer.to_dense()
    wanted = F.linear(xs[0].double(), dense.weight.double(), dense.bias.double())
    error = error_of(layer(xs[0]), wanted, f"linear {I}->{O}")
    functions = {(OURS, "eager"): partial(_each, layer, xs), (DENSE, "eager"): partial(_each, dense, xs)}
    if dtype == F32 and on_gpu(device):
        functions["TF32", "eager"] = partial(with_tf32, _each, dense, xs)
        functions["bf16", "eager"] = partial(_each, _bfloat16(dense), [x.bfloat16() for x in xs])
    bytes_read = int(layer.weight.nbytes * active)
    return Row(functions, error, savings=1 / (density * active), bytes=bytes_read, calls=calls)


def _each(layer: Callable, xs: list[Tensor]) -> Tensor:
    for x in xs:
        y = layer(x)
    return y


def _bfloat16(dense: torch.nn.Linear) -> Callable:
    weight, bias = dense.weight.detach().bfloat16(), dense.bias.detach().bfloat16()
    return lambda x: F.linear(x, weight, bias)


def with_tf32(function: Callable, *arguments) -> Tensor:
    """A call with TF32 allowed, which these benchmarks otherwise forbid."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        return function(*arguments)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def decode(backward: bool, device: str, scale: float, compiled: bool) -> Row:
    """A TopK autoencoder's decoder: a dense dictionary, of which each row uses 64 entries."""
    B, I, O, k, dtype = (4096, 131072, 4096, 64, BF16) if scale == 1 else (40, 32768, 32, 8, F32)
    x = sparse_rows(B, I, k, dtype, device).requires_grad_(backward)
    layer = sk.SparseLinear(I, O, False, density=1, group_size=O, sparse_input_grad=True, device=device, dtype=dtype)
    grad_y = torch.randn(B, O, device=device).to(dtype)
    index = x.detach().topk(k, sorted=False).indices
    values = x.detach().gather(1, index).requires_grad_(backward)
    dense = layer.weight.detach().view(I, O).t().contiguous().requires_grad_(backward)  # as nn.Linear has it
    table = layer.weight.detach().view(I, O).clone().requires_grad_(backward)
    forwards = {
        (OURS, "eager"): (lambda: layer(x), (x, layer.weight)),
        (DENSE, "eager"): (lambda: F.linear(x, dense), (x, dense)),
        (TORCH, "embedding_bag"): (
            lambda: F.embedding_bag(index, table, per_sample_weights=values, mode="sum"),
            (values, table),
        ),
    }
    if not backward:
        functions = {key: call for key, (call, _) in forwards.items()}
    else:
        ys = {key: call() for key, (call, _) in forwards.items()}
        functions = {
            key: partial(torch.autograd.grad, ys[key], leaves, grad_y, retain_graph=True)
            for key, (_, leaves) in forwards.items()
        }
    return Row(functions, _check_decode(functions[OURS, "eager"](), x, layer, grad_y, k), savings=I / k, graphs=False)


def _check_decode(got, x: Tensor, layer: sk.SparseLinear, grad_y: Tensor, k: int) -> float:
    """The forward, or both gradients, on the first rows and the first dictionary entries that are used."""
    rows = layer.weight.detach().view(x.shape[1], -1)
    x = x.detach()
    if isinstance(got, Tensor):
        index = x[:8].topk(k).indices
        wanted = (rows[index].double() * x[:8].gather(1, index).double().unsqueeze(-1)).sum(1)
        return error_of(got[:8].detach(), wanted, "decode")
    grad_x, grad_weight = got
    used = x[0].nonzero().flatten()[:8]
    wanted = x[:, used].double().t() @ grad_y.double()
    error = error_of(grad_weight.view_as(rows)[used], wanted, "decode, gradient of the dictionary")
    wanted = torch.where(x[:2] != 0, grad_y[:2].double() @ rows.double().t(), 0)
    return max(error, error_of(grad_x[:2], wanted, "decode, gradient of the codes"))


def convolution(B: int, active: float, device: str, scale: float, compiled: bool) -> Row:
    B = max(2, int(B * scale))
    x = sparse_rows(B, 64 * 14 * 14, int(active * 64 * 14 * 14), F32, device).view(B, 64, 14, 14)
    layer = sk.SparseConv2d(64, 64, 5, device=device)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    wanted = F.conv2d(x[:4].double(), weight.double(), bias.double())
    error = max(error_of(layer(x)[:4], wanted, "convolution"), error_of(layer(_last(x))[:4], wanted, "convolution"))
    x_last, weight_last = _last(x), _last(weight)
    dense = partial(F.conv2d, x, weight, bias)
    dense_last = partial(F.conv2d, x_last, weight_last, bias)
    functions = {
        (OURS, "eager"): partial(layer, x),
        (OURS, "channels-last"): partial(layer, x_last),
        (DENSE, "eager"): dense,
        (DENSE, "channels-last"): dense_last,
    }
    if on_gpu(device):
        functions["TF32", "channels-last"] = partial(with_tf32, dense_last)
        half = [t.bfloat16() for t in (x_last, weight_last, bias)]
        functions["bf16", "channels-last"] = partial(F.conv2d, *half)
    return Row(functions, error, savings=1 / active)


def convolution_backward(B: int, active: float, grad_active: float, device: str, scale: float, compiled: bool) -> Row:
    """Both gradients, of an incoming gradient as sparse as what pooling and k-winners leave of it."""
    B = max(2, int(B * scale))
    x = sparse_rows(B, 64 * 14 * 14, int(active * 64 * 14 * 14), F32, device).view(B, 64, 14, 14)
    grad_y = sparse_rows(B, 6400, int(grad_active * 6400), F32, device).view(B, 64, 10, 10)
    layer = sk.SparseConv2d(64, 64, 5, sparse_input_grad=True, device=device)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    functions = {}
    with torch.enable_grad():
        for name, change in (("eager", torch.clone), ("channels-last", _last)):
            leaves = change(x).requires_grad_(), change(weight).requires_grad_()
            ys = {
                OURS: sk.functional.sparse_conv2d(*leaves, bias, sparse_input_grad=True),
                DENSE: F.conv2d(*leaves, bias),
            }
            for role, y in ys.items():
                functions[role, name] = partial(torch.autograd.grad, y, leaves, change(grad_y), retain_graph=True)
    errors = []
    for name in ("eager", "channels-last"):
        grads = functions[OURS, name]()
        for what, got, wanted in zip(("x", "weight"), grads, _convolution_gradients(x, weight, grad_y), strict=True):
            errors.append(error_of(got, wanted, f"convolution, {name}, gradient of {what}"))
    if on_gpu(device):
        functions["TF32", "channels-last"] = partial(with_tf32, functions[DENSE, "channels-last"])
    # Backward passes run on their forwards' stream: no graph of them alone can be captured.
    return Row(functions, max(errors), savings=1 / grad_active, graphs=False)


def _convolution_gradients(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, that of x where x is not zero."""
    x, weight, grad_y = x.double(), weight.double(), grad_y.double()
    grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad_y)
    return torch.where(x != 0, grad_x, 0), torch.nn.grad.conv2d_weight(x, weight.shape, grad_y)


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


CASES: dict[str, Callable[[str, float, bool], Row]] = {
    "k-winners fused, 1024 x 1000 float32": k_winners_fused,
    "selection 65536 x 1024 float32, k=102": partial(selection, 65536, 1024, 102),
    "selection 2048 x 131072 float32, k=64": partial(selection, 2048, 131072, 64),
    "selection 64 x 12544 float32, k=1200": partial(selection, 64, 12544, 1200),
    **{f"linear 1600->1000 d=0.4 G=1 + k-winners, B={B}": partial(linear_and_k_winners, B) for B in (1, 8, 64)},
    "linear 4096->16384 d=0.1 G=64 bfloat16, B=1024": partial(linear, 1024, 4096, 16384, 0.1, 64, 1, BF16),
    "linear 4096->16384 d=0.1 G=64 float32, B=1024": partial(linear, 1024, 4096, 16384, 0.1, 64, 1, F32),
    "FFN down 14336->4096, 5% active, bfloat16, B=1": partial(linear, 1, 14336, 4096, 1, 4096, 0.05, BF16),
    "decode 131072->4096 k=64 bfloat16, B=4096, forward": partial(decode, False),
    "decode 131072->4096 k=64 bfloat16, B=4096, backward": partial(decode, True),
    "conv 64->64 5x5 on 14x14, 10% active, float32, B=1024": partial(convolution, 1024, 0.1),
    "conv 64->64 5x5 on 14x14, 10% active, float32, B=64": partial(convolution, 64, 0.1),
    "conv 64->64 5x5 on 14x14, 3% of gradient, float32, B=1024, backward": partial(
        convolution_backward, 1024, 0.1, 0.03
    ),
    # Never slower than dense: inputs without zeros.
    "dense input 1024->1024 d=1 bfloat16, B=1": partial(linear, 1, 1024, 1024, 1, 1024, 1, BF16),
    "dense input 4096->4096 d=1 bfloat16, B=1": partial(linear, 1, 4096, 4096, 1, 4096, 1, BF16),
    "dense input 4096->4096 d=1 bfloat16, B=16": partial(linear, 16, 4096, 4096, 1, 4096, 1, BF16),
    "dense input 4096->4096 d=1 bfloat16, B=1024": partial(linear, 1024, 4096, 4096, 1, 4096, 1, BF16),
    "dense input 4096->4096 d=0.5 G=1 float32, B=64": partial(linear, 64, 4096, 4096, 0.5, 1, 1, F32),
    "dense input conv 64->64 5x5 on 14x14, float32, B=1024": partial(convolution, 1024, 1.0),
    "dense gradient conv 64->64 5x5 on 14x14, float32, B=1024, backward": partial(convolution_backward, 1024, 1, 1),
}
