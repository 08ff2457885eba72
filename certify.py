"""Certify a network sample by sample: attack it, bound it, split it; give each sample a verdict.

    python certify.py                        the newest run under runs/, on its whole test set
    python certify.py runs/NAME --samples 1000 --eps 0.1 --timeout 30

Or any supported network (see relaxations.py), in Python:

    for v in certify.certify(net, x, y, eps=0.1):       # x (n, ...) pixels in [0, 1], y (n,) labels
        print(v.status, v.stage, v.bound)

The stages, each on what the ones before left open, while a sample has time left:

    forward            wrong without any perturbation                             -> misclassified
    attack             one descent (PGD) finds a wrong point in the ball          -> attacked
    box, crown-ibp, deeppoly                all margins have a positive bound     -> certified
    attack             a descent towards each class that no bound has ruled out   -> attacked
    alpha-crown        all margins have a positive bound                          -> certified
    branch-and-bound   the ball is cut into subdomains, until all are settled     -> certified,
                       or one of them gives a counterexample                      -> attacked
    otherwise (time is up)                                                        -> unknown

Branch and bound (Bunel et al. 2020, "Branch and bound for piecewise linear neural network
verification"; with beta-CROWN's bounds, Wang et al. 2021). A subdomain is the part of the ball
where some unstable ReLUs have a given sign: there they are linear, and its bound is tighter. If it
is still not positive, the subdomain is cut in two at one more of the finitely many ReLUs. Where
none is left to cut, the network is linear, and a linear program decides.

Guarantee: "certified" holds for every point of the ball, up to rounding in float64, in which every
bound that counts is computed; float32 only steers the search. "attacked" comes with a
counterexample in the ball (exactly, as float32 numbers), misclassified by a float64 forward pass.
"unknown" is neither. What is attacked is bounded all the same, up to DeepPoly: if it comes out
certified, a bound is wrong; benchmarks/self_check.py tries to get there on random networks. A
positive factor of the logits changes neither verdicts nor the search (unit_of).

Letters in shape comments: those of relaxations.py; n nodes (subdomains), k candidates to cut at.
"""
import heapq
import itertools
import math
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from faster.reduced import alone, pinned_forward
from plumbing.attack import descend, forward_margin, margins_of, restarts_of, smallest
from plumbing.checks import check_problem, check_settings
from plumbing.console import defaults, pick_device, run
from plumbing.data import dataset_kind, hold_out, statistics_of
from plumbing.linear_program import minimum_of_affine
from plumbing.networks import new_network
from plumbing.processes import process_group
from plumbing.reports import certify_radii, newest_run, parse_args, summary     # noqa: F401
from plumbing.rounding import ball, in_float64, unit_of
from plumbing.runs import check_images_of_run, data_of_run, moved
from plumbing.verdicts import ContradictionError, Verdict, charged              # noqa: F401
from plumbing.weights import read_weights
from relaxations import (RELAXATIONS, SLOPES, STEPS, Subdomains, margin_lower_bounds,
                         preactivation_bounds, read_network, subdomain_bounds)
from train import CERTIFY, CLOSE, LAYERS, SETTINGS, load_run

STAGES = (*RELAXATIONS, "branch-and-bound")

# Branch and bound: settings that did well on the networks of benchmarks/certify.py.
WIDTH = 64            # nodes cut at once
TREES = 8             # samples whose trees grow at the same time
CANDIDATES = 1        # ReLUs that each of the two branching scores proposes
NODE_STEPS = 4        # of ascent for each node; it starts from the choices of its parent
POINT_STEPS = 10      # of descent from where the relaxation of a node is smallest
LEAST_GAIN = 1e-6     # by which a half counts as better, so that the other half's gain decides
STORE = 2 ** 27       # numbers kept for waiting nodes (512 MB); beyond it, trees grow depth first


# ------------------------------------------------------------------------------ verdicts and stages

class Settings(NamedTuple):
    """The arguments of certify(), and the unit of the network's margins."""
    eps: float
    timeout: float
    stages: list
    steps: int
    restarts: int
    seed: int
    tolerance: float
    classes: int
    unit: float
    slope: str


class Batch(NamedTuple):
    """Samples that share their passes, and what is known of them so far."""
    net: torch.nn.Module
    x: torch.Tensor       # (B, ...) the images
    y: torch.Tensor       # (B,)
    exact: tuple          # the three in float64
    settings: Settings
    verdicts: list
    low: torch.Tensor     # (B, K) the margins proved
    upper: torch.Tensor   # (B,) the smallest margins seen

    def open(self, *statuses):
        """The samples of these statuses that have time left."""
        some = [i for i, v in enumerate(self.verdicts) if v.status in statuses]
        return [i for i in some if self.verdicts[i].seconds < self.settings.timeout]

    def part(self, some):
        """A batch of some of the samples."""
        net, x, y = self.exact
        verdicts = [self.verdicts[i] for i in some]
        exact = net, x[some], y[some]
        return Batch(self.net, self.x[some], self.y[some], exact, self.settings, verdicts,
                     self.low[some], self.upper[some])


