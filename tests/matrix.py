"""Every row of the table of families, on a tiny random model: what works is written to docs/supported-models.md.

python tests/matrix.py              # all rows, and the page
python tests/matrix.py gpt2 phi3    # these rows, on the screen
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForVisualQuestionAnswering,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from peft_eas import FAMILIES, EASConfig, initialize_eas_weights
from peft_eas.families import find_layers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "supported-models.md"
NUM_LAYERS = 4
IMAGE_TOKEN, AUDIO_TOKEN = 98, 97
SPECIAL = [*range(90, 99)]  # of images and sounds, in some families; not in prompts, and not to be generated
# by field name, over all configurations that have it
SIZES = dict(
    vocab_size=99, max_position_embeddings=128, n_positions=128, max_seq_len=128, pad_token_id=0, bos_token_id=1,
    eos_token_id=None, attention_dropout=0.0,
    hidden_size=32, n_embd=32, d_model=32, word_embed_proj_dim=32,
    intermediate_size=48, n_inner=48, ffn_dim=48, ffn_hidden_size=48,
    num_hidden_layers=NUM_LAYERS, n_layer=NUM_LAYERS, n_layers=NUM_LAYERS, num_layers=NUM_LAYERS,
    num_attention_heads=4, n_head=4, n_heads=4, num_key_value_heads=2, head_dim=8, rotary_dim=4, sliding_window=6,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    num_shared_experts=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, first_k_dense_replace=1,
    n_group=1, topk_group=1, moe_layer_start_index=1, moe_num_experts=4, moe_k=2,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_dt_rank=4, mamba_n_groups=1,
)  # fmt: skip
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
MROPE_WHOLE = dict(rope_parameters=MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0})
MLA = dict(num_key_value_heads=4)
DSA = MLA | dict(index_topk=4, index_head_dim=16, index_n_heads=2)
HYBRID = dict(layer_types=["full_attention", "linear_attention"] * 2)
CONVOLUTIONS = dict(layer_types=["full_attention", "conv"] * 2)
SHARED_KV = dict(
    num_hidden_layers=8, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99,
    layer_types=["sliding_attention", "full_attention"] * 4,
)  # fmt: skip
SMALL_TOWER = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    image_size=4, patch_size=4, projection_dim=32,
)  # fmt: skip
SAM = dict(
    hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    mlp_dim=24, window_size=2, global_attn_indexes=[1], downsample_channels=[8, 16],
)  # fmt: skip
ENCODER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
HEARING = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=16)
OMNI = dict(video_token_id=97, audio_token_id=96, vision_start_token_id=95)
KOSMOS = dict(embed_dim=32, layers=NUM_LAYERS, attention_heads=4, layerdrop=0.0)
GRANITE_SPEECH = dict(window_size=2, downsample_rate=1)
CONFORMER = dict(
    input_dim=8, hidden_dim=16, num_layers=2, context_size=4, max_pos_emb=4, conv_kernel_size=3, output_dim=4
)
# what a family needs besides
PARTICULAR: dict[str, dict] = {
    "aria": dict(projector_patch_to_query_dict={4: 4}),
    "axk1": MLA,
    "axk2": DSA,
    "bailing_hybrid": MLA | HYBRID | dict(num_mtp_layers=0),
    "bamba": dict(attn_layer_indices=[0, 2]),
    "bert-generation": dict(is_decoder=True),
    "blip-2": dict(num_query_tokens=4),
    "chameleon": dict(
        vq_config=dict(embed_dim=8, num_embeddings=4, latent_channels=8, base_channels=32, channel_multiplier=[1, 1]),
        vocabulary_map={"<image>": IMAGE_TOKEN} | {f"IMGIMG{letter}Z": 90 + i for i, letter in enumerate("ABCD")},
    ),
    "cohere_compass_text": dict(
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    ),
    "cosmos3_edge_text": MROPE,
    "dbrx": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"] * 2),
    "deepseek_ocr2_vision": dict(sam_config=SAM, encoder_config=ENCODER | dict(num_key_value_heads=2)),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": DSA,
    "dots3_note_audio_encoder": dict(
        hidden_size=16, num_attention_heads=2, adapter_input_size=16, adapter_out_dim=32, downsample_hidden_size=8
    ),
    "dots3_note_text": DSA
    | dict(
        head_dim=16,
        layer_types=["indexed_attention", "sliding_attention"] * 2,
        per_layer_config={1: dict(kv_lora_rank=24), 3: dict(kv_lora_rank=24)},
        shared_experts_intermediate_size=16,
    ),
    "dots3_note_vision_encoder": dict(
        mlp_layer_types=["dense", "dense"], adapter_in_dim=16, adapter_out_dim=32, spatial_merge_size=2
    ),
    "emu3": dict(
        vocabulary_map={"<image>": IMAGE_TOKEN, "<|extra_200|>": 97}
        | {f"<|visual token {i:06}|>": 70 + i for i in range(16)}
    ),
    "emu3_vqgan": dict(codebook_size=16, embed_dim=4, latent_channels=4, num_attention_heads=1, hidden_size=32),
    "ernie4_5_vl_moe_text": MROPE
    | dict(
        mlp_layer_types=["dense", *["sparse"] * 5],
        num_hidden_layers=6,
        moe_intermediate_size=[16, 24],
        moe_num_shared_experts=1,
    ),
    "exaone4_5_vision": dict(num_key_value_heads=2),
    "fast_vlm": dict(vision_config=SMALL_TOWER),  # another than its own, which is timm's
    "fun_asr_nano": dict(
        adaptor_config=dict(
            hidden_size=32, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, projector_hidden_size=16
        )
    ),
    "fun_asr_nano_encoder": dict(num_stacked_frames=1, num_timestamp_prediction_layers=1, fsmn_kernel_size=3),
    "fuyu": dict(patch_size=4),
    "gemma3": dict(mm_tokens_per_image=4),
    "gemma3n_text": SHARED_KV | dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * 8),
    "gemma4": dict(
        vision_config=dict(
            model_type="gemma4_vision",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            global_head_dim=8,
            patch_size=4,
            position_embedding_size=16,
            pooling_kernel_size=2,
        )
    ),
    "gemma4_text": SHARED_KV | dict(global_head_dim=16),
    "gemma4_unified_text": SHARED_KV | dict(global_head_dim=16),
    "glm4_moe_lite": MLA,
    "glm4v_moe_text": MROPE_WHOLE,
    "glm4v_text": MROPE,
    "glmasr_encoder": dict(intermediate_size=64),
    # with fewer, transformers 5.23 looks at other tokens with a cache than without, in the base model, too
    "glm_moe_dsa": DSA | dict(indexer_types=["full", "shared", "shared", "full"], index_topk=64),
    "glm_ocr_text": MROPE_WHOLE,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granite4_vision": dict(
        text_config=dict(
            model_type="granite",
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=None,
        ),
        vision_config=SMALL_TOWER | dict(hidden_size=64, image_size=8),
        qformer_config=ENCODER
        | dict(
            model_type="blip_2_qformer",
            hidden_size=64,
            encoder_hidden_size=64,
            cross_attention_frequency=1,
            use_qformer_text_input=False,
        ),
        image_grid_pinpoints=[[8, 8]],
        downsample_rate="1/2",
        deepstack_layer_map=[(1, 0)],
        spatial_target_layers=[0, 1, 2, 3],
    ),
    "granite_docling_vision": dict(scale_factor=2, deepstack_visual_indexes=[0]),
    "granite_speech": GRANITE_SPEECH,
    "granite_speech_encoder": CONFORMER,
    "granite_speech_plus": GRANITE_SPEECH,
    "granite_speech_plus_encoder": CONFORMER,
    "granitemoehybrid": dict(layer_types=["attention", "mamba"] * 2, shared_intermediate_size=48),
    "hunyuan_vl_text": dict(rope_parameters=MROPE["rope_parameters"] | {"mrope_section": [1, 1, 1, 1]}),
    "idefics": dict(
        vision_config=dict(
            embed_dim=16, image_size=8, patch_size=4, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        ),
        additional_vocab_size=0,
        cross_layer_interval=2,
        alpha_initializer="ones",
    ),
    "idefics2_perceiver": dict(
        resampler_n_latents=4,
        resampler_n_heads=2,
        resampler_head_dim=8,
        num_key_value_heads=2,
        resampler_depth=2,
    ),
    "instructblip": dict(num_query_tokens=4),
    "instructblipvideo": dict(num_query_tokens=4, video_token_index=IMAGE_TOKEN, video_token_id=IMAGE_TOKEN),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=0),
    "jetmoe": dict(kv_channels=8),
    "kimi_k25": dict(projection_hidden_size=16),
    "kimi_linear": MLA | HYBRID | dict(linear_head_dim=8, linear_num_heads=4),
    "kosmos-2": dict(latent_query_num=4),
    "kosmos-2.5": dict(latent_query_num=4),
    "kosmos_2_5_vision_model": dict(patch_embed_hidden_size=12, head_dim=8, max_num_patches=8),
    "kosmos_2_5_text_model": KOSMOS,
    "kosmos_2_text_model": KOSMOS,
    "lfm2": dict(full_attn_idxs=[0, 2]),
    "lfm2_moe": CONVOLUTIONS | dict(num_dense_layers=1),
    "lfm3": CONVOLUTIONS,
    "llama4_vision_model": dict(
        intermediate_size=64,
        projector_input_dim=32,
        projector_output_dim=32,
        vision_output_dim=32,
        pixel_shuffle_ratio=0.5,
    ),
    "llava_next": dict(image_grid_pinpoints=[[4, 4]], vision_config=SMALL_TOWER),
    "llava_next_video": dict(image_grid_pinpoints=[[4, 4]], vision_config=SMALL_TOWER),
    "llava_onevision": dict(
        image_grid_pinpoints=[[4, 4]], vision_config=SMALL_TOWER | {"model_type": "siglip_vision_model"}
    ),
    "minicpm3": MLA,
    "minimax_m3_vl_text": dict(
        layer_types=["minimax_m3_sparse", "full_attention"] * 2,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=2,
        index_topk_blocks=2,
    ),
    "mistral4": MLA,
    "mllama_text_model": dict(cross_attention_layers=[1, 2]),
    "mllama_vision_model": dict(
        hidden_size=16,
        vision_output_dim=32,
        num_global_layers=1,
        attention_heads=2,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        intermediate_layers_indices=[1],
    ),
    "molmo2_adapter": dict(vision_feature_layer=[1, 0]),
    "molmo2_vision": dict(image_size=[8, 8], patch_size=4, num_hidden_layers=2),
    "muse_glimmer": dict(out_hidden_size=64, projector_hidden_size=32),
    "muse_spark": dict(
        out_hidden_size=64,
        projector_hidden_size=32,
        audio_config=dict(
            patch_sizes=[2], hidden_sizes=[16], depths=[1], num_hidden_layers=1, out_hidden_size=32, conv_kernel_size=3
        ),
    ),
    "muse_spark_text": dict(moe_hidden_size=24, mlp_layer_types=["dense", "sparse"] * 2),
    "muse_spark_vision": dict(pos_emb_height=2, pos_emb_width=2),
    "nemotron_h": dict(
        layers_block_type=["full_attention", "mlp", "linear_attention", "full_attention", "moe", "full_attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        moe_shared_expert_intermediate_size=16,
    ),
    "nemotron_h_omni": dict(vision_hidden_size=16, projector_hidden_size=24),
    "olmo_hybrid": HYBRID,
    "ovis2": dict(hidden_size=32, visual_indicator_token_ids=[91, 92, 93, 94, 95]),
    "paddleocr_vl_text": MROPE,
    "phi4_multimodal": dict(
        vision_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            crop_size=8,
            image_token_id=IMAGE_TOKEN,
        ),
        audio_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_blocks=1,
            num_attention_heads=2,
            ext_pw_out_channel=16,
            depthwise_separable_out_channel=16,
            nemo_conv_channels=16,
            input_size=16,
            audio_token_id=97,
        ),
    ),
    "paligemma": dict(projection_dim=32),
    "qwen2_5_omni_audio_encoder": HEARING,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_vl_vision": dict(hidden_size=32),
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_asr_encoder": dict(downsample_hidden_size=8),
    "qwen3_next": HYBRID,
    "qwen3_omni_moe_audio_encoder": HEARING | dict(downsample_hidden_size=8),
    "qwen3_omni_moe_text": MROPE | dict(sliding_window=None),
    "qwen3_omni_moe_thinker": OMNI,
    "radio": dict(max_img_size=16, video_temporal_patch_size=2),
    "recurrent_gemma": dict(attention_window_size=16, lru_width=32, block_types=["attention", "recurrent"]),
    "sam_vision_model": dict(global_attn_indexes=[0, 1]),
    "unlimited_ocr_vision": dict(sam_config=SAM, encoder_config=ENCODER | dict(image_size=4, patch_size=4)),
    "vibevoice_acoustic_tokenizer_encoder": dict(
        num_filters=4, downsampling_ratios=[2, 2], depths=[1, 1, 1], vae_std=0.0
    ),
    "vibevoice_asr": dict(acoustic_tokenizer_chunk_size=8),
    "vipllava": dict(vision_feature_layer=[-1, -2], vision_feature_layers=[-1, -2]),  # its name depends on the version
    "voxtral_encoder": dict(intermediate_size=64),
    "youtu": MLA,
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
        num_hidden_layers=5,
        attention_head_dim=16,
    ),
    "zamba2": dict(
        layers_block_type=["hybrid", "hybrid", "linear_attention", "linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=6,
        attention_head_dim=16,
        num_mem_blocks=2,
    ),
}
# towers, query transformers and the like
TOWER = dict(
    hidden_size=16, embed_dim=16, intermediate_size=24, depth=2, num_hidden_layers=2, num_attention_heads=2,
    num_heads=2, image_size=8, patch_size=4, out_hidden_size=32, encoder_hidden_size=16, projection_dim=32,
    num_position_embeddings=16, output_dim=32, vocab_size=64, num_embeddings=64, base_channels=32,
    channel_multiplier=[1, 1], d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24,
    num_mel_bins=8, max_source_positions=8,
)  # fmt: skip


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


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model whose layers matter: weights and biases large enough, norms that are not 1."""
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
    return model.eval()


