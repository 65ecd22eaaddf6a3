"""Stand-ins: the constant that a skipped attention leaves, and what attentions add to the residual stream at all.

Equation (2) of docs/method.md: `x' = x + c`, where `c (d,)` starts at the mean of `a(x)`, what the attention adds to
the stream `x (B, T, d)`: after the norms on its output, and before a norm of the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from .batches import arguments_of, arguments_seen, batches_of, counted_tokens, evaluating, explaining, hooks
from .families import Arm, Layers, find_layers
from .layer import EASAttention, EASLayer
from .model import EASModel
from .runtime.eas_attention import Bypass

Means = dict[int | str, torch.Tensor]
"""`{attention: mean (d,) of what it adds}`, in float64 on the CPU."""


@torch.no_grad()
def initialize_eas_weights(
    model: nn.Module, dataloader: Iterable[dict[str, torch.Tensor]], adapter_name: str | None = None
) -> None:
    """Start the stand-ins of an adapter at the mean of what each attention adds to the residual stream.

    One pass without gradients through the base model, as a whole and in eval mode; the means are over the tokens of all
    batches, in all processes, that are no padding and, in decoders, not the first of their sequence. Nothing else
    changes. An `EASCallback` does this when a training begins.

    Args:
        model: What `get_peft_model(model, EASConfig(...))` returned, or a wrapper of it that can be called.
        dataloader: Batches `{input_ids, attention_mask, ...}` of the task, about a thousand tokens in all or more.
        adapter_name: Adapter; the active one by default.

    Raises:
        ValueError: for a model or adapter without stand-ins, while it is merged, without any tokens, for batches that
            the model does not take, and for values that are not finite; nothing is changed then.
    """
    tuner = eas_model(model)
    adapter_name = tuner.named(adapter_name)
    if not tuner.stand_ins(adapter_name):
        raise ValueError(
            f"Adapter {adapter_name!r} has no stand-ins: it skips nothing, or was made with `stand_in='zero'`."
        )
    if any(isinstance(module, EASLayer) and module.merged for module in tuner.modules()):
        raise ValueError("The adapter is merged: call `unmerge_adapter()` before its stand-ins are measured.")

    def forward(batch: dict[str, torch.Tensor]) -> None:
        with explaining():
            model(**arguments_of(batch, tuner.model))

    fill_stand_ins(tuner, adapter_name, batches_of(dataloader), forward)


def fill_stand_ins(tuner: EASModel, adapter_name: str, batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Start the stand-ins of an adapter at the means of the attentions in what `forward` computes of each batch."""
    with tuner.without_adapters(), evaluating(tuner):
        means = attention_means(tuner.model, find_layers(tuner.model), batches, forward, tuner)
    for key, parameter in tuner.stand_ins(adapter_name).items():
        _fill(parameter, means[key])
    for module in tuner.modules():
        if isinstance(module, EASAttention):
            module.measured.add(adapter_name)


