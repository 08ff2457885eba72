"""The attack: projected gradient descent on margins (PGD, Madry et al. 2018), and forward passes.

Letters in shape comments: P parameter vectors, B samples, K classes.
"""
from copy import deepcopy

import torch
import torch.nn.functional as F

from plumbing.rounding import ball, in_float64


def margins_of(logits, y):
    """logit[y] - logit[k], (..., B, K)."""
    return logits.gather(-1, y.expand(logits.shape[:-1])[..., None]) - logits


def smallest(margins, y):
    """The smallest entry k != y of margins (..., B, K): (..., B)."""
    label = F.one_hot(y, margins.shape[-1]).bool()
    return margins.masked_fill(label, torch.inf).amin(-1)


@torch.no_grad()
def forward_margin(net, x, y):
    """min over k != y of logit[y] - logit[k], in float64: (B,). Correct means positive."""
    net, x, y = in_float64(net, x, y)
    logits = torch.cat([net(part) for part in x.split(500)])
    return smallest(margins_of(logits, y), y)


def descend(net, x, y, eps, steps, target=None, start=None):
    """Projected gradient descent (PGD, Madry et al. 2018) on the smallest margin, or that to the
    class target (B,), from x, or from the points start.

    Returns the worst points on the way, (B, ...), exactly inside the ball, and their margins (B,).
    """
    low, high = ball(x, eps)
    z = x if start is None else start
    best, best_margin = x.clone(), x.new_full([len(x)], torch.inf)
    for k in range(steps + 1):
        z = z.detach().clamp(low, high).requires_grad_()
        margins = margins_of(net(z), y)
        worst = smallest(margins, y)
        better = worst.detach() < best_margin
        best_margin = torch.where(better, worst.detach(), best_margin)
        best[better] = z.detach()[better]
        if k < steps:
            goal = worst if target is None else margins.gather(1, target[:, None])
            step = eps * (0.25 if k < steps / 2 else 0.1 if k < 3 * steps / 4 else 0.02)
            z = z - step * torch.autograd.grad(goal.sum(), z)[0].sign()
    return best, best_margin


def restarts_of(net, x, y, eps, restarts, seed):
    """(target, start) of so many descents: the first lowers the smallest margin from x, r > 0 that
    to the r-th runner-up class, from a random point, at the same place between the ends of the ball
    for all samples: what is found for one does not depend on the others."""
    low, high = ball(x, eps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = torch.cat([net(part) for part in x.split(500)])
    ranking = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    for r in range(restarts):                              # y is last in the ranking
        place = torch.rand(x.shape[1:], generator=generator).to(x)
        target = ranking[:, (r - 1) % max(1, ranking.shape[1] - 1)]
        yield (target, low + (high - low) * place) if r else (None, None)


@torch.inference_mode(False)               # whatever the caller's mode: it needs gradients
@torch.enable_grad()
def attack(net, x, y, eps, steps=40, restarts=3, seed=0):
    """The worst points that so many descents find, (B, ...), exactly inside the ball."""
    if any(t.is_inference() for t in (x, y, *net.state_dict().values())):    # these give none
        net, x, y = deepcopy(net), x.clone(), y.clone()
    best, lowest = x.clone(), x.new_full([len(x)], torch.inf)
    for target, start in restarts_of(net, x, y, eps, restarts, seed):
        points, margins = descend(net, x, y, eps, steps, target, start)
        better = margins < lowest
        best[better], lowest = points[better], torch.where(better, margins, lowest)
    return best
