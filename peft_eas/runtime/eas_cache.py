"""What is left of skipped attentions in a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils

from .eas_record import Form

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

    def see(self, others: torch.Tensor | None) -> None:
        """Told which tokens the attention was to look at."""

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


class Remembered:
    """What a skipped attention has in the KV cache: nothing, or `r` numbers of each token, half of them as its keys,
    half as its values, so that caches of every kind do with them what they do with keys and values.

    Args:
        form: How such attentions are built and called.
        index: Index of the layer.
    """

    def __init__(self, form: Form, index: int) -> None:
        self.form = form
        self.index = index

    def nothing(self, kwargs: dict, others: torch.Tensor | None) -> None:
        """Leave an entry without keys and values.

        Args:
            kwargs: Those that the attention is called with.
            others: The tokens that a cross-attention is to look at, of a model that looks for their keys.

        Raises:
            ValueError: if the cache holds keys and values of this layer already.
        """
        cache = self._cache(kwargs)
        # of a decoder that has an encoder, the first entry is never skipped, so no other has to be passed over
        if cache is None or (self.form.answers and not self.form.context):
            return
        entry = self._entry(cache)
        if not isinstance(entry, EmptyEntry):
            self._check_unused(entry)
            entry = cache.layers[self.index] = empty_entry(entry, self.form)
        entry.see(others)

    def with_earlier(self, values: torch.Tensor | None, kwargs: dict) -> torch.Tensor:
        """The numbers `(B, S, r)` of all tokens, those of earlier forwards, which are in the cache, included.

        Args:
            values: `(B, T, r)`, of these tokens; `None` if a cross-attention looks at what it has looked at before.
            kwargs: Those that the attention is called with.

        Raises:
            ValueError: if there are none, or the cache holds keys and values of this layer.
        """
        cache = self._cache(kwargs)
        if cache is None:
            if values is None:
                raise ValueError("A skipped cross-attention was given nothing to look at, and there is no KV cache.")
            return values
        entry = self._entry(cache)
        if not getattr(entry, "eas_rank", None):
            self._check_unused(entry)
            entry.is_initialized = False  # a static one may have been made for the attention's own keys
        both = kwargs.get("past_key_values")
        has_both = bool(self.form.context) and isinstance(both, cache_utils.EncoderDecoderCache)
        updated = both.is_updated if both is not None and has_both else {}
        if values is None or updated.get(self.index):
            kept = entry.keys, entry.values
        else:
            kept = cache.update(*(half[:, None] for half in values.chunk(2, dim=-1)), self.index)
            entry.eas_rank = values.shape[-1]
            updated[self.index] = True
        return torch.cat(kept, dim=-1)[:, 0]

    def retain(self, kwargs: dict) -> None:
        """See that a retained attention finds in the cache what it left there itself.

        Raises:
            ValueError: if there is something that it left when it was skipped.
        """
        cache = self._cache(kwargs)
        entry = cache.layers[self.index] if cache is not None and self.index < len(cache.layers) else None
        if entry is not None and getattr(entry, "eas_rank", None):
            self._check_unused(entry)
            entry.eas_rank, entry.is_initialized = None, False

    def _cache(self, kwargs: dict) -> Any:
        """The KV cache among the arguments of the attention; older families call it `layer_past`."""
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        if isinstance(cache, cache_utils.EncoderDecoderCache):
            return cache.cross_attention_cache if self.form.context else cache.self_attention_cache
        return cache

    def _entry(self, cache: cache_utils.Cache) -> Any:
        while len(cache.layers) <= self.index:  # a cache that grows as it is filled
            cache.layers.append(cache.layer_class_to_replicate())
        return cache.layers[self.index]

    def _check_unused(self, entry: Any) -> None:
        if isinstance(entry, EmptyEntry) or (entry.is_initialized and int(entry.get_seq_length()) > 0):
            raise ValueError(
                f"This KV cache was filled when the attention of layer {self.index} was skipped and is not now, or the "
                "other way round. Start with a new cache after changing which attentions are skipped."
            )


# ----------------------------------------------------------------------------------------------------------------------
# What one family alone needs
# ----------------------------------------------------------------------------------------------------------------------


class StateEntry(cache_utils.LinearAttentionLayer, EmptyEntry):
    """Falcon-H1: an entry that has the state of another mixer of the layer, too, and keeps it.

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


class KeysEntry(EmptyEntry):
    """Mllama: a model that looks into the cache for keys, to know whether there have been images."""

    def see(self, others: torch.Tensor | None) -> None:
        if others is not None:
            self.keys = others.new_zeros(1)
        elif self.keys is None:
            self.keys = torch.zeros(0)


def empty_entry(entry: Any, form: Form) -> EmptyEntry:
    """What is put in the place of an entry."""
    if isinstance(entry, cache_utils.LinearAttentionLayer):
        return StateEntry(entry)
    return KeysEntry() if form.shows_keys else EmptyEntry()
