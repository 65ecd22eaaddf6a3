"""`freeze_context`: what skipped attentions say of other tokens becomes its mean, and the model plain weights."""

import json

import pytest
import torch
from checks import close
from peft import PeftModel
from transformers import AutoModelForCausalLM
from zoo import tiny
from zoo.tiny import adapted
from zoo.training import batch, trainer

SETTINGS = [
    dict(propagation="mean"),
    dict(propagation="mean", use_bias=False, scaling=0.5),
    dict(propagation="mean", stand_in="zero"),
]


def constants(model):
    """What skipped attentions add when they look at one token alone, as their constants; by layer."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(("layers.0.self_attn", "layers.3.self_attn")):
            found[name] = module.eas_stand_in["default"].constant
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frozen_to_one_token_it_computes_what_it_did_with_that_token(family, settings):
    """A text of one token, twice: the first of a sequence is not counted, the second says what it said."""
    model, token = adapted(family, **settings), torch.tensor([[7]])
    expected = model(token).logits
    positions = torch.ones_like(token)  # not the first of its sequence
    moved = model.freeze_context([{"input_ids": token, "position_ids": positions}])
    assert moved.tokens == 1
    assert moved.logits_moved < 1e-5
    assert moved.same_choice == 1
    assert model.peft_config["default"].propagation == "none"
    close(model(token).logits, expected)
    merged = model.merge_and_unload()
    assert [shape["rank"] for shape in merged.config.eas["attentions"][0]["stand_ins"]] == [0, 0]
    close(merged(token).logits, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_mean_is_over_tokens(settings):
    """Of what each attention added in a forward, without padding and the first of each row; by hooks of torch's own."""
    model, given = adapted(**settings), batch()
    kept = given["attention_mask"].bool() & (given["attention_mask"].cumsum(-1) > 1)
    expected, handles = {}, []
    for name, module in model.named_modules():
        if name in constants(model):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, name=name: expected.update({name: output[0][kept].mean(0)})
                )
            )
    model(**given)
    for handle in handles:
        handle.remove()
    model.freeze_context([given])
    for name, constant in constants(model).items():
        torch.testing.assert_close(constant, expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_said_is_what_happens(capsys):
    """The reported change is that between the model before and the model after, rows weighted by their labels."""
    model, batches = adapted(propagation="mean"), [batch(), batch(seed=5, answer=2)]
    before = [model(**given) for given in batches]
    moved = model.freeze_context(batches)
    after = [model(**given) for given in batches]
    kept = [given["attention_mask"].bool() for given in batches]
    weights = torch.tensor([float((given["labels"] != -100).sum()) for given in batches])

    def loss(outputs):
        return float((weights * torch.stack([output.loss for output in outputs])).sum() / weights.sum())

    first, second = (torch.cat([o.logits[k] for o, k in zip(os, kept, strict=True)]) for os in (before, after))
    assert moved.tokens == sum(int(k.sum()) for k in kept)
    assert moved.loss_before == pytest.approx(loss(before), rel=1e-5)
    assert moved.loss_after == pytest.approx(loss(after), rel=1e-5)
    assert moved.logits_moved == pytest.approx(float((second - first).norm() / first.norm()), rel=1e-4)
    assert moved.same_choice == pytest.approx(float((second.argmax(-1) == first.argmax(-1)).float().mean()))
    assert moved.logits_moved > 0.001
    assert str(moved) + "\n" == capsys.readouterr().out
    assert f"{moved.loss_before:.4f} -> {moved.loss_after:.4f}" in str(moved)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_saved_and_trained_further(settings, tmp_path):
    model = adapted(**settings)
    model.freeze_context([batch()])
    given = batch()
    expected = model(**given).logits
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["propagation"], saved["stand_in"]) == ("none", "mean")
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**given).logits, expected, rtol=0, atol=0)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("eas_stand_in" in name for name in trainable)
    assert not any("mean_" in name for name, _ in model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(tmp_path / "run", model, max_steps=4).train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable
    merged = model.eval().merge_and_unload()
    close(merged(**given).logits, model(**given).logits)


def test_a_frozen_model_loads_as_plain_weights(tmp_path):
    model = adapted(propagation="mean")
    model.freeze_context([batch()])
    merged, given = model.merge_and_unload(), tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**given).logits, merged(**given).logits, rtol=0, atol=0)
    base = {name: value.shape for name, value in tiny.model("llama").state_dict().items()}
    new = {name for name in merged.state_dict() if name not in base}
    assert {name.split(".")[-1] for name in new} == {"bias", "constant"}
    assert all(value.shape == base[name] for name, value in merged.state_dict().items() if name in base)


def test_attentions_that_are_skipped_later_say_nothing_of_other_tokens():
    model = adapted(propagation="mean")
    model.set_skip_layers([1])
    model.set_skip_layers([0, 3])
    model.freeze_context([batch()])
    model.set_skip_layers([1])
    assert not any("mean_" in name for name, _ in model.named_parameters())
    expected = model(**batch()).logits
    close(model.merge_and_unload()(**batch()).logits, expected)


def test_what_can_not_be_frozen():
    with pytest.raises(ValueError, match="nothing to freeze"):
        adapted(stand_in="mean").freeze_context([batch()])
    model = adapted(propagation="mean")
    expected = model(**batch()).logits
    with pytest.raises(ValueError, match="no tokens"):
        model.freeze_context([])
    with pytest.raises(IndexError):
        model.freeze_context([batch() | {"input_ids": torch.tensor([[10**6] * 3])}])
    assert model.peft_config["default"].propagation == "mean"
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.freeze_context([batch()])
    with pytest.raises(ValueError, match="after the search"):
        adapted(skip_layers=None, num_skip=2, propagation="mean").freeze_context([batch()])
