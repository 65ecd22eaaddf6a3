"""Rows of models of several kinds of input: towers side by side, fusions, and models around a language model."""

from __future__ import annotations

from dataclasses import replace

from .encoders import BERT, CLIP, VILT
from .spec import Attentions, alike, around

CLIP_TEXT = replace(CLIP, stack="text", layers="text_model.encoder.layers")
CLIP_VISION = replace(CLIP, layers="vision_model.encoder.layers")
AIMV2 = Attentions(
    stack="text",
    layers="text_model.encoder.layers",
    attention="attention",
    attention_norms=("rms_norm1",),
    causal=False,
    ffn="ffn",
)
BERT_TEXT = replace(BERT, stack="text", layers="text_model.encoder.layer")
BERT_ALONE = replace(BERT_TEXT, returns=None)  # returns its output alone


def bert_cross(own: Attentions) -> Attentions:
    """The attention to another model's tokens that layers have beside their own one."""
    return replace(
        own,
        attention="crossattention",
        attention_inputs=("self.query",),
        context="encoder_hidden_states",
        context_inputs=("self.key", "self.value"),
        mask="encoder_attention_mask",
    )


BLIP_ENCODER = replace(BERT, layers="text_encoder.encoder.layer")
BLIP_DECODER = replace(BERT, stack="decoder", layers="text_decoder.bert.encoder.layer", causal=True, answers=True)
BRIDGE_TEXT = replace(BERT, stack="cross_text", layers="cross_modal_text_layers")
BRIDGE_IMAGE = replace(BERT, stack="cross_image", layers="cross_modal_image_layers")
LXMERT = replace(BERT, stack="text", returns=())
LXMERT_CROSS = replace(LXMERT, layers="encoder.x_layers", ffn="lang_inter")

ROWS = (
    *alike("aimv2", AIMV2, replace(AIMV2, stack="vision", layers="vision_model.encoder.layers")),
    *alike("align clap", BERT_ALONE),  # with another tower for images or sounds
    *alike("altclip", replace(BERT_ALONE, layers="text_model.roberta.encoder.layers"), CLIP_VISION),
    *around(
        "language_model",
        "aria audioflamingo3 aya_vision blip-2 cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 "
        "deepseek_vl deepseek_vl_hybrid dots3_note ernie4_5_vl_moe exaone4_5 fast_vlm florence2 fun_asr_nano fuyu "
        "gemma3 gemma4 gemma4_unified glm46v glm4v glm4v_moe glm_ocr glmasr glmga got_ocr2 granite4_vision "
        "granite_speech granite_speech_plus hunyuan_vl hyperclovax_vision_v2 instructblip instructblipvideo internvl "
        "janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision "
        "minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mllama molmo2 moss_transcribe_diarize "
        "muse_glimmer muse_spark musicflamingo nemotron_h_omni ovis2 paddleocr_vl paligemma pp_chart2table "
        "qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_vl qwen3_vl_moe step3p7 "
        "unlimited_ocr vibevoice_asr video_llama_3 video_llava vipllava voxtral",
    ),
    *alike(
        "blip",
        BERT_TEXT,
        BLIP_ENCODER,
        bert_cross(BLIP_ENCODER),
        BLIP_DECODER,
        bert_cross(BLIP_DECODER),
        replace(CLIP_VISION, attention_inputs=("qkv",)),
    ),
    *alike("bridgetower", BERT_TEXT, BRIDGE_TEXT, bert_cross(BRIDGE_TEXT), BRIDGE_IMAGE, bert_cross(BRIDGE_IMAGE)),
    *alike("chinese_clip", BERT_ALONE, CLIP_VISION),
    *alike("clip metaclip_2 owlv2 owlvit siglip siglip2", CLIP_TEXT, CLIP_VISION),
    *around(
        "text_model",
        "emu3 granite_docling idefics2 idefics3 kosmos-2 kosmos-2.5 modernvbert smolvlm vision-text-dual-encoder",
    ),
    *alike(
        "flava",
        *(
            replace(VILT, stack=stack, layers=f"{stack}_model.encoder.layer")
            for stack in ("text", "image", "multimodal")
        ),
    ),
    *alike(
        "lxmert",
        LXMERT,
        replace(LXMERT, stack="vision", layers="encoder.r_layers"),
        replace(
            LXMERT_CROSS,
            stack="cross",
            attention="visual_attention",
            convention="adds_input",
            core="att",
            attention_inputs=("att.query",),
            context="ctx_tensor",
            context_inputs=("att.key", "att.value"),
            mask="ctx_att_mask",
            ffn_back="visn_inter",
        ),
        replace(LXMERT_CROSS, stack="cross_text", attention="lang_self_att"),
        replace(LXMERT_CROSS, stack="cross_vision", attention="visn_self_att", ffn="visn_inter"),
    ),
    # earlier versions of transformers call it `model`
    *around("language_model|model", "qwen2_5_omni_thinker qwen3_omni_moe_thinker"),
    *alike("vilt", VILT),
    *alike("xclip", CLIP_TEXT, CLIP_VISION, replace(CLIP, stack="frames", layers="mit.encoder.layers")),
)
