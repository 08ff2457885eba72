"""What is said about the time left."""
import math

import numpy as np
import pytest

import train
from plumbing import runs, timing, verdicts
from plumbing.for_tests import QUICK, command

# Real trainings of cnn3 by DeepPoly, one thread beside other work: steps, those of the ramp, what
# was measured before the first, and seconds of a step in each twentieth of the run.
RUNS = {
    "mnist, 0.3, grad": (1252, 626, (.054, .714, .401, .421, .363, .344), (
        .049, .056, .082, .141, .182, .175, .156, .143, .120, .115, .102, .107, .113, .102, .108,
        .086, .084, .085, .090, .085)),
    "mnist, 0.3, rgs": (1252, 626, (.054, .418, .345, .338, .343, .331), (
        .060, .066, .090, .128, .156, .170, .155, .148, .133, .123, .106, .113, .104, .103, .099,
        .096, .094, .096, .093, .087)),
    "mnist, 0.1, grad": (1252, 626, (.049, .233, .406, .390, .397, .416), (
        .050, .053, .062, .080, .095, .117, .143, .165, .175, .177, .162, .141, .126, .124, .123,
        .107, .104, .102, .106, .106)),
    "cifar10, grad": (500, 250, (.101, .235, .679, 1.056, 1.705, 1.505), (
        .074, .081, .124, .176, .239, .306, .402, .393, .427, .327, .286, .278, .236, .210, .200,
        .199, .227, .225, .222, .239)),
    "cifar10, rgs": (500, 250, (.080, .247, .890, 1.425, 1.320, 1.448), (
        .088, .094, .125, .181, .229, .324, .400, .458, .461, .415, .385, .357, .326, .318, .264,
        .226, .255, .272, .257, .272)),
    "digits, rgs": (1380, 552, (.026, .053, .105, .133, .122, .116), (
        .030, .036, .042, .053, .062, .069, .075, .084, .087, .086, .089, .089, .095, .096, .091,
        .090, .090, .091, .088, .090)),
    "box": (4000, 1500, (.1,) * 6, (.1,) * 20)}


@pytest.mark.parametrize("run", RUNS)
def test_the_time_left_is_right_within_half_from_the_first_minute_on(run):
    steps, ramp, measured, seconds = RUNS[run]
    took = np.repeat(seconds, -(-steps // 20))[:steps]
    took = took * np.random.default_rng(0).uniform(0.8, 1.2, steps)
    share = [train.eps_at((i + 1) / ramp, 1.0) for i in range(steps)]
    left = timing.time_left(share, 0, lambda: dict(zip(timing.FRACTIONS, measured)))
    spent, said = took.cumsum(), np.array([left(t) for t in took])
    really = spent[-1] - spent
    counts = (spent > 60) & (really > 10)
    assert counts.sum() > 100
    assert (said[counts] < 1.5 * really[counts]).all()
    assert (1.5 * said[counts] > really[counts]).all()


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
def test_the_time_left_is_right_where_the_loss_changes_at_full_radius(ramp, steps):
    """taps is box until the ramp is over: 0.2 s for a step, then 1.1 s."""
    cost = lambda fraction: 1.1 if fraction >= 1 - 1e-9 else 0.2
    share = [train.eps_at((i + 1) / ramp, 1.0) for i in range(steps)]
    left = timing.time_left(share, 0, lambda: {f: cost(f) / 4 for f in timing.FRACTIONS})
    spent, said = [], []
    for fraction in share:
        spent.append(cost(fraction))
        said.append(left(cost(fraction)))
    spent = np.cumsum(spent)
    really = spent[-1] - spent
    counts = (spent > 60) & (really > 30)
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
