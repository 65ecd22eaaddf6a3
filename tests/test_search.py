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
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_training import collate, dataset, parameters, trainer
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator

from peft_eas import EASCallback, EASConfig, plot_search, score_attentions
from peft_eas.layer import EASAttention, EASLayer
from peft_eas.modeling_eas import skipped
from peft_eas.search import bandit, callback
from peft_eas.search.held_out import HeldOut, fingerprints

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
def test_each_optimizer_step_skips_one_drawn_set_and_the_chosen_one_in_the_end(tmp_path, kwargs):
    model = fresh()
    watch = Watch(model)
    if kwargs.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    _made, search = run(tmp_path, model, others=[watch], save_strategy="no", **kwargs)
    report = search.report
    preferences = [[0.0] * 6] * 6 + [e["preferences"] for e in report["rounds"] for _ in range(3)]
    assert [entry["step"] for entry in report["rounds"]] == [6, 9, 12]
    chosen = bandit.choose(report["preferences"], 2)
    drawn = [bandit.draw(preferences[step], 2, random.Random(f"7 step {step}")) for step in range(12)]
    assert watch.steps == [list(skipped) for skipped in (*drawn, *[chosen] * 8)]
    assert watch.forwards >= kwargs.get("gradient_accumulation_steps", 1)
    assert len(set(drawn)) > 3
    assert model.skip_layers == report["skip_layers"] == list(chosen)
    assert model.peft_config["default"].skip_layers == model.skip_layers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_candidates_are_scored_by_the_loss_with_just_them_skipped(tmp_path, family, monkeypatch):
    """Against a copy of the model, made when the round begins, with the set put in place by `set_skip_layers`."""
    model, held_out = fresh(family, dropout=0.3), dataset(12)
    expected = []

    def watched(self, step):
        batches = self.held_out.batches(len(self.state.rounds))
        assert all(len(batch["input_ids"]) == 4 for batch in batches)
        for arms in bandit.draw_distinct(self.state.preferences, 2, 3, random.Random(f"7 round {step}")):
            copied = copy.deepcopy(self.model).eval()
            copied.set_skip_layers(self.state.to_layers(arms))
            with torch.no_grad():
                sums = [(copied(**b).loss.item(), int((b["labels"] != -100).sum())) for b in batches]
            expected.append(sum(x * n for x, n in sums) / sum(n for _, n in sums))
        original(self, step)

    original = callback._Search._score_candidates
    monkeypatch.setattr(callback._Search, "_score_candidates", watched)
    _, search = run(tmp_path, model, dict(search_dataset=held_out), save_strategy="no", max_steps=12)
    report = search.report
    actual = [loss for entry in report["rounds"] for loss in entry["losses"]]
    assert actual == pytest.approx(expected, rel=1e-5)
    assert len(actual) == 9
    assert len(set(actual)) == 9
    # and the preferences follow from them
    preferences = [0.0] * 6
    for entry in report["rounds"]:
        preferences = bandit.update(preferences, entry["subsets"], entry["losses"], 2.0)
        assert entry["preferences"] == pytest.approx(preferences, abs=1e-5)
    assert report["skip_layers"] == list(bandit.choose(preferences, 2))