@torch.inference_mode(False)               # whatever the caller's mode: attack and ascent need
@torch.enable_grad()                       # gradients
def certify(net, x, y, eps, timeout=None, *, stages=STAGES, steps=40, restarts=None, batch=100,
            seed=0, tolerance=None, slope="adaptive", report=lambda verdict: None):
    """A list with one Verdict per sample, for the ball of radius eps (pixels) around each x.

    net: an nn.Sequential as relaxations.py supports it, in eval mode, on the device and in the
    dtype of x.  x: (n, ...) in [0, 1].  y: (n,) labels.  timeout: seconds per sample; one that has
    used them up enters no stage and no descent, and its branching stops (None: no limit; branch and
    bound settles every sample in the end, but for margins that rounding hides).  stages: any of
    STAGES.  steps, restarts: of the attack, which takes at most a quarter of the time;
    restarts=None is one for each class that no bound rules out, 0 leaves it out.  batch: samples
    bounded at once.  slope: of DeepPoly's lower lines, a name of relaxations.SLOPES.  tolerance: go
    on until the smallest margin over the ball is known to so much, in float64: bound <= margin <=
    bound + tolerance (None: until its sign is known; misclassified samples are left out).
    report(verdict): called for each sample as soon as it is settled.
    Raises ContradictionError if a sample is certified and attacked, and before the first stage
    ValueError for bad arguments and for networks that relaxations.py does not support.
    """
    timeout = math.inf if timeout is None else timeout
    tolerance = math.inf if tolerance is None else tolerance
    check_settings(STAGES, stages, SLOPES, slope, timeout=timeout, tolerance=tolerance, batch=batch,
                   steps=steps, restarts=restarts, seed=seed, report=report)
    y = check_problem(net, x, y, eps, margin_lower_bounds, preactivation_bounds)
    if not len(x):
        return []
    net = deepcopy(net).requires_grad_(False)
    x = x.detach().clone()
    if tolerance < math.inf:
        net, x, y = in_float64(net, x, y)
    classes = net(x[:1]).shape[-1]
    restarts = classes if restarts is None else restarts
    settings = Settings(float(eps), timeout, list(stages), steps, restarts, seed, tolerance,
                        classes, unit_of(net, x), slope)
    verdicts = [Verdict(index=i) for i in range(len(x))]
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        certify_batch(net, x[part], y[part], settings, verdicts[part], report)
    return verdicts


def certify_batch(net, x, y, settings, verdicts, report):
    """The stages one after the other, for samples that share their passes."""
    with charged("attack", verdicts):
        exact = in_float64(net, x, y)
        upper = forward_margin(*exact)
        for v, margin in zip(verdicts, upper.tolist()):
            if not margin > 0:
                v.status, v.stage = "misclassified", "forward"
    low = upper.new_full([len(x), settings.classes], -math.inf)
    batch = Batch(net, x, y, exact, settings, verdicts, low, upper)
    descents = restarts_of(net, x, y, settings.eps, settings.restarts, settings.seed)
    attack_by(itertools.islice(descents, 1), batch)
    for relax in CERTIFY:
        if relax in settings.stages:
            bounded_by(relax, batch)
    attack_by(descents, batch)
    exactly = settings.tolerance < math.inf
    left = batch.open("unknown", *["attacked", "certified"] * exactly)
    if not {"alpha-crown", "branch-and-bound"}.intersection(settings.stages):
        left = []
    for i in sorted(set(range(len(x))) - set(left)):
        report(verdicts[i])
    if left:
        branch_and_bound(batch.part(left), report)


def attack_by(descents, batch):
    """Go down the descents, of restarts_of, while samples are open. One towards a class is for
    samples for which no bound rules it out; a sample may spend a quarter of its time on them."""
    settings = batch.settings
    spent = [v.seconds_by_stage for v in batch.verdicts]
    for target, start in descents:
        left = batch.open("unknown")
        left = [i for i in left if spent[i]["attack"] < settings.timeout / 4]
        if not left:
            return
        if target is not None:
            left = [i for i in left if not batch.low[i, target[i]] > 0]
            target = target[left]
        if not left:
            continue
        part = batch.part(left)
        start = start if start is None else start[left]
        with charged("attack", part.verdicts):
            points, _ = descend(part.net, part.x, part.y, settings.eps, settings.steps,
                                target, start)
            margins = forward_margin(part.net, points, part.y)
            batch.upper[left] = part.upper.minimum(margins)
            for v, point, margin in zip(part.verdicts, points, margins):
                if margin <= 0:
                    v.refute("attack", point, settings.unit)


