"""SABR, MTL-IBP and their kin, TAPS and STAPS: formulas, attacks, and where they begin."""
import math

import pytest
import torch
import torch.nn as nn

import gls
import train
from plumbing import taps
from plumbing.for_tests import loss_at, make
from relaxations import margin_lower_bounds, preactivation_bounds


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
    linked = taps.linked(points, l, u)                                     # c = 1/2: from 2 away
    assert torch.equal(linked, points)
    down, up = torch.autograd.grad(linked.sum(), (l, u))
    assert up.tolist() == [1, 0.5, 0, 0, 0] and down.tolist() == [0, 0, 0, 0.5, 1]
    both = torch.autograd.grad(taps.linked(u.detach(), u, u).sum(), u)[0]
    assert both.tolist() == [1] * 5                                         # a box of one point
    for unit in (2.0 ** -60, 2.0 ** 60):                                    # of the layer below
        ends = [(t.detach() * unit).requires_grad_(True) for t in (l, u)]
        linked = taps.linked(points * unit, *ends)
        again = torch.autograd.grad(linked.sum(), ends)
        assert torch.equal(again[0], down) and torch.equal(again[1], up)


def test_the_latent_attack_stays_in_its_box_and_solves_linear_problems():
    """Above the last ReLU the network is affine: the attack finds the corner that intervals bound,
    and the gradient through the connector is that of the bound."""
    net, x, y = make("windows", dtype=torch.float64)
    params = {n: p[None].detach().requires_grad_() for n, p in net.named_parameters()}
    bounds = preactivation_bounds(net, x, 0.05, "box", params)
    low = taps.latent_margins(net, params, bounds, y, 4, split=0)
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
    best = taps.worst_points(of, l, u, 4)
    assert all(((z >= l) & (z <= u)).all() for z in seen) and best.shape == (2, 3, 4, 4, 5)
    assert all(z.is_leaf for z in seen) and not best.requires_grad         # no step is held
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
        words = f"--relax {relax} --opt grad --eps 0.3 --eps-train 0.05"
        config = train.parse_config(words.split())
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
