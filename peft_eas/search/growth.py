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


class Change:
    """By how much a model gives something else than it gave at first, on the same batches.

    A language model: by the divergence of its predictions, in nats a token. Of another one the head is mostly new, so
    what counts is what a head reads, the body's last hidden state: the mean square of its change, relative to its own.
    Where a model with a head has no body of its own that gives one, its `logits` say it, likewise.

    Args:
        model: A transformers model.
        batches: Batches.
        forward: What is done with each; it may run several forwards of `model`.
        caller: What calls `model.forward`, if that goes around the model's hooks.

    Raises:
        ValueError: if the model gives neither.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        forward: Callable[[Any], Any],
        caller: nn.Module | None = None,
    ) -> None:
        self.model, self.batches, self.forward = model, list(batches), forward
        self.called = list(dict.fromkeys([model, caller or model]))
        self.step = 1
        self.is_predicted = model.can_generate() or model.get_output_embeddings() is not None
        self.is_answered = False
        found = [self._given(batch) for batch in self.batches]
        if self.is_predicted and not any(found):  # a loss that makes no logits
            self.is_predicted = False
            found = [self._given(batch) for batch in self.batches]
        if not any(found):  # a head that is part of its body
            self.is_answered = True
            found = [self._given(batch) for batch in self.batches]
        numbers = sum(given.numel() for of_batch in found for given in of_batch)
        if not numbers:
            raise ValueError(f"A {type(model).__name__} gives neither `logits` nor hidden states to compare.")
        self.step = -(-numbers // LARGEST)  # of more, every so many tokens
        self.first = [[given[:: self.step] for given in of_batch] for of_batch in found]

    def __call__(self) -> tuple[float, float]:
        """The change of what the model gives now, and what it is to be divided by: sums, for means over processes."""
        change = size = 0.0
        for batch, before in zip(self.batches, self.first, strict=True):
            for old, new in zip(before, self._given(batch), strict=True):
                if self.is_predicted:
                    change += F.kl_div(new, old, reduction="sum", log_target=True).item()
                    size += len(old)
                else:
                    change += (new - old).double().square().sum().item()
                    size += old.double().square().sum().item()
        return change, size

    def _given(self, batch: Any) -> list[torch.Tensor]:
        """For each forward of the model, `(tokens, size)`: log-probabilities or hidden states, without padding; or
        `(rows, labels)`."""
        given: list[torch.Tensor] = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            if self.is_predicted or self.is_answered:
                values = getattr(output, "logits", None)
            else:
                values = output if isinstance(output, torch.Tensor) else output[0]
            if self.is_answered and isinstance(values, torch.Tensor):
                given.append(values[:: self.step].flatten(1).float())
            elif isinstance(values, torch.Tensor) and values.dim() == 3:
                kept = self._kept(values, arguments).float()
                given.append(kept.log_softmax(-1) if self.is_predicted else kept)

        body: Any = self.model.base_model
        with arguments_seen(*self.called) as arguments, hooks() as handles:
            is_whole = self.is_predicted or self.is_answered or body is self.model
            for watched in self.called if is_whole else [body]:
                handles.append(watched.register_forward_hook(see))
            self.forward(batch)
        return given

    def _kept(self, values: torch.Tensor, arguments: dict) -> torch.Tensor:
        if {"input_ids", "inputs_embeds"} & {key for key, value in arguments.items() if value is not None}:
            kept = kept_tokens(arguments, values.device)
            if kept.shape == values.shape[:2]:
                return values[kept][:: self.step]
        return values.flatten(0, 1)[:: self.step]
