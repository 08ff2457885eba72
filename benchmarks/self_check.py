"""Attack the bounds and verdicts of random networks: an unsound one is found sooner or later.

    python benchmarks/self_check.py 100000       so many checks: about 15 minutes of one CPU core
    python benchmarks/self_check.py              as many as you let it do; Ctrl-C shows the count

Expect "0 contradictions", and exit status 0; anything else names the seeds that make them, one a
line, and is a bug worth a report. Textbook and skip_stable bounds of all relaxations are checked,
of neurons and of margins, in float64 and in float32; and complete verdicts, by their
counterexamples. Switches that round float32 products are to change none of it:

    python benchmarks/self_check.py 100000 --precision medium        or bf16: see PRECISION

And where each tree goes on alone from its first nodes on, as large ones do:

    python benchmarks/self_check.py 100000 --width 1
"""
import argparse
import itertools
import math
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import common                                       # first: it puts the checkout on the path
import certify as branching
from certify import ContradictionError, certify
from relaxations import RELAXATIONS, margin_lower_bounds, preactivation_bounds
from plumbing.console import Progress, count, duration, run
from plumbing.rounding import ROUNDING, in_float64
from train import attack, forward_margin

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution,
            aten.convolution_backward}
CORNERS = 20          # random corners tried in each ball, and as many points inside
IN_FLOAT32 = [relax for relax in RELAXATIONS if relax != "alpha-crown"]   # whose ascent may amplify
PRECISION = {                                                          # switches, see Rounding
    "highest": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "bf16": lambda: [setattr(place, "fp32_precision", "bf16")
                     for place in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]}


class Rounding(TorchDispatchMode):
    """Products of float32 tensors as a processor computes them that makes use of the switches,
    which not every one does: factors rounded to bfloat16, unless oneDNN is off."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if torch.backends.mkldnn.enabled and function.overloadpacket in PRODUCTS:
            given = [t.bfloat16().to(t) if is_factor(t) else t for t in given]
        return function(*given, **(named or {}))


def is_factor(t):
    return torch.is_tensor(t) and t.dtype == torch.float32 and t.dim() > 1


def random_problem(seed, images=6):
    """A random network, so many images, the labels it gives them, and a radius."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = h = torch.rand(images, pick(1, 2), pick(4, 5, 6), pick(4, 5, 7))
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


def self_check(limit=math.inf, seed=0, show=lambda line: None, images=6, rounding=nullcontext):
    """Attack the bounds and verdicts of random networks: (checks, contradictions).

    A check is one image and one claim: that the bounds of a relaxation (textbook, or skip_stable)
    enclose what the neurons and margins are at all points tried, in float64; that those in float32
    are the same; or that a verdict of certify is not contradicted: "certified" by a point,
    "attacked" by a counterexample that is outside of the ball, or rightly classified. The points:
    PGD with 5 restarts of 60 steps, random ones, and random corners of the ball. Stops at the
    limit, or when interrupted. images: of each network. rounding: a context for what may compute in
    float32.
    """
    checks, contradictions = 0, []
    try:
        for seed in itertools.count(seed):
            problem = random_problem(seed, images)
            points = points_to_try(*problem, seed)
            for relax, skip in itertools.product(RELAXATIONS, (False, True)):
                wrong = outside(*problem, points, relax, skip)
                contradictions += [f"seed {seed}, image {i}, {relax}, skip {skip}" for i in wrong]
            for relax, skip in itertools.product(IN_FLOAT32, (False, True)):
                with rounding():
                    wrong = rounded(*problem, relax, skip)
                contradictions += [f"seed {seed}, image {i}, {relax}, skip {skip}, in float32"
                                   for i in wrong]
            with rounding():
                wrong = contradicted(*problem, points, seed)
            contradictions += [f"seed {seed}, image {text}" for text in wrong]
            checks += images * (2 * len(RELAXATIONS) + 2 * len(IN_FLOAT32) + 1)
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


@torch.no_grad()
def rounded(net, x, y, eps, relax, skip):
    """The images whose bounds in float32 are not those in float64, up to 1e-4 of the largest. The
    slope is always 0: rounding may flip the adaptive one, and both are sound."""
    found = []
    for net, x, y in ((net, x, y), in_float64(net, x, y)):
        options = dict(skip_stable=skip, slope="zero")
        bounds = preactivation_bounds(net, x, eps, relax, **options)
        low = margin_lower_bounds(net, x, y, eps, relax, **options)
        found.append([t.flatten(1).double() for t in (low, *itertools.chain(*bounds))])
    wrong = torch.zeros(len(x), dtype=torch.bool)
    for single, double in zip(*found, strict=True):
        wrong |= ~((single - double).abs() <= 1e-4 * (1 + double.abs().max())).all(1)
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
    p.add_argument("--images", type=count(1), default=6, help="of each network; default: 6")
    p.add_argument("--precision", choices=PRECISION, default="highest",
                   help="what float32 products are set to before, in this process")
    p.add_argument("--width", type=count(1), default=branching.WIDTH,
                   help="nodes that make a tree large; and that are cut at once")
    args = p.parse_args(argv)
    PRECISION[args.precision]()
    branching.WIDTH = args.width
    show, begun = Progress(), time.time()
    rounding = nullcontext if args.precision == "highest" else Rounding
    checks, contradictions = self_check(args.checks, args.seed, show, args.images, rounding)
    show.done(f"{checks} checks, {len(contradictions)} contradictions, "
              f"{duration(time.time() - begun)}")
    sys.exit("\n".join(contradictions) or 0)


if __name__ == "__main__":
    run(main)
