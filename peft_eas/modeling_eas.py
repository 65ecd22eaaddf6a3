"""Models merged by peft_eas: what they need at run time.

A merged model is a transformers model of its base class with some attentions gone. This file holds all that such a
model needs, for every family, and imports nothing but torch and transformers: it travels with each checkpoint, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it where `peft_eas` is not installed. The
names `EAS<class>` (`EASLlamaForCausalLM`, `EASLlamaConfig`, ...) are made on demand from the transformers `<class>`.

What is skipped and folded is recorded in `config.eas`; see `restructure`.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.models.auto import modeling_auto

FORMAT = 5
"""Version of `config.eas`; a file of another version is refused."""


# ----------------------------------------------------------------------------------------------------------------------
# What a skipped attention leaves
# ----------------------------------------------------------------------------------------------------------------------


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


class EmptyEntry(getattr(cache_utils, "DummyLayer", object)):
    """Cache entry of a skipped attention that keeps nothing: no keys and no values."""

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    is_sliding = None  # neither full nor sliding: transformers before 5.23 looks for the first layer of a kind by it
    _layer_type = None  # and Unlimited-OCR by this

    def __init__(self, **kwargs) -> None:
        self.is_initialized = True
        self.keys = self.values = None

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
        super().__init__(entry.number_of_states)
        vars(self).update({name: getattr(entry, name) for name in vars(self)})
        EmptyEntry.__init__(self)

    def reset(self) -> None:
        super().reset()
        EmptyEntry.reset(self)


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

    def _cache(self, kwargs: dict) -> cache_utils.Cache | None:
        """The KV cache among the arguments of the attention; older families call it `layer_past`."""
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        if isinstance(cache, cache_utils.EncoderDecoderCache):
            return cache.cross_attention_cache if self.form["context"] else cache.self_attention_cache
        return cache

    def pass_over(self, args: tuple, kwargs: dict) -> None:
        """Leave an entry without keys and values in the KV cache.

        Raises:
            ValueError: if the cache holds keys and values of this layer already.
        """
        cache = self._cache(kwargs)
        # of a decoder that has an encoder, the first entry is never skipped, so no other has to be passed over
        if cache is None or (self.form["answers"] and not self.form["context"]):
            return
        entry = self._entry(cache)
        if not isinstance(entry, EmptyEntry):
            self._check_unused(entry)
            has_state = isinstance(entry, cache_utils.LinearAttentionLayer)
            entry = cache.layers[self.index] = StateEntry(entry) if has_state else EmptyEntry()
        if self.form["shows_keys"]:
            others = self.argument(self.form["context"], args, kwargs)
            if entry.keys is None or others is not None:
                entry.keys = _first(args, kwargs).new_zeros(0 if others is None else 1)

    def retain(self, kwargs: dict) -> None:
        """See that a retained attention finds in the KV cache what it left there itself.

        Raises:
            ValueError: if there is something that it left when it was skipped.
        """
        cache = self._cache(kwargs)
        entry = cache.layers[self.index] if cache is not None and self.index < len(cache.layers) else None
        if getattr(entry, "eas_rank", None):
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
        hidden_states, is_cross = _first(args, kwargs), bool(self.form["context"])
        tokens = self.argument(self.form["context"], args, kwargs) if is_cross else hidden_states
        values = None
        if tokens is not None:
            tokens = tokens.reshape(len(hidden_states), -1, tokens.shape[-1])  # Mllama's come tile by tile
            values = F.linear(tokens.to(down.dtype), down)
        values = self._remembered(values, kwargs, is_cross)
        mask = self.argument(self.form["mask"], args, kwargs)
        _check_readable(mask, config)
        length, total = hidden_states.shape[1], values.shape[1]
        is_causal = self.form["causal"] and not is_cross
        if mask is not None:
            return uniform_attention(values, looked_at(mask, length, total, is_causal, self.form["mask_hides"]))
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


UNREADABLE = (
    "With `propagation='mean'`, skipped attentions read their mask, which can't be with {}: load the model with "
    "`attn_implementation='sdpa'` or `'eager'`, and generate by `generate`. Models with `propagation='none'` run with "
    "all."
)


def _check_readable(mask: object, config: PreTrainedConfig | None) -> None:
    kind = getattr(config, "_attn_implementation", None) or ""
    if not isinstance(mask, (torch.Tensor, type(None))) or any(name in kind for name in ("flash", "flex", "paged")):
        raise ValueError(UNREADABLE.format(repr(kind)))


# ----------------------------------------------------------------------------------------------------------------------
# The modules of a merged layer
# ----------------------------------------------------------------------------------------------------------------------


class SkippedAttention(nn.Module):
    """Stands where an attention was, and adds to the stream what it left, equation (2) of docs/method.md.

    Args:
        form: How such attentions are built and called, see `restructure`.
        layer_idx: Index of the layer.
        attention: The attention; what it is called with is looked at, and its norm of the residual stream is kept.
        width: Size `d` of the stream.
        constant: Whether there is a constant `stand_in (d,)`.
        rank: Rank `r` of what other tokens say, `up (d, r)` of the mean of `down (r, pooled)`; 0: nothing.
        pooled: Size of the tokens that it looks at.
    """

    def __init__(
        self,
        form: dict,
        layer_idx: int,
        attention: nn.Module,
        width: int,
        constant: bool = False,
        rank: int = 0,
        pooled: int = 0,
        **factory,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = getattr(attention, "config", None)
        self.bypass = Bypass(form, layer_idx, attention)
        self.stand_in = nn.Parameter(torch.zeros(width, **factory)) if constant else None
        self.down = nn.Parameter(torch.zeros(rank, pooled, **factory)) if rank else None
        self.up = nn.Parameter(torch.zeros(width, rank, **factory)) if rank else None
        *parents, leaf = form["residual_norm"].split(".")
        if leaf:
            module = self
            for name in parents:
                module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, attention.get_submodule(form["residual_norm"]))

    def forward(self, *args, **kwargs) -> torch.Tensor | tuple:
        if self.down is None:
            self.bypass.pass_over(args, kwargs)
            # a tensor of its own, since layers may change in place what an attention gives them
            first = _first(args, kwargs)
            added = first.new_zeros(1, 1, 1) if self.stand_in is None else self.stand_in.clone()[None, None]
        else:
            information = self.bypass.information(args, kwargs, self.down, self.config)
            added = F.linear(information, self.up, self.stand_in)
        stream = self.bypass.stream(args, kwargs, self, added)
        return self.bypass.returned(stream, args, kwargs)

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


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


def propagates(eas: dict) -> bool:
    """Whether skipped attentions of a model with the record `config.eas` say something of other tokens."""
    return any(left["rank"] for form in eas["attentions"] for left in form["left"])


def shift_input(layers: nn.ModuleList, name: str, shift: torch.Tensor) -> None:
    """Add `shift (d,)` to the input of the attention or FFN `name` (`"3.mlp"`): biases that its linears can't have."""
    module = layers.get_submodule(name)
    module.eas_shift = nn.Parameter(shift, requires_grad=False)
    module.register_forward_pre_hook(_shifted, with_kwargs=True)


