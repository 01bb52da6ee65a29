"""The k-winners layers: Algorithm 1 with boosting by duty cycles (section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled, nn, strided

from sparsekern.nn.recomputing import Forwards, may_recompute, recomputing
from sparsekern.nn.sparse_conv2d import SparseConv2d
from sparsekern.ops import _check, conv_k_winners
from sparsekern.ops.k_winners import (
    channel_moments,
    k_winners2d_counted,
    k_winners_counted,
    k_winners_rows,
    max_pool_k_winners2d_counted,
    norm_max_pool_k_winners2d_counted,
    update_duty_cycle_,
)

_BUFFERS = {"duty_cycle": torch.float32, "samples_seen": torch.int64, "boost_strength": torch.float32}
_DISTRIBUTED = torch.distributed.is_available()


class _KWinnersBase(nn.Module):
    """What both layers share: k, boosting, the duty cycle, its entropy and the state_dict."""

    def __init__(
        self, n, channels, k, density, k_inference_factor, boost_strength, boost_strength_factor, duty_cycle_period
    ):
        super().__init__()
        op = type(self).__name__
        if (k is None) == (density is None):
            raise ValueError(f"{op}: wants exactly one of k and density, got k={k} and density={density}")
        if density is not None:
            _check.density(op, density)
        if k is not None:
            _check.integer(op, "k", k, 0, n)
        _check.at_least_0(op, "k_inference_factor", k_inference_factor)
        _check.at_least_0(op, "boost_strength", boost_strength)
        _check.at_least_0(op, "boost_strength_factor", boost_strength_factor)
        _check.integer(op, "duty_cycle_period", duty_cycle_period, 1)
        self.k = k
        self.density = density
        self.k_inference_factor = k_inference_factor
        self.boost_strength_factor = float(boost_strength_factor)
        self.duty_cycle_period = duty_cycle_period
        self.register_buffer("duty_cycle", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64))
        # A tensor, so that an epoch's new value neither recompiles a compiled model nor recaptures a graph.
        self.register_buffer("boost_strength", torch.tensor(float(boost_strength), dtype=torch.float32))
        self._forwards = Forwards()

    def _apply(self, fn, recurse=True):
        """Moves as any module does, but the float32 buffers stay float32 under ``.half()`` and the like."""
        self._forwards = Forwards()
        exact = {name: self._buffers[name] for name in ("duty_cycle", "boost_strength")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            if moved.dtype != torch.float32:
                self._buffers[name] = value.to(moved.device)
        return self

    def __setattr__(self, name, value):
        """``layer.boost_strength = 2.0`` fills the buffer; all buffers keep the dtype and shape that kernels rely on."""
        if name in _BUFFERS and name in self._buffers:
            op, old = type(self).__name__, self._buffers[name]
            if name == "boost_strength" and not isinstance(value, Tensor):
                _check.at_least_0(op, name, value)
                value = torch.full_like(old, value)
            _check.shape(op, name, value, tuple(old.shape))
            value = value.to(_BUFFERS[name])
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        for name, dtype in _BUFFERS.items():  # load_state_dict(assign=True) takes over those of any dtype
            self._buffers[name] = self._buffers[name].to(dtype)

    def _k_of(self, n: int) -> int:
        """The number of winners of n units in training."""
        return self.k if self.k is not None else min(n, max(1, round(self.density * n)))

    def _k(self, n: int) -> int:
        """The number of winners of n units in the current mode."""
        k = self._k_of(n)
        return k if self.training else min(round(k * self.k_inference_factor), n)

    def _boosting_duty_cycle(self, x: Tensor) -> Tensor:
        """The duty cycle to boost x by: that of the first forward where this one recomputes it."""
        duty_cycle = self._buffers["duty_cycle"]  # an attribute of a module takes ten times as long
        if not self.training or torch.compiler.is_compiling():
            return duty_cycle
        if recomputing():
            return self._forwards.duty_cycle(x) if len(self._forwards) else duty_cycle
        if may_recompute():
            self._forwards.remember(x, duty_cycle)
        return duty_cycle

    def _update_duty_cycle(self, counts: Tensor, rows_per_sample: int, locations: int) -> None:
        """Equation 6, by the counts of the whole global batch; once a step under activation checkpointing."""
        if recomputing():
            return
        if _DISTRIBUTED and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(counts)
        buffers = self._buffers
        update_duty_cycle_(
            buffers["duty_cycle"], buffers["samples_seen"], counts, self.duty_cycle_period, rows_per_sample, locations
        )

    def entropy(self) -> Tensor:
        """The entropy of the units' winning, summed over units, from the duty cycle: bits, float32 ()."""
        d = self.duty_cycle.double().clamp(0, 1)
        return (-(torch.xlogy(d, d) + torch.xlogy(1 - d, 1 - d)).sum() / math.log(2)).float()

    def max_entropy(self) -> float:
        """The largest entropy that k winners allow, reached when all units win equally often: bits."""
        p = self._max_entropy_density()
        if p in (0, 1):
            return 0.0
        return -len(self.duty_cycle) * (p * math.log2(p) + (1 - p) * math.log2(1 - p))

    def step_boost_strength(self) -> None:
        """Multiplies ``boost_strength`` by ``boost_strength_factor``; call it after an epoch."""
        self.boost_strength.mul_(self.boost_strength_factor)

    def extra_repr(self) -> str:
        winners = f"k={self.k}" if self.k is not None else f"density={self.density}"
        return (
            f"{winners}, k_inference_factor={self.k_inference_factor}, boost_strength={float(self.boost_strength):g}, "
            f"boost_strength_factor={self.boost_strength_factor:g}, duty_cycle_period={self.duty_cycle_period}"
        )


