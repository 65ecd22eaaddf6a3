"""The adapted model against the formulas in float64, for every family and setting."""

import itertools

import pytest
import reference
import torch
from peft import get_peft_model
from zoo import tiny

from peft_eas import EASConfig, pia
from peft_eas.runtime import eas_attention

SETTINGS = [
    dict(propagation=p, router=r, use_bias=b)
    for p, r, b in itertools.product(("none", "mean"), ("none", "static"), (True, False))
]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def answers(inputs, count=4):
    """Labels that make the last `count` tokens of each row the answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-count] = -100
    labels[inputs["attention_mask"] == 0] = -100
    return labels


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_logits_are_those_of_the_formulas(family, settings):
    inputs = tiny.inputs(family)
    config = EASConfig(skip_layers=[0, 3], groups=2, scaling=0.7, **settings)
    model = get_peft_model(tiny.model(family), config)
    tiny.shake(model)
    model.eval()
    with torch.no_grad():
        actual = model(**inputs, labels=answers(inputs)).logits
    expected = reference.logits(tiny.model(family), reference.adapters(model), config, inputs)
    kept = inputs["attention_mask"].bool()
    close(actual[kept], expected[kept])
    unadapted = tiny.model(family)(**inputs).logits
    assert (actual - unadapted)[kept].abs().max() > 0.05, "the adapters must matter, or this test can't fail"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups):
    inputs = tiny.inputs("llama")
    config = EASConfig(skip_layers=[1], groups=groups, r=4, r_pia=8)
    model = get_peft_model(tiny.model("llama"), config)
    tiny.shake(model)
    model.eval()
    kept = inputs["attention_mask"].bool()
    expected = reference.logits(tiny.model("llama"), reference.adapters(model), config, inputs)
    close(model(**inputs).logits[kept], expected[kept])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("router", ["none", "static"])
def test_a_fresh_adapter_changes_nothing_but_the_skipping(family, router):
    inputs = tiny.inputs(family)
    base = tiny.model(family)
    expected = base(**inputs).logits
    model = get_peft_model(base, EASConfig(skip_layers=[], router=router)).eval()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    # with a skipped attention, it is the base model whose attention gives zero
    model.set_skip_layers([1, 2])
    stock = tiny.model(family)
    for layer in stock.get_decoder().layers[1:3]:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)


def test_dropout_acts_in_training_only():
    inputs = tiny.inputs("llama", padding=None)
    model = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1], dropout=0.5))
    tiny.shake(model)
    labels = answers(inputs)
    first, second = (model.train()(**inputs, labels=labels).logits for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**inputs, labels=labels).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_init_weights_false_is_not_an_identity():
    inputs = tiny.inputs("llama")
    base = tiny.model("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, EASConfig(skip_layers=[], init_weights=False)).eval()
    assert not torch.allclose(model(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fold_against_float64(dtype, with_bias):
    """W (z + z D^T U^T + u) + w0, computed unfolded in float64, against the folded weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    weight, down, up = draw(20, 12).to(dtype), draw(4, 12), draw(12, 4)
    bias, added = (draw(20).to(dtype), draw(12)) if with_bias else (None, None)
    z = draw(7, 12).double()
    zero = torch.zeros(1, dtype=torch.float64)

    def wide(t):
        return zero if t is None else t.double()

    adapted = z + z @ down.double().T @ up.double().T + wide(added)
    expected = adapted @ weight.double().T + wide(bias)
    folded, folded_bias = pia.fold(weight, bias, down, up, added)
    assert folded.dtype == dtype
    assert (folded_bias is None) == (not with_bias)
    actual = z @ folded.double().T + wide(folded_bias)
    # one rounding of each result to `dtype`
    scale = z.abs() @ folded.double().abs().T + wide(folded_bias).abs()
    assert ((actual - expected).abs() <= scale * torch.finfo(dtype).eps * 2).all()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_number_of_a_fold_is_larger_than_what_is_said_of_it(with_bias, scale):
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        weight, down, up, bias, added = (
            scale * torch.randn(size, generator=generator) for size in ((20, 12), (4, 12), (12, 4), (20,), (12,))
        )
        if number % 2:  # all terms of one sign, so that the bound is close
            weight, down, up, bias, added = (t.abs() for t in (weight, down, up, bias, added))
        given = (weight, bias, down, up, added) if with_bias else (weight, None, down, up, None)
        bound = pia.largest(*given)
        made = [t for t in (*pia.fold(*given), weight @ up) if t is not None]
        assert max(t.abs().max() for t in made) <= bound * (1 + 1e-5)
        for i, tensor in enumerate(given):
            for bad in (float("nan"), float("inf")) if tensor is not None else ():
                broken = tensor.clone()
                broken.view(-1)[0] = bad
                assert not pia.largest(*given[:i], broken, *given[i + 1 :]) < float("inf")


