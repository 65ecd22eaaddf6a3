"""Small models and questions for the examples of the paper's systems, where no hub can be reached.

Those of `--tiny` are random and made; those of `--small` arrive in packages, and are turned into the format that
the paper's data sets are published in.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paper import LETTERS, SUBJECTS, write_scienceqa
from PIL import Image, ImageDraw
from real_data import COLORS, SHAPES, VisualQuestion, cached, visual_questions
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def drawing(color: str, shape: str, size: int = 64) -> Image.Image:
    """A `"circle"`, `"rectangle"` or `"triangle"` on white, as in easy-VQA."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    low, high = size // 6, size - size // 6
    if shape == "triangle":
        draw.polygon([(size // 2, low), (low, high), (high, high)], fill=color)
    else:
        {"circle": draw.ellipse, "rectangle": draw.rectangle}[shape]([low, low, high, high], fill=color)
    return image


def made_scienceqa(folder: Path) -> Path:
    """A few questions in ScienceQA's format, about a drawing, about a sentence, or about neither; the folder."""
    rows = []
    for number, (color, shape) in enumerate(itertools.product(COLORS, SHAPES)):
        row = {"subject": SUBJECTS[number % 3], "grade": f"grade{1 + number % 12}", "lecture": "", "solution": ""}
        if number % 2:
            row |= {"question": "what shape is it?", "choices": list(SHAPES), "answer": SHAPES.index(shape)}
        else:
            row |= {"question": "what color is it?", "choices": list(COLORS[:5]), "answer": COLORS.index(color) % 5}
        context = ({"image": drawing(color, shape, 32)}, {"hint": f"it is a {color} {shape}", "solution": shape}, {})
        rows.append(row | context[number % 4 % 3])
    write_scienceqa(folder, {"train": rows[:16], "minival": rows[16:20], "test": rows[20:]})
    return folder


def packaged_scienceqa(examples: Mapping[str, int], seed: int) -> Path:
    """The folder with questions of easy-VQA in ScienceQA's format, as many of each split, made the first time.

    What easy-VQA doesn't have says of which kind a question is: subjects tell colours, shapes, and yes or no; the
    grade is 7 if there is a "not" or "no" in the question, and 1 otherwise.
    """

    def make(target: Path, scratch: Path) -> None:
        train, test = visual_questions("train"), visual_questions("test")
        for questions in (train, test):
            random.Random(seed).shuffle(questions)
        rows = {split: [(test if split == "test" else train).pop() for _ in range(n)] for split, n in examples.items()}
        write_scienceqa(target, {split: map(_as_scienceqa, asked) for split, asked in rows.items()})

    return cached("-".join(["easy-vqa-as-scienceqa", *map(str, [*examples.values(), seed])]), make)


def _as_scienceqa(question: VisualQuestion) -> dict[str, Any]:
    kinds = (COLORS, SHAPES, ("yes", "no"))
    kind = next(index for index, answers in enumerate(kinds) if question.answer in answers)
    choices = list(kinds[kind])
    return {
        "question": question.text,
        "choices": choices,
        "answer": choices.index(question.answer),
        "subject": SUBJECTS[kind],
        "grade": f"grade{7 if {'not', 'no'} & set(question.text.split()) else 1}",
        "image": question.image,
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the made questions, and others, a thousand in all."""
    texts = ("Question: Context: Options: Response: The answer is BECAUSE: N/A . it a", "what shape color is it?")
    letters = [text for letter in LETTERS for text in (f"({letter})", letter)]
    words = dict.fromkeys([*" ".join((*texts, *COLORS, *SHAPES)).split(), *letters])
    known = ["<pad>", "<s>", "</s>", "<unk>", *words, *(f"w{number}" for number in range(1000))][:1000]
    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(".", "isolated")]
    )
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def tiny_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama of six layers for that tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_tower(layers: int = 2) -> CLIPVisionModel:
    """A random CLIP tower for images of 32x32 pixels."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, image_size=32,
        patch_size=16,
    )  # fmt: skip
    return CLIPVisionModel(config)
