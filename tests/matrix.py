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
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from peft_eas import FAMILIES, EASConfig
from peft_eas.families import find_layers

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
# what a family needs besides
PARTICULAR: dict[str, dict] = {
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=0),
    "bamba": dict(attn_layer_indices=[0, 2]),
    "lfm2": dict(full_attn_idxs=[0, 2]),
    "qwen3_next": dict(layer_types=["full_attention", "linear_attention"] * 2),
    "qwen3_5_text": dict(layer_types=["full_attention", "linear_attention"] * 2),
    "qwen3_5_moe_text": dict(layer_types=["full_attention", "linear_attention"] * 2),
    "olmo_hybrid": dict(layer_types=["full_attention", "linear_attention"] * 2),
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's configuration with small sizes, and models within it likewise."""
    cls = CONFIG_MAPPING[model_type]
    names = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    own = {k: v for k, v in SIZES.items() if k in names and k not in getattr(cls, "attribute_map", {})}
    return cls(**own | PARTICULAR.get(model_type, {}))


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model whose layers matter: weights and biases large enough, norms that are not 1."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    model = auto.from_config(tiny_config(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") and "dt" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_inputs() -> dict[str, torch.Tensor]:
    """Prompts of three lengths, padded on the left."""
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def skipped(model: PreTrainedModel) -> list[int]:
    """Every second attention, the first among them."""
    return list(find_layers(model).names)[::2]


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


def logits(model: nn.Module) -> torch.Tensor:
    inputs = tiny_inputs()
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"differs by {error:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# The checks, in the order of the page's columns
# ----------------------------------------------------------------------------------------------------------------------


def identity(model_type: str) -> None:
    """A fresh adapter changes nothing."""
    base = tiny_model(model_type)
    expected = logits(base)
    assert_close(logits(get_peft_model(base, EASConfig(skip_layers=[])).eval()), expected, 1e-6)


def skipping(model_type: str) -> None:
    """Fresh adapters that skip are the base model whose attentions give zero."""
    base = tiny_model(model_type)
    layers = find_layers(base)
    dropped = skipped(base)
    whole = logits(base)
    for index in dropped:
        attention = base.get_submodule(layers.attention(index))
        attention.register_forward_hook(lambda m, args, output: _dropped(layers.family.adds_residual, args, output))
    expected = logits(base)
    model = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=dropped)).eval()
    assert_close(logits(model), expected, 1e-6)
    assert (expected - whole).abs().max() > 1e-3, "the attentions do nothing"


def _dropped(adds_residual: bool, args: tuple, output):
    first = args[1] if adds_residual else torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def merging(model_type: str) -> None:
    """Merged equals unmerged, with and without propagation and biases."""
    for settings in (dict(), dict(propagation="none"), dict(router="prompt")):
        model = adapted(model_type, **settings)
        expected = logits(model)
        fresh = get_peft_model(tiny_model(model_type), EASConfig(skip_layers=skipped(tiny_model(model_type)))).eval()
        assert (expected - logits(fresh)).abs().max() > 1e-3, "the adapters do nothing"
        assert_close(logits(model.merge_and_unload()), expected)


def generation(model_type: str) -> None:
    """With a KV cache as without, before and after merging."""
    model = adapted(model_type)
    for _ in range(2):
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = model.generate(**tiny_inputs(), use_cache=False, **settings)
        assert torch.equal(model.generate(**tiny_inputs(), **settings), expected)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()


def training(model_type: str) -> None:
    """A step of the Trainer changes every adapter, and nothing else."""
    model = adapted(model_type)
    labels = tiny_inputs()["input_ids"].clone()
    labels[:, :6] = -100
    batch = tiny_inputs() | {"labels": labels}
    rows = [{name: value[i] for name, value in batch.items()} for i in range(3)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trainable, f"not trained: {sorted(trainable - changed)[:5]}"


def reloading(model_type: str) -> None:
    """Adapter and merged model give the same after saving and loading."""
    model = adapted(model_type)
    expected = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert_close(logits(PeftModel.from_pretrained(tiny_model(model_type), folder).eval()), expected, 1e-6)
    merged = model.merge_and_unload()
    expected = logits(merged)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
        loaded = auto.from_pretrained(folder).eval()
    assert type(loaded) is type(merged)
    assert_close(logits(loaded), expected, 1e-6)


def sizes(model_type: str) -> None:
    """The parameters of the skipped attentions are gone, and so are their keys and values."""
    base = tiny_model(model_type)
    layers, dropped = find_layers(base), skipped(base)
    gone = sum(p.numel() for i in dropped for p in base.get_submodule(layers.attention(i)).parameters())
    for index in dropped:
        norms = [n for n in layers.family.attention_norms if hasattr(base.get_submodule(layers.names[index]), n)]
        gone += sum(p.numel() for n in norms for p in base.get_submodule(f"{layers.names[index]}.{n}").parameters())
    assert gone > 0
    merged = get_peft_model(base, EASConfig(skip_layers=dropped, propagation="none", use_bias=False)).merge_and_unload()
    assert tiny_model(model_type).num_parameters() - merged.num_parameters() == gone
    cache = merged(**tiny_inputs(), use_cache=True).past_key_values
    filled = [i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    assert filled
    assert not set(filled) & set(dropped)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (identity, skipping, merging, generation, training, reloading, sizes)
}  # fmt: skip


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


def main() -> None:
    transformers.logging.set_verbosity_error()
    for model_type in sys.argv[1:] or FAMILIES:
        results = run(model_type)
        print(model_type, "ok" if not any(results.values()) else {k: v for k, v in results.items() if v}, flush=True)


if __name__ == "__main__":
    main()
