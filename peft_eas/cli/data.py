"""Examples out of the files, folders and datasets that a user names."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ..checks import shown
from .shared import UsageError, reading

if TYPE_CHECKING:
    from datasets import Dataset

DATA_HELP = (
    "data: a .jsonl, .json, .csv or .parquet file, a folder, or a dataset of the hub, with the columns `prompt` and "
    "`completion`, or `text`"
)


def read_examples(
    data: str, tokenizer: PreTrainedTokenizerBase, max_length: int, count: int | None = None
) -> list[dict[str, list[int]]]:
    """Tokenised examples, with labels that are -100 for the prompt; the longest are cut at the end."""
    with reading(data):
        return _tokenised(data, _rows(data), tokenizer, max_length, count)


def read_batches(
    data: str, tokenizer: PreTrainedTokenizerBase, max_length: int, count: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """The first `count` of these examples in batches `{input_ids, attention_mask, labels}`, padded."""
    examples = read_examples(data, tokenizer, max_length, count)
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [dict(collate(examples[i : i + batch_size])) for i in range(0, len(examples), batch_size)]


def _rows(data: str) -> Sequence[dict[str, Any]] | Dataset:
    """The rows of a file, a folder or a dataset of the Hub."""
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(data)
    if path.suffix in kinds and not path.exists():
        raise UsageError(f"There is no file {data}.")
    if path.is_file() and path.suffix not in kinds:
        raise UsageError(f"{data} is no {', '.join(kinds)} file.")
    if path.is_file() and not path.stat().st_size:
        raise UsageError(f"{data} can't be read: it is empty")
    if path.is_file() and kinds[path.suffix] == "json":
        return _json_rows(path)
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UsageError("reading data needs the package `datasets`: pip install 'peft_eas[cli]'.") from None
    if not path.is_file():
        return load_dataset(data, split="train")
    try:
        return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    except (DatasetsError, ValueError) as error:
        raise UsageError(f"{data} can't be read: {error.__cause__ or error}") from None


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line or in one list. (The parser that `datasets` uses ends the process if there is
    something else.)"""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_list = text.lstrip()[:1] == "["
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON, with an object in each line or a list of objects: {error}.") from None
    wrong = [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if wrong:
        raise UsageError(f"{path}: row {wrong[0]} is no object, but {shown(rows[wrong[0] - 1])}.")
    return rows


def _tokenised(
    data: str,
    rows: Sequence[dict[str, Any]] | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    count: int | None,
) -> list[dict[str, list[int]]]:
    if not len(rows):
        raise UsageError(f"{data} has no rows.")
    columns = {*rows[0]}
    if not ({"prompt", "completion"} <= columns or "text" in columns):
        raise UsageError(f"{data} has the columns {sorted(columns)}, but needs `prompt` and `completion`, or `text`.")
    names = ("prompt", "completion") if {"prompt", "completion"} <= columns else ("text",)
    examples = []
    for number, row in enumerate(itertools.islice(rows, count), start=1):
        for name in names:
            if not isinstance(row.get(name), str):
                raise UsageError(f"{data}: `{name}` of row {number} is no text, but {shown(row.get(name))}.")
        if len(names) == 2:
            prompt = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
        else:
            prompt, answer = [], tokenizer(row["text"]).input_ids
        answer = [*answer, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        ids = (prompt + answer)[:max_length]
        if len(prompt) < len(ids):
            examples.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:max_length]})
    if not examples:
        raise UsageError(f"No prompt in {data} leaves room for its completion within {max_length} tokens.")
    if len(examples) < number:
        print(
            f"{data}: {number - len(examples)} of {number} rows left out, whose prompts leave no room for a completion "
            f"within {max_length} tokens.",
            file=sys.stderr,
        )
    return examples