class KWinners(_KWinnersBase):
    """Keeps the k most excited units of each row, with boosting of those that seldom win (Algorithm 1, section 3.2).

    Winners are the k largest of ``exp(boost_strength * (k / n - duty_cycle)) * x`` and pass x itself; all else is 0. In
    training mode the duty cycle then moves by equation 6; under ``torch.distributed`` by the whole global batch, so that
    every rank must call the layer equally often. In eval mode ``min(round(k * k_inference_factor), n)`` units win and
    nothing is updated. With ``k == n`` the layer is a ReLU; with fewer winners, negative values win where they are among
    the k largest.

    Args:
        n: units.
        k: winners of each row in training, 0..n.
        density: k as a fraction of n, in (0, 1]; exactly one of k and density is given.
        k_inference_factor: winners in eval mode, relative to k.
        boost_strength: beta of Algorithm 1, at least 0.
        boost_strength_factor: what :func:`sparsekern.step_boost_strength` multiplies it by.
        duty_cycle_period: T of equation 6, in samples.

    Shape: x (..., n) of any floating-point dtype -> the same.

    Buffers: ``duty_cycle`` (n,) float32, ``samples_seen`` () int64 and ``boost_strength`` () float32, all in the
    state_dict, so that training resumes exactly.

    Raises:
        ValueError: not exactly one of k and density, k outside 0..n, density outside (0, 1], n or duty_cycle_period below
            1, a negative factor or strength; in a call, an x whose last dimension is not n.
        TypeError: arguments of another type; in a call, an x that is no floating-point tensor.
    """

    def __init__(
        self,
        n: int,
        k: int | None = None,
        *,
        density: float | None = None,
        k_inference_factor: float = 1.5,
        boost_strength: float = 1.0,
        boost_strength_factor: float = 1.0,
        duty_cycle_period: int = 1000,
    ):
        _check.integer("KWinners", "n", n, 1)
        super().__init__(n, n, k, density, k_inference_factor, boost_strength, boost_strength_factor, duty_cycle_period)
        self.n = n
        if k is None:
            self.k, self.density = max(1, round(density * n)), None

    def forward(self, x: Tensor) -> Tensor:
        n, k, buffers = self.n, self._k(self.n), self._buffers
        # The close checks cost as much as the selection from a small row.
        plain = (
            isinstance(x, Tensor)
            and x.is_cpu
            and x.layout is strided
            and x.dim() == 2
            and x.shape[1] == n
            and x.dtype in _check.DTYPES
        )
        if not plain:
            _check.is_float_tensor("KWinners", "x", x)
            if x.dim() == 0 or x.shape[-1] != n:
                raise ValueError(f"KWinners: wants x of shape (..., {n}), got {tuple(x.shape)}")
        if self.k == n:
            return torch.relu(x)
        duty_cycle, boost_strength = self._boosting_duty_cycle(x), buffers["boost_strength"]
        if plain and duty_cycle.is_cpu and type(k) is int and 0 <= k <= n:
            y, counts = k_winners_rows(x.contiguous(), k, duty_cycle, boost_strength, n, 1)
        else:
            y, counts = k_winners_counted(x, k, duty_cycle, boost_strength)
        if self.training:
            self._update_duty_cycle(counts, 1, 1)
        return y

    def _max_entropy_density(self) -> float:
        return self.k / self.n

    def extra_repr(self) -> str:
        return f"{self.n}, {super().extra_repr()}"


