"""What users of PEFT expect of any tuner."""

import copy
import gc
import pickle
import re
from collections import Counter

import attacks
import checks
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from zoo import tiny
from zoo.tiny import adapted

from peft_eas import EASConfig


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_base_model_back_bit_for_bit(family):
    base, inputs = tiny.model(family), tiny.inputs(family)
    expected, names = base(**inputs).logits, {n: type(m) for n, m in base.named_modules()}
    generated = base.generate(**inputs, max_new_tokens=5, pad_token_id=0)
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3], propagation="mean"))
    tiny.shake(model)
    model.eval()
    adapted_logits = model(**inputs).logits
    with model.disable_adapter():
        equal(model(**inputs).logits, expected)
        equal(model.generate(**inputs, max_new_tokens=5, pad_token_id=0), generated)
    equal(model(**inputs).logits, adapted_logits)
    assert not torch.allclose(adapted_logits, expected)
    unloaded = model.unload()
    assert unloaded is base
    assert {n: type(m) for n, m in unloaded.named_modules()} == names
    assert not unloaded._forward_pre_hooks
    assert "generate" not in vars(unloaded)
    assert not hasattr(unloaded, "peft_config")
    equal(unloaded(**inputs).logits, expected)
    equal(unloaded.generate(**inputs, max_new_tokens=5, pad_token_id=0), generated)


def test_unload_after_merge_adapter():
    base, inputs = tiny.model("llama"), tiny.inputs("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3], init_weights=False)).eval()
    model.merge_adapter()
    equal(model.unload()(**inputs).logits, expected)


def test_several_adapters_with_different_skip_sets(tmp_path):
    inputs = tiny.inputs("llama")
    model = adapted()
    model.add_adapter("other", EASConfig(skip_layers=[1, 2, 5], r=4, r_pia=8, propagation="mean", init_weights=False))
    model.add_adapter("partial", EASConfig(skip_layers=[4], layers_to_transform=[3, 4], init_weights=False))
    logits = {}
    for name, skip_layers in {"default": [0, 3], "other": [1, 2, 5], "partial": [4]}.items():
        model.set_adapter(name)
        assert model.skip_layers == skip_layers
        logits[name] = model(**inputs).logits
    assert not torch.allclose(logits["default"], logits["other"])
    # what a model with this adapter alone computes
    model.save_pretrained(tmp_path)
    for name, path in {"default": tmp_path, "other": tmp_path / "other", "partial": tmp_path / "partial"}.items():
        alone = PeftModel.from_pretrained(tiny.model("llama"), path).eval()
        equal(alone(**inputs).logits, logits[name])
    # loaded into a model that has another one
    model = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "other", adapter_name="a").eval()
    model.load_adapter(tmp_path, adapter_name="b")
    for name, expected in {"b": "default", "a": "other"}.items():
        model.set_adapter(name)
        equal(model(**inputs).logits, logits[expected])
    # deletion
    model.delete_adapter("a")
    assert not [n for n, _ in model.named_parameters() if n.endswith(".a")]
    assert not [n for n in model.state_dict() if n.endswith(".a")]
    equal(model(**inputs).logits, logits["default"])
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("a")


def test_a_new_adapter_has_nothing_of_a_deleted_one_of_its_name():
    model = adapted(dropout=0.5)
    model.add_adapter("other", EASConfig(skip_layers=[1]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", EASConfig(skip_layers=[0, 3]))
    model.set_adapter("default")
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())


def test_deleting_the_last_adapter_gives_the_base():
    base, inputs = tiny.model("llama"), tiny.inputs("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3])).eval()
    model.delete_adapter("default")
    equal(model.base_model.model(**inputs).logits, expected)


def test_adapters_are_not_combined():
    model = adapted()
    model.add_adapter("other", EASConfig(skip_layers=[1]))
    with pytest.raises(ValueError, match="can't be combined"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="can't be combined"):
        model.merge_and_unload(adapter_names=["default", "other"])
    inputs = tiny.inputs("llama", rows=2)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="rows of a batch"):
            call(**inputs, adapter_names=["default", "other"])


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_linears_with_another_tuners_adapter_are_refused(target):
    base = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=[target])).base_model.model
    with pytest.raises(ValueError, match=rf"{target} of layer 0 has an adapter of another kind \(peft.tuners.lora"):
        get_peft_model(base, EASConfig(skip_layers=[0]))


