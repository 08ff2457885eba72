"""How long a training, or the verdicts of a test set, will take."""
import math
import time
from itertools import accumulate

import numpy as np

# Fractions of the radius, where a step is measured: just below the whole one, too, since a loss may
# change its kind there (TAPS does).
FRACTIONS = 0.0, 1 / 16, 1 / 4, 1 / 2, 1 - 1e-6, 1.0
# Of runs on digits, MNIST and CIFAR-10, cnn3 by DeepPoly. What a radius costs a new network is more
# than what it costs one that has grown up to it, whose neurons are stable: about the square root of
# it, in units of a step at radius 0. And at full radius later steps are shorter than early ones.
GROWTH, SETTLING = 0.5, 0.3


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
    """Of steps at these fractions of the radius, in units of one at 0, from seconds_at. What the
    last step of the ramp and the first after it differ in is none of the network's."""
    *ramp, whole = seconds.values()
    lengths = [(t / ramp[0]) ** GROWTH for t in ramp]
    lengths.append(lengths[-1] * whole / ramp[-1])
    return np.interp(fractions, list(seconds), lengths).tolist()


def time_left(fractions, done, measure=None, memory=30.0):
    """A function seconds -> seconds left, to be called after each step with what it took. One at
    full radius may be ten times as long as the first ones: more neurons are unstable, and DeepPoly
    substitutes these only.

    fractions: of the radius, in all steps, of which so many are done. measure(): what seconds_at
    returns, up to a factor, which is that of the last steps, about memory seconds of them. Without
    it all steps count the same.
    """
    measured = measure() if measure else {0.0: 1.0, 1.0: 1.0}
    lengths = lengths_of(fractions, measured)
    ahead = [*accumulate(reversed(lengths), initial=0.0)][::-1]            # of step i and later
    shortest, whole = lengths_of([0.0, 1.0], measured)
    settling = SETTLING * max(0.0, 1 - shortest / whole)                  # none if all are alike
    spent = expected = 0.0

    def left(seconds):
        nonlocal spent, expected, done
        kept = math.exp(-seconds / memory)
        spent = kept * spent + seconds
        expected = kept * expected + lengths[done]
        done += 1
        return spent / expected * ahead[done] * (1 - settling * fractions[done - 1])

    return left


class VerdictsLeft:
    """Seconds left, to be asked at each verdict.

    Samples go through attack and bounds a batch at a time, then those that are settled are reported
    at once; the others come late, one after the other, as branch and bound settles them. A late one
    is expected to take what such ones took so far and, until some came, all of them together what
    was before; the batches to come take what the ones so far do.
    """

    def __init__(self, batch):
        self.batch = batch
        self.begun = self.first = self.last = 0.0    # of this batch: start, first and last verdict
        self.at_once = 0                             # verdicts that came with its first one
        self.late, self.seconds = 0, 0.0             # late ones of the batches before, and of these

    def __call__(self, now, done, n):
        """now: seconds since the start. done: how many of n samples have a verdict."""
        place = (done - 1) % self.batch + 1
        size = min(self.batch, n - done + place)
        if place == 1 and done > 1:
            self.late += self.batch - self.at_once
            self.seconds += self.last - self.first
            self.begun = self.last
        if place == 1:
            self.first, self.at_once = now, 1
        before = self.first - self.begun
        if now - self.first <= before / 100:
            self.at_once = place
        self.last = now
        guess = before / max(1, size - self.at_once)
        seconds = self.seconds + now - self.first
        each = (seconds + guess) / (self.late + place - self.at_once + 1)
        rest = each * (size - place)
        seen = done - place + size
        return rest + (now + rest) / seen * (n - seen)
