"""What the configurations of decoders, mixtures of experts among them, need besides the common sizes."""

MLA = dict(num_key_value_heads=4)
DSA = MLA | dict(index_topk=4, index_head_dim=16, index_n_heads=2)
HYBRID = dict(layer_types=["full_attention", "linear_attention"] * 2)
CONVOLUTIONS = dict(layer_types=["full_attention", "conv"] * 2)
SHARED_KV = dict(
    num_hidden_layers=8, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99,
    layer_types=["sliding_attention", "full_attention"] * 4,
)  # fmt: skip
PARTICULAR: dict[str, dict] = {
    "axk1": MLA,
    "axk2": DSA,
    "bailing_hybrid": MLA | HYBRID | dict(num_mtp_layers=0),
    "bamba": dict(attn_layer_indices=[0, 2]),
    "bert-generation": dict(is_decoder=True),
    "dbrx": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": DSA,
    "gemma3n_text": SHARED_KV | dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * 8),
    "gemma4_text": SHARED_KV | dict(global_head_dim=16),
    "gemma4_unified_text": SHARED_KV | dict(global_head_dim=16),
    "glm4_moe_lite": MLA,
    # with fewer, transformers 5.23 looks at other tokens with a cache than without, in the base model, too
    "glm_moe_dsa": DSA | dict(indexer_types=["full", "shared", "shared", "full"], index_topk=64),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["attention", "mamba"] * 2, shared_intermediate_size=48),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=0),
    "jetmoe": dict(kv_channels=8),
    "kimi_linear": MLA | HYBRID | dict(linear_head_dim=8, linear_num_heads=4),
    "lfm2": dict(full_attn_idxs=[0, 2]),
    "lfm2_moe": CONVOLUTIONS | dict(num_dense_layers=1),
    "lfm3": CONVOLUTIONS,
    "minicpm3": MLA,
    "mistral4": MLA,
    "nemotron_h": dict(
        layers_block_type=["full_attention", "mlp", "linear_attention", "full_attention", "moe", "full_attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        moe_shared_expert_intermediate_size=16,
    ),
    "olmo_hybrid": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": dict(attention_window_size=16, lru_width=32, block_types=["attention", "recurrent"]),
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
