"""What does skipping attentions cost in accuracy? EAS, LoRA, and LoRA on what is left: nine tasks, several seeds.

    python benchmarks/evidence.py                          # everything that has no row yet, most important first
    python benchmarks/evidence.py --only MiniLM --only EAS # runs whose name contains all of these
    python benchmarks/evidence.py --list                   # names of runs, and which have a row
    python benchmarks/evidence.py --training-free          # the second part: no training, only what skipping changes
    python benchmarks/evidence.py --summary                # just the tables and the picture, from the rows there are

Every run of a task trains with the same batches in the same order for its seed, for as many steps, and is tested with
the same examples. The learning rate of each kind of adapter is chosen from three on validation data first. A row is
written when its run is done, and a run that has one is not repeated; several processes share the work.

Rows of an older version of the package are made with it: PYTHONPATH=FOLDER python benchmarks/evidence.py --only 0.1.0
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import torch
import transformers
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model
from references import BanditCallback, StartAloneCallback, gate_norm
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_eas
from peft_eas import EASCallback, EASConfig, score_attentions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import sentiment
import vqa
from real_data import (
    ANSWERS,
    DEFAULT_MODEL,
    ENCODER,
    GEMMA,
    Review,
    collator,
    load_model,
    load_tokenizer,
    model_folder,
    python_source,
    rated_texts,
    tokenise,
    visual_questions,
)

RESULTS = Path(__file__).resolve().parent / "results"
SEARCH = 128  # examples to choose attentions with, which are not trained on
SCORED = 64  # of them, for scores
GROWN = 16  # of them, for sets that are grown, as a search does
GIVEN = "EAS, given set"  # by score, and skipped from the first step
WAIT = 10  # seconds, until looking again what other processes have done


# ----------------------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------------------


class Splits(NamedTuple):
    """Examples of a task: to train on, to choose attentions with, to choose the rate with, and to test with."""

    train: list
    search: list
    validation: list
    test: list


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A model and what it is to learn.

    Attributes:
        model: Name of the model.
        name: Name of the data.
        layers: Attentions of the model.
        counts: How many are skipped: about a quarter, and about 40 %.
        steps: Optimizer steps.
        batch_size: Examples in a step.
        validation: Examples to choose the rate with.
        test: Examples to test with.
        seeds: How many seeds the methods that matter most are run with.
        rates: Learning rates to choose from, for each kind of adapter.
    """

    model: str
    name: str
    layers: int
    counts: tuple[int, int]
    steps: int
    batch_size: int
    validation: int
    test: int
    seeds: int = 3
    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"LoRA": (1e-3, 2e-3, 4e-3)} | dict.fromkeys((GIVEN, "0.1.0"), (5e-4, 1e-3, 2e-3))
    )

    has_prompts = True
    has_fresh_head = False
    adapted: dict[str, Any] = field(default_factory=lambda: {"task_type": "CAUSAL_LM"})

    @property
    def title(self) -> str:
        return f"{self.model}, {self.name}"

    @functools.cached_property
    def splits(self) -> Splits:
        raise NotImplementedError

    def load(self) -> PreTrainedModel:
        """The model that training starts from; a fresh head is drawn from torch's generator."""
        raise NotImplementedError

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        """A batch to train on."""
        raise NotImplementedError

    def losses(self, model: nn.Module, examples: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of each example, and whether the answer is right, if there is one to give."""
        raise NotImplementedError

    def length(self, example: Any) -> int:
        """By which examples are put together in batches, so that there is little padding."""
        return len(example["input_ids"])

    def lora(self) -> LoraConfig:
        return LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", **self.adapted)

    def drawn(self, seed: int) -> list:
        """Examples to train on, batch by batch: those of a seed are the same for all methods."""
        rng = random.Random(seed)
        wanted, order = self.steps * self.batch_size, []
        while len(order) < wanted:
            order += rng.sample(self.splits.train, min(wanted - len(order), len(self.splits.train)))
        batches = []
        for start in range(0, wanted, 16 * self.batch_size):
            some = sorted(order[start : start + 16 * self.batch_size], key=self.length)
            batches += [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
        rng.shuffle(batches)
        return [example for batch in batches for example in batch]

    def scored_batches(self, count: int = SCORED) -> list[dict[str, torch.Tensor]]:
        """Batches to choose attentions with."""
        examples = sorted(self.splits.search[:count], key=self.length)
        return [self.collate(examples[i : i + 16]) for i in range(0, len(examples), 16)]

    def split(self, examples: Sequence) -> Splits:
        """Shuffled examples as splits; those to test with depend on nothing but their number."""
        test, rest = examples[: self.test], examples[self.test :]
        validation, rest = rest[: self.validation], rest[self.validation :]
        return Splits(list(rest[SEARCH:]), list(rest[:SEARCH]), list(validation), list(test))


def shuffled_texts(kind: str, max_length: int | None = None) -> list[Review]:
    """Rated texts of one kind, at most so many characters long, always in the same order."""
    texts = [text for text in rated_texts(kind) if max_length is None or len(text.text) <= max_length]
    random.Random(0).shuffle(texts)
    return texts


@dataclass(frozen=True, eq=False, kw_only=True)
class Classification(Task):
    """An encoder with a fresh head tells positive from negative texts.

    The pooler between them has to be trained, too: LoRA adapts it, as any linear; EAS, which adapts attentions and
    FFNs, trains it whole.
    """

    kind: str
    has_fresh_head = True

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(model_folder(ENCODER))

    @functools.cached_property
    def splits(self) -> Splits:
        texts = shuffled_texts(self.kind)
        ids = self.tokenizer([text.text for text in texts], truncation=True, max_length=64).input_ids
        return self.split([{"input_ids": i, "labels": int(t.rating > 0)} for i, t in zip(ids, texts, strict=True)])

    def load(self) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(model_folder(ENCODER))

    def lora(self) -> LoraConfig:
        settings = self.adapted | {"modules_to_save": ["classifier"]}
        return LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", **settings)

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        return dict(DataCollatorWithPadding(self.tokenizer)(examples))

    @torch.no_grad()
    def losses(self, model: nn.Module, examples: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        losses, right = [], []
        for batch in in_batches(sorted(examples, key=self.length), 50, self.collate):
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            right.append(logits.argmax(-1) == labels)
        return torch.cat(losses), torch.cat(right)


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers(Task):
    """A language model completes a prompt with " positive" or " negative"."""

    kind: str
    word: str
    pretrained: str = DEFAULT_MODEL
    max_length: int = 80

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.pretrained)

    @functools.cached_property
    def splits(self) -> Splits:
        texts = [text._replace(kind=self.word) for text in shuffled_texts(self.kind, self.max_length)]
        train, search, validation, test = self.split(texts)
        return Splits(tokenise(train, self.tokenizer), tokenise(search, self.tokenizer), validation, test)

    def load(self) -> PreTrainedModel:
        return load_model(self.pretrained)

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        return dict(collator(self.tokenizer)(examples))

    def losses(self, model: nn.Module, examples: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        examples = sorted(examples, key=lambda review: len(review.text))
        logits = sentiment.next_token_logits(model, self.tokenizer, examples)
        negative, positive = (self.tokenizer(a, add_special_tokens=False).input_ids[0] for a in ANSWERS)
        is_positive = torch.tensor([review.rating > 0 for review in examples])
        losses = F.cross_entropy(logits, torch.where(is_positive, positive, negative), reduction="none")
        return losses, (logits[:, positive] > logits[:, negative]) == is_positive


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(Task):
    """A language model learns Python source: every token is a label, and nothing is a prompt."""

    window: int = 96
    per_file: int = 4
    has_prompts = False

    @functools.cached_property
    def splits(self) -> Splits:
        windows = [window for file in python_windows(self.window, self.per_file) for window in file]
        # all sizes are multiples of `per_file`, so no file is in two splits
        return self.split([{"input_ids": ids, "labels": ids} for ids in windows])

    def load(self) -> PreTrainedModel:
        return load_model()

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels")}

    @torch.no_grad()
    def losses(self, model: nn.Module, examples: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        losses = []
        for batch in in_batches(examples, 10, self.collate):
            logits = model(batch["input_ids"]).logits[:, :-1].float()
            each = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            losses.append(each.mean(-1))
        return torch.cat(losses), None


@functools.cache
def python_windows(length: int, per_file: int) -> list[list[list[int]]]:
    """Up to so many pieces of each file of Python's standard library, as tokens; shorter files are left out."""
    tokenizer, rng, files = load_tokenizer(), random.Random(0), []
    for text in python_source():
        text = text[:40_000]
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=10_000).input_ids
        starts = range(0, len(ids) - length + 1, length)
        files.append([ids[s : s + length] for s in rng.sample(starts, min(per_file, len(starts)))])
    return [windows for windows in files if len(windows) == per_file]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures(Task):
    """A small LLaVA answers questions about images; its projector is trained, too."""

    adapted: dict[str, Any] = field(
        default_factory=lambda: {"task_type": "CAUSAL_LM", "modules_to_save": [vqa.PROJECTOR]}
    )

    @functools.cached_property
    def folder(self) -> Path:
        args = argparse.Namespace(image_epochs=20, seed=0, output=Path(tempfile.gettempdir()) / "peft-eas-llava")
        return vqa.starting_point(self.asked, args)

    @functools.cached_property
    def asked(self) -> list[vqa.VisualQuestion]:
        asked = visual_questions("train")
        random.Random(0).shuffle(asked)
        return asked

    @functools.cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.folder)

    @functools.cached_property
    def splits(self) -> Splits:
        train, others = vqa.affirmative(self.asked), vqa.affirmative(visual_questions("test"))
        random.Random(0).shuffle(others)
        to_test = [question for question in others if question.image_id % 2 == 0]
        to_validate = [question for question in others if question.image_id % 2]  # other images
        return Splits(train[SEARCH:], train[:SEARCH], to_validate[: self.validation], to_test[: self.test])

    def load(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.folder)

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        return vqa.collate(examples, self.processor)

    def losses(self, model: nn.Module, examples: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        examples = sorted(examples, key=self.length)
        logits, tokenizer = vqa.next_token_logits(model, self.processor, examples), self.processor.tokenizer
        answers = vqa.first_tokens([question.answer for question in examples], tokenizer)
        return F.cross_entropy(logits, answers, reduction="none"), vqa.right_answers(logits, tokenizer, examples)

    def length(self, example: Any) -> int:
        return len(example.text)

    def lora(self) -> LoraConfig:
        return LoraConfig(r=8, lora_alpha=8, target_modules=r".*language_model.*_proj", **self.adapted)


def in_batches(examples: Sequence, size: int, collate: Callable[[list], dict]) -> Iterator[dict]:
    for start in range(0, len(examples), size):
        yield collate(list(examples[start : start + size]))


def _mini_lm(name: str, kind: str, test: int, validation: int = 300) -> Task:
    return Classification(
        model="MiniLM", name=name, kind=kind, layers=6, counts=(2, 3), steps=150, batch_size=16, validation=validation,
        test=test, seeds=5,
        rates=dict.fromkeys(("LoRA", GIVEN), (1e-3, 2e-3, 4e-3)) | {"0.1.0": (5e-4, 1e-3, 2e-3)},
        adapted={"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "pooler"]},
    )  # fmt: skip


SMOL = dict(model="SmolLM2", layers=30, counts=(8, 12))
TASKS = [
    _mini_lm("movie reviews", "movie", 4000, validation=1000),
    _mini_lm("tweets", "tweets", 1440),
    _mini_lm("product reviews", "amazon", 1040),
    _mini_lm("editorials", "editorial", 1000),
    Source(**SMOL, name="Python source", steps=60, batch_size=4, validation=40, test=200),
    Answers(
        **SMOL, name="movie reviews", kind="movie", word="Review", steps=100, batch_size=8, validation=200, test=1000
    ),
    Answers(
        **SMOL, name="tweets", kind="tweets", word="Tweet", max_length=100, steps=100, batch_size=8, validation=200,
        test=1000,
    ),
    Answers(
        model="Gemma3-270M", name="movie reviews", kind="movie", word="Review", pretrained=GEMMA, layers=18,
        counts=(5, 7), steps=60, batch_size=8, validation=200, test=600,
    ),
    Pictures(
        model="LLaVA", name="easy-VQA", layers=30, counts=(8, 12), steps=90, batch_size=8, validation=300, test=600
    ),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Methods
# ----------------------------------------------------------------------------------------------------------------------


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
        callback: What searches.
        adapts_retained_ffns: Whether adapters in front of the FFNs of retained attentions are trained.
        version: The version of the package that it needs, as the beginning of it; any if `""`.
    """

    chosen: str
    adapter: str = GIVEN
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] = Trainer
    callback: type[EASCallback] = EASCallback
    adapts_retained_ffns: bool = True
    version: str = "0.2."


MAIN = {
    "LoRA": Method("nothing", "LoRA", version=""),
    "drop, LoRA": Method("similarity", "LoRA", {"stand_in": "zero"}),
    "drop, means, LoRA": Method("similarity", "LoRA", {"stand_in": "mean"}),
    "0.1.0": Method("search", "0.1.0", version="0.1."),
    GIVEN: Method("default"),
    "EAS": Method("search"),
}
# other ways to choose, everything else as in the two above
SETS = {
    "start alone": Method("search", callback=StartAloneCallback),
    "found set, given": Method("found"),
    "bandit": Method("search", callback=BanditCallback),
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
        skipped = 0 if kind == "LoRA" else self.task.counts[0]
        return [*(Run(self.task, kind, skipped, 0, rate) for rate in self.task.rates[kind]), *found]


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
        runs += [Run(task, method, n, seed) for seed in range(task.seeds) for n in task.counts for method in SETS]
    for which in (1, 0):  # what a part is worth shows most where much is skipped
        for model, seeds in (("MiniLM", 5), ("SmolLM2", 1)):
            for task in (task for task in TASKS if task.model == model):
                runs += [Run(task, method, task.counts[which], seed) for seed in range(seeds) for method in ABLATIONS]
    return list(dict.fromkeys(each for run in runs for each in [*run.needed(), run]))


# ----------------------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def scores(task: Task, method: str, seed: int) -> dict[int | str, float]:
    """Scores of the attentions of the pretrained model; the seed is that of a fresh head."""
    set_seed(seed)
    if method == "gate norm":
        return gate_norm(task.load())
    is_grown = method == "default" and not task.has_fresh_head
    batches = task.scored_batches(GROWN if is_grown else SCORED)
    return score_attentions(task.load(), batches, method=None if method == "default" else method)


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


def without(model: PreTrainedModel, skip_layers: list[int | str], stand_in: str, batches: list[dict]) -> nn.Module:
    """The model without these attentions, zeros or their means in place: a fresh adapter, merged at once."""
    config = EASConfig(skip_layers=skip_layers, stand_in=stand_in, propagation="none", use_bias=False)
    adapted = get_peft_model(model, config)
    if stand_in == "mean":
        peft_eas.initialize_eas_weights(adapted, batches)
    return adapted.merge_and_unload()


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
            model = without(model, skip_layers, method.settings["stand_in"], task.scored_batches())
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
    return adapted, [method.callback(task.splits.search)]


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
            model, args, train_dataset=task.drawn(run.seed), data_collator=task.collate, callbacks=callbacks
        )
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def best_rate(run: Run, rows: Iterable[dict]) -> float:
    """The learning rate with the lowest validation loss, of those tried for this kind of adapter."""
    keys = {needed.key for needed in run.needed()}
    tried = [row for row in rows if row["kind"] == "rate" and key_of(row) in keys]
    return min(tried, key=lambda row: math.inf if row["validation_loss"] is None else row["validation_loss"])[
        "learning_rate"
    ]


def is_alike(run: Run, row: dict, rows: Iterable[dict] = ()) -> bool:
    """Whether the row is of a run that was the same but for how the set was chosen, and has the same set; a search is
    the same as its start alone if it has exchanged nothing."""
    here, there = METHODS[run.method], METHODS.get(row["method"])
    about = (run.task.model, run.task.name, run.skipped, run.seed, "run" if run.rate is None else "rate")
    if there is None or about != tuple(row[key] for key in ("model", "task", "skipped", "seed", "kind")):
        return False
    if run.rate is not None and run.rate != row["learning_rate"]:
        return False
    if here.callback is StartAloneCallback:
        return there == replace(here, callback=EASCallback) and row.get("exchanges") == 0
    is_given = "search" not in (here.chosen, there.chosen)
    return is_given and there == replace(here, chosen=there.chosen) and row["skip_layers"] == set_of(run, rows)


def execute(run: Run, rows: Sequence[dict]) -> dict:
    """Do a run, and give its row; `rows` are those of the runs it needs, and others."""
    task = run.task
    learning_rate = best_rate(run, rows) if run.rate is None else run.rate
    same = Run(task, run.method, run.skipped, run.seed, learning_rate)
    for row in rows:
        if run.rate is None and key_of(row) == same.key:
            return row | {"kind": "run"}  # it was done when the rate was chosen
        if is_alike(run, row, rows):
            return row | {"method": run.method}
    model, callbacks = prepare(run, rows)
    seconds = train(run, model, callbacks, learning_rate)
    skip_layers = set_of(run) if METHODS[run.method].adapter == "LoRA" else model.skip_layers
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
        "kind": "run" if run.rate is None else "rate",
        **exchanges(callbacks),
    }


def exchanges(callbacks: Sequence[EASCallback]) -> dict[str, int]:
    """How many a search has made, if there was one."""
    rounds = [entry for callback in callbacks if callback.report for entry in callback.report["rounds"]]
    is_search = any(callback.report for callback in callbacks)
    return {"exchanges": sum(len(entry["exchanged"]) for entry in rounds)} if is_search else {}


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

    def add(self, row: dict) -> None:
        """Write the row. An interruption leaves the rows as they were."""
        fcntl.lockf(self.locks, fcntl.LOCK_EX, 1, 0)
        try:
            rows = [*self.read(), row]
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
    """Do the runs that have no row and that this version of the package can; returns the names of those that failed."""
    here = [run for run in runs if peft_eas.__version__.startswith(METHODS[run.method].version)]
    done = {key_of(row) for row in rows.read()}
    others = sum(run not in here and run.key not in done for run in runs)
    if others:
        print(f"{others} runs are left for another version of peft_eas; this is {peft_eas.__version__}", flush=True)
    failed: list[str] = []
    while True:
        done = {key_of(row) for row in rows.read()}
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
        present = rows.read()
        if any(key_of(row) == run.key for row in present):
            return True  # of another process, a moment ago
        print(f"== {run.key}", flush=True)
        try:
            row = execute(run, present)
        except Exception:
            traceback.print_exc()  # one method that can't be run must not keep the others from it
            failed.append(run.key)
            return True
        rows.add(row)
        print(json.dumps(row), flush=True)
        return True


# ----------------------------------------------------------------------------------------------------------------------
# Tables and the picture
# ----------------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error, NaN with one seed."""

    mean: float
    error: float
    count: int

    def text(self, digits: int = 3, sign: str = "") -> str:
        spread = f" ± {self.error:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:{sign}.{digits}f}{spread}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """`None` without values."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def values(rows: Iterable[dict], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def paired(rows: Iterable[dict], reference: Iterable[dict], key: str = "loss") -> Estimate | None:
    """By how much the rows are above those of the same seeds in `reference`."""
    by_seed = {row["seed"]: row[key] for row in reference}
    pairs = [(row[key], by_seed.get(row["seed"])) for row in rows]
    return estimate([own - other for own, other in pairs if own is not None and other is not None])


class Table:
    """The rows of one task.

    Args:
        task: The task.
        rows: Of all tasks and kinds.
    """

    def __init__(self, task: Task, rows: Iterable[dict]) -> None:
        self.task = task
        self.rows = [r for r in rows if (r["model"], r["task"], r["kind"]) == (task.model, task.name, "run")]
        self.reference = self.of("LoRA", 0)

    def of(self, method: str, count: int) -> list[dict]:
        return [row for row in self.rows if (row["method"], row["skipped"]) == (method, count)]

    def markdown(self) -> str:
        percents = [round(100 * count / self.task.layers) for count in self.task.counts]
        titles = ["method"]
        for count, percent in zip(self.task.counts, percents, strict=True):
            titles += [f"{count} skipped ({percent} %): loss", "above LoRA", "accuracy"]
        titles += ["trainable", "time", "seeds"]
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for method in METHODS:
            counts = (0, 0) if method == "LoRA" else self.task.counts
            groups = [self.of(method, count) for count in counts]
            if not any(groups):
                continue
            cells = [method]
            for rows in groups:
                above = None if method == "LoRA" else paired(rows, self.reference)
                cells += [_text(estimate(values(rows, "loss"))), _text(above, sign="+")]
                cells.append(_text(estimate(values(rows, "accuracy"))))
            cells.append(" / ".join(_thousands(rows) for rows in groups if rows))
            cells.append(" / ".join(_ratio(rows, self.reference) for rows in groups if rows))
            cells.append(" / ".join(str(len(rows)) for rows in groups if rows))
            if method == "LoRA":  # the same whatever the others skip
                cells[4:7] = cells[1:4]
                cells[7:] = [cell.split(" / ")[0] for cell in cells[7:]]
            lines.append("| " + " | ".join(cells) + " |")
        errors = values(self.reference, "test_se")
        if errors:
            lines += ["", f"Standard error of a loss, by the choice of test examples: {statistics.fmean(errors):.4f}."]
        diverged = [row for row in self.rows if row["loss"] is None]
        if diverged:
            lines += ["", f"Left out, as their loss was not finite: {', '.join(map(key_of, diverged))}."]
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """Lines of the table that says whether the goals are met."""
        lines = []
        for (count, is_quarter), method in itertools.product(
            zip(self.task.counts, (True, False), strict=True), (GIVEN, "EAS")
        ):
            rows = self.of(method, count)
            above = paired(rows, self.reference)
            if above is None:
                continue
            points = paired(rows, self.reference, "accuracy")
            drops = [self.of(method, count) for method in ("drop, LoRA", "drop, means, LoRA")]
            ahead = [e for e in (paired(rows, drop) for drop in drops) if e is not None]
            closest = max(ahead, key=lambda e: e.mean, default=None)
            if above.count == 1:
                verdict = "one seed"
            elif is_quarter:
                verdict = "yes" if above.mean <= above.error else f"no, by {above.mean - above.error:.3f}"
            else:
                is_near = above.mean <= 0.02 or (points is not None and points.mean >= -0.01)
                is_ahead = len(ahead) == len(drops) and closest.mean < 0
                verdict = "yes" if is_near and is_ahead else "no: " + " and ".join(
                    ["not near LoRA"] * (not is_near) + ["not ahead of both"] * (not is_ahead)
                )  # fmt: skip
            cells = (
                self.task.title,
                method,
                f"{count} of {self.task.layers}",
                _text(above, sign="+"),
                "" if points is None else Estimate(*(100 * v for v in points[:2]), points.count).text(1, "+"),
                _text(closest, sign="+"),
                verdict,
            )
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def choices(self, methods: Sequence[str]) -> list[str]:
        """Lines of the table of ways to choose; these are shown as what they are above the search."""
        lines = []
        for count in self.task.counts:
            rows = self.of("EAS", count)
            others = {method: paired(self.of(method, count), rows) for method in methods}
            known = {method: above for method, above in others.items() if above is not None and above.count > 1}
            if not known.keys() & SETS.keys():
                continue
            best = min(known, key=lambda method: known[method].mean)
            behind = -known[best].mean
            verdict = "yes" if behind <= known[best].error else f"no: {behind:.3f} behind {best}"
            cells = [self.task.title, f"{count} of {self.task.layers}", *(_text(e, sign="+") for e in others.values())]
            lines.append("| " + " | ".join([*cells, verdict]) + " |")
        return lines


def _text(value: Estimate | None, digits: int = 3, sign: str = "") -> str:
    return "" if value is None else value.text(digits, sign)


def _thousands(rows: list[dict]) -> str:
    return f"{statistics.fmean(values(rows, 'trainable')) / 1000:,.0f} k"


def _ratio(rows: list[dict], reference: list[dict]) -> str:
    by_seed = {row["seed"]: row["seconds"] for row in reference}
    ratios = [row["seconds"] / by_seed[row["seed"]] for row in rows if by_seed.get(row["seed"])]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "?"


def summarise(rows: Sequence[dict], training_free: Sequence[dict] = ()) -> str:
    """Markdown of everything."""
    tables = [Table(task, rows) for task in TASKS]
    tables = [table for table in tables if table.rows]
    lines = [
        "# What skipping attentions costs",
        "",
        "Means over seeds ± their standard errors, which don't include the choice of test examples: those are the same",
        "in all rows of a task. *Above LoRA*: loss minus that of LoRA with nothing skipped and the same seed, so with",
        "the same batches in the same order. *Trainable*: parameters when training ends. *Time*: of the processor",
        "while training, searches included, as a multiple of LoRA's. Two numbers in a cell are those of the two",
        "counts. Made by `benchmarks/evidence.py`, which says what each row is.",
    ]
    verdicts = [line for table in tables for line in table.verdicts()]
    if verdicts:
        lines += [
            "",
            "## EAS with its defaults, next to LoRA",
            "",
            "The goal with fewer skipped, about a quarter: within one standard error of LoRA's loss, or below. With",
            "more, about 40 %: a lower loss than LoRA has on what is left, zeros or means in place (*above drop*:",
            "the better of the two), and within 0.02 of LoRA's with nothing skipped, or one point of its accuracy.",
            "",
            "| model, task | method | skipped | loss above LoRA | points above LoRA | loss above drop | goal met |",
            "|---|---|---|---|---|---|---|",
            *verdicts,
        ]
    ways = [m for m in (GIVEN, *SETS) if any(table.of(m, count) for table in tables for count in table.task.counts)]
    choices = [line for table in tables for line in table.choices(ways)]
    if choices:
        titles = ["model, task", "skipped", *ways, "search best"]
        lines += [
            "",
            "## Ways to choose the set",
            "",
            "Loss above that of EAS with its search, same seeds: where it is positive, the search is better. Goal: the",
            "search is the best, or within one standard error of the best. A set that two ways choose is trained once.",
            "",
            "| " + " | ".join(titles) + " |",
            "|---" * len(titles) + "|",
            *choices,
        ]
    for table in tables:
        task = table.task
        lines += ["", f"## {task.title}", "", _sizes(task), "", table.markdown()]
    chosen = _rates(rows)
    if chosen:
        lines += [
            "",
            "## Learning rates",
            "",
            "Validation loss with each; the lowest is taken, whatever count and seed.",
        ]
        lines += ["", "| model, task | adapter | rate: loss |", "|---|---|---|", *chosen]
    if training_free:
        lines += ["", summarise_training_free(training_free)]
    return "\n".join(lines) + "\n"


def _sizes(task: Task) -> str:
    what = "windows" if isinstance(task, Source) else "examples"
    return f"{task.steps} steps of {task.batch_size}; tested with {task.test:,} {what}."


def _rates(rows: Sequence[dict]) -> list[str]:
    lines = []
    for task in TASKS:
        for kind, tried in task.rates.items():
            found = [r for r in rows if r["kind"] == "rate" and (r["model"], r["task"], r["method"]) ==
                     (task.model, task.name, kind)]  # fmt: skip
            if len(found) < len(tried):
                continue
            best = best_rate(Run(task, kind, 0), found)
            cells = (
                f"{'**' * (r['learning_rate'] == best)}{r['learning_rate']:g}{'**' * (r['learning_rate'] == best)}: "
                + ("not finite" if r["validation_loss"] is None else f"{r['validation_loss']:.3f}")
                for r in sorted(found, key=lambda r: r["learning_rate"])
            )
            lines.append(f"| {task.title} | {kind} | {', '.join(cells)} |")
    return lines


def draw(rows: Sequence[dict], path: Path) -> None:
    """One panel a task: the mean loss of each method, by how many are skipped; LoRA's is a line."""
    tables = [Table(task, rows) for task in TASKS]
    tables = [table for table in tables if any(row["method"] != "LoRA" for row in table.rows)]
    if not tables:
        return
    shown = [method for method in METHODS if method != "LoRA" and any(table.of(method, count) for table in tables
             for count in table.task.counts)]  # fmt: skip
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.6 * columns + 1.8, lines * (0.24 * len(shown) + 1.3)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, table in zip(panels.flat, tables, strict=False):
        lora = estimate(values(table.reference, "loss"))
        if lora is not None:
            axes.axvline(lora.mean, color="0.3", linestyle="--", linewidth=1)
            if lora.count > 1:
                axes.axvspan(lora.mean - lora.error, lora.mean + lora.error, color="0.3", alpha=0.15, linewidth=0)
        for count, color, shift in zip(table.task.counts, ("tab:blue", "tab:orange"), (-0.15, 0.15), strict=True):
            for y, method in enumerate(shown):
                loss = estimate(values(table.of(method, count), "loss"))
                if loss is not None:
                    error = loss.error if loss.count > 1 else 0
                    axes.errorbar(loss.mean, y + shift, xerr=error, fmt="o", color=color, markersize=4, capsize=2)
        few, many = table.task.counts
        axes.set_title(f"{table.task.title} ({few}, {many} of {table.task.layers})", fontsize=9)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[len(tables) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(range(len(shown)), shown)
    panels[0, 0].set_ylim(len(shown) - 0.4, -0.6)
    for color, text in (("tab:blue", "fewer skipped"), ("tab:orange", "more skipped")):
        panels[0, 0].plot([], [], "o", color=color, markersize=4, label=text)
    panels[0, 0].plot([], [], "--", color="0.3", linewidth=1, label="LoRA, nothing skipped")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    figure.supxlabel("test loss, mean over seeds and its standard error", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The second part: nothing is trained
# ----------------------------------------------------------------------------------------------------------------------
#
# Hooks on the stock model, and nothing of this package: so its numbers are a reference for what the package does.

FREE_COUNTS = (4, 8, 12, 16)
FREE_RANK = 32
RIDGE = 1e-2


class Affine(NamedTuple):
    """`x W + b`, or just `b`."""

    weight: torch.Tensor | None
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand_as(x) if self.weight is None else x @ self.weight + self.bias


def ridge(x: torch.Tensor, y: torch.Tensor, rank: int | None = None) -> Affine:
    """The affine map of `x` that is nearest to `y`, `(tokens, size)` both; of at most this rank.

    The penalty is on inputs of unit variance: some of a stream's are a thousand times as large as others.
    """
    x, y = x.double(), y.double()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-9)
    z, target = (x - mean) / scale, y.mean(0)
    gram = z.T @ z
    weight = torch.linalg.solve(gram + RIDGE * len(z) * torch.eye(len(gram), dtype=z.dtype), z.T @ (y - target))
    if rank is not None:  # onto the directions in which what is predicted varies most
        _, directions = torch.linalg.eigh(weight.T @ gram @ weight)
        directions = directions[:, -rank:]
        weight = weight @ directions @ directions.T
    weight = weight / scale[:, None]
    return Affine(weight.float(), (target - mean @ weight).float())


class Texts:
    """Batches of one kind of text, padded on the right.

    Args:
        rows: Ids of tokens.
        size: Rows in a batch.
    """

    def __init__(self, rows: list[list[int]], size: int = 16) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.kept: list[torch.Tensor] = []
        rows = sorted(rows, key=len)
        for start in range(0, len(rows), size):
            some = [torch.tensor(row) for row in rows[start : start + size]]
            ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
            self.batches.append({"input_ids": ids, "attention_mask": mask, "use_cache": False})
            self.kept.append(mask.bool())

    def tokens(self, states: list[torch.Tensor], first: bool = True) -> torch.Tensor:
        """Those of all batches that are no padding: `(tokens, size)`; with or without the first of each row."""
        start = 0 if first else 1
        return torch.cat([s[:, start:][kept[:, start:]] for s, kept in zip(states, self.kept, strict=True)])


@contextmanager
def replaced(
    model: PreTrainedModel, stand_ins: dict[int, Affine], behind: dict[int, Affine] | None = None
) -> Iterator[None]:
    """Inside of the `with`, attentions add a function of their layer's input, and FFNs more than they give."""
    handles, streams = [], {}

    def remember(module: nn.Module, args: tuple, kwargs: dict, index: int) -> None:
        streams[index] = args[0] if args else kwargs["hidden_states"]

    def instead(module: nn.Module, args: tuple, output: tuple, index: int) -> tuple:
        return (stand_ins[index](streams[index]), *output[1:])

    def more(module: nn.Module, args: tuple, output: torch.Tensor, index: int) -> torch.Tensor:
        return output + behind[index](output)

    for index in stand_ins:
        layer = model.model.layers[index]
        handles.append(layer.register_forward_pre_hook(functools.partial(remember, index=index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(functools.partial(instead, index=index)))
        if behind and index in behind:
            handles.append(layer.mlp.register_forward_hook(functools.partial(more, index=index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Calibrated:
    """A whole model on the texts that everything is fitted to, layer by layer.

    Args:
        model: A Llama.
        texts: The texts.
        sample: Fewer of them, for what takes a forward of each attention.
    """

    def __init__(self, model: PreTrainedModel, texts: Texts, sample: Texts) -> None:
        self.model, self.texts, self.sample = model, texts, sample
        self.layers = model.model.layers
        self.inputs, self.arguments = self._first_inputs()
        self.means: dict[int, Affine] = {}
        self.similarity: dict[int, float] = {}
        self.deviation: dict[int, float] = {}
        streams = self.inputs
        for index in range(len(self.layers)):
            after, (added, _) = self.step(index, streams)
            x, a = texts.tokens(streams, first=False), texts.tokens(added, first=False)
            self.means[index] = Affine(None, a.mean(0))
            self.similarity[index] = (1 - F.cosine_similarity(x, x + a, dim=-1)).mean().item()
            self.deviation[index] = ((a - a.mean(0)).norm(dim=-1).mean() / x.norm(dim=-1).mean()).item()
            streams = after

    def _first_inputs(self) -> tuple[list[torch.Tensor], list[dict]]:
        """What the first layer is given, with each batch."""
        inputs, arguments = [], []

        def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append(kwargs)

        handle = self.layers[0].register_forward_pre_hook(remember, with_kwargs=True)
        for batch in self.texts.batches:
            self.model.model(**batch)
        handle.remove()
        return inputs, arguments

    def step(self, index: int, streams: list[torch.Tensor]) -> tuple[list, tuple[list, list]]:
        """Streams behind a layer, and what its attention and its FFN gave."""
        layer, given = self.layers[index], ([], [])
        handles = [
            layer.self_attn.register_forward_hook(lambda _m, _a, output: given[0].append(output[0])),
            layer.mlp.register_forward_hook(lambda _m, _a, output: given[1].append(output)),
        ]
        after = [layer(x, **kwargs) for x, kwargs in zip(streams, self.arguments, strict=True)]
        for handle in handles:
            handle.remove()
        return after, given

    @functools.cached_property
    def own_kl(self) -> dict[int, float]:
        """How much the model moves with each attention alone replaced by its mean."""
        whole = hidden_states(self.model, self.sample)
        return {
            index: divergence(self.model, self.sample, whole, {index: mean})[0] for index, mean in self.means.items()
        }

    def healed(self, skipped: list[int], rank: int | None) -> dict[int, Affine]:
        """Maps of the FFNs' outputs to what their layers then lack, each fitted with those before it in place."""
        behind: dict[int, Affine] = {}
        whole = streams = self.inputs
        for index in range(len(self.layers)):
            whole, _ = self.step(index, whole)
            if index not in skipped:
                streams, _ = self.step(index, streams)
                continue
            with replaced(self.model, {index: self.means[index]}):
                streams, (_, given) = self.step(index, streams)
            lacks = [w - s for w, s in zip(whole, streams, strict=True)]
            behind[index] = ridge(self.texts.tokens(given), self.texts.tokens(lacks), rank)
            streams = [s + behind[index](m) for s, m in zip(streams, given, strict=True)]
        return behind

    def linear(self, skipped: list[int]) -> dict[int, Affine]:
        """Maps of the layers' inputs to what their attentions give in the whole model, likewise one after another."""
        maps: dict[int, Affine] = {}
        whole = streams = self.inputs
        for index in range(len(self.layers)):
            whole, (added, _) = self.step(index, whole)
            if index in skipped:
                maps[index] = ridge(self.texts.tokens(streams), self.texts.tokens(added))
            with replaced(self.model, {index: maps[index]} if index in skipped else {}):
                streams, _ = self.step(index, streams)
        return maps


def hidden_states(model: PreTrainedModel, texts: Texts) -> list[torch.Tensor]:
    """What the head reads of each batch's tokens."""
    return [model.model(**batch).last_hidden_state[kept] for batch, kept in zip(texts.batches, texts.kept, strict=True)]


def divergence(
    model: PreTrainedModel,
    texts: Texts,
    whole: list[torch.Tensor],
    stand_ins: dict[int, Affine],
    behind: dict[int, Affine] | None = None,
) -> tuple[float, float]:
    """KL of the model with these replacements from the whole one, a token, with its standard error over rows."""
    sums, counts = [], []
    with replaced(model, stand_ins, behind):
        for batch, kept, hidden in zip(texts.batches, texts.kept, whole, strict=True):
            own = model.lm_head(model.model(**batch).last_hidden_state[kept]).log_softmax(-1)
            each = F.kl_div(own, model.lm_head(hidden).log_softmax(-1), log_target=True, reduction="none").sum(-1)
            sums += [row.sum().item() for row in each.split(kept.sum(1).tolist())]
            counts += kept.sum(1).tolist()
    mean = sum(sums) / sum(counts)
    residuals = [s - mean * c for s, c in zip(sums, counts, strict=True)]
    return mean, statistics.pstdev(residuals) * math.sqrt(len(sums)) / sum(counts)


def _zeros(calibrated: Calibrated, skipped: list[int]) -> tuple:
    return ({index: Affine(None, torch.zeros_like(calibrated.means[index].bias)) for index in skipped},)


def _means(calibrated: Calibrated, skipped: list[int]) -> tuple:
    return ({index: calibrated.means[index] for index in skipped},)


def _mapped(calibrated: Calibrated, skipped: list[int], rank: int | None = None) -> tuple:
    return *_means(calibrated, skipped), calibrated.healed(skipped, rank)


def _linear(calibrated: Calibrated, skipped: list[int]) -> tuple:
    return (calibrated.linear(skipped),)


FREE_METHODS: dict[str, tuple[str, Callable[[Calibrated, list[int]], tuple]]] = {
    "similarity, zeros (as LLM-Drop)": ("similarity", _zeros),
    "similarity, means": ("similarity", _means),
    "deepest, zeros": ("depth", _zeros),
    "deepest, means": ("depth", _means),
    "deviation, means": ("deviation", _means),
    "own KL, means": ("own_kl", _means),
    f"own KL, means, map of rank {FREE_RANK} behind the FFN": ("own_kl", functools.partial(_mapped, rank=FREE_RANK)),
    "own KL, means, full map behind the FFN": ("own_kl", _mapped),
    "own KL, full linear map of the layer's input (like ReplaceMe)": ("own_kl", _linear),
}


def free_texts(name: str) -> tuple[Texts, Texts, Texts]:
    """To calibrate with, fewer of these, and others to test with."""
    if name == "Python source":
        rows = [window for file in python_windows(96, 4) for window in file]  # the first 40: of ten files
        sizes = 40, 128, 8
    else:
        tokenizer = load_tokenizer()
        rows = [tokenizer(text.text).input_ids for text in shuffled_texts("movie")]
        sizes = 160, 450, 10
    test, calibration = rows[: sizes[0]], rows[sizes[0] :][: sizes[1]]
    return Texts(calibration), Texts(calibration[:: sizes[2]]), Texts(test)


@torch.no_grad()
def training_free(rows: Rows) -> None:
    """Do what has no row yet."""
    model = load_model()
    for name in ("Python source", "movie reviews"):
        done = {(row["method"], row["skipped"]) for row in rows.read() if row["text"] == name}
        missing = [(m, c) for c in FREE_COUNTS for m in FREE_METHODS if (m, c) not in done]
        if not missing:
            continue
        calibration, sample, test = free_texts(name)
        calibrated, whole = Calibrated(model, calibration, sample), hidden_states(model, test)
        for method, count in missing:
            chosen, fit = FREE_METHODS[method]
            by_layer = {i: -i for i in calibrated.means} if chosen == "depth" else getattr(calibrated, chosen)
            skipped = sorted(sorted(by_layer, key=by_layer.get)[:count])
            kl, error = divergence(model, test, whole, *fit(calibrated, skipped))
            row = {
                "text": name,
                "method": method,
                "skipped": count,
                "kl": round(kl, 4),
                "kl_se": round(error, 4),
                "skip_layers": skipped,
                "date": time.strftime("%Y-%m-%d"),
            }
            rows.add(row)
            print(json.dumps(row), flush=True)


def summarise_training_free(rows: Sequence[dict]) -> str:
    lines = [
        "## Without training",
        "",
        "SmolLM2-135M: KL from the whole model, in nats a token, with so many of 30 attentions replaced, ± its",
        "standard error over texts. Measured with hooks on the stock model; chosen and fitted on other texts of the",
        "same kind.",
    ]
    for text in dict.fromkeys(row["text"] for row in rows):
        lines += ["", f"| {text} | " + " | ".join(f"{c} skipped" for c in FREE_COUNTS) + " |"]
        lines.append("|---" * (1 + len(FREE_COUNTS)) + "|")
        for method in FREE_METHODS:
            found = {r["skipped"]: r for r in rows if (r["text"], r["method"]) == (text, method)}
            if found:
                cells = (f"{found[c]['kl']:.3f} ± {found[c]['kl_se']:.3f}" if c in found else "" for c in FREE_COUNTS)
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="runs whose name contains this; all of several"
    )
    parser.add_argument("--list", action="store_true", help="no runs, only their names")
    parser.add_argument("--summary", action="store_true", help="no runs, only the tables and the picture")
    parser.add_argument("--training-free", action="store_true", help="the second part")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # each fresh head is reported otherwise
    rows, free, failed = Rows(RESULTS / "evidence.json"), Rows(RESULTS / "training_free.json"), []
    runs = wanted_runs(args.only)
    if args.list:
        done = {key_of(row) for row in rows.read()}
        for run in runs:
            print("done   " if run.key in done else "missing", run.key)
        return
    if args.training_free:
        training_free(free)
    elif not args.summary:
        failed = work(runs, rows)
    (RESULTS / "evidence.md").write_text(summarise(rows.read(), free.read()))
    draw(rows.read(), RESULTS / "evidence.png")
    if failed:
        raise SystemExit("error: these runs failed, or need one that did:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
