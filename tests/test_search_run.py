"""What a search draws, scores and chooses, and what it leaves alone."""

import copy
import json
import logging
import math
import random

import pytest
import torch
from peft import get_peft_model
from searches import SEARCH, Watch, attentions, charge, fresh, run
from transformers import Trainer, TrainerCallback
from zoo import tiny
from zoo.training import collate, dataset, parameters, trainer

from peft_eas import EASCallback, EASConfig, initialize_eas_weights
from peft_eas.layer import EASLayer
from peft_eas.search import exchange
from peft_eas.search.held_out import PARTS, HeldOut
from peft_eas.search.report import reasons
from peft_eas.search.run import Search


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(gradient_accumulation_steps=3),
        dict(gradient_checkpointing=True),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(bf16=True),
        pytest.param(
            dict(torch_compile=True, torch_compile_backend="eager"),
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.6."), reason="its dynamo fails on `module.training` in a hook"
            ),
        ),
    ],
    ids=str,
)
def test_each_optimizer_step_skips_the_best_set_so_far_and_the_chosen_one_in_the_end(tmp_path, kwargs):
    model = fresh()
    watch = Watch(model)
    if kwargs.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    charge(model, 0.5, (1, 2, 3, 4, 5))
    _made, search = run(tmp_path, model, others=[watch], save_strategy="no", **kwargs)
    report = search.report
    sets = [[]] * 3 + [[4, 5]] * 3 + [e["skip_layers"] for e in report["rounds"] for _ in range(3)]
    assert [entry["step"] for entry in report["rounds"]] == [6, 9, 12]
    assert watch.steps[:12] == sets[:12]
    assert watch.steps[12:] == [report["skip_layers"]] * 8
    assert watch.forwards >= kwargs.get("gradient_accumulation_steps", 1)
    assert 0 in report["skip_layers"]
    assert model.skip_layers == report["skip_layers"]
    assert model.peft_config["default"].skip_layers == model.skip_layers


class Rates(TrainerCallback):
    """Writes down each optimizer step's learning rates, one for each group of parameters, and those that are logged."""

    def __init__(self):
        self.rates, self.logged = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_log(self, args, state, control, logs, **kwargs):
        if "learning_rate" in logs:
            self.logged.append(logs["learning_rate"])


