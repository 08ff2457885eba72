#!/usr/bin/env bash
# torch 2.13.0 (CPU); found 2026-11-28.
#
# Guess: F.conv2d(x, weight, bias, stride=(2,)), which computes what stride=2 does, does so under
#   torch.func.vmap, too; or vmap refuses it.
# What happens: with a batched bias vmap adds the bias along another axis, as the length of the
#   tuple is taken for the number of dimensions. If the number of channels equals the width of the
#   map, the result is silently wrong; else broadcasting ends in an error that names neither bias
#   nor stride. 2 and (2, 2) are right. So is the layer outside of vmap: nn.Conv2d(..., stride=(2,))
#   trains and predicts as intended.
# Why it matters: populations of networks, per-sample gradients and bounds by back-substitution run
#   layers through vmap and functional_call. What they compute is then of another network than the
#   one that runs; a lower bound can lie above the minimum, and the bound at radius 0 is not the
#   forward pass.
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
import torch.nn.functional as F

torch.manual_seed(0)
print("torch", torch.__version__)
x, weight, biases = torch.rand(5, 2, 9, 9), torch.rand(4, 2, 3, 3), torch.rand(3, 4)


def difference(stride):
    """Of vmap from a loop over three biases: four channels, and maps of 4 x 4."""
    together = torch.vmap(lambda bias: F.conv2d(x, weight, bias, stride=stride))(biases)
    loop = torch.stack([F.conv2d(x, weight, bias, stride=stride) for bias in biases])
    return (together - loop).abs().max().item()


plain = torch.equal(F.conv2d(x, weight, biases[0], stride=(2,)),
                    F.conv2d(x, weight, biases[0], stride=2))
print("without vmap, (2,) is 2:", plain)
found = {stride: difference(stride) for stride in (2, (2, 2), (2,))}
for stride, value in found.items():
    print(f"stride {str(stride):7} vmap differs from a loop by {value:.3f}")
sys.exit(not (plain and found[2] == found[2, 2] == 0 and found[2,] > 0.1))
PYTHON
