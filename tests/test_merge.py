"""merge_and_unload: equal to the unmerged model and to a hand-stripped one; what is left, saved, reloaded, sized."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from checks import close, nothing_of_peft_is_left
from memory import AllocatedBytes
from peft import get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from zoo import tiny
from zoo.families import tiny_model
from zoo.tiny import adapted, auto

from peft_eas import EASConfig, pia
from peft_eas.layer import EASLayer
from peft_eas.readers import reader
from peft_eas.runtime.eas_record import Record

SETTINGS = [
    dict(),
    dict(use_bias=False, stand_in="mean"),
    dict(propagation="mean"),
    dict(propagation="mean", use_bias=False, router="static", groups=2, stand_in="mean"),
    dict(router="static", stand_in="zero"),
    dict(propagation="mean", stand_in="zero", scaling=0.5),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_equals_unmerged_saves_and_reloads(family, settings, tmp_path):
    model, inputs = adapted(family, **settings), tiny.inputs(family)
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=6, pad_token_id=0)
    merged = model.merge_and_unload()
    close(merged(**inputs).logits, expected, kept)
    assert torch.equal(merged.generate(**inputs, max_new_tokens=6, pad_token_id=0), generated)
    # batches of any composition: each row gives what it gives alone
    for row in range(3):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        close(merged(**alone).logits[0], expected[row], kept[row])
    nothing_of_peft_is_left(merged)
    merged.save_pretrained(tmp_path)
    for kwargs in (dict(), dict(trust_remote_code=True)):
        reloaded = auto(family).from_pretrained(tmp_path, **kwargs).eval()
        assert type(reloaded).__name__ == type(merged).__name__
        torch.testing.assert_close(reloaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
        assert torch.equal(reloaded.generate(**inputs, max_new_tokens=6, pad_token_id=0), generated)
    # and once more: a reloaded model is saved as it was
    reloaded.save_pretrained(tmp_path / "again")
    again = auto(family).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_equals_a_model_stripped_by_hand(family):
    """Without adapters' effect, merging is stripping: compare with the stock model minus its attentions."""
    inputs = tiny.inputs(family)
    kept = inputs["attention_mask"].bool()
    merged = get_peft_model(tiny.model(family), EASConfig(skip_layers=[0, 3])).merge_and_unload().eval()
    stock = tiny.model(family)
    for index in (0, 3):
        layer = stock.get_decoder().layers[index]
        layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    torch.testing.assert_close(merged(**inputs).logits[kept], stock(**inputs).logits[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_stripped(family, settings, tmp_path):
    merged = adapted(family, **settings).merge_and_unload()
    merged.save_pretrained(tmp_path)
    # whether what is left reads the attention's input
    reads = settings.get("propagation") == "mean" or settings.get("stand_in", "linear") == "linear"
    base = {n: p.shape for n, p in tiny.model(family).named_parameters()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118 (not a dict)
    for index in (0, 3):
        left = [n for n in saved if f".layers.{index}." in n and "vision" not in n]
        assert not [n for n in left if any(k in n for k in ("q_proj", "k_proj", "v_proj", "o_proj"))]
        assert reads == any("input_layernorm" in n for n in left)
        assert (family == "gemma3_text") == any("pre_feedforward_layernorm" in n for n in left)
        assert not [n for n in left if family == "gemma3_text" and "post_attention_layernorm" in n]
        assert [n for n in left if "down_proj" in n]
    gone = [
        n for n in base
        if any(f".layers.{i}." in n and "vision" not in n for i in (0, 3))
        and ("self_attn" in n or ("input_layernorm" in n and not reads)
             or (family == "gemma3_text" and "post_attention" in n))
    ]  # fmt: skip
    parameters = {n: p.shape for n, p in merged.named_parameters()}
    assert not set(gone) & set(parameters)
    assert set(base) - set(gone) <= set(parameters)
    assert all(parameters[n] == base[n] for n in set(base) - set(gone))
    if settings == dict(use_bias=False, stand_in="mean"):  # plain weights, and what stands in
        new = set(parameters) - (set(base) - set(gone))
        assert {n.split(".layers.")[1] for n in new} == {
            "0.self_attn.stand_in.constant",
            "3.self_attn.stand_in.constant",
        }
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.get("text_config", config)
    assert text["per_layer_config"] == {"0": {"skip": ["attention"]}, "3": {"skip": ["attention"]}}
    assert config["model_type"] == f"eas_{family}"


def test_a_merged_model_is_refused_without_this_package(tmp_path):
    """Neither silently wrong nor a riddle, and right with `trust_remote_code=True`."""
    inputs = tiny.inputs("llama")
    merged = adapted().merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.save({"inputs": inputs, "logits": merged(**inputs).logits}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without being trusted")
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
assert not [m for m in sys.modules if m == "peft" or m.startswith("peft.") or m.startswith("peft_eas")]
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_another_format_is_refused(tmp_path):
    adapted().merge_and_unload().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["eas"]["format"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_heads_load_from_a_merged_checkpoint(tmp_path):
    merged, inputs = adapted().merge_and_unload(), tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    hidden = merged(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state, hidden, rtol=0, atol=0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    actual = classifier.model(**inputs).last_hidden_state
    torch.testing.assert_close(actual, hidden, rtol=0, atol=0)


def test_the_configuration_of_other_models_is_left_alone():
    config = tiny.config("llama")
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    second.config = config
    merged = get_peft_model(first, EASConfig(skip_layers=[1])).merge_and_unload()
    assert second.config.model_type == config.model_type == "llama"
    assert not hasattr(config, "eas")
    assert {type(m.config).__name__ for m in merged.modules() if hasattr(m, "config")} == {"EASLlamaConfig"}


def test_a_merged_model_says_what_it_is_and_gets_no_eas_again(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)  # with a `model_type` of its own in the configuration
    merged = adapted(base=base).merge_and_unload()
    assert merged.config.model_type == "eas_llama"
    with pytest.raises(ValueError, match="EASLlamaForCausalLM was merged by peft_eas already"):
        get_peft_model(merged, EASConfig(skip_layers=[1]))


def test_nothing_to_strip_gives_the_base_class():
    merged = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[], use_bias=False)).merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert merged.config.model_type == "llama"


def test_merging_before_a_set_is_chosen_warns():
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2))
    assert model.skip_layers == []
    with pytest.warns(UserWarning, match="no set has been chosen"):
        model.merge_and_unload()


def test_merging_again_gives_the_merged_model():
    model, inputs = adapted(), tiny.inputs("llama")
    merged = model.merge_and_unload()
    expected = merged(**inputs).logits
    assert model.merge_and_unload() is model.unload() is merged
    assert torch.equal(merged(**inputs).logits, expected)


@pytest.mark.parametrize("names", [["none"], []])
def test_merge_of_no_adapter_is_refused(names):
    model, inputs = adapted(), tiny.inputs("llama")
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=r"name one of \['default'\]"):
        model.merge_and_unload(adapter_names=names)
    assert torch.equal(model(**inputs).logits, expected)


def test_merge_of_a_named_adapter():
    inputs = tiny.inputs("llama")
    model = adapted()
    model.add_adapter("other", EASConfig(skip_layers=[1, 2], init_weights=False))
    model.set_adapter("other")
    expected = model(**inputs).logits
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"])
    close(merged(**inputs).logits, expected)
    assert Record.read(merged.config.eas).skipped == [1, 2]


def test_merge_of_a_named_adapter_while_another_is_merged_in_place():
    inputs = tiny.inputs("llama")
    model = adapted()
    model.add_adapter("other", EASConfig(skip_layers=[1, 2], init_weights=False))
    model.set_adapter("other")
    expected = model(**inputs).logits
    model.set_adapter("default")
    model.merge_adapter()
    close(model.merge_and_unload(adapter_names=["other"])(**inputs).logits, expected)


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_a_base_whose_checkpoint_has_other_names_than_its_modules(family, tmp_path):
    """Merged models are saved by the names of their modules, and so they are read."""
    base = tiny.model(family) if family in tiny.FAMILIES else tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    merged = adapted(family, base=auto(family).from_pretrained(tmp_path / "base")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = auto(family).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = tiny.inputs(family)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merge_adapter_and_back(family, settings):
    """Unmerging gives back the very weights: the originals are kept aside while merged."""
    model, inputs = adapted(family, **settings), tiny.inputs(family)
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    folded = model(**inputs).logits
    close(folded, expected, kept)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, folded, rtol=0, atol=0)
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    # merging for good from the merged state
    model.merge_adapter()
    close(model.merge_and_unload()(**inputs).logits, expected, kept)


def test_disabling_a_merged_adapter_gives_the_base():
    base, inputs = tiny.model("llama"), tiny.inputs("llama")
    expected = base(**inputs).logits
    model = adapted(base=base)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [dict(skip_layers=[1]), dict(skip_layers=None, num_skip=2)], ids=str)
