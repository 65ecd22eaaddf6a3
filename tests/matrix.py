"""Every row of the table of families, on a tiny random model: what works is written to docs/supported-models.md.

python tests/matrix.py              # all rows, and the page
python tests/matrix.py gpt2 phi3    # these rows, on the screen
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from peft_eas import FAMILIES, EASConfig
from peft_eas.families import find_layers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "supported-models.md"
NUM_LAYERS = 4
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
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
MLA = dict(num_key_value_heads=4)
HYBRID = dict(layer_types=["full_attention", "linear_attention"] * 2)
# what a family needs besides
PARTICULAR: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[0, 2]),
    "blip-2": dict(num_query_tokens=4),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "gemma3": dict(mm_tokens_per_image=4),
    "glm4_moe_lite": MLA,
    "glm4v_text": MROPE,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "instructblip": dict(num_query_tokens=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=0),
    "lfm2": dict(full_attn_idxs=[0, 2]),
    "minicpm3": MLA,
    "olmo_hybrid": HYBRID,
    "paligemma": dict(projection_dim=32),
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_vl_vision": dict(hidden_size=32),
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "vipllava": dict(vision_feature_layer=[-1, -2]),
    "youtu": MLA,
}
IMAGE_TOKEN = 98
# towers, query transformers and the like
TOWER = dict(
    hidden_size=16, embed_dim=16, intermediate_size=24, depth=2, num_hidden_layers=2, num_attention_heads=2,
    num_heads=2, image_size=8, patch_size=4, out_hidden_size=32, encoder_hidden_size=16, projection_dim=32,
    num_position_embeddings=16, output_dim=32, vocab_size=64, num_embeddings=64, base_channels=32,
    channel_multiplier=[1, 1],
)  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's configuration with small sizes, and models within it likewise."""
    cls = CONFIG_MAPPING[model_type]
    settings = _sized(cls, SIZES)
    if "text_config" in cls.sub_configs:
        default = cls()
        settings = {name: IMAGE_TOKEN for name in ("image_token_id", "image_token_index") if hasattr(default, name)}
        for name in cls.sub_configs:
            inner = getattr(default, name)
            if name == "text_config":
                settings[name] = tiny_config(inner.model_type).to_dict()
            elif inner is not None:
                tower = _sized(type(inner), TOWER) | PARTICULAR.get(inner.model_type, {})
                settings[name] = {"model_type": inner.model_type} | tower
    return cls(**settings | PARTICULAR.get(model_type, {}))


def _sized(cls: type[PreTrainedConfig], sizes: dict) -> dict:
    names = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    return {k: v for k, v in sizes.items() if k in names and k not in getattr(cls, "attribute_map", {})}


def auto_class(model_type: str) -> type:
    """A vision-language model is also known by its language model alone."""
    is_vision_language = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if is_vision_language else AutoModelForCausalLM


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model whose layers matter: weights and biases large enough, norms that are not 1."""
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(tiny_config(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") and "dt" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def pixels() -> dict:
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def patches(temporal: int = 2) -> dict:
    """Images as Qwen-VL's processors give them: 2x2 patches each, one row a patch."""
    values = torch.randn(12, 3 * temporal * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2, 2]] * 3)}


def single_tile() -> dict:
    return {"pixel_values": pixels()["pixel_values"][:, None]}


# how many tokens an image is, and what says so
IMAGES: dict[str, tuple[int, Callable[[], dict]]] = {
    "aya_vision": (1, pixels),
    "blip-2": (4, pixels),
    "cohere2_vision": (1, pixels),
    "deepseek_vl": (4, pixels),
    "gemma3": (4, pixels),
    "glm46v": (1, patches),
    "glm4v": (1, patches),
    "idefics3": (1, single_tile),
    "instructblip": (4, lambda: pixels() | {"qformer_input_ids": torch.ones(3, 4, dtype=torch.long)}),
    "internvl": (1, pixels),
    "llava": (4, pixels),
    "mistral3": (1, lambda: pixels() | {"image_sizes": torch.tensor([[8, 8]] * 3)}),
    "paligemma": (4, pixels),
    "qwen2_5_vl": (1, patches),
    "qwen2_vl": (1, patches),
    "qwen3_5": (1, patches),
    "qwen3_5_moe": (1, patches),
    "qwen3_vl": (1, patches),
    "qwen3_vl_moe": (1, patches),
    "smolvlm": (1, single_tile),
    "vipllava": (4, pixels),
}