def are_zero(stand_ins: Iterable[nn.Parameter]) -> bool:
    """Whether all of these stand-ins are zero, as they are before they are measured or trained."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in map(torch.Tensor.detach, stand_ins))
    return not sum(int(stand_in.any()) for stand_in in whole)  # looks at all: processes have to gather alike


def attention_means(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    caller: nn.Module | None = None,
) -> Means:
    """The mean of what each attention of `model` adds to the stream, over all processes.

    Args:
        model: The transformers model, in eval mode.
        layers: The attentions.
        batches: Batches.
        forward: What is done with each, if that isn't `model(**batch)`; it may run several forwards of `model`.
        caller: What calls `model.forward`, if that goes around the model's hooks.

    Raises:
        ValueError: without any tokens, and for means that are not finite.
    """
    forward = forward or (lambda batch: model(**arguments_of(batch, model)))
    sums: dict[int | str, torch.Tensor | float] = dict.fromkeys(layers, 0.0)
    counts = dict.fromkeys(layers, 0)

    def add(key: int | str, arm: Arm, before: torch.Tensor, added: torch.Tensor) -> None:
        kept = added[counted_tokens(seen, arm.row, added.shape[:-1], added.device)]
        sums[key] = sums[key] + kept.double().sum(dim=0).cpu()
        counts[key] += len(kept)

    with arguments_seen(*dict.fromkeys([model, caller or model])) as seen, watching(model, layers, add):
        for batch in batches:
            forward(batch)
    gathered = gather_object([(sums, counts)])
    means = {}
    for key in layers:
        count = sum(counts[key] for _, counts in gathered)
        if not count:
            raise ValueError(f"The dataloader gave no tokens to measure the attention {key} with.")
        means[key] = sum(sums[key] for sums, _ in gathered) / count
    wrong = [key for key, mean in means.items() if not torch.isfinite(mean).all()]
    if wrong:
        raise ValueError(
            f"What the attentions {wrong} add is not finite: look for NaN in the model's weights or in the batches."
        )
    return means


@contextmanager
def watching(
    model: nn.Module, layers: Layers, see: Callable[[int | str, Arm, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `see(attention, arm, before, added)` for each call of an attention in forwards inside of the `with`.

    `before (B, T, d)` is the residual stream, `added (B, T, d)` what the attention adds to it.
    """
    streams: dict[int | str, torch.Tensor] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict, key: int | str) -> None:
        streams[key] = args[0] if args else kwargs["hidden_states"]

    def compare(module: nn.Module, args: tuple, output: Any, key: int | str) -> None:
        arm, before = layers[key], streams.pop(key)
        output = output[0] if isinstance(output, tuple) else output
        see(key, arm, before, output - before if arm.row.adds_residual or arm.row.core else output)

    def before_norm(norm: nn.Module, args: tuple, key: int | str) -> None:
        see(key, layers[key], streams[key], args[0] - streams.pop(key))

    with hooks() as handles:
        for key, arm in layers.items():
            layer, row = model.get_submodule(arm.layer), arm.row
            attention = layer.get_submodule(row.attention)
            # where the residual stream is read: by the attention's own norm, by the layer, or by the attention
            names = dict(layer.named_modules())
            norms = [name for name in row.attention_norms if name in names]
            reader = layer.get_submodule(norms[0]) if norms else attention if row.context or row.core else layer
            handles.append(reader.register_forward_pre_hook(functools.partial(remember, key=key), with_kwargs=True))
            if row.residual_norm:
                norm = attention.get_submodule(row.residual_norm)
                handles.append(norm.register_forward_pre_hook(functools.partial(before_norm, key=key)))
                continue
            # a norm after the attention is part of what it adds
            behind = [name for name in row.output_norms if name in names]
            last = layer.get_submodule(behind[-1]) if behind else attention
            handles.append(last.register_forward_hook(functools.partial(compare, key=key)))
        yield


@contextmanager
def replaced(model: nn.Module, arm: Arm, stand_in: torch.Tensor) -> Iterator[None]:
    """Forwards inside of the `with` have `stand_in (d,)` where this attention is."""
    layer, row = model.get_submodule(arm.layer), arm.row
    attention = layer.get_submodule(row.attention)
    bypass = Bypass(row, arm.index, getattr(attention, "base_layer", attention))

    def constant(output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output) + stand_in.to(output)

    def instead(attention: nn.Module, args: tuple, kwargs: dict, output: Any) -> torch.Tensor | tuple:
        added = constant(output[0] if isinstance(output, tuple) else output)
        return bypass.returned(bypass.stream(args, kwargs, attention, added), args, kwargs)

    names = dict(layer.named_modules())
    behind = [name for name in row.output_norms if name in names]
    with hooks() as handles:
        if behind:
            last = layer.get_submodule(behind[-1])
            handles.append(last.register_forward_hook(lambda module, args, output: constant(output)))
        else:
            handles.append(attention.register_forward_hook(instead, with_kwargs=True))
        yield


def eas_model(model: nn.Module) -> EASModel:
    """The EAS tuner in `model`.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, EASModel):
            return module
    raise ValueError(
        f"This needs a model with an EAS adapter, and got a {type(model).__name__} without one: make it with "
        "`get_peft_model(model, EASConfig(...))`."
    )


def _fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):  # sharded by FSDP2
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
