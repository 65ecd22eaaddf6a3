"""Models merged by peft_eas: what they need at run time.

A merged model is a transformers model of its base class with some attentions gone. This file holds all that such a
model needs, for every family, and imports nothing but torch and transformers: it travels with each checkpoint, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it where `peft_eas` is not installed. The
names `EAS<class>` (`EASLlamaForCausalLM`, `EASLlamaConfig`, ...) are made on demand from the transformers `<class>`.

What is skipped and folded is recorded in `config.eas`; see `restructure`. Where the layers depend on the prompt
(`propagation="prompt"`, `router="prompt"`), the outermost model finds out which tokens are the prompt
(`PromptBoundary`) and hands a mask down to the layers; what a layer makes of it is kept in that layer's entry of the
KV cache (`PromptSlot`). Encoders and cross-attentions know their tokens by themselves (`AttendedContext`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import re
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.models.auto import modeling_auto

PROMPT_MASK = "eas_prompt_mask"
"""Keyword by which the mask `(B, T)` of the prompt's tokens travels from the outermost model to the layers."""

FORMAT = 4
"""Version of `config.eas`; a file of another version is refused."""


class _Local(threading.local):
    """What belongs to this thread's current forward or `generate`."""

    mask: torch.Tensor | None = None  # of the forward under way, for layers that get no further keywords
    contexts: dict[str, PromptContext]  # of the skipped attentions of the layer under way, for its FFN, by their names

    def __init__(self) -> None:
        self.contexts = {}

    explicit: torch.Tensor | None = None  # see `prompt_mask`
    generations: tuple[_Generation, ...] = ()  # the calls of `generate` under way, outermost first


class _Generation:
    """One call of `generate`.

    Args:
        prompt_length: How many tokens its prompt has.
        is_assistant: Whether it is one of many that draft for another `generate`.
        is_guided: Whether a second sequence is read beside, for classifier-free guidance.

    Attributes:
        started: Whether the first forward has been, in this call or, for an assistant, in an earlier one.
    """

    def __init__(self, prompt_length: int, is_assistant: bool, is_guided: bool) -> None:
        self.prompt_length = prompt_length
        self.started = is_assistant
        self.is_guided = is_guided


_local = _Local()


# ----------------------------------------------------------------------------------------------------------------------
# Which tokens are the prompt
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prompt_mask(mask: torch.Tensor) -> Iterator[None]:
    """Say which tokens are the prompt, for the forwards inside of the `with`.

    Needed where a model can't know it: training without labels (DPO, GRPO, label smoothing), or scoring a continuation
    without labels. For a forward that continues a KV cache, give a mask without any true value.

    Args:
        mask: `(B, T)`, true (or non-zero) for the prompt's tokens; the shape of the `input_ids`.
    """
    before, _local.explicit = _local.explicit, mask
    try:
        yield
    finally:
        _local.explicit = before


@contextlib.contextmanager
def generation(args: tuple, kwargs: dict) -> Iterator[None]:
    """Let the forwards inside know the length of the prompt that `generate(*args, **kwargs)` was given."""
    given = kwargs.get("inputs_embeds")
    if given is None:
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    config = kwargs.get("generation_config")
    guidance = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
    entered = _Generation(
        prompt_length=1 if given is None else given.shape[1],
        is_assistant=bool(getattr(config, "is_assistant", False)),
        is_guided=guidance not in (None, 1),
    )
    before = _local.generations
    _local.generations = (*before, entered)
    try:
        yield
    finally:
        _local.generations = before


