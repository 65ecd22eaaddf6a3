"""One-shot scores: how much a model as it stands needs each of its attentions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..batches import evaluating, hooks, inputs_of, kept_tokens, label_count
from ..families import Layers, find_layers


@torch.no_grad()
def score_attentions(
    model: PreTrainedModel, dataloader: Iterable[dict[str, torch.Tensor]], method: str = "similarity"
) -> dict[int, float]:
    """Score the attentions of a transformers model that has no adapters: the lower, the more redundant.

    `sorted(scores, key=scores.get)[:8]` are the eight layers to begin with.

    Args:
        model: A model of a known family; it is left as it was.
        dataloader: Batches `{input_ids, attention_mask, ...}` of the task, a few hundred tokens in all or more; with
            `labels` for `method="loss"`.
        method: `"similarity"`: one minus the cosine similarity of the residual stream before and after the attention,
            averaged over the tokens (as LLM-Drop does, arXiv 2406.15786); one forward a batch. `"loss"`: by how much
            the loss grows with that attention's output set to zero; one forward a batch and attention.

    Returns:
        `{layer index: score}` of every layer with an attention.

    Raises:
        ValueError: for an unknown family or method, no batch at all, batches without labels, or a loss or similarity
            that is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    layers = find_layers(model)
    with evaluating(model):
        scores = METHODS[method](model, layers, dataloader)
    wrong = [index for index, score in scores.items() if not torch.isfinite(torch.tensor(score))]
    if wrong:
        raise ValueError(f"The scores of layers {wrong} are not finite: look for NaN in the model's weights or inputs.")
    return scores


def _by_similarity(model: PreTrainedModel, layers: Layers, dataloader: Iterable[dict]) -> dict[int, float]:
    family = layers.family
    totals, count = dict.fromkeys(layers.names, 0.0), 0
    for batch in dataloader:
        kept = kept_tokens(batch, model.device)
        streams: dict[int, torch.Tensor] = {}

        def remember(module, args, kwargs, index, streams=streams):
            streams[index] = args[0] if args else kwargs["hidden_states"]

        def compare(module, args, output, index, streams=streams, kept=kept):
            before = streams.pop(index).float()
            update = (output[0] if isinstance(output, tuple) else output).float()
            after = update if family.adds_residual else before + update
            totals[index] += (1 - F.cosine_similarity(before, after, dim=-1))[kept].sum().item()

        with hooks() as handles:
            for index, name in layers.names.items():
                layer = model.get_submodule(name)
                # a norm after the attention is part of what it adds to the residual stream
                last = layer.get_submodule((family.attention, *family.output_norms)[-1])
                before = functools.partial(remember, index=index)
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(last.register_forward_hook(functools.partial(compare, index=index)))
            model(**inputs_of({k: v for k, v in batch.items() if k != "labels"}, model.device))
        count += int(kept.sum())
    if not count:
        raise ValueError("The dataloader gave no tokens to score the attentions with.")
    return {index: total / count for index, total in totals.items()}


def _by_loss(model: PreTrainedModel, layers: Layers, dataloader: Iterable[dict]) -> dict[int, float]:
    batches = [inputs_of(batch, model.device) for batch in dataloader]
    if not batches:
        raise ValueError("The dataloader gave no batches to score the attentions with.")
    if any(batch.get("labels") is None for batch in batches):
        raise ValueError("`method='loss'` needs batches with `labels`; `method='similarity'` does without.")
    weights = [label_count(batch) for batch in batches]

    def loss() -> float:
        total = sum(w * model(**batch).loss.item() for w, batch in zip(weights, batches, strict=True))
        return total / sum(weights)

    whole, scores = loss(), {}
    nothing = functools.partial(_nothing, layers.family.adds_residual)
    for index in layers.names:
        with hooks() as handles:
            handles.append(model.get_submodule(layers.attention(index)).register_forward_hook(nothing))
            scores[index] = loss() - whole
    return scores


METHODS: dict[str, Callable[..., dict[int, float]]] = {"similarity": _by_similarity, "loss": _by_loss}


def _nothing(adds_residual: bool, module: nn.Module, args: tuple, output: tuple | torch.Tensor) -> tuple | torch.Tensor:
    whole = output if isinstance(output, tuple) else (output,)
    first = args[1] if adds_residual else torch.zeros_like(whole[0])
    return (first, *whole[1:]) if isinstance(output, tuple) else first
