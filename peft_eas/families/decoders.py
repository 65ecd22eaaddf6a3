"""Rows of decoders of text without experts; those that are part of a larger model, and hybrids, too."""

from __future__ import annotations

from dataclasses import replace

from .encoders import BERT
from .spec import LATENT, POST, SELF_NORM, SPLIT, Attentions, alike

FUSED = ("query_key_value",)
GPT2 = Attentions(
    layers="h", attention="attn", attention_inputs=("c_attn",), attention_norms=("ln_1",), ffn_inputs=("c_fc",)
)
GPT_NEOX = Attentions(attention="attention", attention_inputs=FUSED, ffn_inputs=("dense_h_to_4h",))
FALCON = replace(GPT_NEOX, layers="h", attention="self_attention", attention_norms=())
LFM2 = Attentions(attention_norms=("operator_norm",), ffn="feed_forward", ffn_inputs=("w1", "w3"))
GEMMA4 = Attentions(has="k_proj", keeps_if="store_full_length_kv", output_norms=POST)
ZAMBA = Attentions(
    attention="shared_transf",
    attention_inputs=(),
    attention_norms=(),
    output_norms=("linear",),
    returns=None,
    ffn="mamba_decoder.mamba",
    ffn_inputs=("in_proj",),
    ffn_masks_input=True,
)

ROWS = (
    *alike("apertus", Attentions(attention_norms=("attention_layernorm",), ffn_inputs=("up_proj",))),
    *alike("arcee jais2 nemotron", Attentions(ffn_inputs=("up_proj",))),
    *alike("bamba", Attentions(ffn="feed_forward")),
    *alike("bert-generation", replace(BERT, stack="decoder", causal=True)),
    *alike("biogpt opt xglm", Attentions(attention_norms=SELF_NORM, ffn="fc1", ffn_inputs=("",))),
    # Llama and its like: a norm, q, k and v; a norm, gate and up
    *alike(
        "bitnet chameleon cwm diffllama doge emu3_text_model ernie4_5 gemma granite granite4_vision_text "
        "granite_docling_text granite_swa helium hunyuan_v1_dense hunyuan_vl_text hyperclovax idefics internlm3 "
        "iquestcoder llama ministral ministral3 mistral molmo2_text olmo paddleocr_vl_text qwen2 qwen2_5_omni_text "
        "qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_5_text qwen3_vl_text seed_oss smollm3 stablelm vaultgemma",
        Attentions(),
    ),
    *alike("bloom", replace(FALCON, attention_norms=("input_layernorm",), convention="adds_residual")),
    # attention and FFN side by side, reading the same norm
    *alike("codegen", replace(GPT2, attention_inputs=("qkv_proj",), attention_norms=(), ffn_inputs=("fc_in",))),
    *alike("cohere cohere2 cohere_compass_text", Attentions(attention_norms=())),
    *alike("cosmos3_edge_text nanochat", Attentions(ffn_inputs=("fc1",))),
    *alike(
        "ctrl",
        Attentions(
            layers="h",
            attention="multi_head_attention",
            attention_inputs=("Wq", "Wk", "Wv"),
            attention_norms=("layernorm1",),
            ffn="ffn.0",
            ffn_inputs=("",),
        ),
    ),
    # a norm after the attention, and no other
    *alike("exaone4 olmo2 olmo3 olmo_hybrid", Attentions(attention_norms=(), output_norms=POST)),
    *alike("falcon", FALCON),
    *alike("falcon_h1", Attentions(attention_norms=(), ffn="feed_forward")),
    # a norm after the attention, and one before
    *alike("gemma2 gemma3_text", Attentions(output_norms=POST)),
    # the last layers have queries alone, and the keys and values of earlier ones; where layers have experts, too, the
    # adapter stands before `mlp`, which they add to
    *alike("gemma3n_text", replace(GEMMA4, attention_norms=())),
    *alike("gemma4_text gemma4_unified_text", GEMMA4),
    *alike("glm", Attentions(ffn_inputs=("gate_up_proj",))),
    *alike(
        "glm4 glm4v_text glm_ocr_text",
        Attentions(output_norms=("post_self_attn_layernorm",), ffn_inputs=("gate_up_proj",)),
    ),
    *alike("gpt2 gpt_bigcode", GPT2),
    *alike("gpt_neo", replace(GPT2, attention="attn.attention", attention_inputs=SPLIT)),
    *alike("gpt_neox", GPT_NEOX),
    *alike("gpt_neox_japanese", replace(GPT_NEOX, returns=("", ""))),
    *alike("gptj", replace(GPT2, attention_inputs=SPLIT, attention_norms=(), ffn_inputs=("fc_in",))),
    # `shared_mlp` and, in some models, experts read one norm
    *alike("granitemoehybrid", Attentions(ffn="shared_mlp", ffn_inputs=("input_linear",))),
    *alike(
        "kosmos_2_5_text_model kosmos_2_text_model",
        Attentions(attention_norms=SELF_NORM, ffn="ffn", ffn_inputs=("fc1",)),
    ),
    *alike("lfm2", LFM2),
    *alike("lfm3", replace(LFM2, attention_inputs=(*SPLIT, "g_proj"), output_norms=("post_operator_norm",))),
    *alike("minicpm3 youtu", Attentions(attention_inputs=LATENT)),
    *alike(
        "mllama_text_model",
        Attentions(keeps_first=True, shows_keys=True),
        Attentions(
            attention="cross_attn",
            attention_inputs=("q_proj",),
            context="cross_attention_states",
            context_inputs=("k_proj", "v_proj"),
            causal=False,
            shows_keys=True,
        ),
    ),
    *alike("modernbert-decoder", Attentions(attention="attn", attention_norms=("attn_norm",), ffn_inputs=("Wi",))),
    *alike(
        "mpt",
        Attentions(
            layers="blocks",
            attention="attn",
            attention_inputs=("Wqkv",),
            attention_norms=("norm_1",),
            mask_hides=True,
            ffn="ffn",
            ffn_inputs=("up_proj",),
        ),
    ),
    *alike("muse_glimmer_text", Attentions(attention_inputs=(*SPLIT, "gate_proj"), output_norms=POST)),
    *alike("persimmon", Attentions(attention_inputs=FUSED, ffn_inputs=("dense_h_to_4h",))),
    *alike("phi", Attentions(attention_norms=(), ffn_inputs=("fc1",))),
    *alike("phi3 phi4_multimodal", Attentions(attention_inputs=("qkv_proj",), ffn_inputs=("gate_up_proj",))),
    *alike(
        "recurrent_gemma",
        Attentions(
            attention="temporal_block",
            has="q_proj",
            attention_norms=("temporal_pre_norm",),
            keeps_first=True,
            ffn="mlp_block",
        ),
    ),
    *alike("starcoder2", Attentions(ffn_inputs=("c_fc",))),
    # layers share the weights of one transformer, which only Mamba hears of: it is skipped as a whole
    *alike("zamba", ZAMBA),
    *alike("zamba2", replace(ZAMBA, attention="shared_transformer")),
)
