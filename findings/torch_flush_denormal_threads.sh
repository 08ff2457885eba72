#!/usr/bin/env bash
# torch 2.13.0 (CPU); found 2026-11-27.
#
# Guess: after torch.set_flush_denormal(True) returned True, denormal results are 0 everywhere in a
#   tensor: it is documented for the CPU, with no word of threads.
# What happens: it holds for the calling thread. The threads that work on large tensors, once they
#   exist, keep what they began with. Of four million equal denormals times 1, two threads make
#   exactly the first half 0, and leave the second as it was.
# Why it matters: equal inputs get different outputs, by their place in the tensor and by the number
#   of threads. Rounding outwards rests on denormals, for the number next to 0 is one: with the
#   switch on, what is computed from such a bound is moved outwards in one half of a layer and not
#   in the other. Gradients through many small slopes vanish for some weights and not for others.
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

SIZE, THREADS, DENORMAL = 4_000_000, 2, 1e-40

torch.set_num_threads(THREADS)
equal = torch.full((SIZE,), DENORMAL)
(equal * 1).sum()                                 # from here on the threads exist
print("torch", torch.__version__, "switch:", torch.set_flush_denormal(True))
flushed = equal * 1 == 0
small = equal[:10] * 1 == 0                       # too small to be shared out
torch.set_flush_denormal(False)
first = flushed[: SIZE // THREADS].float().mean().item()
second = flushed[SIZE // THREADS:].float().mean().item()
print(f"flushed: {small.float().mean():.0%} of 10 numbers, of {SIZE} numbers {first:.0%} of the "
      f"first half and {second:.0%} of the second")
sys.exit(not (small.all() and first == 1 and second == 0))
PYTHON
