"""The runs of `evidence.py`: fine-tunings by several methods, and who makes which."""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import math
import os
import random
import statistics
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tasks import GIVEN, SCORED, TASKS, Task
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed

import peft_eas
from peft_eas import EASCallback, EASConfig, score_attentions

GROWN = 16  # examples for sets that are grown, as a search does
SEEDS = {"MiniLM": 5}  # of what is no main row; of other models one
WAIT = 10  # seconds, until looking again what other processes have done


class Distilled(Trainer):
    """The model learns from itself, too, as it is with nothing skipped."""

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad(), model.skip_gates().skipping([]):
            teacher = model.eval()(**inputs).logits
        for module, training in modes:
            module.training = training
        own, labels = outputs.logits, inputs["labels"]
        if labels.dim() > 1:  # a label is for the token before it
            labelled = labels[:, 1:] != -100
            own, teacher = own[:, :-1][labelled], teacher[:, :-1][labelled]
        own, teacher = own.float().log_softmax(-1), teacher.float().log_softmax(-1)
        loss = loss + F.kl_div(own, teacher, log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class Method:
    """How attentions are chosen, and what learns.

    Attributes:
        chosen: How: `"nothing"` is skipped, by a `"search"` while training, by `"depth"`, at `"random"`, by
            `"gate norm"`, by a score of `score_attentions`, which is `"default"` or has a name, or as `"found"` by the
            search of `"EAS"` with the same seed.
        adapter: The kind of adapter, which says whose learning rate it is: a method that the rate is chosen with.
            `"LoRA"` learns on a model whose chosen attentions are gone.
        settings: Of the `EASConfig`.
        trainer: The Trainer.
        reference: Name of what searches in place of `EASCallback`, in `references.py`, if anything.
        adapts_retained_ffns: Whether adapters in front of the FFNs of retained attentions are trained.
        version: The version of the package that it needs, as the beginning of it; any if `""`.
    """

    chosen: str
    adapter: str = GIVEN
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] = Trainer
    reference: str = ""
    adapts_retained_ffns: bool = True
    version: str = "0.2."


MAIN = {
    "LoRA": Method("nothing", "LoRA", version=""),
    "drop, LoRA": Method("similarity", "LoRA", {"stand_in": "zero"}),
    "drop, means, LoRA": Method("similarity", "LoRA", {"stand_in": "mean"}),
    "skip, LoRA": Method("default", "LoRA", {"stand_in": "linear"}),
    "0.1.0": Method("search", "0.1.0", version="0.1."),
    GIVEN: Method("default"),
    "EAS": Method("search"),
    "found set, LoRA": Method("found", "LoRA", {"stand_in": "linear"}),
}
# other ways to choose, everything else as in the two above
SETS = {
    "start alone": Method("search", reference="StartAloneCallback"),
    "found set, given": Method("found"),
    "bandit": Method("search", reference="BanditCallback"),
    "set by deviation": Method("deviation"),
    "set by similarity": Method("similarity"),
    "set by kl": Method("kl"),
    "set by loss": Method("loss"),
    "set by gate norm": Method("gate norm"),
    "deepest": Method("depth"),
    "random": Method("random"),
}
# those that are about a part have the sets of `"deviation"`, and are to be compared with these
ABLATIONS = {
    "mean stand-in": Method("deviation", settings={"stand_in": "mean"}),
    "zero stand-in": Method("deviation", settings={"stand_in": "zero"}),
    "retained FFNs not adapted": Method("deviation", adapts_retained_ffns=False),
    "two branches": Method("deviation", settings={"router": "static", "groups": 2}),
    "propagation": Method("deviation", settings={"propagation": "mean"}),
    "no biases": Method("deviation", settings={"use_bias": False}),
    "distilled": Method("deviation", trainer=Distilled),
}
METHODS = MAIN | SETS | ABLATIONS


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        task: What is learnt.
        method: A name of `METHODS`.
        skipped: How many attentions are.
        seed: Of all that is random in the training.
        rate: The learning rate, in a run that is made to choose it.
    """

    task: Task
    method: str
    skipped: int
    seed: int = 0
    rate: float | None = None

    @property
    def key(self) -> str:
        parts = [self.task.title, self.method, f"{self.skipped} skipped", f"seed {self.seed}"]
        return ", ".join(parts if self.rate is None else [*parts, f"rate {self.rate:g}"])

    def needed(self) -> list[Run]:
        """The runs that say what the learning rate is, and what the set, if it is another's."""
        if self.rate is not None:
            return []
        found = [replace(self, method="EAS")] if METHODS[self.method].chosen == "found" else []
        kind = METHODS[self.method].adapter
        skipped, seeds = 0 if kind == "LoRA" else self.task.counts[0], range(self.task.rate_seeds)
        tried = [Run(self.task, kind, skipped, seed, rate) for seed in seeds for rate in self.task.rates[kind]]
        return [*tried, *found]


