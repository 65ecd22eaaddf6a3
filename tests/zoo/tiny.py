"""Six tiny decoders that differ in what matters, their prompts, and adapters that do something."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from peft_eas import EASConfig
from zoo.sizes import IMAGE_TOKEN

COMMON = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
MIXED = ["sliding_attention", "full_attention"] * 3


def _llava() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**COMMON)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)


CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**COMMON, layer_types=MIXED, sliding_window=6, use_sliding_window=True),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "gemma3_text": lambda: Gemma3TextConfig(**COMMON, head_dim=8, layer_types=MIXED, sliding_window=6),
    "llava": _llava,
}
FAMILIES = list(CONFIGS)
# Skip sets that have broken implementations: the first layer, the last, neighbours, all of one kind, all but one.
SKIP_SETS = {
    "first": [0, 3],
    "inner": [2, 3],
    "even": [0, 2, 4],
    "odd": [1, 3, 5],
    "last": [5],
    "most": [0, 1, 2, 3, 5],
}


def config(family: str) -> PreTrainedConfig:
    return CONFIGS[family]()


def auto(family: str) -> type:
    return AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM


def model(family: str, seed: int = 0, changes: dict | None = None, **kwargs) -> PreTrainedModel:
    """A tiny model with weights large enough for layers to matter, and norms that are not 1.

    `changes` are made to its configuration.
    """
    torch.manual_seed(seed)
    changed = config(family)
    changed.update(changes or {})
    made = auto(family).from_config(changed, **kwargs)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=0.15)
    return made.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the words `w0` to `w89`, whose tokens are 3 to 92."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i + 3 for i in range(90)} | {"<unk>": 95}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def inputs(family: str, rows: int = 3, length: int = 11, padding: str | None = "left", seed: int = 1) -> dict:
    """Prompts of different lengths, `{input_ids, attention_mask, ...}`; with an image in each row for LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    given = {}
    if family == "llava":
        ids[:, -6:-2] = IMAGE_TOKEN
        given["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator)
    if padding:
        for row in range(rows):  # the first row has none
            where = slice(0, 2 * row) if padding == "left" else slice(length - row, length)
            if family == "llava" and padding == "right":
                continue
            mask[row, where] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, **given}


def adapted(family: str = "llama", base: PreTrainedModel | None = None, **settings) -> PeftModel:
    """A tiny model, or another base, with an adapter that skips two attentions unless `settings` say otherwise."""
    made = get_peft_model(base or model(family), EASConfig(**dict(skip_layers=[0, 3]) | settings)).eval()
    shake(made)
    return made


def shake(peft_model: PeftModel, seed: int = 2, scale: float = 0.1) -> None:
    """Give the adapters random weights, so that they and their biases matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "eas_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
