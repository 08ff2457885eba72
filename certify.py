"""Certify a network sample by sample: attack it, bound it, split it; give each sample a verdict.

    python certify.py                        the newest run under runs/, on its whole test set
    python certify.py runs/NAME --samples 1000 --eps 0.1 --timeout 30
    python certify.py --self-check           attack bounds and verdicts of random networks

Or any supported network (see relaxations.py), in five lines of Python:

    import certify
    verdicts = certify.certify(net, x, y, eps=0.1)      # x (n, ...) pixels in [0, 1], y (n,) labels
    for v in verdicts:
        print(v.status, v.stage, v.bound)

The stages, each on what the one before left open:

    forward            wrong without any perturbation                             -> misclassified
    attack             projected gradient descent finds a wrong point in the ball -> attacked
    box, crown-ibp, deeppoly, alpha-crown    all margins have a positive bound    -> certified
    branch-and-bound   the ball is cut into subdomains, until all are settled     -> certified,
                       or one of them gives a counterexample                      -> attacked
    otherwise (time is up)                                                        -> unknown

Branch and bound (Bunel et al. 2020, "Branch and bound for piecewise linear neural network
verification"; with beta-CROWN's bounds, Wang et al. 2021). A subdomain is the part of the ball
where some unstable ReLUs have a given sign. Those ReLUs are then linear, so its bound is tighter;
if it is still not positive, the subdomain is cut in two at one more ReLU. There are finitely many
ReLUs: where none is left to cut, the network is linear, and a linear program decides.

Guarantee: "certified" holds for every point of the ball, up to rounding in float64, in which every
bound that counts is computed; float32 only steers the search. "attacked" comes with a
counterexample in the ball (exactly, as float32 numbers), misclassified by a float64 forward pass.
"unknown" is neither. Attacked samples are bounded too: one that comes out certified proves a bound
wrong.

Letters in shape comments: those of relaxations.py; n nodes (subdomains), k candidates to cut at.
"""
import heapq
import itertools
import json
import math
import sys
import time
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import jacrev

from plumbing.console import (InputError, Parser, Progress, count, duration, number, pick_device,
                              run)
from plumbing.data import hold_out, load_dataset
from plumbing.processes import process_group, ranks
from plumbing.rounding import ball, in_float64
from plumbing.runs import checksum, claim
from relaxations import (RELAXATIONS, STEPS, Subdomains, adaptive, margin_lower_bounds,
                         pinned_forward, preactivation_bounds, read_network, subdomain_bounds)
from train import CERTIFY, CLOSE, attack, certified_margin, forward_margin, load_run, smallest


STATUSES = ("misclassified", "attacked", "certified", "unknown")
STAGES = (*RELAXATIONS, "branch-and-bound")
ROUNDING = 1e-6       # a bound above it and a counterexample contradict each other; below, a tie

# Branch and bound: settings that did well on the networks of benchmarks/certify.py.
WIDTH = 64            # nodes cut at once
TREES = 8             # samples whose trees grow at the same time
CANDIDATES = 1        # ReLUs that each of the two branching scores proposes
NODE_STEPS = 4        # of ascent for each node; it starts from the choices of its parent
STORE = 2 ** 27       # numbers kept for waiting nodes (512 MB); beyond it, trees grow depth first


@dataclass
class Verdict:
    status: str = "unknown"    # one of STATUSES
    stage: str = ""            # what settled it: forward, attack, box, ...; "" if unknown
    bound: float = -math.inf   # the smallest margin lower bound proved, the best over stages; where
    #                            branching was cut short, up to rounding in float32
    seconds: float = 0.0       # spent on it; the time of a batch is shared equally
    counterexample: Optional[torch.Tensor] = None
    seconds_by_stage: dict = field(default_factory=dict)
    index: int = 0             # of the sample

    def spend(self, stage, seconds):
        self.seconds += seconds
        self.seconds_by_stage[stage] = self.seconds_by_stage.get(stage, 0.0) + seconds


class ContradictionError(AssertionError):
    """A sample is both certified and attacked: a bound is unsound, or a forward pass is wrong.
    Carries the witnesses: index of the sample, stage and bound, and the counterexample."""

    def __init__(self, index, stage, bound, counterexample):
        super().__init__(f"sample {index}: {stage} proves a margin of {bound:.3g}, yet a point of "
                         "the ball is misclassified; a bound is unsound. Please report this with "
                         "the network")
        self.index, self.stage, self.bound = index, stage, bound
        self.counterexample = counterexample


class Settings(NamedTuple):
    """The arguments of certify()."""
    eps: float
    timeout: float
    stages: list
    steps: int
    restarts: int
    seed: int
    tolerance: float