def test_a_planted_pair_is_found(tmp_path):
    """All attentions but 1 and 4 are given a price; from equal preferences, the bandit skips just these two."""
    model = fresh()

    def charge(module, args, output):
        if not module.training:
            output.loss = output.loss + 0.5 * sum(attentions(model)[i].gates["default"] for i in (0, 2, 3, 5))

    model.register_forward_hook(charge)
    settings = dict(warmup_steps=0, search_steps=40, interval=1, num_candidates=4)
    run(tmp_path, model, settings, max_steps=41, save_strategy="no", learning_rate=1e-4)
    assert model.skip_layers == [1, 4]


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    "warm_start", ["depth", "kl", "deviation", "similarity", "loss", {i: abs(i - 2.2) for i in range(6)}], ids=str
)
def test_warm_starts_order_the_preferences_by_scores(tmp_path, monkeypatch, warm_start, warmup_steps):
    held_out, kept = dataset(32), []

    def watched(self):
        kept.append(copy.deepcopy(self.model))
        original(self)

    original = callback._Search._warm_start
    monkeypatch.setattr(callback._Search, "_warm_start", watched)
    settings = dict(warm_start=warm_start, search_dataset=held_out, warmup_steps=warmup_steps, interval=9)
    model = fresh()
    watch = Watch(model)
    _, search = run(tmp_path, model, settings, others=[watch], save_strategy="no", max_steps=5)
    copied = kept[0].eval()
    scores = {i: -i / 6 for i in range(6)} if warm_start == "depth" else warm_start
    if warm_start in ("kl", "deviation", "similarity"):  # of the model as it came
        scores = score_attentions(tiny.model("llama"), [collate(list(held_out))], warm_start)
    elif warm_start == "loss":
        batch, losses = collate(list(held_out)), []
        for skipped in ([], *([i] for i in range(6))):
            copied.set_skip_layers(skipped)
            with torch.no_grad():
                losses.append(copied(**batch).loss.item())
        scores = {i: loss - losses[0] for i, loss in enumerate(losses[1:])}
    assert search.report["scores"] == pytest.approx([scores[i] for i in range(6)], rel=1e-3, abs=1e-5)
    start = search.report["initial_preferences"]
    assert sorted(range(6), key=lambda i: -start[i]) == sorted(range(6), key=scores.get)
    preferences = [[0.0] * 6 if warm_start == "loss" else start] * warmup_steps + [start] * (5 - warmup_steps)
    drawn = [bandit.draw(preferences[step], 2, random.Random(f"7 step {step}")) for step in range(5)]
    assert watch.steps == [list(skipped) for skipped in drawn]
    assert search.report["skip_layers"] == list(bandit.choose(start, 2))


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
    assert watch.evaluated[:14] == best
    assert watch.evaluated[14:] == [search.report["skip_layers"]] * 6
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
                    skips = attention.drawn.get("default", attention.gates["default"])
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
    model = fresh()
    calls = []

    class Failing:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if when == "collating":
                raise OSError("disk")
            example = dict(dataset(8)[i])
            if len(calls) >= 6:  # the second candidate of the first round
                example["input_ids"] = [1000] * len(example["input_ids"])
            calls.append(i)
            return example

    search = EASCallback(**SEARCH | dict(search_dataset=Failing()))
    made = trainer(tmp_path, model, callbacks=[search], max_steps=STEPS, save_strategy="no")
    if when == "forward":
        calls.extend(range(6))
    with pytest.raises((OSError, IndexError)):
        made.train()
    assert all(m.training for m in model.modules() if isinstance(m, EASLayer))
    assert [a.gates["default"] for a in attentions(model)] == [False] * 4 + [True] * 2
    assert torch.equal(
        torch.stack([a.eas_skip["default"] for a in attentions(model)]), torch.tensor([False] * 4 + [True] * 2)
    )
    assert torch.compiler is not None
    # and a new training of the same Trainer begins from there, without what the first one left on the model
    search.search_dataset = None
    made.train()
    assert search.report["is_settled"]
    assert not model._forward_pre_hooks