def test_what_is_idle_is_not_folded(settings):
    """Of another skip set, and of a search that has not chosen yet."""
    model, inputs = adapted(propagation="mean", **settings), tiny.inputs("llama")
    if model.skip_layers:
        model.set_skip_layers([0, 3])
        tiny.shake(model)
    assert any("layers.1.self_attn.eas_stand_in.default.mean_up" in name for name, _ in model.named_parameters())
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    model.merge_adapter()
    close(model(**inputs).logits, expected, kept)
    model.unmerge_adapter()
    close(model.merge_and_unload()(**inputs).logits, expected, kept)


@pytest.mark.parametrize(
    "name", ["eas_adapter.default.down", "eas_stand_in.default.mean_down", "eas_adapter.default.up"]
)
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_safe_merge_refuses_nan(name, method):
    model, inputs = adapted(propagation="mean"), tiny.inputs("llama")
    weights = {n: p.clone() for n, p in model.named_parameters() if "eas_" not in n}
    parameter = next(p for n, p in model.named_parameters() if n.endswith(f".{name}"))
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        getattr(model, method)(safe_merge=True)
    del parameter, inputs
    after = dict(model.named_parameters())
    for n, value in weights.items():  # the model is as it was
        torch.testing.assert_close(after[n], value, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_each_linear_is_folded_once(method, safe_merge, monkeypatch):
    model, folds = adapted(), []
    wrappers = [m for m in model.modules() if isinstance(m, EASLayer) and m.acts("default")]
    fold = pia.fold
    monkeypatch.setattr(pia, "fold", lambda *args: folds.append(args[0].data_ptr()) or fold(*args))
    expected = [reader(wrapper.base_layer, name).weight.data_ptr() for wrapper in wrappers for name in wrapper.readers]
    getattr(model, method)(safe_merge=safe_merge)
    assert sorted(folds) == sorted(expected)
    assert len(folds) == len(set(folds)) > 20


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("is_finite", [True, False])
def test_safe_merge_folds_where_sizes_do_not_tell(method, is_finite):
    """Numbers that may be too large for the dtype once they are added up: they cancel out, or they don't."""
    model = adapted().half()
    adapter = next(m for n, m in model.named_modules() if n.endswith("layers.3.mlp.eas_adapter.default"))
    with torch.no_grad():
        adapter.bias.zero_()
        adapter.down[:2] = 1e4
        adapter.up[..., 0], adapter.up[..., 1] = 1e4, -1e4 if is_finite else 1e4
    weights = {n: p.clone() for n, p in model.named_parameters()}
    if is_finite:
        getattr(model, method)(safe_merge=True)
    else:
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            getattr(model, method)(safe_merge=True)
        after = dict(model.named_parameters())
        assert all(torch.equal(after[n], value) for n, value in weights.items())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_half_precision(dtype, settings):
    """Within rounding of the dtype: no further from the float32 model than the unmerged one, times two."""
    inputs = tiny.inputs("llama")
    exact = adapted(**settings)(**inputs).logits
    model = adapted(base=tiny.model("llama").to(dtype), **settings)
    unmerged = model(**inputs).logits.float()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    error = (merged(**inputs).logits.float() - exact).abs().max()
    assert error <= 2 * (unmerged - exact).abs().max()


def test_memory_peak_of_merging():
    """Below 1.2 times the model: counted by tracing torch's CPU allocations."""
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.update(dict(hidden_size=256, intermediate_size=704, num_hidden_layers=12, vocab_size=400))
    model = get_peft_model(AutoModelForCausalLM.from_config(config), EASConfig(skip_layers=[1, 5, 9]))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    with AllocatedBytes(model) as memory:
        merged = model.merge_and_unload()
    assert memory.now < 0, "stripped attentions are freed"
    assert memory.peak <= 0.2 * size, f"{memory.peak / size:.2f} of the model on top of it"
    assert sum(p.numel() * p.element_size() for p in merged.parameters()) < size


OFFLOADED = [
    "layers.1.self_attn.base_layer.q_proj.weight",
    "layers.5.mlp.base_layer.up_proj.weight",
    "eas_stand_in",
    "lm_head.weight",
]


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_weights_on_the_meta_device_are_refused_before_any_is_folded(name, method):
    model, inputs = adapted(), tiny.inputs("llama")
    expected = model(**inputs).logits
    before = {n: (id(m), dict(m._parameters)) for n, m in model.named_modules()}
    gone = next(n for n, _ in model.named_parameters() if name in n)
    parent, _, leaf = gone.rpartition(".")
    parameters = model.get_submodule(parent)._parameters
    kept = parameters[leaf]
    parameters[leaf] = nn.Parameter(kept.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=rf"1 weights, such as .*{name}.*, are offloaded.*without offloading"):
        getattr(model, method)()
    parameters[leaf] = kept
    assert not any(m.merged for m in model.modules() if isinstance(m, EASLayer))
    after = {n: (id(m), dict(m._parameters)) for n, m in model.named_modules()}
    assert after.keys() == before.keys()
    for n, (module, tensors) in before.items():
        assert after[n][0] == module
        assert all(after[n][1][key] is tensor for key, tensor in tensors.items())
    assert torch.equal(model(**inputs).logits, expected)
    close(model.merge_and_unload()(**inputs).logits, expected)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
def test_offloaded_weights_are_refused(tmp_path, method):
    """By accelerate, which takes them off the disk in each forward."""
    inputs = tiny.inputs("llama")
    tiny.model("llama").save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places | {"lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    model = adapted(base=base)
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=r"lm_head\.weight, are offloaded"):
        getattr(model, method)()
    assert torch.equal(model(**inputs).logits, expected)
    assert not any(m.merged for m in model.modules() if isinstance(m, EASLayer))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "unload"])
def test_a_model_without_values_is_refused(method):
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(tiny.config("llama")), EASConfig(skip_layers=[0, 3]))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="on the meta device"):
        getattr(model, method)()
    assert [type(module) for module in model.modules()] == classes
    assert not any(m.merged for m in model.modules() if isinstance(m, EASLayer))