@torch.inference_mode(False)               # whatever the caller's mode: attack and ascent need
@torch.enable_grad()                       # gradients
def certify(net, x, y, eps, timeout=None, *, stages=STAGES, steps=40, restarts=None, batch=100,
            seed=0, tolerance=None, report=lambda verdict: None):
    """A list with one Verdict per sample, for the ball of radius eps (pixels) around each x.

    net: an nn.Sequential as relaxations.py supports it, in eval mode, on the device and in the
    dtype of x.  x: (n, ...) in [0, 1].  y: (n,) labels.  timeout: seconds per sample; one that has
    used them up enters no further stage, and its branching stops (None: no limit, so that branch
    and bound settles every sample in the end, but for margins that rounding hides).  stages: any of
    STAGES.  steps, restarts: of the attack; restarts=None is one for each class, 0 leaves it out.
    batch: samples bounded at once.
    tolerance: go on until the smallest margin over the ball is known to so much, in float64:
    bound <= margin <= bound + tolerance (None: until its sign is known). Misclassified samples are
    left out of that.
    report(verdict) is called for each sample as soon as it is settled.

    Raises ContradictionError if a sample is certified and attacked, ValueError for bad arguments.
    """
    stages = list(stages)
    unknown = [s for s in stages if s not in STAGES]
    tolerance = math.inf if tolerance is None else tolerance
    if unknown or len(x) != len(y) or not 0 <= eps < math.inf or not tolerance > 0:
        raise ValueError(f"stages {unknown} are unknown, or {len(x)} images do not fit {len(y)} "
                         f"labels, or eps={eps} is no radius >= 0, or tolerance={tolerance} <= 0")
    net, x, y = deepcopy(net).requires_grad_(False), x.clone(), y.clone().long()
    K = net(x[:1]).shape[-1] if len(x) else 2
    if K < 2 or not ((y >= 0) & (y < K)).all():
        raise ValueError(f"y has labels outside 0..{K - 1} of a network with {K} logits, of which "
                         "there have to be two")
    if tolerance < math.inf:
        net, x, y = in_float64(net, x, y)
    settings = Settings(eps, math.inf if timeout is None else timeout, stages, steps,
                        K if restarts is None else restarts, seed, tolerance)
    verdicts = [Verdict(index=i) for i in range(len(x))]
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        _certify_batch(net, x[part], y[part], settings, verdicts[part], report)
    return verdicts


def _certify_batch(net, x, y, settings, verdicts, report):
    upper = _attacked(net, x, y, settings, verdicts)
    for relax in [r for r in CERTIFY if r in settings.stages]:
        _bounded_by(relax, net, x, y, settings, verdicts)
    open_ = ("unknown",) if settings.tolerance == math.inf else ("unknown", "attacked", "certified")
    left = [i for i, v in enumerate(verdicts) if v.status in open_ and v.seconds < settings.timeout]
    if not {"alpha-crown", "branch-and-bound"} & set(settings.stages):
        left = []
    for i in sorted(set(range(len(x))) - set(left)):
        report(verdicts[i])
    if left:
        _grow_trees(net, x[left], y[left], settings, [verdicts[i] for i in left],
                    upper[left].tolist(), report)


def _attacked(net, x, y, settings, verdicts):
    """Forward pass and attack. Returns the smallest margins found, (B,) in float64."""
    begun, upper = time.time(), forward_margin(net, x, y)
    for v, margin in zip(verdicts, upper.tolist()):
        if not margin > 0:
            v.status, v.stage = "misclassified", "forward"
    left = [i for i, v in enumerate(verdicts) if v.status == "unknown"]
    if left and settings.restarts != 0:
        points = attack(net, x[left], y[left], settings.eps, settings.steps, settings.restarts,
                        settings.seed)
        upper[left] = forward_margin(net, points, y[left])
        for i, point in zip(left, points):
            if upper[i] <= 0:
                verdicts[i].status, verdicts[i].stage = "attacked", "attack"
                verdicts[i].counterexample = point.clone()
    for v in verdicts:
        v.spend("attack", (time.time() - begun) / len(x))
    return upper


def _bounded_by(relax, net, x, y, settings, verdicts):
    """Certify what one of the incomplete relaxations can. What was attacked is bounded too."""
    begun = time.time()
    left = [i for i, v in enumerate(verdicts) if v.status in ("unknown", "attacked")
            and v.seconds < settings.timeout]
    low = certified_margin(*in_float64(net, x[left], y[left]), settings.eps, relax,
                           **CERTIFY[relax])
    for i, bound in zip(left, low.tolist()):
        v = verdicts[i]
        v.spend(relax, (time.time() - begun) / len(left))
        v.bound = max(v.bound, bound)
        if bound > ROUNDING and v.status == "attacked":
            raise ContradictionError(v.index, relax, bound, v.counterexample)
        if bound > 0 and v.status == "unknown":
            v.status, v.stage = "certified", relax


# --------------------------------------------------------------------------------- branch and bound

class Tables(NamedTuple):
    """What all nodes of a batch share. N: neurons before all ReLUs, in the order of the network."""
    stages: list
    sizes: list           # of the ReLUs, as they make up N
    box: list             # (1, B, N_in) twice: the balls
    l: torch.Tensor       # (B, N) bounds before the ReLUs over the whole ball
    u: torch.Tensor
    rows: torch.Tensor    # (B, K, K): the margins of sample b as functions of the logits
    bias: torch.Tensor    # (N,) of the layer before each ReLU


