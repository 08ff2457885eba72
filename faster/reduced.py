"""Branch and bound of one image, at half the price: on the network as it is on the image's ball.

There most ReLUs are stable: dead ones leave nothing, and through active ones the layers below and
above become one. What is left depends on the unstable neurons alone, and bounds of it are those of
the whole network, but for rounding. benchmarks/README.md has the price, network by network.
"""
import math
from typing import NamedTuple

import torch

from relaxations import Network, Subdomains, engine, lower_bound, subdomain_bounds

MOST = 2 ** 24      # numbers that its matrices are made from


class Reduced(NamedTuple):
    """A network on one ball. Of ReLU k = 0, ..., L-1 it has n_k neurons, N in all: of the first,
    which alone reads the input, those that are not dead, further up those that are unstable. With
    h_k = relu(z_k), and z_L the logits,
        z_k  =  sum over j < k of W_kj h_j + b_k       for k > 0.
    """
    shapes: list             # (n_k,) of each ReLU and, last, (K,)
    neurons: torch.Tensor    # (N,) where they are in the network, in ascending order
    joins: list              # for each k > 0: ([W_k0, ..., W_k,k-1], b_k)
    whole: Network           # the network
    machine: Network         # and as its engine reads it
    places: torch.Tensor     # (n_0,) where the neurons left of its first ReLU are in its rows

    def ordered(self, t, k):
        return t if k else self.machine.ordered(t, 0)

    def restored(self, t, k):
        return t if k else self.machine.restored(t, 0)

    def of_rows(self, rows, lines, multipliers, box, notes):
        """That of Network. A: the coefficients of each h_j; a: those of z_k."""
        A, d, a = [0] * len(lines), 0, rows
        parts = zip(self.joins, lines, multipliers, notes[1:])
        for (W, b), line, of_relu, note in reversed(list(parts)):
            A, d = [have + a @ w for have, w in zip(A, W)], d + a @ b
            a, d = line.back(*note.back(A[-1], d))
            a = a - of_relu
        nothing = a.new_zeros(*a.shape[:-1], math.prod(self.whole.shapes[0]))
        a = nothing.index_copy(-1, self.places, a)
        return lower_bound(a, d, [box, notes[0], *self.machine.stages[0]])

    def pinned(self, active, x):
        """See pinned_forward."""
        z = x[None]
        for layer in self.whole.stages[0]:
            z = layer.forward(z)
        counts = [n for n, in self.shapes[:-1]]
        before, h = [z[0][:, self.neurons[:counts[0]]]], []
        for (W, b), pins in zip(self.joins, active.split(counts, 1)):
            h.append(before[-1] * pins)
            before.append(b + sum(t @ w.mT for t, w in zip(h, W)))
        *before, logits = before
        return torch.cat(before, 1), logits


def pinned_forward(network, active, x):
    """Pre-activations (B, N) before all ReLUs and logits (B, K) of inputs x (B, N_in), with each
    relu(z) replaced by active * z, active (B, N): affine in x; the network itself where the active
    neurons have z >= 0 and the others z <= 0."""
    if isinstance(network, Reduced):
        return network.pinned(active, x)
    before, h, n = [x.new_zeros(len(x), 0)], x[None], 0
    for s, layers in enumerate(network.stages):
        for layer in layers:
            h = layer.forward(h)
        if s < len(network.stages) - 1:
            before.append(h[0])
            h = h * active[:, n:n + h.shape[-1]]
            n += h.shape[-1]
    return torch.cat(before, 1), h[0]


def reduced(network, box, l, u):
    """The Reduced of a Network on a ball, box (1, 1, N_in) twice, where its neurons have the bounds
    l, u (N,); or None, if it would be too large, or be the same."""
    sizes = [math.prod(shape) for shape in network.shapes]
    if len(sizes) == 1:
        return None                                        # without a ReLU there is nothing to do
    starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    stay = ~(l >= 0) & ~(u <= 0)                           # also where bounds are NaN
    stay[:sizes[0]] = ~(u[:sizes[0]] <= 0)
    stay = stay.split(sizes[:-1])
    for some in stay:
        some[0] |= ~some.any()                             # a layer of nothing would be no layer
    left = [some.nonzero().flatten() for some in stay]
    rows = [*left[1:], torch.arange(sizes[-1], device=l.device)]
    if sum(len(some) * end for some, end in zip(rows, starts[2:])) > MOST:
        return None
    # Going down from z_k, the coefficients of what is left are noted, and go no further; only
    # active neurons let pass, none of them in the first ReLU. The bound is what remains, b_k.
    passes = (u > 0) & ~torch.cat(stay)
    passes = torch.where(passes, 1.0, -1.0).to(box[0])
    joins = []
    for k, some in enumerate(rows, 1):
        part = Network(network.stages[:k + 1], network.shapes[:k + 1], 1)
        below = passes[:starts[k]].expand(len(some), -1)
        none = torch.zeros_like(below)
        ball = [end.expand(-1, len(some), -1) for end in box]
        e = below.new_zeros(len(some), sizes[k]).scatter(1, some[:, None], 1)
        sub, trace = Subdomains(e, ball, below, below, none, none, none), []
        b, *_ = subdomain_bounds(part, sub, trace=trace)
        W = [A[:, kept] for A, kept in zip(trace[1:], left)]
        joins.append((W, b))
    machine = engine(network)
    order = machine.ordered(torch.arange(sizes[0]), 1).argsort().to(l.device)
    neurons = torch.cat([some + start for some, start in zip(left, starts)])
    shapes = [*((len(some),) for some in left), network.shapes[-1]]
    return Reduced(shapes, neurons, joins, network, machine, order[left[0]])


def alone(problem, exact, tree):
    """The two problems of certify.py for one tree, tree.own, with the network as it is on its ball;
    the tree's nodes count that one's neurons from then on. The same two, if it would be too large.
    """
    if tree.own:
        return tree.own
    i, own = tree.sample, []
    for each in (problem, exact):
        ball = [end[:, [i]] for end in each.box]
        network = reduced(each.network, ball, exact.l[i], exact.u[i])
        if network is None:
            tree.own = problem, exact
            return tree.own
        left = network.neurons
        of_all = lambda t: t[i, left].expand(len(t), -1)
        own.append(each._replace(network=network, l=of_all(each.l), u=of_all(each.u),
                                 bias=each.bias[left]))
    for place, (bound, count, node) in enumerate(tree.heap):
        neurons = torch.searchsorted(left, node.neurons)
        node = node._replace(neurons=neurons, slopes=node.slopes[left])
        tree.heap[place] = bound, count, node
    tree.own = tuple(own)
    return tree.own
