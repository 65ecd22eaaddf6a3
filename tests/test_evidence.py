"""The benchmark of accuracy: a rerun goes on, processes share the work, nothing is lost, and tables are right."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from zoo import tiny

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import budgets
import evidence
import references
import tasks
import trainings
from evidence import Table
from tasks import Task
from trainings import Method, Rows, Run


def row(method="LoRA", skipped=0, seed=0, loss=0.5, kind="run", **others):
    return {
        "model": "MiniLM", "task": "tweets", "method": method, "skipped": skipped, "seed": seed, "loss": loss,
        "accuracy": 0.8, "learning_rate": 1e-3, "trainable": 1000, "seconds": 10.0, "version": "0.2.0",
        "skip_layers": [], "test_se": 0.01, "validation_loss": loss, "date": "2026-11-25", "kind": kind,
    } | others  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Tiny(Task):
    """A random Llama and random tokens."""

    has_prompts = False

    @property
    def splits(self):
        ids = torch.randint(3, 97, (300, 8), generator=torch.Generator().manual_seed(0)).tolist()
        return self.split([{"input_ids": i, "labels": i} for i in ids])

    def load(self):
        return tiny.model("llama")

    collate = tasks.Source.collate
    losses = tasks.Source.losses


def a_task():
    return Tiny(
        model="tiny", name="random", layers=6, counts=(2, 3), steps=3, batch_size=4, validation=10, test=20, seeds=2,
        rates=dict.fromkeys(("LoRA", tasks.GIVEN, "0.1.0"), (1e-3, 1e-2)),
    )  # fmt: skip


@pytest.fixture
def task():
    return a_task()


def test_no_file_of_python_source_is_in_two_splits(monkeypatch):
    """A file's tokens are its number here; every third one is too short for four windows, others are longer."""
    files = [str(number) for number in range(300)]
    lengths = [random.Random(name).randint(40, 500) if int(name) % 3 else 30 for name in files]

    def tokenizer(text, **settings):
        return SimpleNamespace(input_ids=[int(text)] * lengths[int(text)])

    monkeypatch.setattr(tasks, "python_source", lambda: files)
    monkeypatch.setattr(tasks, "load_tokenizer", lambda: tokenizer)
    for cached in (tasks.python_tokens, tasks.python_windows):
        monkeypatch.setattr(tasks, cached.__name__, cached.__wrapped__)
    task = tasks.Source(
        model="tiny", name="source", layers=6, counts=(2, 3), steps=3, batch_size=4, validation=40, test=200, window=10
    )
    seen = [{name for example in split for name in example["input_ids"]} for split in task.splits]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert [len(names) for names in seen[2:]] == [10, 50]
    drawn = Counter(example["input_ids"][0] for example in task.splits.validation)
    assert drawn == {name: min(20, lengths[name] // 10) for name in seen[2]}
    assert max(drawn.values()) == 20


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "evidence.json")


def fake(run, present):
    """A row without a training; validation likes a rate of 0.01."""
    rate = trainings.best_rate(run, present) if run.rate is None else run.rate
    kind = "run" if run.rate is None else "rate"
    about = {"model": run.task.model, "task": run.task.name, "learning_rate": rate, "validation_loss": abs(rate - 0.01)}
    return row(run.method, run.skipped, run.seed, kind=kind, **about)


# What is done, and by whom --------------------------------------------------------------------------------------------


def with_needed(*runs):
    return list(dict.fromkeys(each for run in runs for each in [*run.needed(), run]))


def test_a_rerun_goes_on_with_what_is_missing(task, rows):
    runs, done = with_needed(Run(task, "LoRA", 0, 0), Run(task, "LoRA", 0, 1)), []

    def execute(run, present):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run.key)
        return fake(run, present)

    with pytest.raises(KeyboardInterrupt):
        trainings.work(runs, rows, execute)
    assert [trainings.key_of(row) for row in rows.read()] == done == [run.key for run in runs[:3]]
    again = []
    assert trainings.work(runs, rows, lambda run, present: again.append(run.key) or fake(run, present)) == []
    assert again == [runs[3].key]
    assert trainings.work(runs, rows, lambda run, present: pytest.fail(run.key)) == []


