"""What a model costs to run, counted on the meta device: parameters, operations, bytes. Nothing here is measured."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
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

    Where its forward needs values, as routing to experts does, or more than text, only parameters are counted.
    """
    parameters = sum(p.numel() for p in model.parameters())
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= limit] or [limit]
    kv_bytes, prefill = None, {}
    try:
        for length in lengths:
            with FlopCounterMode(display=False) as counter:
                model(**_tokens(length), use_cache=False)
            prefill[length] = counter.get_total_flops()
        cache = DynamicCache()  # without the configuration, no window cuts it off
        model(**_tokens(8), past_key_values=cache, use_cache=True)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        kv_bytes = sum(t.numel() * t.itemsize for t in tensors) // 8
    except Exception as error:  # whatever a family does with values that are not there
        logger.info("The work of %s can't be counted: %s", type(model).__name__, error)
    return Work(parameters, kv_bytes, prefill)


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
