"""Rows of encoders of one kind of input: texts, images or sounds."""

from __future__ import annotations

from dataclasses import replace

from .spec import GATED, LONG, QKV, SELF_NORM, Attentions, alike

# the attention adds its input itself, and norms the sum
BERT = Attentions(
    stack="encoder",
    layers="encoder.layer",
    attention="attention",
    convention="adds_input",
    core="self",
    attention_inputs=tuple(f"self.{name}" for name in QKV),
    attention_norms=(),
    residual_norm="output.LayerNorm",
    causal=False,
    ffn="intermediate",
    ffn_inputs=("dense",),
)
# or has normed the input
PRE_NORM_BERT = replace(BERT, residual_norm="")
# others add to the residual stream outside of the attention
GTE = Attentions(stack="encoder", attention_norms=(), causal=False)
VIT = Attentions(
    stack="encoder", attention="attention", attention_norms=("layernorm_before",), causal=False, ffn_inputs=("fc1",)
)
VILT = replace(
    VIT,
    layers="encoder.layer",
    attention_inputs=tuple(f"attention.{name}" for name in QKV),
    returns=(),
    ffn="intermediate",
    ffn_inputs=("dense",),
)
DINO = replace(VIT, layers="encoder.layer", attention_norms=("norm1",), ffn_inputs=("fc1", *GATED))
WAV2VEC2 = Attentions(
    stack="encoder",
    layers="encoder.layers",
    attention="attention",
    attention_norms=(),
    causal=False,
    ffn="feed_forward",
    ffn_inputs=("intermediate_dense",),
)
WAV2VECS = "data2vec-audio hubert sew unispeech unispeech-sat wav2vec2"
# there may be rotations before the linears
CONFORMER = replace(WAV2VEC2, attention="self_attn", attention_inputs=(), attention_norms=SELF_NORM, ffn="ffn2")
PARAKEET = Attentions(
    stack="encoder",
    layers="encoder.layers",
    attention_norms=("norm_self_att",),
    causal=False,
    ffn="feed_forward2",
    ffn_inputs=("linear1",),
)
CLIP = Attentions(
    stack="vision", layers="encoder.layers", attention_norms=("layer_norm1",), causal=False, ffn_inputs=("fc1",)
)

ROWS = (
    *alike("audio-spectrogram-transformer deit ijepa vit vit_msn vivit", VIT),
    *alike("beit", replace(VIT, mask="")),
    *alike(
        "bert camembert data2vec-text dpr electra ernie rembert roberta roc_bert roformer tapas xlm-roberta xmod", BERT
    ),
    *alike("clip_text_model metaclip_2_text_model siglip2_text_model siglip_text_model", replace(CLIP, stack="text")),
    *alike("clip_vision_model metaclip_2_vision_model siglip2_vision_model siglip_vision_model", CLIP),
    *alike(WAV2VECS, WAV2VEC2),
    *alike("deberta", replace(BERT, attention_inputs=("self.in_proj",))),
    *alike("deberta-v2", replace(BERT, attention_inputs=())),
    *alike("dinov2 dinov2_with_registers", DINO),
    *alike("dinov3_vit", replace(DINO, layers="model.layer")),
    *alike(
        "distilbert",
        Attentions(
            stack="encoder",
            layers="transformer.layer",
            attention="attention",
            attention_inputs=("q_lin", "k_lin", "v_lin"),
            attention_norms=(),
            causal=False,
            ffn="ffn",
            ffn_inputs=("lin1",),
        ),
    ),
    *alike("esm", replace(PRE_NORM_BERT, returns=None)),
    *alike("eurobert", Attentions(stack="encoder", causal=False)),
    *alike("gte nomic_bert", GTE),
    *alike("jina_embeddings_v3", replace(GTE, ffn_inputs=("fc1",))),
    *alike("layoutlm layoutlmv3 markuplm splinter", replace(BERT, returns=None)),
    *alike("longformer", replace(BERT, attention_inputs=tuple(f"self.{name}" for name in LONG), returns=())),
    *alike("megatron-bert xlm-roberta-xl", PRE_NORM_BERT),
    *alike(
        "modernbert",
        Attentions(
            stack="encoder",
            attention="attn",
            attention_inputs=("Wqkv",),
            attention_norms=("attn_norm",),
            causal=False,
            ffn_inputs=("Wi",),
        ),
    ),
    *alike(
        "mpnet",
        replace(
            BERT,
            convention="adds_input",
            core="attn",
            attention_inputs=("attn.q", "attn.k", "attn.v"),
            residual_norm="LayerNorm",
            returns=(),
        ),
    ),
    *alike("nystromformer visual_bert", replace(BERT, returns=())),
    *alike("parakeet_ctc parakeet_tdt", PARAKEET),
    *alike("roberta-prelayernorm", replace(PRE_NORM_BERT, ffn="intermediate.dense", ffn_inputs=("",))),
    *alike("videomae yolos", replace(VILT, returns=None, mask="")),
    *alike("vit_mae", VIT, replace(VIT, stack="decoder", layers="decoder.decoder_layers")),
    *alike(
        "vjepa2",
        replace(VIT, layers="encoder.layer", attention_inputs=QKV, attention_norms=("norm1",), mask=""),
    ),
    *alike("wav2vec2-bert wav2vec2-conformer", CONFORMER),
    # the first has the relative positions of all, and gates of them read the input
    *alike("wavlm", replace(WAV2VEC2, attention_inputs=(), returns=("", "position_bias"), keeps_first=True)),
)

EARLIER = {
    "5.16": alike(WAV2VECS, replace(WAV2VEC2, returns=("", ""))),
    "5.18": alike(
        "dinov2 dinov2_with_registers",
        replace(VILT, attention_norms=("norm1",), returns=None, mask="", ffn="mlp", ffn_inputs=("fc1", "weights_in")),
    ),
}
"""How earlier versions of transformers build some, by the version that doesn't any more."""
