"""How the layers of each model family are built: one row a family, and nothing about families anywhere else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Where a family keeps what EAS touches. Names of modules are relative to the row before them.

    Attributes:
        model_type: `config.model_type` of the model.
        decoder: For a vision-language model, the name of its language model; the rest of the row is then looked up by
            that model's own `model_type`.
        layers: The list of decoder layers, in the decoder.
        attention: The attention, in a layer.
        attention_inputs: The linears of the attention that read its input.
        attention_norms: The norms, in a layer, that nobody needs once the attention is gone.
        ffn: The FFN, in a layer.
        ffn_inputs: The linears of the FFN that read its input.
    """

    model_type: str
    decoder: str | None = None
    layers: str = "layers"
    attention: str = "self_attn"
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn: str = "mlp"
    ffn_inputs: tuple[str, ...] = ("gate_proj", "up_proj")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        # sandwich norms: here `post_attention_layernorm` normalises the attention's output
        Family("gemma3_text", attention_norms=("input_layernorm", "post_attention_layernorm")),
        Family("llava", decoder="language_model"),
    )
}


@dataclass(frozen=True)
class Layers:
    """The decoder layers of one model that have an attention.

    Attributes:
        family: The row of the decoder.
        decoder: Name of the decoder in the model, `""` if the model is the decoder.
        names: `{index: name of the layer in the model}`.
    """

    family: Family
    decoder: str
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
    family = _row(model)
    decoder_name, decoder = "", model
    if family.decoder is not None:
        decoder_name, decoder = _first(model, family.decoder, family)
        family = _row(decoder)
    name, layers = _first(decoder, family.layers, family)
    prefix = f"{decoder_name}.{name}" if decoder_name else name
    return Layers(
        family=family,
        decoder=prefix.removesuffix(family.layers).removesuffix("."),
        names={i: f"{prefix}.{i}" for i, layer in enumerate(layers) if hasattr(layer, family.attention)},
    )


def _row(model: nn.Module) -> Family:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"EAS does not know how models of type {model_type!r} ({type(model).__name__}) are built. Known types: "
        f"{', '.join(sorted(FAMILIES))}. To add one, put a row into the table: "
        f"`peft_eas.FAMILIES[{model_type!r}] = peft_eas.Family({model_type!r}, attention=..., attention_inputs=..., "
        "attention_norms=..., ffn=..., ffn_inputs=...)`."
    )


def _first(model: nn.Module, suffix: str, family: Family) -> tuple[str, nn.Module]:
    """The outermost module whose name ends with `suffix`."""
    found = [(name, m) for name, m in model.named_modules() if name == suffix or name.endswith(f".{suffix}")]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module {suffix!r}, which the row of {family.model_type!r} names."
        )
    return min(found, key=lambda item: item[0].count("."))
