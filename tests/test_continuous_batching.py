"""transformers' continuous batching (`generate_batch`): each request gives what `generate` gives for it alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig
from zoo import tiny

from peft_eas import EASConfig

STATES = ["unmerged", "merged"]
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"  # before 5.17
# smaller than the requests: prompts are read in parts, and wait for one another
SMALL = dict(num_blocks=12, max_batch_tokens=8, use_cuda_graph=False) | {PAGE: 4}


def adapted(family, state, propagation="none", attention="sdpa"):
    base = tiny.model(family, attn_implementation=attention)
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3], propagation=propagation)).eval()
    tiny.shake(model)
    return model.merge_and_unload().eval() if state == "merged" else model


def prompts():
    """Of different lengths; two have so many tokens in common that they share pages of the cache."""
    ids = tiny.inputs("llama", rows=5, length=14, padding=None)["input_ids"].tolist()
    return [ids[0], ids[0][:10] + ids[1][:3], ids[2][:3], ids[3][:9], ids[4][:1]]


def check(model, **settings):
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        for ids in prompts()
    ]
    assert len({token for tokens in expected for token in tokens}) > 3, "a model that repeats itself shows nothing"
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    results = model.generate_batch(
        prompts(), generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**settings),
        progress_bar=False,
    )  # fmt: skip
    assert [result.generated_tokens for result in results.values()] == expected


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_small_batches(family, state):
    check(adapted(family, state), **SMALL)


@pytest.mark.parametrize("state", STATES)
def test_with_eager_attention(state):
    """Which is to be replaced by one that knows of pages."""
    check(adapted("llama", state, attention="eager"), **{PAGE: 16}, num_blocks=32, max_batch_tokens=64)


@pytest.mark.parametrize("state", STATES)
def test_what_reads_masks_is_refused_before_anything_runs(state):
    model = adapted("llama", state, "mean")
    with pytest.raises(ValueError, match=r"continuous batching.*propagation='none'"):
        model.generate_batch(prompts(), continuous_batching_config=ContinuousBatchingConfig(**SMALL))
    if state == "unmerged":
        model.set_skip_layers([])
        check(model, **SMALL)
