"""How the layers of each model family are built: one row a family, and nothing about families anywhere else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import CONFIG_MAPPING

from .modeling_eas import outermost, register_config

SPLIT = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
ROUTED = ("gate", "experts.gate_up_proj")  # of a mixture of experts
SHARED = tuple(f"{name}.{linear}" for name in ("shared_expert", "shared_experts") for linear in GATED)
LATENT = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")  # multi-head latent attention
PRE = ("input_layernorm",)
POST = ("post_attention_layernorm",)


@dataclass(frozen=True)
class Family:
    """Where a family keeps what EAS touches. Names of modules are relative to the row before them.

    Attributes:
        model_type: `config.model_type` of the model.
        decoder: For a vision-language model, the name of its language model; the rest of the row is then looked up by
            that model's own `model_type`.
        layers: The list of decoder layers, in the decoder.
        attention: The attention, in a layer; layers without one are left alone.
        attention_inputs: The linears of the attention that read its input; those that a layer has of them.
        attention_norms: The norms, in a layer, that only the attention reads; those that a layer has.
        output_norms: The norms, in a layer, that the attention's output goes through.
        ffn: The FFN, in a layer.
        ffn_inputs: The linears of the FFN that read its input (`""`: the FFN is that linear), routers and the stacked
            weights of experts included; those that a layer has of them.
        stacked_axis: Which axis of stacked weights is the input's: -1 for `(experts, out, in)`, -2 for `(experts, in,
            out)`.
        adds_residual: Whether the attention adds the residual stream, its second argument, itself.
    """

    model_type: str
    decoder: str | None = None
    layers: str = "layers"
    attention: str = "self_attn"
    attention_inputs: tuple[str, ...] = SPLIT
    attention_norms: tuple[str, ...] = PRE
    output_norms: tuple[str, ...] = ()
    ffn: str = "mlp"
    ffn_inputs: tuple[str, ...] = GATED
    stacked_axis: int = -1
    adds_residual: bool = False


_ROWS = (
    # Llama and its like: a norm, q, k and v; a norm, gate and up
    *(
        Family(model_type)
        for model_type in (
            "cwm", "diffllama", "emu3_text_model", "ernie4_5", "gemma", "granite", "granite_swa", "helium",
            "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo", "qwen2",
            "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "seed_oss", "smollm3", "stablelm",
        )
    ),
    # other FFNs, other names
    Family("apertus", attention_norms=("attention_layernorm",), ffn_inputs=("up_proj",)),
    Family("arcee", ffn_inputs=("up_proj",)),
    Family("biogpt", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    Family("bitnet"),
    Family("hyperclovax"),
    Family("jais2", ffn_inputs=("up_proj",)),
    Family("modernbert-decoder", attention="attn", attention_norms=("attn_norm",), ffn_inputs=("Wi",)),
    Family("nanochat", ffn_inputs=("fc1",)),
    Family("nemotron", ffn_inputs=("up_proj",)),
    Family("opt", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    Family("starcoder2", ffn_inputs=("c_fc",)),
    Family("xglm", attention_norms=("self_attn_layer_norm",), ffn="fc1", ffn_inputs=("",)),
    # fused projections
    Family("glm", ffn_inputs=("gate_up_proj",)),
    Family("persimmon", attention_inputs=("query_key_value",), ffn_inputs=("dense_h_to_4h",)),
    Family("phi3", attention_inputs=("qkv_proj",), ffn_inputs=("gate_up_proj",)),
    Family("gpt2", layers="h", attention="attn", attention_inputs=("c_attn",), attention_norms=("ln_1",),
           ffn_inputs=("c_fc",)),
    Family("gpt_bigcode", layers="h", attention="attn", attention_inputs=("c_attn",), attention_norms=("ln_1",),
           ffn_inputs=("c_fc",)),
    Family("gpt_neo", layers="h", attention="attn.attention", attention_norms=("ln_1",), ffn_inputs=("c_fc",)),
    Family("gpt_neox", attention="attention", attention_inputs=("query_key_value",), ffn_inputs=("dense_h_to_4h",)),
    Family("bloom", layers="h", attention="self_attention", attention_inputs=("query_key_value",),
           ffn_inputs=("dense_h_to_4h",), adds_residual=True),
    Family("mpt", layers="blocks", attention="attn", attention_inputs=("Wqkv",), attention_norms=("norm_1",),
           ffn="ffn", ffn_inputs=("up_proj",)),
    # attention and FFN side by side, reading the same norm
    Family("codegen", layers="h", attention="attn", attention_inputs=("qkv_proj",), attention_norms=(),
           ffn_inputs=("fc_in",)),
    Family("cohere", attention_norms=()),
    Family("cohere2", attention_norms=()),
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
    Family("vaultgemma"),
    # multi-head latent attention
    Family("deepseek_v2", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("deepseek_v3", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("glm4_moe_lite", attention_inputs=LATENT, ffn_inputs=GATED + ROUTED + SHARED),
    Family("minicpm3", attention_inputs=LATENT),
    Family("youtu", attention_inputs=LATENT),
    # mixtures of experts
    *(
        Family(model_type, ffn_inputs=GATED + ROUTED + SHARED)
        for model_type in (
            "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hy_v3", "mellum", "mimo_v2_flash",
            "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_vl_moe_text", "solar_open",
        )
    ),
    Family("cohere2_moe", attention_norms=(), ffn_inputs=GATED + ROUTED + SHARED),
    Family("flex_olmo", attention_norms=(), output_norms=POST, ffn_inputs=ROUTED),
    Family("gpt_oss", ffn_inputs=("router", "experts.gate_up_proj"), stacked_axis=-2),
    Family("granitemoe", ffn="block_sparse_moe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("granitemoe_swa", ffn="block_sparse_moe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("hunyuan_v1_moe",
           ffn_inputs=("gate.wg", "experts.gate_up_proj", "shared_mlp.gate_proj", "shared_mlp.up_proj")),
    Family("llama4_text", ffn="feed_forward", ffn_inputs=(*GATED, "router", "experts.gate_up_proj", *SHARED),
           stacked_axis=-2),
    Family("phimoe", ffn_inputs=("router", "experts.gate_up_proj")),
    Family("qwen2_moe", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    # hybrids: layers that have no attention are left alone
    Family("bamba", ffn="feed_forward"),
    Family("jamba", ffn="feed_forward", ffn_inputs=(*GATED, "router", "experts.gate_up_proj")),
    Family("lfm2", attention_norms=("operator_norm",), ffn="feed_forward", ffn_inputs=("w1", "w3")),
    Family("olmo_hybrid", attention_norms=(), output_norms=POST),
    Family("qwen3_5_text"),
    Family("qwen3_5_moe_text", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    Family("qwen3_next", ffn_inputs=(*GATED, *ROUTED, *SHARED, "shared_expert_gate")),
    # vision-language models
    *(
        Family(model_type, decoder="language_model")
        for model_type in (
            "aya_vision", "blip-2", "cohere2_vision", "deepseek_vl", "gemma3", "glm46v", "glm4v", "got_ocr2",
            "instructblip", "internvl", "janus", "lfm2_vl", "lighton_ocr", "llama4", "llava",
            "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2", "paligemma",
            "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "video_llava", "vipllava",
        )
    ),
    *(Family(model_type, decoder="text_model") for model_type in ("idefics2", "idefics3", "smolvlm")),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of that `model_type`.

    Raises:
        ValueError: if transformers has no configuration class for the `model_type`; register that first
            (`AutoConfig.register`).
    """
    if family.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model type {family.model_type!r}: call `AutoConfig.register` for it first."
        )
    FAMILIES[family.model_type] = family
    register_config(CONFIG_MAPPING[family.model_type])


@dataclass(frozen=True)
class Layers:
    """The decoder layers of one model that have an attention.

    Attributes:
        family: The row of the decoder.
        decoder: What the model calls its decoder, `""` if it is one itself.
        container: Name of the list of layers in the model.
        names: `{index: name of the layer in the model}`.
    """

    family: Family
    decoder: str
    container: str
    names: dict[int, str]

    def attention(self, index: int) -> str:
        """Name of the attention of layer `index` in the model."""
        return f"{self.names[index]}.{self.family.attention}"

    def ffn(self, index: int) -> str:
        """Name of the FFN of layer `index` in the model."""
        return f"{self.names[index]}.{self.family.ffn}"


def find_layers(model: nn.Module) -> Layers:
    """Find the decoder layers of `model` by the row of its family.

    Raises:
        ValueError: if no row fits the model, with the families that are known and what to do.
    """
    row = family = _row(model)
    name, decoder = "", model
    if row.decoder is not None:
        name, decoder = outermost(model, row.decoder)
        family = _row(decoder)
    inner, layers = outermost(decoder, family.layers)
    container = f"{name}.{inner}".strip(".")
    return Layers(
        family=family,
        decoder=row.decoder or "",
        container=container,
        names={i: f"{container}.{i}" for i, layer in enumerate(layers) if _has(layer, family.attention)},
    )


def _has(layer: nn.Module, name: str) -> bool:
    try:
        return layer.get_submodule(name) is not None
    except AttributeError:
        return False


def _row(model: nn.Module) -> Family:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"EAS does not know how models of type {model_type!r} ({type(model).__name__}) are built. Known types: "
        f"{', '.join(sorted(FAMILIES))}. To add one: `peft-eas inspect-family MODEL` proposes a row, and "
        f"`peft_eas.register_family(peft_eas.Family({model_type!r}, ...))` puts it into the table."
    )
