"""One-shot scores: how much a model as it stands needs each of its attentions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..batches import (
    arguments_of,
    arguments_seen,
    batches_of,
    counted_tokens,
    evaluating,
    explaining,
    kept_tokens,
    label_count,
)
from ..checks import choice, integer
from ..config import EASConfig
from ..families import Layers, Place, find_layers
from ..gates import SkipGates
from ..merge import check_in_memory
from ..model import EASModel
from ..processes import gather_object
from ..runtime.eas_attention import StandIn
from ..stand_in import MEASURING, fill_stand_ins, moments, replaced, watching
from ..targets import stream_size
from .growth import Divergence, grow, predicts_words
from .held_out import ENOUGH_TO_GROW, means_over_processes, token_count

TRYING = "Trying attentions"  # as bars of progress say

RANK = 32
"""Of the stand-ins that sets are grown with, as by default."""


@torch.no_grad()
def score_attentions(
    model: PreTrainedModel,
    dataloader: Iterable[dict[str, torch.Tensor]],
    method: str | None = None,
    num_skip: int | None = None,
) -> dict[int | str, float]:
    """Score the attentions of a transformers model that has no adapters: the lower, the more redundant.

    `sorted(scores, key=scores.get)[:8]` are the eight layers to begin with.

    Args:
        model: A model of a known family; it is left as it was.
        dataloader: Batches `{input_ids, attention_mask, ...}` of the task, a few hundred tokens in all or more; with
            `labels` for `method="loss"`. For `"kl"` and `"loss"`, which run the model on all of them for each
            attention, a thousand tokens are plenty.
        method: By default `"growth"` for language models, `"deviation"` for others, whose heads are mostly new.
            `"growth"`: a set is grown with all stand-ins, linear ones, in place, each time by the attention with which
            predictions move least, and the score is how far the set has moved them when the attention has joined: the
            divergence from the whole model's, in nats a token. About one and a half forwards for each attention, of
            the first batches that have 2,048 tokens together; stand-ins are measured on all.
            The others take each attention by itself, with the mean of what it adds in its place. `"deviation"`: how far
            what it adds is from that mean, relative to the residual stream (root mean squares), one forward for all.
            `"kl"`, the divergence from the whole model's predictions, and `"loss"`, the growth of the loss, take a
            forward for each attention. `"similarity"`: one minus the cosine similarity of the stream before and after
            the attention (as LLM-Drop does, arXiv 2406.15786), one forward for all.
        num_skip: How many are to be skipped: a set is grown no further. By default half of those that can be.

    Returns:
        `{attention: score}`, by index of the layer, or by name where that is not enough; by `"growth"` of those that
        can be skipped, by the others of all.

    Raises:
        ValueError: for an unknown family or method, no batch at all, batches that the model does not take or without
            labels, a model without logits where there have to be some, or scores that are not finite.
    """
    method = choice("method", method, METHODS) if method is not None else default_method(model)
    if num_skip is not None:
        num_skip = integer("num_skip", num_skip, 0)
    layers, batches = find_layers(model), list(batches_of(dataloader))
    if not batches:
        raise ValueError("The dataloader gave no batches to score the attentions with.")
    with evaluating(model), explaining():
        settings = {"count": num_skip} if method == "growth" else {}
        scores = METHODS[method](model, layers, batches, **settings)
    wrong = [index for index, score in scores.items() if not torch.isfinite(torch.tensor(score))]
    if wrong:
        raise ValueError(f"The scores of layers {wrong} are not finite: look for NaN in the model's weights or inputs.")
    return scores


def default_method(model: PreTrainedModel) -> str:
    """What sets of this model are best chosen by, see `score_attentions`."""
    return "growth" if predicts_words(model) else "deviation"


def _by_similarity(model: PreTrainedModel, layers: Layers, batches: Sequence[dict]) -> dict[int | str, float]:
    totals, counts = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    for batch in batches:
        kept = kept_tokens(batch, model.device) if {"input_ids", "inputs_embeds"} & batch.keys() else None

        def see(
            key: int | str, place: Place, before: torch.Tensor, added: torch.Tensor, read: torch.Tensor, kept=kept
        ) -> None:
            row, after = place.row, before + added
            if row.residual_norm:
                norm = model.get_submodule(f"{place.attention}.{row.residual_norm}")
                before, after = norm.forward(before), norm.forward(after)  # without the hooks
            change = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
            if not row.answers and not row.context and kept is not None and kept.shape == change.shape:
                change = change[kept]
            totals[key] += change.sum().item()
            counts[key] += change.numel()

        with watching(model, layers, see):
            model(**arguments_of({k: v for k, v in batch.items() if k != "labels"}, model))
    return {key: total / max(1, counts[key]) for key, total in totals.items()}


def _by_deviation(model: PreTrainedModel, layers: Layers, batches: Sequence[dict]) -> dict[int | str, float]:
    return deviations(model, layers, batches, lambda batch: model(**arguments_of(batch, model)), model)


def deviations(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    caller: nn.Module,
    stand_ins: Mapping[int | str, StandIn] | None = None,
) -> dict[int | str, float]:
    """Scores by `"deviation"` in what `forward` computes of each batch, over all processes; see `moments`.

    Where there are stand-ins, what they add is taken off what the attentions add: what is left counts.
    """
    stand_ins = stand_ins or {}
    sums = dict.fromkeys(layers, torch.zeros(()))
    squares, streams, counts = (dict.fromkeys(layers, 0.0) for _ in range(3))

    def see(key: int | str, place: Place, before: torch.Tensor, added: torch.Tensor, read: torch.Tensor) -> None:
        kept = counted_tokens(seen, place.row, added.shape[:-1], added.device)
        if key in stand_ins:  # without propagation, which starts at nothing
            added = added - stand_ins[key](read, lambda down: down.new_zeros(len(down)))
        adds, stream = added[kept].double(), before.expand_as(added)[kept].double()
        sums[key] = sums[key] + adds.sum(dim=0).cpu()
        squares[key] += adds.square().sum().item()
        streams[key] += stream.square().sum().item()
        counts[key] += len(adds)

    with arguments_seen(*dict.fromkeys([model, caller])) as seen, watching(model, layers, see):
        for batch in batches:
            forward(batch)
    scores, gathered = {}, gather_object([(sums, squares, streams, counts)])
    for key in layers:
        total, square, stream, count = (sum(of[key] for of in kinds) for kinds in zip(*gathered, strict=True))
        about_mean = square - (total / max(1, count) * total).sum().item()
        scores[key] = (max(0.0, about_mean) / max(stream, 1e-30)) ** 0.5
    return scores


def _by_growth(
    model: PreTrainedModel, layers: Layers, batches: Sequence[dict], count: int | None = None
) -> dict[int | str, float]:
    check_in_memory(model)
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    if getattr(model.config, "is_encoder_decoder", False):  # its tokens may be made of the labels
        inputs = list(batches)

    def forward(batch: dict) -> tuple[float, float]:
        model(**arguments_of(batch, model))
        return 0.0, 0.0

    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    width = min(stream_size(model, place) for place in layers.values() if place.is_skippable)
    tuner = EASModel(model, EASConfig(r=1, r_pia=min(RANK, width)), "scores")
    try:
        with evaluating(tuner):
            fill_stand_ins(tuner, "scores", tqdm(inputs, desc=MEASURING, unit="batch"), forward)
            gates, divergence = tuner.skip_gates("scores"), Divergence(model, _enough_to_grow(inputs), forward)
            number = len(gates.layers)
            count = number // 2 if count is None else min(count, number)
            cost_by = cost_by_gates(gates, divergence)
            with tqdm(desc="Trying sets", unit="set") as progress:

                def cost_of(numbers: list[int]) -> float:
                    progress.update()
                    return cost_by(numbers)

                scores = grow(cost_of, number, count)
    finally:
        tuner.unload()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
    return dict(zip(gates.layers, scores, strict=True))


def _enough_to_grow(batches: Sequence[dict]) -> Sequence[dict]:
    """The first of them that have so many tokens together; all if there are fewer, or no tokens."""
    totals = itertools.accumulate(map(token_count, batches))
    return batches[: next((n for n, total in enumerate(totals, 1) if total >= ENOUGH_TO_GROW), len(batches))]


def cost_by_gates(gates: SkipGates, divergence: Divergence) -> Callable[[list[int]], float]:
    """What a set costs, by number of its attentions: how far it moves predictions, over all processes."""

    def cost_of(numbers: list[int]) -> float:
        with gates.skipping([gates.layers[i] for i in numbers]):
            cost = sum(means_over_processes(divergence()))
        return cost if math.isfinite(cost) else math.inf

    return cost_of


def _means(model: PreTrainedModel, layers: Layers, batches: Sequence[dict]) -> dict[int | str, torch.Tensor]:
    return {key: of.mean for key, of in moments(model, layers, batches, is_linear=False).items()}


def _by_kl(model: PreTrainedModel, layers: Layers, batches: Sequence[dict]) -> dict[int | str, float]:
    inputs = [arguments_of({k: v for k, v in batch.items() if k != "labels"}, model) for batch in batches]
    if any(batch.get("decoder_input_ids") is None and "labels" in batch for batch in batches) and getattr(
        model.config, "is_encoder_decoder", False
    ):
        inputs = [arguments_of(batch, model) for batch in batches]  # its tokens are made of the labels

    def predictions(batch: dict) -> torch.Tensor:
        """`(tokens, classes)`, of the tokens that are no padding."""
        logits = getattr(model(**batch), "logits", None)
        if logits is None:
            raise ValueError(
                f"`method='kl'` compares predictions, and a {type(model).__name__} makes none (it gives no `logits`): "
                "use `method='deviation'` or `'loss'`."
            )
        kept = kept_tokens(batch, logits.device) if {"input_ids", "inputs_embeds"} & batch.keys() else None
        kept = logits[kept] if kept is not None and logits.shape[:2] == kept.shape else logits.flatten(0, -2)
        return F.log_softmax(kept.float(), dim=-1)

    means = _means(model, layers, batches)
    moved, tokens = dict.fromkeys(layers, 0.0), 0
    # one batch at a time: the predictions are as many numbers as there are words for each token
    for batch in tqdm(inputs, desc=TRYING, unit="batch"):
        before = predictions(batch)
        tokens += len(before)
        for key, mean in means.items():
            with replaced(model, layers[key], mean):
                moved[key] += F.kl_div(predictions(batch), before, reduction="sum", log_target=True).item()
    return {key: total / tokens for key, total in moved.items()}


def _by_loss(model: PreTrainedModel, layers: Layers, batches: Sequence[dict]) -> dict[int | str, float]:
    inputs = [arguments_of(batch, model) for batch in batches]
    if any(batch.get("labels") is None for batch in inputs):
        raise ValueError("`method='loss'` needs batches with `labels`; the other methods do without.")
    weights = [label_count(batch) for batch in inputs]

    def loss() -> float:
        total = sum(w * model(**batch).loss.item() for w, batch in zip(weights, inputs, strict=True))
        return total / sum(weights)

    whole, scores = loss(), {}
    for key, mean in tqdm(_means(model, layers, batches).items(), desc=TRYING, unit="attention"):
        with replaced(model, layers[key], mean):
            scores[key] = loss() - whole
    return scores


METHODS: dict[str, Callable[..., dict[int | str, float]]] = {
    "growth": _by_growth,
    "kl": _by_kl,
    "deviation": _by_deviation,
    "loss": _by_loss,
    "similarity": _by_similarity,
}
