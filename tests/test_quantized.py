"""Quantised base models: trained, searched, saved, merged, and quantised again. On the CPU."""

import json
import logging

import pytest
import reference
import torch
from checks import close, nothing_of_peft_is_left
from memory import AllocatedBytes
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from zoo import tiny
from zoo.families import tiny_model
from zoo.tiny import auto
from zoo.training import batch, trainer

from peft_eas import EASCallback, EASConfig, model_card
from peft_eas.cli import main

bitsandbytes = pytest.importorskip("bitsandbytes")

FOUR_BITS = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
KINDS = {
    "nf4": FOUR_BITS,
    "fp4": FOUR_BITS | dict(bnb_4bit_quant_type="fp4"),
    "nf4 twice": FOUR_BITS | dict(bnb_4bit_use_double_quant=True),
    "nf4 in bfloat16": FOUR_BITS | dict(bnb_4bit_quant_storage=torch.bfloat16),  # as FSDP needs it
    "int8": dict(load_in_8bit=True),
}
# with rows shorter than a block of 64 weights, bitsandbytes undoes 4 bits wrongly on CPUs with AVX512
WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16)
SETTINGS = [dict(), dict(propagation="mean"), dict(router="static", propagation="mean")]
FOLDED = {f"model.layers.{i}.mlp.{name}_proj" for i in range(6) for name in ("gate", "up")} | {
    f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 2, 4, 5) for name in "qkv"
}


