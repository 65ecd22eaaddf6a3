"""The layout of Nvidia's Nemotron-NAS models (`DeciLMForCausalLM`), which vLLM, SGLang and TensorRT-LLM load."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .llama_shape import ATTENTION, DTYPES, FFN, LlamaShape, llama_shape

SIZE_STEP = 256
"""The engines round the intermediate size up to a multiple of this."""


def write_nemotron_nas(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | None,
    pre_tokenizer: str | None,
) -> None:
    """Write configuration, weights and tokenizer into `folder`.

    Raises:
        ValueError: for a `dtype` that the engines don't load.
    """
    if pre_tokenizer is not None:
        raise ValueError("`pre_tokenizer` is for the format 'gguf'.")
    shape = llama_shape(model)
    dtype = dtype or str(shape.tensors["model.norm.weight"].dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"The format 'nemotron-nas' has no dtype {dtype!r}: choose from {', '.join(DTYPES)}.")
    biased, ffn_biased = shape.has_bias(ATTENTION), shape.has_bias(FFN)
    if biased or ffn_biased:
        dropped = "TensorRT-LLM ignores all biases" + (" and SGLang those of FFNs" if ffn_biased else "")
        warnings.warn(
            f"This model has biases. vLLM uses them, but {dropped}, without a word: train with `use_bias=False` "
            "and `stand_in='zero'` for these engines (a base model's own biases stay).",
            stacklevel=3,
        )
    size = math.ceil(shape.config.intermediate_size / SIZE_STEP) * SIZE_STEP
    config = _config(shape, dtype, biased, ffn_biased, size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("configuration_decilm.py"), folder)
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(_tensors(shape, DTYPES[dtype], biased, ffn_biased, size), folder)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def _config(shape: LlamaShape, dtype: str, biased: bool, ffn_biased: bool, size: int) -> dict:
    """What config.json says. Keys are those that transformers 4 reads, too: the engines come with either."""
    config = shape.config
    same = ("vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "initializer_range",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    group = config.num_attention_heads // config.num_key_value_heads
    # size = 2/3 * ffn_mult * hidden_size, as the engines have it
    ffn = {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5 * size / config.hidden_size}
    scaling = {key: value for key, value in shape.rope.items() if key != "rope_theta"}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "torch_dtype": dtype,
        **{key: getattr(config, key) for key in same},
        "intermediate_size": size,
        "head_dim": shape.head_dim,
        "attention_bias": biased,
        "mlp_bias": ffn_biased,
        "rope_theta": shape.rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "block_configs": [
            {
                "attention": {
                    "no_op": not has_attention,
                    "replace_with_linear": False,
                    "n_heads_in_group": group if has_attention else None,
                },
                "ffn": ffn,
            }
            for has_attention in shape.attention
        ],
    }


def _tensors(
    shape: LlamaShape, dtype: torch.dtype, biased: bool, ffn_biased: bool, size: int
) -> dict[str, torch.Tensor]:
    """The weights, with zeros where one layer has a bias and another has none, and where the size was rounded up."""
    tensors = {name: tensor.to(dtype) for name, tensor in shape.tensors.items()}
    for index, has_attention in enumerate(shape.attention):
        names = [f"self_attn.{name}" for name in ATTENTION if biased and has_attention]
        names += [f"mlp.{name}" for name in FFN if ffn_biased]
        for name in names:
            linear = f"model.layers.{index}.{name}"
            weight = tensors[f"{linear}.weight"]
            tensors.setdefault(f"{linear}.bias", weight.new_zeros(weight.shape[0]))
    missing = size - shape.config.intermediate_size
    if missing:
        for name, tensor in tensors.items():
            if name.endswith((".gate_proj.weight", ".up_proj.weight")):
                tensors[name] = F.pad(tensor, (0, 0, 0, missing))
            elif name.endswith((".gate_proj.bias", ".up_proj.bias", ".down_proj.weight")):
                tensors[name] = F.pad(tensor, (0, missing))
    return tensors


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # its name before transformers 5, which knows both
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