def test_the_rate_is_the_best_by_validation_and_its_run_is_not_repeated(task, rows):
    trainings.work(with_needed(Run(task, "LoRA", 0, 1)), rows, fake)
    assert [row["learning_rate"] for row in rows.read()] == [1e-3, 1e-2, 1e-2]
    same = trainings.execute(Run(task, "LoRA", 0, 0), rows.read())  # trains nothing
    assert same == rows.read()[1] | {"kind": "run"}


def test_a_rate_that_diverged_is_not_chosen(task):
    run = Run(task, "LoRA", 0)
    tried = [fake(needed, []) for needed in run.needed()]
    tried[1] |= {"validation_loss": None, "loss": None}
    assert trainings.best_rate(run, tried) == 1e-3


def test_a_rate_is_chosen_by_the_mean_over_as_many_seeds_as_the_task_says(task):
    """Seed 0 likes 0.001, by less than the other one likes 0.01."""
    losses = {(1e-3, 0): 0.3, (1e-2, 0): 0.4, (1e-3, 1): 0.8, (1e-2, 1): 0.5, (1e-3, 2): 0.1, (1e-2, 2): 0.9}

    def tried(run):
        return [fake(n, []) | {"validation_loss": losses[n.rate, n.seed]} for n in run.needed()]

    of_one, of_two = Run(task, "LoRA", 0, 4), Run(replace(task, rate_seeds=2), "LoRA", 0, 4)
    assert [(n.seed, n.rate) for n in of_two.needed()] == [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2)]
    assert trainings.best_rate(of_one, tried(of_two)) == 1e-3
    assert trainings.best_rate(of_two, tried(of_two)) == 1e-2
    diverged = [made | {"validation_loss": None} if made["seed"] else made for made in tried(of_two)]
    assert trainings.rate_losses(diverged) == {1e-3: math.inf, 1e-2: math.inf}


def test_runs_with_a_rate_that_is_not_chosen_any_more_are_done_again(task, rows):
    run = Run(task, "LoRA", 0, 1)
    trainings.work(with_needed(run), rows, fake)
    assert [r["learning_rate"] for r in trainings.current(rows.read(), [task])] == [1e-3, 1e-2, 1e-2]
    more = replace(task, rate_seeds=2)  # and the second likes the other rate

    def execute(run, present):
        made = fake(run, present)
        return made | {"validation_loss": 1.0} if (run.rate, run.seed) == (1e-2, 1) else made

    assert len(trainings.current(rows.read(), [more])) == 3  # as long as not all are tried
    trainings.work(with_needed(Run(more, "LoRA", 0, 1)), rows, execute)
    of_run = [r for r in rows.read() if trainings.key_of(r) == run.key]
    assert [r["learning_rate"] for r in of_run] == [1e-3]
    assert trainings.current(rows.read(), [more]) == rows.read()


def test_a_run_with_a_rate_that_is_tried_later_is_not_repeated(task):
    run = Run(task, "LoRA", 0, 1, 1e-2)
    made = fake(Run(task, "LoRA", 0, 1), [fake(n, []) for n in Run(task, "LoRA", 0, 1).needed()])
    assert made["learning_rate"] == 1e-2
    assert trainings.execute(run, [made]) == made | {"kind": "rate"}  # trains nothing


def test_a_failure_keeps_only_what_needs_it_from_being_done(task, rows, capsys):
    runs = with_needed(Run(task, "LoRA", 0, 0), Run(task, "EAS", 2, 0))

    def execute(run, present):
        if run.method == "LoRA" and run.rate == 1e-3:
            raise RuntimeError("no memory")
        return fake(run, present)

    methods = {name: replace(method, version="") for name, method in trainings.METHODS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "METHODS", methods)
        failed = trainings.work(runs, rows, execute)
    assert failed == [runs[0].key, Run(task, "LoRA", 0, 0).key]
    assert [trainings.key_of(row) for row in rows.read()] == [run.key for run in runs if run.key not in failed]
    assert "no memory" in capsys.readouterr().err