def key_of(row: dict) -> str:
    """The `key` of the run that the row is of."""
    parts = [row["model"], row["task"], row["method"], f"{row['skipped']} skipped", f"seed {row['seed']}"]
    return ", ".join([*parts, f"rate {row['learning_rate']:g}"] if row["kind"] == "rate" else parts)


def all_runs() -> list[Run]:
    """Most important first; those that say a rate before the first one that needs it."""
    runs: list[Run] = []
    for task in TASKS:
        for seed in range(task.seeds):
            runs.append(Run(task, "LoRA", 0, seed))
            runs += [Run(task, method, count, seed) for count in task.counts for method in MAIN if method != "LoRA"]
    for task in TASKS:
        seeds = SEEDS.get(task.model, 1)
        runs += [Run(task, method, n, seed) for seed in range(seeds) for n in task.counts for method in SETS]
    for which in (1, 0):  # what a part is worth shows most where much is skipped
        for task in (task for task in TASKS if task.model in ("MiniLM", "SmolLM2")):
            seeds = SEEDS.get(task.model, 1)
            runs += [Run(task, method, task.counts[which], seed) for seed in range(seeds) for method in ABLATIONS]
    return list(dict.fromkeys(each for run in runs for each in [*run.needed(), run]))


# ----------------------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------------------


def references() -> ModuleType:
    """The module `references.py`, which older versions of the package, whose rows are made here, too, can't run."""
    return importlib.import_module("references")


@functools.cache
def scores(task: Task, method: str, seed: int) -> dict[int | str, float]:
    """Scores of the attentions of the pretrained model; the seed is that of a fresh head."""
    set_seed(seed)
    if method == "gate norm":
        return references().gate_norm(task.load())
    is_grown = method == "default" and not task.has_fresh_head
    batches = task.scored_batches(GROWN if is_grown else SCORED)
    settings = {"num_skip": max(task.counts)} if method == "default" else {"method": method}
    return score_attentions(task.load(), batches, **settings)


def set_of(run: Run, rows: Iterable[dict] = ()) -> list[int | str] | None:
    """The attentions to skip; `None` if they are searched for. The rows are those of the runs that it needs."""
    task, chosen = run.task, METHODS[run.method].chosen
    if chosen == "search":
        return None
    if chosen == "nothing":
        return []
    if chosen == "found":
        search = replace(run, method="EAS").key
        return next(row["skip_layers"] for row in rows if key_of(row) == search)
    if chosen == "depth":
        return list(range(task.layers - run.skipped, task.layers))
    if chosen == "random":
        return sorted(random.Random(f"{run.seed} {run.skipped}").sample(range(task.layers), run.skipped))
    by_layer = scores(task, chosen, run.seed if task.has_fresh_head else 0)
    lowest = set(sorted(by_layer, key=by_layer.get)[: run.skipped])
    return [layer for layer in by_layer if layer in lowest]  # in the model's order


def freeze_retained_ffns(model: PeftModel) -> None:
    """Leave the adapters in front of the FFNs of retained attentions as they are: identities."""
    for attention, ffns in model.skip_gates().wrappers.values():
        for ffn in () if attention.skips("default") else ffns:
            ffn.set_requires_grad("default", requires_grad=False)


def prepare(run: Run, rows: Iterable[dict] = ()) -> tuple[PeftModel, list[EASCallback]]:
    """The model with adapters, and the callbacks of its training; see `set_of`."""
    task, method, skip_layers = run.task, METHODS[run.method], set_of(run, rows)
    set_seed(run.seed)
    model = task.load()
    if method.adapter == "LoRA":
        if skip_layers:
            model = peft_eas.skip_attentions(model, task.scored_batches(), skip_layers=skip_layers, **method.settings)
        set_seed(run.seed)
        return get_peft_model(model, task.lora()), []
    # the teacher's attentions need the adapters that those of a given set go without
    is_set_later = skip_layers is None or method.trainer is Distilled
    wanted = {"num_skip": run.skipped} if is_set_later else {"skip_layers": skip_layers}
    settings = dict(method.settings)
    if method.adapter == "0.1.0" and not task.has_prompts:
        settings["propagation"] = "none"  # its default is refused where labels don't tell what the prompt is
    set_seed(run.seed)
    adapted = get_peft_model(model, EASConfig(**wanted, **settings, **task.adapted))
    if is_set_later and skip_layers is not None:
        adapted.set_skip_layers(skip_layers)
    if not method.adapts_retained_ffns:
        freeze_retained_ffns(adapted)
    searching = getattr(references(), method.reference) if method.reference else EASCallback
    return adapted, [searching(task.splits.search)]