def build(cls: type, config: PreTrainedConfig) -> PreTrainedModel:
    return cls.from_config(config) if hasattr(cls, "_model_mapping") else cls(config)


def pixels(size: int = 8) -> dict:
    return {"pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))}


def patches(temporal: int = 2) -> dict:
    """Images as Qwen-VL's processors give them: 2x2 patches each, one row a patch."""
    values = torch.randn(12, 3 * temporal * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2, 2]] * 3)}


def tiles() -> dict:
    """Images of two tiles as Mllama's processor gives them, which all tokens may look at."""
    return {
        "pixel_values": torch.randn(3, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),
        "aspect_ratio_ids": torch.full((3, 1), 2),
        "aspect_ratio_mask": torch.ones(3, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(3, 11, 1, 2, dtype=torch.long),
    }


def single_tile() -> dict:
    return {"pixel_values": pixels()["pixel_values"][:, None]}


def sized() -> dict:
    return pixels() | {"image_sizes": torch.tensor([[8, 8]] * 3)}


def base_and_tile(size: int = 4) -> dict:
    """Each image whole, and once more as its only tile."""
    values = torch.randn(3, 2, 3, size, size, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_sizes": torch.tensor([[size, size]] * 3)}


def flat_patches() -> dict:
    """2x2 patches for each image, which keep the form of images."""
    values = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return patches(1) | {"pixel_values": values}


def rows_of_patches() -> dict:
    """2x2 patches for each image, one row an image."""
    return {"pixel_values": torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(3))}


def padded_patches() -> dict:
    """2x2 patches for each image as LFM2-VL's processor gives them."""
    return rows_of_patches() | {
        "spatial_shapes": torch.tensor([[2, 2]] * 3),
        "pixel_attention_mask": torch.ones(3, 4, dtype=torch.long),
    }


def images_at(tokens: int) -> torch.Tensor:
    """Where images are in a prompt."""
    places = torch.arange(11).expand(3, -1)
    return ((places >= 4) & (places < 4 + tokens)).long()


# with a KV cache, these count padding as tokens in transformers, too
UNPADDED = ("kosmos-2", "kosmos-2.5")
# how many tokens an image is, and what says so
IMAGES: dict[str, tuple[int, Callable[[], dict]]] = {
    "aria": (4, lambda: pixels() | {"pixel_mask": torch.ones(3, 8, 8, dtype=torch.bool)}),
    "aya_vision": (1, pixels),
    "blip-2": (4, pixels),
    "chameleon": (4, partial(pixels, 4)),
    "cohere2_vision": (1, pixels),
    "cohere_compass": (1, patches),
    "cosmos3_edge": (1, partial(patches, 1)),
    "cosmos3_omni": (1, patches),
    "deepseek_vl": (4, pixels),
    "deepseek_vl_hybrid": (4, lambda: pixels() | {"high_res_pixel_values": pixels()["pixel_values"]}),
    "dots3_note": (1, partial(patches, 1)),
    "emu3": (3, lambda: pixels(4) | {"image_sizes": torch.tensor([[2, 4]] * 3)}),
    "ernie4_5_vl_moe": (1, partial(patches, 1)),
    "exaone4_5": (1, patches),
    "fuyu": (4, rows_of_patches),
    "gemma3": (4, pixels),
    "gemma4": (
        1,
        lambda: rows_of_patches() | {"image_position_ids": torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]] * 3)},
    ),
    "glm46v": (1, patches),
    "glm4v": (1, patches),
    "glm4v_moe": (1, patches),
    "glm_ocr": (1, patches),
    "glmga": (1, patches),
    "got_ocr2": (1, pixels),
    "granite4_vision": (3, partial(base_and_tile, 8)),
    "granite_docling": (
        1,
        lambda: single_tile() | {"pixel_attention_mask": torch.ones(3, 1, dtype=torch.bool)},
    ),
    "hunyuan_vl": (4, partial(patches, 1)),
    "hyperclovax_vision_v2": (1, patches),
    "idefics": (
        0,  # which are looked at by cross-attentions
        lambda: single_tile() | {"image_attention_mask": torch.ones(3, 11, 1, dtype=torch.long)},
    ),
    "idefics2": (4, single_tile),
    "idefics3": (1, single_tile),
    "instructblip": (4, lambda: pixels() | {"qformer_input_ids": torch.ones(3, 4, dtype=torch.long)}),
    "instructblipvideo": (
        4,
        lambda: single_tile() | {"qformer_input_ids": torch.ones(3, 4, dtype=torch.long)},
    ),
    "internvl": (1, pixels),
    "janus": (4, pixels),
    "kimi_k25": (1, flat_patches),
    "kosmos-2": (4, lambda: pixels() | {"image_embeds_position_mask": images_at(4)}),
    "kosmos-2.5": (
        4,
        lambda: {
            "flattened_patches": flattened()["flattened_patches"][:, :4],
            "image_embeds_position_mask": images_at(4),
        },
    ),
    "lfm2_vl": (1, padded_patches),
    "lfm3_vl": (1, patches),
    "lighton_ocr": (1, sized),
    "llama4": (1, pixels),
    "llava": (4, pixels),
    "llava_next": (3, base_and_tile),
    "llava_next_video": (3, base_and_tile),
    "llava_onevision": (3, base_and_tile),
    "minimax_m3_vl": (1, patches),
    "mistral3": (1, sized),
    "mllama": (1, tiles),
    "muse_glimmer": (1, patches),
    "muse_spark": (1, patches),
    "nemotron_h_omni": (
        1,
        lambda: {"pixel_values": patches(1)["pixel_values"], "image_grid_hw": torch.tensor([[2, 2]] * 3)},
    ),
    "ovis2": (4, pixels),
    "paddleocr_vl": (1, flat_patches),
    "paligemma": (4, pixels),
    "phi4_multimodal": (
        5,
        lambda: {
            "image_pixel_values": base_and_tile(8)["pixel_values"],
            "image_sizes": torch.tensor([[8, 8]] * 3),
            "image_attention_mask": torch.ones(3, 2, 2, 2, dtype=torch.bool),
        },
    ),
    "pp_chart2table": (1, pixels),
    "qianfan_ocr": (1, pixels),
    "qwen2_5_omni_thinker": (1, patches),
    "qwen2_5_vl": (1, patches),
    "qwen2_vl": (1, patches),
    "qwen3_5": (1, patches),
    "qwen3_5_moe": (1, patches),
    "qwen3_omni_moe_thinker": (1, patches),
    "qwen3_vl": (1, patches),
    "qwen3_vl_moe": (1, patches),
    "smolvlm": (1, single_tile),
    "step3p7": (1, pixels),
    "unlimited_ocr": (3, partial(pixels, 16)),
    "video_llama_3": (1, lambda: patches(1) | {"image_merge_sizes": torch.tensor([2] * 3)}),
    "video_llava": (4, pixels),
    "vipllava": (4, pixels),
}