def test_trainable_parameters_are_those_in_use():
    model, inputs = adapted(), tiny.inputs("llama")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :7] = -100
    model.train()(**inputs, labels=labels).loss.backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("eas_" in n for n in trainable)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
    layers = {n.split(".layers.")[1].split(".eas_")[0] for n in trainable}
    assert layers == {f"{index}.{module}" for index in range(6) for module in ("self_attn", "mlp")}
    adapted_attentions = {n.split(".layers.")[1][0] for n in trainable if "self_attn.eas_adapter" in n}
    assert adapted_attentions == {"1", "2", "4", "5"}
    stand_ins = {n.split(".layers.")[1][0] for n in trainable if "eas_stand_in" in n}
    assert stand_ins == {"0", "3"}


def test_set_skip_layers(tmp_path):
    model, inputs = adapted(), tiny.inputs("llama")
    model.set_skip_layers([4, 1])
    assert model.skip_layers == model.peft_config["default"].skip_layers == [1, 4]
    tiny.shake(model)
    expected = model(**inputs).logits
    of_attentions = {n.split(".layers.")[1]: p for n, p in model.named_parameters() if "self_attn.eas_" in n}
    for name, parameter in of_attentions.items():  # what the earlier set needed is kept, frozen
        assert parameter.requires_grad == ((name[0] in "14") == ("stand_in" in name)), name
    assert {name[0] for name in of_attentions if "stand_in" in name} == set("0134")
    model.save_pretrained(tmp_path)
    equal(PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()(**inputs).logits, expected)
    with pytest.raises(ValueError, match=r"names \[17\]"):
        model.set_skip_layers([17])
    assert model.skip_layers == [1, 4]
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.set_skip_layers([2])


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_model(model, state, logits):
    """Nothing of it has changed."""
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, tensor in state.items():
        equal(after[name], tensor)
    equal(model(**tiny.inputs("llama")).logits, logits)


@pytest.mark.parametrize("made", [dict(skip_layers=None, num_skip=2), dict(skip_layers=[0, 3])], ids=str)
def test_the_skip_set_of_a_checkpoint_wins_over_one_that_was_chosen(tmp_path, made):
    """As in a resume: PEFT does not read the configuration of an adapter that exists."""
    inputs = tiny.inputs("llama")
    trained = adapted(skip_layers=[2, 4])
    trained.save_pretrained(tmp_path)
    model = adapted(**made)
    if made["skip_layers"]:
        model.set_skip_layers([0, 1])
    model.load_adapter(tmp_path, "default")
    assert model.skip_layers == model.peft_config["default"].skip_layers == [2, 4]
    equal(model.eval()(**inputs).logits, trained(**inputs).logits)


@pytest.mark.parametrize("is_strict", [True, False])
def test_the_skip_set_of_a_state_that_torch_loads_is_followed(tmp_path, is_strict):
    inputs = tiny.inputs("llama")
    trained = adapted(skip_layers=[2, 4])
    model = adapted()
    model.set_skip_layers([1])
    state = trained.state_dict()
    if is_strict:  # what is idle here has to be there, too
        model.set_skip_layers([2, 4])
        state = model.state_dict() | state
        model.set_skip_layers([1])
    model.load_state_dict(state, strict=is_strict)
    assert model.skip_layers == model.peft_config["default"].skip_layers == [2, 4]
    equal(model(**inputs).logits, trained(**inputs).logits)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path)  # with a configuration that says so
    equal(PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()(**inputs).logits, trained(**inputs).logits)


# ----------------------------------------------------------------------------------------------------------------------
# States that are not whole
# ----------------------------------------------------------------------------------------------------------------------

KINDS = [dict(), dict(propagation="mean", use_bias=False), dict(stand_in="zero", router="static")]


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def edit_weights(folder, edit):
    """Change the state dict that a folder holds; `edit(key, value)` gives the new value, or `None` to drop it."""
    path = folder / "adapter_model.safetensors"
    edited = {key: edit(key, value) for key, value in load_file(path).items()}
    save_file({key: value for key, value in edited.items() if value is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("lost", ["self_attn.eas_skip", "layers.3.self_attn.eas_skip"])
def test_gates_that_are_lost_are_those_of_the_configuration(tmp_path, recwarn, lost, low_cpu_mem_usage, settings):
    inputs, model = tiny.inputs("llama"), adapted(**settings)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda key, value: None if key.endswith(lost) else value)
    options = dict(low_cpu_mem_usage=low_cpu_mem_usage)
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path, **options).eval()
    assert loaded.skip_layers == [0, 3]
    equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message)]
    loaded.save_pretrained(tmp_path / "again")
    assert len([key for key in load_file(tmp_path / "again" / "adapter_model.safetensors") if "eas_skip" in key]) == 6


