"""Generation with every kind of cache against `use_cache=False`, unmerged and merged."""

import threading

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from peft_eas import EASConfig, prompt_mask

STATES = ["unmerged", "folded", "merged"]
MODES = {
    "dynamic": dict(),
    "static": dict(cache_implementation="static"),
    "beams": dict(num_beams=3),
    "beam-sampling": dict(num_beams=3, do_sample=True),
    "sampling": dict(do_sample=True, temperature=1.5),
    "several": dict(do_sample=True, num_return_sequences=3),
    "quantities": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
}


def adapted(family, skip_layers, state="unmerged", **settings):
    model = get_peft_model(
        tiny.model(family), EASConfig(**dict(skip_layers=skip_layers, propagation="prompt") | settings)
    ).eval()
    tiny.shake(model)
    if state == "folded":
        model.merge_adapter()
    return model.merge_and_unload().eval() if state == "merged" else model


def generate(model, inputs, **kwargs):
    torch.manual_seed(0)
    settings = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, suppress_tokens=[tiny.IMAGE_TOKEN]) | kwargs
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("skip_layers", tiny.SKIP_SETS.values(), ids=tiny.SKIP_SETS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_is_uncached_for_every_skip_set(family, skip_layers, state):
    model, inputs = adapted(family, skip_layers, state), tiny.inputs(family)
    expected = generate(model, inputs, use_cache=False)
    assert len(expected.unique()) > 6, "a model that repeats itself shows nothing"
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("settings", [dict(), dict(router="prompt"), dict(propagation="none")], ids=str)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cached_is_uncached_in_every_mode(family, mode, state, settings):
    model, inputs = adapted(family, [0, 3], state, **settings), tiny.inputs(family)
    expected = generate(model, inputs, **mode | {"use_cache": False, "cache_implementation": None})
    assert torch.equal(generate(model, inputs, **mode), expected)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_prompt_lookup_decoding(family, state):
    model = adapted(family, [0, 1, 3], state)
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    expected = generate(model, dict(input_ids=ids), use_cache=False, max_new_tokens=12)
    actual = generate(model, dict(input_ids=ids), prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("state", STATES)
def test_assisted_decoding(state):
    model, assistant = adapted("llama", [0, 3], state), adapted("llama", [1, 2], "merged", router="prompt")
    inputs = tiny.inputs("llama", rows=1)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)
    base = tiny.model("llama")  # the other way round, with a model that knows nothing of prompts
    assert torch.equal(generate(base, inputs, assistant_model=model), generate(base, inputs))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("length", [None, 4, 20])
@pytest.mark.parametrize("settings", [dict(), dict(router="prompt")], ids=str)
def test_classifier_free_guidance(state, length, settings):
    """Both sequences have a prompt of their own; by hand: without caches, and with masks."""
    model = adapted("llama", [0, 3], state, **settings)
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    other = ids[:, -1:] if length is None else tiny.inputs("llama", rows=1, padding=None, seed=5)["input_ids"]
    other = other.repeat(1, 3)[:, : length or 1]
    negative = {} if length is None else dict(negative_prompt_ids=other)
    actual = generate(model, dict(input_ids=ids), guidance_scale=1.5, **negative)
    starts, sequences = [ids.shape[1], other.shape[1]], [ids, other]
    for _ in range(9):
        scores = []
        for start, sequence in zip(starts, sequences, strict=True):
            with torch.no_grad(), prompt_mask(torch.arange(sequence.shape[1])[None] < start):
                scores.append(model(sequence).logits[:, -1].log_softmax(-1))
        guided = scores[1] + 1.5 * (scores[0] - scores[1])
        guided[:, tiny.IMAGE_TOKEN] = -torch.inf
        sequences = [torch.cat([sequence, guided.argmax(-1)[:, None]], dim=1) for sequence in sequences]
    assert torch.equal(actual, sequences[0])
    with pytest.raises(ValueError, match="use_cache=True"):
        generate(model, dict(input_ids=ids), guidance_scale=1.5, use_cache=False, **negative)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_left_padded_row_gives_what_it_gives_alone(family, state):
    model, inputs = adapted(family, [0, 3], state), tiny.inputs(family)
    together = generate(model, inputs)
    for row in range(1, 3):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        start = 2 * row
        alone |= {k: alone[k][:, start:] for k in ("input_ids", "attention_mask")}
        assert torch.equal(generate(model, alone)[0], together[row, start:])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("settings", [dict(), dict(router="prompt")], ids=str)
def test_interleaved_generations_do_not_mix(state, settings):
    model = adapted("llama", [0, 3], state, **settings)
    prompts = [tiny.inputs("llama", rows=2, padding=None, seed=seed)["input_ids"] for seed in (1, 2)]
    expected = [generate(model, dict(input_ids=ids), use_cache=False) for ids in prompts]
    caches, ids = [DynamicCache(), DynamicCache()], list(prompts)
    given = list(prompts)
    with torch.no_grad():
        for _ in range(9):
            for i in range(2):
                logits = model(input_ids=given[i], past_key_values=caches[i], use_cache=True).logits
                given[i] = logits[:, -1:].argmax(-1)
                ids[i] = torch.cat([ids[i], given[i]], dim=1)
    assert all(torch.equal(a, b) for a, b in zip(ids, expected, strict=True))


@pytest.mark.parametrize("state", STATES)
def test_generations_in_threads_do_not_mix(state):
    model = adapted("llama", [0, 3], state)
    prompts = [tiny.inputs("llama", rows=2, length=7 + seed, seed=seed) for seed in range(4)]
    expected = [generate(model, inputs) for inputs in prompts]
    actual = [None] * 4

    def work(i):
        actual[i] = [generate(model, prompts[i]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, e) for some, e in zip(actual, expected, strict=True) for a in some)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_static_cache_can_be_reset_and_used_again(family, state):
    model = adapted(family, [0, 3], state)
    cache = StaticCache(config=model.config, max_cache_len=24)
    for seed in (1, 2):
        ids = tiny.inputs(family, rows=2, padding=None, seed=seed)["input_ids"]
        cache.reset()
        expected = generate(model, dict(input_ids=ids), use_cache=False)
        assert torch.equal(generate(model, dict(input_ids=ids), past_key_values=cache), expected)


@pytest.mark.parametrize("state", STATES)
def test_inputs_embeds(state):
    model, inputs = adapted("llama", [0, 3], state), tiny.inputs("llama")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(generate(model, given), generate(model, inputs)[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_skipped_attention_caches_nothing(family, state):
    model, inputs = adapted(family, [0, 3], state), tiny.inputs(family)
    stock = tiny.model(family)
    caches = [m(**inputs, use_cache=True).past_key_values for m in (model, stock)]

    def size(cache):
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert size(caches[0]) * 6 == size(caches[1]) * 4


def test_chunked_prefill_is_refused_with_propagation_and_exact_without():
    inputs = tiny.inputs("llama", padding=None)
    with pytest.raises(ValueError, match="chunked prefill"):
        generate(adapted("llama", [0, 3]), inputs, prefill_chunk_size=4)
    model = adapted("llama", [0, 3], propagation="none")
    assert torch.equal(generate(model, inputs, prefill_chunk_size=4), generate(model, inputs))


@pytest.mark.parametrize("state", STATES)
def test_a_second_turn_is_refused_and_a_continuation_is_not(state):
    model = adapted("llama", [0, 3], state)
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    full = generate(model, dict(input_ids=ids), max_new_tokens=9)
    first = generate(model, dict(input_ids=ids), max_new_tokens=4, return_dict_in_generate=True)
    # the output goes on where it ended ...
    resumed = generate(model, dict(input_ids=first.sequences), past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(resumed, full)
    # ... but more of a prompt can't be added
    turn = torch.cat([full, ids], dim=1)
    with pytest.raises(ValueError, match="a further turn"):
        generate(model, dict(input_ids=turn), past_key_values=first.past_key_values)


@pytest.mark.parametrize("state", STATES)
def test_several_tokens_on_a_cache_have_to_be_declared(state):
    model = adapted("llama", [0, 3], state)
    ids = tiny.inputs("llama", rows=2, padding=None)["input_ids"]
    prompt, rest = ids[:, :6], ids[:, 6:]
    mask = torch.zeros_like(ids)
    mask[:, :6] = 1
    with torch.no_grad():
        with prompt_mask(mask):
            expected = model(input_ids=ids).logits[:, 6:]
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="prompt_mask"):
            model(input_ids=rest, past_key_values=cache)
        with prompt_mask(torch.zeros_like(rest)):
            actual = model(input_ids=rest, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_filled_with_other_attentions_skipped_is_refused():
    model = adapted("llama", [0, 3])
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.set_skip_layers([1])
    with pytest.raises(ValueError, match="new cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    model.set_skip_layers([0])
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="new cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)
