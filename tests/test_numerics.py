"""Rounding, overflow and units: no bound is wrong, no verdict depends on them."""
import itertools
import math
import sys
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import certify
import relaxations
import train
from plumbing.for_tests import (NETS, RELAXATIONS, UNITS, hard_problem, in_ball, make, random_bn,
                                random_subdomain, true_margins)
from plumbing.rounding import ball
from relaxations import margin_lower_bounds, preactivation_bounds

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import self_check                                                                  # noqa: E402


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


def test_a_network_with_nan_weights_is_never_certified():
    for name in NETS:
        for layer in range(2, 9):
            net, x, y = make(name)
            if layer < len(net) and getattr(net[layer], "weight", None) is not None:
                net[layer].weight.data.flatten()[0] = math.nan
                for relax in RELAXATIONS:
                    low = margin_lower_bounds(net, x, y, 0.01, relax)
                    assert not (train.smallest(low, y) > 0).any()


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


@pytest.mark.parametrize("factor", [1e-6, 2.0 ** 20])
@pytest.mark.parametrize("place", ["first", "behind"])
def test_a_factor_anywhere_changes_no_verdict(place, factor):
    """In the first layer and all biases, or in the last but one, the last being an identity."""
    net, x, y, eps = hard_problem()
    scaled = deepcopy(net)
    for layer in scaled:
        if hasattr(layer, "bias") and (place == "first" or layer is scaled[-1]):
            layer.bias *= factor
    scaled[0 if place == "first" else -1].weight *= factor
    if place == "behind":
        scaled.append(nn.Linear(10, 10, bias=False).requires_grad_(False))
        scaled[-1].weight.copy_(torch.eye(10))
    torch.testing.assert_close(scaled(x) / factor, net(x))
    ours, theirs = (certify.certify(n, x, y, eps, restarts=2, timeout=20) for n in (net, scaled))
    assert sum(v.stage == "branch-and-bound" for v in ours) > 2
    assert [(v.status, v.stage) for v in theirs] == [(v.status, v.stage) for v in ours]


def test_the_unit_of_the_margins_by_hand():
    """The power of two that is next to the spread of a logit, within float32."""
    x = torch.rand(3, 1, 2, generator=torch.Generator().manual_seed(5))
    images = torch.rand(16, 1, 2, generator=torch.Generator().manual_seed(0))
    spread = images[:, 0, 1].std().item()
    assert 0.18 < spread < 0.35                                        # next to a quarter
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    for weight, unit in ((1.0, 0.25), (-4.0, 1.0), (0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0),
                         (1e-44, 2.0 ** -126), (3e38, 2.0 ** 126)):
        net[1].weight.data = torch.tensor([[0.0, 0.0], [0.0, weight]])
        net[1].bias.data = torch.tensor([-9.0, 9.0]) * bool(0.1 < abs(weight) < 9)
        assert certify.unit_of(net, x) == certify.unit_of(net, 0 * x[:1]) == unit


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 0.02, 0.1, 0.25, 2 / 255])
def test_the_ends_of_a_ball_are_in_it_exactly_and_the_next_numbers_are_not(eps, dtype):
    x = torch.rand(500, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([0.0, 1.0, 0.5])
    low, high = ball(x, eps)
    exact = [Fraction(t) for t in x.tolist()]
    lower = [max(t - Fraction(eps), 0) for t in exact]
    upper = [min(t + Fraction(eps), 1) for t in exact]
    for ends, wrong in (((low, high), False),
                        ((low.nextafter(low - 1), high.nextafter(high + 1)), True)):
        assert all((a < b) == wrong for a, b in zip(map(Fraction, ends[0].tolist()), lower))
        assert all((a > b) == wrong for a, b in zip(map(Fraction, ends[1].tolist()), upper))


@pytest.mark.parametrize("tolerance, dtype", [(None, torch.float64), (1e-4, torch.float32)])
def test_counterexamples_in_float64_are_in_the_ball_exactly(tolerance, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    x = torch.rand(20, 1, 4, 4, dtype=dtype)
    verdicts = certify.certify(net.eval(), x, net(x).argmax(1), 0.3, tolerance=tolerance)
    found = [(v, image) for v, image in zip(verdicts, x) if v.status == "attacked"]
    assert len(found) > 5
    for v, image in found:
        pairs = zip(v.counterexample.flatten().tolist(), image.flatten().tolist())
        assert all(abs(Fraction(a) - Fraction(b)) <= Fraction(0.3) for a, b in pairs)


@pytest.mark.parametrize("hidden", [0.0, 1e4, 1e5])
def test_large_hidden_values_that_cancel_certify_nothing_wrong(hidden):
    """Their rounding is that of the hidden values, not of the margins."""
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
                            nn.Linear(6, 2)).eval().requires_grad_(False)
        for layer in net[::2]:
            layer.weight *= 4
        net[2].bias += hidden
        x = torch.rand(40, 2)
        wide, x64 = train.in_float64(net, x)
        logits = wide(x64)
        net[4].bias[0] -= (logits[:, 0] - logits[:, 1]).median()
        wide, x64 = train.in_float64(net, x)
        y = wide(x64).argmax(1)
        exactly = margin_lower_bounds(wide, x64, y, 1e-3, skip_stable=True)
        found = train.evaluate(net, x, y, 1e-3)["deeppoly"]
        assert not (found & ~(train.smallest(exactly, y) > 0)).any()


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


def test_alpha_crown_keeps_the_bound_of_deeppoly_where_its_own_is_looser():
    """Tighter bounds of a neuron may flip the slope that the ascent starts from."""
    torch.manual_seed(134)
    layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    x, y = torch.rand(4, 2).double(), torch.tensor([0, 1, 2, 0])
    alpha = dict(relax="alpha-crown", steps=1)
    bounds = preactivation_bounds(net, x, 0.4, **alpha)
    own = margin_lower_bounds(net, x, y, 0.4, intermediate=bounds, **alpha)
    deeppoly = margin_lower_bounds(net, x, y, 0.4, "deeppoly")
    assert (own < deeppoly - 0.02).any() and (own > deeppoly + 0.005).any()
    assert torch.equal(margin_lower_bounds(net, x, y, 0.4, **alpha), torch.maximum(own, deeppoly))


def test_the_unit_of_beta_is_the_largest_coefficient_of_the_same_relu():
    found = relaxations.unit_of_beta([torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2)])
    assert found.tolist() == [[3, 3, 1, 1]]
