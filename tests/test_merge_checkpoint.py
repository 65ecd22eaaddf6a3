"""Merging from files to files: the very files of `merge_and_unload().save_pretrained()`, with little memory, and after
being killed, too."""

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from memory import AllocatedBytes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)
from zoo import tiny
from zoo.families import adapted, auto_class, tiny_model, whole_models

from peft_eas import EASConfig, cli, merge_checkpoint, tensor_files
from peft_eas.checkpoint import plan_checkpoint

SMALL = 20_000
"""Bytes of a file of weights: each of these models has several."""


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def make(folder, model_type="llama", **settings):
    """A base model and an adapter in folders."""
    saved(tiny_model(model_type), folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")  # which the card has, too
    saved(adapted(model_type, **settings), folder / "adapter")
    return folder / "base", folder / "adapter"


def merged_in_memory(base, adapter, auto=AutoModelForCausalLM, dtype="auto"):
    model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload(safe_merge=True)


def weights_of(file):
    """Not those that are mapped to the file, which is going to be another."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def digests(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same_files(folder, auto=AutoModelForCausalLM, size=SMALL, dtype=None):
    """What is merged both ways is the same, and nothing else is left; gives the names of the files."""
    base, adapter = folder / "base", folder / "adapter"
    merged_in_memory(base, adapter, auto, dtype or "auto").save_pretrained(folder / "expected", max_shard_size=size)
    merge_checkpoint(base, adapter, folder / "merged", max_shard_size=size, dtype=dtype)
    assert digests(folder / "merged") == digests(folder / "expected")
    assert {file.name for file in folder.iterdir()} == {"base", "adapter", "expected", "merged"}
    return sorted(file.name for file in (folder / "merged").iterdir())


FAMILIES = [
    *("llama", "qwen2", "gpt2", "gpt_neox", "bloom", "gemma2", "falcon", "opt"),
    *("mixtral", "qwen3_moe", "zamba2", "nemotron_h", "recurrent_gemma"),  # experts are stacked; layers share weights
    *("llava", "qwen2_vl", "ernie4_5_vl_moe", "qwen2_audio", "bart", "t5", "bert", "deberta-v2", "vit", "lxmert"),
]


@pytest.mark.parametrize("model_type", [family for family in FAMILIES if family in whole_models()])
def test_the_files_are_those_of_a_merge_in_memory(model_type, tmp_path):
    make(tmp_path, model_type)
    assert len([name for name in same_files(tmp_path, auto_class(model_type)) if name.endswith(".safetensors")]) > 1


SETTINGS = {
    "biases": dict(use_bias=True),
    "static router": dict(router="static", groups=2, use_bias=True),
    "constants": dict(stand_in="mean", propagation="none"),
    "no stand-ins": dict(stand_in="zero", propagation="none"),
    "nothing skipped": dict(skip_layers=[], propagation="none"),
}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_for_all_that_adapters_have(model_type, settings, tmp_path):
    make(tmp_path, model_type, **settings)
    same_files(tmp_path)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32", torch.float64])
def test_one_file_in_any_dtype(dtype, tmp_path):
    make(tmp_path)
    saved(tiny_model("llama").to(torch.bfloat16), tmp_path / "base")
    assert "model.safetensors" in same_files(tmp_path, size="50GB", dtype=dtype)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as tensors:
        expected = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
        assert str(tensors.get_tensor("lm_head.weight").dtype) == f"torch.{expected}"


def test_a_base_model_in_several_files_with_a_generation_config(tmp_path):
    make(tmp_path)
    shutil.rmtree(tmp_path / "base")
    model = tiny_model("llama")
    model.generation_config.update(max_new_tokens=7, temperature=0.5, do_sample=True)
    model.save_pretrained(tmp_path / "base", max_shard_size=SMALL)
    assert "model.safetensors" in same_files(tmp_path, size="50GB")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_a_trained_head_takes_the_place_of_the_base_model_s(tmp_path):
    """Which has none, as it was a language model."""
    config = BertConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    base = AutoModelForSequenceClassification.from_config(config)
    saved(base, tmp_path / "base")
    settings = dict(skip_layers=[1], task_type="SEQ_CLS", modules_to_save=["classifier"])
    model = get_peft_model(base, EASConfig(**settings))
    tiny.shake(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    saved(model, tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    weights = {name: tensor for name, tensor in weights_of(file).items() if not name.startswith("classifier")}
    save_file(weights, file, {"format": "pt"})
    same_files(tmp_path, AutoModelForSequenceClassification)
    # but nothing takes the place of what the adapter does not have
    save_file({name: tensor for name, tensor in weights.items() if "pooler" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of .*such as bert\.pooler"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# Killed ---------------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from peft_eas import merge_checkpoint, tensor_files
values, left = tensor_files.values_of, int(sys.argv[4])
def counted(tensor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return values(tensor)
tensor_files.values_of = counted
merge_checkpoint(*sys.argv[1:4], max_shard_size=20_000)
"""


def test_goes_on_after_it_was_killed(tmp_path):
    """With what is whole as it is, and in the middle of a file."""
    base, adapter = make(tmp_path)
    merged_in_memory(base, adapter).save_pretrained(tmp_path / "expected", max_shard_size=SMALL)
    killed = [sys.executable, "-c", KILLED, str(base), str(adapter), str(tmp_path / "merged"), "30"]
    assert subprocess.run(killed, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    kept = tmp_path / ".merged.merging" / "kept" / "weights"
    whole = {file.name: file.stat().st_ino for file in kept.glob("*.safetensors")}
    (part,) = kept.glob("*.part")
    whole[part.stem] = part.stat().st_ino
    assert len(whole) > 2
    assert part.stat().st_size > 4000
    with open(part, "ab") as file:  # a tensor that was cut
        file.write(b"\1" * 17)
    counted, values = [], tensor_files.values_of
    plan = plan_checkpoint(base, adapter, max_shard_size=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "values_of", lambda tensor: counted.append(1) or values(tensor))
        plan.write(tmp_path / "merged")
    spared = sum(len(shard.tensors) for shard in plan.shards) - len(counted)
    assert 25 < spared < 30  # but for what had not left the process
    assert digests(tmp_path / "merged") == digests(tmp_path / "expected")
    assert {name: (tmp_path / "merged" / name).stat().st_ino for name in whole} == whole
    assert not (tmp_path / ".merged.merging").exists()


def interrupt(plan, out, at=20):
    """Write some tensors of a plan, and then nothing more."""
    values, count = tensor_files.values_of, itertools.count(1)

    def counted(tensor):
        if next(count) == at:
            raise KeyboardInterrupt
        return values(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "values_of", counted)
        with pytest.raises(KeyboardInterrupt):
            plan.write(out)
    assert not out.exists()


@pytest.mark.parametrize("change", ["adapter", "base", "dtype"])
def test_begins_anew_with_another_adapter_or_base(change, tmp_path):
    base, adapter = make(tmp_path)
    interrupt(plan_checkpoint(base, adapter, max_shard_size=SMALL), tmp_path / "merged")
    assert list((tmp_path / ".merged.merging" / "kept" / "weights").glob("*.safetensors"))
    if change == "adapter":
        saved(adapted("llama", seed=5), adapter)
    elif change == "base":
        model = tiny_model("llama")
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        saved(model, base)
    same_files(tmp_path, dtype="bfloat16" if change == "dtype" else None)


def test_interrupted_before_the_weights_come_in(tmp_path):
    """Such as by a tokenizer that can't be saved."""
    base, adapter = make(tmp_path)

    def fail(folder):
        assert (folder / "config.json").exists()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        plan_checkpoint(base, adapter, max_shard_size=SMALL).write(tmp_path / "merged", fail)
    assert not (tmp_path / "merged").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "values_of", None)  # nothing is read any more
        merge_checkpoint(base, adapter, tmp_path / "merged", max_shard_size=SMALL)
    merged_in_memory(base, adapter).save_pretrained(tmp_path / "expected", max_shard_size=SMALL)
    assert digests(tmp_path / "merged") == digests(tmp_path / "expected")


def test_two_at_once_are_one_too_many(tmp_path):
    base, adapter = make(tmp_path)

    def again(folder):
        with pytest.raises(ValueError, match="Another process is writing"):
            merge_checkpoint(base, adapter, tmp_path / "merged")

    plan_checkpoint(base, adapter).write(tmp_path / "merged", again)
    assert (tmp_path / "merged" / "model.safetensors").exists()


# Refused --------------------------------------------------------------------------------------------------------------


def refuses(folder, match, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", **kwargs)
    assert {file.name for file in folder.iterdir()} <= {"base", "adapter"}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_it_does_not_merge(tmp_path):
    base, adapter = make(tmp_path)
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses(tmp_path, "is quantised.*merge_and_unload")
    saved(tiny_model("llama"), base)
    weights = weights_of(base / "model.safetensors")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    refuses(tmp_path, "truncated", OSError)
    (base / "model.safetensors").unlink()
    refuses(tmp_path, "has no weights to merge into")
    torch.save(weights, base / "pytorch_model.bin")
    refuses(tmp_path, "not in safetensors.*merge_and_unload")
    shutil.rmtree(adapter)
    saved(get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear")), adapter)
    refuses(tmp_path, "is an adapter of type .*LORA, not an EAS adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    saved(tiny_model("llama"), base)
    saved(adapted("llama"), adapter)
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge_checkpoint(base, adapter, tmp_path / "full")


def test_a_model_that_is_changed_when_it_is_loaded(tmp_path):
    """Youtu makes its padding's embedding zero."""
    make(tmp_path, "youtu")
    refuses(tmp_path, "has to be converted when it is loaded.*merge_and_unload")


@pytest.mark.parametrize(("value", "part"), [(1e30, "mlp.eas_adapter.up"), (float("nan"), "eas_stand_in.constant")])
def test_no_model_with_nan(value, part, tmp_path):
    """By folding what is finite into float16, or in what is not folded."""
    _, adapter = make(tmp_path)
    file = adapter / "adapter_model.safetensors"
    weights = weights_of(file)
    next(tensor for name, tensor in weights.items() if name.endswith(part)).view(-1)[3] = value
    save_file(weights, file, {"format": "pt"})
    refuses(tmp_path, "NaNs detected", dtype="float16")


# Memory ---------------------------------------------------------------------------------------------------------------


def large(folder):
    """A model of 40 MB, of which no tensor has more than 1.5."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1400, num_hidden_layers=8, num_attention_heads=4
    )
    torch.manual_seed(0)
    saved(AutoModelForCausalLM.from_config(config), folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), EASConfig(skip_layers=[1, 5]))
    tiny.shake(model)
    saved(model, folder / "adapter")
    return folder / "base", folder / "adapter"


def test_there_is_one_tensor_at_a_time(tmp_path, monkeypatch):
    base, adapter = large(tmp_path)
    monkeypatch.setattr("peft_eas.pia.WORKSPACE", 10**6)
    read = tensor_files._read
    # in memory of its own, so that it is counted
    monkeypatch.setattr(tensor_files, "_read", lambda file, key: read(file, key).clone())
    with AllocatedBytes(torch.nn.Module()) as planning:
        plan = plan_checkpoint(base, adapter)
    held = (adapter / "adapter_model.safetensors").stat().st_size
    assert planning.peak < 3 * held + 10**5  # made, read and put in
    with AllocatedBytes(torch.nn.Module()) as writing:
        plan.write(tmp_path / "merged")
    tensor = 1400 * 256 * 4
    assert plan.size > 25 * tensor
    assert plan.peak < held + 2 * tensor + 10**6
    assert tensor < writing.peak < plan.peak


# The command line -----------------------------------------------------------------------------------------------------


def told(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["merge", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_dry_run_says_what_will_be_written(tmp_path, capsys):
    base, adapter = make(tmp_path)
    lines = told(capsys, adapter, tmp_path / "merged", "--base", base, "--dry-run").splitlines()
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter"}
    told(capsys, adapter, tmp_path / "merged", "--base", base)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert lines[0].split() == [f"{size:,}", "model.safetensors"]
    assert lines[1].split()[0] == f"{size:,}"
    assert "EASLlamaForCausalLM" in lines[1]
    assert "bytes in memory at most" in lines[2]
    assert len(lines) == 3


def test_a_dry_run_of_a_large_model_needs_no_weights(tmp_path, capsys):
    sizes = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256)
    config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = dict(skip_layers=[40, 41], r=1, r_pia=1, groups=1, task_type="CAUSAL_LM")
    model = get_peft_model(model, EASConfig(**settings), low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        if "eas_" in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(torch.zeros(parameter.shape)))
    for module in model.modules():
        if hasattr(module, "gates"):
            module.set_gate("default", module.place.index in (40, 41))
            module.eas_skip["default"] = torch.tensor(module.place.index in (40, 41))
    saved(model, tmp_path / "adapter")
    text = told(capsys, tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "base", "--dry-run")
    assert "model-00003-of-00003.safetensors" in text
    attention = 2 * (8192 * 8192 + 1024 * 8192)
    weights = 2 * (80 * (attention + 3 * 8192 * 28672) + 2 * 128256 * 8192) - 2 * 2 * attention
    total, peak = (int(line.split()[0].replace(",", "")) for line in text.splitlines()[3:5])
    assert weights < total < weights + 10**8
    assert peak < 3 * 10**9
    assert "There are no weights in" in text
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["config.json"]


def test_the_command_line_has_a_progress_bar(tmp_path, capsys):
    base, adapter = make(tmp_path)
    tiny.tokenizer().save_pretrained(base)
    assert cli.main(["merge", str(adapter), str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert "Merging: 100%" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<eos>"
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), PreTrainedModel)
