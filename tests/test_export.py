"""Exports, read by others: a reader of nemotron-nas checkpoints written from vLLM's rules, and llama.cpp itself."""

import json
import sys
import warnings

import pytest
import torch
from checks import skip_without_onnx
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from zoo import tiny
from zoo.exports import BPE, TEXT, byte_level, merged, quietly

import peft_eas
from peft_eas import EASConfig, cli

LLAMAS = ["nemotron-nas", "gguf"]
FORMATS = [*LLAMAS, "onnx"]


def adapted(family="llama", **settings):
    model = get_peft_model(tiny.model(family), EASConfig(**dict(skip_layers=[1, 3], stand_in="mean") | settings))
    tiny.shake(model)
    return model


@pytest.fixture
def refused(tmp_path):
    def check(format, match, model, **options):
        with pytest.raises(ValueError, match=match):
            quietly(model, tmp_path / "out", format, byte_level(), **options)
        assert not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize("format", FORMATS)
def test_what_no_format_can_hold_is_refused(format, refused, tmp_path):
    refused(format, "merge_and_unload", adapted())
    merged = adapted(propagation="mean").merge_and_unload()
    refused(format, r"mean over other tokens.*freeze_context.*propagation='none'", merged)
    refused(format, "reads more than text", adapted("llava").merge_and_unload())
    quantised = tiny.model("llama")
    quantised.config.quantization_config = {"quant_method": "gptq"}
    refused(format, "unquantised base", quantised)
    with pytest.raises(ValueError, match="`format` must be one of 'nemotron-nas', 'gguf', 'onnx', got 'tflite'"):
        peft_eas.export(tiny.model("llama"), tmp_path / "out", "tflite")


@pytest.mark.parametrize("format", LLAMAS)
def test_linear_stand_ins_are_refused(format, refused):
    refused(format, r"linear map.*stand_in='mean'.*freeze_context", adapted(stand_in="linear").merge_and_unload())


@pytest.mark.parametrize("format", LLAMAS)
def test_what_is_no_llama_is_refused(format, refused):
    for family, why in (("qwen3", "normalises queries"), ("gemma3_text", "has norms")):
        model = adapted(family).merge_and_unload()
        refused(format, f"{why}.*MistralForCausalLM.*'onnx'", model)
    head = AutoModelForSequenceClassification.from_config(tiny.config("llama"))
    refused(format, "LlamaForSequenceClassification can't be", head)
    for family in ("mistral", "qwen2"):
        model = adapted(family).merge_and_unload()
        refused(format, r"6 tokens back.*max_position_embeddings = 6", model)
    refused(format, "'gelu', but", merged(hidden_act="gelu"))
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    refused(format, "rotates a part", merged(rope_parameters=partial))
    refused(format, "no dtype 'int3'", merged(), dtype="int3")
    foreign = merged()
    foreign.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(8)
    refused(format, "no place for: model.layers.1.self_attn.q_norm.weight", foreign)


def test_warnings_name_what_an_engine_would_do_silently(tmp_path):
    for number, (settings, match) in enumerate(
        [
            (dict(), "TensorRT-LLM ignores all biases and SGLang those of FFNs"),
            (
                dict(name="attention biases of its own", use_bias=False, stand_in="zero"),
                "TensorRT-LLM ignores all biases, without",
            ),
            (dict(skip=[0], use_bias=False, stand_in="zero"), "Layer 0 has no attention.*KV cache"),
        ]
    ):
        with pytest.warns(UserWarning, match=match) as caught:
            peft_eas.export(merged(**settings), tmp_path / str(number), "nemotron-nas")
        assert {warning.filename for warning in caught if warning.category is UserWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft_eas.export(merged(use_bias=False, stand_in="zero"), tmp_path / "silent", "nemotron-nas")


@pytest.mark.parametrize("format", LLAMAS)
def test_an_export_is_whole_or_not_there(format, tmp_path):
    model, tokenizer = merged(**BPE), byte_level()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not an empty folder"):
        quietly(model, tmp_path / "full", format, tokenizer)
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # the disk is full in the middle of the weights
    try:
        with pytest.raises(Exception, match=r"too large|requested and .* written"):
            quietly(model, tmp_path / "out", format, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "deeper" / "empty").mkdir(parents=True)
    quietly(model, tmp_path / "deeper" / "empty", format, tokenizer)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["empty"]
    assert any((tmp_path / "deeper" / "empty").iterdir())


@pytest.mark.parametrize(("format", "package"), [("gguf", "gguf"), ("onnx", "onnxscript")])
def test_what_a_format_needs_is_named(format, package, tmp_path, monkeypatch):
    if format == "onnx":
        skip_without_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"`{package}`: pip install 'peft_eas\[export\]'"):
        peft_eas.export(merged(**BPE), tmp_path / "out", format, byte_level())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_command(llama_cpp, tmp_path, capsys):
    model, tokenizer = merged(use_bias=False, **BPE), byte_level()
    model.save_pretrained(tmp_path / "merged")
    run = ["export", str(tmp_path / "merged")]
    assert cli.main([*run, str(tmp_path / "nas"), "--format", "nemotron-nas", "--dtype", "bfloat16"]) == 0
    streams = capsys.readouterr()
    assert "config.json, configuration_decilm.py, generation_config.json" in streams.out
    assert f"There is no tokenizer in {tmp_path / 'merged'}." in streams.err
    assert AutoConfig.from_pretrained(tmp_path / "nas", trust_remote_code=True).dtype == torch.bfloat16
    assert cli.main([*run, str(tmp_path / "gguf"), "--format", "gguf"]) == 1
    assert "give `tokenizer`" in capsys.readouterr().err.splitlines()[-1]
    tokenizer.save_pretrained(tmp_path / "merged")
    assert cli.main([*run, str(tmp_path / "gguf"), "--format", "gguf"]) == 0
    streams = capsys.readouterr()
    assert f"{tmp_path / 'gguf'}: model.gguf (" in streams.out
    assert "no tokenizer" not in streams.err
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    found = llama_cpp(tmp_path / "gguf").log_probabilities(ids[0].tolist(), 390)
    assert (found - model(ids).logits[0, -1].log_softmax(-1)).abs().max() < 2e-3
    assert cli.main([*run, str(tmp_path / "nas2"), "--format", "nemotron-nas"]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "nas2")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    settings = json.loads((tmp_path / "nas2" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no other name
