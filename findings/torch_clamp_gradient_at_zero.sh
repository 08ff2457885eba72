#!/usr/bin/env bash
# torch 2.13.0 (CPU); found 2026-11-27.
#
# Guess: x.clamp(min=0) is relu(x) in its gradient too, and torch.maximum(x, 0) as well.
# What happens: at exactly 0 the gradients are 0 (relu), 1 (clamp) and 0.5 (maximum). Each alone is
#   a subgradient. But the least value of a * x over lower <= x <= upper, written as
#       a.clamp(min=0) * lower + a.clamp(max=0) * upper,
#   gets at a = 0 the gradient lower + upper, for BOTH clamps pass it on. The supergradients there
#   are the numbers from lower to upper, so on [2, 3] the answer 5 is none of them, and neither
#   one-sided slope is near it. relu(a) * lower - relu(-a) * upper gets 0, which is not in [2, 3]
#   either; torch.where(a > 0, lower, upper) * a gets upper, which is.
# Why it matters: the concretization of a backward bound is commonly written so, as is, with weights
#   for a, the affine layer of interval bounds. Coefficients are exactly 0 behind dead ReLUs and at
#   pruned weights. These get a gradient that the bound does not have; for inputs in [0, 1] or
#   behind a ReLU it is up to twice the largest supergradient.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
ZERO, LOWER, UPPER = (torch.tensor(value, dtype=torch.float64) for value in (0.0, 2.0, 3.0))


def least_clamp(a):
    return a.clamp(min=0) * LOWER + a.clamp(max=0) * UPPER


def least_relu(a):
    return a.relu() * LOWER - (-a).relu() * UPPER


def least_where(a):
    return torch.where(a > 0, LOWER, UPPER) * a


def gradient_at_zero(function):
    a = ZERO.clone().requires_grad_()
    return torch.autograd.grad(function(a), a)[0].item()


STEP = 1e-3
print("least of a * x, x in [2, 3]: slope from the left", -least_clamp(ZERO - STEP).item() / STEP,
      "and from the right", least_clamp(ZERO + STEP).item() / STEP)
seen = {
    "relu(x)": (gradient_at_zero(torch.relu), 0.0),
    "x.clamp(min=0)": (gradient_at_zero(lambda x: x.clamp(min=0)), 1.0),
    "torch.maximum(x, 0)": (gradient_at_zero(lambda x: torch.maximum(x, ZERO)), 0.5),
    "least of a * x by clamp": (gradient_at_zero(least_clamp), 5.0),
    "least of a * x by relu": (gradient_at_zero(least_relu), 0.0),
    "least of a * x by where": (gradient_at_zero(least_where), 3.0),
}
for name, (now, recorded) in seen.items():
    print(f"gradient at 0 of {name:24} {now:4} recorded {recorded}")
sys.exit(any(now != recorded for now, recorded in seen.values()))
PYTHON
