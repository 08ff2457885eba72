"""Every claim the other files make, checked. Run: pytest (about 5 minutes on 2 CPU cores).

Oracles are independent of the code under test: hand-computed numbers, brute force, closed forms,
finite differences, or slow_bounds below, a DeepPoly that anybody can check line by line.
"""
import ast
import inspect
import itertools
import json
import math
import re
import sys
from copy import deepcopy
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import certify
import gls
import relaxations
import train
from plumbing.data import CIFAR_STATISTICS, Dataset
from plumbing.for_tests import (NETS, QUICK, QUICK_RUN, command, in_ball, make, npz, random_bn,
                                true_margins)
from plumbing.processes import members_at_once
from plumbing.runs import LOG
from plumbing.verdicts import STATUSES
from relaxations import margin_lower_bounds, preactivation_bounds

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import self_check                                                                  # noqa: E402

torch.set_num_threads(1)     # tiny networks: a second thread only spins


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


RELAXATIONS = relaxations.RELAXATIONS[:3]     # alpha-crown, which is slow, has tests of its own


# ---------------------------------------------------------------------------------- networks to try

def relu_inputs(net, x):
    """The input of each ReLU, by running the network."""
    found = []
    for layer in flat(net):
        if isinstance(layer, nn.ReLU):
            found.append(x)
        x = layer(x)
    return found


def flat(net):
    """Its layers, those of nested ones too."""
    return [layer for layer in net.modules() if not isinstance(layer, nn.Sequential)]


def slow_bounds(net, x, y, eps, crown_ibp=False):
    """Textbook DeepPoly (or CROWN-IBP) of one image, neuron by neuron: pre-activations and margins.

    Dense matrices of layers between ReLUs come from differentiating them; all else is spelt out.
    """
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


@pytest.mark.fast_path
def test_margins_of_many_classes_equal_the_heart_and_cost_in_proportion(monkeypatch):
    """Also those of a last stage without, or with several, layers, and one that is a map."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    x = torch.rand(6, 1, 4, 4).double()
    start = lambda *rest: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *rest).double()
    nets = [start(nn.Flatten(), nn.Linear(48, 40)), start(nn.Flatten()),
            start(nn.Flatten(), nn.Linear(48, 9), nn.Linear(9, 40)),
            start(nn.Conv2d(3, 3, 2), nn.ReLU(), nn.Conv2d(3, 9, 2), nn.Flatten())]
    for net, relax in itertools.product(nets, RELAXATIONS):
        y = torch.arange(6)
        found = []
        for fast in (True, False):
            monkeypatch.setattr(relaxations, "FAST", fast)
            low = margin_lower_bounds(net, x, y, 0.1, relax)
            grads = torch.autograd.grad(low.logsumexp(-1).sum(), list(net.parameters()))
            found.append([low, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))
    monkeypatch.setattr(relaxations, "FAST", True)
    for relax in RELAXATIONS:
        flops = []
        for K in (50, 500):
            net = start(nn.Flatten(), nn.Linear(48, K))
            with FlopCounterMode(display=False) as counter:
                margin_lower_bounds(net, x, torch.arange(6), 0.1, relax).sum().backward()
            flops.append(counter.get_total_flops())
        assert flops[1] < 12 * flops[0]


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


def test_the_heart_names_nothing_from_below_it_and_has_150_lines():
    source = Path(relaxations.__file__).read_text()
    marks = [m.start() for m in re.finditer("^# =====", source, re.M)]
    heart, below = source[marks[0]:marks[1]], source[marks[1]:]
    defined = re.findall(r"^(?:def |class )(\w+)", below, re.M)
    defined += re.findall(r"^(\w+) =", below, re.M)
    names = {node.id for node in ast.walk(ast.parse(heart)) if isinstance(node, ast.Name)}
    assert not names & set(defined)
    assert "lower_bound" in heart and len(heart.strip().splitlines()) <= 150
    assert source[marks[3]:].startswith("# =") and "the same numbers, faster" in source[marks[3]:]


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


@pytest.mark.fast_path
@pytest.mark.parametrize("skip", [False, True])
def test_the_memory_budget_bounds_the_peak(skip):
    from torch.distributed._tools.mem_tracker import MemTracker    # private: not in every version
    torch.manual_seed(0)
    wide = lambda i: (nn.Conv2d(i, 4, 3, padding=1), nn.ReLU())    # its rows see much of the maps
    convs = nn.Sequential(*wide(1), *wide(4), *wide(4), nn.Flatten(), nn.Linear(400, 10))

    def peak(net, x, memory):
        with MemTracker() as tracker:
            low = margin_lower_bounds(net, x, torch.arange(8), 0.3, "deeppoly", None, skip,
                                      memory=memory)
            low.logsumexp(-1).sum().backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    for net, x, low, high in (
            (train.build_network("cnn3", (1, 28, 28), 10), torch.rand(8, 1, 28, 28), 24, 25),
            (convs, torch.rand(8, 1, 10, 10), 23, 23)):
        assert peak(net, x, 2 ** low) < 2 ** low <= 2 ** high < peak(net, x, None) < 2 ** 31


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


def test_gradient_is_finite_where_bounds_are_zero():
    net = train.build_network("cnn3", (1, 8, 8), 10)
    for p in net.parameters():
        if p.dim() == 1:
            p.data.zero_()
    for relax in RELAXATIONS:        # black images, eps 0 and zero biases: l = u = 0 everywhere
        net.zero_grad()
        low = margin_lower_bounds(net, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), 0.0, relax)
        low.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


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
@pytest.mark.parametrize("dense", [True, False])
def test_convolutions_as_matrices_or_not_give_the_same(name, dense, monkeypatch):
    net, x, y = make(name)
    params = {k: torch.stack([v, 1.1 * v]) for k, v in net.named_parameters()}
    for options in (dict(), dict(skip_stable=True), dict(params=params), dict(relax="crown-ibp")):
        with monkeypatch.context() as patch:
            low = margin_lower_bounds(net, x, y, 0.1, **options)
            patch.setattr(relaxations, "is_dense", lambda op, size: dense)
            torch.testing.assert_close(low, margin_lower_bounds(net, x, y, 0.1, **options))


def test_transposed_convolution_and_its_gradient():
    """Against PyTorch's own, in blocks too: few channels, and a stride or an even map."""
    for O, C, k, s, p, d, groups, size in [
            (2, 1, 5, 2, 2, 1, 1, (10, 12)), (3, 2, 4, 2, 1, 1, 1, (9, 8)),
            (2, 1, 3, 3, 0, 1, 1, (11, 9)), (2, 3, 2, 3, 1, 1, 1, (7, 8)),
            (4, 1, 5, 2, 3, 1, 2, (8, 9)), (2, 3, 5, 4, 4, 1, 1, (13, 12)),
            (2, 5, 3, 2, 1, 1, 1, (8, 8)), (2, 1, 3, 2, 1, 2, 1, (9, 9)),
            (6, 2, 3, 1, 1, 1, 3, (6, 7)), (6, 2, 3, 1, 1, 1, 3, (6, 8)),
            (2, 3, 3, 1, 2, 1, 1, (6, 4)), (2, 1, 4, 1, 0, 1, 1, (8, 6)),
            (3, 2, 1, 1, 0, 1, 1, (4, 4))]:
        size_out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in size]
        A = torch.randn(2, O * groups, *size_out, dtype=torch.float64, requires_grad=True)
        W = torch.randn(O * groups, C, k, k, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, C * groups, *size, dtype=torch.float64)
        options = size, (s, s), (p, p), (d, d), groups
        ours = relaxations.conv_transpose(A, W, *options)
        adjoint = (nn.functional.conv2d(x, W, None, s, p, d, groups) * A).sum()     # <Wx, A>
        torch.testing.assert_close((ours * x).sum(), adjoint)                       # = <x, W'A>
        ours, grads = (torch.autograd.grad(t, (A, W)) for t in ((ours * x).sum(), adjoint))
        torch.testing.assert_close(ours, grads)


