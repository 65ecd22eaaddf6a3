"""Merged models where people keep and load them: whole or not at all, and as any transformers model."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import checks
import damage
import pytest
import torch
from checks import close
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    pipeline,
)
from zoo import tiny
from zoo.tiny import adapted, auto

from peft_eas import EASConfig

KINDS = {
    "plain": dict(use_bias=False),
    "biases": dict(),
    "mean": dict(propagation="mean"),
    "two branches": dict(router="static", groups=2, propagation="mean"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def merged(request):
    return adapted(**request.param).merge_and_unload()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


SHAPE = dict(width=32, constant=True, read=32, rank=32, pooled=32, mean_rank=32)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (dict(skip=[0, 2]), r"skips the attentions of layers \[0, 2\].*missing: .*layers\.2\.self_attn.*unexpected:"),
        (dict(skip=[0], stand_ins=[SHAPE]), r"missing: .*layers\.3\."),
        (dict(skip=[0, 3, 4], stand_ins=[SHAPE] * 3), r"unexpected: .*layers\.4\.self_attn"),
        (dict(skip=[0]), r"`eas\.attentions\[0\]\.stand_ins` .* must be 1 entries"),
        (dict(stand_ins=[SHAPE | {"constant": False}] * 2), r"unexpected: .*self_attn\.stand_in\.constant"),
        (dict(stand_ins=[SHAPE | {"rank": 0}] * 2), r"unexpected: .*self_attn\.stand_in\.down"),
        (dict(stand_ins=[SHAPE | {"mean_rank": 0}] * 2), r"unexpected: .*self_attn\.stand_in\.mean_down"),
        (dict(skip=[0, 3, 9], stand_ins=[SHAPE] * 3), r"`eas\.attentions\[0\]\.skip` .* must be some of `present`"),
        (dict(present=list(range(12))), r"`eas\.attentions\[0\]\.present` .* has layer 11, but there are 6"),
        (dict(layers="model"), r"`eas\.attentions\[0\]\.layers` .* 'model', which is no list"),
        (dict(layers="blocks"), r"`eas\.attentions\[0\]\.layers` .*LlamaForCausalLM has no module 'blocks'"),
        (dict(core="inner"), r"`eas\.attentions\[0\]\.core` .* 'inner', which is not there"),
        (dict(biased=["0.self_attn"]), r"`eas\.attentions\[0\]\.biased` .* '0.self_attn', which is no linear"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(tmp_path, kind, message):
    adapted(propagation="mean").merge_and_unload().save_pretrained(tmp_path)
    damage.edit(tmp_path, lambda eas: eas["attentions"][0].update(kind))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("eas", [None, [], "x", 5, {}, {"format": 8}], ids=repr)
def test_no_record_is_refused(tmp_path, eas):
    adapted().merge_and_unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in ({**config, "eas": eas}, {key: value for key, value in config.items() if key != "eas"}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"`eas` in config\.json must be|of `config\.eas`|lacks"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_older_format_is_refused(tmp_path):
    adapted().merge_and_unload().save_pretrained(tmp_path)
    damage.edit(tmp_path, lambda eas: eas.update(format=1))
    with pytest.raises(ValueError, match=r"format 1 .* reads format 8.*merge the adapter again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_every_change_to_the_record_is_refused_or_harmless(tmp_path):
    """Each field is taken away or made something else. What still loads has the logits that it had."""
    merged = adapted(propagation="mean").merge_and_unload()
    merged.save_pretrained(tmp_path)
    changes, inputs = damage.changes(merged.config.eas), tiny.inputs("llama")
    expected = merged(**inputs).logits
    outcomes = Counter(
        damage.outcome(tmp_path, change, is_signed, inputs, expected)
        for _, change in random.Random(0).sample(changes, 80)
        for is_signed in (False, True)
    )
    assert outcomes.pop("refused") > 140, outcomes
    assert set(outcomes) <= {"same", "another model, signed"}, outcomes


@pytest.mark.parametrize("size", [0, 5, 3000, 40_000])
def test_a_truncated_file_is_refused(tmp_path, size):
    adapted().merge_and_unload().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(OSError, match="truncated or corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 3000, 20_000])
def test_a_truncated_adapter_is_refused(tmp_path, size):
    model = adapted()
    model.save_pretrained(tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", size)
    fresh = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1]))
    for load in (
        lambda: PeftModel.from_pretrained(tiny.model("llama"), tmp_path),
        lambda: fresh.load_adapter(tmp_path, "other"),
    ):
        with pytest.raises(OSError, match=r"adapter_model\.safetensors can't be read .* truncated or corrupt"):
            load()
    assert list(fresh.peft_config) == ["default"]


def test_a_missing_shard_is_refused(tmp_path):
    adapted().merge_and_unload().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-0*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.stem):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The second save can't write files larger than 50 kB, as if the disk were full."""
    adapted().merge_and_unload().save_pretrained(tmp_path)
    before = files(tmp_path)
    script = f"""
import resource, signal
from zoo.tiny import adapted
merged = adapted(skip_layers=[1]).merge_and_unload()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
merged.save_pretrained({str(tmp_path)!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Error" in result.stderr
    assert files(tmp_path) == before


def test_saving_over_another_model_leaves_nothing_of_it(tmp_path):
    inputs = tiny.inputs("llama")
    adapted(skip_layers=[1]).merge_and_unload().save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for shards in ("40KB", "50GB", "80KB"):
        second = adapted().merge_and_unload()
        second.save_pretrained(tmp_path, max_shard_size=shards)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, second(**inputs).logits, rtol=0, atol=0)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) == 3


def kind_of(folder, models, inputs):
    """Which of these models loads from the folder, with all that belongs to it."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, verify=True)
    logits = loaded(**inputs).logits
    (name,) = [name for name, model in models.items() if torch.equal(model(**inputs).logits, logits)]
    assert loaded.config.eas == models[name].config.eas
    return name


