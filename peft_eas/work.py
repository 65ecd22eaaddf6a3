"""What a model costs to run, counted from its shapes: parameters, operations, bytes. Nothing here is measured."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

ONCE = ("prompt_", "eas_adapter.router")
"""In the names of what a merged model computes once a prompt, rather than for each token."""


@dataclass(frozen=True)
class Work:
    """Counts of one model, for the text that it reads and writes: of an image's encoder, only parameters are counted.

    Attributes:
        parameters: Parameters; one in several places counts once.
        per_token: Weights of the matrices that every token passes.
        head: Weights of the matrix that makes logits. In a prefill, only the last token passes it.
        read: Parameters that are read to decode one token: not the embeddings, nor what is computed once a prompt.
        windows: For each attention that there is, how many tokens it looks at; `None` for all.
        query_width: Values of a token's queries.
        kv_width: Values that an attention caches for a token.
        itemsize: Bytes of a value.
    """

    parameters: int
    per_token: int
    head: int
    read: int
    windows: tuple[int | None, ...]
    query_width: int
    kv_width: int
    itemsize: int

    @property
    def kv_bytes(self) -> int:
        """Bytes that a token takes in the KV cache."""
        return len(self.windows) * self.kv_width * self.itemsize

    def prefill(self, tokens: int) -> int:
        """Floating-point operations of the matrix products that read one prompt.

        Attention is causal: token `i` looks at `i` tokens. Norms, rotations, softmax and biases are not counted.
        """
        pairs = 0
        for window in self.windows:
            full = min(tokens, window or tokens)
            pairs += full * (full + 1) // 2 + (tokens - full) * full
        return 2 * (tokens * self.per_token + self.head) + 4 * self.query_width * pairs

    def decode(self, cached: int) -> int:
        """Bytes to be read to decode one token after `cached` others: parameters, keys and values."""
        tokens = sum(min(cached, window or cached) for window in self.windows)
        return (self.read + tokens * self.kv_width) * self.itemsize


def count(model: PreTrainedModel, skip: Collection[int] = ()) -> Work:
    """Count a model, whose weights are not looked at: it may be on the meta device.

    Args:
        model: A decoder, or a model around one.
        skip: Indices of the layers that have no attention.
    """
    config = model.config.get_text_config(decoder=True)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    outside = {id(module.weight) for module in (decoder.get_input_embeddings(), head) if module is not None}
    head_weights = 0 if head is None else head.weight.numel()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = [m for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and not _is_once(name)]
    inside = [p for name, p in decoder.named_parameters() if id(p) not in outside and not _is_once(name)]
    return Work(
        parameters=sum(p.numel() for p in model.parameters()),
        per_token=sum(m.in_features * m.out_features for m in matrices),
        head=head_weights,
        read=head_weights + sum(p.numel() for p in inside),
        windows=tuple(window for index, window in enumerate(_windows(config)) if index not in skip),
        query_width=heads * head_dim,
        kv_width=2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        itemsize=model.dtype.itemsize,
    )


def base_of(merged: PreTrainedModel) -> PreTrainedModel:
    """The model that `merged` was before, with all of its attentions; on the meta device, so without values."""
    base_class = getattr(transformers, type(merged).__name__.removeprefix("EAS"))
    config = copy.deepcopy(merged.config)
    config.__class__ = base_class.config_class
    config.get_text_config(decoder=True).per_layer_config = None
    with torch.device("meta"):
        return base_class._from_config(config, dtype=merged.dtype, attn_implementation="eager")


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """For each layer, the width of its sliding window, as transformers' caches read it off a configuration."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _is_once(name: str) -> bool:
    return any(part in name for part in ONCE)
