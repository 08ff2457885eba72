"""Certify a network sample by sample: attack it, bound it, split it; give each sample a verdict.

    python certify.py                        the newest run under runs/, on its whole test set
    python certify.py runs/NAME --samples 1000 --eps 0.1 --timeout 30

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
wrong. benchmarks/self_check.py tries to contradict bounds and verdicts on random networks.

A positive factor of the logits changes no verdict. Nor does it change the search, for constants
that are compared with margins count in a unit of the network's own: see unit_of.

Letters in shape comments: those of relaxations.py; n nodes (subdomains), k candidates to cut at.
"""
import heapq
import itertools
import math
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch.func import jacrev

from plumbing.console import InputError, Parser, count, number, pick_device, run, warn
from plumbing.data import dataset_name, hold_out
from plumbing.processes import process_group, ranks
from plumbing.rounding import ball, in_float64
from plumbing.runs import checksum, data_of_run, is_trained_on
from plumbing.verdicts import STATUSES, points_of, save_point, write_verdicts
from relaxations import (RELAXATIONS, STEPS, Subdomains, adaptive, margin_lower_bounds,
                         pinned_forward, preactivation_bounds, read_network, subdomain_bounds)
from train import CERTIFY, CLOSE, attack, certified_margin, forward_margin, load_run, smallest

STAGES = (*RELAXATIONS, "branch-and-bound")
ROUNDING = 1e-6       # a bound above it and a counterexample contradict each other; below, a tie

# Branch and bound: settings that did well on the networks of benchmarks/certify.py.
WIDTH = 64            # nodes cut at once
TREES = 8             # samples whose trees grow at the same time
CANDIDATES = 1        # ReLUs that each of the two branching scores proposes
NODE_STEPS = 4        # of ascent for each node; it starts from the choices of its parent
LEAST_GAIN = 1e-6     # by which a half counts as better, so that the other half's gain decides
STORE = 2 ** 27       # numbers kept for waiting nodes (512 MB); beyond it, trees grow depth first


