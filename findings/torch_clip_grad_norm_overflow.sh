#!/usr/bin/env bash
# torch 2.13.0 (CPU); found 2026-11-27.
#
# Guess: clip_grad_norm_ scales a finite gradient, however large, to the asked norm; should the
#   norm not be finite, the gradient shows it as nan or inf.
# What happens: the squares are summed in float32, so from a norm of about 1.8e19 on the norm is
#   inf though every entry is finite, the factor max_norm / inf is 0, and the whole gradient
#   becomes exactly 0. Nothing is raised (error_if_nonfinite is False by default) and no parameter
#   is nan. The same gradient in float64, or with norm_type=inf, is clipped as asked.
# Why it matters: the gradient of interval bounds grows by the row sums of |W| at each layer and
#   can reach this size in a deep network (below: 24 layers of 512, He initialisation, a
#   cross-entropy of finite bounds). The clipping that was put in against large gradients then
#   stops the training: the loss stays where it is and looks converged. Only the returned norm
#   tells.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

print("torch", torch.__version__)
torch.manual_seed(0)
WIDTH, DEPTH, CLASSES = 512, 24, 10
sizes = [WIDTH] * DEPTH + [CLASSES]
network = nn.Sequential(*(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:])))
for layer in network:
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
image, label = torch.rand(1, WIDTH), torch.tensor([0])


def interval_loss(layers, image, radius=0.1):
    """Returns the cross-entropy of the worst logits in the interval bounds of a ReLU network."""
    lower, upper = image - radius, image + radius
    for index, layer in enumerate(layers):
        if index:
            lower, upper = lower.relu(), upper.relu()
        center, deviation = (upper + lower) / 2, (upper - lower) / 2
        center, deviation = layer(center), deviation @ layer.weight.abs().T
        lower, upper = center - deviation, center + deviation
    true_class = F.one_hot(label, CLASSES).bool()
    return F.cross_entropy(torch.where(true_class, lower, upper), label)


def clipped(layers, image, norm_type):
    """Returns the norm clip_grad_norm_ found and the one it left; prints the gradient it got."""
    layers.zero_grad()
    loss = interval_loss(layers, image)
    loss.backward()
    gradients = [parameter.grad for parameter in layers.parameters()]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    finite = all(gradient.isfinite().all() for gradient in gradients)
    found = nn.utils.clip_grad_norm_(layers.parameters(), 1.0, norm_type=norm_type).item()
    left = nn.utils.get_total_norm([g.double() for g in gradients], norm_type=norm_type).item()
    print(f"{str(image.dtype):14} norm_type {norm_type}: loss {loss:.3g}, all entries finite "
          f"{finite}, the largest {largest:.3g}; norm found {found:.3g}, left {left:.3g}")
    return finite, found, left


finite, found, left = clipped(network, image, 2.0)
is_zeroed = finite and math.isinf(found) and left == 0
finite, found, left = clipped(network, image, math.inf)
max_is_clipped = finite and math.isfinite(found) and abs(left - 1) < 1e-3
finite, found, left = clipped(copy.deepcopy(network).double(), image.double(), 2.0)
double_is_clipped = finite and math.isfinite(found) and abs(left - 1) < 1e-3
sys.exit(not (is_zeroed and max_is_clipped and double_is_clipped))
PYTHON
