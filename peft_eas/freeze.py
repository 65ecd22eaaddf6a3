"""Freezing the context: a model whose skipped attentions look at tokens becomes one with plain weights.

The mean of what they add (2) over the tokens of some batches becomes their constant: `k <- k + F E E[z] + D E[p]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .batches import arguments_of, counted_tokens, evaluating, hooks, kept_tokens, label_count
from .layer import EASAttention
from .runtime.eas_attention import StandIn
from .runtime.eas_record import StandInShape

Constants = dict[EASAttention, torch.Tensor]
"""The constant `(d,)` of each attention that is to look at no tokens any more."""


@dataclass(frozen=True)
class FrozenContext:
    """By how much freezing the context moved a model, over the batches that it was frozen with.

    Attributes:
        tokens: Number of tokens.
        loss_before: Loss a label, `None` without labels.
        loss_after: Likewise, with the context frozen.
        logits_moved: Root mean square of the logits' change, relative to that of the logits.
        same_choice: Share of the tokens for which the largest logit is still the same.
    """

    tokens: int
    loss_before: float | None
    loss_after: float | None
    logits_moved: float
    same_choice: float

    def __str__(self) -> str:
        loss = ""
        if self.loss_before is not None and self.loss_after is not None:
            increase = self.loss_after - self.loss_before
            loss = f"loss {self.loss_before:.4f} -> {self.loss_after:.4f} ({increase:+.4f}), "
        return (
            f"EAS: context frozen to the mean of {self.tokens} tokens: {loss}logits moved by "
            f"{100 * self.logits_moved:.2f} % (RMS), the same choice for {100 * self.same_choice:.1f} % of the tokens"
        )


@torch.no_grad()
def freeze(
    model: PreTrainedModel, attentions: Sequence[EASAttention], adapter_name: str, dataloader: Iterable[dict]
) -> FrozenContext:
    """Let the skipped ones of `attentions` add the mean of what they would say, and say what that changed.

    Raises:
        ValueError: if there are no tokens; nothing is changed then.
    """
    skipped = [attention for attention in attentions if attention.skips(adapter_name)]
    with evaluating(model):
        constants = _mean_constants(model, skipped, adapter_name, dataloader)
        moved = _compare(model, constants, adapter_name, dataloader)
    for attention in attentions:
        if adapter_name in attention.eas_stand_in:
            before = attention.stand_in(adapter_name)
            attention.eas_stand_in[adapter_name] = _constant(before, attention.stream_size, constants.get(attention))
    return moved


def _constant(before: StandIn, size: int, value: torch.Tensor | None) -> StandIn:
    """A stand-in that is this constant, or the one of `before`, and nothing else."""
    like = next(before.parameters())
    stand_in = StandIn(StandInShape(width=size, constant=True), device=like.device, dtype=like.dtype)
    value = before.constant if value is None else value
    if value is not None and stand_in.constant is not None:
        stand_in.constant.copy_(value)
    return stand_in.requires_grad_(like.requires_grad).train(before.training)


def _mean_constants(
    model: PreTrainedModel, skipped: Sequence[EASAttention], adapter_name: str, dataloader: Iterable[dict]
) -> Constants:
    sums: Constants = {}
    counts = dict.fromkeys(skipped, 0)
    for batch in dataloader:
        inputs = arguments_of(batch, model)

        def see(attention: EASAttention, added: torch.Tensor, inputs: dict = inputs) -> torch.Tensor:
            kept = added[counted_tokens(inputs, attention.place.row, added.shape[:-1], added.device)]
            sums[attention] = sums.get(attention, 0) + kept.double().sum(dim=0)
            counts[attention] += len(kept)
            return added

        with _adding(skipped, adapter_name, see):
            model(**inputs)
    if not all(counts.values()):
        raise ValueError("The dataloader gave no tokens to freeze the context with.")
    return {attention: sums[attention] / counts[attention] for attention in skipped}


@contextmanager
def _adding(
    skipped: Iterable[EASAttention],
    adapter_name: str,
    instead: Callable[[EASAttention, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """What each attention adds to the stream, `(B, T, d)`, is `instead(attention, added)` inside of the `with`."""
    with hooks() as handles:
        for attention in skipped:

            def hook(module: nn.Module, args: tuple, added: torch.Tensor, a: EASAttention = attention) -> torch.Tensor:
                return instead(a, added.expand(*args[0].shape[:-1], -1))

            handles.append(attention.stand_in(adapter_name).register_forward_hook(hook))
        yield


def _compare(
    model: PreTrainedModel, constants: Constants, adapter_name: str, dataloader: Iterable[dict]
) -> FrozenContext:
    losses, labels = torch.zeros(2, dtype=torch.float64), 0
    change, size, same, count = 0.0, 0.0, 0, 0
    for batch in dataloader:
        inputs = arguments_of(batch, model)
        before = model(**inputs)
        with _adding(constants, adapter_name, lambda attention, added: constants[attention].to(added).expand_as(added)):
            after = model(**inputs)
        pair = [output.logits for output in (before, after)]
        if {"input_ids", "inputs_embeds"} & batch.keys():
            kept = kept_tokens(batch, model.device)
            pair = [logits[kept] if logits.shape[:2] == kept.shape else logits for logits in pair]
        change += (pair[1] - pair[0]).double().square().sum().item()
        size += pair[0].double().square().sum().item()
        same += int((pair[1].argmax(-1) == pair[0].argmax(-1)).sum())
        count += pair[0][..., 0].numel()
        if batch.get("labels") is not None:
            weight = label_count(batch)
            losses += weight * torch.tensor([before.loss.item(), after.loss.item()], dtype=torch.float64)
            labels += weight
    loss_before, loss_after = (losses / labels).tolist() if labels else (None, None)
    return FrozenContext(count, loss_before, loss_after, (change / size) ** 0.5, same / count)
