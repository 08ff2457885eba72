"""Every claim the other files make, checked. Run: pytest (about 2 minutes on 2 CPU cores).

Oracles are independent of the code under test: hand-computed numbers, brute force, closed forms,
finite differences, or slow_bounds below, a DeepPoly that anybody can check line by line.
"""
import errno
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import certify
import gls
import relaxations
import train
from plumbing.verdicts import unsealed
from relaxations import margin_lower_bounds, preactivation_bounds

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import self_check                                                                  # noqa: E402

torch.set_num_threads(1)     # tiny networks: a second thread only spins
RELAXATIONS = relaxations.RELAXATIONS[:3]     # alpha-crown, which is slow, has tests of its own


# ---------------------------------------------------------------------------------- networks to try

def random_bn(channels):
    bn = nn.BatchNorm2d(channels)
    bn.running_mean.uniform_(-0.5, 0.5)
    bn.running_var.uniform_(0.3, 2.0)
    nn.init.uniform_(bn.weight, -1.5, 1.5)
    nn.init.uniform_(bn.bias, -0.5, 0.5)
    return bn


NETS = {
    "mlp": lambda: ((6,), [
        nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)]),
    "windows": lambda: ((1, 9, 8), [                   # convolutions over convolutions, odd sizes
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, (2, 3), stride=(1, 2)), nn.ReLU(),
        nn.Conv2d(3, 2, 2, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)]),
    "strides": lambda: ((2, 11, 9), [                  # strides that leave a rest, dilation, groups
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 2, stride=2, dilation=(2, 1), padding=(1, 0), groups=4), nn.ReLU(),
        nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(),
        nn.LazyLinear(3)]),
    "outgrown": lambda: ((1, 5, 5), [                  # kernels larger than the map
        nn.Conv2d(1, 2, 5, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 5, padding=2), nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]),
    "batchnorm": lambda: ((2, 6, 7), [                 # in every place; two affine layers in a row
        random_bn(2), nn.Conv2d(2, 3, 3, padding=1), random_bn(3), nn.ReLU(), random_bn(3),
        nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(4), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)]),
    "relus": lambda: ((2, 4, 4), [                     # first, last, twice, after Flatten
        nn.ReLU(), nn.Conv2d(2, 2, 2, padding="same", dilation=2), nn.Flatten(), nn.ReLU(),
        nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3), nn.ReLU()]),
}


def make(name, seed=0, dtype=torch.float64, batch=3):
    """A random network of the list above, images with pixels at both ends of [0, 1], and labels."""
    torch.manual_seed(seed)
    shape, layers = NETS[name]()
    net = nn.Sequential(*layers).eval()
    net(torch.zeros(1, *shape))                        # sets the sizes of lazy layers
    net = net.to(dtype)
    for p in net.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    x = (1.4 * torch.rand(batch, *shape, dtype=dtype) - 0.2).clamp(0, 1)
    return net, x, net(x).argmax(1)


def true_margins(net, x, y):
    logits = net(x)
    return logits.gather(1, y[:, None]) - logits


def relu_inputs(net, x):
    """The input of each ReLU, by running the network."""
    found = []
    for layer in net:
        if isinstance(layer, nn.ReLU):
            found.append(x)
        x = layer(x)
    return found


def in_ball(x, eps, n, generator):
    """n points of the ball around each x: half of them corners. (n, B, ...)"""
    u = 2 * torch.rand(n, *x.shape, dtype=x.dtype, generator=generator) - 1
    u[::2] = u[::2].sign()
    return (x + eps * u).clamp(0, 1)


def slow_bounds(net, x, y, eps, crown_ibp=False):
    """Textbook DeepPoly (or CROWN-IBP) of one image, neuron by neuron: pre-activations and margins.

    Dense matrices of layers between ReLUs come from differentiating them; all else is spelt out.
    """
    matrices, chain, shape = [], [], x.shape
    for layer in [*net, None]:
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


@pytest.mark.parametrize("slope", [relaxations.zero, relaxations.one, relaxations.parallel])
def test_every_slope_rule_is_sound(slope):
    net, x, y = make("windows")
    low = margin_lower_bounds(net, x, y, 0.1, slope=slope)
    assert not torch.equal(low, margin_lower_bounds(net, x, y, 0.1))
    for point in in_ball(x, 0.1, 100, torch.Generator().manual_seed(0)):
        assert (true_margins(net, point, y) >= low - 1e-9).all()


@pytest.mark.parametrize("name", NETS)
def test_equal_to_the_slow_path(name):
    full, x, y = make(name, batch=2)
    # a ReLU right after a ReLU does nothing, and costs nothing here; the slow path does not know it
    net = nn.Sequential(*[a for a, b in zip(full, [None, *full])
                          if not (isinstance(a, nn.ReLU) and isinstance(b, nn.ReLU))])
    for relax in ("crown-ibp", "deeppoly"):
        torch.testing.assert_close(margin_lower_bounds(full, x, y, 0.1, relax),
                                   margin_lower_bounds(net, x, y, 0.1, relax))
        if relax == "crown-ibp" and name == "batchnorm":
            continue                 # intervals there go layer by layer, not through the product
        ours = margin_lower_bounds(net, x, y, 0.1, relax), preactivation_bounds(net, x, 0.1, relax)
        for i in range(len(x)):
            bounds, low = slow_bounds(net, x[i], y[i], 0.1, relax == "crown-ibp")
            torch.testing.assert_close(ours[0][i], low, atol=1e-9, rtol=0)
            for (l, u), (a, b) in zip(ours[1], bounds):
                torch.testing.assert_close(l[i].flatten(), a, atol=1e-9, rtol=0)
                torch.testing.assert_close(u[i].flatten(), b, atol=1e-9, rtol=0)


