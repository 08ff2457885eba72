"""Read beside the paper: what gls, relaxations, train and certify claim, checked.

In this order: bounds against a slow DeepPoly that anybody can check line by line, brute force and
samples; the fast path against the heart; the estimators against closed forms; what a training step
hands on; the command lines; verdicts against oracles that need no solver. Rounding, refusals,
baselines and the rest are in tests/ and beside the modules, plumbing/test_*.py. All of them run by
pytest, in about ten minutes on 2 CPU cores; this file in about five.
"""
import json
import math
import re
from copy import deepcopy
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import certify
import gls
import relaxations
import train
from plumbing.data import CIFAR_STATISTICS
from plumbing.for_tests import (NETS, QUICK, RELAXATIONS, arrivals, command, flat, in_ball, loss_at,
                                make, npz, points_seen, random_bn, random_subdomain, relu_inputs,
                                same_random_numbers, steps_of_adam, train_on_noise, true_margins)
from plumbing.runs import LOG
from plumbing.verdicts import STATUSES
from relaxations import margin_lower_bounds, preactivation_bounds


# ------------------------------------------------------------------------------------ the slow path

def affine_maps(net, x):
    """(W, b) of what is before, between and after the ReLUs, as dense matrices, by differentiating
    it."""
    matrices, chain, shape = [], [], x.shape
    for layer in [*flat(net), None]:
        if layer is None or isinstance(layer, nn.ReLU):
            f = nn.Sequential(*chain)
            point = torch.zeros(shape, dtype=x.dtype)
            W = torch.autograd.functional.jacobian(lambda v: f(v[None])[0].flatten(), point)
            matrices.append((W.flatten(1), f(point[None])[0].flatten().detach()))
            shape, chain = f(point[None])[0].shape, []
        else:
            chain.append(layer)
    return matrices


def slow_bounds(net, x, y, eps, crown_ibp=False):
    """Textbook DeepPoly (or CROWN-IBP) of one image, neuron by neuron: pre-activations and margins.
    """
    matrices = affine_maps(net, x)
    low, high = (x - eps).clamp(min=0).flatten(), (x + eps).clamp(max=1).flatten()
    bounds = []

    def lower(row, top):         # a lower bound of row . z, where z is the output of matrices[top]
        constant = 0.0
        for k in range(top, -1, -1):
            W, b = matrices[k]
            constant, row = constant + row @ b, row @ W
            if k == 0:
                break
            new = torch.zeros_like(row)
            for j in range(len(row)):
                l, u = (t[j] for t in bounds[k - 1])
                if l >= 0:
                    new[j] = row[j]
                elif u > 0 and row[j] >= 0:
                    new[j] = row[j] * (1.0 if u >= -l else 0.0)
                elif u > 0:
                    new[j] = row[j] * u / (u - l)
                    constant = constant - row[j] * u * l / (u - l)
            row = new
        return constant + sum(r * (low[j] if r >= 0 else high[j]) for j, r in enumerate(row))

    inner_low, inner_high = low, high
    for k, (W, b) in enumerate(matrices[:-1]):
        if crown_ibp:
            l = W.clamp(min=0) @ inner_low + W.clamp(max=0) @ inner_high + b
            u = W.clamp(min=0) @ inner_high + W.clamp(max=0) @ inner_low + b
        else:
            eye = torch.eye(len(b), dtype=x.dtype)
            l = torch.stack([lower(e, k) for e in eye])
            u = -torch.stack([lower(-e, k) for e in eye])
        bounds.append((l, u))
        inner_low, inner_high = l.clamp(min=0), u.clamp(min=0)
    K = len(matrices[-1][1])
    eye = torch.eye(K, dtype=x.dtype)
    return bounds, torch.stack([lower(eye[y] - eye[k], len(matrices) - 1) for k in range(K)])


# -------------------------------------------------------------------------------------- relaxations

@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("relax", RELAXATIONS)
@pytest.mark.parametrize("name", NETS)
def test_sound_against_samples_and_pgd(name, relax, skip):
    g = torch.Generator().manual_seed(1)
    for seed, eps in ((0, 0.02), (1, 0.1), (2, 0.5), (3, 1.0)):
        net, x, y = make(name, seed)
        bounds = preactivation_bounds(net, x, eps, relax, skip_stable=skip)
        low = margin_lower_bounds(net, x, y, eps, relax, skip_stable=skip)
        for point in in_ball(x, eps, 60, g):
            assert (true_margins(net, point, y) >= low - 1e-9).all()
            for z, (l, u) in zip(relu_inputs(net, point), bounds):
                assert z.shape == l.shape and (z >= l - 1e-9).all() and (z <= u + 1e-9).all()
        points = train.attack(net, x, y, eps, steps=15, restarts=2)
        worst = train.forward_margin(net, points, y)
        assert (worst >= train.smallest(low, y) - 1e-9).all()
        assert ((points - x).abs() <= eps + 1e-12).all() and ((points >= 0) & (points <= 1)).all()


@pytest.mark.parametrize("slope", ["zero", "one", "parallel"])
def test_every_slope_rule_is_sound(slope):
    net, x, y = make("windows")
    low = margin_lower_bounds(net, x, y, 0.1, slope=slope)
    assert not torch.equal(low, margin_lower_bounds(net, x, y, 0.1))
    for point in in_ball(x, 0.1, 100, torch.Generator().manual_seed(0)):
        assert (true_margins(net, point, y) >= low - 1e-9).all()


def zonotope(net, x, y, eps):
    """DeepZ (Singh et al. 2018) of one image, forwards: bounds before each ReLU, and margins. The
    zonotope is centre + sum of a_i G_i, |a_i| <= 1; an unstable ReLU adds a generator."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    centre = (low + high)[None] / 2
    G = torch.diag((high - low).flatten() / 2).view(-1, *x.shape)
    bounds = []
    for layer in flat(net):
        if not isinstance(layer, nn.ReLU):
            origin = layer(torch.zeros_like(centre))
            centre, G = layer(centre), layer(G) - origin
            continue
        radius = G.abs().sum(0, keepdim=True)
        l, u = centre - radius, centre + radius
        bounds.append((l[0], u[0]))
        slope = torch.where(l >= 0, 1.0, torch.where(u <= 0, 0.0, u / (u - l))).to(l)
        new = torch.where((l < 0) & (u > 0), -slope * l / 2, 0)
        centre = slope * centre + new
        G = torch.cat([slope * G, torch.diag(new.flatten()).view(-1, *new.shape[1:])])
    margin = lambda logits: logits[:, y:y + 1] - logits
    return bounds, margin(centre)[0] - margin(G).abs().sum(0)


@pytest.mark.parametrize("name", NETS)
def test_parallel_slopes_give_the_zonotope(name):
    net, x, y = make(name, batch=2)
    net = nn.Sequential(*[a for a, b in zip(flat(net), [None, *flat(net)])
                          if not (isinstance(a, nn.ReLU) and isinstance(b, nn.ReLU))])
    low = margin_lower_bounds(net, x, y, 0.1, slope="parallel")
    bounds = preactivation_bounds(net, x, 0.1, slope="parallel")
    for i in range(len(x)):
        expected, margins = zonotope(net, x[i], y[i], 0.1)
        torch.testing.assert_close(low[i], margins, atol=1e-9, rtol=0)
        for (l, u), (a, b) in zip(bounds, expected, strict=True):
            torch.testing.assert_close(l[i], a, atol=1e-9, rtol=0)
            torch.testing.assert_close(u[i], b, atol=1e-9, rtol=0)


def test_a_slope_has_a_name_or_is_a_function():
    net, x, y = make("windows")
    for name, rule in relaxations.SLOPES.items():
        low = margin_lower_bounds(net, x, y, 0.1, slope=name)
        assert name == rule.__name__
        for same in (rule, lambda l, u: rule(l, u)):
            assert torch.equal(low, margin_lower_bounds(net, x, y, 0.1, slope=same))
    for slope in ("steep", 0.5, None, ["one"]):
        with pytest.raises(ValueError, match="adaptive, zero, one, parallel, and no function"):
            margin_lower_bounds(net, x, y, 0.1, slope=slope)


@pytest.mark.parametrize("name", NETS)
def test_equal_to_the_slow_path(name):
    full, x, y = make(name, batch=2)
    # a ReLU right after a ReLU does nothing, and costs nothing here; the slow path does not know it
    net = nn.Sequential(*[a for a, b in zip(flat(full), [None, *flat(full)])
                          if not (isinstance(a, nn.ReLU) and isinstance(b, nn.ReLU))])
    for relax in ("crown-ibp", "deeppoly"):
        torch.testing.assert_close(margin_lower_bounds(full, x, y, 0.1, relax),
                                   margin_lower_bounds(net, x, y, 0.1, relax))
        if relax == "crown-ibp" and name in ("batchnorm", "others", "signals"):
            continue                 # intervals there go layer by layer, not through the product
        ours = margin_lower_bounds(net, x, y, 0.1, relax), preactivation_bounds(net, x, 0.1, relax)
        for i in range(len(x)):
            bounds, low = slow_bounds(net, x[i], y[i], 0.1, relax == "crown-ibp")
            torch.testing.assert_close(ours[0][i], low, atol=1e-9, rtol=0)
            for (l, u), (a, b) in zip(ours[1], bounds):
                torch.testing.assert_close(l[i].flatten(), a, atol=1e-9, rtol=0)
                torch.testing.assert_close(u[i].flatten(), b, atol=1e-9, rtol=0)


def test_the_adaptive_slope_is_1_where_both_areas_are_equal():
    l, u = torch.tensor([[-1.0, -1, -1], [1.0, 0.9, 1.1]])
    assert relaxations.adaptive(l, u).tolist() == [1, 0, 1]


def test_the_worked_example_of_the_docstring():
    """Its numbers, from the text: bounds before the ReLUs, and the margin of each relaxation."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(),
                        nn.Linear(2, 2)).double()
    for layer, W, b in ((0, [[1., 1.], [1., -1.]], [-.5, 0.]), (2, [[1., -1.], [1., 0.]], [0., 0.]),
                        (4, [[0., 2.], [1., 0.]], [0., 0.])):
        net[layer].weight.data = torch.tensor(W).double()
        net[layer].bias.data = torch.tensor(b).double()
    text = relaxations.__doc__.split("A worked example")[1]
    number = lambda fraction: float(Fraction(fraction))
    said = {name: number(value) for name, value in re.findall(
        r"^    (box|CROWN-IBP|DeepPoly) .*?= (-[\d/]+)\n", text, re.M | re.S)}
    low3 = number(re.search(r"DeepPoly .* so z3 in \[(\S+), 1\]", text)[1])
    interval3 = number(re.search(r"intervals? give .*?z3 in \[(\S+), 1\]", text, re.I | re.S)[1])
    assert (said, low3, interval3) == ({"box": -1, "CROWN-IBP": -1 / 3, "DeepPoly": -.2}, -.25, -.5)
    x, y = torch.full((1, 2), 0.5).double(), torch.tensor([0])
    for relax, low in (("box", interval3), ("CROWN-IBP", interval3), ("DeepPoly", low3)):
        margins = margin_lower_bounds(net, x, y, 0.25, relax.lower())[0]
        assert margins.tolist() == pytest.approx([0, said[relax]])
        (l1, u1), (l3, u3) = preactivation_bounds(net, x, 0.25, relax.lower())
        assert l1[0].tolist() == [0, -.5] and u1[0].tolist() == [1, .5]
        assert l3[0].tolist() == pytest.approx([low, 0]) and u3[0].tolist() == pytest.approx([1, 1])
    corner = torch.full((1, 2), 0.25).double()
    assert true_margins(net, corner, y)[0].tolist() == [0, 0]


