"""TAPS: the last part of a network is attacked, inside a box, instead of bounded (Mao et al. 2023,
"Connecting certified and adversarial training").

Letters in shape comments: P parameter vectors, B samples, K classes.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap

from plumbing.attack import margins_of
from plumbing.console import InputError
from plumbing.reading import flat_layers


def latent_margins(net, params, bounds, y, classes, split=1, expand=1.0):
    """Of taps: margin k at a point that an attack found for k in a box inside the network, (P, B,
    K); the box is where interval arithmetic has the outputs of the last ReLU but split.

    bounds: of all neurons, as preactivation_bounds returns them. A gradient goes, expand times as
    large, to what is above the box, and through linked to the box and so to what is below.
    """
    part, names = last_part(net, split), {p: name for name, p in net.named_parameters()}
    above = {name: params[names[p]] for name, p in part.named_parameters()}
    l, u = (F.relu(t).unsqueeze(2) for t in bounds[-1 - split])                  # (P, B, 1, ...)

    def margins(above, points):                                                  # (P, B, K, ...)
        logits = vmap(lambda p, z: functional_call(part, p, (z,)))(above, points.flatten(1, 2))
        found = margins_of(logits.unflatten(1, points.shape[1:3]), y[:, None])
        return found.diagonal(dim1=-2, dim2=-1)

    fixed = {name: t.detach() for name, t in above.items()}
    points = worst_points(lambda z: margins(fixed, z), l.detach(), u.detach(), classes)
    low = margins(above, linked(points, l, u))
    return low.detach() + expand * (low - low.detach())


def last_part(net, relus):
    """What is above all ReLUs but the last so many, as an nn.Sequential of the same layers."""
    layers = [layer for _, layer in flat_layers(net)]
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if relus >= len(places):
        raise InputError(f"--split {relus}: with {len(places)} ReLUs in the network, it has to be "
                         "less than that: taps and staps bound what is below")
    return nn.Sequential(*layers[places[-1 - relus] + 1:])


def linked(points, l, u, c=0.5):
    """points in [l, u], which from here on move with the ends that they are near (the rectified
    linear connector): d point / d u = relu(1 - (u - point) / (c (u - l))), and likewise d l."""
    slack = c * (u - l).detach()

    def motion(end):
        share = F.relu(1 - (points - end.detach()).abs() / slack)
        return torch.where(slack > 1e-5 * u.abs(), share, 0.5) * (end - end.detach())
    return points + motion(l) + motion(u)


def worst_points(margins, l, u, classes, steps=8):
    """Points (P, B, K, ...) of boxes (P, B, 1, ...), the k-th with the least of margins(points),
    (P, B, K), that PGD met from the centre on (the authors' start at random points)."""
    centre, own = (l + u) / 2, [1] * (l.dim() - 3)                   # own: axes of a point
    z = centre.expand(-1, -1, classes, *l.shape[3:])
    best, least = z, z.new_full(z.shape[:3], torch.inf)
    for step in range(steps + 1):
        z = z.clamp(l, u).detach().requires_grad_()
        with torch.enable_grad():
            found = margins(z)
        better = found.detach() < least
        least = torch.where(better, found.detach(), least)
        best = torch.where(better.view(*better.shape, *own), z.detach(), best)
        if step < steps:
            slopes = torch.autograd.grad(found.sum(), z)[0]
            z = z - max(0.2, 2 / steps) * (u - l) * slopes.sign()
    return best
