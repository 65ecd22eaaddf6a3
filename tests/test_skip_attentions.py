"""Attentions taken out of a pretrained model before it is trained."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5EncoderModel
from zoo import families, tiny

from peft_eas import score_attentions, skip_attentions

SKIPPED = [1, 4]


def batches(family):
    return [tiny.inputs(family, seed=seed, rows=4, length=12) for seed in (1, 2)]


@torch.no_grad()
def with_means(family, data):
    """The model with hooks that put in place of two attentions the mean of what they give, of all tokens that are not
    padding and not the first of their row."""
    model = tiny.model(family).eval()
    attentions = {i: model.model.layers[i].self_attn for i in SKIPPED}
    given = {i: [] for i in SKIPPED}
    for batch in data:
        kept = batch["attention_mask"].bool()
        kept &= batch["attention_mask"].cumsum(1) > 1
        handles = [
            attention.register_forward_hook(lambda m, args, output, i=i, kept=kept: given[i].append(output[0][kept]))
            for i, attention in attentions.items()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    for i, attention in attentions.items():
        mean = torch.cat(given[i]).mean(0)
        attention.register_forward_hook(lambda m, args, output, mean=mean: (mean.expand_as(output[0]), *output[1:]))
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_means_stand_in_for_them(family):
    data = batches(family)
    model = skip_attentions(tiny.model(family), data, skip_layers=SKIPPED, stand_in="mean")
    assert model.config.eas["attentions"][0]["skip"] == SKIPPED
    inputs = tiny.inputs(family, seed=5)
    torch.testing.assert_close(model(**inputs).logits, with_means(family, data)(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_linear_ones_are_nearer_than_means_and_these_than_nothing(family):
    data = batches(family)
    whole = [tiny.model(family)(**batch).logits for batch in data]
    off = []
    for stand_in in ("linear", "mean", "zero"):
        model = skip_attentions(tiny.model(family), data, skip_layers=SKIPPED, stand_in=stand_in, r_pia=8)
        logits = [model(**batch).logits for batch in data]
        off.append(sum((a - b)[batch["attention_mask"].bool()].square().sum()
                       for a, b, batch in zip(logits, whole, data, strict=True)))  # fmt: skip
    assert off[0] < off[1] < off[2]


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_without_a_set_those_of_the_lowest_scores_go(family):
    data = [families.tiny_inputs(family)]
    scores = score_attentions(families.tiny_model(family), data)
    model = skip_attentions(families.tiny_model(family), data, num_skip=2)
    gone = [name for part in model.config.eas["attentions"] for name in part["skip"]]
    assert len(gone) == 2
    lowest = sorted(scores, key=scores.get)[:2]
    alike = skip_attentions(families.tiny_model(family), data, skip_layers=lowest)
    assert alike.config.eas == model.config.eas
    # a quarter by default
    count = round(0.25 * len(scores))
    default = skip_attentions(families.tiny_model(family), data)
    assert sum(len(part["skip"]) for part in default.config.eas["attentions"]) == count


def test_what_others_need_stays():
    """The first attention of T5's encoder makes the position biases of all, so it stays even if it adds nothing."""
    torch.manual_seed(0)
    model = T5EncoderModel(families.tiny_model("t5").config).eval()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.o.weight.zero_()
    data = [{key: families.tiny_inputs("t5")[key] for key in ("input_ids", "attention_mask")}]
    scores = score_attentions(model, data)
    needed, *others = sorted(scores, key=scores.get)
    assert scores[needed] == 0
    (part,) = skip_attentions(model, data, num_skip=1).config.eas["attentions"]
    assert part["skip"] == [others[0]]


def test_it_is_a_model_that_others_tune(tmp_path):
    data = batches("llama")
    smaller = skip_attentions(tiny.model("llama"), data, num_skip=2)
    assert not [n for n, m in smaller.named_modules() if "eas_adapter" in n]
    smaller.save_pretrained(tmp_path)
    inputs = tiny.inputs("llama", seed=5)
    expected = smaller(**inputs).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    lora = get_peft_model(loaded, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    lora(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {n.split(".lora_")[0].split(".")[-1] for n, p in lora.named_parameters() if p.grad is not None} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    trained = lora.eval()(**inputs).logits
    torch.testing.assert_close(lora.merge_and_unload()(**inputs).logits, trained, rtol=1e-4, atol=1e-4)


def test_what_was_trainable_is():
    model, data = tiny.model("llama").train(), batches("llama")
    model.model.layers[0].requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with pytest.raises(ValueError, match="gave no tokens"):
        skip_attentions(model, [], skip_layers=[0])
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    smaller = skip_attentions(model, data, skip_layers=[0, 2])
    assert smaller.training
    still = {name for name in frozen if "self_attn" not in name}
    assert {name for name, parameter in smaller.named_parameters() if not parameter.requires_grad} == still
    inputs = tiny.inputs("llama")
    smaller(**inputs, labels=inputs["input_ids"]).loss.backward()  # all weights are trained, stand-ins included
    assert all(p.grad is not None for p in smaller.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_skip="auto"), "needs a search"),
        (dict(num_skip=2, skip_layers=[1]), "contradicts"),
        (dict(r_pia=1000), "at most the model's hidden size"),
        (dict(skip_layers=[17]), "17"),
        (dict(num_skip=-1), "a count from 0"),
        (dict(num_skip=7), "more than the 6 attentions"),
    ],
    ids=str,
)
def test_what_it_refuses_changes_nothing(settings, message):
    model, data = tiny.model("llama"), batches("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        skip_attentions(model, data, **settings)
    assert {n for n, _ in model.named_modules()} == {n for n, _ in tiny.model("llama").named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_can_not_be_measured_leave_the_model_as_it_was():
    model = tiny.model("llama")
    inputs = tiny.inputs("llama")
    expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[0, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        skip_attentions(model, [{"inputs_embeds": embeds}], skip_layers=SKIPPED)
    assert type(model) is type(tiny.model("llama"))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