def test_by_hand():
    """Two hidden layers, input x in [1/4, 3/4]^2 (eps 1/4 around the middle), label 0:

        z1 = x1 + x2 - 1/2 in [0, 1]     h1 = relu(z1) = z1               logit 0 = 2 h4
        z2 = x1 - x2 in [-1/2, 1/2]      h2 = relu(z2)                    logit 1 = h3
        z3 = h1 - h2                     z4 = h1

    Intervals: z3 in [-1/2, 1], z4 in [0, 1], margin 2 h4 - h3 >= 2*0 - 1 = -1.
    Back-substitution of z3: h2 <= (z2 + 1/2)/2, so z3 >= x1 + x2 - 1/2 - (x1 - x2)/2 - 1/4
        = x1/2 + 3/2 x2 - 3/4 >= -1/4;  h2 >= z2 (a tie, slope 1), so z3 <= 2 x2 - 1/2 <= 1.
    Margin, with h3 <= c (z3 - l), c = u/(u - l): 2 h1 - c (h1 - h2) + c l, and h2 >= z2:
        CROWN-IBP l = -1/2, c = 2/3:  2 x1 + 2/3 x2 - 1   >= 1/2 + 1/6  - 1   = -1/3
        DeepPoly  l = -1/4, c = 4/5:  2 x1 + 2/5 x2 - 4/5 >= 1/2 + 1/10 - 4/5 = -1/5
    """
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(),
                        nn.Linear(2, 2)).double()
    for layer, W, b in ((0, [[1., 1.], [1., -1.]], [-.5, 0.]), (2, [[1., -1.], [1., 0.]], [0., 0.]),
                        (4, [[0., 2.], [1., 0.]], [0., 0.])):
        net[layer].weight.data = torch.tensor(W).double()
        net[layer].bias.data = torch.tensor(b).double()
    x, y = torch.full((1, 2), 0.5).double(), torch.tensor([0])
    for relax, margin, low in (("box", -1, -.5), ("crown-ibp", -1 / 3, -.5),
                               ("deeppoly", -.2, -.25)):
        assert margin_lower_bounds(net, x, y, 0.25, relax)[0].tolist() == pytest.approx([0, margin])
        (l1, u1), (l3, u3) = preactivation_bounds(net, x, 0.25, relax)
        assert l1[0].tolist() == [0, -.5] and u1[0].tolist() == [1, .5]
        assert l3[0].tolist() == pytest.approx([low, 0]) and u3[0].tolist() == pytest.approx([1, 1])


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
            (convs, torch.rand(8, 1, 10, 10), 23, 24)):
        assert peak(net, x, 2 ** low) < 2 ** low < 2 ** high < peak(net, x, None) < 2 ** 31


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
    net = train.build_network("mlp", (3, 4, 4), 3, "default", train.CIFAR_STATISTICS).double()
    mean, std = (torch.tensor(t).double().repeat_interleave(16) for t in train.CIFAR_STATISTICS)
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
            patch.setattr(relaxations, "_is_dense", lambda op, size: dense)
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
        ours = relaxations._ConvTranspose.apply(A, W, *options)
        adjoint = (nn.functional.conv2d(x, W, None, s, p, d, groups) * A).sum()     # <Wx, A>
        torch.testing.assert_close((ours * x).sum(), adjoint)                       # = <x, W'A>
        ours, grads = (torch.autograd.grad(t, (A, W)) for t in ((ours * x).sum(), adjoint))
        torch.testing.assert_close(ours, grads)


def test_windows_on_the_map():
    """_take cuts windows out of a map, _whole_map puts them back: loops over the positions."""
    shape, window, rows = (2, 4, 5), relaxations.Window((3, 2), (2, 1), (1, 1)), (2, 6)
    t = torch.arange(1., 41).view(1, 1, 40)
    padded = nn.functional.pad(t.view(2, 4, 5), (1, 1, 1, 1))
    seen = relaxations._take(t, window, shape, relaxations.Rows(rows))             # (1, 1, G, 1, F)
    for g, (i, j) in enumerate((i, j) for i in range(rows[0]) for j in range(rows[1])):
        patch = padded[:, 2 * i:2 * i + 3, j:j + 2].permute(1, 2, 0).flatten()     # (h, w, C)
        assert seen[0, 0, g, 0].tolist() == patch.tolist() + [0] * 4               # filled to 16
    back = relaxations._whole_map(seen, window, shape, relaxations.Rows(rows))     # (1, 1, 1, G, N)
    whole = t.view(2, 4, 5).permute(1, 2, 0).flatten()
    assert ((back[0, 0, 0] == whole) | (back[0, 0, 0] == 0)).all()
    assert (back != 0).sum() == (seen != 0).sum()


def test_the_trace_is_in_the_order_of_the_input():
    """Its first entry is the gradient of the bound with respect to the whole box."""
    net, x, y = make("batchnorm")
    stages, _, box = relaxations.prepare(net, x, 0.1, "deeppoly", None)
    pairs = [[t.detach().flatten(1) for t in p] for p in preactivation_bounds(net, x, 0.1)]
    l, u = (torch.cat(t, 1) for t in zip(*pairs))
    box = [t.detach().requires_grad_() for t in box]
    rows = torch.eye(net(x).shape[1], dtype=x.dtype)[y]
    zero, trace = torch.zeros_like(l), []
    sub = relaxations.Subdomains([p[0].shape[1] for p in pairs], rows, box, l, u, zero, zero, zero)
    low = relaxations.subdomain_bounds(stages, sub, trace=trace)[0]
    grads = torch.autograd.grad(low.sum(), box)
    torch.testing.assert_close(trace[0], (grads[0] + grads[1])[0])


def test_the_functions_with_a_backward_pass_of_their_own():
    """Finite differences, for every way the shapes broadcast."""
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for A in (random(2, 3, 2, 4, 5), random(2, 1, 2, 4, 5), random(1, 3, 2, 4, 5)):
        for v in (random(2, 3, 2, 1, 5), random(1, 3, 1, 1, 5), random(2, 1, 1, 1, 5)):
            assert torch.autograd.gradcheck(relaxations._Dot.apply, (A, v))
        for R in (1, 4):                                     # one slope for all rows, or for each
            lines = random(2, 3, 2, R, 5), random(2, 3, 2, 1, 5), random(2, 3, 2, 1, 5)
            assert torch.autograd.gradcheck(relaxations._Lines.apply, (A, *lines))
        for box in ((random(2, 3, 2, 1, 5), random(2, 3, 2, 1, 5)), (random(1, 3, 2, 1, 5),) * 2):
            assert torch.autograd.gradcheck(relaxations._Minimum.apply, (A, *box))
    assert torch.autograd.gradcheck(relaxations._Sides.apply,
                                    (random(2, 1, 2, 3, 4), random(2, 1, 2, 3, 4)))


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


def test_what_changes_the_function_behind_our_back_is_refused():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    net, x, y = make("mlp")
    hooked, subclass, tied = deepcopy(net), deepcopy(net), deepcopy(net)
    hooked[1].register_forward_hook(lambda module, inputs, output: -output)
    subclass[0] = Twice(6, 7)
    tied[2], tied[4] = nn.Linear(7, 7), nn.Linear(7, 7)
    tied[4] = tied[2]
    tied.double()
    margin_lower_bounds(tied, x, y, 0.1)
    normed = deepcopy(net)
    torch.nn.utils.parametrizations.weight_norm(normed[2])
    torch.testing.assert_close(margin_lower_bounds(normed, x, y, 0.1),
                               margin_lower_bounds(net, x, y, 0.1))
    stack = lambda n: {k: torch.stack([p, p]) for k, p in n.named_parameters()}
    for n, params, message in ((hooked, None, "without hooks"), (subclass, None, "layer 0 (Twice)"),
                               (tied, stack(tied), "the same module"),
                               (normed, stack(normed), "unknown")):
        with pytest.raises(ValueError, match=re.escape(message)):
            margin_lower_bounds(n, x, y, 0.1, params=params)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="full precision"):
        margin_lower_bounds(net, x, y, 0.1)


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


