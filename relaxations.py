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
comes one line; engine, below it, asks faster/ for the same numbers.

Letters in shape comments, here and in the other modules:
    P  parameter vectors (the population; 1 if there is only one)      B  samples      K  classes
    N  neurons of a layer, N = C*H*W       O, C  channels out of / into a convolution
    R  rows bounded together, a.z + d      U  rows picked out one by one
    G  positions of the bounded layer's map, Ho*Wo (1 for a linear layer)
    Q  coefficients that a row holds       D  parameters
"""
import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vjp, vmap

import faster                # noqa: F401     its place is known from here on, for engine
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
AFFINE = (
    nn.Linear,
    nn.Conv1d, nn.Conv2d,
    nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.BatchNorm1d, nn.BatchNorm2d,
    nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.Upsample,
    nn.ZeroPad1d, nn.ZeroPad2d,
    nn.ConstantPad1d, nn.ConstantPad2d)
RESHAPE = (
    nn.Flatten, nn.Unflatten, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d)


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
        rows = (eye[y][:, None] - eye).expand(self.P, -1, -1, -1)      # slopes are of each member
        bound = partial(best_slopes, ascent=ask.ascent) if ask.ascent else lower_bound
        return margins(self.stages, rows, bounds, box, ask.relax, ask.slope, bound)

    def of_rows(self, rows, lines, multipliers, box, notes):
        """Bounds of rows (1, B, R, K) of the logits, on subdomains: see subdomain_bounds."""
        steps = [box, notes[0], *self.stages[0]]
        parts = zip(lines, multipliers, notes[1:], self.stages[1:])
        for line, of_relu, note, layers in parts:
            steps += [Shift(of_relu), line, note, *layers]
        return lower_bound(rows, 0, steps)

    def ordered(self, t, k):
        """What stage k reads or, for the last k, the logits, in the order that rows have them."""
        return t                                           # PyTorch's; the fast path has its own

    def restored(self, t, k):
        """And in PyTorch's order again."""
        return t


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
    ball = Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    box = Box(*(end.flatten(1)[None] for end in ball))
    first, *rest = network.stages
    while first and isinstance(first[0].module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        norm, *first = first
        box = Box(*norm.interval(*box))
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
    ("elision", Gowal et al. 2018). Two logits that rise together then cancel: if logit 0 is h + 1
    and logit 1 is h, with h in [0, 5], the margin is 1; bounding them apart gives 1 - 5 = -4.

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
    ask = options(relax, slope, skip_stable, steps, Budget(memory, x))
    machine = engine(network)
    with full_precision(x):
        if intermediate is None:
            bounds = machine.neurons(box, ask)
        else:
            flat = lambda t: t.reshape(network.P, len(x), -1)
            bounds = [Box(flat(l), flat(u)) for l, u in intermediate]
        low = machine.margins(box, y, bounds, ask)
        if ask.ascent and intermediate is None:             # tighter bounds may flip a rule's slope
            plain = ask._replace(ascent=0)
            deeppoly = machine.margins(box, y, machine.neurons(box, plain), plain)
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
    shield: a context for the bounds. Units do not matter: Adam's epsilon is tiny.
    """
    free = [t.detach().clone().requires_grad_() for t in free]
    groups = [{"params": t, "lr": rate} for t, rate in zip(free, rates)]
    tiny = torch.finfo(free[0].dtype).tiny ** 0.5
    optimizer = torch.optim.Adam(groups, eps=tiny, maximize=True, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    best = -torch.inf
    chosen = [t.detach().clone() for t in free]
    for step in range(steps + 1):
        with torch.enable_grad(), shield():
            low = bound(free)
            total = low.sum()                              # rows share nothing that is free
        low = low.detach()
        better = low > best
        best = torch.where(better, low, best)
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
    rates = [RATES[0]] * len(lines)
    chosen = lambda slopes: lower_bound(A, d, with_lower(steps, slopes))
    best, slopes = ascend(chosen, start, limits, rates, ascent, shield=shield)
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
    sizes = [math.prod(shape) for shape in network.shapes[:-1]]

    def of_each(order, t):
        """What t (B, N) has for each ReLU, in that of the machine's two orders."""
        parts = enumerate(t.split(sizes, -1), 1)
        parts = [order(part, k) for k, part in parts]
        return torch.cat([t[:, :0], *parts], -1)

    def chosen(choices):
        slopes, multipliers = map(by_relu, choices)
        each = [line._replace(lower=lower) for line, lower in zip(lines, slopes)]
        return machine.of_rows(rows, each, multipliers, box, notes)[0, :, 0]

    by_relu = lambda t: t[None, :, None].split(sizes, -1)                    # (1, B, 1, N) each
    rows = machine.ordered(sub.rows, len(network.shapes))
    rows = rows[None, :, None]                                               # (1, B, 1, K)
    box = for_rows(machine.ordered(end, 0) for end in sub.box)
    of_neurons = [of_each(machine.ordered, t) for t in sub[2:]]
    l, u, signs, slopes, multipliers = of_neurons
    whole = relax_relu(l, u, lambda l, u: slopes.clamp(0, 1))
    lines = [Lines(*parts) for parts in zip(*map(by_relu, whole))]
    notes = [Note([]) for _ in network.shapes]
    choices = whole.lower, signs * F.relu(signs * multipliers)
    with full_precision(l):
        low = chosen(choices)
        found = [note.kept[0][0, :, 0] for note in notes]                    # (B, N) of each
        if trace is not None:
            trace += [machine.restored(A, k) for k, A in enumerate(found)]
        if not steps or not sizes or (low > target).all():
            return low, sub.slopes, sub.multipliers
        unit = unit_of_beta(found[1:])
        none = torch.zeros_like(signs)
        lowest = none.masked_fill(signs < 0, -torch.inf)
        highest = none.masked_fill(signs > 0, torch.inf)
        of_slopes = whole.upper.floor(), whole.upper.ceil()
        limits = [of_slopes, (lowest, highest)]
        in_units = lambda free: chosen((free[0], free[1] * unit))
        start = choices[0], choices[1] / unit
        low, (slopes, betas) = ascend(in_units, start, limits, RATES, steps, target=target)
    found = slopes, betas * unit
    return low, *(of_each(machine.restored, t) for t in found)


def unit_of_beta(coefficients):
    """The largest coefficient (B, N) that each row has of a neuron of the same ReLU."""
    large = [A.abs().amax(1, keepdim=True).expand_as(A) for A in coefficients]
    unit = torch.cat(large, 1)
    return unit.where(unit > 0, 1)


# ===================================================================== the same numbers, faster
# The folder faster/ computes them in 0.13 to 0.71 of the time on 8x8 images, and DeepPoly on larger
# ones where the heart has no memory for it: coefficients only for what a neuron sees, rows only for
# neurons that may be unstable, as many at once as memory holds. engine alone asks for it, unless
# FAST is False or it does not know a layer.

def engine(network):
    """The network as the fast path reads it, if FAST and if it can; else as the heart does."""
    if not FAST or not isinstance(network, Network):
        return network
    from faster.network import fast_network                    # not above: it is built on this file
    return fast_network(network) or network