def mel(frames: int, *masks: str, shown: int | None = None, bins_last: bool = False) -> dict:
    """Sounds as most processors give them, with masks of what is no padding."""
    values = torch.randn(3, 8, frames, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, frames, dtype=torch.long)
    mask[:, shown or frames :] = 0
    return {"input_features": values.mT if bins_last else values} | dict.fromkeys(masks, mask)


# how many tokens a sound is, and what says so
SOUNDS: dict[str, tuple[int, Callable[[], dict]]] = {
    "audioflamingo3": (4, partial(mel, 16, "input_features_mask")),
    "fun_asr_nano": (4, partial(mel, 4, "input_features_mask", bins_last=True)),
    "glmasr": (2, partial(mel, 16, "input_features_mask")),
    "granite_speech": (4, partial(mel, 4, bins_last=True)),
    "granite_speech_plus": (4, partial(mel, 4, bins_last=True)),
    "moss_transcribe_diarize": (2, partial(mel, 16, "input_features_mask", "padding_mask")),
    "musicflamingo": (4, partial(mel, 16, "input_features_mask")),
    "qwen2_audio": (4, partial(mel, 16, "feature_attention_mask")),
    "qwen3_asr": (2, partial(mel, 100, "input_features_mask", shown=16)),
    "vibevoice_asr": (
        2,
        lambda: {"input_values": torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(3))},
    ),
    "voxtral": (2, partial(mel, 16)),
}


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


# ----------------------------------------------------------------------------------------------------------------------
# Models that are no decoders: each with a task of its own
# ----------------------------------------------------------------------------------------------------------------------

TEXT = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=8,
)
SEQ2SEQ = dict(
    vocab_size=99, d_model=32, encoder_layers=NUM_LAYERS, decoder_layers=NUM_LAYERS, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=NUM_LAYERS, num_heads=4, decoder_start_token_id=0,
    eos_token_id=None,
)  # fmt: skip

GEMMA = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48, max_position_embeddings=40, sliding_window=4, query_pre_attn_scalar=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """How a family that is no decoder is tried.

    Attributes:
        section: Of the page.
        model: The class of a model with a task, or the auto class.
        config: Makes its configuration.
        inputs: Makes inputs.
        labels: What else a training step takes; `None` for a model without a loss, which then is the mean square of
            the output.
        output: What of the model's output is compared.
        task: PEFT's type of the task.
        unused: Parameters that this task has no use for, and no gradients (a regular expression).
        checkpoints: Whether adapters can be trained with gradient checkpointing; BLIP and UDOP change their embeddings
            in place, which then is an error in transformers with LoRA, too.
    """

    section: str
    model: type
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[], dict]
    labels: dict | None
    output: str = "logits"
    task: str | None = None
    unused: str = ""
    checkpoints: bool = True


