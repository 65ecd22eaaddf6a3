"""What models that see, some of which hear, too, need besides the common sizes, and how images are given to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from zoo.decoders import DSA
from zoo.inputs import (
    base_and_tile,
    flat_patches,
    flattened,
    images_at,
    padded_patches,
    patches,
    pixels,
    rows_of_patches,
    single_tile,
    sized,
    tiles,
)
from zoo.sizes import IMAGE_TOKEN, NUM_LAYERS

MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
MROPE_WHOLE = dict(rope_parameters=MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0})
ENCODER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SMALL_TOWER = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    image_size=4, patch_size=4, projection_dim=32,
)  # fmt: skip
SAM = dict(
    hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    mlp_dim=24, window_size=2, global_attn_indexes=[1], downsample_channels=[8, 16],
)  # fmt: skip
HEARING = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=16)
OMNI = dict(video_token_id=97, audio_token_id=96, vision_start_token_id=95)
KOSMOS = dict(embed_dim=32, layers=NUM_LAYERS, attention_heads=4, layerdrop=0.0)
PARTICULAR: dict[str, dict] = {
    "aria": dict(projector_patch_to_query_dict={4: 4}),
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
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"] * 2),
    "deepseek_ocr2_vision": dict(sam_config=SAM, encoder_config=ENCODER | dict(num_key_value_heads=2)),
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
    "fuyu": dict(patch_size=4),
    "gemma3": dict(mm_tokens_per_image=4),
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
    "glm4v_moe_text": MROPE_WHOLE,
    "glm4v_text": MROPE,
    "glm_ocr_text": MROPE_WHOLE,
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
    "kimi_k25": dict(projection_hidden_size=16),
    "kosmos-2": dict(latent_query_num=4),
    "kosmos-2.5": dict(latent_query_num=4),
    "kosmos_2_5_text_model": KOSMOS,
    "kosmos_2_5_vision_model": dict(patch_embed_hidden_size=12, head_dim=8, max_num_patches=8),
    "kosmos_2_text_model": KOSMOS,
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
    "minimax_m3_vl_text": dict(
        layer_types=["minimax_m3_sparse", "full_attention"] * 2,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=2,
        index_topk_blocks=2,
    ),
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
    "nemotron_h_omni": dict(vision_hidden_size=16, projector_hidden_size=24),
    "ovis2": dict(hidden_size=32, visual_indicator_token_ids=[91, 92, 93, 94, 95]),
    "paddleocr_vl_text": MROPE,
    "paligemma": dict(projection_dim=32),
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
    "qwen2_5_omni_audio_encoder": HEARING,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_vl_vision": dict(hidden_size=32),
    "qwen3_omni_moe_audio_encoder": HEARING | dict(downsample_hidden_size=8),
    "qwen3_omni_moe_text": MROPE | dict(sliding_window=None),
    "qwen3_omni_moe_thinker": OMNI,
    "radio": dict(max_img_size=16, video_temporal_patch_size=2),
    "sam_vision_model": dict(global_attn_indexes=[0, 1]),
    "unlimited_ocr_vision": dict(sam_config=SAM, encoder_config=ENCODER | dict(image_size=4, patch_size=4)),
    "vipllava": dict(vision_feature_layer=[-1, -2], vision_feature_layers=[-1, -2]),  # its name depends on the version
}
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
