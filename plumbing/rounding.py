"""Where rounding could decide: balls that are exact as floating-point numbers, and float64."""
import math
from copy import deepcopy

import torch

ROUNDING = 1e-6       # of float64 bounds of margins, in units of the network's: below it, a tie


def ball(x, eps):
    """Lower and upper ends of the ball of pixels in [0, 1], in the dtype of x and rounded inwards:
    exactly inside."""
    exact = x.detach().cpu().double()
    lower, upper = (exact - eps).clamp(min=0), (exact + eps).clamp(max=1)
    low, high = lower.to(x.dtype), upper.to(x.dtype)
    above = torch.nextafter(low, torch.ones_like(low))
    below = torch.nextafter(high, torch.zeros_like(high))
    low = torch.where(low < lower, above, low)
    high = torch.where(high > upper, below, high)
    return low.to(x.device), high.to(x.device)


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


def check_finite(value, norm, where, explain):
    """FloatingPointError if the loss or the gradient's norm of a step is not finite; explain says
    which numbers were not, "" if bounds and gradients are: then a finite loss leaves the norm."""
    if not (value.isfinite() and norm.isfinite()):
        what = explain() or ("the gradient is finite, but the sum of its squares is not"
                             if value.isfinite() else
                             "the bounds of the output, or a regulariser, are not finite")
        raise FloatingPointError(
            f"{where}: the loss is {value:.4g}, the gradient's norm {norm:.4g}; {what}. Try a "
            "smaller --lr or a longer --ramp; the last good checkpoint is kept")


def first_not_finite(net, bounds, gradients):
    """Where numbers stop being finite: a layer's bounds, else a parameter's gradient, else "".

    bounds: (l, u) before each ReLU. gradients: {name of the parameter: gradient}.
    """
    relus = [i for i, layer in enumerate(net) if isinstance(layer, torch.nn.ReLU)]
    for i, (l, u) in zip(relus, bounds):
        if not (l.isfinite() & u.isfinite()).all():
            return f"the bounds before layer {i} ({net[i]}) are not finite"
    for name, g in gradients.items():
        if not g.isfinite().all():
            return f"the gradient of layer {name} is not finite"
    return ""
