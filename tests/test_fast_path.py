"""The pieces of the fast path against the heart, PyTorch and loops; its memory and its cost."""
import itertools

import pytest
import torch
import torch.nn as nn

import certify
import relaxations
import train
from faster import backward
from faster.layers import Op, conv_transpose
from faster.windows import View
from plumbing.for_tests import NETS, RELAXATIONS, arrivals, make, random_bn
from relaxations import margin_lower_bounds, preactivation_bounds


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


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dense", [True, False])
def test_convolutions_as_matrices_or_not_give_the_same(name, dense, monkeypatch):
    net, x, y = make(name)
    params = {k: torch.stack([v, 1.1 * v]) for k, v in net.named_parameters()}
    for options in (dict(), dict(skip_stable=True), dict(params=params), dict(relax="crown-ibp")):
        with monkeypatch.context() as patch:
            low = margin_lower_bounds(net, x, y, 0.1, **options)
            patch.setattr(Op, "is_dense", lambda op, size: dense)
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
        ours = conv_transpose(A, W, *options)
        adjoint = (nn.functional.conv2d(x, W, None, s, p, d, groups) * A).sum()     # <Wx, A>
        torch.testing.assert_close((ours * x).sum(), adjoint)                       # = <x, W'A>
        ours, grads = (torch.autograd.grad(t, (A, W)) for t in ((ours * x).sum(), adjoint))
        torch.testing.assert_close(ours, grads)


@pytest.mark.parametrize("rows, lines", [((2, 3, 4, 5, 6), (2, 3, 4, 1, 6)),
                                         ((1, 3, 4, 5, 6), (2, 3, 4, 1, 6)),
                                         ((2, 1, 1, 5, 6), (2, 3, 4, 1, 6)),
                                         ((2, 3, 1, 5, 6), (1, 3, 1, 1, 6)),
                                         ((2, 3, 5, 6), (1, 3, 1, 6))])
def test_backward_passes_by_hand(rows, lines):
    """Against finite differences, second derivatives too; forward, against the heart's steps."""
    torch.manual_seed(0)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    A, *ends = draw(rows), draw(lines), draw(lines), draw(lines)
    for step, given in ((backward.Relax, ends), (backward.Constant, ends[:1]),
                        (backward.Smallest, ends[:2])):
        assert torch.autograd.gradcheck(step.apply, (A, *given))
        assert torch.autograd.gradgradcheck(step.apply, (A, *given))
    for quick, step in ((backward.QuickLines, relaxations.Lines),
                        (backward.QuickBox, relaxations.Box)):
        some = ends[:len(step._fields)]
        for ours, hearts in zip(quick(*some).back(A, 1.0), step(*some).back(A, 1.0)):
            assert ours is hearts or torch.allclose(ours, hearts, rtol=1e-12, atol=1e-12)


@pytest.mark.fast_path
@pytest.mark.parametrize("relax", RELAXATIONS)
def test_second_derivatives_equal_the_heart(relax, monkeypatch):
    net, x, y = make("windows")
    found = []
    for fast in (True, False):
        monkeypatch.setattr(relaxations, "FAST", fast)
        loss = margin_lower_bounds(net, x, y, 0.05, relax).logsumexp(-1).sum()
        first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        square = sum(t.square().sum() for t in first)
        found.append(torch.autograd.grad(square, list(net.parameters())))
    for a, b in zip(*found, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))


def test_windows_on_the_map():
    """take cuts windows out of a map, spread puts them back: loops over the positions."""
    view = View((2, 4, 5), (2, 6), (3, 2), (2, 1), (1, 1))         # C, H, W = 2, 4, 5
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
    sub = relaxations.Subdomains(rows, box, l, u, zero, zero, zero)
    low = relaxations.subdomain_bounds(network, sub, trace=trace)[0]
    grads = torch.autograd.grad(low.sum(), box)
    torch.testing.assert_close(trace[0], (grads[0] + grads[1])[0])


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
            rows, box, l.masked_fill(signs > 0, 0),
            u.masked_fill(signs < 0, 0), signs.to(l), random(), signs * random())
        found = []
        for fast in (True, False):
            monkeypatch.setattr(relaxations, "FAST", fast)
            trace = []
            low = relaxations.subdomain_bounds(network, sub, trace=trace)
            found.append([*low, *trace, *relaxations.subdomain_bounds(network, sub, steps=3)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("relax", relaxations.RELAXATIONS)
def test_the_budget_arrives_in_every_pass(relax, monkeypatch):
    calls = arrivals(monkeypatch, relaxations, "Budget")
    net, x, y = make("windows")
    margin_lower_bounds(net, x, y, 0.1, relax, steps=1, memory=54_321)
    preactivation_bounds(net, x, 0.1, relax, steps=1, memory=54_321)
    assert len(calls) == 2 and {given["memory"] for given, _ in calls} == {54_321}


@pytest.mark.fast_path
@pytest.mark.parametrize("relax", ["deeppoly", "alpha-crown"])
def test_a_pass_costs_what_its_rows_keep(relax, monkeypatch):
    """Each of what fits four times keeps 1,000 bytes: the neurons of two images fill that, by
    all_rows and, but for one layer with three unstable ones, by unstable_rows; margins half."""
    monkeypatch.setattr(relaxations.Budget, "fit", lambda *args, **options: (4, 1000))
    calls = arrivals(monkeypatch, relaxations.Budget, "run")
    net, x, y = make("windows")
    skip = relax == "alpha-crown"
    margin_lower_bounds(net, x[:2], y[:2], 0.1, relax, skip_stable=skip, steps=1)
    costs = {given["cost"] for given, _ in calls}
    assert {4000, 2000} <= costs <= {4000, 3000, 2000}


@pytest.mark.parametrize("layers", [[], [nn.ReLU()], [nn.ReLU(), nn.Identity(), nn.ReLU()]])
def test_a_network_with_no_layer_but_a_normalisation_is_bounded_too(layers):
    """That is taken off, and nothing is left for a fast path."""
    net = nn.Sequential(random_bn(2, nn.BatchNorm2d), *layers, nn.Flatten()).eval()
    x = torch.rand(4, 2, 1, 2)
    for relax in relaxations.RELAXATIONS:
        low = margin_lower_bounds(net, x, torch.arange(4), 0.0, relax)
        logits = net(x)
        right = logits.gather(1, torch.arange(4)[:, None]) - logits
        torch.testing.assert_close(low, right)
    found = certify.certify(net, x, net(x).argmax(1), 1e-4)
    assert {v.status for v in found} <= {"certified", "attacked"}
