"""One message for one mistake: what images, labels, radii and other arguments have to be.

certify.certify, train.evaluate and train.fit ask check_problem before they compute anything, so
that what is refused is refused at once, whatever the images turn out to be. It asks the bounds,
whose words are the same everywhere; those for networks are in reading.py.
"""
import math
import numbers
from copy import deepcopy

import torch
import torch.nn as nn

from plumbing.rounding import ROUNDING, unit_of

FLOATS = torch.float32, torch.float64
CROSSED = 1e-4        # of the largest bound: by so much rounding may put a lower above an upper one


def is_plain(t):
    """Is it a dense tensor of PyTorch's own, not of a subclass, whose operations may be others?"""
    return type(t) in (torch.Tensor, nn.Parameter) and t.layout == torch.strided


def check_images(x):
    """Raises ValueError for what are no images: a plain tensor (B, ...) of float32 or float64."""
    if not torch.is_tensor(x) or x.is_nested or x.is_meta or x.layout != torch.strided:
        kind = f"{x.layout} on {x.device}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"x has to be a tensor of images, got {kind}; "
                         "torch.as_tensor(x, dtype=torch.float32) makes one of an array")
    if not is_plain(x):
        raise ValueError(f"x is a {type(x).__name__}, which may compute something else than a "
                         "tensor; x.as_subclass(torch.Tensor) is one")
    if x.dim() < 2:
        raise ValueError(f"x has to be a batch of images (B, ...), got the shape {tuple(x.shape)}; "
                         "x[None] is a batch of one")
    if x.dtype not in FLOATS:
        raise ValueError("x and the parameters have to be all float32 or all float64, got x of "
                         f"{x.dtype}; pixels of 0..255 are x.float() / 255")


def check_numbers(x, tensors):
    """Raises ValueError unless the images x are pixels and as precise as the {name: tensor} of each
    layer."""
    kinds = {(t.dtype, t.device) for own in tensors for t in own.values()
             if t.dtype != torch.int64}                                    # of num_batches_tracked
    if kinds - {(x.dtype, x.device)}:
        kinds = {(x.dtype, x.device), *kinds}
        raise ValueError("x and the parameters have to be all float32 or all float64, on one "
                         f"device, got {', '.join(sorted(f'{t} on {at}' for t, at in kinds))}")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("bounds need full precision; leave torch.autocast before computing them")
    lowest, highest = x.aminmax() if x.numel() else (-1, -1)
    if not (lowest >= 0 and highest <= 1):
        raise ValueError("x is empty, or has values outside [0, 1] or NaN: pass pixels; "
                         "normalisation is a layer of the network")


def as_radii(eps, x):
    """eps as a tensor that broadcasts with the images x. Raises ValueError."""
    try:
        eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"eps={eps!r} is no number or tensor ({str(e).splitlines()[0]})") from None
    fits = all(n in (1, m) for n, m in zip(reversed(eps.shape), reversed(x.shape)))
    # One of each image, or of each column? Shapes would allow either.
    unclear = 1 < eps.numel() == len(x) and eps.dim() == 1
    if not fits or unclear or eps.dim() > x.dim() or not ((eps >= 0) & eps.isfinite()).all():
        raise ValueError(f"eps={eps.tolist()} has to be a radius in pixels, 0 <= eps < infinity: a "
                         "number, or a tensor that broadcasts with x (one of each image: (B, 1, "
                         "...))")
    return eps


def as_slopes(slopes, l, u):
    """What a rule for lower slopes returned, as a tensor like l. Raises ValueError where it leaves
    [0, 1] and counts, at l < 0 < u."""
    try:
        slopes = torch.as_tensor(slopes, dtype=l.dtype, device=l.device).expand_as(l)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("slope(l, u) has to return a tensor like l") from None
    outside = (slopes < 0) | (slopes > 1)
    if (outside & (l < 0) & (u > 0)).any():
        raise ValueError("slope(l, u) has to be in [0, 1]: other lines do not bound relu")
    return slopes