def test_gates_that_are_lost_are_those_of_the_adapter_that_is_loaded_into(tmp_path):
    inputs, trained = tiny.inputs("llama"), adapted()
    trained.set_skip_layers([2, 4])
    tiny.shake(trained, seed=9)
    model = adapted()
    model.set_skip_layers([2, 4])
    for state in (trainable(trained), {k.replace(".default", ""): v for k, v in trainable(trained).items()}):
        assert not set_peft_model_state_dict(model, state).unexpected_keys
        assert model.skip_layers == [2, 4]
        equal(model(**inputs).logits, trained(**inputs).logits)
        tiny.shake(model)


@pytest.mark.parametrize("made", [dict(), dict(skip_layers=None, num_skip=2)], ids=str)
def test_gates_are_saved_with_a_state_of_parameters_alone(tmp_path, made):
    """As training scripts save one; also while a search has not ended, when the configuration names no set."""
    inputs, model = tiny.inputs("llama"), adapted(**made)
    if made:
        model.skip_gates().set([1, 5])
    model.save_pretrained(tmp_path, state_dict=trainable(model))
    whole = get_peft_model_state_dict(model)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == whole.keys()
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert loaded.skip_layers == model.skip_layers
    equal(loaded(**inputs).logits, model(**inputs).logits)


def test_some_gates_alone_are_refused_where_no_set_has_been_chosen(tmp_path):
    model = adapted(skip_layers=None, num_skip=2)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda key, value: None if key.endswith("layers.3.self_attn.eas_skip") else value)
    with pytest.raises(ValueError, match=r"can't be told: model\.layers\.3\.self_attn\.eas_skip are missing"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)


NEEDED = {
    "model.layers.0.self_attn.eas_stand_in.constant": dict(),
    "model.layers.3.self_attn.eas_stand_in.mean_up": dict(propagation="mean"),
    "model.layers.1.self_attn.eas_adapter.down": dict(),
    "model.layers.2.self_attn.eas_adapter.bias": dict(),
    "model.layers.5.self_attn.eas_adapter.router": dict(router="static"),
    "model.layers.0.mlp.eas_adapter.up": dict(),
}


@pytest.mark.parametrize(("name", "settings"), NEEDED.items(), ids=NEEDED)
@pytest.mark.parametrize("is_chosen", [True, False], ids=["chosen", "not chosen"])
def test_missing_parameters_are_refused(tmp_path, name, settings, is_chosen):
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda key, value: None if key.endswith(name) else value)
    message = rf"lacks {name}: this is not what its configuration and the set"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    model = adapted(**settings if is_chosen else settings | dict(skip_layers=None, num_skip=2))
    state, logits = state_of(model), model(**tiny.inputs("llama")).logits
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    same_model(model, state, logits)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (dict(), r"has model\.layers\.0\.mlp\.eas_adapter\.bias, .* and 6 more:"),
        (dict(use_bias=False, router="static"), r"has model\.layers\.0\.mlp\.eas_adapter\.router, "),
        (
            dict(use_bias=False, propagation="mean"),
            r"has model\.layers\.0\.self_attn\.eas_stand_in\.mean_down, model\.layers\.0\.self_attn\.eas_stand_in\.",
        ),
        (dict(use_bias=False, stand_in="zero"), r"lacks model\.layers\.0\.self_attn\.eas_stand_in\.constant, "),
    ],
    ids=str,
)
def test_parameters_of_another_configuration_are_refused(saved, message):
    model = adapted(use_bias=False)
    state, logits = state_of(model), model(**tiny.inputs("llama")).logits
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, get_peft_model_state_dict(adapted(**saved)))
    same_model(model, state, logits)


def test_a_state_with_nothing_of_the_adapter_is_refused():
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\..*, .*, .*, .* and \d+ more"):
        set_peft_model_state_dict(adapted(), {})


def load_folder(model, folder):
    model.load_adapter(folder, "default")


def load_by_peft(model, folder):
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def load_by_torch(model, folder):
    model.load_state_dict(PeftModel.from_pretrained(tiny.model("llama"), folder).state_dict(), strict=False)


