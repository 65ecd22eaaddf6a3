"""Merged models in the formats of other engines. What a format can't hold is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..folders import new_folder
from .gguf_file import write_gguf
from .llama_shape import llama_shape
from .nemotron_nas import write_nemotron_nas

FORMATS: dict[str, Callable] = {"nemotron-nas": write_nemotron_nas, "gguf": write_gguf}
"""`{format: function that writes it}`."""


def export(
    model: PreTrainedModel,
    dir: str | os.PathLike,
    format: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    pre_tokenizer: str | None = None,
) -> None:
    """Write a merged model into the folder `dir`, for an engine other than transformers; see docs/export.md.

    The folder is written whole or not at all.

    Args:
        model: What `merge_and_unload()` returned, or what was loaded from where that was saved.
        dir: The folder; must be new or empty.
        format: `"nemotron-nas"` (vLLM, SGLang, TensorRT-LLM) or `"gguf"` (llama.cpp; writes `model.gguf`).
        tokenizer: Its tokenizer, which is written as well. A GGUF file can't do without.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or, for GGUF, `"q8_0"`. Default: that of the model.
        pre_tokenizer: For GGUF: the name that llama.cpp has for the tokenizer's way of splitting text, if it is not
            one of those that are recognised.

    Raises:
        ValueError: if `dir` is not free, or if the format can't hold the model; the message says what to do.
        ImportError: if a package that the format needs is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}: choose from {', '.join(map(repr, FORMATS))}.")
    with new_folder(dir) as folder:
        FORMATS[format](llama_shape(model), folder, tokenizer=tokenizer, dtype=dtype, pre_tokenizer=pre_tokenizer)
