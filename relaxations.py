"""Bounds of a ReLU network over an L-infinity ball, by convex relaxation.

For a network f, an image x in [0, 1] and a radius eps, the input set is the ball
    B(x) = {x' : |x' - x|_inf <= eps, 0 <= x' <= 1},
and everything here returns numbers that hold for *every* x' in B(x): lower and upper bounds of the
pre-activations, and lower bounds of the margins logit[y] - logit[k]. If all margins k != y have a
positive lower bound, no perturbation of radius eps changes the prediction: the image is certified.

Four relaxations, one engine. They differ only in two choices:

    relax          bounds before each ReLU             bound of the margins
    "box"          interval arithmetic                 interval arithmetic, last layer exact
    "crown-ibp"    interval arithmetic                 back-substitution
    "deeppoly"     back-substitution, layer by layer   back-substitution
    "alpha-crown"  as deeppoly, but every row of both chooses its own lower slopes, by ascent

    box          Gowal et al. 2018, "On the effectiveness of interval bound propagation" (IBP)
    crown-ibp    Zhang et al. 2020, "Towards stable and efficient training of verifiably robust
                 neural networks"
    deeppoly     Singh et al. 2019, "An abstract domain for certifying neural networks"; the same
                 bound as CROWN, Zhang et al. 2018, "Efficient neural network robustness
                 certification with general activation functions"
    alpha-crown  Xu et al. 2021, "Fast and complete: enabling complete verification with rapid and
                 massively parallel incomplete verifiers"; see "free choices" below, and there
                 beta-CROWN, which certify.py needs for branch and bound

Back-substitution in four lines. To bound a row a.z + d from below, where z = W h + b and
h = relu(z'): (1) replace z by W h + b, which is exact; (2) replace each h_j by a line in z'_j that
lies below relu where its coefficient is positive and above relu where it is negative; (3) repeat
down to the input; (4) minimise the remaining linear function over the ball, which is exact.

Guarantee: the bounds are sound in exact arithmetic, for every network this file accepts. In
floating point they carry the rounding error of the sums, so a margin within about 1e-4 of zero
should be decided in float64 (certify.py does). TF32 rounds to 10 bits and is switched off below.

How to read this file. Those steps are _lower_bounds, with one function for each;
margin_lower_bounds takes them for the margins, _back_substituted and _tightened for the neurons.
The method is in the sections "interval arithmetic", "relaxing one ReLU", "back-substitution" and
"the bounds". Beside it: "the network" reads and checks an nn.Sequential; "windows" keeps books on
what a neuron of a convolution sees; "free choices" are alpha- and beta-CROWN. Last comes what is
for speed and memory only.

Letters in shape comments, here and in the other modules:
    P  parameter vectors (the population; 1 if there is only one)      B  samples      K  classes
    N  neurons of a layer, N = C*H*W       O, C  channels out of / into a convolution
    G  positions of the bounded layer's map, Ho*Wo (1 for a linear layer)
    R  rows bounded at each position       F  features that such a row depends on
    U  rows picked out one by one          D  parameters
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# A bound computed with 10-bit mantissas is no bound; cuDNN would use them on convolutions.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

RELAXATIONS = ("box", "crown-ibp", "deeppoly", "alpha-crown")
# Rows are bounded in passes. The most coefficients at once in one, where more are no faster; and
# the memory that the passes of a call may hold, by default, in bytes (on a GPU: half of it).
CHUNK, MEMORY = {"cpu": 2 ** 23, "cuda": 2 ** 27, "mps": 2 ** 27}, {"cpu": 2 ** 31, "mps": 2 ** 32}
# The ascent of alpha-CROWN: its length, and Adam's first step for slopes and for multipliers.
STEPS, RATES = 20, (0.3, 0.2)


# ---------------------------------------------------------------------------------- the network

class Affine(NamedTuple):
    """One affine layer z = W h + b of a network, for each of P parameter vectors."""
    weight: torch.Tensor     # (P, O, I), or (P, O, C/groups, kh, kw) for a convolution
    bias: torch.Tensor       # (P, O)
    in_shape: tuple          # (N,) or (C, H, W), also of a linear layer that reads a map
    out_shape: tuple
    stride: tuple = None     # None marks a linear layer
    padding: tuple = None
    dilation: tuple = None
    groups: int = 1

    @property
    def is_conv(self):
        return self.stride is not None

    @property
    def is_elementwise(self):  # a 1x1 depthwise convolution, such as normalisation
        return self.is_conv and self.weight.shape[2:] == (1, 1, 1) and self.stride == (1, 1) \
            and self.padding == (0, 0) and self.groups == self.weight.shape[1] == self.in_shape[0]


def _is(layer, kind):
    """Is it a layer of that kind, and computes what the kind computes?"""
    return isinstance(layer, kind) and type(layer).forward is kind.forward \
        and not layer._forward_hooks and not layer._forward_pre_hooks


def read_network(net, in_shape, params=None):
    """The network as stages: lists of Affine layers, with one ReLU between consecutive stages; and
    the shapes at their ends, without the batch: of each ReLU's input and of the logits.

    BatchNorm2d in eval mode is itself affine, z -> s z + t: folded into the convolution before it,
    else a 1x1 depthwise convolution.
    Raises ValueError, naming the layer, for what cannot be bounded.
    """
    if not _is(net, nn.Sequential):
        raise ValueError(f"net is a {type(net).__name__}; it has to be a plain torch.nn.Sequential")
    params = params or {}
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    unknown = sorted(set(params) - {f"{i}.{name}" for i in range(len(net)) for name in names})
    sizes = {t.shape[:1] for t in params.values()}
    if unknown or len(sizes) > 1 or (0,) in sizes or () in sizes:
        raise ValueError("params has to map names such as '0.weight' to tensors with one leading P "
                         f">= 1; got the sizes {sorted(map(tuple, sizes))}, unknown {unknown}")
    P = _population(params)

    def get(i, name):  # a tensor of layer i, with its leading P
        own, t = getattr(net[i], name), params.get(f"{i}.{name}")
        if params and any(net[i] is net[j] for j in range(i)):
            raise ValueError(f"layer {i} and an earlier one are the same module; params cannot "
                             "tell them apart")
        if t is not None and (own is None or t.shape[1:] != own.shape):
            raise ValueError(f"params['{i}.{name}'] is {tuple(t.shape)}, but the layer's is "
                             f"{None if own is None else tuple(own.shape)}")
        return own if own is None else own[None].expand(P, *own.shape) if t is None else t

    stages, shapes, shape = [[]], [], tuple(in_shape)
    source = shape                                         # as shape, but not flattened
    for i, layer in enumerate(net):
        where = f"layer {i} ({type(layer).__name__})"
        if _is(layer, nn.ReLU):
            stages.append([])
            shapes.append(shape)
        elif _is(layer, nn.Flatten):
            if (layer.start_dim, layer.end_dim) != (1, -1):
                raise ValueError(f"{where}: only Flatten(start_dim=1, end_dim=-1) is supported")
            shape = (torch.Size(shape).numel(),)
        elif _is(layer, nn.Linear):
            if shape != (layer.in_features,):
                raise ValueError(f"{where} takes {layer.in_features} features, but gets the shape "
                                 f"{shape}" + "; is nn.Flatten() missing?" * (len(shape) == 3))
            bias = get(i, "bias")
            bias = get(i, "weight").new_zeros(P, layer.out_features) if bias is None else bias
            stages[-1].append(Affine(get(i, "weight"), bias, source, (layer.out_features,)))
            source = shape = stages[-1][-1].out_shape
        elif _is(layer, nn.Conv2d):
            stages[-1].append(_read_conv(layer, where, get(i, "weight"), get(i, "bias"), shape))
            source = shape = stages[-1][-1].out_shape
        elif _is(layer, nn.BatchNorm2d):
            scale, shift = _read_batchnorm(layer, where, shape, lambda name: get(i, name))
            if stages[-1] and stages[-1][-1].is_conv:
                conv = stages[-1].pop()
                stages[-1].append(conv._replace(weight=conv.weight * scale[..., None, None, None],
                                                bias=conv.bias * scale + shift))
            else:
                stages[-1].append(Affine(scale[..., None, None, None], shift, shape, shape,
                                         (1, 1), (0, 0), (1, 1), groups=shape[0]))
        else:
            raise ValueError(f"{where} is not supported; supported are Conv2d, Linear, ReLU, "
                             "Flatten and BatchNorm2d in eval mode, in a flat nn.Sequential, "
                             "without hooks and with their own forward")
    if len(shape) != 1 or not any(stages):
        raise ValueError(f"the network ends in the shape {shape}, not in logits; "
                         "is nn.Flatten() or a layer missing?")
    return stages, [*shapes, shape]


def _read_batchnorm(layer, where, shape, get):
    """s = gamma / sqrt(var + eps) and t = beta - s mean, (P, C) each."""
    if layer.training or layer.running_mean is None:
        raise ValueError(f"{where} uses batch statistics; call net.eval() (and keep "
                         "track_running_stats=True), so that it is a fixed affine map")
    if len(shape) != 3 or shape[0] != layer.num_features:
        raise ValueError(f"{where} takes {layer.num_features} channels, but gets the shape {shape}")
    scale = (get("running_var") + layer.eps).rsqrt()
    scale = scale * get("weight") if layer.affine else scale
    shift = -get("running_mean") * scale
    return scale, shift + get("bias") if layer.affine else shift


def _read_conv(layer, where, weight, bias, shape):
    if len(shape) != 3 or shape[0] != layer.in_channels:
        raise ValueError(f"{where} takes {layer.in_channels} channels, but gets the shape {shape}")
    span = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
    padding = layer.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same" and not any(s % 2 for s in span):
        padding = tuple(s // 2 for s in span)
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"{where}: only symmetric zero padding is supported, not "
                         f"padding={layer.padding!r}, padding_mode={layer.padding_mode!r}")
    size = tuple((n + 2 * p - s - 1) // t + 1
                 for n, p, s, t in zip(shape[1:], padding, span, layer.stride))
    if min(size) < 1:
        raise ValueError(f"{where}: its kernel is larger than its input {shape}")
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return Affine(weight, bias, shape, (layer.out_channels, *size),
                  layer.stride, padding, layer.dilation, layer.groups)


# ----------------------------------------------------------------------------- interval arithmetic

def _forward(op, x, weight, bias=None):
    """W x + b for a batch: x (P or 1, B, N_in) -> (P, B, N_out)."""
    P, B = len(weight), x.shape[1]
    if not op.is_conv:
        y = (weight @ x.mT).mT               # not x @ weight.mT, whose gradient would be transposed
        return y if bias is None else y + bias[:, None]
    # The population becomes channels: one grouped convolution, or, while all members still see
    # the same input, one convolution with P times the output channels.
    shared = len(x) == 1 and op.groups == 1
    x = (x if shared else x.expand(P, -1, -1)).transpose(0, 1).reshape(B, -1, *op.in_shape[1:])
    y = F.conv2d(x, weight.flatten(0, 1), None if bias is None else bias.flatten(),
                 op.stride, op.padding, op.dilation, 1 if shared else P * op.groups)
    return y.reshape(B, P, -1).transpose(0, 1)


def interval(ops, lower, upper):
    """Interval arithmetic: centre c -> W c + b, radius r -> |W| r (Gowal et al. 2018).

    Exact for one affine layer over a box; for several in a row, only sound. (P or 1, B, N) each.
    """
    for op in ops:
        centre = torch.lerp(lower, upper, 0.5)
        radius = _forward(op, upper - centre, op.weight.abs())
        centre = _forward(op, centre, op.weight, op.bias)
        lower, upper = centre - radius, centre + radius
    return lower, upper


# ----------------------------------------------------------------------------- relaxing one ReLU
# Where l < 0 < u, relu is enclosed between two lines, of which only the lower one is a choice:
#
#            u |      ,/            upper: the chord   relu(z) <= u/(u-l) (z - l)
#              |   ,-'/             lower: any slope   relu(z) >= s z  with  0 <= s <= 1
#              |,-'  /
#           ,-'|    /    slope 1    A neuron with l >= 0 (slopes 1, 1) or u <= 0 (slopes 0, 0) is
#        ,-'   |   /                exactly linear: "stable". Nothing is lost there.
#     --l------+--/-------u-- slope 0

def adaptive(l, u):
    """Slope 1 if u >= -l else 0: the smaller area between the lines (DeepPoly; CROWN-adaptive)."""
    return (u >= -l).to(l.dtype)


def zero(l, u):
    """Always 0: keeps relu >= 0, forgets z. The safest choice where most neurons are inactive."""
    return torch.zeros_like(l)


def one(l, u):
    """Always 1."""
    return torch.ones_like(l)


def parallel(l, u):
    """The slope of the upper line, u / (u - l) (Fast-Lin; the zonotope of DeepZ)."""
    above, below = F.relu(u), F.relu(-l)
    return above / (above + below + torch.finfo(l.dtype).tiny)


class Relu(NamedTuple):
    """Two lines around relu over [l, u]: lower z <= relu(z) <= upper z + intercept. (P, B, N)."""
    lower: torch.Tensor
    upper: torch.Tensor
    intercept: torch.Tensor


def relax_relu(l, u, slope=adaptive):
    """The two lines for every neuron with pre-activation in [l, u]; slope(l, u) in [0, 1].

    Where l < 0 < u does not hold, slope(l, u) has to be finite, and does not matter.
    """
    below, above = F.relu(-l), F.relu(u)
    width = above + below + torch.finfo(l.dtype).tiny                # tiny: not 0/0 at l = u = 0
    # 1 if l >= 0, 0 if u <= 0. Adding 0 * width is nothing, unless it overflowed: then NaN reaches
    # the margins, and no sample is certified.
    upper = above / width + 0 * width
    stable = upper.detach()
    lower = torch.lerp(stable.floor(), stable.ceil(), slope(l, u))       # where stable, as upper
    # Through (u, u), not (l, 0): still above relu where tiny counts and the slope is too small.
    return Relu(lower, upper, above - upper * above)


# ------------------------------------------------------------------------- windows of coefficients
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
# What falls outside the map is zero padding: slopes and inputs read there are 0, so the
# coefficients there vanish by themselves. When the window outgrows the map, and above linear
# layers, a row holds one coefficient per neuron: the window is None, all rows are at one position.
# The coefficients of a window or a map come in the order (height, width, channel): transposed
# convolutions are fastest in it. Bounds keep PyTorch's order; _take and _channels_last translate.

class Window(NamedTuple):
    kernel: tuple
    stride: tuple
    padding: tuple


def _below(window, op):
    """The window that a row has after back-substitution through op (None: the whole map)."""
    if window is None or not op.is_conv:
        return None
    k, s, p = (tuple(op.weight.shape[3:]), op.stride, op.padding)
    kernel = tuple((K - 1) * s + d * (k - 1) + 1
                   for K, s, d, k in zip(window.kernel, s, op.dilation, k))
    if kernel[0] * kernel[1] >= 2 * op.in_shape[1] * op.in_shape[2]:
        return None
    return Window(kernel, tuple(S * t for S, t in zip(window.stride, s)),
                  tuple(Q * t + q for Q, t, q in zip(window.padding, s, p)))


@lru_cache(maxsize=64)
def _seen(window, positions, shape, device):
    """Which neurons of a map each position sees: indices (G, F) into (C, H, W), N for nothing.

    F is kh * kw * C, in this order, filled up with nothing.
    """
    C, H, W = shape
    with torch.inference_mode(False):      # the result is kept, and has to serve in training too
        ys, xs = (torch.arange(n, device=device)[:, None] * s - p + torch.arange(k, device=device)
                  for n, s, p, k in zip(positions, window.stride, window.padding, window.kernel))
        ys, xs = ys[:, None, :, None, None], xs[None, :, None, :, None]    # (Ho, 1, kh, 1, 1), ...
        inside = (ys >= 0) & (ys < H) & (xs >= 0) & (xs < W)
        index = torch.arange(C, device=device) * (H * W) + ys * W + xs
        index = index.masked_fill(~inside, C * H * W).flatten(2).flatten(0, 1)
        return _padded(index, C * H * W)


class Rows(NamedTuple):
    """Where the rows being bounded sit. Without picks: every position of every sample, (B, G)."""
    positions: tuple               # (Ho, Wo) of the bounded layer
    sample: torch.Tensor = None    # (P, U) picked rows: member * B + sample
    position: torch.Tensor = None  # (P, U) and their position, 0 <= position < G

    @property
    def picked(self):
        return self.sample is not None


def _channels_last(t, shape, back=False):
    """The last dimension of t, if it is a map (C, H, W), in the order (H, W, C); or back."""
    if len(shape) < 3:
        return t
    C, H, W = shape
    return t.unflatten(-1, (H * W, C) if back else (C, H * W)).mT.flatten(-2)


def _take(t, window, shape, rows):
    """What each row sees of a map t (P or 1, B, N): (P, B, G, 1, F); if picked, (P, U, 1, 1, F)."""
    G = 1
    if window is None:
        t = _channels_last(t, shape)[:, :, None]                               # (P, B, 1, N)
    else:
        index = _seen(window, rows.positions, shape, t.device)
        G = len(index)
        t = F.pad(t, (0, 1)).index_select(-1, index.flatten()).view(*t.shape[:2], *index.shape)
    if rows.picked:
        P, U = rows.sample.shape
        cell = rows.sample * G + (rows.position if window is not None else 0)
        t = t.expand(P, *t.shape[1:]).flatten(0, 2)                            # (P*B*G, F)
        t = t.index_select(0, cell.flatten()).view(P, U, 1, -1)
    return t[..., None, :]


def _whole_map(A, window, shape, rows):
    """Rows over windows -> the same rows over the map: (P, B, G, R, F) -> (P, B, 1, G*R, N)."""
    index = _seen(window, rows.positions, shape, A.device)                     # (G, F)
    index = index[rows.position][:, :, None, None] if rows.picked else index[None, None, :, None]
    A = A.expand(torch.broadcast_shapes(A.shape, index.shape))
    zeros = A.new_zeros(*A.shape[:-1], torch.Size(shape).numel() + 1)        # last: padding
    A = zeros.scatter(-1, index.expand(A.shape), A)[..., :-1].flatten(2, 3).unsqueeze(2)
    return _channels_last(A, shape)


def _matrix(op, window):
    """A convolution on a window as a matrix (P, F above, F below)."""
    n = op.weight.shape[1] * window.kernel[0] * window.kernel[1]
    M = _conv_transpose(torch.eye(n, dtype=op.weight.dtype, device=op.weight.device)[None], op,
                        window)
    return F.pad(_padded(M), (0, 0, 0, -n % 16))


def _bias(op, window):
    """The bias of each neuron that a row sees, (P, F)."""
    kernel = op.out_shape[1:] if window is None else window.kernel
    bias = op.bias.repeat(1, torch.Size(kernel).numel())
    return bias if window is None else _padded(bias)


# ------------------------------------------------------------------------------ back-substitution
# Coefficients A (P, B, G, R, F) and constants d (P, B, G, R); any of P, B, G may be 1 as long as
# the rows do not differ there. Three operations: through an affine layer, through a ReLU, and
# the minimum over a box.

def _through_affine(A, d, window, op, rows):
    """a.z + d with z = W h + b  ->  (a W).h + (d + a.b), exactly."""
    below = _below(window, op)
    if window is not None and below is None:
        A = _whole_map(A, window, op.out_shape, rows)                          # (P, B, 1, G*R, N)
        d = d.expand(-1, -1, A.shape[3] // d.shape[3], -1).flatten(2).unsqueeze(2)
    lead, flat = A.shape[1:-1], A.flatten(1, 3)                                # (P, rows, F)
    window = window if below else None
    d = d + _dot(A, _bias(op, window)[:, None, None, None])
    if not op.is_conv:
        M = _channels_last(op.weight, op.in_shape)
    elif not _is_dense(op, below.kernel if below else op.in_shape[1:]):
        A = _conv_transpose(flat, op, window)
        return (_padded(A) if below else A).unflatten(1, lead), d, below
    elif below:
        M = _matrix(op, window)
    else:
        M = _conv_transpose(torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)[None], op, None)
    return (flat @ M).unflatten(1, lead), d, below


def _conv_transpose(A, op, window):
    """The transpose of a convolution: rows (P, M, F) over a window of its output, or over all of
    it (None) -> (P, M, F') over the window below, or over all of its input."""
    P, kernel = len(op.weight), window.kernel if window else op.out_shape[1:]
    size, padding = op.in_shape[1:], op.padding
    if window:
        size, padding = _below(window, op).kernel, (0, 0)
        A = A[..., :op.weight.shape[1] * kernel[0] * kernel[1]]
    A = A.expand(P, -1, -1).unflatten(2, (*kernel, -1))                        # (P, M, Ho, Wo, O)
    A = A.permute(1, 0, 4, 2, 3) if P == 1 else A.permute(1, 2, 3, 0, 4).movedim((3, 4), (1, 2))
    A = _ConvTranspose.apply(A.flatten(1, 2), op.weight.flatten(0, 1), size, op.stride, padding,
                             op.dilation, P * op.groups)                       # (M, P*C, H, W)
    return A.unflatten(1, (P, -1)).permute(1, 0, 3, 4, 2).flatten(2)


def _through_relu(A, d, lower, upper, intercept, multiplier=None):
    """Each relu(z) by its lower line where its coefficient is positive, its upper line where not.

    A+ (lower z) + A- (upper z + intercept), where A = A+ + A-. Slopes (P, B, G, 1 or R, F).
    multiplier: Lagrange multipliers of the sign of z, (P, B, G, R, F); see "free choices".
    """
    A, constant = _Lines.apply(A, lower, upper, intercept)
    return A if multiplier is None else A - multiplier, d + constant


def _minimum(A, d, lower, upper):
    """min of A x + d over the box lower <= x <= upper: A+ lower + A- upper + d, exact."""
    if A.shape[1:3] == (1, 1):
        return d + _dot(A, lower) + _dot(_negative(A), upper - lower)
    return d + _Minimum.apply(A, lower, upper)


def _seen_below(rows, window, shape, stages, bottom, relus, box):
    """What the rows see on their way down through the stages, bottom first: of the box the stages
    start from, lower and upper bounds, and of each ReLU between them the two lines, as _take
    gives them: (P, B, G, 1, F), or (P, U, 1, 1, F) for picked rows."""
    seen = []
    for s in range(len(stages) - 1, bottom - 1, -1):
        for op in reversed(stages[s]):
            window, shape = _below(window, op), op.in_shape
        maps = relus[s - 1] if s > bottom else box
        seen.append([_take(t, window, shape, rows) for t in maps])
    return seen[::-1]


def _lower_bounds(A, d, window, shape, rows, stages, bottom, seen, free=None, trace=None):
    """Sound lower bounds, (P, B, G, R), of A h + d, where h are the outputs of stages[-1].

    Substitutes backwards through the stages and the ReLUs between them, down to and with
    stages[bottom]. shape is that of h, rows and window say what A sees, seen is _seen_below.
    free: {s: Free} for the ReLU after stages[s], to use instead of the rule's lower slope; where it
    lacks one, the rule's is used and put in. trace: a list that collects the coefficients of each
    ReLU's outputs, top down, and last of the inputs.
    """
    top = len(stages) - 1
    for s in range(top, bottom - 1, -1):
        for n, op in enumerate(reversed(stages[s])):
            if window is not None and window.padding != (0, 0) and (n > 0 or s == top):
                # No ReLU has been between this layer and the last, so A is not yet 0 on padding.
                inside = A.new_ones(1, 1, torch.Size(shape).numel())
                of_one = rows._replace(sample=0 * rows.sample) if rows.picked else rows
                A = A * _take(inside, window, shape, of_one)
            A, d, window = _through_affine(A, d, window, op, rows)
            shape = op.in_shape
        if trace is not None:
            trace.append(A)
        if s > bottom:
            lower, upper, intercept = seen[s - bottom]
            multiplier = None
            if free is not None:
                if s - 1 not in free:
                    each = lower.expand(torch.broadcast_shapes(A.shape, lower.shape))
                    free[s - 1] = Free(each, limits=(upper.floor(), upper.ceil()))
                lower, multiplier = free[s - 1][:2]
            A, d = _through_relu(A, d, lower, upper, intercept, multiplier)
    return _minimum(A, d, *seen[0])


def _map_shapes(stages):
    """The shapes of what each stage reads and, last, of what the network gives: maps as maps."""
    shapes = [next(op.out_shape for stage in reversed(stages) for op in reversed(stage))]
    for stage in reversed(stages):
        shapes.append(stage[0].in_shape if stage else shapes[-1])
    return shapes[::-1]


def _first_rows(op):
    """The rows e_j W of a layer, which depend on the weights alone, by their first step down.

    Returns W (P, Gx, O, F), constants (P, Gx, O), and what W sees: a window, with Gx = 1 row per
    channel that serves every position; or, if that outgrows the map, all of it, with Gx = G.
    """
    O, P = op.out_shape[0], len(op.weight)
    rows = Rows(op.out_shape[1:] if op.is_conv else (1, 1))
    eye = torch.eye(O, dtype=op.weight.dtype, device=op.weight.device)[None, None, None]
    eye = _padded(eye) if op.is_conv else eye
    W, c, window = _through_affine(eye, eye.new_zeros(1, 1, 1, O),
                                   Window((1, 1), (1, 1), (0, 0)) if op.is_conv else None, op, rows)
    return W.view(P, -1, O, W.shape[-1]), c.view(P, -1, O), window, rows


def _back_substituted(s, stages, relus, box, budget):
    """Textbook bounds (l, u) of every pre-activation of stage s, (P, B, N) each.

    An upper bound of z_j is minus a lower bound of -z_j, so each neuron gives two rows.
    """
    op, below = stages[s][-1], [*stages[:s], stages[s][:-1]]
    W, c, window, rows = _first_rows(op)
    P, B, O, G = len(W), box[0].shape[1], W.shape[2], rows.positions[0] * rows.positions[1]
    shape, last = op.in_shape, stages[s - 1][-1] if s and stages[s - 1] and not below[-1] else None
    smaller = _below(window, last) if last else None
    if smaller and _is_dense(last, smaller.kernel):
        start = _first_relu(W[:, 0], c[:, 0], window, rows, relus[s - 1], last)
        window, shape, below = smaller, last.in_shape, [*stages[:s - 1], stages[s - 1][:-1]]
    else:
        def start(_, o):
            A, d = W[:, :, o], c[:, :, o]
            return (torch.cat([A, -A], 2).view(P, 1, 1, -1, A.shape[-1]),
                    torch.cat([d, -d], 2).view(P, 1, 1, -1))
    fit, keeps = budget.fit(2 * P * G, _sizes(window, shape, sum(below, [])), held=2)
    samples, channels = min(B, fit), min(O, max(1, fit // B))
    starts = range(0, O, channels)

    def see(i):
        maps = [[t[:, i] for t in some] for some in (*relus[:len(below) - 1], box)]
        return _seen_below(rows, window, shape, below, 0, maps[:-1], maps[-1])

    def jobs():
        for b in range(0, B, samples):
            i = slice(b, b + samples)     # 3/4: three numbers, where two rows keep two each
            seen = see(i) if budget.spend(3 * keeps * samples // 4) else None
            yield from ((i, slice(o, o + channels), seen) for o in starts)

    def bound(i, o, seen):
        A, d = start(i, o)
        low = _lower_bounds(A, d, window, shape, rows, below, 0, see(i) if seen is None else seen)
        return low.view(P, low.shape[1], G, 2, -1).transpose(2, 4)             # (P, b, o, 2, G)

    low = budget.run(bound, jobs(), keeps * samples * channels)
    n = len(starts)
    low = torch.cat([torch.cat(low[i:i + n], 2) for i in range(0, len(low), n)], 1)
    return low[:, :, :, 0].flatten(2), -low[:, :, :, 1].flatten(2)


def _tightened(l, u, s, stages, relus, box, budget, steps=0):
    """(l, u), tightened by back-substitution of the neurons that it leaves unstable, only those.

    With steps, each row raises its own bound over its own lower slopes (alpha-CROWN).
    """
    op, below = stages[s][-1], [*stages[:s], stages[s][:-1]]
    unstable = (l < 0) & (u > 0)
    member, sample, neuron = where = unstable.nonzero(as_tuple=True)
    if not len(member):
        return l, u
    if len(member) > l.numel() / 2 and not steps:    # picking most rows costs more than all at once
        low, high = _back_substituted(s, stages, relus, box, budget)
        return (torch.where(unstable, torch.maximum(l, low), l),
                torch.where(unstable, torch.minimum(u, high), u))
    W, c, window, rows = _first_rows(op)
    P, B, O, G = len(W), box[0].shape[1], W.shape[2], rows.positions[0] * rows.positions[1]
    # The t-th pick of each member, as one table (P, U); short lists are filled up with neuron 0.
    counts = member.bincount(minlength=P)
    slot = torch.arange(len(member), device=l.device) - (counts.cumsum(0) - counts)[member]
    picks = member.new_zeros(P, int(counts.max()))
    picks[member, slot] = sample * G * O + neuron
    fit, keeps = budget.fit(2 * P, _sizes(window, op.in_shape, sum(below, [])), held=4)
    U = min(picks.shape[1], fit)

    def bound(t):
        p = torch.arange(P, device=l.device)[:, None]
        b, j = picks[:, t:t + U] // (G * O), picks[:, t:t + U] % (G * O)
        entry = (p, j % G if W.shape[1] > 1 else 0, j // G)
        A, d = torch.stack((W[entry], -W[entry]), 2), torch.stack((c[entry], -c[entry]), 2)
        which = Rows(rows.positions, p * B + b, j % G)
        seen = _seen_below(which, window, op.in_shape, below, 0, relus, box)
        low = lambda free: _lower_bounds(A[:, :, None], d[:, :, None], window, op.in_shape, which,
                                         below, 0, seen, free)
        return _with_best_slopes(low, steps).view(P, -1, 2)

    low = budget.run(bound, [(t,) for t in range(0, picks.shape[1], U)], keeps * U)
    low = torch.cat(low, 1)[member, slot]
    return (l.index_put(where, torch.maximum(l[where], low[:, 0])),
            u.index_put(where, torch.minimum(u[where], -low[:, 1])))


# ------------------------------------------------------------------------------------- the bounds

def prepare(net, x, eps, relax, params):
    """Check the input; returns the stages, the shapes at their ends, and the input set as a
    box (P or 1, B, N). Elementwise layers that come first (normalisation) map boxes to boxes
    exactly, so they are applied to the box and taken off the stages."""
    if relax not in RELAXATIONS:
        raise ValueError(f"relax={relax!r} is not one of {', '.join(RELAXATIONS)}")
    if relax == "alpha-crown" and torch.is_inference_mode_enabled():
        raise ValueError("alpha-crown climbs along gradients, which torch.inference_mode() has "
                         "none of; torch.no_grad() will do")
    stages, shapes = read_network(net, x.shape[1:], params)
    dtypes = {x.dtype} | {t.dtype for stage in stages for op in stage for t in (op.weight, op.bias)}
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x and the parameters have to be all float32 or all float64, got "
                         f"{sorted(map(str, dtypes))}")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("bounds need full precision; leave torch.autocast before computing them")
    low, high = x.aminmax() if len(x) else (-1, -1)
    if not (low >= 0 and high <= 1):
        raise ValueError("x is empty, or has values outside [0, 1] or NaN: pass pixels; "
                         "normalisation is a layer of the network")
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if eps.dim() > x.dim() or any(n not in (1, m) for n, m in zip(eps.shape[::-1], x.shape[::-1])) \
            or not ((eps >= 0) & eps.isfinite()).all():
        raise ValueError(f"eps={eps.tolist()} has to be a radius in pixels, 0 <= eps < infinity: a "
                         "number, or a tensor that broadcasts with x")
    box = [(x - eps).clamp(min=0), (x + eps).clamp(max=1)]
    box = [t.flatten(1)[None] for t in box]                                    # (1, B, N)
    while stages[0] and stages[0][0].is_elementwise:
        first, *rest = stages[0]
        box, stages = list(interval([first], *box)), [rest, *stages[1:]]
    return stages, shapes, box


def _intermediate(stages, box, relax, slope, skip_stable, budget, steps=0):
    """Bounds [(l, u), ...] before each ReLU, (P, B, N) each."""
    bounds, relus, inputs = [], [], box
    for s, ops in enumerate(stages[:-1]):
        # Interval bounds of a single first layer are exact: nothing is gained by substitution.
        substitute = relax in ("deeppoly", "alpha-crown") and ops and (s > 0 or len(ops) > 1)
        if not substitute or skip_stable:
            l, u = interval(ops, *inputs)
        if substitute and skip_stable:
            l, u = _tightened(l, u, s, stages, relus, box, budget)
        elif substitute:
            l, u = _back_substituted(s, stages, relus, box, budget)
        if substitute and relax == "alpha-crown":
            l, u = _tightened(l, u, s, stages, relus, box, budget, steps)
        bounds.append((l, u))
        relus += [relax_relu(l, u, slope)] if relax in ("deeppoly", "alpha-crown") else []
        inputs = F.relu(l), F.relu(u)
    return bounds


def preactivation_bounds(net, x, eps, relax="deeppoly", params=None, *, slope=adaptive,
                         skip_stable=False, memory=None, steps=STEPS):
    """Sound bounds of every pre-activation over the ball of radius eps around x, clipped to [0, 1].

    Returns [(l, u), ...], one pair per ReLU in the order of the network, each shaped like the
    ReLU's input: (B, ...), or (P, B, ...) with params. Guarantee: l <= z(x') <= u for every x' in
    the ball. Arguments and errors are those of margin_lower_bounds.
    """
    stages, shapes, box = prepare(net, x, eps, relax, params)
    bounds = _intermediate(stages, box, relax, slope, skip_stable, Budget(memory, x), steps)
    return [tuple(t.expand(_population(params), -1, -1).reshape(shape) for t in pair)
            for pair, shape in zip(bounds, _outer_shapes(shapes, x, params))]


def margin_lower_bounds(net, x, y, eps, relax="deeppoly", params=None, skip_stable=False, *,
                        slope=adaptive, intermediate=None, memory=None, steps=STEPS):
    """Sound lower bounds of the margins over the ball of radius eps around x, clipped to [0, 1].

    Returns (B, K), or (P, B, K) with params: entry k is a lower bound of logit[y] - logit[k] for
    every x' in the ball; entry y is 0. If all others are positive, x is certified at radius eps.
    Differentiable with respect to the parameters (and x).

    The rows logit[y] - logit[k] are multiplied into what follows the last ReLU before it is bounded
    ("elision", Gowal et al. 2018). Two logits that rise together then cancel: if logit 0 is
    h + 1 and logit 1 is h, with h in [0, 5], the margin is exactly 1, while bounding the
    logits apart gives 1 - 5 = -4.

    net: nn.Sequential of Conv2d, Linear, ReLU, Flatten, eval-mode BatchNorm2d, ending in (B, K).
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
    slope: the lower line of an unstable ReLU, (l, u) -> slope in [0, 1]; see adaptive.
    intermediate: bounds before each ReLU to use instead, as preactivation_bounds returns them.
    memory: a budget in bytes for the passes (None: MEMORY): how many rows go down at once, and how
        many passes are kept for backward. The least pass goes down whatever it takes, and
        alpha-CROWN may take twice the budget.

    Raises ValueError for an unsupported layer (named), and for arguments that make no sense.
    """
    stages, shapes, box = prepare(net, x, eps, relax, params)
    y = torch.as_tensor(y, device=x.device)
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y has to hold {len(x)} integer labels, got {y.dtype} {tuple(y.shape)}")
    K, = shapes[-1]
    if not ((y >= 0) & (y < K)).all():
        raise ValueError(f"y has labels outside 0..{K - 1}, of a network with {K} logits")
    y, budget = y.long(), Budget(memory, x)
    if intermediate is None:
        bounds = _intermediate(stages, box, relax, slope, skip_stable, budget, steps)
    else:
        want = _outer_shapes(shapes, x, params)
        if [[t.shape for t in pair] for pair in intermediate] != [[s, s] for s in want]:
            raise ValueError(f"intermediate has to hold a pair (l, u) of each of the shapes {want}")
        P = _population(params)
        bounds = [[t.reshape(P, len(x), -1) for t in pair] for pair in intermediate]
    # "box" stops at the last ReLU, whose outputs lie in a box; the others go down to the input.
    bottom = len(stages) - 1 if relax == "box" else 0
    inputs = [F.relu(t) for t in bounds[-1]] if bottom else box
    relus = [] if bottom else [relax_relu(l, u, slope) for l, u in bounds]
    eye = torch.eye(K, dtype=x.dtype, device=x.device)
    def bound(b):
        some = [[t[:, b:b + samples] for t in maps] for maps in (*relus, inputs)]
        labels = y[b:b + samples]
        if bottom:           # rows that depend on the label alone: one product for all samples
            labels, of = labels.unique(return_inverse=True)
        A = _channels_last(eye[labels][:, None] - eye, top)[None, :, None]   # (1, B or U, 1, K, K)
        A = A.flatten(1, 3)[:, None, None] if bottom else A
        seen = _seen_below(rows, None, top, stages, bottom, some[:-1], some[-1])
        low = lambda free: _lower_bounds(A, A.new_zeros(A.shape[:-1]), None, top, rows, stages,
                                         bottom, seen, free)
        low = _with_best_slopes(low, steps if relax == "alpha-crown" else 0)[:, :, 0]
        return low.unflatten(-1, (-1, K))[:, torch.arange(len(of)), of] if bottom else low

    rows, top = Rows((1, 1)), _map_shapes(stages)[-1]
    sizes = _sizes(None, top, sum(stages[bottom:], []))
    fit, keeps = budget.fit(_population(params) * K, sizes, held=2 + 3 / K)
    samples = min(len(x), fit)
    jobs = [(b,) for b in range(0, len(x), samples)]
    low = torch.cat(budget.run(bound, jobs, keeps * samples), 1)
    if relax == "alpha-crown" and intermediate is None:     # tighter bounds may flip a rule's slope
        deeppoly = margin_lower_bounds(net, x, y, eps, "deeppoly", params, skip_stable, slope=slope,
                                       memory=memory)
        low = torch.maximum(low, deeppoly[None] if params is None else deeppoly)
    return low[0] if params is None else low


def _outer_shapes(shapes, x, params):
    """Shapes of the bounds before each ReLU as the user sees them: (B, ...), or (P, B, ...)."""
    lead = (len(x),) if params is None else (_population(params), len(x))
    return [torch.Size((*lead, *shape)) for shape in shapes[:-1]]


def _population(params):
    return len(next(iter(params.values()))) if params else 1


# ------------------------------------------------------------------------------------ free choices
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

class Free(NamedTuple):
    """What rows may choose at one ReLU, (P, B, G, R, F) each."""
    slope: torch.Tensor                # of the lower line, between those of limits
    multiplier: torch.Tensor = None    # s beta; None: 0
    limits: tuple = None               # of the slope: 0 and 1 where unstable, else both the slope


def pinned_forward(stages, active, x):
    """Pre-activations (B, N) before all ReLUs and logits (B, K) of inputs x (B, N_in), with each
    relu(z) replaced by active * z, active (B, N): affine in x; the network itself where the active
    neurons have z >= 0 and the others z <= 0."""
    before, h, n = [x.new_zeros(len(x), 0)], x[None], 0
    for s, ops in enumerate(stages):
        for op in ops:
            h = _forward(op, h, op.weight, op.bias)
        if s < len(stages) - 1:
            before.append(h[0])
            h = h * active[:, n:n + h.shape[-1]]
            n += h.shape[-1]
    return torch.cat(before, 1), h[0]


def _ascend(bound, free, limits, rates, steps, target=torch.inf):
    """Raise the bound of every row by projected Adam on what is free: (best bounds, choices).

    bound(free) -> (...); each tensor of free is (..., F), F numbers for each row. limits has its
    (lowest, highest), rates its first step size. The given choices are tried first, and each row
    keeps its best ones, so no row gets looser. Stops early when all bounds exceed target.
    """
    free = [t.detach().clone().requires_grad_() for t in free]
    optimizer = torch.optim.Adam([{"params": t, "lr": r} for t, r in zip(free, rates)],
                                 maximize=True, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    best, chosen = -torch.inf, [t.detach().clone() for t in free]
    same = lambda t: t
    for step in range(steps + 1):
        # The hooks: inside a checkpoint, its own would compute the pass again for each backward.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(same, same):
            low = bound(free)
            total = low.sum()                              # rows share nothing that is free
        better = low.detach() > best
        best = torch.where(better, low.detach(), best)
        for t, c in zip(free, chosen):
            c.copy_(torch.where(better[..., None], t.detach(), c))
        if step == steps or (best > target).all():
            return best, chosen
        optimizer.zero_grad()
        total.backward(inputs=free)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for t, (lowest, highest) in zip(free, limits):
                t.clamp_(lowest, highest)


def _with_best_slopes(bound, steps):
    """The best of bound(free) over the lower slopes of each row, from the rule's (alpha-CROWN).

    Its gradient is that of bound at the slopes found, held fixed.
    """
    if not steps:
        return bound(None)
    rule = {}
    low = bound(rule)                                      # fills in the rule's slopes
    if rule:
        slopes, _, limits = zip(*rule.values())
        chosen = lambda slopes: bound({s: Free(t) for s, t in zip(rule, slopes)})
        best, slopes = _ascend(chosen, slopes, limits, [RATES[0]] * len(rule), steps)
        low = chosen(slopes) if torch.is_grad_enabled() else best
    return low


class Subdomains(NamedTuple):
    """B parts of balls, on each of which one linear function of the logits is to be bounded.

    N counts the neurons before all ReLUs, in the order of the network.
    """
    sizes: list                 # of the ReLUs, as they make up N
    rows: torch.Tensor          # (B, K) the functions
    box: list                   # lower and upper bounds of the input, (1, B, N_in) each
    l: torch.Tensor             # (B, N) bounds before the ReLUs
    u: torch.Tensor
    signs: torch.Tensor         # (B, N) 1 or -1 where the part has s z >= 0, else 0
    slopes: torch.Tensor        # (B, N) lower slopes, used where l < 0 < u
    multipliers: torch.Tensor   # (B, N) s beta


def subdomain_bounds(stages, sub, steps=0, target=torch.inf, trace=None):
    """Sound lower bounds (B,) of the functions on their subdomains; and the slopes and multipliers
    (B, N) that give them, the given ones or better by so many steps of ascent.

    trace: with steps=0, a list to be filled with the coefficients (B, ...) of each ReLU's outputs,
    bottom up, after those of the input.
    """
    shapes = _map_shapes(stages)

    def by_relu(t, *lead):
        return [part.reshape(*lead, part.shape[-1]) for part in t.split(sub.sizes, -1)]

    def bound(choices):
        parts = ([_channels_last(part, shape)
                  for part, shape in zip(by_relu(t, 1, -1, 1, 1), shapes[1:])] for t in choices)
        return _lower_bounds(A, A.new_zeros(A.shape[:-1]), None, shapes[-1], rows, stages, 0, seen,
                             {s: Free(*p) for s, p in enumerate(zip(*parts))}, found)[0, :, 0, 0]

    rows = Rows((1, 1))
    relus = [relax_relu(l, u) for l, u in zip(by_relu(sub.l, 1, -1), by_relu(sub.u, 1, -1))]
    seen = _seen_below(rows, None, shapes[-1], stages, 0, relus, sub.box)
    A = _channels_last(sub.rows, shapes[-1])[None, :, None, None]
    found = None if trace is None else []
    upper, zero = torch.cat([sub.l[:, :0], *(relu.upper[0] for relu in relus)], -1), 0 * sub.signs
    limits = [(upper.floor(), upper.ceil()), (zero.masked_fill(sub.signs < 0, -torch.inf),
                                              zero.masked_fill(sub.signs > 0, torch.inf))]
    choices = [t.clamp(*limit) for t, limit in zip((sub.slopes, sub.multipliers), limits)]
    if steps and sub.sizes:
        low, choices = _ascend(bound, choices, limits, RATES, steps, target)
    else:
        low = bound(choices)
    if trace is not None:
        trace += [_channels_last(A[0, :, 0, 0], shape, back=True)
                  for A, shape in zip(reversed(found), shapes)]
    return low, *choices


# ----------------------------------------------------------------------- for speed and memory only
# What follows computes nothing new. Each piece has a short form that gives the same numbers up to
# rounding, but is slower, or keeps more for the backward pass:
#
#     _ConvTranspose      F.conv_transpose2d, slow on a CPU where channels are few
#     _Lines, _Minimum    F.relu(A) * lower + _negative(A) * upper, and sums over it
#     _dot, _Sides        (A * v).sum(-1) and torch.cat
#     _first_relu         _through_relu and _through_affine, of the rows and of minus the rows
#
# _is_dense chooses between two forms of a layer, Budget how many rows go down at once.

def _padded(t, value=0):
    """Fill up the last dimension to a multiple of 16: matrix products are fast with it."""
    return F.pad(t, (0, -t.shape[-1] % 16), value=value)


def _is_dense(op, size):
    """Is a product with one dense matrix, mostly zeros, faster than the transposed convolution?
    Measured on a CPU: the fewer the channels below, the slower is the convolution."""
    C, kh, kw = op.weight.shape[2:]
    return size[0] * size[1] * C <= min(64, 10 * C) * kh * kw


class _ConvTranspose(torch.autograd.Function):
    """conv_transpose2d to a map of the given size; on a CPU faster, where channels are few."""

    @staticmethod
    def forward(ctx, A, weight, size, stride, padding, dilation, groups):
        ctx.save_for_backward(A, weight)
        ctx.options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        kernel = tuple(weight.shape[2:])
        square = kernel[0] == kernel[1] and stride[0] == stride[1] and padding[0] == padding[1]
        even = not any(n % 2 for n in size)                # so that blocks of 2 x 2 fill it
        if weight.shape[1] < 4 and square and (stride[0] > 1 or even) and dilation == (1, 1) \
                and padding[0] < kernel[0]:
            return _in_blocks(A, weight, size, kernel[0], stride[0], padding[0],
                              max(stride[0], 2), groups)
        rest = [(n + 2 * p - d * (k - 1) - 1) % s
                for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)]
        return F.conv_transpose2d(A, weight, output_padding=rest, **ctx.options)

    @staticmethod
    def backward(ctx, g):
        A, weight = ctx.saved_tensors
        g = g.permute(0, 2, 3, 1)          # channels last for PyTorch, too, if there is only one
        g = g.flatten().view(g.shape).permute(0, 3, 1, 2)
        return (F.conv2d(g, weight, **ctx.options) if ctx.needs_input_grad[0] else None,
                nn.grad.conv2d_weight(g, weight.shape, A, **ctx.options)
                if ctx.needs_input_grad[1] else None, *[None] * 5)


def _in_blocks(A, weight, size, k, s, p, r, groups):
    """conv_transpose2d of kernel k, stride s, padding p, whose output is made in blocks of r x r: a
    convolution of stride r/s with r*r times the channels (r = s: Shi et al. 2016, "sub-pixel").

    Output y gets input i times weight[y + p - s i]. Blocks begin at -(p % s); block Y has outputs
    y = r Y + a - p % s and sees inputs i = r/s Y + t + p//s - m, where m = (k-1)//s. So the tap is
    weight[a + s (m - t)].
    """
    m = (k - 1) // s
    a, t = (torch.arange(n, device=A.device) for n in (r, r // s + m))
    tap = a[:, None] + s * (m - t)
    tap = tap.clamp(max=k).masked_fill(tap < 0, k)                                     # k: nothing
    W = F.pad(weight, (0, 1, 0, 1))[..., tap[:, None, :, None], tap[:, None]]
    W = W.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1, 5, 6)      # (groups, a, b, C, O, t, t)
    A = F.conv2d(A, W.flatten(0, 3), stride=r // s, padding=m - p // s, groups=groups)
    A = A.unflatten(1, (groups, r, r, -1)).permute(0, 5, 2, 6, 3, 1, 4)
    A = A.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)  # (M, groups*C, r Y, r X)
    bottom, right = (n + p % s - made for n, made in zip(size, A.shape[2:]))
    return F.pad(A, (-(p % s), right, -(p % s), bottom))


def _negative(A):
    """A- = min(A, 0): as clamp(max=0), whose backward pass is ten times as slow on a CPU."""
    return F.hardtanh(A, -torch.inf, 0.0)


def _through_negative(grad, A):
    """The gradient of A-, times grad."""
    return torch.ops.aten.hardtanh_backward(grad, A.expand_as(grad), -torch.inf, 0.0)


# The inner loops of everything. Their backward passes are written out: they go over the rows less
# often than autograd's, and of all that is as large as A they keep only A.

class _Lines(torch.autograd.Function):
    """A+ lower + A- upper (P, B, G, R, F) and A- . intercept (P, B, G, R), where A = A+ + A-."""

    @staticmethod
    def forward(ctx, A, lower, upper, intercept):
        ctx.save_for_backward(A, lower, upper, intercept)
        negative = _negative(A)
        return torch.addcmul(A * lower, negative, upper - lower), _dot(negative, intercept)

    @staticmethod
    def backward(ctx, g, h):
        A, lower, upper, intercept = ctx.saved_tensors
        need = ctx.needs_input_grad
        grads = [None] * 4
        if need[0]:
            grad = (g * (upper - lower)).addcmul_(h[..., None], intercept)
            grads[0] = _through_negative(grad, A).addcmul_(g, lower).sum_to_size(A.shape)
        if need[1]:
            grads[1] = (g * F.relu(A)).sum_to_size(lower.shape)
        if need[2] or need[3]:
            negative = _negative(A)
            grads[2] = (g * negative).sum_to_size(upper.shape)
            grads[3] = (h[..., None, :] @ negative).sum_to_size(intercept.shape)
        return tuple(grads)


class _Minimum(torch.autograd.Function):
    """A+ . lower + A- . upper, (P, B, G, R)."""

    @staticmethod
    def forward(ctx, A, lower, upper):
        ctx.save_for_backward(A, lower, upper)
        return (A @ lower.mT + _negative(A) @ (upper - lower).mT).squeeze(-1)

    @staticmethod
    def backward(ctx, g):
        A, lower, upper = ctx.saved_tensors
        grads, column, row = [None] * 3, g[..., None], g[..., None, :]
        if ctx.needs_input_grad[0]:
            grad = _through_negative(column * (upper - lower), A)
            grads[0] = grad.addcmul_(column, lower).sum_to_size(A.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grads[1] = (row @ F.relu(A)).sum_to_size(lower.shape)
            grads[2] = (row @ _negative(A)).sum_to_size(upper.shape)
        return tuple(grads)


class _Dot(torch.autograd.Function):
    """(A @ v.mT).squeeze(-1), whose own backward pass loops over samples on a CPU."""

    @staticmethod
    def forward(ctx, A, v):
        ctx.save_for_backward(A, v)
        return (A @ v.mT).squeeze(-1)

    @staticmethod
    def backward(ctx, g):
        A, v = ctx.saved_tensors
        return ((g[..., None] * v).sum_to_size(A.shape) if ctx.needs_input_grad[0] else None,
                (g[..., None, :] @ A).sum_to_size(v.shape) if ctx.needs_input_grad[1] else None)


def _dot(A, v):
    """(P, B, G, R, F) . (P, B, G, 1, F) -> (P, B, G, R); one matrix product if all share A."""
    if A.shape[1:3] == (1, 1):
        return (v.flatten(1, 3) @ A[:, 0, 0].mT).view(-1, *v.shape[1:3], A.shape[3])
    return _Dot.apply(A, v)


def _first_relu(W, c, window, rows, relu, op):
    """The first two steps of back-substitution, a ReLU and the affine layer op below it, for rows
    W z + c that all samples and positions share: W (P, O, F), c (P, O).

    With m and r the mean and half the difference of the two slopes, and t the intercept,
        a relu(z)  >=  a (m z + t/2) - |a| (r z + t/2)
        a relu(z)  <=  a (m z + t/2) + |a| (r z + t/2)
    and z = M h + b. So two products serve for both: of m and r (P, B*G, F) with what depends on
    the weights alone, a M and |a| M (P, F, O*F'). No sample has coefficients of z of its own.

    Returns a function of slices of samples and of rows: coefficients (P, B, G, 2O, F') and
    constants (P, B, G, 2O) of the lower bounds of the rows, and of minus the rows.
    """
    M, b = _matrix(op, window), _bias(op, window)[:, None, None]
    lower, upper, intercept = relu
    mean, half, t = (_take(map, window, op.out_shape, rows)[..., 0, :]
                     for map in ((lower + upper) / 2, (upper - lower) / 2, intercept / 2))
    sides = (mean, mean * b + t), (half, half * b + t)                         # (P, B, G, F) each

    def product(A, slope, constant):
        AM = (A.mT[..., None] * M[:, :, None]).flatten(2)                      # (P, F, O*F')
        lead = *slope.shape[1:3], A.shape[1]
        return ((slope.flatten(1, 2) @ AM).view(len(M), *lead, -1),
                (constant.flatten(1, 2) @ A.mT).view(len(M), *lead))

    def start(samples, some):
        A = W[:, some]
        (X, x), (Y, y) = (product(a, *(t[:, samples] for t in side))
                          for a, side in zip((A, A.abs()), sides))
        x = x + c[:, None, None, some]
        return _Sides.apply(X, Y), torch.cat([x - y, -x - y], 3)

    return start


class _Sides(torch.autograd.Function):
    """X - Y and -X - Y, one after the other along R: the rows, and minus the rows."""

    @staticmethod
    def forward(ctx, X, Y):
        R = X.shape[3]
        both = X.new_empty(*X.shape[:3], 2 * R, *X.shape[4:])
        torch.sub(X, Y, out=both[:, :, :, :R])
        torch.add(X, Y, out=both[:, :, :, R:]).neg_()
        return both

    @staticmethod
    def backward(ctx, g):
        a, b = g.chunk(2, 3)
        return a - b, (a + b).neg_()


def _sizes(window, shape, ops):
    """The numbers of coefficients that one row holds, one after another, going down through ops."""
    sizes = []
    for op in [*reversed(ops), None]:
        kernel = shape[1:] if window is None else window.kernel
        size = shape[0] * torch.Size(kernel).numel()
        sizes.append(size if window is None else size + -size % 16)            # as _padded
        if op is not None:
            window, shape = _below(window, op), op.in_shape
    return sizes


class Budget:
    """Bytes that the passes of one call may hold: half for what is kept for backward, a quarter for
    the pass at work, a quarter in reserve for what is not counted."""

    def __init__(self, memory, t):
        if memory is None and t.is_cuda:
            memory = torch.cuda.get_device_properties(t.device).total_memory // 2
        elif memory is None:
            memory = MEMORY[t.device.type]
        if not 0 <= memory < float("inf"):
            raise ValueError(f"memory={memory} has to be a number of bytes")
        self.chunk, self.number = CHUNK[t.device.type], t.element_size()
        self.at_work, self.left = int(memory) // 4, int(memory) // 2

    def fit(self, rows, sizes, held):
        """How many times so many rows of so many coefficients go down in one pass, at least 1; and
        the bytes that this many rows keep for backward.

        held: numbers for each coefficient: it before and after its ReLU, and lines of its own.
        """
        keeps = int(rows * held * sum(sizes) * self.number)
        works = keeps + 3 * rows * max(sizes) * self.number            # 3: what backward adds
        return max(1, min(self.chunk // (rows * max(sizes)), self.at_work // works)), keeps

    def spend(self, cost):
        """May so many bytes be kept for backward? Where there is none, nothing is kept."""
        if not torch.is_grad_enabled():
            return True
        fits = cost <= self.left
        self.left -= cost if fits else 0
        return fits

    def run(self, bound, jobs, cost):
        """bound(*job) of all jobs, one after another. Those that the budget does not let keep what
        backward needs, cost bytes each, compute it again there: a third more time."""
        return [bound(*job) if self.spend(cost) else
                checkpoint(bound, *job, use_reentrant=False, preserve_rng_state=False)
                for job in jobs]
