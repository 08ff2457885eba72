"""What is said about the time left."""
import numpy as np
import pytest

import train
from plumbing import timing, verdicts

PLACES = 0, 1 / 16, 1 / 4, 1 / 2, 1                         # fractions of eps, and seconds there of
COSTS = {                                                   # a step: at the start, when trained
    "box": ([1.0] * 5, [1.0] * 5),
    "digits": ([0.03, 0.06, 0.15, 0.14, 0.14], [0.03, 0.06, 0.15, 0.14, 0.14]),
    "mnist": ([0.06, 0.29, 0.47, 0.42, 0.40], [0.08, 0.07, 0.11, 0.20, 0.28]),
    "cifar10": ([0.10, 0.22, 0.67, 1.45, 1.58], [0.09, 0.13, 0.25, 0.47, 0.92])}


@pytest.mark.parametrize("pace", [2, 4])                    # at which the weights become trained
@pytest.mark.parametrize("kind", COSTS)
def test_the_time_left_is_right_within_half_from_the_first_minute_on(monkeypatch, kind, pace):
    ramp, steps, clock, done = 1500, 4000, [0.0], [0]
    monkeypatch.setattr(timing.time, "time", lambda: clock[0])
    noise = np.random.default_rng(0).uniform(0.8, 1.2, steps)
    def cost(fraction):
        trained = min(1, pace * done[0] / ramp)
        first, last = (np.interp(fraction, PLACES, costs) for costs in COSTS[kind])
        return (1 - trained) * first + trained * last
    share = [train.eps_at((i + 1) / ramp, 1.0) for i in range(steps)]
    left = timing.time_left(share, 0, lambda: {f: cost(f) / 4 for f in timing.FRACTIONS})
    spent, said = [], []
    for fraction, factor in zip(share, noise):
        seconds = factor * cost(fraction)
        clock[0] += seconds
        said.append(left(seconds))
        spent.append(clock[0])
        done[0] += 1
    spent, said = np.array(spent), np.array(said)
    really = spent[-1] - spent
    counts = (spent > 60) & (really > 30)
    assert counts.sum() > 500
    assert (said[counts] < 1.5 * really[counts]).all() and (1.5 * said[counts]
                                                            > really[counts]).all()
    if kind == "cifar10":                                          # as if all steps were alike
        one_rate = spent / np.arange(1, steps + 1) * np.arange(steps - 1, -1, -1)
        assert (one_rate[counts] < really[counts] / 3).any()


def test_the_cost_of_a_step_is_measured_without_changing_anything():
    calls = []
    seconds = timing.seconds_at(calls.append)
    assert calls == [0.0, *timing.FRACTIONS] and list(seconds) == list(timing.FRACTIONS)
    assert timing.lengths_of([0.5], {0.0: 1.0, 1.0: 3.0}) == [2.0]
    assert timing.time_left([0.1, 1.0, 1.0], 0)(2.0) == 4.0             # without: all alike


def test_time_left_of_verdicts():
    """100 images in batches of 25: the first verdict comes when a whole batch is bounded."""
    assert verdicts.seconds_left(10.0, 1, 100, 25) == pytest.approx(10 * (200 / 26 - 1))
    assert verdicts.seconds_left(10.0, 50, 100, 25) == 10.0
    assert verdicts.seconds_left(10.0, 100, 100, 25) == 0.0
    assert verdicts.seconds_left(10.0, 3, 100, 1) == pytest.approx(10 * 97 / 3)


@pytest.mark.parametrize("ramp, steps", [(1500, 4000), (4000, 4000)])
def test_the_time_left_is_right_where_the_loss_changes_at_full_radius(monkeypatch, ramp, steps):
    """taps is box until the ramp is over: 0.2 s for a step, then 1.1 s."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "time", lambda: clock[0])
    cost = lambda fraction: 1.1 if fraction >= 1 - 1e-9 else 0.2
    share = [train.eps_at((i + 1) / ramp, 1.0) for i in range(steps)]
    left = timing.time_left(share, 0, lambda: {f: cost(f) / 4 for f in timing.FRACTIONS})
    spent, said = [], []
    for fraction in share:
        clock[0] += cost(fraction)
        said.append(left(cost(fraction)))
        spent.append(clock[0])
    really = spent[-1] - np.array(spent)
    counts = (np.array(spent) > 60) & (really > 30)
    assert (np.array(said)[counts] < 1.5 * really[counts]).all()
    assert (1.5 * np.array(said)[counts] > really[counts]).all()
