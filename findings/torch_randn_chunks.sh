#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6; found 2026-11-27.
#
# Guess: a generator is a stream. Drawing 64 normal numbers at once or as 20 + 44 gives the same 64
#   numbers (numpy does), a longer draw begins with the shorter one, and float64 noise is float32
#   noise with more digits.
# What happens: torch.randn fills 16 or more contiguous numbers in blocks of 16, eight uniform
#   pairs a block, and overwrites the last 16 when the length is no multiple of 16. Fewer than 16
#   numbers come from other code. So 20 + 44 differs from 64, randn(20) does not begin with
#   randn(16), and float64 agrees with float32 up to 15 numbers and is other noise from 16 on.
#   torch.rand, in float32, has none of this.
# Why it matters: an estimator that draws its weight noise in chunks to save memory, spreads it
#   over processes by skipping ahead, or redraws a part of it from its seed gets other noise unless
#   the parts have the same boundaries. A float64 run is no check of a float32 run with the same
#   seed.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy
import torch

print("torch", torch.__version__, "numpy", numpy.__version__)


def draw(*lengths, sample=torch.randn, dtype=torch.float32):
    """Draws the lengths one after another from one generator and joins them."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([sample(n, generator=generator, dtype=dtype) for n in lengths])


def float64_is_near(n):
    return torch.allclose(draw(n).double(), draw(n, dtype=torch.float64), atol=1e-5)


generator = numpy.random.default_rng(0)
parts = numpy.concatenate([generator.standard_normal(20), generator.standard_normal(44)])
whole = numpy.random.default_rng(0).standard_normal(64)

seen = {
    "numpy normal  20 + 44 is 64": (bool((parts == whole).all()), True),
    "torch.rand    20 + 44 is 64": (torch.equal(draw(20, 44, sample=torch.rand),
                                                draw(64, sample=torch.rand)), True),
    "torch.randn   32 + 32 is 64": (torch.equal(draw(32, 32), draw(64)), True),
    "torch.randn   20 + 44 is 64": (torch.equal(draw(20, 44), draw(64)), False),
    "torch.randn   40 +  8 is 48": (torch.equal(draw(40, 8), draw(48)), False),
    "torch.randn   20 begins with 16": (torch.equal(draw(20)[:16], draw(16)), False),
    "torch.randn   32 begins with 16": (torch.equal(draw(32)[:16], draw(16)), True),
    "float64 near float32, 15 numbers": (float64_is_near(15), True),
    "float64 near float32, 16 numbers": (float64_is_near(16), False),
}
for name, (now, recorded) in seen.items():
    print(f"{name:34} {str(now):6} recorded {recorded}")
print("first of float32 and float64, 16 numbers:",
      draw(16)[0].item(), draw(16, dtype=torch.float64)[0].item())
sys.exit(any(now != recorded for now, recorded in seen.values()))
PYTHON
