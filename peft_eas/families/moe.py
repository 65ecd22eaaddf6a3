"""Rows of decoders whose FFNs are mixtures of experts; those that are part of a larger model, and hybrids, too."""

from __future__ import annotations

from dataclasses import replace

from .decoders import LFM2
from .spec import GATED, LATENT, POST, SPLIT, Attentions, alike

ROUTED = ("gate", "experts.gate_up_proj")
SHARED = tuple(f"{name}.{linear}" for name in ("shared_expert", "shared_experts") for linear in GATED)
EXPERTS = GATED + ROUTED + SHARED
ROUTER = ("router", "experts.gate_up_proj")
INDEXED = (*LATENT, "indexer.wk", "indexer.weights_proj")  # with an indexer, which says what to look at
MIXTRAL = Attentions(ffn_inputs=EXPERTS)
DEEPSEEK = replace(MIXTRAL, attention_inputs=LATENT)
AFMOE = Attentions(
    attention_inputs=(*SPLIT, "gate_proj"),
    output_norms=POST,
    ffn_inputs=(*GATED, "router.gate", "experts.gate_up_proj", *SHARED),
)

ROWS = (
    *alike("afmoe", AFMOE),
    *alike(
        "aria_text",
        Attentions(ffn_inputs=("router", "experts.gate_up_proj|experts.fc1.weight", *SHARED), stacked_axis=-2),
    ),
    *alike("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite mistral4", DEEPSEEK),
    *alike("axk2 deepseek_v32", replace(DEEPSEEK, attention_inputs=INDEXED)),
    *alike("bailing_hybrid", replace(DEEPSEEK, has="kv_a_proj_with_mqa", attention_inputs=(*LATENT, "g_proj"))),
    *alike("beam", replace(AFMOE, ffn_inputs=GATED + ROUTED)),
    *alike("cohere2_moe", replace(MIXTRAL, attention_norms=())),
    *alike(
        "dbrx",
        Attentions(
            layers="blocks",
            attention="norm_attn_norm.attn",
            attention_inputs=("Wqkv",),
            attention_norms=("norm_attn_norm.norm_1",),
            ffn="ffn",
            ffn_inputs=("router.layer", "experts.mlp.w1", "experts.mlp.v1"),
        ),
    ),
    *alike(
        "deepseek_ocr2_text dots1 ernie4_5_moe exaone_moe flint glm4_moe glm4v_moe_text hy_v3 mellum mimo_v2_flash "
        "minimax_m2 mixtral olmoe qwen3_moe qwen3_omni_moe_text qwen3_vl_moe_text solar_open unlimited_ocr_text",
        MIXTRAL,
    ),
    *alike("dots3_note_text", replace(DEEPSEEK, attention_inputs=(*INDEXED, "g_proj"))),
    # the layer looks at the class of `mlp`, so the adapter stands before the shared experts in it, which the first
    # layers have not; what else reads their input gets what it got
    *alike("ernie4_5_vl_moe_text", Attentions(ffn="mlp.shared_experts")),
    *alike("flex_olmo", Attentions(attention_norms=(), output_norms=POST, ffn_inputs=ROUTED)),
    # a layer may take over what the layer before looks at: after a skipped attention, that is what the one before saw
    *alike(
        "glm_moe_dsa",
        replace(DEEPSEEK, attention_inputs=INDEXED, returns=("", "prev_topk_indices"), keeps_first=True),
    ),
    *alike("gpt_oss", Attentions(ffn_inputs=ROUTER, stacked_axis=-2)),
    # experts and a shared FFN may read one norm: the adapter stands before the experts, the other gets what it got
    *alike("granitemoe granitemoe_swa granitemoeshared", Attentions(ffn="block_sparse_moe", ffn_inputs=ROUTER)),
    *alike(
        "hunyuan_v1_moe",
        Attentions(ffn_inputs=("gate.wg", "experts.gate_up_proj", "shared_mlp.gate_proj", "shared_mlp.up_proj")),
    ),
    *alike("jamba", Attentions(ffn="feed_forward", ffn_inputs=GATED + ROUTER)),
    *alike(
        "jetmoe",
        Attentions(
            attention="self_attention",
            attention_inputs=("experts.router.layer", "experts.input_linear.weight", "kv_proj"),
            returns=("", ""),
            ffn_inputs=("router.layer", "input_linear.weight"),
        ),
    ),
    *alike("kimi_linear", replace(DEEPSEEK, has="kv_a_proj_with_mqa")),
    *alike("kolibri1", Attentions(output_norms=("post_self_attn_layernorm",), ffn_inputs=ROUTED + SHARED)),
    *alike("laguna step3p5", replace(MIXTRAL, attention_inputs=(*SPLIT, "g_proj"))),
    *alike("lfm2_moe", replace(LFM2, ffn_inputs=("w1", "w3", *ROUTED))),
    *alike("llama4_text", Attentions(ffn="feed_forward", ffn_inputs=GATED + ROUTER + SHARED, stacked_axis=-2)),
    *alike("minimax", Attentions(has="q_proj", attention_norms=(), keeps_first=True, ffn_inputs=ROUTED)),
    *alike(
        "minimax_m3_vl_text",
        Attentions(
            attention_inputs=(*SPLIT, "indexer.q_proj", "indexer.k_proj"),
            ffn_inputs=("gate_up_proj", *ROUTED, "shared_experts.gate_up_proj"),
        ),
    ),
    *alike("muse_spark_text", replace(AFMOE, ffn_inputs=(*GATED, "gate", "pre_expert_proj"))),
    # each layer is a mixer of one kind
    *alike(
        "nemotron_h",
        Attentions(
            attention="mixer",
            has="q_proj",
            attention_norms=(),
            ffn="mixer",
            ffn_after=1,
            ffn_inputs=("up_proj", "gate", "fc1_latent_proj|experts.up_proj", "shared_experts.up_proj"),
        ),
    ),
    *alike("phimoe", Attentions(ffn_inputs=ROUTER)),
    *alike("qwen2_moe qwen3_5_moe_text qwen3_next", replace(MIXTRAL, ffn_inputs=(*EXPERTS, "shared_expert_gate"))),
)
