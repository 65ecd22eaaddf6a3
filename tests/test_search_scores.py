"""One-shot scores against what they are said to be, computed another way."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from zoo import families, tiny

from peft_eas import EASConfig, initialize_eas_weights, score_attentions
from peft_eas.families import find_layers
from peft_eas.families.spec import POST
from peft_eas.runtime.eas_attention import StandIn
from peft_eas.runtime.eas_record import StandInShape
from peft_eas.search import budget
from peft_eas.search import scores as scores_module
from peft_eas.search.scores import METHODS


def batches(family):
    given = [tiny.inputs(family, seed=seed, rows=2, length=10 + seed) for seed in (1, 2)]
    for batch in given:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return given


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_is_the_loss_of_a_skip_set_of_one(family):
    data = batches(family)
    scores = score_attentions(tiny.model(family), data, method="loss")
    model = get_peft_model(tiny.model(family), EASConfig(skip_layers=[], stand_in="mean")).eval()

    @torch.no_grad()
    def loss():
        losses = [(model(**b).loss, (b["labels"] != -100).sum()) for b in data]
        return float(sum(x * n for x, n in losses) / sum(n for _, n in losses))

    whole = loss()
    for index in range(6):
        model.set_skip_layers([index])
        initialize_eas_weights(model, data)
        assert scores[index] == pytest.approx(loss() - whole, abs=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_similarity_of_the_residual_stream(family):
    data = batches(family)
    scores = score_attentions(tiny.model(family), data, "similarity")
    # the stream after the attention is what the norm in front of the FFN reads
    norm = "pre_feedforward_layernorm" if family == "gemma3_text" else "post_attention_layernorm"
    model, totals, count = tiny.model(family), torch.zeros(6), 0
    layers = model.get_decoder().layers
    seen = {}
    for i, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, "before"): args[0]}))
        getattr(layer, norm).register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, "after"): args[0]}))
    for batch in data:
        with torch.no_grad():
            model(**batch)
        kept = batch["attention_mask"].bool()
        count += kept.sum()
        for i in range(6):
            a, b = seen[i, "before"][kept].double(), seen[i, "after"][kept].double()
            totals[i] += (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum()
    for i in range(6):
        assert scores[i] == pytest.approx(float(totals[i] / count), rel=1e-4, abs=1e-6)


# where an attention's output, or the residual stream after it, is found elsewhere than in a Llama
AFTER = {"bloom": "post_attention_layernorm", "gpt2": "ln_2", "opt": "final_layer_norm", "mixtral": POST[0]}
BEFORE = {"bloom": "input_layernorm", "gpt2": "ln_1", "opt": "self_attn_layer_norm", "mixtral": "input_layernorm"}


@pytest.mark.parametrize("family", AFTER)
def test_other_families(family):
    """Similarity by the inputs of the norms before and after, and loss by skip sets of one."""
    inputs = families.tiny_inputs(family)
    kept = inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~kept, -100)
    model, seen = families.tiny_model(family), {}
    for i, name in ((i, place.layer) for i, place in find_layers(model).items()):
        for which in (BEFORE, AFTER):
            norm = model.get_submodule(f"{name}.{which[family]}")
            norm.register_forward_pre_hook(lambda m, args, key=(i, which is AFTER): seen.update({key: args[0]}))
    with torch.no_grad():
        model(**inputs)
    by_similarity = score_attentions(families.tiny_model(family), [inputs], "similarity")
    assert set(by_similarity) == {i for i, _ in seen}
    for i, score in by_similarity.items():
        a, b = (seen[i, after].view(*kept.shape, -1)[kept].double() for after in (False, True))
        assert score == pytest.approx(float((1 - torch.cosine_similarity(a, b, dim=-1)).mean()), rel=1e-4, abs=1e-6)
    by_loss = score_attentions(families.tiny_model(family), [inputs], method="loss")
    assert list(by_loss) == list(by_similarity)
    tuned = get_peft_model(families.tiny_model(family), EASConfig(skip_layers=[], stand_in="mean")).eval()
    with torch.no_grad():
        whole = float(tuned(**inputs).loss)
        for i, score in by_loss.items():
            tuned.set_skip_layers([i])
            initialize_eas_weights(tuned, [inputs])
            assert score == pytest.approx(float(tuned(**inputs).loss) - whole, abs=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_divergence_and_deviation_with_the_mean_in_place(family):
    """Of a stock model, one attention's output (behind its norm) replaced by its mean, by hand and in float64."""
    data = batches(family)
    by_kl, by_deviation = (score_attentions(tiny.model(family), data, method) for method in ("kl", "deviation"))
    norm = "pre_feedforward_layernorm" if family == "gemma3_text" else "post_attention_layernorm"
    model, seen = tiny.model(family).double(), {}
    layers = model.get_decoder().layers
    for i, layer in enumerate(layers):
        for module, when in ((layer.input_layernorm, "before"), (getattr(layer, norm), "after")):
            module.register_forward_pre_hook(lambda m, args, at=(i, when): seen.setdefault(at, []).append(args[0]))

    @torch.no_grad()
    def predictions():
        inputs = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in data]
        logits = [model(**b).logits[b["attention_mask"].bool()] for b in inputs]
        return torch.cat(logits).log_softmax(dim=-1)

    whole, streams = predictions(), {at: list(given) for at, given in seen.items()}
    rows = [b["attention_mask"].bool() for b in data]
    counted = [mask & (mask.cumsum(dim=1) > 1) for mask in rows]  # without the first of each row
    for i, layer in enumerate(layers):
        x = torch.cat([s[k] for s, k in zip(streams[i, "before"], counted, strict=True)])
        a = torch.cat([s[k] for s, k in zip(streams[i, "after"], counted, strict=True)]) - x
        deviation = ((a - a.mean(dim=0)).square().sum() / x.square().sum()).sqrt()
        assert by_deviation[i] == pytest.approx(float(deviation), rel=1e-4)

        mean = a.mean(dim=0)

        def constant(module, args, output, c=mean):
            first = output[0] if isinstance(output, tuple) else output
            replaced = torch.zeros_like(first) + c
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        last = layer.post_attention_layernorm if family == "gemma3_text" else layer.self_attn
        handle = last.register_forward_hook(constant)
        moved = predictions()
        handle.remove()
        kl = (whole.exp() * (whole - moved)).sum(dim=-1).mean()
        assert by_kl[i] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method):
    model = tiny.model("llama").train()
    model.model.layers[2].eval()
    model.model.layers[1].requires_grad_(False)
    modes = [m.training for m in model.modules()]
    own = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    logits, attributes = model(**batches("llama")[0]).logits, set(vars(model))
    score_attentions(model, batches("llama"), method)
    assert [m.training for m in model.modules()] == modes
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == own
    assert set(vars(model)) == attributes
    torch.testing.assert_close(model(**batches("llama")[0]).logits, logits, rtol=0, atol=0)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    with pytest.raises(ValueError, match="can't take such a batch"), torch.no_grad():
        score_attentions(model, [batches("llama")[0] | {"input_ids": torch.tensor([[1.5]])}], method)
    assert [m.training for m in model.modules()] == modes
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_what_can_not_be_scored_is_said():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="'growth', 'kl', 'deviation', 'loss', 'similarity'"):
        score_attentions(model, [], method="gradient")
    for method in METHODS:
        with pytest.raises(ValueError, match="gave no"):
            score_attentions(model, [], method=method)
    with pytest.raises(ValueError, match="needs batches with `labels`"):
        score_attentions(model, [tiny.inputs("llama")], method="loss")
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layers \[3, 4, 5\] are not finite"):
        score_attentions(model, batches("llama"), "similarity")
    with pytest.raises(ValueError, match=r"attentions \[3, 4, 5\] read or add is not finite"):
        score_attentions(model, batches("llama"))
    with pytest.raises(ValueError, match=r"gives no `logits`"):
        score_attentions(tiny.model("llama").model, batches("llama"), "kl")


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_is_timed_is_the_model_without_these_attentions(family):
    inputs = families.tiny_inputs(family)
    model = get_peft_model(families.tiny_model(family), EASConfig(skip_layers=[])).eval()
    names = [find_layers(families.tiny_model(family))[i].attention for i in (0, 2)]
    whole = model(**inputs).logits
    with model.disable_adapter(), budget.without(model.base_model.model, names):
        actual = model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=0)
    model.set_skip_layers([0, 2])
    torch.testing.assert_close(actual, model(**inputs).logits)


