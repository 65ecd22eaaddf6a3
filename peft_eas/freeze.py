"""Freezing the context: a model that looks at each prompt becomes one with plain weights.

What a layer takes from the prompt (the information `p` of equation (3), and with `router="prompt"` the weights `alpha`)
is replaced by its mean over given prompts: `p` goes into the bias `c`, `alpha` into a static router.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from .batches import evaluating, inputs_of, kept_tokens, label_count
from .modeling_eas import PromptSlot, prompt_mask

States = dict[int, dict[str, torch.Tensor]]
"""What the layers keep of the prompt, `{layer: {name: (n,)}}`."""


@dataclass(frozen=True)
class FrozenContext:
    """By how much freezing the context moved a model, over the rows that it was frozen with.

    Attributes:
        rows: Number of prompts.
        loss_before: Loss a label, `None` without labels.
        loss_after: Likewise, with the context frozen.
        logits_moved: Root mean square of the logits' change, relative to that of the logits.
        same_choice: Share of the tokens for which the largest logit is still the same.
    """

    rows: int
    loss_before: float | None
    loss_after: float | None
    logits_moved: float
    same_choice: float

    def __str__(self) -> str:
        loss = ""
        if self.loss_before is not None:
            increase = self.loss_after - self.loss_before
            loss = f"loss {self.loss_before:.4f} -> {self.loss_after:.4f} ({increase:+.4f}), "
        return (
            f"EAS: context frozen to the mean of {self.rows} prompts: {loss}logits moved by "
            f"{100 * self.logits_moved:.2f} % (RMS), the same choice for {100 * self.same_choice:.1f} % of the tokens"
        )


def mean_states(model: PreTrainedModel, layers: Iterable[int], dataloader: Iterable[dict]) -> tuple[States, int]:
    """Means over all rows of what `layers` keep of their prompts, and the number of rows.

    Raises:
        ValueError: if there are no rows.
    """
    sums: States = {index: {} for index in layers}
    rows = 0
    for batch in dataloader:
        cache = DynamicCache(config=model.config)
        model(**inputs_of(batch, model.device) | {"use_cache": True, "past_key_values": cache})
        for index, state in sums.items():
            for name, value in cache.layers[index].prompt_state.items():
                state[name] = state.get(name, 0) + value.double().sum(dim=(0, 1))
        rows += len(value)
    if not rows:
        raise ValueError("The dataloader gave no rows to freeze the context with.")
    return {index: {name: value / rows for name, value in state.items()} for index, state in sums.items()}, rows


def compare(
    model: PreTrainedModel, states: States, skip_layers: Iterable[int], dataloader: Iterable[dict], rows: int
) -> FrozenContext:
    """Run `model` as it is and with `states` in place of what it would take from each prompt."""
    losses, labels = torch.zeros(2, dtype=torch.float64), 0
    change, size, same, count = 0.0, 0.0, 0, 0
    for batch in dataloader:
        inputs = inputs_of(batch, model.device)
        kept = kept_tokens(batch, model.device)
        before = model(**inputs)
        frozen = inputs | {"use_cache": True, "past_key_values": _cache_with(model, states, skip_layers, len(kept))}
        with prompt_mask(torch.zeros_like(kept)):  # the cache has it all
            after = model(**frozen)
        pair = [output.logits[kept] if output.logits.shape[:2] == kept.shape else output.logits
                for output in (before, after)]  # fmt: skip
        change += (pair[1] - pair[0]).double().square().sum().item()
        size += pair[0].double().square().sum().item()
        same += int((pair[1].argmax(-1) == pair[0].argmax(-1)).sum())
        count += pair[0].shape[0]
        if batch.get("labels") is not None:
            weight = label_count(batch)
            losses += weight * torch.tensor([before.loss.item(), after.loss.item()], dtype=torch.float64)
            labels += weight
    loss_before, loss_after = (losses / labels).tolist() if labels else (None, None)
    return FrozenContext(rows, loss_before, loss_after, (change / size) ** 0.5, same / count)


def _cache_with(model: PreTrainedModel, states: States, skip_layers: Iterable[int], rows: int) -> DynamicCache:
    """An empty cache whose layers have read these prompts already."""
    cache = DynamicCache(config=model.config)
    for index, state in states.items():
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        if index in skip_layers:
            cache.layers[index] = PromptSlot()
        dtype = next(model.parameters()).dtype
        cache.layers[index].prompt_state = {
            name: value.to(dtype).expand(rows, 1, -1).contiguous() for name, value in state.items()
        }
    return cache


def freeze(model: PreTrainedModel, layers: Iterable[int], skip_layers: Iterable[int], dataloader: Iterable[dict]):
    """The mean states of `layers`, and what putting them in place of each prompt's own would change."""
    with torch.no_grad(), evaluating(model):
        states, rows = mean_states(model, layers, dataloader)
        return states, compare(model, states, skip_layers, dataloader, rows)
