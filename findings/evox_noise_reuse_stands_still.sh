#!/usr/bin/env bash
# evox 1.4.0 (with torch 2.13.0, numpy 2.4.6); found 2026-11-28.
#
# Guess: NoiseReuseES draws antithetic noise at the start of an unroll (T = 100 steps, K = 10 a
#   generation, by default) and uses the same noise for its ten generations. On a fitness that does
#   not change it is an ordinary evolution strategy: each generation moves the center against the
#   slope.
# What happens: the noise is not stored. In the nine other generations the perturbation is exactly
#   0: the whole population is the center, evaluated as often as there are members, and the
#   gradient is 0. Of 30 generations on a linear fitness three move the center. With
#   optimizer="adam" it glides on by the old average in between, and so seems to learn.
# Why it matters: this is the estimator for losses along a training or another unroll, where noise
#   has to stay. Nine tenths of the evaluations are spent on nothing, so that its progress for each
#   evaluation, by which estimators are compared, comes out ten times too small. Fitness values
#   that are all equal are the only sign.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 evox==1.4.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from evox.algorithms import NoiseReuseES, OpenES
from evox.core import Problem
from evox.workflows import StdWorkflow

print("evox", version("evox"), "torch", torch.__version__)
GENERATIONS, MEMBERS, SIGMA, RATE = 30, 100, 0.1, 0.001
spreads = []


class Slope(Problem):
    """The fitness 3 x, to be minimised; notes how far the members are from each other."""

    def evaluate(self, population):
        spreads.append((population.max() - population.min()).item())
        return 3 * population[:, 0]


def run(algorithm):
    """Returns in which generations the center moved, and in which the members were all equal."""
    spreads.clear()
    torch.manual_seed(0)
    workflow = StdWorkflow(algorithm, Slope())
    center, moved = algorithm.center.clone(), []
    for generation in range(GENERATIONS):
        workflow.step() if generation else workflow.init_step()
        now = workflow.algorithm.center.clone()
        if not torch.equal(now, center):
            moved.append(generation)
        center = now
    equal = [generation for generation, spread in enumerate(spreads) if spread == 0]
    print(f"{type(algorithm).__name__:13} center {center.item():8.4f}; moved in {len(moved)} of "
          f"{GENERATIONS} generations {moved if len(moved) < 9 else ''}; members all equal in "
          f"{len(equal)}")
    return moved, equal


open_es, _ = run(OpenES(MEMBERS, torch.zeros(1), RATE, SIGMA))
moved, equal = run(NoiseReuseES(MEMBERS, torch.zeros(1), lr=RATE, sigma=SIGMA))
with_adam, equal_with_adam = run(
    NoiseReuseES(MEMBERS, torch.zeros(1), lr=RATE, sigma=SIGMA, optimizer="adam"))
sys.exit(not (len(open_es) == GENERATIONS and moved == [0, 10, 20] and len(equal) == 27
              and len(with_adam) == GENERATIONS and len(equal_with_adam) == 27))
PYTHON