def words() -> dict:
    """Texts of three lengths, padded on the right."""
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictured_words(tokens: int) -> dict:
    """Texts behind so many tokens of an image."""
    given = words()
    return {
        "input_ids": torch.cat([torch.full((3, tokens), IMAGE_TOKEN), given["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(3, tokens).long(), given["attention_mask"]], dim=1),
    }


def answers() -> torch.Tensor:
    return torch.randint(5, 90, (3, 4), generator=torch.Generator().manual_seed(4))


def sources() -> dict:
    return words() | {"decoder_input_ids": answers()}


def sounds() -> dict:
    sound = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(3))
    return {"input_features": sound, "decoder_input_ids": answers()}


def pictured_sources() -> dict:
    """Texts behind the five tokens of an image."""
    return sources() | pictured_words(5) | pixels(16)


def flattened() -> dict:
    """Images as Pix2Struct takes them, one row a patch, its place first; padded."""
    seen = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    places = torch.stack([torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1], dim=-1).expand(3, -1, -1)
    values = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(3))
    flat = torch.cat([places, values], dim=-1) * seen[..., None]
    return {"flattened_patches": flat, "attention_mask": seen, "decoder_input_ids": answers()}


def regions() -> dict:
    generator = torch.Generator().manual_seed(3)
    feats, boxes = torch.randn(3, 5, 12, generator=generator), torch.rand(3, 5, 4, generator=generator)
    seen = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
    return words() | {"visual_feats": feats, "visual_pos": boxes, "visual_attention_mask": seen}


def boxed_words() -> dict:
    """Texts with where each word is on its page."""
    boxes = torch.randint(0, 50, (3, 7, 4), generator=torch.Generator().manual_seed(3))
    return words() | {"bbox": boxes.sort(dim=-1).values}


def region_words() -> dict:
    """Texts with regions of an image behind them, as VisualBERT takes them."""
    regions_ = regions()
    return words() | {
        "visual_embeds": regions_["visual_feats"], "visual_attention_mask": regions_["visual_attention_mask"]
    }  # fmt: skip


def padded_patches() -> dict:
    """Images of different shapes as SigLIP 2 takes them, one row a patch, padded."""
    shapes = torch.tensor([[2, 2], [2, 1], [1, 3]])
    seen = (torch.arange(4) < shapes.prod(dim=1, keepdim=True)).long()
    values = torch.randn(3, 4, 3 * 8 * 8, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values * seen[..., None], "pixel_attention_mask": seen, "spatial_shapes": shapes}


def frames(count: int) -> dict:
    """Short films."""
    return {"pixel_values": torch.randn(3, count, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def heard() -> dict:
    """Sounds of three lengths, one row a frame."""
    mask = (torch.arange(16) < torch.tensor([[16], [12], [8]])).long()
    return {"input_features": mel(16)["input_features"].mT * mask[..., None], "attention_mask": mask}


def waves(samples: int = 400) -> dict:
    return {"input_values": torch.randn(3, samples, generator=torch.Generator().manual_seed(3))}


CONFORMER_SIZES = dict(
    hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=48, layerdrop=0.0,
)  # fmt: skip
PARAKEET = dict(
    **CONFORMER_SIZES, num_mel_bins=8, subsampling_factor=2, subsampling_conv_channels=4, conv_kernel_size=3,
    max_position_embeddings=40,
)  # fmt: skip
LISTENER = dict(
    hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
SMALL_EFFICIENTNET = dict(
    image_size=32, width_coefficient=0.25, depth_coefficient=0.25, in_channels=[8, 8], out_channels=[8, 8],
    kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2], hidden_dim=16,
)  # fmt: skip
CALLED = torch.tensor([[1, 2], [3, 4], [5, 6]])
CLASSES = {"labels": torch.tensor([0, 1, 2])}
ENDS = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, mask_token_id=3)


def _classifies(config: type, inputs: Callable[[], dict] = words, **settings) -> Example:
    make = partial(config, **TEXT | settings, num_labels=3)
    return Example("Encoders", AutoModelForSequenceClassification, make, inputs, CLASSES)


def _sees(config: type, model: type = AutoModelForImageClassification, **settings) -> Example:
    make = partial(config, **VISION | settings, num_labels=3)
    return Example("Encoders", model, make, partial(pixels, 16), CLASSES)


def _hears(config: type, **settings) -> Example:
    make = partial(
        config, **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"}, num_labels=3, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16, apply_spec_augment=False, **settings,
    )  # fmt: skip
    return Example("Encoders", AutoModelForAudioClassification, make, waves, CLASSES)


def _matches(config: type, text: dict | None = None, **settings) -> Example:
    """Two towers, trained to tell which text belongs to which image."""
    sizes = dict(text_config=TEXT | ENDS | (text or {}), vision_config=VISION, projection_dim=16) | settings
    return Example(
        "Fusion of texts and images", AutoModel, partial(config, **sizes), lambda: words() | pixels(16),
        {"return_loss": True}, "logits_per_image",
    )  # fmt: skip


def _translates(config: type, **sizes) -> Example:
    make = partial(config, **sizes or SEQ2SEQ)
    return Example("Encoder-decoders", AutoModelForSeq2SeqLM, make, sources, {"labels": answers()}, task="SEQ_2_SEQ_LM")


def _interprets(config: type, model: type, inputs: Callable[[], dict]) -> Example:
    sizes = {k: v for k, v in SEQ2SEQ.items() if k != "d_model"} | dict(
        hidden_size=32, speech_encoder_layers=NUM_LAYERS, speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=48, feature_projection_input_dim=8, speech_encoder_layerdrop=0.0,
        t2u_encoder_layers=1, t2u_decoder_layers=1, t2u_encoder_ffn_dim=48, t2u_decoder_ffn_dim=48,
        t2u_encoder_attention_heads=4, t2u_decoder_attention_heads=4, conv_depthwise_kernel_size=3,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip
    return Example("Encoder-decoders", model, partial(config, **sizes), inputs, {"labels": answers()})


def _transcribes(config: Callable[[], PreTrainedConfig]) -> Example:
    return Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq, config, lambda: heard() | {"decoder_input_ids": answers()},
        {"labels": answers()},
    )  # fmt: skip


EXAMPLES: dict[str, Example] = {
    "bert": _classifies(transformers.BertConfig),
    "camembert": _classifies(transformers.CamembertConfig),
    "dpr": Example(
        "Encoders", transformers.DPRQuestionEncoder, partial(transformers.DPRConfig, **TEXT), words, None,
        "pooler_output",
    ),
    "electra": _classifies(transformers.ElectraConfig),
    "ernie": _classifies(transformers.ErnieConfig),
    "roberta": _classifies(transformers.RobertaConfig),
    "xlm-roberta": _classifies(transformers.XLMRobertaConfig),
    "data2vec-text": _classifies(transformers.Data2VecTextConfig),
    "deberta": _classifies(transformers.DebertaConfig, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _classifies(
        transformers.DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
        position_buckets=4, norm_rel_ebd="layer_norm", conv_kernel_size=0, position_biased_input=False,
    ),
    "distilbert": _classifies(
        transformers.DistilBertConfig, dim=32, n_layers=NUM_LAYERS, n_heads=4, hidden_dim=48
    ),
    "esm": _classifies(transformers.EsmConfig, mask_token_id=3),
    "eurobert": _classifies(transformers.EuroBertConfig, num_key_value_heads=2, **ENDS),
    "gte": _classifies(lambda **settings: transformers.GteConfig(**settings)),  # which older versions lack
    "jina_embeddings_v3": _classifies(lambda **settings: transformers.JinaEmbeddingsV3Config(**settings)),
    "layoutlm": _classifies(transformers.LayoutLMConfig, boxed_words, max_2d_position_embeddings=64),
    "layoutlmv3": _classifies(
        transformers.LayoutLMv3Config, lambda: boxed_words() | pixels(16), max_2d_position_embeddings=64,
        coordinate_size=6, shape_size=4, input_size=16, patch_size=8,
    ),
    "markuplm": _classifies(transformers.MarkupLMConfig),
    "longformer": _classifies(transformers.LongformerConfig, attention_window=4),
    "megatron-bert": _classifies(transformers.MegatronBertConfig),
    "modernbert": _classifies(transformers.ModernBertConfig, **ENDS),
    "mpnet": _classifies(transformers.MPNetConfig),
    "nomic_bert": _classifies(transformers.NomicBertConfig),
    "nystromformer": _classifies(  # whose convolutions read padding
        transformers.NystromformerConfig, lambda: {"input_ids": words()["input_ids"]}, num_landmarks=7,
        segment_means_seq_len=7, conv_kernel_size=3,
    ),
    "rembert": _classifies(transformers.RemBertConfig),
    "roberta-prelayernorm": _classifies(transformers.RobertaPreLayerNormConfig),
    "roc_bert": _classifies(transformers.RoCBertConfig),
    "roformer": _classifies(transformers.RoFormerConfig),
    "splinter": Example(
        "Encoders", AutoModelForQuestionAnswering, partial(transformers.SplinterConfig, **TEXT),
        words, {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([1, 2, 2])}, "start_logits",
    ),
    "tapas": _classifies(transformers.TapasConfig),
    "xlm-roberta-xl": _classifies(transformers.XLMRobertaXLConfig),
    "xmod": _classifies(transformers.XmodConfig, default_language="en_XX"),
    "audio-spectrogram-transformer": Example(
        "Encoders", AutoModelForAudioClassification,
        partial(transformers.ASTConfig, **VISION, num_labels=3, max_length=16, num_mel_bins=16),
        lambda: {"input_values": pixels(16)["pixel_values"][:, 0]}, CLASSES,
    ),
    "beit": _sees(transformers.BeitConfig, out_indices=[1, 2], use_relative_position_bias=True),
    "deit": _sees(transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "dinov2": _sees(transformers.Dinov2Config),
    "dinov2_with_registers": _sees(transformers.Dinov2WithRegistersConfig, use_swiglu_ffn=True),
    "dinov3_vit": Example(
        "Encoders", AutoModel, partial(transformers.DINOv3ViTConfig, **VISION, num_register_tokens=1),
        partial(pixels, 16), None, "last_hidden_state",
    ),
    "ijepa": _sees(transformers.IJepaConfig),
    "videomae": Example(
        "Encoders", transformers.VideoMAEForVideoClassification,
        partial(transformers.VideoMAEConfig, **VISION, num_frames=2, tubelet_size=1, num_labels=3),
        partial(frames, 2), CLASSES,
    ),
    "vit": _sees(transformers.ViTConfig),
    "vit_mae": Example(
        "Encoders", transformers.ViTMAEForPreTraining,
        partial(
            transformers.ViTMAEConfig, **VISION, decoder_hidden_size=16, decoder_num_hidden_layers=NUM_LAYERS,
            decoder_num_attention_heads=2, decoder_intermediate_size=24, mask_ratio=0.5,
        ),
        lambda: pixels(16) | {"noise": torch.rand(3, 4, generator=torch.Generator().manual_seed(5))}, {},
    ),
    "vit_msn": _sees(transformers.ViTMSNConfig),
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
    "yolos": Example(
        "Encoders", AutoModel, partial(transformers.YolosConfig, **VISION | dict(image_size=[16, 16])),
        partial(pixels, 16), None, "last_hidden_state",
    ),
    "data2vec-audio": _hears(transformers.Data2VecAudioConfig),
    "hubert": _hears(transformers.HubertConfig),
    "sew": _hears(transformers.SEWConfig, layerdrop=0.0),
    "unispeech": _hears(transformers.UniSpeechConfig),
    "unispeech-sat": _hears(transformers.UniSpeechSatConfig),
    "wav2vec2": _hears(transformers.Wav2Vec2Config),
    "wav2vec2-bert": Example(
        "Encoders", AutoModelForAudioClassification,
        partial(transformers.Wav2Vec2BertConfig, **CONFORMER_SIZES, feature_projection_input_dim=8, num_labels=3),
        heard, CLASSES,
    ),
    "wav2vec2-conformer": _hears(
        transformers.Wav2Vec2ConformerConfig, position_embeddings_type="rotary", conv_depthwise_kernel_size=3,
        layerdrop=0.0,
    ),
    "wavlm": _hears(transformers.WavLMConfig, num_buckets=8, max_bucket_distance=16, layerdrop=0.0),
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
    "aimv2": dataclasses.replace(_matches(transformers.Aimv2Config), labels=None),
    "align": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.AlignConfig(text_config=TEXT, vision_config=SMALL_EFFICIENTNET, projection_dim=8),
        lambda: words() | pixels(32), {"return_loss": True}, "text_embeds",
    ),
    "altclip": _matches(transformers.AltCLIPConfig, dict(project_dim=16, pad_token_id=0)),
    "chinese_clip": _matches(transformers.ChineseCLIPConfig),
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
    "clip": _matches(transformers.CLIPConfig, dict(eos_token_id=98)),
    "metaclip_2": _matches(transformers.MetaClip2Config, dict(eos_token_id=98)),
    "owlv2": _matches(transformers.Owlv2Config),
    "owlvit": _matches(transformers.OwlViTConfig),
    "siglip": _matches(transformers.SiglipConfig, dict(projection_size=32)),
    "modernvbert": Example(
        "Fusion of texts and images", transformers.ModernVBertForSequenceClassification,
        lambda: transformers.ModernVBertConfig(
            text_config=TEXT | ENDS, vision_config=VISION, pixel_shuffle_factor=2, image_token_id=IMAGE_TOKEN,
            num_labels=3,
        ),
        lambda: pictured_words(1) | {"pixel_values": pixels(16)["pixel_values"][:, None]}, CLASSES,
    ),
    "vision-text-dual-encoder": Example(
        "Fusion of texts and images", transformers.VisionTextDualEncoderModel,
        lambda: transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT), projection_dim=16
        ),
        lambda: words() | pixels(16), {"return_loss": True}, "text_embeds",
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
    "flava": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.FlavaConfig(
            text_config=TEXT, image_config=VISION, projection_dim=16, hidden_size=32,
            multimodal_config={k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
        ),
        lambda: words() | pixels(16), None, "multimodal_embeddings",
    ),
    "siglip2": Example(
        "Fusion of texts and images", AutoModel,
        lambda: transformers.Siglip2Config(
            text_config=TEXT | dict(projection_size=32),
            vision_config={k: v for k, v in VISION.items() if k != "image_size"} | dict(num_patches=4),
        ),
        lambda: words() | padded_patches(), {"return_loss": True}, "logits_per_image",
    ),
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
    "visual_bert": Example(
        "Fusion of texts and images", transformers.VisualBertForQuestionAnswering,
        partial(transformers.VisualBertConfig, **TEXT, visual_embedding_dim=12, num_labels=3),
        region_words, {"labels": torch.eye(3)},
    ),
    "vilt": Example(
        "Fusion of texts and images", AutoModelForVisualQuestionAnswering,
        partial(transformers.ViltConfig, **TEXT, image_size=16, patch_size=8, max_image_length=-1, num_labels=3),
        lambda: words() | pixels(16), {"labels": torch.eye(3)},
    ),
    "lxmert": Example(
        "Fusion of texts and images", AutoModelForQuestionAnswering,
        lambda: transformers.LxmertConfig(
            vocab_size=99, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=2, x_layers=3,
            r_layers=2, visual_feat_dim=12, visual_pos_dim=4, num_qa_labels=3, max_position_embeddings=40,
        ),
        regions, {"labels": torch.tensor([0, 1, 2])}, "question_answering_score", unused=r"x_layers\.2\.visn",
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
    "t5": _translates(transformers.T5Config, **T5, feed_forward_proj="relu"),
    "longt5": _translates(
        transformers.LongT5Config, **T5, encoder_attention_type="transient-global", local_radius=3,
        global_block_size=2,
    ),
    "mt5": _translates(transformers.MT5Config, **T5),
    "umt5": _translates(transformers.UMT5Config, **T5),
    "switch_transformers": _translates(
        transformers.SwitchTransformersConfig, **T5, num_decoder_layers=NUM_LAYERS, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, expert_capacity=8,
    ),
    "bart": _translates(transformers.BartConfig),
    "bigbird_pegasus": _translates(transformers.BigBirdPegasusConfig, **SEQ2SEQ, attention_type="original_full"),
    "blenderbot": _translates(transformers.BlenderbotConfig),
    "blenderbot-small": _translates(transformers.BlenderbotSmallConfig),
    "led": _translates(
        transformers.LEDConfig, **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        attention_window=4, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40,
    ),
    "marian": _translates(transformers.MarianConfig),
    "mbart": _translates(transformers.MBartConfig),
    "mvp": _translates(transformers.MvpConfig),
    "nllb-moe": _translates(
        transformers.NllbMoeConfig, **SEQ2SEQ, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        expert_capacity=8,
    ),
    "pegasus": _translates(transformers.PegasusConfig),
    "pegasus_x": _translates(transformers.PegasusXConfig, **SEQ2SEQ, num_global_tokens=2, block_size=4),
    "plbart": _translates(transformers.PLBartConfig),
    "m2m_100": _translates(transformers.M2M100Config),
    "seamless_m4t": _interprets(transformers.SeamlessM4TConfig, transformers.SeamlessM4TForTextToText, sources),
    "seamless_m4t_v2": _interprets(  # in which convolutions read padding
        transformers.SeamlessM4Tv2Config, transformers.SeamlessM4Tv2ForSpeechToText,
        lambda: {"input_features": heard()["input_features"], "decoder_input_ids": answers()},
    ),
    "udop": Example(
        "Encoder-decoders", transformers.UdopForConditionalGeneration,
        partial(transformers.UdopConfig, **T5, max_2d_position_embeddings=64, image_size=16, patch_size=8),
        lambda: sources() | {"bbox": boxed_words()["bbox"] / 64}, {"labels": answers()}, task="SEQ_2_SEQ_LM",
        checkpoints=False,
    ),
    "t5gemma": Example(
        "Encoder-decoders", AutoModelForSeq2SeqLM,
        lambda: transformers.T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=99, eos_token_id=None),
        sources, {"labels": answers()}, task="SEQ_2_SEQ_LM",
    ),
    "florence2": Example(
        "Encoder-decoders", AutoModelForImageTextToText,
        lambda: transformers.Florence2Config(
            text_config=SEQ2SEQ | dict(model_type="bart"), image_token_id=IMAGE_TOKEN,
            vision_config=dict(
                embed_dim=[8, 16], depths=[1, 1], num_heads=[2, 2], num_groups=[2, 2], patch_size=[3, 3],
                patch_stride=[4, 2], patch_padding=[1, 1], patch_prenorm=[False, True], window_size=2,
                projection_dim=32,
            ),
        ),
        pictured_sources, {"labels": answers()},
    ),
    "pix2struct": Example(
        "Encoder-decoders", AutoModelForImageTextToText,
        lambda: transformers.Pix2StructConfig(
            text_config=dict(
                vocab_size=99, hidden_size=32, d_kv=8, d_ff=48, num_layers=NUM_LAYERS, num_heads=4,
                decoder_start_token_id=0, eos_token_id=None, encoder_hidden_size=32,
            ),
            vision_config=dict(
                hidden_size=32, patch_embed_hidden_size=12, d_ff=48, d_kv=8, num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4, patch_size=2, seq_len=9,
            ),
        ),
        flattened, {"labels": answers()},
    ),
    "vision-encoder-decoder": Example(
        "Encoder-decoders", transformers.VisionEncoderDecoderModel,
        lambda: transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**VISION),
            transformers.TrOCRConfig(
                vocab_size=99, d_model=32, decoder_layers=NUM_LAYERS, decoder_attention_heads=4, decoder_ffn_dim=48,
                max_position_embeddings=20, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                decoder_start_token_id=2, cross_attention_hidden_size=32,
            ),
            decoder_start_token_id=2, pad_token_id=0,
        ),
        lambda: pixels(16) | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "speech-encoder-decoder": Example(
        "Encoder-decoders", transformers.SpeechEncoderDecoderModel,
        lambda: transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            _hears(transformers.Wav2Vec2Config, layerdrop=0.0).config(), transformers.MBartConfig(**SEQ2SEQ),
            decoder_start_token_id=2, pad_token_id=0,
        ),
        lambda: waves() | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "encoder-decoder": Example(
        "Encoder-decoders", transformers.EncoderDecoderModel,
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.BertConfig(**TEXT), transformers.BartConfig(**SEQ2SEQ), decoder_start_token_id=2,
            pad_token_id=0,
        ),
        sources, {"labels": answers()},
    ),
    "speecht5": Example(
        "Encoder-decoders", transformers.SpeechT5ForSpeechToText,
        lambda: transformers.SpeechT5Config(
            **{k: v for k, v in SEQ2SEQ.items() if k not in ("d_model", "max_position_embeddings")}, hidden_size=32,
            conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, max_text_positions=40,
            max_speech_positions=80, encoder_layerdrop=0.0, decoder_layerdrop=0.0, apply_spec_augment=False,
        ),
        lambda: waves() | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "canary": _transcribes(
        lambda: transformers.CanaryConfig(
            encoder_config=PARAKEET, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=None,
            decoder_start_token_id=2,
            decoder_config=LISTENER | dict(vocab_size=99, bos_token_id=1, eos_token_id=None, head_dim=8),
        )
    ),
    "cohere_asr": _transcribes(
        lambda: transformers.CohereAsrConfig(
            encoder_config=PARAKEET, **LISTENER, vocab_size=99, bos_token_id=1, eos_token_id=None,
            decoder_start_token_id=2, head_dim=8,
        )
    ),
    "moonshine": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.MoonshineConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=NUM_LAYERS,
            decoder_num_hidden_layers=NUM_LAYERS, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
            encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, decoder_start_token_id=1, pad_token_id=0,
            eos_token_id=None,
        ),
        lambda: waves(1500) | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "speech_to_text": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.Speech2TextConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
            input_feat_per_channel=20, input_channels=1, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=(3, 3),
            max_source_positions=40, max_target_positions=20,
        ),
        sounds, {"labels": answers()},
    ),
    "whisper": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=10, max_target_positions=20, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        sounds, {"labels": answers()},
    ),
}  # fmt: skip


