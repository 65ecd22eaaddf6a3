"""Merged models in the formats of other engines. What a format can't hold is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import choice, refused
from ..folders import new_folder
from ..runtime.eas_record import Record
from .gguf_file import write_gguf
from .nemotron_nas import write_nemotron_nas
from .onnx_file import write_onnx

FORMATS: dict[str, Callable] = {"nemotron-nas": write_nemotron_nas, "gguf": write_gguf, "onnx": write_onnx}
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
        format: `"nemotron-nas"` (vLLM, SGLang, TensorRT-LLM), `"gguf"` (llama.cpp; the file is `model.gguf`) or
            `"onnx"` (one forward, without a KV cache; the file is `model.onnx`).
        tokenizer: Its tokenizer, which is written as well. A GGUF file can't do without.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or, for GGUF, `"q8_0"`. Default: that of the model.
        pre_tokenizer: For GGUF: the name that llama.cpp has for the tokenizer's way of splitting text, if it is not
            one of those that are recognised.

    Raises:
        ValueError: if `dir` is not free, or if the format can't hold the model; the message says what to do.
        ImportError: if a package that the format needs is not installed.
    """
    choice("format", format, FORMATS)
    if not isinstance(dir, (str, os.PathLike)) or not os.fspath(dir):
        raise refused("dir", dir, "the name of a folder")
    for name, value in (("dtype", dtype), ("pre_tokenizer", pre_tokenizer)):
        if value is not None and not isinstance(value, str):
            raise refused(name, value, "a name, or None")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise refused("tokenizer", tokenizer, "a tokenizer of transformers, or None")
    with new_folder(dir) as folder:
        _check(model)
        FORMATS[format](model, folder, tokenizer=tokenizer, dtype=dtype, pre_tokenizer=pre_tokenizer)


def _check(model: PreTrainedModel) -> None:
    """Refuse what no format can hold."""
    if isinstance(model, PeftModel):
        raise ValueError("This model has adapters in it: export what `model.merge_and_unload()` returns.")
    if not isinstance(model, PreTrainedModel):
        raise refused("model", model, "a model of transformers")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("The weights of this model are quantised: merge the adapters into the unquantised base model.")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise ValueError(
            f"A {type(model).__name__} reads more than text, which can't be exported. transformers runs it as it is."
        )
    record = Record.read(model.config.eas) if hasattr(model.config, "eas") else None
    if record is not None and record.propagates:
        raise ValueError(
            "Skipped attentions of this model leave a mean over other tokens (`propagation='mean'`), which other "
            "engines know nothing of. Ways out: `model.freeze_context(dataloader)` on the model with adapters before "
            "it is merged, or training with `propagation='none'`."
        )
    if record is not None and any(kind.shifted for kind in record.attentions):
        raise ValueError(
            "The adapters' biases stay beside this model's weights, as its experts have none, and other engines know "
            "nothing of them. Way out: training with `use_bias=False`."
        )
