"""Small METERs for examples/meter_vqa.py, where the published ones are out of reach."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import vqa
from meter_model import MeterConfig, MeterForVisualQuestionAnswering
from real_data import ENCODER, VISUAL_ANSWERS, model_folder, visual_questions
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, RobertaConfig, set_seed

# ----------------------------------------------------------------------------------------------------------------------
# --small: real weights and questions that arrive in packages
# ----------------------------------------------------------------------------------------------------------------------

SMALL = dict(r=24, r_pia=36, epochs=1, train_examples=6400, search_examples=320, test_examples=1000, search_interval=5)
"""Defaults of examples/meter_vqa.py; the ranks are the same parts of the width as in the authors' recipe."""


def small_meter(args: argparse.Namespace) -> MeterForVisualQuestionAnswering:
    """A METER with MiniLM as text encoder, the CLIP tower that examples/vqa.py makes, and new fusion layers and head.

    The answers are easy-VQA's, sorted.
    """
    described = argparse.Namespace(image_epochs=20, seed=args.seed, output=args.output)
    llava = AutoModelForImageTextToText.from_pretrained(vqa.starting_point(visual_questions("train"), described))
    text, tower = AutoModel.from_pretrained(model_folder(ENCODER)), llava.model.vision_tower
    set_seed(args.seed)
    config = MeterConfig(
        text_config=text.config.to_dict(),
        vision_config=tower.config.to_dict(),
        hidden_size=192,
        num_attention_heads=6,
        intermediate_size=768,
        id2label=dict(enumerate(sorted(VISUAL_ANSWERS))),
        label2id={answer: i for i, answer in enumerate(sorted(VISUAL_ANSWERS))},
    )
    model = MeterForVisualQuestionAnswering(config)
    model.text_transformer.load_state_dict(text.state_dict())
    model.vit_model["visual"].load_state_dict(openai_names(tower))
    return model


CLIP_NAMES = {
    "pre_layrnorm": "ln_pre",  # it is written so
    "post_layernorm": "ln_post",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.class_embedding": "class_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""What of a name of transformers' CLIP is called otherwise in OpenAI's."""


def openai_names(tower: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of transformers' `CLIPVisionModel` with OpenAI's names, and with queries, keys and values in one."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        for old, new in CLIP_NAMES.items():
            name = name.replace(old, new)
        weights[name] = value
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# --tiny: random weights and drawn examples
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(
    r=8, r_pia=12, epochs=1, batch_size=8, train_examples=32, search_examples=8, search_interval=1, test_examples=24
)
"""Defaults of examples/meter_vqa.py, likewise."""


def save_tiny_checkpoint(folder: Path) -> Path:
    """A METER with random weights as its authors' checkpoints are: a Lightning file, of no task; and its sizes."""
    text = RobertaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    config = MeterConfig(
        text_config=text.to_dict(), vision_config=vision, hidden_size=64, num_attention_heads=4, intermediate_size=96
    )
    model = MeterForVisualQuestionAnswering(config)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(model.HEAD)}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    torch.save({"state_dict": weights}, folder / "meter.ckpt")
    return folder / "meter.ckpt"
