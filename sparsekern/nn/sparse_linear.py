"""The sparse linear layer: a drop-in for ``nn.Linear`` of which only a fraction of the weights exists (section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from sparsekern.nn.mask import draw_supports, magnitude_mask, mask_to_indices, supports_to_indices
from sparsekern.nn.parameters import freeze_as, whole
from sparsekern.ops import _check
from sparsekern.ops.sparse_linear import (
    eager_forward,
    has_values,
    pack_support,
    plan_groups,
    plan_support,
    sparse_linear_eager,
    sparse_linear_prepared,
    split_groups,
    support_problem,
)
from sparsekern.ops.sparse_linear_reference import compress, densify


@dataclass(frozen=True, slots=True)
class PackedSupport:
    """What the kernels want of a support, prepared once. No buffers: DDP would send those of rank 0 to the others."""

    made_of: Tensor | None = None  # row_indices
    version: int | None = None  # of row_indices then; tensors made in inference mode have none
    ccol_indices: Tensor | None = None  # what the kernels take in the place of the layer's, with bits
    row_indices: Tensor | None = None
    bits: Tensor | None = None
    plan: Tensor | None = None


class SparseLinear(nn.Module):
    """``nn.Linear`` of which each output unit has ``max(1, round(density * in_features))`` weights, at random inputs.

    Non-existing weights are not stored, so they stay exactly zero under any optimizer. Existing ones start as
    ``nn.Linear``'s do (uniform within ``1 / sqrt(in_features)``, the paper's Kaiming). Any input is right, dense or
    sparse: the layer finds the zeros of its input itself.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        density: fraction of the weights that exist, in (0, 1].
        group_size: this many neighbouring output units share one random support (the last group may be smaller). 1 is
            the paper's layer; 16 is up to 3.3x as fast as 1 behind k-winners, and more for dense inputs
            (docs/performance.md).
        sparse_input_grad: compute the input's gradient only where the input is not zero, which is much cheaper: right
            directly behind k-winners, ReLU and dropout, which drop the rest; behind anything else the gradient would be
            wrong.
        device, dtype: of the parameters.

    Shape: x (..., I) -> (..., O), in the dtype of the parameters.

    Raises:
        ValueError: sizes below 1, a density outside (0, 1]; in a call, an x of another shape.
        TypeError: arguments of another type, a dtype that is not float32, float64, bfloat16 or float16; in a call, an x of
            another dtype than the parameters, outside autocast.

    Attributes:
        weight: (blocks, group_size), the existing weights by input, then by group of outputs; where the last group is
            smaller, the lanes past it stay unused. :meth:`densify` lays them out.
        bias: (O,) or None.
        ccol_indices, row_indices: int32 buffers, PyTorch's ``sparse_bsc`` indices of the support, in the state_dict.
            Whoever changes them in place calls the layer once before calling what was compiled of it before.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        group_size: int = 1,
        sparse_input_grad: bool = False,
        device=None,
        dtype=None,
    ):
        _check.density("SparseLinear", density)
        _check.float_dtype("SparseLinear", "dtype", dtype)
        for name, value in (("in_features", in_features), ("out_features", out_features), ("group_size", group_size)):
            _check.integer("SparseLinear", name, value, 1)
        fan_in = max(1, round(density * in_features))
        blocks = fan_in * -(-out_features // group_size)
        self._allocate(in_features, out_features, bias, blocks, group_size, sparse_input_grad, device, dtype)
        self.fan_in = fan_in
        self.reset_parameters()

    def _allocate(self, in_features, out_features, bias, blocks, group_size, sparse_input_grad, device, dtype):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.sparse_input_grad = sparse_input_grad
        self.fan_in: int | None = None  # of every output unit; None where a given mask decides
        self.weight = nn.Parameter(torch.empty(blocks, group_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("ccol_indices", torch.empty(in_features + 1, dtype=torch.int32, device=device))
        self.register_buffer("row_indices", torch.empty(blocks, dtype=torch.int32, device=device))
        self._packed = PackedSupport()

    def reset_parameters(self) -> None:
        """Draws support, weights and bias anew (a support that was given is kept)."""
        if self.weight.is_meta:
            return
        if self.fan_in is not None:
            groups = -(-self.out_features // self.group_size)
            supports = draw_supports(self.in_features, groups, self.fan_in)
            ccol_indices, row_indices = supports_to_indices(supports, self.in_features)
            self.ccol_indices.copy_(ccol_indices)
            self.row_indices.copy_(row_indices)
        self._pack_support()
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        self._zero_unused_lanes()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def _zero_unused_lanes(self) -> None:
        used = self.out_features % self.group_size
        if used and has_values(self.row_indices) and not (self.weight.is_meta or hasattr(self.weight, "full_tensor")):
            last = self.row_indices == self.out_features // self.group_size
            self.weight[last, used:] = 0

    @torch.inference_mode(False)  # what is made in it could not be saved for a backward pass
    @torch.no_grad()
    def _pack_support(self) -> None:
        ccol, rows, group_size = self.ccol_indices, self.row_indices, self.group_size
        made_of, version = rows, None if rows.is_inference() else rows._version
        if group_size >= 16 or not has_values(rows):
            in_registers = group_size % 16 == 0 and has_values(rows)
            plan = plan_groups(ccol, rows, -(-self.out_features // group_size)) if in_registers else None
            self._packed = PackedSupport(made_of, version, plan=plan)
            return
        # Groups too small for a register are as stored a layer without groups, whose kernels are 1.5 to 3 times as fast.
        fits = len(rows) * group_size < 2**31  # the indices are int32
        if group_size > 1 and self.out_features % group_size == 0 and rows.is_cpu and fits:
            ccol, rows, group_size = *split_groups(ccol, rows, group_size), 1
        bits = pack_support(ccol, rows, self.out_features, group_size)
        plan = plan_support(ccol, rows, self.out_features, bits)
        if rows is made_of or bits is None:
            ccol = rows = None
        self._packed = PackedSupport(made_of, version, ccol, rows, bits, plan)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        before, rows = self._packed.made_of, self.row_indices
        if before is not rows:  # for instance on another device
            self._packed = PackedSupport()
            # to_empty() leaves nothing to prepare.
            if has_values(before) and has_values(rows) and torch.equal(before.to(rows.device), rows):
                self._pack_support()
        return self

    def __getstate__(self):
        return self.__dict__ | {"_packed": PackedSupport()}

    def __setstate__(self, state):
        super().__setstate__(state)
        ccol, rows, groups = self.ccol_indices, self.row_indices, -(-self.out_features // self.group_size)
        # A copy of what to_empty() left is no support yet.
        if has_values(ccol) and has_values(rows) and support_problem(ccol, rows, groups) is None:
            self._pack_support()

    def forward(self, x: Tensor) -> Tensor:
        # What is looked up, called and checked here takes as long as the sums of a small layer. Module.__getattr__ is the
        # slowest of all; a parametrized weight is no parameter.
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        ccol, rows, packed = buffers["ccol_indices"], buffers["row_indices"], self._packed
        traced, transformed = is_compiling(), are_transforms_active()
        if traced:
            fits = _fits_traced(packed, rows)
        else:
            fits = packed.made_of is rows and (packed.version is None or packed.version == rows._version)
            if not fits and not transformed:  # under transforms rows may be one of many supports
                self._pack_support()
                packed, fits = self._packed, True
        if not fits:
            packed = PackedSupport()
        if packed.row_indices is not None:
            ccol, rows = packed.ccol_indices, packed.row_indices
        bits, plan = packed.bits, packed.plan
        out_features = self.out_features
        others = ccol, rows, out_features, self.sparse_input_grad, bits, plan
        plain = isinstance(x, Tensor) and x.is_cpu and weight.is_cpu and x.dim() == 2
        if plain and not (traced or transformed or is_any_autocast_enabled()):
            try:  # the op checks shapes and dtypes in a tenth of the time
                if not is_grad_enabled():
                    return eager_forward(x, weight, bias, ccol, rows, out_features, bits, plan)
                return sparse_linear_eager(x, weight, bias, others)
            except RuntimeError:
                pass  # what follows says what is wrong
        prepared = plan if bits is None else bits
        if prepared is not None:
            if prepared.device != buffers["row_indices"].device:  # moved by FSDP, which keeps tensor and version
                self._packed = PackedSupport()
                return self.forward(x)
            if rows is not buffers["row_indices"]:
                weight = weight.reshape(-1, 1)
        return sparse_linear_prepared(x, weight, bias, others)

    @property
    def density(self) -> float:
        """The fraction of the weights that exists, in (0, 1]."""
        return float(self.mask.sum()) / (self.in_features * self.out_features)

    @property
    def mask(self) -> Tensor:
        """Which weights exist: bool (out_features, in_features)."""
        stored = torch.ones(len(self.row_indices), self.group_size, dtype=torch.bool, device=self.row_indices.device)
        return self.densify(stored)

    def densify(self, t: Tensor) -> Tensor:
        """Lays the stored weight, its ``.grad`` or anything of its shape out as dense ``(out_features, in_features)``.

        Differentiable; zeros where no weight exists.
        """
        wanted = f"SparseLinear.densify: wants a tensor of shape {tuple(self.weight.shape)}"
        if not isinstance(t, Tensor):
            raise TypeError(f"{wanted}, got {type(t).__name__}")
        if t.shape != self.weight.shape:
            raise ValueError(f"{wanted}, got {tuple(t.shape)}")
        return densify(whole(t), self.ccol_indices, self.row_indices, self.out_features)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The ``nn.Linear`` that computes the same, with copies of the weights."""
        linear = nn.utils.skip_init(  # draws nothing from torch's generator
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        linear.weight.copy_(self.densify(self.weight))
        if self.bias is not None:
            linear.bias.copy_(whole(self.bias))
        return freeze_as(self, linear.train(self.training))

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        group_size: int = 1,
        sparse_input_grad: bool = False,
    ) -> SparseLinear:
        """Takes over an existing layer: the weights under a mask, or the largest by magnitude.

        Args:
            linear: the dense layer; its weights are copied. On the meta device, which has no values, the mask has none
                either until a state_dict is loaded.
            density: keep this fraction of each output unit's weights, those of largest magnitude (of largest Euclidean
                norm over a group); exactly one of density and mask is given.
            mask: bool (O, I), which weights to keep; any pattern, for instance that of a pruned layer. Rows must be
                alike within each group.
            group_size, sparse_input_grad: as in the constructor.

        Raises:
            ValueError: none or both of density and mask, a density outside (0, 1], a group_size below 1, a mask of another
                shape or whose rows differ within a group, weights without values (on the meta device).
            TypeError: not an nn.Linear of a floating-point dtype, a mask that is not bool, arguments of another type.
        """
        op = "SparseLinear.from_dense"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{op}: wants an nn.Linear, got {type(linear).__name__}")
        if (density is None) == (mask is None):
            raise ValueError(
                f"{op}: wants exactly one of density and mask, got {'both' if mask is not None else 'none'}"
            )
        _check.integer(op, "group_size", group_size, 1)
        _check.is_float_tensor(op, "linear.weight", linear.weight)
        fan_in = None
        if density is not None:
            _check.density(op, density)
            _check.has_values(op, "linear.weight", linear.weight)
            fan_in = max(1, round(density * linear.in_features))
            mask = magnitude_mask(linear.weight, fan_in, group_size)
        elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{op}: wants a bool tensor for mask, got {getattr(mask, 'dtype', type(mask).__name__)}")
        _check.shape(op, "mask", mask, (linear.out_features, linear.in_features))
        _check.has_values(op, "mask", mask)
        ccol_indices, row_indices = mask_to_indices(mask, group_size)
        layer = cls.__new__(cls)
        layer._allocate(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            len(row_indices),
            group_size,
            sparse_input_grad,
            linear.weight.device,
            linear.weight.dtype,
        )
        layer.ccol_indices.copy_(ccol_indices)
        layer.row_indices.copy_(row_indices)
        layer._pack_support()
        layer.weight.copy_(compress(linear.weight, layer.ccol_indices, layer.row_indices, group_size))
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        return freeze_as(linear, layer.train(linear.training))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        problem = self._misfit(state_dict, prefix)
        if problem is None:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
            self._pack_support()
            self._zero_unused_lanes()
            return
        errors.append(f"SparseLinear {prefix.rstrip('.') or '(root)'}: {problem}; nothing of this layer was loaded")
        if strict:
            own = self._parameters | self._buffers
            missing += [prefix + n for n, t in own.items() if t is not None and prefix + n not in state_dict]

    def _misfit(self, state_dict, prefix) -> str | None:
        """What is wrong with a state_dict, if anything; of the indices that it lacks the layer's own count."""
        given = {name: state_dict.get(prefix + name) for name in ("weight", "bias", "ccol_indices", "row_indices")}
        given = {name: t for name, t in given.items() if t is not None}
        for name, t in given.items():
            if not isinstance(t, Tensor):
                return f"wants a tensor for {name}, got {type(t).__name__}"
            if name.endswith("indices") and (t.dtype != torch.int32 or t.dim() != 1):
                return f"wants {name} of one dimension in int32, got {t.dtype} of shape {tuple(t.shape)}"
        ccol, row = (given.get(name, self._buffers[name]) for name in ("ccol_indices", "row_indices"))
        weight, bias = given.get("weight"), given.get("bias")
        if weight is not None and (weight.dim() != 2 or weight.shape[1] != self.group_size):
            return f"wants weights of group_size {self.group_size}, got shape {tuple(weight.shape)}"
        if len(ccol) != self.in_features + 1:
            return f"wants in_features {self.in_features}, got {len(ccol) - 1}"
        blocks, weights = len(self.row_indices), len(row) if weight is None else len(weight)
        if len(row) != blocks or weights != blocks:
            return f"wants {blocks} blocks (fan-in times groups), got {len(row)} and {weights} weights"
        if self.bias is not None and bias is not None and bias.shape != self.bias.shape:
            return f"wants out_features {self.out_features}, got a bias of shape {tuple(bias.shape)}"
        if not (given.keys() & {"ccol_indices", "row_indices"} and has_values(ccol) and has_values(row)):
            return None
        groups = -(-self.out_features // self.group_size)
        problem = support_problem(ccol.to(row.device), row, groups)
        if problem is not None or self.fan_in is None:
            return problem
        even = (torch.bincount(row.long(), minlength=groups) == self.fan_in).all()
        return None if even else f"wants fan-in {self.fan_in} for every output unit, got another"

    def extra_repr(self) -> str:
        support = f"fan_in={self.fan_in}" if self.fan_in is not None else f"weights={self.weight.numel()}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{support}, group_size={self.group_size}" + (", sparse_input_grad=True" if self.sparse_input_grad else "")
        )


def _fits_traced(packed: PackedSupport, rows: Tensor) -> bool:
    """While a layer is traced: whether packed was made of rows, as far as can be told.

    In-place changes after the trace are not seen: the layer is then to be called once outside of it.
    """
    if is_exporting() and not is_dynamo_compiling():  # rows stands for a tensor
        mode, made_of = getattr(rows, "fake_mode", None), packed.made_of
        return mode is not None and made_of is not None and mode.from_tensor(made_of, static_shapes=True) is rows
    if packed.made_of is not rows:
        return False
    return packed.version is None or is_exporting() or _is_version(rows, packed.version)


@torch.compiler.assume_constant_result
def _is_version(t: Tensor, version: int) -> bool:
    """Called with the tensor itself while a graph that has it as an input is traced."""
    return t._version == version
