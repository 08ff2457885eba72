"""Where rounding could decide: balls that are exact as floating-point numbers, and float64."""
import math
from copy import deepcopy

import torch

ROUNDING = 1e-6       # of float64 bounds of margins, in units of the network's: below it, a tie


def ball(x, eps):
    """Lower and upper ends of the ball of pixels in [0, 1], in the dtype of x and rounded inwards:
    exactly inside."""
    exact = x.detach().cpu().double()
    eps = torch.as_tensor(eps, dtype=torch.float64).cpu()
    low, high = (inwards(exact, move, x.dtype).clamp(0, 1) for move in (-eps, eps))
    return low.to(x.device), high.to(x.device)


def inwards(x, move, dtype):
    """x + move of float64 in a dtype: the nearest number that is not farther from x."""
    end = x + move
    moved = end - x
    rest = (x - (end - moved)) + (move - moved)           # end + rest is x + move (Knuth's TwoSum)
    near = end.to(dtype)
    too_far = ((near.double() - end) - rest) * move.sign() > 0
    return torch.where(too_far, torch.nextafter(near, x.to(dtype)), near)


def in_float64(net, *tensors):
    """Copies in float64 (on the CPU if the device has none, as MPS), to decide close calls."""
    device = tensors[0].device
    if device.type == "mps":
        device = torch.device("cpu")
    copies = [deepcopy(net).to(device, torch.float64)]
    for t in tensors:
        dtype = torch.float64 if t.is_floating_point() else t.dtype
        copies.append(t.to(device, dtype))
    return copies


@torch.no_grad()
def unit_of(net, x):
    """The unit of the network's margins: about how far one of its logits is spread over images.

    Constants that margins and the steps of multipliers are compared with count in it: so a factor
    of the logits, which changes no prediction, does not change the search either, wherever in the
    network it stands. The images are random and always the same, in the shape of x (n, ...): the
    unit does not depend on who else is in a batch. A power of two: dividing by it and multiplying
    again is exact.
    """
    images = torch.rand(16, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    spread = net(images.to(x)).cpu().double().std(0).max().item()
    power = round(math.log2(spread)) if 0 < spread < math.inf else 0
    return 2.0 ** min(max(power, -126), 126)               # it and its inverse are float32 numbers


@torch.no_grad()
def scale_of(net, x):
    """unit_of or, where larger values cancel in the margins, a scale for these: a million times
    what rounding to the dtype of x changes the logits of the same images by, at most."""
    images = torch.rand(16, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
    wide, images64 = in_float64(net, images)
    error = (wide(images64) - net(images).to(images64)).abs().max().item()
    return max(unit_of(net, x), 1e6 * error)


def check_finite(value, norm, where, explain):
    """FloatingPointError if the loss or the gradient's norm of a step is not finite; explain says
    which numbers were not, "" if bounds and gradients are: then a finite loss leaves the norm."""
    if not (value.isfinite() and norm.isfinite()):
        what = explain() or ("the gradient is finite, but the sum of its squares is not"
                             if value.isfinite() else
                             "the bounds of the output, or a regulariser, are not finite")
        raise FloatingPointError(
            f"{where}: the loss is {value:.4g}, the gradient's norm {norm:.4g}; {what}. Try a "
            "smaller --lr or a longer --ramp; a run folder keeps its last good checkpoint")


def first_not_finite(layers, bounds, gradients):
    """Where numbers stop being finite: a layer's bounds, else a parameter's gradient, else "".

    layers: (name, layer) of all. bounds: (l, u) before each ReLU. gradients: {name of the
    parameter: gradient}.
    """
    relus = [(name, layer) for name, layer in layers if isinstance(layer, torch.nn.ReLU)]
    for (name, relu), (l, u) in zip(relus, bounds):
        if not (l.isfinite() & u.isfinite()).all():
            return f"the bounds before layer {name} ({relu}) are not finite"
    for name, g in gradients.items():
        if not g.isfinite().all():
            return f"the gradient of layer {name} is not finite"
    return ""
