"""ONNX models: what `torch.onnx.export` makes of one forward of a merged model, without a KV cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "model.onnx"
TORCH = "2.13"
"""The first version that is known to do this; 2.6 can't."""


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write_onnx(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | None,
    pre_tokenizer: str | None,
) -> None:
    """Write `model.onnx`, from `input_ids` and `attention_mask (B, T)` to `logits`, and the tokenizer into `folder`.

    Raises:
        ValueError: for options that other formats have, and if torch is too old.
        ImportError: if the package `onnxscript` is not installed.
    """
    if dtype is not None or pre_tokenizer is not None:
        raise ValueError("The format 'onnx' takes the model as it is: give neither `dtype` nor `pre_tokenizer`.")
    if Version(torch.__version__) < Version(TORCH):
        raise ValueError(f"The format 'onnx' needs torch {TORCH} or later, but this is {torch.__version__}.")
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("The format 'onnx' needs the package `onnxscript`: pip install 'peft_eas[export]'.")
    inputs = {name: torch.ones(2, 3, dtype=torch.long, device=model.device) for name in ("input_ids", "attention_mask")}
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    training = model.training
    try:
        program = torch.onnx.export(
            _Logits(model).eval(), kwargs=inputs, dynamo=True, verbose=False, input_names=list(inputs),
            output_names=["logits"], dynamic_shapes=dict.fromkeys(inputs, sizes),
        )  # fmt: skip
    finally:
        model.train(training)
    assert program is not None  # with `dynamo=True` there is one
    program.save(folder / FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