def skipped(model: PreTrainedModel) -> list[int | str]:
    """Every second attention, the first among them; where layers have two, there are layers without the one, without
    the other, and without both."""
    layers = find_layers(model)
    arms = {key: arm for key, arm in layers.items() if arm.is_skippable}
    if not layers.by_name:
        return list(arms)[::2]
    return [key for key, arm in arms.items() if arm.index in ((0, 2, 3) if arm.row.context else (0, 1, 3))]


def adapted(model_type: str, seed: int = 2, **settings) -> PeftModel:
    base = tiny_model(model_type)
    task = EXAMPLES[model_type].task if model_type in EXAMPLES else "CAUSAL_LM"
    config = EASConfig(**dict(skip_layers=skipped(base), task_type=task, propagation="mean") | settings)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "eas_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module, model_type: str, inputs: dict | None = None) -> torch.Tensor:
    inputs = inputs or tiny_inputs(model_type)
    with torch.no_grad():
        outputs = model(**inputs)
    if model_type in EXAMPLES:
        return outputs[EXAMPLES[model_type].output]
    found = outputs.logits[inputs["attention_mask"].bool()]
    return found.masked_fill(found == torch.finfo(found.dtype).min, 0)  # what Chameleon never says


def cache_of(model: nn.Module, inputs: dict) -> Cache:
    """What a forward leaves in the KV cache; in one of ours if the outputs have none (RecurrentGemma)."""
    outputs = model(**inputs, **asking(model))
    outputs = getattr(outputs, "language_model_outputs", outputs)
    if "past_key_values" in outputs:
        return outputs.past_key_values
    cache = DynamicCache(config=model.config)
    model(**inputs, use_cache=True, past_key_values=cache)
    return cache