def test_elision_example_of_the_docstring():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    for p, v in zip(net.parameters(), ([[5.]], [0.], [[1.], [1.]], [1., 0.])):
        p.data = torch.tensor(v)
    low = margin_lower_bounds(net, torch.tensor([[0.5]]), torch.tensor([0]), 0.5, "box")
    assert low[0].tolist() == [0, 1]


def test_exact_on_affine_networks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), random_bn(3), nn.Flatten(),
                        nn.LazyLinear(4)).eval()
    net(torch.zeros(1, 2, 4, 5))
    net = net.double()
    x, y = torch.rand(3, 2, 4, 5).double(), torch.tensor([0, 1, 3])
    low = margin_lower_bounds(net, x, y, 0.2, "deeppoly")
    for i in range(3):
        margins = lambda v: true_margins(net, v[None], y[i:i + 1])[0]
        J = torch.autograd.functional.jacobian(margins, x[i])
        down, up = (x[i] - .2).clamp(0, 1) - x[i], (x[i] + .2).clamp(0, 1) - x[i]
        exact = margins(x[i]) + torch.stack([torch.minimum(j * down, j * up).sum() for j in J])
        torch.testing.assert_close(low[i], exact)


def test_two_neurons_by_brute_force():
    """relu(w1.x + b1), relu(w2.x + b2) over a square: linear on the cells of a line arrangement,
    so the minimum is at one of its vertices. Bounds never exceed it, and meet it if both neurons
    are stable."""
    g, exact_cases = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
        x, eps = torch.rand(1, 2, generator=g, dtype=torch.float64), 0.2
        lo, hi = (x[0] - eps).clamp(min=0), (x[0] + eps).clamp(max=1)
        lines = [([1., 0.], lo[0]), ([1., 0.], hi[0]), ([0., 1.], lo[1]), ([0., 1.], hi[1])]
        lines += [(net[0].weight[j].tolist(), -net[0].bias[j]) for j in (0, 1)]
        points = []
        for i in range(6):
            for j in range(i):
                M = torch.tensor([lines[i][0], lines[j][0]], dtype=torch.float64)
                if M.det().abs() > 1e-9:
                    p = torch.linalg.solve(M, torch.stack([lines[i][1], lines[j][1]]).detach())
                    if (p >= lo - 1e-9).all() and (p <= hi + 1e-9).all():
                        points.append(p)
        points = torch.stack(points)
        y = net(x).argmax(1)
        exact = true_margins(net, points, y.expand(len(points))).amin(0)
        (l, u), = preactivation_bounds(net, x, eps, "box")
        stable = bool(((l >= 0) | (u <= 0)).all())
        exact_cases += stable
        for relax in RELAXATIONS:
            low = margin_lower_bounds(net, x, y, eps, relax)[0]
            assert (low <= exact + 1e-9).all()
            if stable and relax != "box":
                torch.testing.assert_close(low, exact)
    assert 20 < exact_cases < 80


@pytest.mark.parametrize("relax", RELAXATIONS)
@pytest.mark.parametrize("name", NETS)
def test_eps_zero_is_the_forward_pass(name, relax):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        net, x, y = make(name, dtype=dtype)
        low = margin_lower_bounds(net, x, y, 0.0, relax)
        torch.testing.assert_close(low, true_margins(net, x, y), atol=tolerance, rtol=tolerance)
        for z, (l, u) in zip(relu_inputs(net, x), preactivation_bounds(net, x, 0, relax)):
            torch.testing.assert_close(l, z, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(u, z, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("relax", RELAXATIONS)
@pytest.mark.parametrize("name", NETS)
def test_population_equals_a_loop_and_chunks_change_nothing(name, relax, skip):
    nets = [make(name, seed)[0] for seed in range(3)]
    _, x, y = make(name, 0)
    params, buffers = torch.func.stack_module_state(nets)
    both = {**params, **buffers}
    loop = torch.stack([margin_lower_bounds(n, x, y, 0.1, relax, skip_stable=skip) for n in nets])
    for memory in (None, 1, 60_000):
        stacked = margin_lower_bounds(nets[0], x, y, 0.1, relax, both, skip, memory=memory)
        torch.testing.assert_close(stacked, loop, atol=1e-10, rtol=1e-10)
    bounds = preactivation_bounds(nets[0], x, 0.1, relax, both, skip_stable=skip)
    for i, n in enumerate(nets):
        for (l, u), (a, b) in zip(bounds, preactivation_bounds(n, x, 0.1, relax, skip_stable=skip)):
            assert l.shape == (3, *a.shape)
            torch.testing.assert_close(l[i], a)
            torch.testing.assert_close(u[i], b)
    again = margin_lower_bounds(nets[0], x, y, 0.1, relax, both, skip, intermediate=bounds)
    torch.testing.assert_close(again, loop)


@pytest.mark.parametrize("memory", [None, 1, 40_000])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("relax", RELAXATIONS)
@pytest.mark.parametrize("name", ["windows", "outgrown", "batchnorm"])
def test_gradient_against_finite_differences(name, relax, skip, memory):
    net, x, y = make(name)
    names, values = zip(*((n, p.detach()[None]) for n, p in net.named_parameters()))
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(v.shape, generator=g, dtype=v.dtype) for v in values]

    def f(t):
        params = {n: v + t * d for n, v, d in zip(names, values, direction)}
        bounds = preactivation_bounds(net, x, 0.1, relax, params, skip_stable=skip, memory=memory)
        low = margin_lower_bounds(net, x, y, 0.1, relax, params, intermediate=bounds, memory=memory)
        return low.logsumexp(-1).sum() + sum((u - l).square().mean() for l, u in bounds)

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(f(t), t)
    h = 1e-7
    with torch.no_grad():
        assert slope.item() == pytest.approx(((f(h) - f(-h)) / (2 * h)).item(), rel=1e-4)


def test_batchnorm_is_folded_exactly():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(2, 3, 3, padding=1), random_bn(3)
    rest = [nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)]
    net = nn.Sequential(conv, bn, *rest).double().eval()
    fused = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, bn), *rest).double().eval()
    x, y = torch.rand(2, 2, 4, 4).double(), torch.tensor([0, 2])
    for relax in RELAXATIONS:
        torch.testing.assert_close(margin_lower_bounds(net, x, y, .1, relax),
                                   margin_lower_bounds(fused, x, y, .1, relax))


def test_eps_is_in_pixels_whatever_the_normalisation():
    """A network on (x - mean) / std is the same function as one with these in its first weights."""
    torch.manual_seed(0)
    net = train.build_network("mlp", (3, 4, 4), 3, "default", CIFAR_STATISTICS).double()
    mean, std = (torch.tensor(t).double().repeat_interleave(16) for t in CIFAR_STATISTICS)
    plain = deepcopy(net)[1:]
    plain[1].weight.data = net[2].weight.data / std
    plain[1].bias.data = net[2].bias.data - net[2].weight.data @ (mean / std)
    x, y = torch.rand(2, 3, 4, 4).double(), torch.tensor([0, 1])
    torch.testing.assert_close(net(x), plain(x))
    for relax in RELAXATIONS:
        torch.testing.assert_close(margin_lower_bounds(net, x, y, .1, relax),
                                   margin_lower_bounds(plain, x, y, .1, relax))


def test_the_ball_is_clipped_to_pixels():
    net, x, y = make("mlp")
    x = x.round()                                       # pixels 0 and 1: half the ball is outside
    low = margin_lower_bounds(net, x, y, 0.2)
    inside = margin_lower_bounds(net, x * 0.8 + 0.1, y, 0.1)      # the same set, as a smaller ball
    torch.testing.assert_close(low, inside)
    torch.testing.assert_close(margin_lower_bounds(net, x, y, 5.0),
                               margin_lower_bounds(net, x, y, 1.0))


