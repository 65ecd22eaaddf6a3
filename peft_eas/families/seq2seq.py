"""Rows of encoder-decoders."""

from __future__ import annotations

from dataclasses import replace

from .encoders import CONFORMER, PARAKEET, WAV2VEC2
from .spec import LONG, POST, QKV, SELF_NORM, Attentions, alike, around

# the decoder's attention to itself, and its attention to what the encoder gives
DECODER = Attentions(layers="decoder.layers", keeps_first=True, answers=True)
CROSS = replace(
    DECODER,
    keeps_first=False,
    causal=False,
    attention="encoder_attn",
    attention_inputs=("q_proj",),
    context="key_value_states",
    context_inputs=("k_proj", "v_proj"),
)


def of_encoder(decoder: Attentions, layers: str = "encoder.layers") -> Attentions:
    """The attentions of an encoder whose layers are built as those of the decoder."""
    return replace(decoder, stack="encoder", layers=layers, keeps_first=False, causal=False, answers=False)


# Bart: norms after the residual sums
BART = replace(DECODER, attention_norms=(), ffn="fc1", ffn_inputs=("",))
BART_CROSS = replace(CROSS, attention_norms=(), ffn="fc1", ffn_inputs=("",))
# Pegasus: norms before
PEGASUS = replace(BART, attention_norms=SELF_NORM)
PEGASUS_CROSS = replace(BART_CROSS, attention_norms=("encoder_attn_layer_norm",))
MOONSHINE = replace(DECODER, ffn_inputs=("fc1",))
MOONSHINE_CROSS = replace(CROSS, attention_norms=POST, ffn_inputs=("fc1",))
NLLB = replace(PEGASUS, ffn="ffn", ffn_inputs=("fc1", "router.classifier", "experts.*.fc1"))
NLLB_CROSS = replace(
    PEGASUS_CROSS,
    attention="cross_attention",
    attention_norms=("cross_attention_layer_norm",),
    ffn=NLLB.ffn,
    ffn_inputs=NLLB.ffn_inputs,
)
SEAMLESS = replace(NLLB, layers="text_decoder.layers", ffn_inputs=("fc1",))
SEAMLESS_CROSS = replace(NLLB_CROSS, layers="text_decoder.layers", context="encoder_hidden_states", ffn_inputs=("fc1",))
T5GEMMA = replace(DECODER, attention_norms=("pre_self_attn_layernorm",), output_norms=("post_self_attn_layernorm",))
T5 = Attentions(
    layers="decoder.block",
    attention="layer.0.SelfAttention",
    attention_inputs=("q", "k", "v"),
    attention_norms=("layer.0.layer_norm",),
    returns=("position_bias", ""),
    keeps_first=True,
    answers=True,
    mask="mask",
    ffn="layer.2.DenseReluDense",
    ffn_inputs=("wi", "wi_0", "wi_1", "router.classifier", "experts.*.wi"),
)
T5_ENCODER = replace(
    T5, stack="encoder", layers="encoder.block", causal=False, answers=False, ffn="layer.1.DenseReluDense"
)
T5_CROSS = replace(
    T5,
    attention="layer.1.EncDecAttention",
    attention_inputs=("q",),
    attention_norms=("layer.1.layer_norm",),
    keeps_first=False,
    causal=False,
    context="key_value_states",
    context_inputs=("k", "v"),
)

ROWS = (
    *alike("bart blenderbot-small marian mvp plbart", of_encoder(BART), BART, BART_CROSS),
    # whose encoders look at blocks
    *alike("bigbird_pegasus pegasus_x", PEGASUS, PEGASUS_CROSS),
    *alike("blenderbot m2m_100 mbart pegasus speech_to_text whisper", of_encoder(PEGASUS), PEGASUS, PEGASUS_CROSS),
    *alike("canary cohere_asr", PARAKEET, MOONSHINE, replace(MOONSHINE_CROSS, context="encoder_hidden_states")),
    *around("decoder", "encoder-decoder speech-encoder-decoder vision-encoder-decoder"),
    *alike(
        "led",
        replace(of_encoder(BART), attention_inputs=tuple(f"longformer_self_attn.{name}" for name in LONG), returns=()),
        replace(BART, returns=("", "")),
        replace(BART_CROSS, returns=("", "")),
    ),
    # keys and values are made of sums of the input, too; attentions that look at neighbours alone are left alone
    *alike(
        "longt5",
        replace(
            T5_ENCODER,
            attention="layer.0.TransientGlobalSelfAttention",
            attention_inputs=(),
            returns=("position_bias",),
        ),
        T5,
        T5_CROSS,
    ),
    *alike("moonshine", of_encoder(MOONSHINE), MOONSHINE, MOONSHINE_CROSS),
    *alike("mt5 t5 udop", T5_ENCODER, T5, T5_CROSS),
    *alike("nllb-moe", of_encoder(NLLB), NLLB, NLLB_CROSS),
    *alike(
        "pix2struct",
        Attentions(
            stack="encoder",
            layers="encoder.encoder.layer",
            attention="attention",
            attention_inputs=QKV,
            attention_norms=("pre_attention_layer_norm",),
            causal=False,
            ffn_inputs=("wi_0", "wi_1"),
        ),
        replace(
            T5,
            layers="decoder.layer",
            attention="self_attention.attention",
            attention_inputs=QKV,
            attention_norms=("self_attention.layer_norm",),
            ffn="mlp.DenseReluDense",
        ),
        replace(
            T5_CROSS,
            layers="decoder.layer",
            attention="encoder_decoder_attention.attention",
            attention_inputs=("query",),
            attention_norms=("encoder_decoder_attention.layer_norm",),
            context_inputs=("key", "value"),
            ffn="mlp.DenseReluDense",
        ),
    ),
    *alike(
        "seamless_m4t seamless_m4t_v2",
        of_encoder(SEAMLESS, "text_encoder.layers"),
        replace(CONFORMER, stack="speech", layers="speech_encoder.encoder.layers"),
        SEAMLESS,
        SEAMLESS_CROSS,
    ),
    *alike(
        "speecht5",
        replace(WAV2VEC2, layers="wrapped_encoder.layers"),
        *(
            replace(kind, layers="wrapped_decoder.layers", ffn="feed_forward", ffn_inputs=("intermediate_dense",))
            for kind in (BART, BART_CROSS)
        ),
    ),
    *alike(
        "switch_transformers",
        replace(T5_ENCODER, ffn="layer.1.mlp"),
        replace(T5, ffn="layer.2.mlp"),
        replace(T5_CROSS, ffn="layer.2.mlp"),
    ),
    *alike(
        "t5gemma",
        of_encoder(T5GEMMA),
        T5GEMMA,
        replace(
            CROSS,
            attention="cross_attn",
            attention_norms=("pre_cross_attn_layernorm",),
            output_norms=("post_cross_attn_layernorm",),
            context="encoder_hidden_states",
        ),
    ),
    *alike("trocr", BART, BART_CROSS),
    *alike(
        "umt5",
        replace(T5_ENCODER, keeps_first=False, returns=("",), mask="attention_mask"),
        replace(T5, returns=("",), mask="attention_mask"),
        replace(T5_CROSS, context="encoder_hidden_states", returns=("",), mask="attention_mask"),
    ),
)