def test_labels_of_any_integer_type_and_inference_mode():
    net, x, y = make("windows")
    expected = margin_lower_bounds(net, x, y, 0.1)
    for labels in (y.to(torch.uint8), y.to(torch.int16), y.tolist()):
        assert torch.equal(margin_lower_bounds(net, x, labels, 0.1), expected)
    relaxations._seen.cache_clear()
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


@pytest.mark.parametrize("layers, message", [
    ([nn.Flatten(), nn.Sigmoid()], "layer 1 (Sigmoid) is not supported; supported are Conv2d"),
    ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")],
     "layer 0 (Conv2d): only symmetric zero padding"),
    ([nn.Conv2d(1, 2, 2, padding="same")], "only symmetric zero padding"),
    ([nn.Conv2d(2, 2, 3)], "layer 0 (Conv2d) takes 2 channels"),
    ([nn.Conv2d(1, 2, 7)], "its kernel is larger than its input"),
    ([nn.Conv2d(1, 2, 3), nn.Linear(2, 3)], "is nn.Flatten() missing?"),
    ([nn.Conv2d(1, 2, 3)], "not in logits"),
    ([nn.BatchNorm2d(1).train(), nn.Flatten(), nn.Linear(16, 3)],
     "layer 0 (BatchNorm2d) uses batch statistics"),
    ([nn.Flatten(2), nn.Linear(16, 3)], "only Flatten(start_dim=1, end_dim=-1)"),
])
def test_networks_that_cannot_be_bounded(layers, message):
    with pytest.raises(ValueError) as error:
        margin_lower_bounds(nn.Sequential(*layers), torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1)
    assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(relax="zonotope"), "relax='zonotope' is not one of box, crown-ibp, deeppoly"),
    (dict(eps=-0.1), "eps=-0.1"), (dict(eps=math.nan), "eps=nan"),
    (dict(x=torch.full((1, 6), 1.2)), "outside [0, 1]"),
    (dict(x=torch.full((1, 6), math.nan)), "outside [0, 1]"),
    (dict(x=torch.zeros(1, 6).double()), "all float32 or all float64"),
    (dict(x=torch.zeros(1, 6).half()), "all float32"),
    (dict(x=torch.zeros(0, 6), y=torch.zeros(0).long()), "x is empty"),
    (dict(eps=torch.zeros(5, 1)), "broadcasts with x"),
    (dict(y=torch.tensor([True])), "integer labels"),
    (dict(intermediate=[]), "intermediate has to hold a pair"),
    (dict(params={"0.weight": torch.zeros(2, 6, 7)}), "but the layer's is (7, 6)"),
    (dict(params={"0.weight": torch.zeros(0, 7, 6)}), "one leading P >= 1"),
    (dict(y=torch.tensor([4])), "labels outside 0..3"),
    (dict(y=torch.tensor([0, 1])), "1 integer labels"),
    (dict(params={"0.weights": torch.zeros(2, 7, 6)}), "unknown ['0.weights']"),
    (dict(net=nn.Linear(6, 4)), "has to be a plain torch.nn.Sequential"),
    (dict(memory=math.inf), "memory=inf has to be a number of bytes"),
    (dict(memory=math.nan), "memory=nan has to be"), (dict(memory=-1), "memory=-1 has to be"),
])
def test_arguments_that_make_no_sense(change, message):
    args = dict(net=make("mlp", dtype=torch.float32)[0], x=torch.zeros(1, 6),
                y=torch.tensor([0]), eps=0.1) | change
    with pytest.raises(ValueError) as error:
        margin_lower_bounds(**args)
    assert message in str(error.value)


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


def test_smoothed_loss():
    theta, g = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    value, error = gls.smoothed_loss(SMOOTHED["step"][0], theta, 0.3, 20000, g)
    exact = 0.5 * (1 + math.erf(0.2 / 0.3 / math.sqrt(2)))
    assert abs(value - exact) < 5 * error and 0 < error < 0.01


@pytest.mark.parametrize("estimator", [
    lambda *a, **k: gls.pgpe(*a, 6, **k), lambda *a, **k: gls.rgs(*a, 6, **k),
    lambda *a, **k: gls.rgs(*a, 6, antithetic=True, **k),
    lambda *a, **k: gls.smoothed_loss(*a, 6, **k)])
def test_estimators_leave_theta_alone_and_do_not_depend_on_chunks(estimator):
    theta = torch.randn(5, dtype=torch.float64)
    before = theta.clone()
    results = [estimator(lambda t: t.square().sum(1).sin(), theta, 0.2,
                         generator=torch.Generator().manual_seed(3), chunk=chunk)
               for chunk in (None, 1, 4)]
    assert torch.equal(theta, before) and not theta.requires_grad
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
    assert train.members_at_once(auto, config | dict(batch_size=10 ** 4)) == 1
    assert train.members_at_once(auto, config | dict(batch_size=10 ** 4, device="cuda")) == 16


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
])
def test_estimators_refuse_nonsense(call, message):
    with pytest.raises(ValueError) as error:
        call(lambda t: t.sum(1), torch.zeros(3), torch.Generator())
    assert message in str(error.value)


def test_pgpe_example_of_the_docstring_runs():
    code = gls.__doc__.split("PGPE in ten lines:")[1]
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
    assert net[9].weight.abs().max() <= 1 / math.sqrt(512)             # the last keeps PyTorch's
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


@pytest.mark.parametrize("relax", ["alpha-crown", *train.ATTACKING])
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


