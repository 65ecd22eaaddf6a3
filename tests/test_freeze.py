"""`freeze_context`: what depends on the prompt becomes its mean, and the model plain weights."""

import copy
import json

import pytest
import tiny
import torch
from peft import PeftModel
from test_merge import adapted, close
from test_training import batch, trainer
from transformers import AutoModelForCausalLM

from peft_eas import prompt_mask

SETTINGS = [
    dict(propagation="prompt"),
    dict(propagation="prompt", use_bias=False),
    dict(propagation="prompt", router="prompt"),
    dict(router="prompt", use_bias=False),
]


def row(given, index):
    return {name: value[index : index + 1] for name, value in given.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frozen_to_one_prompt_it_computes_what_it_did_with_that_prompt(family, settings):
    model, given = adapted(family, **settings), row(batch(family), 0)
    expected = model(**given)
    moved = model.freeze_context([given])
    assert moved.rows == 1
    assert moved.logits_moved < 1e-5
    assert moved.same_choice == 1
    with prompt_mask(torch.zeros_like(given["input_ids"])):  # nobody looks at it
        actual = model(**given)
    close(actual.logits, expected.logits)
    merged = model.merge_and_unload()
    assert merged.config.eas["attentions"][0]["adapters"] == {}
    close(merged(**given).logits, expected.logits)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_the_mean_is_over_rows(settings):
    given = batch()

    def shift(*rows):
        model = adapted(**settings)
        pias = [m for n, m in model.named_modules() if n.endswith(("layers.0.mlp", "layers.3.mlp"))]
        before = [m.eas_down_bias["default"].clone() if "default" in m.eas_down_bias else 0 for m in pias]
        model.freeze_context([row(given, index) for index in rows] if len(rows) < 3 else [given])
        return [m.eas_down_bias["default"] - b for m, b in zip(pias, before, strict=True)]

    alone = [shift(index) for index in range(3)]
    for layer, mean in enumerate(shift(0, 1, 2)):
        torch.testing.assert_close(mean, torch.stack([a[layer] for a in alone]).mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone[0][layer], alone[1][layer], atol=1e-3)


def test_what_is_said_is_what_happens(capsys):
    """The reported change is that between the model before and the model after, rows weighted by their labels."""
    model, batches = adapted(propagation="prompt"), [batch(), batch(seed=5, answer=2)]
    before = [model(**given) for given in batches]
    moved = model.freeze_context(batches)
    after = [model(**given) for given in batches]
    kept = [given["attention_mask"].bool() for given in batches]
    weights = torch.tensor([float((given["labels"] != -100).sum()) for given in batches])

    def loss(outputs):
        return float((weights * torch.stack([output.loss for output in outputs])).sum() / weights.sum())

    first, second = (torch.cat([o.logits[k] for o, k in zip(os, kept, strict=True)]) for os in (before, after))
    assert moved.loss_before == pytest.approx(loss(before), rel=1e-5)
    assert moved.loss_after == pytest.approx(loss(after), rel=1e-5)
    assert moved.logits_moved == pytest.approx(float((second - first).norm() / first.norm()), rel=1e-4)
    assert moved.same_choice == pytest.approx(float((second.argmax(-1) == first.argmax(-1)).float().mean()))
    assert 0.001 < moved.logits_moved < 1
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
    assert (saved["propagation"], saved["router"], saved["use_bias"]) == (
        "none",
        "static" if "router" in settings else "none",
        True,
    )
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**given).logits, expected, rtol=0, atol=0)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(tmp_path / "run", model, max_steps=4).train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable
    merged = model.eval().merge_and_unload()
    close(merged(**given).logits, model(**given).logits)


def test_a_frozen_model_loads_as_plain_weights(tmp_path):
    model = adapted(propagation="prompt")
    model.freeze_context([batch()])
    merged, given = model.merge_and_unload(), tiny.inputs("llama")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**given).logits, merged(**given).logits, rtol=0, atol=0)
    base = {name: value.shape for name, value in tiny.model("llama").state_dict().items()}
    new = {name for name in merged.state_dict() if name not in base}
    assert {name.split(".")[-1] for name in new} == {"bias", "stand_in"}
    assert all(value.shape == base[name] for name, value in merged.state_dict().items() if name in base)


def test_idle_adapters_are_dropped():
    model = adapted(propagation="prompt")
    model.set_skip_layers([1])
    model.set_skip_layers([0, 3])
    model.freeze_context([batch()])
    assert not [name for name, _ in model.named_parameters() if ".layers.1.self_attn.eas_stand_in" in name]
    model.set_skip_layers([1])  # and are created anew, as the adapter is now
    close(copy.deepcopy(model).merge_and_unload()(**batch()).logits, model(**batch()).logits)


def test_what_can_not_be_frozen(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="does not depend on the prompt"):
        model.freeze_context([batch()])
    model = adapted(propagation="prompt")
    with pytest.raises(ValueError, match="no rows"):
        model.freeze_context([])
    with pytest.raises(ValueError, match="first token has a label"):
        model.freeze_context([batch() | {"labels": batch()["input_ids"]}])
    assert model.peft_config["default"].propagation == "prompt"
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.freeze_context([batch()])
    with pytest.raises(ValueError, match="after the search"):
        adapted(skip_layers=None, num_skip=2, propagation="prompt").freeze_context([batch()])