class PromptBoundary:
    """Forward pre-hook of the outermost model: finds the prompt's tokens and hands their mask to the layers.

    The prompt is what `prompt_mask` says; else the tokens before the first that has a label, if a generative model gets
    labels; else, at inference, all tokens up to the length that `generate` was given; padding never. A forward that
    continues a KV cache has none: its layers use what the prefill left there.

    Args:
        model: The outermost model.
        is_needed: Whether some layer depends on the prompt now.
    """

    def __init__(self, model: PreTrainedModel, is_needed: Callable[[], bool]) -> None:
        parameters = inspect.signature(type(model).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
        self.generative = model.can_generate()
        self.is_needed = is_needed

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if module.training:
            _recompute_as_computed(module)
        # a model within a model, such as that of BLIP-2, has the outer one's mask already
        if kwargs.get(PROMPT_MASK) is not None or _local.mask is not None or not self.is_needed():
            return None
        mask = self._find(dict(zip(self.names, args, strict=False)) | kwargs, module.training)
        if _local.generations:
            _local.generations[-1].started = True
        if mask is None:
            return None
        _local.mask = mask
        return args, kwargs | {PROMPT_MASK: mask}

    def _find(self, inputs: dict, training: bool) -> torch.Tensor | None:
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if tokens is None:
            raise ValueError(f"{_SUBJECT} needs `input_ids` or `inputs_embeds`.")
        batch, length = tokens.shape[:2]
        explicit = _local.explicit
        if explicit is not None and explicit.shape != (batch, length):
            raise ValueError(
                f"`prompt_mask` got a mask of shape {tuple(explicit.shape)}, but the forward has {batch} rows of "
                f"{length} tokens: give a mask of shape {(batch, length)}."
            )
        if _continues(inputs.get("past_key_values")):
            self._check_continuation(explicit, length)
            return None
        mask = _not_padding(inputs.get("attention_mask"), batch, length, tokens.device)
        if _is_packed(inputs, mask):
            raise ValueError(
                f"{_SUBJECT} can't be told from its neighbours in a packed row. Ways out: rows that are not packed; or "
                "a model with `propagation='none'` and `router='none'`."
            )
        if explicit is not None:
            return _checked(explicit.to(mask.device).bool() & mask)
        labels = inputs.get("labels") if self.generative else None
        if labels is not None:
            # what follows the first answer, such as a further question, would tell the answer about its future
            return _checked(((labels.to(mask.device) != -100).cumsum(-1) == 0) & mask)
        if self.generative and training and torch.is_grad_enabled():
            raise ValueError(
                f"{_SUBJECT} is not known: the model is being trained without `labels`, and its answers must not be "
                f"taken for a prompt. {_WAYS_OUT}"
            )
        if _local.generations:
            entered = _local.generations[-1]
            if entered.is_guided and not inputs.get("use_cache"):
                raise ValueError(
                    f"{_SUBJECT} can't be told from the one that guides it (`guidance_scale`) without a KV cache: set "
                    "`use_cache=True`."
                )
            if entered.is_guided and entered.started:
                return mask  # all of the other sequence's, whose cache is made by this forward
            if length < entered.prompt_length:
                raise ValueError(
                    f"{_SUBJECT} must be read in one forward, but the first one has {length} of its "
                    f"{entered.prompt_length} tokens (chunked prefill, say): set `prefill_chunk_size=None`. "
                    f"{_WAYS_OUT}"
                )
            mask = mask & (torch.arange(length, device=mask.device) < entered.prompt_length)
        return mask

    @staticmethod
    def _check_continuation(explicit: torch.Tensor | None, length: int) -> None:
        if explicit is not None:
            if explicit.any():
                raise ValueError(f"{_SUBJECT} was read already by this KV cache: no further tokens can be added to it.")
            return
        # Inside of `generate`, several tokens after the first forward are drafts to be verified; so are those of an
        # assistant, whose own `generate` runs inside of another.
        are_drafts = _local.generations and _local.generations[-1].started
        if length > 1 and not are_drafts:
            raise ValueError(
                f"{_SUBJECT} was read already by this KV cache, and {length} more tokens come at once. If they belong "
                "to the prompt (a further turn, chunked prefill), start with a new cache and all tokens; if not, say "
                "so: `with prompt_mask(torch.zeros(batch, tokens)): model(...)`."
            )


class _AsComputed:
    """A layer's checkpointing function; what it recomputes finds the mask of its own forward, not of a later one, and
    the skipped attention of the layer before, if that is where it is (Nemotron-H)."""

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        mask, contexts = _local.mask, dict(_local.contexts)

        def run(*inputs):
            before, _local.mask = _local.mask, mask
            _local.contexts = {attention: context.anew() for attention, context in contexts.items()}
            try:
                return function(*inputs)
            finally:
                _local.mask = before

        return self.checkpoint(run, *args, **kwargs)


def _recompute_as_computed(model: nn.Module) -> None:
    for layer in model.modules():
        checkpoint = vars(layer).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _AsComputed):
            layer._gradient_checkpointing_func = _AsComputed(checkpoint)


def _forget_mask(module: nn.Module, args: tuple, output: object) -> None:
    _local.mask = None


def mask_of(kwargs: dict) -> torch.Tensor | None:
    """The prompt's mask, taken out of an attention's keywords; or, in families that pass none on, that of the forward
    under way."""
    return kwargs.pop(PROMPT_MASK, _local.mask)


def watch_prompt(model: PreTrainedModel, is_needed: Callable[[], bool]) -> None:
    """Let `model` find the prompt in each forward (see `PromptBoundary`); a model within it, too, if that generates."""
    unwatch_prompt(model)
    for module in _boundaries(model):
        module.register_forward_pre_hook(PromptBoundary(module, is_needed), with_kwargs=True)
        module.register_forward_hook(_forget_mask, always_call=True)


def unwatch_prompt(model: PreTrainedModel) -> None:
    """Undo `watch_prompt`."""
    for module in _boundaries(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PromptBoundary):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _forget_mask:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _boundaries(model: PreTrainedModel) -> list[PreTrainedModel]:
    inner = (m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel) and m.can_generate())
    return [model, *inner]


_SUBJECT = "The prompt of a model with `propagation='prompt'` or `router='prompt'`"
_WAYS_OUT = (
    "Ways out: labels that are -100 for the prompt's tokens; `with peft_eas.prompt_mask(mask): ...` around the "
    "forward; or a model with `propagation='none'` and `router='none'`."
)