@pytest.mark.parametrize("name", NETS)
def test_skip_stable_is_never_looser_where_that_is_a_theorem(name):
    """With slope 0 a tighter pre-activation bound gives lines inside the old ones, so every bound
    above is at least as tight. (The adaptive slope may flip from 1 to 0; then it need not be.)"""
    net, x, y = make(name)
    for eps in (0.02, 0.1, 0.3):
        for scale in (1.0, 2.0):
            params = {k: scale * v[None] for k, v in net.named_parameters()}
            text, skip = (margin_lower_bounds(net, x, y, eps, params=params, skip_stable=skip,
                                              slope=relaxations.zero) for skip in (False, True))
            assert (skip >= text - 1e-9 * text.abs().amax()).all()


def test_skip_stable_only_replaces_bounds_of_unstable_neurons():
    for name in NETS:
        net, x, y = make(name, seed=5)
        box = preactivation_bounds(net, x, 0.05, "box")
        text = preactivation_bounds(net, x, 0.05, "deeppoly")
        skip = preactivation_bounds(net, x, 0.05, "deeppoly", skip_stable=True)
        same = True
        for (bl, bu), (tl, tu), (sl, su) in zip(box, text, skip):
            assert (sl >= bl - 1e-12).all() and (su <= bu + 1e-12).all()
            same &= bool((((tl < 0) & (tu > 0)) == ((sl < 0) & (su > 0))).all())
            unstable = (sl < 0) & (su > 0)
            if same:                 # no sign settled by intervals alone so far: textbook bounds
                assert (sl[unstable] >= tl[unstable] - 1e-12).all()
    net, x, y = make("mlp")          # where nothing is unstable, all agree with the forward pass
    torch.testing.assert_close(margin_lower_bounds(net, x, y, 0, skip_stable=True),
                               true_margins(net, x, y))


@pytest.mark.fast_path
@pytest.mark.parametrize("options", [dict(relax="box"), dict(relax="crown-ibp"), dict(),
                                     dict(skip_stable=True), dict(slope=relaxations.parallel),
                                     dict(relax="alpha-crown", steps=3),
                                     dict(relax="alpha-crown", steps=3, skip_stable=True)])
@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("name", NETS)
def test_the_fast_path_equals_the_heart(name, members, options, monkeypatch):
    """In values and gradients, to 1e-12 of the largest, whatever the memory."""
    net, x, y = make(name)
    params = dict(net.named_parameters())
    if members:
        params = {k: torch.stack([v, 1.1 * v]).detach().requires_grad_() for k, v in params.items()}

    def numbers(fast, memory=None):
        monkeypatch.setattr(relaxations, "FAST", fast)
        given = dict(params=params if members else None, memory=memory, **options)
        bounds = preactivation_bounds(net, x, 0.1, **given)
        low = margin_lower_bounds(net, x, y, 0.1, **given)
        loss = low.logsumexp(-1).sum() + sum((u - l).square().mean() for l, u in bounds)
        grads = torch.autograd.grad(loss, params.values(), allow_unused=True,
                                    materialize_grads=True)
        return [low, *(t for pair in bounds for t in pair), *grads]

    heart = numbers(False)
    for memory in (None, 40_000):
        for a, b in zip(numbers(True, memory), heart, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))


# ---------------------------------------------------------------------------------------------- gls

def mean_and_error(samples):
    """Mean over repetitions, and five of its standard errors: unbiased estimates stay within."""
    samples = torch.stack(samples)
    return samples.mean(0), 5 * samples.std(0) / len(samples) ** 0.5


A = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
SMOOTHED = {   # loss, gradient of its smoothed version at theta, and the gradient per sigma_j
    "linear": (lambda t: t @ A, lambda theta, s: A, lambda theta, s: torch.zeros(3)),
    # E|theta + s eps|^2 / 2 = |theta|^2 / 2 + sum_j s_j^2 / 2
    "quadratic": (lambda t: t.square().sum(1) / 2, lambda theta, s: theta,
                  lambda theta, s: s.expand(3)),
    # P(theta_0 + s eps > 0) = Phi(theta_0 / s), whose derivatives are phi/s and -phi theta_0/s^2
    "step": (lambda t: (t[:, 0] > 0).to(t.dtype),
             lambda theta, s: torch.exp(-(theta / s) ** 2 / 2) / (s * math.sqrt(2 * math.pi))
             * torch.eye(3)[0],
             lambda theta, s: -theta / s ** 2 * torch.exp(-(theta / s) ** 2 / 2)
             / math.sqrt(2 * math.pi) * torch.eye(3)[0]),
}


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("name", SMOOTHED)
def test_pgpe_is_unbiased(name, per_parameter):
    loss, gradient, per_sigma = SMOOTHED[name]
    theta = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.5, 0.4] if per_parameter else 0.3, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for pairs in (1, 2, 5):          # a bias such as the factor 1 - 1/n would show with few pairs
        runs = [gls.pgpe(loss, theta, sigma, pairs, g) for _ in range(4000)]
        s_grad = per_sigma(theta, sigma).double()
        for samples, expected in (
                ([r[1] for r in runs], gradient(theta, sigma).double()),
                ([r[2] for r in runs], s_grad if per_parameter else s_grad.sum())):
            mean, error = mean_and_error(samples)
            assert mean.shape == expected.shape and ((mean - expected).abs() <= error + 1e-12).all()


def test_pgpe_variance_is_that_of_antithetic_pairs():
    """For a linear loss the pair difference is exact: Var[grad_j] = (|a|^2 + a_j^2) / n."""
    theta, g = torch.zeros(3, dtype=torch.float64), torch.Generator().manual_seed(0)
    runs = torch.stack([gls.pgpe(lambda t: 7 + t @ A, theta, 0.1, 4, g)[1] for _ in range(5000)])
    torch.testing.assert_close(runs.var(0), (A.square().sum() + A ** 2) / 4, rtol=0.1, atol=0)


def test_rgs_is_the_mean_gradient_and_blind_to_jumps():
    theta, g = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    quadratic, step = SMOOTHED["quadratic"][0], SMOOTHED["step"][0]
    mean, error = mean_and_error([gls.rgs(quadratic, theta, 0.3, 3, g)[1] for _ in range(2000)])
    assert ((mean - theta).abs() <= error).all()
    torch.testing.assert_close(gls.rgs(quadratic, theta, 0.3, 4, g, antithetic=True)[1], theta)
    assert gls.rgs(step, theta, 0.3, 50, g)[1].abs().max() == 0          # while PGPE sees it, above
    value, grad, none = gls.gradient(quadratic, theta)
    torch.testing.assert_close(grad, theta)
    assert value == quadratic(theta[None])[0] and none is None
    smooth = torch.stack([gls.rgs(quadratic, theta, 0.3, 1, g)[1] for _ in range(4000)]) - theta
    torch.testing.assert_close(smooth.std(0), torch.full((3,), 0.3).double(), rtol=0.1, atol=0)


def test_the_values_and_the_standard_error_are_those_of_closed_forms():
    """For 7 + a.t every antithetic pair has the mean L(theta), without noise. For |t|^2 / 2 it is
    (|theta|^2 + s^2 |eps|^2) / 2, with the mean (|theta|^2 + D s^2) / 2 and the variance s^4 D / 2;
    a single point has s^2 |theta|^2 more of it."""
    theta, g = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    line, bowl = (lambda t: 7 + t @ A), SMOOTHED["quadratic"][0]
    exact = line(theta[None])[0]
    for estimator in (gls.pgpe, partial(gls.pgpe, adapt=False), gls.smoothed_loss,
                      partial(gls.rgs, antithetic=True)):
        torch.testing.assert_close(estimator(line, theta, 0.3, 10, g)[0], exact)
    assert gls.smoothed_loss(line, theta, 0.3, 10, g)[1] < 1e-12
    s, pairs = 0.7, 20000
    mean, variance = (theta @ theta + 3 * s ** 2) / 2, torch.tensor(3 * s ** 4 / 2).double()
    of_point = variance + s ** 2 * theta @ theta
    value, error = gls.smoothed_loss(bowl, theta, s, 2 * pairs, g)
    torch.testing.assert_close(error, (variance / pairs) ** 0.5, rtol=0.05, atol=0)
    assert (value - mean).abs() < 5 * error
    assert (gls.pgpe(bowl, theta, s, pairs, g)[0] - mean).abs() < 5 * error
    assert (gls.rgs(bowl, theta, s, pairs, g)[0] - mean).abs() < 5 * (of_point / pairs) ** 0.5
    few = torch.stack([gls.rgs(bowl, theta, s, 4, g)[0] for _ in range(4000)])
    torch.testing.assert_close(few.var(), of_point / 4, rtol=0.1, atol=0)
    step, exact = SMOOTHED["step"][0], 0.5 * (1 + math.erf(0.2 / 0.3 / math.sqrt(2)))
    value, error = gls.smoothed_loss(step, theta, 0.3, 20000, g)
    assert (value - exact).abs() < 5 * error


@pytest.mark.parametrize("chunk, sizes", [(None, [8]), (1, [1] * 8), (3, [2] * 4), (4, [4, 4])])
def test_pgpe_evaluates_the_pairs_asked_for(chunk, sizes):
    calls, = points_seen(partial(gls.pgpe, pairs=4, chunk=chunk), 1, 3)
    assert [len(points) for points in calls] == sizes
    points = {tuple(p.tolist()) for p in torch.cat(calls)}
    assert len(points) == 8 and points == {tuple(-v for v in p) for p in points}


