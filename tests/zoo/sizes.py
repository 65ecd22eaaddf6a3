"""Numbers that tiny configurations share."""

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
# towers, query transformers and the like
TOWER = dict(
    hidden_size=16, embed_dim=16, intermediate_size=24, depth=2, num_hidden_layers=2, num_attention_heads=2,
    num_heads=2, image_size=8, patch_size=4, out_hidden_size=32, encoder_hidden_size=16, projection_dim=32,
    num_position_embeddings=16, output_dim=32, vocab_size=64, num_embeddings=64, base_channels=32,
    channel_multiplier=[1, 1], d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24,
    num_mel_bins=8, max_source_positions=8,
)  # fmt: skip
# models that are no decoders
TEXT = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
ENDS = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, mask_token_id=3)
VISION = dict(
    hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=48, image_size=16,
    patch_size=8,
)  # fmt: skip
SEQ2SEQ = dict(
    vocab_size=99, d_model=32, encoder_layers=NUM_LAYERS, decoder_layers=NUM_LAYERS, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
CONFORMER_SIZES = dict(
    hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=48, layerdrop=0.0,
)  # fmt: skip
PARAKEET = dict(
    **CONFORMER_SIZES, num_mel_bins=8, subsampling_factor=2, subsampling_conv_channels=4, conv_kernel_size=3,
    max_position_embeddings=40,
)  # fmt: skip