@pytest.mark.parametrize("form", ["matrix", "transposed", "stacked"])
def test_a_fold_in_parts_is_that_of_the_whole(form, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = {"matrix": (20, 12), "transposed": (12, 20), "stacked": (3, 20, 12)}[form]
    weight, bias, down, up, added = (
        torch.randn(size, generator=generator) for size in (sizes, (20,), (4, 12), (12, 4), (12,))
    )
    weight = weight.mT if form == "transposed" else weight
    given = (weight, None, down, up, None) if form == "stacked" else (weight, bias, down, up, added)
    whole = pia.fold(*given)
    monkeypatch.setattr(pia, "WORKSPACE", 3 * 4 * 7 * 12)  # 7 rows, or 2 of each of 3 experts
    parts = pia.fold(*given)
    torch.testing.assert_close(parts, whole)
    assert parts[0].stride() == weight.stride()
    assert pia.workspace(weight) == pia.WORKSPACE < 3 * weight.nbytes


def test_a_bias_is_a_shift_of_the_input():
    """W (z + z D^T U^T + u) + w0, unfolded, against folded weights that read a shifted input; in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias, down, up, added, z = draw(20, 12), draw(20), draw(4, 12), draw(12, 4), draw(12), draw(7, 12)
    expected = (z + z @ down.T @ up.T + added) @ weight.T + bias
    folded, _ = pia.fold(weight, bias, down, up, None)
    shifted = z + pia.input_shift(down, up, added)
    torch.testing.assert_close(shifted @ folded.T + bias, expected)


@pytest.mark.parametrize("remainder", [0.0, 1e-5])
def test_an_adapter_that_erases_its_input_is_not_folded(remainder):
    """R = 0 (or nearly) in a direction that the bias needs: no shift before it can have any effect."""
    down = torch.eye(4, 12)
    with pytest.raises(ValueError, match=r"use_bias=False"):
        pia.input_shift(down, (remainder - 1) * down.T, torch.eye(12)[0])


def test_uniform_attention_is_attention_with_queries_of_zero():
    """Against torch's own, for each form in which attentions get their masks."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 7, 4, generator=generator)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    causal = reference.causal(padding)
    nothing = torch.zeros(2, 7, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(nothing, nothing, values, attn_mask=causal)
    kept = padding.bool()
    additive = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    masks = (causal[:, None], additive[:, None], causal, padding, padding[:, None, None], causal[:, None].long())
    for mask in masks:
        allowed = eas_attention.looked_at(mask, length=7, total=7, is_causal=True)
        close(eas_attention.uniform_attention(values, allowed)[kept], expected[kept])
        # the last three of the seven look
        allowed = eas_attention.looked_at(mask[..., -3:, :] if mask.shape[-2] == 7 else mask, 3, 7, is_causal=True)
        close(eas_attention.uniform_attention(values, allowed), expected[:, -3:])
    close(eas_attention.causal_mean(values)[1], expected[1])
    both = eas_attention.looked_at(padding, length=7, total=7, is_causal=False)
    close(eas_attention.uniform_attention(values, both)[:, 0], torch.stack([values[0, 2:].mean(0), values[1].mean(0)]))
    assert eas_attention.uniform_attention(values, torch.zeros(1, 7, 7, dtype=torch.bool)).eq(0).all()
