#!/usr/bin/env bash
# maraboupy 2.0.0 (with numpy 1.26.4); found 2026-11-28.
#
# Guess: Marabou is a complete verifier: "unsat" means that no input satisfies the query, but for
#   queries that miss by a rounding error. A ReLU network whose first layer is multiplied by s > 0
#   and whose last one by 1 / s is the same function, and gets the same answers.
# What happens: from s = 1e-5 on the answer is "unsat" though hundreds of random inputs exceed the
#   threshold, by up to a tenth of the range. A variable whose bounds are closer than about 1e-5
#   is taken for a constant, their lower end, whatever it is multiplied by later. The same with a
#   narrow input box: of relu((x - 0.5) / width) >= 0.5, 0.5 <= x <= 0.5 + width, it finds the
#   solution at width 1.1e-5, and calls it unsat at 9e-6. No warning is given, at verbosity 2
#   either, and the status is not UNKNOWN.
# Why it matters: "unsat" is the proof. Small activations come with weight decay, with folded batch
#   normalisation and with inputs in small units; narrow boxes with small radii and with input
#   splitting. An LP solver's tolerances, known to be absolute, are 1e-6 and less; here it is 1e-5.
#   Whoever counts images proven by a complete verifier has to look at the scale of the layers.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet maraboupy==2.0.0 numpy==1.26.4
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from maraboupy import Marabou, MarabouCore

OPTIONS = Marabou.createOptions(verbosity=0, timeoutInSeconds=60, numWorkers=1)


def answer(layers, box, threshold):
    """Asks for an input in the box whose last output is at least the threshold."""
    query = MarabouCore.InputQuery()
    sources = list(range(layers[0][0].shape[1]))
    used = len(sources)
    query.setNumberOfVariables(used + sum(2 * len(bias) for _, bias in layers))
    for i, variable in enumerate(sources):
        query.markInputVariable(variable, i)
        query.setLowerBound(variable, box[0])
        query.setUpperBound(variable, box[1])
    for weights, bias in layers:  # a ReLU behind each layer, the last too
        before = range(used, used + len(bias))
        after = range(before.stop, before.stop + len(bias))
        for row, constant, variable in zip(weights, bias, before):
            equation = MarabouCore.Equation()
            for weight, source in zip(row, sources):
                equation.addAddend(float(weight), source)
            equation.addAddend(-1.0, variable)
            equation.setScalar(-float(constant))
            query.addEquation(equation)
        for pair in zip(before, after):
            MarabouCore.addReluConstraint(query, *pair)
        sources, used = list(after), after.stop
    query.markOutputVariable(sources[-1], 0)
    query.setLowerBound(sources[-1], threshold)
    return MarabouCore.solve(query, OPTIONS, "")[0]


print("maraboupy", version("maraboupy"))
random = np.random.default_rng(0)
W, b, V, c = random.normal(size=(8, 3)), random.normal(size=8), random.normal(size=(1, 8)), [9.0]
inputs = random.random((100_000, 3))
same = {}
for s in (1.0, 1e-3, 1e-4, 1e-5, 1e-6):
    outputs = np.maximum(inputs @ (W * s).T + b * s, 0) @ (V / s).T + c
    threshold = outputs.max() - (outputs.max() - outputs.min()) / 10
    assert outputs.min() > 0
    same[s] = answer([(W * s, b * s), (V / s, c)], (0.0, 1.0), threshold)
    print(f"first layer times {s:g}: outputs seen {outputs.min():.4f} to {outputs.max():.4f}, "
          f"{(outputs > threshold).sum()} above {threshold:.4f}; Marabou: {same[s]}")
narrow = {}
for width in (1e-3, 1.1e-5, 9e-6, 1e-6):
    layer = np.array([[1 / width]]), np.array([-0.5 / width])
    narrow[width] = answer([layer], (0.5, 0.5 + width), 0.5)
    print(f"relu((x - 0.5) / {width:g}) >= 0.5 on the box of that width: {narrow[width]}")
sys.exit(not (list(same.values()) == ["sat"] * 3 + ["unsat"] * 2
              and list(narrow.values()) == ["sat"] * 2 + ["unsat"] * 2))
PYTHON