def test_other_versions_methods_are_left_and_said_once(task, rows, capsys, monkeypatch):
    monkeypatch.setitem(trainings.METHODS, tasks.GIVEN, Method("deviation", version="9."))
    runs = with_needed(Run(task, "LoRA", 0, 0), Run(task, tasks.GIVEN, 2, 0))
    assert trainings.work(runs, rows, fake) == []
    assert {row["method"] for row in rows.read()} == {"LoRA"}
    assert capsys.readouterr().out.count("3 runs are left for another version") == 1


def test_a_write_that_is_interrupted_loses_nothing(rows, monkeypatch):
    rows.add(row(seed=0))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rows.add(row(seed=1))
    assert rows.read() == [row(seed=0)]
    rows.add(row(seed=2))
    assert rows.read() == [row(seed=0), row(seed=2)]
    with pytest.raises(ValueError):
        rows.add(row(loss=math.nan))  # no JSON
    assert len(rows.read()) == 2


def test_two_processes_share_the_runs(tmp_path):
    """Neither does what the other one has claimed, and no row is lost."""
    code = f"""
        import sys, time
        sys.path[:0] = [{str(Path(trainings.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
        import trainings, test_evidence
        from pathlib import Path
        trainings.WAIT = 0.05
        task = test_evidence.a_task()
        def execute(run, present):
            time.sleep(0.05)
            return test_evidence.fake(run, present)
        runs = test_evidence.with_needed(*(trainings.Run(task, "LoRA", 0, seed) for seed in range(12)))
        assert trainings.work(runs, trainings.Rows(Path({str(tmp_path)!r}) / "evidence.json"), execute) == []
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    keys = [trainings.key_of(row) for row in json.loads((tmp_path / "evidence.json").read_text())]
    assert len(keys) == len(set(keys)) == 14
    assert sorted(keys) == sorted(line[3:] for text in said for line in text.splitlines() if line.startswith("== "))


def test_names_of_runs_are_those_of_their_rows_and_none_is_twice():
    runs = trainings.all_runs()
    assert len({run.key for run in runs}) == len(runs)
    for position, run in enumerate(runs):
        about = {"model": run.task.model, "task": run.task.name}
        kind = "run" if run.rate is None else "rate"
        made = row(run.method, run.skipped, run.seed, kind=kind, learning_rate=run.rate or 1e-3, **about)
        assert trainings.key_of(made) == run.key
        assert set(run.needed()) <= set(runs[:position])


def test_only_picks_runs_whose_name_contains_all_and_those_they_need():
    runs = trainings.wanted_runs(["tweets", "drop, means, LoRA", "3 skipped", "seed 4"])
    assert [run.key.split(", ", 1)[1] for run in runs] == [
        *(f"tweets, LoRA, 0 skipped, seed 0, rate {rate}" for rate in ("0.001", "0.002", "0.004", "0.008")),
        "tweets, drop, means, LoRA, 3 skipped, seed 4",
    ]


@pytest.mark.parametrize("kind", ["LoRA", tasks.GIVEN, "0.1.0"])
@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.title)
def test_the_rate_that_was_chosen_has_worse_ones_on_either_side(task, kind):
    """Else a baseline, or EAS, might be better than it seems."""
    found = json.loads((evidence.RESULTS / "evidence.json").read_text())
    run = Run(task, kind, 0 if kind == "LoRA" else task.counts[0])
    keys = {needed.key for needed in run.needed()}
    made = [row for row in found if row["kind"] == "rate" and trainings.key_of(row) in keys]
    if len(made) < len(keys):
        pytest.skip("not all of them were tried yet")
    assert min(task.rates[kind]) < trainings.best_rate(run, made) < max(task.rates[kind])


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_batches_for_all_methods(task):
    first, again, other = task.drawn(0), task.drawn(0), task.drawn(1)
    assert first == again
    assert first != other
    assert len(first) == task.steps * task.batch_size
    train = task.splits.train
    assert all(example in train for example in first)
    assert not [example for example in train if example in task.splits.test + task.splits.search]


def test_more_steps_than_examples_see_each_equally_often(task):
    longer = replace(task, steps=2 * len(task.splits.train) // task.batch_size)
    drawn = [tuple(example["input_ids"]) for example in longer.drawn(0)]
    assert {drawn.count(each) for each in drawn} == {2}


@pytest.mark.parametrize("method", ["LoRA", "random"])
def test_a_run_trains_merges_and_is_tested(method, task, monkeypatch):
    monkeypatch.setitem(trainings.METHODS, "random", Method("random", settings={"propagation": "none"}))
    run = Run(task, method, 0 if method == "LoRA" else 2, 1)
    made = trainings.execute(run, [fake(needed, []) for needed in run.needed()])
    assert set(made) == set(row())
    assert trainings.key_of(made) == run.key
    assert (made["learning_rate"], made["accuracy"]) == (1e-2, None)
    assert made["skip_layers"] == ([] if method == "LoRA" else sorted(trainings.set_of(run)))
    assert 3 < made["loss"] < 8
    assert made["trainable"] > 0
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize(("method", "all_adapted"), [("retained FFNs not adapted", False), (tasks.GIVEN, True)])
def test_which_ffns_are_adapted(method, all_adapted, task):
    run = Run(task, method, 2)
    model, callbacks = trainings.prepare(run)
    trainings.train(run, model, callbacks, 1e-2)
    layers = model.base_model.model.model.layers
    adapted = [index for index, layer in enumerate(layers) if layer.mlp.eas_adapter["default"].up.any()]
    assert adapted == (list(range(6)) if all_adapted else model.skip_layers)


def test_a_windows_loss_is_its_tokens_mean(task):
    model, windows = task.load(), task.splits.test
    losses, right = task.losses(model, windows)
    for window, loss in zip(windows, losses, strict=True):
        ids = torch.tensor([window["input_ids"]])
        assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert right is None


# Other ways to choose ----------------------------------------------------------------------------------------------


def test_a_set_that_was_trained_is_not_trained_again(task, rows, monkeypatch):
    given, other = Run(task, tasks.GIVEN, 2, 1), Run(task, "set by kl", 2, 1)
    monkeypatch.setattr(trainings, "set_of", lambda run, rows=(): [1, 4])
    same = fake(given, [fake(needed, []) for needed in given.needed()]) | {"skip_layers": [1, 4]}
    assert trainings.execute(other, [fake(needed, []) for needed in other.needed()] + [same]) == same | {
        "method": "set by kl"
    }
    others = [{"skip_layers": [1, 3]}, {"seed": 0}, {"skipped": 3}, {"task": "tweets"}, {"kind": "rate"}]
    others += [{"method": method} for method in ("EAS", "drop, LoRA", "mean stand-in", "distilled", "gone since")]
    assert trainings.is_alike(other, same)
    assert not any(trainings.is_alike(other, same | each) for each in others)
    assert not trainings.is_alike(Run(task, "EAS", 2, 1), same)


def test_a_set_that_was_found_is_that_of_the_same_seed(task):
    run = Run(task, "found set, given", 2, 1)
    assert run.needed()[-1] == Run(task, "EAS", 2, 1)
    searches = [row("EAS", 2, seed, model="tiny", task="random", skip_layers=[seed, 5]) for seed in (0, 1)]
    assert trainings.set_of(run, searches) == [1, 5]
    tried = [fake(needed, []) for needed in run.needed()[:-1]]
    assert trainings.best_rate(run, [*tried, searches[1] | {"learning_rate": 7, "validation_loss": 0}]) == 1e-2
    model, _ = trainings.prepare(run, searches)
    assert model.skip_layers == [1, 5]


def test_lora_learns_on_what_a_search_left(task):
    run = Run(task, "found set, LoRA", 2, 1)
    assert run.needed()[-1] == Run(task, "EAS", 2, 1)
    found = row("EAS", 2, 1, model="tiny", task="random", skip_layers=[0, 4])
    made = trainings.execute(run, [*(fake(needed, []) for needed in run.needed()[:-1]), found])
    assert made["skip_layers"] == [0, 4]
    model, callbacks = trainings.prepare(run, [found])
    assert not callbacks
    assert type(model.base_model).__name__ == "LoraModel"
    stand_ins = [name for name, module in model.named_modules() if type(module).__name__ == "StandIn"]
    assert [int(name.split(".layers.")[1].split(".")[0]) for name in stand_ins] == [0, 4]


def test_a_start_alone_ends_as_the_search_that_exchanges_nothing(task):
    task = replace(task, steps=8)
    made = {}
    for method in ("EAS", "start alone"):
        run = Run(task, method, 2, 1)
        made[method] = trainings.execute(run, [fake(needed, []) for needed in run.needed()])
    searched, alone = made["EAS"], made["start alone"]
    assert searched["exchanges"] == alone["exchanges"] == 0
    assert (alone["loss"], alone["skip_layers"]) == (searched["loss"], searched["skip_layers"])
    assert trainings.is_alike(Run(task, "start alone", 2, 1), searched)
    assert not trainings.is_alike(Run(task, "start alone", 2, 1), searched | {"exchanges": 1})


def test_a_bandit_trains_drawn_sets_and_chooses_by_what_they_lost(task, monkeypatch):
    task = replace(task, steps=20)
    run, seen = Run(task, "bandit", 2), []
    monkeypatch.setattr(references.bandit, "draw", lambda preferences, count, rng: (1, 4))
    monkeypatch.setattr(references.bandit, "draw_distinct", lambda *_: [(0, 3), (0, 5), (2, 3)])
    model, callbacks = trainings.prepare(run)
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, list(module.skip_layers))))
    trainings.train(run, model, callbacks, 1e-2)
    trained = [skipped for training, skipped in seen if training]
    assert trained == [[]] * 2 + [[1, 4]] * 6 + [model.skip_layers] * 12
    (entry,) = callbacks[0].report["rounds"]
    tried = [skipped for training, skipped in seen if not training]
    assert all(each in tried for each in ([0, 3], [0, 5], [2, 3]))
    scores = callbacks[0].report["scores"]
    start = references.bandit.preferences_from_scores(scores, 2)
    learnt = references.bandit.update(start, [(0, 3), (0, 5), (2, 3)], entry["losses"], 2.0)
    assert model.skip_layers == list(references.bandit.choose(learnt, 2))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gate_norm_is_that_of_each_heads_product(family):
    torch.manual_seed(0)
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    bert = BertConfig(**small, num_attention_heads=4)
    model = tiny.model("llama") if family == "llama" else BertForSequenceClassification(bert)
    config, scores = model.config, references.gate_norm(model)
    size = config.hidden_size // config.num_attention_heads
    layers = model.model.layers if family == "llama" else model.bert.encoder.layer
    assert len(scores) == len(layers)
    for index, layer in enumerate(layers):
        own = layer.self_attn if family == "llama" else layer.attention.self
        q, k = (own.q_proj, own.k_proj) if family == "llama" else (own.query, own.key)
        shared = config.num_attention_heads * size // len(k.weight)
        total = 0.0
        for head in range(config.num_attention_heads):
            of_key = head // shared
            product = q.weight[head * size :][:size].T @ k.weight[of_key * size :][:size]
            total += product.square().sum().item()
        assert scores[index] == pytest.approx(math.sqrt(total), rel=1e-4)


# Tables ---------------------------------------------------------------------------------------------------------------

TWEETS = next(task for task in tasks.TASKS if task.title == "MiniLM, tweets")


def test_means_and_standard_errors():
    assert evidence.estimate([]) is None
    assert evidence.estimate([0.5]).text() == "0.500"
    mean, error, count = evidence.estimate([1.0, 2.0, 6.0])
    assert (mean, count) == (3.0, 3)
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


def test_differences_are_those_of_the_same_seeds():
    reference = [row(seed=seed, loss=loss) for seed, loss in ((0, 0.5), (1, 0.9), (2, 0.1), (3, 0.7))]
    rows = [row("EAS", 2, seed, loss) for seed, loss in ((1, 1.0), (0, 0.4), (3, 1.0), (9, 5.0))]
    rows.append(row("EAS", 2, 2, None))
    differences = [0.1, -0.1, 0.3]
    mean, error, count = evidence.paired(rows, reference)
    assert count == 3
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    assert evidence.paired(rows, []) is None


def test_a_table_on_rows_made_by_hand():
    rows = [row(seed=seed, loss=loss, seconds=10.0) for seed, loss in ((0, 0.4), (1, 0.6))]
    rows += [row("EAS", 2, seed, loss, seconds=9.0) for seed, loss in ((0, 0.41), (1, 0.65))]
    rows += [row("EAS", 2, 0, 9.0, kind="rate"), row("EAS", 2, 0, 9.0, task="editorials"), row("EAS", 3, 1, 0.7)]
    lines = Table(TWEETS, rows).markdown().splitlines()
    assert lines[2] == (
        "| LoRA | 0.500 ± 0.100 |  | 0.800 ± 0.000 | 0.500 ± 0.100 |  | 0.800 ± 0.000 | 1 k | 1.00 | 2 |"
    )
    assert lines[3] == (
        "| EAS | 0.530 ± 0.120 | +0.030 ± 0.020 | 0.800 ± 0.000 | 0.700 | +0.100 | 0.800 | 1 k / 1 k | 0.90 / 1.00 "
        "| 2 / 1 |"
    )


@pytest.mark.parametrize(
    ("added", "verdict"),
    [
        ((-0.1, 0.0, 0.0), "yes"),
        ((-0.01, 0.05, 0.0), "yes"),
        ((0.05, 0.06, 0.07), "no, by 0.054"),
        ((-0.1, 0.0), "2 seeds"),
        ((-0.1,), "1 seed"),
    ],
)
def test_the_goal_at_a_quarter(added, verdict):
    rows = [row(seed=seed) for seed in range(3)] + [row("EAS", 2, seed, 0.5 + a) for seed, a in enumerate(added)]
    (line,) = Table(TWEETS, rows).verdicts()
    assert line.endswith(f"| {verdict} |")


@pytest.mark.parametrize(
    ("loss", "accuracy", "verdict"),
    [
        (0.51, 0.7, "yes"),
        (0.55, 0.795, "yes"),
        (0.55, 0.7, "no: not near LoRA"),
        (0.61, 0.795, "no: not ahead of both"),
        (0.75, 0.7, "no: not near LoRA and not ahead of both"),
    ],
)
def test_the_goal_at_forty_percent(loss, accuracy, verdict):
    rows = [row(seed=seed) for seed in range(3)]
    for seed in range(3):
        rows += [row("drop, LoRA", 3, seed, 0.7), row("drop, means, LoRA", 3, seed, 0.6)]
        rows.append(row("EAS", 3, seed, loss, accuracy=accuracy))
    (line,) = Table(TWEETS, rows).verdicts()
    assert line.endswith(f"| {verdict} |")


def test_exchanges_of_a_search_and_of_what_knows_none():
    found = [{"exchanged": [[1, 2]]}, {"exchanged": []}, {"exchanged": [[0, 4], [3, 5]]}]
    assert trainings.exchanges([SimpleNamespace(report={"rounds": found})]) == {"exchanges": 3}
    assert trainings.exchanges([SimpleNamespace(report={"rounds": [{"losses": [0.5]}]})]) == {"exchanges": 0}  # 0.1.0
    assert trainings.exchanges([SimpleNamespace(report=None)]) == trainings.exchanges([]) == {}


def test_ways_to_choose_are_compared_with_the_search():
    rows = [row("EAS", 2, seed, loss) for seed, loss in ((0, 0.4), (1, 0.6), (2, 0.5))]
    rows += [row("bandit", 2, seed, loss) for seed, loss in ((0, 0.5), (1, 0.7), (2, 0.6))]
    rows += [row("random", 2, 0, 0.1), row("random", 2, 1, 0.3)]
    rows += [row("deepest", 2, seed, loss) for seed, loss in ((0, 0.38), (1, 0.57), (2, 0.46))]
    titles = next(line for line in evidence.summarise(rows).splitlines() if "search best" in line).split("|")
    (line,) = Table(TWEETS, rows).choices(["bandit", "deepest", "random"])
    cells = {title.strip(): cell.strip() for title, cell in zip(titles, line.split("|"), strict=True)}
    # what has two seeds is shown, and no more
    assert cells.pop("search best") == "no: 0.030 ± 0.006 behind deepest"
    assert cells.pop("by examples") == "0.000"  # on validation examples all differences are the same
    shown = {"bandit": "+0.100 ± 0.000", "random": "-0.300 ± 0.000", "deepest": "-0.030 ± 0.006", "skipped": "2 of 6"}
    assert {title: cell for title, cell in cells.items() if cell} == shown | {"model, task": "MiniLM, tweets"}
    noisy = [row("deepest", 2, seed, loss) for seed, loss in ((0, 0.3), (1, 0.6), (2, 0.55))]
    (line,) = Table(TWEETS, rows[:3] + noisy).choices(["bandit", "deepest"])
    assert line.endswith("| yes |")
    assert Table(TWEETS, rows[:3]).choices(["bandit", "deepest"]) == []


def test_what_the_choice_of_test_examples_moves_is_told_by_those_to_validate_with():
    """Against differences of simulated examples, whose spread is known."""
    generator, spread, found = torch.Generator().manual_seed(0), 0.4, []
    ways = [f"way {i}" for i in range(15)]
    for _ in range(40):
        rows = [row("EAS", 2, seed, 0.5) for seed in range(3)]
        for way in ways:
            each = 0.02 + spread * torch.randn(TWEETS.test + TWEETS.validation, generator=generator)
            test, validation = each[: TWEETS.test].mean().item(), each[TWEETS.test :].mean().item()
            rows += [row(way, 2, seed, 0.5 + test, validation_loss=0.5 + validation) for seed in range(3)]
        rows += [row("failed", 2, seed, 3.0, validation_loss=9.0) for seed in range(3)]
        found.append(Table(TWEETS, rows).error_by_examples([*ways, "failed"]))
    assert statistics.fmean(found) == pytest.approx(spread / math.sqrt(TWEETS.test), rel=0.15)
    (line,) = Table(TWEETS, [*rows[:3], *(row("bandit", 2, s, 0.49, validation_loss=0.52) for s in range(3))]).choices(
        ["bandit"]
    )
    assert line.endswith("| 0.018 | yes |")


def test_summary_and_picture_of_anything_there_is(tmp_path):
    evidence.draw([], trainings.METHODS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    rows = [row(seed=seed, loss=0.4 + seed / 10) for seed in range(3)] + [row("EAS", 2, 0), row("random", 3, 1, None)]
    rows += [row(kind="rate", learning_rate=rate, loss=rate) for rate in TWEETS.rates["LoRA"]]
    text = evidence.summarise(rows)
    assert "## MiniLM, tweets" in text
    assert "**0.001**: 0.001, 0.002: 0.002, 0.004: 0.004" in text
    assert "MiniLM, tweets, random, 3 skipped, seed 1" in text  # left out, and said so
    rows += [row("drop, LoRA", 2, 0)]
    evidence.draw(rows, trainings.METHODS, tmp_path / "evidence.png")
    evidence.draw(rows, evidence.DRAWN["choices"], tmp_path / "choices.png")  # that is not among them
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    assert (tmp_path / "choices.png").stat().st_size < (tmp_path / "evidence.png").stat().st_size
    evidence.draw(rows, ["EAS", "bandit"], tmp_path / "none.png")  # there is nothing to compare EAS with
    assert not (tmp_path / "none.png").exists()
    assert "##" not in evidence.summarise([])


# Budgets --------------------------------------------------------------------------------------------------------------


def test_budgets_rows_have_what_was_promised_and_what_was_kept(task):
    task = replace(task, steps=8)
    by_loss = budgets.execute(task, {"num_skip": "auto", "max_loss_increase": 0.5}, 1)
    by_speed = budgets.execute(task, {"target_speedup": 1.02}, 1)
    assert by_loss["predicted_loss"] <= by_loss["whole_loss"] + 0.5
    assert 3 < by_loss["measured_loss"] < 8
    assert 0 < len(by_loss["skip_layers"]) < 6
    assert by_speed["predicted_speedup"] >= 1.02
    assert by_speed["measured_speedup"] > 0
    lines = budgets.summarise([by_loss, by_speed]).splitlines()
    assert f"{by_loss['measured_loss']:.3f}" in lines[-2]
    assert f"{by_speed['measured_speedup']:.2f}" in lines[-1]


def test_arguments_of_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--list", "--only", "MiniLM, tweets, LoRA", "--only", "seed 0"])
    Rows(tmp_path / "evidence.json").add(row(kind="rate"))
    evidence.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["done", *["missing"] * 4]
