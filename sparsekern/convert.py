"""Whole models: swapping the layers of an existing model for sparse ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from sparsekern.nn.sparse_conv2d import SparseConv2d
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.ops import _check


def sparsify_(
    model: nn.Module,
    *,
    density: float,
    group_size: int = 1,
    skip: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    sparse_input_grad: bool = False,
) -> dict[str, str]:
    """Swaps a model's ``nn.Linear`` and ``nn.Conv2d`` layers for sparse ones, in place, and says what it swapped.

    Linear layers keep, for each group of output units, the weights of largest magnitude
    (:meth:`SparseLinear.from_dense`). Convolutions keep all their weights: they gain from zeros in their input. Layers that
    no sparse layer computes (subclasses with a forward of their own, grouped or dilated convolutions, parametrised layers)
    are left alone, and a layer used in several places is swapped in all. Build the optimizer afterwards, and train on: the
    weights that are cut off are missed.

    Args:
        model: changed in place; must not itself be an ``nn.Linear`` or ``nn.Conv2d``.
        density: of the linear layers, in (0, 1].
        group_size: of the linear layers.
        skip: names of submodules to leave alone, with all that is below them, or a function of name and module.
        sparse_input_grad: for every new layer; right only where each is directly behind k-winners, ReLU or dropout.

    Returns:
        The swapped layers: name -> what stands there now.

    Raises:
        ValueError, TypeError: bad arguments or an unknown name in skip, before anything is changed.
    """
    _check_model("sparsify_", model)
    _check.density("sparsify_", density)
    _check.integer("sparsify_", "group_size", group_size, 1)
    skipped = _skipper(model, skip)

    def swap(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear and not _parametrised(module):
            return SparseLinear.from_dense(
                module, density=density, group_size=group_size, sparse_input_grad=sparse_input_grad
            )
        if type(module) is nn.Conv2d and _convertible(module):
            return SparseConv2d.from_dense(module, sparse_input_grad=sparse_input_grad)
        return None

    return _swap_all("sparsify_", model, swap, skipped)


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
    return {name: repr(new) for name, new in places}


def _skipper(model: nn.Module, skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = {skip} if isinstance(skip, str) else set(skip)
    unknown = names - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"sparsify_: wants names of submodules in skip, got {sorted(unknown)}, which the model lacks")
    return lambda name, module: any(name == s or name.startswith(s + ".") for s in names)


def _parametrised(module: nn.Module) -> bool:
    return nn.utils.parametrize.is_parametrized(module)


def _convertible(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    same = conv.padding == "same" and (conv.stride != (1, 1) or any(k % 2 == 0 for k in conv.kernel_size))
    return plain and not same and not _parametrised(conv)