def exponential(model):
    """An optimizer of two groups, and a scheduler that goes by the rates that it finds."""
    first, *others = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1e-2}, {"params": others, "lr": 1e-3}])
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def stepping(model):
    """An optimizer whose step is the scheduler's, too, as with DeepSpeed."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    step, scheduler.step = scheduler.step, lambda *args: None
    optimizer.register_step_post_hook(lambda *args: step())
    return optimizer, scheduler


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    "optimizers", [lambda model: (None, None), exponential, stepping], ids=["linear", "exponential", "stepping"]
)
def test_the_rate_rises_again_when_attentions_go(tmp_path, optimizers, warmup_steps):
    """And each step is the Trainer's own otherwise: next to a training without a search."""
    seen = {}
    for name, settings in (("given", dict(skip_layers=[4, 5])), ("search", {})):
        model, seen[name] = fresh(**settings), Rates()
        search = EASCallback(**SEARCH | dict(warmup_steps=warmup_steps))
        made = trainer(
            tmp_path, model, [search, seen[name]], optimizers(model), max_steps=20, gradient_accumulation_steps=2,
            save_strategy="no", logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        made.train()
    factors = [1.0] * 3 + [1 / 4, 2 / 4, 3 / 4] + [1.0] * 14 if warmup_steps else [1.0] * 20
    assert len(seen["given"].rates) == 20
    expected = [[rate * factor for rate in rates] for rates, factor in zip(seen["given"].rates, factors, strict=True)]
    assert seen["search"].rates == [pytest.approx(rates) for rates in expected]
    assert seen["search"].logged == seen["given"].logged
    assert search.report["is_settled"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_costs_are_differences_of_the_loss_with_one_attention_turned(tmp_path, family, monkeypatch):
    """Against a copy of the model, made when the round begins, with the set put in place by `set_skip_layers`."""
    model, held_out, expected = fresh(family, dropout=0.3), dataset(12), []

    def watched(self, step):
        batches = self.held_out.batches(len(self.state.rounds))
        assert len(batches) == PARTS
        copied, best = copy.deepcopy(self.model).eval(), self.state.best()

        def losses(skip_layers):
            copied.set_skip_layers(skip_layers)
            with torch.no_grad():
                return [copied(**batch).loss.item() for batch in batches]

        original(self, step)
        whole = losses(best)
        assert self.state.rounds[-1]["losses"] == pytest.approx(whole, rel=1e-5)
        for layer, cost in zip(self.state.rounds[-1]["tried"], self.state.rounds[-1]["costs"], strict=True):
            if layer in best:
                one = losses([i for i in best if i != layer])
                expected.append((cost, [a - b for a, b in zip(whole, one, strict=True)]))
            else:
                one = losses(sorted([*best, layer]))
                expected.append((cost, [b - a for a, b in zip(whole, one, strict=True)]))

    original = Search.round
    monkeypatch.setattr(Search, "round", watched)
    _, search = run(tmp_path, model, dict(search_dataset=held_out), save_strategy="no", max_steps=12)
    assert len(expected) == 12
    for actual, right in expected:
        assert actual == pytest.approx(right, abs=1e-5)
        assert len(set(actual)) > 1
    # and the order follows from them
    tries = [(e["tried"], e["costs"], e["exchanged"], e["skip_layers"]) for e in search.report["rounds"]]
    order, known = [5, 4, 3, 2, 1, 0], []
    for tried, costs, exchanged, skip_layers in tries:
        known += zip(tried, costs, strict=True)
        order, done = exchange.exchange(order, 2, exchange.costs(known))
        assert exchanged == [list(pair) for pair in done]
        assert skip_layers == sorted(order[:2])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_planted_set_is_found(tmp_path, count):
    """All attentions but a few of the first are given a price."""
    model = fresh(num_skip=count)
    charge(model, 0.5, range(count, 6))
    settings = dict(warmup_steps=0, search_steps=12, interval=3)
    run(tmp_path, model, settings, max_steps=13, save_strategy="no", learning_rate=1e-4)
    assert model.skip_layers == list(range(count))


class Priced(Trainer):
    """A loss of one's own, in which skipping costs something; it counts, draws random numbers, and changes its
    inputs."""

    calls = 0
    factor = 10

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": {"loss": []}, "eval": {"loss": []}}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = self.factor * torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / num_items_in_batch + 0 * torch.rand(()) + 0 * random.random()
        self.calls += 1
        self._metrics["train" if model.training else "eval"]["loss"].append(loss.item())
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def test_a_loss_of_ones_own_scores_and_notices_nothing(tmp_path):
    """Losses are ten times as large as with the model's own, and the trainer, its random numbers and what is learned
    are those of a training without any tries."""
    made = {}
    for name, settings in (("tried", {}), ("alone", dict(search_steps=1, interval=100))):
        model = fresh(dropout=0.2)
        arguments = trainer(tmp_path, model).args
        arguments.max_steps = 12
        arguments.save_strategy = "no"
        search = EASCallback(dataset(12), **SEARCH | dict(search_steps=6) | settings)
        made[name] = Priced(
            model,
            arguments,
            train_dataset=dataset(),
            data_collator=collate,
            callbacks=[search],
            eval_dataset=dataset(4),
        )
        with pytest.MonkeyPatch.context() as patch:
            if name == "alone":
                patch.setattr(Search, "round", lambda self, step: None)
            else:  # tries, but never an exchange
                patch.setattr(exchange, "CLEAR", math.inf)
            made[name].train()
        made[name].random = random.random(), torch.rand(()).item()
        if name == "tried":
            entry = search.report["rounds"][0]
            assert len(entry["tried"]) == 4
            assert min(entry["losses"]) > 10
    tried, alone = made["tried"], made["alone"]
    assert tried.calls == alone.calls == 12
    assert tried._metrics == alone._metrics
    assert len(tried._metrics["train"]["loss"]) == 12
    assert not tried._metrics["eval"]["loss"]
    assert tried.random == alone.random
    a, b = parameters(tried.model), parameters(alone.model)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "settings", [dict(compute_loss_func=True), dict(label_smoothing_factor=0.3)], ids=lambda s: next(iter(s))
)
def test_losses_are_those_of_the_trainer_s_settings(tmp_path, settings):
    """`compute_loss_func` and label smoothing, against the same computed here."""
    model, rows = fresh(), dataset(4)

    def triple(outputs, labels, num_items_in_batch=None):
        total = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return 3 * total / num_items_in_batch

    kwargs = dict(settings)
    if kwargs.pop("compute_loss_func", False):
        kwargs["compute_loss_func"] = triple
    search = EASCallback(rows, **SEARCH | dict(search_steps=3))
    smoothing = kwargs.pop("label_smoothing_factor", 0.0)
    arguments = trainer(tmp_path, model, label_smoothing_factor=smoothing, max_steps=6, save_strategy="no").args
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                kept["model"] = copy.deepcopy(model).eval()

    Trainer(
        model, arguments, train_dataset=dataset(), data_collator=collate, callbacks=[Keep(), search], **kwargs
    ).train()
    copied = kept["model"]
    copied.set_skip_layers([4, 5])
    batches = HeldOut(rows, collate, 4, 2, 7).batches(0)
    expected = []
    for batch in batches:
        with torch.no_grad():
            logp = copied(**batch).logits[:, :-1].log_softmax(-1)
        kept_tokens = batch["labels"][:, 1:] != -100
        right = -logp.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
        if smoothing:
            right = (1 - smoothing) * right + smoothing * -logp.mean(-1)
        expected.append((right[kept_tokens].mean() * (1 if smoothing else 3)).item())
    assert search.report["rounds"][0]["losses"] == pytest.approx(expected, rel=1e-4)


def left_by_stand_ins(plain, tuner, batch):
    """How far attentions of a model without adapters are from (2), a constant aside, relative to what passes them."""
    scores, kept = {}, batch["attention_mask"].bool()
    kept[torch.arange(len(kept)), kept.int().argmax(1)] = False  # the first of each row
    seen = []
    for i, layer in enumerate(plain.model.layers):
        seen.clear()
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
            layer.input_layernorm.register_forward_hook(lambda module, args, output: seen.append(output)),
            layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0])),
        ]
        with torch.no_grad():
            plain.eval()(**batch)
            x, z, a = (each[kept].double() for each in seen)
            stand_in = tuner.stand_ins("default")[i]
            left = a - stand_in.constant - z @ stand_in.down.double().T @ stand_in.up.double().T
        scores[i] = ((left - left.mean(0)).square().sum() / x.square().sum()).sqrt().item()
        for hook in hooks:
            hook.remove()
    return scores


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("warm_start", ["depth", "deviation", {i: abs(i - 2.2) for i in range(6)}], ids=str)
def test_the_start_goes_by_scores_of_the_model_after_the_warm_up(tmp_path, warm_start, warmup_steps):
    """Against scores of a copy that was merged then, so of a model without any adapters."""
    held_out, model, scores = dataset(32), fresh(use_bias=False), {}
    watch, original = Watch(model), Search.begin

    def start(self, step):
        assert step == warmup_steps
        plain = tiny.model("llama")
        plain.load_state_dict(copy.deepcopy(self.model).merge_and_unload().state_dict())
        original(self, step)
        if warm_start == "deviation":
            scores.update(left_by_stand_ins(plain, self.tuner, collate(list(held_out))))

    settings = dict(warm_start=warm_start, search_dataset=held_out, warmup_steps=warmup_steps, interval=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "begin", start)
        _, search = run(tmp_path, model, settings, [watch], save_strategy="no", max_steps=5, learning_rate=1e-2)
    scores = scores or ({i: -i for i in range(6)} if warm_start == "depth" else warm_start)
    ranked = sorted(scores, key=scores.get)
    assert search.report["start"] == ranked
    if warm_start != "depth":
        assert search.report["scores"] == pytest.approx([scores[i] for i in range(6)], rel=1e-3, abs=1e-5)
    assert watch.steps[:5] == [[]] * warmup_steps + [sorted(ranked[:2])] * (5 - warmup_steps)


