#!/usr/bin/env bash
# torchopt 0.7.3 (with torch 2.13.0, numpy 2.4.6, optree 0.20.0); found 2026-11-28.
#
# Guess: torchopt.diff.zero_order offers three estimates of one gradient, that of the loss smoothed
#   with standard deviation sigma. All have the same mean; "forward", by the difference of
#   f(x + sigma z) and f(x), is exactly 0 for a constant loss, and the error falls with the root of
#   num_samples.
# What happens: "forward" multiplies the difference by sigma where the others divide by it, so it is
#   sigma^2 times the gradient. And from the second sample on it subtracts the last difference, not
#   f(x): the baseline is an alternating sum of all losses so far. A constant loss gets a gradient
#   from two samples on, and the error does not fall with more samples: 400 are no better than 40
#   and stay at two thirds of the slope. With the defaults, sigma 1 and one sample, it is right.
# Why it matters: this is the estimator that a Gaussian average of a certified loss needs, and the
#   "forward" variant is taken as the one with the cheap variance reduction. A comparison of the
#   three would blame the method: at sigma 0.1 its steps are a hundredth, and more samples, the
#   usual cure for a noisy estimate, do not help.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchopt==0.7.3 optree==0.20.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchopt

print("torchopt", torchopt.__version__, "torch", torch.__version__)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
SLOPE = 3.0


def estimates(loss, method, num_samples, sigma, repeats):
    """Returns the estimated slopes of a loss of one number at 0."""
    wrap = torchopt.diff.zero_order.zero_order(
        torch.randn, method=method, argnums=0, num_samples=num_samples, sigma=sigma)
    estimated, x = wrap(loss), torch.zeros(1, requires_grad=True)
    return torch.cat([torch.autograd.grad(estimated(x), x)[0] for _ in range(repeats)])


def linear(x):
    return SLOPE * x.sum()


def constant(x):
    return 0 * x.sum() + 1


print(f"slope {SLOPE}, mean of 4000 estimates by one sample:")
mean = {(method, sigma): estimates(linear, method, 1, sigma, 4000).mean().item()
        for sigma in (1.0, 0.1) for method in ("naive", "forward", "antithetic")}
for (method, sigma), value in mean.items():
    print(f"  sigma {sigma} {method:10} {value:.4f}")

flat = {n: estimates(constant, "forward", n, 1.0, 1).item() for n in (1, 2)}
print("forward, constant loss: 1 sample", flat[1], "and 2 samples", flat[2])

spread = {(method, n): estimates(linear, method, n, 1.0, 300).std().item()
          for method in ("antithetic", "forward") for n in (40, 400)}
for (method, n), value in spread.items():
    print(f"  sigma 1.0 {method:10} {n:3} samples: standard deviation {value:.3f}")
scaled = abs(mean["forward", 0.1] / SLOPE - 0.01) < 0.002 and abs(mean["forward", 1.0] - 3) < 0.5
sound = abs(mean["antithetic", 0.1] - SLOPE) < 0.5
falls = {method: spread[method, 400] / spread[method, 40] for method in ("antithetic", "forward")}
sys.exit(not (scaled and sound and flat[1] == 0 != flat[2]
              and falls["antithetic"] < 0.4 and falls["forward"] > 0.8))
PYTHON