def _continues(cache: object) -> bool:
    """Whether `cache` holds what an earlier forward made of the prompt."""
    layers = getattr(cache, "layers", ())
    return any(getattr(layer, "prompt_state", None) for layer in layers)


def _not_padding(attention_mask: object, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Tokens that are not padding, `(B, T)`, from whatever form of mask the model was given."""
    if isinstance(attention_mask, dict):  # prepared by `generate` for hybrid models: any kind serves
        attention_mask = next((m for m in attention_mask.values() if m is not None), None)
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"{_SUBJECT} can't be read off a {type(attention_mask).__name__}. {_WAYS_OUT}")
    if attention_mask.dim() == 4:  # every token that is not padding attends to itself
        own = torch.diagonal(attention_mask[:, 0, :, :length], dim1=-2, dim2=-1)
        return (own if own.dtype == torch.bool else own >= 0).expand(batch, length)
    return attention_mask[:, -length:].bool()


def _is_packed(inputs: dict, not_padding: torch.Tensor) -> bool:
    """Whether a row holds several sequences: by the arguments of flash attention, or positions that start anew."""
    if inputs.get("cu_seq_lens_q") is not None or inputs.get("seq_idx") is not None:
        return True
    positions = inputs.get("position_ids")
    if positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
        return False
    both = not_padding[:, 1:] & not_padding[:, :-1]
    return bool(((positions.diff(dim=-1) < 0) & both).any())


def _checked(mask: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and not mask.any(dim=-1).all():
        rows = (~mask.any(dim=-1)).nonzero().flatten().tolist()
        raise ValueError(f"{_SUBJECT} is empty in row(s) {rows}: the first token has a label. {_WAYS_OUT}")
    return mask


def prompt_mean(z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean, in float32 or wider, of `z (B, T, d)` over the tokens where `mask (B, T)` is true, or all: `(B, 1, d)`.

    Zero for a row without such tokens, as a text without an image is to a cross-attention.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if mask is None:
        return wide.mean(dim=1, keepdim=True).to(z.dtype)
    weights = mask.to(device=z.device, dtype=wide.dtype).unsqueeze(1)
    return ((weights @ wide) / weights.sum(-1, keepdim=True).clamp(min=1)).to(z.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What a layer makes of the prompt, and where it is kept
# ----------------------------------------------------------------------------------------------------------------------


class PromptSlot(getattr(cache_utils, "DummyLayer", object)):
    """Cache entry of a skipped attention: no keys and no values, only what the layer keeps of the prompt.

    `prompt_state` holds tensors `(B, 1, n)` by name. It belongs to the generation that made the cache, follows beams
    and repeats with it, and is empty for models that don't depend on the prompt.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    is_sliding = None  # neither full nor sliding: transformers before 5.23 looks for the first layer of a kind by it
    _layer_type = None  # and Unlimited-OCR by this

    def __init__(self, **kwargs) -> None:
        self.is_initialized = True
        self.keys = self.values = None
        self.prompt_state: dict[str, torch.Tensor] = {}

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
        self.prompt_state.clear()

    def crop(self, tokens_to_remove: int) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, value in self.prompt_state.items():
            self.prompt_state[name] = function(value)


class StateSlot(cache_utils.LinearAttentionLayer, PromptSlot):
    """The same where the entry has the state of another mixer of the layer, too, which it keeps (Falcon-H1).

    Args:
        entry: The entry for both.
    """

    def __init__(self, entry: cache_utils.LinearAttentionLayer) -> None:
        super().__init__(entry.number_of_states)
        vars(self).update({name: getattr(entry, name) for name in vars(self)})
        PromptSlot.__init__(self)

    def reset(self) -> None:
        super().reset()
        PromptSlot.reset(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        PromptSlot.reorder_cache(self, beam_idx)


def cache_of(kwargs: dict) -> cache_utils.Cache | None:
    """The KV cache among the arguments of an attention; older families call it `layer_past`."""
    cache = kwargs.get("past_key_values")
    return kwargs.get("layer_past") if cache is None else cache


def prompt_slot(cache: cache_utils.Cache, layer_idx: int) -> PromptSlot:
    """The entry of skipped layer `layer_idx` in `cache`, which takes the place of the keys' and values'.

    Raises:
        ValueError: if the cache holds keys and values of this layer already.
    """
    layer = _entry(cache, layer_idx)
    if not isinstance(layer, PromptSlot):
        if layer.is_initialized and int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"This KV cache holds keys and values of layer {layer_idx}, whose attention is skipped now. Start with "
                "a new cache after changing which attentions are skipped."
            )
        has_state = isinstance(layer, cache_utils.LinearAttentionLayer)
        cache.layers[layer_idx] = StateSlot(layer) if has_state else PromptSlot()
    return cache.layers[layer_idx]


def _entry(cache: cache_utils.Cache, layer_idx: int) -> object:
    while len(cache.layers) <= layer_idx:  # a cache that grows as it is filled
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


class PromptContext:
    """What one layer knows of the prompt in one forward.

    Args:
        mask: `(B, T)` mask of the prompt's tokens in a prefill or in training; `None` while decoding.
        state: What the prefill left, if there is a cache to keep it.
    """

    def __init__(self, mask: torch.Tensor | None, state: dict[str, torch.Tensor]) -> None:
        if mask is not None:
            state.clear()
        self.mask = mask
        self.state = state

    @property
    def rows(self) -> int:
        """`B`, as far as it matters: 1 if nothing depends on the row."""
        known = self.mask if self.mask is not None else next(iter(self.state.values()), None)
        return 1 if known is None else len(known)

    def anew(self) -> PromptContext:
        """The same, before anything further was computed of it."""
        context = copy.copy(self)
        context.state = dict(self.state)
        return context

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The value `name (B, 1, n)`, computed in a prefill and remembered from then on."""
        if name not in self.state:
            self.state[name] = compute()
        return self.state[name]

    def mean(self, z: torch.Tensor) -> torch.Tensor:
        """Mean `(B, 1, d)` over the prompt's tokens of `z (B, T, d)`, the input of an attention or a FFN."""
        if self.mask is None:
            raise ValueError(
                f"{_SUBJECT} has not been read by this KV cache. Pass the cache of the prefill, or call the outermost "
                "model rather than a part of it."
            )
        return prompt_mean(z, self.mask)


class AttendedContext(PromptContext):
    """What a layer knows of the tokens that its attention would look at, where all of them are there from the start.

    Args:
        hidden_states: `(B, T, d)`, the attention's input.
        attention_mask: The attention's mask, in whatever form it was given.
        state: What an earlier forward left, if there is a cache to keep it.
        is_cross: Whether it is a cross-attention.
        others: `(B, S, d')`, the other modality's tokens or the encoder's, for a cross-attention.
    """

    def __init__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        state: dict[str, torch.Tensor],
        is_cross: bool = False,
        others: torch.Tensor | None = None,
    ) -> None:
        self.tokens = hidden_states
        self.mask = attention_mask
        self.state = state
        self.is_cross = is_cross
        self.others = others

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def mean(self, z: torch.Tensor) -> torch.Tensor:
        tokens = self.others if self.is_cross else z
        if tokens is None:
            raise ValueError("A skipped cross-attention was given nothing to look at, and its KV cache knows nothing.")
        tokens = tokens.reshape(self.rows, -1, tokens.shape[-1])  # Mllama's come tile by tile
        return prompt_mean(tokens, _attended(self.mask, self.rows, tokens.shape[1]))


