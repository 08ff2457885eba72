#!/usr/bin/env bash
# evosax 0.3.2 (with jax 0.10.2, optax 0.2.8, numpy 2.4.6); found 2026-11-27.
#
# Guess: PGPE and Open_ES of one library, with the same antithetic population, the raw fitness and
#   the same optax optimizer, hand it the same gradient estimate, that of the smoothed fitness by
#   the mean: they differ in what PGPE does to the standard deviation.
# What happens: Open_ES hands over the gradient, PGPE sigma^2 times it (with one sigma for each
#   parameter, each by its own). For a linear fitness of slope 3 and sigma 0.1, a step of optax.sgd
#   of rate 1 is about -3 by Open_ES and -0.03 by PGPE.
# Why it matters: the estimators are compared with each other and with averaged gradients at one
#   learning rate, norm limit or weight decay; at the sigma of weight noise, about 0.01, PGPE gets
#   a ten-thousandth of the step. Optimizers that normalise (Adam, ClipUp) hide it, until sigma
#   falls so far that their epsilon counts. As PGPE adapts sigma, it changes the learning rate of
#   each weight with it.
#
# Exits with 0 while the behaviour is as described, with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet evosax==0.3.2 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 \
    numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import optax
from evosax.algorithms import PGPE, Open_ES
from evosax.core.fitness_shaping import identity_fitness_shaping_fn

SIGMA, SLOPE, MEMBERS = 0.1, 3.0, 10_000
key = jax.random.key(0)


def first_step(kind, **spread):
    """How far the mean, one number, moves for the fitness SLOPE * x."""
    method = kind(MEMBERS, jnp.zeros(1), optimizer=optax.sgd(1.0),
                  fitness_shaping_fn=identity_fitness_shaping_fn, **spread)
    params = method.default_params
    if kind is PGPE:
        params = params.replace(std_init=SIGMA)
    state = method.init(key, jnp.zeros(1), params)
    population, state = method.ask(key, state, params)
    state, _ = method.tell(key, population, SLOPE * population[:, 0], state, params)
    return float(method.get_mean(state)[0])


print("evosax", version("evosax"), "jax", jax.__version__)
open_es = first_step(Open_ES, std_schedule=optax.constant_schedule(SIGMA))
pgpe = first_step(PGPE)
print(f"minus the slope {-SLOPE}; step by Open_ES {open_es:.4f}, by PGPE {pgpe:.5f}, which is "
      f"{pgpe / open_es:.4f} of it; sigma^2 is {SIGMA ** 2:.4f}")
sys.exit(not (abs(open_es + SLOPE) < 0.2 and abs(pgpe / open_es - SIGMA ** 2) < 1e-4))
PYTHON