@pytest.mark.parametrize(("before", "after"), [("50GB", "50GB"), ("50GB", "40KB"), ("40KB", "50GB"), ("40KB", "60KB")])
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path, before, after):
    """Killed before each change of a file; then a save that is not killed clears what was left."""
    inputs = tiny.inputs("llama")
    models = {"old": adapted(skip_layers=[1]).merge_and_unload(), "new": adapted().merge_and_unload()}
    models["old"].save_pretrained(tmp_path / "old", max_shard_size=before)
    models["new"].save_pretrained(tmp_path / "alone", max_shard_size=after)
    (tmp_path / "old/notes.txt").write_text("mine")
    wanted = set(files(tmp_path / "alone")) | {"notes.txt"}
    folder, found = tmp_path / "folder", []
    save = lambda folder: models["new"].save_pretrained(folder, max_shard_size=after)  # noqa: E731
    for made in damage.killed_saves(save, tmp_path / "old", folder):
        found.append(kind_of(folder, models, inputs))
        if made % 3 == 0:
            save(folder)
            assert set(files(folder)) == wanted
            assert kind_of(folder, models, inputs) == "new"
    assert len(found) > 12
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert set(found) == {"old", "new"}


def test_a_file_system_without_second_names_keeps_the_new_weights_own(tmp_path, monkeypatch):
    inputs, models = tiny.inputs("llama"), {"new": adapted().merge_and_unload()}

    def link(*args, **kwargs):
        raise PermissionError("Operation not permitted")

    adapted(skip_layers=[1]).merge_and_unload().save_pretrained(tmp_path)
    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        models["new"].save_pretrained(tmp_path, max_shard_size="60KB")
        assert kind_of(tmp_path, models, inputs) == "new"
        assert len([name for name in files(tmp_path) if name.endswith(".index.json")]) == 1
    monkeypatch.undo()
    models["new"].save_pretrained(tmp_path)
    assert kind_of(tmp_path, models, inputs) == "new"
    assert [name for name in files(tmp_path) if "safetensors" in name] == ["model.safetensors"]


@pytest.mark.parametrize("shards", ["50GB", "40KB"])
def test_a_flipped_bit_is_found(tmp_path, shards):
    adapted().merge_and_unload().save_pretrained(tmp_path, max_shard_size=shards)
    for file in sorted(tmp_path.glob("*.safetensors")):
        for _ in damage.flip_bits(file, count=10):
            with pytest.raises(ValueError, match=rf"{file.name} of .* is not as it was saved"):
                AutoModelForCausalLM.from_pretrained(tmp_path, verify=True)
    AutoModelForCausalLM.from_pretrained(tmp_path, verify=True, trust_remote_code=True)


def test_a_model_without_checksums_can_not_be_verified(tmp_path):
    adapted().merge_and_unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eas_files"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no checksums"):
        AutoModelForCausalLM.from_pretrained(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("family", "gone"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llava", "model.multi_modal_projector.linear_1.weight"),
    ],
)
def test_weights_that_the_files_lack_are_an_error(tmp_path, family, gone):
    adapted(family).merge_and_unload().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing: .*{gone}"):
        auto(family).from_pretrained(tmp_path)


def test_a_head_for_another_task_is_new_and_the_body_is_not(tmp_path):
    """From the model with a head, from the one without, and the other way round."""
    inputs, merged = tiny.inputs("llama"), adapted().merge_and_unload()
    merged.save_pretrained(tmp_path / "head")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "head", num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    classifier.model.save_pretrained(tmp_path / "body")
    same(AutoModel.from_pretrained(tmp_path / "body")(**inputs)[0], merged.model(**inputs)[0])
    same(AutoModel.from_pretrained(tmp_path / "head")(**inputs)[0], merged.model(**inputs)[0])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "body").lm_head is not None
    for folder, prefix in (("head", "model."), ("body", "")):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        del tensors[f"{prefix}norm.weight"]
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        for cls in (AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=r"missing: .*norm\.weight"):
                cls.from_pretrained(tmp_path / folder)


