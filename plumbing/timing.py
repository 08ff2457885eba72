"""How long a training, or the verdicts of a test set, will take."""
import math
import time
from itertools import accumulate

import numpy as np

from plumbing.processes import ranks

# Fractions of the radius, where a step is measured: just below the whole one, too, since a loss may
# change its kind there (TAPS does).
FRACTIONS = 0.0, 1 / 16, 1 / 4, 1 / 2, 1 - 1e-6, 1.0
# Steps at full radius get shorter while the network trains, as neurons become stable: those ahead
# took 0.5 to 0.9 of what was measured (cnn3 by DeepPoly, MNIST at 0.1 and 0.3, CIFAR-10).
SETTLING = 0.2


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
    """Of steps at these fractions of the radius, from seconds_at."""
    return np.interp(fractions, list(seconds), list(seconds.values())).tolist()


def time_left(fractions, done, measure=None, memory=20.0):
    """A function seconds -> seconds left, to be called after each step with what it took. One at
    full radius may be ten times as long as the first ones: more neurons are unstable, and DeepPoly
    substitutes these only.

    fractions: of the radius, in all steps, of which so many are done. measure(): what seconds_at
    returns for the network as it is, up to a factor: that of the last steps, about memory seconds
    of them. It is called now and, since bounds change with the weights, every minute of the ramp,
    or so much more rarely that it takes 2 % of the time. Without it all steps count the same.
    """
    ahead, lengths, spent, expected, again, settling = [], [], 0.0, 0.0, 0.0, 0.0

    def renew():
        nonlocal ahead, lengths, spent, expected, again, settling
        begun = time.time()
        seconds = measure() if measure else {0.0: 1.0, 1.0: 1.0}
        lengths = lengths_of(fractions, seconds)
        settling = SETTLING * max(0.0, 1 - seconds[0.0] / seconds[1.0])    # none if all are alike
        ahead = [*accumulate(reversed(lengths), initial=0.0)][::-1]    # of step i and later
        again = time.time() + max(60.0, 50 * (time.time() - begun))
        spent = expected = 0.0

    def left(seconds):
        nonlocal spent, expected, done
        if measure and ranks()[1] == 1 and time.time() > again and fractions[done] < 1:
            renew()
        kept = math.exp(-seconds / memory)
        spent = kept * spent + seconds
        expected = kept * expected + lengths[done]
        done += 1
        return spent / expected * ahead[done] * (1 - settling * fractions[done - 1])

    renew()
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
