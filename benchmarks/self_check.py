"""Attack the bounds and verdicts of random networks: an unsound one is found sooner or later.

    python benchmarks/self_check.py 100000       so many checks: about 40 minutes on one CPU core
    python benchmarks/self_check.py              as many as you let it do; Ctrl-C shows the count

Expect "0 contradictions", and exit status 0; anything else names the seeds that make them, one a
line, and is a bug worth a report. Textbook and skip_stable bounds of all relaxations are checked,
of neurons and of margins, in float64; and complete verdicts, by their counterexamples.
"""
import argparse
import itertools
import math
import sys
import time

import torch
import torch.nn as nn

import common                                       # first: it puts the checkout on the path
from certify import ContradictionError, certify
from relaxations import RELAXATIONS, margin_lower_bounds, preactivation_bounds
from plumbing.console import Progress, count, duration, run
from plumbing.rounding import ROUNDING, in_float64
from train import attack, forward_margin

CORNERS = 20          # random corners tried in each ball, and as many points inside


def random_problem(seed):
    """A random network, 6 images, the labels it gives them, and a radius."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = h = torch.rand(6, pick(1, 2), pick(4, 5, 6), pick(4, 5, 7))
        layers = []

        def add(layer):
            nonlocal h
            layers.append(layer.eval())
            h = layer(h)

        for _ in range(pick(0, 1, 2)):
            kernel = min(pick(1, 2, 3), *h.shape[2:])
            add(nn.Conv2d(h.shape[1], pick(2, 4), kernel, pick(1, 2), pick(0, kernel // 2)))
            if pick(True, False):
                add(random_batchnorm(h.shape[1]))
            add(nn.ReLU())
        add(nn.Flatten())
        for _ in range(pick(1, 2)):
            add(nn.Linear(h.shape[1], pick(4, 8, 12)))
            add(nn.ReLU())
        add(nn.Linear(h.shape[1], pick(2, 3, 5)))
        net, gain = nn.Sequential(*layers), pick(0.7, 1.0, 2.0, 4.0)
        for p in net.parameters():
            p.mul_(gain)
        return net, x, net(x).argmax(1), pick(0.01, 0.03, 0.1, 0.3)


def pick(*values):
    return values[int(torch.randint(len(values), ()))]


def random_batchnorm(channels):
    layer = nn.BatchNorm2d(channels)
    for t in (layer.weight, layer.bias, layer.running_mean):
        t.normal_()
    layer.running_var.uniform_(0.2, 3)
    return layer


def self_check(limit=math.inf, seed=0, show=lambda line: None):
    """Attack the bounds and verdicts of random networks: (checks, contradictions).

    A check is one image and one claim: that the bounds of a relaxation (textbook, or skip_stable)
    enclose what the neurons and margins are at all points tried, in float64, or that a verdict of
    certify is not contradicted: "certified" by a point, "attacked" by a counterexample that is
    outside of the ball, or rightly classified. The points: PGD with 5 restarts of 60 steps, random
    ones, and random corners of the ball. Stops at the limit, or when interrupted.
    """
    checks, contradictions = 0, []
    try:
        for seed in itertools.count(seed):
            problem = random_problem(seed)
            points = points_to_try(*problem, seed)
            for relax, skip in itertools.product(RELAXATIONS, (False, True)):
                wrong = outside(*problem, points, relax, skip)
                contradictions += [f"seed {seed}, image {i}, {relax}, skip {skip}" for i in wrong]
            wrong = contradicted(*problem, points, seed)
            contradictions += [f"seed {seed}, image {text}" for text in wrong]
            checks += len(problem[1]) * (2 * len(RELAXATIONS) + 1)
            show(f"{checks} checks, {len(contradictions)} contradictions")
            if checks >= limit:
                break
    except KeyboardInterrupt:
        pass
    return checks, contradictions


def points_to_try(net, x, y, eps, seed):
    """(1 + 2 CORNERS, B, ...) points of the balls, in float64."""
    worst = attack(net, x, y, eps, steps=60, restarts=5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(2 * CORNERS, *x.shape, dtype=torch.float64)
    noise.uniform_(-1, 1, generator=generator)
    noise[CORNERS:] = noise[CORNERS:].sign()
    return torch.cat([worst[None].double(), (x.double() + eps * noise).clamp(0, 1)])


@torch.no_grad()
def outside(net, x, y, eps, points, relax, skip):
    """The images for which some point violates some bound, beyond rounding in float64."""
    net, x, y = in_float64(net, x, y)
    bounds = preactivation_bounds(net, x, eps, relax, skip_stable=skip, steps=5)
    low = margin_lower_bounds(net, x, y, eps, relax, skip_stable=skip, steps=5)
    wrong = torch.zeros(len(x), dtype=torch.bool)
    h, n = points.flatten(0, 1), 0
    for layer in net:
        if isinstance(layer, nn.ReLU):
            z = h.unflatten(0, points.shape[:2]).flatten(2)
            l, u = (t.flatten(1) for t in bounds[n])
            slack = 1e-9 * (1 + l.abs() + u.abs())
            wrong |= ~((z >= l - slack) & (z <= u + slack)).all(2).all(0)      # NaN is wrong too
            n += 1
        h = layer(h)
    logits = h.unflatten(0, points.shape[:2])
    margins = logits.gather(2, y.expand(len(points), -1)[..., None]) - logits
    wrong |= ~(margins >= low - 1e-9 * (1 + low.abs())).all(2).all(0)
    return wrong.nonzero().flatten().tolist()


def contradicted(net, x, y, eps, points, seed):
    """The verdicts of certify that some point contradicts, as lines of text."""
    margins = torch.stack([forward_margin(net, p, y) for p in points]).amin(0)
    try:
        verdicts = certify(net, x, y, eps, timeout=1.0, seed=seed)
    except ContradictionError as e:
        return [f"{e.index}: {e}"]
    found = []
    for v in verdicts:
        i, point = v.index, v.counterexample
        wrong = v.status == "certified" and margins[i] <= -ROUNDING
        if v.status == "attacked":
            wrong = ((point.double() - x[i].double()).abs().max() > eps
                     or forward_margin(net, point[None], y[i:i + 1]) > 0)
        if wrong:
            found.append(f"{i}, {v.status} by {v.stage}")
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checks", nargs="?", type=count(1), default=10 ** 9,
                   help="so many, or as many as you let it do")
    p.add_argument("--seed", type=count(0), default=0, help="of the first network")
    args = p.parse_args(argv)
    show, begun = Progress(), time.time()
    checks, contradictions = self_check(args.checks, args.seed, show)
    show.done(f"{checks} checks, {len(contradictions)} contradictions, "
              f"{duration(time.time() - begun)}")
    sys.exit("\n".join(contradictions) or 0)


if __name__ == "__main__":
    run(main)