def _norm_fuses(norm: nn.Module, channels: int, count: int, needs_grad: bool) -> bool:
    """Whether a module before pooling is batch norm and nothing else, which keeps the order of a channel's units.

    count: the values that a channel has in the batch.
    """
    if type(norm) is not nn.BatchNorm2d or norm.affine or _hooked(norm):
        return False
    if norm.num_features != channels or torch._C._are_functorch_transforms_active():
        return False
    return count > 1 if norm.training or norm._buffers["running_mean"] is None else not needs_grad


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def _conv_fuses(conv: nn.Module, x: Tensor) -> bool:
    """Whether a module before all else is a plain convolution that the op for one-channel images takes."""
    if type(conv) is nn.Conv2d:
        plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    else:
        plain = type(conv) is SparseConv2d and conv._buffers["mask"] is None
    return (
        plain
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.in_channels == 1
        and not _hooked(conv)
        and x.dim() == 4
        and x.shape[2] > conv.kernel_size[0]
        and x.shape[3] > conv.kernel_size[1]
        and conv_k_winners.serves(x, _weight(conv))
    )


def _weight(conv: nn.Module) -> Tensor:
    """conv.weight, by its dictionary where it is there: an attribute of a module takes ten times as long."""
    return conv._parameters["weight"] if "weight" in conv._parameters else conv.weight  # noqa: SIM401 (it would look up both)


def _bias(conv: nn.Module) -> Tensor | None:
    return conv._parameters["bias"] if "bias" in conv._parameters else conv.bias  # noqa: SIM401


def _dense_format(x: Tensor) -> Tensor:
    """x contiguous or channels-last, as it is if it is one of them."""
    return x if _check.is_channels_last(x) else x.contiguous()


