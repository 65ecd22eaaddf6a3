"""The table of families: every row on a tiny model, rows from outside, and rows proposed by tracing."""

import dataclasses
import itertools

import checks
import matrix
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import families, tiny

from peft_eas import FAMILIES, Attentions, EASCallback, EASConfig, Family, cli, model_card, register_family
from peft_eas.families import decoders, encoders, find_layers, moe, multimodal, seq2seq
from peft_eas.prove import learn_family
from peft_eas.runtime.eas_structure import outermost
from peft_eas.trace import TraceError, as_source, check_family, propose_family

# the rest of the matrix is `make supported-models`
FAST = {name: checks.CHECKS[name] for name in ("skipping", "standing_in", "merging", "prefix", "parts", "packing")}


@pytest.mark.parametrize("model_type", families.whole_models())
def test_family(model_type):
    results = checks.run(model_type, FAST)
    assert not any(results.values()), results


def test_the_page_is_that_of_the_table():
    """Every family has its line on the page, so the page is from after its row was written."""
    lines = matrix.PAGE.read_text(encoding="utf-8").splitlines()
    listed = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert set(families.whole_models()) <= set(listed) <= set(FAMILIES)  # older versions of transformers lack some
    assert not [line for line in lines if "✗" in line]


def test_families_that_are_built_alike_share_a_list_and_lists_are_sorted():
    """Alike are rows with equal attentions, or around a model of the same name; no matter in which file they are."""
    seen = []
    for kind in (decoders, encoders, moe, multimodal, seq2seq):
        lists = itertools.groupby(kind.ROWS, lambda family: family.decoder or family.attentions)
        lists = [(built, [family.model_type for family in rows]) for built, rows in lists]
        names = [model_types for _, model_types in lists]
        assert names == sorted(map(sorted, names))
        seen += [built for built, _ in lists]
    assert len(set(seen)) == len(seen)


def layer_names(model, row):
    layers = [model.get_submodule(place.layer) for place in find_layers(model).values()]
    return {n for layer in layers for n in (*dict(layer.named_modules()), *dict(layer.named_parameters()))}


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "opt", "phi", "bloom", "falcon", "gemma3_text", "olmo2", "mixtral", "gpt_oss", "deepseek_v3"],
)
def test_a_row_is_found_by_tracing(model_type):
    model, family = families.tiny_model(model_type), FAMILIES[model_type]
    proposed_family = propose_family(model)
    (row,), (proposed,) = family.attentions, proposed_family.attentions
    names = layer_names(model, row)

    def present(module, inputs):
        return {name for name in inputs if f"{module}.{name}".rstrip(".") in names}

    assert set(proposed.attention_inputs) == present(row.attention, row.attention_inputs)
    assert set(proposed.ffn_inputs) == present(row.ffn, row.ffn_inputs)
    same = ("layers", "attention", "attention_norms", "output_norms", "ffn", "stacked_axis", "convention")
    assert {name: getattr(proposed, name) for name in same} == {name: getattr(row, name) for name in same}
    assert eval(as_source(proposed_family), {"Family": Family, "Attentions": Attentions}) == proposed_family
    assert check_family(model, proposed_family) < 1e-5
    assert FAMILIES[model_type] is family


@pytest.mark.parametrize(
    "wrong", [dict(ffn_inputs=("gate_proj",)), dict(attention_inputs=("q_proj", "k_proj")), dict(attention_norms=())]
)
def test_an_incomplete_row_is_noticed(wrong):
    """What reads the input without being named shows; a norm that is kept in vain does not."""
    error = check_family(families.tiny_model("llama"), Family("llama", (Attentions(**wrong),)))
    assert (error > 1e-3) == ("attention_norms" not in wrong)


def test_tracing_something_else_says_so():
    class Config(LlamaConfig):
        model_type = "no_layers"

    class Model(LlamaForCausalLM):
        def get_decoder(self):
            return nn.Linear(1, 1)

    with pytest.raises(TraceError, match="no list of layers"):
        propose_family(Model(tiny.config("llama")))
    with pytest.raises(TraceError, match="Nothing in 'shared_transf' of ZambaForCausalLM reads the input"):
        propose_family(families.tiny_model("zamba"))
    with pytest.raises(TraceError, match="No layer of NemotronHForCausalLM calls an attention and then a FFN"):
        propose_family(families.tiny_model("nemotron_h"))


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


