"""nemotron-nas computes what the merged model computes, in its own code and by its engine's formulas."""

import functools
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from zoo import tiny
from zoo.exports import MODELS, merged, quietly, relative_error

from peft_eas import EASConfig
from peft_eas.export import nemotron_nas
from peft_eas.export.llama_shape import LlamaShape


def deci_logits(folder, ids):
    """What vLLM's `DeciLMForCausalLM` computes: layers from `block_configs`, every weight by name, none left over."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert len(config.block_configs) == config.num_hidden_layers
    weights = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}

    def linear(name, z, sizes, bias):
        weight = weights.pop(f"{name}.weight")
        assert weight.shape == sizes
        return F.linear(z, weight, weights.pop(f"{name}.bias") if bias else None)

    def norm(name, z):
        return F.rms_norm(z, z.shape[-1:], weights.pop(f"{name}.weight"), config.rms_norm_eps)

    embeddings = weights.pop("model.embed_tokens.weight")
    z, residual = F.embedding(ids, embeddings), None
    d, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    rotary = LlamaRotaryEmbedding(config)(z, torch.arange(ids.shape[1])[None])
    for index, block in enumerate(config.block_configs):
        layer = f"model.layers.{index}"
        if not block.attention.no_op:
            residual = z if residual is None else z + residual
            z = norm(f"{layer}.input_layernorm", residual)
            kv_heads = heads // block.attention.n_heads_in_group
            counts, bias = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}, config.attention_bias
            q, k, v = (
                linear(f"{layer}.self_attn.{name}", z, (n * head_dim, d), bias).unflatten(-1, (n, head_dim))
                for name, n in counts.items()
            )
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary)
            out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).flatten(2)
            z = linear(f"{layer}.self_attn.o_proj", out, (d, heads * head_dim), bias)
        assert residual is not None, "vLLM and SGLang break on a layer 0 without attention"
        residual = z + residual
        z = norm(f"{layer}.post_attention_layernorm", residual)
        size = int(2 * block.ffn.ffn_mult * d / 3)
        size, bias = size if size % 256 == 0 else size + 256 - size % 256, config.mlp_bias
        gate = linear(f"{layer}.mlp.gate_proj", z, (size, d), bias)
        up = linear(f"{layer}.mlp.up_proj", z, (size, d), bias)
        z = linear(f"{layer}.mlp.down_proj", F.silu(gate) * up, (d, size), bias)
    z = norm("model.norm", z + residual)
    logits = F.linear(z, embeddings if config.tie_word_embeddings else weights.pop("lm_head.weight"))
    assert not weights, f"vLLM has no place for {list(weights)}"
    return logits


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nemotron_nas_computes_what_the_merged_model_computes(name, use_bias, tmp_path):
    model, ids = merged(name, use_bias=use_bias), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, False, True] * 2
    assert config["attention_bias"] is (
        use_bias or name in ("biases of its own", "attention biases of its own", "qwen2")
    )
    assert config["mlp_bias"] is True  # what stands in for the attentions of layers 2 and 5
    model = merged(name, use_bias=use_bias, stand_in="zero")
    quietly(model, tmp_path / "without", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "without", ids), model(ids).logits) < 1e-5
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert config["mlp_bias"] is (use_bias or name == "biases of its own")


@pytest.mark.parametrize("skip", tiny.SKIP_SETS.values(), ids=tiny.SKIP_SETS)
@torch.no_grad()
def test_nemotron_nas_skips_any_layer(skip, tmp_path):
    model, ids = merged(skip=skip), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5
    blocks = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).block_configs
    assert [index for index, block in enumerate(blocks) if block.attention.no_op] == [i for i in skip if i]


@pytest.mark.parametrize(
    ("hidden", "size"), [(576, 1536), (896, 4864), (2048, 5632), (4096, 11008), (4096, 14336), (8192, 28672)]
)
def test_the_engines_formula_gives_the_size_of_real_models(hidden, size):
    config = tiny.config("llama")
    config.update({"hidden_size": hidden, "intermediate_size": size})
    shape = LlamaShape(config, {"rope_type": "default", "rope_theta": 1e4}, 8, {}, (True,))
    (block,) = nemotron_nas._config(shape, "float32", False, False, size)["block_configs"]
    for mult in (block["ffn"]["ffn_mult"], round(block["ffn"]["ffn_mult"], 6)):  # some round it
        assert -(-int(2 * mult * hidden / 3) // 256) * 256 == size


def test_the_configuration_survives_saving(tmp_path):
    quietly(merged(), tmp_path / "out", "nemotron-nas", dtype="bfloat16")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.model_type, config.dtype) == ("nemotron-nas", torch.bfloat16)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.block_configs == config.block_configs
    assert again.rope_parameters == config.rope_parameters


def test_large_models_are_sharded(tmp_path, monkeypatch):
    save = functools.partial(nemotron_nas.save_torch_state_dict, max_shard_size="50KB")
    monkeypatch.setattr(nemotron_nas, "save_torch_state_dict", save)
    model, ids = merged(), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    with torch.no_grad():
        assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5


@torch.no_grad()
def test_windows_that_make_no_difference_are_none(tmp_path):
    ids = tiny.inputs("llama", padding=None)["input_ids"]
    for name, base, skip in (
        ("short", tiny.model("mistral", changes={"sliding_window": 16, "max_position_embeddings": 16}), [2]),
        ("all skipped", tiny.model("qwen2"), [0, 2, 4]),  # the sliding ones
    ):
        model = get_peft_model(base, EASConfig(skip_layers=skip, stand_in="mean")).merge_and_unload().eval()
        quietly(model, tmp_path / name, "nemotron-nas")
        assert relative_error(deci_logits(tmp_path / name, ids), model(ids).logits) < 1e-5
