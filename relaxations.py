"""Bounds of a ReLU network over an L-infinity ball, by convex relaxation.

For a network f, an image x in [0, 1] and a radius eps, the input set is the ball
    B(x) = {x' : |x' - x|_inf <= eps, 0 <= x' <= 1},
and everything here returns numbers that hold for *every* x' in B(x): lower and upper bounds of the
pre-activations, and lower bounds of the margins logit[y] - logit[k]. If all margins k != y have a
positive lower bound, no perturbation of radius eps changes the prediction: the image is certified.

    relax          bounds before each ReLU             bound of the margins
    "box"          interval arithmetic                 interval arithmetic, last layers exact
    "crown-ibp"    interval arithmetic                 back-substitution
    "deeppoly"     back-substitution, layer by layer   back-substitution
    "alpha-crown"  as deeppoly, but every row chooses its own lower slopes, by ascent

    box          Gowal et al. 2018, "On the effectiveness of interval bound propagation" (IBP)
    crown-ibp    Zhang et al. 2020, "Towards stable and efficient training of verifiably robust
                 neural networks"
    deeppoly     Singh et al. 2019, "An abstract domain for certifying neural networks"; the same
                 bound as CROWN, Zhang et al. 2018, "Efficient neural network robustness
                 certification with general activation functions"
    alpha-crown  Xu et al. 2021, "Fast and complete: enabling complete verification with rapid and
                 massively parallel incomplete verifiers"

Back-substitution bounds a row a.z + d from below, z being the output of some layer, in four steps:
    1. z = W h + b is replaced by what it is: the row becomes (a W).h + (d + a.b), exactly.
    2. Each h_j = relu(z_j) is replaced by a line in z_j: one below relu where a_j > 0, one above
       relu where a_j < 0. The row can only get smaller.
    3. Repeat down to the input.
    4. The smallest value of a.x + d over the ball is known: each x_j goes to one of its ends.

The lines of step 2. Where l < 0 < u, relu lies between two of them; only the lower is a choice:

            u |      ,/            upper: the chord   relu(z) <= u/(u-l) (z - l)
              |   ,-'/             lower: any slope   relu(z) >= s z  with  0 <= s <= 1
              |,-'  /
           ,-'|    /    slope 1    A neuron with l >= 0 (slopes 1, 1) or u <= 0 (slopes 0, 0) is
        ,-'   |   /                exactly linear: "stable". Nothing is lost there.
     --l------+--/-------u-- slope 0

A worked example, two neurons in each layer: x in [1/4, 3/4]^2, the label is 0, and
    z1 = x1 + x2 - 1/2    z3 = h1 - h2    logit 0 = 2 h4        h = relu(z)
    z2 = x1 - x2          z4 = h1         logit 1 = h3
Intervals give z1 in [0, 1], z2 in [-1/2, 1/2], z3 in [-1/2, 1], z4 in [0, 1]. Stable neurons are
linear: h1 = z1, h4 = z4 = z1. What is left is h2 and h3, in z3 = h1 - h2 and in the margin
2 h4 - h3 = 2 z1 - h3. The upper line of h2 is (z2 + 1/2) / 2; its lower one is z2 or 0.
    box        margin >= 2 * 0 - 1                                                         = -1
    CROWN-IBP  h3 <= 2/3 (z3 + 1/2) from z3 in [-1/2, 1];  h2 >= z2 (the tie takes slope 1)
               margin >= 2 z1 - 2/3 (z1 - z2) - 1/3 = 2 x1 + 2/3 x2 - 1  at x = (1/4, 1/4)  = -1/3
    DeepPoly   z3 >= z1 - (z2 + 1/2) / 2 = x1/2 + 3/2 x2 - 3/4, so z3 in [-1/4, 1]
               h3 <= 4/5 (z3 + 1/4):  margin >= 2 x1 + 2/5 x2 - 4/5                         = -1/5
    exactly    the margin is 0 at x = (1/4, 1/4), and nowhere less
Tighter mostly, not always: where the lower line forgets more than an interval does, CROWN-IBP can
be looser than box.

Guarantee: the bounds are sound in exact arithmetic, for every network this file accepts. In
floating point they carry the rounding error of the sums, so a margin within about 1e-4 of zero
should be decided in float64 (certify.py does). Products that round their factors to fewer bits than
float32 has (TF32, bfloat16) are not used, whatever is set elsewhere.

How to read this file. "The heart" is the method, whole, in 150 lines. "The door" is what users
call. "Free choices" are alpha- and beta-CROWN: the same back-substitution with other lines. Then
comes one line; below it the same numbers are computed faster, and nothing above needs it.

Letters in shape comments, here and in the other modules:
    P  parameter vectors (the population; 1 if there is only one)      B  samples      K  classes
    N  neurons of a layer, N = C*H*W       O, C  channels out of / into a convolution
    R  rows bounded together, a.z + d      U  rows picked out one by one
    G  positions of the bounded layer's map, Ho*Wo (1 for a linear layer)
    Q  coefficients that a row holds       D  parameters
"""
import math
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vjp, vmap

from plumbing.checks import (as_labels, as_radii, as_rule, check_bounds, check_images,
                             check_numbers, check_relaxation, check_whole)
from plumbing.memory import Budget
from plumbing.precision import finite, full_precision
from plumbing.reading import read_layers

# A bound computed with 10-bit mantissas is no bound; cuDNN would use them on convolutions.
torch.backends.cudnn.allow_tf32 = False

RELAXATIONS = ("box", "crown-ibp", "deeppoly", "alpha-crown")
FAST = True     # False: everything through the heart
STEPS, RATES = 20, (0.3, 0.2)    # of alpha-CROWN's ascent; Adam's first step for alpha and beta


# ======================================================================================= the heart
# Bounds are (P, B, N). Rows are A (P, B, R, N) and d (P, B, R); the lines and the box that all of
# them meet are (P, B, 1, N).

class Layer(NamedTuple):
    """A layer that is affine in its input, z = W h + b, for each of P parameter vectors."""
    module: nn.Module
    tensors: dict        # what its state_dict holds: {name: (P, ...)}
    in_shape: tuple      # of one input of the module; here h and z are flat
    out_shape: tuple
    P: int

    def forward(self, h, tensors=None):
        """W h + b: (P, B, N) -> (P, B, N')."""
        return vmap(self.of_one)(tensors or self.tensors, h.expand(self.P, -1, -1))

    def of_one(self, tensors, h):
        """W h + b of one network: (B, N) -> (B, N')."""
        return functional_call(self.module, tensors, h.unflatten(1, self.in_shape)).flatten(1)

    def interval(self, lower, upper):
        """Interval arithmetic: centre c -> W c + b, radius r -> |W| r (Gowal et al. 2018), where
        |W| is the layer with |weight| for its weight and 0 for its bias and its mean."""
        to_size = {"weight": torch.abs, "running_var": torch.clone}
        size = {name: to_size.get(name, torch.zeros_like)(t) for name, t in self.tensors.items()}
        centre = finite(self.forward((lower + upper) / 2))
        radius = self.forward((upper - lower) / 2, size)
        return centre - radius, centre + radius

    def back(self, A, d):
        """a.z + d  ->  (a W).h + (d + a.b), exactly. PyTorch itself computes a W, whatever W is."""
        def of_member(tensors, A):                                               # (B, R, N')
            nothing = A.new_zeros(1, math.prod(self.in_shape))
            b, pull = vjp(lambda h: self.of_one(tensors, h), nothing)
            AW, = vmap(pull)(A.flatten(0, 1)[:, None])
            return AW.view(*A.shape[:2], -1), A @ b[0]

        A = A.expand(self.P, *A.shape[1:])
        AW, Ab = vmap(of_member)(self.tensors, A)
        return AW, d + Ab