def check_relaxation(known, relax):
    """Raises ValueError unless it is one of the known, and can be computed here."""
    if relax not in known:
        raise ValueError(f"relax={relax!r} is not one of {', '.join(known)}")
    if relax == "alpha-crown" and torch.is_inference_mode_enabled():
        raise ValueError("alpha-crown climbs along gradients, which torch.inference_mode() has "
                         "none of; torch.no_grad() will do")


def as_rule(slope, known):
    """The rule of that name, or the function (l, u); one that is not of the known {name: function}
    raises ValueError where it leaves [0, 1]."""
    if slope in [*known, *known.values()]:
        return known.get(slope, slope)
    if not callable(slope):
        raise ValueError(f"slope={slope!r} is none of {', '.join(known)}, and no function (l, u)")

    return lambda l, u: as_slopes(slope(l, u), l, u)


def check_bounds(pairs, shapes, x):
    """Raises ValueError unless they are pairs (l, u), l <= u but for rounding, of tensors of these
    shapes, like x; or None."""
    if pairs is None:
        return
    try:
        got = [(t.shape, t.dtype, t.device) for l, u in pairs for t in (l, u)]
    except (AttributeError, TypeError, ValueError):
        got = None
    if got != [(shape, x.dtype, x.device) for shape in shapes for _ in "lu"]:
        sizes = [tuple(shape) for shape in shapes]
        raise ValueError(f"intermediate has to hold a pair (l, u) of each of the shapes {sizes}, "
                         f"{x.dtype} on {x.device} as x is")
    for k, (l, u) in enumerate(pairs):
        if (l - u > CROSSED * torch.maximum(l.abs().max(), u.abs().max())).any():
            raise ValueError(f"intermediate[{k}] has lower bounds above upper ones")


def as_labels(y, x, K=None):
    """The labels (B,) of the images x, as int64 on their device. Raises ValueError unless they are
    integers, of 0..K-1 if K is given."""
    try:
        y = torch.as_tensor(y, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"y has to hold {len(x)} integer labels, got {type(y).__name__}") from None
    fraction = y.is_floating_point() or y.is_complex() or y.dtype == torch.bool
    if y.shape != x.shape[:1] or fraction:
        hint = "; y.flatten() or, if they are one-hot, y.argmax(1) will do" * (y.dim() == 2)
        raise ValueError(f"y has to hold {len(x)} integer labels, got {y.dtype} {tuple(y.shape)} "
                         f"for images {tuple(x.shape)}{hint}")
    y = y.as_subclass(torch.Tensor).long()
    if K is not None and not ((y >= 0) & (y < K)).all():
        raise ValueError(f"y has labels outside 0..{K - 1}, of a network with {K} logits")
    return y


def check_radius(eps):
    """Raises ValueError unless eps is one number, 0 <= eps < infinity."""
    single = torch.is_tensor(eps) and eps.dim() == 0 and eps.dtype in FLOATS
    real = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not (single or real) or not 0 <= eps < math.inf:
        shown = f"a tensor {tuple(eps.shape)}" if torch.is_tensor(eps) and eps.dim() else eps
        raise ValueError(f"eps={shown} has to be a radius in pixels, 0 <= eps < infinity: one "
                         "number for all images")


def check_whole(least, **named):
    """Raises ValueError unless each is a whole number from least to 2^63 - 1."""
    for name, n in named.items():
        if not isinstance(n, numbers.Integral) or not least <= n < 2 ** 63:
            raise ValueError(f"{name}={n} has to be a whole number >= {least}")


def check_choice(known, **named):
    """Raises ValueError unless each is one of the known names."""
    for name, value in named.items():
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")


def check_number(name, value, most=math.inf):
    """Raises ValueError unless it is a number from 0 to most; NaN is none."""
    if not isinstance(value, numbers.Real) or not 0 <= value <= most:
        raise ValueError(f"{name}={value} has to be a number >= 0")


def check_settings(known, stages, slopes, slope, *, timeout, tolerance, batch, steps, restarts,
                   seed, report):
    """Raises ValueError for settings that make no sense."""
    check_number("timeout", timeout)
    check_number("tolerance", tolerance)
    check_whole(1, batch=batch)
    check_whole(0, steps=steps, seed=seed, restarts=0 if restarts is None else restarts)
    if not isinstance(stages, (list, tuple)) or not set(map(str, stages)) <= set(known):
        raise ValueError(f"stages={stages} has to be a list of {', '.join(known)}")
    check_choice(slopes, slope=slope)
    if not callable(report):
        raise ValueError(f"report={report!r} has to be a function of a verdict")
    if tolerance == 0:
        raise ValueError("tolerance=0 cannot be reached in floating point; 1e-6 can")


