"""The bandit's functions: values worked out by hand, and synthetic bandits whose best set is known."""

import itertools
import math
import random
import statistics
from collections import Counter

import bandit
import pytest

from peft_eas.search.budget import count_for_speedup, largest_within, predicted_speedup
from peft_eas.search.schedule import Schedule


def test_probabilities():
    assert bandit.probabilities([0.0, math.log(3), -math.log(3)]) == pytest.approx([0.5, 0.75, 0.25])
    extreme = bandit.probabilities([1e4, -1e4])
    assert extreme[0] == 1
    assert 0 < extreme[1] < 1e-200


def test_a_draw_is_without_replacement_and_in_proportion():
    """Chances of pairs, worked out: the first arm by p, the second by p among those that are left."""
    preferences = [0.0, math.log(3), -math.log(3)]  # p = 1/2, 3/4, 1/4
    p = dict(enumerate([2, 3, 1]))
    expected = Counter()
    for first, second in itertools.permutations(p, 2):
        expected[tuple(sorted((first, second)))] += p[first] / 6 * p[second] / (6 - p[first])
    rng = random.Random(0)
    drawn = Counter(bandit.draw(preferences, 2, rng) for _ in range(20000))
    assert set(drawn) == set(expected)
    for pair, chance in expected.items():
        assert drawn[pair] / 20000 == pytest.approx(chance, abs=0.012)


def test_draws_repeat_with_their_seed_and_have_any_size():
    preferences = [0.3 * i for i in range(7)]
    once, again = ([bandit.draw(preferences, 3, random.Random(5)) for _ in range(2)] for _ in range(2))
    assert once == again
    assert bandit.draw(preferences, 0, random.Random(5)) == ()
    assert bandit.draw(preferences, 7, random.Random(5)) == tuple(range(7))


@pytest.mark.parametrize("preferences", [[0.0] * 5, [900.0, 900.0, -900.0, -900.0, -900.0]], ids=["equal", "extreme"])
def test_candidates_are_distinct_and_drawing_them_ends(preferences):
    for number in (1, 3, 10, 50):
        subsets = bandit.draw_distinct(preferences, 2, number, random.Random(1))
        assert len(subsets) == len(set(subsets)) == min(number, 10)
        assert all(len(set(s)) == 2 and list(s) == sorted(s) for s in subsets)
    assert bandit.draw_distinct(preferences, 5, 3, random.Random(1)) == [(0, 1, 2, 3, 4)]


def test_the_paper_s_reward_and_its_advantage():
    assert bandit.reward(0.0) == 1
    assert bandit.reward(math.log(4)) == pytest.approx(0.25)
    # rewards 1/2, 1/4, 1/4: mean 1/3, deviations 1/6, -1/12, -1/12, spread sqrt((1/36 + 2/144) / 3) = sqrt(2) / 12
    advantages = bandit.advantages([math.log(2), math.log(4), math.log(4)])
    assert advantages == pytest.approx([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)])
    assert bandit.advantages([0.7, 0.7]) == [0.0, 0.0]


def test_advantages_do_not_depend_on_the_level_of_the_losses():
    low, high = bandit.advantages([0.1, 0.2, 0.15]), bandit.advantages([1000.1, 1000.2, 1000.15])
    assert high == pytest.approx(low, rel=1e-6)


