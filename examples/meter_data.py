"""Questions for examples/meter_vqa.py: as the data sets' authors publish them, as batches, and small ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import vqa
from made import drawing
from paper import ImageQuestion, load_image, read_nlvr2, read_vqa, write_nlvr2, write_vqa
from real_data import SHAPES, VisualQuestion, cached, visual_questions
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPLITS = {"vqa": ("train2014", "val2014"), "nlvr2": ("train", "dev")}
"""What to train on and what to test with: the parts with public labels."""


def read(task: str, folder: Path, split: str) -> list[ImageQuestion]:
    """The questions of one split.

    Args:
        task: `"vqa"` or `"nlvr2"`.
        folder: With the files of VQA v2 as they are, and their images in `train2014/` and `val2014/`; or with those of
            NLVR2, and their images in `images/train/` (in its folders `0` to `99`) and `images/dev/`.
        split: One of `SPLITS`.

    Raises:
        DataError: says which file, and which question, is not as it should be.
    """
    if task == "nlvr2":
        return read_nlvr2(folder / f"{split}.json", folder / "images" / split)
    questions, annotations = f"v2_OpenEnded_mscoco_{split}_questions.json", f"v2_mscoco_{split}_annotations.json"
    return read_vqa(folder / questions, folder / annotations, folder / split)


@dataclass
class Collator:
    """Makes batches of questions.

    Args:
        tokenizer: The text encoder's.
        answers: Those that the model chooses from.
        image_size: Width and height that images are brought to, in pixels, without the authors' random changes.
    """

    tokenizer: PreTrainedTokenizerBase
    answers: Sequence[str]
    image_size: int

    def __call__(self, questions: Sequence[ImageQuestion]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask (B, T)`, `pixel_values (B, 3, H, W)` and `labels (B, answers)`; of questions
        about two images, `pixel_values (B, 2, 3, H, W)` and `labels (B,)`."""
        texts = [question.text for question in questions]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=50, return_tensors="pt")
        images = [load_image(path) for question in questions for path in question.images]
        pixels, labels = self.processor(images, return_tensors="pt")["pixel_values"], self.scores(questions)
        if len(images) > len(texts):
            pixels, labels = pixels.unflatten(0, (len(texts), -1)), labels.argmax(-1)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "pixel_values": pixels,
            "labels": labels,
        }

    @cached_property
    def processor(self) -> CLIPImageProcessorPil:
        size = {"height": self.image_size, "width": self.image_size}
        return CLIPImageProcessorPil(size=size, do_center_crop=False)

    def scores(self, questions: Sequence[ImageQuestion]) -> torch.Tensor:
        """What each answer is worth: `(questions, answers)`."""
        return torch.tensor([[question.scores.get(answer, 0.0) for answer in self.answers] for question in questions])


# ----------------------------------------------------------------------------------------------------------------------
# Small data
# ----------------------------------------------------------------------------------------------------------------------


def easy_vqa() -> Path:
    """The folder with easy-VQA's questions, those with "not" left out, in VQA v2's format.

    It has three splits: `pretrain` and `train2014`, about every other image each of those to train on, and `val2014`.
    """

    def write(target: Path, scratch: Path) -> None:
        train, test = (vqa.affirmative(visual_questions(split)) for split in ("train", "test"))
        _write(target, "pretrain", [q for q in train if q.image_id % 2])
        _write(target, "train2014", [q for q in train if not q.image_id % 2])
        _write(target, "val2014", test)

    return cached("easy-vqa-as-vqa-v2", write)


def _write(folder: Path, split: str, questions: list[VisualQuestion]) -> None:
    random.Random(0).shuffle(questions)  # else all about one image follow each other
    rows = [dict(image=q.image, image_id=q.image_id, question=q.text, answer=q.answer) for q in questions]
    write_vqa(folder, split, rows)


COLORS = ("blue", "red")
QUESTIONS = ("what color is it?", "what shape is it?", "is it red?")
SENTENCES = ("both are red", "both are of the same shape")


def write_tiny_data(folder: Path) -> None:
    """Drawn examples in the formats of VQA v2 and NLVR2: for training, and a third of that for testing."""
    kinds = list(itertools.product(COLORS, SHAPES))
    for vqa_split, nlvr2_split, times in (("train2014", "train", 6), ("val2014", "dev", 2)):
        rows, pairs = [], []
        for number, (color, shape) in enumerate(kinds * times):
            image = drawing(color, shape, 32)
            for question, answer in zip(QUESTIONS, (color, shape, "yes" if color == "red" else "no"), strict=True):
                rows.append(dict(image=image, image_id=number, question=question, answer=answer))
            other = kinds[(number + number // len(kinds)) % len(kinds)]  # itself, then the next one, and so on
            for sentence, label in zip(SENTENCES, (color == other[0] == "red", shape == other[1]), strict=True):
                pairs.append(dict(images=(image, drawing(*other, 32)), sentence=sentence, label=label))
        write_vqa(folder, vqa_split, rows)
        write_nlvr2(folder, nlvr2_split, pairs)


def save_tiny_tokenizer(folder: Path) -> None:
    """A tokenizer of the words of these examples."""
    known = sorted({word for text in QUESTIONS + SENTENCES for word in text.split()})
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *known])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
