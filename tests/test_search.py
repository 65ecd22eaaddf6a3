"""`EASCallback` in the stock Trainer."""

import copy
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import attacks
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_training import collate, dataset, parameters, trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator
from zoo import tiny

from peft_eas import EASCallback, EASConfig, plot_search, score_attentions
from peft_eas.layer import EASAttention, EASLayer
from peft_eas.runtime.eas_record import Record
from peft_eas.search import exchange
from peft_eas.search.held_out import PARTS, HeldOut, fingerprints
from peft_eas.search.report import reasons, write_report
from peft_eas.search.run import Search

STEPS = 20
SEARCH = dict(warmup_steps=3, search_steps=9, interval=3, warm_start=None)  # rounds after steps 6, 9 and 12
PHASES = {"warm-up": 2, "search": 7, "settled": 15}


def fresh(family="llama", seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(tiny.model(family), EASConfig(**dict(num_skip=2) | settings))
    tiny.shake(model, scale=0.05)
    return model


def attentions(model):
    return [m for m in model.modules() if isinstance(m, EASAttention)]


class Watch(TrainerCallback):
    """Writes down, for each optimizer step and each evaluation, which attentions its forwards skipped."""

    def __init__(self, model):
        self.entered, self.ran = Counter(), Counter()
        self.steps, self.evaluated = [], []
        for module in attentions(model):
            module.register_forward_pre_hook(self.enter)
            module.base_layer.register_forward_pre_hook(self.run)

    def enter(self, module, args):
        self.entered[module.layer_idx, module.training] += 1

    def run(self, module, args):
        self.ran[module.layer_idx, module.training] += 1

    def skipped(self, training):
        entered, ran = ([count[i, training] for i in range(6)] for count in (self.entered, self.ran))
        # every forward of the step, those that are repeated in a backward included, did the same
        assert all(entered)
        assert all(ran[i] in (0, entered[i]) for i in range(6))
        self.entered.clear()
        self.ran.clear()
        return [i for i in range(6) if not ran[i]]

    def on_step_begin(self, args, state, control, **kwargs):
        self.entered.clear()
        self.ran.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.forwards = self.entered[0, True]
        self.steps.append(self.skipped(training=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(self.skipped(training=False))


def run(path, model, settings=None, others=(), resume=None, **kwargs):
    search = EASCallback(**SEARCH | (settings or {}))
    made = trainer(path, model, callbacks=[search, *others], **dict(max_steps=STEPS, save_steps=1) | kwargs)
    made.train(resume_from_checkpoint=resume)
    return made, search


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn, scored and chosen
# ----------------------------------------------------------------------------------------------------------------------


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
    sets = [[4, 5]] * 6 + [e["skip_layers"] for e in report["rounds"] for _ in range(3)]
    assert [entry["step"] for entry in report["rounds"]] == [6, 9, 12]
    assert watch.steps[:12] == sets[:12]
    assert watch.steps[12:] == [report["skip_layers"]] * 8
    assert watch.forwards >= kwargs.get("gradient_accumulation_steps", 1)
    assert 0 in report["skip_layers"]
    assert model.skip_layers == report["skip_layers"]
    assert model.peft_config["default"].skip_layers == model.skip_layers


def charge(model, price, layers):
    """Let the held-out loss be this much higher for each of these attentions that is skipped."""

    def add(module, args, output):
        if not module.training and output.loss is not None:
            output.loss = output.loss * 0.01 + price * sum(attentions(model)[i].gates["default"] for i in layers)

    model.register_forward_hook(add)


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
    for name, settings in (("tried", {}), ("alone", dict(warmup_steps=0, search_steps=1, interval=100))):
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


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    "warm_start", ["depth", "kl", "deviation", "similarity", {i: abs(i - 2.2) for i in range(6)}], ids=str
)
def test_warm_starts_are_scores_and_the_lowest_are_skipped_from_the_first_step(tmp_path, warm_start, warmup_steps):
    held_out = dataset(32)
    settings = dict(warm_start=warm_start, search_dataset=held_out, warmup_steps=warmup_steps, interval=9)
    model = fresh()
    watch = Watch(model)
    _, search = run(tmp_path, model, settings, others=[watch], save_strategy="no", max_steps=5)
    scores = {i: -i for i in range(6)} if warm_start == "depth" else warm_start
    if warm_start in ("kl", "deviation", "similarity"):  # of the model as it came
        scores = score_attentions(tiny.model("llama"), [collate(list(held_out))], warm_start)
    ranked = sorted(scores, key=scores.get)
    assert search.report["start"] == ranked
    if warm_start != "depth":
        assert search.report["scores"] == pytest.approx([scores[i] for i in range(6)], rel=1e-3, abs=1e-5)
    assert watch.steps[:5] == [sorted(ranked[:2])] * 5


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


# ----------------------------------------------------------------------------------------------------------------------
# What is left alone
# ----------------------------------------------------------------------------------------------------------------------


class EvaluateAlways(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_evaluation_uses_the_best_set_so_far_and_changes_nothing(tmp_path):
    model, watch = fresh(), None
    watch = Watch(model)
    evaluated, search = run(tmp_path / "a", model, others=[EvaluateAlways(), watch], save_strategy="no")
    plain, _ = run(tmp_path / "b", fresh(), save_strategy="no")
    rounds = search.report["rounds"]
    best = [[4, 5]] * 5 + [e["skip_layers"] for e in rounds for _ in range(3)]
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
            if state.global_step in (12, 20):
                return  # the set has just changed
            moved = 0
            for name, module in model.named_modules():
                if isinstance(module, EASLayer):
                    attention = model.get_submodule(name.replace("mlp", "self_attn"))
                    skips = attention.gates["default"]
                    for key, value in module.named_parameters():
                        if "eas_" in key:
                            of_skipped = any(part in key for part in ("stand_in", "mean_down", "mean_up"))
                            idle = not skips if of_skipped else skips and module is attention
                            same = torch.equal(value, before[f"{name}.{key}"])
                            assert same or not idle
                            moved += not same
            assert moved

    run(tmp_path, model, others=[Compare()], weight_decay=0.1, save_strategy="no", learning_rate=1e-2)


@pytest.mark.parametrize("when", ["collating", "forward"])
def test_an_exception_while_scoring_leaves_the_model_as_it_was(tmp_path, when):
    model, is_wrong = fresh(), [True]

    class Failing:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if when == "collating" and made.state.global_step and is_wrong:
                raise OSError("disk")
            return dataset(8)[i]

    def fail(module, args, output):
        if when == "forward" and is_wrong and [a.gates["default"] for a in attentions(model)] == [False] * 5 + [True]:
            raise OSError("device")  # while the fifth is tried

    model.register_forward_hook(fail)
    search = EASCallback(**SEARCH | dict(search_dataset=Failing()))
    made = trainer(tmp_path, model, callbacks=[search], max_steps=STEPS, save_strategy="no")
    with pytest.raises(OSError, match="disk" if when == "collating" else "device"):
        made.train()
    assert made.state.global_step == 6
    assert all(m.training for m in model.modules() if isinstance(m, EASLayer))
    assert [a.gates["default"] for a in attentions(model)] == [False] * 4 + [True] * 2
    assert torch.equal(
        torch.stack([a.eas_skip["default"] for a in attentions(model)]), torch.tensor([False] * 4 + [True] * 2)
    )
    # training forwards go by the set, whatever it is
    watch = Watch(model)
    model.set_skip_layers([1])
    model(**collate(list(dataset(4))))
    assert watch.skipped(training=True) == [1]
    model.set_skip_layers([4, 5])
    model.peft_config["default"].skip_layers = None
    # and a new training of the same Trainer begins from there, without what the first one left on the model
    is_wrong.clear()
    search.search_dataset = None
    made.train()
    assert search.report["is_settled"]
    assert not model._forward_pre_hooks


class Recorded(EASCallback):
    """Writes down what was before an event in which it scores, and when it does."""

    scores = False

    def watched(self, event, *args, **kwargs):
        self.before, self.scores = noticed(kwargs["model"]), True
        event(*args, **kwargs)
        self.scores = False

    def on_train_begin(self, *args, **kwargs):
        self.watched(lambda *a, **k: EASCallback.on_train_begin(self, *a, **k), *args, **kwargs)

    def on_step_end(self, *args, **kwargs):
        self.watched(super().on_step_end, *args, **kwargs)


def noticed(model):
    """What a scoring, even one that fails, must leave as it was."""
    return (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(dict(a.gates), {k: bool(v) for k, v in a.eas_skip.items()}, a.disable_adapters) for a in attentions(model)],
    )  # fmt: skip


MOMENTS = {"dataset": (1, 6, 14, 23), "collator": (1, 5, 7, 10), "loss": (1, 2, 4, 11), "forward": (1, 2, 4, 11)}
"""Which calls try a batch, measure stand-ins, score the start, and are in a round (those of a model: in a try)."""


@pytest.mark.parametrize(("where", "at"), [(where, at) for where, moments in MOMENTS.items() for at in moments])
def test_what_fails_while_scoring_leaves_no_trace(tmp_path, where, at):
    model, rows, calls = fresh().train(), dataset(8), Counter()
    error = KeyboardInterrupt if where in ("dataset", "loss") else OSError

    def fail(place):
        calls[place] += search.scores
        if search.scores and place == where and calls[place] == at:
            raise error("here")

    class Rows:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            fail("dataset")
            return rows[i]

    def collator(examples):
        fail("collator")
        return collate(examples)

    def compute_loss(*args, **kwargs):
        fail("loss")
        return Trainer.compute_loss(made, *args, **kwargs)

    with torch.no_grad():
        for stand_in in model.stand_ins("default").values():
            stand_in.zero_()  # so that they are measured
    model.base_model.model.model.layers[3].mlp.register_forward_hook(lambda *args: fail("forward"))
    search = Recorded(Rows(), **SEARCH | dict(warm_start="deviation"))
    made = trainer(tmp_path, model, callbacks=[search], max_steps=STEPS, save_strategy="no")
    made.data_collator, made.compute_loss = collator, compute_loss
    with pytest.raises(error, match="here"):
        made.train()
    assert made.state.global_step == (6 if at == MOMENTS[where][-1] else 0)
    assert noticed(model) == search.before
    assert model.training
    assert model.skip_layers == (search.report["skip_layers"] if made.state.global_step else [])
    # a plain step of a training goes by the set, whatever it is
    search.scores = False
    watch = Watch(model)
    model.set_skip_layers([1])
    model(**collate(list(dataset(4)))).loss.backward()
    assert watch.skipped(training=True) == [1]
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_what_fails_while_training_leaves_nothing_on_the_model(tmp_path):
    """A data loader, which fails between two steps."""
    model, rows = fresh(), dataset(24)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            if made.state.global_step == 7:
                raise OSError("disk")
            return rows[i]

    made = trainer(tmp_path, model, callbacks=[EASCallback(**SEARCH)], max_steps=STEPS, save_strategy="no")
    made.train_dataset = Rows()
    with pytest.raises(OSError, match="disk"):
        made.train()
    assert not model._forward_pre_hooks


def test_rewards_from_the_training_set_never_see_the_batch_just_trained_on(tmp_path, monkeypatch):
    trained, scored, rounds = [], [], []
    original = Search.round

    def watched(self, step):
        inner = self.held_out.batches

        def batches(number, avoid=()):
            made = inner(number, avoid)
            scored.append({tuple(row[row > 0].tolist()) for batch in made for row in batch["input_ids"]})
            return made

        self.held_out.batches = batches
        original(self, step)
        self.held_out.batches = inner
        rounds.append(set().union(*trained))

    monkeypatch.setattr(Search, "round", watched)
    model = fresh()

    def remember(module, args, kwargs):
        if module.training:
            trained.append({tuple(row[row > 0].tolist()) for row in kwargs["input_ids"]})

    class Forget(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trained.clear()

    model.register_forward_pre_hook(remember, with_kwargs=True)
    run(
        tmp_path, model, dict(interval=1), others=[Forget()], gradient_accumulation_steps=3, save_strategy="no"
    )  # half of the 24 examples in each step
    assert len(scored) == 9
    for seen, used in zip(rounds, scored, strict=True):
        assert len(seen) == 12
        assert len(used) == 6
        assert not seen & used


def test_rows_with_the_same_question_about_other_images_are_others():
    batch = tiny.inputs("llava", rows=4, padding=None)
    batch["input_ids"] = batch["input_ids"][:1].repeat(4, 1)
    batch["pixel_values"][3] = batch["pixel_values"][0]
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]

    def made_without(trained):
        found = HeldOut(rows, default_data_collator, 1, 4, seed=0).batches(
            0, fingerprints(default_data_collator(trained))
        )
        return [b["pixel_values"][0] for b in found]

    left = made_without([rows[0], rows[1]])
    assert len(left) == 4  # as many as in other processes
    assert all(torch.equal(pixels, rows[2]["pixel_values"]) for pixels in left)
    with pytest.raises(ValueError, match="Every example is being trained on"):
        made_without(rows[:3])
    # the tokens count, too
    rows[3]["input_ids"] = rows[3]["input_ids"].flip(0)
    assert len(made_without(rows[:3])) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_resume(tmp_path_factory):
    """Not every version of the Trainer, with or without a search, resumes exactly within an epoch."""
    path = tmp_path_factory.mktemp("plain")
    whole = trainer(path, fresh(skip_layers=[1], num_skip=None), max_steps=9, save_steps=8)
    whole.train()
    resumed = trainer(path / "again", fresh(skip_layers=[1], num_skip=None), max_steps=9, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-8"))
    expected, actual = parameters(whole.model), parameters(resumed.model)
    if not all(torch.equal(actual[name], expected[name]) for name in expected):
        pytest.skip("these versions of transformers and accelerate don't resume exactly within an epoch")


def same_run(actual, expected, actual_search, expected_search):
    assert actual_search.report == expected_search.report
    a, b = parameters(actual.model), parameters(expected.model)
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("settings", [dict(), dict(warm_start="similarity")], ids=str)
def test_a_resumed_run_draws_scores_and_chooses_like_one_that_was_not_interrupted(
    tmp_path, settings, restore, exact_resume
):
    whole, whole_search = run(tmp_path, fresh(), settings)
    for step in (*PHASES.values(), 12, 13):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed, search = run(
            tmp_path / "again", fresh(seed=11), settings, resume=checkpoint, save_strategy="no",
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        same_run(resumed, whole, search, whole_search)


def test_a_checkpoint_of_any_phase_loads_with_the_best_set_so_far(tmp_path):
    _, search = run(tmp_path, fresh())
    rounds = search.report["rounds"]
    inputs = tiny.inputs("llama")
    for step, expected in ((2, [4, 5]), (7, rounds[0]["skip_layers"]), (15, search.report["skip_layers"])):
        loaded = PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / f"checkpoint-{step}"))
        assert loaded.skip_layers == expected
        logits = loaded(**inputs).logits
        merged = loaded.merge_and_unload()
        assert Record.read(merged.config.eas).skipped == expected
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_a_search_can_not_be_gone_on_from(tmp_path):
    plain = trainer(tmp_path, fresh(num_skip=2), max_steps=3, save_steps=3)
    plain.train()
    with pytest.raises(ValueError, match="without an `EASCallback`"):
        run(tmp_path, fresh(), resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_whose_search_was_changed_is_refused(tmp_path):
    run(tmp_path, fresh(), max_steps=7, save_strategy="steps", save_steps=7)
    (file,) = tmp_path.glob("checkpoint-7/trainer_state.json")
    state = json.loads(file.read_text())
    saved = state["stateful_callbacks"]["eas_search"]
    changes = [
        ("new", 1),
        ("order", [0, 0, 1, 2, 3, 4]),
        ("count", 7),
        ("interval", 0),
        ("rounds", [{}]),
        ("rounds", 3),
    ]
    changes += [("settled", [9]), ("layers", None), ("warmup", "1")]
    for wrong in (5, [], {"a": 1}, *(saved | {key: value} for key, value in changes)):
        state["stateful_callbacks"]["eas_search"] = wrong
        file.write_text(json.dumps(state))
        model = fresh()
        with pytest.raises(ValueError, match=r"`trainer_state.json` has a search"):
            run(tmp_path, model, resume=str(file.parent))
        assert not model._forward_pre_hooks


def test_training_that_ends_before_the_search_settles_with_a_warning(tmp_path, caplog):
    model = fresh()
    with caplog.at_level(logging.WARNING):
        _, search = run(tmp_path, model, max_steps=7, save_strategy="no")
    assert "Training ended at step 7, before the search did (step 12)" in caplog.text
    assert model.skip_layers == search.report["skip_layers"] == search.report["rounds"][0]["skip_layers"]
    assert search.report["is_settled"]
    assert not any(n.has_adapter("default") for n in attentions(model) if n.gates["default"])


def test_the_best_checkpoint_keeps_the_set_that_made_it_the_best(tmp_path, caplog):
    model = fresh()
    charge(model, 0.5, (0, 1, 4, 5))
    with caplog.at_level(logging.WARNING):
        made, search = run(
            tmp_path, model, others=[EarlyStoppingCallback(early_stopping_patience=20)], eval_strategy="steps",
            eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True,  # so that the best one is early
        )  # fmt: skip
    best = PeftModel.from_pretrained(tiny.model("llama"), made.state.best_model_checkpoint)
    assert int(made.state.best_model_checkpoint.rsplit("-", 1)[1]) < 12
    assert best.skip_layers == model.skip_layers == search.report["skip_layers"]
    inputs = tiny.inputs("llama")
    torch.testing.assert_close(model.eval()(**inputs).logits, best.eval()(**inputs).logits)
    chosen = search.report["rounds"][-1]["skip_layers"]
    assert chosen != model.skip_layers
    assert "was saved before the search ended" in caplog.text


class WorseAndWorse(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def test_early_stopping_settles_on_the_set_of_the_best_checkpoint(tmp_path, caplog):
    model = fresh()
    charge(model, 0.5, (0, 1, 4, 5))
    with caplog.at_level(logging.WARNING):
        made, search = run(
            tmp_path, model, others=[WorseAndWorse(), EarlyStoppingCallback(early_stopping_patience=1)],
            eval_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True,
            metric_for_best_model="loss",
        )  # fmt: skip
    assert made.state.global_step == 8
    assert "Training ended at step 8, before the search did" in caplog.text
    assert search.report["rounds"][0]["skip_layers"] != [4, 5]
    assert model.skip_layers == search.report["skip_layers"] == model.peft_config["default"].skip_layers == [4, 5]


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


# ----------------------------------------------------------------------------------------------------------------------
# Budgets
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_skip", "count"), [(3, 3), (0.5, 3), (None, 2), (0, 0)])
def test_counts_and_fractions(tmp_path, num_skip, count):
    model = fresh(num_skip=num_skip)
    run(tmp_path, model, save_strategy="no")
    assert len(model.skip_layers) == count


@pytest.mark.parametrize("allowed", [0.0, 0.4, 100.0])
def test_auto_skips_the_most_that_the_held_out_loss_allows(tmp_path, allowed):
    model = fresh(num_skip="auto", max_loss_increase=allowed)
    kept = {}

    class Keep(TrainerCallback):  # as the model is when the set is chosen
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kept["step"] = state.global_step

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 11:
                kept["model"] = copy.deepcopy(model)

    held_out = dataset(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CLEAR", math.inf)
        _, search = run(tmp_path, model, dict(search_dataset=held_out), others=[Keep()], save_strategy="no")
    report = search.report
    copied, losses = kept["model"].eval(), []
    tries = [try_ for e in report["rounds"] for try_ in zip(e["tried"], e["costs"], strict=True)]
    order = exchange.ranked([5, 4, 3, 2, 1, 0], 2, exchange.costs(tries))
    for count in range(6):
        copied.set_skip_layers(sorted(order[:count]))
        with torch.no_grad():
            losses.append(copied(**collate(list(held_out))).loss.item())
    assert report["budget"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert report["order"] == order or report["comparison"]["kept"] == "start"
    expected = max(k for k in range(6) if k == 0 or losses[k] <= losses[0] + allowed)
    assert len(model.skip_layers) == report["count"] == expected
    assert allowed < 100 or expected == 5
    assert report["budget"]["predicted_loss"] == pytest.approx(losses[expected], rel=1e-4)
    with torch.no_grad():  # what it is when the training has ended
        ended = model.eval()(**collate(list(held_out))).loss.item()
    assert report["budget"]["measured_loss"] == pytest.approx(ended, rel=1e-4)


def test_a_target_speedup_is_predicted_from_operations_and_checked_by_measurement(tmp_path, caplog):
    """The operations of a tiny Llama, counted by hand."""
    model, rows = fresh(num_skip=None, target_speedup=1.2), [dataset(1)[0]] * 4
    _, search = run(tmp_path, model, dict(search_dataset=rows), save_strategy="no")
    tokens, length = 4 * len(rows[0]["input_ids"]), len(rows[0]["input_ids"])
    attention = 2 * tokens * 32 * (32 + 16 + 16 + 32) + 2 * 2 * tokens * length * 32
    total = 6 * (attention + 2 * tokens * 3 * 32 * 48) + 2 * tokens * 32 * 99
    count = next(k for k in range(6) if total / (total - k * attention) >= 1.2)
    budget = search.report["budget"]
    assert len(model.skip_layers) == count
    assert budget["predicted_speedup"] == pytest.approx(total / (total - count * attention), rel=0.01)
    assert budget["measured_speedup"] > 0
    assert (budget["measured_speedup"] < 1.2) == ("the target is 1.20" in caplog.text)
    with pytest.raises(ValueError, match=r"`target_speedup`=9 can't be had"):
        run(tmp_path, fresh(num_skip=None, target_speedup=9), save_strategy="no")


# ----------------------------------------------------------------------------------------------------------------------
# Seeing it
# ----------------------------------------------------------------------------------------------------------------------


def test_reporters_see_the_metrics_and_files_are_left(tmp_path):
    seen = []

    class Reporter(TrainerCallback):  # as TensorBoard's, which stands before the callbacks of the user
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    model = fresh()
    search = EASCallback(**SEARCH)
    made = trainer(
        tmp_path, model, callbacks=[Reporter(), search], max_steps=STEPS, logging_strategy="steps", logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    made.train()
    logged = [logs for logs in seen if "eas/loss" in logs]
    entries = search.report["rounds"]
    assert len(logged) == len(entries) == 3
    for logs, entry in zip(logged, entries, strict=True):
        means = [sum(cost) / len(cost) for cost in entry["costs"]]
        assert logs["eas/cost_min"] == pytest.approx(min(means))
        assert logs["eas/cost_max"] == pytest.approx(max(means))
        assert logs["eas/loss"] == pytest.approx(sum(entry["losses"]) / PARTS)
        assert logs["eas/skipped"] == 2
        assert logs["eas/exchanges"] == sum(len(e["exchanged"]) for e in entries[: entries.index(entry) + 1])
        assert all(isinstance(value, (int, float)) for value in logs.values())
        assert next(h for h in made.state.log_history if h["step"] == entry["step"])["eas/skipped"] == 2
    assert [logged[0]["eas/skip_layers/1"], logged[0]["eas/skip_layers/2"]] == entries[0]["skip_layers"]
    assert json.loads((tmp_path / "report.json").read_text()) == search.report
    assert (tmp_path / "search.png").stat().st_size > 10_000
    for given in (search.report, tmp_path, str(tmp_path / "report.json")):
        assert len(plot_search(given).axes) == 4  # scores, sets, costs, losses
    plot_search(tmp_path, tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_search(tmp_path / "nowhere")
    # one that somebody changed
    report, odd = json.loads((tmp_path / "report.json").read_text()), tmp_path / "odd.json"

    def drawn(text):
        odd.write_text(text)
        return lambda: plot_search(odd)

    seen = attacks.outcomes(("a report", drawn(text)) for text in attacks.changed_json(report, seed=5, count=30))
    assert set(seen) == {"works", "refused"}
    with pytest.raises(ValueError, match="not the report of a search"):
        plot_search({"layers": [1]})


def test_a_full_disk_leaves_the_report_and_the_picture_that_were_there(tmp_path):
    run(tmp_path / "run", fresh(), save_strategy="no")
    before, report = attacks.contents(tmp_path), json.loads((tmp_path / "run" / "report.json").read_text())
    moments = []
    for moment, failed in attacks.full_disks(tmp_path, lambda: write_report(report | {"seed": 1}, tmp_path / "run")):
        moments.append(moment)
        assert failed
        after = attacks.contents(tmp_path)
        assert after.keys() == before.keys()
        assert after["run/search.png"] == before["run/search.png"]
        # a new report stands as soon as it is whole
        assert json.loads(after["run/report.json"])["seed"] == (1 if "search.png" in moment else 7)
        (tmp_path / "run" / "report.json").write_bytes(before["run/report.json"])
    assert {"open report.json", "write report.json", "replace report.json", "replace search.png"} <= {*moments}
    before = attacks.contents(tmp_path)  # with the new report, of the last time, when the disk was large enough
    for moment, failed in attacks.full_disks(tmp_path, lambda: plot_search(report, tmp_path / "run" / "search.png")):
        assert failed, moment
        assert attacks.contents(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        dict(warmup_steps=-1), dict(warmup_steps=True), dict(search_steps="many"), dict(search_steps=math.inf),
        dict(interval=0), dict(interval=2.5), dict(num_candidates=0), dict(warm_start="gradient"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        EASCallback(**wrong)


def test_what_can_not_be_searched(tmp_path, caplog):
    with pytest.raises(ValueError, match="with an EAS adapter"):
        trainer(tmp_path, tiny.model("llama"), callbacks=[EASCallback()])
    for wrong in (iter([1]), {"a": dataset(4)}, "reviews.jsonl"):
        with pytest.raises(ValueError, match=rf"with this {type(wrong).__name__}.*not streamed"):
            run(tmp_path, fresh(), dict(search_dataset=wrong))
    with pytest.raises(ValueError, match="prepare it like the training set"):
        run(tmp_path, fresh(), dict(search_dataset=dataset(4).rename_columns({"input_ids": "a", "labels": "b"})))
    with pytest.raises(ValueError, match=r"no scores of layers \[3, 4, 5\]"):
        run(tmp_path, fresh(), dict(warm_start={0: 1, 1: 2, 2: 3}))
    unlabelled = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    with caplog.at_level(logging.INFO):
        model = fresh(num_skip=None, skip_layers=[1])
        run(tmp_path, model, dict(search_dataset=unlabelled), save_strategy="no")
    assert "there is nothing to search" in caplog.text
    assert model.skip_layers == [1]
    model = fresh()
    model.set_skip_layers([1])
    model.peft_config["default"].skip_layers = None
    model.skip_gates().drop_idle()
    with pytest.raises(ValueError, match="both the adapter and the stand-in"):
        run(tmp_path, model)


def test_a_forgotten_callback_is_told_at_the_first_step(tmp_path):
    def said(callbacks=(), **settings):
        model = fresh(**settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, model, callbacks=list(callbacks), max_steps=3, save_strategy="no").train()
        return [str(w.message) for w in caught if "no search is running" in str(w.message)]

    (message,) = said()
    assert "EASCallback" in message
    assert "skip_layers" in message
    assert len(said(num_skip="auto", max_loss_increase=0.1)) == 1
    for settings in (dict(callbacks=[EASCallback(**SEARCH)]), dict(num_skip=0), dict(num_skip=None, skip_layers=[1])):
        assert not said(**settings)


def test_a_callback_that_no_trainer_calls_is_refused(tmp_path):
    made = trainer(tmp_path, fresh(), max_steps=1)
    with pytest.raises(ValueError, match=r"was called by something else.*`callbacks`"):
        EASCallback().on_train_begin(made.args, made.state, made.control, made.model)


def test_columns_that_the_collator_does_not_know_are_left_out(tmp_path):
    held_out = dataset(8).add_column("text", ["?"] * 8)
    _, search = run(tmp_path, fresh(), dict(search_dataset=held_out), save_strategy="no")
    assert len(search.report["rounds"]) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Killed; and another Trainer
# ----------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import test_search
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

test_search.run(sys.argv[1], test_search.fresh(), others=[Kill()], save_steps=2)
"""


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, phase, exact_resume):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "examples"), os.environ.get("PYTHONPATH", "")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(PHASES[phase] + 1)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed" / f"checkpoint-{STEPS}").exists()
    whole, whole_search = run(tmp_path / "whole", fresh(), save_strategy="no")
    resumed, search = run(tmp_path / "killed", fresh(seed=4), resume=True, save_steps=2)
    same_run(resumed, whole, search, whole_search)


def test_trl_s_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(90)} | {"<pad>": 90, "<eos>": 91, "<unk>": 92}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip
    rows = [{"prompt": f"w{i} w{2 * i} w{3 * i}", "completion": f" w{10 + i % 2}"} for i in range(4, 28)]
    model = fresh()
    watch = Watch(model)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=7, bf16=False, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    made = trl.SFTTrainer(
        model, args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(rows[:16]),
        eval_dataset=Dataset.from_list(rows[16:]), callbacks=[watch],
    )  # fmt: skip
    search = EASCallback(made.eval_dataset, **SEARCH)
    made.add_callback(search)
    made.train()
    entries = search.report["rounds"]
    assert [entry["step"] for entry in entries] == [6, 9, 12]
    assert all(math.isfinite(loss) for entry in entries for loss in entry["losses"])
    assert watch.steps[-1] == model.skip_layers == search.report["skip_layers"]
    assert any("eas/skipped" in logs for logs in made.state.log_history)
    merged = model.merge_and_unload()
    assert Record.read(merged.config.eas).skipped == search.report["skip_layers"]
    # a dataset that is not prepared is refused
    refused = trl.SFTTrainer(
        fresh(), args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(rows[:16]),
        callbacks=[EASCallback(Dataset.from_list(rows[16:]), **SEARCH)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="after a TRL trainer has been made"):
        refused.train()
