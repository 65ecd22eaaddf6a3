"""METER, and the same two task heads on BridgeTower: models of one text and one or two images.

METER (Dou et al., CVPR 2022, arXiv 2111.02387) has a text encoder, a CLIP vision tower without its last block, and six
fusion layers for each of the two: a text's tokens look at each other and at the image's, and the image's likewise. Its
parameters have the names of the authors' own, so that their checkpoints load (`load_meter_checkpoint`).

transformers has no METER, so importing this module registers it: the configuration, the models with their auto classes
(`AutoModelForVisualQuestionAnswering`; `AutoModelForSequenceClassification` for NLVR2, where a sentence is true or
false), and the row of peft_eas with the 24 attentions of the fusion layers. A merged model loads where this module is
imported.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerModel,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer, BridgeTowerPooler

from peft_eas import FAMILIES, Family, register_family

IMAGE_SIZES = {"vqa": 576, "nlvr2": 288}
"""Pixels that the authors fine-tune with."""


class CheckpointError(ValueError):
    """A checkpoint can't be read, or is of another model; the message names the file."""


class MeterConfig(PreTrainedConfig):
    """Sizes of a METER; those of the published one by default.

    Args:
        text_config: Of the text encoder, of any type that `AutoModel` gives as an encoder; RoBERTa base by default.
        vision_config: Of the vision tower; by default CLIP's ViT-B/16 without its last block. `image_size` is in pixels
            and `hidden_act` CLIP's QuickGELU.
        hidden_size: Width of the fusion layers; the other arguments with names of BERT's are theirs, too.
    """

    model_type = "meter"
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12  # BERT's default, which the authors leave as it is
    initializer_range: float = 0.02
    is_decoder: bool = False  # the fusion layers, taken from BridgeTower, ask for it, and for the next one
    add_cross_attention: bool = False

    def __post_init__(self, **kwargs) -> None:
        if self.text_config is None:
            self.text_config = RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
            )
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if not isinstance(self.vision_config, PreTrainedConfig):
            sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, patch_size=16, image_size=288)
            self.vision_config = CLIPVisionConfig(**sizes | (self.vision_config or {}))
        super().__post_init__(**kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# The vision tower
# ----------------------------------------------------------------------------------------------------------------------


class MeterVisionBlock(nn.Module):
    """A layer of CLIP's vision tower, with OpenAI's names."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attn = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_eps)
        layers = {"c_fc": nn.Linear(width, inner), "act": ACT2FN[config.hidden_act], "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        z = self.ln_1(hidden_states)
        hidden_states = hidden_states + self.attn(z, z, z, need_weights=False)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class MeterVision(nn.Module):
    """CLIP's vision tower, with OpenAI's names: `(B, 3, H, W)` becomes `(B, patches + 1, width)`, the class first."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn((config.image_size // patch) ** 2 + 1, width) * width**-0.5
        )
        self.conv1 = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width, config.layer_norm_eps)
        blocks = nn.ModuleList(MeterVisionBlock(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixel_values).flatten(2).mT
        first = self.class_embedding.expand(len(patches), 1, -1)
        hidden_states = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            hidden_states = block(hidden_states)
        return self.ln_post(hidden_states)


# ----------------------------------------------------------------------------------------------------------------------
# Bodies: what they say of a text and an image
# ----------------------------------------------------------------------------------------------------------------------


class MeterModel(PreTrainedModel):
    """METER without a head; `num_images` says how many types of tokens there are besides the text's."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    _supports_sdpa = True
    num_images = 1

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        text, vision, width = config.text_config, config.vision_config, config.hidden_size
        self.text_transformer = AutoModel.from_config(text)
        self.vit_model = nn.ModuleDict({"visual": MeterVision(vision)})
        self.cross_modal_text_transform = nn.Linear(text.hidden_size, width)
        self.cross_modal_image_transform = nn.Linear(vision.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(1 + self.num_images, width)
        for name in ("cross_modal_image_layers", "cross_modal_text_layers"):
            layers = nn.ModuleList(BridgeTowerBertCrossLayer(config) for _ in range(config.num_hidden_layers))
            for layer in layers:
                layer.attention.self.is_causal = False  # BridgeTower's says True, which counts where there is no mask
            self.add_module(name, layers)
        self.cross_modal_image_pooler = BridgeTowerPooler(config)
        self.cross_modal_text_pooler = BridgeTowerPooler(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_transformer.get_input_embeddings()

    def pooled(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor, image_type: int = 1
    ) -> torch.Tensor:
        """What is said of a text and an image: `(B, 2d)`, the text's part first.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 0 for padding.
            pixel_values: `(B, 3, H, W)`.
            image_type: The type of the image's tokens; the text's have 0.
        """
        text = self.text_transformer(input_ids, attention_mask).last_hidden_state
        text = self.cross_modal_text_transform(text)
        image = self.cross_modal_image_transform(self.vit_model["visual"](pixel_values))
        text = text + self.token_type_embeddings(torch.zeros_like(input_ids))
        image = image + self.token_type_embeddings(input_ids.new_full(image.shape[:2], image_type))
        mask = (1 - attention_mask[:, None, None].to(text.dtype)) * torch.finfo(text.dtype).min
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            # both look at what the other was before this layer
            text, image = text_layer(text, image, mask)[0], image_layer(image, text, None, mask)[0]
        return torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)


class BridgeTowerFusionConfig(BridgeTowerConfig):
    """BridgeTower's, under a name of its own: transformers registers no further models of its own configurations."""

    model_type = "bridgetower_fusion"


class BridgeTowerBody(BridgeTowerModel):
    """BridgeTower without a head, called as METER is."""

    config: BridgeTowerFusionConfig
    config_class = BridgeTowerFusionConfig
    num_images = 1

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__(config)
        self.token_type_embeddings = nn.Embedding(1 + self.num_images, config.hidden_size)

    def pooled(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor, image_type: int = 1
    ) -> torch.Tensor:
        """As `MeterModel.pooled`."""
        output = super().forward(
            input_ids, attention_mask, pixel_values=pixel_values, image_token_type_idx=image_type, return_dict=True
        )
        return output.pooler_output


# ----------------------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------------------


def head(size: int, width: int, num_labels: int) -> nn.Sequential:
    """The authors' head of both tasks: `(B, size)` becomes `(B, num_labels)`."""
    return nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, num_labels))