@pytest.fixture
def own_model():
    AutoConfig.register("own_llama", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    torch.manual_seed(0)
    yield OwnModel(OwnConfig(**tiny.COMMON)).eval()
    FAMILIES.pop("own_llama", None)


def test_a_type_that_has_no_row_and_cannot_be_learned_names_the_nearest():
    class Config(LlamaConfig):
        model_type = "lama"

    message = r"'lama' \(LlamaForCausalLM\).* nearest .*'llama'.*supported-models.*inspect-family.*usage.md#families"
    with pytest.raises(ValueError, match=message) as caught:
        get_peft_model(LlamaForCausalLM(Config(**tiny.COMMON)), EASConfig(skip_layers=[1]))
    assert len(str(caught.value)) < 400


def test_a_row_makes_a_family_known(own_model, tmp_path):
    register_family(dataclasses.replace(FAMILIES["llama"], model_type="own_llama"))
    inputs = tiny.inputs("llama")
    model = get_peft_model(own_model, EASConfig(skip_layers=[1])).eval()
    tiny.shake(model)
    generated = model.generate(**inputs, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, pad_token_id=0, use_cache=False))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, OwnModel)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"AutoConfig\.register"):
        register_family(Family("nobody_knows"))


def test_a_type_that_has_no_row_is_learned(own_model):
    with pytest.warns(UserWarning, match=r"register_family\(peft_eas.Family\('own_llama'\)\)"):
        model = get_peft_model(own_model, EASConfig(skip_layers=[1], init_weights=False)).eval()
    assert FAMILIES["own_llama"].attentions == FAMILIES["llama"].attentions
    inputs = tiny.inputs("llama")
    expected = model(**inputs).logits
    checks.close(model.merge_and_unload()(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_5"])  # a Qwen3.5 may be its language model alone, too
def test_a_model_around_a_known_one_is_learned(model_type, monkeypatch):
    before = dict(FAMILIES)
    monkeypatch.delitem(FAMILIES, model_type)
    model, state = families.tiny_model(model_type), torch.get_rng_state()
    with pytest.warns(UserWarning, match="decoder='language_model'"):
        learn_family(model)
    assert before == FAMILIES
    assert torch.equal(torch.get_rng_state(), state)


class OddAttention(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        output, *others = super().forward(hidden_states, *args, **kwargs)
        return output + 0.1 * hidden_states, *others


def test_what_cannot_be_proved_is_refused(own_model, monkeypatch):
    """An attention that gives its input back, too, is more than linears that read it."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaAttention", OddAttention)
    with pytest.raises(ValueError, match=r"'own_llama'.*A skipped attention is not one that gives zero"):
        get_peft_model(OwnModel(own_model.config), EASConfig(skip_layers=[1]))
    assert "own_llama" not in FAMILIES


def test_a_row_that_does_not_fit_the_model_is_refused(own_model):
    register_family(Family("own_llama", (Attentions(attention_inputs=("c_attn",)),)))
    with pytest.raises(ValueError, match=r"LlamaAttention of layer 0 has none of c_attn"):
        get_peft_model(own_model, EASConfig(skip_layers=[1]))


def test_ffns_may_get_their_tokens_in_chunks():
    make, found = families.EXAMPLES["bert"], []
    for size in (0, 1):
        torch.manual_seed(0)
        model = families.build(make.model, make.config(chunk_size_feed_forward=size))
        model = get_peft_model(model, EASConfig(skip_layers=[1], propagation="mean")).eval()
        tiny.shake(model)
        found += [checks.logits(model, "bert"), checks.logits(model.merge_and_unload(), "bert")]
    for logits in found[1:]:
        checks.close(logits, found[0])


def test_inspect_family(tmp_path, capsys):
    families.tiny_config("gpt_neox").save_pretrained(tmp_path)
    assert cli.main(["inspect-family", str(tmp_path), "--layers", "2"]) == 0
    said = capsys.readouterr().out
    assert as_source(FAMILIES["gpt_neox"]) in said
    assert "Merging with this row is exact" in said


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", "depends on those that follow"),
        ("t5", "proposed for decoders"),
        ("vit", "transformers has none of type"),
    ],
)
def test_inspecting_what_is_no_decoder_says_so(model_type, message, tmp_path, capsys):
    families.EXAMPLES[model_type].config().save_pretrained(tmp_path)
    assert cli.main(["inspect-family", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "by hand" in said


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("propagation", ["mean", "none"])
@pytest.mark.parametrize("model_type", ["bloom", "nemotron_h"])
def test_gradient_checkpointing(model_type, propagation, use_reentrant):
    """Two forwards before a backward: bloom's layers pass no keywords on, and in nemotron_h the attention is skipped in
    a layer of its own."""

    def gradients(checkpointing):
        model = families.adapted(model_type, propagation=propagation).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = 0
        for first in (6, 9):
            labels = families.tiny_inputs(model_type)["input_ids"].clone()
            labels[:, :first] = -100
            loss = loss + model(**families.tiny_inputs(model_type), labels=labels).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_attention_without_a_ffn_after_it_is_not_skipped():
    model = families.tiny_model("nemotron_h")
    kinds = model.config.layers_block_type
    assert kinds == ["full_attention", "mlp", "linear_attention", "full_attention", "moe", "full_attention"]
    assert {i: place.is_skippable for i, place in find_layers(model).items()} == {0: True, 3: True, 5: False}
    with pytest.raises(ValueError, match=r"can be skipped .* are \[0, 3\]"):
        get_peft_model(model, EASConfig(skip_layers=[5]))
    places = find_layers(families.tiny_model("ernie4_5_vl_moe"))  # whose PIAs stand before the shared experts
    assert [i for i, place in places.items() if not place.is_skippable] == [0]


def test_a_family_that_is_built_as_another_is_merged_as_that():
    """GLM-GA has no model class of its own: a merged one is a GLM-4.6V, and loads as such."""
    merged = families.adapted("glmga").merge_and_unload()
    assert type(merged).__name__ == "EASGlm46VForConditionalGeneration"
    assert merged.config.model_type == "eas_glm46v"
    assert merged.config.eas["model_type"] == "glm46v"
    checks.reloading("glmga")


def test_a_language_model_by_several_names():
    """Transformers has moved that of Qwen-Omni; merged models are loaded wherever it is."""
    merged = families.adapted("qwen2_5_omni_thinker").merge_and_unload()
    assert merged.config.eas["decoder"] == "language_model|model"
    with pytest.raises(ValueError, match=r"has no module 'neither\|nor'"):
        outermost(merged, "neither|nor")


@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba", "lxmert"])
def test_a_second_adapter(model_type):
    """What a layer is, is seen through the wrappers of the first one."""
    model = families.adapted(model_type)
    expected = checks.logits(model, model_type)
    model.add_adapter("other", EASConfig(skip_layers=model.skip_layers[:1], init_weights=False))
    model.set_adapter("other")
    others = checks.logits(model, model_type)
    assert (others - expected).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(checks.logits(model, model_type), expected, rtol=0, atol=0)
    merged = model.merge_and_unload(adapter_names=["other"])
    checks.close(checks.logits(merged, model_type), others)


@pytest.mark.parametrize("latent", [None, 8])
def test_experts_with_a_linear_before_them(latent):
    """The PIA folds into what reads the FFN's input: the experts, or the linear before them."""
    config = families.tiny_config("nemotron_h")
    config.moe_latent_size = latent
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model = get_peft_model(model, EASConfig(skip_layers=[3], init_weights=False))
    inputs = families.tiny_inputs("nemotron_h")
    expected = model(**inputs).logits
    before = {name.replace(".base_layer", ""): p.clone() for name, p in model.base_model.model.named_parameters()}
    merged = model.merge_and_unload()
    checks.close(merged(**inputs).logits, expected)
    moe = "model.layers.4.mixer"
    changed = {n for n, p in merged.named_parameters() if n.startswith(moe) and n in before and not p.equal(before[n])}
    first = "experts.up_proj" if latent is None else "fc1_latent_proj.weight"
    assert changed == {f"{moe}.{name}" for name in ("gate.weight", "shared_experts.up_proj.weight", first)}


@pytest.mark.parametrize(("model_type", "sources", "skipped"), [("zamba", [1], [2]), ("zamba2", [0, 1], [4])])
def test_layers_that_share_an_attention(model_type, sources, skipped, tmp_path):
    """The first to have it is never skipped; the others still share it when the model is merged, saved and loaded."""
    model = families.tiny_model(model_type)
    layers = find_layers(model)
    assert [i for i, place in layers.items() if not place.is_skippable] == sources
    name = layers[sources[0]].row.attention
    model = get_peft_model(model, EASConfig(skip_layers=skipped, init_weights=False))
    trained = {n.split("layers.")[1].split(".eas")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{name}" for i in skipped} | {f"{i}.mamba_decoder.mamba" for i in layers}
    inputs = families.tiny_inputs(model_type)
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for result in (merged, loaded):
        checks.close(result(**inputs).logits, expected)
        first, last = (
            list(result.model.layers[i].get_submodule(name).parameters()) for i in (sources[-1], max(layers))
        )
        assert first
        assert all(a is b for a, b in zip(first, last, strict=True))
        left = dict(result.model.layers[skipped[0]].get_submodule(name).named_parameters())
        shapes = {"stand_in.constant": (32,), "stand_in.down": (32, 32), "stand_in.up": (32, 32)}
        assert {key: tuple(value.shape) for key, value in left.items()} == shapes
    assert loaded.num_parameters() == merged.num_parameters()
    names = dict(merged.named_parameters(remove_duplicate=False))
    for result in (merged, loaded):
        assert result.all_tied_weights_keys.keys() <= names.keys()


def test_search_over_layers_that_share_an_attention(tmp_path):
    model = get_peft_model(families.tiny_model("zamba"), EASConfig(num_skip=1))
    rows = [{"input_ids": [5, 6, 7 + i, 8], "labels": [-100, -100, 7 + i, 8]} for i in range(4)]
    callback = EASCallback(search_dataset=rows, warmup_steps=1, search_steps=3, interval=1)
    args = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_steps=2,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert len(model.skip_layers) == 1
    assert set(model.skip_layers) <= {2, 4}
    resumed = get_peft_model(families.tiny_model("zamba"), EASConfig(num_skip=1))
    callback = EASCallback(search_dataset=rows, warmup_steps=1, search_steps=3, interval=1)
    trainer = Trainer(resumed, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.skip_layers == model.skip_layers


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_biases_of_adapters_stay_out_of_what_mamba_makes_zero(model_type):
    model = families.adapted(model_type, propagation="none")
    inputs = families.tiny_inputs(model_type)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :4] = 0
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[seen]
    checks.close(model.merge_and_unload()(**inputs).logits[seen], expected)


def test_a_hybrid_s_card_counts_its_attentions(tmp_path, capsys):
    model = families.adapted("nemotron_h", skip_layers=[3])
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    text = str(model_card(merged))
    assert "1 of its 3 attentions" in text
    assert "skipped  - no attention\n  0 #--.-# 5\n" in text
    assert cli.main(["inspect", str(tmp_path / "merged")]) == 0
    assert "1 of 3 attentions: [3]" in capsys.readouterr().out


@pytest.mark.parametrize("propagation", ["mean", "none"])
def test_merged_bloom_compiles_as_bloom_does(propagation):
    """Its layers pass no keywords on."""
    checks.skip_unless_compiled()
    inputs = families.tiny_inputs("bloom") | {"use_cache": False}
    for model in (families.tiny_model("bloom"), families.adapted("bloom", propagation=propagation).merge_and_unload()):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
