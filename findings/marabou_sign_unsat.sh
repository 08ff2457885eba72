#!/usr/bin/env bash
# maraboupy 2.0.0 (with numpy 2.4.6); found 2026-11-28.
#
# Guess: where a complete verifier answers "unsat" no input of the box meets the query. A query of
#   nothing but the network and the box of its inputs always has a solution, the network's value at
#   any point, so it is "sat".
# What happens: for the network below (one input, two layers of three Sign units, small integers for
#   weights, halves for biases, so that no Sign is near its jump) the query without a property is
#   "unsat" on [0, 1] and on [0, 1/2]. On [0, 1/4], [1/4, 1/2], [1/2, 1] and at single points it is
#   "sat", with the right value. tighteningStrategy="none" answers "sat" everywhere, so the fault is
#   in the bounds of Sign by "deeppoly", the default, and by "sbt". Of random networks of this shape
#   one in 300 was hit; of those of ReLU, LeakyReLU or absolute value none in 200.
# Why it matters: "unsat" is what certifies. Here every property is certified, and its opposite, for
#   a binarized network small enough to check by hand. A fault as rare as that passes the tests on
#   a few networks, and not a search over thousands of boxes. A query without a property, or for
#   the box around a point that was run, is a cheap check of any verifier.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet maraboupy==2.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from maraboupy import Marabou, MarabouNetwork

print("maraboupy", version("maraboupy"), "numpy", np.__version__)
LAYERS = [
    ([[3], [1], [-1]], [-0.5, -0.5, -2.5]),
    ([[2, -1, -1], [2, -3, -2], [-2, -2, 1]], [1.5, 1.5, -0.5]),
    ([[-1, 1, 1]], [1.5]),
]


def forward(x):
    values = np.array([x])
    for index, (weight, bias) in enumerate(LAYERS):
        values = np.array(weight) @ (np.where(values >= 0, 1, -1) if index else values) + bias
    return values[0]


def solve(lower, upper, strategy="deeppoly"):
    """The answer for the network on a box without a property, and the output of a solution."""
    query = MarabouNetwork.MarabouNetwork()
    units = [query.getNewVariable()]
    query.setLowerBound(units[0], lower)
    query.setUpperBound(units[0], upper)
    query.inputVars = [np.array(units)]
    for index, (weight, bias) in enumerate(LAYERS):
        if index:
            signs = [query.getNewVariable() for _ in units]
            for unit, sign in zip(units, signs):
                query.setLowerBound(sign, -1.0)
                query.setUpperBound(sign, 1.0)
                query.addSignConstraint(unit, sign)
            units = signs
        sums = [query.getNewVariable() for _ in weight]
        for row, offset, total in zip(weight, bias, sums):
            query.addEquality(units + [total], [float(w) for w in row] + [-1.0], -offset)
        units = sums
    query.outputVars = [np.array(units)]
    answer, solution, _ = query.solve(
        verbose=False, options=Marabou.createOptions(verbosity=0, tighteningStrategy=strategy))
    value = solution[units[0]] if answer == "sat" else None
    print(f"{strategy} [{lower}, {upper}]: {answer}", "" if value is None else f"output {value}")
    return answer, value


print("the network takes the values", sorted({float(forward(x)) for x in np.linspace(0, 1, 1001)}))
boxes = [(0, 1), (0, 0.5), (0.5, 1), (0, 0.25), (0.25, 0.5)]
wrong = [box for box in boxes if solve(*box)[0] == "unsat"]
points = [solve(x, x) == ("sat", forward(x)) for x in (0.05, 0.3, 0.45, 0.7, 0.95)]
without = [solve(*box, strategy="none")[0] for box in boxes]
sys.exit(not (wrong == [(0, 1), (0, 0.5)] and all(points) and without == ["sat"] * len(boxes)))
PYTHON
