"""What is said about the time left."""
import numpy as np
import pytest

import train
from plumbing import timing, verdicts


def simulated(cost, eps_share, load=1.0, seed=0):
    """(seconds spent, said to be left, really left) of a run whose step at a fraction f of eps
    costs cost(f), times a load that comes after the measurement."""
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, len(eps_share))
    real = [load * cost(f) * e for f, e in zip(eps_share, noise)]
    lengths = timing.lengths_of(eps_share, {f: cost(f) / 4 for f in timing.FRACTIONS})
    left = timing.time_left(lengths, 0)
    said = [left(seconds) for seconds in real]
    spent = np.cumsum(real)
    return spent, np.array(said), spent[-1] - spent


COSTS = {"box": lambda f: 1.0, "digits": lambda f: 0.03 + 0.11 * min(1, f / 0.2),
         "mnist": lambda f: 0.15 + 0.6 * min(1, f / 0.1),
         "cifar10": lambda f: 0.1 + 1.5 * min(1, f / 0.55)}           # measured, at the start


@pytest.mark.parametrize("load", [1, 3])
@pytest.mark.parametrize("kind", COSTS)
def test_the_time_left_is_right_within_half_from_the_first_minute_on(kind, load):
    share = [train.eps_at((i + 1) / 800, 1.0) for i in range(1600)]
    spent, said, left = simulated(COSTS[kind], share, load)
    counts = (spent > 60) & (left > 30)
    assert counts.sum() > 200 or kind == "digits"
    assert (said[counts] < 1.5 * left[counts]).all() and (said[counts] > left[counts] / 1.5).all()
    one_rate = spent / np.arange(1, 1601) * np.arange(1599, -1, -1)   # as if all steps were alike
    assert kind in ("box", "digits") or (one_rate[counts] < left[counts] / 1.5).any()


def test_the_cost_of_a_step_is_measured_without_changing_anything():
    calls = []
    seconds = timing.seconds_at(calls.append)
    assert calls == [0.0, *timing.FRACTIONS] and list(seconds) == list(timing.FRACTIONS)
    assert timing.lengths_of([0.1, 0.9], None) == [1.0, 1.0]
    assert timing.lengths_of([0.5], {0.0: 1.0, 1.0: 3.0}) == [2.0]


def test_time_left_of_verdicts():
    """100 images in batches of 25: the first verdict comes when a whole batch is bounded."""
    assert verdicts.seconds_left(10.0, 1, 100, 25) == pytest.approx(10 * (200 / 26 - 1))
    assert verdicts.seconds_left(10.0, 50, 100, 25) == 10.0
    assert verdicts.seconds_left(10.0, 100, 100, 25) == 0.0
    assert verdicts.seconds_left(10.0, 3, 100, 1) == pytest.approx(10 * 97 / 3)