def test_pages_have_the_tables_of_the_results(monkeypatch):
    root = Path(train.__file__).parent
    monkeypatch.syspath_prepend(root / "figures")
    import tables
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.filled(page) for page in pages] == pages
    assert all("<!-- end -->" in page for page in pages)
    # 5 and 5 runs, all of one above all of the other: 2 of 252 ways to deal them are as extreme
    assert tables.permutation_test([6., 7, 8, 9, 10], [1., 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert tables.permutation_test([1., 2], [1., 2]) == 1


def test_readme_explains_every_column_of_the_log():
    readme = (Path(train.__file__).parent / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", readme, re.M) == list(train.LOG)


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


def test_hold_out_takes_the_last_training_images_for_the_test(tmp_path, capsys):
    data = train.load_dataset("digits")
    held = train.hold_out(data, 200)
    assert torch.equal(torch.cat([held.x_train, held.x_test]), data.x_train)
    assert torch.equal(held.y_test, data.y_train[-200:]) and len(held.x_test) == 200
    assert train.hold_out(data, 0) is data
    run = tmp_path / "run"
    assert command(train.main, "--validation", 200, "--out", run, *QUICK[:6]) == 0
    assert "200 test images" in capsys.readouterr().out
    assert command(certify.main, run, "--stages", "box", "--restarts", 0) == 0
    assert "200 test images" in capsys.readouterr().out
    labels = [json.loads(l)["label"]
              for l in next(run.glob("certify-*.jsonl")).read_text().splitlines()[1:]]
    assert sorted(labels) == sorted(held.y_test.tolist())
    out = tmp_path / "test.jsonl"                              # and the test images after all
    assert command(certify.main, run, "--stages", "box", "--restarts", 0, "--validation", 0,
                   "--out", out) == 0
    labels = [json.loads(l)["label"] for l in out.read_text().splitlines()[1:]]
    assert sorted(labels) == sorted(data.y_test.tolist())
    assert command(train.main, "--validation", 1437, "--out", tmp_path / "no") == 2
    assert "leaves none" in capsys.readouterr().err


def test_augment_shifts_and_flips():
    x = torch.arange(1., 3 * 16 + 1).view(1, 3, 4, 4).repeat(200, 1, 1, 1)
    g = torch.Generator().manual_seed(0)
    padded = nn.functional.pad(x[0], (2, 2, 2, 2))
    crops = {tuple(p[:, i:i + 4, j:j + 4].flatten().tolist()) for i in range(5) for j in range(5)
             for p in (padded, nn.functional.pad(x[0].flip(2), (2, 2, 2, 2)))}
    out = {tuple(image.flatten().tolist()) for image in train.augment(x, g)}
    assert out <= crops and len(out) > 40                              # of 50


def test_certified_margin_decides_close_calls_in_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3))
    x = torch.rand(2, 50)
    y = net(x).argmax(1)
    low = train.certified_margin(net, x, y, 0.01, "deeppoly")
    net[2].bias.data[y[0]] -= low[0].item()                            # now the bound is about 0
    exact = train.certified_margin(*train.in_float64(net, x, y), 0.01, "deeppoly")
    assert exact.abs()[0] < train.CLOSE
    assert train.certified_margin(net, x, y, 0.01, "deeppoly")[0] == exact[0].float()


# ------------------------------------------------------------------------------------ files of data

def idx(images, magic):
    sizes = np.array([magic, *images.shape], ">i4").tobytes()
    return sizes + images.astype(np.uint8).tobytes()


def fake_mnist(folder, zipped):
    rng, content = np.random.default_rng(0), {}
    for name in train.MNIST_FILES:
        n = 20 if "train" in name else 10
        array = rng.integers(0, 256, (n, 28, 28)) if "images" in name else rng.integers(0, 10, n)
        content[name] = idx(array, 0x803 if "images" in name else 0x801)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content[name]) if zipped else content[name])
    return content


@pytest.mark.parametrize("place, zipped", [
    ("MNIST/raw", True), ("MNIST/raw", False), (".", True), (".", False)])
def test_mnist_files(tmp_path, place, zipped):
    content = fake_mnist(tmp_path / place, zipped)
    data = train.load_dataset("mnist", tmp_path)
    assert data.x_train.shape == (20, 1, 28, 28) and data.x_test.shape == (10, 1, 28, 28)
    assert data.classes == 10
    raw = np.frombuffer(content["train-images-idx3-ubyte"], np.uint8)[16:]
    assert torch.equal(data.x_train.flatten(), torch.tensor(raw) / 255)
    assert data.y_test.tolist() == list(content["t10k-labels-idx1-ubyte"][8:])


@pytest.mark.parametrize("damage, message", [
    (lambda b: b[:-5], "bytes where its header says"), (lambda b: b + b"x", "more bytes"),
    (lambda b: b"", "not an MNIST"),
    (lambda b: b"\x00\x00\x08\x01" + b[4:], "not an MNIST image file"),
    (lambda b: b[:4] + b"\x7f" * 4 + b[8:], "not an MNIST"),
    (lambda b: b"PK" + b, "not an MNIST")])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_mnist(tmp_path, damage, message, zipped):
    content = fake_mnist(tmp_path, zipped)
    bad = damage(content["train-images-idx3-ubyte"])
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(bad) if zipped else bad)
    with pytest.raises(train.InputError, match=message):
        train.load_dataset("mnist", tmp_path)


