"""Costs and exchanges: values worked out by hand, and synthetic attentions whose best set is known."""

import math
import random
import statistics

import pytest

from peft_eas.search import exchange
from peft_eas.search.exchange import Cost


def test_costs_are_means_over_all_batches_with_their_standard_errors():
    known = exchange.costs([(3, [0.1, 0.3]), (1, [1.0]), (3, [0.2, 0.6]), (2, [])])
    assert known[3].mean == pytest.approx(0.3)
    # deviations -0.2, 0, -0.1, 0.3: variance 0.14 / 3
    assert known[3].error == pytest.approx(math.sqrt(0.14 / 3 / 4))
    assert known[3].batches == 4
    assert known[1] == Cost(1.0, math.inf, 1)
    assert 2 not in known


def test_a_start_is_the_order_of_the_scores_and_of_equal_ones_the_deeper_come_first():
    assert exchange.start([0.2, 0.1, 0.3]) == [1, 0, 2]
    assert exchange.start([0.0] * 4) == [3, 2, 1, 0]


def test_what_was_never_tried_comes_first_from_the_edge_outwards():
    order = [4, 0, 2, 1, 3, 5]
    assert exchange.to_try(order, 2, {}, 4) == [0, 2, 4, 1]
    known = {0: Cost(0.1, 0.01, 4), 2: Cost(0.2, 0.01, 4)}
    assert exchange.to_try(order, 2, known, 2) == [4, 1]
    assert exchange.to_try(order, 2, known, 3, failed=[4]) == [1, 3, 5]
    assert exchange.to_try(order, 2, {}, 3, fits=False) == [0, 4]
    # there is nothing to choose between
    assert exchange.to_try(order, 0, {}, 3) == exchange.to_try(order, 6, {}, 3) == []


def test_then_comes_what_is_the_fewest_standard_errors_from_the_edge():
    # the dearest in the set has 0.3, the cheapest outside 0.5: the edge is at 0.4
    known = {0: Cost(0.3, 0.01, 4), 1: Cost(0.1, 0.2, 4), 2: Cost(0.5, 0.1, 4), 3: Cost(0.9, 0.1, 4)}
    assert exchange.to_try([0, 1, 2, 3], 2, known, 4) == [2, 1, 3, 0]  # 1, 1.5, 5 and 10 of them


def test_only_clear_pairs_are_exchanged_the_clearest_first():
    known = {0: Cost(0.5, 0.03, 8), 1: Cost(0.1, 0.03, 8), 2: Cost(0.3, 0.04, 8), 3: Cost(0.2, 0.04, 8)}
    # 0.3 / 0.05 for (0, 3); then 1 is cheaper than 0 and 2
    assert exchange.exchange([0, 1, 2, 3], 2, known) == ([3, 1, 2, 0], [(0, 3)])
    near = known | {2: Cost(0.3, 0.1, 8), 3: Cost(0.4, 0.04, 8)}  # 0.2 / 0.104 and 0.1 / 0.05
    assert exchange.exchange([0, 1, 2, 3], 2, near) == ([0, 1, 2, 3], [])
    alone = {0: Cost(0.5, math.inf, 2), 3: Cost(0.1, 0.01, 8)}
    assert exchange.exchange([0, 1, 2, 3], 2, alone) == ([0, 1, 2, 3], [])
    assert exchange.exchange([0, 1], 1, {}) == ([0, 1], [])


def test_ranks_within_the_set_and_outside_follow_what_is_known():
    known = {0: Cost(0.5, 0.1, 4), 4: Cost(0.1, 0.1, 4), 1: Cost(0.3, 0.1, 4), 5: Cost(0.2, 0.1, 4)}
    assert exchange.ranked([0, 2, 4, 1, 3, 5], 3, known) == [4, 2, 0, 5, 3, 1]


def play(costs, count, rounds, seed, scores, noise):
    """Rounds of four tries of four batches; what skipping attentions costs adds up."""
    rng, order, tries = random.Random(seed), exchange.start(scores), []
    for _ in range(rounds):
        for arm in exchange.to_try(order, count, exchange.costs(tries), 4):
            tries.append((arm, [costs[arm] + rng.gauss(0, noise) for _ in range(4)]))
        order, _ = exchange.exchange(order, count, exchange.costs(tries))
    return order[:count]


def test_rounds_come_closer_to_the_best_set_and_noise_does_not_lead_away():
    """30 attentions with costs of a long tail, of which 8 are skipped, scores that are right within a factor; how far
    from the best set, where a random one has 1."""

    def regret(rounds, noise):
        regrets = []
        for seed in range(16):
            rng = random.Random(seed)
            costs = [rng.lognormvariate(-3.5, 1) for _ in range(30)]
            scores = [cost * rng.lognormvariate(0, 1) for cost in costs]
            found = sum(costs[i] for i in play(costs, 8, rounds, seed, scores, noise))
            best = sum(sorted(costs)[:8])
            regrets.append((found - best) / (8 * statistics.fmean(costs) - best))
        return statistics.fmean(regrets)

    start = regret(0, 0.0)
    assert 0.1 < start < 0.4
    assert regret(4, 0.01) < 0.5 * start
    assert regret(10, 0.01) < 0.3 * start
    assert regret(8, 0.2) < 1.25 * start  # noise that is ten times the costs
