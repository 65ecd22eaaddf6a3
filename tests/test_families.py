"""The table of families: every row on a tiny model, rows from outside, and rows proposed by tracing."""

import dataclasses

import matrix
import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_eas import FAMILIES, EASConfig, Family, cli, register_family
from peft_eas.trace import TraceError, as_source, check_family, propose_family

# the rest of the matrix is `make supported-models`
FAST = {name: matrix.CHECKS[name] for name in ("skipping", "merging")}


@pytest.mark.parametrize("model_type", matrix.whole_models())
def test_family(model_type):
    results = matrix.run(model_type, FAST)
    assert not any(results.values()), results


def test_the_page_is_that_of_the_table():
    """Every family has its line on the page, so the page is from after its row was written."""
    lines = matrix.PAGE.read_text(encoding="utf-8").splitlines()
    listed = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert set(matrix.whole_models()) <= set(listed) <= set(FAMILIES)  # older versions of transformers lack some
    assert not [line for line in lines if "✗" in line]


def layer_names(model, row):
    from peft_eas.families import find_layers

    layers = [model.get_submodule(arm.layer) for arm in find_layers(model).values()]
    return {n for layer in layers for n in (*dict(layer.named_modules()), *dict(layer.named_parameters()))}


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "opt", "phi", "bloom", "falcon", "gemma3_text", "olmo2", "mixtral", "gpt_oss", "deepseek_v3"],
)
def test_a_row_is_found_by_tracing(model_type):
    model, row = matrix.tiny_model(model_type), FAMILIES[model_type]
    proposed = propose_family(model)
    names = layer_names(model, row)

    def present(module, inputs):
        return {name for name in inputs if f"{module}.{name}".rstrip(".") in names}

    assert set(proposed.attention_inputs) == present(row.attention, row.attention_inputs)
    assert set(proposed.ffn_inputs) == present(row.ffn, row.ffn_inputs)
    same = ("layers", "attention", "attention_norms", "output_norms", "ffn", "stacked_axis", "adds_residual")
    assert {name: getattr(proposed, name) for name in same} == {name: getattr(row, name) for name in same}
    assert eval(as_source(proposed), {"Family": Family}) == proposed
    assert check_family(model, proposed) < 1e-5
    assert FAMILIES[model_type] is row


@pytest.mark.parametrize(
    "wrong", [dict(ffn_inputs=("gate_proj",)), dict(attention_inputs=("q_proj", "k_proj")), dict(attention_norms=())]
)
def test_an_incomplete_row_is_noticed(wrong):
    """What reads the input without being named shows; a norm that is kept in vain does not."""
    error = check_family(matrix.tiny_model("llama"), dataclasses.replace(FAMILIES["llama"], **wrong))
    assert (error > 1e-3) == ("attention_norms" not in wrong)


def test_tracing_something_else_says_so():
    class Config(LlamaConfig):
        model_type = "no_layers"

    class Model(LlamaForCausalLM):
        def get_decoder(self):
            return nn.Linear(1, 1)

    with pytest.raises(TraceError, match="no list of layers"):
        propose_family(Model(tiny.config("llama")))


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


def test_an_unknown_family_names_the_known_ones_and_a_row_makes_it_known(own_model, tmp_path):
    with pytest.raises(ValueError, match=r"'own_llama'.*Known types: .*gpt2.*inspect-family.*register_family"):
        get_peft_model(own_model, EASConfig(skip_layers=[1]))
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


def test_a_row_that_does_not_fit_the_model_is_refused(own_model):
    register_family(
        dataclasses.replace(FAMILIES["gpt2"], model_type="own_llama", layers="layers", attention="self_attn")
    )
    with pytest.raises(ValueError, match=r"LlamaAttention of layer 0 has none of c_attn"):
        get_peft_model(own_model, EASConfig(skip_layers=[1]))


def test_chunks_of_tokens_are_refused():
    make = matrix.EXAMPLES["bert"]
    model = matrix.build(make.model, make.config(chunk_size_feed_forward=2))
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0"):
        get_peft_model(model, EASConfig(skip_layers=[1]))


def test_inspect_family(tmp_path, capsys):
    matrix.tiny_config("gpt_neox").save_pretrained(tmp_path)
    assert cli.main(["inspect-family", str(tmp_path), "--layers", "2"]) == 0
    said = capsys.readouterr().out
    assert as_source(FAMILIES["gpt_neox"]) in said
    assert "Merging with this row is exact" in said


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", "With this row the model fails"),
        ("t5", "proposed for decoders"),
        ("vit", "transformers has none of type"),
    ],
)
def test_inspecting_what_is_no_decoder_says_so(model_type, message, tmp_path, capsys):
    matrix.EXAMPLES[model_type].config().save_pretrained(tmp_path)
    assert cli.main(["inspect-family", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "by hand" in said


def test_gradient_checkpointing_where_no_keywords_are_passed_on():
    """Two forwards with different prompts before a backward: what is recomputed must know its own prompt."""

    def gradients(checkpointing):
        model = matrix.adapted("bloom").train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = 0
        for first in (6, 9):
            labels = matrix.tiny_inputs("bloom")["input_ids"].clone()
            labels[:, :first] = -100
            loss = loss + model(**matrix.tiny_inputs("bloom"), labels=labels).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)
