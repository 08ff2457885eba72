"""What is said about the time left."""
import math

import numpy as np
import pytest

import train
from plumbing import runs, timing, verdicts
from plumbing.for_tests import QUICK, command

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


@pytest.mark.parametrize("at_once, late", [(1, [0.4] * 24), (20, [0.1] * 5), (15, [5.0] * 10),
                                           (25, []), (10, [0.01, 0.1, 1.0] * 5)])
@pytest.mark.parametrize("batches", [1, 2, 8])
def test_the_time_left_of_verdicts_is_right_within_half(at_once, late, batches):
    """Batches of 25 images: 10 s of attack and bounds, verdicts that come at once, and late ones.
    What is shown counts, not what the next verdict overwrites, from the third late one on, or the
    second batch, while 10 s are left."""
    times = []
    for k in range(batches):
        begun = k * (10 + sum(late)) + 10
        times += [begun] * at_once + [begun + sum(late[:i + 1]) for i in range(len(late))]
    left = timing.VerdictsLeft(25)
    for done, now in enumerate(times, 1):
        said, really = left(now, done, len(times)), times[-1] - now
        shown = done == len(times) or times[done] > now
        if shown and really > 10 and (done > 25 or done - at_once > 2 or not late):
            assert really / 1.5 < said < 1.5 * really, (done, said, really)
    assert said == 0


def test_a_clock_that_was_set_back_ends_nothing():
    left = timing.VerdictsLeft(25)
    for done, now in enumerate([100.0] * 25 + [99.5 + 0.1 * k for k in range(75)], 1):
        left(now, done, 100)


def test_a_single_image_and_single_batches():
    left = timing.VerdictsLeft(1)
    assert [left(3.0 * i, i, 4) for i in range(1, 5)] == [9.0, 6.0, 3.0, 0.0]


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


def test_the_length_of_a_step_is_measured_before_the_first_and_goes_into_the_time_left(
        tmp_path, monkeypatch, capsys):
    """A step at full radius counts as nine of the first ones; without a ramp nothing is measured,
    nor where nothing is left to do."""
    measured, said = [], []

    def seconds_at(step):
        measured.append(math.isfinite(step(1.0)))                  # a step of this training
        return {0.0: 1.0, 1.0: 9.0}
    monkeypatch.setattr(train, "seconds_at", seconds_at)
    line = runs.progress_line
    def spy(now, epoch, step, steps, config, eps, numbers, left):
        said.append((now["seconds"], eps, left))
        return line(now, epoch, step, steps, config, eps, numbers, left)
    monkeypatch.setattr(runs, "progress_line", spy)
    words = [*QUICK, "--net", "mlp", "--epochs", 2, "--ramp", 2, "--out", tmp_path / "run"]
    assert command(train.main, *words) == 0 and measured == [True]
    lengths = [1 + 8 * eps / 0.1 for _, eps, _ in said]
    assert len(said) == 6 and lengths[0] < 1.2 and lengths[-1] == pytest.approx(9)
    (seconds, eps, left), settles = said[0], timing.SETTLING * 8 / 9
    expected = seconds / lengths[0] * sum(lengths[1:]) * (1 - settles * eps / 0.1)
    assert 0 < settles < 0.3 and left == pytest.approx(expected, rel=1e-3)
    assert command(train.main, "--resume", tmp_path / "run") == 0 and len(measured) == 1
    assert command(train.main, *words[:-4], "--ramp", 0, "--out", tmp_path / "two") == 0
    assert len(measured) == 1


def verdicts_at(path, times, batch, monkeypatch, capsys):
    """The seconds left that are shown when verdicts come at these times, a list for each image:
    (time, seconds that the verdict took)."""
    now, said = [0.0], []
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(verdicts, "duration", lambda left: said.append(left) or "")
    def certify_some(indices, report):
        for i in indices:
            now[0], seconds = times[i]
            report(verdicts.Verdict("certified", "box", 1.0, seconds, index=i))
    verdicts.write_verdicts(path, dict(eps=0.1), [0] * len(times), certify_some,
                            verdicts.verdict_of, "title", batch=batch)
    return said


def test_the_first_verdict_of_a_batch_tells_what_the_rest_will_take(tmp_path, monkeypatch, capsys):
    """100 images in batches of 25: 10 s of attack and bounds, then 0.4 s for each. As if all came
    with the first one: 1,030 s."""
    times = [(20 * (i // 25) + 10 + 0.4 * (i % 25 + 1), 0.8) for i in range(100)]
    said = verdicts_at(tmp_path / "v", times, 25, monkeypatch, capsys)
    really = [times[-1][0] - t for t, _ in times]
    assert len(said) == 100
    assert all(r / 1.5 < s < 1.5 * r for s, r in zip(said, really) if r > 20)


def test_what_is_known_from_another_radius_tells_nothing_about_the_time(
        tmp_path, monkeypatch, capsys):
    """900 of 1,000 images are known already; the others come in batches as above."""
    times = [(0.0, 0.0)] * 900 + [(20 * (i // 25) + 10 + 0.4 * (i % 25 + 1), 0.8)
                                  for i in range(100)]
    said = verdicts_at(tmp_path / "v", times, 25, monkeypatch, capsys)
    really = [times[-1][0] - t for t, _ in times[900:]]
    assert len(said) == 100                                # nothing is said before there is work
    assert all(r / 1.5 < s < 1.5 * r for s, r in zip(said, really) if r > 20)
