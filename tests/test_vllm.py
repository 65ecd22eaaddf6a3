"""Merged models in vLLM's Transformers backend: what it looks for in them, and, where there is a vLLM, the real one.

vLLM pins versions of its own, so the real one is run by another interpreter, which has vLLM and need not have peft_eas:

    PEFT_EAS_VLLM_PYTHON=path/to/python pytest tests/test_vllm.py
"""

import ast
import inspect
import json
import os
import re
import subprocess
import textwrap

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import tiny

from peft_eas import EASConfig
from peft_eas.runtime.eas_attention import SkippedAttention

PYTHON = os.environ.get("PEFT_EAS_VLLM_PYTHON")
SIZES = dict(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HEAD = {"head_dim": 32}
WINDOW = {"head_dim": 32, "sliding_window": 16}
ALL = {"num_key_value_heads": None}  # as many as of queries
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen3": HEAD,
    "gemma3_text": WINDOW,
    "olmo2": {},
    "gpt_neox": ALL,
    "mixtral": EXPERTS,
    "qwen2": {},
    "gemma2": WINDOW,
    "phi3": {},
    "phi": ALL,
    "granite": {},
    "starcoder2": {},
    "glm4": HEAD,
    "cohere": {},
    "stablelm": {},
    "smollm3": {},
    "opt": ALL | {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "nemotron": {},
    "exaone4": {},
    "qwen3_moe": HEAD | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
}
SKIP = [0, 2, 5]


def merged(base, **settings):
    model = get_peft_model(base, EASConfig(skip_layers=SKIP, task_type="CAUSAL_LM", **settings))
    tiny.shake(model)
    return model.merge_and_unload().eval()


class Attention(nn.Module):
    """As vLLM's, which is hung on the module of every layer."""

    def get_kv_cache_spec(self, config):
        return "keys and values"


def dispatches(module):
    """Whether vLLM finds an attention by the source of a module: one call of what is read from transformers' table."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))

    def is_read(value):
        value = value.func if isinstance(value, ast.Call) else value
        return isinstance(value, (ast.Attribute, ast.Subscript)) and (
            isinstance(value.value, ast.Name) and value.value.id == "ALL_ATTENTION_FUNCTIONS"
        )

    assigned = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    names = {
        target.id
        for node in assigned if is_read(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }  # fmt: skip
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sum(isinstance(func, ast.Name) and func.id in names for func in calls) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@torch.no_grad()
def test_vllm_finds_an_attention_in_every_layer_and_keeps_nothing_for_skipped_ones(family):
    model, inputs = merged(tiny.model(family)), tiny.inputs(family)
    before, names = model(**inputs).logits, set(model.state_dict())
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn
        assert dispatches(module)
        assert module.layer_idx == index  # how vLLM tells which layer's it is
        attention = Attention()
        module.attn = attention
        is_skipped = isinstance(module, SkippedAttention)
        assert is_skipped is (index in SKIP)
        assert attention.get_kv_cache_spec(None) == (None if is_skipped else "keys and values")
    assert set(model.state_dict()) == names
    assert torch.equal(model(**inputs).logits, before)


def test_skipped_attentions_that_read_their_mask_are_refused_in_vllm():
    """It puts all requests into one row, and has no mask."""
    model, inputs = merged(tiny.model("llama"), propagation="mean"), tiny.inputs("llama", padding=None)
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"propagation='mean'.*'vllm'"):
        model.model.layers[0].self_attn(model.model.embed_tokens(inputs["input_ids"]), attention_mask=None)


RUN = """
import json, os, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(
    folder, trust_remote_code=True, model_impl="transformers", dtype="float32", enforce_eager=True, max_num_seqs=4,
    skip_tokenizer_init=True, max_model_len=256, kv_cache_memory_bytes=2**26, enable_prefix_caching=False,
)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
answers = [
    [[token, logprobs[token].logprob] for token, logprobs in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)]
    for o in outputs
]
kv = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
names = sorted(name for group in kv.kv_cache_groups for name in group.layer_names)
print("ANSWER" + json.dumps([answers, names, sum(t.size for t in kv.kv_cache_tensors)]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not PYTHON, reason="PEFT_EAS_VLLM_PYTHON names no interpreter that has vLLM")
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_generates_what_transformers_does(family, tmp_path):
    torch.manual_seed(0)
    sizes = {key: value for key, value in (SIZES | FAMILIES[family]).items() if value is not None}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
    model = merged(base)
    model.save_pretrained(tmp_path)
    prompts = [torch.randint(3, 320, (length,)).tolist() for length in (5, 23, 40)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [PYTHON, "-c", RUN, str(tmp_path), json.dumps(prompts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    answers, layers, _ = json.loads(done.stdout.rpartition("ANSWER")[2])
    assert [int(re.search(r"\.(\d+)\.", name)[1]) for name in layers] == [i for i in range(6) if i not in SKIP]
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            ran = model.generate(
                torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        assert [token for token, _ in answer] == ran.sequences[0, len(ids) :].tolist()
        expected = [logits.log_softmax(-1).max().item() for logits in ran.logits]
        torch.testing.assert_close(torch.tensor([p for _, p in answer]), torch.tensor(expected), rtol=0, atol=1e-4)
