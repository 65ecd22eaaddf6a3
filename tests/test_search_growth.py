"""Sets that are grown: against the plain greedy algorithm, and against sets that are tried by hand."""

import json
import random

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from searches import SEARCH, attentions, run
from transformers import BertForSequenceClassification, Trainer
from zoo import families, tiny
from zoo.training import collate, dataset, trainer

from peft_eas import EASCallback, EASConfig, initialize_eas_weights, score_attentions
from peft_eas.search import growth, start
from peft_eas.search import scores as scores_module


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


def cost_by_hand(make, inputs, data):
    """Of a set with stand-ins, from the configuration's own skipping: the divergence."""
    kept = inputs["attention_mask"].bool()

    @torch.no_grad()
    def given(model):
        return model(**inputs).logits[kept].double().log_softmax(-1)

    whole = given(make())

    def cost_of(layers):
        skipping = get_peft_model(make(), EASConfig(skip_layers=[int(i) for i in layers], r_pia=32)).eval()
        initialize_eas_weights(skipping, data)
        return float((whole.exp() * (whole - given(skipping))).sum(-1).mean())

    return cost_of


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_scores_are_what_sets_cost_with_their_stand_ins(model_type):
    inputs = tiny.inputs(model_type)
    inputs.pop("labels", None)
    scores = score_attentions(tiny.model(model_type), [inputs])
    cost_of = cost_by_hand(lambda: tiny.model(model_type), inputs, [inputs])
    layers = list(scores)
    expected = greedily(cost_of, len(layers), len(layers) // 2)
    assert sorted(layers, key=scores.get)[: len(expected)] == expected
    for count in range(1, len(expected) + 1):
        assert scores[expected[count - 1]] == pytest.approx(cost_of(expected[:count]), rel=1e-3, abs=1e-7)


def test_a_set_is_grown_no_further_than_it_is_to_be(monkeypatch):
    inputs, asked = tiny.inputs("llama"), []
    whole = score_attentions(tiny.model("llama"), [inputs])
    cost = growth.Divergence.__call__
    monkeypatch.setattr(growth.Divergence, "__call__", lambda self: asked.append(1) or cost(self))
    for count in (1, 2, 3):
        asked.clear()
        grown = score_attentions(tiny.model("llama"), [inputs], num_skip=count)
        lowest = sorted(grown, key=grown.get)[:count]
        assert lowest == sorted(whole, key=whole.get)[:count]
        assert [grown[i] for i in lowest] == pytest.approx([whole[i] for i in lowest])
        if count == 1:
            assert len(asked) == len(whole)
    with pytest.raises(ValueError, match="`num_skip` must be an integer from 0"):
        score_attentions(tiny.model("llama"), [inputs], num_skip=-1)


def test_sets_are_grown_on_tokens_enough(monkeypatch):
    """Stand-ins are measured on all batches; forwards of all sets are of the first ones that have so many tokens."""
    data = [{k: v for k, v in tiny.inputs("llama", seed=seed).items() if k != "labels"} for seed in range(4)]
    sizes = [int(batch["attention_mask"].sum()) for batch in data]
    monkeypatch.setattr(scores_module, "ENOUGH_TO_GROW", sizes[0] + 1)
    grown = score_attentions(tiny.model("llama"), data)
    for few, is_alike in ((data[:2], True), (data[:3], False)):
        costs = [cost_by_hand(lambda: tiny.model("llama"), batch, data) for batch in few]
        weights = sizes[: len(few)]
        first = min(grown, key=grown.get)
        cost = sum(n * cost_of([first]) for n, cost_of in zip(weights, costs, strict=True)) / sum(weights)
        assert (grown[first] == pytest.approx(cost, rel=1e-3)) is is_alike


def test_the_default_of_other_models_is_deviation():
    """The head of a classifier is new, so neither its predictions nor its loss say anything yet."""
    model, batches = families.tiny_model("bert"), [families.tiny_inputs("bert")]
    classifier = BertForSequenceClassification(model.config).eval()
    scores = score_attentions(classifier, batches)
    assert scores == score_attentions(classifier, batches, "deviation")
    with pytest.raises(ValueError, match="no `logits` to compare"):
        score_attentions(classifier, batches, "growth")


def test_while_a_model_learns_its_loss_counts_as_much():
    """Against twice the growth of the cross-entropy with targets that are half predictions and half labels."""
    model, other = tiny.model("llama"), tiny.model("llama", seed=1)
    batches = [tiny.inputs("llama"), tiny.inputs("llama", padding=None)]
    for inputs in batches:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"][0, :3] = -100

    def loss(batch):
        return model(**batch).loss.item(), float((batch["labels"][:, 1:] != -100).sum())

    with torch.no_grad():
        divergence = growth.Divergence(model, batches, loss)
        first = [model(**batch).logits.double().log_softmax(-1) for batch in batches]
        model.load_state_dict(other.state_dict())
        terms = divergence()
        now = [model(**batch).logits.double().log_softmax(-1) for batch in batches]
    soft, hard = [], []
    for before, after, inputs in zip(first, now, batches, strict=True):
        moved, labels = before - after, inputs["labels"][:, 1:]
        soft.append((before.exp() * moved).sum(-1)[inputs["attention_mask"].bool()])  # no padding
        hard.append(moved[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100])
    expected = torch.cat(soft).mean() + torch.cat(hard).mean()
    assert sum(total / count for total, count in terms) == pytest.approx(expected.item(), rel=1e-4)
    assert torch.cat(hard).mean().abs() > 1e-3


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_search_starts_from_what_adds_nothing(tmp_path, warmup_steps):
    """Attentions 1 and 2 side by side, which no score of single ones need hold apart from others; of a model that
    says what the labels are, so that each other attention is needed."""
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2))
    with torch.no_grad():
        for index in (1, 2):
            model.get_base_model().model.layers[index].self_attn.o_proj.weight.zero_()
        rows = [dict(row) for row in dataset(32)]
        for row in rows:
            said = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0].argmax(-1).tolist()
            row["labels"] = [-100, *said[:-1]]
    settings = SEARCH | dict(warm_start=None, search_dataset=Dataset.from_list(rows), warmup_steps=warmup_steps)
    _, search = run(tmp_path, model, settings, save_strategy="no", max_steps=12)
    assert sorted(search.report["start"][:2]) == [1, 2]
    assert [search.report["scores"][i] for i in (1, 2)] == pytest.approx([0, 0], abs=1e-5)
    assert min(search.report["scores"][i] for i in (0, 3, 4, 5)) > 1e-4


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("enough", [1, 10**6])
def test_a_search_compares_predictions_of_tokens_enough(enough, task_type, monkeypatch, tmp_path):
    """PEFT calls the model by its hooks or around them, by the task."""
    seen = []
    monkeypatch.setattr(start, "ENOUGH_TO_GROW", enough)
    monkeypatch.setattr(growth.Divergence, "__call__", lambda self: seen.append(self) or [(0.0, 1.0)])
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2, task_type=task_type))
    settings = SEARCH | dict(warm_start=None, search_dataset=dataset(32))
    run(tmp_path, model, settings, save_strategy="no", max_steps=12)
    assert {given.shape[1] for of_batch in seen[0].first for given in of_batch} == {model.config.vocab_size}
    assert sum(len(batch["input_ids"]) for batch in seen[0].batches) == (4 if enough == 1 else 16)


