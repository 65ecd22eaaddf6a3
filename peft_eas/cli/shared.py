"""What several commands need: errors, arguments, models and tokenizers."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from peft import PeftConfig
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checkpoint import model_class_of
from ..checks import one_line
from ..config import EASConfig, EASType


class UsageError(Exception):
    """Something that the user can put right; shown without a traceback."""


def say(text: str, file: TextIO) -> None:
    """Print lines that may have something of a file in them, which is not to reach the terminal as a command."""
    print("\n".join(map(one_line, text.split("\n"))), file=file)


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Whatever libraries run into while they read files that hold something else than they should."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} holds a file that is no JSON: {error}.") from error
    except (UsageError, OSError, ValueError):  # which say what is wrong
        raise
    except Exception as error:
        raise UsageError(f"{name} can't be read ({type(error).__name__}: {error}): is a file damaged?") from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def num_skip(text: str) -> int | float | str:
    if text == "auto":
        return text
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a count, a fraction, or auto, got {text}") from None


def layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load_model(name: str, dtype: str | None = None, adapter: PeftConfig | None = None) -> PreTrainedModel:
    """A model that generates text; or one of the kind that `adapter` was trained with, if that says so."""
    with reading(name):
        return model_class_of(name, adapter).from_pretrained(name, dtype=dtype or "auto")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with reading(name):
        return with_padding(AutoTokenizer.from_pretrained(name), name)


def with_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"The tokenizer of {name} has neither a padding token nor an end of sequence.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizers(sources: Sequence[str]) -> Iterator[PreTrainedTokenizerBase]:
    for source in sources:
        with contextlib.suppress(OSError, ValueError), reading(source):
            yield AutoTokenizer.from_pretrained(source)


def save_tokenizer(sources: Sequence[str], folder: Path) -> None:
    """Save the tokenizer of the first source that has one; or the processor, which has a tokenizer and more."""
    found = next(_processors(sources), None) or next(tokenizers(sources), None)
    if found is None:
        say(f"There is no tokenizer beside {' or '.join(sources)}; none was saved.", file=sys.stderr)
    else:
        found.save_pretrained(folder)


def _processors(sources: Sequence[str]) -> Iterator[ProcessorMixin]:
    for source in sources:
        with contextlib.suppress(OSError, ValueError), reading(source):
            found = AutoProcessor.from_pretrained(source)
            if isinstance(found, ProcessorMixin):  # of a language model it is the tokenizer
                yield found


def summary(out: Path, model: PreTrainedModel, skipped: Sequence[int | str]) -> str:
    """What was saved, in a line."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{out}: {type(model).__name__}, {size / 1e6:.1f} M parameters, without the attentions of {skipped}"


def adapter_config(name: str) -> EASConfig:
    """The configuration of an adapter, a folder or a name on the Hub."""
    with reading(name):
        config = PeftConfig.from_pretrained(name)
    if config.peft_type != EASType.EAS:
        raise UsageError(f"{name} is an adapter of type {config.peft_type!s}, not an EAS adapter.")
    return config