class Node(NamedTuple):
    """A subdomain, and one margin to be bounded there. The first two fields order the heap."""
    bound: float                # proved so far
    order: int                  # unique
    sample: int                 # its row in Tables
    target: int                 # the class k of the margin
    neurons: torch.Tensor       # (m,) the ReLUs cut, as indices 0..N-1
    signs: torch.Tensor         # (m,) 1: z >= 0, -1: z <= 0
    multipliers: torch.Tensor   # (m,) signs * beta
    slopes: torch.Tensor        # (N,) alpha


@dataclass
class Tree:
    """The nodes of one sample that are not settled yet, worst bound first."""
    sample: int
    verdict: Verdict
    upper: float                # the smallest margin seen at a point of the ball, in float64
    heap: list = field(default_factory=list)
    proved: float = math.inf    # the smallest bound among settled nodes
    stuck: bool = False         # a node could not be settled

    def goal(self, tolerance):
        """A node whose bound exceeds this is settled."""
        goal = self.upper - tolerance
        return max(goal, 0.0) if self.upper > 0 else goal

    def bound(self):
        return min(self.proved, self.heap[0].bound if self.heap else math.inf)

    def pop(self, limit):
        """The worst node; if more than limit are waiting, the last of the heap: mostly a young one,
        so that the tree grows in depth and the heap no further."""
        return heapq.heappop(self.heap) if len(self.heap) <= limit else self.heap.pop()

    def add(self, node, tolerance):
        if node.bound > self.goal(tolerance):
            self.proved = min(self.proved, node.bound)
        else:
            heapq.heappush(self.heap, node)


