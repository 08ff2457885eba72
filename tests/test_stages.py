"""The stages of certify.py: their order, their clock, and what they leave out."""
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import certify
from plumbing import verdicts
from plumbing.for_tests import RELAXATIONS, arrivals, hard_problem

COSTS = dict(descend=5.0, box=1.0, deeppoly=3.0, neurons=7.0, roots=2.0)     # of each image or node


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but in these stages, and what they were asked: (name, images)."""
    now, calls = [0.0], []
    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(verdicts, "time", fake)

    def wrap(function, name_of, size_of):
        sound = getattr(certify, function)

        def timed(*args, **options):
            name, size = name_of(args), size_of(args)
            if not (function.endswith("_bounds") and args[3 if "margin" in function else 2] == 0):
                calls.append((name, size))
                now[0] += COSTS.get(name, 2.0) * size
            return sound(*args, **options)
        monkeypatch.setattr(certify, function, timed)

    wrap("descend", lambda args: "descend", lambda args: len(args[1]))
    wrap("margin_lower_bounds", lambda args: args[4], lambda args: len(args[1]))
    wrap("preactivation_bounds", lambda args: "neurons", lambda args: len(args[1]))
    wrap("raise_bounds", lambda args: "roots", lambda args: len(args[2]))
    return calls


def test_verdicts_do_not_depend_on_how_many_images_share_a_batch(clock):
    net, x, y, eps = hard_problem()
    y[::9] = (y[::9] + 1) % 10
    kinds = set()
    for timeout in (None, 0.0, 4.0, 9.5, 21.0, 60.0):
        stages = certify.STAGES if timeout is None else certify.STAGES[:4]
        first, *others = ([(v.status, v.stage, round(v.seconds, 6)) for v in certify.certify(
            net, x, y, eps, timeout, stages=stages, batch=batch)] for batch in (1, 7, 100))
        if timeout is None:
            first, *others = ([v[:2] for v in found] for found in (first, *others))
        assert all(first == other for other in others)
        kinds |= {v[:2] for v in first}
    assert {stage for _, stage in kinds} >= {"", "forward", "attack", "deeppoly",
                                             "branch-and-bound"}


def test_the_clock_reaches_every_stage(clock):
    """No stage and no descent begins for an image whose time is over, and cheap ones come first."""
    net, x, y, eps = hard_problem()
    alone = [v.index for v in certify.certify(net, x, y, eps)
             if (v.status, v.stage) == ("certified", "branch-and-bound")][:3]
    for i in alone:
        image = x[i:i + 1], y[i:i + 1], eps
        clock.clear()
        certify.certify(net, *image)
        names = [name for name, _ in clock]
        assert names[:5] == ["descend", "box", "crown-ibp", "deeppoly", "descend"]
        assert list(dict.fromkeys(names[4:])) == ["descend", "neurons", "roots"]
        for timeout in (0.0, 1.0, 5.5, 7.5, 9.0, 12.0, 40.0, 100.0):
            clock.clear()
            v, = certify.certify(net, *image, timeout, stages=certify.STAGES[:4])
            asked = [(name, COSTS.get(name, 2.0) * size) for name, size in clock if size]
            costs = [cost for _, cost in asked]
            assert sum(costs[:-1]) <= timeout and v.seconds == pytest.approx(sum(costs))
            descents = [cost for name, cost in asked if name == "descend"]
            assert sum(descents[:-1]) <= timeout / 4


def test_no_descent_towards_a_class_that_bounds_rule_out(monkeypatch):
    net, x, y, eps = hard_problem()
    calls = arrivals(monkeypatch, certify, "descend")
    bounds = arrivals(monkeypatch, certify, "margin_lower_bounds")
    verdicts = certify.certify(net, x, y, eps, stages=RELAXATIONS[:3], restarts=25)
    low = {}                                               # by image: proved margins of all classes
    for given, found in bounds:
        if given["eps"]:
            for image, row in zip(given["x"], found):
                key = tuple(image.flatten().float().tolist())
                low[key] = torch.fmax(low.get(key, row), row)
    targets = {}
    for given, _ in calls:
        for k, image in enumerate(given["x"]):
            targets.setdefault(tuple(image.flatten().tolist()), []).append(
                None if given["target"] is None else int(given["target"][k]))
    skipped = 0
    for v, image, label in zip(verdicts, x, y):
        key = tuple(image.flatten().tolist())
        first, *rest = targets[key]
        assert first is None and all(low[key][k] <= 0 and k != label for k in rest)
        if v.status == "unknown":
            wanted = {k for k in range(10) if low[key][k] <= 0 and k != label}
            assert set(rest) == wanted
            skipped += 9 - len(wanted)
        if v.status == "certified":
            assert not rest
    assert skipped > 10


def test_the_benchmark_can_charge_cpu_time(monkeypatch):
    """Of a sample that waits half a second, nearly nothing."""
    monkeypatch.setattr(verdicts, "time", time)
    folder = Path(certify.__file__).parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    benchmark = runpy.run_path(str(folder / "certify.py"))
    waiting = verdicts.Verdict()
    for clock in (lambda: None, benchmark["on_cpu_time"]):
        clock()
        with verdicts.charged("attack", [waiting]):
            time.sleep(0.5)
    assert 0.5 <= waiting.seconds < 0.9
