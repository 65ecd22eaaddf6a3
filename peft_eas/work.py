"""What a model costs to run, counted on the meta device: parameters, operations, bytes. Nothing here is measured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

logger = logging.getLogger(__name__)

LENGTHS = (512, 2048)
"""Tokens for which operations are counted."""


@dataclass(frozen=True)
class Work:
    """Counts of one model, for the text that it reads and writes.

    Attributes:
        parameters: Parameters; one in several places counts once.
        kv_bytes: Bytes that a token takes in the KV cache, `None` if that can't be counted. Sliding windows, which stop
            growing, are counted as if they did not.
        prefill: `{tokens: floating-point operations of the matrix products that read so many}`, without what can't be
            counted. Each token is taken to look at all others.
    """

    parameters: int
    kv_bytes: int | None = None
    prefill: dict[int, int] = field(default_factory=dict)


@torch.no_grad()
def count(model: PreTrainedModel) -> Work:
    """Count a model on the meta device.

    Where its forward needs values, as routing to experts does, or more than text, only parameters are counted. Layers
    that are built alike and are given as much cost as much: one of them is counted.
    """
    parameters = sum(p.numel() for p in model.parameters())
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= limit] or [limit]
    kv_bytes = _tried(_kv_bytes, model)
    prefill = {length: _tried(_operations, model, length) for length in lengths}
    return Work(parameters, kv_bytes, {length: found for length, found in prefill.items() if found is not None})


def _tried(counting: Callable[..., int], model: PreTrainedModel, *args: int) -> int | None:
    """What is counted with one layer of each kind, or, where layers hand on more than they return, with all."""
    for running in (_each_kind_once, _each):
        try:
            return counting(running, model, *args)
        except Exception as error:  # whatever a family does with values that are not there
            logger.info("The work of %s can't be counted: %s", type(model).__name__, error)
            if isinstance(error, RuntimeError):  # torch's, of the meta device
                break
    return None


def _operations(running: Callable, model: PreTrainedModel, length: int) -> int:
    with FlopCounterMode(display=False) as counter, running(model, counter.get_total_flops) as repeated:
        model(**_tokens(length), use_cache=False)
    return counter.get_total_flops() + sum(repeated)


def _kv_bytes(running: Callable, model: PreTrainedModel) -> int:
    cache = DynamicCache()  # without the configuration, no window cuts it off
    with running(model, lambda: _bytes_of(cache)) as repeated:
        model(**_tokens(8), past_key_values=cache, use_cache=True)
    return (_bytes_of(cache) + sum(repeated)) // 8


@contextmanager
def _each(model: nn.Module, spent: Callable[[], int]) -> Iterator[list[int]]:
    """Inside, all layers run, and nothing is repeated."""
    yield []


@contextmanager
def _each_kind_once(model: nn.Module, spent: Callable[[], int]) -> Iterator[list[int]]:
    """Inside, of the layers that are built alike and are given as much, the first runs, and the others return what it
    did. Yields a list of how much more would have been `spent`."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [own for name, own in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    runs: dict[Hashable, tuple[Any, int]] = {}
    repeated: list[int] = []

    def run(layer: nn.Module, built: Hashable, *args: Any, **kwargs: Any) -> Any:
        given = [*enumerate(args), *kwargs.items()]
        kind = (built, *((name, value.shape) for name, value in given if isinstance(value, torch.Tensor)))
        if kind in runs:
            output, cost = runs[kind]
            repeated.append(cost)
            return output
        before = spent()
        output = type(layer).forward(layer, *args, **kwargs)
        runs[kind] = output, spent() - before
        return output

    layers = [layer for own in outer for layer in own if "forward" not in vars(layer)]
    for layer in layers:
        built = (
            *((name, type(m)) for name, m in layer.named_modules()),
            *((n, p.shape) for n, p in layer.named_parameters()),
        )
        layer.forward = partial(run, layer, built)
    try:
        yield repeated
    finally:
        for layer in layers:
            del layer.forward


def _bytes_of(cache: DynamicCache) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.itemsize for t in tensors)


def _tokens(length: int) -> dict[str, torch.Tensor]:
    # without a mask, transformers looks at the positions' values
    return {name: torch.ones(1, length, dtype=torch.long, device="meta") for name in ("input_ids", "attention_mask")}


def base_of(merged: PreTrainedModel) -> PreTrainedModel:
    """The model that `merged` was before, with all of its attentions; on the meta device, so without values."""
    base_class: Any = type(merged).__bases__[1]
    config = copy.deepcopy(merged.config)
    config.__class__ = base_class.config_class
    text = config.get_text_config(decoder=True)
    recorded = (text.to_dict().get("per_layer_config") or {}).values()
    if all(set(layer) == {"skip"} for layer in recorded):  # not the family's own
        text.per_layer_config = None
    return _built(base_class, config, merged)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """A model like `model`, on the meta device."""
    return _built(type(model), copy.deepcopy(model.config), model)


def _built(cls: type[PreTrainedModel], config: object, like: PreTrainedModel) -> PreTrainedModel:
    # other attentions look at the mask's values; other experts may run without values, and are not counted
    with torch.device("meta"):
        return cls._from_config(config, dtype=like.dtype, attn_implementation="eager", experts_implementation="eager")