def tiny_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """Prompts of three lengths, padded on the left, with an image in each if the family's images are known here."""
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : 2 * row] = 0
    tokens, make = IMAGES.get(model_type, (0, dict))
    ids[:, 4 : 4 + tokens] = IMAGE_TOKEN
    inputs = {"input_ids": ids * mask, "attention_mask": mask, **make()}
    if "image_grid_thw" in inputs or model_type == "gemma3":
        inputs["token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return inputs


def skipped(model: PreTrainedModel) -> list[int]:
    """Every second attention, the first among them."""
    return [key for key, arm in find_layers(model).items() if arm.is_skippable][::2]


def adapted(model_type: str, **settings) -> PeftModel:
    base = tiny_model(model_type)
    config = EASConfig(**dict(skip_layers=skipped(base), task_type="CAUSAL_LM") | settings)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "eas_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module, model_type: str) -> torch.Tensor:
    inputs = tiny_inputs(model_type)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def cache_of(outputs) -> Cache:
    return getattr(outputs, "language_model_outputs", outputs).past_key_values


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"differs by {error:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# The checks, in the order of the page's columns
# ----------------------------------------------------------------------------------------------------------------------


def identity(model_type: str) -> None:
    """A fresh adapter changes nothing."""
    base = tiny_model(model_type)
    expected = logits(base, model_type)
    assert_close(logits(get_peft_model(base, EASConfig(skip_layers=[])).eval(), model_type), expected, 1e-6)


def skipping(model_type: str) -> None:
    """Fresh adapters that skip are the base model whose attentions give zero."""
    base = tiny_model(model_type)
    layers = find_layers(base)
    dropped = skipped(base)
    whole = logits(base, model_type)
    for index in dropped:
        attention = base.get_submodule(layers[index].attention)
        attention.register_forward_hook(lambda m, args, output: _dropped(layers.family.adds_residual, args, output))
    expected = logits(base, model_type)
    model = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=dropped)).eval()
    assert_close(logits(model, model_type), expected, 1e-6)
    assert (expected - whole).abs().max() > 1e-3, "the attentions do nothing"


def _dropped(adds_residual: bool, args: tuple, output):
    first = args[1] if adds_residual else torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def merging(model_type: str) -> None:
    """Merged equals unmerged, with and without propagation and biases."""
    for settings in (dict(), dict(propagation="none"), dict(router="prompt")):
        model = adapted(model_type, **settings)
        expected = logits(model, model_type)
        fresh = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=skipped(tiny_model(model_type)))).eval()
        assert (expected - logits(fresh, model_type)).abs().max() > 1e-3, "the adapters do nothing"
        assert_close(logits(model.merge_and_unload(), model_type), expected)


def generation(model_type: str) -> None:
    """With a KV cache as without, before and after merging."""
    model = adapted(model_type)
    for _ in range(2):
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN])
        expected = model.generate(**tiny_inputs(model_type), use_cache=False, **settings)
        assert torch.equal(model.generate(**tiny_inputs(model_type), **settings), expected)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()


def training(model_type: str) -> None:
    """A step of the Trainer changes every adapter, and nothing else."""
    model = adapted(model_type)
    labels = tiny_inputs(model_type)["input_ids"].clone()
    labels[:, :8] = -100
    batch = tiny_inputs(model_type) | {"labels": labels}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=[0, 1, 2], data_collator=lambda rows: batch).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trainable, f"not trained: {sorted(trainable - changed)[:5]}"