def adaptive(l, u):
    """Slope 1 if u >= -l else 0: the smaller area between the lines (DeepPoly; CROWN-adaptive)."""
    return (u >= -l).to(l.dtype)


class Lines(NamedTuple):
    """Two lines around each relu(z): lower z <= relu(z) <= upper z + intercept."""
    lower: torch.Tensor
    upper: torch.Tensor
    intercept: torch.Tensor

    def back(self, A, d):
        """a.relu(z) + d >= a'.z + d': the lower line where a > 0, the upper one where a < 0."""
        negative = minus(A)
        d = d + (negative @ self.intercept.mT).squeeze(-1)
        # A+ lower + A- upper, where A+ = A - A-
        return torch.addcmul(A * self.lower, negative, self.upper - self.lower), d


def minus(A):
    """A- = min(A, 0), as clamp(max=0), whose backward pass is three times as slow on a CPU."""
    return F.hardtanh(A, -torch.inf, 0.0)


def relax_relu(l, u, slope=adaptive):
    """The Lines of neurons with z in [l, u]; slope(l, u), in [0, 1], counts where l < 0 < u."""
    below, above = F.relu(-l), F.relu(u)
    width = above + below + torch.finfo(l.dtype).tiny                # tiny: not 0/0 at l = u = 0
    # 1 if l >= 0, 0 if u <= 0. Adding 0 * width is nothing, unless it overflowed: then NaN reaches
    # the margins, and no sample is certified.
    upper = above / width + 0 * width
    stable = upper.detach()
    lower = torch.lerp(stable.floor(), stable.ceil(), slope(l, u))       # where stable, as upper
    # Through (u, u), not (l, 0): still above relu where tiny counts and the slope is too small.
    return Lines(lower, upper, above - upper * above)


class Box(NamedTuple):
    """The set of all x with lower <= x <= upper."""
    lower: torch.Tensor
    upper: torch.Tensor

    def back(self, A, d):
        """The smallest a.x + d in the box, exactly: each x_j goes to one of its ends."""
        low = A @ self.lower.mT + minus(A) @ (self.upper - self.lower).mT    # A+ lower + A- upper
        return None, d + low.squeeze(-1)


def lower_bound(A, d, steps):
    """Sound lower bounds (P, B, R) of the rows a.z + d, where z is the output of steps[-1], and the
    steps are a Box, then Layers and Lines."""
    for step in reversed(steps):
        A, d = step.back(A, d)
    return finite(d)


def neurons(stages, box, substitute, slope=adaptive, skip_stable=False, bound=lower_bound):
    """Bounds of the inputs of each ReLU, a Box (P, B, N) for each, from below upwards.

    stages: lists of layers, with one ReLU between consecutive stages.  substitute: bound them by
    back-substitution (DeepPoly), else by intervals, which are exact for one layer over a box.
    skip_stable: leave alone what intervals show to be stable; the rest gets the tighter bound.
    """
    bounds, inputs, steps = [], box, [for_rows(box)]
    for layers in stages[:-1]:
        l, u = inputs
        for layer in layers:
            l, u = layer.interval(l, u)
        exact = not layers or len(steps) + len(layers) == 2
        steps += layers
        if substitute and not exact:
            eye = torch.eye(l.shape[-1]).to(l)
            rows = torch.cat([eye, -eye]).expand(*l.shape[:2], -1, -1)
            low, minus_high = bound(rows, 0, steps).chunk(2, 2)      # z <= u means -z >= -u
            if skip_stable:
                unstable = (l < 0) & (u > 0)
                low = torch.where(unstable, torch.maximum(l, low), l)
                minus_high = torch.where(unstable, torch.maximum(-u, minus_high), -u)
            l, u = low, -minus_high
        bounds.append(Box(l, u))
        if substitute:
            steps.append(relax_relu(*for_rows(bounds[-1]), slope))
        inputs = F.relu(l), F.relu(u)
    return bounds


def margins(stages, rows, bounds, box, relax, slope=adaptive, bound=lower_bound):
    """Lower bounds of rows (P, B, R, K) of the logits, from the bounds of the neurons: (P, B, R).
    "box" stops at the outputs of the last ReLU, which lie in a box; the others go on to the input.
    """
    if relax == "box" and bounds:
        box = Box(*map(F.relu, bounds[-1]))
        stages, bounds = stages[-1:], []
    lines = [relax_relu(*for_rows(pair), slope) for pair in bounds]
    return bound(rows, 0, [for_rows(box), *interleaved(stages, lines)])


def interleaved(stages, lines):
    """All layers and lines, in the order of the network."""
    steps = list(stages[0])
    for line, layers in zip(lines, stages[1:]):
        steps += [line, *layers]
    return steps


def for_rows(box):
    """(P, B, N) -> (P, B, 1, N)."""
    return Box(*(t.unsqueeze(2) for t in box))


# ======================================================================================== the door
# What users call, and what is accepted.

# A class belongs in AFFINE if it is affine in its input and, where it has no weight, has no
# negative coefficients: whoever adds one vouches for both, or refuses settings in check_layer of
# plumbing/reading.py. RESHAPE changes nothing but shapes. A subclass that defines nothing but a
# constructor counts as its base.
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.BatchNorm1d,
          nn.BatchNorm2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
          nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d)
RESHAPE = nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d


class Network(NamedTuple):
    """An nn.Sequential as read_network reads it, which the heart bounds."""
    stages: list         # lists of Layers, with one ReLU between consecutive stages
    shapes: list         # without the batch: of each ReLU's input and, last, of the logits, (K,)
    P: int

    def neurons(self, box, ask):
        """The bounds before each ReLU: a Box of (P, B, N) for each, or of (1, B, N)."""
        bound = partial(best_where_unstable, ascent=ask.ascent) if ask.ascent else lower_bound
        return neurons(self.stages, box, ask.substitute, ask.slope, ask.skip_stable, bound)

    def margins(self, box, y, bounds, ask):
        """The bounds of the margins, (P, B, K)."""
        eye = torch.eye(*self.shapes[-1]).to(box.lower)
        rows = eye[y][:, None] - eye
        rows = rows.expand(self.P, -1, -1, -1)                         # slopes are of each member
        bound = partial(best_slopes, ascent=ask.ascent) if ask.ascent else lower_bound
        return margins(self.stages, rows, bounds, box, ask.relax, ask.slope, bound)

    def of_rows(self, rows, lines, multipliers, box, notes):
        """Bounds of rows (1, B, R, K) of the logits, on subdomains: see subdomain_bounds."""
        steps = [box, notes[0], *self.stages[0]]
        parts = zip(lines, multipliers, notes[1:], self.stages[1:])
        for line, of_relu, note, layers in parts:
            steps += [Shift(of_relu), line, note, *layers]
        return lower_bound(rows, 0, steps)

    def layouts(self):
        """What each stage reads and, last, the logits, if the rows are not in PyTorch's order."""
        return [()] * (len(self.stages) + 1)


