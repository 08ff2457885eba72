#!/usr/bin/env bash
# evotorch 0.6.1 (with torch 2.13.0, numpy 2.4.6, ray 2.60.0); found 2026-11-27.
#
# Guess: where all members of a population have the same fitness there is nothing to learn, and
#   PGPE leaves its center where it is.
# What happens: with the default ranking ("centered"; "nes" and "linear" too) equal fitnesses get
#   different ranks, by their place in the population, and the default optimizer ClipUp normalises
#   what comes of it to the full learning rate: the center walks at random, a whole step each
#   time. Without ranking the estimated gradient is exactly 0, ClipUp divides it by its norm, and
#   the center is nan from then on, also once the fitness is informative again.
# Why it matters: ties are usual here. A certified accuracy takes few values on a batch, and a
#   cross-entropy in float32 is exactly 0 for every member once its margins are above about 17. An
#   estimator over weight noise that ranks its losses then moves as fast as on a steep loss, and
#   one that normalises its step needs a case for the zero gradient.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ray==2.60.0 evotorch==0.6.1
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import logging
import math
import sys

import torch

logging.disable(logging.INFO)
import evotorch
from evotorch.algorithms import PGPE

print("evotorch", evotorch.__version__, "torch", torch.__version__)
LEARNING_RATE = 0.1


def flat(population):
    return torch.ones(len(population))


def square(population):
    """Returns the squared distance of each member to the vector of ones."""
    return (population - 1).square().sum(dim=1)


def walk(ranking):
    """Returns the lengths of a first step and a second on flat, then of a third on square."""
    fitnesses = iter([flat, flat, square, square])
    problem = evotorch.Problem(
        "min",
        lambda population: next(fitnesses)(population),
        solution_length=10,
        initial_bounds=(0, 0),
        vectorized=True,
        seed=1,
    )
    search = PGPE(
        problem,
        popsize=100,
        center_learning_rate=LEARNING_RATE,
        stdev_learning_rate=0.1,
        stdev_init=0.1,
        ranking_method=ranking,
    )
    search.step()  # Only evaluates a first population; each later one moves by the last before.
    lengths = []
    for _ in range(3):
        before = search.status["center"].clone()
        search.step()
        lengths.append((search.status["center"] - before).norm().item())
    return lengths


seen = {ranking: walk(ranking) for ranking in ("centered", "nes", "linear", None)}
for ranking, (first, second, third) in seen.items():
    print(f"ranking {str(ranking):9} flat: first step {first:.4f}, second {second:.4f}; "
          f"then a square: {third:.4f}")
full_steps = all(
    abs(seen[ranking][0] - LEARNING_RATE) < 1e-4 for ranking in ("centered", "nes", "linear")
)
stays_nan = all(math.isnan(length) for length in seen[None])
sys.exit(not (full_steps and stays_nan))
PYTHON
