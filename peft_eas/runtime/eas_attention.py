"""What happens where an attention is skipped: something is added to the residual stream in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, cache_utils

from .eas_cache import EmptyEntry, StateEntry
from .eas_record import Form, Left


def uniform_attention(values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Attention with queries of zero, equation (3) of docs/method.md: a mean over the tokens that are looked at.

    Args:
        values: `(B, S, r)`.
        allowed: `(B or 1, T or 1, S)`, whether each token may look at each; `None`: all at all.

    Returns:
        `(B, T or 1, r)`; zero for a token that may look at none, such as padding.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if allowed is None:
        return wide.mean(dim=1, keepdim=True).to(values.dtype)
    weights = allowed.to(wide.dtype)
    return (weights @ wide / weights.sum(-1, keepdim=True).clamp(min=1)).to(values.dtype)


def causal_mean(values: torch.Tensor) -> torch.Tensor:
    """The same where each token looks at itself and those before it: `(B, T, r) -> (B, T, r)`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    counts = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    return (wide.cumsum(dim=1) / counts).to(values.dtype)


def looked_at(
    attention_mask: torch.Tensor, length: int, total: int, is_causal: bool, hides: bool = False
) -> torch.Tensor:
    """Whether each of `length` tokens may look at each of `total`, `(B or 1, T or 1, S)`, by an attention's mask.

    Args:
        attention_mask: `(B, S)` of tokens that are no padding, or `(B, heads or 1, T or 1, S)`, or without the heads;
            bool, numbers of which 0 means no, or numbers below 0 that are added to scores.
        length: `T`; they are the last of the `S`.
        total: `S`.
        is_causal: Whether a token looks at none that follow, where the mask does not say which tokens look.
        hides: Whether a bool mask says the opposite, what may not be looked at (MPT).
    """
    mask = attention_mask[..., :total]
    mask = mask >= 0 if mask.is_floating_point() else mask.bool() ^ hides
    if mask.dim() == 4:
        mask = mask.any(dim=1)
    elif mask.dim() == 2:
        mask = mask[:, None]
    if is_causal and mask.shape[1] == 1 < length:
        mask = mask & torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
    return mask


