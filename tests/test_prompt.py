"""Which tokens count as the prompt: never an answer, never padding; and a clear error where nobody can know."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, LlamaModel

from peft_eas import EASConfig, prompt_mask

SETTINGS = [dict(), dict(router="prompt"), dict(router="prompt", propagation="none")]


def adapted(family="llama", merged=False, base=None, **settings):
    model = get_peft_model(
        base or tiny.model(family), EASConfig(**dict(skip_layers=[0, 3], propagation="prompt") | settings)
    ).eval()
    tiny.shake(model)
    return model.merge_and_unload().eval() if merged else model


def labelled(inputs, count=4):
    labels = inputs["input_ids"].clone()
    labels[:, :-count] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_answers_do_not_reach_earlier_tokens(settings, train, merged):
    """Causality: with labels, changing an answer token changes no logit before it."""
    model, inputs = adapted(merged=merged, **settings).train(train), tiny.inputs("llama")
    labels = labelled(inputs)
    first = model(**inputs, labels=labels).logits
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -2] = 50
    second = model(**changed, labels=labels).logits
    torch.testing.assert_close(second[:, :-2], first[:, :-2], rtol=0, atol=0)
    assert not torch.allclose(second[:, -2:], first[:, -2:])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_second_question_does_not_reach_the_first_answer(settings, merged):
    """Causality in a conversation, where tokens without a label follow tokens with one."""
    model, inputs = adapted(merged=merged, **settings).train(), tiny.inputs("llama", padding=None)
    labels = labelled(inputs, 6)
    labels[:, -4:-2] = -100
    first = model(**inputs, labels=labels).logits
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -4:-2] = 50
    second = model(**changed, labels=labels).logits
    torch.testing.assert_close(second[:, :-4], first[:, :-4], rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(settings, side, merged):
    model, inputs = adapted(merged=merged, **settings), tiny.inputs("llama", padding=side)
    expected = model(**inputs).logits
    kept = inputs["attention_mask"].bool()
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(~kept, 77)}
    torch.testing.assert_close(model(**other).logits[kept], expected[kept], rtol=0, atol=0)
    for row, mask in enumerate(kept):
        alone = model(input_ids=inputs["input_ids"][row : row + 1, mask]).logits[0]
        torch.testing.assert_close(alone, expected[row, mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_training_and_inference_pool_the_same_prompt(merged):
    """What the prompt's tokens see in training is what they see in a prefill of the prompt alone."""
    model, inputs = adapted(merged=merged), tiny.inputs("llama")
    in_training = model.train()(**inputs, labels=labelled(inputs)).logits[:, :-4]
    prefill = model.eval()(**{k: v[:, :-4] for k, v in inputs.items()}).logits
    kept = inputs["attention_mask"][:, :-4].bool()
    torch.testing.assert_close(in_training[kept], prefill[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_without_labels_is_refused(settings, merged):
    model, inputs = adapted(merged=merged, **settings).train(), tiny.inputs("llama")
    with pytest.raises(ValueError, match=r"without `labels`.*prompt_mask.*propagation='none'"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)  # nothing is trained here
    model.requires_grad_(True)
    with prompt_mask(inputs["attention_mask"]):
        model(**inputs).logits.sum().backward()


def test_training_without_labels_is_fine_without_prompt():
    adapted(propagation="none").train()(**tiny.inputs("llama")).logits.sum().backward()


@pytest.mark.parametrize("merged", [False, True])
def test_a_row_without_prompt_is_refused(merged):
    model, inputs = adapted(merged=merged).train(), tiny.inputs("llama", padding=None)
    labels = labelled(inputs)
    labels[1] = inputs["input_ids"][1]
    with pytest.raises(ValueError, match=r"empty in row\(s\) \[1\]"):
        model(**inputs, labels=labels)


@pytest.mark.parametrize("merged", [False, True])
def test_an_explicit_mask(merged):
    model, inputs = adapted(merged=merged), tiny.inputs("llama")
    labels = labelled(inputs)
    expected = model(**inputs, labels=labels).logits
    with prompt_mask((labels == -100).long()):  # padding is left out by itself
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shape \(3, 10\).*\(3, 11\)"), prompt_mask(torch.ones(3, 10)):
        model(**inputs)
    assert not torch.allclose(model(**inputs).logits, expected), "the mask is forgotten afterwards"


@pytest.mark.parametrize("merged", [False, True])
def test_packed_rows_are_refused(merged):
    model = adapted(merged=merged)
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed row.*rows that are not packed"):
        model(input_ids=ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=6, max_length_k=6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="packed row"):
        model(input_ids=ids, position_ids=positions)


@pytest.mark.parametrize("merged", [False, True])
def test_a_four_dimensional_mask(merged):
    """As `generate` prepares it for static caches."""
    model, inputs = adapted(merged=merged), tiny.inputs("llama")
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    causal = torch.ones(11, 11).tril().bool() & kept[:, None, None, :]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions).logits
    for mask in (causal, torch.where(causal, 0.0, torch.finfo(torch.float32).min)):
        actual = model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classifiers_pool_all_tokens(auto, merged):
    """Their labels are no tokens: the whole text is the prompt, with labels or without."""
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.classifier_dropout = 0.0
    base = auto.from_config(config)
    model, inputs = adapted(merged=merged, base=base), tiny.inputs("llama")
    labels = torch.tensor([0, 1, 1])
    if auto is AutoModelForTokenClassification:
        labels = torch.ones_like(inputs["input_ids"])
        labels[:, :3] = -100
    expected = model(**inputs).logits
    torch.testing.assert_close(model.train()(**inputs, labels=labels).logits, expected, rtol=1e-5, atol=1e-6)
    with prompt_mask(inputs["attention_mask"]):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_head_pools_all_tokens():
    torch.manual_seed(0)
    model, inputs = adapted(base=LlamaModel(tiny.config("llama"))), tiny.inputs("llama")
    expected = model(**inputs).last_hidden_state
    with prompt_mask(inputs["attention_mask"]):
        torch.testing.assert_close(model.train()(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