def _norm_by_running(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """The mean, variance and eps that batch norm goes by, by channel; None where the first two are the input's own."""
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    if norm.training or mean is None:
        return None
    if mean.dtype is not dtype:
        mean, variance = mean.to(dtype), variance.to(dtype)
    return mean, variance, norm.eps


@torch.no_grad()
def _norm_by_moments(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor, None]:
    """The mean and what to multiply by, by the moments of an input of n values a channel.

    Moves the running moments as the module would.
    """
    if norm.training and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        for running, new in ((norm.running_mean, mean), (norm.running_var, variance * (n / (n - 1)))):
            step = new.to(running.dtype) - running
            running.add_(step / norm.num_batches_tracked if norm.momentum is None else step * norm.momentum)
    return mean, torch.rsqrt(variance + norm.eps), None


def _map_size(x: Tensor, conv: nn.Module | None) -> tuple[int, int, int]:
    """Channels, rows and columns of the map that is pooled, conv's if there is one; no channels where x is not one."""
    if conv is None:
        return tuple(x.shape[1:]) if x.dim() == 4 else (0, 0, 0)
    (KH, KW), (_, _, H, W) = conv.kernel_size, x.shape
    return conv.out_channels, H - KH + 1, W - KW + 1


def _choose_convolved(x: Tensor, conv: nn.Module, norm: nn.BatchNorm2d | None, choice: tuple) -> tuple[Tensor, Tensor]:
    """The winners and the counts of a one-channel image, all in one op."""
    weight, bias = _weight(conv), _bias(conv)
    if norm is None:
        return conv_k_winners.conv_max_pool_k_winners2d_counted(x, weight, bias, *choice)
    moments, by = None, _norm_by_running(norm, torch.float32)
    if by is None:
        moments = conv_k_winners.patch_moments(x.contiguous(), weight.shape[2:])
        _, rows, columns = _map_size(x, conv)
        by = _norm_by_moments(norm, *conv_k_winners.conv_moments(moments, weight, bias), x.shape[0] * rows * columns)
    return conv_k_winners.conv_norm_max_pool_k_winners2d_counted(x, weight, bias, *by, moments, *choice)


class KWinners2d(_KWinnersBase):
    """k-winners of a feature map, the duty cycle kept per channel (section 3.2).

    k units win over C*H*W of each sample, or with ``local=True`` over the C channels at each location. Everything else is
    as in :class:`KWinners`; the rate of a channel is averaged over its locations.

    Args:
        channels: C.
        k: winners of each sample (of each location if local) in training.
        density: k as a fraction of the units chosen from, in (0, 1]; exactly one of k and density is given.
        local: choose winners at each location rather than in the whole map.
        conv: a module applied before all else, ``nn.Conv2d`` for instance, as if it came before this layer. On a CPU, one
            of one-channel float32 images with a multiple of 16 filters (stride 1, no padding) takes part in the one pass
            of ``max_pool=2``, so that its map is never written: the same to rounding, in channels-last. Where x needs a
            gradient, they go one after the other.
        norm: a module applied before pooling, ``nn.BatchNorm2d`` for instance, as if it came before this layer. On a CPU,
            ``nn.BatchNorm2d(channels, affine=False)`` takes part in the one pass of max_pool: the same to rounding, but
            its gradient in training cannot be differentiated again.
        max_pool: the side of the windows whose maxima compete, as behind ``nn.MaxPool2d(max_pool)`` but in one pass,
            whose backward touches the winners alone; 1 for no pooling.
        memory_format: of the result, ``torch.contiguous_format`` or ``torch.channels_last``; None for x's. Contiguous
            where ``nn.Flatten`` follows, which then copies nothing.
        k_inference_factor, boost_strength, boost_strength_factor, duty_cycle_period: as in :class:`KWinners`.

    Shape: x, or what conv makes of it, (B, C, H, W) of any floating-point dtype -> (B, C, H // max_pool, W // max_pool), in
    the same memory format unless another is asked for.

    Buffers: ``duty_cycle`` (C,) float32, ``samples_seen`` () int64 and ``boost_strength`` () float32.

    Raises:
        ValueError: as :class:`KWinners`; in a call, an x that is not (B, C, H, W), maps smaller than the window, k above
            the number of units.
        TypeError: as :class:`KWinners`; a conv or norm that is no module; another memory_format.
    """

    def __init__(
        self,
        channels: int,
        k: int | None = None,
        *,
        density: float | None = None,
        local: bool = False,
        conv: nn.Module | None = None,
        norm: nn.Module | None = None,
        max_pool: int = 1,
        memory_format: torch.memory_format | None = None,
        k_inference_factor: float = 1.5,
        boost_strength: float = 1.0,
        boost_strength_factor: float = 1.0,
        duty_cycle_period: int = 1000,
    ):
        _check.integer("KWinners2d", "channels", channels, 1)
        _check.integer("KWinners2d", "max_pool", max_pool, 1)
        for name, module in (("conv", conv), ("norm", norm)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"KWinners2d: wants a module or None for {name}, got {type(module).__name__}")
        if memory_format not in (None, torch.contiguous_format, torch.channels_last):
            raise TypeError(
                f"KWinners2d: wants torch.contiguous_format, torch.channels_last or None for memory_format, "
                f"got {memory_format!r}"
            )
        super().__init__(
            channels if local else None,
            channels,
            k,
            density,
            k_inference_factor,
            boost_strength,
            boost_strength_factor,
            duty_cycle_period,
        )
        self.channels = channels
        self.local = local
        self.max_pool = max_pool
        self.memory_format = memory_format
        self.conv = conv
        self.norm = norm
        self._units: int | None = channels if local else None  # of the last map seen; for max_entropy

    def forward(self, x: Tensor) -> Tensor:
        _check.is_float_tensor("KWinners2d", "x", x)
        pool, local, modules = self.max_pool, self.local, self._modules
        conv, norm = modules.get("conv"), modules.get("norm")  # an attribute of a module takes ten times as long
        conv_fused = conv is not None and pool == 2 and not local and _conv_fuses(conv, x)
        if conv is not None and not conv_fused:
            x = conv(x)
        channels, rows, columns = _map_size(x, conv if conv_fused else None)
        if channels != self.channels:
            raise ValueError(f"KWinners2d: wants x of shape (B, {self.channels}, H, W), got {tuple(x.shape)}")
        height, width = rows // pool, columns // pool
        if pool > 1 and not (height and width):
            raise ValueError(f"KWinners2d: wants H and W at least {pool} (max_pool), got {tuple(x.shape)}")
        locations = height * width
        n = channels if local else channels * locations
        if self.k is not None and self.k > n:
            raise ValueError(f"KWinners2d: wants k in 0..{n} for x of shape {tuple(x.shape)}, got {self.k}")
        relu = self._k_of(n) == n
        # In one pass, unless there is nothing to choose.
        fused = pool > 1 and not (relu or local) and x.is_cpu
        norm_fused = False
        if norm is not None and fused:
            needs_grad = is_grad_enabled() and (
                any(p.requires_grad for p in conv.parameters()) if conv_fused else x.requires_grad
            )
            norm_fused = _norm_fuses(norm, channels, x.shape[0] * rows * columns, needs_grad)
        if conv_fused and (relu or (norm is not None and not norm_fused)):
            x, conv_fused = conv(x), False
        if norm is not None and not norm_fused:
            shape, x = x.shape, norm(x)
            if x.shape != shape:
                raise ValueError(
                    f"KWinners2d: wants a norm that keeps the shape {tuple(shape)}, got {tuple(x.shape)} from it"
                )
        if pool > 1 and not fused:
            x = nn.functional.max_pool2d(x, pool)
        if relu:
            return self._laid_out(torch.relu(x))
        # A compiled layer would be compiled again for each size; to set an attribute of a module takes 1.5 us.
        if not torch.compiler.is_compiling() and self._units != n:
            self._units = n
        y, counts = self._choose(x, n, conv if conv_fused else None, norm if norm_fused else None, fused)
        if self.training and locations > 0:
            self._update_duty_cycle(counts, locations if local else 1, locations)
        return self._laid_out(y)

    def _laid_out(self, y: Tensor) -> Tensor:
        return y if self.memory_format is None else y.contiguous(memory_format=self.memory_format)

    def _choose(
        self, x: Tensor, n: int, conv: nn.Module | None, norm: nn.BatchNorm2d | None, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """The winners and the counts, behind what was not applied yet of convolution, norm and, if fused, pooling."""
        choice = (self._k(n), self._boosting_duty_cycle(x), self._buffers["boost_strength"])
        pooling = (self.max_pool, self.memory_format is torch.contiguous_format)
        if conv is not None:
            return _choose_convolved(x, conv, norm, choice)
        if norm is not None:
            x = _dense_format(x)
            by = _norm_by_running(norm, torch.promote_types(x.dtype, torch.float32))
            by = by or _norm_by_moments(norm, *channel_moments(x.detach()), x[:, 0].numel())
            return norm_max_pool_k_winners2d_counted(x, *by, *choice, *pooling)
        if fused:
            return max_pool_k_winners2d_counted(x, *choice, *pooling)
        return k_winners2d_counted(x, *choice, self.local)

    def _max_entropy_density(self) -> float:
        if self._units is not None:
            return self._k_of(self._units) / self._units
        if self.density is None:
            raise RuntimeError(
                "KWinners2d: max_entropy needs the size of the map: call the layer once, or give density"
            )
        return self.density

    def extra_repr(self) -> str:
        pooling = f", max_pool={self.max_pool}" if self.max_pool > 1 else ""
        layout = f", memory_format={self.memory_format}" if self.memory_format is not None else ""
        return f"{self.channels}, {super().extra_repr()}" + (", local=True" if self.local else "") + pooling + layout


def step_boost_strength(model: nn.Module) -> None:
    """Multiplies each k-winners layer's ``boost_strength`` by its ``boost_strength_factor``; call it after an epoch."""
    for module in model.modules():
        if isinstance(module, _KWinnersBase):
            module.step_boost_strength()