def bounded_by(relax, batch):
    """Certify what one of the incomplete relaxations can. What was attacked is bounded too."""
    settings = batch.settings
    left = batch.open("unknown", "attacked")
    if not left:
        return
    part = batch.part(left)
    with charged(relax, part.verdicts):
        low = margin_lower_bounds(*part.exact, settings.eps, relax, **CERTIFY[relax],
                                  slope=settings.slope)
        batch.low[left] = torch.fmax(part.low, low)
        bounds = smallest(low, part.exact[2]).tolist()
    for v, bound in zip(part.verdicts, bounds):
        v.prove(relax, bound, settings.unit)


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
    slopes: torch.Tensor        # (N,) alpha
    neurons: torch.Tensor = torch.zeros(0).long()     # (m,) the ReLUs cut, as indices 0..N-1
    signs: torch.Tensor = torch.zeros(0)              # (m,) 1: z >= 0, -1: z <= 0
    multipliers: torch.Tensor = torch.zeros(0)        # (m,) signs * beta


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
    own: tuple = ()             # the problem of a large one, and its twin: of alone

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


def branch_and_bound(batch, report):
    """Settle samples by alpha-CROWN, at the roots, and by branch and bound: a large tree by itself,
    on the network as it is on the ball of its image."""
    def settled(trees, stage):
        over = [tree for tree in trees if tree.is_over(batch.settings)]
        for tree in over:
            tree.verdict.prove(stage, tree.bound() * unit, unit)
            report(tree.verdict)
            tree.heap, tree.own = [], ()                                       # They may be large.
        return over

    unit, stages = batch.settings.unit, batch.settings.stages
    problem, exact, trees = roots(batch)
    over = settled(trees, "alpha-crown" if "alpha-crown" in stages else "branch-and-bound")
    while waiting := [tree for tree in trees if tree not in over]:
        active, whose = waiting[:TREES], []
        large = [tree for tree in active if tree.own or len(tree.heap) >= WIDTH][:1]
        with charged("branch-and-bound", whose):
            own = alone(problem, exact, *large) if large else (problem, exact)
            whose += split_worst(*own, trees, large or active)
        over += settled(waiting, "branch-and-bound")


def roots(batch):
    """The problem, its exact twin, and a tree per sample: its roots are the margins that no bound
    has settled, raised by alpha-CROWN with slopes of their own for each, while there is time."""
    eps, unit = batch.settings.eps, batch.settings.unit
    bounds = neuron_bounds(batch)
    exact = pose(*batch.exact, eps, unit, bounds)
    problem = pose(batch.net, batch.x, batch.y, eps, unit, bounds)
    tolerance = batch.settings.tolerance / unit
    upper, low = ((t / unit).tolist() for t in (batch.upper, batch.low))
    trees = [Tree(i, v, upper[i], tolerance) for i, v in enumerate(batch.verdicts)]
    start = SLOPES[batch.settings.slope]
    slopes = start(problem.l, problem.u)
    nodes = []
    others = F.one_hot(batch.y, batch.settings.classes) == 0
    for i, k in others.nonzero().tolist():
        node = Node(low[i][k], i, k, slopes[i])
        if node.bound > trees[i].goal():
            trees[i].add(node)
        else:
            nodes.append(node)
    for start in range(0, len(nodes), 4 * WIDTH):
        part = nodes[start:start + 4 * WIDTH]
        in_time = batch.open("unknown", "attacked", "certified")
        late = [node for node in part if node.sample not in in_time]
        todo = [node for node in part if node.sample in in_time]
        with charged("alpha-crown", [trees[node.sample].verdict for node in todo]):
            todo = raise_bounds(problem, exact, todo, trees, STEPS)
        for node in late + todo:
            trees[node.sample].add(node)
    return problem, exact, trees


