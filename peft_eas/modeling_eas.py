"""Models merged by peft_eas: what they need at run time.

A merged model is a transformers model of its base class with some attentions gone. This file holds all that such a
model needs, for every family, and imports nothing but torch and transformers: it travels with each checkpoint, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it where `peft_eas` is not installed. The
names `EAS<class>` (`EASLlamaForCausalLM`, `EASLlamaConfig`, ...) are made on demand from the transformers `<class>`.

What is skipped and folded is recorded in `config.eas`; see `restructure`. Where the layers depend on the prompt
(`propagation="prompt"`, `router="prompt"`), the outermost model finds out which tokens are the prompt
(`PromptBoundary`) and hands a mask down to the layers; what a layer makes of it is kept in that layer's entry of the
KV cache (`PromptSlot`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.models.auto import modeling_auto

PROMPT_MASK = "eas_prompt_mask"
"""Keyword by which the mask `(B, T)` of the prompt's tokens travels from the outermost model to the layers."""

FORMAT = 1
"""Version of `config.eas`; a file of another version is refused."""


class _Local(threading.local):
    """What belongs to this thread's current forward or `generate`."""

    context: PromptContext | None = None  # the layer under way, from its attention to its FFN
    explicit: torch.Tensor | None = None  # see `prompt_mask`
    generations: tuple[_Generation, ...] = ()  # the calls of `generate` under way, outermost first