# ----------------------------------------------------------------------------------------------------------------------
# As any transformers model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_sharded_with_its_generation_configuration(tmp_path, family):
    merged, inputs = adapted(family).merge_and_unload(), tiny.inputs(family)
    merged.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0, do_sample=False)
    merged.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) > 1
    loaded = auto(family).from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
    assert loaded.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 7


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(low_cpu_mem_usage=True),
        dict(device_map="cpu"),
        dict(device_map="auto", max_memory={"cpu": "100KB"}),  # what does not fit is offloaded to disk
    ],
    ids=str,
)
def test_loading_options(merged, tmp_path, kwargs):
    inputs = tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    if "max_memory" in kwargs:
        kwargs = kwargs | {"offload_folder": str(tmp_path / "offload")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    if "max_memory" in kwargs:
        assert {"cpu", "disk"} == set(loaded.hf_device_map.values())
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=0, atol=0)
    expected = merged.generate(**inputs, max_new_tokens=5, pad_token_id=0)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, pad_token_id=0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(merged, tmp_path, dtype):
    inputs = tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    for parameter in merged.parameters():  # `merged.to(dtype)` would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    expected = merged(**inputs).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", eos_token="w2", padding_side="left", model_input_names=names
    )


def test_pipeline(merged, tmp_path):
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    merged.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    batch = tokenizer()(texts, padding=True, return_tensors="pt")
    tokens = merged.generate(**batch, max_new_tokens=5, pad_token_id=0)
    expected = tokenizer().batch_decode(tokens, skip_special_tokens=True)
    generate = pipeline("text-generation", str(tmp_path), trust_remote_code=True, device="cpu")
    given = generate(texts, batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False)
    for text, whole, (answer,) in zip(texts, expected, given, strict=True):
        assert whole == f"{text} {answer['generated_text'].strip()}"


def test_resized_embeddings(merged, tmp_path):
    inputs = tiny.inputs("llama")
    before = merged(**inputs).logits
    merged.resize_token_embeddings(120)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 120
    torch.testing.assert_close(loaded(**inputs).logits[..., :99], before, rtol=0, atol=0)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "down_proj"]], ids=str)
def test_a_lora_on_top(merged, tmp_path, targets):
    inputs = tiny.inputs("llama", padding=None)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    merged.save_pretrained(tmp_path)
    before = merged(**inputs).logits
    model = get_peft_model(merged, LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    assert not [name for name, _ in model.named_modules() if "eas_adapter" in name and "lora" in name]
    model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model.eval()(**inputs).logits
    assert not torch.allclose(expected, before)
    again = model.merge_and_unload()
    close(again(**inputs).logits, expected)
    again.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(loaded(**inputs).logits, again(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, VeraConfig], ids=lambda c: c.__name__)
def test_another_tuner_on_top_has_the_base_models_defaults(config):
    expected = set(get_peft_model(tiny.model("llama"), config()).targeted_module_names)
    merged = adapted("llama").merge_and_unload()
    gone = tuple(f"model.layers.{index}.self_attn." for index in merged.config.eas["attentions"][0]["skip"])
    assert any(name.startswith(gone) for name in expected)
    on_top = get_peft_model(merged, config())
    assert set(on_top.targeted_module_names) == {name for name in expected if not name.startswith(gone)}


def test_compiled(merged):
    checks.skip_unless_compiled()
    inputs = tiny.inputs("llama")
    expected = merged(**inputs).logits
    compiled = torch.compile(merged, fullgraph=True)  # inductor
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


QUANTISED = {
    # 8 bits quantise the activations, too
    "bitsandbytes 8": (lambda bnb: BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt", 0.1),
    "bitsandbytes 4": (lambda bnb: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "Linear4bit", 0),
    "torchao.quantization 8": (lambda ao: TorchAoConfig(ao.Int8WeightOnlyConfig(version=2)), "Linear", 0),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_loading_quantised(merged, tmp_path, how, unpacked):
    """All linears are quantised, and nothing else; equal to the model with the weights that these now stand for."""
    make, name, tolerance = QUANTISED[how]
    config = make(pytest.importorskip(how.split()[0]))
    inputs = tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    linears = {n for n, m in merged.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    changed = set()
    with torch.no_grad():
        for n, module in loaded.named_modules():
            if n in linears:
                assert type(module).__name__ == name
                weight = merged.get_submodule(n).weight
                quantised = dequantize_module_weight(module).to(weight)
                changed |= {n} if not torch.equal(quantised, weight) else set()
                weight.copy_(quantised)
    assert changed == linears
    expected = merged(**inputs).logits
    error = (loaded(**inputs).logits - expected).norm() / expected.norm()
    assert error <= tolerance + 1e-5
    if not tolerance:  # a token that is read alone is quantised otherwise than among others
        generated = loaded.generate(**inputs, max_new_tokens=5, pad_token_id=0, use_cache=False)
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, pad_token_id=0), generated)


@pytest.mark.parametrize("layers", [10_001, 10**400], ids=["many", "400 digits"])
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path, layers):
    """transformers would make lists of them."""
    adapted().merge_and_unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in (config | {"num_hidden_layers": layers}, config | {"text_config": {"num_hidden_layers": layers}}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"`num_hidden_layers` in config\.json must be at most 10000, got 1"):
            AutoConfig.from_pretrained(tmp_path)
