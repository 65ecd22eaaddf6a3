"""What the examples of the paper's three systems share: their data, as published, and the tables and times they print.

ScienceQA (Lu et al., NeurIPS 2022), VQA v2 (Goyal et al., CVPR 2017) and NLVR2 (Suhr et al., ACL 2019) are read from
the files that their authors publish. Where one of these is not as it should be, a `DataError` says which file, which
row, and what was expected.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig


class DataError(ValueError):
    """A file of a data set is missing, or has something else in it than the data set's authors publish."""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no {path}: download the data set, or give the folder that has it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}): download it again.") from None


@contextmanager
def _row(path: Path, name: str) -> Iterator[None]:
    """Say which row of which file is meant, if reading it fails."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}, {name}: {error}") from None
    except KeyError as error:
        raise DataError(f"{path}, {name}: it has no {error}, or something else has no such entry.") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}, {name}: {error}") from None


def _image(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"its image {path} is missing; unpack all images of the data set.")
    return path


def load_image(path: Path) -> Image.Image:
    """The image in a file, in RGB.

    Raises:
        DataError: if it can't be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} can't be read as an image ({error}): unpack it again.") from None


# ----------------------------------------------------------------------------------------------------------------------
# ScienceQA
# ----------------------------------------------------------------------------------------------------------------------

LETTERS = string.ascii_uppercase
ANSWER = " The answer is"


@dataclass(frozen=True)
class Problem:
    """A question of ScienceQA, with its choices; `answer` is the index of the right one.

    Prompt and response are in the format QCM-ALE of the data set's authors: question, context and choices; then answer,
    lecture and explanation.
    """

    name: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    grade: str
    hint: str = ""
    image: Path | None = None
    explanation: str = ""

    @property
    def prompt(self) -> str:
        choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"Question: {self.question}\nContext: {self.hint or 'N/A'}\nOptions: {choices}\nResponse:"

    @property
    def response(self) -> str:
        because = f" BECAUSE: {self.explanation}" if self.explanation else ""
        return f"{ANSWER} {LETTERS[self.answer]}.{because}"


SUBJECTS = ("natural science", "social science", "language science")
CATEGORIES: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem.subject == SUBJECTS[0],
    "SOC": lambda problem: problem.subject == SUBJECTS[1],
    "LAN": lambda problem: problem.subject == SUBJECTS[2],
    "TXT": lambda problem: bool(problem.hint),
    "IMG": lambda problem: problem.image is not None,
    "NO": lambda problem: not problem.hint and problem.image is None,
    "G1-6": lambda problem: int(problem.grade.removeprefix("grade")) <= 6,
    "G7-12": lambda problem: int(problem.grade.removeprefix("grade")) >= 7,
    "Avg": lambda problem: True,
}
"""The columns of ScienceQA's table: by subject, by context, by grade."""


def read_scienceqa(folder: Path, split: str) -> list[Problem]:
    """The questions of one split.

    Args:
        folder: Has `problems.json`, `pid_splits.json` and `images/<split>/<number>/image.png`.
        split: One of those in `pid_splits.json`: `"train"`, `"val"`, `"test"`, `"minitrain"` and so on.

    Raises:
        DataError: if a file, an image or a split is missing, or a question is incomplete.
    """
    file = folder / "problems.json"
    problems, splits = _read(file), _read(folder / "pid_splits.json")
    if split not in splits:
        raise DataError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {', '.join(splits)}.")
    read = []
    for name in splits[split]:
        with _row(file, f"question {name}"):
            row = problems[name]
            choices, answer = tuple(row["choices"]), row["answer"]
            if not choices or not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise DataError(f"`answer` is {answer!r}, which is none of its {len(choices)} `choices`.")
            if row["subject"] not in SUBJECTS or not row["grade"].removeprefix("grade").isdecimal():
                raise DataError(f"`subject` is {row['subject']!r} and `grade` {row['grade']!r}; no such are published.")
            image = _image(folder / "images" / row["split"] / name / row["image"]) if row["image"] else None
            explanation = f"{row.get('lecture', '')} {row.get('solution', '')}".strip()
            own = (row["question"], choices, answer, row["subject"], row["grade"], row["hint"], image, explanation)
            read.append(Problem(name, *own))
    return read