# ------------------------------------------------------------------------------ verdicts and stages

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

    def prove(self, stage, bound, unit):
        """All margins are at least bound in the whole ball. unit: that of the network's margins."""
        self.bound = max(self.bound, bound)
        if bound > ROUNDING * unit and self.status == "attacked":
            raise ContradictionError(self.index, stage, bound, self.counterexample)
        if bound > 0 and self.status == "unknown":
            self.status, self.stage = "certified", stage

    def refute(self, stage, point, unit):
        """A point of the ball is misclassified."""
        if self.status == "certified" and self.bound > ROUNDING * unit:
            raise ContradictionError(self.index, self.stage, self.bound, point)
        if self.status != "attacked":
            self.status, self.stage, self.counterexample = "attacked", stage, point.clone()


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
    """The arguments of certify(), and the unit of the network's margins."""
    eps: float
    timeout: float
    stages: list
    steps: int
    restarts: int
    seed: int
    tolerance: float
    unit: float


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

    Raises ContradictionError if a sample is certified and attacked, and before the first stage
    ValueError for bad arguments and for networks that relaxations.py does not support.
    """
    stages = list(stages)
    timeout = math.inf if timeout is None else timeout
    tolerance = math.inf if tolerance is None else tolerance
    check_settings(stages, eps, timeout, tolerance, batch=batch, steps=steps, seed=seed,
                   restarts=0 if restarts is None else restarts)
    check_samples(net, x, y)
    if not len(x):
        return []
    net = deepcopy(net).requires_grad_(False)
    x, y = x.clone(), y.clone().to(x.device, torch.long)
    if tolerance < math.inf:
        net, x, y = in_float64(net, x, y)
    restarts = net(x[:1]).shape[-1] if restarts is None else restarts
    settings = Settings(float(eps), timeout, stages, steps, restarts, seed, tolerance, unit_of(net))
    verdicts = [Verdict(index=i) for i in range(len(x))]
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        certify_batch(net, x[part], y[part], settings, verdicts[part], report)
    return verdicts


def check_settings(stages, eps, timeout, tolerance, **whole):
    """Raises ValueError for settings that make no sense. NaN makes none: no comparison is true."""
    try:
        fine = set(stages) <= set(STAGES) and 0 <= eps < math.inf
        fine = fine and timeout >= 0 and tolerance > 0 and whole["batch"] >= 1
        fine = fine and all(int(n) == n >= 0 for n in whole.values())
    except (TypeError, ValueError, RuntimeError, OverflowError):       # several numbers, or none
        fine = False
    if not fine:
        given = dict(eps=eps, timeout=timeout, tolerance=tolerance, **whole, stages=stages)
        raise ValueError(f"certify takes a radius 0 <= eps < infinity, timeout >= 0, tolerance > 0,"
                         f" whole numbers >= 0 (batch >= 1), and stages of {', '.join(STAGES)}; "
                         f"got {given}")


@torch.no_grad()
def check_samples(net, x, y):
    """Raises ValueError, in the words of the bounds, for what they refuse; and for a network that
    bounds and forward pass take for two: at eps 0 they have to give the same margins."""
    tensors = torch.is_tensor(x) and torch.is_tensor(y)
    if not tensors or x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError("x has to be a tensor of images (n, ...), y one of their labels (n,)")
    if not len(x):
        return
    # If the bounds take the images with the lowest and the highest pixel, and the smallest and the
    # largest label, they take all.
    lowest, highest = x.flatten(1).amin(1), x.flatten(1).amax(1)
    few = x[torch.stack([lowest.argmin(), highest.argmax()])]
    labels = torch.stack(y.aminmax())
    K = margin_lower_bounds(net, few, labels, 0.0, "box").shape[1]
    if K < 2:
        raise ValueError(f"the network has {K} logit; a margin is between two")
    twin, few, labels = in_float64(net, few, labels.long())
    logits = twin(few)
    margins = logits.gather(1, labels[:, None]) - logits
    difference = (margin_lower_bounds(twin, few, labels, 0.0, "box") - margins).abs().max()
    if difference > ROUNDING * max(unit_of(net), logits.abs().max()):
        raise ValueError(f"bounds and forward pass of the network differ by {difference:.3g} at a "
                         "radius of 0: some layer does not compute what its class says")


def unit_of(net):
    """The unit of the network's margins: about the largest weight of its last layer that has any.

    Constants that margins and the steps of multipliers are compared with count in it: so a factor
    of that layer, which changes no prediction, does not change the search either. A power of two:
    dividing by it and multiplying again is exact.
    """
    weights = [m.weight for m in net.modules() if getattr(m, "weight", None) is not None]
    largest = weights[-1].abs().max().item() if weights else 1.0
    return 2.0 ** round(math.log2(largest)) if 0 < largest < math.inf else 1.0


def certify_batch(net, x, y, settings, verdicts, report):
    """The stages one after the other, for samples that share their passes."""
    upper = attacked(net, x, y, settings, verdicts)
    for relax in [relax for relax in CERTIFY if relax in settings.stages]:
        bounded_by(relax, net, x, y, settings, verdicts)
    exactly = settings.tolerance < math.inf
    open_ = ("unknown", "attacked", "certified") if exactly else ("unknown",)
    left = [i for i, v in enumerate(verdicts)
            if v.status in open_ and v.seconds < settings.timeout]
    if not {"alpha-crown", "branch-and-bound"} & set(settings.stages):
        left = []
    for i in sorted(set(range(len(x))) - set(left)):
        report(verdicts[i])
    if left:
        some = [verdicts[i] for i in left]
        branch_and_bound(net, x[left], y[left], settings, some, upper[left].tolist(), report)


def attacked(net, x, y, settings, verdicts):
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
                verdicts[i].refute("attack", point, settings.unit)
    for v in verdicts:
        v.spend("attack", (time.time() - begun) / len(x))
    return upper


def bounded_by(relax, net, x, y, settings, verdicts):
    """Certify what one of the incomplete relaxations can. What was attacked is bounded too."""
    begun = time.time()
    left = [i for i, v in enumerate(verdicts)
            if v.status in ("unknown", "attacked") and v.seconds < settings.timeout]
    twin, x64, y64 = in_float64(net, x[left], y[left])
    low = certified_margin(twin, x64, y64, settings.eps, relax, **CERTIFY[relax])
    for i, bound in zip(left, low.tolist()):
        verdicts[i].spend(relax, (time.time() - begun) / len(left))
        verdicts[i].prove(relax, bound, settings.unit)


# --------------------------------------------------------------------------------- branch and bound

class Problem(NamedTuple):
    """What all nodes of a batch share: in the dtype of x, to steer by, and once more in float64,
    the exact twin, for bounds that count. N: neurons before all ReLUs, in the network's order."""
    net: torch.nn.Module
    x: torch.Tensor       # (B, ...) the images
    y: torch.Tensor       # (B,)
    eps: float
    unit: float           # of all margins, bounds and multipliers of nodes and trees
    network: tuple        # as relaxations.py reads it
    sizes: list           # of the ReLUs, as they make up N
    box: list             # (1, B, N_in) twice: the balls
    l: torch.Tensor       # (B, N) bounds before the ReLUs over the whole ball
    u: torch.Tensor
    rows: torch.Tensor    # (B, K, K): the margins of sample b, in units, as functions of the logits
    bias: torch.Tensor    # (N,) what each neuron is if all neurons and pixels below are 0