def test_stand_ins_are_measured_in_the_model_after_the_warm_up(tmp_path):
    """Against those of a copy that was merged then, and adapted anew."""
    model, expected, original = fresh(use_bias=False), {}, Search.begin
    for stand_in in model.stand_ins("default").values():
        stand_in.constant.data.zero_()

    def constants(tuned):
        return {key: stand_in.constant.detach().clone() for key, stand_in in tuned.stand_ins("default").items()}

    def begin(self, step):
        plain = tiny.model("llama")
        plain.load_state_dict(copy.deepcopy(self.model).merge_and_unload().state_dict())
        tuned = get_peft_model(plain, EASConfig(num_skip=2))
        initialize_eas_weights(tuned, [collate(list(dataset()))])
        original(self, step)
        expected.update(constants(tuned), measured=constants(self.tuner))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "begin", begin)
        run(tmp_path, model, dict(search_dataset=dataset(32)), save_strategy="no", max_steps=4, learning_rate=1e-2)
    measured = expected.pop("measured")
    assert measured.keys() == expected.keys() == set(range(6))
    for key, constant in expected.items():
        torch.testing.assert_close(measured[key], constant, rtol=1e-3, atol=1e-5)


def test_the_better_of_start_and_found_stays(tmp_path, caplog):
    """The found set is dearer on all held-out examples; or cheaper; both losses are reported."""
    for price, kept in ((2.0, "start"), (-2.0, "found")):
        model, where = fresh(), {}

        def charge_late(module, args, output, model=model, price=price, where=where):
            if not module.training:
                gates = [a.gates["default"] for a in attentions(model)]
                # while single attentions are tried, the first looks good; as a set, when there is a set of it, bad
                is_found = gates[0] and sum(gates) == 2
                output.loss = output.loss * 0.01 + 0.5 * sum(gates[1:]) + is_found * price
                where.setdefault("all", []).append(gates)

        model.register_forward_hook(charge_late)
        settings = dict(search_dataset=dataset(12), search_steps=3, num_candidates=6)
        _, search = run(tmp_path / kept, model, settings, save_strategy="no", max_steps=8)
        comparison = search.report["comparison"]
        assert comparison["start"]["skip_layers"] == [4, 5]
        assert 0 in comparison["found"]["skip_layers"]
        assert comparison["kept"] == kept
        assert (comparison["found"]["loss"] < comparison["start"]["loss"]) == (kept == "found")
        assert model.skip_layers == search.report["skip_layers"] == comparison[kept]["skip_layers"]
        why = dict(zip(range(6), reasons(search.report), strict=True))
        assert why[0].startswith("cheaper than") if kept == "found" else why[0] == "the start did better in the end"