def train(run: Run, model: PeftModel, callbacks: list[EASCallback], learning_rate: float) -> float:
    """Fine-tune, and say how many seconds of the processor it took."""
    task = run.task
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            learning_rate=learning_rate,
            max_steps=task.steps,
            per_device_train_batch_size=task.batch_size,
            train_sampling_strategy="sequential",  # `drawn` has shuffled them
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            max_grad_norm=1.0,
            weight_decay=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=run.seed,
            use_cpu=True,
        )
        trainer = METHODS[run.method].trainer(
            model,
            args,
            train_dataset=task.drawn(run.seed),
            data_collator=task.collate,
            callbacks=callbacks,
            optimizers=(task.optimizer(model, learning_rate), None),
        )
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def best_rate(run: Run, rows: Iterable[dict]) -> float:
    """The learning rate with the lowest validation loss, of those tried for this kind of adapter."""
    tried = rate_losses(rate_rows(run, rows))
    return min(tried, key=tried.__getitem__)


def rate_rows(run: Run, rows: Iterable[dict]) -> list[dict]:
    """The rows of the runs that its learning rate is chosen by; none as long as one is missing."""
    keys = {needed.key for needed in run.needed() if needed.rate is not None}
    found = [row for row in rows if row["kind"] == "rate" and key_of(row) in keys]
    return found if len(found) == len(keys) else []


