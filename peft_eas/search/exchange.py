"""What a search goes by, as pure functions: the costs of skipping attentions, and exchanges that lower the loss.

Attentions, by number, stand in an order, and the first `count` of it are skipped: the set. A try of an attention turns
its gate over in the set as it stands, once, and compares the held-out loss batch by batch:

    cost_i = loss(set) - loss(set without i),  for i in the set
    cost_j = loss(set and j) - loss(set),      for j outside

in the unit of the loss. An attention outside that costs clearly less than one in the set takes its place. One forward
a batch says something of an attention and all its exchanges; single exchanges would take `count * (n - count)`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

CLEAR = 3.0
"""How many standard errors of the difference of two costs make it clear. A pair is the best of dozens."""

LEAST = 4
"""Fewer differences of batches than these have no standard error that is worth the name."""


class Cost(NamedTuple):
    """What skipping an attention costs: mean over batches, its standard error, and how many batches there were."""

    mean: float
    error: float
    batches: int


def costs(tries: Iterable[tuple[int, Sequence[float]]]) -> dict[int, Cost]:
    """The cost of each attention that was tried.

    Args:
        tries: Attention and differences of the loss, one a batch, of each try; it may be tried again.
    """
    differences: dict[int, list[float]] = {}
    for attention, given in tries:
        differences.setdefault(attention, []).extend(given)
    return {
        attention: Cost(
            statistics.fmean(values),
            statistics.stdev(values) / math.sqrt(len(values)) if len(values) >= LEAST else math.inf,
            len(values),
        )
        for attention, values in differences.items()
        if values
    }


def start(scores: Sequence[float]) -> list[int]:
    """Attentions in the order of their scores, the lowest first; of equal ones the later: the paper's sets are deep."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))


def to_try(
    order: Sequence[int],
    count: int,
    known: Mapping[int, Cost],
    number: int,
    failed: Collection[int] = (),
    fits: bool = True,
) -> list[int]:
    """The `number` attentions of which least is known of whether they belong to the set.

    Those that were never tried come first, from the edge of the set outwards; then those whose costs are the fewest
    standard errors away from the edge, which is halfway between the dearest in the set and the cheapest outside.

    Args:
        order: All attentions, the set first.
        count: Size of the set.
        known: Costs.
        number: How many attentions to name.
        failed: Arms that were tried in vain, and come last.
        fits: Whether one more than `count` may be skipped, for a moment.
    """
    inside, outside = order[:count], order[count:]
    if not inside or not outside:
        return []
    dearest = max((known[i].mean for i in inside if i in known), default=0.0)
    cheapest = min((known[j].mean for j in outside if j in known), default=dearest)
    edge = (dearest + cheapest) / 2

    def doubt(place: int) -> tuple[float, float]:
        attention, distance = order[place], abs(place - count + 0.5)
        if attention not in known:
            return math.inf if attention in failed else -1.0, distance
        return abs(known[attention].mean - edge) / max(known[attention].error, 1e-30), distance

    places = sorted(range(len(order)) if fits else range(count), key=doubt)
    return [order[place] for place in places[:number]]


def exchange(order: Sequence[int], count: int, known: Mapping[int, Cost]) -> tuple[list[int], list[tuple[int, int]]]:
    """Exchange attentions of the set for cheaper ones outside, the clearest pair first, as long as a pair is clear.

    Returns:
        The new order, and each exchange: which is retained from now on, and which is skipped for it.
    """
    order = list(order)
    done: list[tuple[int, int]] = []

    def clearness(out: int, enters: int) -> float:
        error = math.hypot(known[out].error, known[enters].error)
        saved = known[out].mean - known[enters].mean
        return saved / max(error, 1e-30) if saved > 0 else 0.0

    while True:
        pairs = [(i, j) for i in order[:count] if i in known for j in order[count:] if j in known]
        best = max(pairs, key=lambda pair: clearness(*pair), default=None)
        if best is None or clearness(*best) <= CLEAR:
            return order, done
        i, j = (order.index(attention) for attention in best)
        order[i], order[j] = order[j], order[i]
        done.append(best)


def ranked(order: Sequence[int], count: int, known: Mapping[int, Cost]) -> list[int]:
    """The order with attentions of known cost sorted by it, among themselves; in the set, and outside. Others stay."""
    result = list(order)
    for places in (range(count), range(count, len(order))):
        tried = [place for place in places if order[place] in known]
        by_cost = sorted((order[place] for place in tried), key=lambda attention: known[attention].mean)
        for place, attention in zip(tried, by_cost, strict=True):
            result[place] = attention
    return result
