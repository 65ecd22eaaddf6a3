"""Every family of the table as a tiny random model: configurations, models, inputs, and adapters that do something."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from peft_eas import FAMILIES, EASConfig
from peft_eas.families import find_layers
from zoo import audio_language, decoders, encoder_decoders, encoders, fusion, tiny, vision_language
from zoo.audio_language import SOUNDS
from zoo.sizes import AUDIO_TOKEN, IMAGE_TOKEN, SIZES, TOWER
from zoo.vision_language import IMAGES, UNPADDED

PARTICULAR = decoders.PARTICULAR | vision_language.PARTICULAR | audio_language.PARTICULAR
EXAMPLES = encoders.EXAMPLES | fusion.EXAMPLES | encoder_decoders.EXAMPLES


def whole_models() -> list[str]:
    """Families of this version of transformers that are models of their own; the others are decoders of these."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known -= {"trocr"}  # which is nothing without an encoder
    known |= (EXAMPLES | SOUNDS).keys() & CONFIG_MAPPING.keys()
    return [model_type for model_type in FAMILIES if model_type in known]


def generates(model_type: str) -> bool:
    """Whether the model of a family that is tried here generates text."""
    return model_type not in EXAMPLES or EXAMPLES[model_type].section == "Encoder-decoders"


def auto_class(model_type: str) -> type:
    """A vision-language model is also known by its language model alone."""
    if model_type in EXAMPLES:
        return EXAMPLES[model_type].model
    for names, auto in (
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, AutoModelForMultimodalLM),
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    ):
        if model_type in names:
            return auto
    return AutoModelForSeq2SeqLM


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's configuration with small sizes, and models within it likewise."""
    cls = CONFIG_MAPPING[model_type]
    settings = _sized(cls, SIZES)
    if "text_config" in cls.sub_configs:
        default = cls()
        tokens = {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}
        named = {f"{what}_token_{end}": token for what, token in tokens.items() for end in ("id", "index")}
        settings = {name: token for name, token in named.items() if hasattr(default, name)}
        for name in cls.sub_configs:
            inner = getattr(default, name)
            if name == "text_config":
                settings[name] = tiny_config(inner.model_type).to_dict()
            elif inner is not None:
                tower = _sized(type(inner), TOWER) | PARTICULAR.get(inner.model_type, {})
                settings[name] = {"model_type": inner.model_type} | tower
    return cls(**settings | PARTICULAR.get(model_type, {}))


def _sized(cls: type[PreTrainedConfig], sizes: dict) -> dict:
    names = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    return {k: v for k, v in sizes.items() if k in names and k not in getattr(cls, "attribute_map", {})}


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model whose layers matter: weights and biases large enough, norms that are not 1."""
    model, random_state = _made(model_type)
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=4)
def _made(model_type: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, and the state of torch's random numbers behind it; to make it takes longer than to copy it."""
    torch.manual_seed(0)
    model = build(
        auto_class(model_type), EXAMPLES[model_type].config() if model_type in EXAMPLES else tiny_config(model_type)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # positions that are what they are
                continue
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.15)
            elif (name.endswith("bias") and "dt" not in name) or name.endswith("_gate"):
                parameter.normal_(std=0.1)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as Youtu makes it whenever a model is loaded
    return model.eval(), torch.get_rng_state()


def build(cls: type, config: PreTrainedConfig) -> PreTrainedModel:
    return cls.from_config(config) if hasattr(cls, "_model_mapping") else cls(config)


def tiny_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """Prompts of three lengths, padded on the left, with an image or a sound in each if the family's are known here."""
    if model_type in EXAMPLES:
        return EXAMPLES[model_type].inputs()
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(3 if model_type not in UNPADDED else 0):
        mask[row, : 2 * row] = 0
    tokens, make = (IMAGES | SOUNDS).get(model_type, (0, dict))
    ids[:, 4 : 4 + tokens] = AUDIO_TOKEN if model_type in SOUNDS else IMAGE_TOKEN
    inputs = {"input_ids": ids * mask, "attention_mask": mask, **make()}
    model = auto_class(model_type)._model_mapping[CONFIG_MAPPING[model_type]]
    if model_type == "gemma3" or "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return inputs


def skipped(model: PreTrainedModel) -> list[int | str]:
    """Every second attention, the first among them; where layers have two, there are layers without the one, without
    the other, and without both."""
    layers = find_layers(model)
    places = {key: place for key, place in layers.items() if place.is_skippable}
    if not layers.by_name:
        return list(places)[::2]
    return [key for key, place in places.items() if place.index in ((0, 2, 3) if place.row.context else (0, 1, 3))]


def adapted(model_type: str, seed: int = 2, **settings) -> PeftModel:
    base = tiny_model(model_type)
    task = EXAMPLES[model_type].task if model_type in EXAMPLES else "CAUSAL_LM"
    config = EASConfig(**dict(skip_layers=skipped(base), task_type=task, propagation="mean") | settings)
    model = get_peft_model(base, config).eval()
    tiny.shake(model, seed)
    return model