def test_what_is_compared_is_bounded(monkeypatch):
    """Of predictions that are many numbers, every so many tokens are compared."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding=None)
    monkeypatch.setattr(growth, "LARGEST", 10 * model.config.vocab_size)
    with torch.no_grad():
        divergence = growth.Divergence(model, [inputs], lambda batch: (model(**batch).logits.sum().item(), 0.0))
        assert sum(given.numel() for of_batch in divergence.first for given in of_batch) <= growth.LARGEST
        assert divergence()[0] == (0.0, -(-inputs["input_ids"].numel() // divergence.step))


def test_a_search_of_a_loss_that_makes_no_logits_starts_by_deviation(tmp_path):
    class Quiet(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["input_ids"], output_hidden_states=True, labels=inputs["labels"]).loss

    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2))
    model.get_base_model().register_forward_hook(lambda module, args, output: setattr(output, "logits", None))
    for warm_start in (None, "growth"):
        search = EASCallback(dataset(8), **SEARCH | dict(warm_start=warm_start))
        arguments = trainer(tmp_path, model, max_steps=6, save_strategy="no").args
        quiet = Quiet(model, arguments, train_dataset=dataset(), data_collator=collate, callbacks=[search])
        if warm_start is None:
            quiet.train()
            assert search.report["settings"]["warm_start"] == "deviation"
            model = get_peft_model(model.unload(), EASConfig(num_skip=2))
        else:
            with pytest.raises(ValueError, match="no `logits` to compare"):
                quiet.train()


def test_sets_that_cost_infinitely_much_have_no_score_in_the_report(tmp_path):
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2))

    def spoil(module, args, output):
        if not module.training and attentions(model)[0].gates["default"]:
            output.logits = output.logits * float("nan")

    model.get_base_model().register_forward_hook(spoil)
    settings = SEARCH | dict(warm_start="growth", search_dataset=dataset(8))
    _, search = run(tmp_path, model, settings, save_strategy="no", max_steps=5)
    assert search.report["scores"][0] is None
    assert search.report["start"][-1] == 0
    assert json.loads((tmp_path / "report.json").read_text()) == search.report