def rate_losses(rows: Iterable[dict]) -> dict[float, float]:
    """The validation loss with each learning rate, the mean over seeds; infinite if one of them diverged."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = row["validation_loss"]
        losses.setdefault(row["learning_rate"], []).append(math.inf if loss is None else loss)
    return {rate: statistics.fmean(of_seeds) for rate, of_seeds in losses.items()}


def current(rows: Sequence[dict], tasks: Iterable[Task] = TASKS) -> list[dict]:
    """The rows without those of runs with another learning rate than the one that is chosen now."""
    by_title = {task.title: task for task in tasks}

    @functools.cache
    def chosen(task: Task, adapter: str) -> float | None:
        run = Run(task, adapter, 0)
        return best_rate(run, rows) if rate_rows(run, rows) else None

    def is_current(row: dict) -> bool:
        task, method = by_title.get(f"{row['model']}, {row['task']}"), METHODS.get(row["method"])
        if row["kind"] == "rate" or task is None or method is None:
            return True
        return chosen(task, method.adapter) in (None, row["learning_rate"])

    return [row for row in rows if is_current(row)]


def is_alike(run: Run, row: dict, rows: Iterable[dict] = ()) -> bool:
    """Whether the row is of a run that was the same but for how the set was chosen, and has the same set; a search is
    the same as its start alone if it has exchanged nothing."""
    here, there = METHODS[run.method], METHODS.get(row["method"])
    about = (run.task.model, run.task.name, run.skipped, run.seed, "run" if run.rate is None else "rate")
    if there is None or about != tuple(row[key] for key in ("model", "task", "skipped", "seed", "kind")):
        return False
    if run.rate is not None and run.rate != row["learning_rate"]:
        return False
    if here.reference == "StartAloneCallback":
        return there == replace(here, reference="") and row.get("exchanges") == 0
    is_given = "search" not in (here.chosen, there.chosen)
    return is_given and there == replace(here, chosen=there.chosen) and row["skip_layers"] == set_of(run, rows)


def execute(run: Run, rows: Sequence[dict]) -> dict:
    """Do a run, and give its row; `rows` are those of the runs it needs, and others."""
    task = run.task
    learning_rate = best_rate(run, rows) if run.rate is None else run.rate
    kind = "run" if run.rate is None else "rate"
    same = replace(run, rate=learning_rate).key
    for row in rows:
        if key_of(row | {"kind": "rate"}) == same:
            return row | {"kind": kind}  # whether a rate was tried with it or not, it is the same run
        if is_alike(run, row, rows):
            return row | {"method": run.method}
    model, callbacks = prepare(run, rows)
    seconds = train(run, model, callbacks, learning_rate)
    skip_layers = set_of(run, rows) if METHODS[run.method].adapter == "LoRA" else model.skip_layers
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    merged = model.merge_and_unload().eval()
    validation, _ = task.losses(merged, task.splits.validation)
    losses, right = task.losses(merged, task.splits.test)
    return {
        "model": task.model,
        "task": task.name,
        "method": run.method,
        "skipped": run.skipped,
        "seed": run.seed,
        "loss": _number(losses.mean()),
        "accuracy": None if right is None else _number(right.float().mean()),
        "learning_rate": learning_rate,
        "trainable": trainable,
        "seconds": round(seconds, 1),
        "version": peft_eas.__version__,
        "skip_layers": skip_layers,
        "test_se": _number(losses.std() / math.sqrt(len(losses))),
        "validation_loss": _number(validation.mean()),
        "date": time.strftime("%Y-%m-%d"),
        "kind": kind,
        **exchanges(callbacks),
    }


def exchanges(callbacks: Sequence[EASCallback]) -> dict[str, int]:
    """How many a search has made, if there was one."""
    rounds = [entry for callback in callbacks if callback.report for entry in callback.report["rounds"]]
    is_search = any(callback.report for callback in callbacks)
    made = sum(len(entry.get("exchanged", ())) for entry in rounds)  # reports of 0.1.0 know of none
    return {"exchanges": made} if is_search else {}


def _number(value: torch.Tensor) -> float | None:
    """JSON has no NaN and no infinities."""
    return round(value.item(), 5) if torch.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------------------
# Rows, and who makes which
# ----------------------------------------------------------------------------------------------------------------------


class Rows:
    """A file of rows, for several processes at once.

    Locks are of bytes of a file aside: the first for writing, one of the others for each run. The system gives them
    back when a process ends, however it does.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        name = f"peft-eas-{zlib.crc32(str(path.resolve()).encode()):08x}.lock"
        self.locks = open(Path(tempfile.gettempdir()) / name, "a")  # noqa: SIM115, closing it would give all back

    def read(self) -> list[dict]:
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def add(self, row: dict, replaces: Callable[[dict], bool] = lambda other: False) -> None:
        """Write the row, in place of those that it replaces. An interruption leaves the rows as they were."""
        fcntl.lockf(self.locks, fcntl.LOCK_EX, 1, 0)
        try:
            rows = [*(other for other in self.read() if not replaces(other)), row]
            scratch = self.path.with_suffix(".part")
            scratch.write_text("[\n" + ",\n".join(json.dumps(each, allow_nan=False) for each in rows) + "\n]\n")
            os.replace(scratch, self.path)
        finally:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, 0)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may do the run inside of the `with`: no other one is doing it."""
        place = 1 + zlib.crc32(key.encode())
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, place)


def wanted_runs(only: Sequence[str]) -> list[Run]:
    """Runs whose name contains all of these, and the runs that they need."""
    runs = [run for run in all_runs() if all(text in run.key for text in only)]
    return list(dict.fromkeys(each for run in runs for each in [*run.needed(), run]))


def work(runs: Sequence[Run], rows: Rows, execute: Callable[[Run, list[dict]], dict] = execute) -> list[str]:
    """Do the runs that have no `current` row and that this version of the package can; returns names of what failed."""
    here = [run for run in runs if peft_eas.__version__.startswith(METHODS[run.method].version)]
    tasks = {run.task for run in runs}
    done = {key_of(row) for row in current(rows.read(), tasks)}
    others = sum(run not in here and run.key not in done for run in runs)
    if others:
        print(f"{others} runs are left for another version of peft_eas; this is {peft_eas.__version__}", flush=True)
    failed: list[str] = []
    while True:
        done = {key_of(row) for row in current(rows.read(), tasks)}
        missing = [run for run in here if run.key not in done and run.key not in failed]
        lost = [run for run in missing if any(needed.key in failed for needed in run.needed())]
        failed += [run.key for run in lost]
        missing = [run for run in missing if run not in lost]
        if not missing:
            return failed
        for run in missing:
            if all(needed.key in done for needed in run.needed()) and _do(run, rows, execute, failed):
                break  # and see again what is most important
        else:
            time.sleep(WAIT)  # other processes do what is left, or what it needs


def _do(run: Run, rows: Rows, execute: Callable[[Run, list[dict]], dict], failed: list[str]) -> bool:
    """Whether there is something new: a row, or a failure."""
    with rows.claim(run.key) as mine:
        if not mine:
            return False
        present = current(rows.read(), [run.task])
        if any(key_of(row) == run.key for row in present):
            return True  # of another process, a moment ago
        print(f"== {run.key}", flush=True)
        try:
            row = execute(run, present)
        except Exception:
            traceback.print_exc()  # one method that can't be run must not keep the others from it
            failed.append(run.key)
            return True
        rows.add(row, replaces=lambda other: key_of(other) == run.key)
        print(json.dumps(row), flush=True)
        return True