class Node(NamedTuple):
    """A subdomain, and one margin to be bounded there."""
    bound: float                # proved so far
    sample: int                 # its row in Problem
    target: int                 # the class k of the margin
    neurons: torch.Tensor       # (m,) the ReLUs cut, as indices 0..N-1
    signs: torch.Tensor         # (m,) 1: z >= 0, -1: z <= 0
    multipliers: torch.Tensor   # (m,) signs * beta
    slopes: torch.Tensor        # (N,) alpha


@dataclass(eq=False)
class Tree:
    """The nodes of one sample that are not settled yet, worst bound first. Numbers in units."""
    sample: int
    verdict: Verdict
    upper: float                # the smallest margin seen at a point of the ball, in float64
    tolerance: float = math.inf
    heap: list = field(default_factory=list)                   # (bound, count, node)
    counts: itertools.count = field(default_factory=itertools.count)
    proved: float = math.inf    # the smallest bound among settled nodes
    stuck: bool = False         # a node could not be settled

    def goal(self):
        """A node whose bound exceeds this is settled."""
        goal = self.upper - self.tolerance
        return max(goal, 0.0) if self.upper > 0 else goal

    def bound(self):
        return min(self.proved, self.heap[0][0] if self.heap else math.inf)

    def pop(self, most, limit):
        """The worst nodes; while more than limit are waiting, the last of the heap: mostly young
        ones, so that the tree grows in depth and the heap no further."""
        nodes = []
        while self.heap and len(nodes) < most:
            full = len(self.heap) > limit
            entry = self.heap.pop() if full else heapq.heappop(self.heap)
            nodes.append(entry[-1])
        return nodes

    def add(self, node):
        if node.bound > self.goal():
            self.proved = min(self.proved, node.bound)
        else:
            heapq.heappush(self.heap, (node.bound, next(self.counts), node))

    def is_over(self, settings):
        v = self.verdict
        if not self.heap or "branch-and-bound" not in settings.stages:
            return True
        settled = self.stuck or v.status == "attacked"         # as far as the sign is concerned
        return v.seconds > settings.timeout or settled and self.tolerance == math.inf


