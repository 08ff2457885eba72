"""Bounds of the neurons of one layer, faster than row by row: textbook DeepPoly for all of them, or
tightened for those that intervals leave unstable. Letters as in relaxations.py.
"""
import math

import torch

from faster.layers import hwc
from faster.windows import View, Windowed, sizes_down, way_down
from relaxations import best_slopes, lower_bound, no_checkpoint


def first_rows(op):
    """The rows e_j W of a layer, which depend on the weights alone, by their first step down.

    Returns W (P, Gx, O, Q), constants (P, Gx, O), and what W sees: a window, with Gx = 1 row per
    channel that serves every position; or, if that outgrows the map, all of it, with Gx = G.
    """
    if op.stride is None:
        W = hwc(op.weight, op.in_shape)
        return W[:, None], op.bias[:, None], View(op.in_shape)
    O = op.out_shape[0]
    view = View(op.out_shape, op.out_shape[1:], (1, 1))
    eye = torch.eye(O).to(op.weight)[None, None, None]
    W, c = Windowed(op, view).back(eye, eye.new_zeros(1, 1, 1, O))
    P, *_, Q = W.shape
    W = W.view(P, -1, O, Q)
    return W, c.view(P, -1, O), view.below(op)


def all_rows(stages, lines, box, budget):
    """Textbook bounds (l, u) of all outputs of stages[-1], (P, B, N) each."""
    *below, (*others, op) = stages
    below, (W, c, view) = [*below, others], first_rows(op)
    P, _, O, Q = W.shape
    B, G = box.lower.shape[1], math.prod(view.positions)
    fused = None
    if can_fuse(below, view):
        *below, (*others, last), _ = below
        fused = first_relu(W[:, 0], c[:, 0], view, lines[-1], last)
        below, lines, view = [*below, others], lines[:-1], view.below(last)

    def start(samples, some):
        if fused:
            return fused(samples, some)
        rows = (t[:, :, some] for t in (W, c))
        A, d = (both_signs(t, 2).flatten(1, 2) for t in rows)
        return [(A[:, None, None], d[:, None, None])]

    sizes = sizes_down(view, below)
    fit, keeps = budget.fit(2 * P * G, sizes, held=3 + 3 / (2 * O))
    samples = min(B, fit)
    channels = min(O, max(1, fit // B))
    channels -= channels % 8 if channels > 8 else 0     # else products are half as fast
    starts = range(0, O, channels)

    def jobs():
        for b in range(0, B, samples):
            some = slice(b, b + samples)
            way = way_down(view, below, parts_of(lines, some), *parts_of([box], some))
            yield from ((some, slice(o, o + channels), way) for o in starts)

    def bound(some, channels, way):
        low = [lower_bound(A, d, way) for A, d in start(some, channels)]
        low = [t.reshape(*t.shape[:2], G, -1) for t in low]
        return torch.cat(low, 3).unflatten(3, (2, -1))                         # (P, b, G, 2, o)

    low = budget.run(bound, jobs(), keeps * samples * channels)
    n = len(starts)
    parts = [low[i:i + n] for i in range(0, len(low), n)]                      # of some samples
    low = torch.cat([torch.cat(part, 4) for part in parts], 1)
    low, minus_high = low.unbind(3)                                            # (P, B, G, O) each
    return low.mT.flatten(2), -minus_high.mT.flatten(2)                        # in PyTorch's order


def can_fuse(below, view):
    """Are the next steps a ReLU and a convolution on a window, better as one matrix?"""
    if len(below) < 2 or below[-1] or not below[-2] or not view.kernel:
        return False
    smaller = view.below(below[-2][-1])
    return smaller.kernel and below[-2][-1].is_dense(smaller.kernel)


def both_signs(t, dim):
    """Rows, and minus the rows: an upper bound of z_j is minus a lower bound of -z_j."""
    return torch.cat([t, -t], dim)


def parts_of(maps, samples):
    """The same Lines or Boxes for some of the samples."""
    return [type(each)(*(t[:, samples] for t in each)) for each in maps]


# Without it the bounds take 8.3 times as long (skip_stable, after training by box; see README.md).
def unstable_rows(l, u, stages, lines, box, budget, ascent=0):
    """(l, u) of all outputs of stages[-1], tightened by back-substitution of the neurons that they
    leave unstable, only those. With steps of ascent, each row chooses its own lower slopes."""
    unstable = (l < 0) & (u > 0)
    member, sample, neuron = where = unstable.nonzero(as_tuple=True)
    if not len(member):
        return l, u
    if len(member) > l.numel() / 2 and not ascent:   # picking most rows costs more than all at once
        low, high = all_rows(stages, lines, box, budget)
        return tightened(l, u, where, low[where], high[where])
    *below, (*others, op) = stages
    below, (W, c, view) = [*below, others], first_rows(op)
    P, Gx, O, _ = W.shape
    G = math.prod(view.positions)
    slot, (samples, neurons) = tables(member, P, member * l.shape[1] + sample, neuron)
    members = torch.arange(P, device=l.device)[:, None]
    fit, keeps = budget.fit(2 * P, sizes_down(view, below), held=5)
    longest = samples.shape[1]
    U = min(longest, fit)

    def bound(t):
        some = neurons[:, t:t + U]
        position, channel = some % G, some // G
        entry = members, position if Gx > 1 else 0, channel
        picked = view._replace(sample=samples[:, t:t + U], position=position)
        rows = (t[entry][:, :, None, None] for t in (W, c))
        A, d = (both_signs(t, 3) for t in rows)                                # (P, U, 1, 2, Q)
        way = way_down(picked, below, lines, box)
        return best_slopes(A, d, way, ascent, no_checkpoint)[:, :, 0]

    jobs = [(t,) for t in range(0, longest, U)]
    low = torch.cat(budget.run(bound, jobs, keeps * U), 1)
    low, minus_high = low[member, slot].unbind(1)
    return tightened(l, u, where, low, -minus_high)


def tables(member, P, *columns):
    """Numbers of picks, of which each belongs to a member, as tables (P, U) of the picks of each,
    short ones filled up with zeros; and the column that a pick has got."""
    counts = member.bincount(minlength=P)
    before = counts.cumsum(0) - counts
    slot = torch.arange(len(member), device=member.device) - before[member]
    found = member.new_zeros(len(columns), P, int(counts.max()))
    found[:, member, slot] = torch.stack(columns)
    return slot, found


def tightened(l, u, where, low, high):
    """(l, u) with the better of both bounds where there are others, low and high."""
    l = l.index_put(where, torch.maximum(l[where], low))
    u = u.index_put(where, torch.minimum(u[where], high))
    return l, u


# Without it DeepPoly takes 1.6 to 1.8 times as long.
def first_relu(W, c, view, lines, op):
    """The first two steps of back-substitution, a ReLU and the affine layer op below it, for rows
    W z + c that all samples and positions share: W (P, O, Q), c (P, O).

    With m and r the mean and half the difference of the two slopes, and t the intercept,
        a relu(z)  >=  a (m z + t/2) - |a| (r z + t/2)
        a relu(z)  <=  a (m z + t/2) + |a| (r z + t/2)
    and z = M h + b. So two products serve for both: of m and r (P, B*G, Q) with what depends on
    the weights alone, a M and |a| M (P, Q, O*Q'). No sample has coefficients of z of its own.

    Returns a function of slices of samples and of rows: coefficients (P, B, G, O, Q') and
    constants (P, B, G, O) of lower bounds of the rows, and the same of minus the rows.
    """
    M = op.matrix(view.kernel, view.below(op).kernel, (0, 0))                       # (P, Q, Q')
    b = op.bias.repeat(1, math.prod(view.kernel))[:, None, None]
    lower, upper, intercept = lines
    maps = (lower + upper) / 2, (upper - lower) / 2, intercept / 2
    mean, half, t = (view.take(each).squeeze(3) for each in maps)                # (P, B, G, Q)
    sides = (mean, mean * b + t), (half, half * b + t)

    def product(A, slope, constant):
        AM = (A.mT[..., None] * M[:, :, None]).flatten(2)                      # (P, Q, O*Q')
        lead = *slope.shape[1:3], A.shape[1]
        AM = slope.flatten(1, 2) @ AM
        constant = constant.flatten(1, 2) @ A.mT
        return AM.view(len(M), *lead, -1), constant.view(len(M), *lead)

    def start(samples, some):
        A = W[:, some]
        X, x = product(A, *(t[:, samples] for t in sides[0]))
        Y, y = product(A.abs(), *(t[:, samples] for t in sides[1]))
        x = x + c[:, None, None, some]
        minus = (X + Y).neg_(), (x + y).neg_()
        return [(X - Y, x - y), minus]

    return start
