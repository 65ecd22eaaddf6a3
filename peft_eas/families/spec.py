"""What has to be known of a model family, as data: `Attentions` of one kind, and the `Family` that has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..checks import choice, integer, refused
from ..runtime.eas_record import CONVENTIONS, Form

# names of linears and norms that many rows have in common
SPLIT = ("q_proj", "k_proj", "v_proj")
QKV = ("query", "key", "value")
LONG = (*QKV, *(f"{name}_global" for name in QKV))
LATENT = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")  # multi-head latent attention
GATED = ("gate_proj", "up_proj")
PRE = ("input_layernorm",)
SELF_NORM = ("self_attn_layer_norm",)
POST = ("post_attention_layernorm",)


def _check(row: Attentions | Family) -> None:
    """Refuse what is of another kind than a field's annotation says; above all text for a tuple of names."""
    for place in fields(row):
        value = getattr(row, place.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(row, place.name, value)
        accepts, allowed = _KINDS[str(place.type)]
        if not accepts(value):
            raise refused(f"{type(row).__name__}.{place.name}", value, allowed)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.*|-]*", value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_name, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (_is_name, "a name"),
    "str | None": (lambda v: v is None or (_is_name(v) and v != ""), "a name, or None"),
    "bool": (lambda v: isinstance(v, bool), "True or False"),
    "int": (lambda v: isinstance(v, int) and not isinstance(v, bool), "an integer"),
    "tuple[str, ...]": (_are_names, "a tuple of names"),
    "tuple[str, ...] | None": (lambda v: v is None or _are_names(v), "a tuple of names, or None"),
    "tuple[Attentions, ...]": (
        lambda v: isinstance(v, tuple) and v != () and all(isinstance(item, Attentions) for item in v),
        "a tuple of `Attentions`",
    ),
}
"""Whether a value is of the kind that a row's annotation says, and what that is called in an error."""


@dataclass(frozen=True, kw_only=True)
class Attentions(Form):
    """Attentions of one kind in one list of layers. Names of modules are relative to the line before them.

    Attributes:
        stack: What the list is called in the names of its attentions, `"encoder"` in `"encoder.3.self"`.
        layers: The list of layers, in the model.
        attention: The attention, in a layer; layers without one are left alone.
        has: What an attention has, where other modules go by its name: those without are left alone, such as linear
            attentions, or attentions that take their keys and values from an earlier layer (Gemma 4).
        core: The part of the attention whose input only its linears read, where the attention itself adds its input to
            what that part gives (BERT).
        attention_inputs: The linears of the attention that read its input; those that a layer has of them. Of a
            cross-attention: those that read the stream which it adds to. None for an attention without an adapter, as
            none could be folded: where other than linears read the input, or these linears read something else, too
            (DeBERTa-v2), or several layers share the weights, whose first is then never skipped (Zamba).
        attention_norms: The norms, in a layer, that only the attention reads; those that a layer has.
        output_norms: The norms, in a layer, that the attention's output goes through; a linear without bias, in Zamba.
        residual_norm: The norm, in the attention, that its input goes through when it has been added (BERT); `""` if
            there is none (XLM-RoBERTa-XL).
        convention: `"plain"`: the attention returns what it adds to the residual stream; `"adds_input"`: it adds its
            own input itself (BERT); `"adds_residual"`: it adds the stream, its second argument, itself (BLOOM).
        returns: What an attention returns besides its output: names of arguments that it passes on, or `""` for `None`;
            `None` if it returns the output alone, in no tuple (LayoutLM).
        keeps_first: Whether the first attention of the list is never skipped, as others need it: T5's has the relative
            positions of all; that of a decoder with cross-attentions says how long the KV cache is.
        keeps_if: An attribute of the attentions; one where it is true is never skipped, as later layers take their keys
            and values from it (Gemma 4).
        causal: Whether a token looks at itself and those before it, where no mask says so.
        answers: Whether all tokens are answers: of a decoder that has an encoder.
        context: Of a cross-attention, the argument with the tokens that keys and values come from.
        context_inputs: The linears that read these.
        mask: The argument with the attention's mask; `""` if it may look at all tokens (BEiT's has position biases).
        mask_hides: Whether that says what may not be looked at (MPT).
        shows_keys: Whether the model looks into the cache for keys (Mllama, to know whether there have been images).
        ffn: The FFN, in a layer. An attention that none follows is never skipped.
        ffn_after: How many layers after that of the attention: 1 where each layer is one of them (Nemotron-H).
        ffn_inputs: The linears of the FFN that read its input (`""`: the FFN is that linear), routers and the stacked
            weights of experts included; those that a layer has of them. A `*` stands for the names of experts; of names
            with a `|` between them, the first that a layer has is meant.
        ffn_back: Of a cross-attention that its layer calls a second time, for the tokens that were looked at to look
            back (LXMERT): the FFN of these, with the same `ffn_inputs`. It is skipped both times or not at all.
        ffn_masks_input: Whether the FFN makes zeros of its input where there is padding, as Mamba does: what is added
            to the input can't then be made a bias.
        stacked_axis: Which axis of stacked weights is the input's: -1 for `(experts, out, in)`, -2 for `(experts, in,
            out)`.
    """

    stack: str = "decoder"
    layers: str = "layers"
    attention: str = "self_attn"
    has: str = ""
    core: str = ""
    attention_inputs: tuple[str, ...] = SPLIT
    attention_norms: tuple[str, ...] = PRE
    output_norms: tuple[str, ...] = ()
    residual_norm: str = ""
    convention: str = "plain"
    returns: tuple[str, ...] | None = ("",)
    keeps_first: bool = False
    keeps_if: str = ""
    causal: bool = True
    answers: bool = False
    context: str = ""
    context_inputs: tuple[str, ...] = ()
    mask: str = "attention_mask"
    mask_hides: bool = False
    shows_keys: bool = False
    ffn: str = "mlp"
    ffn_after: int = 0
    ffn_inputs: tuple[str, ...] = GATED
    ffn_masks_input: bool = False
    ffn_back: str = ""
    stacked_axis: int = -1

    def __post_init__(self) -> None:
        _check(self)
        if self.stacked_axis not in (-1, -2):
            raise refused("stacked_axis", self.stacked_axis, "-1 or -2")
        choice("convention", self.convention, CONVENTIONS)
        integer("ffn_after", self.ffn_after, 0)


@dataclass(frozen=True)
class Family:
    """Where a family keeps what EAS touches.

    Attributes:
        model_type: `config.model_type` of the model.
        attentions: All kinds of attentions that it has, in the order in which a layer calls them; most families have
            one, in one list of layers. Those of a Llama by default.
        decoder: Of a model around another one, such as a vision-language model, the name of that other model, or names
            with a `|` between them, of which the first that it has is meant. Its attentions are then those that the row
            of the other model's own `model_type` says, in place of `attentions`.
    """

    model_type: str
    attentions: tuple[Attentions, ...] = (Attentions(),)
    decoder: str | None = None

    def __post_init__(self) -> None:
        _check(self)


def alike(model_types: str, *attentions: Attentions) -> list[Family]:
    """The rows of model types, given with spaces between them, that have the same attentions."""
    return [Family(model_type, attentions) for model_type in model_types.split()]


def around(decoder: str, model_types: str) -> list[Family]:
    """The rows of model types, likewise, that are built around another model, which all of them call `decoder`."""
    return [Family(model_type, decoder=decoder) for model_type in model_types.split()]
