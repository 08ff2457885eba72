"""How branch and bound searches: no verdict rests on it, but it does what it says."""
import pytest
import torch
import torch.nn as nn

import certify
import train
from plumbing.for_tests import arrivals, flat, in_ball, make, random_subdomain, true_margins
from relaxations import subdomain_bounds


def node_of(name="windows", cuts=2, seed=0):
    net, x, y = make(name, batch=1)
    return random_subdomain(net.requires_grad_(False), x, y, 0.2, cuts, seed)


@pytest.mark.parametrize("name", ["mlp", "windows", "batchnorm"])
def test_the_bias_of_a_neuron_is_what_it_is_if_all_below_is_zero(name):
    problem, _ = node_of(name)
    z, found = torch.zeros_like(problem.x), []
    for layer in flat(problem.net):
        if isinstance(layer, nn.ReLU):
            found.append(z.flatten())
            z = torch.zeros_like(z)
        z = layer(z)
    torch.testing.assert_close(problem.bias, torch.cat(found))


def test_the_two_scores_are_their_formulas(monkeypatch):
    monkeypatch.setattr(certify, "CANDIDATES", 3)
    problem, node = node_of(cuts=4)
    sub = certify.subdomains(problem, [node, node._replace(signs=-node.signs)])
    generator = torch.Generator().manual_seed(0)
    a, bias = (torch.randn(shape, generator=generator, dtype=sub.l.dtype)
               for shape in (sub.l.shape, problem.bias.shape))
    unstable = (sub.l < 0) & (sub.u > 0)
    chosen = certify.candidates(sub, a, bias, unstable)
    for row, tried in enumerate(chosen.tolist()):
        chord, babsr = {}, {}
        for j in unstable[row].nonzero().flatten().tolist():
            l, u, c, b = (t.item() for t in (sub.l[row, j], sub.u[row, j], a[row, j], bias[j]))
            s, t = u / (u - l), -u * l / (u - l)
            chord[j] = abs(min(c, 0) * t)
            babsr[j] = abs(min(c, 0) * t + max(c * b * (s - 1), c * b * s))
        best = [set(sorted(score, key=score.get)[-3:]) for score in (babsr, chord)]
        assert [set(tried[:3]), set(tried[3:])] == best and best[0] != best[1]


@pytest.mark.parametrize("enough", [torch.inf, 0.1])
def test_the_cut_has_the_best_product_of_gains(enough, monkeypatch):
    """Of the candidates, whose halves are bounded here one by one; a gain beyond the goal is no
    better, and one of nothing leaves the choice to the other half."""
    monkeypatch.setattr(certify, "CANDIDATES", 4)
    calls = arrivals(monkeypatch, certify, "candidates")
    places = set()
    for seed in range(20):
        problem, node = node_of(cuts=2, seed=seed)
        low, *_ = subdomain_bounds(problem.network, certify.subdomains(problem, [node]))
        goal = low.item() + enough
        (neuron,), (bounds,), points = certify.branch(problem, [node], [goal])
        tried, scores = calls[-1][1][0].tolist(), {}
        for j in tried:
            both = certify.subdomains(problem, list(certify.halves(node, j)))
            found = subdomain_bounds(problem.network, both)[0]
            gains = (found.clamp(max=goal) - low).clamp(min=1e-6)
            scores[j] = gains.prod().item(), found.tolist()
        best = max(score for score, _ in scores.values())
        assert scores[neuron][0] == pytest.approx(best)
        assert bounds == pytest.approx(scores[neuron][1])
        low_end, high_end = (end[0] for end in problem.box)
        assert ((points == low_end) | (points == high_end)).all()      # corners
        places.add(tried.index(neuron))
    assert len(places) > 2


def test_points_are_tried_from_the_worst_of_each_tree_and_within_the_ball():
    net, x, y = make("mlp", batch=2)
    problem, node = random_subdomain(net.requires_grad_(False), x, y, 0.2, 0)
    nodes = [node._replace(sample=i % 2) for i in range(10)]
    points = in_ball(x, 0.2, 5, torch.Generator().manual_seed(0)).flatten(0, 1)
    trees = [certify.Tree(i, certify.Verdict(), 1e9) for i in (0, 1)]
    centres = x.repeat(5, 1)
    outside = centres + 2 * (points - centres)
    certify.try_points(problem, outside, nodes, trees, steps=0)
    inside = outside.clamp(0, 1).clamp(centres - 0.2, centres + 0.2)
    margins = train.smallest(true_margins(net, inside, y.repeat(5)), y.repeat(5)).view(5, 2)
    assert not torch.equal(inside, outside) and (margins.argmin(0) > 0).any()
    assert [tree.upper for tree in trees] == pytest.approx(margins.amin(0).tolist())
    certify.try_points(problem, outside, nodes, trees)                 # a descent goes further down
    assert all(tree.upper < m for tree, m in zip(trees, margins.amin(0).tolist()))
