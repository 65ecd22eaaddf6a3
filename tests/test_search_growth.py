"""Sets that are grown: against the plain greedy algorithm, and against sets that are tried by hand."""

import random

import pytest
import torch
from peft import get_peft_model
from searches import SEARCH, run
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from zoo import families, sizes, tiny
from zoo.training import dataset

from peft_eas import EASConfig, initialize_eas_weights, score_attentions
from peft_eas.search import growth


def costs(seed, number):
    """Of sets: a cost of each attention, and one of each pair, as those of neighbours are more than their sum."""
    rng = random.Random(seed)
    alone = [rng.lognormvariate(0, 1) for _ in range(number)]
    pairs = {(i, j): rng.expovariate(4) for i in range(number) for j in range(i)}
    asked = []

    def cost_of(numbers):
        asked.append(tuple(numbers))
        return sum(alone[i] for i in numbers) + sum(pairs[i, j] for i in numbers for j in numbers if j < i)

    return cost_of, asked


def greedily(cost_of, number, count):
    joined = []
    while len(joined) < count:
        others = [i for i in range(number) if i not in joined]
        joined.append(min(others, key=lambda i: cost_of([*joined, i])))
    return joined


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_greedy_set_of_every_size_for_fewer_costs(seed):
    cost_of, asked = costs(seed, 24)
    scores = growth.grow(cost_of, 24, 8)
    number = len(asked)
    assert len(set(asked)) == number <= sum(range(17, 25)) / 2
    expected = greedily(cost_of, 24, 8)
    ranked = sorted(range(24), key=scores.__getitem__)
    assert ranked[:8] == expected
    for count in range(1, 9):
        assert scores[expected[count - 1]] == pytest.approx(cost_of(expected[:count]))
    assert min(scores[i] for i in ranked[8:]) >= scores[expected[-1]]


def test_costs_that_fall_and_costs_that_are_not_finite():
    """Noise may make a larger set cheaper; an attention whose loss is infinite joins last."""
    table = {(0,): 0.3, (1,): 0.2, (2,): float("inf")}
    scores = growth.grow(lambda numbers: table.get(tuple(numbers), 0.1), 3, 2)
    assert sorted(range(3), key=lambda i: scores[i])[2] == 2
    assert sorted(scores)[:2] == pytest.approx([0.2, 0.2])
    assert growth.grow(lambda numbers: float(numbers[0]), 3, 0) == [0.0, 1.0, 2.0]
    infinite = growth.grow(lambda numbers: float("inf") if {1, 2} & set(numbers) else 0.5, 3, 2)
    assert infinite == [0.5, float("inf"), float("inf")]


def classifier():
    torch.manual_seed(0)
    model = BertForSequenceClassification(families.tiny_model("bert").config).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:  # which do next to nothing as they come
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                linear.weight.mul_(10)
    return model


def change_by_hand(model_type, make, inputs, data):
    """Of a set with stand-ins, from the configuration's own skipping: the divergence, or that of the last state."""
    kept = inputs["attention_mask"].bool()

    @torch.no_grad()
    def given(model):
        if model_type == "bert":
            return model(**inputs, output_hidden_states=True).hidden_states[-1][kept].double()
        return model(**inputs).logits[kept].double().log_softmax(-1)

    whole = given(make())

    def cost_of(layers):
        skipping = get_peft_model(make(), EASConfig(skip_layers=[int(i) for i in layers], r_pia=32)).eval()
        initialize_eas_weights(skipping, data)
        now = given(skipping)
        if model_type == "bert":
            return float((now - whole).square().sum() / whole.square().sum())
        return float((whole.exp() * (whole - now)).sum(-1).mean())

    return cost_of


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bert"])
def test_scores_are_what_sets_cost_with_their_stand_ins(model_type):
    """BERT with a new head: what counts is what it reads."""
    make, inputs = (
        (classifier, families.tiny_inputs("bert"))
        if model_type == "bert"
        else (lambda: tiny.model(model_type), tiny.inputs(model_type))
    )
    inputs.pop("labels", None)
    scores = score_attentions(make(), [inputs])
    cost_of = change_by_hand(model_type, make, inputs, [inputs])
    layers = list(scores)
    expected = greedily(cost_of, len(layers), len(layers) // 2)
    assert sorted(layers, key=scores.get)[: len(expected)] == expected
    for count in range(1, len(expected) + 1):
        assert scores[expected[count - 1]] == pytest.approx(cost_of(expected[:count]), rel=1e-3, abs=1e-7)


def test_a_search_starts_from_what_adds_nothing(tmp_path):
    """Attentions 1 and 2 side by side, which no score of single ones need hold apart from others."""
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2))
    with torch.no_grad():
        for index in (1, 2):
            model.get_base_model().model.layers[index].self_attn.o_proj.weight.zero_()
    settings = SEARCH | dict(warm_start="growth", search_dataset=dataset(32))
    _, search = run(tmp_path, model, settings, save_strategy="no", max_steps=12)
    assert sorted(search.report["start"][:2]) == [1, 2]
    assert [search.report["scores"][i] for i in (1, 2)] == pytest.approx([0, 0], abs=1e-6)
    assert min(search.report["scores"][i] for i in (0, 3, 4, 5)) > 1e-5


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_search_compares_predictions(task_type, monkeypatch, tmp_path):
    """PEFT calls the model by its hooks or around them, by the task."""
    seen = []
    monkeypatch.setattr(growth.Change, "__call__", lambda self: seen.append(self) or (0.0, 1.0))
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2, task_type=task_type))
    settings = SEARCH | dict(warm_start="growth", search_dataset=dataset(32))
    run(tmp_path, model, settings, save_strategy="no", max_steps=12)
    assert seen[0].is_predicted
    assert {given.shape[1] for of_batch in seen[0].first for given in of_batch} == {model.config.vocab_size}


def test_what_is_compared_is_bounded(monkeypatch):
    """Of predictions that are many numbers, every so many tokens are compared."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding=None)
    monkeypatch.setattr(growth, "LARGEST", 10 * model.config.vocab_size)
    with torch.no_grad():
        change = growth.Change(model, [inputs], lambda batch: model(**batch))
        assert sum(given.numel() for of_batch in change.first for given in of_batch) <= growth.LARGEST
        assert change() == (0.0, -(-inputs["input_ids"].numel() // change.step))


def test_a_head_without_a_body_of_its_own():
    """What a model says that is called as a whole, and gives no hidden states."""

    class Whole(BertModel):
        def forward(self, input_ids, attention_mask):
            pooled = super().forward(input_ids, attention_mask).pooler_output
            return SequenceClassifierOutput(logits=pooled[:, :5])

    torch.manual_seed(0)
    model = Whole(BertConfig(**sizes.TEXT)).eval()
    inputs = tiny.inputs("llama", padding=None)
    with torch.no_grad():
        change = growth.Change(model, [inputs], lambda batch: model(**batch))
        before = model(**inputs).logits
        torch.testing.assert_close(change.first, [[before]])
        assert change() == (0.0, before.double().square().sum().item())
        model.pooler.dense.weight.mul_(2)
        expected = (model(**inputs).logits - before).double().square().sum().item()
        assert change()[0] == pytest.approx(expected)


def test_a_model_that_gives_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="neither `logits` nor hidden states"):
        growth.Change(tiny.model("llama"), [{}], lambda batch: None)
