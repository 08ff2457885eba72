"""What a row of back-substitution sees of a map: a window, while the maps are larger.

One neuron of a convolution depends on a small window of the map below, and, further down, on a
larger window of the next map. So its coefficients are kept for that window only:

    the bounded layer      the map below            the map below that
    . . . . .              . . . . . . .            . . . . . . . . .
    . . # . .   kernel 3   . . # # # . .  kernel 3  . . # # # # # . .
    . . . . .   -------->  . . # # # . .  ------->  . . # # # # # . .     stride 1 in this drawing
    . . . . .              . . # # # . .            . . # # # # # . .

The neuron at position (y, x) sees the rows  y*stride - padding + (0 .. kernel-1), columns alike.
What falls outside the map is zero padding: lines and inputs read there are 0, so the coefficients
there vanish by themselves. When the window outgrows the map, and below linear layers, a row holds
one coefficient for each neuron. Rows are A (P, B, G, R, Q), and d (P, B, G, R).
"""
import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from faster.backward import QuickBox, QuickLines
from faster.layers import spans
from relaxations import Lines


class View(NamedTuple):
    """What the rows at each position see of a map: a window, or all of it (kernel None)."""
    shape: tuple                   # of the map, (C, H, W) or (N,)
    positions: tuple = (1, 1)      # (Ho, Wo) of the bounded layer
    kernel: tuple = None
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    sample: torch.Tensor = None    # (P, U) of rows picked one by one: member * B + sample
    position: torch.Tensor = None  # (P, U) and their position, 0 <= position < G

    def size(self):
        """Q, the coefficients of a row."""
        return math.prod(self.shape if self.kernel is None else (self.shape[0], *self.kernel))

    def below(self, op):
        """The view of the inputs of op that comes of this view of its outputs."""
        if self.kernel is None or op.stride is None:
            return self._replace(shape=op.in_shape, kernel=None)
        along = zip(self.kernel, op.stride, spans(op.weight.shape[3:], op.dilation))
        kernel = tuple((K - 1) * s + span for K, s, span in along)
        if math.prod(kernel) >= 2 * math.prod(op.in_shape[1:]):
            return self._replace(shape=op.in_shape, kernel=None)
        stride = tuple(S * s for S, s in zip(self.stride, op.stride))
        along = zip(self.padding, op.stride, op.padding)
        padding = tuple(Q * s + p for Q, s, p in along)
        return self._replace(shape=op.in_shape, kernel=kernel, stride=stride, padding=padding)

    def cells(self, device):
        """The cells of the map that each position sees, (G, cells); H*W is padding."""
        size = self.shape[1:]
        return seen_cells(size, self.positions, self.kernel, self.stride, self.padding, device)

    def take(self, t):
        """What the rows see of t (P or 1, B, N): (P, B, G, 1, Q); if picked, (P, U, 1, 1, Q)."""
        if self.kernel is None:
            t = t[:, :, None]                                                   # (P, B, 1, N)
            if self.sample is not None:
                t = t.expand(len(self.sample), -1, -1, -1)
                t = t.flatten(0, 1)[self.sample]
            return t[..., None, :]
        cells = self.cells(t.device)
        t = t.unflatten(-1, (-1, self.shape[0]))
        t = F.pad(t, (0, 0, 0, 1))                                          # (P, B, H*W + 1, C)
        if self.sample is not None:
            at = self.sample[..., None] * t.shape[2] + cells[self.position]   # (P, U, cells)
            t = t.expand(len(at), -1, -1, -1).flatten(0, 2)
            t = t.index_select(0, at.flatten())
            return t.view(*at.shape[:2], 1, 1, -1)
        t = t.index_select(2, cells.flatten())
        return t.view(*t.shape[:2], len(cells), 1, -1)

    def spread(self, A, d):
        """Rows over windows as rows over the map: (P, B, G, R, Q) -> (P, B, 1, G*R, N)."""
        cells = self.cells(A.device)
        cells = cells[None, None] if self.sample is None else cells[self.position][:, :, None]
        A = A.unflatten(-1, (-1, self.shape[0]))
        A, at = torch.broadcast_tensors(A, cells[..., None, :, None])  # (P, B, G, R, cells, C)
        *lead, _, C = A.shape
        zeros = A.new_zeros(*lead, math.prod(self.shape[1:]) + 1, C)           # last: padding
        A = zeros.scatter(-2, at, A)[..., :-1, :].flatten(-2)
        d = d.expand(lead).flatten(2)
        return A.flatten(2, 3).unsqueeze(2), d.unsqueeze(2)


@lru_cache(maxsize=64)
def seen_cells(size, positions, kernel, stride, padding, device):
    with torch.inference_mode(False):      # the result is kept, and has to serve in training too
        (H, W), arange = size, partial(torch.arange, device=device)
        ys, xs = (arange(n)[:, None] * s - p + arange(k)
                  for n, s, p, k in zip(positions, stride, padding, kernel))
        ys, xs = ys[:, None, :, None], xs[None, :, None, :]                 # (Ho, 1, kh, 1), ...
        outside = (ys < 0) | (ys >= H) | (xs < 0) | (xs >= W)
        cells = (ys * W + xs).masked_fill(outside, H * W)
        return cells.flatten(2).flatten(0, 1)


class Windowed(NamedTuple):
    """An Op as a step for rows that see its outputs by a view."""
    op: tuple
    view: View

    def back(self, A, d):
        below, view = self.view.below(self.op), self.view
        if view.kernel and below.kernel:
            return self.op.back(A, d, view.kernel, below.kernel, (0, 0))
        return self.op.back(*(view.spread(A, d) if view.kernel else (A, d)))


def way_down(view, stages, lines, box):
    """The steps from the box up to stages[-1], whose outputs the rows see by the view; of the lines
    and the box, (P or 1, B, N) each, they have what the rows see."""
    steps, below_affine = [], True
    for ops, line in zip(stages[::-1], [*lines[::-1], None]):
        for op in reversed(ops):
            if below_affine and view.padding != (0, 0) and view.kernel:
                # No ReLU has been in between, so the coefficients on padding are not 0 yet.
                ones = torch.ones_like(box.lower[..., :1])
                inside = view.take(ones.expand(-1, -1, math.prod(view.shape)))
                steps.append(Lines(inside, inside, 0 * inside))
            steps.append(Windowed(op, view))
            view, below_affine = view.below(op), True
        if line is not None:
            steps.append(QuickLines(*(view.take(t) for t in line)))
            below_affine = False
    return [QuickBox(*(view.take(t) for t in box)), *steps[::-1]]


def sizes_down(view, stages):
    """The numbers of coefficients that one row holds, one after another, going down the stages."""
    sizes = [view.size()]
    for op in reversed([op for ops in stages for op in ops]):
        view = view.below(op)
        sizes.append(view.size())
    return sizes
