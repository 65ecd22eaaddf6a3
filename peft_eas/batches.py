"""What forwards outside of a training need: batches as their arguments, and models in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checks import shown
from .families import Attentions


def batches_of(dataloader: Any) -> Iterator[Mapping[str, Any]]:
    """The batches of a dataloader.

    Raises:
        ValueError: if it isn't one.
    """
    try:
        batches = iter(dataloader)
    except TypeError:
        raise ValueError(f"The dataloader must give batches one by one, got {shown(dataloader)}.") from None
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                "Each batch must be a dict of what the model takes, such as `input_ids` and `attention_mask`, got "
                f"{shown(batch)}."
            )
        yield batch


@contextmanager
def explaining() -> Iterator[None]:
    """Whatever a model raises inside of the `with` for a batch that it can't take becomes an error that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model can't take such a batch ({type(error).__name__}: {error}): give batches as its Trainer's "
            "collator makes them."
        ) from error


def inputs_of(batch: dict, device: torch.device) -> dict:
    """A batch as the arguments of a forward that keeps no cache."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return moved | {"use_cache": False}


def arguments_of(batch: dict, model: PreTrainedModel) -> dict:
    """A batch as the arguments of a forward of `model`; some that don't generate know of no caches (CLAP)."""
    inputs = inputs_of(batch, model.device)
    if not model.can_generate():
        del inputs["use_cache"]
    return inputs


def label_count(batch: Mapping[str, Any]) -> int:
    """How many labels a batch has, which is what its mean loss counts for; 1 if they are called something else."""
    labels = batch.get("labels")
    return int((labels != -100).sum()) if isinstance(labels, torch.Tensor) else 1


def kept_tokens(batch: dict, device: torch.device) -> torch.Tensor:
    """Which tokens are no padding, `(B, T)`."""
    mask = batch.get("attention_mask")
    given = batch["inputs_embeds"] if batch.get("input_ids") is None else batch["input_ids"]
    return torch.ones(given.shape[:2], dtype=torch.bool, device=device) if mask is None else mask.bool().to(device)


def counted_tokens(batch: dict, row: Attentions, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Which tokens of a stream of `shape (B, T)` say something of an attention of this kind, `(B, T)`.

    Those that are no padding; of a causal attention, without the first of a sequence, which looks at itself alone.
    """
    masks = [batch.get("attention_mask")]
    if row.stack == "decoder" and (row.answers or not row.causal):  # its tokens are the labels
        labels = batch.get("labels")
        masks = [batch.get("decoder_attention_mask"), None if labels is None else labels != -100]
    fitting = [m for m in masks if isinstance(m, torch.Tensor) and m.shape == shape]
    kept = fitting[0].bool().to(device) if fitting else torch.ones(shape, dtype=torch.bool, device=device)
    if row.context or not row.causal:
        return kept
    positions = batch.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.shape == shape:
        return kept & (positions.to(device) > 0)
    return kept & (kept.cumsum(dim=1) > 1)


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
def arguments_seen(*modules: nn.Module) -> Iterator[dict]:
    """A dict that has, inside of the `with`, the named arguments of the latest forward of one of these modules."""
    seen: dict = {}

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.clear()
        seen.update(kwargs)

    with hooks() as handles:
        for module in modules:
            handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
        yield seen
        seen.clear()


@contextmanager
def hooks() -> Iterator[list]:
    """A list for the handles of hooks, which are removed when the `with` ends."""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