def write_scienceqa(folder: Path, splits: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Write questions in ScienceQA's format: `image`, if there is one, is a PIL image."""
    problems, names = {}, {}
    for split, rows in splits.items():
        names[split] = []
        for row in rows:
            name = str(len(problems) + 1)
            names[split].append(name)
            image = row.get("image")
            problems[name] = {"hint": "", **row, "split": split, "image": image and "image.png"}
            if image:
                place = folder / "images" / split / name
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / "image.png")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(names), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# VQA v2 and NLVR2
# ----------------------------------------------------------------------------------------------------------------------

SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""What an answer is worth that none, one, two, three, or more of the ten people gave."""


@dataclass(frozen=True)
class ImageQuestion:
    """A question about one image, or a sentence about two (NLVR2), with what each answer is worth, from 0 to 1."""

    name: str
    text: str
    images: tuple[Path, ...]
    scores: Mapping[str, float]


def read_vqa(questions: Path, annotations: Path, images: Path) -> list[ImageQuestion]:
    """The questions of VQA v2.

    Args:
        questions: `v2_OpenEnded_mscoco_train2014_questions.json`, or another split's.
        annotations: `v2_mscoco_train2014_annotations.json`, likewise: ten people's answers to each question.
        images: The folder with `COCO_train2014_000000000009.jpg` and so on.

    Raises:
        DataError: if a file or an image is missing, or a question has no answers.
    """
    answers = {row["question_id"]: row for row in _read(annotations).get("annotations", ())}
    read = []
    for row in _read(questions).get("questions", ()):
        name = row.get("question_id")
        with _row(questions, f"question {name}"):
            if not answers.get(name, {}).get("answers"):
                raise DataError(f"{annotations} has no answers to it; take both files of the same split.")
            given = Counter(str(answer["answer"]).lower().strip() for answer in answers[name]["answers"])
            subset = answers[name].get("data_subtype", images.name)
            image = _image(images / f"COCO_{subset}_{row['image_id']:012}.jpg")
            scores = {answer: SCORES[min(count, 4)] for answer, count in given.most_common()}
            read.append(ImageQuestion(str(name), row["question"], (image,), scores))
    if not read:
        raise DataError(f"{questions} has no `questions`: it is another kind of file.")
    return read


def read_nlvr2(sentences: Path, images: Path) -> list[ImageQuestion]:
    """The sentences of NLVR2, each true or false of two images.

    Args:
        sentences: `dev.json`, or another split's: one JSON object a line.
        images: The folder with `dev-0-0-img0.png` and so on.

    Raises:
        DataError: if the file or an image is missing, or a label is neither True nor False.
    """
    if not sentences.is_file():
        raise DataError(f"There is no {sentences}: download the data set, or give the folder that has it.")
    read = []
    for number, line in enumerate(sentences.read_text(encoding="utf-8").splitlines(), 1):
        with _row(sentences, f"line {number}"):
            row = json.loads(line)
            label = str(row["label"])
            if label not in ("True", "False"):
                raise DataError(f"`label` is {label!r}, not True or False.")
            pair = row["identifier"].rsplit("-", 1)[0]
            place = images / str(row.get("directory", ""))  # the images of the training set lie in a hundred folders
            both = tuple(_image(place / f"{pair}-img{side}.png") for side in (0, 1))
            read.append(ImageQuestion(row["identifier"], row["sentence"], both, {label: 1.0}))
    if not read:
        raise DataError(f"{sentences} has no sentences: download it again.")
    return read


def write_vqa(folder: Path, split: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write questions in VQA v2's format, the images in `folder / split`.

    Args:
        folder: Where to.
        split: What stands for `train2014` in all names.
        rows: `image` (of PIL), `image_id`, `question` and `answer`, which all ten people give.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    questions, annotations = [], []
    for number, row in enumerate(rows):
        path = folder / split / f"COCO_{split}_{row['image_id']:012}.jpg"
        if not path.exists():
            row["image"].save(path, quality=95)
        both = {"question_id": number, "image_id": row["image_id"]}
        questions.append({**both, "question": row["question"]})
        answers = [{"answer_id": i, "answer": row["answer"], "answer_confidence": "yes"} for i in range(1, 11)]
        annotations.append({**both, "data_subtype": split, "answers": answers})
    for name, content in (
        (f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions}),
        (f"v2_mscoco_{split}_annotations.json", {"annotations": annotations}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_nlvr2(folder: Path, split: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write sentences in NLVR2's format: `folder / "dev.json"`, the images in `folder / "images" / "dev"`.

    Args:
        folder: Where to.
        split: What stands for `dev`.
        rows: `images` (two of PIL), `sentence` and `label`, which is true or false.
    """
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        for side, image in enumerate(row["images"]):
            image.save(images / f"{split}-{number}-0-img{side}.png")
        name = f"{split}-{number}-0-0"
        lines.append(json.dumps({"identifier": name, "sentence": row["sentence"], "label": str(row["label"])}))
    (folder / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def frequent_answers(questions: Iterable[ImageQuestion], least: int = 9) -> list[str]:
    """The answers that most people gave to at least `least` questions, sorted: 3,129 in VQA v2's train and val."""
    best = Counter(max(q.scores, key=q.scores.__getitem__) for q in questions)
    return sorted(answer for answer, count in best.items() if count >= least)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and times
# ----------------------------------------------------------------------------------------------------------------------


def print_table(rows: Mapping[str, Mapping[str, str]]) -> None:
    """A table with a row for each name; a cell that a row lacks is `-`."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = {c: 2 + max(len(c), *(len(row.get(c, "-")) for row in rows.values())) for c in columns}
    first = 2 + max(map(len, rows))
    print(" " * first + "".join(f"{column:>{width[column]}}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{first}}" + "".join(f"{row.get(column, '-'):>{width[column]}}" for column in columns))


def by_category(right: torch.Tensor, problems: Sequence[Problem]) -> dict[str, str]:
    """Accuracy in per cent in each of `CATEGORIES` that has questions; `right`: `(problems,)`, bool."""
    cells = {}
    for category, belongs in CATEGORIES.items():
        chosen = torch.tensor([belongs(problem) for problem in problems])
        if chosen.any():
            cells[category] = f"{100 * right[chosen].double().mean():.2f}"
    return cells


@torch.no_grad()
def timed(calls: Mapping[str, Callable[[], Any]], samples: int, rounds: int = 5) -> dict[str, dict[str, str]]:
    """How long each call takes a sample, in milliseconds (median), and how often as fast as the first one it is.

    The calls take turns, and each is compared with the first in the same round, so that whatever else the machine does
    hits all alike: median and quartiles of these ratios. One more round is for warming up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    cells = {}
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles(a / b for a, b in zip(first[1:], own[1:], strict=True))
        milliseconds = 1000 * statistics.median(own[1:]) / samples
        cells[name] = {"ms/sample": f"{milliseconds:.1f}", "speed": f"{middle:.2f}x [{low:.2f}, {high:.2f}]"}
    return cells


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# Models and command lines
# ----------------------------------------------------------------------------------------------------------------------


def check_type(name: str | Path, *model_types: str) -> None:
    """Refuse a checkpoint of another model, most of whose weights transformers would make anew.

    Raises:
        DataError: if it is not of one of these types.
    """
    found = AutoConfig.from_pretrained(name).model_type
    if found not in model_types:
        raise DataError(f"{name} is a model of the type {found!r}; {' or '.join(map(repr, model_types))} is needed.")


def parse(options: argparse.ArgumentParser, small: dict[str, Any], tiny: dict[str, Any]) -> argparse.Namespace:
    """The command line, with `--small` and `--tiny` besides, which come with other defaults."""
    size = options.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a model and questions that arrive in packages")
    size.add_argument("--tiny", action="store_true", help="a random model and a few made questions")
    chosen = options.parse_known_args()[0]
    options.set_defaults(**small if chosen.small else tiny if chosen.tiny else {})
    return options.parse_args()
