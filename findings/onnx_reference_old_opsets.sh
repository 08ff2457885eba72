#!/usr/bin/env bash
# onnx 1.23.2, numpy 2.4.6; found 2026-11-28.
#
# Guess: onnx.reference.ReferenceEvaluator, made to show what the operators mean, computes those of
#   older opsets by their own text: BatchNormalization with one output is inference, by the stored
#   mean and variance; Softmax before opset 13 flattens all from its axis (1 by default) on.
# What happens: at opsets 9 to 13 BatchNormalization normalizes by 0.9 of the stored statistics and
#   0.1 of those of the batch, so an image gets another output with other images next to it.
#   Softmax at opsets below 13 works on one axis, by default the last, as from 13 on: a map of 75
#   numbers sums to 15 and not to 1. BatchNormalization is right from opset 14 on. The checker
#   accepts all of these models.
# Why it matters: networks for verification are commonly stored with opset 9 to 12, and a
#   counterexample is checked by running the network. By this evaluator true ones are rejected and
#   wrong ones pass, and a converter that is compared with it is "repaired" until it agrees.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "numpy", np.__version__)
random = np.random.default_rng(0)
images = random.normal(size=(4, 3, 5, 5)).astype(np.float32)
SCALE, SHIFT, MEAN, VARIANCE = (np.array(numbers, np.float32) for numbers in (
    [1.0, 2.0, 0.5], [0.0, 1.0, -1.0], [3.0, -2.0, 0.5], [0.04, 0.09, 0.01]))


def run(opset, operator, inputs, constants, x):
    node = helper.make_node(operator, ["x", *inputs], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    stored = [numpy_helper.from_array(value, name) for name, value in zip(inputs, constants)]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def batch_norm(opset, x):
    return run(opset, "BatchNormalization", ["scale", "shift", "mean", "variance"],
               [SCALE, SHIFT, MEAN, VARIANCE], x)


scale, shift, mean, variance = (array[:, None, None] for array in (SCALE, SHIFT, MEAN, VARIANCE))
meant = (images - mean) / np.sqrt(variance + 1e-5) * scale + shift
errors, company = {}, {}
for opset in (9, 11, 13, 14, 15):
    found = batch_norm(opset, images)
    errors[opset] = np.abs(found - meant).max()
    company[opset] = np.abs(found[:1] - batch_norm(opset, images[:1])).max()
    print(f"BatchNormalization, opset {opset}: off by {errors[opset]:.2g}; the first image alone "
          f"and among others differ by {company[opset]:.2g}")
sums = {}
for opset in (7, 11, 12):
    sums[opset] = run(opset, "Softmax", [], [], images).sum(axis=(1, 2, 3))
    print(f"Softmax, opset {opset}: sum of each image {sums[opset]}, meant 1")
sys.exit(not (
    all(errors[opset] > 1 and company[opset] > 0.1 for opset in (9, 11, 13))
    and all(errors[opset] < 1e-3 and company[opset] < 1e-6 for opset in (14, 15))
    and all((abs(total - 15) < 1e-3).all() for total in sums.values())
))
PYTHON
