"""LaVIN (Luo et al., NeurIPS 2023, arXiv 2305.15023): a Llama that sees an image as a few tokens in front of the text.

A class of its own, which neither transformers nor peft_eas knows, and a row that makes it known to both. Whoever loads
a merged model of it imports this module before, and peft_eas with it.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    CLIPImageProcessorPil,
    GenerationMixin,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from peft_eas import Family, register_family


@strict
class LavinConfig(PreTrainedConfig):
    """
    Args:
        text_config: Of the language model.
        vision_config: Of the tower.
        vision_layers: The layers of the tower whose class tokens are seen: each becomes one token. LaVIN has every
            fourth of 24.
        bottleneck: Width between tower and language model.
        image_token_id: The token in whose places they are put.
    """

    model_type = "lavin"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vision_layers: list[int] | tuple[int, ...] = (4, 8, 12, 16, 20, 24)
    bottleneck: int = 128
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
            config = getattr(self, name) or {}
            if isinstance(config, dict):
                config = AutoConfig.for_model(**{"model_type": kind, **config})
            setattr(self, name, config)
        super().__post_init__(**kwargs)


class LavinPreTrainedModel(PreTrainedModel):
    config_class = LavinConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True


class LavinModel(LavinPreTrainedModel):
    """Tower, bottleneck and language model, without a head."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, config.bottleneck),
            nn.SiLU(),
            nn.Linear(config.bottleneck, config.text_config.hidden_size),
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images, `(images, 3, height, width)`, as tokens: `(images, vision_layers, hidden_size)`."""
        layers = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(torch.stack([layers[layer][:, 0] for layer in self.config.vision_layers], dim=1))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the language model; where `input_ids` has the image's token, the image's are put.

        Raises:
            ValueError: if there are not as many places as image tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self.get_image_features(pixel_values).to(inputs_embeds)
            places = input_ids == self.config.image_token_id
            if places.sum() != seen.shape[0] * seen.shape[1]:
                raise ValueError(
                    f"{len(pixel_values)} images have {seen.shape[0] * seen.shape[1]} tokens, "
                    f"and `input_ids` {places.sum()} places for them."
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], seen)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class LavinForConditionalGeneration(LavinPreTrainedModel, GenerationMixin):
    """LaVIN with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.model = LavinModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of any causal language model, with `pixel_values` of the images whose places are in `input_ids`."""
        output = self.model(
            input_ids, pixel_values, inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)

    def prepare_inputs_for_generation(
        self, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> dict:
        """The images are read with the prompt, and are in the KV cache then."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


AutoConfig.register("lavin", LavinConfig)
AutoModelForImageTextToText.register(LavinConfig, LavinForConditionalGeneration)
register_family(Family("lavin", decoder="language_model"))  # the language model's own row says the rest


def put_together(
    tower: PreTrainedModel, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: tuple[int, ...]
) -> tuple[LavinForConditionalGeneration, LlavaProcessor]:
    """A LaVIN with these parts, a new bottleneck between them, and one more token, `<image>`; and its processor."""
    tokenizer.add_tokens("<image>", special_tokens=True)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LavinConfig(
        text_config=language_model.config,
        vision_config=tower.config,
        vision_layers=layers,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = LavinForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = language_model.generation_config
    size = tower.config.image_size
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        patch_size=size,  # the whole image is one patch,
        num_additional_image_tokens=len(layers) - 1,  # and so it has a token for each layer
        vision_feature_select_strategy="full",
    )
    return model, processor
