#!/usr/bin/env bash
# deel-torchlip 1.0.5 (with torch 2.13.0, numpy 2.4.6); found 2026-11-28.
#
# Guess: SpectralConv2d with its default k_coef_lip=1 is 1-Lipschitz in the l2 norm for whatever
#   kernel, stride and padding mode of its documentation, which says that the output is divided by
#   the Lipschitz bound "to ensure k-Lipschitz"; the constant is below 1 rather than above.
# What happens: the divisor is that of zero padding (the kernel's reach over the stride, rounded up)
#   and knows nothing of the padding mode. Modes that copy pixels exceed it: a trained 3 x 3 kernel
#   with padding 1 has the constant 1.23 with "reflect" and 1.49 with stride 2; with non-overlapping
#   windows "reflect", "replicate", "symmetric" and "circular" reach 2. Zero padding keeps to 1.
# Why it matters: the certified radius of such a network is its margin over the product of the
#   constants, taken for 1. Five such layers of constant 1.23 make that radius 2.8 times too large,
#   and training for large margins searches for just these kernels. Random kernels do not show it:
#   at initialisation the constant of the common 3 x 3 layer is about 0.8.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 deel-torchlip==1.0.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from deel import torchlip

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
print("deel-torchlip", version("deel-torchlip"), "torch", torch.__version__)
SHAPE = (2, 8, 8)


def constant(layer):
    """The l2 Lipschitz constant of an affine layer: the largest singular value of its Jacobian."""
    point = torch.zeros(1, *SHAPE)
    jacobian = torch.func.jacrev(lambda image: layer(image).flatten())(point)
    return torch.linalg.matrix_norm(jacobian.flatten(start_dim=1), 2)


def trained(kernel, stride, mode):
    """The constants of a new layer and after some steps of training towards a larger one."""
    torch.manual_seed(0)
    layer = torchlip.SpectralConv2d(2, 4, kernel, stride=stride, padding=1, padding_mode=mode)
    first = constant(layer).item()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-constant(layer)).backward()
        optimizer.step()
    layer.eval()
    exported = constant(layer.vanilla_export()).item()
    print(f"kernel {kernel} stride {stride} {mode:9}: at first {first:.3f}, trained {exported:.3f}")
    return exported


zeros = [trained(kernel, stride, "zeros") for kernel, stride in ((3, 1), (3, 2), (3, 3))]
copies = [trained(*case) for case in ((3, 1, "reflect"), (3, 2, "reflect"), (3, 3, "replicate"),
                                      (3, 3, "symmetric"), (3, 3, "circular"))]
sys.exit(not (max(zeros) < 1.001 and min(copies[:1]) > 1.15 and min(copies[1:]) > 1.3))
PYTHON