def test_the_update_by_hand():
    """Two candidates have advantages of +1 and -1; an arm in both stays, p (1 - p) scales the rest."""
    preferences = [0.0, math.log(3), 0.0, 2.0]
    updated = bandit.update(preferences, [(0, 1), (0, 2)], [0.3, 0.5], lr=2.0)
    assert updated == pytest.approx([0.0, math.log(3) + 2 * 3 / 16, -2 / 4, 2.0])
    assert preferences == [0.0, math.log(3), 0.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_left_out(bad):
    preferences = [0.1, -0.2, 0.4]
    with_bad = bandit.update(preferences, [(0,), (1,), (2,)], [0.3, bad, 0.5], lr=1.0)
    assert with_bad == bandit.update(preferences, [(0,), (2,)], [0.3, 0.5], lr=1.0)
    assert bandit.update(preferences, [(0,), (1,)], [0.3, bad], lr=1.0) == preferences


def test_the_choice():
    assert bandit.choose([0.5, 2.0, -1.0, 2.5], 2) == (1, 3)
    assert bandit.choose([0.0, 0.0, 0.0], 2) == (1, 2)
    assert bandit.choose([1.0, 2.0], 0) == ()


def test_a_warm_start_keeps_the_order_of_the_scores():
    preferences = bandit.preferences_from_scores([5.0, 0.1, 7.0, 1e9], 2)
    # quantiles 5/8, 7/8, 3/8, 1/8; the edge of a set of two is at 1/2, where the logit is zero
    assert preferences == pytest.approx([2 * math.log(x) for x in (5 / 3, 7, 3 / 5, 1 / 7)])
    assert bandit.choose(preferences, 2) == (0, 1)
    for count in range(5):
        p = bandit.probabilities(bandit.preferences_from_scores([3.0, 1.0, 2.0, 0.0], count))
        assert [p[i] > 0.5 for i in (3, 1, 2, 0)] == [m < count for m in range(4)]


def play(costs, count, rounds, seed, start=None, noise=0.02, lr=2.0, level=1.0, scale=1.0):
    """A bandit whose loss is a sum of the costs of what is skipped, and noise that a round's candidates don't share."""
    rng = random.Random(seed)
    preferences = list(start or [0.0] * len(costs))
    for _ in range(rounds):
        subsets = bandit.draw_distinct(preferences, count, 3, rng)
        losses = [level + scale * (sum(costs[i] for i in subset) + rng.gauss(0, noise)) for subset in subsets]
        preferences = bandit.update(preferences, subsets, losses, lr)
    return bandit.choose(preferences, count)


@pytest.mark.parametrize(("level", "scale"), [(1.0, 1.0), (12.0, 1.0), (0.2, 0.01)])
def test_the_best_set_of_a_clear_bandit_is_found(level, scale):
    """Four arms of twelve cost nothing; at losses near 12 and for differences of a thousandth, too."""
    found = 0
    for seed in range(20):
        good = set(random.Random(seed).sample(range(12), 4))
        costs = [0.0 if i in good else 0.2 for i in range(12)]
        found += set(play(costs, 4, 150, seed, level=level, scale=scale)) == good
    assert found >= 17


def test_more_rounds_and_a_warm_start_come_closer_to_the_best_set():
    """30 arms with costs of a long tail, of which 8 are skipped; how far from the best, where a random set has 1."""

    def regret(rounds, warm):
        regrets = []
        for seed in range(40):
            rng = random.Random(1000 + seed)
            costs = [rng.lognormvariate(-3.5, 1) for _ in range(30)]
            scores = [cost * rng.lognormvariate(0, 1) for cost in costs]
            start = bandit.preferences_from_scores(scores, 8) if warm else None
            cost = sum(costs[i] for i in play(costs, 8, rounds, seed, start))
            best = sum(sorted(costs)[:8])
            regrets.append((cost - best) / (8 * statistics.fmean(costs) - best))
        return statistics.fmean(regrets)

    cold, warm = [[regret(rounds, start) for rounds in (0, 10, 100)] for start in (False, True)]
    assert cold[0] > 0.8
    assert cold[0] > cold[1] + 0.2
    assert cold[1] > cold[2] + 0.1
    assert cold[2] < 0.15
    assert warm[0] < 0.4
    assert warm[0] > warm[1] > warm[2]
    assert warm[1] < cold[1]


def test_the_schedule():
    schedule = Schedule.of(0.1, 0.3, 4, total=40)
    assert schedule == Schedule(warmup=4, settle=16, interval=4)
    assert [schedule.phase(step) for step in (0, 3, 4, 15, 16, 40)] == [
        "warm-up", "warm-up", "search", "search", "settled", "settled",
    ]  # fmt: skip
    assert [step for step in range(41) if schedule.scores_after(step)] == [8, 12, 16]
    # counts; a round is always held where the search ends
    assert Schedule.of(5, 7, 16, total=1000) == Schedule(5, 12, 16)
    assert [s for s in range(30) if Schedule(5, 12, 16).scores_after(s)] == [12]
    assert Schedule.of(0, 0.0, 3, total=10).settle == 1
    assert Schedule.of(1, 2.0, 3, total=10) == Schedule(1, 3, 3)


def test_budgets_by_hand():
    losses = [2.0, 2.01, 2.2, 2.05, math.nan, 3.0]
    assert [largest_within(losses, x) for x in (0.0, 0.01, 0.05, 0.2, 1.0)] == [0, 1, 3, 3, 5]
    assert largest_within([1.0, math.inf], 5.0) == 0
    assert predicted_speedup(100.0, 5.0, 4) == 1.25
    assert count_for_speedup(100.0, 5.0, 10, 1.25) == 4
    assert count_for_speedup(100.0, 5.0, 10, 1.26) == 5
    with pytest.raises(ValueError, match=r"1\.82 times as fast"):
        count_for_speedup(100.0, 5.0, 10, 1.9)
