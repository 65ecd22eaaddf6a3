"""A merged model as a Llama of which some layers have no attention: what the formats of this package can hold."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..runtime.eas_record import Record

ELSEWHERE = "transformers runs the merged model as it is; the format 'onnx' holds one forward of it."
"""What to do with a model that a format can't hold."""
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""`{model_type: class}` of the models that are Llamas, but for biases and sliding windows."""

UNFIT = {
    "qwen3": "it normalises queries and keys",
    "gemma3_text": "it has norms behind its attentions and FFNs, and scales its embeddings",
}
"""`{model_type: why not}` of families that look alike."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PLACES = re.compile(
    r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight|model\.layers\.\d+\.("
    rf"(input|post_attention)_layernorm\.weight|self_attn\.({'|'.join(ATTENTION)})\.(weight|bias)|"
    rf"mlp\.({'|'.join(FFN)})\.(weight|bias))"
)


@dataclass(frozen=True)
class LlamaShape:
    """What a format writes.

    Attributes:
        config: The configuration of the model.
        rope: `{"rope_type": ..., "rope_theta": ..., ...}`.
        head_dim: Size of an attention's head.
        tensors: The parameters, by the names they have in `LlamaForCausalLM`; those of a skipped attention and its
            norm are missing.
        attention: For each layer, whether it has an attention.
    """

    config: PreTrainedConfig
    rope: dict[str, Any]
    head_dim: int
    tensors: dict[str, torch.Tensor]
    attention: tuple[bool, ...]

    def has_bias(self, names: tuple[str, ...]) -> bool:
        """Whether any linear of one of these `names` has a bias."""
        return any(tensor.endswith(tuple(f".{name}.bias" for name in names)) for tensor in self.tensors)


def llama_shape(model: PreTrainedModel) -> LlamaShape:
    """See `model` as a Llama.

    An attention that layer 0 doesn't have is put in as zeros, with a warning: llama.cpp, vLLM and SGLang can't begin
    with a layer that has none.

    Raises:
        ValueError: if it is none, with what stands in the way and what to do about it.
    """
    config = model.config
    model_type = config.model_type.removeprefix("eas_")
    name = type(model).__name__.removeprefix("EAS")
    if name != FAMILIES.get(model_type):
        why = f": {UNFIT[model_type]}" if model_type in UNFIT else ""
        raise ValueError(
            f"A {name} can't be exported so, since the engines' layers without attention are those of Llama{why}. What "
            f"can be: {', '.join(FAMILIES.values())}. {ELSEWHERE}"
        )
    if hasattr(config, "eas") and not Record.read(config.eas).is_plain:
        raise ValueError(
            "Skipped attentions of this model leave a linear map (`stand_in='linear'`), which the engines' layers have "
            "no place for. Ways out: training with `EASConfig(stand_in='mean')`, or `model.freeze_context(dataloader)` "
            "on the model with adapters before it is merged."
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"This model's activation is {config.hidden_act!r}, but the engines' layers only know silu. {ELSEWHERE}"
        )
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"This model rotates a part of each head only (`partial_rotary_factor`), unlike Llama. {ELSEWHERE}"
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    attention = [f"model.layers.{i}.self_attn.q_proj.weight" in tensors for i in range(config.num_hidden_layers)]
    _check_window(config, attention)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _move_stand_ins(tensors, attention)
    misfits = [name for name in tensors if not _PLACES.fullmatch(name)]
    if misfits:
        raise ValueError(
            f"This model has parameters that a Llama has no place for: {', '.join(misfits[:5])}. {ELSEWHERE}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not attention[0]:
        warnings.warn(
            "Layer 0 has no attention, but llama.cpp, vLLM and SGLang can't begin with such a layer: it gets one of "
            "zeros, which changes nothing but takes the time and the KV cache of an attention.",
            stacklevel=4,
        )
        tensors |= _zero_attention(config, head_dim, tensors["model.norm.weight"])
        attention[0] = True
    return LlamaShape(config, rope, head_dim, tensors, tuple(attention))


def _move_stand_ins(tensors: dict[str, torch.Tensor], attention: list[bool]) -> None:
    """What is added where an attention is skipped becomes the bias of what writes the stream just before: the last
    linear of the layer before, as no norm stands between; of layer 0, the bias of its attention's output."""
    for index in range(len(attention)):
        stand_in = tensors.pop(f"model.layers.{index}.self_attn.stand_in.constant", None)
        if stand_in is not None:
            before = f"model.layers.{index - 1}.mlp.down_proj" if index else "model.layers.0.self_attn.o_proj"
            bias = tensors.get(f"{before}.bias")
            tensors[f"{before}.bias"] = stand_in if bias is None else bias + stand_in


def _check_window(config: PreTrainedConfig, attention: list[bool]) -> None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(attention)
    slides = any(has and type == "sliding_attention" for has, type in zip(attention, types, strict=True))
    if window is not None and slides and window < config.max_position_embeddings:
        raise ValueError(
            f"Attentions of this model see {window} tokens back (`sliding_window`), which the formats can't say. For "
            f"sequences no longer than that, it makes no difference: set `model.config.max_position_embeddings = "
            f"{window}`, and export again."
        )


def _zero_attention(config: PreTrainedConfig, head_dim: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """An attention for layer 0 whose output is zero."""
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes = zip(ATTENTION, [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)], strict=True)
    zeros = {f"model.layers.0.self_attn.{name}.weight": like.new_zeros(shape) for name, shape in shapes}
    return zeros | {"model.layers.0.input_layernorm.weight": torch.ones_like(like)}
