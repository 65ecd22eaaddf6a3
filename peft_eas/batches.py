"""What forwards outside of a training need: batches as their arguments, and models in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def inputs_of(batch: dict, device: torch.device) -> dict:
    """A batch as the arguments of a forward that keeps no cache."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return moved | {"use_cache": False}


def label_count(batch: dict) -> int:
    """How many labels a batch has, which is what its mean loss counts for; 1 if they are called something else."""
    labels = batch.get("labels")
    return int((labels != -100).sum()) if isinstance(labels, torch.Tensor) else 1


def kept_tokens(batch: dict, device: torch.device) -> torch.Tensor:
    """Which tokens are no padding, `(B, T)`."""
    mask = batch.get("attention_mask")
    given = batch["inputs_embeds"] if batch.get("input_ids") is None else batch["input_ids"]
    return torch.ones(given.shape[:2], dtype=torch.bool, device=device) if mask is None else mask.bool().to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode inside of the `with`; then each module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def hooks() -> Iterator[list]:
    """A list for the handles of hooks, which are removed when the `with` ends."""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