def read_network(net, in_shape, params=None, trusted=False):
    """The Network that an nn.Sequential is for inputs of in_shape; nested ones are read as one.

    Raises ValueError, naming the layer, for what cannot be bounded.
    """
    P, entries, logits = read_layers(net, tuple(in_shape), params or {}, AFFINE, RESHAPE, trusted)
    stages, shapes = [[]], []
    for module, tensors, before, after in entries:
        if module is None:                                                                # a ReLU
            stages.append([])
            shapes.append(before)
        else:
            stages[-1].append(Layer(module, tensors, before, after, P))
    return Network(stages, [*shapes, logits], P)


def prepare(net, x, eps, relax, params, trusted=False):
    """Check the input; returns the Network and the input set as a Box (P, B, N). Normalisation, if
    it comes first, maps the box exactly, so it is applied to it and taken off the network."""
    if not trusted:
        check_relaxation(RELAXATIONS, relax)
        check_images(x)
    network = read_network(net, x.shape[1:], params, trusted)
    if not trusted:
        check_numbers(x, [layer.tensors for layers in network.stages for layer in layers])
        eps = as_radii(eps, x)
    ends = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    box = Box(*(end.flatten(1)[None] for end in ends))
    first, *rest = network.stages
    while first and isinstance(first[0].module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        box, first = Box(*first[0].interval(*box)), first[1:]
    return network._replace(stages=[first, *rest]), box


def preactivation_bounds(net, x, eps, relax="deeppoly", params=None, *, slope=adaptive,
                         skip_stable=False, memory=None, steps=STEPS, trusted=False):
    """Sound bounds of every pre-activation over the ball of radius eps around x, clipped to [0, 1].

    Returns [(l, u), ...], one pair per ReLU in the order of the network, each shaped like the
    ReLU's input: (B, ...), or (P, B, ...) with params. Guarantee: l <= z(x') <= u for every x' in
    the ball. Arguments and errors are those of margin_lower_bounds.
    """
    network, box = prepare(net, x, eps, relax, params, trusted)
    ask = options(relax, slope, skip_stable, steps, Budget(memory, x))
    with full_precision(x):
        bounds = engine(network).neurons(box, ask)
    return [tuple(t.expand(network.P, -1, -1).reshape(shape) for t in pair)
            for pair, shape in zip(bounds, bound_shapes(network, x, params))]


def margin_lower_bounds(net, x, y, eps, relax="deeppoly", params=None, skip_stable=False, *,
                        slope=adaptive, intermediate=None, memory=None, steps=STEPS, trusted=False):
    """Sound lower bounds of the margins over the ball of radius eps around x, clipped to [0, 1].

    Returns (B, K), or (P, B, K) with params: entry k is a lower bound of logit[y] - logit[k] in the
    ball, and entry y is 0. If all others are positive, x is certified at radius eps.
    Differentiable with respect to the parameters (and x).

    The rows logit[y] - logit[k] are multiplied into what follows the last ReLU before it is bounded
    ("elision", Gowal et al. 2018). Two logits that rise together then cancel: if logit 0 is
    h + 1 and logit 1 is h, with h in [0, 5], the margin is exactly 1, while bounding the
    logits apart gives 1 - 5 = -4.

    net: nn.Sequential of ReLU and of layers in AFFINE and RESHAPE, in eval mode, ending in (B, K).
    x: (B, ...) pixels in [0, 1], float32 or float64 like the parameters.  y: (B,) labels.
    eps: radius in pixels: a number, or a tensor that broadcasts with x.
    relax: "box", "crown-ibp", "deeppoly" (textbook: every bound by full back-substitution), or
        "alpha-crown" (steps of ascent; its gradient holds the slopes found fixed).
    params: {name of net.state_dict(): (P, ...)}, as torch.func.stack_module_state makes it: bounds
        for P networks at once. Names left out keep the values of net, for all P.
    skip_stable: with "deeppoly" and "alpha-crown", back-substitute only the neurons that interval
        arithmetic on the bounds of the layer before leaves unstable, and keep the tighter of both
        bounds. Faster, and usually at least as tight: with slope=zero always; but the adaptive
        slope may flip from 1 to 0, and then neurons and margins above it may be looser.
    slope: of the lower line of an unstable ReLU: a name of SLOPES, or a function (l, u) -> slope in
        [0, 1]. "alpha-crown" starts from it.
    intermediate: bounds before each ReLU to use instead, as preactivation_bounds returns them.
    memory: a budget in bytes for the passes, see plumbing/memory.py. The least pass goes down
        whatever it takes, and alpha-CROWN may take twice the budget.
    trusted: the like of these arguments was accepted before, as in training: nothing is checked.

    Raises ValueError for an unsupported layer (named), and for arguments that make no sense.
    """
    network, box = prepare(net, x, eps, relax, params, trusted)
    if not trusted:
        y = as_labels(y, x, *network.shapes[-1])
        check_bounds(intermediate, bound_shapes(network, x, params), x)
    ask, machine = options(relax, slope, skip_stable, steps, Budget(memory, x)), engine(network)
    with full_precision(x):
        if intermediate is None:
            bounds = machine.neurons(box, ask)
        else:
            flat = lambda t: t.reshape(network.P, len(x), -1)
            bounds = [Box(flat(l), flat(u)) for l, u in intermediate]
        low = machine.margins(box, y, bounds, ask)
    if relax == "alpha-crown" and intermediate is None:     # tighter bounds may flip a rule's slope
        deeppoly = margin_lower_bounds(net, x, y, eps, "deeppoly", params, skip_stable, slope=slope,
                                       memory=memory)
        low = torch.maximum(low, deeppoly)
    return low[0] if params is None else low


def bound_shapes(network, x, params):
    """Shapes of the bounds before each ReLU as the user sees them: (B, ...), or (P, B, ...)."""
    lead = (len(x),) if params is None else (network.P, len(x))
    return [torch.Size((*lead, *shape)) for shape in network.shapes[:-1]]


class Options(NamedTuple):
    """What a call asks for."""
    relax: str
    slope: object
    skip_stable: bool
    substitute: bool     # bound the neurons by back-substitution
    ascent: int          # steps, of alpha-CROWN
    budget: object


def options(relax, slope, skip_stable, steps, budget):
    check_whole(0, steps=steps)
    substitute, ascent = relax in ("deeppoly", "alpha-crown"), steps * (relax == "alpha-crown")
    return Options(relax, as_rule(slope, SLOPES), skip_stable, substitute, ascent, budget)


def engine(network):
    """The network as the fast path reads it, if FAST and if it can; else as the heart does."""
    quick = read_ops(network) if FAST and isinstance(network, Network) else None
    return quick or network


# =================================================================================== free choices
# Two things in a back-substituted bound may be chosen at will, row by row. Every choice is sound,
# a good one is tight: alpha-CROWN and beta-CROWN raise the bound by gradient ascent on them.
#
# alpha, the slope of the lower line of an unstable ReLU: anything in [0, 1] (Xu et al. 2021).
#
# beta, for branch and bound (Wang et al. 2021, "Beta-CROWN: efficient bound propagation with
# per-neuron split constraints for neural network robustness verification"). A subdomain S of the
# ball consists of the points where some pre-activations have a given sign, s_j z_j >= 0 with s_j =
# 1 or -1. That makes those ReLUs linear, but leaves the constraints unused. For any beta_j >= 0,
#     min over S of f(x)  >=  min over S of     f(x) - sum_j beta_j s_j z_j(x)    (subtracts >= 0)
#                         >=  min over ball of  f(x) - sum_j beta_j s_j z_j(x)    (S is part of it)
# and the last is bounded by back-substitution as ever: once its ReLU is passed, the coefficient a_j
# of z_j becomes a_j - s_j beta_j. beta = 0 gives the old bound back. With the best alpha and beta
# it is that of the linear program made of the lines around the ReLUs and of all constraints; if
# that program has no solution, it grows beyond all limits.


def zero(l, u):
    """Always 0: keeps relu >= 0, forgets z. The safest choice where most neurons are inactive."""
    return torch.zeros_like(l)


def one(l, u):
    """Always 1."""
    return torch.ones_like(l)


def parallel(l, u):
    """That of the upper line, u / (u - l): the bounds are those of a zonotope (Fast-Lin, Weng et
    al. 2018; DeepZ, Singh et al. 2018), the same in either direction."""
    return relax_relu(l, u).upper


SLOPES = dict(adaptive=adaptive, zero=zero, one=one, parallel=parallel)


def with_lower(steps, slopes):
    """The steps with other lower slopes for the Lines, one after another."""
    of_each = iter(slopes)
    return [step._replace(lower=next(of_each)) if isinstance(step, Lines) else step
            for step in steps]


def ascend(bound, free, limits, rates, steps, *, target=torch.inf, shield=nullcontext):
    """Raise the bound of every row by projected Adam on what is free: (best bounds, choices).

    bound(free) -> (...); each tensor of free is (..., Q), Q numbers for each row. limits has its
    (lowest, highest), rates its first step size. The given choices are tried first, and each row
    keeps its best ones, so no row gets looser. Stops early when all bounds exceed target.
    shield: a context for the bounds. No factor of the bounds matters: Adam's epsilon is tiny.
    """
    free = [t.detach().clone().requires_grad_() for t in free]
    optimizer = torch.optim.Adam([{"params": t, "lr": r} for t, r in zip(free, rates)],
                                 eps=torch.finfo(free[0].dtype).tiny ** 0.5, maximize=True,
                                 fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    best, chosen = -torch.inf, [t.detach().clone() for t in free]
    for step in range(steps + 1):
        with torch.enable_grad(), shield():
            low = bound(free)
            total = low.sum()                              # rows share nothing that is free
        better = low.detach() > best
        best = torch.where(better, low.detach(), best)
        for t, c in zip(free, chosen):
            torch.where(better[..., None], t.detach(), c, out=c)
        if step == steps or (best > target).all():
            return best, chosen
        optimizer.zero_grad()
        total.backward(inputs=free)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for t, (lowest, highest) in zip(free, limits):
                t.clamp_(lowest, highest)


def best_slopes(A, d, steps, ascent, shield=nullcontext):
    """lower_bound with the best lower slopes that so many steps of ascent find for each row, from
    the given ones on (alpha-CROWN). Its gradient is that of the bound, with the slopes held fixed.
    """
    lines = [step for step in steps if isinstance(step, Lines)]
    if not ascent or not lines:
        return lower_bound(A, d, steps)
    start = []
    for line in lines:
        rows = torch.broadcast_shapes(A.shape[:-1], line.lower.shape[:-1])
        start.append(line.lower.expand(*rows, -1))
    limits = [(line.upper.floor(), line.upper.ceil()) for line in lines]
    chosen = lambda slopes: lower_bound(A, d, with_lower(steps, slopes))
    best, slopes = ascend(chosen, start, limits, [RATES[0]] * len(start), ascent, shield=shield)
    return chosen(slopes) if torch.is_grad_enabled() else best


def no_checkpoint():
    """Inside a checkpoint, its hooks would compute the pass again for each backward of the ascent:
    these take their place. (torch.func, and so the heart, allows none.)"""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def best_where_unstable(A, d, steps, ascent):
    """best_slopes of neurons, rows and minus the rows, that lower_bound leaves unstable."""
    low = lower_bound(A, d, steps)
    below, above = low.chunk(2, 2)
    unstable = (below < 0) & (-above > 0)
    better = best_slopes(A, d, steps, ascent)
    return torch.where(torch.cat([unstable, unstable], 2), better, low)


class Subdomains(NamedTuple):
    """B parts of balls, on each of which one linear function of the logits is to be bounded.

    N counts the neurons before all ReLUs, in the order of the network.
    """
    rows: torch.Tensor          # (B, K) the functions
    box: list                   # lower and upper bounds of the input, (1, B, N_in) each
    l: torch.Tensor             # (B, N) bounds before the ReLUs
    u: torch.Tensor
    signs: torch.Tensor         # (B, N) 1 or -1 where the part has s z >= 0, else 0
    slopes: torch.Tensor        # (B, N) lower slopes, used where l < 0 < u
    multipliers: torch.Tensor   # (B, N) s beta


class Shift(NamedTuple):
    """A step that subtracts multipliers s beta from the coefficients of the z of a ReLU."""
    by: torch.Tensor

    def back(self, A, d):
        return A - self.by, d


class Note(NamedTuple):
    """A step that does nothing: it keeps the coefficients of what the step below it gives."""
    kept: list

    def back(self, A, d):
        self.kept[:] = [A.detach()]
        return A, d


def subdomain_bounds(network, sub, steps=0, target=torch.inf, trace=None):
    """Sound lower bounds (B,) of the functions on their subdomains; and the slopes and multipliers
    (B, N) that give them, the given ones or better by so many steps of ascent.

    trace: a list to be filled with the coefficients (B, ...) that the given slopes and multipliers
    give the input and, from below upwards, the outputs of each ReLU.
    """
    machine = engine(network)
    layouts = machine.layouts()
    sizes = [math.prod(shape) for shape in network.shapes[:-1]]

    def of_each(order, t):
        """The parts of t (B, N) that belong to each ReLU, in an order: hwc, as rows, or chw."""
        parts = zip(t.split(sizes, -1), layouts[1:])
        ordered = [order(part, layout) for part, layout in parts]
        return torch.cat([t[:, :0], *ordered], -1)

    def chosen(choices):
        slopes, multipliers = map(by_relu, choices)
        each = [line._replace(lower=lower) for line, lower in zip(lines, slopes)]
        return machine.of_rows(rows, each, multipliers, box, notes)[0, :, 0]

    by_relu = lambda t: t[None, :, None].split(sizes, -1)                    # (1, B, 1, N) each
    box = Box(*(hwc(t[:, :, None], layouts[0]) for t in sub.box))
    rows = hwc(sub.rows, layouts[-1])[None, :, None]                         # (1, B, 1, K)
    l, u, signs, slopes, multipliers = (of_each(hwc, t) for t in sub[2:])
    whole = relax_relu(l, u, lambda l, u: slopes.clamp(0, 1))
    lines = [Lines(*parts) for parts in zip(*map(by_relu, whole))]
    notes = [Note([]) for _ in layouts[1:]]
    choices = whole.lower, signs * F.relu(signs * multipliers)
    with full_precision(l):
        low = chosen(choices)
        found = [note.kept[0][0, :, 0] for note in notes]                    # (B, N) of each
        if trace is not None:
            trace += [chw(A, layout) for A, layout in zip(found, layouts)]
        if not steps or not sizes or (low > target).all():
            return low, sub.slopes, sub.multipliers
        # The unit of beta: the largest coefficient that the row has of the same ReLU.
        large = [A.abs() for A in found[1:]]
        largest = [A.amax(1, keepdim=True).expand_as(A) for A in large]
        unit = torch.cat(largest, 1)
        unit = unit.where(unit > 0, 1)
        none = torch.zeros_like(signs)
        limits = [(whole.upper.floor(), whole.upper.ceil()),
                  (none.masked_fill(signs < 0, -torch.inf), none.masked_fill(signs > 0, torch.inf))]
        in_units = lambda free: chosen((free[0], free[1] * unit))
        low, (slopes, betas) = ascend(in_units, (choices[0], choices[1] / unit), limits, RATES,
                                      steps, target=target)
    return low, of_each(chw, slopes), of_each(chw, betas * unit)


# ===================================================================== the same numbers, faster
# Nothing above needs what follows; FAST = False leaves it out. It reads Conv2d, Linear, BatchNorm
# and zero padding, as most networks have nothing else; any other goes through the heart.
#
# Prices, as times longer without a piece: benchmarks/prices.py, CNN3 with 64 images of digits and
# MNIST, initial weights, one thread of an AMD EPYC.
#     unstable_rows    8.3   skip_stable, after training by box; else nearly all rows are unstable
#     first_relu       1.6 to 1.8   DeepPoly, which is_dense lets in
#     sub_pixel        1.2 to 1.4   CROWN-IBP forward; 1.04 to 1.19 with its gradient
# The windows and the memory budget have no short form beside the heart itself: 4 to 8 times.

class Op(NamedTuple):
    """A Layer without its module: a linear one (stride None) or a convolution.

    Its bounds are in PyTorch's order; rows, and the lines and the box that they meet, in the order
    (height, width, channel), in which transposed convolutions are fastest (hwc translates).
    """
    weight: torch.Tensor     # (P, O, N), or (P, O, C/groups, kh, kw)
    bias: torch.Tensor       # (P, O)
    in_shape: tuple          # (N,) or (C, H, W), also of a linear layer that reads a map
    out_shape: tuple
    stride: tuple = None
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def apply(self, h, weight, bias=None):
        """W h + b: (P or 1, B, N) -> (P, B, N')."""
        P, B = len(weight), h.shape[1]
        if self.stride is None:
            y = (weight @ h.mT).mT           # not h @ weight.mT, whose gradient is a transpose
            return y if bias is None else y + bias[:, None]
        # The population becomes channels: one grouped convolution, or, while all members still see
        # the same input, one convolution with P times the output channels.
        shared = len(h) == 1 and self.groups == 1
        h = h if shared else h.expand(P, -1, -1)
        h = h.transpose(0, 1).reshape(B, -1, *self.in_shape[1:])
        y = F.conv2d(h, weight.flatten(0, 1), None if bias is None else bias.flatten(),
                     self.stride, self.padding, self.dilation, 1 if shared else P * self.groups)
        return y.reshape(B, P, -1).transpose(0, 1)

    def interval(self, lower, upper):
        centre = torch.lerp(lower, upper, 0.5)
        radius = self.apply(upper - centre, self.weight.abs())
        centre = finite(self.apply(centre, self.weight, self.bias))
        return centre - radius, centre + radius

    def back(self, A, d, kernel=None, size=None, padding=None):
        """Layer.back, for rows A (P, ..., Q) of all outputs; or of a window of them of the size
        kernel, which sees inputs of the given size."""
        window = (kernel or self.out_shape[1:], size or self.in_shape[1:],
                  self.padding if padding is None else padding)
        lead, rows = A.shape[1:-1], A.flatten(1, -2)                           # (P, rows, Q)
        bias = self.bias.repeat(1, math.prod(window[0]))[..., None]
        d = d + (rows @ bias).squeeze(2).unflatten(1, lead)
        if self.stride is None or is_dense(self, window[1]):
            rows = rows @ self.matrix(*window)
        else:
            rows = self.transposed(rows, *window)
        return rows.unflatten(1, lead), d

    def matrix(self, kernel, size, padding):
        """The layer on such a window as a matrix, (P, Q, Q')."""
        if self.stride is None:
            return hwc(self.weight, self.in_shape)
        eye = torch.eye(self.weight.shape[1] * math.prod(kernel)).to(self.weight)
        return self.transposed(eye[None], kernel, size, padding)

    def transposed(self, rows, kernel, size, padding):
        """Rows (P, M, Q) of a window of outputs as rows of the inputs that it sees."""
        P, O = self.bias.shape
        A = as_map(rows.expand(P, -1, -1), (O, *kernel))
        A = conv_transpose(A, self.weight.flatten(0, 1), size, self.stride, padding,
                           self.dilation, P * self.groups)
        return as_rows(A, P)


def as_map(t, shape):
    """(P, B, H*W*C) -> (B, P*C, H, W), in the memory as torch.channels_last has it."""
    C, H, W = shape
    t = t.unflatten(-1, (H, W, C)).permute(1, 2, 3, 0, 4)                      # (B, H, W, P, C)
    return t.flatten(3).permute(0, 3, 1, 2)


def as_rows(y, P):
    """(B, P*C, H, W) -> (P, B, H*W*C)."""
    y = y.permute(0, 2, 3, 1).unflatten(-1, (P, -1))                           # (B, H, W, P, C)
    return y.permute(3, 0, 1, 2, 4).flatten(2)


def hwc(t, shape):
    """The last dimension of t, if it is a map (C, H, W), in the order (H, W, C)."""
    if len(shape) < 3:
        return t
    return t.unflatten(-1, (shape[0], -1)).mT.flatten(-2)


def hwc_box(pair, shape):
    return Box(*(hwc(t, shape) for t in pair))


def chw(t, shape):
    """The last dimension of t, if it is a map, in PyTorch's order again."""
    if len(shape) < 3:
        return t
    return t.unflatten(-1, (-1, shape[0])).mT.flatten(-2)


def is_dense(op, size):
    """Is a product with one dense matrix, mostly zeros, faster than the transposed convolution?
    Measured on a CPU: the fewer the channels below, the slower is the convolution."""
    C, kh, kw = op.weight.shape[2:]
    return size[0] * size[1] * C <= min(64, 10 * C) * kh * kw


def read_ops(network):
    """The QuickNetwork of a Network, or None."""
    stages, source = [[] for _ in network.stages], ()      # source: shape of what the last Op gives
    for ops, layers in zip(stages, network.stages):
        for layer in layers:
            if not read_op(layer, ops, source):
                return None
            source = ops[-1].out_shape
    return QuickNetwork(stages, network.shapes, network.P)


def read_op(layer, ops, source):
    """Append the layer to ops as an Op, or fold it into the last of them; False: it cannot be."""
    module, tensors, shape = layer.module, layer.tensors, layer.in_shape
    norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    if isinstance(module, nn.Linear) and len(shape) == 1:
        weight = tensors["weight"]
        op = Op(weight, bias_of(tensors, weight), source or shape, layer.out_shape)
    elif len(shape) == 3 and source in ((), shape) and conv_padding(module):
        weight, options = tensors["weight"], (module.stride, conv_padding(module), module.dilation)
        op = Op(weight, bias_of(tensors, weight), shape, layer.out_shape, *options, module.groups)
    elif norm and ops and source == shape:
        op, (scale, shift) = ops.pop(), scale_and_shift(module, tensors)
        each = scale.view(*scale.shape, *[1] * (op.weight.dim() - 2))
        op = op._replace(weight=op.weight * each, bias=op.bias * scale + shift)
    elif norm and len(shape) == 3 and source in ((), shape):
        scale, shift = scale_and_shift(module, tensors)
        kernel = scale[..., None, None, None]                                # (P, C, 1, 1, 1)
        op = Op(kernel, shift, shape, shape, stride=(1, 1), groups=shape[0])
    else:
        return False
    ops.append(op)
    return True


def bias_of(tensors, weight):
    bias = tensors["bias"].flatten(1) if "bias" in tensors else weight.new_zeros(())
    return bias.expand(weight.shape[:2])                       # that of Linear may be one number


def conv_padding(module):
    """(above and below, left and right) of a Conv2d that pads with zeros, alike on both sides."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return None
    if module.padding != "same":
        return (0, 0) if module.padding == "valid" else module.padding
    width = spans(module.weight.shape[2:], module.dilation)
    return tuple(w // 2 for w in width) if all(w % 2 for w in width) else None


def spans(kernel, dilation):
    """The cells along each axis from the first to the last that a kernel sees."""
    return [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]


def scale_and_shift(norm, tensors):
    """s = gamma / sqrt(var + eps) and t = beta - s mean, (P, C) each: BatchNorm is z -> s z + t."""
    scale = (tensors["running_var"] + norm.eps).rsqrt() * tensors.get("weight", 1)
    return scale, tensors.get("bias", 0) - tensors["running_mean"] * scale


# One neuron of a convolution depends on a small window of the map below, and, further down, on a
# larger window of the next map. So its coefficients are kept for that window only:
#
#     the bounded layer      the map below            the map below that
#     . . . . .              . . . . . . .            . . . . . . . . .
#     . . # . .   kernel 3   . . # # # . .  kernel 3  . . # # # # # . .
#     . . . . .   -------->  . . # # # . .  ------->  . . # # # # # . .     stride 1 in this drawing
#     . . . . .              . . # # # . .            . . # # # # # . .
#
# The neuron at position (y, x) sees the rows  y*stride - padding + (0 .. kernel-1), columns alike.
# What falls outside the map is zero padding: lines and inputs read there are 0, so the coefficients
# there vanish by themselves. When the window outgrows the map, and below linear layers, a row holds
# one coefficient for each neuron. Rows are A (P, B, G, R, Q), and d (P, B, G, R).

class View(NamedTuple):
    """What the rows at each position see of a map: a window, or all of it (kernel None)."""
    shape: tuple                   # of the map, (C, H, W) or (N,)
    positions: tuple = (1, 1)      # (Ho, Wo) of the bounded layer
    kernel: tuple = None
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    sample: torch.Tensor = None    # (P, U) of rows picked one by one: member * B + sample
    position: torch.Tensor = None  # (P, U) and their position, 0 <= position < G

    def size(self):
        """Q, the coefficients of a row."""
        return math.prod(self.shape if self.kernel is None else (self.shape[0], *self.kernel))

    def below(self, op):
        """The view of the inputs of op that comes of this view of its outputs."""
        if self.kernel is None or op.stride is None:
            return self._replace(shape=op.in_shape, kernel=None)
        along = zip(self.kernel, op.stride, spans(op.weight.shape[3:], op.dilation))
        kernel = tuple((K - 1) * s + span for K, s, span in along)
        if math.prod(kernel) >= 2 * math.prod(op.in_shape[1:]):
            return self._replace(shape=op.in_shape, kernel=None)
        stride = tuple(S * s for S, s in zip(self.stride, op.stride))
        along = zip(self.padding, op.stride, op.padding)
        padding = tuple(Q * s + p for Q, s, p in along)
        return self._replace(shape=op.in_shape, kernel=kernel, stride=stride, padding=padding)

    def cells(self, device):
        """The cells of the map that each position sees, (G, cells); H*W is padding."""
        size = self.shape[1:]
        return seen_cells(size, self.positions, self.kernel, self.stride, self.padding, device)

    def take(self, t):
        """What the rows see of t (P or 1, B, N): (P, B, G, 1, Q); if picked, (P, U, 1, 1, Q)."""
        if self.kernel is None:
            t = t[:, :, None]                                                   # (P, B, 1, N)
            if self.sample is not None:
                t = t.expand(len(self.sample), -1, -1, -1)
                t = t.flatten(0, 1)[self.sample]
            return t[..., None, :]
        cells = self.cells(t.device)
        t = t.unflatten(-1, (-1, self.shape[0]))
        t = F.pad(t, (0, 0, 0, 1))                                          # (P, B, H*W + 1, C)
        if self.sample is not None:
            at = self.sample[..., None] * t.shape[2] + cells[self.position]   # (P, U, cells)
            t = t.expand(len(at), -1, -1, -1).flatten(0, 2)
            t = t.index_select(0, at.flatten())
            return t.view(*at.shape[:2], 1, 1, -1)
        t = t.index_select(2, cells.flatten())
        return t.view(*t.shape[:2], len(cells), 1, -1)

    def spread(self, A, d):
        """Rows over windows as rows over the map: (P, B, G, R, Q) -> (P, B, 1, G*R, N)."""
        cells = self.cells(A.device)
        cells = cells[None, None] if self.sample is None else cells[self.position][:, :, None]
        A = A.unflatten(-1, (-1, self.shape[0]))
        A, at = torch.broadcast_tensors(A, cells[..., None, :, None])  # (P, B, G, R, cells, C)
        *lead, _, C = A.shape
        zeros = A.new_zeros(*lead, math.prod(self.shape[1:]) + 1, C)           # last: padding
        A = zeros.scatter(-2, at, A)[..., :-1, :].flatten(-2)
        d = d.expand(lead).flatten(2)
        return A.flatten(2, 3).unsqueeze(2), d.unsqueeze(2)


@lru_cache(maxsize=64)
def seen_cells(size, positions, kernel, stride, padding, device):
    with torch.inference_mode(False):      # the result is kept, and has to serve in training too
        (H, W), arange = size, partial(torch.arange, device=device)
        ys, xs = (arange(n)[:, None] * s - p + arange(k)
                  for n, s, p, k in zip(positions, stride, padding, kernel))
        ys, xs = ys[:, None, :, None], xs[None, :, None, :]                 # (Ho, 1, kh, 1), ...
        outside = (ys < 0) | (ys >= H) | (xs < 0) | (xs >= W)
        cells = (ys * W + xs).masked_fill(outside, H * W)
        return cells.flatten(2).flatten(0, 1)


class Windowed(NamedTuple):
    """An Op as a step for rows that see its outputs by a view."""
    op: Op
    view: View

    def back(self, A, d):
        below, view = self.view.below(self.op), self.view
        if view.kernel and below.kernel:
            return self.op.back(A, d, view.kernel, below.kernel, (0, 0))
        return self.op.back(*(view.spread(A, d) if view.kernel else (A, d)))


def way_down(view, stages, lines, box):
    """The steps from the box up to stages[-1], whose outputs the rows see by the view; of the lines
    and the box, (P or 1, B, N) each, they have what the rows see."""
    steps, below_affine = [], True
    for ops, line in zip(stages[::-1], [*lines[::-1], None]):
        for op in reversed(ops):
            if below_affine and view.padding != (0, 0) and view.kernel:
                # No ReLU has been in between, so the coefficients on padding are not 0 yet.
                ones = torch.ones_like(box.lower[..., :1])
                inside = view.take(ones.expand(-1, -1, math.prod(view.shape)))
                steps.append(Lines(inside, inside, 0 * inside))
            steps.append(Windowed(op, view))
            view, below_affine = view.below(op), True
        if line is not None:
            steps.append(Lines(*(view.take(t) for t in line)))
            below_affine = False
    return [Box(*(view.take(t) for t in box)), *steps[::-1]]


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
    W, c = W.view(P, -1, O, Q), c.view(P, -1, O)
    return W, c, view.below(op)


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
    samples, channels = min(B, fit), min(O, max(1, fit // B))
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

    low, n = budget.run(bound, jobs(), keeps * samples * channels), len(starts)
    parts = [low[i:i + n] for i in range(0, len(low), n)]                      # of some samples
    low = torch.cat([torch.cat(part, 4) for part in parts], 1)
    low, minus_high = low.unbind(3)                                            # (P, B, G, O) each
    return low.mT.flatten(2), -minus_high.mT.flatten(2)                        # in PyTorch's order


def can_fuse(below, view):
    """Are the next steps a ReLU and a convolution on a window, better as one matrix?"""
    if len(below) < 2 or below[-1] or not below[-2] or not view.kernel:
        return False
    smaller = view.below(below[-2][-1])
    return smaller.kernel and is_dense(below[-2][-1], smaller.kernel)


def both_signs(t, dim):
    """Rows, and minus the rows: an upper bound of z_j is minus a lower bound of -z_j."""
    return torch.cat([t, -t], dim)


def parts_of(maps, samples):
    """The same Lines or Boxes for some of the samples."""
    return [type(each)(*(t[:, samples] for t in each)) for each in maps]


def unstable_rows(l, u, stages, lines, box, budget, ascent=0):
    """(l, u) of all outputs of stages[-1], tightened by back-substitution of the neurons that they
    leave unstable, only those. With steps of ascent, each row chooses its own lower slopes."""
    unstable = (l < 0) & (u > 0)
    member, sample, neuron = where = unstable.nonzero(as_tuple=True)
    if not len(member):
        return l, u
    if len(member) > l.numel() / 2 and not ascent:   # picking most rows costs more than all at once
        low, high = all_rows(stages, lines, box, budget)
        return (torch.where(unstable, torch.maximum(l, low), l),
                torch.where(unstable, torch.minimum(u, high), u))
    *below, (*others, op) = stages
    below, (W, c, view) = [*below, others], first_rows(op)
    P, Gx, O, _ = W.shape
    G = math.prod(view.positions)
    # The t-th pick of each member, as tables (P, U); short lists are filled up with zeros.
    counts = member.bincount(minlength=P)
    before = counts.cumsum(0) - counts
    slot = torch.arange(len(member), device=l.device) - before[member]
    samples, neurons = member.new_zeros(2, P, int(counts.max()))
    samples[member, slot], neurons[member, slot] = member * l.shape[1] + sample, neuron
    fit, keeps = budget.fit(2 * P, sizes_down(view, below), held=5)
    longest, members = samples.shape[1], torch.arange(P, device=l.device)[:, None]
    U = min(longest, fit)

    def bound(t):
        position, channel = neurons[:, t:t + U] % G, neurons[:, t:t + U] // G
        entry = members, position if Gx > 1 else 0, channel
        picked = view._replace(sample=samples[:, t:t + U], position=position)
        rows = (t[entry][:, :, None, None] for t in (W, c))
        A, d = (both_signs(t, 3) for t in rows)                                # (P, U, 1, 2, Q)
        way = way_down(picked, below, lines, box)
        return best_slopes(A, d, way, ascent, no_checkpoint)[:, :, 0]

    low = budget.run(bound, [(t,) for t in range(0, longest, U)], keeps * U)
    low = torch.cat(low, 1)[member, slot]
    return (l.index_put(where, torch.maximum(l[where], low[:, 0])),
            u.index_put(where, torch.minimum(u[where], -low[:, 1])))


def quick_neurons(stages, layouts, box, ask):
    """neurons with substitute=True; with steps of ascent, as best_where_unstable does it."""
    bounds, lines, inputs, box = [], [], box, hwc_box(box, layouts[0])
    for s, ops in enumerate(stages[:-1]):
        l, u = inputs
        exact = not ops or s == 0 and len(ops) == 1
        if exact or ask.skip_stable:
            for op in ops:
                l, u = op.interval(l, u)
        if not exact and ask.skip_stable:
            l, u = unstable_rows(l, u, stages[:s + 1], lines, box, ask.budget)
        elif not exact:
            l, u = all_rows(stages[:s + 1], lines, box, ask.budget)
        if not exact and ask.ascent:
            l, u = unstable_rows(l, u, stages[:s + 1], lines, box, ask.budget, ask.ascent)
        bounds.append(Box(l, u))
        lines = [*lines, relax_relu(*hwc_box(bounds[-1], layouts[s + 1]), ask.slope)]
        inputs = F.relu(l), F.relu(u)
    return bounds


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
        return ((slope.flatten(1, 2) @ AM).view(len(M), *lead, -1),
                (constant.flatten(1, 2) @ A.mT).view(len(M), *lead))

    def start(samples, some):
        A = W[:, some]
        X, x = product(A, *(t[:, samples] for t in sides[0]))
        Y, y = product(A.abs(), *(t[:, samples] for t in sides[1]))
        x = x + c[:, None, None, some]
        minus = (X + Y).neg_(), (x + y).neg_()
        return [(X - Y, x - y), minus]

    return start


FEW = 3      # channels: up to so many, a transposed convolution is slow on a CPU


def conv_transpose(A, weight, size, stride, padding, dilation, groups):
    """conv_transpose2d to a map of the given size."""
    kernel = weight.shape[2:]
    square = all(t[0] == t[1] for t in (kernel, stride, padding))
    if square and stride[0] > 1 and dilation == (1, 1) and weight.shape[1] <= FEW:
        return sub_pixel(A, weight, size, stride[0], padding[0], groups)
    along = zip(size, stride, padding, spans(kernel, dilation))
    rest = [(n + 2 * p - span) % s for n, s, p, span in along]
    return F.conv_transpose2d(A, weight, None, stride, padding, rest, groups, dilation)


def sub_pixel(A, weight, size, s, p, groups):
    """conv_transpose2d of stride s as a convolution to s*s times the channels, which are blocks of
    s x s outputs (Shi et al. 2016, "sub-pixel").

    Output y gets input i times weight[y + p - s i]. Blocks begin at -p; block Y has the outputs
    s Y + a - p and sees inputs Y + t - m, where m = (k-1)//s. So the tap is weight[a + s (m - t)].
    """
    k = weight.shape[2]
    m = (k - 1) // s
    t = torch.arange(m + 1, device=A.device)
    a = torch.arange(s, device=A.device)[:, None]
    tap = (a + s * (m - t)).clamp(max=k)                                               # k: nothing
    W = F.pad(weight, (0, 1, 0, 1))
    W = W[..., tap[:, None, :, None], tap[:, None]]
    W = W.unflatten(0, (groups, -1))                                   # (groups, O, C, a, b, t, t)
    W = W.permute(0, 3, 4, 2, 1, 5, 6).flatten(0, 3)
    A = F.conv2d(A, W, padding=m, groups=groups)
    A = A.unflatten(1, (groups, s, s, -1))
    A = A.permute(0, 5, 2, 6, 3, 1, 4)
    A = A.flatten(5, 6).flatten(3, 4).flatten(1, 2)                       # (M, s Y, s X, groups*C)
    below, right = (n + p - made for n, made in zip(size, A.shape[1:3]))
    A = F.pad(A, (0, 0, -p, right, -p, below))
    return A.permute(0, 3, 1, 2)


def sizes_down(view, stages):
    """The numbers of coefficients that one row holds, one after another, going down the stages."""
    sizes = [view.size()]
    for op in reversed([op for ops in stages for op in ops]):
        view = view.below(op)
        sizes.append(view.size())
    return sizes


class QuickNetwork(Network):
    """A Network, with stages of Ops."""

    @property
    def K(self):
        return self.shapes[-1][0]

    def layouts(self):
        """What each stage reads and, last, the logits: (C, H, W) or (N,)."""
        layouts = [[op for ops in self.stages for op in ops][-1].out_shape]
        for ops in reversed(self.stages):
            layouts.append(ops[0].in_shape if ops else layouts[-1])
        return layouts[::-1]

    def neurons(self, box, ask):
        if not ask.substitute:
            return Network.neurons(self, box, ask)
        return quick_neurons(self.stages, self.layouts(), box, ask)

    def margins(self, box, y, bounds, ask):
        """Samples go down in passes; no row is spent on the margin of y over itself."""
        P, K, n, budget = self.P, self.K, len(y), ask.budget
        if K == 1:               # nothing to bound; and where there are no rows PyTorch may crash
            return box.lower.new_zeros(P, n, 1)
        W, c = self.logits(box.lower)
        if ask.relax == "box":
            box, bounds = Box(*map(F.relu, bounds[-1])) if bounds else box, []
            if K <= 32:
                return self.box_of_few_classes(W, c, box, y)
        stages, layouts = self.stages[:len(bounds)], self.layouts()[-2 - len(bounds):]
        maps = [hwc_box(pair, layout) for pair, layout in zip([box, *bounds], layouts)]

        def of_samples(b):
            some, *pairs = parts_of(maps, slice(b, b + samples))
            lines = [relax_relu(*for_rows(pair), ask.slope) for pair in pairs]
            way = [for_rows(some), *interleaved([*stages, []], lines)]
            return best_slopes(*self.rows(W, c, y[b:b + samples]), way, ask.ascent, no_checkpoint)

        sizes = sizes_down(View(W.shape[2:]), stages)
        fit, keeps = budget.fit(P * K, sizes, held=3 + 3 / K)
        samples = min(n, fit)
        jobs = [(b,) for b in range(0, n, samples)]
        return self.filled_up(torch.cat(budget.run(of_samples, jobs, keeps * samples), 1), y)

    def box_of_few_classes(self, W, c, box, y):
        """The rows of all labels in one product, which serves all samples."""
        labels, which = y.unique(return_inverse=True)
        W = chw(W, self.layouts()[-2])
        A, d = (t.flatten(1, 2) for t in self.rows(W, c, labels))              # (P, L*(K-1), N)
        low = d[:, None] + box.lower @ A.mT
        low = low + (box.upper - box.lower) @ minus(A).mT                      # (P, B, L*(K-1))
        low = low.unflatten(2, (len(labels), -1))
        low = low[:, torch.arange(len(y)), which]
        return self.filled_up(finite(low), y)

    def logits(self, like):
        """The logits as functions of what the last stage reads: W (P, K, N) and c (P, K)."""
        ops = self.stages[-1]
        if ops and ops[-1].stride is None:                                     # no product with eye
            *ops, last = ops
            W, c = hwc(last.weight, last.in_shape), last.bias
        else:
            W = hwc(torch.eye(self.K), self.layouts()[-1])
            W = W.to(like).expand(self.P, -1, -1)
            c = W.new_zeros(W.shape[:2])
        for op in reversed(ops):
            W, c = op.back(W, c)
        return W, c

    def rows(self, W, c, y):
        """logit[y] - logit[k] for the other classes k: A (P, B, K-1, N) and d (P, B, K-1)."""
        def against(t):
            of_others = t.index_select(1, others.flatten()).unflatten(1, others.shape)
            return t.index_select(1, y).unsqueeze(2) - of_others

        others = self.others(y)
        return against(W), against(c)

    def others(self, y):
        """The other classes of each label, (B, K-1)."""
        return (y[:, None] + torch.arange(1, self.K).to(y)) % self.K

    def filled_up(self, low, y):
        """(P, B, K-1) of the other classes -> (P, B, K), with 0 for the label itself."""
        low_of_all = low.new_zeros(self.P, len(y), self.K)
        return low_of_all.scatter(2, self.others(y).expand(self.P, -1, -1), low)
