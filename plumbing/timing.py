"""How long a training will take. A step at full radius may be ten times as long as the first ones:
more neurons are unstable, and DeepPoly substitutes these only."""
import math
import time
from itertools import accumulate

import numpy as np

FRACTIONS = 0.0, 1 / 16, 1 / 4, 1.0          # of the radius, where a step is measured


def seconds_at(step):
    """{fraction of the radius: seconds that step(fraction) takes}; a first call is not counted."""
    step(0.0)
    seconds = {}
    for fraction in FRACTIONS:
        begun = time.time()
        step(fraction)
        seconds[fraction] = time.time() - begun
    return seconds


def lengths_of(fractions, seconds):
    """Of steps at these fractions of the radius, from seconds_at; of equal length without it."""
    if seconds is None:
        return [1.0] * len(fractions)
    return np.interp(fractions, list(seconds), list(seconds.values())).tolist()


def time_left(lengths, done, memory=60.0):
    """A function seconds -> seconds left, to be called after each step, of which so many are done,
    with what it took.

    lengths of all steps count up to a factor: that of the steps of the last minute or so.
    """
    ahead = [*accumulate(reversed(lengths), initial=0.0)][::-1]      # ahead[i]: of step i and later
    spent = expected = 0.0

    def left(seconds):
        nonlocal spent, expected, done
        kept = math.exp(-seconds / memory)
        spent = kept * spent + seconds
        expected = kept * expected + lengths[done]
        done += 1
        return spent / expected * ahead[done]
    return left