def _tables(net, x, y, eps, l, u):
    stages, shapes = read_network(net, x.shape[1:])
    eye = torch.eye(shapes[-1][0], dtype=x.dtype, device=x.device)
    sizes = [torch.Size(shape).numel() for shape in shapes[:-1]]
    bias = [ops[-1].bias[0].repeat_interleave(n // ops[-1].bias.shape[1]) if ops else x.new_zeros(n)
            for ops, n in zip(stages, sizes)]
    box = [(x - eps).clamp(min=0), (x + eps).clamp(max=1)]
    return Tables(stages, sizes, [t.flatten(1)[None] for t in box], l, u, eye[y][:, None] - eye,
                  torch.cat([x.new_zeros(0), *bias]))


def _subdomains(tables, nodes):
    """The nodes as one batch, in the dtype of the tables."""
    sample, target = (torch.tensor(t, device=tables.l.device)
                      for t in zip(*((node.sample, node.target) for node in nodes)))
    l, u = tables.l[sample], tables.u[sample]
    row = torch.arange(len(nodes)).repeat_interleave(torch.tensor([len(n.neurons) for n in nodes]))
    cut = row.to(l.device), torch.cat([node.neurons for node in nodes]).to(l.device)
    signs = torch.zeros_like(l).index_put(cut, torch.cat([n.signs for n in nodes]).to(l))
    betas = torch.zeros_like(l).index_put(cut, torch.cat([n.multipliers for n in nodes]).to(l))
    return Subdomains(tables.sizes, tables.rows[sample, target], [t[:, sample] for t in tables.box],
                      l.masked_fill(signs > 0, 0), u.masked_fill(signs < 0, 0), signs,
                      torch.stack([node.slopes for node in nodes]).to(l), betas)


def _bounded(tables, wide, nodes, trees, tolerance, steps, first=None):
    """The nodes with bounds raised by beta-CROWN. float32 only steers: a bound that would settle
    its node is computed again in float64, from pre-activation bounds in float64.

    first: bounds that the nodes have as they are; where one is enough, there is no ascent."""
    goals = torch.tensor([trees[node.sample].goal(tolerance) for node in nodes]).double()
    low = torch.full_like(goals, -torch.inf) if first is None else torch.tensor(first).double()
    todo = (~(low > goals)).nonzero().flatten().tolist()
    if todo:
        sub, nodes = _subdomains(tables, [nodes[i] for i in todo]), list(nodes)
        found, *free = subdomain_bounds(tables.stages, sub, steps, goals[todo].to(sub.l))
        low[todo] = found.cpu().double()
        for i, slopes, multipliers in zip(todo, *free):
            nodes[i] = nodes[i]._replace(slopes=slopes.clone(),
                                         multipliers=multipliers[nodes[i].neurons])
    sure = (low > goals).nonzero().flatten().tolist()
    if sure:
        again = _subdomains(wide, [nodes[i] for i in sure])
        low[sure] = subdomain_bounds(wide.stages, again)[0].cpu()
    return [node._replace(bound=max(node.bound, b)) for node, b in zip(nodes, low.tolist())]


def _branch(tables, nodes, goals):
    """Where to cut each node, and a point of the ball where its relaxation is smallest.

    Filtered smart branching (De Palma et al. 2021): two scores of every unstable ReLU propose
    candidates, both halves of each cut are bounded without ascent, and the best product of gains
    wins. With a the coefficient of relu(z) and t, s the intercept and slope of its upper line,
        chord   |a- t|, how much the upper line costs the bound;
        BaBSR   |a- t + max(a b (s - 1), a b s)|, b the bias: the same, less what one half loses
                by z no longer being free (Bunel et al. 2020).
    Returns neurons, a list (n,) with None where all ReLUs are stable; the bounds (n, 2) of their
    halves, z >= 0 and z <= 0; and points (n, N_in).
    """
    sub, trace = _subdomains(tables, nodes), []
    low = subdomain_bounds(tables.stages, sub, trace=trace)[0]
    points = torch.where(trace[0] > 0, *(t[0] for t in sub.box))
    unstable = (sub.l < 0) & (sub.u > 0)
    if not unstable.any():
        return [None] * len(nodes), [None] * len(nodes), points
    a, s = torch.cat(trace[1:], 1), torch.where(unstable, sub.u / (sub.u - sub.l), 0.0)
    chord = a.clamp(max=0) * -s * sub.l
    babsr = (chord + a * tables.bias * torch.where(a * tables.bias > 0, s, s - 1)).abs()
    k = min(CANDIDATES, a.shape[1])
    tried = torch.cat([score.where(unstable, -1).topk(k)[1] for score in (babsr, -chord)], 1)
    rows = torch.arange(len(nodes), device=a.device).repeat_interleave(4 * k)
    half = Subdomains(sub.sizes, sub.rows[rows], [t[:, rows] for t in sub.box],
                      *(t[rows] for t in sub[3:]))
    one, neuron = torch.arange(len(rows), device=a.device), tried.repeat_interleave(2, 1).flatten()
    half.l[one[::2], neuron[::2]] = 0
    half.u[one[1::2], neuron[1::2]] = 0
    bounds = subdomain_bounds(tables.stages, half)[0].view(len(nodes), 2 * k, 2)
    gain = bounds.minimum(torch.tensor(goals).to(low)[:, None, None]) - low[:, None, None]
    gain = gain.clamp(min=1e-6).prod(-1).where(unstable.gather(1, tried), -1)
    best = torch.arange(len(nodes), device=a.device), gain.argmax(1)
    neurons = [j if unstable[i, j] else None for i, j in enumerate(tried[best].tolist())]
    return neurons, bounds[best].tolist(), points


def _halves(node, neuron, order):
    """The two nodes that cutting at a neuron makes of one; together they cover it."""
    for sign in (1.0, -1.0):
        yield node._replace(
            order=next(order), neurons=torch.cat([node.neurons, node.neurons.new_tensor([neuron])]),
            signs=torch.cat([node.signs, node.signs.new_tensor([sign])]),
            multipliers=torch.cat([node.multipliers, node.multipliers.new_zeros(1)]))


def _try_points(net, x, y, eps, points, nodes, trees):
    """Keep the worst of the points (n, N_in) for each tree; one with a margin <= 0 settles it."""
    sample = torch.tensor([node.sample for node in nodes], device=x.device)
    low, high = ball(x[sample], eps)
    points = points.to(x).view(low.shape).clamp(low, high)
    logits = net(points)
    margins = smallest(logits.gather(1, y[sample, None]) - logits, y[sample]).tolist()
    for tree in trees:
        mine = [i for i, node in enumerate(nodes) if node.sample == tree.sample]
        i = min(mine, key=margins.__getitem__, default=None)
        if i is None or margins[i] > tree.upper + CLOSE * max(1.0, abs(tree.upper)):
            continue
        v, margin = tree.verdict, forward_margin(net, points[i:i + 1], y[sample[i:i + 1]]).item()
        tree.upper = min(tree.upper, margin)
        if margin <= 0 and v.status == "certified" and v.bound > ROUNDING:
            raise ContradictionError(v.index, v.stage, v.bound, points[i])
        if margin <= 0 and v.status != "attacked":
            v.status, v.stage, v.counterexample = "attacked", "branch-and-bound", points[i].clone()


def _settle_linear(wide, node):
    """A node without unstable ReLUs: its exact minimum and where it is, in float64.

    The network is affine there: minimise it subject to the signs of the ReLUs that were cut. What
    the linear program finds is only used through _try_points and, as multipliers, through
    subdomain_bounds, so nothing rests on its accuracy.
    """
    sub = _subdomains(wide, [node._replace(multipliers=torch.zeros_like(node.multipliers))])
    signs, active = sub.signs[0, node.neurons], (sub.u > -sub.l).to(sub.l)

    def outputs(x):
        z, logits = pinned_forward(wide.stages, active, x[None])
        return torch.cat([signs * z[0, node.neurons], (sub.rows * logits).sum(1)])

    low, high = (t[0, 0] for t in sub.box)
    values, J = outputs(low), jacrev(outputs)(low)
    program = J[-1], J[:-1], J[:-1] @ low - values[:-1], low, high
    x, tries = linear_program(*(t.cpu().numpy() for t in program))
    bound = -math.inf
    for beta in tries:
        sub.multipliers[0, node.neurons] = signs * torch.from_numpy(beta).to(signs)
        bound = max(bound, subdomain_bounds(wide.stages, sub)[0].item())
    return bound, low if x is None else torch.from_numpy(x)


def linear_program(c, G, h, low, high):
    """min c.x  subject to  G x >= h and low <= x <= high, by the dual simplex method.

    Returns x (None if infeasible) and a list of multipliers beta >= 0 to try: at the last of them,
    min over low <= x <= high of c.x - beta.(G x - h) is the optimum, or, if infeasible, large.

    Each variable v, that is x or a slack w = G x - h >= 0, is either at one of its ends ("at", n of
    them) or basic: basic = T at + t. The start is dual feasible whatever c is, because x is bounded
    on both sides: every x at the end that c prefers.
    """
    (m, n), tiny = G.shape, 1e-9
    size = np.abs(G).max(1, initial=0)
    size[size == 0] = 1
    G, h = G / size[:, None], h / size                     # multipliers are divided in the end
    lo, hi = np.concatenate([low, np.zeros(m)]), np.concatenate([high, np.full(m, np.inf)])
    T, t = np.vstack([G, c]), np.append(-h, 0.0)           # the last row is the objective
    ends, basic = np.arange(n), n + np.arange(m)
    top = c < 0                                            # at the upper end?
    for _ in range(50 * (m + n)):
        at = np.where(top, hi[ends], lo[ends])
        v = T[:m] @ at + t[:m]
        outside = np.maximum(lo[basic] - v, v - hi[basic])
        r = outside.argmax() if m else 0
        if not m or outside[r] <= tiny:
            x, beta = np.empty(n), np.zeros(m)
            for var, value in zip([*ends, *basic], [*at, *v]):
                if var < n:
                    x[var] = value
            slack = ends >= n
            beta[ends[slack] - n] = T[m, slack].clip(0)
            return x, [beta / size]
        up = 1 if v[r] < lo[basic[r]] else -1              # where basic variable r has to go
        helps = up * T[r] * np.where(top, -1, 1)           # what moving each from its end does
        ratio = np.where(helps > tiny, np.abs(T[m]) / np.maximum(helps, tiny), np.inf)
        j = ratio.argmin() if n else 0
        if not np.isfinite(ratio[j]):                      # nothing helps: row r is a proof
            beta, slack = np.zeros(m), ends >= n
            beta[ends[slack] - n] = (-up * T[r, slack]).clip(0)
            if basic[r] >= n:
                beta[basic[r] - n] = 1
            return None, [beta / size * 10.0 ** k for k in range(-2, 11)]
        row = np.append(-T[r] / T[r, j], -t[r] / T[r, j])  # solve row r for the j-th end
        row[j] = 1 / T[r, j]
        column = T[:, j].copy()
        T[:, j] = 0
        T, t = T + np.outer(column, row[:-1]), t + column * row[-1]
        T[r], t[r] = row[:-1], row[-1]
        ends[j], basic[r], top[j] = basic[r], ends[j], up < 0
    return None, []


def _plant(net, x, y, settings, verdicts, upper):
    """Tables in the dtype of x and in float64, and a tree per sample: its roots are the margins
    that alpha-CROWN leaves open, with slopes of their own for each."""
    eps, tolerance = settings.eps, settings.tolerance
    # On large networks the ascent alone takes longer than a sample has; DeepPoly has to do there.
    slow = any(10 * v.seconds_by_stage.get("deeppoly", 0) > settings.timeout for v in verdicts)
    double, x64, y64 = in_float64(net, x, y)
    bounds = preactivation_bounds(double, x64, eps, "deeppoly" if slow else "alpha-crown",
                                  skip_stable=True)
    empty, order = x64.new_zeros(len(x), 0), itertools.count()
    l, u = (torch.cat([empty, *(pair[side].flatten(1) for pair in bounds)], 1) for side in (0, 1))
    wide = _tables(double, x64, y64, eps, l, u)
    tables = _tables(net, x, y, eps, l.to(x), u.to(x))
    slopes, none = adaptive(tables.l, tables.u), torch.zeros(0)
    trees = [Tree(i, v, upper[i]) for i, v in enumerate(verdicts)]
    roots = [Node(v.bound, next(order), i, k, none.long(), none, none, slopes[i])
             for i, v in enumerate(verdicts) for k in range(tables.rows.shape[1]) if k != y[i]]
    for start in range(0, len(roots), 4 * WIDTH):
        part = roots[start:start + 4 * WIDTH]
        for node in _bounded(tables, wide, part, trees, tolerance, STEPS):
            trees[node.sample].add(node, tolerance)
    return tables, wide, trees, order


def _grow(net, x, y, settings, tables, wide, trees, active, order):
    """Cut the worst nodes of the active trees and bound their halves. How many of each tree."""
    quota, limit = max(1, WIDTH // len(active)), STORE // (TREES * max(1, tables.l.shape[1]))
    nodes = [tree.pop(limit) for tree in active for _ in range(min(quota, len(tree.heap)))]
    goals = [trees[node.sample].goal(settings.tolerance) for node in nodes]
    neurons, bounds, points = _branch(tables, nodes, goals)
    _try_points(net, x, y, settings.eps, points, nodes, active)
    cut = [i for i, neuron in enumerate(neurons) if neuron is not None]
    if cut:
        halves = [half for i in cut for half in _halves(nodes[i], neurons[i], order)]
        for half in _bounded(tables, wide, halves, trees, settings.tolerance, NODE_STEPS,
                             [bound for i in cut for bound in bounds[i]]):
            trees[half.sample].add(half, settings.tolerance)
    for node in [node for node, neuron in zip(nodes, neurons) if neuron is None]:
        tree = trees[node.sample]
        bound, point = _settle_linear(wide, node)
        _try_points(net, x, y, settings.eps, point[None], [node], [tree])
        bound = max(bound, node.bound)
        tree.proved = min(tree.proved, bound)
        tree.stuck |= not bound > tree.goal(settings.tolerance)
    return Counter(node.sample for node in nodes)


def _grow_trees(net, x, y, settings, verdicts, upper, report):
    """Settle samples by alpha-CROWN, at the roots, and by branch and bound."""
    begun = time.time()
    tables, wide, trees, order = _plant(net, x, y, settings, verdicts, upper)
    for v in verdicts:
        v.spend("alpha-crown", (time.time() - begun) / len(verdicts))

    def over(tree):
        v, sign_is_enough = tree.verdict, settings.tolerance == math.inf
        return not tree.heap or "branch-and-bound" not in settings.stages \
            or v.seconds > settings.timeout or sign_is_enough and (
                tree.stuck or v.status == "attacked")

    waiting = list(trees)
    stage = "alpha-crown" if "alpha-crown" in settings.stages else "branch-and-bound"
    while waiting:
        for tree in [tree for tree in waiting if over(tree)]:
            v = tree.verdict
            v.bound = max(v.bound, tree.bound())
            if v.bound > ROUNDING and v.status == "attacked":
                raise ContradictionError(v.index, stage, v.bound, v.counterexample)
            if v.bound > 0 and v.status == "unknown":
                v.status, v.stage = "certified", stage
            waiting.remove(tree)
            report(v)
        stage, begun, active = "branch-and-bound", time.time(), waiting[:TREES]
        if active:
            cut = _grow(net, x, y, settings, tables, wide, trees, active, order)
            for sample, nodes in cut.items():
                verdicts[sample].spend(stage, (time.time() - begun) * nodes / cut.total())


# --------------------------------------------------------------------------------------- self-check

def random_problem(seed):
    """A random network, 6 images, the labels it gives them, and a radius."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pick = lambda *values: values[int(torch.randint(len(values), ()))]
        x = h = torch.rand(6, pick(1, 2), pick(4, 5, 6), pick(4, 5, 7))
        layers = []
        def add(layer):
            nonlocal h
            layers.append(layer.eval())
            h = layer(h)
        for _ in range(pick(0, 1, 2)):
            kernel = min(pick(1, 2, 3), *h.shape[2:])
            add(nn.Conv2d(h.shape[1], pick(2, 4), kernel, pick(1, 2), pick(0, kernel // 2)))
            if pick(True, False):
                layer = nn.BatchNorm2d(h.shape[1])
                for t in (layer.weight, layer.bias, layer.running_mean):
                    t.normal_()
                layer.running_var.uniform_(0.2, 3)
                add(layer)
            add(nn.ReLU())
        add(nn.Flatten())
        for _ in range(pick(1, 2)):
            add(nn.Linear(h.shape[1], pick(4, 8, 12)))
            add(nn.ReLU())
        add(nn.Linear(h.shape[1], pick(2, 3, 5)))
        net, gain = nn.Sequential(*layers), pick(0.7, 1.0, 2.0, 4.0)
        for p in net.parameters():
            p.mul_(gain)
        return net, x, net(x).argmax(1), pick(0.01, 0.03, 0.1, 0.3)


def self_check(limit=math.inf, seed=0, show=lambda line: None):
    """Attack the bounds and verdicts of random networks: (checks, contradictions).

    A check is one image and one claim: that the bounds of a relaxation (textbook, or skip_stable)
    enclose what the neurons and margins are at all points tried, in float64, or that a verdict of
    certify is not contradicted: "certified" by a point, "attacked" by a counterexample that is
    outside of the ball, or rightly classified. The points: PGD with 5 restarts of 60 steps, random
    ones, and random corners of the ball. Stops at the limit, or when interrupted.
    """
    checks, contradictions, K = 0, [], 20
    try:
        for seed in itertools.count(seed):
            net, x, y, eps = random_problem(seed)
            worst = attack(net, x, y, eps, steps=60, restarts=5, seed=seed)
            wide, x64, worst, _ = in_float64(net, x, worst, y)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.empty(2 * K, *x.shape, dtype=torch.float64).uniform_(
                -1, 1, generator=generator)
            noise[K:] = noise[K:].sign()
            points = torch.cat([worst[None], (x64 + eps * noise).clamp(0, 1)])    # (1 + 2 K, B, ..)
            for relax, skip in itertools.product(RELAXATIONS, (False, True)):
                for image in _outside(wide, x64, y, eps, points, relax, skip):
                    contradictions.append(f"seed {seed}, image {image}, {relax}, skip {skip}")
                checks += len(x)
            try:
                margins = torch.stack([forward_margin(wide, p, y) for p in points]).amin(0)
                for v in certify(net, x, y, eps, timeout=1.0, seed=seed):
                    i, point = v.index, v.counterexample
                    wrong = v.status == "certified" and margins[i] <= -ROUNDING
                    if v.status == "attacked":
                        wrong = ((point.double() - x64[i]).abs().max() > eps
                                 or forward_margin(wide, point[None], y[i:i + 1]) > 0)
                    if wrong:
                        contradictions.append(f"seed {seed}, image {i}, {v.status} by {v.stage}")
            except ContradictionError as e:
                contradictions.append(f"seed {seed}, image {e.index}: {e}")
            checks += len(x)
            show(f"{checks} checks, {len(contradictions)} contradictions")
            if checks >= limit:
                break
    except KeyboardInterrupt:
        pass
    return checks, contradictions


@torch.no_grad()
def _outside(net, x, y, eps, points, relax, skip):
    """The images for which some point violates some bound, beyond rounding in float64."""
    bounds = preactivation_bounds(net, x, eps, relax, skip_stable=skip, steps=5)
    low = margin_lower_bounds(net, x, y, eps, relax, skip_stable=skip, steps=5)
    h, n, wrong = points.flatten(0, 1), 0, torch.zeros(len(x), dtype=torch.bool)
    for layer in net:
        if isinstance(layer, nn.ReLU):
            z = h.unflatten(0, points.shape[:2]).flatten(2)
            l, u = (t.flatten(1) for t in bounds[n])
            slack = 1e-9 * (1 + l.abs() + u.abs())
            wrong |= ~((z >= l - slack) & (z <= u + slack)).all(2).all(0)      # NaN is wrong too
            n += 1
        h = layer(h)
    logits = h.unflatten(0, points.shape[:2])
    margins = logits.gather(2, y.expand(len(points), -1)[..., None]) - logits
    wrong |= ~(margins >= low - 1e-9 * (1 + low.abs())).all(2).all(0)
    return wrong.nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------- command line

def summary(verdicts, stages):
    """The final table, as lines of text: counts that add up to the number of samples."""
    n, counts = len(verdicts), Counter(v.status for v in verdicts)
    settled = Counter(v.stage for v in verdicts if v.status == "certified")
    def line(title, k):
        return f"  {title:34}{100 * k / n:7.2f} %   {k}/{n}"
    lines = [line("natural accuracy", n - counts["misclassified"]),
             line("not attacked (upper bound)", counts["certified"] + counts["unknown"])]
    total = 0
    for stage in stages:
        total += settled[stage]
        lines.append(line(f"certified up to {stage}", total))
    spent = sum((Counter(v.seconds_by_stage) for v in verdicts), Counter())
    lines.append("  seconds: " + ", ".join(f"{s} {spent[s]:.1f}" for s in ("attack", *STAGES)
                                           if s in spent))
    lines.append("  " + " + ".join(f"{counts[s]} {s}" for s in STATUSES) + f" = {n} samples, "
                 f"{sum(v.seconds for v in verdicts):.1f} s")
    return lines


def newest_run(root="runs"):
    runs = sorted(Path(root).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run found under {root}/; train one with python train.py, or name its "
                         "folder")
    return runs[-1].parent


def sealed(row):
    """A line of JSON with a checksum of the rest of it."""
    return json.dumps(row | {"crc": zlib.crc32(json.dumps(row).encode())})


def unsealed(line):
    """The row of such a line; raises ValueError, KeyError or TypeError if it was damaged."""
    row = json.loads(line)
    if row.pop("crc") != zlib.crc32(json.dumps(row).encode()):
        raise ValueError("wrong checksum")
    return row


def open_log(path, header):
    """Verdicts that path already holds {index: Verdict}, and the file to append to.

    The first line of the file is its settings. A file of other settings is never touched; a last
    line that an interrupt cut short is dropped.
    """
    known, file = {}, open(path, "a")
    claim(file, path)
    if path.stat().st_size:
        lines = path.read_bytes().split(b"\n")[:-1]            # what ends in a newline is complete
        try:
            same = bool(lines) and unsealed(lines[0]) == header
            for r in map(unsealed, lines[1:] if same else []):
                bound = -math.inf if r["bound"] is None else r["bound"]
                known[r["index"]] = Verdict(r["status"], r["stage"], bound, r["seconds"],
                                            seconds_by_stage=r["seconds_by_stage"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            same = False
        if lines and not same:
            raise InputError(f"{path} holds other results, or is damaged; choose another file with "
                             "--out, or delete it")
        with open(path, "r+b") as f:
            f.truncate(sum(len(line) + 1 for line in lines))
    if not path.stat().st_size:
        print(sealed(header), file=file, flush=True)
    return known, file


def parse_args(argv):
    p = Parser(prog="certify.py", description="Certify a trained run, sample by sample.")
    p.add_argument("run", nargs="?", help="run folder of train.py; default: the newest under runs/")
    p.add_argument("--eps", type=number(0, 1), help="radius in pixels; default: the run's")
    p.add_argument("--samples", type=count(1), help="first N test images; default: the run's")
    p.add_argument("--validation", type=count(0), help="certify the last N training images, not "
                   "those of the test; 0: those of the test; default: the run's")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                   help=f"of {', '.join(STAGES)}; default: all")
    p.add_argument("--timeout", type=number(0, math.inf), default=30.0,
                   help="seconds for each image; default: 30")
    p.add_argument("--steps", type=count(1), default=40, help="of the attack")
    p.add_argument("--restarts", type=count(0),
                   help="of the attack; 0: no attack; default: one for each class")
    p.add_argument("--batch-size", type=count(1), default=100)
    p.add_argument("--seed", type=count(0), default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--data-dir", help="default: that of the run")
    p.add_argument("--self-check", metavar="N", nargs="?", type=count(1), const=10 ** 9,
                   help="instead: N checks of random networks, or as many as you let it do")
    p.add_argument("--out", help="JSON lines, one verdict each; default: RUN/certify-epsEPS.jsonl")
    return p.parse_args(argv)


def merge(path, header, known, file):
    """Move the verdicts of other processes, path.1, path.2, ..., into those of the first."""
    for part in sorted(path.parent.glob(path.name + ".[0-9]*")):
        more, handle = open_log(part, header)
        with handle:
            known |= more
            file.writelines(part.read_text().splitlines(keepends=True)[1:])
            file.flush()
            part.unlink()


def main(argv=None):
    args = parse_args(argv)
    if args.self_check:
        show, begun = Progress(), time.time()
        checks, contradictions = self_check(args.self_check, args.seed, show)
        show.done(f"{checks} checks, {len(contradictions)} contradictions, "
                  f"{duration(time.time() - begun)}")
        sys.exit("\n".join(contradictions) or 0)
    device = pick_device(args.device)
    folder = Path(args.run) if args.run else newest_run()
    net, config, _ = load_run(folder)
    data = hold_out(load_dataset(config["dataset"], args.data_dir or config["data_dir"]),
                    config["validation"] if args.validation is None else args.validation)
    if list(data.x_test.shape[1:]) != config["input_shape"] or data.classes != config["classes"]:
        raise InputError(f"{folder} was trained on images {config['input_shape']} of "
                         f"{config['classes']} classes, but {config['dataset']} has "
                         f"{list(data.x_test.shape[1:])} of {data.classes}")
    with process_group(device):
        certify_run(net.to(device), config, data, folder, args, device)


def certify_run(net, config, data, folder, args, device):
    """Write a verdict for each test image, and show their counts. With many processes each takes
    its share; the first gathers what they wrote."""
    (rank, world), eps = ranks(), config["eps"] if args.eps is None else args.eps
    n = min(len(data.x_test), args.samples or config["test_subset"] or len(data.x_test))
    path = Path(args.out) if args.out else folder / f"certify-eps{eps:.6g}.jsonl"
    points = path.with_suffix(".counterexamples")
    settings = dict(stages=[s for s in STAGES if s in args.stages], timeout=args.timeout,
                    steps=args.steps, seed=args.seed,
                    restarts=data.classes if args.restarts is None else args.restarts)
    header = dict(run=folder.resolve().name, eps=eps, **settings,
                  network=checksum(*net.state_dict().values()),
                  images=checksum(data.x_test, data.y_test))
    known = {}
    try:
        if rank == 0:
            known, file = open_log(path, header)
            merge(path, header, known, file)                       # of a job that was interrupted
        todo = [[i for i in range(n) if i not in known]]
        if world > 1:
            dist.broadcast_object_list(todo, src=0)
        todo = todo[0][rank::world]
        if rank:
            _, file = open_log(path.with_name(f"{path.name}.{rank}"), header)
    except OSError as e:
        raise InputError(f"--out {path} cannot be written ({e})") from None
    print(f"{folder}: {config['net']} trained by {config['relax']}, {config['opt']}; "
          f"eps {eps:.4g}; {n} test images"
          + (f", {len(known)} verdicts already in {path}" if known else ""))
    show, begun, numbers = Progress(), time.time(), itertools.count(1)

    def report(v):
        i, done = todo[v.index], next(numbers)
        known[i] = v
        row = dict(index=i, label=int(data.y_test[i]), status=v.status, stage=v.stage,
                   bound=v.bound if v.bound > -math.inf else None, seconds=v.seconds,
                   seconds_by_stage=v.seconds_by_stage)
        if v.counterexample is not None:
            row["counterexample"] = f"{points.name}/{i}.npy"
            points.mkdir(exist_ok=True)
            np.save(points / f"{i}.npy", v.counterexample.cpu().numpy())
        print(sealed(row), file=file, flush=True)
        counts = Counter(v.status for v in known.values())
        left = (time.time() - begun) / done * (len(todo) - done)
        show(f"{len(known)}/{n}  " + "  ".join(f"{counts[s]} {s}" for s in STATUSES)
             + f"  {duration(left)} left")

    with file:
        x, y = data.x_test[todo].to(device), data.y_test[todo].to(device)
        try:
            certify(net, x, y, eps, batch=args.batch_size, report=report, **settings)
        except ContradictionError as e:
            points.mkdir(exist_ok=True)
            witness = points / f"contradiction-{todo[e.index]}.npy"
            np.save(witness, e.counterexample.cpu().numpy())
            print(f"abort: test image {todo[e.index]} is certified and attacked: {e}. The "
                  f"counterexample is in {witness}", file=sys.stderr)
            sys.exit(1)
        if rank:
            file.close()                                           # and its claim is given up
        if world > 1:
            dist.barrier()
        if rank == 0:
            merge(path, header, known, file)
    show.done(f"verdicts in {path}, counterexamples in {points}:")
    if rank == 0:
        print("\n".join(summary([known[i] for i in range(n)], settings["stages"])))


if __name__ == "__main__":
    run(main)