class _Generation:
    """One call of `generate`: how many tokens its prompt has, and whether its first forward has been."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.started = False


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
    before = _local.generations
    _local.generations = (*before, _Generation(1 if given is None else given.shape[1]))
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
        if kwargs.get(PROMPT_MASK) is not None or not self.is_needed():
            return None
        mask = self._find(dict(zip(self.names, args, strict=False)) | kwargs, module.training)
        if _local.generations:
            _local.generations[-1].started = True
        return None if mask is None else (args, kwargs | {PROMPT_MASK: mask})

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
            raise ValueError(f"{_SUBJECT} can't be told from its neighbours in a packed row. {_WAYS_OUT}")
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
            prompt_length = _local.generations[-1].prompt_length
            if length < prompt_length:
                raise ValueError(
                    f"{_SUBJECT} must be read in one forward, but the first one has {length} of its {prompt_length} "
                    f"tokens (chunked prefill, say): set `prefill_chunk_size=None`. {_WAYS_OUT}"
                )
            mask = mask & (torch.arange(length, device=mask.device) < prompt_length)
        return mask

    @staticmethod
    def _check_continuation(explicit: torch.Tensor | None, length: int) -> None:
        if explicit is not None:
            if explicit.any():
                raise ValueError(f"{_SUBJECT} was read already by this KV cache: no further tokens can be added to it.")
            return
        # Inside of `generate`, several tokens after the first forward are drafts to be verified; so are those of an
        # assistant, whose own `generate` runs inside of another.
        generations = _local.generations
        are_drafts = len(generations) > 1 or (generations and generations[0].started)
        if length > 1 and not are_drafts:
            raise ValueError(
                f"{_SUBJECT} was read already by this KV cache, and {length} more tokens come at once. If they belong "
                "to the prompt (a further turn, chunked prefill), start with a new cache and all tokens; if not, say "
                "so: `with prompt_mask(torch.zeros(batch, tokens)): model(...)`."
            )


_SUBJECT = "The prompt of a model with `propagation='prompt'` or `router='prompt'`"
_WAYS_OUT = (
    "Ways out: labels that are -100 for the prompt's tokens; `with peft_eas.prompt_mask(mask): ...` around the "
    "forward; or a model with `propagation='none'` and `router='static'`."
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


def prompt_mean(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean, in float32 or wider, of `z (B, T, d)` over the tokens where `mask (B, T)` is true: `(B, 1, d)`."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    weights = mask.to(device=z.device, dtype=wide.dtype).unsqueeze(1)
    return ((weights @ wide) / weights.sum(-1, keepdim=True)).to(z.dtype)


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
        cache.layers[layer_idx] = PromptSlot()
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
        down: Projection of the propagated information, in merged models.
    """

    def __init__(
        self, mask: torch.Tensor | None, state: dict[str, torch.Tensor], down: nn.Linear | None = None
    ) -> None:
        if mask is not None:
            state.clear()
        self.mask = mask
        self.state = state
        self.down = down

    def once(self, name: str, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The value `name (B, 1, n)`, computed from the mask in a prefill and remembered from then on."""
        if name not in self.state:
            if self.mask is None:
                raise ValueError(
                    f"{_SUBJECT} has not been read by this KV cache. Pass the cache of the prefill, or call the "
                    "outermost model rather than a part of it."
                )
            self.state[name] = compute(self.mask)
        return self.state[name]

    def information(self, z: torch.Tensor) -> torch.Tensor:
        """The propagated information `(B, 1, r)`: the mean over the prompt's tokens of `z`, projected down."""
        return self.once("p", lambda mask: self.down(prompt_mean(z, mask)))


def enter_layer(context: PromptContext | None) -> None:
    """Make `context` the one that the current layer's FFN finds with `current_context`."""
    _local.context = context


def current_context() -> PromptContext | None:
    """The context that the current layer's attention has entered."""
    return _local.context


# ----------------------------------------------------------------------------------------------------------------------
# The modules of a merged layer
# ----------------------------------------------------------------------------------------------------------------------


class SkippedAttention(nn.Module):
    """Stands where an attention was: adds nothing, caches nothing.

    Args:
        layer_idx: Index of the layer.
        down: Projection of the propagated information (`z A^T + a`) for the FFN's input linears, if they need it.
    """

    def __init__(self, layer_idx: int, down: nn.Linear | None = None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.prompt_down = down

    def forward(self, hidden_states: torch.Tensor, *args, past_key_values=None, **kwargs) -> tuple[torch.Tensor, None]:
        slot = None if past_key_values is None else prompt_slot(past_key_values, self.layer_idx)
        state = {} if slot is None else slot.prompt_state
        enter_layer(PromptContext(kwargs.get(PROMPT_MASK), state, self.prompt_down))
        return hidden_states.new_zeros(1, 1, 1), None

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


class PromptLinear(nn.Linear):
    """A linear that reads a FFN's input, with the PIA folded in: `y = z W^T + w0 + p U^T`.

    The last term is one vector a sequence, `(B, 1, out)`: it is computed in the prefill and from then on a bias.

    Args:
        rank: Length of the propagated information `p`.
        name: Name under which the layer's cache entry keeps the vector.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, name: str, **factory) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.name = name
        self.prompt_up = nn.Parameter(torch.zeros(out_features, rank, **factory))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        context = _local.context or PromptContext(None, {})
        vector = context.once(self.name, lambda mask: F.linear(context.information(z), self.prompt_up))
        return super().forward(z).add_(vector)


class RoutedAdapter(nn.Module):
    """An adapter with `router="prompt"`, which no static weight can hold: kept as a rank-`r` product.

    Equations (1) and (2) of docs/method.md, with scaling, temperature, the PIA's 1/2 and the groups multiplied in.

    Args:
        hidden_size: `d`.
        rank: `r`.
        bias: Whether the projections have biases.
        propagates: Whether the prompt's information is added (a PIA with `propagation="prompt"`).
    """

    def __init__(self, hidden_size: int, rank: int, bias: bool, propagates: bool, **factory) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, 2, **factory)
        self.down = nn.Linear(hidden_size, rank, bias, **factory)
        self.up = nn.Linear(rank, 2 * hidden_size, bias, **factory)
        self.prompt_down = nn.Linear(hidden_size, rank, bias, **factory) if propagates else None

    def forward(self, z: torch.Tensor, context: PromptContext) -> torch.Tensor:
        alpha = context.once("alpha", lambda mask: torch.softmax(self.router(prompt_mean(z, mask)), dim=-1))
        hidden = self.down(z)
        if self.prompt_down is not None:
            hidden = hidden + context.once("p", lambda mask: self.prompt_down(prompt_mean(z, mask)))
        first, second = self.up(hidden).chunk(2, dim=-1)
        return z + alpha[..., :1] * first + alpha[..., 1:] * second


def cache_state(cache: cache_utils.Cache | None, layer_idx: int) -> dict[str, torch.Tensor]:
    """Where a retained attention keeps what it made of the prompt: beside its keys and values."""
    if cache is None:
        return {}
    layer = _entry(cache, layer_idx)
    if not hasattr(layer, "prompt_state"):
        layer.prompt_state = {}
    return layer.prompt_state


def _adapt_attention_input(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a retained attention with a `RoutedAdapter`."""
    mask = kwargs.pop(PROMPT_MASK, None)
    context = PromptContext(mask, cache_state(kwargs.get("past_key_values"), attention.layer_idx))
    if args:
        return (attention.eas_adapter(args[0], context), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": attention.eas_adapter(kwargs["hidden_states"], context)}


def _adapt_ffn_input(ffn: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of the FFN of a skipped attention with a `RoutedAdapter`."""
    return (ffn.eas_adapter(args[0], _local.context), *args[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Models and configurations
# ----------------------------------------------------------------------------------------------------------------------


def restructure(model: PreTrainedModel, eas: dict) -> None:
    """Give `model`, built as its base class builds it, the structure that `eas` (`config.eas`) records. Idempotent.

    `eas` holds: `layers`, `attention`, `ffn` (names), `norms` (those of a layer that go with its attention), `skip`
    (indices of layers without attention), `biased` (linears that a fold has given a bias), `prompt` (`rank`, `bias` and
    `linears` of the propagated information, or `None`), `routed` (`{module: rank}` of kept adapters), `use_bias`.

    Raises:
        ValueError: if `eas` was written by another version.
    """
    if eas.get("format") != FORMAT:
        raise ValueError(
            f"This checkpoint has format {eas.get('format')!r} of `config.eas`, but this modelling file reads format "
            f"{FORMAT}: use the modelling file that came with the checkpoint, or a matching version of peft_eas."
        )
    layers = model.get_decoder().get_submodule(eas["layers"])
    prompt = eas["prompt"]
    for name in eas["biased"]:
        linear = layers.get_submodule(name)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for index in eas["skip"]:
        layer = layers[index]
        attention = getattr(layer, eas["attention"])
        if isinstance(attention, SkippedAttention):
            continue
        like = next(attention.parameters())
        down = None
        if prompt is not None:
            ffn = getattr(layer, eas["ffn"])
            for name in prompt["linears"]:
                ffn.set_submodule(name, prompt_linear(ffn.get_submodule(name), prompt["rank"], name))
            width = ffn.get_submodule(prompt["linears"][0]).in_features
            down = nn.Linear(width, prompt["rank"], prompt["bias"], device=like.device, dtype=like.dtype)
        strip_attention(layer, eas["attention"], eas["norms"], SkippedAttention(index, down))
    for name, rank in eas["routed"].items():
        module = layers.get_submodule(name)
        if hasattr(module, "eas_adapter"):
            continue
        like = next(module.parameters())
        propagates = name.endswith(f".{eas['ffn']}") and eas["propagates"]
        width = model.config.get_text_config(decoder=True).hidden_size
        module.eas_adapter = RoutedAdapter(
            width, rank, eas["use_bias"], propagates, device=like.device, dtype=like.dtype
        )
        hook_routed_adapter(module, is_ffn=name.endswith(f".{eas['ffn']}"))


def strip_attention(layer: nn.Module, attention: str, norms: list[str], stand_in: SkippedAttention) -> None:
    """Put `stand_in` where a layer's attention was, and drop the norms that only the attention needed."""
    setattr(layer, attention, stand_in)
    for name in norms:
        setattr(layer, name, nn.Identity())


def hook_routed_adapter(module: nn.Module, is_ffn: bool) -> None:
    """Let `module.eas_adapter` see the module's input first."""
    if is_ffn:
        module.register_forward_pre_hook(_adapt_ffn_input)
    else:
        module.register_forward_pre_hook(_adapt_attention_input, with_kwargs=True)


def prompt_linear(linear: nn.Linear, rank: int, name: str) -> PromptLinear:
    """`linear` as a `PromptLinear` that shares its parameters."""
    if isinstance(linear, PromptLinear):
        return linear
    weight = linear.weight
    new = PromptLinear(
        linear.in_features, linear.out_features, False, rank, name, device=weight.device, dtype=weight.dtype
    )
    new.weight, new.bias = weight, linear.bias
    return new


def watch_prompt(model: PreTrainedModel) -> None:
    """Let the outermost `model` find the prompt in each forward, if its layers depend on it."""
    eas = model.config.eas
    if eas["prompt"] is not None or eas["routed"]:
        model.register_forward_pre_hook(PromptBoundary(model, _always), with_kwargs=True)


def _always() -> bool:
    return True


describe: Callable[..., None] | None = None
"""Writes a merged model's card. Called with the model, the folder that it was saved to and, when it is pushed, the name
of its repository. peft_eas sets it, where that is imported."""


class EASMixin:
    """A transformers model whose attentions are partly gone; comes before the base class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        restructure(self, config.eas)
        watch_prompt(self)

    def generate(self, *args, **kwargs):
        with generation(args, kwargs):
            return super().generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        self.config.auto_map = {
            "AutoConfig": f"modeling_eas.{type(self.config).__name__}",
            **{auto: f"modeling_eas.EAS{name}" for auto, name in auto_classes(self.config.eas["model_type"]).items()},
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        if describe is not None and kwargs.get("is_main_process", True) and not kwargs.get("push_to_hub"):
            describe(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        if describe is not None:  # by now, transformers has put the repository's card or its empty template there
            describe(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


@functools.cache
def auto_classes(model_type: str) -> dict[str, str]:
    """`{auto class: name of the model class}` that transformers has for `model_type`."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        value = None if mapping is None or not name.startswith("AutoModel") else mapping._model_mapping.get(model_type)
        # some entries are models of another configuration
        if isinstance(value, str) and getattr(transformers, value).config_class.model_type == model_type:
            found[name] = value
    return found


class EASConfigMixin:
    """A transformers configuration with the record `eas`; comes before the base class."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        register_models(cls)
        return super().from_dict(config_dict, **kwargs)


def register_config(base: type[PreTrainedConfig]) -> None:
    """Let `AutoConfig` know merged models over `base`; their model classes follow when one is loaded."""
    AutoConfig.register(f"eas_{base.model_type}", getattr(sys.modules[__name__], f"EAS{base.__name__}"), exist_ok=True)


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Let transformers' auto classes know the merged models of `config_class`."""
    for auto, name in auto_classes(config_class.model_type.removeprefix("eas_")).items():
        getattr(modeling_auto, auto).register(config_class, getattr(sys.modules[__name__], f"EAS{name}"), exist_ok=True)


def __getattr__(name: str) -> type:
    """Make `EAS<class>` from the transformers class `<class>`."""
    base = getattr(transformers, name.removeprefix("EAS"), None) if name.startswith("EAS") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        members = {"model_type": f"eas_{base.model_type}", "_auto_class": "AutoConfig"}
        bases: tuple[type, ...] = (EASConfigMixin, base)
    elif isinstance(base, type) and issubclass(base, PreTrainedModel):
        config = getattr(sys.modules[__name__], f"EAS{base.config_class.__name__}")
        autos = [auto for auto, cls in auto_classes(base.config_class.model_type).items() if cls == base.__name__]
        members = {"config_class": config, "_auto_class": autos[0] if autos else "AutoModel"}
        bases = (EASMixin, base)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = types.new_class(name, bases, exec_body=lambda ns: ns.update(members, __module__=__name__))
    globals()[name] = made
    return made