def change_input(args: tuple, kwargs: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments of a module with its `hidden_states`, given by position or by name, changed; wherever it is given
    (some attentions take their queries and keys as two arguments)."""
    given = _first(args, kwargs)
    changed = change(given)
    args = tuple(changed if value is given else value for value in args)
    return args, {name: changed if value is given else value for name, value in kwargs.items()}


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


class Bypass:
    """What happens where an attention is skipped: something is added to the residual stream in its place.

    Args:
        form: How such attentions are built and called.
        index: Index of the layer.
        attention: The attention, for the names of its arguments.
    """

    def __init__(self, form: Form, index: int, attention: nn.Module) -> None:
        parameters = inspect.signature(type(attention).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
        self.form = form
        self.index = index

    def argument(self, name: str, args: tuple, kwargs: dict) -> Any:
        """An argument of the attention, given by position or by name; `None` if it is not given."""
        if name in kwargs:
            return kwargs[name]
        where = self.names.index(name) if name in self.names else len(args)
        return args[where] if where < len(args) else None

    def _cache(self, kwargs: dict) -> cache_utils.Cache | None:
        """The KV cache among the arguments of the attention; older families call it `layer_past`."""
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        if isinstance(cache, cache_utils.EncoderDecoderCache):
            return cache.cross_attention_cache if self.form.context else cache.self_attention_cache
        return cache

    def pass_over(self, args: tuple, kwargs: dict) -> None:
        """Leave an entry without keys and values in the KV cache.

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
            has_state = isinstance(entry, cache_utils.LinearAttentionLayer)
            entry = cache.layers[self.index] = StateEntry(entry) if has_state else EmptyEntry()
        if self.form.shows_keys:
            others = self.argument(self.form.context, args, kwargs)
            if entry.keys is None or others is not None:
                entry.keys = _first(args, kwargs).new_zeros(0 if others is None else 1)

    def retain(self, kwargs: dict) -> None:
        """See that a retained attention finds in the KV cache what it left there itself.

        Raises:
            ValueError: if there is something that it left when it was skipped.
        """
        cache = self._cache(kwargs)
        entry = cache.layers[self.index] if cache is not None and self.index < len(cache.layers) else None
        if entry is not None and getattr(entry, "eas_rank", None):
            self._check_unused(entry)
            entry.eas_rank, entry.is_initialized = None, False

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

    def information(
        self, args: tuple, kwargs: dict, down: torch.Tensor, config: PreTrainedConfig | None
    ) -> torch.Tensor:
        """Equation (3): what the tokens that this attention would look at say, `(B, T or 1, r)`.

        `r` numbers of each token are what is kept in the KV cache, half of them as its keys, half as its values, so
        that caches of every kind do with them what they do with keys and values.

        Args:
            args: Those of the attention.
            kwargs: Likewise.
            down: `C (r, d')`.
            config: The attention's, which says how it is computed.

        Raises:
            ValueError: if the attention's mask is in a form that can't be read.
        """
        hidden_states, is_cross = _first(args, kwargs), bool(self.form.context)
        tokens = self.argument(self.form.context, args, kwargs) if is_cross else hidden_states
        values = None
        if tokens is not None:
            tokens = tokens.reshape(len(hidden_states), -1, tokens.shape[-1])  # Mllama's come tile by tile
            values = F.linear(tokens.to(down.dtype), down)
        values = self._remembered(values, kwargs, is_cross)
        mask = self.argument(self.form.mask, args, kwargs)
        _check_readable(mask, config)
        length, total = hidden_states.shape[1], values.shape[1]
        is_causal = self.form.causal and not is_cross
        if mask is not None:
            return uniform_attention(values, looked_at(mask, length, total, is_causal, self.form.mask_hides))
        # as torch's own causal attention: the first of the values are these tokens', unless one goes on from the cache
        return causal_mean(values[:, :length]) if is_causal and length > 1 else uniform_attention(values, None)

    def _remembered(self, values: torch.Tensor | None, kwargs: dict, is_cross: bool) -> torch.Tensor:
        """The values `(B, S, r)` of all tokens, those of earlier forwards included."""
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
        remembers = both.is_updated if is_cross and isinstance(both, cache_utils.EncoderDecoderCache) else {}
        if values is None or remembers.get(self.index):
            kept = entry.keys, entry.values
        else:
            kept = cache.update(*(half[:, None] for half in values.chunk(2, dim=-1)), self.index)
            entry.eas_rank = values.shape[-1]
            remembers[self.index] = True
        return torch.cat(kept, dim=-1)[:, 0]

    def stream(self, args: tuple, kwargs: dict, attention: nn.Module, added: torch.Tensor) -> torch.Tensor:
        """The attention's output when it adds `added`, of the shape `(B, T, d)` or one like it, to the stream."""
        if self.form.adds_residual:
            return args[1] + added
        if self.form.residual_norm:
            return attention.get_submodule(self.form.residual_norm)(_first(args, kwargs) + added)
        return _first(args, kwargs) + added if self.form.core else added

    def returned(self, stream: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | tuple:
        """What the attention returns with this output."""
        if self.form.returns is None:
            return stream
        return stream, *(self.argument(name, args, kwargs) if name else None for name in self.form.returns)


UNREADABLE = (
    "With `propagation='mean'`, skipped attentions read their mask, which can't be with {}: load the model with "
    "`attn_implementation='sdpa'` or `'eager'`, and generate by `generate`. Models with `propagation='none'` run with "
    "all."
)


def _check_readable(mask: object, config: PreTrainedConfig | None) -> None:
    kind = getattr(config, "_attn_implementation", None) or ""
    if not isinstance(mask, (torch.Tensor, type(None))) or any(name in kind for name in ("flash", "flex", "paged")):
        raise ValueError(UNREADABLE.format(repr(kind)))


class SkippedAttention(nn.Module):
    """Stands where an attention was, and adds to the stream what it left, equation (2) of docs/method.md: a constant
    `stand_in (d,)`; the map `up (d, r)` after `down (r, d')` of what it reads; and `mean_up (d, r)` of the mean of
    `mean_down (r, d'')` over what it looks at; where there are such.

    Args:
        form: How such attentions are built and called.
        layer_idx: Index of the layer.
        attention: The attention; what it is called with is looked at, and its norm of the residual stream is kept.
        left: What it leaves.
    """

    def __init__(self, form: Form, layer_idx: int, attention: nn.Module, left: Left, **factory) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = getattr(attention, "config", None)
        self.bypass = Bypass(form, layer_idx, attention)
        self.stand_in = nn.Parameter(torch.zeros(left.width, **factory)) if left.constant else None
        self.down, self.up = _pair(left.rank, left.read, left.width, factory)
        self.mean_down, self.mean_up = _pair(left.mean_rank, left.pooled, left.width, factory)
        *parents, leaf = form.residual_norm.split(".")
        if leaf:
            module: nn.Module = self
            for name in parents:
                module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, attention.get_submodule(form.residual_norm))

    def forward(self, *args, **kwargs) -> torch.Tensor | tuple:
        first = _first(args, kwargs)
        # a tensor of its own, since layers may change in place what an attention gives them
        added = first.new_zeros(1, 1, 1) if self.stand_in is None else self.stand_in.clone()[None, None]
        if self.down is not None and self.up is not None:
            added = F.linear(F.linear(first, self.down), self.up, self.stand_in)
        if self.mean_down is None or self.mean_up is None:
            self.bypass.pass_over(args, kwargs)
        else:
            information = self.bypass.information(args, kwargs, self.mean_down, self.config)
            added = added + F.linear(information, self.mean_up)
        stream = self.bypass.stream(args, kwargs, self, added)
        return self.bypass.returned(stream, args, kwargs)

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


def _pair(rank: int, size: int, width: int, factory: dict) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """A map of a rank, `(r, size)` and `(width, r)`; of rank 0, none."""
    if not rank:
        return None, None
    return nn.Parameter(torch.zeros(rank, size, **factory)), nn.Parameter(torch.zeros(width, rank, **factory))


def shift_input(layers: nn.ModuleList, name: str, shift: torch.Tensor) -> None:
    """Add `shift (d,)` to the input of the attention or FFN `name` (`"3.mlp"`): biases that its linears can't have."""
    module = layers.get_submodule(name)
    module.eas_shift = nn.Parameter(shift, requires_grad=False)
    module.register_forward_pre_hook(_shifted, with_kwargs=True)


def _shifted(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return change_input(args, kwargs, lambda z: z + module.eas_shift)