@torch.no_grad()
def test_what_stand_ins_leave_is_of_streams_of_any_shape(monkeypatch):
    """Vision towers have streams of `(tokens, size)`; what a propagation adds is not taken off."""
    torch.manual_seed(0)
    stand_in = StandIn(StandInShape(width=6, constant=True, read=4, rank=2, pooled=4, mean_rank=2))
    for parameter in stand_in.parameters():
        torch.nn.init.normal_(parameter)
    place = SimpleNamespace(row=SimpleNamespace(stack="encoder", answers=False, causal=False, context=False))

    def scored(shape):
        torch.manual_seed(1)
        before, added, read = (torch.randn(6, size).view(*shape, size) for size in (6, 6, 4))

        @contextmanager
        def watched(model, layers, see):
            see(0, place, before, added, read)
            yield

        monkeypatch.setattr(scores_module, "watching", watched)
        model = torch.nn.Linear(1, 1)
        found = scores_module.deviations(model, {0: place}, [], lambda batch: None, model, {0: stand_in})
        z, a, x = (t.flatten(0, -2) for t in (read, added, before))
        left = a - z @ stand_in.down.T @ stand_in.up.T
        left = left - left.mean(0)
        assert found[0] == pytest.approx((left.square().sum() / x.square().sum()).sqrt().item(), rel=1e-4)
        return found[0]

    assert scored((6,)) == pytest.approx(scored((2, 3)))
