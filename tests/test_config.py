"""EASConfig: what is allowed, what is refused, and that it survives saving; errors leave the model as it was."""

import itertools
import json
import subprocess
import sys

import attacks
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, OpenAIGPTConfig
from zoo import tiny

from peft_eas import EASConfig
from peft_eas.checks import shown

WRONG = {
    "r": [0, -8, 3, 2.0, True, "8", None, 10**7, 2**63, 10**5000, torch.ones(2)],
    "r_pia": [0, 7, 1.5, None, np.float32(8)],
    "num_skip": [-1, 0.0, 1.0, -0.5, float("nan"), True, "4", 2**63, np.array([1])],
    "skip_layers": [[-1], [1, 1], [1.0], ["a", "a"], "12", 3, [True], [2**63], {1: 2}, itertools.count()],
    "groups": [0, -1, 1.5, True, 5],
    "router": ["dynamic", None, 1],
    "propagation": ["all", None, True],
    "dropout": [-0.1, 1.0, float("nan"), "0"],
    "scaling": [0, float("inf"), float("nan"), None, 1e300, 5e-324, 10**400, torch.tensor(1e5)],
    "use_bias": [None, "none", 1],
    "init_weights": [None, "gaussian"],
    "layers_to_transform": [[-1], [0, 0], ["a"], True, 2**63, np.array(1.0)],
    "target_modules": [1, [1], [""], {"mlp": 1}, [["mlp"]], "[", [None]],
    "exclude_modules": [1, [1], "("],
    "modules_to_save": [1, "lm_head", ["("], [3]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values], ids=shown)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}`") as said:
        EASConfig(**{"groups": 2, name: value})
    assert len(str(said.value)) < 250


def test_numbers_of_numpy_and_torch_are_kept_as_python_s(tmp_path):
    config = EASConfig(
        r=np.int32(4), r_pia=torch.tensor(8), groups=np.array(2), num_skip=np.float64(0.5), scaling=np.float32(0.5),
        dropout=torch.tensor(0.25), use_bias=np.bool_(False), layers_to_transform=np.arange(3),
    )  # fmt: skip
    for name, value in (("r", 4), ("r_pia", 8), ("groups", 2), ("num_skip", 0.5), ("scaling", 0.5), ("dropout", 0.25)):
        assert getattr(config, name) == value
        assert type(getattr(config, name)) is type(value)
    assert config.use_bias is False
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert EASConfig(skip_layers=torch.tensor([3, 1])).skip_layers == [1, 3]


def test_a_random_configuration_is_refused_or_works():
    """A ValueError, or a model of finite logits with something to train; nothing else."""
    seen = attacks.configurations(2000, injected=200)
    assert set(seen) <= {"config refused", "config allowed, no model tried", "model works", "model refused"}
    assert seen["model works"] > 100
    assert seen["model refused"] > 20


def test_wrong_values_are_refused_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = attacks.outcomes(attacks.wrong_calls(tmp_path))
    assert set(seen) == {"works", "refused"}
    assert seen["refused"] > 10 * seen["works"]


def test_num_skip_and_skip_layers_must_agree():
    with pytest.raises(ValueError, match="contradicts"):
        EASConfig(num_skip=3, skip_layers=[1, 2])
    assert EASConfig(num_skip=2, skip_layers=[4, 1]).skip_layers == [1, 4]


@pytest.mark.parametrize(
    ("settings", "count"), [(dict(), 8), (dict(num_skip=3), 3), (dict(num_skip=0.4), 12), (dict(skip_layers=[1, 2]), 2)]
)
def test_count_to_skip(settings, count):
    assert EASConfig(**settings).count_to_skip(30) == count


def test_round_trip(tmp_path):
    config = EASConfig(
        r=4, r_pia=8, skip_layers=[3, 1], groups=4, router="static", propagation="mean", dropout=0.1,
        scaling=0.5, use_bias=False, init_weights=False, layers_to_transform=[0, 1, 3], modules_to_save=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EAS"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EASConfig)
    assert loaded.to_dict() == config.to_dict()


@pytest.fixture
def saved(tmp_path):
    """A base model and an adapter of it, on disk, with what they compute together."""
    base = tiny.model("llama")
    base.save_pretrained(tmp_path / "base")
    inputs = tiny.inputs("llama")
    base.config.name_or_path = base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3], task_type="CAUSAL_LM")).eval()
    tiny.shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, inputs, model(**inputs).logits


def test_peft_model_from_pretrained(saved):
    path, inputs, expected = saved
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(
            tiny.model("llama"), path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert model.skip_layers == [0, 3]
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
        assert not any(p.requires_grad for p in model.parameters())


def test_auto_peft_model(saved):
    path, inputs, expected = saved
    model = AutoPeftModelForCausalLM.from_pretrained(path / "adapter").eval()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_transformers_own_load_adapter(saved):
    path, inputs, expected = saved
    model = AutoModelForCausalLM.from_pretrained(path / "base")
    base_logits = model(**inputs).logits
    model.load_adapter(str(path / "adapter"))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    generated = [model.generate(**inputs, max_new_tokens=6, use_cache=c, pad_token_id=0) for c in (True, False)]
    assert torch.equal(*generated)
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs).logits, base_logits, rtol=0, atol=0)
    # straight from the adapter's folder, whose configuration names the base
    model = AutoModelForCausalLM.from_pretrained(path / "adapter")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_transformers_own_add_adapter():
    model, inputs = tiny.model("llama"), tiny.inputs("llama")
    model.add_adapter(EASConfig(skip_layers=[0, 3], init_weights=False), adapter_name="one")
    model.add_adapter(EASConfig(skip_layers=[2], init_weights=False), adapter_name="two")
    logits = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        logits[name] = model(**inputs).logits
    assert not torch.allclose(logits["one"], logits["two"])
    model.delete_adapter("two")
    model.set_adapter("one")
    torch.testing.assert_close(model(**inputs).logits, logits["one"], rtol=0, atol=0)


def state(model):
    return {n: type(m).__name__ for n, m in model.named_modules()}, {n: p.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(skip_layers=[2, 6]), r"names \[6\]"),
        (dict(num_skip=7), "more than the 6"),
        (dict(skip_layers=list(range(6))), "keep at least one"),
        (dict(num_skip=6), "keep at least one"),
        (dict(skip_layers=[1], layers_to_transform=[2, 3]), r"names \[1\].*\[2, 3\]"),
        (dict(skip_layers=[1], exclude_modules=["layers.1.mlp"]), r"names \[1\]"),
        (dict(target_modules=["q_proj"], skip_layers=[]), "whole attentions and FFNs"),
        (dict(groups=3, r=3, r_pia=3, skip_layers=[1]), "does not divide"),
        (dict(r=64), "at most the model's hidden size, 32"),
        (dict(r_pia=64, skip_layers=[1]), "at most the model's hidden size, 32"),
        (dict(exclude_modules=["self_attn"]), "No attention can be skipped.*`num_skip=0`"),
        (dict(target_modules=r".*\.mlp"), "No attention can be skipped"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_leaves_the_model_alone(settings, message):
    model = tiny.model("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, EASConfig(**settings))
    assert_same(state(model), before)


def assert_same(after, before):
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, value in before[1].items():
        torch.testing.assert_close(after[1][name], value, rtol=0, atol=0)


def test_a_family_that_is_neither_known_nor_learned_is_refused_with_the_nearest():
    model = AutoModelForCausalLM.from_config(OpenAIGPTConfig(n_layer=2, n_embd=8, n_head=2, vocab_size=9))
    before = state(model)
    with pytest.raises(
        ValueError, match=r"'openai-gpt'.*nearest.*'opt'.*register_family\(.*could not be learned.*: .*"
    ):
        get_peft_model(model, EASConfig(skip_layers=[1]))
    assert_same(state(model), before)
    with pytest.raises(ValueError, match="nearest"):
        get_peft_model(torch.nn.Linear(2, 2), EASConfig(skip_layers=[1]))


def test_a_failed_second_adapter_leaves_the_first():
    model, inputs = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1])).eval(), tiny.inputs("llama")
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match="names"):
        model.add_adapter("other", EASConfig(skip_layers=[9]))
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_other_tuners_still_work():
    inputs = tiny.inputs("llama")
    model = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(model(**inputs).logits, tiny.model("llama")(**inputs).logits, rtol=0, atol=0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == 12
    assert all("lora_" in name for name in trained)


def test_importing_the_package_imports_no_model_and_no_trainer():
    script = """
import sys, torch, transformers, peft
before = set(sys.modules)
import peft_eas
from transformers import AutoConfig
new = sorted(set(sys.modules) - before)
print([name for name in new if name.startswith(("transformers.models.", "transformers.trainer.", "datasets"))])
print(type(AutoConfig.for_model("eas_qwen3_moe")).__name__)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "EASQwen3MoeConfig"]
