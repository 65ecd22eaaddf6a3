"""Generation with every kind of cache against `use_cache=False`, unmerged and merged."""

import copy
import gc
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, QuantizedCache, StaticCache
from zoo import tiny

from peft_eas import EASConfig

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
        tiny.model(family), EASConfig(**dict(skip_layers=skip_layers, propagation="mean") | settings)
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


@pytest.mark.parametrize("settings", [dict(), dict(propagation="none")], ids=str)
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
    model, assistant = adapted("llama", [0, 3], state), adapted("llama", [1, 2], "merged")
    inputs = tiny.inputs("llama", rows=1)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)
    base = tiny.model("llama")  # the other way round
    assert torch.equal(generate(base, inputs, assistant_model=model), generate(base, inputs))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("length", [None, 4, 20])
@pytest.mark.parametrize("settings", [dict(), dict(propagation="none")], ids=str)
def test_classifier_free_guidance(state, length, settings):
    """By hand: both sequences, without caches."""
    model = adapted("llama", [0, 3], state, **settings)
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    other = ids[:, -1:] if length is None else tiny.inputs("llama", rows=1, padding=None, seed=5)["input_ids"]
    other = other.repeat(1, 3)[:, : length or 1]
    negative = {} if length is None else dict(negative_prompt_ids=other)
    actual = generate(model, dict(input_ids=ids), guidance_scale=1.5, **negative)
    sequences = [ids, other]
    for _ in range(9):
        with torch.no_grad():
            scores = [model(sequence).logits[:, -1].log_softmax(-1) for sequence in sequences]
        guided = scores[1] + 1.5 * (scores[0] - scores[1])
        guided[:, tiny.IMAGE_TOKEN] = -torch.inf
        sequences = [torch.cat([sequence, guided.argmax(-1)[:, None]], dim=1) for sequence in sequences]
    assert torch.equal(actual, sequences[0])


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
@pytest.mark.parametrize("settings", [dict(), dict(propagation="none")], ids=str)
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
                logits[..., tiny.IMAGE_TOKEN] = -torch.inf
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
@pytest.mark.parametrize("shared", [True, False])
def test_two_generations_and_a_training_in_threads_do_not_mix(state, shared):
    models = [adapted("llama", [0, 3], state)] * 2 if shared else [adapted("llama", [i], state) for i in (0, 3)]
    trained = adapted("llama", [1, 2])
    at_first = copy.deepcopy(trained.state_dict())
    prompts = [tiny.inputs("llama", rows=2, length=7 + seed, seed=seed) for seed in range(2)]

    def generated(i):
        return [generate(models[i], prompts[i], cache_implementation=cache) for cache in (None, "static")]

    def losses():
        trained.train().load_state_dict(at_first)
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(8):
            loss = trained(**prompts[0], labels=prompts[0]["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    works = [lambda: generated(0), lambda: generated(1), losses]
    expected = [work() for work in works]
    assert expected[2][-1] < expected[2][0]
    actual = [[], [], []]

    def again(i):
        barrier.wait()
        actual[i] += [works[i]() for _ in range(3)]

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=again, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(actual[i]) == 3
        assert all(torch.equal(a, e) for some in actual[i] for a, e in zip(some, expected[i], strict=True))
    assert actual[2] == [expected[2]] * 3


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
@pytest.mark.parametrize("propagation", ["none", "mean"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_a_skipped_attention_caches(family, propagation, state):
    """Nothing; or the numbers of its rank for each token."""
    model, inputs = adapted(family, [0, 3], state, propagation=propagation, r_pia=8), tiny.inputs(family)
    stock = tiny.model(family)
    caches = [m(**inputs, use_cache=True).past_key_values for m in (model, stock)]

    def sizes(cache):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return [sum(0 if t is None else t.numel() for t in pair) for pair in pairs]

    actual, whole = map(sizes, caches)
    a_token = 2 * stock.config.get_text_config().num_key_value_heads * caches[1].layers[0].keys.shape[-1]
    expected = [size // a_token * (8 if propagation == "mean" else 0) for size in whole]
    assert actual == [expected[i] if i in (0, 3) else size for i, size in enumerate(whole)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("cache", [dict(), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_chunked_prefill(family, cache, state):
    model, inputs = adapted(family, [0, 3], state), tiny.inputs(family)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, prefill_chunk_size=4, **cache), expected)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_second_turn(family, state):
    """Goes on from the cache of the first, and from copies of it."""
    model = adapted(family, [0, 3], state)
    ids = tiny.inputs(family, rows=1, padding=None)["input_ids"]
    first = generate(model, dict(input_ids=ids), max_new_tokens=4, return_dict_in_generate=True)
    for seed in (1, 2):
        other = tiny.inputs(family, rows=1, padding=None, seed=seed)["input_ids"]
        turn = torch.cat([first.sequences, other], dim=1)
        cache = copy.deepcopy(first.past_key_values)
        second = generate(model, dict(input_ids=turn), past_key_values=cache)
        assert torch.equal(second, generate(model, dict(input_ids=turn), use_cache=False))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_rows_of_a_cache(family, state):
    """Reordered, repeated, chosen and cropped, it is the cache of such rows."""
    model = adapted(family, [0, 3], state)
    ids = tiny.inputs(family, rows=3, length=5, padding=None)[
        "input_ids"
    ]  # within the window, or none could be cropped

    def cache_of(ids):
        return model(ids, use_cache=True).past_key_values

    changed = [
        (ids[[2, 0, 0]], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        (ids.repeat_interleave(2, dim=0), lambda cache: cache.batch_repeat_interleave(2)),
        (ids[[1]], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        (ids[:, :-2], lambda cache: cache.crop(-2)),
    ]
    for expected, change in changed:
        cache, following = cache_of(ids), expected[:, :2]
        change(cache)
        actual = model(following, past_key_values=cache).logits
        torch.testing.assert_close(
            actual, model(torch.cat([expected, following], dim=1)).logits[:, -2:], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_packed_rows(state):
    model = adapted("llama", [0, 3], state)
    ids = tiny.inputs("llama", rows=2, padding=None)["input_ids"]
    positions = torch.arange(ids.shape[1]).repeat(2)[None]
    packed = model(ids.flatten()[None], position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(row[None]).logits for row in ids], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("propagation", ["none", "mean"])
def test_a_forward_is_a_forward(propagation, state):
    """Whichever method is called, and it leaves nothing behind in the process."""
    model, inputs = adapted("llama", [0, 3], state, propagation=propagation), tiny.inputs("llama")
    inner = model if state == "merged" else model.base_model.model
    expected = model(**inputs).logits
    torch.testing.assert_close(inner.forward(**inputs).logits, expected, rtol=0, atol=0)
    del expected

    def graphs():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())

    model.requires_grad_(True)
    before = graphs()
    model(**inputs)
    assert graphs() == before


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "paged|sdpa"])
def test_masks_that_can_not_be_read_are_refused(implementation):
    model = adapted("llama", [0, 3], "merged")
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'.*propagation='none'"):
        model.model.layers[0].self_attn(torch.randn(1, 3, 32), attention_mask=None)


def test_a_cache_filled_with_other_attentions_skipped_is_refused():
    model = adapted("llama", [0, 3])
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.set_skip_layers([1])
    with pytest.raises(ValueError, match="new cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    model.set_skip_layers([0, 3])
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="new cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("settings", [dict(), dict(propagation="none")], ids=str)
@torch.no_grad()
def test_quantised_caches(settings, state):
    """As near to no cache as in a model with all of its attentions, or twice as far."""
    pytest.importorskip("optimum.quanto")
    inputs = tiny.inputs("llama", rows=2, length=40, padding=None)["input_ids"]

    def error(model):
        config = model.get_base_model().config if state != "merged" and model is not stock else model.config
        cache = QuantizedCache("quanto", config, nbits=4, q_group_size=16, residual_length=4)
        parts = (inputs[:, :16], *inputs[:, 16:].split(1, dim=1))
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
        expected = model(inputs).logits
        return float((logits - expected).norm() / expected.norm())

    stock, model = tiny.model("llama"), adapted("llama", [0, 3], state, **settings)
    assert 1e-3 < error(model) < 2 * error(stock)
