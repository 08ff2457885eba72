#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6, scipy 1.17.1; found 2026-11-28.
#
# Guess: SobolEngine(scramble=True) draws from [0, 1), like scipy.stats.qmc.Sobol and torch.rand, so
#   that torch.special.ndtri of the draw is finite Gaussian noise.
# What happens: the points have 30 bits. float32, the default, keeps 24 of them and rounds to the
#   nearest, so that a number from 1 - 2^-25 on, one of 2^25, becomes exactly 1.0 and its ndtri inf.
#   The same draw with dtype=torch.float64 is below 1. torch.rand in float32 returns no 1.0.
# Why it matters: quasi-random weight noise of a Gaussian average takes one number for each weight
#   and sample. Four of 32 engines of 5000 weights and 128 samples have a 1.0 in it; with five
#   million weights, in blocks of dimensions, every step has. One infinite weight makes the loss of
#   its sample inf or nan, and with it the average. The first point of an engine without scrambling,
#   all 0, is known for that; scrambling, its usual remedy, leaves this. Draw in float64, or clamp
#   to 1 - 2^-24 before ndtri.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy
import scipy
import torch
from torch.quasirandom import SobolEngine

print("torch", torch.__version__, "numpy", numpy.__version__, "scipy", scipy.__version__)
WEIGHTS, SAMPLES, ENGINES = 5000, 128, 32


def draw(seed, dtype):
    return SobolEngine(WEIGHTS, scramble=True, seed=seed).draw(SAMPLES, dtype=dtype)


hit, ones, below = [], 0, True
for seed in range(ENGINES):
    points = draw(seed, torch.float32)
    places = (points == 1).nonzero().tolist()
    if not places:
        continue
    hit.append(seed)
    ones += len(places)
    exact = draw(seed, torch.float64)
    below = below and bool((exact < 1).all())
    for sample, weight in places:
        print(f"seed {seed}, sample {sample}, weight {weight}: float32 {points[sample, weight]}, "
              f"float64 {exact[sample, weight]:.10f}; ndtri {torch.special.ndtri(points).max()}, "
              f"of float64 {torch.special.ndtri(exact).max():.3f}")
    noise = torch.special.ndtri(points)
    print(f"  mean of the squared noise over all weights and samples: {noise.square().mean()}")
numbers = WEIGHTS * SAMPLES * ENGINES
print(f"{ones} times 1.0 among {numbers} numbers; {numbers / 2 ** 25:.1f} expected by rounding")
uniform = torch.rand(numbers, generator=torch.Generator().manual_seed(0)).max().item()
numpy_like = max(scipy.stats.qmc.Sobol(WEIGHTS, rng=seed).random(SAMPLES).max() for seed in hit)
print("largest of torch.rand", uniform, "and of scipy's Sobol", numpy_like)
sys.exit(not (len(hit) >= 2 and below and uniform < 1 and numpy_like < 1))
PYTHON