def _attended(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Tokens that some query may look at, `(B, S)`; `None` if all."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"Which tokens are padding can't be read off a {type(attention_mask).__name__}: load the model with "
            "`attn_implementation='sdpa'` or `'eager'`."
        )
    mask = attention_mask[..., -length:]
    mask = mask >= 0 if mask.is_floating_point() else mask.bool()
    return (mask.flatten(1, -2).any(dim=1) if mask.dim() > 2 else mask).expand(batch, length)


def by_row(adapter: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, rows: int) -> torch.Tensor:
    """`adapter(z)` for `z (B, T, d)`, or for the `(B * T, d)` that some families' FFNs are given; `rows` is `B`."""
    return adapter(z) if z.dim() == 3 else adapter(z.reshape(rows, -1, z.shape[-1])).reshape(z.shape)


def change_input(args: tuple, kwargs: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments of a module with its `hidden_states`, given by position or by name, changed; wherever it is given
    (some attentions take their queries and keys as two arguments)."""
    given = args[0] if args else kwargs["hidden_states"]
    changed = change(given)
    args = tuple(changed if value is given else value for value in args)
    return args, {name: changed if value is given else value for name, value in kwargs.items()}


class Bypass:
    """What happens where an attention is skipped: its layer's FFN is told of the tokens that it would have looked at,
    and the residual stream passes.

    Args:
        form: How such attentions are built and called, see `restructure`.
        index: Index of the layer.
        attention: The attention, for the names of its arguments.
    """

    def __init__(self, form: dict, index: int, attention: nn.Module) -> None:
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

    def context(self, args: tuple, kwargs: dict, state: Callable[[object, int], dict]) -> PromptContext:
        """What the layer knows of the prompt, or of the tokens that this attention would look at.

        Args:
            args: Those of the attention.
            kwargs: Likewise; the prompt's mask is taken out.
            state: Where a layer keeps what it made of these, by cache and index of the layer.
        """
        mask = mask_of(kwargs)
        cache = cache_of(kwargs)
        is_cross = bool(self.form["context"])
        if isinstance(cache, cache_utils.EncoderDecoderCache):
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if self.form["pools"] == "nothing":
            cache = None  # nothing is kept; as the first entry is never skipped, no other has to be passed over, either
        kept = {} if cache is None else state(cache, self.index)
        others = self.argument(self.form["context"], args, kwargs) if is_cross else None
        slot = _entry(cache, self.index) if self.form["shows_keys"] and cache is not None else None
        if isinstance(slot, PromptSlot) and (slot.keys is None or others is not None):
            slot.keys = _first(args, kwargs).new_zeros(0 if others is None else 1)
        if self.form["pools"] == "prompt":
            return PromptContext(mask, kept)
        attention_mask = self.argument(self.form["mask"], args, kwargs)
        return AttendedContext(_first(args, kwargs), attention_mask, kept, is_cross, others)

    def stream(self, args: tuple, kwargs: dict, attention: nn.Module, added: torch.Tensor) -> torch.Tensor:
        """The attention's output when it adds `added`, of the shape `(B, T, d)` or one like it, to the stream."""
        if self.form["adds_residual"]:
            return args[1] + added
        if self.form["residual_norm"]:
            return attention.get_submodule(self.form["residual_norm"])(_first(args, kwargs) + added)
        return _first(args, kwargs) + added if self.form["core"] else added

    def returned(self, stream: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | tuple:
        """What the attention returns with this output."""
        if self.form["returns"] is None:
            return stream
        return stream, *(self.argument(name, args, kwargs) if name else None for name in self.form["returns"])


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def slot_state(cache: cache_utils.Cache, layer_idx: int) -> dict[str, torch.Tensor]:
    """Where a skipped attention keeps what it made of the prompt: in place of keys and values."""
    return prompt_slot(cache, layer_idx).prompt_state


def cache_state(cache: cache_utils.Cache, layer_idx: int) -> dict[str, torch.Tensor]:
    """Where a retained attention keeps what it made of the prompt: beside its keys and values."""
    layer = _entry(cache, layer_idx)
    if not hasattr(layer, "prompt_state"):
        layer.prompt_state = {}
    return layer.prompt_state


def enter_layer(form: dict, context: PromptContext | None) -> None:
    """Make `context` the one that the FFN finds for an attention of this form; `None`: it is not skipped.

    If what it looks from now is what it has just looked at, it looks back, and the context is the other FFN's.
    """
    attention = form["attention"]
    if context is None:
        _local.contexts.pop(attention, None)
        _local.contexts.pop(looking_back(attention), None)
        return
    there = _local.contexts.get(attention)
    looks_back = bool(form["ffn_back"]) and there is not None and there.others is context.tokens
    _local.contexts[looking_back(attention) if looks_back else attention] = context


def looking_back(attention: str) -> str:
    """What the second call of an attention that looks both ways is called."""
    return f"{attention} back"


def take_context(attention: str) -> PromptContext | None:
    """The context that a skipped attention has entered, see `enter_layer`; it is let go of."""
    return _local.contexts.pop(attention, None)


# ----------------------------------------------------------------------------------------------------------------------
# The modules of a merged layer
# ----------------------------------------------------------------------------------------------------------------------


class SkippedAttention(nn.Module):
    """Stands where an attention was: adds a constant to the stream, or nothing; caches nothing.

    Args:
        form: How such attentions are built and called, see `restructure`.
        layer_idx: Index of the layer.
        attention: The attention; what it is called with is looked at, and its norm of the residual stream is kept.
        width: Size `d` of the constant `stand_in (d,)`; 0 if it adds nothing.
    """

    def __init__(self, form: dict, layer_idx: int, attention: nn.Module, width: int, **factory) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.bypass = Bypass(form, layer_idx, attention)
        self.stand_in = nn.Parameter(torch.zeros(width, **factory)) if width else None
        *parents, leaf = form["residual_norm"].split(".")
        if leaf:
            module = self
            for name in parents:
                module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, attention.get_submodule(form["residual_norm"]))

    def forward(self, *args, **kwargs) -> torch.Tensor | tuple:
        enter_layer(self.bypass.form, self.bypass.context(args, kwargs, slot_state))
        # a tensor of its own, since layers may change in place what an attention gives them
        added = _first(args, kwargs).new_zeros(1, 1, 1) if self.stand_in is None else self.stand_in.clone()[None, None]
        stream = self.bypass.stream(args, kwargs, self, added)
        return self.bypass.returned(stream, args, kwargs)

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


class Projection(nn.Module):
    """`y = z weight^T + bias`. Not an `nn.Linear`, so that quantisation and other adapters leave it alone."""

    def __init__(self, in_features: int, out_features: int, bias: bool, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias else None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return F.linear(z, self.weight, self.bias)


class InputShift(nn.Module):
    """What folded weights can't hold of an adapter: a vector added to the input of an attention or a FFN.

    Equation (10) of docs/method.md: `z + up(down(mean over the prompt's tokens of z)) + bias`; of a cross-attention,
    the mean over the other modality's tokens. With `propagation="prompt"` the vector is computed once, `(B, 1, d)`, and
    from then on a constant; without (`rank=0`) it is the bias alone, where linears can't have one.

    Args:
        width: `d`.
        rank: `r`, 0 if nothing depends on the prompt.
        bias: Whether there is a constant part, the adapter's own biases.
        pooled: Size of the tokens whose mean it is.
    """

    def __init__(self, width: int, rank: int, bias: bool, pooled: int, **factory) -> None:
        super().__init__()
        self.record = {"kind": "input_shift", "width": width, "rank": rank, "bias": bias, "pooled": pooled}
        self.down = Projection(pooled, rank, False, **factory) if rank else None
        self.up = Projection(rank, width, False, **factory) if rank else None
        self.bias = nn.Parameter(torch.zeros(width, **factory)) if bias else None

    def forward(self, z: torch.Tensor, context: PromptContext) -> torch.Tensor:
        if self.down is None:
            return z if self.bias is None else z + self.bias
        return z + context.once("shift", lambda: self._shift(context.mean(z)))

    def _shift(self, mean: torch.Tensor) -> torch.Tensor:
        by_prompt = self.up(self.down(mean))
        return by_prompt if self.bias is None else by_prompt + self.bias


class RoutedAdapter(nn.Module):
    """An adapter with `router="prompt"`, which no static weight can hold: kept as a rank-`r` product.

    Equations (1) and (2) of docs/method.md, with scaling, temperature and the groups multiplied in.

    Args:
        width: `d`.
        rank: `r`.
        bias: Whether the projections have biases.
        propagates: Whether the prompt's information is added (a PIA with `propagation="prompt"`).
    """

    def __init__(self, width: int, rank: int, bias: bool, propagates: bool, **factory) -> None:
        super().__init__()
        self.record = {"kind": "routed", "width": width, "rank": rank, "bias": bias, "propagates": propagates}
        self.router = Projection(width, 2, True, **factory)
        self.down = Projection(width, rank, bias, **factory)
        self.up = Projection(rank, 2 * width, bias, **factory)
        self.prompt_down = Projection(width, rank, bias, **factory) if propagates else None

    def forward(self, z: torch.Tensor, context: PromptContext) -> torch.Tensor:
        alpha = context.once("alpha", lambda: torch.softmax(self.router(context.mean(z)), dim=-1))
        hidden = self.down(z)
        if self.prompt_down is not None:
            hidden = hidden + context.once("p", lambda: self.prompt_down(context.mean(z)))
        first, second = self.up(hidden).chunk(2, dim=-1)
        return z + alpha[..., :1] * first + alpha[..., 1:] * second


KEPT_ADAPTERS = {"input_shift": InputShift, "routed": RoutedAdapter}
"""What stays of adapters in a merged model, by the `kind` of its record."""


def skipped(eas: dict) -> list[int | str]:
    """The attentions that a model with the record `config.eas` skips: indices of layers, or names (`by_name`)."""
    return _listed(eas, "skip")


def attentions(eas: dict) -> list[int | str]:
    """The attentions that its base model has, likewise."""
    return _listed(eas, "present")


def _listed(eas: dict, key: str) -> list[int | str]:
    found = [(form, index) for form in eas["attentions"] for index in form[key]]
    if not eas["by_name"]:
        return sorted(index for _, index in found)
    return [f"{form['stack']}.{index}.{'cross' if form['context'] else 'self'}" for form, index in found]


def depends_on_prompt(eas: dict) -> bool:
    """Whether a model with the record `config.eas` has layers that depend on the prompt of a decoder."""
    return any(
        record["kind"] == "routed" or record["rank"] > 0
        for form in eas["attentions"]
        for record in form["adapters"].values()
        if form["pools"] == "prompt"
    )


def _adapt_attention_input(bypass: Bypass, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a retained attention with a kept adapter."""
    context = bypass.context(args, kwargs, cache_state)
    return change_input(args, kwargs, lambda z: attention.eas_adapter(z, context))


def _adapt_ffn_input(form: dict, attention: str, ffn: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the FFN of a skipped attention with a kept adapter."""
    context = take_context(attention) or PromptContext(None, {})
    adapter = getattr(ffn, _adapter_name(form))
    return change_input(args, kwargs, lambda z: by_row(lambda rows: adapter(rows, context), z, context.rows))


def _shift_ffn_input(form: dict, ffn: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the FFN of a retained attention with a kept adapter: biases that its linears can't have."""
    return change_input(args, kwargs, lambda z: getattr(ffn, _adapter_name(form))(z, PromptContext(None, {})))


def _adapter_name(form: dict) -> str:
    """What the kept adapter of such an attention is called, in the module that it stands before."""
    return "eas_cross_adapter" if form["context"] else "eas_adapter"


# ----------------------------------------------------------------------------------------------------------------------
# Models and configurations
# ----------------------------------------------------------------------------------------------------------------------


def restructure(model: PreTrainedModel, eas: dict) -> None:
    """Give `model`, built as its base class builds it, the structure that `eas` (`config.eas`) records. Idempotent.

    `eas` holds `decoder` (name of a vision-language model's language model) and `attentions`: for each kind of
    attention in each list of layers, how such attentions are built and called (`Attentions.form` of the module
    `families`) and what became of them: `present` (indices of layers that had one), `norms` (those of a layer that go
    with its attention), `skip` (indices of layers that have lost it), `stand_in` (for each of these, the size of the
    constant that is added in its place, 0 if none), `biased` (linears that a fold has given a bias),
    `adapters` (records of what stays of adapters, by the attention or FFN that they stand before). For people,
    `by_name` (see `skipped`) and `config` (what the adapter was configured with).

    Raises:
        ValueError: if `eas` was written by another version, or names layers that are not there.
    """
    if eas.get("format") != FORMAT:
        raise ValueError(
            f"This checkpoint has format {eas.get('format')!r} of `config.eas`, but this modelling file reads format "
            f"{FORMAT}: use the modelling file that came with the checkpoint, or a matching version of peft_eas."
        )
    decoder = model if eas["decoder"] is None else outermost(model, eas["decoder"])[1]
    for form in eas["attentions"]:
        _, layers = outermost(decoder, form["layers"])
        if not set(form["skip"]) <= set(range(len(layers))):
            raise ValueError(
                f"config.json skips the attentions of layers {form['skip']}, but has {len(layers)} layers."
            )
        if len(form["stand_in"]) != len(form["skip"]):
            raise ValueError(
                f"config.json skips the attentions of layers {form['skip']}, but has {len(form['stand_in'])} sizes of "
                "what stands in for them."
            )
        for name in form["biased"]:
            linear = layers.get_submodule(name)
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        for name, record in form["adapters"].items():
            module = layers.get_submodule(name)
            if not hasattr(module, _adapter_name(form)):
                like = next(module.parameters())
                settings = {key: value for key, value in record.items() if key != "kind"}
                adapter = KEPT_ADAPTERS[record["kind"]](**settings, device=like.device, dtype=like.dtype)
                keep_adapter(layers, form, name, adapter)
        strip_attentions(layers, form)
    forget_ties(model)


def outermost(model: nn.Module, suffix: str) -> tuple[str, nn.Module]:
    """The outermost module of `model` whose name ends with `suffix`, and that name; of suffixes with a `|` between
    them, with the first that there is.

    Raises:
        ValueError: if there is none.
    """
    for end in suffix.split("|"):
        found = [(name, m) for name, m in model.named_modules() if f".{name}".endswith(f".{end}")]
        if found:
            return min(found, key=lambda item: item[0].count("."))
    raise ValueError(f"{type(model).__name__} has no module {suffix!r}.")


def has_module(model: nn.Module, suffix: str) -> bool:
    """Whether `model` has a module whose name ends with `suffix`."""
    return any(f".{name}".endswith(f".{suffix}") for name, _ in model.named_modules())


def strip_attentions(layers: nn.ModuleList, form: dict) -> None:
    """Put a `SkippedAttention` where each skipped attention was, and drop the norms that only the attention needed."""
    for index, width in zip(form["skip"], form["stand_in"], strict=True):
        layer = layers[index]
        attention = layer.get_submodule(form["attention"])
        if not isinstance(attention, SkippedAttention):
            like = next(p for p in layer.parameters() if p.is_floating_point())  # an attention may be quantised
            put_in = SkippedAttention(form, index, attention, width, device=like.device, dtype=like.dtype)
            layer.set_submodule(form["attention"], put_in.train(layer.training))
        for name in form["norms"]:
            if name in dict(layer.named_modules()):
                layer.set_submodule(name, nn.Identity())


def forget_ties(model: PreTrainedModel) -> None:
    """Let `model` know which of its tied weights are gone (layers of Zamba share those of their attentions)."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, _ in tensors}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if name in names}


def keep_adapter(layers: nn.ModuleList, form: dict, name: str, adapter: InputShift | RoutedAdapter) -> None:
    """Let `adapter` see the input of the attention or FFN `name` (`"3.mlp"`) first."""
    module = layers.get_submodule(name)
    setattr(module, _adapter_name(form), adapter.train(module.training))
    index, inside = name.split(".", 1)
    index = int(index)
    if inside == f"{form['attention']}.{form['core']}".rstrip(".") and index in form["present"]:
        hook = functools.partial(_adapt_attention_input, Bypass(form, index, module))
    elif index - form["ffn_after"] in form["skip"]:
        attention = form["attention"] if inside == form["ffn"] else looking_back(form["attention"])
        hook = functools.partial(_adapt_ffn_input, form, attention)
    else:
        hook = functools.partial(_shift_ffn_input, form)
    # that of a self-attention takes the mean of the input as it was
    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=not form["context"])


def always() -> bool:
    return True


describe: Callable[[PreTrainedModel, Path, str | None], None] | None = None
"""Writes the model card of a model into a folder, for a repository if there is one; `peft_eas` puts it here."""


class EASMixin:
    """A transformers model whose attentions are partly gone; comes before the base class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        restructure(self, config.eas)
        if depends_on_prompt(config.eas):
            watch_prompt(self, always)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the base class: of other classes, transformers leaves buffers that no checkpoint holds without values."""
        base = next(c for c in cls.__mro__ if c.__module__ != __name__)
        return not base.__module__.startswith("transformers.")

    def generate(self, *args, **kwargs):
        with generation(args, kwargs):
            return super().generate(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint whose layers are not those of its configuration is an error.

        Raises:
            ValueError: if weights of the layers are missing, or there are some that no layer has.
            OSError: if a file of weights is truncated or corrupt.
        """
        name = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights in {name} can't be read ({error}): a file is truncated or corrupt. Download it again, or "
                "merge again."
            ) from error
        # a head for another task is new, or left out, by right; a layer never is
        lists = "|".join(re.escape(form["layers"]) for form in model.config.eas["attentions"])
        of_layer = re.compile(rf"(^|\.)({lists})\.\d+\.")
        wrong = {kind: sorted(filter(of_layer.search, info[f"{kind}_keys"])) for kind in ("missing", "unexpected")}
        if any(wrong.values()):
            listed = "; ".join(
                f"{kind}: {', '.join(keys[:4])}{' ...' * (len(keys) > 4)}" for kind, keys in wrong.items() if keys
            )
            raise ValueError(
                f"The weights in {name} are not those of its config.json, which skips the attentions of layers "
                f"{skipped(model.config.eas)} ({listed}). Use the config.json that was saved with the weights."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory, *args, push_to_hub: bool = False, distributed_checkpoint: bool = False, **kwargs
    ) -> None:
        """As in transformers, but what is in the folder is replaced only when all new files are complete."""
        self.config.auto_map = {
            "AutoConfig": f"modeling_eas.{type(self.config).__name__}",
            **{
                auto: f"modeling_eas.EAS{c.__name__}" for auto, c in auto_classes(self.config.eas["model_type"]).items()
            },
        }
        # by the names of its own modules, and not by those of the checkpoint that the base model came from
        kwargs.setdefault("save_original_format", False)
        folder = Path(save_directory)
        if push_to_hub:
            self.save_pretrained(folder, *args, **{k: v for k, v in kwargs.items() if k not in _HUB_KWARGS})
            self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, *args, **kwargs)
            return
        if distributed_checkpoint:  # all processes write to one folder
            super().save_pretrained(folder, *args, distributed_checkpoint=True, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            super().save_pretrained(scratch, *args, **kwargs)
            written = sorted(Path(scratch).iterdir())
            for file in written:
                os.replace(file, folder / file.name)
        if describe is not None and kwargs.get("is_main_process", True):
            describe(self, folder, None)
        names = {file.name for file in written}
        if any(map(_WEIGHTS.fullmatch, names)):
            for file in folder.iterdir():  # or an earlier model's weights would be read, if it had other shards
                if _WEIGHTS.fullmatch(file.name) and file.name not in names:
                    file.unlink()

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # transformers has put an empty card there since `save_pretrained`
        if describe is not None:
            describe(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


_HUB_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def auto_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """`{auto class: model class}` that transformers has for `model_type`, those registered from outside included."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not name.startswith("AutoModel"):
            continue
        value = mapping._model_mapping.get(model_type)
        candidates = [getattr(transformers, value)] if isinstance(value, str) else []
        candidates += [model for config, model in mapping._extra_content.items() if config.model_type == model_type]
        for model in candidates:
            if model.config_class.model_type == model_type:  # some entries are models of another configuration
                found[name] = model
    return found


class EASConfigMixin:
    """A transformers configuration with the record `eas`; comes before the base class."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        register_models(cls)
        return super().from_dict(config_dict, **kwargs)


def register_config(base: type[PreTrainedConfig]) -> None:
    """Let `AutoConfig` know merged models over `base`; their model classes follow when one is loaded."""
    AutoConfig.register(f"eas_{base.model_type}", eas_class(base), exist_ok=True)


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Let transformers' auto classes know the merged models of `config_class`."""
    for auto, base in auto_classes(config_class.model_type.removeprefix("eas_")).items():
        getattr(modeling_auto, auto).register(config_class, eas_class(base), exist_ok=True)


def eas_class(base: type) -> type:
    """The class of merged models over the model class `base`, or of their configurations over the class `base`."""
    name = f"EAS{base.__name__}"
    known = globals().get(name)
    if known is not None and base in known.__bases__:
        return known
    if issubclass(base, PreTrainedConfig):
        mixin, members = EASConfigMixin, {"model_type": f"eas_{base.model_type}", "_auto_class": "AutoConfig"}
    else:
        autos = [auto for auto, cls in auto_classes(base.config_class.model_type).items() if cls is base]
        members = {"config_class": eas_class(base.config_class), "_auto_class": autos[0] if autos else "AutoModel"}
        mixin = EASMixin
    made = types.new_class(name, (mixin, base), exec_body=lambda ns: ns.update(members, __module__=__name__))
    globals()[name] = made
    return made


def __getattr__(name: str) -> type:
    """Make `EAS<class>` from the transformers class `<class>`."""
    base = getattr(transformers, name.removeprefix("EAS"), None) if name.startswith("EAS") else None
    if not (isinstance(base, type) and issubclass(base, (PreTrainedConfig, PreTrainedModel))):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: transformers {transformers.__version__} has no class "
            f"{name.removeprefix('EAS')!r}. If the family was registered from outside, import what registers it."
        )
    return eas_class(base)
