"""How branch and bound searches: no verdict rests on it, but it does what it says."""
import pytest
import torch
import torch.nn as nn

import certify
import train
from faster import reduced
from plumbing.for_tests import (NETS, arrivals, flat, hard_problem, in_ball, make, random_subdomain,
                                true_margins)
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


def own_problem(problem, node):
    """That of a tree with this node alone, and the node in it."""
    tree = certify.Tree(node.sample, certify.Verdict(), 1.0, heap=[(0.0, 0, node)])
    own, exact = reduced.alone(problem, problem, tree)
    assert torch.equal(own.l, exact.l) and reduced.alone(problem, problem, tree) is tree.own
    return own, tree.heap[0][-1]


@pytest.mark.fast_path
@pytest.mark.parametrize("name", NETS)
def test_the_network_of_one_ball_has_the_bounds_of_the_whole(name):
    """In each of its subdomains; and what the search goes by: coefficients, and linear pieces."""
    for seed in range(3):
        net, x, y = make(name, batch=1)
        problem, node = random_subdomain(net.requires_grad_(False), x, y, 0.1, 4, seed)
        own, same = own_problem(problem, node)
        left = own.network.neurons
        assert torch.equal(left[same.neurons], node.neurons)
        assert torch.equal(own.bias, problem.bias[left])
        found = []
        for p, n in ((problem, node), (own, same)):
            trace, sub = [], certify.subdomains(p, [n, n._replace(signs=-n.signs)])
            low, *_ = subdomain_bounds(p.network, sub, trace=trace)
            found.append([low, trace[0], torch.cat([low[:, None], *trace[1:]], 1)[:, 1:]])
        whole, own_found = found
        whole[2] = whole[2][:, left]
        for a, b in zip(whole, own_found):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        active = (problem.u > -problem.l).to(x)
        z, logits = reduced.pinned_forward(problem.network, active, x.flatten(1))
        mine, same_logits = reduced.pinned_forward(own.network, active[:, left], x.flatten(1))
        torch.testing.assert_close(mine, z[:, left])
        torch.testing.assert_close(same_logits, logits)


def test_a_neuron_without_bounds_is_not_taken_for_a_stable_one():
    problem, node = node_of()
    box, l, u = problem.box, problem.l[0].clone(), problem.u[0].clone()
    stable = [[k for k in ks if l[k] >= 0 or u[k] <= 0][0] for ks in
              (range(0, 30), range(len(l) - 9, len(l)))]         # of the first and of the last ReLU
    for k in stable:
        l[k] = u[k] = torch.nan
    left = reduced.reduced(problem.network, box, l, u).neurons.tolist()
    assert set(stable) <= set(left)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_trees_that_go_on_alone_come_to_the_same(name, monkeypatch):
    """At once, at four nodes, or never, as with matrices too large for it."""
    net, x, y, eps = hard_problem(name)
    calls, found = arrivals(monkeypatch, certify, "alone"), []
    for width, most in ((64, 0), (4, 2 ** 24), (1, 2 ** 24), (1, 0)):
        monkeypatch.setattr(certify, "WIDTH", width)
        monkeypatch.setattr(reduced, "MOST", most)
        calls.clear()
        verdicts = certify.certify(net, x, y, eps, restarts=2)
        found.append([v.status for v in verdicts])
        assert bool(calls) == (width < 64)
        assert not any(given["tree"].own or given["tree"].heap for given, _ in calls)
    assert found == [found[0]] * 4 and "unknown" not in found[0]


@pytest.mark.parametrize("eps", [0.2, 0.3, 0.4])
def test_the_smallest_margin_found_alone_is_that_of_the_whole_network(eps, monkeypatch):
    """Each is found to 1e-7, down to linear pieces; with MOST = 0 on the whole network."""
    monkeypatch.setattr(certify, "WIDTH", 1)
    calls = arrivals(monkeypatch, certify, "alone")
    net, x, y = make("mlp", batch=5)
    net.requires_grad_(False)
    found = []
    for most in (2 ** 24, 0):
        monkeypatch.setattr(reduced, "MOST", most)
        found.append([v.bound for v in certify.certify(net, x, y, eps, tolerance=1e-7)])
    assert calls and found[0] == pytest.approx(found[1], abs=2e-7)


def test_an_affine_network_of_many_classes_has_many_roots_and_nothing_to_reduce():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 100)).eval(), torch.rand(3, 1, 4, 4)
    for options in (dict(restarts=0), dict(tolerance=1e-4), dict(stages=["branch-and-bound"])):
        found = certify.certify(net, x, net(x).argmax(1), 1.0, **options)
        assert {v.status for v in found} == {"attacked"}