def test_rewards_from_the_training_set_never_see_the_batch_just_trained_on(tmp_path, monkeypatch):
    trained, scored, rounds = [], [], []
    original = callback._Search._score_candidates

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

    monkeypatch.setattr(callback._Search, "_score_candidates", watched)
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
        assert len(used) == 12
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
    assert len(left) == 1
    assert torch.equal(left[0], rows[2]["pixel_values"])
    with pytest.raises(ValueError, match="Every example is being trained on"):
        made_without(rows[:3])
    # the tokens count, too
    rows[3]["input_ids"] = rows[3]["input_ids"].flip(0)
    assert len(made_without(rows[:3])) == 1


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
        assert skipped(merged.config.eas) == expected
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_a_search_can_not_be_gone_on_from(tmp_path):
    plain = trainer(tmp_path, fresh(num_skip=2), max_steps=3, save_steps=3)
    plain.train()
    with pytest.raises(ValueError, match="without an `EASCallback`"):
        run(tmp_path, fresh(), resume=str(tmp_path / "checkpoint-3"))


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
    assert all(not a.drawn for a in attentions(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_ignored_counted_and_reported(tmp_path, caplog, bad):
    model = fresh()

    def spoil(module, args, output):
        if not module.training and attentions(model)[3].gates["default"]:
            output.loss = output.loss * bad

    model.register_forward_hook(spoil)
    settings = dict(interval=1, num_candidates=4)
    with caplog.at_level(logging.WARNING):
        made, search = run(tmp_path, model, settings, save_strategy="no", logging_strategy="steps", logging_steps=1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == search.report
    without = sum(3 in subset for entry in report["rounds"] for subset in entry["subsets"])
    assert report["ignored"] == without > 0
    for entry in report["rounds"]:
        assert [loss is None for loss in entry["losses"]] == [3 in subset for subset in entry["subsets"]]
    assert report["preferences"][3] == 0
    assert all(math.isfinite(s) for s in report["preferences"])
    assert "not finite; they are ignored" in caplog.text
    assert max(entry.get("eas/ignored_candidates", 0) for entry in made.state.log_history) == without


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
    _, search = run(tmp_path, model, dict(search_dataset=held_out), others=[Keep()], save_strategy="no")
    report = search.report
    copied, losses = kept["model"].eval(), []
    for count in range(6):
        copied.set_skip_layers(list(bandit.choose(report["preferences"], count)))
        with torch.no_grad():
            losses.append(copied(**collate(list(held_out))).loss.item())
    assert report["budget"]["losses"] == pytest.approx(losses, rel=1e-4)
    expected = max(k for k in range(6) if k == 0 or losses[k] <= losses[0] + allowed)
    assert len(model.skip_layers) == report["count"] == expected
    assert allowed < 100 or expected == 5


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
    logged = [logs for logs in seen if "eas/candidate_loss" in logs]
    entries = search.report["rounds"]
    assert len(logged) == len(entries) == 3
    for logs, entry in zip(logged, entries, strict=True):
        assert logs["eas/candidate_loss_min"] == min(entry["losses"])
        assert logs["eas/candidate_loss"] == pytest.approx(sum(entry["losses"]) / 3)
        assert logs["eas/skipped"] == 2
        assert logs["eas/preference_spread"] > 0
        assert all(isinstance(value, (int, float)) for value in logs.values())
        assert next(h for h in made.state.log_history if h["step"] == entry["step"])["eas/skipped"] == 2
    assert [logged[0]["eas/skip_layers/1"], logged[0]["eas/skip_layers/2"]] == entries[0]["skip_layers"]
    assert json.loads((tmp_path / "report.json").read_text()) == search.report
    assert (tmp_path / "search.png").stat().st_size > 10_000
    for given in (search.report, tmp_path, str(tmp_path / "report.json")):
        assert len(plot_search(given).axes) == 3  # preferences, their scale, losses
    plot_search(tmp_path, tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_search(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        dict(warmup_steps=-1), dict(warmup_steps=True), dict(search_steps="many"), dict(search_steps=math.inf),
        dict(interval=0), dict(interval=2.5), dict(num_candidates=1), dict(lr=0), dict(lr=math.nan),
        dict(warm_start="gradient"),
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
    assert skipped(merged.config.eas) == search.report["skip_layers"]
    # a dataset that is not prepared is refused
    refused = trl.SFTTrainer(
        fresh(), args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(rows[:16]),
        callbacks=[EASCallback(Dataset.from_list(rows[16:]), **SEARCH)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="after a TRL trainer has been made"):
        refused.train()
