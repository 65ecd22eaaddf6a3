"""What reads the input of an attention or a FFN: linears, routers and the stacked weights of experts."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import pia
from .adapter import Dense
from .families import Place
from .quantized import Dequantiser, Linear, is_quantised, weight_of
from .shards import shape_of


def readers_of(module: nn.Module, place: Place, is_ffn: bool) -> tuple[tuple[str, ...], int]:
    """Names of what reads the input of an attention or a FFN, and the size of that input; `(), 0` if it has no adapter.

    Raises:
        ValueError: if it has none of what the family's row names, or another tuner's adapter on some of it.
    """
    named = place.row.ffn_inputs if is_ffn else place.row.attention_inputs
    if not named:
        return (), 0
    # rows name all that some layers have
    names = tuple(name for given in named for name in _meant(module, given))
    if not names:
        raise ValueError(
            f"{type(module).__name__} of layer {place.index} has none of {', '.join(named)}, which the family's row "
            "names as what reads its input."
        )
    for name in names:
        if isinstance(reader(module, name), BaseTunerLayer):
            kind = type(reader(module, name)).__module__
            raise ValueError(
                f"{name} of layer {place.index} has an adapter of another kind ({kind}), which folding would lose: "
                "merge or unload that one first."
            )
    return names, _in_features(reader(module, names[0]), place.row.stacked_axis)


def _meant(module: nn.Module, given: str) -> list[str]:
    """What a name in a row stands for here: nothing, or several modules if there is a `*` in it."""
    if "*" in given:
        return fnmatch.filter(dict(module.named_modules()), given)
    there = (name for name in given.split("|") if not isinstance(reader(module, name), (type(None), nn.Identity)))
    return list(there)[:1]


def reader(module: Any, name: str) -> Linear:
    """A linear or a stacked weight of `module` by its name, `""` for the module itself; `None` if there is none."""
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)
    return module


def tensors_of(linear: nn.Module | nn.Parameter) -> list[torch.Tensor]:
    """The parameters of a linear, or a stacked weight itself."""
    return [linear] if isinstance(linear, nn.Parameter) else list(linear.parameters())


def _is_transposed(linear: nn.Module) -> bool:
    return isinstance(linear, Conv1D)


def _in_features(linear: Linear, stacked_axis: int) -> int:
    if isinstance(linear, nn.Parameter):
        return shape_of(linear)[stacked_axis]
    if hasattr(linear, "in_features"):
        return linear.in_features
    return shape_of(linear.weight)[0 if _is_transposed(linear) else -1]


def folded(
    linear: Linear, stacked_axis: int, adapter: Dense, has_bias: bool, unquantised: Dequantiser
) -> nn.Module | nn.Parameter:
    """A linear, or the stacked weights of experts, with an adapter folded in; of the same class, if not quantised.

    Args:
        linear: What reads what the adapter gives.
        stacked_axis: Which axis of stacked weights is the input's.
        adapter: The adapter.
        has_bias: Whether its bias is folded in, too.
        unquantised: Makes what takes the place of a quantised linear.
    """
    is_stacked = isinstance(linear, nn.Parameter)
    is_transposed = stacked_axis == -2 if is_stacked else _is_transposed(linear)
    weight, bias = _weight_and_bias(linear)
    added = adapter.bias if has_bias else None
    matrix = weight.mT if is_transposed else weight
    new_matrix, new_bias = pia.fold(matrix, bias, adapter.down, adapter.up, added)
    if not is_stacked and is_quantised(linear.weight):
        return unquantised(linear, new_matrix, new_bias)
    new_weight = nn.Parameter(
        new_matrix.mT.contiguous() if is_transposed else new_matrix, requires_grad=weight.requires_grad
    )
    if is_stacked:
        return new_weight
    new = copy.copy(linear)
    new._parameters = linear._parameters | {"weight": new_weight}
    if new_bias is not None:
        new._parameters["bias"] = nn.Parameter(new_bias, requires_grad=weight.requires_grad)
    return new


def folds_finitely(linear: Linear, stacked_axis: int, adapter: Dense, has_bias: bool, unquantised: Dequantiser) -> bool:
    """Whether all that `folded` returns of these is finite; folds only where sizes don't tell."""
    weight, bias = _weight_and_bias(linear)
    added = adapter.bias if has_bias else None
    dtype = unquantised.dtype if is_quantised(getattr(linear, "weight", None)) else weight.dtype
    # half of what there is room for, as sums are rounded
    if pia.largest(weight, bias, adapter.down, adapter.up, added) < torch.finfo(dtype).max / 2:
        return True
    made = folded(linear, stacked_axis, adapter, has_bias, unquantised)
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(made))


def _weight_and_bias(linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (linear, None) if isinstance(linear, nn.Parameter) else (weight_of(linear), getattr(linear, "bias", None))