def branch_and_bound(net, x, y, settings, verdicts, upper, report):
    """Settle samples by alpha-CROWN, at the roots, and by branch and bound. upper: the smallest
    margin known of each."""
    begun = time.time()
    problem, exact, trees = roots(net, x, y, settings, verdicts, upper)
    for v in verdicts:
        v.spend("alpha-crown", (time.time() - begun) / len(verdicts))
    stage = "alpha-crown" if "alpha-crown" in settings.stages else "branch-and-bound"
    waiting = trees
    while waiting:
        over = [tree for tree in waiting if tree.is_over(settings)]
        for tree in over:
            tree.verdict.prove(stage, tree.bound() * settings.unit, settings.unit)
            report(tree.verdict)
        waiting = [tree for tree in waiting if tree not in over]
        stage, begun, active = "branch-and-bound", time.time(), waiting[:TREES]
        if active:
            cut = split_worst(problem, exact, trees, active)
            for sample, nodes in cut.items():
                verdicts[sample].spend(stage, (time.time() - begun) * nodes / cut.total())


def roots(net, x, y, settings, verdicts, upper):
    """The problem, its exact twin, and a tree per sample: its roots are the margins that
    alpha-CROWN leaves open, with slopes of their own for each."""
    eps, unit = settings.eps, settings.unit
    # On large networks the ascent alone takes longer than a sample has; DeepPoly has to do there.
    slow = any(10 * v.seconds_by_stage.get("deeppoly", 0) > settings.timeout for v in verdicts)
    twin, x64, y64 = in_float64(net, x, y)
    bounds = preactivation_bounds(twin, x64, eps, "deeppoly" if slow else "alpha-crown",
                                  skip_stable=True)
    exact = pose(twin, x64, y64, eps, unit, bounds)
    problem = pose(net, x, y, eps, unit, bounds)
    trees = [Tree(i, v, margin / unit, settings.tolerance / unit)
             for i, (v, margin) in enumerate(zip(verdicts, upper))]
    slopes, none = adaptive(problem.l, problem.u), torch.zeros(0)
    nodes = []
    for i, v in enumerate(verdicts):
        others = [k for k in range(problem.rows.shape[1]) if k != y[i]]
        nodes += [Node(v.bound / unit, i, k, none.long(), none, none, slopes[i]) for k in others]
    for start in range(0, len(nodes), 4 * WIDTH):
        part = nodes[start:start + 4 * WIDTH]
        for node in raise_bounds(problem, exact, part, trees, STEPS):
            trees[node.sample].add(node)
    return problem, exact, trees


def pose(net, x, y, eps, unit, bounds):
    """The problem in the dtype of x. bounds: of the pre-activations, in float64."""
    network = read_network(net, x.shape[1:])
    sizes = [l[0].numel() for l, _ in bounds]
    l = u = x.new_zeros(len(x), 0)
    for low, high in bounds:
        l = torch.cat([l, low.flatten(1).to(x)], 1)
        u = torch.cat([u, high.flatten(1).to(x)], 1)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    box = [low.flatten(1)[None], high.flatten(1)[None]]
    nothing = torch.zeros_like(box[0][0, :1])
    bias, logits = pinned_forward(network, torch.zeros_like(l[:1]), nothing)
    eye = torch.eye(logits.shape[1], dtype=x.dtype, device=x.device)
    rows = (eye[y][:, None] - eye) / unit
    return Problem(net, x, y, eps, unit, network, sizes, box, l, u, rows, bias[0])