def load_base_by_torch(model, folder):
    state = PeftModel.from_pretrained(tiny.model("llama"), folder).get_base_model().state_dict()
    model.get_base_model().load_state_dict(state, strict=False)


LOADS = [load_folder, load_by_peft, load_by_torch]


@pytest.mark.parametrize("skip_layers", [[], [0], [0, 3, 4], [1, 2]], ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_another_set_than_the_one_that_an_adapter_was_made_with_is_refused(tmp_path, load, skip_layers):
    adapted(skip_layers=skip_layers).save_pretrained(tmp_path)
    model = adapted()
    tiny.shake(model, seed=9)
    state, logits = state_of(model), model(**tiny.inputs("llama")).logits
    with pytest.raises(ValueError, match=re.escape(f"skips the attentions {skip_layers}, but adapter 'default'")):
        load(model, tmp_path)
    same_model(model, state, logits)
    assert model.skip_layers == model.peft_config["default"].skip_layers == [0, 3]
    model.set_skip_layers(skip_layers)  # as the message says
    load(model, tmp_path)
    assert model.skip_layers == skip_layers


def test_a_folder_whose_configuration_contradicts_its_weights_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda key, value: ~value if "layers.3.self_attn.eas_skip" in key else value)
    with pytest.raises(ValueError, match=r"skips the attentions \[0\], .* `skip_layers=\[0, 3\]`"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)


def test_a_state_of_another_set_that_is_not_whole_changes_nothing_in_torch():
    state = {name: tensor for name, tensor in adapted(skip_layers=[1]).state_dict().items() if "stand_in" not in name}
    model = adapted()
    model.set_skip_layers([0])
    before, logits = state_of(model), model(**tiny.inputs("llama")).logits
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.self_attn\.eas_stand_in\.constant"):
        model.load_state_dict(state, strict=False)
    same_model(model, before, logits)
    assert model.peft_config["default"].skip_layers == [0]
    # parts of the same set are torch's own affair
    model.load_state_dict({name: tensor for name, tensor in before.items() if "layers.2." in name}, strict=False)


def test_a_base_model_does_not_take_a_state_of_another_set(tmp_path):
    """Nor one that has been injected into: nothing there could change the set as a whole."""
    adapted(skip_layers=[2, 4]).save_pretrained(tmp_path)
    model = adapted()
    with pytest.raises(ValueError, match=r"keeps the attention 'decoder.0.self', and adapter 'default' skips it"):
        load_base_by_torch(model, tmp_path)
    model(**tiny.inputs("llama"))
    injected = inject_adapter_in_model(EASConfig(skip_layers=[0, 3]), tiny.model("llama"))
    with pytest.raises(ValueError, match=r"skips the attentions \[2, 4\], but adapter 'default'"):
        load_by_peft(injected, tmp_path)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_saving_what_has_been_merged_or_unloaded_is_refused(tmp_path, method):
    """Merging changes the model in place, also where what it returns is not looked at."""
    model, inputs = adapted(), tiny.inputs("llama")
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    names = ("adapter_model.safetensors", "adapter_config.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    getattr(model, method)()
    for save in (model.save_pretrained, lambda folder: get_peft_model_state_dict(model)):
        with pytest.raises(ValueError, match=r"no longer in this model.*`model\.get_base_model\(\)`"):
            save(tmp_path)
    with pytest.raises(ValueError, match="no longer in this model"):
        model.load_adapter(tmp_path, "default")
    assert [(tmp_path / name).read_bytes() for name in names] == before
    equal(PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()(**inputs).logits, expected)


def test_low_level_injection():
    inputs = tiny.inputs("llama")
    expected = adapted()
    model = inject_adapter_in_model(EASConfig(skip_layers=[0, 3]), tiny.model("llama"))
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(expected).items()}
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    equal(model(**inputs).logits, expected(**inputs).logits)
    model = inject_adapter_in_model(EASConfig(skip_layers=[0, 3]), tiny.model("llama"), state_dict=state)
    set_peft_model_state_dict(model, state)
    equal(model(**inputs).logits, expected(**inputs).logits)