def test_windows_on_the_map():
    """take cuts windows out of a map, spread puts them back: loops over the positions."""
    view = relaxations.View((2, 4, 5), (2, 6), (3, 2), (2, 1), (1, 1))         # C, H, W = 2, 4, 5
    t = torch.arange(1., 41).view(1, 1, 40)                                    # in order H, W, C
    padded = nn.functional.pad(t.view(4, 5, 2), (0, 0, 1, 1, 1, 1))
    seen = view.take(t)                                                        # (1, 1, G, 1, Q)
    for g, (i, j) in enumerate((i, j) for i in range(2) for j in range(6)):
        assert seen[0, 0, g, 0].tolist() == padded[2 * i:2 * i + 3, j:j + 2].flatten().tolist()
    back, d = view.spread(seen, torch.arange(12.).view(1, 1, 12, 1))           # (1, 1, 1, G, N)
    assert ((back[0, 0, 0] == t[0]) | (back[0, 0, 0] == 0)).all()
    assert (back != 0).sum() == (seen != 0).sum() and d.flatten().tolist() == list(range(12))
    samples, positions = torch.tensor([[0, 0]]), torch.tensor([[7, 3]])        # picked: the same
    picked = view._replace(sample=samples, position=positions)
    assert torch.equal(picked.take(t)[0, :, 0], seen[0, 0, [7, 3]])
    assert torch.equal(picked.spread(picked.take(t), torch.zeros(1, 2, 1, 1))[0][0, :, 0],
                       back[0, 0, 0, [7, 3]][:, None])


def test_the_trace_is_in_the_order_of_the_input():
    """Its first entry is the gradient of the bound with respect to the whole box."""
    net, x, y = make("batchnorm")
    network, box = relaxations.prepare(net, x, 0.1, "deeppoly", None)
    pairs = [[t.detach().flatten(1) for t in p] for p in preactivation_bounds(net, x, 0.1)]
    l, u = (torch.cat(t, 1) for t in zip(*pairs))
    box = [t.detach().requires_grad_() for t in box]
    rows = torch.eye(net(x).shape[1], dtype=x.dtype)[y]
    zero, trace = torch.zeros_like(l), []
    sub = relaxations.Subdomains([p[0].shape[1] for p in pairs], rows, box, l, u, zero, zero, zero)
    low = relaxations.subdomain_bounds(network, sub, trace=trace)[0]
    grads = torch.autograd.grad(low.sum(), box)
    torch.testing.assert_close(trace[0], (grads[0] + grads[1])[0])


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


def test_settings_that_nobody_uses_are_bounded_or_refused(monkeypatch):
    """A variance below zero, weights of another size than the layer says, a single logit."""
    torch.manual_seed(0)
    norm = random_bn(4, nn.BatchNorm1d)
    norm.running_var.fill_(-0.9 * norm.eps)
    layers = nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, (1, 3)), nn.ReLU(), nn.Flatten()
    layers[1].weight = nn.Parameter(torch.randn(2, 1, 3, 1))
    nets = [nn.Sequential(nn.Linear(16, 4), norm, nn.ReLU(), nn.Linear(4, 3)).eval(),
            nn.Sequential(*layers, nn.Linear(16, 3)), nn.Sequential(*layers, nn.Linear(16, 1))]
    x, y = torch.rand(3, 16).double(), torch.zeros(3).long()
    generator = torch.Generator().manual_seed(0)
    for net in nets:
        points = in_ball(x, 0.1, 50, generator)
        true = torch.stack([true_margins(net.double(), p, y) for p in points])
        for fast, relax in itertools.product((True, False), RELAXATIONS):
            monkeypatch.setattr(relaxations, "FAST", fast)
            low = margin_lower_bounds(net, x, y, 0.1, relax)
            assert low.shape == true.shape[1:] and (true >= low - 1e-9 * (1 + low.abs())).all()


def test_weights_of_any_scale_give_no_false_certificate():
    """relu(s z) / s, for s where sums under- or overflow: the margin is -0.49 at a corner."""
    for dtype, scales in ((torch.float64, (1e-33, 1e-300, 1e160, 1.7e308)),
                          (torch.float32, (1e-33, 1e-37, 2e38))):
        for s in scales:
            net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).to(dtype)
            values = [[.99 * s, -.99 * s]], [0.], [[0.], [1 / s]], [.5, 0.]
            for p, v in zip(net.parameters(), values):
                p.data = torch.tensor(v, dtype=dtype)
            x, y = torch.full((1, 2), .5, dtype=dtype), torch.tensor([0])
            for relax in RELAXATIONS:
                low = margin_lower_bounds(net, x, y, .5, relax)
                assert not low[0, 1] > -0.48


def test_an_overflow_inside_gives_no_false_certificate():
    """relu(3e38 (x1 + x2 + x3)) is infinite in float32, its lower bound inf - inf: not a number."""
    net = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2))
    for p, v in zip(net.parameters(), ([[3e38, 3e38, 3e38]], [0.], [[0.], [1.]], [.5, 0.])):
        p.data = torch.tensor(v)
    for relax in RELAXATIONS:
        low = margin_lower_bounds(net, torch.full((1, 3), .9), torch.tensor([0]), .8, relax)
        assert not low[0, 1] > 0


@pytest.mark.parametrize("fast", (True, False))
@pytest.mark.parametrize("hidden", (True, False))
def test_an_overflow_of_a_partial_sum_is_no_bound(hidden, fast, monkeypatch):
    """In float32, s (x1 + x2 - x3 - x4 - x5) is infinite, with the sign of the first two terms."""
    monkeypatch.setattr(relaxations, "FAST", fast)
    s = torch.tensor([3e38, 3e38, -3e38, -3e38, -3e38])
    net, values = nn.Sequential(nn.Linear(5, 2)), [torch.stack([s, 0 * s]), torch.zeros(2)]
    if hidden:
        net = nn.Sequential(nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 2))
        values = [-s[None], torch.zeros(1), torch.tensor([[-1e-38], [0.]]), torch.tensor([1., 0.])]
    for p, v in zip(net.parameters(), values):
        p.data = v
    x, y = torch.full((1, 5), .9), torch.tensor([0])
    assert true_margins(deepcopy(net).double(), x.double(), y)[0, 1] < 0
    for relax in RELAXATIONS:
        assert not margin_lower_bounds(net, x, y, .001, relax)[0, 1] > 0
    assert not train.evaluate(net, x, y, .001)["best"].any()


def test_no_bound_depends_on_the_rest_of_the_batch():
    for name in NETS:                # mostly unstable images take another path than stable ones
        net, x, y = make(name, batch=4)
        eps = torch.tensor([0.001, 0.01, 0.1, 0.5]).double().view(-1, *[1] * (x.dim() - 1))
        for relax, skip in (("box", False), ("deeppoly", False), ("deeppoly", True)):
            def bounds(i):
                pairs = preactivation_bounds(net, x[i], eps[i], relax, skip_stable=skip)
                margins = margin_lower_bounds(net, x[i], y[i], eps[i], relax, skip_stable=skip)
                return [margins, *(t for pair in pairs for t in pair)]
            alone = [bounds(slice(i, i + 1)) for i in range(4)]
            for together, apart in zip(bounds(slice(None)), zip(*alone)):
                torch.testing.assert_close(together, torch.cat(apart), atol=1e-12, rtol=1e-12)


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


