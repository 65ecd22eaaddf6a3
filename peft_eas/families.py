"""How the layers of each model family are built: one row a family, and nothing about families anywhere else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING

from .checks import integer, refused
from .runtime.eas_record import Form
from .runtime.eas_structure import has_module, outermost
from .runtime.modeling_eas import EASConfigMixin, register_config

SPLIT = ("q_proj", "k_proj", "v_proj")
QKV = ("query", "key", "value")
LONG = (*QKV, *(f"{name}_global" for name in QKV))
GATED = ("gate_proj", "up_proj")
ROUTED = ("gate", "experts.gate_up_proj")  # of a mixture of experts
SHARED = tuple(f"{name}.{linear}" for name in ("shared_expert", "shared_experts") for linear in GATED)
LATENT = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")  # multi-head latent attention
INDEXED = (*LATENT, "indexer.wk", "indexer.weights_proj")  # with an indexer, which says what to look at
PRE = ("input_layernorm",)
SELF_NORM = ("self_attn_layer_norm",)
POST = ("post_attention_layernorm",)


@dataclass(frozen=True, kw_only=True)
class Attentions(Form):
    """Attentions of one kind in one list of layers. Names of modules are relative to the line before them.

    Attributes:
        stack: What the list is called in the names of its attentions, `"encoder"` in `"encoder.3.self"`.
        layers: The list of layers, in the model.
        attention: The attention, in a layer; layers without one are left alone.
        has: What an attention has, where other modules go by its name: those without are left alone, such as linear
            attentions, or attentions that take their keys and values from an earlier layer (Gemma 4).
        core: The part of the attention whose input only its linears read, where the attention itself adds its input to
            what that part gives (BERT).
        attention_inputs: The linears of the attention that read its input; those that a layer has of them. Of a
            cross-attention: those that read the stream which it adds to. None for an attention without an adapter, as
            none could be folded: where other than linears read the input, or these linears read something else, too
            (DeBERTa-v2), or several layers share the weights, whose first is then never skipped (Zamba).
        attention_norms: The norms, in a layer, that only the attention reads; those that a layer has.
        output_norms: The norms, in a layer, that the attention's output goes through; a linear without bias, in Zamba.
        residual_norm: The norm, in the attention, that its input goes through when it has been added (BERT); `""` if
            there is none (XLM-RoBERTa-XL).
        adds_residual: Whether the attention adds the residual stream, its second argument, itself (BLOOM).
        returns: What an attention returns besides its output: names of arguments that it passes on, or `""` for `None`;
            `None` if it returns the output alone, in no tuple (LayoutLM).
        keeps_first: Whether the first attention of the list is never skipped, as others need it: T5's has the relative
            positions of all; that of a decoder with cross-attentions says how long the KV cache is.
        keeps_if: An attribute of the attentions; one where it is true is never skipped, as later layers take their keys
            and values from it (Gemma 4).
        causal: Whether a token looks at itself and those before it, where no mask says so.
        answers: Whether all tokens are answers: of a decoder that has an encoder.
        context: Of a cross-attention, the argument with the tokens that keys and values come from.
        context_inputs: The linears that read these.
        mask: The argument with the attention's mask; `""` if it may look at all tokens (BEiT's has position biases).
        mask_hides: Whether that says what may not be looked at (MPT).
        shows_keys: Whether the model looks into the cache for keys (Mllama, to know whether there have been images).
        ffn: The FFN, in a layer. An attention that none follows is never skipped.
        ffn_after: How many layers after that of the attention: 1 where each layer is one of them (Nemotron-H).
        ffn_inputs: The linears of the FFN that read its input (`""`: the FFN is that linear), routers and the stacked
            weights of experts included; those that a layer has of them. A `*` stands for the names of experts; of names
            with a `|` between them, the first that a layer has is meant.
        ffn_back: Of a cross-attention that its layer calls a second time, for the tokens that were looked at to look
            back (LXMERT): the FFN of these, with the same `ffn_inputs`. It is skipped both times or not at all.
        ffn_masks_input: Whether the FFN makes zeros of its input where there is padding, as Mamba does: what is added
            to the input can't then be made a bias.
        stacked_axis: Which axis of stacked weights is the input's: -1 for `(experts, out, in)`, -2 for `(experts, in,
            out)`.
    """

    stack: str = "decoder"
    layers: str = "layers"
    attention: str = "self_attn"
    has: str = ""
    core: str = ""
    attention_inputs: tuple[str, ...] = SPLIT
    attention_norms: tuple[str, ...] = PRE
    output_norms: tuple[str, ...] = ()
    residual_norm: str = ""
    adds_residual: bool = False
    returns: tuple[str, ...] | None = ("",)
    keeps_first: bool = False
    keeps_if: str = ""
    causal: bool = True
    answers: bool = False
    context: str = ""
    context_inputs: tuple[str, ...] = ()
    mask: str = "attention_mask"
    mask_hides: bool = False
    shows_keys: bool = False
    ffn: str = "mlp"
    ffn_after: int = 0
    ffn_inputs: tuple[str, ...] = GATED
    ffn_masks_input: bool = False
    ffn_back: str = ""
    stacked_axis: int = -1

    def __post_init__(self) -> None:
        """Refuse what is of another kind than a field's annotation says; above all text for a tuple of names."""
        for place in fields(self):
            value = getattr(self, place.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, place.name, value)
            accepts, allowed = _KINDS[place.type]
            if not accepts(value):
                raise refused(f"{type(self).__name__}.{place.name}", value, allowed)
        if self.stacked_axis not in (-1, -2):
            raise refused("stacked_axis", self.stacked_axis, "-1 or -2")
        integer("ffn_after", self.ffn_after, 0)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.*|-]*", value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_name, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (_is_name, "a name"),
    "str | None": (lambda v: v is None or (_is_name(v) and v != ""), "a name, or None"),
    "bool": (lambda v: isinstance(v, bool), "True or False"),
    "int": (lambda v: isinstance(v, int) and not isinstance(v, bool), "an integer"),
    "tuple[str, ...]": (_are_names, "a tuple of names"),
    "tuple[str, ...] | None": (lambda v: v is None or _are_names(v), "a tuple of names, or None"),
    "tuple[Attentions, ...]": (
        lambda v: isinstance(v, tuple) and all(isinstance(item, Attentions) for item in v),
        "a tuple of `Attentions`",
    ),
}
"""Whether a value is of the kind that a row's annotation says, and what that is called in an error."""


@dataclass(frozen=True, kw_only=True)
class Family(Attentions):
    """Where a family keeps what EAS touches; most have one kind of attention in one list of layers.

    Attributes:
        model_type: `config.model_type` of the model.
        decoder: For a vision-language model, the name of its language model, or names with a `|` between them, of which
            the first that it has is meant; the rest of the row is then looked up by that model's own `model_type`.
        also: Further attentions: cross-attentions of these layers, those of other lists.
    """

    model_type: str = field(kw_only=False)
    decoder: str | None = None
    also: tuple[Attentions, ...] = ()

    @property
    def attentions(self) -> tuple[Attentions, ...]:
        """All kinds of attentions of the family, in the order in which a layer calls them."""
        return (self, *self.also)


# what several rows have in common
_BERT = dict(
    stack="encoder", layers="encoder.layer", attention="attention", core="self",
    attention_inputs=tuple(f"self.{name}" for name in QKV), attention_norms=(), residual_norm="output.LayerNorm",
    causal=False, ffn="intermediate", ffn_inputs=("dense",),
)  # fmt: skip
_BERT_CROSS = dict(
    attention="crossattention", attention_inputs=("self.query",), context="encoder_hidden_states",
    context_inputs=("self.key", "self.value"), mask="encoder_attention_mask",
)  # fmt: skip


_VIT = dict(
    stack="encoder", attention="attention", attention_norms=("layernorm_before",), causal=False, ffn_inputs=("fc1",)
)  # fmt: skip
_VILT = dict(
    stack="encoder", layers="encoder.layer", attention="attention",
    attention_inputs=tuple(f"attention.{name}" for name in QKV), attention_norms=("layernorm_before",), returns=(),
    causal=False, ffn="intermediate", ffn_inputs=("dense",),
)  # fmt: skip


_AIMV2 = dict(attention="attention", attention_norms=("rms_norm1",), causal=False, ffn="ffn")
_WAV2VEC2 = dict(
    stack="encoder", layers="encoder.layers", attention="attention", attention_norms=(), causal=False,
    ffn="feed_forward", ffn_inputs=("intermediate_dense",),
)  # fmt: skip
_WAV2VECS = ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2")
_CONFORMER = _WAV2VEC2 | dict(attention="self_attn", attention_inputs=(), attention_norms=SELF_NORM, ffn="ffn2")
_PARAKEET = dict(
    stack="encoder", layers="encoder.layers", attention_norms=("norm_self_att",), causal=False,
    ffn="feed_forward2", ffn_inputs=("linear1",),
)  # fmt: skip


_ZAMBA = dict(
    attention_inputs=(), attention_norms=(), output_norms=("linear",), returns=None, ffn="mamba_decoder.mamba",
    ffn_inputs=("in_proj",), ffn_masks_input=True,
)  # fmt: skip


def _clip(stack: str, layers: str) -> dict:
    return dict(stack=stack, layers=layers, attention_norms=("layer_norm1",), causal=False, ffn_inputs=("fc1",))


def _t5(stack: str, ffn: str) -> dict:
    return dict(
        stack=stack, layers=f"{stack}.block", attention="layer.0.SelfAttention", attention_inputs=("q", "k", "v"),
        attention_norms=("layer.0.layer_norm",), returns=("position_bias", ""), keeps_first=True,
        causal=stack != "encoder", answers=stack != "encoder", mask="mask", ffn=ffn,
        ffn_inputs=("wi", "wi_0", "wi_1", "router.classifier", "experts.*.wi"),
    )  # fmt: skip


_T5_CROSS = dict(
    attention="layer.1.EncDecAttention", attention_inputs=("q",), attention_norms=("layer.1.layer_norm",),
    keeps_first=False, context="key_value_states", context_inputs=("k", "v"), causal=False,
)  # fmt: skip


_UMT5 = dict(returns=("",), mask="attention_mask")
_OF_ENCODER = dict(stack="encoder", layers="encoder.layers", keeps_first=False, causal=False, answers=False)
_NLLB = dict(ffn="ffn", ffn_inputs=("fc1", "router.classifier", "experts.*.fc1"))
_MOONSHINE = dict(layers="decoder.layers", keeps_first=True, answers=True, ffn_inputs=("fc1",))
_MOONSHINE_CROSS = _MOONSHINE | dict(
    attention="encoder_attn", attention_inputs=("q_proj",), attention_norms=POST, keeps_first=False,
    context="key_value_states", context_inputs=("k_proj", "v_proj"), causal=False,
)  # fmt: skip
_SEAMLESS = dict(layers="text_decoder.layers", ffn="ffn", ffn_inputs=("fc1",))
_SPEECHT5 = dict(layers="wrapped_decoder.layers", ffn="feed_forward", ffn_inputs=("intermediate_dense",))
_T5GEMMA = dict(
    layers="decoder.layers", attention_norms=("pre_self_attn_layernorm",), output_norms=("post_self_attn_layernorm",),
    keeps_first=True, answers=True,
)  # fmt: skip


def _bart(stack: str, norms: tuple[str, ...] = ()) -> dict:
    return dict(
        stack=stack, layers=f"{stack}.layers", attention_norms=norms, ffn="fc1", ffn_inputs=("",),
        keeps_first=stack == "decoder", causal=stack != "encoder", answers=stack != "encoder",
    )  # fmt: skip


def _bart_cross(norms: tuple[str, ...] = ()) -> dict:
    return _bart("decoder", norms) | dict(
        attention="encoder_attn", attention_inputs=("q_proj",), keeps_first=False, context="key_value_states",
        context_inputs=("k_proj", "v_proj"), causal=False,
    )  # fmt: skip


_ROWS = (
    # Llama and its like: a norm, q, k and v; a norm, gate and up
    *(
        Family(model_type)
        for model_type in (
            "chameleon", "cwm", "diffllama", "doge", "emu3_text_model", "ernie4_5", "gemma", "granite",
            "granite4_vision_text", "granite_docling_text", "granite_swa", "helium", "hunyuan_v1_dense",
            "hunyuan_vl_text", "idefics", "internlm3", "iquestcoder", "llama", "ministral", "ministral3", "mistral",
            "molmo2_text", "olmo", "paddleocr_vl_text", "qwen2", "qwen2_vl_text", "qwen2_5_omni_text",
            "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "seed_oss", "smollm3", "stablelm",
        )
    ),
    # other FFNs, other names
    Family("apertus", attention_norms=("attention_layernorm",), ffn_inputs=("up_proj",)),
    Family("arcee", ffn_inputs=("up_proj",)),
    Family("biogpt", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    Family("bitnet"),
    Family("cosmos3_edge_text", ffn_inputs=("fc1",)),
    Family("hyperclovax"),
    Family("jais2", ffn_inputs=("up_proj",)),
    *(
        Family(model_type, attention_norms=SELF_NORM, ffn="ffn", ffn_inputs=("fc1",))
        for model_type in ("kosmos_2_text_model", "kosmos_2_5_text_model")
    ),
    Family("modernbert-decoder", attention="attn", attention_norms=("attn_norm",), ffn_inputs=("Wi",)),
    Family("nanochat", ffn_inputs=("fc1",)),
    Family("nemotron", ffn_inputs=("up_proj",)),
    Family("opt", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    Family("starcoder2", ffn_inputs=("c_fc",)),
    Family("xglm", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    Family("bert-generation", **_BERT | dict(stack="decoder", causal=True)),
    Family("ctrl", layers="h", attention="multi_head_attention", attention_inputs=("Wq", "Wk", "Wv"),
           attention_norms=("layernorm1",), ffn="ffn.0", ffn_inputs=("",)),
    # fused projections
    Family("glm", ffn_inputs=("gate_up_proj",)),
    Family("persimmon", attention_inputs=("query_key_value",), ffn_inputs=("dense_h_to_4h",)),
    *(
        Family(model_type, attention_inputs=("qkv_proj",), ffn_inputs=("gate_up_proj",))
        for model_type in ("phi3", "phi4_multimodal")
    ),
    Family("gpt2", layers="h", attention="attn", attention_inputs=("c_attn",), attention_norms=("ln_1",),
           ffn_inputs=("c_fc",)),
    Family("gpt_bigcode", layers="h", attention="attn", attention_inputs=("c_attn",), attention_norms=("ln_1",),
           ffn_inputs=("c_fc",)),
    Family("gpt_neo", layers="h", attention="attn.attention", attention_norms=("ln_1",), ffn_inputs=("c_fc",)),
    Family("gpt_neox", attention="attention", attention_inputs=("query_key_value",), ffn_inputs=("dense_h_to_4h",)),
    Family("gpt_neox_japanese", attention="attention", attention_inputs=("query_key_value",), returns=("", ""),
           ffn_inputs=("dense_h_to_4h",)),
    Family("bloom", layers="h", attention="self_attention", attention_inputs=("query_key_value",),
           ffn_inputs=("dense_h_to_4h",), adds_residual=True),
    Family("mpt", layers="blocks", attention="attn", attention_inputs=("Wqkv",), attention_norms=("norm_1",), ffn="ffn",
           ffn_inputs=("up_proj",), mask_hides=True),
    # attention and FFN side by side, reading the same norm
    Family("codegen", layers="h", attention="attn", attention_inputs=("qkv_proj",), attention_norms=(),
           ffn_inputs=("fc_in",)),
    Family("cohere", attention_norms=()),
    Family("cohere2", attention_norms=()),
    Family("cohere_compass_text", attention_norms=()),
    Family("falcon", layers="h", attention="self_attention", attention_inputs=("query_key_value",), attention_norms=(),
           ffn_inputs=("dense_h_to_4h",)),
    Family("gptj", layers="h", attention="attn", attention_norms=(), ffn_inputs=("fc_in",)),
    Family("phi", attention_norms=(), ffn_inputs=("fc1",)),
    # a norm after the attention, and no other (post), or one before, too (sandwich)
    Family("exaone4", attention_norms=(), output_norms=POST),
    Family("olmo2", attention_norms=(), output_norms=POST),
    Family("olmo3", attention_norms=(), output_norms=POST),
    Family("gemma2", output_norms=POST),
    Family("gemma3_text", output_norms=POST),
    Family("glm4", output_norms=("post_self_attn_layernorm",), ffn_inputs=("gate_up_proj",)),
    Family("glm4v_text", output_norms=("post_self_attn_layernorm",), ffn_inputs=("gate_up_proj",)),
    Family("glm_ocr_text", output_norms=("post_self_attn_layernorm",), ffn_inputs=("gate_up_proj",)),
    Family("muse_glimmer_text", attention_inputs=(*SPLIT, "gate_proj"), output_norms=POST),
    Family("vaultgemma"),
    # the last layers have queries alone, and the keys and values of earlier ones; where layers have experts, too, the
    # adapter stands before `mlp`, which they add to
    Family("gemma3n_text", has="k_proj", keeps_if="store_full_length_kv", attention_norms=(), output_norms=POST),
    *(
        Family(model_type, has="k_proj", keeps_if="store_full_length_kv", output_norms=POST)
        for model_type in ("gemma4_text", "gemma4_unified_text")
    ),
    # multi-head latent attention
    Family("deepseek_v2", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("deepseek_v3", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("glm4_moe_lite", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("axk1", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("axk2", attention_inputs=INDEXED, ffn_inputs=GATED + ROUTED + SHARED),
    Family("deepseek_v32", attention_inputs=INDEXED, ffn_inputs=GATED + ROUTED + SHARED),
    Family("dots3_note_text", attention_inputs=(*INDEXED, "g_proj"), ffn_inputs=GATED + ROUTED + SHARED),
    # a layer may take over what the layer before looks at: after a skipped attention, that is what the one before saw
    Family("glm_moe_dsa", attention_inputs=INDEXED, returns=("", "prev_topk_indices"), keeps_first=True,
           ffn_inputs=GATED + ROUTED + SHARED),
    Family("minicpm3", attention_inputs=LATENT),
    Family("mistral4", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("youtu", attention_inputs=LATENT),
    # mixtures of experts
    *(
        Family(model_type, ffn_inputs=GATED + ROUTED + SHARED)
        for model_type in (
            "deepseek_ocr2_text", "dots1", "ernie4_5_moe", "exaone_moe", "flint", "glm4_moe", "glm4v_moe_text",
            "hy_v3", "mellum", "mimo_v2_flash", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_omni_moe_text",
            "qwen3_vl_moe_text", "solar_open", "unlimited_ocr_text",
        )
    ),
    Family("afmoe", attention_inputs=(*SPLIT, "gate_proj"), output_norms=POST,
           ffn_inputs=(*GATED, "router.gate", "experts.gate_up_proj", *SHARED)),
    Family("aria_text", ffn_inputs=("router", "experts.gate_up_proj|experts.fc1.weight", *SHARED), stacked_axis=-2),
    Family("beam", attention_inputs=(*SPLIT, "gate_proj"), output_norms=POST, ffn_inputs=GATED + ROUTED),
    Family("cohere2_moe", attention_norms=(), ffn_inputs=GATED + ROUTED + SHARED),
    Family("dbrx", layers="blocks", attention="norm_attn_norm.attn", attention_inputs=("Wqkv",),
           attention_norms=("norm_attn_norm.norm_1",), ffn="ffn",
           ffn_inputs=("router.layer", "experts.mlp.w1", "experts.mlp.v1")),
    # the layer looks at the class of `mlp`, so the adapter stands before the shared experts in it, which the first
    # layers have not; what else reads their input gets what it got
    Family("ernie4_5_vl_moe_text", ffn="mlp.shared_experts"),
    Family("flex_olmo", attention_norms=(), output_norms=POST, ffn_inputs=ROUTED),
    Family("gpt_oss", ffn_inputs=("router", "experts.gate_up_proj"), stacked_axis=-2),
    Family("granitemoe", ffn="block_sparse_moe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("granitemoe_swa", ffn="block_sparse_moe", ffn_inputs=("router", "experts.gate_up_proj")),
    # the experts and a shared FFN read one norm: the adapter stands before one of them, the other gets what it got
    Family("granitemoeshared", ffn="block_sparse_moe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("hunyuan_v1_moe",
           ffn_inputs=("gate.wg", "experts.gate_up_proj", "shared_mlp.gate_proj", "shared_mlp.up_proj")),
    Family("jetmoe", attention="self_attention",
           attention_inputs=("experts.router.layer", "experts.input_linear.weight", "kv_proj"), returns=("", ""),
           ffn_inputs=("router.layer", "input_linear.weight")),
    Family("kolibri1", output_norms=("post_self_attn_layernorm",), ffn_inputs=ROUTED + SHARED),
    Family("laguna", attention_inputs=(*SPLIT, "g_proj"), ffn_inputs=GATED + ROUTED + SHARED),
    Family("llama4_text", ffn="feed_forward", ffn_inputs=(*GATED, "router", "experts.gate_up_proj", *SHARED),
           stacked_axis=-2),
    Family("minimax_m3_vl_text", attention_inputs=(*SPLIT, "indexer.q_proj", "indexer.k_proj"),
           ffn_inputs=("gate_up_proj", *ROUTED, "shared_experts.gate_up_proj")),
    Family("muse_spark_text", attention_inputs=(*SPLIT, "gate_proj"), output_norms=POST,
           ffn_inputs=(*GATED, "gate", "pre_expert_proj")),
    Family("phimoe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("qwen2_moe", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    Family("step3p5", attention_inputs=(*SPLIT, "g_proj"), ffn_inputs=GATED + ROUTED + SHARED),
    # hybrids: layers that have no attention are left alone
    Family("bailing_hybrid", has="kv_a_proj_with_mqa", attention_inputs=(*LATENT, "g_proj"),
           ffn_inputs=GATED + ROUTED + SHARED),
    Family("bamba", ffn="feed_forward"),
    Family("falcon_h1", attention_norms=(), ffn="feed_forward"),
    # `shared_mlp` and, in some models, experts read one norm
    Family("granitemoehybrid", ffn="shared_mlp", ffn_inputs=("input_linear",)),
    Family("jamba", ffn="feed_forward", ffn_inputs=(*GATED, "router", "experts.gate_up_proj")),
    Family("kimi_linear", has="kv_a_proj_with_mqa", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("lfm2", attention_norms=("operator_norm",), ffn="feed_forward", ffn_inputs=("w1", "w3")),
    Family("lfm2_moe", attention_norms=("operator_norm",), ffn="feed_forward", ffn_inputs=("w1", "w3", *ROUTED)),
    Family("lfm3", attention_inputs=(*SPLIT, "g_proj"), attention_norms=("operator_norm",),
           output_norms=("post_operator_norm",), ffn="feed_forward", ffn_inputs=("w1", "w3")),
    Family("minimax", has="q_proj", attention_norms=(), keeps_first=True, ffn_inputs=ROUTED),
    # each layer is a mixer of one kind
    Family("nemotron_h", attention="mixer", has="q_proj", attention_norms=(), ffn="mixer", ffn_after=1,
           ffn_inputs=("up_proj", "gate", "fc1_latent_proj|experts.up_proj", "shared_experts.up_proj")),
    Family("olmo_hybrid", attention_norms=(), output_norms=POST),
    Family("qwen3_5_text"),
    Family("qwen3_5_moe_text", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    Family("recurrent_gemma", attention="temporal_block", has="q_proj", attention_norms=("temporal_pre_norm",),
           keeps_first=True, ffn="mlp_block"),
    Family("qwen3_next", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    # layers share the weights of one transformer, which only Mamba hears of: it is skipped as a whole
    Family("zamba", attention="shared_transf", **_ZAMBA),
    Family("zamba2", attention="shared_transformer", **_ZAMBA),
    # encoders; the attention of BERT adds its input itself, and norms the sum
    *(
        Family(model_type, **_BERT)
        for model_type in (
            "bert", "camembert", "data2vec-text", "dpr", "electra", "ernie", "rembert", "roberta", "roc_bert",
            "roformer", "tapas", "xlm-roberta", "xmod",
        )
    ),
    *(  # and returns it alone
        Family(model_type, **_BERT | dict(returns=None))
        for model_type in ("layoutlm", "layoutlmv3", "markuplm", "splinter")
    ),
    Family("deberta", **_BERT | dict(attention_inputs=("self.in_proj",))),
    Family("deberta-v2", **_BERT | dict(attention_inputs=())),
    Family("nystromformer", **_BERT | dict(returns=())),
    Family("longformer", **_BERT | dict(attention_inputs=tuple(f"self.{name}" for name in LONG), returns=())),
    *(  # or norms its input
        Family(model_type, **_BERT | dict(residual_norm="")) for model_type in ("megatron-bert", "xlm-roberta-xl")
    ),
    Family("esm", **_BERT | dict(residual_norm="", returns=None)),
    Family("roberta-prelayernorm", **_BERT | dict(residual_norm="", ffn="intermediate.dense", ffn_inputs=("",))),
    Family("mpnet", **_BERT | dict(core="attn", attention_inputs=("attn.q", "attn.k", "attn.v"),
                                   residual_norm="LayerNorm", returns=())),
    # others add to the residual stream outside of the attention
    Family("distilbert", stack="encoder", layers="transformer.layer", attention="attention",
           attention_inputs=("q_lin", "k_lin", "v_lin"), attention_norms=(), causal=False, ffn="ffn",
           ffn_inputs=("lin1",)),
    Family("eurobert", stack="encoder", causal=False),
    Family("jina_embeddings_v3", stack="encoder", attention_norms=(), causal=False, ffn_inputs=("fc1",)),
    *(
        Family(model_type, stack="encoder", attention_norms=(), causal=False)
        for model_type in ("gte", "nomic_bert")
    ),
    Family("modernbert", stack="encoder", attention="attn", attention_inputs=("Wqkv",), attention_norms=("attn_norm",),
           causal=False, ffn_inputs=("Wi",)),
    # of images
    *(
        Family(model_type, **_VIT)
        for model_type in ("audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_msn", "vivit")
    ),
    *(Family(model_type, **_VILT | dict(returns=None, mask="")) for model_type in ("videomae", "yolos")),
    Family("vit_mae", **_VIT, also=(Attentions(**_VIT | dict(stack="decoder", layers="decoder.decoder_layers")),)),
    Family("beit", **_VIT | dict(mask="")),
    *(
        Family(model_type, **_VIT | dict(layers=layers, attention_norms=("norm1",), ffn_inputs=("fc1", *GATED)))
        for model_type, layers in (
            ("dinov2", "encoder.layer"), ("dinov2_with_registers", "encoder.layer"), ("dinov3_vit", "model.layer")
        )
    ),
    Family("vjepa2", **_VIT | dict(layers="encoder.layer", attention_inputs=QKV, attention_norms=("norm1",), mask="")),
    # of texts and images, one each
    *(
        Family(model_type, **_clip("text", "text_model.encoder.layers"),
               also=(Attentions(**_clip("vision", "vision_model.encoder.layers")),))
        for model_type in ("clip", "metaclip_2", "owlv2", "owlvit", "siglip", "siglip2")
    ),
    Family("xclip", **_clip("text", "text_model.encoder.layers"),
           also=(Attentions(**_clip("vision", "vision_model.encoder.layers")),
                 Attentions(**_clip("frames", "mit.encoder.layers")))),
    Family("aimv2", **_AIMV2 | dict(stack="text", layers="text_model.encoder.layers"),
           also=(Attentions(**_AIMV2 | dict(stack="vision", layers="vision_model.encoder.layers")),)),
    *(
        Family(f"{model_type}_{stack}_model", **_clip(stack, "encoder.layers"))
        for model_type in ("clip", "metaclip_2", "siglip", "siglip2")
        for stack in ("text", "vision")
    ),
    *(
        Family(model_type, **_BERT | dict(stack="text", layers=layers, returns=None),
               also=(Attentions(**_clip("vision", "vision_model.encoder.layers")),))
        for model_type, layers in (
            ("altclip", "text_model.roberta.encoder.layers"), ("chinese_clip", "text_model.encoder.layer")
        )
    ),
    *(  # with another tower for images or sounds
        Family(model_type, **_BERT | dict(stack="text", layers="text_model.encoder.layer", returns=None))
        for model_type in ("align", "clap")
    ),
    *(Family(model_type, decoder="text_model") for model_type in ("modernvbert", "vision-text-dual-encoder")),
    # of sounds
    *(Family(model_type, **_WAV2VEC2) for model_type in _WAV2VECS),
    # the first has the relative positions of all, and gates of them read the input
    Family("wavlm", **_WAV2VEC2 | dict(attention_inputs=(), returns=("", "position_bias"), keeps_first=True)),
    # there may be rotations before the linears
    *(Family(model_type, **_CONFORMER) for model_type in ("wav2vec2-bert", "wav2vec2-conformer")),
    *(Family(model_type, **_PARAKEET) for model_type in ("parakeet_ctc", "parakeet_tdt")),
    # fusion of texts and images
    Family("vilt", **_VILT),
    Family("flava", **_VILT | dict(stack="text", layers="text_model.encoder.layer"),
           also=tuple(Attentions(**_VILT | dict(stack=stack, layers=f"{stack}_model.encoder.layer"))
                      for stack in ("image", "multimodal"))),
    Family("visual_bert", **_BERT | dict(returns=())),
    Family("blip", **_BERT | dict(stack="text", layers="text_model.encoder.layer"),
           also=(
               *(
                   Attentions(**_BERT | dict(stack=stack, layers=layers, causal=answers, answers=answers) | kind)
                   for stack, layers, answers in (("encoder", "text_encoder.encoder.layer", False),
                                                  ("decoder", "text_decoder.bert.encoder.layer", True))
                   for kind in (dict(), _BERT_CROSS)
               ),
               Attentions(**_clip("vision", "vision_model.encoder.layers") | dict(attention_inputs=("qkv",))),
           )),
    Family("lxmert", **_BERT | dict(stack="text", returns=()),
           also=(
               Attentions(**_BERT | dict(stack="vision", layers="encoder.r_layers", returns=())),
               Attentions(**_BERT | dict(stack="cross", layers="encoder.x_layers", attention="visual_attention",
                                         core="att", attention_inputs=("att.query",), context="ctx_tensor",
                                         context_inputs=("att.key", "att.value"), mask="ctx_att_mask", returns=(),
                                         ffn="lang_inter", ffn_back="visn_inter")),
               Attentions(**_BERT | dict(stack="cross_text", layers="encoder.x_layers", attention="lang_self_att",
                                         ffn="lang_inter", returns=())),
               Attentions(**_BERT | dict(stack="cross_vision", layers="encoder.x_layers", attention="visn_self_att",
                                         ffn="visn_inter", returns=())),
           )),
    Family("bridgetower", **_BERT | dict(stack="text", layers="text_model.encoder.layer"),
           also=tuple(
               Attentions(**_BERT | dict(stack=stack, layers=layers) | kind)
               for stack, layers in (("cross_text", "cross_modal_text_layers"),
                                     ("cross_image", "cross_modal_image_layers"))
               for kind in (dict(), _BERT_CROSS)
           )),
    # encoder-decoders
    *(
        Family(model_type, **_t5("encoder", f"layer.1.{ffn}"),
               also=(Attentions(**_t5("decoder", f"layer.2.{ffn}")),
                     Attentions(**_t5("decoder", f"layer.2.{ffn}") | _T5_CROSS)))
        for model_type, ffn in (("t5", "DenseReluDense"), ("mt5", "DenseReluDense"), ("switch_transformers", "mlp"),
                                ("udop", "DenseReluDense"))
    ),
    # keys and values are made of sums of the input, too; attentions that look at neighbours alone are left alone
    Family("longt5", **_t5("encoder", "layer.1.DenseReluDense")
           | dict(attention="layer.0.TransientGlobalSelfAttention", attention_inputs=(), returns=("position_bias",)),
           also=(Attentions(**_t5("decoder", "layer.2.DenseReluDense")),
                 Attentions(**_t5("decoder", "layer.2.DenseReluDense") | _T5_CROSS))),
    Family("umt5", **_t5("encoder", "layer.1.DenseReluDense") | _UMT5 | dict(keeps_first=False),
           also=(Attentions(**_t5("decoder", "layer.2.DenseReluDense") | _UMT5),
                 Attentions(**_t5("decoder", "layer.2.DenseReluDense") | _T5_CROSS | _UMT5
                            | dict(context="encoder_hidden_states")))),
    Family("pix2struct", stack="encoder", layers="encoder.encoder.layer", attention="attention", attention_inputs=QKV,
           attention_norms=("pre_attention_layer_norm",), causal=False, ffn_inputs=("wi_0", "wi_1"),
           also=(Attentions(**_t5("decoder", "mlp.DenseReluDense")
                            | dict(layers="decoder.layer", attention="self_attention.attention",
                                   attention_inputs=QKV, attention_norms=("self_attention.layer_norm",))),
                 Attentions(**_t5("decoder", "mlp.DenseReluDense") | _T5_CROSS
                            | dict(layers="decoder.layer", attention="encoder_decoder_attention.attention",
                                   attention_inputs=("query",), context_inputs=("key", "value"),
                                   attention_norms=("encoder_decoder_attention.layer_norm",))))),
    *(  # with a norm after the residual sum
        Family(model_type, **_bart("encoder"),
               also=(Attentions(**_bart("decoder")), Attentions(**_bart_cross())))
        for model_type in ("bart", "blenderbot-small", "marian", "mvp", "plbart")
    ),
    Family("led", **_bart("encoder")
           | dict(attention_inputs=tuple(f"longformer_self_attn.{name}" for name in LONG), returns=()),
           also=(Attentions(**_bart("decoder") | dict(returns=("", ""))),
                 Attentions(**_bart_cross() | dict(returns=("", ""))))),
    Family("trocr", **_bart("decoder"), also=(Attentions(**_bart_cross()),)),
    *(  # with a norm before
        Family(model_type, **_bart("encoder", SELF_NORM),
               also=(Attentions(**_bart("decoder", SELF_NORM)),
                     Attentions(**_bart_cross(("encoder_attn_layer_norm",)))))
        for model_type in ("blenderbot", "m2m_100", "mbart", "pegasus", "speech_to_text", "whisper")
    ),
    Family("nllb-moe", **_bart("encoder", SELF_NORM) | _NLLB,
           also=(Attentions(**_bart("decoder", SELF_NORM) | _NLLB),
                 Attentions(**_bart_cross(("cross_attention_layer_norm",)) | _NLLB
                            | dict(attention="cross_attention")))),
    *(  # whose encoders look at blocks
        Family(model_type, **_bart("decoder", SELF_NORM),
               also=(Attentions(**_bart_cross(("encoder_attn_layer_norm",))),))
        for model_type in ("bigbird_pegasus", "pegasus_x")
    ),
    *(
        Family(model_type, **_bart("encoder", SELF_NORM) | _SEAMLESS | dict(layers="text_encoder.layers"),
               also=(Attentions(**_CONFORMER | dict(stack="speech", layers="speech_encoder.encoder.layers")),
                     Attentions(**_bart("decoder", SELF_NORM) | _SEAMLESS),
                     Attentions(**_bart_cross(("cross_attention_layer_norm",)) | _SEAMLESS
                                | dict(attention="cross_attention", context="encoder_hidden_states"))))
        for model_type in ("seamless_m4t", "seamless_m4t_v2")
    ),
    Family("speecht5", **_WAV2VEC2 | dict(layers="wrapped_encoder.layers"),
           also=(Attentions(**_bart("decoder") | _SPEECHT5), Attentions(**_bart_cross() | _SPEECHT5))),
    # with the layers of decoders
    Family("moonshine", **_MOONSHINE
           | _OF_ENCODER,
           also=(Attentions(**_MOONSHINE), Attentions(**_MOONSHINE_CROSS))),
    *(
        Family(model_type, **_PARAKEET,
               also=(Attentions(**_MOONSHINE),
                     Attentions(**_MOONSHINE_CROSS | dict(context="encoder_hidden_states"))))
        for model_type in ("canary", "cohere_asr")
    ),
    Family("t5gemma", **_T5GEMMA | _OF_ENCODER,
           also=(Attentions(**_T5GEMMA),
                 Attentions(**_T5GEMMA | dict(attention="cross_attn", attention_inputs=("q_proj",),
                                              attention_norms=("pre_cross_attn_layernorm",),
                                              output_norms=("post_cross_attn_layernorm",), keeps_first=False,
                                              context="encoder_hidden_states", context_inputs=("k_proj", "v_proj"),
                                              causal=False)))),
    # around one of these
    Family("florence2", decoder="language_model"),
    *(Family(f"{source}encoder-decoder", decoder="decoder") for source in ("", "speech-", "vision-")),
    # vision-language models
    Family("mllama_text_model", keeps_first=True, shows_keys=True,
           also=(Attentions(attention="cross_attn", attention_inputs=("q_proj",), context="cross_attention_states",
                            context_inputs=("k_proj", "v_proj"), causal=False, shows_keys=True),)),
    *(
        Family(model_type, decoder="language_model")
        for model_type in (
            "aria", "aya_vision", "blip-2", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni",
            "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note", "ernie4_5_vl_moe", "exaone4_5",
            "fast_vlm", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm_ocr",
            "glmga", "got_ocr2", "granite4_vision", "hunyuan_vl", "hyperclovax_vision_v2", "instructblip",
            "instructblipvideo", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4",
            "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
            "minimax_m3_vl", "mistral3", "mllama", "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "ovis2",
            "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
            "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava",
            "vipllava",
        )
    ),
    *(
        Family(model_type, decoder="text_model")
        for model_type in ("emu3", "granite_docling", "idefics2", "idefics3", "kosmos-2", "kosmos-2.5", "smolvlm")
    ),
    *(  # which older versions of transformers call `model`
        Family(model_type, decoder="language_model|model")
        for model_type in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    ),
    # audio-language models
    *(
        Family(model_type, decoder="language_model")
        for model_type in (
            "audioflamingo3", "fun_asr_nano", "glmasr", "granite_speech", "granite_speech_plus",
            "moss_transcribe_diarize", "musicflamingo", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral",
        )
    ),
)  # fmt: skip

# how earlier versions of transformers build some: by the version that doesn't any more
_EARLIER = {
    "5.16": tuple(Family(model_type, **_WAV2VEC2 | dict(returns=("", ""))) for model_type in _WAV2VECS),
    "5.18": tuple(
        Family(model_type, **_VILT | dict(attention_norms=("norm1",), returns=None, mask="", ffn="mlp",
                                          ffn_inputs=("fc1", "weights_in")))
        for model_type in ("dinov2", "dinov2_with_registers")
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}
for _version, _rows in _EARLIER.items():
    if Version(transformers.__version__) < Version(_version):
        FAMILIES |= {family.model_type: family for family in _rows}


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of that `model_type`.

    Raises:
        ValueError: if transformers has no configuration class for the `model_type`; register that first
            (`AutoConfig.register`).
    """
    if not isinstance(family, Family):
        raise refused("family", family, "a `peft_eas.Family`")
    if issubclass(CONFIG_MAPPING.get(family.model_type, object), EASConfigMixin):
        raise ValueError(f"{family.model_type!r} is the type of merged models, which can't get EAS again.")
    if family.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model type {family.model_type!r}: call `AutoConfig.register` for it first."
        )
    FAMILIES[family.model_type] = family
    register_config(CONFIG_MAPPING[family.model_type])


@dataclass(frozen=True)
class Arm:
    """One attention of a model that can be skipped, or adapted.

    Attributes:
        row: How attentions of its kind are built.
        index: Index of its layer.
        container: Name in the model of the list of layers.
        depth: How deep in its list the layer is, in [0, 1).
        is_skippable: Whether it can be skipped, or only adapted, because others need something of it.
        has_ffn: Whether a FFN follows it.
    """

    row: Attentions
    index: int
    container: str
    depth: float
    is_skippable: bool = True
    has_ffn: bool = True

    @property
    def name(self) -> str:
        """Such as `"decoder.3.self"`."""
        return f"{self.row.stack}.{self.index}.{self.row.kind}"

    @property
    def layer(self) -> str:
        """Name of the layer in the model."""
        return f"{self.container}.{self.index}"

    @property
    def attention(self) -> str:
        """Name of the attention in the model."""
        return f"{self.layer}.{self.row.attention}"

    @property
    def ffns(self) -> list[str]:
        """Name in the model of the FFN that follows, if one does; of both for an attention that looks both ways."""
        return [f"{self.container}.{name}" for name in self.ffns_in_list]

    @property
    def ffns_in_list(self) -> list[str]:
        """The same, as they are called in the list of layers."""
        names = (self.row.ffn, self.row.ffn_back) if self.has_ffn else ()
        return [f"{self.index + self.row.ffn_after}.{name}" for name in names if name]


class Layers(dict[int | str, Arm]):
    """The attentions of one model by what they are called: the index of the layer if that says which is meant (one
    attention a layer, one list of layers), the name (`"encoder.3.self"`) otherwise.

    Attributes:
        family: The row of the model, or of its decoder.
        decoder: What the model calls its decoder, `""` if it is one itself.
        containers: Name in the model of each list of layers, by the name that the row has for it.
        by_name: Whether it takes names to say which attention is meant.
    """

    def __init__(self, family: Family, decoder: str, containers: dict[str, str], arms: list[Arm]) -> None:
        indices = [arm.index for arm in arms]
        self.by_name = len(set(indices)) < len(indices)
        super().__init__({arm.name if self.by_name else arm.index: arm for arm in arms})
        self.family = family
        self.decoder = decoder
        self.containers = containers
        self._keys = {arm.name: key for key, arm in self.items()}

    def key_of(self, arm: Arm) -> int | str:
        """What an attention is called here."""
        return self._keys[arm.name]

    def resolve(self, given: Iterable[int | str]) -> list[int | str]:
        """The attentions that are meant, in the model's order, by indices of layers or by names.

        Raises:
            ValueError: for one that there is not, or an index where it takes a name.
        """
        given = list(given)
        wrong = [item for item in given if item not in self and item not in self._keys]
        if wrong:
            names = list(self._keys)
            also = "" if names == list(self) else f", also called {names[0]!r} to {names[-1]!r}"
            raise ValueError(f"`skip_layers` names {wrong}, but the attentions of this model are {list(self)}{also}.")
        meant = {self._keys.get(item, item) for item in given}
        return [key for key in self if key in meant]


def find_layers(model: nn.Module) -> Layers:
    """Find the attentions of `model` by the row of its family.

    Raises:
        ValueError: if no row fits the model, with the families that are known and what to do; if its FFNs get their
            input in chunks.
    """
    row = family = _row(model)
    name, decoder = "", model
    if row.decoder is not None:
        name, decoder = outermost(model, row.decoder)
        family = _row(decoder)
    # it may be one of several towers; one that is alone and should have an encoder is something else
    present = [kind for kind in family.attentions if not family.also or has_module(decoder, kind.layers)]
    kinds = family.attentions if row.decoder is None else present
    has_encoder = any(not kind.causal and not kind.context for kind in kinds)
    if has_encoder and getattr(decoder.config, "is_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has `is_decoder=True`, but EAS knows models of type {family.model_type!r} only as "
            "encoders or with one."
        )
    containers, arms = {}, []
    for attentions in present:
        inner, layers = outermost(decoder, attentions.layers)
        container = containers[attentions.layers] = f"{name}.{inner}".strip(".")
        is_needed, seen = attentions.keeps_first, set()
        there = filter(None, (_get(layer, attentions.attention) for layer in layers))
        times = Counter(parameter for attention in there for parameter in _own(attention))
        for index, layer in enumerate(layers):
            attention = _get(layer, attentions.attention)
            if attention is None or (attentions.has and not hasattr(attention, attentions.has)):
                continue
            if attentions.keeps_if:
                is_needed = is_needed or getattr(attention, attentions.keeps_if)
            if not attentions.attention_inputs:
                own = set(_own(attention))
                is_needed = is_needed or (not own <= seen and max(map(times.get, own)) > 1)
                seen |= own
            has_ffn = _is_ffn(attentions, layers[index + attentions.ffn_after :][:1])
            arms.append(Arm(attentions, index, container, index / len(layers), has_ffn and not is_needed, has_ffn))
            is_needed = False
    if not arms:
        raise ValueError(f"{type(model).__name__} has none of the layers that the row of {family.model_type!r} names.")
    return Layers(family, row.decoder or "", containers, arms)


def _is_ffn(row: Attentions, layers: Iterable[nn.Module]) -> bool:
    """Whether there is a layer, and it holds a FFN of the row, with or without adapters."""
    names = [name.partition("*")[0] for given in row.ffn_inputs for name in given.split("|")]
    return any(_get(layer, f"{row.ffn}.{name}".rstrip(".")) is not None for layer in layers for name in names)


def _own(attention: nn.Module) -> list[int]:
    """The ids of an attention's parameters, without those of adapters."""
    return [id(parameter) for parameter in getattr(attention, "base_layer", attention).parameters()]


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _row(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if hasattr(config, "eas"):
        raise ValueError(
            f"{type(model).__name__} was merged by peft_eas already, and can't get EAS again: use the base model, or "
            "train another adapter, such as LoRA, on the merged one."
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"EAS does not know how models of type {model_type!r} ({type(model).__name__}) are built. Known types: "
        f"{', '.join(sorted(FAMILIES))}. To add one: `peft-eas inspect-family MODEL` proposes a row, and "
        f"`peft_eas.register_family(peft_eas.Family({model_type!r}, ...))` puts it into the table."
    )