@pytest.fixture(autouse=True)
def _quietly(unpacked):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(kind, family)` loads a quantised model; without a kind, the float one that it was made from."""
    folders = {}

    def load(kind="nf4", family="llama", config=None, **kwargs):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            made = tiny.model(family, changes=WIDE) if family in tiny.FAMILIES else tiny_model(family)
            made.save_pretrained(folders[family])
        if kind is not None:
            config = BitsAndBytesConfig(**KINDS[kind])
        if config is not None:
            kwargs |= dict(quantization_config=config, device_map={"": "cpu"})
        return auto(family).from_pretrained(folders[family], **dict(dtype=torch.float32) | kwargs)

    return load


def adapted(base, shake=0.1, **settings):
    torch.manual_seed(0)
    model = get_peft_model(base, EASConfig(**dict(skip_layers=[0, 3]) | settings)).eval()
    tiny.shake(model, scale=shake)
    return model


def is_quantised(module):
    return isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))


def by_hand(linear):
    """What a linear of bitsandbytes stands for, from its integers and scales alone."""
    weight = linear.weight
    if weight.dtype == torch.int8:
        scales = linear.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    state = weight.quant_state
    pairs = weight.data.view(torch.uint8).flatten()
    values = state.code[torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten().long()]
    scales = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.code[scales.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(scales)]
        scales = scales + state.offset
    return (values * scales.repeat_interleave(state.blocksize)[: len(values)]).view(state.shape).double()


def float_copy(quantised, like):
    """`like`, a float model, with the weights that those of the model `quantised` stand for."""
    for name, module in quantised.named_modules():
        if is_quantised(module):
            like.get_submodule(name).weight.data.copy_(by_hand(module))
    return like


@torch.no_grad()
def distance(actual, expected, kept=...):
    return float((actual - expected)[kept].float().norm() / expected[kept].float().norm())


# ----------------------------------------------------------------------------------------------------------------------
# Merging for good
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_the_formulas_give_for_the_weights_that_the_adapter_saw(load, kind, settings, tmp_path):
    inputs = tiny.inputs("llama")
    kept = inputs["attention_mask"].bool()
    base = load(kind)
    stock = float_copy(base, load(None))
    assert distance(stock(**inputs).logits, load(None)(**inputs).logits, kept) > 0.01
    model = adapted(base, **settings)
    expected = reference.logits(stock, reference.adapters(model), model.peft_config["default"], inputs).float()
    with torch.no_grad():
        if kind == "int8":  # LLM.int8 quantises activations, too; in training on a CPU, bitsandbytes does without that
            assert distance(model(**inputs).logits, expected, kept) < 0.1
            model.train()
        close(model(**inputs).logits, expected, kept)
    merged = model.eval().merge_and_unload()
    close(merged(**inputs).logits, expected, kept)
    # a float model like any other, in every respect
    nothing_of_peft_is_left(merged)
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not [m for m in merged.modules() if is_quantised(m)]
    merged.save_pretrained(tmp_path / "merged")
    adapted(load(None), **settings).merge_and_unload().save_pretrained(tmp_path / "float")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("merged", "float")]
    first, second = ({key: value for key, value in config.items() if key != "eas_files"} for config in configs)
    assert first == second
    assert saved(tmp_path / "merged") == saved(tmp_path / "float")
    generated = merged.generate(**inputs, max_new_tokens=5, pad_token_id=0)
    for kwargs in (dict(), dict(trust_remote_code=True)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **kwargs)
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, pad_token_id=0), generated)
    lora = get_peft_model(merged, LoraConfig(target_modules="all-linear"))
    assert {type(m.base_layer) for m in lora.modules() if hasattr(m, "base_layer")} == {nn.Linear}
    merged.to(torch.bfloat16)


def saved(folder):
    """`{name: (dtype, shape)}` of what a folder's file holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


# besides the usual ones: linears that bitsandbytes has to turn around, a FFN that is one linear, stacked experts
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("settings", [dict(), dict(propagation="mean")], ids=str)
def test_families(load, family, settings, tmp_path):
    model, inputs = adapted(load("nf4", family), **settings), tiny.inputs(family)
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if is_quantised(m)]
    close(merged(**inputs).logits, expected, kept)
    merged.save_pretrained(tmp_path)
    loaded = auto(family).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
def test_half_precision(load, prepared, compute, settings):
    """One dtype: what the rest of the model has. No further from the formulas than the unmerged model, times two."""
    inputs = tiny.inputs("llama")
    kept = inputs["attention_mask"].bool()
    config = BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=compute)
    base = load(None, config=config, dtype=torch.bfloat16)
    stock = float_copy(base, load(None, dtype=torch.bfloat16).float())
    model = adapted(prepare_model_for_kbit_training(base) if prepared else base, **settings)
    assert {p.dtype for n, p in model.named_parameters() if "eas_" in n} == {torch.float32}
    expected = reference.logits(stock, reference.adapters(model), model.peft_config["default"], inputs).float()
    unmerged = model(**inputs).logits
    model.merge_adapter()
    in_place = model(**inputs).logits
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float32 if prepared else torch.bfloat16}
    error = max(distance(unmerged, expected, kept), 1e-5)
    assert error < (1e-5 if prepared and compute == torch.float32 else 0.05) * 1.01
    assert distance(in_place, expected, kept) <= 2 * error
    assert distance(merged(**inputs).logits, expected, kept) <= 2 * error


def test_norms_in_float32_and_trained_heads(load, tmp_path):
    """As some trainers leave a model, which then needs autocasting. Merged it has one dtype, and does without."""
    inputs = tiny.inputs("llama")
    base = load(None, config=BitsAndBytesConfig(**FOUR_BITS), dtype=torch.bfloat16)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model = adapted(base, modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save.default.weight.data += 0.1
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert distance(merged(**inputs).logits, expected) < 0.05
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torchao(load, settings):
    ao = pytest.importorskip("torchao.quantization")
    inputs = tiny.inputs("llama")
    base = load(None, config=TorchAoConfig(ao.Int8WeightOnlyConfig(version=2)))
    model = adapted(prepare_model_for_kbit_training(base), **settings)
    expected = model(**inputs).logits
    model.merge_adapter()
    close(model(**inputs).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"needs a base model quantised by bitsandbytes, .* kind Int8Tensor"):
        model.merge_and_unload(requantize=True)
    merged = model.merge_and_unload()
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    close(merged(**inputs).logits, expected)


def test_memory_peak_of_merging():
    """Not more than the merged model and a few of its tensors, beside what was there."""
    config = tiny.config("llama")
    config.update(dict(hidden_size=256, intermediate_size=704, num_hidden_layers=12, vocab_size=400))
    model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantised = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, False, torch.float32)
            quantised.load_state_dict(module.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    model = get_peft_model(model, EASConfig(skip_layers=[1, 5, 9]))
    with AllocatedBytes(model) as memory:
        merged = model.merge_and_unload()
    size = sum(p.nbytes for p in merged.parameters())
    assert memory.now < size
    assert memory.peak <= size + 6 * 704 * 256 * 4


# ----------------------------------------------------------------------------------------------------------------------
# In place, and back
# ----------------------------------------------------------------------------------------------------------------------


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Bit for bit: packed integers that are stored as floats may be NaN."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.flatten().view(torch.uint8), second[name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_adapter_and_back(load, kind, settings):
    inputs = tiny.inputs("llama")
    model = adapted(load(kind), **settings)
    expected = model(**inputs).logits
    before, modules = state(model), [m for m in model.modules() if is_quantised(m)]
    model.merge_adapter()
    assert len([m for m in model.modules() if is_quantised(m)]) == len(modules) - len(FOLDED)
    if kind == "int8":
        assert distance(model(**inputs).logits, expected) < 0.1
    else:
        close(model(**inputs).logits, expected)
    model.unmerge_adapter()
    assert [m for m in model.modules() if is_quantised(m)] == modules
    same(state(model), before)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    model.merge_adapter()
    again = model.merge_and_unload()
    other = adapted(load(kind), **settings).merge_and_unload()
    same(state(again), state(other))


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_disabling_and_unloading_give_the_quantised_base(load, kind, tmp_path):
    inputs = tiny.inputs("llama")
    base = load(kind)
    expected, before = base(**inputs).logits, state(base)
    model = adapted(base)
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    unloaded = model.unload()
    same(state(unloaded), before)
    torch.testing.assert_close(unloaded(**inputs).logits, expected, rtol=0, atol=0)
    unloaded.save_pretrained(tmp_path)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})(**inputs).logits,
        expected,
        rtol=0,
        atol=0,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Quantised again
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_requantised(load, kind, merged_before, settings, tmp_path, capsys):
    """Folded linears hold the folded weights, quantised as the base was; the others are untouched; the loss is told."""
    inputs = tiny.inputs("llama")
    base = load(kind)
    before = {n: by_hand(m) for n, m in base.named_modules() if is_quantised(m)}
    wanted = adapted(load(kind), **settings).merge_and_unload()
    model = adapted(base, **settings)
    if merged_before:
        model.merge_adapter()
    with pytest.warns(UserWarning, match="quantised again") as warned:
        merged = model.merge_and_unload(requantize=True)
    error = change = size = 0
    for name, module in wanted.named_modules():
        if name not in before:
            continue
        found = by_hand(merged.get_submodule(name))
        if name not in FOLDED:
            assert torch.equal(found, before[name])
            continue
        assert kind != "int8" or merged.get_submodule(name).state.CB is None  # nothing of the old weights
        error += (found - module.weight).square().sum()
        change += (module.weight - before[name]).square().sum()
        size += module.weight.square().sum()
    message = str(next(w.message for w in warned if "quantised again" in str(w.message)))
    assert f"an error of {100 * (error / size) ** 0.5:.2f} % of their weights" in message
    assert f"is {100 * (error / change) ** 0.5:.0f} % of the change" in message
    # what these weights compute
    expected = float_copy(merged, wanted)(**inputs).logits
    if kind == "int8":
        assert distance(merged(**inputs).logits, expected) < 0.1
    else:
        close(merged(**inputs).logits, expected)
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    assert not [n for n, (dtype, _) in saved(tmp_path).items() if n.endswith("proj.weight") and dtype == "F32"]
    sizes = [next(k for k in model_card(m).text.splitlines() if k.startswith("| parameters")) for m in (merged, wanted)]
    assert sizes[0] == sizes[1]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "quantised by bitsandbytes" in capsys.readouterr().out
    for kwargs in (dict(), dict(trust_remote_code=True)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, **kwargs)
        same(state(loaded), state(merged))
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore:The folded linears were quantised again")
def test_requantised_in_half_precision(load, prepared, settings, tmp_path):
    inputs = tiny.inputs("llama")
    base = load(None, config=BitsAndBytesConfig(**KINDS["nf4 twice"]), dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(base) if prepared else base
    merged = adapted(base, **settings).merge_and_unload(requantize=True)
    kept = {p.dtype for p in merged.parameters() if not isinstance(p, bitsandbytes.nn.Params4bit)}
    assert kept == {torch.float32 if prepared else torch.bfloat16}
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    same(state(loaded), state(merged))
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)


def test_only_a_quantised_base_is_quantised_again():
    model = adapted(tiny.model("llama"))
    with pytest.raises(ValueError, match="this one is not quantised"):
        model.merge_and_unload(requantize=True)
    assert model.skip_layers == [0, 3]
    model.merge_and_unload()


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """As GPTQ's and AWQ's linears are made: no weight, but something packed."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.data.to(torch.int8))
        self.register_buffer("plain", linear.weight.data)

    def forward(self, z):
        return nn.functional.linear(z, self.plain)


class Scaled(Packed):
    """As those of 8-bit floats, and of EETQ: a weight that says nothing without its scales."""

    def __init__(self, linear, dtype):
        super().__init__(linear)
        self.register_buffer("weight", linear.weight.data.to(dtype))


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize(
    "make",
    [Packed, lambda m: Scaled(m, torch.float8_e4m3fn), lambda m: Scaled(m, torch.int8)],
    ids=["packed", "float8", "int8"],
)
def test_unknown_linears_train_but_are_not_merged(make, method):
    base = tiny.model("llama")
    for name, module in list(base.named_modules()):
        if name in FOLDED:
            base.set_submodule(name, make(module))
    model = adapted(base)
    model.train()(**batch()).loss.backward()
    before, inputs = state(model), tiny.inputs("llama")
    expected = model.eval()(**inputs).logits
    with pytest.raises(ValueError, match=r"folded into a (Packed|Scaled) of test_quantized.*Ways out: load the base"):
        getattr(model, method)()
    same(state(model), before)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_weights_repacked_for_the_cpu_are_refused(load):
    """On CPUs with AVX512-BF16, a forward for inference does this to the weights, and loses their scales."""
    if not hasattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this version does not repack")
    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    linear = linear.to("cpu")
    model = adapted(load("nf4"))
    weight = linear.weight
    weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    model.base_model.model.model.layers[3].mlp.base_layer.up_proj = linear
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"repacked .* for this CPU .* merge before the first forward"):
            method()


@pytest.mark.parametrize("kwargs", [dict(), dict(requantize=True)], ids=str)
def test_safe_merge_refuses_nan(load, kwargs):
    model = adapted(load("nf4"))
    parameter = next(p for n, p in model.named_parameters() if n.endswith("eas_adapter.default.up"))
    parameter.data.view(-1)[0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True, **kwargs)
    assert before.keys() == state(model).keys()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("nf4 twice", dict()), ("nf4", dict(bf16=True)), ("int8", dict())],
    ids=str,
)
def test_searched_trained_saved_merged(load, kind, kwargs, tmp_path):
    """The search and the training, with gradient checkpointing, as in QLoRA; the base is as it was."""
    inputs = tiny.inputs("llama")
    base = prepare_model_for_kbit_training(load(kind))
    before = state(base)
    torch.manual_seed(0)
    model = get_peft_model(base, EASConfig(num_skip=2, task_type="CAUSAL_LM"))
    search = EASCallback(warmup_steps=3, search_steps=9, interval=3)
    run = trainer(
        tmp_path / "run", model, [search], max_steps=24, learning_rate=1e-2, gradient_checkpointing=True, **kwargs
    )
    loss = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * loss
    assert len(model.skip_layers) == 2
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model.base_model(**inputs).logits
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(load(kind), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert loaded.skip_layers == model.skip_layers
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    assert distance(merged(**inputs).logits, expected) < (0.1 if kind == "int8" else 1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    same(state(model.unload()), before)


def test_frozen_context(load):
    model = adapted(load("nf4"), propagation="mean")
    model.freeze_context([batch()])
    inputs = tiny.inputs("llama")
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert merged.config.eas["attentions"][0]["shifted"] == {}
    close(merged(**inputs).logits, expected)