class EvaluateAlways(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_evaluation_uses_the_best_set_so_far_and_changes_nothing(tmp_path):
    model, watch = fresh(), None
    watch = Watch(model)
    evaluated, search = run(tmp_path / "a", model, others=[EvaluateAlways(), watch], save_strategy="no")
    plain, _ = run(tmp_path / "b", fresh(), save_strategy="no")
    rounds = search.report["rounds"]
    best = [[]] * 2 + [[4, 5]] * 3 + [e["skip_layers"] for e in rounds for _ in range(3)]
    assert watch.evaluated[:11] == best[:11]
    assert watch.evaluated[11:] == [search.report["skip_layers"]] * 9
    expected, actual = parameters(plain.model), parameters(evaluated.model)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    predictions = evaluated.predict(dataset(8)).predictions
    with torch.no_grad():
        own = model.eval()(**{k: v for k, v in collate(list(dataset(8))).items() if k != "labels"}).logits
    assert predictions.shape == tuple(own.shape)


def test_idle_adapters_do_not_move(tmp_path):
    """Neither by momentum nor by weight decay: without a gradient, the optimizer leaves them alone."""
    model = fresh(propagation="mean")
    before = {}

    class Compare(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            before.update(parameters(model))

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step in (3, 12, 20):
                return  # the set has just changed
            moved = 0
            for name, module in model.named_modules():
                if isinstance(module, EASLayer):
                    attention = model.get_submodule(name.replace("mlp", "self_attn"))
                    skips = attention.gates["default"]
                    for key, value in module.named_parameters():
                        if "eas_" in key:
                            idle = not skips if "eas_stand_in" in key else skips and module is attention
                            same = torch.equal(value, before[f"{name}.{key}"])
                            assert same or not idle
                            moved += not same
            assert moved

    run(tmp_path, model, others=[Compare()], weight_decay=0.1, save_strategy="no", learning_rate=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_ignored_counted_and_reported(tmp_path, caplog, bad):
    model = fresh()

    def spoil(module, args, output):
        if not module.training and attentions(model)[3].gates["default"]:
            output.loss = output.loss * bad

    model.register_forward_hook(spoil)
    settings = dict(interval=1)
    with caplog.at_level(logging.WARNING):
        made, search = run(tmp_path, model, settings, save_strategy="no", logging_strategy="steps", logging_steps=1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == search.report
    tried = sum(3 in entry["tried"] for entry in report["rounds"])
    assert report["ignored"] == tried == 1  # not again before others
    for entry in report["rounds"]:
        assert [cost is None for cost in entry["costs"]] == [layer == 3 for layer in entry["tried"]]
    assert report["costs"][3] is None
    assert 3 not in report["skip_layers"]
    assert "not finite; they are ignored" in caplog.text
    assert max(entry.get("eas/ignored_candidates", 0) for entry in made.state.log_history) == 1


def test_a_search_without_a_warm_up_that_exchanges_nothing_learns_what_the_given_set_learns(tmp_path):
    """Bit for bit: the same random numbers, steps and stand-ins."""
    learned = []
    for number, settings in enumerate((dict(num_skip=2), dict(skip_layers=[2, 4]))):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model("llama"), EASConfig(**settings))
        charge(model, 0.5, (0, 1, 3, 5))
        start = {i: float(i not in (2, 4)) for i in range(6)}
        callback = dict(search_dataset=dataset(32), warm_start=start, warmup_steps=0)
        run(tmp_path / str(number), model, callback, max_steps=14, save_strategy="no")
        assert model.skip_layers == [2, 4]
        learned.append(parameters(model))
    of_search, of_given = learned
    assert of_search.keys() == of_given.keys()
    for name, value in of_given.items():
        assert torch.equal(of_search[name], value), name