def test_modules_to_save(tmp_path):
    inputs = tiny.inputs("llama")
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    equal(PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()(**inputs).logits, expected)
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is torch.nn.Linear
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases(dtype, autocast):
    config = EASConfig(skip_layers=[0, 3])
    model = get_peft_model(tiny.model("llama").to(dtype), config, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in model.named_parameters() if "eas_" in n}
    assert dtypes == {torch.float32 if autocast else dtype}
    inputs = tiny.inputs("llama")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :7] = -100
    output = model.train()(**inputs, labels=labels)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    # the skip set made later has the same dtypes
    model.set_skip_layers([1])
    assert {n.split(".layers.")[1][0] for n, _ in model.named_parameters() if "self_attn.eas_adapter" in n} == set(
        "012345"
    )
    assert {p.dtype for n, p in model.named_parameters() if "eas_" in n} == dtypes


def test_copies_and_pickles_stand_alone():
    model, inputs = adapted(), tiny.inputs("llama")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        equal(other(**inputs).logits, expected)
        other.set_skip_layers([1])
        assert not torch.allclose(other(**inputs).logits, expected)
        other.disable_adapter_layers()
        equal(model(**inputs).logits, expected)


def test_half_adapted_models():
    """Attentions or FFNs that are left alone keep working; only whole layers can be skipped."""
    inputs = tiny.inputs("llama")
    model = adapted(skip_layers=[2], exclude_modules=["layers.0.mlp", "layers.1.self_attn"])
    assert type(model.base_model.model.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert type(model.base_model.model.model.layers[1].self_attn).__name__ == "LlamaAttention"
    expected = model(**inputs).logits
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_outputs_that_users_ask_for():
    inputs = tiny.inputs("llama")
    model = get_peft_model(
        tiny.model("llama", attn_implementation="eager"), EASConfig(skip_layers=[0, 3], init_weights=False)
    ).eval()
    for current in (model, model.merge_and_unload()):
        output = current(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 7
        assert len(output.attentions) == 4  # of the attentions that are there


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "settings", [dict(), dict(propagation="mean"), dict(router="static", propagation="mean")], ids=str
)
def test_torch_compile_without_graph_breaks(settings, merged):
    torch._dynamo.reset()
    inputs = tiny.inputs("llama")
    checks.skip_unless_compiled()
    model = adapted(**settings)
    if merged:
        model = model.merge_and_unload()
    inputs |= {"labels": inputs["input_ids"].clone()}
    inputs["labels"][:, :7] = -100
    expected = model(**inputs)
    inner = model if merged else model.base_model.model
    compiled = torch.compile(inner, backend="eager", fullgraph=True)
    actual = compiled(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    if not merged:
        actual.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(**inputs).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(grads[n], p.grad, rtol=1e-3, atol=1e-6)
    # other skip sets are compiled anew, not taken for this one
    if not merged:
        model.set_skip_layers([1])
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, inner(**inputs).logits, rtol=1e-5, atol=1e-5)


def alive():
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Module, EASConfig)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), kinds))


def test_adapters_that_are_deleted_leave_nothing():
    model = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1]))
    before = alive()
    for number in range(100):
        settings = dict(skip_layers=[number % 6], propagation=("none", "mean")[number % 2], r=4, r_pia=4)
        model.add_adapter(f"another{number}", EASConfig(**settings))
        if number % 10 == 0:
            model.set_adapter(f"another{number}")
            model(**tiny.inputs("llama"))
            model.set_adapter("default")
        model.delete_adapter(f"another{number}")
    assert not alive() - before  # less, where something of an earlier test went meanwhile
    assert list(model.peft_config) == ["default"]


def test_a_full_disk_while_an_adapter_is_saved_is_said_and_a_later_save_works(tmp_path):
    """PEFT writes its files one after the other, in place: they may be half there until then. (Of a card that was cut
    off, it takes the rest for somebody's text, and keeps it.)"""
    model = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1], propagation="mean"))
    tiny.shake(model)
    model.save_pretrained(tmp_path / "adapter")
    before, moments = attacks.contents(tmp_path), []
    for moment, failed in attacks.full_disks(tmp_path, lambda: model.save_pretrained(tmp_path / "adapter")):
        moments.append(moment)
        assert failed, moment
        assert attacks.contents(tmp_path).keys() == before.keys()
        model.save_pretrained(tmp_path / "adapter")
        after = attacks.contents(tmp_path)
        assert all(after[name] == content for name, content in before.items() if "README" not in name)
    assert {"save adapter_model.safetensors", "write adapter_config.json", "open README.md"} <= {*moments}