def asking(model: nn.Module) -> dict[str, bool]:
    """For a cache; to ask again for what is the default is an error in the encoder of Switch Transformers."""
    return {} if getattr(model.config, "use_cache", False) else {"use_cache": True}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"differs by {error:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# The checks, in the order of the page's columns
# ----------------------------------------------------------------------------------------------------------------------


def identity(model_type: str) -> None:
    """A fresh adapter changes nothing."""
    base = tiny_model(model_type)
    expected = logits(base, model_type)
    assert_close(logits(get_peft_model(base, EASConfig(skip_layers=[])).eval(), model_type), expected, 1e-6)


def skipping(model_type: str) -> None:
    """Fresh adapters that skip are the base model whose attentions give zero."""
    base = tiny_model(model_type)
    layers = find_layers(base)
    dropped = skipped(base)
    whole = logits(base, model_type)
    for index in dropped:
        attention = base.get_submodule(layers[index].attention)
        if layers[index].row.core:  # the attention adds its input itself
            *_, projection = (m for m in attention.modules() if isinstance(m, nn.Linear))
            projection.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
        else:
            attention.register_forward_hook(partial(_dropped, layers[index].row.adds_residual))
    expected = logits(base, model_type)
    model = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=dropped)).eval()
    assert_close(logits(model, model_type), expected, 1e-5)
    assert (expected - whole).abs().max() > 1e-3, "the attentions do nothing"