def test_pgpe_sums_over_the_noise_that_it_evaluated():
    """A loss a.t has the estimate 1/n sum_i (a.eps_i) eps_i, of the very eps_i that it saw."""
    for dtype, D in ((torch.float32, 37), (torch.float64, 5)):
        a, seen = torch.arange(D).to(dtype), []
        loss = lambda t: (seen.append(t.clone()), t @ a)[1]
        grad = gls.pgpe(loss, torch.zeros(D, dtype=dtype), 0.5, 6, torch.Generator(), chunk=4)[1]
        eps = torch.cat([points[:len(points) // 2] for points in seen]) / 0.5
        torch.testing.assert_close(grad, (eps @ a) @ eps / 6)


# Losses of two parts, the gradient of their smoothed mean, and its gradient by sigma
SLOPES = torch.stack([A, torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)])
PARTS = {
    "linear": ([lambda t, a=a: 7 * a[0] + t @ a for a in SLOPES], lambda t, s: SLOPES.mean(0),
               lambda t, s: 0.0),
    "quadratic": ([lambda t, c=c: c * t.square().sum(1) / 2 for c in (1, 5)], lambda t, s: 3 * t,
                  lambda t, s: 3 * len(t) * s),
    "step": ([lambda t, c=c: 4 * (t[:, 0] > c).to(t.dtype) for c in (0.1, 0.6)],
             lambda t, s: sum(2 * torch.exp(-((t - c) / s) ** 2 / 2) for c in (0.1, 0.6))
             / (s * math.sqrt(2 * math.pi)) * torch.eye(3)[0],
             lambda t, s: -sum(2 * (t[0] - c) * torch.exp(-((t[0] - c) / s) ** 2 / 2)
                               for c in (0.1, 0.6)) / (s ** 2 * math.sqrt(2 * math.pi))),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_unbiased(name):
    losses, gradient, by_sigma = PARTS[name]
    theta, g = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    estimators = [partial(gls.pgpe, pairs=2), partial(gls.pgpe, pairs=4)]
    if name != "step":
        estimators += [partial(gls.rgs, samples=2, antithetic=True), partial(gls.rgs, samples=6)]
    values = [loss(theta + 0.3 * torch.randn(10 ** 5, 3, generator=g, dtype=theta.dtype))
              for loss in losses]
    exact, its_error = torch.cat(values).mean(), 10 * torch.cat(values).std() / 10 ** 2.5
    for estimator in estimators:
        runs = [estimator(losses, theta, 0.3, generator=g) for _ in range(1000)]
        mean, error = mean_and_error([r[1] for r in runs])
        assert ((mean - gradient(theta, 0.3)).abs() <= error + 1e-12).all()
        mean, error = mean_and_error([r[0] for r in runs])
        assert (mean - exact).abs() <= error + its_error
        if estimator.func is gls.pgpe:
            mean, error = mean_and_error([r[2] for r in runs])
            assert (mean - by_sigma(theta, 0.3)).abs() <= error


def test_the_variance_of_parts_is_that_of_their_mean():
    """Of PGPE for linear losses (|a_j|^2 + a_jk^2) / n, of RGS none; for c_j |t|^2 / 2 RGS has
    c_j^2 s^2 / n: means over j, and nothing of theta. The sign + on one part and - on the other
    leaves (c_1 - c_2) s eps / 2 of an antithetic pair; both signs on both parts leave nothing."""
    theta, g = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    runs = lambda estimator, losses: torch.stack([
        estimator(losses, 50 * theta, 0.3, generator=g)[1] for _ in range(1500)])
    lines, bowls = PARTS["linear"][0], PARTS["quadratic"][0]
    of_pair = (SLOPES.square().sum(1, keepdim=True) + SLOPES ** 2).mean(0)
    torch.testing.assert_close(runs(partial(gls.pgpe, pairs=4), lines).var(0), of_pair / 4,
                               rtol=0.1, atol=0)
    assert (gls.rgs(lines, theta, 0.3, 2, g)[1] - SLOPES.mean(0)).abs().max() < 1e-12
    for samples, antithetic, variance in ((4, False, 13 * 0.09 / 4), (2, True, 4 * 0.09),
                                          (4, True, 0.0)):
        rgs = partial(gls.rgs, samples=samples, antithetic=antithetic)
        torch.testing.assert_close(runs(rgs, bowls).var(0), torch.full((3,), variance).double(),
                                   rtol=0.1, atol=1e-12)


def test_the_relative_error_is_that_of_closed_forms():
    """RGS of |t|^2 / 2: a variance s^2 D / n against |theta|^2. PGPE of a.t: |a|^2 (D + 1) / n."""
    theta, g = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    bowl, line = SMOOTHED["quadratic"][0], SMOOTHED["linear"][0]
    error = gls.relative_error(lambda: gls.rgs(bowl, theta, 0.3, 5, g), 1500)
    assert error.item() == pytest.approx(0.3 * (3 / 5) ** 0.5 / theta.norm().item(), rel=0.03)
    error = gls.relative_error(lambda: gls.pgpe(line, theta, 0.3, 16, g), 1500)
    assert error.item() == pytest.approx((4 / 16) ** 0.5, rel=0.03)
    two = iter([3.0, 5.0])                                 # mean 4, variance 2: 2 / (16 - 2/2)
    error = gls.relative_error(lambda: (0, torch.tensor([next(two)])), 2)
    assert error.item() == pytest.approx((2 / 15) ** 0.5)
    assert gls.relative_error(lambda: gls.gradient(bowl, theta)) == 0
    signs = iter([1, -1, 1, -1])
    assert gls.relative_error(lambda: (0, next(signs) * theta), 4) == math.inf


def test_pgpe_example_of_the_docstring_runs():
    code = gls.__doc__.split("PGPE in eight lines:")[1]
    scope = {"torch": torch, "gls": gls}
    exec("\n".join(line[4:] for line in code.splitlines()).replace("print(theta)", ""), scope)
    assert (scope["theta"] - 1).abs().max() < 0.05


# -------------------------------------------------------------------------------------------- train


def test_unflatten_is_the_order_of_parameters_to_vector():
    net = train.build_network("cnn7", (1, 6, 6), 3)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for name, t in train.unflatten(theta[None], net).items():
        assert torch.equal(t[0], net.get_parameter(name))


def test_robust_loss_bounds_the_worst_cross_entropy_and_counts_its_parts():
    net, x, y = make("windows", dtype=torch.float64)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    loss = lambda **k: train.robust_loss(net, x, y, 0.05, **k)(theta).item()
    cross_entropy = nn.functional.cross_entropy
    points = in_ball(x, 0.05, 50, torch.Generator().manual_seed(0))
    worst = max(cross_entropy(net(p), y).item() for p in points)
    natural = cross_entropy(net(x), y).item()
    weights = sum(p.abs().sum() for p in net.parameters() if p.dim() > 1)
    assert loss() >= worst
    assert loss(kappa=1.0) == pytest.approx(natural)
    assert loss(kappa=0.25) == pytest.approx(0.75 * loss() + 0.25 * natural)
    assert loss(l1=0.01) == pytest.approx(loss() + 0.01 * weights.item())
    assert train.robust_loss(net, x, y, 0.0)(theta).item() == pytest.approx(natural)
    margins, fractions = margin_lower_bounds(net, x, y, 0.05), []
    train.robust_loss(net, x, y, 0.05, certified=fractions)(theta)
    right = [all(m > 0 for k, m in enumerate(row) if k != c)
             for row, c in zip(margins.tolist(), y.tolist())]
    assert fractions[0].item() == pytest.approx(sum(right) / len(y))


def test_beta_goes_from_crown_ibp_to_box():
    net, x, y = make("windows", dtype=torch.float64)
    m, box = (margin_lower_bounds(net, x, y, 0.05, r) for r in ("crown-ibp", "box"))
    for beta in (0.0, 0.3, 1.0):
        assert loss_at(net, x, y, 0.05, "crown-ibp", beta=beta) == pytest.approx(
            nn.functional.cross_entropy(-beta * m - (1 - beta) * box, y).item())
    assert loss_at(net, x, y, 0.05, "deeppoly", beta=0.3) == loss_at(net, x, y, 0.05, "deeppoly")


@pytest.mark.parametrize("relax", ["crown-ibp", "deeppoly"])
def test_the_slope_reaches_the_loss_and_the_table(relax):
    net, x, y = make("windows", dtype=torch.float64)
    values, rules = [], dict(adaptive=relaxations.adaptive, zero=relaxations.zero,
                             one=relaxations.one, parallel=relaxations.parallel)
    assert train.SETTINGS["slope"].limits == tuple(rules)
    for name, rule in rules.items():
        words = f"--relax {relax} --opt grad --slope {name} --regularize 0"
        config = train.parse_config(words.split())
        loss, = train.losses_of_step(net, x, y, config["eps"], config | dict(skip_stable=False))
        m = margin_lower_bounds(net, x, y, config["eps"], relax, slope=rule)
        values.append(nn.functional.cross_entropy(-m, y).item())
        theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
        assert loss(theta).item() == pytest.approx(values[-1])
        skip = dict(skip_stable=True) if relax == "deeppoly" else {}
        m = margin_lower_bounds(net, x, y, 0.1, relax, slope=rule, **skip)
        certified = train.evaluate(net, x, y, 0.1, slope=name)[relax]
        m[torch.arange(len(y)), y] = torch.inf
        assert certified.tolist() == (m.amin(1) > 0).tolist()
    assert len({round(v, 6) for v in values}) == 4


def test_certified_error_counts_and_only_pgpe_follows_it():
    net, x, _ = make("mlp", dtype=torch.float64, batch=40)
    y = torch.arange(40) % 4
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    margins = margin_lower_bounds(net, x, y, 0.1, "box")
    error = sum(any(m <= 0 for k, m in enumerate(row) if k != c)
                for row, c in zip(margins.tolist(), y.tolist())) / 40
    loss = train.robust_loss(net, x, y, 0.1, "box", loss="certified-error")
    assert 0.1 < error < 1 and loss(theta[None]).tolist() == [error]
    assert gls.gradient(loss, theta)[1].abs().max() == 0
    generator = torch.Generator().manual_seed(0)
    step = gls.pgpe(loss, theta, 0.05, 500, generator)[1]
    lower, _ = gls.smoothed_loss(loss, theta - 0.1 * step / step.norm(), 0.05, 4000, generator)
    value, deviation = gls.smoothed_loss(loss, theta, 0.05, 4000, generator)
    assert lower < value - 5 * deviation                               # downhill


def test_the_alpha_crown_loss_and_its_gradient():
    """Each hidden neuron sees one input: rows are linear in each slope, so that the ascent ends at
    0s and 1s, where holding the slopes fixed gives the true gradient (Danskin)."""
    net, x, y = make("windows", dtype=torch.float64)
    assert loss_at(net, x, y, 0.1, "alpha-crown") < loss_at(net, x, y, 0.1, "deeppoly")
    assert loss_at(net, x, y, 0.1, "alpha-crown", slope_steps=0) == pytest.approx(
        loss_at(net, x, y, 0.1, "deeppoly"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(9, 9, 1, groups=9), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3))
    net, x, y = net.double(), torch.rand(4, 9, 1, 1).double(), torch.tensor([0, 1, 2, 0])
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    loss = train.robust_loss(net, x, y, 0.2, "alpha-crown", slope_steps=40)
    assert loss(theta[None]) < loss_at(net, x, y, 0.2, "deeppoly") - 1e-4
    _, grad, _ = gls.gradient(loss, theta)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        d = torch.randn(len(theta), generator=generator, dtype=theta.dtype) * 1e-6
        slope = (loss((theta + d)[None]) - loss((theta - d)[None])).item() / 2
        assert slope == pytest.approx((grad @ d).item(), rel=1e-4)


def test_regularizers_by_hand():
    """Centres 3, 1, -1 (radius 1/2: two neurons active, one inactive), then 1, -1 with radius 2."""
    c = torch.tensor([[[3., 1., -1.]]])
    first = (c - .5, c + .5)
    # tightness: relu(.5 - .1/.5)/.5 = .6.  m = (4/3) / (1/3) = 4; mean 1, squares 4, 0, 4: v = 4/4
    # balance: relu(.5 - 1/4)/.5 + relu(.5 - 1)/.5 = .5
    assert train.regularizers([first], 0.1).item() == pytest.approx(1.1)
    wide = torch.tensor([[[1., -1.]]])
    # tightness: relu(.5 - .1/2)/.5 = .9; nothing is stable, so its balance is skipped, not 0/0
    both = train.regularizers([first, (wide - 2, wide + 2)], 0.1)
    assert both.item() == pytest.approx((.6 + .9) / 2 + .5 / 2)
    # tightness .6; no ratio is defined where no neuron is inactive, or where one has all the square
    for stable in (c + 3, torch.tensor([[[3., 3., 0., -1.]]])[..., :3]):
        assert train.regularizers([(stable - .5, stable + .5)], 0.1).item() == pytest.approx(.6)
    l = torch.zeros(1, 2, 3, requires_grad=True)           # dead: no width, and no gradient of it
    train.regularizers([(l, 0 * l)], 0.1).sum().backward()
    assert l.grad.tolist() == torch.zeros(1, 2, 3).tolist()
    for unit in (1e-15, 1e-8, 1e6):                                    # of the layer and the pixels
        assert train.regularizers([(unit * first[0], unit * first[1])],
                                  0.1 * unit).item() == pytest.approx(1.1)


def test_eps_schedule():
    e = [train.eps_at(t / 1000, 0.3) for t in range(1001)]
    steps = np.diff(e)
    assert e[0] == 0 and e[-1] == pytest.approx(0.3) and train.eps_at(7, 0.3) == pytest.approx(0.3)
    assert (steps > 0).all() and (np.diff(steps) > -1e-12).all()       # convex: no slope ever falls
    assert np.allclose(steps[250:], steps[-1]) and steps[249] == pytest.approx(steps[250], rel=0.02)
    assert train.eps_at(0.125, 1.0) / train.eps_at(0.25, 1.0) == pytest.approx(1 / 16)     # quartic


def test_sigma_step_by_hand():
    sigma, grad = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([2.0, -100.0, 100.0])
    step = train.adapt_sigma(sigma, grad, 0.1)                         # 0.5 - 0.1 * 0.25 * 2
    assert step.tolist() == pytest.approx([0.45, 0.6, 0.4])


# ----------------------------------------------------------- what a training step hands on, arrives


def test_the_ramp_and_the_settings_of_the_loss_arrive(tmp_path, monkeypatch):
    calls = arrivals(monkeypatch, train, "robust_loss")
    steps = steps_of_adam(monkeypatch)
    rows = train_on_noise(tmp_path, "--relax crown-ibp --beta 0.2 --opt grad --epochs 4 --ramp 2 "
                          "--regularize 0.5 --eps 0.3 --eps-train 0.2 --lr 0.01 --lr-decay 0.5 "
                          "--milestones 1 3 --kappa 0.3 --l1 1e-4 --alpha 0.7 --lam 0.9 "
                          "--slope-steps 2 --no-skip-stable")
    assert len(calls) == len(steps) == 12
    for i, (given, _) in enumerate(calls):
        eps = train.eps_at((i + 1) / 6, 0.2)           # of 6 steps; the first is the first of them
        full = eps / 0.2
        assert given["eps"] == pytest.approx(eps) and given["beta"] == pytest.approx(1 - 0.8 * full)
        assert given["regularize"] == pytest.approx(0.5 * (1 - full))
        assert (given["kappa"], given["l1"], given["alpha"], given["lam"], given["slope_steps"],
                given["skip_stable"]) == (0.3, 1e-4, 0.7, 0.9, 2, False)
        assert given["relax"] == "crown-ibp" and given["loss"] == "cross-entropy"
    assert 0 < calls[0][0]["eps"] < 0.01 and 0.9 < calls[0][0]["beta"] < 1
    assert [c["eps"] for c, _ in calls[5:]] == pytest.approx([0.2] * 7)
    assert [c["beta"] for c, _ in calls[5:]] == pytest.approx([0.2] * 7)
    assert [c["regularize"] for c, _ in calls[5:]] == pytest.approx([0.0] * 7)
    assert [lr for lr, _ in steps] == pytest.approx([0.01] * 3 + [0.005] * 6 + [0.0025] * 3)
    assert [r["lr"] for r in rows] == pytest.approx([0.01, 0.005, 0.005, 0.0025])
    assert [r["eps"] for r in rows] == pytest.approx([train.eps_at(0.5, 0.2), 0.2, 0.2, 0.2])


@pytest.mark.parametrize("words, eps", [("--eps-train 0", 0.0), ("--eps-train 0.2", 0.2)])
def test_without_a_ramp_or_a_radius_all_is_at_its_end(tmp_path, monkeypatch, words, eps):
    calls = arrivals(monkeypatch, train, "robust_loss")
    train_on_noise(tmp_path, f"--relax crown-ibp --beta 0.2 --opt grad --epochs 1 --ramp 0 {words}")
    for given, _ in calls:
        assert (given["eps"], given["regularize"]) == pytest.approx((eps, 0.0))
        assert given["beta"] == pytest.approx(0.2)


def test_the_regularisers_get_the_mean_radius_that_the_network_sees(monkeypatch):
    """Widths with eps 0.1: at 0 and at 1 half of the ball is cut off; normalisation divides by
    the standard deviation."""
    calls = arrivals(monkeypatch, train, "regularizers")
    norm, flat = nn.BatchNorm2d(1, eps=0.0, affine=False), nn.BatchNorm1d(4, eps=0.0, affine=False)
    learns = nn.BatchNorm2d(1, eps=0.0)
    for layer in (norm, flat, learns):
        layer.running_var.fill_(0.25)
    x = torch.tensor([[0., 0.5, 1., 0.5], [0.5] * 4]).view(2, 1, 2, 2)
    radius = sum([0.1, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]) / 8 / 2
    for first, factor in (([norm, nn.Flatten()], 2), ([nn.Identity(), norm, nn.Flatten()], 2),
                          ([nn.Flatten(), flat], 2), ([learns, nn.Flatten()], 1)):
        net = nn.Sequential(*first, nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        loss_at(net, x, torch.tensor([0, 1]), 0.1, "box", regularize=1.0)
        assert calls[-1][0]["radius"].item() == pytest.approx(factor * radius)


def test_a_network_without_relu_trains(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    before = net[1].weight.detach().clone()
    rows = train_on_noise(tmp_path, "--opt grad --epochs 2 --ramp 2 --regularize 0.5", net)
    assert rows[-1]["loss"] < 3 and not torch.equal(net[1].weight, before)


def test_the_log_averages_over_images_not_batches_and_anew_each_epoch(tmp_path, monkeypatch):
    numbers = iter([1., 2., 6., 3., 3., 3.])
    def step(net, theta, optimizer, sigma, *args, **options):
        n = next(numbers)
        return sigma, torch.tensor([n, n / 10, 10 * n])
    monkeypatch.setattr(train, "take_step", step)
    rows = train_on_noise(tmp_path, "--epochs 2")
    for row, mean in zip(rows, ((8 * 1 + 8 * 2 + 4 * 6) / 20, 3)):
        assert (row["loss"], row["certified"], row["gradient"]) == pytest.approx(
            (mean, mean / 10, 10 * mean))
    assert [r["epoch"] for r in rows] == [1, 2]


def test_each_epoch_sees_each_image_once_and_adam_a_clipped_gradient(tmp_path, monkeypatch):
    calls, steps = arrivals(monkeypatch, train, "take_step"), steps_of_adam(monkeypatch)
    rows = train_on_noise(tmp_path, "--opt grad --epochs 2 --clip 0.001")
    assert [norm for _, norm in steps] == pytest.approx([0.001] * 6, rel=1e-3)
    assert all(r["gradient"] > 0.01 for r in rows)                     # before clipping
    epochs = [torch.cat([given["x"] for given, _ in calls[i:i + 3]]) for i in (0, 3)]
    first, second = (sorted(map(tuple, x.flatten(1).tolist())) for x in epochs)
    assert first == second and len(set(first)) == 20 and not torch.equal(*epochs)


def test_the_evaluation_asks_each_relaxation_as_certification_does(monkeypatch):
    net, x, y = make("windows", dtype=torch.float32, batch=12)
    calls = arrivals(monkeypatch, train, "certified_margin")
    result = train.evaluate(net, x, y, 0.05)
    calls = [(given, bound) for given, bound in calls if given["x"] is x]     # not those in float64
    for (given, bound), (relax, options) in zip(calls, train.CERTIFY.items(), strict=True):
        expected = relax, 0.05, options | dict(slope="adaptive")
        assert (given["relax"], given["eps"], given["options"]) == expected
        assert torch.equal(result[relax], bound > 0)
    assert torch.equal(result["best"], result["box"] | result["crown-ibp"] | result["deeppoly"])
    assert train.CERTIFY["deeppoly"] == {"skip_stable": True}


@pytest.mark.parametrize("words, antithetic", [("", True), ("--no-antithetic", False)])
def test_rgs_gets_the_settings_asked_for(tmp_path, monkeypatch, words, antithetic):
    calls = arrivals(monkeypatch, gls, "rgs")
    train_on_noise(tmp_path, f"--opt rgs --samples 6 --sigma 0.02 --members 4 --epochs 1 {words}")
    for given, _ in calls:
        assert given["antithetic"] == antithetic and given["samples"] == 6
        assert given["sigma"].item() == pytest.approx(0.02) and given["chunk"] == 4


@pytest.mark.parametrize("adapt", ["fixed", "scalar", "parameter"])
def test_pgpe_gets_the_settings_asked_for_and_its_sigma_comes_back(tmp_path, monkeypatch, adapt):
    calls = arrivals(monkeypatch, gls, "pgpe")
    rows = train_on_noise(tmp_path, "--opt pgpe --samples 6 --sigma 0.02 --members 4 --epochs 1 "
                          f"--sigma-lr 0.5 --sigma-adapt {adapt}")
    sigma = torch.tensor(0.02)
    for given, (_, gradient, sigma_gradient) in calls:
        assert given["pairs"] == 3 and given["chunk"] == 4
        assert given["sigma"].shape == (gradient.shape if adapt == "parameter" else ())
        torch.testing.assert_close(given["sigma"], sigma.expand(given["sigma"].shape))
        assert (sigma_gradient is None) == (adapt == "fixed")
        if sigma_gradient is not None:
            sigma = train.adapt_sigma(given["sigma"], sigma_gradient, 0.5)
    assert rows[-1]["sigma"] == pytest.approx(sigma.mean().item())
    assert (rows[-1]["sigma"] == pytest.approx(0.02)) == (adapt == "fixed")


# -------------------------------------------------------------------------------- the command lines


@pytest.mark.parametrize("opt", ["grad", "rgs", "pgpe"])
@pytest.mark.parametrize("relax", RELAXATIONS)
def test_train_then_certify_finds_the_same_numbers(tmp_path, capsys, relax, opt):
    run = tmp_path / "run"
    extra = ["--samples", 8] if opt == "pgpe" else []
    assert command(train.main, "--relax", relax, "--opt", opt, "--out", run, "--eps", 0.03,
                   "--lr", 0.01, *QUICK, *extra) == 0
    printed = capsys.readouterr().out
    assert f"python certify.py {run}" in printed and set(p.name for p in run.iterdir()) == {
        "config.json", "log.csv", "checkpoint.pt", "evaluation.json"}
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0].split(",") == list(LOG) and len(lines) == 2
    assert json.loads((run / "config.json").read_text())["relax"] == relax
    assert command(certify.main, run, "--stages", *RELAXATIONS, "--restarts", 3) == 0
    again = capsys.readouterr().out
    number = lambda text, start: next(
        l for l in text.splitlines() if l.strip().startswith(start)).split()[-1]
    for ours, theirs in (("natural", "natural"), ("under attack", "not attacked"),
                         ("certified by the best", "certified up to deeppoly")):
        assert number(printed, ours) == number(again, theirs)
    rows = [json.loads(l) for l in next(run.glob("certify-*.jsonl")).read_text().splitlines()][1:]
    assert sorted(r["index"] for r in rows) == list(range(60))
    assert {r["status"] for r in rows} <= set(STATUSES)


def test_training_lowers_the_loss_and_certifies(tmp_path):
    run = tmp_path / "run"
    assert command(train.main, "--out", run, "--epochs", 6, "--subset", 600, "--eps", 0.03,
                   "--test-subset", 100) == 0
    net, config, _ = train.load_run(run)
    data = train.load_dataset("digits")
    low = train.certified_margin(net, data.x_test[:100], data.y_test[:100], 0.03, "deeppoly")
    assert (low > 0).float().mean() > 0.4                              # of 10 classes


@pytest.mark.parametrize("opt, extra", [
    ("rgs", []), ("pgpe", ["--samples", "4", "--sigma-adapt", "parameter"])])
def test_same_seed_same_weights(tmp_path, opt, extra):
    states = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(train.main, "--opt", opt, "--out", tmp_path / out, "--seed", seed,
                       *QUICK, *extra) == 0
        states.append(train.load_run(tmp_path / out)[0].state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_sigma_adapts_and_cnn7_and_own_data_train(tmp_path):
    npz(tmp_path / "own.npz")
    assert command(train.main, "--dataset", tmp_path / "own.npz", "--net", "cnn7", "--relax", "box",
                   "--opt", "pgpe", "--samples", 4, "--sigma-adapt", "scalar", "--epochs", 2,
                   "--kappa", 0.5, "--l1", 1e-6, "--out", tmp_path / "run") == 0
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[3]) != 0.01
    net, *_ = train.load_run(tmp_path / "run")
    assert net[1].running_mean.abs().max() > 0                         # BatchNorm has seen data
    assert command(certify.main, tmp_path / "run", "--restarts", 0,
                   "--stages", "box") == 0


@pytest.mark.parametrize("eps, kinds", [(0.1, {"misclassified", "certified"}),
                                        (0.6, {"misclassified", "attacked"})])
def test_certify_any_network_and_verdicts_add_up(eps, kinds):
    net, x, y = make("windows", dtype=torch.float32, batch=30)
    y[:5] = (y[:5] + 1) % 4
    verdicts = certify.certify(net, x, y, eps, timeout=1, batch=7)
    assert len(verdicts) == 30 and kinds <= {v.status for v in verdicts}
    assert all(v.status == "misclassified" for v in verdicts[:5])
    for v, a, b in zip(verdicts, x, y):
        if v.status == "certified":
            assert v.bound > 0 and v.stage in certify.STAGES
        if v.status == "attacked":
            assert v.bound <= 0 and net(v.counterexample[None]).argmax() != b
            assert (v.counterexample.double() - a.double()).abs().max() <= eps
    lines = certify.summary(verdicts, RELAXATIONS)
    assert "= 30 samples" in lines[-1]
    assert sum(int(part.split()[0]) for part in lines[-1].split("=")[0].split("+")) == 30
    with pytest.raises(ValueError):
        certify.certify(net, x, y, -1)


# ----------------------------------------------------------------------- complete certification
# Oracles without a solver: a piecewise linear function of one variable is smallest at one of its
# breakpoints; one with one hidden layer and two variables, at a vertex of the arrangement of the
# lines where a ReLU bends and of the edges of the box.

def rough_mlp(sizes, seed):
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    net = nn.Sequential(*layers).double().eval().requires_grad_(False)
    for layer in net[::2]:
        layer.weight *= 3
    return net


def smallest_margin_at(net, points, y):
    logits = net(points)
    return (logits[:, y, None] - logits).index_fill(1, torch.tensor([y]), torch.inf).min().item()


def minimum_on_a_line(net, x, y, eps):
    ends = torch.tensor([max(x.item() - eps, 0), min(x.item() + eps, 1)], dtype=torch.float64)
    for i, layer in enumerate(net):
        if isinstance(layer, nn.ReLU):           # its input is linear between neighbouring ends
            z = net[:i](ends[:, None])
            a, b = z[:-1], z[1:]
            cuts = ends[:-1, None] + a / (a - b) * (ends[1:] - ends[:-1])[:, None]
            ends = torch.cat([ends, cuts[a * b < 0]]).unique()
    return smallest_margin_at(net, ends[:, None], y)


def minimum_in_a_plane(net, x, y, eps):
    lo, hi = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    edges = torch.tensor([[1, 0, lo[0]], [1, 0, hi[0]], [0, 1, lo[1]], [0, 1, hi[1]]]).double()
    edges[:, 2] = torch.stack([lo[0], hi[0], lo[1], hi[1]])
    lines = torch.cat([torch.cat([net[0].weight, -net[0].bias[:, None]], 1), edges])  # a.v = c
    i, j = torch.triu_indices(len(lines), len(lines), 1)
    a, c = torch.stack([lines[i, :2], lines[j, :2]], 1), torch.stack([lines[i, 2], lines[j, 2]], 1)
    crossing = torch.linalg.det(a).abs() > 1e-12
    v = torch.linalg.solve(a[crossing], c[crossing])
    v = v[((v >= lo - 1e-9) & (v <= hi + 1e-9)).all(1)].clamp(lo, hi)
    return smallest_margin_at(net, v, y)


@pytest.mark.parametrize("sizes, oracle", [([1, 6, 6, 3], minimum_on_a_line),
                                           ([1, 4, 4, 4, 3], minimum_on_a_line),
                                           ([2, 8, 3], minimum_in_a_plane)])
def test_complete_verdicts_and_minimum_margins_equal_an_oracle(sizes, oracle):
    stages, statuses = set(), set()
    for seed in range(8):
        net, eps = rough_mlp(sizes, seed), (0.05, 0.2, 0.5)[seed % 3]
        unit = (1.0, 2.0 ** 20)[seed % 2]                  # of the logits
        net[-1].weight *= unit
        net[-1].bias *= unit
        x = torch.rand(15, sizes[0], dtype=torch.float64)
        y = net(x).argmax(1)
        minimum = [oracle(net, a, b, eps) for a, b in zip(x, y.tolist())]
        exact = certify.certify(net, x, y, eps, restarts=0, tolerance=1e-5 * unit)
        signs = certify.certify(deepcopy(net).float(), x.float(), y, eps, restarts=0)
        for v, w, m in zip(exact, signs, minimum):
            want = "certified" if m > 0 else "attacked"
            if abs(m) > 1e-6 * unit:                       # float32 inputs are not quite these
                assert v.status == w.status == want
            assert v.bound <= m + 1e-12 * unit and m <= v.bound + 1e-5 * unit
            assert w.bound <= m + 1e-5 * unit
            stages |= {v.stage, w.stage}
            statuses |= {v.status}
    assert statuses == {"certified", "attacked"} and "branch-and-bound" in stages


def biased(seed):
    """A float32 network with large biases that cancel: errors of 1e-4. The minimum of image 0 is 0,
    or up to 2e-5 below."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    net.eval().requires_grad_(False)
    for layer in net[::2]:
        layer.weight *= 4 + 4 * (seed % 2)
    net[2].bias += (30.0, 100.0, 300.0)[seed % 3]
    x, y, eps = torch.rand(6, 1), torch.zeros(6).long(), 0.5
    minimum = minimum_on_a_line(deepcopy(net).double(), x[0].double(), 0, eps)
    net[4].bias[0] -= minimum + (seed % 3) * 1e-5
    return net, x, y, eps


@pytest.mark.parametrize("seed", [36, 65, *range(6)])
def test_float32_networks_near_zero_are_settled_as_in_float64(seed):
    """No wrong certificate, and no false alarm about a contradiction."""
    net, x, y, eps = biased(seed)
    double = lambda: deepcopy(net).double()
    for stages in (["branch-and-bound"], certify.STAGES):
        verdicts = certify.certify(net, x, y, eps, restarts=1, stages=stages, timeout=5)
        for i, v in enumerate(verdicts):
            minimum = minimum_on_a_line(double(), x[i].double(), 0, eps)
            assert v.bound <= minimum + 1e-9
            if abs(minimum) > 1e-9:
                assert v.status in ("certified" if minimum > 0 else "attacked", "misclassified")


def test_ties_are_no_contradictions():
    found = []
    for seed in range(12):
        net = rough_mlp([1, 5, 3], seed)
        x = torch.rand(4, 1, dtype=torch.float64)
        y = net(x).argmax(1)
        net[2].bias[y[0]] -= minimum_on_a_line(net, x[0], int(y[0]), 0.3)      # now 0, or so
        x, y = x[y == y[0]], y[y == y[0]]
        for tolerance in (None, 1e-5):
            found += [v.status for v in certify.certify(net, x, y, 0.3, tolerance=tolerance)]
    assert "attacked" in found


def test_a_counterexample_contradicts_a_certificate_unless_both_are_a_tie():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().requires_grad_(False)
    for p, value in zip(net.parameters(), (1.0, -0.5, torch.tensor([[1.0], [0.0]]), 0.0)):
        p[:] = value                                       # the margin of class 0 is relu(x - 1/2)
    x, y = torch.tensor([[0.8]]).double(), torch.tensor([0])
    problem, node = random_subdomain(net, x, y, 0.4, 0)
    point = torch.tensor([[0.45]]).double()                # margin 0
    tree = certify.Tree(0, certify.Verdict("certified", "box", 1e-16), 1.0)
    certify.try_points(problem, point, [node], [tree])
    assert tree.verdict.status == "attacked" and (tree.verdict.counterexample == point[0]).all()
    tree = certify.Tree(0, certify.Verdict("certified", "box", 0.1), 1.0)
    with pytest.raises(certify.ContradictionError, match="a bound is unsound"):
        certify.try_points(problem, point, [node], [tree])


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("name", ["mlp", "windows", "batchnorm"])
def test_bounds_of_subdomains_are_sound_inside_and_halves_cover_the_whole(name, steps):
    net, x, y = make(name, batch=1)
    net.requires_grad_(False)
    eps, found = 0.2, 0
    points = in_ball(x, eps, 3000, torch.Generator().manual_seed(1)).flatten(0, 1)
    z = torch.cat([t.flatten(1) for t in relu_inputs(net, points)], 1)
    logits = net(points)
    for seed in range(30):
        problem, node = random_subdomain(net, x, y, eps, seed % 4, seed)
        margin = logits[:, y[0]] - logits[:, node.target]
        sub = certify.subdomains(problem, [node])
        low, slopes, multipliers = relaxations.subdomain_bounds(problem.network, sub, steps)
        inside = (z[:, node.neurons] * node.signs >= 0).all(1)
        assert (margin[inside] >= low - 1e-9).all()
        found += int(inside.sum())
        again = sub._replace(slopes=slopes, multipliers=multipliers)         # they give that bound
        assert torch.allclose(relaxations.subdomain_bounds(problem.network, again)[0], low)
        # Halves: no point of the whole is in neither, no bound is below that of the whole.
        node = node._replace(bound=low.item(), slopes=slopes[0],
                             multipliers=multipliers[0, node.neurons])
        free = [i for i in range(sub.l.shape[1]) if sub.l[0, i] < 0 < sub.u[0, i]]
        if free:
            halves = list(certify.halves(node, free[0]))
            sides = [(z[:, h.neurons] * h.signs >= 0).all(1) for h in halves]
            assert (sides[0] | sides[1])[inside].all() and not (sides[0] & sides[1] & ~inside).any()
            tree = certify.Tree(0, certify.Verdict(), 1.0)
            bounded = certify.raise_bounds(problem, problem, halves, [tree], steps)
            for half, side in zip(bounded, sides):
                assert half.bound >= low.item() and (margin[side] >= half.bound - 1e-9).all()
    assert found > 10000


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_settled_and_no_verdict_is_contradicted(name):
    net, x, y = make(name, batch=6)
    y = net(x).argmax(1)
    for eps in (0.03, 0.12):
        points = in_ball(x, eps, 500, torch.Generator().manual_seed(2))
        verdicts = certify.certify(net, x, y, eps, timeout=1, restarts=0)
        for i, v in enumerate(verdicts):
            margins = true_margins(net, points[:, i], y[i].expand(len(points)))
            worst = train.smallest(margins, y[i].expand(len(points))).min()
            assert v.bound <= worst + 1e-9 and (v.status != "certified" or worst > 0)
            if v.status == "attacked":
                assert (v.counterexample - x[i]).abs().max() <= eps + 1e-15
                assert train.forward_margin(net, v.counterexample[None], y[i:i + 1]) <= 0


def test_an_affine_network_and_one_with_nan_weights_are_settled_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.rand(20, 1, 2, 2, dtype=torch.float64)
    y = net(x).argmax(1)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            verdicts = certify.certify(net, x.clone(), y, 0.2, restarts=2)
            assert {v.status for v in verdicts} == {"certified", "attacked"}
    verdicts = certify.certify(net, x, y, 0.2, restarts=0)             # corners found by the roots
    assert {v.status for v in verdicts} == {"certified", "attacked"}
    net, x, y = make("mlp", batch=2)
    net[-1].bias.data[0] = torch.nan
    assert {v.status for v in certify.certify(net, x, y, 0.1)} == {"misclassified"}


def test_beta_by_hand():
    """The margin is z = x - 1/4 with x in [0, 1]: -1/4 at least, but 0 at least where z >= 0."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double().requires_grad_(False)
    net[0].weight[:], net[0].bias[:] = 1, torch.tensor([-0.25, 1.0])       # z = x - 1/4, x + 1
    net[2].weight[:] = torch.tensor([[0.0, 1.0], [0.0, 0.0]])              # margin: (x + 1) + bias
    net[2].bias[:] = torch.tensor([-1.25, 0.0])                            # = x - 1/4 = z
    x, y = torch.tensor([[0.5]]).double(), torch.tensor([0])
    problem, node = random_subdomain(net, x, y, 0.5, 0)
    def bound(sign, beta, steps=0):
        cut = node._replace(neurons=torch.tensor([0]), signs=torch.tensor([sign]).double(),
                            multipliers=torch.tensor([sign * beta]).double())
        sub = certify.subdomains(problem, [cut])
        return relaxations.subdomain_bounds(problem.network, sub, steps)[0].item()
    assert bound(1, 0.0) == pytest.approx(-0.25)           # min over x in [0, 1] of x - 1/4
    assert bound(1, 0.5) == pytest.approx(-0.125)          # of (x - 1/4)(1 - 1/2)
    assert bound(1, 1.0) == pytest.approx(0.0)             # the minimum where z >= 0
    assert bound(1, 3.0) == pytest.approx(-1.5)            # of -2 (x - 1/4): sound, too much of it
    assert bound(-1, 2.0) == pytest.approx(-0.75)          # of 3 (x - 1/4): f falls to -1/4 there
    assert bound(-1, -5.0) == pytest.approx(-0.25)         # a negative beta counts as 0
    assert -0.02 < bound(1, 0.0, steps=40) <= 0


def test_alpha_crown_is_never_looser_than_deeppoly_nor_branching_than_alpha_crown():
    tighter = 0
    for name in ("mlp", "windows", "batchnorm", "outgrown"):
        net, x, y = make(name, batch=4)
        with torch.no_grad():
            for skip in (False, True):
                low = {r: margin_lower_bounds(net, x, y, 0.1, r, skip_stable=skip)
                       for r in ("deeppoly", "alpha-crown")}
                boxes = {r: preactivation_bounds(net, x, 0.1, r, skip_stable=skip)
                         for r in ("deeppoly", "alpha-crown")}
                assert (low["alpha-crown"] >= low["deeppoly"]).all()
                tighter += int((low["alpha-crown"] > low["deeppoly"] + 1e-6).sum())
                (l, u), (a, b) = boxes["deeppoly"][0], boxes["alpha-crown"][0]
                assert (a >= l).all() and (b <= u).all()
        y = net(x).argmax(1)
        bounds = [[v.bound for v in certify.certify(net, x, y, 0.1, restarts=0, stages=stages,
                                                    tolerance=tolerance, timeout=0.5)]
                  for stages, tolerance in ((["deeppoly"], None), (certify.STAGES[:4], 1e-3),
                                            (certify.STAGES, 1e-3))]
        for deeppoly, alpha, branched in zip(*bounds):
            assert deeppoly <= alpha <= branched
    assert tighter > 20


@pytest.mark.parametrize("seed", [0, 1, 3])           # in 2 nothing is gained
def test_the_ascent_finds_the_best_slopes_by_brute_force(seed):
    """Two neurons see each pixel, and no two pixels meet: the bound of a margin is a sum over
    pixels, each the largest over a grid of the two slopes of the smaller value at the two ends."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.ReLU(),
                        nn.Flatten(), nn.Linear(10, 3)).double()
    net[1].weight.data *= 3
    x, y = torch.full((1, 5), 0.5).double(), torch.tensor([0])
    low = margin_lower_bounds(net, x, y, 0.4, "alpha-crown", steps=60)[0]
    grid, ends = torch.linspace(0, 1, 201).double()[:, None], torch.tensor([0.1, 0.9]).double()
    for k in (1, 2):
        c, parts = net[4].weight[0] - net[4].weight[k], []
        for j in range(10):                                            # (grid, ends) of each neuron
            z = net[1].weight[j, 0, 0] * ends + net[1].bias[j]
            l, u = z.min(), z.max()
            line = z.relu() if l >= 0 or u <= 0 else u * (z - l) / (u - l)
            is_free = bool(l < 0 < u and c[j] > 0)
            parts.append(c[j] * (grid * z if is_free else line.expand(201, 2)))
        best = sum((parts[j][:, None] + parts[j + 1]).amin(-1).max() for j in range(0, 10, 2))
        best = best + net[4].bias[0] - net[4].bias[k]
        assert low[k].item() == pytest.approx(best.item(), abs=2e-3)
    assert (low[1:] > margin_lower_bounds(net, x, y, 0.4)[0, 1:] + 0.01).any()


def test_alpha_crown_of_a_population_equals_a_loop():
    nets = [make("windows", seed)[0] for seed in range(2)]
    _, x, y = make("windows", 0)
    params, buffers = torch.func.stack_module_state(nets)
    options = dict(relax="alpha-crown", skip_stable=True, steps=3)
    with torch.no_grad():
        loop = torch.stack([margin_lower_bounds(n, x, y, 0.1, **options) for n in nets])
        for memory in (None, 1, 60_000):
            stacked = margin_lower_bounds(nets[0], x, y, 0.1, params={**params, **buffers},
                                          memory=memory, **options)
            torch.testing.assert_close(stacked, loop, atol=1e-10, rtol=1e-10)


def test_alpha_crown_is_sound_for_intermediate_bounds_too():
    for name in NETS:
        net, x, y = make(name)
        points = in_ball(x, 0.15, 100, torch.Generator().manual_seed(0))
        with torch.no_grad():
            bounds = preactivation_bounds(net, x, 0.15, "alpha-crown", skip_stable=True, steps=10)
            low = margin_lower_bounds(net, x, y, 0.15, "alpha-crown", steps=10)
        for p in points:
            for (l, u), z in zip(bounds, relu_inputs(net, p)):
                assert ((z >= l - 1e-9) & (z <= u + 1e-9)).all()
            assert (true_margins(net, p, y) >= low - 1e-9).all()


def one_neuron(weight, bias, out, out_bias, dtype=torch.float64):
    """z = weight x + bias, and logits out relu(z) + out_bias of a single pixel x."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, len(out))).to(dtype).eval()
    with torch.no_grad():
        net[0].weight[:], net[0].bias[:] = weight, bias
        net[2].weight[:, 0], net[2].bias[:] = torch.tensor(out), torch.tensor(out_bias)
    return net.requires_grad_(False)


def test_images_that_carry_a_gradient_leave_none_in_a_verdict():
    net, x, y = make("windows", dtype=torch.float32, batch=9)
    plain, tracked = (certify.certify(net, images, y, 0.6, stages=["deeppoly"])
                      for images in (x, x.clone().requires_grad_()))
    assert "attacked" in {v.status for v in plain}
    for v, w in zip(plain, tracked, strict=True):
        assert (v.status, v.stage) == (w.status, w.stage)
        assert w.counterexample is None or not w.counterexample.requires_grad


def test_a_case_that_only_the_ascent_certifies():
    """z = 1.1 x - 1/2 in [-0.5, 0.6], so DeepPoly's lower line is z; the best one is 0. The margin
    relu(z) + 1 is positive with both, and relu(z) + 0.1 with the best only: neither may the ascent
    be left out, nor stop as soon as one of the two is positive."""
    net = one_neuron(1.1, -0.5, [1.0, 0.0, 0.0], [0.0, -1.0, -0.1])
    x, y = torch.tensor([[0.5]]).double(), torch.tensor([0])
    run = lambda *stages: certify.certify(net, x, y, 0.5, stages=stages, restarts=0)[0]
    assert run("deeppoly").status == "unknown"
    assert run("deeppoly").bound == pytest.approx(-0.4)
    v = run("alpha-crown")
    assert (v.status, v.stage) == ("certified", "alpha-crown") and 0 < v.bound <= 0.1


def test_a_margin_of_exactly_zero_is_no_certificate():
    net = one_neuron(1.0, -0.5, [1.0, 0.0], [0.0, 0.0], torch.float32)     # relu(x - 1/2)
    x, y = torch.tensor([[0.75], [0.25]]), torch.tensor([0, 0])
    for stages in ([], certify.STAGES):
        found, already = certify.certify(net, x, y, 0.5, stages=stages, restarts=1)
        assert (found.status, found.stage) == ("attacked", "attack")
        assert train.forward_margin(net, found.counterexample[None], y[:1]) == 0
        assert (already.status, already.stage) == ("misclassified", "forward")
    table = {name: hits.tolist() for name, hits in train.evaluate(net, x, y, 0.5).items()}
    assert table == dict.fromkeys(table, [False, False]) | dict(natural=[True, False])


@pytest.mark.parametrize("seed", range(6))
def test_a_tolerance_is_kept_in_float64_whatever_the_network_is_in(seed):
    net, x, y, eps = biased(seed)
    for v, pixel in zip(certify.certify(net, x, y, eps, restarts=0, tolerance=1e-7), x):
        minimum = minimum_on_a_line(deepcopy(net).double(), pixel.double(), 0, eps)
        if v.status != "misclassified":
            assert v.bound <= minimum + 1e-10 and minimum <= v.bound + 1e-7


def test_a_cut_neuron_is_bounded_by_zero_on_its_side_and_others_are_left_alone():
    net, x, y = make("windows", batch=1)
    problem, node = random_subdomain(net.requires_grad_(False), x, y, 0.2, 4)
    node = node._replace(signs=torch.tensor([1.0, -1, -1, 1]).double())
    sub = certify.subdomains(problem, [node, node._replace(signs=-node.signs)])
    l, u = problem.l.repeat(2, 1), problem.u.repeat(2, 1)
    for j, sign in zip(node.neurons.tolist(), node.signs.tolist()):
        active, other = (0, 1) if sign > 0 else (1, 0)
        assert l[0, j] < 0 < u[0, j]                       # z >= 0 on one side, z <= 0 on the other
        l[active, j], u[other, j] = 0, 0
        assert sub.signs[active, j] == 1 and sub.signs[other, j] == -1
    assert torch.equal(sub.l, l) and torch.equal(sub.u, u)
    assert (sub.signs != 0).sum() == 8


def test_a_certified_and_attacked_sample_aborts(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert command(train.main, "--out", run, "--eps", 0.5, "--eps-train", 0, *QUICK,
                   "--epochs", 4, "--lr", 0.01) == 0
    sound = margin_lower_bounds                                        # plant an unsound bound
    planted = lambda net, x, y, eps, *a, **k: sound(net, x, y, eps, *a, **k) + 1e3 * (eps > 0)
    for module in (train, certify):
        monkeypatch.setattr(module, "margin_lower_bounds", planted)
    assert command(certify.main, run, "--stages", *RELAXATIONS) == 1
    error = capsys.readouterr().err
    assert "a bound is unsound" in error
    witness = np.load(re.search(r"counterexample is in (\S+)", error)[1])
    assert witness.shape == (1, 8, 8)
    net, *_ = train.load_run(run)
    data = train.load_dataset("digits")
    with pytest.raises(AssertionError, match="both certified and attacked"):
        train.evaluate(net, data.x_test[:60], data.y_test[:60], 0.5)


def test_a_loss_that_explodes_stops_the_run(tmp_path, capsys):
    code = command(train.main, "--relax", "box", "--opt", "grad", "--lr", "1e30",
                   "--out", tmp_path / "run", *QUICK)
    err = capsys.readouterr().err
    assert code == 1 and "Try a smaller --lr" in err
    assert re.search(r"epoch 1, batch \d, eps 0.1: .*the bounds before layer 3 \(ReLU\(\)\)", err)
    assert train.load_run(tmp_path / "run")                            # the one before it is whole
    within = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    net = nn.Sequential(nn.Flatten(), within, nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    within[0].weight.data.fill_(1e38)
    with pytest.raises(FloatingPointError, match=r"the bounds before layer 1.1 \(ReLU\(\)\)"):
        train.fit(net, torch.ones(2, 1, 2, 2), [0, 1], relax="box", opt="grad", epochs=1, eps=1)