@pytest.mark.fast_path
def test_subdomains_are_bounded_alike_by_both(monkeypatch):
    for name in NETS:
        net, x, y = make(name)
        network, box = relaxations.prepare(net, x, 0.1, "deeppoly", None)
        pairs = [[t.detach().flatten(1) for t in p] for p in preactivation_bounds(net, x, 0.1)]
        l, u = (torch.cat(t, 1) for t in zip(*pairs))
        generator = torch.Generator().manual_seed(0)
        random = lambda: torch.rand(l.shape, generator=generator, dtype=l.dtype)
        signs = ((random() < 0.2) & (l < 0) & (u > 0)) * torch.where(random() < 0.5, -1.0, 1.0)
        rows = torch.eye(net(x).shape[1], dtype=x.dtype)[y]
        sub = relaxations.Subdomains(
            [p[0].shape[1] for p in pairs], rows, box, l.masked_fill(signs > 0, 0),
            u.masked_fill(signs < 0, 0), signs.to(l), random(), signs * random())
        found = []
        for fast in (True, False):
            monkeypatch.setattr(relaxations, "FAST", fast)
            trace = []
            low = relaxations.subdomain_bounds(network, sub, trace=trace)
            found.append([*low, *trace, *relaxations.subdomain_bounds(network, sub, steps=3)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_labels_of_any_integer_type_and_inference_mode():
    net, x, y = make("windows")
    expected = margin_lower_bounds(net, x, y, 0.1)
    for labels in (y.to(torch.uint8), y.to(torch.int16), y.tolist()):
        assert torch.equal(margin_lower_bounds(net, x, labels, 0.1), expected)
    relaxations.seen_cells.cache_clear()
    with torch.inference_mode():
        margin_lower_bounds(net, x, y, 0.1)
        with pytest.raises(ValueError, match="no_grad"):
            margin_lower_bounds(net, x, y, 0.1, "alpha-crown")
    with torch.no_grad():
        margin_lower_bounds(net, x, y, 0.1, "alpha-crown")
    margin_lower_bounds(net, x, y, 0.1).sum().backward()               # what was cached serves too


def test_a_network_with_nan_weights_is_never_certified():
    for name in NETS:
        for layer in range(2, 9):
            net, x, y = make(name)
            if layer < len(net) and getattr(net[layer], "weight", None) is not None:
                net[layer].weight.data.flatten()[0] = math.nan
                for relax in RELAXATIONS:
                    low = margin_lower_bounds(net, x, y, 0.01, relax)
                    assert not (train.smallest(low, y) > 0).any()


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


def points_seen(estimator, losses, D, dtype=torch.float64):
    """What each of so many losses is given, with theta = 0: [(P, D), ...], a call after another."""
    seen = [[] for _ in range(losses)]
    def watch(points):
        return lambda thetas: (points.append(thetas.detach().clone()), thetas.sum(1))[1]
    estimator([watch(points) for points in seen], torch.zeros(D, dtype=dtype), 0.1,
              generator=torch.Generator().manual_seed(0))
    return seen


@pytest.mark.parametrize("chunk, sizes", [(None, [8]), (1, [1] * 8), (3, [2] * 4), (4, [4, 4])])
def test_pgpe_evaluates_the_pairs_asked_for(chunk, sizes):
    calls, = points_seen(partial(gls.pgpe, pairs=4, chunk=chunk), 1, 3)
    assert [len(points) for points in calls] == sizes
    points = {tuple(p.tolist()) for p in torch.cat(calls)}
    assert len(points) == 8 and points == {tuple(-v for v in p) for p in points}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [5, 16, 37])          # 16 numbers or more are drawn by other code
def test_the_noise_depends_neither_on_chunks_nor_on_processes(D, dtype, monkeypatch):
    """Bit by bit; of many processes, each evaluates other pairs, and together all."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: None)
    seen = lambda **k: {tuple(p.tolist()) for calls in points_seen(
        partial(gls.pgpe, pairs=6, **k), 2, D, dtype) for points in calls for p in points}
    whole = seen()
    assert len(whole) == 12
    assert all(seen(chunk=chunk) == whole for chunk in (1, 2, 3, 4, 6, 12))
    for chunk in (2, 4, None):
        shares = [seen(chunk=chunk, shard=(rank, 2)) for rank in range(2)]
        assert shares[0] | shares[1] == whole and len(shares[0]) + len(shares[1]) == 12


def test_pgpe_sums_over_the_noise_that_it_evaluated():
    """A loss a.t has the estimate 1/n sum_i (a.eps_i) eps_i, of the very eps_i that it saw."""
    for dtype, D in ((torch.float32, 37), (torch.float64, 5)):
        a, seen = torch.arange(D).to(dtype), []
        loss = lambda t: (seen.append(t.clone()), t @ a)[1]
        grad = gls.pgpe(loss, torch.zeros(D, dtype=dtype), 0.5, 6, torch.Generator(), chunk=4)[1]
        eps = torch.cat([points[:len(points) // 2] for points in seen]) / 0.5
        torch.testing.assert_close(grad, (eps @ a) @ eps / 6)


def test_pgpe_holds_the_noise_of_a_chunk_only():
    """At most 5.5 vectors beside theta and one perturbed copy: 110 MB for 5 million float32."""
    from torch.distributed._tools.mem_tracker import MemTracker    # private: not in every version
    theta, generator = torch.zeros(50_000), torch.Generator()
    with MemTracker() as tracker:
        gls.pgpe(lambda t: t.sum(1), theta, torch.tensor(0.1), 64, generator, chunk=2)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert theta.nbytes < peak <= (2 + 5.5) * theta.nbytes


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


def test_each_part_sees_as_many_samples_and_both_signs_of_a_pair_if_it_can():
    for chunk in (None, 1, 3):
        by_pgpe = [torch.cat(calls) for calls in points_seen(
            partial(gls.pgpe, pairs=6, chunk=chunk), 3, 4)]
        by_rgs = [torch.cat(calls) for calls in points_seen(
            partial(gls.rgs, samples=12, antithetic=True, chunk=chunk), 3, 4)]
        for points in (*by_pgpe, *by_rgs):
            points = {tuple(p.tolist()) for p in points}
            assert len(points) == 4 and points == {tuple(-v for v in p) for p in points}
        for seen in (by_pgpe, by_rgs):
            assert len({tuple(p.tolist()) for p in torch.cat(seen)}) == 12
    (plus,), (minus,) = points_seen(partial(gls.rgs, samples=2, antithetic=True), 2, 4)
    assert torch.equal(plus, -minus) and len(plus) == 1


def test_equal_parts_give_what_one_loss_gives():
    theta, loss = torch.randn(5, dtype=torch.float64), lambda t: t.square().sum(1).sin()
    for estimator in (partial(gls.pgpe, pairs=6), partial(gls.rgs, samples=6),
                      partial(gls.smoothed_loss, samples=12)):
        whole, parts = (estimator(losses, theta, 0.2, generator=torch.Generator().manual_seed(3))
                        for losses in (loss, [loss] * 3))
        for a, b in zip(whole, parts):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12)


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


@pytest.mark.parametrize("estimator", [
    lambda *a, **k: gls.pgpe(*a, 6, **k), lambda *a, **k: gls.rgs(*a, 6, **k),
    lambda *a, **k: gls.rgs(*a, 6, antithetic=True, **k),
    lambda *a, **k: gls.smoothed_loss(*a, 6, **k)])
def test_estimators_leave_theta_alone_and_do_not_depend_on_chunks(estimator):
    theta, sizes = torch.randn(5, dtype=torch.float64), []

    def loss(t):
        sizes[-1] = max(sizes[-1], len(t))
        return t.square().sum(1).sin()

    before, results = theta.clone(), []
    for chunk in (None, 1, 4):
        sizes.append(0)
        results.append(estimator(loss, theta, 0.2, generator=torch.Generator().manual_seed(3),
                                 chunk=chunk))
    assert torch.equal(theta, before) and not theta.requires_grad
    assert sizes[0] > 4 and sizes[1:] == [1, 4]                         # the most at once
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12)


def test_members_run_at_once_change_rounding_only(tmp_path):
    runs = [tmp_path / members for members in ("auto", "1", "3")]
    for opt, run in ((opt, run) for opt in ("rgs", "pgpe") for run in runs):
        words = [] if run.name == "auto" else ["--members", run.name]
        train.main([*QUICK_RUN.split(), "--opt", opt, "--samples", "4", *words, "--out",
                    str(run / opt)])
    for opt in ("rgs", "pgpe"):
        (auto, config, _), *others = (train.load_run(run / opt) for run in runs)
        assert config["members"] > 1
        for other, _, _ in others:
            for a, b in zip(auto.parameters(), other.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert members_at_once(auto, config | dict(batch_size=10 ** 4)) == 1
    assert members_at_once(auto, config | dict(batch_size=10 ** 4, device="cuda")) == 16
    assert members_at_once(auto, config | dict(parts=8, batch_size=64)) == 8 * 16


def test_estimators_touch_nobody_elses_gradient():
    other = torch.ones(5, requires_grad=True)
    loss = lambda t: (t * other).sum(1)
    gls.rgs(loss, torch.zeros(5), 0.1, 2, torch.Generator())
    with torch.no_grad():
        assert torch.equal(gls.gradient(loss, torch.zeros(5))[1], torch.ones(5))
    assert other.grad is None
    sigma = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for estimator in (gls.pgpe, gls.rgs):
        result = estimator(loss, torch.zeros(5), sigma, 2, torch.Generator())
        assert all(t is None or t.dtype == torch.float32 and not t.requires_grad for t in result)


@pytest.mark.parametrize("call, message", [
    (lambda f, t, g: gls.rgs(f, t, 0.1, 2, g, chunk=-1), "chunk=-1"),
    (lambda f, t, g: gls.pgpe(f, t, 0.1, 2.5, g), "pairs=2.5"),
    (lambda f, t, g: gls.gradient(f, t[None]), "one vector"),
    (lambda f, t, g: gls.pgpe(f, t, 0.1, 0, g), "pairs=0"),
    (lambda f, t, g: gls.rgs(f, t, 0.1, 0, g), "samples=0"),
    (lambda f, t, g: gls.pgpe(f, t, 0.0, 2, g), "sigma"),
    (lambda f, t, g: gls.rgs(f, t, -1.0, 2, g), "sigma"),
    (lambda f, t, g: gls.rgs(f, t, 0.1, 3, g, antithetic=True), "samples=3 has to be even"),
    (lambda f, t, g: gls.pgpe(lambda t: t.sum(), t, 0.1, 2, g), "has to map (P, D) to (P,)"),
    (lambda f, t, g: gls.pgpe(f, t[None], 0.1, 2, g), "one vector"),
    (lambda f, t, g: gls.smoothed_loss(f, t, 0.1, 3, g), "samples=3 has to be even"),
    (lambda f, t, g: gls.rgs([f] * 2, t, 0.1, 3, g), "samples=3 has to be a multiple of the 2"),
    (lambda f, t, g: gls.pgpe([f] * 4, t, 0.1, 6, g), "pairs=6 has to be a multiple of the 4"),
    (lambda f, t, g: gls.smoothed_loss([f] * 2, t, 0.1, 2, g), "pairs=1 has to be a multiple"),
    (lambda f, t, g: gls.pgpe([], t, 0.1, 6, g), "a multiple of the 0 losses"),
])
def test_estimators_refuse_nonsense(call, message):
    with pytest.raises(ValueError) as error:
        call(lambda t: t.sum(1), torch.zeros(3), torch.Generator())
    assert message in str(error.value)


def test_pgpe_example_of_the_docstring_runs():
    code = gls.__doc__.split("PGPE in eight lines:")[1]
    scope = {"torch": torch, "gls": gls}
    exec("\n".join(line[4:] for line in code.splitlines()).replace("print(theta)", ""), scope)
    assert (scope["theta"] - 1).abs().max() < 0.05


# -------------------------------------------------------------------------------------------- train

def test_network_sizes_and_initialisation():
    count = lambda net: sum(p.numel() for p in net.parameters())
    torch.manual_seed(0)
    for name, shape, n in (("cnn3", (1, 28, 28), 24330), ("cnn3", (3, 32, 32), 29930),
                           ("cnn5", (1, 28, 28), 820954), ("cnn5", (3, 32, 32), 1067002)):
        assert count(train.build_network(name, shape, 10)) == n
    assert 13.2e6 < count(train.build_network("cnn7", (1, 28, 28), 10)) < 13.4e6
    net = train.build_network("cnn5", (3, 32, 32), 10)
    for layer in (net[2], net[4], net[7]):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / fan_in, rel=0.05)
    last = net[9].weight.abs().max() * math.sqrt(512)                  # the last keeps PyTorch's
    assert 0.9 < last <= 1
    mean, std, x = [0.1, 0.2, 0.3], [0.5, 0.4, 0.2], torch.rand(2, 3, 4, 4)
    normalized = train.build_network("mlp", (3, 4, 4), 3, statistics=(mean, std))[0](x)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    torch.testing.assert_close(normalized, (x - mean) / std)
    for shape in ((1, 7, 9), (3, 13, 5)):                              # any input size
        for name in train.NETWORKS:
            net = train.build_network(name, shape, 3, "default")
            assert net(torch.zeros(2, *shape)).shape == (2, 3)


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


def test_defaults_of_the_loss_are_those_of_the_settings():
    given = inspect.signature(train.robust_loss).parameters
    for name in ("loss", "slope", "beta", "alpha", "lam", "split", "expand", "slope_steps"):
        assert given[name].default == train.SETTINGS[name].default, name


def loss_at(net, x, y, eps, relax, **options):
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    return train.robust_loss(net, x, y, eps, relax, **options)(theta).item()


def test_baselines_mix_the_box_and_the_attack_as_their_formulas_say():
    net, x, y = make("windows", dtype=torch.float64)
    loss = lambda relax, **options: loss_at(net, x, y, 0.05, relax, **options)
    points = train.attack(net, x, y, 0.05, steps=8, restarts=1)
    rows = lambda logits: nn.functional.cross_entropy(logits, y, reduction="none")
    m, logits = margin_lower_bounds(net, x, y, 0.05, "box"), net(points)
    of_box, of_attack = rows(-m), rows(logits)
    assert (of_box > of_attack).all() and (of_attack > rows(net(x)) + 1e-3).all()
    expected = {"mtl-ibp": (0.3 * of_box + 0.7 * of_attack).mean().item(),
                "cc-ibp": rows(-0.3 * m + 0.7 * logits).mean().item(),
                "exp-ibp": (of_box ** 0.3 * of_attack ** 0.7).mean().item()}
    for relax, value in expected.items():
        assert loss(relax, alpha=0.3) == pytest.approx(value)
        assert loss(relax, alpha=1.0) == pytest.approx(loss("box"))
        assert loss(relax, alpha=0.0) == pytest.approx(of_attack.mean().item())
    assert len({round(v, 6) for v in expected.values()}) == 3


def test_the_small_box_of_sabr_is_around_the_attack_and_in_the_ball(monkeypatch):
    net, x, y = make("windows", dtype=torch.float64)
    points = train.attack(net, x, y, 0.05, steps=8, restarts=1)
    seen, bounds = [], train.margin_lower_bounds
    monkeypatch.setattr(train, "margin_lower_bounds", lambda net, x, y, eps, *args, **options: (
        seen.append((x, eps)), bounds(net, x, y, eps, *args, **options))[1])
    whole, small = (loss_at(net, x, y, 0.05, "sabr", lam=lam) for lam in (1.0, 0.2))
    (center, radius), = seen[1:]
    assert whole == pytest.approx(loss_at(net, x, y, 0.05, "box")) and small < whole
    assert radius == pytest.approx(0.01) and torch.equal(seen[0][0], x)
    assert ((center - x).abs() + radius <= 0.05 + 1e-12).all()
    assert ((center - points).abs() <= radius + 1e-12).all()
    assert loss_at(net, x, y, 0.05, "sabr", lam=1e-9) == pytest.approx(
        nn.functional.cross_entropy(net(points), y).item())


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
        config = train.parse_config(f"--relax {relax} --slope {name} --regularize 0".split())
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


def test_taps_by_hand():
    """h = relu(w x) with w = 4, x in [1/4, 3/4]: the box is [1, 3]. logit 1 is |h - 3/2|, logit 0
    is 0: intervals give margin 1 >= -3/2 - 1/2, the attack goes from 2 up to 3 and finds -3/2."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    theta = torch.tensor([4., 0., 1., -1., -1.5, 1.5, 0., 0., 1., 1., 0., 0.], dtype=torch.float64)
    x, y = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    torch.nn.utils.vector_to_parameters(theta, net.double().parameters())
    bound, attacked = (math.log(1 + math.exp(t)) for t in (2.0, 1.5))           # cross-entropies
    p_bound, p_attacked = (1 - math.exp(-t) for t in (bound, attacked))         # of class 1
    for expand in (1.0, 5.0):
        loss = train.robust_loss(net, x, y, 0.25, "taps", expand=expand)
        value, grad, _ = gls.gradient(loss, theta)
        assert value.item() == pytest.approx(bound * attacked)
        # The margin moves by -3/4 with w where h is at u = 3/4 w; that of intervals by l - u.
        assert grad[0].item() == pytest.approx(
            expand * bound * p_attacked * 3 / 4 + attacked * p_bound / 2)
    assert loss(theta[None]).item() == pytest.approx(value.item())          # as pgpe calls it
    with pytest.raises(ValueError, match="--split 2: with 2 ReLUs"):
        train.robust_loss(net, x, y, 0.25, "taps", split=2)(theta[None])


def test_the_connector_moves_points_with_the_ends_they_are_near():
    l, u = (torch.full((5,), t, requires_grad=True) for t in (0.0, 4.0))
    points = torch.tensor([4., 3., 2., 1., 0.])
    linked = train.linked(points, l, u)                                     # c = 1/2: from 2 away
    assert torch.equal(linked, points)
    down, up = torch.autograd.grad(linked.sum(), (l, u))
    assert up.tolist() == [1, 0.5, 0, 0, 0] and down.tolist() == [0, 0, 0, 0.5, 1]
    both = torch.autograd.grad(train.linked(u.detach(), u, u).sum(), u)[0]
    assert both.tolist() == [1] * 5                                         # a box of one point


def test_the_latent_attack_stays_in_its_box_and_solves_linear_problems():
    """Above the last ReLU the network is affine: the attack finds the corner that intervals bound,
    and the gradient through the connector is that of the bound."""
    net, x, y = make("windows", dtype=torch.float64)
    params = {n: p[None].detach().requires_grad_() for n, p in net.named_parameters()}
    bounds = preactivation_bounds(net, x, 0.05, "box", params)
    low = train.latent_margins(net, params, bounds, y, 4, split=0)
    want = margin_lower_bounds(net, x, y, 0.05, "box", params, intermediate=bounds)
    torch.testing.assert_close(low, want)
    weights = torch.randn(low.shape, generator=torch.Generator().manual_seed(0), dtype=low.dtype)
    slopes = lambda m: torch.autograd.grad((m * weights).sum(), list(params.values()),
                                           retain_graph=True)
    for a, b in zip(slopes(low), slopes(want)):
        torch.testing.assert_close(a, b)
    l, u = torch.rand(2, 3, 1, 4, 5) / 2, 0.5 + torch.rand(2, 3, 1, 4, 5) / 2
    rows = torch.randn(4, 4, 5)
    seen = []
    of = lambda z: (seen.append(z), ((z - 0.4) ** 2 * rows).sum((-1, -2)))[1]
    best = train.worst_points(of, l, u, 4)
    assert all(((z >= l) & (z <= u)).all() for z in seen) and best.shape == (2, 3, 4, 4, 5)
    least = torch.stack([of(z) for z in seen[:]]).amin(0)
    assert len(seen) == 18
    assert torch.equal(of(best), least)


def test_taps_is_between_the_attack_and_the_box_and_staps_is_taps_in_a_small_box():
    net, x, y = make("windows", dtype=torch.float64)
    taps = loss_at(net, x, y, 0.05, "taps")
    points = train.attack(net, x, y, 0.05, steps=8, restarts=1)
    rows = lambda m: torch.logsumexp(-m, -1)
    of_box = rows(margin_lower_bounds(net, x, y, 0.05, "box"))
    of_attack = nn.functional.cross_entropy(net(points), y, reduction="none")
    assert (of_attack * of_box).mean() < taps < of_box.square().mean()
    assert loss_at(net, x, y, 0.05, "staps", lam=1.0) == pytest.approx(taps)
    center, radius = train.small_box(x, points, 0.05, 0.3)
    assert loss_at(net, x, y, 0.05, "staps", lam=0.3) == pytest.approx(
        loss_at(net, center, y, radius, "taps"))


def test_taps_begins_when_the_ramp_is_over():
    net, x, y = make("windows", dtype=torch.float64)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    for relax, before in (("taps", "box"), ("staps", "sabr"), ("mtl-ibp", "mtl-ibp")):
        config = train.parse_config(f"--relax {relax} --eps 0.3 --eps-train 0.05".split())
        config["regularize"] = 0.0
        for eps, now in ((0.049, before), (train.eps_at(1.0, 0.05), relax)):
            loss, = train.losses_of_step(net, x, y, eps, config)
            assert loss(theta).item() == loss_at(net, x, y, eps, now)


@pytest.mark.parametrize("relax", ["alpha-crown", *train.BASELINES])
def test_losses_of_a_population_are_those_of_its_members(relax):
    net, x, y = make("batchnorm")
    thetas = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    thetas = thetas + 0.1 * torch.randn(3, len(thetas), generator=torch.Generator().manual_seed(0))
    loss = train.robust_loss(net, x, y, 0.05, relax, kappa=0.2)
    torch.testing.assert_close(loss(thetas), torch.cat([loss(t[None]) for t in thetas]))


def test_the_attack_of_a_baseline_sees_the_weights_of_its_step(tmp_path, monkeypatch):
    weights, attack = [], train.attack
    monkeypatch.setattr(train, "attack", lambda net, *args, **options: (
        weights.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()),
        attack(net, *args, **options))[1])
    net, x, y = make("mlp", batch=64)
    config = train.parse_config("--relax sabr --opt grad --epochs 2 --ramp 0 --batch-size 16 "
                                "--lr 0.01".split()) | {"augment": False}
    assert config["sigma"] == 0                                # plain gradients: no noise is logged
    train.train(net.float(), x.float(), y, config, torch.device("cpu"), tmp_path, lambda line: None)
    assert len(weights) == 8
    assert all(((a - b).abs().max() > 1e-3) for a, b in zip(weights, weights[1:]))


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