def _dropped(adds_residual: bool, module: nn.Module, args: tuple, output):
    first = args[1] if adds_residual else torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def standing_in(model_type: str) -> None:
    """An attention whose output is a constant costs nothing to skip: its stand-in is that constant."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    before = logits(base, model_type)
    generator = torch.Generator().manual_seed(3)
    shared = {base.get_submodule(layers[key].attention): layers[key].row for key in dropped}  # Zamba's serve several
    for attention, row in shared.items():
        module = attention
        if row.core:  # the attention adds its input itself
            *_, module = (m for m in attention.modules() if isinstance(m, nn.Linear))
        module.register_forward_hook(partial(_constant, row.adds_residual, torch.randn(64, generator=generator)))
    expected = logits(base, model_type)
    assert (expected - before).abs().max() > 1e-3, "the attentions did nothing"
    model = get_peft_model(base, EASConfig(skip_layers=dropped, propagation="none")).eval()
    initialize_eas_weights(model, [tiny_inputs(model_type)])
    assert_close(logits(model, model_type), expected, 2e-4)
    merged = model.merge_and_unload()
    assert_close(logits(merged, model_type), expected, 2e-4)
    assert_close(logits(reloaded(merged, model_type), model_type), expected, 2e-4)


def _constant(adds_residual: bool, constant: torch.Tensor, module: nn.Module, args: tuple, output):
    first = output[0] if isinstance(output, tuple) else output
    first = torch.zeros_like(first) + constant[: first.shape[-1]] + (args[1] if adds_residual else 0)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def reloaded(merged: PreTrainedModel, model_type: str) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        cls = auto_class(model_type)
        return (cls if hasattr(cls, "_model_mapping") else type(merged)).from_pretrained(folder).eval()


def merging(model_type: str) -> None:
    """Merged equals unmerged, with and without propagation, with one branch and two."""
    for settings in (dict(router="static", groups=2), dict(propagation="none")):
        model = adapted(model_type, **settings)
        expected = logits(model, model_type)
        fresh = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=skipped(tiny_model(model_type)))).eval()
        assert (expected - logits(fresh, model_type)).abs().max() > 1e-3, "the adapters do nothing"
        try:
            assert_close(logits(model.merge_and_unload(), model_type), expected)
        except AssertionError:
            if not any("expert" in name for name, _ in model.named_parameters()):
                raise
            # where two experts are as likely, rounding may choose the other one: not with other adapters, too
            model = adapted(model_type, seed=3, **settings)
            expected = logits(model, model_type)
            assert_close(logits(model.merge_and_unload(), model_type), expected)


def generation(model_type: str) -> None:
    """With a KV cache as without, before and after merging."""
    model = adapted(model_type)
    if not generates(model_type):
        return
    inputs = {name: value for name, value in tiny_inputs(model_type).items() if not name.startswith("decoder_")}
    for _ in range(2):
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=SPECIAL)
        expected = model.generate(**inputs, use_cache=False, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        if "decoder_input_ids" in tiny_inputs(model_type):
            read_in_two(model, model_type)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()


def read_in_two(model: nn.Module, model_type: str) -> None:
    """A decoder that goes on from its cache gives what it gives at once."""
    whole, inputs = logits(model, model_type), tiny_inputs(model_type)
    ids = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        cache = model(**inputs, decoder_input_ids=ids[:, :2], **asking(model)).past_key_values
        rest = model(**inputs, decoder_input_ids=ids[:, 2:], past_key_values=cache, **asking(model)).logits
    assert_close(rest, whole[:, 2:])


def training(model_type: str) -> None:
    """A step of the Trainer changes every adapter, and nothing else."""
    model, example, loss = adapted(model_type), EXAMPLES.get(model_type), None
    if example is not None:
        batch = tiny_inputs(model_type) | (example.labels or {})
        if example.labels is None:
            loss = partial(_mean_square, example.output)
    else:
        labels = tiny_inputs(model_type)["input_ids"].clone()
        labels[:, :8] = -100
        batch = tiny_inputs(model_type) | {"labels": labels}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=model.base_model.model.supports_gradient_checkpointing
            and (example is None or example.checkpoints),
        )  # fmt: skip
        Trainer(
            model, args, train_dataset=[0, 1, 2], data_collator=lambda rows: batch, compute_loss_func=loss
        ).train()  # fmt: skip
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if example is not None and example.unused:
        trainable = {name for name in trainable if not re.search(example.unused, name)}
    assert changed == trainable, f"not trained: {sorted(trainable - changed)[:5]}"


def _mean_square(name: str, outputs, labels: None, num_items_in_batch: None) -> torch.Tensor:
    return outputs[name].square().mean()


def reloading(model_type: str) -> None:
    """Adapter and merged model give the same after saving and loading."""
    model = adapted(model_type)
    expected = logits(model, model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert_close(
            logits(PeftModel.from_pretrained(tiny_model(model_type), folder).eval(), model_type), expected, 1e-6
        )
    merged = model.merge_and_unload()
    expected = logits(merged, model_type)
    loaded = reloaded(merged, model_type)
    assert type(loaded) is type(merged)
    assert_close(logits(loaded, model_type), expected, 1e-5)


def sizes(model_type: str) -> None:
    """The parameters of the skipped attentions are gone, and so are their keys and values."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    prefixes, stays = [], []
    for arm in map(layers.get, dropped):
        prefixes += [
            f"{arm.layer}.{name}." for name in (arm.row.attention, *arm.row.attention_norms, *arm.row.output_norms)
        ]
        stays += [f"{arm.attention}.{arm.row.residual_norm}."] if arm.row.residual_norm else []
    named = list(base.named_parameters(remove_duplicate=False))
    removed = {n for n, _ in named if n.startswith(tuple(prefixes)) and not n.startswith(tuple(stays))}
    used_elsewhere = {id(p) for n, p in named if n not in removed}  # layers may share weights
    gone = sum(p.numel() for p in {p for n, p in named if n in removed} if id(p) not in used_elsewhere)
    assert gone > 0
    merged = get_peft_model(
        base, EASConfig(skip_layers=dropped, propagation="none", stand_in="zero", use_bias=False)
    ).merge_and_unload()
    assert tiny_model(model_type).num_parameters() - merged.num_parameters() == gone
    if generates(model_type):
        cache = cache_of(merged, tiny_inputs(model_type))
        for row in layers.family.attentions:
            own = cache
            if isinstance(cache, EncoderDecoderCache):
                own = cache.cross_attention_cache if row.context else cache.self_attention_cache
            elements = [
                sum(vars(layer)[name].numel() for name in ("keys", "prefill_keys") if vars(layer).get(name) is not None)
                for layer in own.layers
            ]
            arms = {arm.index: key in dropped for key, arm in layers.items() if arm.row == row}
            if row.stack == "decoder":
                assert all((elements[index] <= 1) == is_dropped for index, is_dropped in arms.items())