class VisualQuestionAnswering:
    """To be mixed into a body: which of the most frequent answers a question has."""

    HEAD = "vqa_classifier"
    num_images = 1

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.vqa_classifier = head(2 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `(B, answers)`, and the loss.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 0 for padding.
            pixel_values: `(B, 3, H, W)`.
            labels: What each answer is worth, from 0 to 1: `(B, answers)`.
        """
        logits = self.vqa_classifier(self.pooled(input_ids, attention_mask, pixel_values))
        loss = None
        if labels is not None:  # a sum over answers, so that it doesn't fade where there are thousands
            loss = F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[-1]
        return SequenceClassifierOutput(loss=loss, logits=logits)


class VisualReasoning:
    """To be mixed into a body: whether a sentence is true of two images (NLVR2)."""

    HEAD = "nlvr2_classifier"
    num_images = 2

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.nlvr2_classifier = head(4 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """As `VisualQuestionAnswering.forward`, with `pixel_values (B, 2, 3, H, W)` and `labels (B,)`, 1 for true."""
        both = [self.pooled(input_ids, attention_mask, pixel_values[:, i], 1 + i) for i in range(2)]
        logits = self.nlvr2_classifier(torch.cat(both, -1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForVisualQuestionAnswering(VisualQuestionAnswering, MeterModel):
    """METER for VQA."""


class MeterForVisualReasoning(VisualReasoning, MeterModel):
    """METER for NLVR2."""


class BridgeTowerForVisualQuestionAnswering(VisualQuestionAnswering, BridgeTowerBody):
    """BridgeTower for VQA."""


class BridgeTowerForVisualReasoning(VisualReasoning, BridgeTowerBody):
    """BridgeTower for NLVR2."""


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


METER = {"vqa": MeterForVisualQuestionAnswering, "nlvr2": MeterForVisualReasoning}
BRIDGETOWER = {"vqa": BridgeTowerForVisualQuestionAnswering, "nlvr2": BridgeTowerForVisualReasoning}


def load_model(name: str | Path, task: str, answers: Sequence[str]) -> MeterModel | BridgeTowerBody:
    """A METER or a BridgeTower with a head for these answers.

    Beside a checkpoint file of other sizes than the published ones there has to be its `config.json`.

    Raises:
        CheckpointError: if it is another model.
    """
    labels = {"id2label": dict(enumerate(answers)), "label2id": {answer: i for i, answer in enumerate(answers)}}
    path = Path(name)
    if path.suffix == ".ckpt":
        if (path.parent / "config.json").exists():
            config = MeterConfig.from_pretrained(path.parent, **labels)
        else:
            config = MeterConfig(vision_config={"image_size": IMAGE_SIZES[task]}, **labels)
        model = METER[task](config)
        load_meter_checkpoint(model, path)
        return model.eval()
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "meter":
        if config.architectures != [METER[task].__name__] or [*config.id2label.values()] != [*answers]:
            raise CheckpointError(f"{name} is a METER for another task, or for other answers than those of the data.")
        return METER[task].from_pretrained(name)
    if config.model_type != "bridgetower":
        raise CheckpointError(f"{name} is a {config.model_type}: give a METER's *.ckpt file, or a BridgeTower.")
    sizes = {**config.to_dict(), "model_type": BridgeTowerFusionConfig.model_type}
    model = BRIDGETOWER[task](BridgeTowerFusionConfig.from_dict(sizes, **labels))
    load_bridgetower(model, name)
    return model.eval()


def load_meter_checkpoint(model: MeterModel, path: str | Path) -> None:
    """Give a METER the weights in one of the authors' checkpoint files, which PyTorch Lightning has written.

    Positions are interpolated to the model's image size, and NLVR2's second image begins with the type of the first.
    What the model has no place for is left out: the heads of pretraining, CLIP's text part. A head that the file does
    not have stays as it is: new.

    Nothing of the file is run: `torch.load(weights_only=True)` reads it, and whatever else Lightning has pickled there,
    as hyper-parameters, is read as an empty dictionary.

    Raises:
        CheckpointError: if the file can't be read like that, or is of another model.
    """
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(OrderedDict, name) for name in others]):
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except FileNotFoundError:
        raise CheckpointError(f"There is no {path}.") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} can't be read as a checkpoint of PyTorch Lightning ({type(error).__name__}: {reason}). Download "
            "it again; or, if you trust it, save a file with nothing but {'state_dict': ...}."
        ) from error
    _load(model, weights, path)


def load_bridgetower(model: BridgeTowerBody, name: str | Path) -> None:
    """Give a BridgeTower with a head the weights of one without, from the hub or a folder. The head stays new.

    Raises:
        CheckpointError: if it is of another model.
    """
    body, info = BridgeTowerModel.from_pretrained(name, output_loading_info=True)
    lost = set(info["missing_keys"])
    _load(model, {key: value for key, value in body.state_dict().items() if key not in lost}, name)


def _load(model: MeterModel | BridgeTowerBody, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    own = model.state_dict()
    found = {name: _fitted(name, weights[name], own[name]) for name in own if name in weights}
    missing = [name for name in own if name not in weights and not name.startswith(f"{model.HEAD}.")]
    misshapen = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in found.items()
        if value.shape != own[name].shape
    ]
    if missing or misshapen:
        listed = "; ".join(
            f"{kind}: {', '.join(names[:4])}{' ...' * (len(names) > 4)}"
            for kind, names in {"missing": missing, "of other sizes": misshapen}.items()
            if names
        )
        raise CheckpointError(f"{source} is of another model than this {type(model).__name__} ({listed}).")
    model.load_state_dict(found, strict=False)


def _fitted(name: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A parameter with as many positions, or types of tokens, as the model's own has, if it can have them."""
    if name == "token_type_embeddings.weight" and len(value) == 2 and len(own) == 3:
        return value[[0, 1, 1]]
    if name == "vit_model.visual.positional_embedding" and value.shape != own.shape and value.dim() == 2:
        before, after = (int((len(positions) - 1) ** 0.5) for positions in (value, own))
        if before**2 == len(value) - 1:
            grid = value[1:].float().T.reshape(1, -1, before, before)
            grid = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
            return torch.cat([value[:1], grid[0].flatten(1).T.to(value.dtype)])
    return value


# ----------------------------------------------------------------------------------------------------------------------
# What transformers and peft_eas have to know
# ----------------------------------------------------------------------------------------------------------------------

# the fusion layers of both are built alike; nothing of the towers is skipped, as BridgeTower's own row would let it be
_FUSION = tuple(row for row in FAMILIES["bridgetower"].attentions if row.stack.startswith("cross_"))
for _config, _answering, _reasoning in (
    (MeterConfig, MeterForVisualQuestionAnswering, MeterForVisualReasoning),
    (BridgeTowerFusionConfig, BridgeTowerForVisualQuestionAnswering, BridgeTowerForVisualReasoning),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForVisualQuestionAnswering.register(_config, _answering)
    AutoModelForSequenceClassification.register(_config, _reasoning)
    register_family(Family(_config.model_type, _FUSION))
