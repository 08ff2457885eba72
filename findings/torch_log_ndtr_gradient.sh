#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6; found 2026-11-28.
#
# Guess: torch.special.log_ndtr, made for the far tail of the normal distribution function, has a
#   gradient as good as its value: at x far below 0 nearly -x, to some digits in float32.
# What happens: the value is right to float32 down to -10^10. The gradient is computed as
#   exp(-(value + x^2 / 2)), two numbers near x^2 / 2 that cancel. In float32 it is 4 percent off at
#   -1000, a third at -5000, 6.5 times too large at -10^4, and 0.4 in place of 10^5 at -10^5; then
#   it jumps between 0.4 and 0. It is no longer monotone, and a second derivative is noise as early
#   as -100. In float64 the gradient is 0.01 percent off
#   at -10^6 and twice too large at -10^8.
# Why it matters: the log probability that a margin survives Gaussian noise is log_ndtr(margin /
#   sigma), the loss with which certified radii and smoothed margins are trained. A margin of -10
#   and a sigma of 0.001 to 0.01, the sizes of weight noise, are -10^3 to -10^4. The worst examples
#   get random weights in the batch, or none, and the loss shows nothing of it.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import torch

print("torch", torch.__version__)


def tail(place, dtype):
    """log_ndtr and its gradient at minus place, over the true ones, and its second derivative."""
    x = torch.tensor(-place, dtype=dtype, requires_grad=True)
    value = torch.special.log_ndtr(x)
    slope, = torch.autograd.grad(value, x, create_graph=True)
    curvature, = torch.autograd.grad(slope, x)
    # The series of Mills' ratio is right to nine digits from place = 100 on.
    series = 1 - place ** -2 + 3 * place ** -4
    true_value = -place ** 2 / 2 + math.log(series / place) - math.log(2 * math.pi) / 2
    return value.item() / true_value, slope.item() * series / place, curvature.item()


found = {}
for dtype in (torch.float32, torch.float64):
    for place in (1e2, 1e3, 5e3, 1e4, 1e5, 1e6, 1e8):
        found[dtype, place] = value, slope, curvature = tail(place, dtype)
        print(f"{dtype} x {-place:6.0e}: value over the true one {value:.6f}, gradient over the "
              f"true one {slope:.6g}, second derivative (true: -1) {curvature:.4g}")
values_are_right = all(abs(value - 1) < 1e-5 for value, _, _ in found.values())
slopes = {place: found[torch.float32, place][1] for place in (1e2, 1e3, 1e4, 1e5)}
as_described = (
    values_are_right and abs(slopes[1e2] - 1) < 1e-2 and 0.01 < abs(slopes[1e3] - 1) < 0.1
    and slopes[1e4] > 3 and slopes[1e5] < 1e-3 and abs(found[torch.float64, 1e8][1] - 1) > 0.3
)
sys.exit(not as_described)
PYTHON
