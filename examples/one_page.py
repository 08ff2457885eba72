"""Certified training with Gaussian loss smoothing on one page: python examples/one_page.py

DeepPoly (Singh et al. 2019) bounds the margins of a network of linear layers over a ball around an
image, the loss is the cross-entropy of these worst cases, and RGS (Balauca et al. 2025) averages
its gradient over random weights. The weights in the end are, but for rounding, those of
    python train.py --net mlp --init default --lr-decay 1 --regularize 0 --no-skip-stable
Shapes: B images, R rows to bound, N neurons of a layer, K classes.
"""
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters


def relu_lines(l, u):
    """Two lines around relu on [l, u]: lower * z <= relu(z) <= upper * z + intercept."""
    above = u.clamp(min=0)
    width = above - l.clamp(max=0) + 1e-30            # not 0/0 for a neuron that is always 0
    upper = above / width                             # the chord: 1 if l >= 0, 0 if u <= 0
    lower = (u >= -l).to(u)                           # 0 or 1, whichever is closer to relu
    return lower, upper, above - upper * above


def lower_bound(A, layers, lines, low, high):
    """Lower bounds (B, R) of rows A (B, R, N) times the output of layers; inputs in [low, high]."""
    d = 0
    for i in reversed(range(len(layers))):
        d = d + A @ layers[i].bias                    # z = W h + b, exactly
        A = A @ layers[i].weight
        if i > 0:                                     # h = relu(z'): its lower line
            lower, upper, intercept = lines[i - 1]    # where A >= 0, its upper line where A < 0
            d = d + (A.clamp(max=0) * intercept).sum(-1)
            A = A.clamp(min=0) * lower + A.clamp(max=0) * upper
    return d + (A.clamp(min=0) * low + A.clamp(max=0) * high).sum(-1)      # at the worst corner


def margins(layers, x, y, eps):
    """Lower bounds (B, K) of logit[y] - logit[k] over all images within eps of x, in [0, 1]."""
    box = (x - eps).clamp(min=0)[:, None], (x + eps).clamp(max=1)[:, None]
    lines = []
    for i in range(1, len(layers)):                   # bounds before each ReLU, in order
        z = torch.eye(layers[i - 1].out_features).to(x)
        l = lower_bound(z, layers[:i], lines, *box)
        u = -lower_bound(-z, layers[:i], lines, *box)
        lines.append(relu_lines(l[:, None], u[:, None]))
    logit = torch.eye(layers[-1].out_features).to(x)
    return lower_bound(logit[y][:, None] - logit, layers, lines, *box)


def train(x, y, eps=0.1, sigma=0.01, epochs=20, ramp=8, clip=10):
    """Linear layers, to be read with ReLUs between, trained on images (n, 64) and labels (n,)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*map(torch.nn.Linear, (64, 100, 100), (100, 100, 10)))
    theta = parameters_to_vector(net.parameters()).detach()
    optimizer = torch.optim.Adam([theta], lr=2e-3)
    batches, generator = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for epoch in range(epochs):
        parts = torch.randperm(len(x), generator=batches).split(64)
        for step, i in enumerate(parts, 1):
            t = min((epoch + step / len(parts)) / ramp, 1)           # the radius grows smoothly
            radius = eps * (256 * t ** 4 if t < 1 / 4 else 16 * t - 3) / 13
            noise = sigma * torch.randn(len(theta), generator=generator)
            net.zero_grad()
            for weights, seen in zip((theta + noise, theta - noise), i.tensor_split(2)):       # RGS
                vector_to_parameters(weights, net.parameters())
                losses = torch.logsumexp(-margins(net, x[seen], y[seen], radius), 1)
                (losses.sum() / len(i)).backward()
            theta.grad = parameters_to_vector(p.grad for p in net.parameters())
            clip_grad_norm_([theta], clip)
            optimizer.step()
    vector_to_parameters(theta, net.parameters())
    return net


if __name__ == "__main__":
    digits = np.loadtxt(Path(__file__).parents[1] / "data" / "digits.csv.gz", delimiter=",")
    x, y = torch.from_numpy(digits[:, :-1] / 16), torch.from_numpy(digits[:, -1]).long()
    net = train(x[:1437].float(), y[:1437])         # 20 seconds of one CPU core
    certified = (margins(net.double(), x[1437:], y[1437:], eps=0.1) > 0).sum(1) == 9
    print(f"{certified.sum()} of {len(certified)} test images are certified at eps 0.1")     # 238
