"""Quantised linears: the weights that they stand for, plain linears in their place, and quantising these again."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .unread import Unread

Linear = Any
"""A linear of whatever library: with attributes that `nn.Module` does not tell the types of."""

_BITSANDBYTES = ("Params4bit", "Int8Params")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_quantised(weight: object) -> bool:
    """Whether a parameter is a quantised weight of a kind that is known here: bitsandbytes' or torchao's."""
    kind = type(weight)
    return kind.__name__ in _BITSANDBYTES or kind.__module__.startswith("torchao.")


def check_foldable(linear: nn.Module | nn.Parameter) -> None:
    """Refuse a linear, or the stacked weights of experts, if the weights can't be had.

    Raises:
        ValueError: if they are quantised in an unknown way, or in one that can't be undone.
    """
    weight: Any = linear if isinstance(linear, nn.Parameter) else getattr(linear, "weight", None)
    is_plain = type(weight).__module__.startswith("torch.") or type(weight) in (torch.Tensor, Unread)
    if not (is_quantised(weight) or (is_plain and weight.dtype in _FLOATING)):
        kind = type(linear)
        raise ValueError(
            f"Adapters can't be folded into a {kind.__name__} of {kind.__module__}: its weights are quantised in a way "
            "that is not known here (those of bitsandbytes and torchao are). Ways out: load the base model without "
            "quantisation, put the adapter on it with `PeftModel.from_pretrained`, and merge that; or use the adapter "
            "unmerged."
        )
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked its 4-bit weights for this CPU (AVX512-BF16) in a forward without gradients, "
            "and there is no exact way back. Load base model and adapter again, and merge before the first forward."
        )


@torch.no_grad()
def weight_of(linear: Linear) -> torch.Tensor:
    """The weight of a linear; if it is quantised, the one `(o, d)` that it computes with, in float32."""
    weight = linear.weight
    if not is_quantised(weight):
        return weight
    if type(weight).__name__ not in _BITSANDBYTES:
        return weight.dequantize().float()
    from bitsandbytes import functional

    if type(weight).__name__ == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = linear.compute_dtype or torch.float32  # not that of the checkpoint, nor in a forward
        return functional.dequantize_4bit(weight.data, state).float()
    if weight.dtype != torch.int8:  # `llm_int8_has_fp16_weight`: quantised in each forward
        return weight.data.float()
    scale = linear.state.SCB if weight.SCB is None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scale.to(weight.device))


class Dequantiser:
    """Makes plain linears to take the place of quantised ones.

    Args:
        dtype: Their dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, linear: Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """What stands in the model for `linear`, with the weight `(o, d)` and the bias `(o,)`."""
        with torch.device("meta"):
            source: Any = getattr(linear, "source_cls", None)
            if source is Conv1D:  # which has been turned around
                new, weight = Conv1D(linear.out_features, linear.in_features), weight.T.contiguous()
            else:
                new = nn.Linear(linear.in_features, linear.out_features, bias=False)
        new.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        new.bias = self._bias(bias)
        return new.train(linear.training)

    def _bias(self, bias: torch.Tensor | None) -> nn.Parameter | None:
        return None if bias is None else nn.Parameter(bias.to(self.dtype), requires_grad=False)


class Requantiser(Dequantiser):
    """Quantises folded linears as those were whose place they take, and keeps account of what that loses.

    Args:
        model: The base model with adapters in it.

    Raises:
        ValueError: if it is not one that bitsandbytes has quantised.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(unquantised_dtype(model))
        kinds = {type(parameter).__name__ for parameter in model.parameters() if is_quantised(parameter)}
        if not kinds or not kinds <= set(_BITSANDBYTES):
            found = f"has weights of the kind {', '.join(sorted(kinds))}" if kinds else "is not quantised"
            raise ValueError(f"`requantize=True` needs a base model quantised by bitsandbytes, but this one {found}.")
        self._error = self._change = self._size = 0.0

    def __call__(self, linear: Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        old, new = linear.weight, copy.copy(linear)
        if type(old).__name__ == "Params4bit":
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            settings = {name: getattr(old, name) for name in names} | {"module": new}
            made = type(old)(weight.to(old.quant_state.dtype), **settings)
        else:
            new.state = copy.copy(linear.state)
            new.state.reset_grads()
            made = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        new._parameters = linear._parameters | {"weight": made.to(old.device), "bias": self._bias(bias)}
        self._error += (weight_of(new) - weight).square().sum().item()
        self._change += (weight - weight_of(linear)).square().sum().item()
        self._size += weight.square().sum().item()
        return new

    def warn(self) -> None:
        """Say what quantising again has cost, if anything was folded."""
        if self._change:
            of_weights, of_change = (100 * math.sqrt(self._error / whole) for whole in (self._size, self._change))
            warnings.warn(
                f"The folded linears were quantised again, with an error of {of_weights:.2f} % of their weights, which "
                f"is {of_change:.0f} % of the change that the adapter made to them (Frobenius norms): this is not the "
                "model that was trained. Without `requantize=True` it is; or compare both on your data.",
                stacklevel=4,
            )


def unquantised_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model whose linears may be quantised: that of its embeddings."""
    return next(model.get_input_embeddings().parameters()).dtype


@torch.no_grad()
def dequantise(model: PreTrainedModel) -> None:
    """Put plain linears in the place of those that are quantised, one by one, and make of `model` an ordinary one."""
    dequantiser = Dequantiser(unquantised_dtype(model))
    for name in [n for n, m in model.named_modules() if is_quantised(getattr(m, "weight", None))]:
        linear: Linear = model.get_submodule(name)
        model.set_submodule(name, dequantiser(linear, weight_of(linear), linear.bias))
    in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():  # quantised linears took any dtype, plain ones don't
        if not any(kept in name for kept in in_float32):
            parameter.data = parameter.data.to(dequantiser.dtype)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for attribute in ("quantization_config", "_is_quantized"):
                vars(module.config).pop(attribute, None)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(attribute, None)