def images(model_type: str) -> None:
    """The image, or the sound, is among what a skipped attention says: another one changes what it keeps."""
    if model_type not in IMAGES | SOUNDS:
        return
    model = adapted(model_type)
    inputs = tiny_inputs(model_type)
    seen = ("pixel_values", "patches", "input_features", "input_values")
    name = next(name for name in inputs if any(part in name for part in seen))
    other = inputs | {name: inputs[name].roll(len(inputs[name]) // 3, 0)}
    kept = []
    for given in (inputs, other):
        cache = cache_of(model, given)
        layers = [vars(cache.layers[index]) for index in skipped(model.base_model.model)]
        kept.append([layer["prefill_values" if "prefill_values" in layer else "values"] for layer in layers])
    assert max((first - second).abs().max() for first, second in zip(*kept, strict=True)) > 1e-3


TEXTS = torch.randint(3, 90, (3, 2, 10), generator=torch.Generator().manual_seed(5))


def decoded(model_type: str) -> list[nn.Module]:
    """An adapted decoder, with and without propagation, as it is and merged; none for other models."""
    if model_type in EXAMPLES:
        return []
    models = []
    for propagation in ("mean", "none"):
        model = adapted(model_type, propagation=propagation)
        models += [model, copy.deepcopy(model).merge_and_unload()]
    return models


@torch.no_grad()
def prefix_moves(model: nn.Module, ids: torch.Tensor) -> float:
    """By how much the logits of six tokens change when others, or padding, follow; relative to the largest."""
    before = model(ids[:, :6]).logits
    mask = (torch.arange(10) < 6).long().expand(2, 10)
    after = model(ids).logits, model(ids * mask, attention_mask=mask).logits
    return distance(before, *(logits[:, :6] for logits in after))


@torch.no_grad()
def parts_differ(model: nn.Module, ids: torch.Tensor) -> float:
    """How far the logits of a text that is read in parts, with a KV cache, are from those read at once."""
    moved = 0.0
    for mask in (None, (torch.arange(10) >= torch.tensor([[0], [3]])).long()):
        whole = model(ids, attention_mask=mask).logits
        read, cache = [], None
        for start, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
            outputs = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            read.append(outputs.logits)
        kept = torch.ones(2, 10, dtype=torch.bool) if mask is None else mask.bool()
        moved = max(moved, distance(whole[kept], torch.cat(read, dim=1)[kept]))
    return moved


@torch.no_grad()
def packing_differs(model: nn.Module, ids: torch.Tensor) -> float:
    """How far the logits of two texts in one row are from those of the texts apart."""
    positions = torch.arange(10).repeat(2)[None]
    apart = torch.cat([model(row[None]).logits for row in ids], dim=1)
    packed = model(ids.flatten()[None], position_ids=positions, use_cache=False).logits  # no cache: nothing before
    return distance(apart, packed)


def distance(expected: torch.Tensor, *actual: torch.Tensor) -> float:
    scale = expected.abs().max()
    return max(float((logits - expected).abs().max() / scale) for logits in actual)


def stock_is_exact(model_type: str, differ: Callable[[nn.Module, torch.Tensor], float]) -> bool:
    """Whether the base model does itself what is asked of it, with all texts: hybrids may not read in parts, or know of
    packing, and what an indexer chooses of few tokens may depend on what follows."""
    try:
        return all(differ(tiny_model(model_type), ids) < 1e-4 for ids in TEXTS)
    except Exception:
        return False


def _check(model_type: str, differ: Callable[[nn.Module, torch.Tensor], float]) -> None:
    if model_type in EXAMPLES or not stock_is_exact(model_type, differ):
        return
    for model in decoded(model_type):
        found = differ(model, TEXTS[0])
        assert found < 1e-4, f"{type(model).__name__} differs by {found:.1e}"


def prefix(model_type: str) -> None:
    """Logits do not change when tokens, or padding, follow; without a mask, too."""
    _check(model_type, prefix_moves)


def parts(model_type: str) -> None:
    """Read in parts, with a KV cache, as at once: chunks, a second turn, single tokens; with left padding, too."""
    _check(model_type, parts_differ)


def packing(model_type: str) -> None:
    """Two texts in one row, with positions that start anew, as apart."""
    _check(model_type, packing_differs)


AS_STOCK = {"prefix": prefix_moves, "parts": parts_differ, "packing": packing_differs}
"""Checks of what the base model does itself, where it does."""


def padding(model_type: str) -> None:
    """A row of a padded batch gives what it gives alone."""
    inputs = tiny_inputs(model_type)
    if (
        model_type not in EXAMPLES
        or "attention_mask" not in inputs
        or EXAMPLES[model_type].output.startswith("logits_per_")
    ):
        return
    mask = inputs["attention_mask"]
    row = int(mask.sum(dim=1).argmin())
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    length = int(mask[row].sum())
    assert length < mask.shape[1]
    alone |= {
        name: alone[name][:, :length]
        for name in ("input_ids", "attention_mask", "bbox", "flattened_patches", "input_features")
        if name in alone
    }
    model = adapted(model_type)
    whole, single = logits(model, model_type), logits(model, model_type, alone)
    assert_close(single, whole[row : row + 1][:, : single.shape[1]])


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        identity, skipping, standing_in, merging, prefix, parts, packing, generation, training, reloading, sizes,
        images, padding,
    )
}  # fmt: skip


def whole_models() -> list[str]:
    """Families of this version of transformers that are models of their own; the others are decoders of these."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known -= {"trocr"}  # which is nothing without an encoder
    known |= (EXAMPLES | SOUNDS).keys() & CONFIG_MAPPING.keys()
    return [model_type for model_type in FAMILIES if model_type in known]


def generates(model_type: str) -> bool:
    """Whether the model of a family that is tried here generates text."""
    return model_type not in EXAMPLES or EXAMPLES[model_type].section == "Encoder-decoders"


def applies(name: str, model_type: str) -> bool:
    """Whether there is something to check."""
    if name in AS_STOCK:
        return model_type not in EXAMPLES and stock_is_exact(model_type, AS_STOCK[name])
    if name == "padding":
        return model_type in EXAMPLES and "attention_mask" in tiny_inputs(model_type)
    return (name != "images" or model_type in IMAGES | SOUNDS) and (name != "generation" or generates(model_type))


def run(model_type: str, checks: dict[str, Callable[[str], None]] = CHECKS) -> dict[str, str]:
    """`{check: ""}` or what went wrong."""
    results = {}
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(model_type)
            results[name] = ""
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return results


def kind(model_type: str) -> str:
    """The section of the page that a family belongs to."""
    if model_type in EXAMPLES:
        return EXAMPLES[model_type].section
    if model_type in SOUNDS:
        return "Audio-language models"
    if FAMILIES[model_type].decoder is not None or model_type in IMAGES:
        return "Vision-language models"
    if any("experts" in name for row in FAMILIES[model_type].attentions for name in row.ffn_inputs):
        return "Mixtures of experts"
    return "Decoders"


def page(results: dict[str, dict[str, str]]) -> str:
    """docs/supported-models.md."""
    lines = [
        "# Supported models",
        "",
        f"What `make supported-models` found with transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]}: each family as a tiny random model. The columns:",
        "",
        *(f"- **{name}**: {check.__doc__.strip().splitlines()[0]}" for name, check in CHECKS.items()),
        "",
        "An empty cell: there is nothing to check; of prefix, parts and packing, that the base model does not do it,",
        "either.",
        "",
        "A family that is not here: see [Families](usage.md#families).",
        "",
        "Of models that have layers without attention, the attentions of the others are skipped; of vision-language",
        "and audio-language models, those of the language model. Left alone are the first attention of each list of",
        "T5 and its kin, which has the relative positions of all; the first self-attention of decoders with",
        "cross-attentions, which says how long the KV cache is, and those of GLM-MoE-DSA, MiniMax and RecurrentGemma;",
        "the attentions of Gemma 3n and Gemma 4 that share keys and values with others; in Zamba, the first with each",
        "set of weights; in Nemotron-H, attentions that no FFN follows; in ERNIE 4.5 VL, those of layers without",
        "shared experts; the cross-attentions of IDEFICS; the first of WavLM, which has the relative positions of",
        "all; the vision towers of ALIGN, BridgeTower, Florence-2, ModernVBERT and vision-text-dual-encoders, and the",
        "audio tower of CLAP; the encoders of BigBird-Pegasus, Pegasus-X, LongT5 with local attentions, and of models",
        "that are an encoder and a decoder of other families.",
        "",
        "Kosmos-2 and 2.5 are tried without padding, which they count as tokens where there is a KV cache; FastVLM",
        "without images and its own vision tower, which needs timm; DeepSeek-OCR 2 without images, which are at least",
        "145 tokens each.",
    ]
    failures = []
    sections = ["Decoders", "Mixtures of experts", "Vision-language models", "Audio-language models"]
    sections += dict.fromkeys(example.section for example in EXAMPLES.values())
    for section in sections:
        rows = {model_type: result for model_type, result in results.items() if kind(model_type) == section}
        lines += ["", f"## {section} ({len(rows)})", "", f"| model type | {' | '.join(CHECKS)} |"]
        lines += [f"|{'---|' * (len(CHECKS) + 1)}"]
        for model_type, result in sorted(rows.items()):
            marks = []
            for name, error in result.items():
                if error:
                    failures.append(f"- `{model_type}`, {name}: {error}")
                shown = "✗" if error else "✓" if applies(name, model_type) else " "
                marks.append(shown)
            lines.append(f"| `{model_type}` | {' | '.join(marks)} |")
    if failures:
        lines += ["", "## What does not work", "", *failures]
    return "\n".join(lines) + "\n"


def main() -> None:
    transformers.logging.set_verbosity_error()
    results = {}
    for model_type in sys.argv[1:] or whole_models():
        results[model_type] = run(model_type)
        wrong = {name: error for name, error in results[model_type].items() if error}
        print(model_type, wrong or "ok", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(results), encoding="utf-8")
        print(f"{len(results)} families: {PAGE}")


if __name__ == "__main__":
    main()