def neuron_bounds(batch):
    """Bounds of all neurons, in float64: by alpha-CROWN, or by DeepPoly on networks so large that
    an ascent would take longer than a sample has."""
    settings = batch.settings
    taken = [v.seconds_by_stage.get("deeppoly", 0) for v in batch.verdicts]
    chosen = ["alpha-crown" if t <= settings.timeout / 10 else "deeppoly" for t in taken]
    order, found = [], []
    for relax in sorted(set(chosen)):
        some = [i for i, each in enumerate(chosen) if each == relax]
        order += some
        part = batch.part(some)
        net, x, _ = part.exact
        with charged("alpha-crown", part.verdicts):
            found.append(preactivation_bounds(net, x, settings.eps, relax, skip_stable=True,
                                              slope=settings.slope))
    back = torch.tensor(order).argsort()
    return [[torch.cat(ends)[back] for ends in zip(*pairs)] for pairs in zip(*found)]


def pose(net, x, y, eps, unit, bounds):
    """The problem in the dtype of x. bounds: of the pre-activations, in float64."""
    network = read_network(net, x.shape[1:])
    l = u = x.new_zeros(len(x), 0)
    for low, high in bounds:
        l = torch.cat([l, low.flatten(1).to(x)], 1)
        u = torch.cat([u, high.flatten(1).to(x)], 1)
    low = (x - eps).clamp(min=0)
    high = (x + eps).clamp(max=1)
    box = [low.flatten(1)[None], high.flatten(1)[None]]
    nothing = torch.zeros_like(box[0][0, :1])
    bias, logits = pinned_forward(network, torch.zeros_like(l[:1]), nothing)
    eye = torch.eye(logits.shape[1]).to(x)
    rows = (eye[y][:, None] - eye) / unit
    return Problem(net, x, y, eps, unit, network, box, l, u, rows, bias[0])