def test_damaged_gzip_and_wrong_labels(tmp_path):
    content = fake_mnist(tmp_path, True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    for bad in (good[:-3], b"no gzip", good[:12] + b"\xff" * 5 + good[17:]):
        path.write_bytes(bad)
        with pytest.raises(train.InputError, match="delete it, and it is downloaded again"):
            train.load_dataset("mnist", tmp_path)
    labels = content["train-labels-idx1-ubyte"]
    path.write_bytes(gzip.compress(labels[:-1] + b"\x0a"))
    with pytest.raises(train.InputError, match=r"y_train has labels outside 0..9"):
        train.load_dataset("mnist", tmp_path)


def fake_cifar(folder, zipped, n=3, last_label=None):
    rng, files = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = rng.integers(0, 256, (n, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    if zipped:
        with tarfile.open(folder / train.CIFAR_FILE, "w:gz") as tar:
            for name, b in files.items():
                info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
                info.size = len(b)
                tar.addfile(info, io.BytesIO(b))
    else:
        (folder / "cifar-10-batches-bin").mkdir()
        for name, b in files.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(b)
    return files


@pytest.mark.parametrize("zipped", [True, False])
def test_cifar_files(tmp_path, zipped):
    files = fake_cifar(tmp_path, zipped)
    data = train.load_dataset("cifar10", tmp_path)
    assert data.x_train.shape == (15, 3, 32, 32) and data.x_test.shape == (3, 3, 32, 32)
    record = np.frombuffer(files["data_batch_2.bin"], np.uint8)[:3073]       # image 3
    assert data.y_train[3] == record[0]
    assert torch.equal(data.x_train[3].flatten(), torch.tensor(record[1:]) / 255)


def test_damaged_cifar(tmp_path):
    fake_cifar(tmp_path / "a", False)
    (tmp_path / "a/cifar-10-batches-bin/data_batch_3.bin").write_bytes(b"x" * 3000)
    fake_cifar(tmp_path / "b", False)
    (tmp_path / "b/cifar-10-batches-bin/test_batch.bin").unlink()
    fake_cifar(tmp_path / "c", True)
    archive = tmp_path / "c" / train.CIFAR_FILE
    archive.write_bytes(archive.read_bytes()[:-2000])
    for folder, message in (("a", "data_batch_3.bin missing or not made of"),
                            ("b", "test_batch.bin is missing"), ("c", "cannot be read")):
        with pytest.raises(train.InputError, match=message):
            train.load_dataset("cifar10", tmp_path / folder)


def test_digits():
    data = train.load_dataset("digits")
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.min() == 0 and data.x_train.max() == 1 and data.classes == 10
    assert data.y_train[:10].tolist() == list(range(10))


def npz(path, **change):
    rng = np.random.default_rng(0)
    arrays = dict(x_train=rng.integers(0, 256, (12, 6, 5, 3)).astype(np.uint8),
                  y_train=np.arange(12) % 4,
                  x_test=rng.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8),
                  y_test=np.arange(4)) | change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_npz(tmp_path):
    path = tmp_path / "own.npz"
    arrays = npz(path)
    data = train.load_dataset(str(path))
    assert data.x_train.shape == (12, 3, 6, 5) and data.classes == 4                  # NHWC
    assert data.x_train[2, 1, 4, 3] == np.float32(arrays["x_train"][2, 4, 3, 1]) / np.float32(255)
    npz(path, x_train=np.ones((12, 3, 6, 5)), x_test=np.zeros((4, 3, 6, 5)))
    assert train.load_dataset(str(path)).x_train.shape == (12, 3, 6, 5)              # NCHW, float64
    npz(path, x_train=np.ones((12, 6, 5)), x_test=np.zeros((4, 6, 5), np.float32))
    assert train.load_dataset(str(path)).x_train.shape == (12, 1, 6, 5)


@pytest.mark.parametrize("change, message", [
    (dict(x_test=None), "lacks the arrays x_test"),
    (dict(y_test=np.array([0, 1, 2, 4])), "y_test has labels outside 0..3: 0 to 4"),
    (dict(y_train=np.arange(12) - 1), "labels outside"),
    (dict(y_train=np.arange(11)), "12 integer labels"),
    (dict(y_train=np.arange(12.)), "integer labels"),
    (dict(x_train=np.full((12, 6, 5, 3), 1.5)), "outside"),
    (dict(x_train=np.full((12, 6, 5, 3), np.nan)), "NaN"),
    (dict(x_train=np.zeros((12, 6, 5, 3), int)), "uint8 or float"),
    (dict(x_train=np.zeros((12, 90))), "has to be uint8 or float images"),
    (dict(x_test=np.zeros((4, 5, 5, 3))), "test images"),
    (dict(x_train=np.array([{}] * 12)), "not a readable")])
def test_bad_npz(tmp_path, change, message):
    path = tmp_path / "own.npz"
    npz(path, **change)
    with pytest.raises(train.InputError, match=message):
        train.load_dataset(str(path))


def test_files_that_are_no_npz(tmp_path):
    good = tmp_path / "good.npz"
    npz(good)
    for i, content in enumerate((b"", b"hello", good.read_bytes()[:-40], good.read_bytes()[:200])):
        bad = tmp_path / f"bad{i}.npz"
        bad.write_bytes(content)
        with pytest.raises(train.InputError, match="not a readable"):
            train.load_dataset(str(bad))


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, for downloads: serves tmp_path/www."""
    (tmp_path / "www").mkdir()
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{s.server_address[1]}/"
        s.shutdown()


def test_download_tries_mirrors_and_checks_what_came(tmp_path, server, monkeypatch):
    folder, url = server
    fake_mnist(folder, True)
    (folder / "damaged").mkdir()
    for path in folder.glob("*.gz"):
        (folder / "damaged" / path.name).write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(train, "MNIST_MIRRORS", (url + "missing/", url + "damaged/", url))
    sums = {n: hashlib.md5((folder / (n + ".gz")).read_bytes()).hexdigest()
            for n in train.MNIST_FILES}
    monkeypatch.setattr(train, "MNIST_FILES", sums)
    target = tmp_path / "data"
    assert len(train.load_dataset("mnist", target).x_train) == 20
    names = sorted(p.name for p in target.rglob("*") if p.is_file())
    assert names == sorted(n + ".gz" for n in sums)
    monkeypatch.setattr(train, "MNIST_MIRRORS", (url + "damaged/", "http://127.0.0.1:1/"))
    with pytest.raises(train.InputError) as error:
        train.load_dataset("mnist", tmp_path / "other")
    assert "wrong checksum" in str(error.value) and "Put the four files" in str(error.value)
    assert not [p for p in (tmp_path / "other").rglob("*") if p.is_file()]     # nothing left behind


# -------------------------------------------------------------------------------- the command lines

QUICK = "--epochs 1 --ramp 0 --subset 96 --test-subset 60 --batch-size 32".split()


def command(main, *args):
    """Exit status of a command line."""
    try:
        train.run(lambda: main([str(a) for a in args]))
    except SystemExit as e:
        return e.code
    return 0


@pytest.mark.parametrize("opt", ["grad", "rgs", "pgpe"])
@pytest.mark.parametrize("relax", RELAXATIONS)
def test_train_then_certify_finds_the_same_numbers(tmp_path, capsys, relax, opt):
    run = tmp_path / "run"
    extra = ["--samples", 8] if opt == "pgpe" else []
    assert command(train.main, "--relax", relax, "--opt", opt, "--out", run, "--eps", 0.03,
                   "--lr", 0.01, *QUICK, *extra) == 0
    printed = capsys.readouterr().out
    assert f"python certify.py {run}" in printed and set(p.name for p in run.iterdir()) == {
        "config.json", "log.csv", "checkpoint.pt"}
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0].split(",") == list(train.LOG) and len(lines) == 2
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
    assert {r["status"] for r in rows} <= set(certify.STATUSES)


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
        low, slopes, multipliers = relaxations.subdomain_bounds(problem.stages, sub, steps)
        inside = (z[:, node.neurons] * node.signs >= 0).all(1)
        assert (margin[inside] >= low - 1e-9).all()
        found += int(inside.sum())
        again = sub._replace(slopes=slopes, multipliers=multipliers)         # they give that bound
        assert torch.allclose(relaxations.subdomain_bounds(problem.stages, again)[0], low)
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
        return relaxations.subdomain_bounds(problem.stages, sub, steps)[0].item()
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


@pytest.mark.parametrize("name", UNITS)
def test_a_factor_of_the_last_layer_changes_neither_verdicts_nor_search(name, monkeypatch):
    torch.manual_seed(0)
    eps, layers = UNITS[name]()
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    for layer in net:
        if hasattr(layer, "weight"):
            layer.weight *= 2
    x = train.load_dataset("digits").x_test[:25]
    y = net(x).argmax(1)
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
    dict(y=[0, 1, 2]), dict(y=torch.zeros(2).long()), dict(y=torch.zeros(3)),
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
    with pytest.raises(ValueError, match="a margin is between two"):
        certify.certify(nn.Sequential(nn.Linear(6, 1)), x, torch.zeros(3).long(), 0.1)
    net[1].forward = lambda z: z.clamp(min=-0.1)           # the network that runs is another one
    with pytest.raises(ValueError, match="bounds and forward pass"):
        certify.certify(net, x, y, 0.1)


# ------------------------------------------------------------- certify.py from the command line

def test_a_certified_and_attacked_sample_aborts(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert command(train.main, "--out", run, "--eps", 0.5, "--eps-train", 0, *QUICK,
                   "--epochs", 4, "--lr", 0.01) == 0
    for module in (train, certify):                                    # plant an unsound bound
        monkeypatch.setattr(module, "certified_margin",
                            lambda net, x, y, *a, **k: torch.ones(len(x)))
    assert command(certify.main, run, "--stages", *RELAXATIONS) == 1
    error = capsys.readouterr().err
    assert "a bound is unsound" in error
    witness = np.load(re.search(r"counterexample is in (\S+)", error)[1])
    assert witness.shape == (1, 8, 8)
    net, *_ = train.load_run(run)
    data = train.load_dataset("digits")
    with pytest.raises(AssertionError, match="both certified and attacked"):
        train.evaluate(net, data.x_test[:60], data.y_test[:60], 0.5)




def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(tmp_path, monkeypatch):
    save = train.save_checkpoint
    def slow(folder, net, config, training=None):
        save(folder, net, config, training)
        if training:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train, "save_checkpoint", slow)
    assert command(train.main, "--out", tmp_path / "run", *QUICK) == 143


@pytest.mark.parametrize("args, words", [
    (["--dataset", "imagenet"], "--dataset: 'imagenet'"),
    (["--relax", "zonotope"], "--relax: invalid choice: 'zonotope'"),
    (["--net", "vgg"], "--net: invalid choice"), (["--opt", "adam"], "--opt: invalid choice"),
    (["--eps", "-0.1"], "--eps: '-0.1'"),
    (["--eps", "8"], "--eps: '8' has to be a number >= 0 and <= 1"),
    (["--eps", "1/0"], "--eps"), (["--eps-train", "nan"], "--eps-train: 'nan'"),
    (["--lr", "0"], "--lr: '0'"),
    (["--opt", "pgpe", "--sigma", "0"], "--sigma: '0' has to be a number > 0"),
    (["--opt", "pgpe", "--samples", "0"], "--samples: '0'"),
    (["--opt", "pgpe", "--samples", "3"], "--samples: 3 is odd"),
    (["--samples", "5"], "--samples: 5 is odd"),
    (["--loss", "certified-error"], "use --opt pgpe"),
    (["--loss", "certified-error", "--opt", "pgpe", "--relax", "sabr"], "sabr has no"),
    (["--lam", "0"], "--lam: '0'"), (["--alpha", "2"], "--alpha: '2'"),
    (["--sigma-adapt", "scalar"], "--sigma-adapt"),
    (["--batch-size", "x"], "--batch-size"), (["--epochs", "-1"], "--epochs"),
    (["--device", "cuda"], "--device cuda"), (["--dataset", "no.npz"], "no.npz: no such file"),
    (["--unknown"], "--unknown")])
def test_train_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(train.main, *args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_run_folders_and_checkpoints_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    assert command(certify.main) == 2 and "no run found" in capsys.readouterr().err
    assert command(train.main, "--out", "full", *QUICK) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]
    for _ in range(2):
        assert command(train.main, "--epochs", 0, "--test-subset", 5) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-cnn3-deeppoly-rgs", "digits-cnn3-deeppoly-rgs-2"]
    assert command(certify.main) == 0                                  # the newest
    assert "digits-cnn3-deeppoly-rgs-2" in capsys.readouterr().out
    path = tmp_path / "runs/digits-cnn3-deeppoly-rgs/checkpoint.pt"
    good = path.read_bytes()
    for bad in (b"", b"hello", good[:-100], good.replace(b"format", b"foreign")):
        path.write_bytes(bad)
        assert command(certify.main, path.parent) == 2
        err = capsys.readouterr().err
        assert "checkpoint" in err and err.count("\n") == 1
    saved = torch.load(io.BytesIO(good), weights_only=True)
    for change in (dict(format=99), dict(config=saved["config"] | {"net": "cnn5"}), dict(state={})):
        torch.save(saved | change, path)
        assert command(certify.main, path.parent) == 2 and capsys.readouterr().err.count("\n") == 1
    assert command(certify.main, tmp_path / "nowhere") == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_a_loss_that_explodes_stops_the_run(tmp_path, capsys):
    code = command(train.main, "--relax", "box", "--opt", "grad", "--lr", "1e30",
                   "--out", tmp_path / "run", *QUICK)
    err = capsys.readouterr().err
    assert code == 1 and "Try a smaller --lr" in err
    assert re.search(r"epoch 1, batch \d, eps 0.1: .*the bounds before layer 3 \(ReLU\(\)\)", err)
    assert train.load_run(tmp_path / "run")                            # the one before it is whole


# --------------------------------------------------------------------- runs that stop and go on

RUNS = {   # what a run may have beside weights: sigmas, running statistics, augmentation
    "rgs": "--net small --epochs 3 --subset 300 --test-subset 5 --ramp 2 --milestones 1 2",
    "pgpe": "--net small --opt pgpe --samples 4 --sigma-adapt parameter --epochs 2 --subset 200 "
            "--test-subset 5 --milestones 1",
    "batchnorm": "--dataset own.npz --net cnn7 --relax box --opt grad --epochs 3 --batch-size 4",
    "augmented": "--dataset cifar10 --data-dir . --net small --relax sabr --epochs 2 "
                 "--batch-size 4"}


def weights(run):
    return train.load_run(run)[0].state_dict()


def stop_at(monkeypatch, steps, number):
    """Send this process a signal in the middle of each of these steps, counted over all runs."""
    take_step, count = train.take_step, [0]
    def step(*args):
        count[0] += 1
        if count[0] in steps:
            os.kill(os.getpid(), number)
        return take_step(*args)
    monkeypatch.setattr(train, "take_step", step)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_stops_and_goes_on_ends_with_the_same_weights(
        tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    npz("own.npz")
    fake_cifar(tmp_path, zipped=True)
    assert command(train.main, *RUNS[kind].split(), "--out", "whole") == 0
    with monkeypatch.context() as m:
        stop_at(m, (2, 4, 5), signal.SIGTERM)
        assert command(train.main, *RUNS[kind].split(), "--out", "run") == 128 + signal.SIGTERM
        err = capsys.readouterr().err
        assert "python train.py --resume run goes on after epoch 1, batch 2" in err
        assert command(train.main, "--resume", "run") == 143 == command(
            train.main, "--resume", "run")
    assert any(not torch.equal(t, weights("whole")[k]) for k, t in weights("run").items())
    assert command(train.main, "--resume", "run") == 0
    for k, t in weights("run").items():
        assert torch.equal(t, weights("whole")[k]), k
    logs = [[line.split(",")[:7] for line in Path(run, "log.csv").read_text().splitlines()]
            for run in ("whole", "run")]
    assert logs[0] == logs[1] and len(logs[0]) > 2                     # all but the times
    before = Path("run/checkpoint.pt").read_bytes()
    assert command(train.main, "--resume", "run") == 0                 # nothing left to do
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children")
def test_fifty_kills_at_random_times_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    run = "--net mlp --relax box --opt rgs --epochs 40 --subset 640 --ramp 20 --test-subset 5"
    assert command(train.main, *run.split(), "--out", "whole") == 0
    with monkeypatch.context() as m:
        stop_at(m, (1,), signal.SIGINT)
        assert command(train.main, *run.split(), "--out", "run") == 130
    random, kills = np.random.default_rng(0), 0
    while kills < 50:
        child = os.fork()
        if child == 0:
            os._exit(command(train.main, "--resume", "run"))
        time.sleep(random.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert train.load_run("run")[2]["done"] > 0                    # always whole
    assert command(train.main, "--resume", "run") == 0
    assert all(torch.equal(t, weights("whole")[k]) for k, t in weights("run").items())


def test_a_second_interrupt_ends_at_once_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.requests_to_stop() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    run, fsync, count = tmp_path / "run", os.fsync, [0]
    def full(handle):
        count[0] += 1
        if count[0] > 4:           # config, checkpoint at the start; log and checkpoint of epoch 1
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)
    monkeypatch.setattr(os, "fsync", full)
    quick = ["--epochs", 3, *QUICK[2:]]
    assert command(train.main, "--out", run, *quick) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
    assert train.load_run(run)[2]["done"] == 3 and {p.name for p in run.iterdir()} == {
        "config.json", "log.csv", "checkpoint.pt"}
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert command(train.main, "--resume", run) == 0


def test_one_process_for_each_run_and_only_on_its_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    npz("own.npz")
    own = "--dataset own.npz --net mlp --relax box --opt grad --epochs 1"
    assert command(train.main, *own.split(), "--out", "run") == 0
    with train.locked("run"):
        assert command(train.main, "--resume", "run") == 2
        assert "run is in use by another process" in capsys.readouterr().err
    assert command(certify.main, "run", "--stages", "box") == 0
    with open(next(Path("run").glob("*.jsonl"))) as file:
        train.claim(file, "")
        assert command(certify.main, "run", "--stages", "box") == 2
    assert "in use" in capsys.readouterr().err
    npz("own.npz", y_train=(np.arange(12) + 1) % 4)
    for args, words in (([], "was trained on other images"), (["--lr", "1"], "leave out --lr")):
        assert command(train.main, "--resume", "run", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert command(train.main, "--resume", "nowhere") == 2
    assert "nowhere cannot be opened" in capsys.readouterr().err
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    npz("own.npz")
    for damage in ({"training": {"done": 0}}, {"training": saved["training"] | {"noise": 3}},
                   {"config": saved["config"] | {"input_shape": [3, 10 ** 6, 10 ** 6]}},
                   {"state": {k: t.double() for k, t in saved["state"].items()}}):
        torch.save(saved | damage, "run/checkpoint.pt")
        assert command(train.main, "--resume", "run") == 2, damage.keys()
        assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------- many processes

def together(world, *args, main=train.main, before=lambda rank: None):
    """Exit statuses of a command line run by so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            before(rank)
            os._exit(command(main, *args))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


QUICK_RUN = ("--net small --epochs 2 --ramp 1 --subset 200 --batch-size 33 --test-subset 5 "
             "--l1 1e-4 --kappa 0.1 --milestones 1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("world, extra", [
    (2, "--opt grad"), (3, "--opt grad --relax mtl-ibp"), (2, "--opt rgs"),
    (3, "--opt rgs --relax crown-ibp --beta 0.5"), (2, "--opt pgpe --samples 12 --members 4"),
    (3, "--opt pgpe --samples 6 --members 2 --sigma-adapt parameter")])
def test_many_processes_give_the_result_of_one(tmp_path, monkeypatch, world, extra):
    """Bit by bit for pgpe, which adds up losses in the same order; else up to rounding."""
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} {extra}".split()
    assert command(train.main, *args, "--out", "one") == 0
    assert together(world, *args, "--out", "many") == [0] * world
    one, many = weights("one"), weights("many")
    for k in one:
        if "pgpe" in extra:
            assert torch.equal(one[k], many[k]), k
        else:
            torch.testing.assert_close(one[k], many[k], atol=2e-5, rtol=0)
    logs = [np.loadtxt(f"{run}/log.csv", delimiter=",", skiprows=1) for run in ("one", "many")]
    np.testing.assert_allclose(*(log[:, :7] for log in logs), rtol=1e-3)       # all but the times


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_by_default_every_process_gets_a_part_of_the_population(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} --opt pgpe --samples 8".split()
    assert together(2, *args, "--out", "many") == [0, 0]
    assert json.loads(Path("many/config.json").read_text())["members"] == 4
    assert command(train.main, *args, "--members", "4", "--out", "one") == 0
    assert all(torch.equal(t, weights("one")[k]) for k, t in weights("many").items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_job_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} --opt pgpe --samples 8 --members 2".split()
    assert command(train.main, *args, "--out", "one") == 0
    def stop(rank):                                  # the signal reaches one process only
        stop_at(pytest.MonkeyPatch(), (4,) if rank else (), signal.SIGTERM)
    assert together(2, *args, "--out", "many", before=stop) == [143, 143]
    assert 0 < train.load_run("many")[2]["done"] < 14
    assert together(3, "--resume", "many", before=stop) == [143] * 3
    assert command(train.main, "--resume", "many") == 0
    assert all(torch.equal(t, weights("one")[k]) for k, t in weights("many").items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_first_process_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits-small-box-grad", "digits-small-box-grad-2"):
        assert together(2, *f"{QUICK_RUN} --relax box --opt grad".split()) == [0, 0]
        assert json.loads(Path("runs", name, "config.json").read_text())["processes"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_share_the_images_to_certify(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, *f"{QUICK_RUN} --out run --relax box --opt grad".split()) == 0
    args = "run --eps 0.01 --samples 40 --restarts 1 --steps 5".split()
    assert command(certify.main, *args, "--out", "one.jsonl") == 0
    assert together(3, *args, "--out", "many.jsonl", main=certify.main) == [0] * 3
    read = lambda path: [unsealed(line) for line in Path(path).read_text().splitlines()]
    one, many = ({r["index"]: r["status"] for r in read(f"{name}.jsonl")[1:]}
                 for name in ("one", "many"))
    assert one == many and len(read("many.jsonl")) == 41 and len(set(one.values())) > 1
    lines = Path("many.jsonl").read_text().splitlines(keepends=True)
    Path("many.jsonl").write_text("".join(lines[:11]))               # as an interrupted job leaves
    Path("many.jsonl.2").write_text("".join([lines[0], *lines[11:21]]))
    assert together(2, *args, "--out", "many.jsonl", main=certify.main) == [0] * 2
    assert {r["index"]: r["status"] for r in read("many.jsonl")[1:]} == one
    assert len(read("many.jsonl")) == 41 and not list(Path().glob("many.jsonl.*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists the threads of a process")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One alive when Python shuts down may abort the process. In fresh processes, where the group
    is made before the first optimizer step imports what remembers it."""
    code = ("import pathlib, sys, train; train.main(sys.argv[1:]); "
            "names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]; "
            "print([name for name in names if 'gloo' in name])")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [subprocess.Popen(
        [sys.executable, "-c", code, *f"{QUICK_RUN} --opt grad --out {tmp_path}/run".split()],
        env=os.environ | dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="localhost",
                              MASTER_PORT=port, PYTHONPATH=str(Path(train.__file__).parent)),
        stdout=subprocess.PIPE, text=True) for rank in "01"]
    assert [child.communicate()[0].splitlines()[-1] for child in children] == ["[]", "[]"]


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


# --------------------------------------------------------------------------------- hostile files

def mutations(content, count, seed=0):
    """Copies of content: cut, with bits flipped, parts overwritten, repeated, removed, zeroed."""
    random = np.random.default_rng(seed)
    for i in range(count):
        a, b = sorted(random.integers(0, len(content), 2).tolist())
        b = min(b, a + 64) if i % 2 else b
        kind = i % 7
        if kind == 0:
            yield content[:a]
        elif kind in (1, 2):
            damaged = bytearray(content)
            for _ in range(kind):
                damaged[random.integers(len(content))] ^= 1 << int(random.integers(8))
            yield bytes(damaged)
        elif kind == 3:
            yield content[:a] + random.bytes(b - a) + content[b:]
        elif kind == 4:
            yield content[:b] + content[a:]
        elif kind == 5:
            yield content[:a] + content[b:]
        else:
            yield content[:a] + bytes(b - a) + content[b:]


def fuzz(path, load, check, count=2000):
    """Every mutation of the file is refused with InputError, or passes check."""
    content, refused = path.read_bytes(), 0
    for damaged in mutations(content, count):
        path.write_bytes(damaged)
        try:
            result = load()
        except train.InputError as e:
            assert str(e) and "\n" not in str(e)
            refused += 1
        else:
            check(result, damaged)
    path.write_bytes(content)
    assert refused > 0.4 * count


def same_as(good):
    def check(result, damaged):
        for a, b in zip(result, good, strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    return check


@pytest.mark.parametrize("zipped", [True, False])
def test_fuzzed_mnist(tmp_path, zipped):
    fake_mnist(tmp_path, zipped)
    load = lambda: train.load_dataset("mnist", tmp_path)
    def plausible(data, _):                      # raw pixels have no checksum: any are as good
        assert data.x_test.shape == (10, 1, 28, 28) and len(data.x_train) == len(data.y_train) == 20
    for name in ("t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        fuzz(tmp_path / (name + ".gz" * zipped), load, same_as(load()) if zipped else plausible,
             count=1000)


def test_fuzzed_cifar(tmp_path):
    fake_cifar(tmp_path, zipped=True, n=1)
    load = lambda: train.load_dataset("cifar10", tmp_path)
    archive, good = tmp_path / train.CIFAR_FILE, load()
    fuzz(archive, load, same_as(good))
    tar, plain = gzip.decompress(archive.read_bytes()), tmp_path / "cifar-10-binary.tar"
    plain.write_bytes(tar)
    def zipped_again():                          # behind a right checksum of gzip
        archive.write_bytes(gzip.compress(plain.read_bytes(), 1))
        return load()
    def plausible(data, _):
        assert data.x_train.shape[1:] == (3, 32, 32) and len(data.x_test) == len(data.y_test)
    fuzz(plain, zipped_again, plausible, count=1000)


def test_fuzzed_npz(tmp_path):
    npz(tmp_path / "own.npz")
    load = lambda: train.load_dataset(str(tmp_path / "own.npz"))
    fuzz(tmp_path / "own.npz", load, same_as(load()))


def test_fuzzed_checkpoint(tmp_path):
    assert command(train.main, "--net", "mlp", "--dataset", npz(tmp_path / "o.npz") and tmp_path
                   / "o.npz", "--relax", "box", "--epochs", 1, "--out", tmp_path / "run") == 0
    good = weights(tmp_path / "run")
    def check(result, _):
        net, config, training = result
        assert all(torch.equal(t, good[k]) for k, t in net.state_dict().items())
        assert training["done"] == 1 and config["relax"] == "box"
    fuzz(tmp_path / "run/checkpoint.pt", lambda: train.load_run(tmp_path / "run"), check)



def test_bombs_and_foreign_paths(tmp_path):
    """Small files that unpack to gigabytes, or that ask to be written elsewhere."""
    zeros = bytes(2 ** 24)
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("x_train.npy", "w", force_zip64=True) as entry:
        for _ in range(65):                                            # just above the limit
            entry.write(zeros)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(bomb.read_bytes())
    tar = tmp_path / "tar"
    (tar / "MNIST/raw").mkdir(parents=True)
    with gzip.open(tar / train.CIFAR_FILE, "wb", 1) as archive:
        info = tarfile.TarInfo("../" * 5 + "test_batch.bin")
        info.size = 2 ** 30
        archive.write(info.tobuf())
        for _ in range(64):
            archive.write(zeros)
    with gzip.open(tar / "MNIST/raw/train-images-idx3-ubyte.gz", "wb", 1) as images:
        images.write(np.array([0x803, 150_000, 28, 28], ">i4").tobytes())
        for _ in range(64):
            images.write(zeros)
    sparse = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000000000\0".replace(b"0", b"7")            # its size once expanded
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / train.CIFAR_FILE).write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (lambda: train.load_dataset(str(bomb)), lambda: train.load_run(run),
                 lambda: train.load_dataset("cifar10", tar),
                 lambda: train.load_dataset("cifar10", tmp_path / "sparse"),
                 lambda: train.load_dataset("mnist", tar)):
        with pytest.raises(train.InputError):
            load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20       # KiB
    assert not (tmp_path.parent / "test_batch.bin").exists()
