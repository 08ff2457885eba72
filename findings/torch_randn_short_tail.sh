#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6; found 2026-11-28.
#
# Guess: torch.randn in float32 is normal as far out as its format reaches. Among 2^31 numbers about
#   17 are beyond 5.7682 (the share of a normal is 8e-9), and the largest is near 6.2; numpy's
#   float32 generator, drawn as often, looks alike.
# What happens: no number is ever beyond 5.7682. A draw of 16 or more is made by the method of Box
#   and Muller from uniform numbers of 24 bits, so the largest radius is sqrt(2 log 2^24), however
#   many numbers are drawn. numpy's (ziggurat) has its 17 there, within chance.
# Why it matters: a Gaussian average over five million weights, 64 pairs a step, has drawn 2^31
#   numbers after seven steps. A loss that jumps further out than 5.77 sigma of one weight has an
#   estimated gradient of exactly 0 whatever the number of samples, and rare events estimated from
#   weight or input noise (tails of randomised smoothing, largest losses) stop at that distance
#   with no sign of it. float64 noise reaches 8.57.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not. It takes a minute or two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import numpy
import torch

print("torch", torch.__version__, "numpy", numpy.__version__)
CHUNKS, LENGTH = 2 ** 11, 2 ** 20
END = math.sqrt(2 * math.log(2 ** 24)) + 1e-4
expected = CHUNKS * LENGTH * math.erfc(END / math.sqrt(2))


def tail(draw):
    """The largest of all numbers, and how many are beyond END."""
    largest, beyond = 0.0, 0
    for _ in range(CHUNKS):
        chunk = draw()
        largest = max(largest, float(abs(chunk).max()))
        beyond += int((abs(chunk) > END).sum())
    return largest, beyond


generator = torch.Generator().manual_seed(0)
stream = numpy.random.default_rng(0)
drawn = {
    "torch.randn": tail(lambda: torch.randn(LENGTH, generator=generator)),
    "numpy": tail(lambda: stream.standard_normal(LENGTH, dtype=numpy.float32)),
}
print(f"{CHUNKS * LENGTH} numbers each; a normal has {expected:.1f} of them beyond {END:.4f}")
for name, (largest, beyond) in drawn.items():
    print(f"{name:12} largest {largest:.4f}, beyond {END:.4f}: {beyond}")
as_recorded = drawn["torch.randn"][1] == 0 and drawn["numpy"][1] >= 5
sys.exit(not as_recorded)
PYTHON
