"""Encoders of texts, images and sounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from zoo.example import Example
from zoo.inputs import CLASSES, boxed_words, frames, heard, pixels, waves, words
from zoo.sizes import CONFORMER_SIZES, ENDS, NUM_LAYERS, PARAKEET, TEXT, VISION

CALLED = torch.tensor([[1, 2], [3, 4], [5, 6]])


def classifies(config: type, inputs: Callable[[], dict] = words, **settings) -> Example:
    make = partial(config, **TEXT | settings, num_labels=3)
    return Example("Encoders", AutoModelForSequenceClassification, make, inputs, CLASSES)


def sees(config: type, model: type = AutoModelForImageClassification, **settings) -> Example:
    make = partial(config, **VISION | settings, num_labels=3)
    return Example("Encoders", model, make, partial(pixels, 16), CLASSES)


def hears(config: type, **settings) -> Example:
    make = partial(
        config, **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"}, num_labels=3, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16, apply_spec_augment=False, **settings,
    )  # fmt: skip
    return Example("Encoders", AutoModelForAudioClassification, make, waves, CLASSES)


EXAMPLES: dict[str, Example] = {
    "audio-spectrogram-transformer": Example(
        "Encoders", AutoModelForAudioClassification,
        partial(transformers.ASTConfig, **VISION, num_labels=3, max_length=16, num_mel_bins=16),
        lambda: {"input_values": pixels(16)["pixel_values"][:, 0]}, CLASSES,
    ),
    "beit": sees(transformers.BeitConfig, out_indices=[1, 2], use_relative_position_bias=True),
    "bert": classifies(transformers.BertConfig),
    "camembert": classifies(transformers.CamembertConfig),
    "data2vec-audio": hears(transformers.Data2VecAudioConfig),
    "data2vec-text": classifies(transformers.Data2VecTextConfig),
    "deberta": classifies(transformers.DebertaConfig, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": classifies(
        transformers.DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        position_buckets=4, norm_rel_ebd="layer_norm", conv_kernel_size=0, position_biased_input=False,
    ),
    "deit": sees(transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "dinov2": sees(transformers.Dinov2Config),
    "dinov2_with_registers": sees(transformers.Dinov2WithRegistersConfig, use_swiglu_ffn=True),
    "dinov3_vit": Example(
        "Encoders", AutoModel, partial(transformers.DINOv3ViTConfig, **VISION, num_register_tokens=1),
        partial(pixels, 16), None, "last_hidden_state",
    ),
    "distilbert": classifies(
        transformers.DistilBertConfig, dim=32, n_layers=NUM_LAYERS, n_heads=4, hidden_dim=48
    ),
    "dpr": Example(
        "Encoders", transformers.DPRQuestionEncoder, partial(transformers.DPRConfig, **TEXT), words, None,
        "pooler_output",
    ),
    "electra": classifies(transformers.ElectraConfig),
    "ernie": classifies(transformers.ErnieConfig),
    "esm": classifies(transformers.EsmConfig, mask_token_id=3),
    "eurobert": classifies(transformers.EuroBertConfig, num_key_value_heads=2, **ENDS),
    "gte": classifies(lambda **settings: transformers.GteConfig(**settings)),  # which older versions lack
    "hubert": hears(transformers.HubertConfig),
    "ijepa": sees(transformers.IJepaConfig),
    "jina_embeddings_v3": classifies(lambda **settings: transformers.JinaEmbeddingsV3Config(**settings)),
    "layoutlm": classifies(transformers.LayoutLMConfig, boxed_words, max_2d_position_embeddings=64),
    "layoutlmv3": classifies(
        transformers.LayoutLMv3Config, lambda: boxed_words() | pixels(16), max_2d_position_embeddings=64,
        coordinate_size=6, shape_size=4, input_size=16, patch_size=8,
    ),
    "longformer": classifies(transformers.LongformerConfig, attention_window=4),
    "markuplm": classifies(transformers.MarkupLMConfig),
    "megatron-bert": classifies(transformers.MegatronBertConfig),
    "modernbert": classifies(transformers.ModernBertConfig, **ENDS),
    "mpnet": classifies(transformers.MPNetConfig),
    "nomic_bert": classifies(transformers.NomicBertConfig),
    "nystromformer": classifies(  # whose convolutions read padding
        transformers.NystromformerConfig, lambda: {"input_ids": words()["input_ids"]}, num_landmarks=7,
        segment_means_seq_len=7, conv_kernel_size=3,
    ),
    "parakeet_ctc": Example(
        "Encoders", transformers.ParakeetForCTC,
        lambda: transformers.ParakeetCTCConfig(vocab_size=9, pad_token_id=8, encoder_config=PARAKEET),
        heard, {"labels": CALLED},
    ),
    "parakeet_tdt": Example(
        "Encoders", transformers.ParakeetForTDT,
        lambda: transformers.ParakeetTDTConfig(
            vocab_size=9, pad_token_id=0, encoder_config=PARAKEET, decoder_hidden_size=16, num_decoder_layers=1,
            blank_token_id=8, durations=[0, 1],
        ),
        lambda: heard() | {"decoder_input_ids": nn.functional.pad(CALLED, (1, 0), value=8)}, {"labels": CALLED},
    ),
    "rembert": classifies(transformers.RemBertConfig),
    "roberta": classifies(transformers.RobertaConfig),
    "roberta-prelayernorm": classifies(transformers.RobertaPreLayerNormConfig),
    "roc_bert": classifies(transformers.RoCBertConfig),
    "roformer": classifies(transformers.RoFormerConfig),
    "sew": hears(transformers.SEWConfig, layerdrop=0.0),
    "splinter": Example(
        "Encoders", AutoModelForQuestionAnswering, partial(transformers.SplinterConfig, **TEXT),
        words, {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([1, 2, 2])}, "start_logits",
    ),
    "tapas": classifies(transformers.TapasConfig),
    "unispeech": hears(transformers.UniSpeechConfig),
    "unispeech-sat": hears(transformers.UniSpeechSatConfig),
    "videomae": Example(
        "Encoders", transformers.VideoMAEForVideoClassification,
        partial(transformers.VideoMAEConfig, **VISION, num_frames=2, tubelet_size=1, num_labels=3),
        partial(frames, 2), CLASSES,
    ),
    "vit": sees(transformers.ViTConfig),
    "vit_mae": Example(
        "Encoders", transformers.ViTMAEForPreTraining,
        partial(
            transformers.ViTMAEConfig, **VISION, decoder_hidden_size=16, decoder_num_hidden_layers=NUM_LAYERS,
            decoder_num_attention_heads=2, decoder_intermediate_size=24, mask_ratio=0.5,
        ),
        lambda: pixels(16) | {"noise": torch.rand(3, 4, generator=torch.Generator().manual_seed(5))}, {},
    ),
    "vit_msn": sees(transformers.ViTMSNConfig),
    "vivit": Example(
        "Encoders", transformers.VivitForVideoClassification,
        partial(transformers.VivitConfig, **VISION, num_frames=4, tubelet_size=[2, 8, 8], num_labels=3),
        partial(frames, 4), CLASSES,
    ),
    "vjepa2": Example(
        "Encoders", transformers.VJEPA2ForVideoClassification,
        partial(
            transformers.VJEPA2Config, **VISION | dict(hidden_size=48), crop_size=16, frames_per_clip=2, tubelet_size=1,
            num_pooler_layers=1, num_labels=3, pred_hidden_size=24, pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        ),
        lambda: {"pixel_values_videos": frames(2)["pixel_values"]}, CLASSES,
    ),
    "wav2vec2": hears(transformers.Wav2Vec2Config),
    "wav2vec2-bert": Example(
        "Encoders", AutoModelForAudioClassification,
        partial(transformers.Wav2Vec2BertConfig, **CONFORMER_SIZES, feature_projection_input_dim=8, num_labels=3),
        heard, CLASSES,
    ),
    "wav2vec2-conformer": hears(
        transformers.Wav2Vec2ConformerConfig, position_embeddings_type="rotary", conv_depthwise_kernel_size=3,
        layerdrop=0.0,
    ),
    "wavlm": hears(transformers.WavLMConfig, num_buckets=8, max_bucket_distance=16, layerdrop=0.0),
    "xlm-roberta": classifies(transformers.XLMRobertaConfig),
    "xlm-roberta-xl": classifies(transformers.XLMRobertaXLConfig),
    "xmod": classifies(transformers.XmodConfig, default_language="en_XX"),
    "yolos": Example(
        "Encoders", AutoModel, partial(transformers.YolosConfig, **VISION | dict(image_size=[16, 16])),
        partial(pixels, 16), None, "last_hidden_state",
    ),
}  # fmt: skip