def check_copy(net):
    """Raises ValueError for a network that cannot be copied."""
    try:
        deepcopy(net)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"the network cannot be copied ({str(e).splitlines()[0]}); weights that "
                         "are computed belong in torch.nn.utils.parametrize") from None


def check_training(net, x):
    """Raises ValueError for images that are none to train on, and for networks that are none, or
    that can be bounded only."""
    check_images(x)
    if not len(x):
        raise ValueError(f"x holds no image: its shape is {tuple(x.shape)}")
    if not isinstance(net, nn.Module):
        raise ValueError(f"net has to be a torch.nn.Sequential, got {type(net).__name__}")
    for name, module in net.named_modules():
        if hasattr(module, "parametrizations"):
            raise ValueError(f"layer {name} has weights that are computed, which can be bounded, "
                             "but not trained here; remove_parametrizations, of "
                             "torch.nn.utils.parametrize, makes plain ones")
    for name, p in net.named_parameters():
        if not p.requires_grad:
            raise ValueError(f"{name} is frozen, and training here moves all parameters; "
                             "net.requires_grad_() makes that plain")


@torch.no_grad()
def check_problem(net, x, y, eps, margins, neurons):
    """The labels as int64; ValueError, in the words of the bounds, for what these refuse, and for a
    network that bounds and forward pass take for two: at eps 0 they have to give the same margins.

    margins, neurons: relaxations.margin_lower_bounds and preactivation_bounds.
    """
    check_images(x)
    y = as_labels(y, x)
    check_radius(eps)
    if not len(x):
        return y
    # If the bounds take the images with the lowest and the highest pixel, and the smallest and the
    # largest label, they take all.
    lowest, highest = x.flatten(1).amin(1), x.flatten(1).amax(1)
    few = x[torch.stack([lowest.argmin(), highest.argmax()])]
    labels = torch.stack(y.aminmax())
    K = margins(net, few, labels, 0.0, "box").shape[1]
    if K < 2:
        raise ValueError(f"the network has {K} logit; a margin is between two")
    check_copy(net)
    check_forward(net, few, labels, margins, neurons)
    return y


def check_forward(net, x, y, margins, neurons):
    """Raises ValueError if bounds at eps 0 are not what the network computes, in float64; it names
    the first layer where they differ."""
    device = "cpu" if x.device.type == "mps" else x.device
    twin, x, y = deepcopy(net).to(device).double(), x.to(device).double(), y.to(device)
    logits = twin(x)
    right = logits.gather(1, y[:, None]) - logits
    difference = (margins(twin, x, y, 0.0, "box") - right).abs().max()
    if not difference > ROUNDING * max(unit_of(twin, x), logits.abs().max()):
        return                                             # NaN weights are certified nowhere
    where = "some layer"
    layers = list(leaves(twin))
    for n, (name, last) in enumerate(layers):
        prefix = nn.Sequential(*(layer for _, layer in layers[:n + 1]))
        z = prefix(x).flatten(1)
        try:
            low, high = neurons(nn.Sequential(*prefix, nn.ReLU(), nn.Flatten()), x, 0.0, "box")[-1]
        except ValueError:                                 # nothing affine yet
            continue
        if max((low.flatten(1) - z).abs().max(), (high.flatten(1) - z).abs().max()) \
                > ROUNDING * z.abs().max():
            where = f"layer {name} ({type(last).__name__})"
            break
    raise ValueError(f"bounds and forward pass of the network differ by {difference:.3g} at a "
                     f"radius of 0: {where} does not compute what its class says")


def leaves(net, prefix=""):
    """(name, layer) of the layers of nested nn.Sequentials, by their names in net.state_dict()."""
    for name, layer in net.named_children():
        if isinstance(layer, nn.Sequential):
            yield from leaves(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer
