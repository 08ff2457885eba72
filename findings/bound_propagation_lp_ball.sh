#!/usr/bin/env bash
# bound-propagation 0.4.7 (with torch 2.13.0, numpy 2.4.6); found 2026-11-28.
#
# Guess: concretized CROWN bounds over LpNormSet(center, radius, p) hold for every point of that
#   ball, and are exact for one affine layer: 3 x + 4 y on the unit disk (p = 2) is in [-5, 5].
# What happens: the bounds are [-2.4, 2.4], and points of the disk reach 5. The norm taken of the
#   slopes has the exponent p / (1 - p), which is -2 for p = 2, in place of p / (p - 1). A norm of
#   negative exponent is below the least absolute slope, so the bounds are too narrow for any p > 1
#   and two inputs; with one slope of 0 they have no width at all, as if the radius were 0. A box
#   (HyperRectangle) is not affected; crown_ibp has its inner bounds right and its last step wrong.
# Why it matters: these are the bounds of the library for l2 robustness. Margins are certified that
#   an attack inside of the ball makes negative, and training on them is nearly training on the
#   natural margin. Slopes of exactly 0 (pruned weights, dead units) remove the radius altogether.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bound-propagation==0.4.7
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bound_propagation import BoundModelFactory, LpNormSet
from torch import nn

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
print("bound-propagation", version("bound-propagation"), "torch", torch.__version__)


def affine(*slopes):
    layer = nn.Linear(len(slopes), 1, bias=False)
    layer.weight.data = torch.tensor([slopes])
    return layer


def compare(network, inputs, radius, method="crown"):
    """Bounds of the output over the l2 ball around 0, and its range over 10^5 points of it."""
    center = torch.zeros(1, inputs)
    bounded = BoundModelFactory().build(network)
    bounds = getattr(bounded, method)(LpNormSet(center, radius, 2.0)).concretize()
    directions = torch.randn(100_000, inputs)
    with torch.no_grad():
        seen = network(radius * directions / directions.norm(dim=1, keepdim=True))[:, 0]
    found = [number.item() for number in (bounds.lower, bounds.upper, seen.min(), seen.max())]
    print("  bounds [%.4f, %.4f], points of the ball reach [%.4f, %.4f]" % tuple(found))
    return found


print("3 x + 4 y, radius 1:")
two_slopes = compare(affine(3.0, 4.0), 2, 1.0)
print("3 x + 4 y + 0 z, radius 1:")
with_zero = compare(affine(3.0, 4.0, 0.0), 3, 1.0)
print("a ReLU network, radius 0.5, crown and crown_ibp:")
relu = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
networks = [compare(relu, 8, 0.5, method) for method in ("crown", "crown_ibp")]
as_described = (
    abs(two_slopes[1] - 2.4) < 1e-6
    and two_slopes[3] > 4.99
    and abs(with_zero[1]) < 1e-6
    and all(upper < high - 0.01 and lower > low + 0.01 for lower, upper, low, high in networks[:1])
)
sys.exit(not as_described)
PYTHON
