"""One-shot scores: how much a model as it stands needs each of its attentions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..batches import evaluating, hooks, inputs_of, kept_tokens, label_count
from ..families import Layers, find_layers
from ..modeling_eas import Bypass


@torch.no_grad()
def score_attentions(
    model: PreTrainedModel, dataloader: Iterable[dict[str, torch.Tensor]], method: str = "similarity"
) -> dict[int | str, float]:
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
        `{attention: score}` of every attention, by index of its layer, or by name where that is not enough.

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


def _by_similarity(model: PreTrainedModel, layers: Layers, dataloader: Iterable[dict]) -> dict[int | str, float]:
    totals, counts = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    for batch in dataloader:
        kept = kept_tokens(batch, model.device) if {"input_ids", "inputs_embeds"} & batch.keys() else None
        streams: dict[int | str, torch.Tensor] = {}

        def remember(module, args, kwargs, key, streams=streams):
            streams[key] = args[0] if args else kwargs["hidden_states"]

        def compare(module, args, output, key, streams=streams, kept=kept):
            row, before = layers[key].row, streams.pop(key)
            update = output[0] if isinstance(output, tuple) else output
            if row.residual_norm:
                before, after = module.get_submodule(row.residual_norm)(before), update
            else:
                after = update if row.adds_residual or row.core else before + update
            change = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
            if row.pools != "nothing" and not row.context and kept is not None and kept.shape == change.shape:
                change = change[kept]
            totals[key] += change.sum().item()
            counts[key] += change.numel()

        with hooks() as handles:
            for key, arm in layers.items():
                layer, row = model.get_submodule(arm.layer), arm.row
                attention = layer.get_submodule(row.attention)
                # where the residual stream is read: by the attention's own norm, by the layer, or by the attention
                norms = [name for name in row.attention_norms if name in dict(layer.named_modules())]
                reader = layer.get_submodule(norms[0]) if norms else attention if row.context else layer
                # a norm after the attention is part of what it adds
                last = layer.get_submodule(row.output_norms[-1]) if row.output_norms else attention
                handles.append(reader.register_forward_pre_hook(functools.partial(remember, key=key), with_kwargs=True))
                handles.append(last.register_forward_hook(functools.partial(compare, key=key)))
            model(**inputs_of({k: v for k, v in batch.items() if k != "labels"}, model.device))
    if not any(counts.values()):
        raise ValueError("The dataloader gave no tokens to score the attentions with.")
    return {key: total / max(1, counts[key]) for key, total in totals.items()}


def _by_loss(model: PreTrainedModel, layers: Layers, dataloader: Iterable[dict]) -> dict[int | str, float]:
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
    for key, arm in layers.items():
        attention = model.get_submodule(arm.attention)
        bypass = Bypass(arm.row.form(), arm.index, getattr(attention, "base_layer", attention))
        with hooks() as handles:
            handles.append(attention.register_forward_hook(functools.partial(_nothing, bypass), with_kwargs=True))
            scores[key] = loss() - whole
    return scores


METHODS: dict[str, Callable[..., dict[int | str, float]]] = {"similarity": _by_similarity, "loss": _by_loss}


def _nothing(bypass: Bypass, attention: nn.Module, args: tuple, kwargs: dict, output: Any) -> torch.Tensor | tuple:
    nothing = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return bypass.returned(bypass.stream(args, kwargs, attention, nothing), args, kwargs)
