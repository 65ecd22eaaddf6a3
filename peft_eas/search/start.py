"""How a search begins: stand-ins of all attentions, and a score of each, in the model as it is then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..families import find_layers
from ..gates import SkipGates
from ..model import EASModel
from ..stand_in import ENOUGH, are_zero, fill_stand_ins, moments
from .growth import Divergence, grow
from .held_out import ENOUGH_TO_GROW, GROWN, means_over_processes
from .scores import cost_by_gates, default_method, deviations
from .trainer import Scorer

WARM_STARTS = ("growth", "deviation", "depth")


def measure_stand_ins(
    tuner: EASModel, adapter_name: str, scorer: Scorer, batches: Iterable[Any], is_adapted: bool = False
) -> None:
    """Start the stand-ins at what the attentions add in these batches, unless they were measured or trained before.

    Args:
        tuner: The EAS tuner.
        adapter_name: The adapter.
        scorer: What runs the Trainer's forwards.
        batches: As the collator makes them.
        is_adapted: Whether in the model that the adapter makes, or in the base model.

    Raises:
        ValueError: if the model can't be measured with these.
    """
    stand_ins = tuner.stand_ins(adapter_name)
    if stand_ins and are_zero(stand_ins.values()):
        with scorer.aside(), _explained():
            fill_stand_ins(tuner, adapter_name, batches, scorer.loss, ENOUGH, is_adapted)


def scores_of(
    warm_start: str | Mapping[int | str, float], tuner: EASModel, gates: SkipGates, scorer: Scorer, count: int
) -> list[float]:
    """A score of each attention that can be skipped, in the model as it is now with none of them skipped.

    Args:
        warm_start: See `EASCallback`.
        tuner: The EAS tuner.
        gates: Its gates.
        scorer: What runs the Trainer's forwards.
        count: How many are to be skipped, at most.
    """
    layers, found = gates.layers, find_layers(tuner.model)
    if isinstance(warm_start, Mapping):
        return [float(warm_start[key]) for key in layers]
    if warm_start == "depth":
        return [-float(found[key].depth) for key in layers]
    with scorer.aside(), gates.skipping([]):
        if warm_start == "growth":
            batches = scorer.held_out.few(GROWN, ENOUGH_TO_GROW)
            divergence = Divergence(tuner.model, batches, scorer.loss, tuner)
            return grow(cost_by_gates(gates, divergence), len(layers), count)
        stand_ins = tuner.stand_ins(gates.adapter_name)
        by_layer = deviations(tuner.model, found, scorer.sample(), scorer.loss, tuner, stand_ins)
    return means_over_processes([(by_layer[key], 1) for key in layers])


def checked_start(
    warm_start: str | Mapping[int | str, float] | None, tuner: EASModel, gates: SkipGates, scorer: Scorer, batch: Any
) -> str | Mapping[int | str, float]:
    """Try on one batch what a search begins with, so that what can't be done is said before anything is trained.

    Returns:
        What the first set goes by; where nothing was said, `"growth"` if there are predictions of words to compare.

    Raises:
        ValueError: if it fails, or `warm_start` lacks scores.
    """
    if isinstance(warm_start, Mapping) and (missing := [key for key in gates.layers if key not in warm_start]):
        raise ValueError(f"`warm_start` has no scores of layers {missing}.")
    found = find_layers(tuner.model)
    layers = {key: found[key] for key in tuner.stand_ins(gates.adapter_name)}
    with scorer.aside(), gates.skipping([]):
        with _explained():
            moments(tuner.model, layers, [batch], False, scorer.loss, tuner)
        if (warm_start or default_method(tuner.model)) != "growth":
            return warm_start or "deviation"
        try:
            Divergence(tuner.model, [batch], scorer.loss, tuner)
        except ValueError:  # a loss that makes no logits
            if warm_start is not None:
                raise
            return "deviation"
        return "growth"


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The stand-ins of skipped attentions can't be measured with this Trainer's batches: {error} "
            "Call `peft_eas.initialize_eas_weights(model, dataloader)` before training, with batches of what the "
            "model takes."
        ) from error
