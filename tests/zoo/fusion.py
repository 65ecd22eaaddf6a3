"""Models of texts and images that are no decoders: two towers, or one of both."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import transformers
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForVisualQuestionAnswering

from zoo.example import Example
from zoo.inputs import CLASSES, answers, frames, patches_of_shapes, pictured_words, pixels, region_words, regions, words
from zoo.sizes import ENDS, IMAGE_TOKEN, NUM_LAYERS, TEXT, VISION

SMALL_EFFICIENTNET = dict(
    image_size=32, width_coefficient=0.25, depth_coefficient=0.25, in_channels=[8, 8], out_channels=[8, 8],
    kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2], hidden_dim=16,
)  # fmt: skip


def matches(config: type, text: dict | None = None, **settings) -> Example:
    """Two towers, trained to tell which text belongs to which image."""
    sizes = dict(text_config=TEXT | ENDS | (text or {}), vision_config=VISION, projection_dim=16) | settings
    return Example(
        "Fusion of texts and images", AutoModel, partial(config, **sizes), lambda: words() | pixels(16),
        {"return_loss": True}, "logits_per_image",
    )  # fmt: skip


EXAMPLES: dict[str, Example] = {
    "aimv2": dataclasses.replace(matches(transformers.Aimv2Config), labels=None),
    "align": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.AlignConfig(text_config=TEXT, vision_config=SMALL_EFFICIENTNET, projection_dim=8),
        lambda: words() | pixels(32), {"return_loss": True}, "text_embeds",
    ),
    "altclip": matches(transformers.AltCLIPConfig, dict(project_dim=16, pad_token_id=0)),
    "blip": Example(
        "Fusion of texts and images", AutoModelForVisualQuestionAnswering,
        lambda: transformers.BlipConfig(
            text_config=TEXT | dict(encoder_hidden_size=32, bos_token_id=1, eos_token_id=2, sep_token_id=2),
            vision_config=VISION, projection_dim=16, image_text_hidden_size=16,
        ),
        # an output without logits; and without mask, as the decoder looks at padding, too
        lambda: {"input_ids": words()["input_ids"], "labels": answers()} | pixels(16), {}, "loss",
        checkpoints=False,
    ),
    "bridgetower": Example(
        "Fusion of texts and images", transformers.BridgeTowerForImageAndTextRetrieval,
        lambda: transformers.BridgeTowerConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            text_config=TEXT | {"hidden_size": 64},
            vision_config=dict(hidden_size=64, num_hidden_layers=NUM_LAYERS, patch_size=8, image_size=16),
        ),
        lambda: words() | pixels(16), {"labels": torch.tensor([0, 1, 0])},
    ),
    "chinese_clip": matches(transformers.ChineseCLIPConfig),
    "clap": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.ClapConfig(
            text_config=TEXT | dict(projection_dim=16), projection_dim=16,
            audio_config=dict(
                window_size=2, num_mel_bins=8, spec_size=16, num_classes=3, hidden_size=16, depths=[1, 1],
                num_attention_heads=[2, 2], num_hidden_layers=2, patch_embeds_hidden_size=8, projection_dim=16,
            ),
        ),
        lambda: words() | {"input_features": pixels(8)["pixel_values"][:, :1]}, {"return_loss": True}, "text_embeds",
    ),
    "clip": matches(transformers.CLIPConfig, dict(eos_token_id=98)),
    "flava": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.FlavaConfig(
            text_config=TEXT, image_config=VISION, projection_dim=16, hidden_size=32,
            multimodal_config={k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
        ),
        lambda: words() | pixels(16), None, "multimodal_embeddings",
    ),
    "lxmert": Example(
        "Fusion of texts and images", AutoModelForQuestionAnswering,
        lambda: transformers.LxmertConfig(
            vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=2, x_layers=3,
            r_layers=2, visual_feat_dim=12, visual_pos_dim=4, num_qa_labels=3, max_position_embeddings=40,
        ),
        regions, {"labels": torch.tensor([0, 1, 2])}, "question_answering_score", unused=r"x_layers\.2\.visn",
    ),
    "metaclip_2": matches(transformers.MetaClip2Config, dict(eos_token_id=98)),
    "modernvbert": Example(
        "Fusion of texts and images", transformers.ModernVBertForSequenceClassification,
        lambda: transformers.ModernVBertConfig(
            text_config=TEXT | ENDS, vision_config=VISION, pixel_shuffle_factor=2, image_token_id=IMAGE_TOKEN,
            num_labels=3,
        ),
        lambda: pictured_words(1) | {"pixel_values": pixels(16)["pixel_values"][:, None]}, CLASSES,
    ),
    "owlv2": matches(transformers.Owlv2Config),
    "owlvit": matches(transformers.OwlViTConfig),
    "siglip": matches(transformers.SiglipConfig, dict(projection_size=32)),
    "siglip2": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.Siglip2Config(
            text_config=TEXT | dict(projection_size=32),
            vision_config={k: v for k, v in VISION.items() if k != "image_size"} | dict(num_patches=4),
        ),
        lambda: words() | patches_of_shapes(), {"return_loss": True}, "logits_per_image",
    ),
    "vilt": Example(
        "Fusion of texts and images", AutoModelForVisualQuestionAnswering,
        partial(transformers.ViltConfig, **TEXT, image_size=16, patch_size=8, max_image_length=-1, num_labels=3),
        lambda: words() | pixels(16), {"labels": torch.eye(3)},
    ),
    "vision-text-dual-encoder": Example(
        "Fusion of texts and images", transformers.VisionTextDualEncoderModel,
        lambda: transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT), projection_dim=16
        ),
        lambda: words() | pixels(16), {"return_loss": True}, "text_embeds",
    ),
    "visual_bert": Example(
        "Fusion of texts and images", transformers.VisualBertForQuestionAnswering,
        partial(transformers.VisualBertConfig, **TEXT, visual_embedding_dim=12, num_labels=3),
        region_words, {"labels": torch.eye(3)},
    ),
    "xclip": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.XCLIPConfig(
            text_config=TEXT | ENDS,
            vision_config=VISION | dict(
                num_frames=2, mit_hidden_size=16, mit_intermediate_size=24, mit_num_hidden_layers=3,
                mit_num_attention_heads=2,
            ),
            projection_dim=16, prompt_num_attention_heads=2,
        ),
        lambda: words() | frames(2), {"return_loss": True}, "logits_per_video",
    ),
}  # fmt: skip
