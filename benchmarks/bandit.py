"""The k-armed bandit of section 3.2 of the paper (arXiv 2403.15226), as pure functions.

There is one preference `s_i` for each attention (arm). In the order of use:

    p_i = sigmoid(s_i)                                                          (1)  how likely arm i is to be drawn
    subset ~ `count` arms without replacement, with chances in proportion to p  (2)
    R_k = exp(-loss_k)                                                          (3)  reward of candidate subset k
    A_k = (R_k - mean R) / std R                                                (4)  its advantage
    s_i <- s_i + lr * A_k * p_i * (1 - p_i),  for each i in subset k            (5)
    chosen = the `count` arms with the highest s                                (6)

The paper has no standard deviation in (4). With it, a preference moves by as much whether losses are near 0.1 or near
8, and whether candidates differ by 0.3 or by 0.003, so that one learning rate serves every model and task; without it,
preferences hardly leave zero in the few hundred steps that a fine-tuning has.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence


def probabilities(preferences: Sequence[float]) -> list[float]:
    """Equation (1), within (0, 1) for any finite preference."""
    return [1 / (1 + math.exp(min(-s, 700.0))) for s in preferences]


def draw(preferences: Sequence[float], count: int, rng: random.Random) -> tuple[int, ...]:
    """Equation (2): `count` arms in ascending order.

    The largest of `log(u_i) / p_i` are such a draw (Efraimidis and Spirakis, 2006); `u_i` are one number an arm,
    whatever the preferences, so that a seed means the same draw as long as preferences are the same.
    """
    keys = [math.log(1 - rng.random()) / p for p in probabilities(preferences)]
    return tuple(sorted(sorted(range(len(keys)), key=keys.__getitem__)[len(keys) - count :]))


def draw_distinct(preferences: Sequence[float], count: int, number: int, rng: random.Random) -> list[tuple[int, ...]]:
    """`number` different draws, or all subsets there are if they are fewer."""
    number = min(number, math.comb(len(preferences), count))
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * number):
        if len(found) == number:
            break
        found[draw(preferences, count, rng)] = None
    # preferences so strong that draws keep repeating: the rest are the likeliest of the others
    favourites = sorted(range(len(preferences)), key=lambda i: -preferences[i])
    for subset in itertools.combinations(favourites, count):
        if len(found) == number:
            break
        found[tuple(sorted(subset))] = None
    return list(found)


def reward(loss: float) -> float:
    """Equation (3)."""
    return math.exp(-loss)


def advantages(losses: Sequence[float]) -> list[float]:
    """Equation (4) of losses that are finite; zeros if they are all alike.

    Losses are taken relative to the lowest, which changes nothing in exact arithmetic and keeps large losses apart.
    """
    rewards = [reward(loss - min(losses)) for loss in losses]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / spread if spread else 0.0 for r in rewards]


def update(
    preferences: Sequence[float], subsets: Sequence[Sequence[int]], losses: Sequence[float], lr: float
) -> list[float]:
    """Equation (5) for all candidates of a round at once.

    Candidates whose loss is NaN or infinite are left out; with fewer than two others there is nothing to compare, and
    the preferences stay.
    """
    scored = [(subset, loss) for subset, loss in zip(subsets, losses, strict=True) if math.isfinite(loss)]
    updated = list(preferences)
    if len(scored) < 2:
        return updated
    p = probabilities(preferences)
    for (subset, _), advantage in zip(scored, advantages([loss for _, loss in scored]), strict=True):
        for i in subset:
            updated[i] += lr * advantage * p[i] * (1 - p[i])
    return updated


def choose(preferences: Sequence[float], count: int) -> tuple[int, ...]:
    """Equation (6), in ascending order; of equal arms the later ones, as the paper's sets are mostly deep."""
    ranked = sorted(range(len(preferences)), key=lambda i: (preferences[i], i))
    return tuple(sorted(ranked[len(ranked) - count :]))


def preferences_from_scores(scores: Sequence[float], count: int) -> list[float]:
    """A warm start: preferences that put the arms in the order of one-shot scores (low score, high preference).

    Only ranks count, as scores of different methods have different scales and long tails. The arm of rank `m` among `n`
    gets `2 (logit(1 - (m + 1/2) / n) - logit(1 - count / n))`: probabilities (1) are above 1/2 for the `count` best and
    below for the others. What is drawn is then mostly the best set with some exchanges near its edge; among synthetic
    bandits the sets that are drawn are half as far from the best as with probabilities spread evenly over (0, 1), and
    what is found in the end is as good.
    """
    n = len(scores)
    edge = _logit(1 - min(max(count, 0.25), n - 0.25) / n)
    started = [0.0] * n
    for rank, i in enumerate(sorted(range(n), key=lambda i: scores[i])):
        started[i] = 2 * (_logit(1 - (rank + 0.5) / n) - edge)
    return started


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