def reloading(model_type: str) -> None:
    """Adapter and merged model give the same after saving and loading."""
    model = adapted(model_type)
    expected = logits(model, model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert_close(
            logits(PeftModel.from_pretrained(tiny_model(model_type), folder).eval(), model_type), expected, 1e-6
        )
    merged = model.merge_and_unload()
    expected = logits(merged, model_type)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded = auto_class(model_type).from_pretrained(folder).eval()
    assert type(loaded) is type(merged)
    assert_close(logits(loaded, model_type), expected, 1e-6)


def sizes(model_type: str) -> None:
    """The parameters of the skipped attentions are gone, and so are their keys and values."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    gone = sum(p.numel() for i in dropped for p in base.get_submodule(layers.attention(i)).parameters())
    for index in dropped:
        layer = base.get_submodule(layers[index].layer)
        norms = {*layers[index].row.attention_norms, *layers[index].row.output_norms}
        gone += sum(p.numel() for n, m in layer.named_modules() if n in norms for p in m.parameters())
    assert gone > 0
    merged = get_peft_model(base, EASConfig(skip_layers=dropped, propagation="none", use_bias=False)).merge_and_unload()
    assert tiny_model(model_type).num_parameters() - merged.num_parameters() == gone
    cache = cache_of(merged(**tiny_inputs(model_type), use_cache=True))
    filled = [i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    assert filled
    assert not set(filled) & set(dropped)


def images(model_type: str) -> None:
    """The image is part of the prompt: another one changes what a skipped layer is told, and the answer."""
    if model_type not in IMAGES:
        return
    model = adapted(model_type)
    inputs = tiny_inputs(model_type)
    other = inputs | {"pixel_values": inputs["pixel_values"].roll(len(inputs["pixel_values"]) // 3, 0)}
    told = []
    for given in (inputs, other):
        cache = cache_of(model(**given, use_cache=True))
        told.append(cache.layers[skipped(model.base_model.model)[0]].prompt_state["p"])
    assert (told[0] - told[1]).abs().max() > 1e-3


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (identity, skipping, merging, generation, training, reloading, sizes, images)
}  # fmt: skip


def whole_models() -> list[str]:
    """Families that are models of their own; the others are decoders of these."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return [model_type for model_type in FAMILIES if model_type in known]


def run(model_type: str, checks: dict[str, Callable[[str], None]] = CHECKS) -> dict[str, str]:
    """`{check: ""}` or what went wrong."""
    results = {}
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(model_type)
            results[name] = ""
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return results


def kind(model_type: str) -> str:
    """The section of the page that a family belongs to."""
    if FAMILIES[model_type].decoder is not None:
        return "Vision-language models"
    if any("experts" in name for name in FAMILIES[model_type].ffn_inputs):
        return "Mixtures of experts"
    return "Decoders"


def page(results: dict[str, dict[str, str]]) -> str:
    """docs/supported-models.md."""
    lines = [
        "# Supported models",
        "",
        f"What `make supported-models` found with transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]}: each family as a tiny random model. The columns:",
        "",
        *(f"- **{name}**: {check.__doc__.strip().splitlines()[0]}" for name, check in CHECKS.items()),
        "",
        "A family that is not here: see [Families](usage.md#families).",
        "",
        "Cross-attentions, encoders and encoder-decoders are not supported yet. Of models that have layers without",
        "attention, the attentions of the others are skipped; of vision-language models, those of the language model.",
    ]
    failures = []
    for section in ("Decoders", "Mixtures of experts", "Vision-language models"):
        rows = {model_type: result for model_type, result in results.items() if kind(model_type) == section}
        lines += ["", f"## {section} ({len(rows)})", "", f"| model type | {' | '.join(CHECKS)} |"]
        lines += [f"|{'---|' * (len(CHECKS) + 1)}"]
        for model_type, result in sorted(rows.items()):
            marks = []
            for name, error in result.items():
                if error:
                    failures.append(f"- `{model_type}`, {name}: {error}")
                shown = " " if name == "images" and model_type not in IMAGES else "✗" if error else "✓"
                marks.append(shown)
            lines.append(f"| `{model_type}` | {' | '.join(marks)} |")
    if failures:
        lines += ["", "## What does not work", "", *failures]
    return "\n".join(lines) + "\n"


def main() -> None:
    transformers.logging.set_verbosity_error()
    results = {}
    for model_type in sys.argv[1:] or whole_models():
        results[model_type] = run(model_type)
        wrong = {name: error for name, error in results[model_type].items() if error}
        print(model_type, wrong or "ok", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(results), encoding="utf-8")
        print(f"{len(results)} families: {PAGE}")


if __name__ == "__main__":
    main()
