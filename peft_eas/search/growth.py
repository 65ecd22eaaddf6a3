"""The set that a search starts from: grown by one attention at a time, with all stand-ins in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..batches import arguments_seen, hooks, kept_tokens

LARGEST = 2**26
"""How many numbers of what the whole model gives are kept, at most: 256 MB."""


def grow(cost_of: Callable[[list[int]], float], number: int, count: int) -> list[float]:
    """Let attentions join a set one by one, each time the one with which the set costs least.

    What an attention adds to the cost is rarely less in a larger set. So what it added when it was last tried is taken
    for the least that it may add now, and only the cheapest is tried again, until it stays the cheapest (the lazy
    greedy algorithm: M. Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978). About one
    and a half times as many costs are asked for as there are attentions, instead of `number * count`.

    Args:
        cost_of: What a set of attentions costs.
        number: How many attentions there are, `0` to `number - 1`.
        count: How many are to join.

    Returns:
        A score of each attention: what the set costs once it has joined; of those that have not joined, what the set
        would cost with it, by what it added when it was last tried. The `n` lowest scores are the set of `n`.
    """
    added = [cost_of([i]) for i in range(number)]
    scores = list(added)
    joined: list[int] = []
    total = 0.0
    while len(joined) < count:
        tried = set() if joined else set(range(number))
        others = [i for i in range(number) if i not in joined]
        # of equal ones the later: the paper's sets are deep
        while (best := min(others, key=lambda i: (added[i], -i))) not in tried:
            more = cost_of([*joined, best]) - total
            added[best] = math.inf if math.isnan(more) else more  # of a set that costs infinitely much already
            tried.add(best)
        joined.append(best)
        total += added[best]
        scores[best] = max(total, scores[joined[-2]]) if joined[1:] else total  # noise may make a set cheaper
    for i in set(range(number)) - set(joined):
        scores[i] = (scores[joined[-1]] if joined else 0.0) + max(0.0, added[i])
    return scores


def predicts_words(model: PreTrainedModel) -> bool:
    """Whether it has a language model's head, which was trained before; that of a classifier is mostly new."""
    return model.can_generate() or model.get_output_embeddings() is not None


class Divergence:
    """By how much a language model predicts something else than it did at first, on the same batches; in nats a token.

    One that has begun to learn its task may predict better without an attention than with it. So what its loss grows
    by counts, too, as much as the divergence: together, twice by how much the cross-entropy grows with targets that are
    half what it predicted at first and half the labels.

    Args:
        model: A transformers model.
        batches: Batches.
        forward: What is done with each; it may run several forwards of `model`. It returns the loss of the batch, and
            what that counts for in a mean: 0 if the model has yet to learn.
        caller: What calls `model.forward`, if that goes around the model's hooks.

    Raises:
        ValueError: if the model gives no `logits (B, T, words)`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        forward: Callable[[Any], tuple[float, float]],
        caller: nn.Module | None = None,
    ) -> None:
        self.batches, self.forward = list(batches), forward
        self.called = list(dict.fromkeys([model, caller or model]))
        self.step = 1
        found, self.losses = zip(*map(self._predicted, self.batches), strict=True)
        numbers = sum(given.numel() for of_batch in found for given in of_batch)
        if not numbers:
            raise ValueError(f"A {type(model).__name__} gives no `logits` to compare here: score by `deviation`.")
        self.step = -(-numbers // LARGEST)  # of more, every so many tokens
        self.first = [[given[:: self.step] for given in of_batch] for of_batch in found]

    def __call__(self) -> list[tuple[float, float]]:
        """What is to be added up of the model as it is now: sums, and what each is to be divided by, for means over
        processes."""
        diverged = tokens = grown = weights = 0.0
        for batch, before, (loss_before, _) in zip(self.batches, self.first, self.losses, strict=True):
            given, (loss, weight) = self._predicted(batch)
            for old, new in zip(before, given, strict=True):
                diverged += F.kl_div(new, old, reduction="sum", log_target=True).item()
                tokens += len(old)
            grown += weight * (loss - loss_before)
            weights += weight
        return [(diverged, tokens), (grown, weights)]

    def _predicted(self, batch: Any) -> tuple[list[torch.Tensor], tuple[float, float]]:
        """For each forward of the model log-probabilities `(tokens, words)`, without padding; and the weighted loss."""
        given: list[torch.Tensor] = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            logits = getattr(output, "logits", None)
            if isinstance(logits, torch.Tensor) and logits.dim() == 3:
                given.append(self._kept(logits, arguments).float().log_softmax(-1))

        with arguments_seen(*self.called) as arguments, hooks() as handles:
            for watched in self.called:
                handles.append(watched.register_forward_hook(see))
            loss = self.forward(batch)
        return given, loss

    def _kept(self, logits: torch.Tensor, arguments: dict) -> torch.Tensor:
        if {"input_ids", "inputs_embeds"} & {key for key, value in arguments.items() if value is not None}:
            kept = kept_tokens(arguments, logits.device)
            if kept.shape == logits.shape[:2]:
                return logits[kept][:: self.step]
        return logits.flatten(0, 1)[:: self.step]