def split_worst(problem, exact, trees, active):
    """Cut the worst nodes of the active trees and bound their halves. Returns their verdicts."""
    quota = max(1, WIDTH // len(active))
    limit = STORE // (TREES * max(1, problem.l.shape[1]))
    nodes = [node for tree in active for node in tree.pop(quota, limit)]
    goals = [trees[node.sample].goal() for node in nodes]
    neurons, bounds, points = branch(problem, nodes, goals)
    try_points(problem, points, nodes, active)
    cut = [i for i, neuron in enumerate(neurons) if neuron is not None]
    both = [half for i in cut for half in halves(nodes[i], neurons[i])]
    first = [bound for i in cut for bound in bounds[i]]
    for half in raise_bounds(problem, exact, both, trees, NODE_STEPS, first):
        trees[half.sample].add(half)
    linear = [node for node, neuron in zip(nodes, neurons) if neuron is None]
    for node in linear:
        tree = trees[node.sample]
        bound, point = settle_linear(exact, node)
        try_points(problem, point[None], [node], [tree], steps=0)
        bound = max(bound, node.bound)
        tree.proved = min(tree.proved, bound)
        tree.stuck |= not bound > tree.goal()
    return [trees[node.sample].verdict for node in nodes]


def subdomains(problem, nodes):
    """The nodes as one batch, in the dtype of the problem."""
    device = problem.l.device
    sample = torch.tensor([node.sample for node in nodes], device=device)
    target = torch.tensor([node.target for node in nodes], device=device)
    l, u = problem.l[sample], problem.u[sample]
    cuts = torch.tensor([len(node.neurons) for node in nodes])
    row = torch.arange(len(nodes)).repeat_interleave(cuts)
    neurons = torch.cat([node.neurons for node in nodes])
    where = row.to(device), neurons.to(device)
    spread = lambda parts: torch.zeros_like(l).index_put(where, torch.cat(parts).to(l))
    signs = spread([node.signs for node in nodes])
    multipliers = spread([node.multipliers for node in nodes])
    slopes = torch.stack([node.slopes for node in nodes]).to(l)
    # Inside, the sign of a cut neuron is known: z >= 0 raises l to 0, z <= 0 lowers u to 0.
    l = l.masked_fill(signs > 0, 0)
    u = u.masked_fill(signs < 0, 0)
    box = [end[:, sample] for end in problem.box]
    return Subdomains(problem.rows[sample, target], box, l, u, signs, slopes, multipliers)


def raise_bounds(problem, exact, nodes, trees, steps, first=None):
    """The nodes with bounds raised by beta-CROWN. float32 only steers: a bound that would settle
    its node is computed again in float64, from pre-activation bounds in float64.
    first: bounds that the nodes have as they are; where one is enough, there is no ascent."""
    goals = [trees[node.sample].goal() for node in nodes]
    goals = torch.tensor(goals).double()
    low = torch.tensor(first or [-math.inf] * len(nodes)).double()
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
    candidates, both halves of each are bounded without ascent, and the best product of gains wins.
    Returns neurons, a list (n,) with None where all ReLUs are stable; the bounds (n, 2) of their
    halves, z >= 0 and z <= 0; and points (n, N_in).
    """
    sub, trace = subdomains(problem, nodes), []
    low, *_ = subdomain_bounds(problem.network, sub, trace=trace)
    points = torch.where(trace[0] > 0, *sub.box)[0]
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
    chosen = enumerate(tried[best].tolist())
    neurons = [j if unstable[i, j] else None for i, j in chosen]
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
    lost = torch.where(ab > 0, s, s - 1)
    babsr = (chord + ab * lost).abs()
    k = min(CANDIDATES, a.shape[1])
    best = [score.where(unstable, -1).topk(k) for score in (babsr, -chord)]
    return torch.cat([places for _, places in best], 1)


def bounds_of_halves(problem, sub, tried):
    """Bounds (n, 2k, 2), without ascent, of the halves z >= 0 and z <= 0 that each cut makes."""
    n, cuts = tried.shape
    rows = torch.arange(n, device=tried.device).repeat_interleave(2 * cuts)
    box = [end[:, rows] for end in sub.box]
    half = Subdomains(sub.rows[rows], box, *(t[rows] for t in sub[2:]))
    neuron = tried.flatten()
    first = torch.arange(0, len(rows), 2, device=tried.device)
    half.l[first, neuron] = 0
    half.u[first + 1, neuron] = 0
    return subdomain_bounds(problem.network, half)[0].view(n, cuts, 2)


def halves(node, neuron):
    """The two nodes that cutting at a neuron makes of one; together they cover it."""
    for sign in (1.0, -1.0):
        yield node._replace(
            neurons=F.pad(node.neurons, (0, 1), value=neuron),
            signs=F.pad(node.signs, (0, 1), value=sign),
            multipliers=F.pad(node.multipliers, (0, 1)))


def try_points(problem, points, nodes, trees, steps=POINT_STEPS):
    """Descend from the worst of the points (n, N_in) of each tree; what is found is kept if it is
    worse than all before, and settles the tree if its margin is <= 0."""
    sample = torch.tensor([node.sample for node in nodes], device=problem.x.device)
    x, y = problem.x[sample], problem.y[sample]
    low, high = ball(x, problem.eps)
    points = points.to(x).view(x.shape).clamp(low, high)
    margins = smallest(margins_of(problem.net(points), y), y).tolist()
    worst = []
    for tree in trees:
        mine = [i for i, node in enumerate(nodes) if node.sample == tree.sample]
        worst.append(min(mine, key=margins.__getitem__))
    points, margins = descend(problem.net, x[worst], y[worst], problem.eps, steps,
                              start=points[worst])
    for tree, i, point, margin in zip(trees, worst, points, margins / problem.unit):
        if margin <= tree.upper + CLOSE * max(1.0, abs(tree.upper)):
            exactly = forward_margin(problem.net, point[None], y[[i]]).item()
            tree.upper = min(tree.upper, exactly / problem.unit)
            if exactly <= 0:
                tree.verdict.refute("branch-and-bound", point, problem.unit)


def settle_linear(exact, node):
    """A node without unstable ReLUs: its exact minimum and where it is, in float64.

    The network is affine there, subject to the signs of the ReLUs that were cut. What the linear
    program finds is tried as a point and as multipliers: nothing rests on its accuracy.
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
    x, tries = minimum_of_affine(outputs, low, high)
    bound = -math.inf
    for beta in tries:
        sub.multipliers[0, node.neurons] = signs * beta
        bound = max(bound, subdomain_bounds(exact.network, sub)[0].item())
    return bound, low if x is None else x


# ------------------------------------------------------------------------------------- command line

def main(argv=None):
    args = parse_args(argv, STAGES, SETTINGS)
    device = pick_device(args.device)
    path = Path(args.weights or args.run or newest_run())
    if args.weights:
        config = defaults(SETTINGS, dataset_kind(args.dataset), "grad")
        config |= args.given | dict(net=args.net, init="default")
        data = hold_out(data_of_run(config), args.validation or 0)
        shape = list(data.x_test.shape[1:])
        config |= dict(input_shape=shape, classes=data.classes)
        config["statistics"] = statistics_of(data, config)
        net = read_weights(path, new_network(config, LAYERS, read_network))
    else:
        net, config, _ = load_run(path)
        config = moved(config | dict(out=str(path)), args.given)
        data = data_of_run(config)
        check_images_of_run(data, config, path)
        held_out = config["validation"] if args.validation is None else args.validation
        data = hold_out(data, held_out)
    with process_group(device):
        certify_radii(certify, net.to(device), config, data, path, args)


if __name__ == "__main__":
    run(main)
