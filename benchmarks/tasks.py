"""What the models of `evidence.py` learn: nine tasks, on real data."""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

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

SEARCH = 128  # examples to choose attentions with, which are not trained on
SCORED = 64  # of them, for scores
GIVEN = "EAS, given set"  # by score, and skipped from the first step


def rates(further: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Those that are tried with each kind of adapter."""
    three = {"LoRA": (1e-3, 2e-3, 4e-3), GIVEN: (1e-3, 2e-3, 4e-3), "0.1.0": (5e-4, 1e-3, 2e-3)}
    return {kind: (*tried, *further.get(kind, ())) for kind, tried in three.items()}


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
        rates: Learning rates to choose from, for each kind of adapter: three, and further ones as long as the lowest
            or the highest is the best.
        rate_seeds: How many seeds a rate is chosen with, by the mean of their losses: more than one where runs of one
            rate differ by more than rates do.
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
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: rates({}))
    rate_seeds: int = 1

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

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer | None:
        """What the Trainer is to use instead of its own, if anything."""

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
    def collator(self) -> Callable[[list], Any]:
        return collator(self.tokenizer)  # once: it copies the tokenizer, which takes seconds

    @functools.cached_property
    def splits(self) -> Splits:
        texts = [text._replace(kind=self.word) for text in shuffled_texts(self.kind, self.max_length)]
        train, search, validation, test = self.split(texts)
        return Splits(tokenise(train, self.tokenizer), tokenise(search, self.tokenizer), validation, test)

    def load(self) -> PreTrainedModel:
        return load_model(self.pretrained)

    def collate(self, examples: list) -> dict[str, torch.Tensor]:
        return dict(self.collator(examples))

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
    per_validation_file: int = 20
    has_prompts = False

    @functools.cached_property
    def splits(self) -> Splits:
        windows = [window for file in python_windows(self.window, self.per_file) for window in file]
        # all sizes are multiples of `per_file`, so no file is in two splits
        splits = self.split([{"input_ids": ids, "labels": ids} for ids in windows])
        # the rate is chosen with a few files, so with more of each: those of the other splits stay what they are
        first, count = self.test // self.per_file, self.validation // self.per_file
        long = [ids for ids in python_tokens() if len(_starts(ids, self.window)) >= self.per_file]
        rng = random.Random(1)
        drawn = [
            w for ids in long[first : first + count] for w in _windows(ids, self.window, self.per_validation_file, rng)
        ]
        return splits._replace(validation=[{"input_ids": ids, "labels": ids} for ids in drawn])

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
def python_tokens() -> list[list[int]]:
    """The beginning of each file of Python's standard library, as tokens."""
    tokenizer = load_tokenizer()
    return [
        tokenizer(text[:40_000], add_special_tokens=False, truncation=True, max_length=10_000).input_ids
        for text in python_source()
    ]


@functools.cache
def python_windows(length: int, per_file: int) -> list[list[list[int]]]:
    """Pieces of each of these files, so many; shorter files are left out."""
    rng = random.Random(0)
    files = [_windows(ids, length, per_file, rng) for ids in python_tokens()]
    return [windows for windows in files if len(windows) == per_file]


def _starts(ids: list[int], length: int) -> range:
    return range(0, len(ids) - length + 1, length)


def _windows(ids: list[int], length: int, most: int, rng: random.Random) -> list[list[int]]:
    starts = _starts(ids, length)
    return [ids[start : start + length] for start in rng.sample(starts, min(most, len(starts)))]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures(Task):
    """A small LLaVA answers questions about images; its projector is trained, too, at a tenth of the rate."""

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

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer | None:
        return vqa.slow_projector(model, learning_rate)


def in_batches(examples: Sequence, size: int, collate: Callable[[list], dict]) -> Iterator[dict]:
    for start in range(0, len(examples), size):
        yield collate(list(examples[start : start + size]))


def _mini_lm(name: str, kind: str, test: int, further: dict[str, tuple[float, ...]], validation: int = 300) -> Task:
    return Classification(
        model="MiniLM", name=name, kind=kind, layers=6, counts=(2, 3), steps=150, batch_size=16, validation=validation,
        test=test, seeds=5, rates=rates(further),
        adapted={"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "pooler"]},
    )  # fmt: skip


SMOL = dict(model="SmolLM2", layers=30, counts=(8, 12))
TASKS = [
    _mini_lm("movie reviews", "movie", 4000, {"0.1.0": (4e-3,)}, validation=1000),
    _mini_lm("tweets", "tweets", 1440, {"LoRA": (8e-3,), GIVEN: (5e-4,), "0.1.0": (4e-3, 8e-3)}),
    _mini_lm("product reviews", "amazon", 1040, {"LoRA": (8e-3,)}),
    _mini_lm("editorials", "editorial", 1000, {GIVEN: (5e-4,)}),
    Source(
        **SMOL, name="Python source", steps=60, batch_size=4, validation=40, test=200,
        rates=rates({"LoRA": (8e-3,), GIVEN: (8e-3,)}),
    ),
    Answers(
        **SMOL, name="movie reviews", kind="movie", word="Review", steps=100, batch_size=8, validation=200, test=1000,
        rates=rates({GIVEN: (5e-4,)}),
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
        model="LLaVA", name="easy-VQA", layers=30, counts=(8, 12), steps=90, batch_size=8, validation=300, test=600,
        rates=rates({GIVEN: (5e-4,)}), rate_seeds=3,
    ),
]  # fmt: skip