def _shifted(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return change_input(args, kwargs, lambda z: z + module.eas_shift)


# ----------------------------------------------------------------------------------------------------------------------
# Models and configurations
# ----------------------------------------------------------------------------------------------------------------------


def restructure(model: PreTrainedModel, eas: dict) -> None:
    """Give `model`, built as its base class builds it, the structure that `eas` (`config.eas`) records. Idempotent.

    `eas` holds `decoder` (name of a vision-language model's language model) and `attentions`: for each kind of
    attention in each list of layers, how such attentions are built and called (`Attentions.form` of the module
    `families`) and what became of them: `present` (indices of layers that had one), `norms` and `output_norms` (those
    of a layer that go with its attention), `skip` (indices of layers that have lost it), `left` (for each of these,
    what is added in its place: the sizes that `SkippedAttention` takes), `biased` (linears that a fold has given a
    bias), `shifted` (attentions and FFNs whose input is shifted, with its size). For people, `by_name` (see `skipped`)
    and `config` (what the adapter was configured with).

    Raises:
        ValueError: if `eas` was written by another version, or names layers that are not there.
    """
    if eas.get("format") != FORMAT:
        raise ValueError(
            f"This checkpoint has format {eas.get('format')!r} of `config.eas`, but this modelling file reads format "
            f"{FORMAT}: merge the adapter again, or use the version of peft_eas (or the modelling file) that the "
            "checkpoint came with."
        )
    decoder = model if eas["decoder"] is None else outermost(model, eas["decoder"])[1]
    for form in eas["attentions"]:
        _, layers = outermost(decoder, form["layers"])
        if not set(form["skip"]) <= set(range(len(layers))):
            raise ValueError(
                f"config.json skips the attentions of layers {form['skip']}, but has {len(layers)} layers."
            )
        if len(form["left"]) != len(form["skip"]):
            raise ValueError(
                f"config.json skips the attentions of layers {form['skip']}, but has {len(form['left'])} records of "
                "what is left of them."
            )
        for name in form["biased"]:
            linear = layers.get_submodule(name)
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        for name, width in form["shifted"].items():
            if not hasattr(layers.get_submodule(name), "eas_shift"):
                shift_input(layers, name, next(layers.get_submodule(name).parameters()).new_zeros(width))
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
    for index, left in zip(form["skip"], form["left"], strict=True):
        layer = layers[index]
        attention = layer.get_submodule(form["attention"])
        if not isinstance(attention, SkippedAttention):
            like = next(p for p in layer.parameters() if p.is_floating_point())  # an attention may be quantised
            put_in = SkippedAttention(form, index, attention, **left, device=like.device, dtype=like.dtype)
            layer.set_submodule(form["attention"], put_in.train(layer.training))
        for name in (*form["output_norms"], *(() if left["rank"] else form["norms"])):
            if name in dict(layer.named_modules()):
                layer.set_submodule(name, nn.Identity())


def forget_ties(model: PreTrainedModel) -> None:
    """Let `model` know which of its tied weights are gone (layers of Zamba share those of their attentions)."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, _ in tensors}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if name in names}


describe: Callable[[PreTrainedModel, Path, str | None], None] | None = None
"""Writes the model card of a model into a folder, for a repository if there is one; `peft_eas` puts it here."""


class EASMixin:
    """A transformers model whose attentions are partly gone; comes before the base class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        restructure(self, config.eas)

    @classmethod
    def _base(cls) -> type[PreTrainedModel]:
        return next(c for c in cls.__mro__ if c.__module__ != __name__)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the base class: of other classes, transformers leaves buffers that no checkpoint holds without values."""
        return not cls._base().__module__.startswith("transformers.")

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, but refused where the mask is read, before anything runs."""
        if propagates(self.config.eas):
            raise ValueError(UNREADABLE.format("continuous batching"))
        return super().init_continuous_batching(*args, **kwargs)

    # transformers reads in the module of a class whether it can

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._base()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._base()._can_set_experts_implementation()

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