def split_worst(problem, exact, trees, active):
    """Cut the worst nodes of the active trees and bound their halves. How many of each tree."""
    quota = max(1, WIDTH // len(active))
    limit = STORE // (TREES * max(1, problem.l.shape[1]))
    nodes = [node for tree in active for node in tree.pop(quota, limit)]
    goals = [trees[node.sample].goal() for node in nodes]
    neurons, bounds, points = branch(problem, nodes, goals)
    try_points(problem, points, nodes, active)
    cut = [i for i, neuron in enumerate(neurons) if neuron is not None]
    if cut:
        both = [half for i in cut for half in halves(nodes[i], neurons[i])]
        first = [bound for i in cut for bound in bounds[i]]
        for half in raise_bounds(problem, exact, both, trees, NODE_STEPS, first):
            trees[half.sample].add(half)
    for node in [node for node, neuron in zip(nodes, neurons) if neuron is None]:
        tree = trees[node.sample]
        bound, point = settle_linear(exact, node)
        try_points(problem, point[None], [node], [tree])
        bound = max(bound, node.bound)
        tree.proved = min(tree.proved, bound)
        tree.stuck |= not bound > tree.goal()
    return Counter(node.sample for node in nodes)


def subdomains(problem, nodes):
    """The nodes as one batch, in the dtype of the problem."""
    device = problem.l.device
    sample = torch.tensor([node.sample for node in nodes], device=device)
    target = torch.tensor([node.target for node in nodes], device=device)
    l, u = problem.l[sample], problem.u[sample]
    cuts = torch.tensor([len(node.neurons) for node in nodes])
    row = torch.arange(len(nodes)).repeat_interleave(cuts)
    where = row.to(device), torch.cat([node.neurons for node in nodes]).to(device)
    signs = torch.cat([node.signs for node in nodes]).to(l)
    multipliers = torch.cat([node.multipliers for node in nodes]).to(l)
    signs = torch.zeros_like(l).index_put(where, signs)
    multipliers = torch.zeros_like(l).index_put(where, multipliers)
    # Inside, the sign of a cut neuron is known: z >= 0 raises l to 0, z <= 0 lowers u to 0.
    return Subdomains(problem.sizes, problem.rows[sample, target],
                      [end[:, sample] for end in problem.box],
                      l.masked_fill(signs > 0, 0), u.masked_fill(signs < 0, 0), signs,
                      torch.stack([node.slopes for node in nodes]).to(l), multipliers)


def raise_bounds(problem, exact, nodes, trees, steps, first=None):
    """The nodes with bounds raised by beta-CROWN. float32 only steers: a bound that would settle
    its node is computed again in float64, from pre-activation bounds in float64.

    first: bounds that the nodes have as they are; where one is enough, there is no ascent."""
    goals = torch.tensor([trees[node.sample].goal() for node in nodes]).double()
    low = torch.full_like(goals, -torch.inf) if first is None else torch.tensor(first).double()
    todo = (~(low > goals)).nonzero().flatten().tolist()
    if todo:
        sub, nodes = subdomains(problem, [nodes[i] for i in todo]), list(nodes)
        target = goals[todo].to(sub.l)
        found, slopes, multipliers = subdomain_bounds(problem.network, sub, steps, target)
        low[todo] = found.cpu().double()
        for row, i in enumerate(todo):
            nodes[i] = nodes[i]._replace(slopes=slopes[row].clone(),
                                         multipliers=multipliers[row, nodes[i].neurons])
    sure = (low > goals).nonzero().flatten().tolist()
    if sure:
        again = subdomains(exact, [nodes[i] for i in sure])
        low[sure] = subdomain_bounds(exact.network, again)[0].cpu()
    low = low.tolist()
    return [node._replace(bound=max(node.bound, b)) for node, b in zip(nodes, low)]


def branch(problem, nodes, goals):
    """Where to cut each node, and a point of the ball where its relaxation is smallest.

    Filtered smart branching (De Palma et al. 2021): two scores of every unstable ReLU propose
    candidates, both halves of each cut are bounded without ascent, and the best product of gains
    wins.
    Returns neurons, a list (n,) with None where all ReLUs are stable; the bounds (n, 2) of their
    halves, z >= 0 and z <= 0; and points (n, N_in).
    """
    sub, trace = subdomains(problem, nodes), []
    low, *_ = subdomain_bounds(problem.network, sub, trace=trace)
    points = torch.where(trace[0] > 0, *(end[0] for end in sub.box))
    unstable = (sub.l < 0) & (sub.u > 0)
    if not unstable.any():
        return [None] * len(nodes), [None] * len(nodes), points
    tried = candidates(sub, torch.cat(trace[1:], 1), problem.bias, unstable)   # (n, 2k)
    bounds = bounds_of_halves(problem, sub, tried)                             # (n, 2k, 2)
    enough = torch.tensor(goals).to(low)                       # a bound above it is no better
    gains = bounds.minimum(enough[:, None, None]) - low[:, None, None]
    score = gains.clamp(min=LEAST_GAIN).prod(-1)
    choice = score.where(unstable.gather(1, tried), -1).argmax(1)
    best = torch.arange(len(nodes), device=low.device), choice
    neurons = [j if unstable[i, j] else None for i, j in enumerate(tried[best].tolist())]
    return neurons, bounds[best].tolist(), points


def candidates(sub, a, bias, unstable):
    """The neurons (n, 2k) that the two scores like best. With a (n, N) the coefficient of relu(z)
    and t, s the intercept and slope of its upper line,
        chord   |a- t|, how much the upper line costs the bound;
        BaBSR   |a- t + max(a b (s - 1), a b s)|, b the bias: the same, less what one half loses
                by z no longer being free (Bunel et al. 2020).
    """
    s = torch.where(unstable, sub.u / (sub.u - sub.l), 0.0)
    chord = a.clamp(max=0) * -s * sub.l
    ab = a * bias
    babsr = (chord + ab * torch.where(ab > 0, s, s - 1)).abs()
    k = min(CANDIDATES, a.shape[1])
    best = [score.where(unstable, -1).topk(k)[1] for score in (babsr, -chord)]
    return torch.cat(best, 1)


def bounds_of_halves(problem, sub, tried):
    """Bounds (n, 2k, 2), without ascent, of the halves z >= 0 and z <= 0 that each cut makes."""
    n, cuts = tried.shape
    rows = torch.arange(n, device=tried.device).repeat_interleave(2 * cuts)
    half = Subdomains(sub.sizes, sub.rows[rows], [end[:, rows] for end in sub.box],
                      *(t[rows] for t in sub[3:]))
    neuron = tried.flatten()
    first = torch.arange(0, len(rows), 2, device=tried.device)
    half.l[first, neuron] = 0
    half.u[first + 1, neuron] = 0
    return subdomain_bounds(problem.network, half)[0].view(n, cuts, 2)


def halves(node, neuron):
    """The two nodes that cutting at a neuron makes of one; together they cover it."""
    for sign in (1.0, -1.0):
        yield node._replace(
            neurons=torch.cat([node.neurons, node.neurons.new_tensor([neuron])]),
            signs=torch.cat([node.signs, node.signs.new_tensor([sign])]),
            multipliers=torch.cat([node.multipliers, node.multipliers.new_zeros(1)]))


def try_points(problem, points, nodes, trees):
    """Keep the worst of the points (n, N_in) for each tree; one with a margin <= 0 settles it."""
    sample = torch.tensor([node.sample for node in nodes], device=problem.x.device)
    y = problem.y[sample]
    low, high = ball(problem.x[sample], problem.eps)
    points = points.to(low).view(low.shape).clamp(low, high)
    logits = problem.net(points)
    margins = smallest(logits.gather(1, y[:, None]) - logits, y)
    margins = (margins / problem.unit).tolist()
    for tree in trees:
        mine = [i for i, node in enumerate(nodes) if node.sample == tree.sample]
        i = min(mine, key=margins.__getitem__, default=None)
        if i is None or margins[i] > tree.upper + CLOSE * max(1.0, abs(tree.upper)):
            continue
        margin = forward_margin(problem.net, points[i:i + 1], y[i:i + 1]).item()
        tree.upper = min(tree.upper, margin / problem.unit)
        if margin <= 0:
            tree.verdict.refute("branch-and-bound", points[i], problem.unit)


def settle_linear(exact, node):
    """A node without unstable ReLUs: its exact minimum and where it is, in float64.

    The network is affine there: minimise it subject to the signs of the ReLUs that were cut. What
    the linear program finds is only used through try_points and, as multipliers, through
    subdomain_bounds, so nothing rests on its accuracy.
    """
    free = node._replace(multipliers=torch.zeros_like(node.multipliers))
    sub = subdomains(exact, [free])
    signs = sub.signs[0, node.neurons]
    active = (sub.u > -sub.l).to(sub.l)

    def outputs(x):
        z, logits = pinned_forward(exact.network, active, x[None])
        margin = (sub.rows * logits).sum(1)
        return torch.cat([signs * z[0, node.neurons], margin])

    low, high = (end[0, 0] for end in sub.box)
    J = jacrev(outputs)(low)
    c, G = J[-1], J[:-1]
    h = G @ low - outputs(low)[:-1]
    x, tries = linear_program(*(t.cpu().numpy() for t in (c, G, h, low, high)))
    bound = -math.inf
    for beta in tries:
        sub.multipliers[0, node.neurons] = signs * torch.from_numpy(beta).to(signs)
        bound = max(bound, subdomain_bounds(exact.network, sub)[0].item())
    return bound, low if x is None else torch.from_numpy(x)


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
    seconds = [f"{stage} {spent[stage]:.1f}" for stage in ("attack", *STAGES) if stage in spent]
    lines.append("  seconds: " + ", ".join(seconds))
    total = " + ".join(f"{counts[status]} {status}" for status in STATUSES)
    lines.append(f"  {total} = {n} samples, {sum(v.seconds for v in verdicts):.1f} s")
    return lines


def newest_run(root="runs"):
    runs = sorted(Path(root).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run found under {root}/; train one with python train.py, or name its "
                         "folder")
    return runs[-1].parent


def verdict_of(row):
    bound = -math.inf if row["bound"] is None else row["bound"]
    return Verdict(row["status"], row["stage"], bound, row["seconds"],
                   seconds_by_stage=row["seconds_by_stage"])


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
    p.add_argument("--dataset", type=dataset_name, help="PATH.npz, if the run's has moved")
    p.add_argument("--data-dir", help="default: that of the run")
    p.add_argument("--out", help="JSON lines, one verdict each; default: RUN/certify-epsEPS.jsonl")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    folder = Path(args.run) if args.run else newest_run()
    net, config, _ = load_run(folder)
    moved = {k: getattr(args, k) for k in ("dataset", "data_dir") if getattr(args, k)}
    data = data_of_run(config | moved)
    if not is_trained_on(data, config):
        warn(f"{folder} was trained on other images than these")
    data = hold_out(data, config["validation"] if args.validation is None else args.validation)
    if list(data.x_test.shape[1:]) != config["input_shape"] or data.classes != config["classes"]:
        raise InputError(f"{folder} was trained on images {config['input_shape']} of "
                         f"{config['classes']} classes, but {config['dataset']} has "
                         f"{list(data.x_test.shape[1:])} of {data.classes}")
    with process_group(device):
        certify_run(net.to(device), config, data, folder, args, device)


def certify_run(net, config, data, folder, args, device):
    """Write a verdict for each test image, and show their counts. With many processes each takes
    its share; the first gathers what they wrote."""
    eps = config["eps"] if args.eps is None else args.eps
    n = min(len(data.x_test), args.samples or config["test_subset"] or len(data.x_test))
    path = Path(args.out) if args.out else folder / f"certify-eps{eps:.6g}.jsonl"
    settings = dict(stages=[s for s in STAGES if s in args.stages], timeout=args.timeout,
                    steps=args.steps, seed=args.seed,
                    restarts=data.classes if args.restarts is None else args.restarts)
    header = dict(run=folder.resolve().name, eps=eps, **settings,
                  network=checksum(*net.state_dict().values()),
                  images=checksum(data.x_test, data.y_test))

    def certify_some(indices, report):
        x, y = data.x_test[indices].to(device), data.y_test[indices].to(device)
        try:
            certify(net, x, y, eps, batch=args.batch_size, report=report, **settings)
        except ContradictionError as e:
            i = indices[e.index]
            witness = save_point(points_of(path), f"contradiction-{i}", e.counterexample)
            print(f"abort: test image {i} is certified and attacked: {e}. The counterexample is in "
                  f"{witness}", file=sys.stderr)
            sys.exit(1)

    title = (f"{folder}: {config['net']} trained by {config['relax']}, {config['opt']}; "
             f"eps {eps:.4g}; {n} test images")
    labels = data.y_test[:n].tolist()
    verdicts = write_verdicts(path, header, labels, certify_some, verdict_of, title,
                              batch=args.batch_size)
    if ranks()[0] == 0:
        print("\n".join(summary([verdicts[i] for i in range(n)], settings["stages"])))


# ------------------------------------------------------------------------- a linear program exactly

def linear_program(c, G, h, low, high):
    """min c.x  subject to  G x >= h and low <= x <= high, by the dual simplex method.

    Returns x (None if infeasible) and a list of multipliers beta >= 0 to try: at the last of them,
    min over low <= x <= high of c.x - beta.(G x - h) is the optimum, or, if infeasible, large.

    Each variable v, that is x or a slack w = G x - h >= 0, is either at one of its ends ("at", n of
    them) or basic: basic = T at + t. The start is dual feasible whatever c is, because x is bounded
    on both sides: every x at the end that c prefers.
    """
    (m, n), tiny = G.shape, 1e-9                           # of pixels; constraints are normalised
    size = np.abs(G).max(1, initial=0)
    size[size == 0] = 1
    G, h = G / size[:, None], h / size                     # multipliers are divided in the end
    lo = np.concatenate([low, np.zeros(m)])
    hi = np.concatenate([high, np.full(m, np.inf)])
    T, t = np.vstack([G, c]), np.append(-h, 0.0)           # the last row is the objective
    ends, basic = np.arange(n), n + np.arange(m)
    top = c < 0                                            # at the upper end?
    for _ in range(50 * (m + n)):
        at = np.where(top, hi[ends], lo[ends])
        v = T[:m] @ at + t[:m]
        outside = np.maximum(lo[basic] - v, v - hi[basic])
        r = outside.argmax() if m else 0
        if not m or outside[r] <= tiny:
            x, price = np.empty(n + m), np.zeros(n + m)
            x[ends], x[basic], price[ends] = at, v, T[m]
            return x[:n], [price[n:].clip(0) / size]
        up = 1 if v[r] < lo[basic[r]] else -1              # where basic variable r has to go
        helps = up * T[r] * np.where(top, -1, 1)           # what moving each from its end does
        cost = np.abs(T[m]) / np.maximum(helps, tiny)
        ratio = np.where(helps > tiny, cost, np.inf)
        j = ratio.argmin() if n else 0
        if not np.isfinite(ratio[j]):                      # nothing helps: row r is a proof
            proof = np.zeros(n + m)
            proof[ends], proof[basic[r]] = (-up * T[r]).clip(0), 1
            beta = proof[n:] / size * (np.abs(c).max() or 1)
            return None, [beta * 10.0 ** k for k in range(-2, 11)]
        pivot(T, t, r, j)
        ends[j], basic[r], top[j] = basic[r], ends[j], up < 0
    return None, []


def pivot(T, t, r, j):
    """Basic variable r and the j-th of those at their ends change places, in place."""
    row, constant = -T[r] / T[r, j], -t[r] / T[r, j]       # row r solved for the j-th
    row[j] = 1 / T[r, j]
    column = T[:, j].copy()
    T[:, j] = 0
    T += np.outer(column, row)
    t += column * constant
    T[r], t[r] = row, constant


if __name__ == "__main__":
    run(main)
