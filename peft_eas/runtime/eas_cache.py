"""Entries in a KV cache of attentions that are skipped."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils

_Entry: Any = getattr(cache_utils, "DummyLayer", object)


class EmptyEntry(_Entry):
    """Cache entry of a skipped attention that keeps nothing: no keys and no values."""

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    is_sliding = None  # neither full nor sliding: transformers before 5.23 looks for the first layer of a kind by it
    _layer_type = None  # and Unlimited-OCR by this

    def __init__(self, **kwargs) -> None:
        self.is_initialized = True
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        if key_states is None and value_states is None:  # how DDP rebuilds a cache
            return None, None
        raise ValueError(
            "This KV cache was filled while this layer's attention was skipped, and now the attention wants to use it. "
            "Start with a new cache after changing which attentions are skipped."
        )

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = None

    def crop(self, tokens_to_remove: int) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class StateEntry(cache_utils.LinearAttentionLayer, EmptyEntry):
    """The same where the entry has the state of another mixer of the layer, too, which it keeps (Falcon-H1).

    Args:
        entry: The entry for both.
    """

    def __init__(self, entry: cache_utils.LinearAttentionLayer) -> None:
        cache_utils.LinearAttentionLayer.__init__(self, entry.number_of_states)
        self.__dict__.update({name: getattr(entry, name) for name in vars(self)})
        EmptyEntry.__init__(self)

    def reset(self) -> None:
        super().reset()
        EmptyEntry.reset(self)
