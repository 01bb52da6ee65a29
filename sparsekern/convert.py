"""Whole models: swapping the layers of an existing model for sparse ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn import functional as F

from sparsekern.nn.sparse_conv2d import SparseConv2d
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops import _check


class Swapped(dict[str, str]):
    """The swapped layers: name -> what stands there now."""

    left_alone: dict[str, str]  # name -> why, of each other nn.Linear and nn.Conv2d


def sparsify_(
    model: nn.Module,
    *,
    density: float,
    group_size: int = 1,
    skip: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    sparse_input_grad: bool = False,
) -> Swapped:
    """Swaps a model's ``nn.Linear`` and ``nn.Conv2d`` layers for sparse ones, in place, and says what it swapped.

    Linear layers keep, for each group of output units, the weights of largest magnitude
    (:meth:`SparseLinear.from_dense`). Convolutions keep all their weights: they gain from zeros in their input. Layers that
    no sparse layer computes (subclasses with a forward of their own, grouped or dilated convolutions, parametrised layers,
    layers with hooks, such as ``weight_norm``'s, or of complex numbers) are left alone, and a layer used in several places
    is swapped in all. A weight tied to another layer's is so no longer: each gets a copy. A frozen parameter stays frozen.
    ``nn.TransformerEncoderLayer`` leaves PyTorch's fast path of eval mode, which reads the weights of its layers itself.
    Build the optimizer afterwards.

    Args:
        model: changed in place; must not itself be an ``nn.Linear`` or ``nn.Conv2d``.
        density: of the linear layers, in (0, 1].
        group_size: of the linear layers.
        skip: names of submodules to leave alone, with all that is below them, or a function of name and module.
        sparse_input_grad: for every new layer; right only where each is directly behind k-winners, ReLU or dropout.

    Returns:
        The swapped layers: name -> what stands there now; its ``left_alone`` says which ones were not, and why.

    Raises:
        ValueError, TypeError: bad arguments or an unknown name in skip, before anything is changed.
    """
    _check_model("sparsify_", model)
    _check.density("sparsify_", density)
    _check.integer("sparsify_", "group_size", group_size, 1)
    skipped = _skipper(model, skip)

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or _why_not(module):
            return None
        if isinstance(module, nn.Conv2d):
            return SparseConv2d.from_dense(module, sparse_input_grad=sparse_input_grad)
        return SparseLinear.from_dense(
            module, density=density, group_size=group_size, sparse_input_grad=sparse_input_grad
        )

    swapped = Swapped()
    swapped.left_alone = {}

    def skipped_or_noted(name: str, module: nn.Module) -> bool:
        if skipped(name, module):
            return True
        why = _why_not(module) if isinstance(module, (nn.Linear, nn.Conv2d)) else None
        if why:
            swapped.left_alone[name] = why
        return False

    swapped.update(_swap_all("sparsify_", model, swap, skipped_or_noted))
    return swapped


def densify_(model: nn.Module) -> dict[str, str]:
    """Swaps a model's sparse layers for the ``nn.Linear`` and ``nn.Conv2d`` that compute the same, in place.

    Returns:
        The swapped layers: name -> what stands there now.

    Raises:
        TypeError: not an nn.Module, or itself a sparse layer, which cannot be swapped in place.
    """

    def swap(module: nn.Module) -> nn.Module | None:
        return module.to_dense() if isinstance(module, (SparseLinear, SparseConv2d)) else None

    _check_model("densify_", model)
    return _swap_all("densify_", model, swap, lambda name, module: False)


def _check_model(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: wants an nn.Module, got {type(model).__name__}")


def _swap_all(op: str, model: nn.Module, swap, skipped) -> dict[str, str]:
    if swap(model) is not None:
        raise TypeError(f"{op}: wants a model that contains layers, got a single {type(model).__name__}")
    replacements: dict[nn.Module, nn.Module | None] = {}
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not skipped(name, module):
            if module not in replacements:
                replacements[module] = swap(module)
            if replacements[module] is not None:
                places.append((name, replacements[module]))
    for name, new in places:  # only now: an error above leaves the model as it was
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    _choose_paths(model, {model.get_submodule(name.rpartition(".")[0]) for name, _ in places})
    return {name: repr(new) for name, new in places}


def _skipper(model: nn.Module, skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = {skip} if isinstance(skip, str) else set(skip) if isinstance(skip, Iterable) else {skip}
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"sparsify_: wants names of submodules or a function for skip, got {skip!r}")
    unknown = names - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"sparsify_: wants names of submodules in skip, got {sorted(unknown)}, which the model lacks")
    return lambda name, module: any(name == s or name.startswith(s + ".") for s in names)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _why_not(module: nn.Linear | nn.Conv2d) -> str | None:
    """Why no sparse layer computes what a module does, or None."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(module).__name__}"
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrised"
    if any(getattr(module, name) for name in HOOKS):
        return "it has hooks"
    if module.weight.dtype not in _check.DTYPES:
        return f"it is of {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "it has no weights"
    return _why_not_conv(module) if isinstance(module, nn.Conv2d) else None


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return "it has groups"
    if conv.dilation != (1, 1):
        return "it is dilated"
    if conv.padding_mode != "zeros":
        return f"it pads by {conv.padding_mode!r}"
    if conv.padding == "same" and (conv.stride != (1, 1) or any(k % 2 == 0 for k in conv.kernel_size)):
        return "it pads its two sides differently"
    return None


def _choose_paths(model: nn.Module, parents: set[nn.Module]) -> None:
    """Keeps transformer layers whose children were swapped off the path that reads those children's weights itself."""
    for layer in parents:
        if isinstance(layer, nn.TransformerEncoderLayer):
            act, dense = layer.activation, type(layer.linear1) is type(layer.linear2) is nn.Linear
            relu, gelu = act is F.relu or isinstance(act, nn.ReLU), act is F.gelu or isinstance(act, nn.GELU)
            layer.activation_relu_or_gelu = 0 if not dense else 1 if relu else 2 if gelu else 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and parents & set(encoder.modules()):
            encoder.use_nested_tensor = False  # which only that path takes