ROOT = Path(train.__file__).parent
PAGES = {page: (ROOT / page).read_text() for page in (
    "README.md", "docs/runs.md", "results/README.md", "benchmarks/README.md", "data/README.md")}


def test_pages_have_the_tables_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "figures")
    import tables
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.filled(page) for page in pages] == pages
    assert all("<!-- end -->" in page for page in pages)
    # 5 and 5 runs, all of one above all of the other: 2 of 252 ways to deal them are as extreme
    assert tables.permutation_test([6., 7, 8, 9, 10], [1., 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert tables.permutation_test([1., 2], [1., 2]) == 1


def test_the_page_on_runs_explains_every_column_of_the_log():
    explained = re.search(r"<!-- log .*?<!-- end -->", PAGES["docs/runs.md"], re.S)[0]
    assert re.findall(r"^\| `(\w+)` \|", explained, re.M) == list(LOG)


def anchors(page):
    """What GitHub makes of the headings: lower case, no punctuation, - for a blank."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_exists(page):
    modules = dict(train=train, gls=gls, relaxations=relaxations, certify=certify)
    for module, name in re.findall(r"`(train|gls|relaxations|certify)\.(\w+)", PAGES[page]):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    tests = (ROOT / "test_gls.py").read_text()
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in tests, name
    for file in re.findall(r"(?:python3?|pytest) ((?:\w+/)*\w+\.py)", PAGES[page]):
        assert (ROOT / file).exists(), file


def test_attack_is_exact_on_an_affine_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    x = torch.rand(20, 1, 3, 4)
    y = net(x).argmax(1)
    points = train.attack(net, x, y, 0.15, steps=30)
    worst = train.forward_margin(net, points, y)
    exact = train.smallest(margin_lower_bounds(net.double(), x.double(), y, 0.15), y)
    torch.testing.assert_close(worst, exact, atol=1e-5, rtol=0)
    wide = x.double()                                          # float32 points, exactly in the ball
    assert ((points.double() - wide).abs() <= 0.15).all()
    assert points.min() >= 0 and points.max() <= 1


def test_each_step_of_the_attack_forgets_the_one_before():
    """Else the memory of all steps would be held until the last."""
    is_leaf, W = [], torch.randn(12, 4)

    def net(z):
        is_leaf.append(z.is_leaf)
        return z.flatten(1) @ W

    train.attack(net, torch.rand(3, 1, 3, 4), torch.tensor([0, 1, 2]), 0.1, steps=4, restarts=2)
    assert is_leaf == [True] * (2 * 5 + 1)


@pytest.mark.parametrize("scale", [1, 2.0 ** -20, 1e-6, 1e4, 1e6])
def test_certified_margin_decides_close_calls_in_float64(scale):
    """At 1e4 the float32 bound is wrong by about 1e-3, which is close to 0 though above CLOSE."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3))
    net[2].weight.data *= scale
    net[2].bias.data *= scale
    x = torch.rand(20, 50)
    y = net(x).argmax(1)
    of_float32 = 0
    for i in range(20):
        one, close = slice(i, i + 1), deepcopy(net)
        low = train.certified_margin(net, x[one], y[one], 0.01, "deeppoly")
        close[2].bias.data[y[i]] -= low[0] - 1e-7 * scale             # now the bound is about 0
        problem = close, x[one], y[one], 0.01, "deeppoly"
        exact = train.certified_margin(*train.in_float64(*problem[:3]), *problem[3:])
        assert 0 < exact.abs() < train.CLOSE * scale
        assert train.certified_margin(*problem) == exact.float()
        plain = train.smallest(margin_lower_bounds(*problem), y[one]).detach()
        of_float32 += bool(plain != exact.float())
    assert of_float32 > 10                                             # or nothing was tested


def test_one_page_ends_with_the_weights_of_train(tmp_path, monkeypatch):
    """examples/one_page.py shares the images with train.py, and no line."""
    page = (ROOT / "examples" / "one_page.py").read_text()
    assert not re.search(r"import.*\b(train|gls|relaxations|certify)\b", page)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import one_page
    data = train.load_dataset("digits")
    x, y = data.x_train[:300].flatten(1), data.y_train[:300]
    net = one_page.train(x, y, epochs=2, ramp=2, clip=0.3)         # so that it clips now and then
    train.main(["--net", "mlp", "--init", "default", "--lr-decay", "1", "--regularize", "0",
                "--no-skip-stable", "--epochs", "2", "--ramp", "2", "--clip", "0.3",
                "--subset", "300", "--test-subset", "20", "--out", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"].values()
    for one, other in zip(net.parameters(), saved, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    x, y = data.x_test[:20], data.y_test[:20]                          # and it bounds likewise
    theirs = train.load_run(tmp_path / "run")[0]
    torch.testing.assert_close(one_page.margins(net, x.flatten(1), y, 0.1),
                               margin_lower_bounds(theirs, x, y, 0.1), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------- what a training step hands on, arrives

def arrivals(monkeypatch, module, name):
    """A list of what each call of module.name is given, {parameter: value}, and of its result."""
    calls, function = [], getattr(module, name)
    signature = inspect.signature(function)
    def spy(*args, **options):
        given = signature.bind(*args, **options)
        given.apply_defaults()
        calls.append((given.arguments, function(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(module, name, spy)
    return calls


def steps_of_adam(monkeypatch):
    """A list of (learning rate, norm of the gradient) at each step of the optimiser."""
    seen, step = [], torch.optim.Adam.step
    def spy(self):
        group, = self.param_groups
        seen.append((group["lr"], group["params"][0].grad.norm().item()))
        return step(self)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return seen


def train_on_noise(folder, words, net=None, augment=False):
    """The rows of the log of a short training: 20 images, 8, 8 and 4 of them in the 3 steps of an
    epoch."""
    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    config = train.parse_config(f"--batch-size 8 {words}".split()) | {"augment": augment}
    return train.train(net, x, y, config, torch.device("cpu"), folder, lambda line: None)


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
    norm = nn.BatchNorm2d(1, eps=0.0, affine=False)
    norm.running_var.fill_(0.25)
    net = nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.tensor([[0., 0.5, 1., 0.5], [0.5] * 4]).view(2, 1, 2, 2)
    loss_at(net, x, torch.tensor([0, 1]), 0.1, "box", regularize=1.0)
    widths = [0.1, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert calls[0][0]["radius"].item() == pytest.approx(sum(widths) / 8 / 2 / 0.5)


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


def test_cifar_10_is_normalised_and_augmented(tmp_path, monkeypatch):
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    data = Dataset(x, y, x, y, 4)
    for dataset, augmented, first in (("cifar10", True, nn.BatchNorm2d),
                                      ("own.npz", False, nn.Conv2d)):
        config = train.parse_config(["--dataset", dataset])
        net, config = train.new_run(config, data, torch.device("cpu"))
        assert config["augment"] == augmented and type(net[0]) is first
    changed = arrivals(monkeypatch, train, "augment")
    calls = arrivals(monkeypatch, train, "take_step")
    train_on_noise(tmp_path, "--opt grad --epochs 1", augment=True)
    assert len(calls) == 3
    assert all(given["x"] is x for (given, _), (_, x) in zip(calls, changed, strict=True))


@pytest.mark.parametrize("relax, opt", [("mtl-ibp", "rgs"), ("sabr", "rgs"), ("deeppoly", "pgpe")])
def test_the_mean_over_parts_is_the_loss_of_the_minibatch(relax, opt, monkeypatch):
    """Also where they are not of one size; each is attacked by itself. Of fewer images than parts,
    all are one."""
    net, x, y = make("windows", batch=8)
    config = train.parse_config(f"--relax {relax} --opt {opt} --samples 12 --parts 3 --kappa 0.3 "
                                "--l1 0.01 --regularize 0".split())
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    calls, certified = arrivals(monkeypatch, train, "attack"), ([], [])
    parts = train.losses_of_step(net, x, y, 0.05, config, certified[0])
    attacked = [len(given["x"]) for given, _ in calls]
    assert attacked == ([3, 3, 2] if relax in train.ATTACKING else []) and len(parts) == 3
    whole, = train.losses_of_step(net, x, y, 0.05, config | dict(parts=1), certified[1])
    each = torch.cat([loss(theta) for loss in parts])
    torch.testing.assert_close(each.mean(), whole(theta)[0])
    assert each.std() > 0.01 * each.mean()                                # so it could differ
    torch.testing.assert_close(torch.stack(certified[0]).mean(), certified[1][0])
    alone, = train.losses_of_step(net, x[:2], y[:2], 0.05, config)
    all_of_it, = train.losses_of_step(net, x[:2], y[:2], 0.05, config | dict(parts=1))
    assert torch.equal(alone(theta), all_of_it(theta))


def test_each_part_has_its_own_regularisers(monkeypatch):
    net, x, y = make("windows", batch=8)
    config = train.parse_config("--samples 4 --parts 4 --regularize 0.5 --relax box".split())
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    parts = train.losses_of_step(net, x, y, 0.05, config)                 # in the ramp: eps is 0.1
    for i, loss in enumerate(parts):
        images = slice(2 * i, 2 * i + 2)
        assert loss(theta).item() == pytest.approx(
            loss_at(net, x[images], y[images], 0.05, "box", regularize=0.25))


@pytest.mark.parametrize("words", ["--opt rgs --samples 4 --parts 4", "--opt rgs --parts 2",
                                   "--opt pgpe --samples 8 --parts 4 --members 3"])
def test_parts_share_out_every_minibatch(tmp_path, monkeypatch, words):
    """20 images in steps of 8, 8 and 4: an epoch sees each once, whatever the number of parts."""
    calls = arrivals(monkeypatch, train, "robust_loss")
    train_on_noise(tmp_path, f"--epochs 1 {words}")
    seen = torch.cat([given["x"] for given, _ in calls]).flatten(1)
    assert len(seen) == len({tuple(x.tolist()) for x in seen}) == 20
    assert len(calls) == 3 * int(re.search(r"--parts (\d)", words)[1])


@pytest.mark.parametrize("words", ["--opt grad --parts 2", "--opt rgs --samples 4 --parts 3",
                                   "--opt pgpe --samples 12 --parts 4"])
def test_parts_that_cannot_be_used_equally_often_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(words.split())
    err = capsys.readouterr().err
    assert "argument --parts" in err and err.count("\n") == 1


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


def test_each_restart_of_the_attack_starts_aims_and_steps_as_it_says():
    """Logit k is pixel k: the margin to class k falls by lowering pixel y and raising pixel k, and
    no other pixel moves. 4 steps of 0.25, 0.25, 0.1 and 0.02 eps, from within the ball."""
    seen, eps = [], 0.1
    class Identity(nn.Module):
        def forward(self, z):
            seen.append(z.detach().clone())
            return z
    x = torch.tensor([[0.5, 0.7, 0.4, 0.6], [0.2, 0.3, 0.4, 0.5]])
    y, ranking = torch.tensor([1, 3]), [[1, 3, 0, 2], [3, 2, 1, 0]]
    best = train.attack(Identity(), x, y, eps, steps=4, restarts=5)
    starts, points = [], torch.stack(seen[-25:]).view(5, 5, 2, 4)      # restart, step, image, pixel
    for r, path in enumerate(points):
        position = (path[0] - x) / eps
        starts.append(position[0])
        torch.testing.assert_close(position[0], position[1])           # the same for all images
        for i, classes in enumerate(ranking):
            target = classes[1 + (r - 1) % 3] if r else classes[1]
            way = torch.zeros(4)
            way[classes[0]], way[target] = -1, 1
            z = x[i] + eps * position[i]
            for k, step in enumerate((0.25, 0.25, 0.1, 0.02)):
                z = (z + step * eps * way).clamp(x[i] - eps, x[i] + eps)
                torch.testing.assert_close(path[k + 1, i], z)
    starts = torch.stack(starts)
    assert starts[0].abs().max() == 0 and (starts[1:].abs() <= 1 + 1e-6).all()
    assert starts[1:].std() > 0.3 and len(set(map(tuple, starts.tolist()))) == 5
    margins = points.gather(3, y.expand(5, 5, 2)[..., None]) - points
    lowest = train.smallest(margins, y).flatten(0, 1).amin(0)          # the last step's count too
    assert torch.equal(train.smallest(best.gather(1, y[:, None]) - best, y), lowest)
    only = train.attack(Identity(), x, y, eps, steps=1, restarts=1)
    torch.testing.assert_close(only[0], x[0] + 0.25 * eps * torch.tensor([0., -1., 0., 1.]))


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


def random_subdomain(net, x, y, eps, cuts, seed=0):
    """A node with random cuts and random multipliers, slopes and target; its problem."""
    g = torch.Generator().manual_seed(seed)
    bounds = preactivation_bounds(net, x, eps, "deeppoly")
    problem = certify.pose(net, x, y, eps, 1.0, bounds)
    l, u = problem.l[0], problem.u[0]
    unstable = ((l < 0) & (u > 0)).nonzero().flatten()
    neurons = unstable[torch.randperm(len(unstable), generator=g)[:cuts]]
    signs = torch.randint(0, 2, neurons.shape, generator=g).to(x) * 2 - 1
    multipliers = signs * torch.rand(neurons.shape, generator=g).to(x)
    slopes = torch.rand(l.shape, generator=g).to(x)
    target = (int(y[0]) + 1) % problem.rows.shape[1]
    return problem, certify.Node(-math.inf, 0, target, neurons, signs, multipliers, slopes)


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


@pytest.mark.parametrize("factor", [1e-3, 2.0 ** -10, 2.0 ** 10, 1e3])
@pytest.mark.parametrize("name", ["mlp", "windows"])
def test_no_ascent_depends_on_the_unit_of_a_hidden_layer(name, factor):
    """A hidden layer times a factor, the next one divided by it: the same network, and bounds."""
    net, x, y = make(name)
    net.requires_grad_(False)
    scaled = deepcopy(net)
    scaled[0].weight.mul_(factor)
    scaled[0].bias.mul_(factor)
    scaled[2].weight.div_(factor)
    torch.testing.assert_close(net(x), scaled(x))
    low, bounds = [], []
    for n in (net, scaled):
        found = preactivation_bounds(n, x, 0.1, "alpha-crown", steps=5)
        low.append(margin_lower_bounds(n, x, y, 0.1, "alpha-crown", steps=5))
        problem, node = random_subdomain(n, x[:1], y[:1], 0.2, cuts=3, seed=1)
        sub = certify.subdomains(problem, [node])._replace(multipliers=torch.zeros_like(problem.l))
        bounds.append([relaxations.subdomain_bounds(problem.network, sub, steps)[0].item()
                       for steps in (0, 5, 20)])
        found[0] = [t / (1 if n is net else factor) for t in found[0]]
        low += found
    half = len(low) // 2
    for a, b in zip(low[:half], low[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    assert bounds[0][0] < bounds[0][1] < bounds[0][2]


@pytest.mark.parametrize("factor", [2.0 ** -40, 2.0 ** 40])
def test_no_ascent_depends_on_the_unit_of_the_margins(factor):
    net, x, y = make("mlp")
    low = margin_lower_bounds(net, x, y, 0.3, "alpha-crown", steps=9)
    assert not torch.equal(low, margin_lower_bounds(net, x, y, 0.3, "alpha-crown", steps=8))
    net[-1].weight.data *= factor
    net[-1].bias.data *= factor
    again = margin_lower_bounds(net, x, y, 0.3, "alpha-crown", steps=9)
    torch.testing.assert_close(again / factor, low, rtol=1e-9, atol=1e-12)


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


def test_linear_programs_by_brute_force():
    """Random ones in the plane: the minimum is at a vertex; and the duality gap is zero."""
    rng, infeasible = np.random.default_rng(0), 0
    for _ in range(300):
        m = int(rng.integers(0, 6))
        c, G, h = rng.normal(size=2), rng.normal(size=(m, 2)), rng.normal(size=m) * 0.7
        low, high = -rng.random(2), rng.random(2)
        lines = [(np.eye(2)[i], t[i]) for i in (0, 1) for t in (low, high)] + list(zip(G, h))
        vertices = [np.linalg.solve([a, b], [s, t]) for k, (a, s) in enumerate(lines)
                    for b, t in lines[:k] if abs(np.linalg.det([a, b])) > 1e-9]
        inside = [v for v in vertices if (G @ v >= h - 1e-9).all() and (v >= low - 1e-9).all()
                  and (v <= high + 1e-9).all()]
        x, tries = certify.linear_program(c, G, h, low, high)
        slope = c - tries[-1] @ G
        dual = np.minimum(slope * low, slope * high).sum() + tries[-1] @ h
        assert all((beta >= 0).all() for beta in tries)
        if inside:
            best = min(c @ v for v in inside)
            assert c @ x == pytest.approx(best) and dual == pytest.approx(best)
            assert (G @ x >= h - 1e-7).all()
            assert (x >= low - 1e-9).all() and (x <= high + 1e-9).all()
        else:
            infeasible += 1
            assert x is None and dual > 1e3
    assert 20 < infeasible < 280


def one_neuron(weight, bias, out, out_bias, dtype=torch.float64):
    """z = weight x + bias, and logits out relu(z) + out_bias of a single pixel x."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, len(out))).to(dtype).eval()
    with torch.no_grad():
        net[0].weight[:], net[0].bias[:] = weight, bias
        net[2].weight[:, 0], net[2].bias[:] = torch.tensor(out), torch.tensor(out_bias)
    return net.requires_grad_(False)


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


UNITS = {  # radius, layers
    "mlp": lambda: (0.04, [nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(),
                           nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10)]),
    "conv": lambda: (0.06, [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
                            nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(),
                            nn.Linear(20, 10)]),
}


def hard_problem(name="conv"):
    """Digits that a random network is sure of, at a radius where each stage settles some."""
    torch.manual_seed(0)
    eps, layers = UNITS[name]()
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    for layer in net:
        if hasattr(layer, "weight"):
            layer.weight *= 2
    x = train.load_dataset("digits").x_test[:25]
    return net, x, net(x).argmax(1), eps


@pytest.mark.parametrize("name", UNITS)
def test_a_factor_of_the_last_layer_changes_neither_verdicts_nor_search(name, monkeypatch):
    net, x, y, eps = hard_problem(name)
    bounds, rows = certify.subdomain_bounds, [0]

    def counted(stages, sub, *args, **options):
        rows[0] += len(sub.rows)
        return bounds(stages, sub, *args, **options)

    monkeypatch.setattr(certify, "subdomain_bounds", counted)

    def verdicts(factor):
        scaled, rows[0] = deepcopy(net), 0
        scaled[-1].weight *= factor
        scaled[-1].bias *= factor
        return certify.certify(scaled, x, y, eps, restarts=2, timeout=20), rows[0]

    ours, work = verdicts(1.0)
    assert sum(v.stage == "branch-and-bound" for v in ours) > 2 and work > 300
    for factor in (2.0 ** -20, 2.0 ** 20, 1e-6, 1e6):
        theirs, more = verdicts(factor)
        assert [v.status for v in theirs] == [v.status for v in ours]
        assert 0.7 * work < more < 1.4 * work
        if math.log2(factor) % 1 == 0:
            assert [v.stage for v in theirs] == [v.stage for v in ours]
            for a, b in zip(ours, theirs):
                assert b.bound / factor == pytest.approx(a.bound, rel=1e-4)


def test_what_counts_as_close_does_not_depend_on_a_factor_of_the_last_layer():
    net, x, y, eps = hard_problem()
    low = train.certified_margin(net, x, y, 0.7 * eps, "deeppoly")
    assert 0 < (low > 0).sum() < len(x)
    for factor in (2.0 ** -20, 2.0 ** 20, 1e-6, 1e-3, 1e3, 1e6):
        scaled = deepcopy(net)
        scaled[-1].weight *= factor
        scaled[-1].bias *= factor
        again = train.certified_margin(scaled, x, y, 0.7 * eps, "deeppoly")
        assert torch.equal(again > 0, low > 0)
        if math.log2(factor) % 1 == 0:
            assert torch.equal(again, low * factor)        # the same ones from float64


def test_rounding_is_no_contradiction_whatever_the_unit_of_the_margins():
    for unit in (1.0, 2.0 ** -30, 2.0 ** 30):
        for bound, wrong in ((1e-9 * unit, False), (1e-3 * unit, True)):
            proved = certify.Verdict("certified", "box", bound)
            refuted = certify.Verdict("attacked")
            for call in (lambda: proved.refute("attack", torch.zeros(1), unit),
                         lambda: refuted.prove("box", bound, unit)):
                if wrong:
                    with pytest.raises(certify.ContradictionError, match="a bound is unsound"):
                        call()
                else:
                    call()
            assert refuted.status == "attacked" and (wrong or proved.status == "attacked")


# ------------------------------------------------------------------- what certify refuses, at once

@pytest.mark.parametrize("change", [
    dict(eps=-0.1), dict(eps=math.nan), dict(eps=math.inf), dict(eps=None), dict(eps="0.1"),
    dict(eps=torch.tensor([0.1, 0.2])), dict(timeout=math.nan), dict(timeout=-1.0),
    dict(batch=0), dict(batch=-1), dict(batch=2.5), dict(steps=-1), dict(steps=math.nan),
    dict(restarts=-1), dict(restarts=math.inf), dict(seed=-1), dict(tolerance=0.0),
    dict(tolerance=math.nan), dict(stages=["deep-poly"]), dict(stages="box"),
    dict(y=[0, 1]), dict(y=[[0], [1, 2]]), dict(y=torch.zeros(2).long()), dict(y=torch.zeros(3)),
    dict(y=torch.zeros(3, 4).long()), dict(y=torch.tensor([0, 1, 4])),
    dict(y=torch.tensor([0, -1, 2])),
    dict(x=torch.full((3, 6), 1.5)), dict(x=torch.full((3, 6), -0.1)), dict(x=torch.zeros(6)),
    dict(x=torch.full((3, 6), torch.nan)), dict(x=torch.zeros(3, 1, 6)), dict(x=np.zeros((3, 6))),
    dict(x=torch.zeros(3, 6).byte()), dict(x=torch.zeros(3, 6).double())],
    ids=lambda change: next(iter(change)))
def test_nonsense_is_refused_before_the_first_stage(change, monkeypatch):
    net, _, y = make("mlp", dtype=torch.float32)
    arguments = dict(net=net, x=torch.zeros(3, 6), y=y, eps=0.1) | change
    monkeypatch.setattr(certify, "certify_batch", None)
    with pytest.raises(ValueError):
        certify.certify(**arguments)


def test_what_bounds_refuse_is_refused_in_their_words_and_before_the_attack(monkeypatch):
    monkeypatch.setattr(certify, "certify_batch", None)
    net, x, y = make("mlp", dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        half = deepcopy(net).to(dtype), x.to(dtype)
        with pytest.raises(ValueError, match="all float32 or all float64"):
            margin_lower_bounds(*half, y, 0.1)
        with pytest.raises(ValueError, match="all float32 or all float64"):
            certify.certify(*half, y, 0.1)
    unsupported = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"layer 1 \(Sigmoid\)"):
        certify.certify(unsupported, x, (unsupported(x).argmax(1) + 1) % 4, 0.1)
    for refusing in (certify.certify, train.evaluate):
        with pytest.raises(ValueError, match="a margin is between two"):
            refusing(nn.Sequential(nn.Linear(6, 1)), x, torch.zeros(3).long(), 0.1)
    with pytest.raises(train.InputError, match="a margin is between two"):
        train.build_network("mlp", (1, 8, 8), 1)
    net[1].forward = lambda z: z.clamp(min=-0.1)           # the network that runs is another one
    with pytest.raises(ValueError, match=r"layer 1 \(ReLU\) may compute something else"):
        certify.certify(net, x, y, 0.1)
    net, sound = make("mlp", dtype=torch.float32)[0], certify.margin_lower_bounds
    monkeypatch.setattr(certify, "margin_lower_bounds", lambda *args: sound(*args) + 0.01)
    with pytest.raises(ValueError, match="bounds and forward pass of the network differ by 0.01"):
        certify.certify(net, x, y, 0.1)


@pytest.mark.parametrize("wrong", ["0", "3.1", "5"])
def test_a_layer_that_bounds_and_forward_pass_take_for_two_is_named(wrong, monkeypatch):
    """A Linear that adds 0.1 when it is called, but not as the bounds call it."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Identity(),
                        nn.Sequential(nn.ReLU(), nn.Linear(5, 5), nn.ReLU()), nn.Identity(),
                        nn.Linear(5, 3)).eval().requires_grad_(False)
    module = net.get_submodule(wrong)
    module.weight += 0.3                               # so that what is below reaches the logits
    marked = module.weight.double()
    forward = nn.Linear.forward

    def changed(self, z):
        bounded = not isinstance(self.weight, nn.Parameter)            # by reading.plain
        same = self.weight.shape == marked.shape and torch.equal(self.weight.double(), marked)
        return forward(self, z) + 0.1 * (same and not bounded) * torch.arange(len(self.bias))

    monkeypatch.setattr(nn.Linear, "forward", changed)
    x, y = torch.rand(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=rf"radius of 0: layer {wrong} \(Linear\) does not"):
        certify.certify(net, x, y, 0.1)
    with pytest.raises(ValueError, match=rf"radius of 0: layer {wrong} \(Linear\) does not"):
        train.evaluate(net, x, y, 0.1)


# ------------------------------------------------------------------------- stages and the clock

COSTS = dict(descend=5.0, box=1.0, deeppoly=3.0, neurons=7.0, roots=2.0)     # of each image or node


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but in these stages, and what they were asked: (name, images)."""
    now, calls = [0.0], []
    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(certify, "time", fake)

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


# ------------------------------------------------------------- certify.py from the command line

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


# ------------------------------------------------------------------------------------- self-check

def test_the_self_check_finds_planted_errors(monkeypatch, capsys):
    assert command(self_check.main, 200) == 0
    assert re.search(r"2\d\d checks, 0 contradictions", capsys.readouterr().out)
    sound = self_check.margin_lower_bounds
    monkeypatch.setattr(self_check, "margin_lower_bounds",
                        lambda *args, **options: sound(*args, **options) + 0.02)
    assert command(self_check.main, 200) != 0
    assert "contradiction" in capsys.readouterr().out
    monkeypatch.undo()
    bounds = self_check.preactivation_bounds
    monkeypatch.setattr(self_check, "preactivation_bounds", lambda *args, **options: [
        (l, u - 0.05 * (u - l)) for l, u in bounds(*args, **options)])
    assert len(self_check.self_check(200)[1]) > 3
    monkeypatch.undo()
    monkeypatch.setattr(self_check, "certify", lambda net, x, *args, **options: [
        certify.Verdict("certified", "box", 1.0, 0.0, index=i) for i in range(len(x))])
    assert any("box" in c for c in self_check.self_check(400)[1])


def test_no_certificate_in_float32_is_contradicted_in_float64():
    """Radii at which the float64 bound is within 1e-2 to 1e-9 of zero, on either side."""
    cases, signs = 0, []
    for seed in range(7):
        net, x, y, _ = self_check.random_problem(seed)
        wide, x64, _ = train.in_float64(net, x, y)
        for relax in RELAXATIONS:
            low, high = torch.zeros(len(x)).double(), torch.ones(len(x)).double()
            per_image = lambda eps: train.smallest(margin_lower_bounds(
                wide, x64, y, eps[:, None, None, None], relax).detach(), y)
            for _ in range(50):                                        # the radius of bound zero
                middle = (low + high) / 2
                low, high = (torch.where(per_image(middle) > 0, a, b)
                             for a, b in ((middle, low), (high, middle)))
            for change in [s * 10.0 ** -k for s in (1, -1) for k in range(2, 10)]:
                for i in ((low > 1e-3) & (low < 0.99)).nonzero().flatten().tolist():
                    eps, one = low[i].item() * (1 + change), slice(i, i + 1)
                    exact = train.certified_margin(wide, x64[one], y[one], eps, relax)
                    ours = train.certified_margin(net, x[one], y[one], eps, relax)
                    if ours > 0 >= exact:    # rounding may flip the adaptive slope: also sound
                        verdict, = certify.certify(wide, x64[one], y[one], eps)
                        assert verdict.status == "certified"
                    signs.append((bool(ours > 0), change < 0))
                    cases += 1
    assert cases > 1000 and sum(a == b for a, b in signs) > 0.9 * cases





# --------------------------------------------------------------------------------------- the house

HOUSE = Path(__file__).resolve().parent
MOST_LINES = {"relaxations.py": 1201, "train.py": 650, "certify.py": 600, "gls.py": 200,
              "README.md": 150}


@pytest.mark.parametrize("name", MOST_LINES)
def test_files_and_functions_keep_to_their_size(name):
    text = (HOUSE / name).read_text()
    lines = len(text.splitlines())
    assert lines <= MOST_LINES[name]
    tree = ast.parse(text if name.endswith(".py") else "")
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 50, function.name
        arguments = len(function.args.posonlyargs + function.args.args)
        assert arguments <= 8, function.name


def test_one_step_runs_few_lines_of_the_heart(tmp_path, monkeypatch):
    """The second step of training by CROWN-IBP, in the ramp, with the fast path switched off."""
    take_step, lines, steps = train.take_step, set(), []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if HOUSE not in path.parents or path == Path(__file__):
            return None                                # no event for the lines of this function
        if event == "line":
            lines.add((path.name, frame.f_lineno))
        return note

    def step(*args, **options):
        steps.append(len(lines))
        before = sys.gettrace()
        sys.settrace(note if len(steps) == 2 else before)
        try:
            return take_step(*args, **options)
        finally:
            sys.settrace(before)

    monkeypatch.setattr(relaxations, "FAST", False)
    monkeypatch.setattr(train, "take_step", step)
    assert command(train.main, "--net", "mlp", "--opt", "grad", "--relax", "crown-ibp",
                   "--out", tmp_path / "run", *QUICK, "--ramp", 1) == 0
    assert len(steps) == 3
    method = [name for name, _ in lines if name in ("relaxations.py", "train.py", "gls.py")]
    assert len(method) <= 205 and len(lines) <= 295        # the rest reads what is given
