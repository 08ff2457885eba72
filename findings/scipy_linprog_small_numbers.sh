#!/usr/bin/env bash
# scipy 1.17.1 (its HiGHS; with numpy 2.4.6); found 2026-11-27.
#
# Guess: a linear program that is feasible by far is not called infeasible; and of a bounded one
#   with the status "optimal" the value is the minimum, but for a small relative error. Units do not
#   matter: whoever writes the same program in thousandths gets a thousandth.
# What happens: scipy.optimize.linprog hands over to HiGHS, whose limits are absolute. Coefficients
#   of constraints below 1e-9 are taken for 0: "x / 10^10 >= 1, 0 <= x <= 10^14" is infeasible
#   (status 2), without a warning. Costs below about 1e-7 may be taken for paid: "maximise x / 10^8,
#   0 <= x <= 10^10" ends in x = 0, "optimal" (status 0), where the answer is 100. And a program
#   with random numbers of ordinary size has, multiplied by 1e-10, an "optimum" that lies above
#   the minimum.
# Why it matters: verifiers close a subdomain when its linear program is infeasible, and certify an
#   image when its smallest margin is positive. Both answers can be wrong on the unsound side. Tiny
#   coefficients are usual: behind weight decay, in networks with folded batch normalisation, at
#   pixels that were constant, and where logits are scaled by a temperature. A solver for proofs
#   has to scale rows and costs first, or to check the dual in exact or directed arithmetic.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import scipy
from scipy.optimize import linprog

INFEASIBLE, OPTIMAL = 2, 0

print("scipy", scipy.__version__)
feasible = linprog([1.0], A_ub=[[-1e-10]], b_ub=[-1.0], bounds=[(0, 1e14)])
print("x / 10^10 >= 1, feasible from x = 10^10 on: status", feasible.status)

largest = linprog([-1e-8], bounds=[(0, 1e10)])
print("the largest x / 10^8, which is 100: status", largest.status, "value", -largest.fun)

random = np.random.default_rng(0)
A, costs = random.normal(size=(30, 20)), random.normal(size=20)
minimum, scaled = (linprog(costs * unit, A_ub=A, b_ub=np.ones(30), bounds=[(-1, 1)] * 20).fun / unit
                   for unit in (1.0, 1e-10))
print(f"a random program: minimum {minimum:.6f}; in another unit, times that unit {scaled:.6f}")

as_described = (feasible.status == INFEASIBLE and largest.status == OPTIMAL and largest.fun == 0
                and scaled > minimum + 1e-4)
sys.exit(not as_described)
PYTHON
