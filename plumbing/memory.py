"""How many rows of coefficients go down at once, so that the bounds of a call fit into memory."""
import math
import numbers

import torch
from torch.utils.checkpoint import checkpoint

# Rows are bounded in passes. The most coefficients at once in one, where more are no faster; and
# the memory that the passes of a call may hold, by default, in bytes (on a GPU: half of it).
CHUNK = {"cpu": 2 ** 23, "cuda": 2 ** 27, "mps": 2 ** 27}
MEMORY = {"cpu": 2 ** 31, "mps": 2 ** 32}


def default_memory(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return MEMORY[device.type]


class Budget:
    """Bytes that the passes of one call may hold: half for what is kept for backward, a quarter for
    the pass at work, a quarter in reserve for what is not counted."""

    def __init__(self, memory, t):
        memory = default_memory(t.device) if memory is None else memory
        if not isinstance(memory, numbers.Real) or not 0 <= memory < math.inf:
            raise ValueError(f"memory={memory} has to be a number of bytes")
        self.chunk, self.number = CHUNK[t.device.type], t.element_size()
        self.at_work, self.left = int(memory) // 4, int(memory) // 2

    def fit(self, rows, sizes, held):
        """How many times so many rows of so many coefficients go down in one pass, at least 1; and
        the bytes that this many rows keep for backward.

        held: numbers for each coefficient: it before and after its ReLU, its negative part, and
        lines of its own.
        """
        keeps = int(rows * held * sum(sizes) * self.number)
        works = keeps + 3 * rows * max(sizes) * self.number            # 3: what backward adds
        return max(1, min(self.chunk // (rows * max(sizes)), self.at_work // works)), keeps

    def run(self, bound, jobs, cost):
        """bound(*job) of all jobs, one after another. Those that the budget does not let keep what
        backward needs, cost bytes each, compute it again there: a third more time."""
        found = []
        for job in jobs:
            kept = not torch.is_grad_enabled() or cost <= self.left
            self.left -= cost if kept else 0
            found.append(bound(*job) if kept else checkpoint(
                bound, *job, use_reentrant=False, preserve_rng_state=False))
        return found
