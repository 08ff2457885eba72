"""The network whose bounds are those of the heart of relaxations.py, faster."""
import torch
import torch.nn.functional as F

from faster.backward import QuickBox, QuickLines
from faster.layers import chw, hwc, read_op
from faster.rows import all_rows, parts_of, unstable_rows
from faster.windows import View, sizes_down
from plumbing.precision import finite
from relaxations import (Box, Network, best_slopes, for_rows, interleaved, minus,
                         no_checkpoint, relax_relu)


class FastNetwork(Network):
    """A Network with stages of Ops. Its rows, and the lines and the box that they meet, have maps
    in the order (height, width, channel); its bounds have PyTorch's."""

    @property
    def K(self):
        return self.shapes[-1][0]

    def layouts(self):
        """What each stage reads and, last, the logits: (C, H, W) or (N,)."""
        layouts = [[op for ops in self.stages for op in ops][-1].out_shape]
        for ops in reversed(self.stages):
            layouts.append(ops[0].in_shape if ops else layouts[-1])
        return layouts[::-1]

    def ordered(self, t, k):
        return hwc(t, self.layouts()[k])

    def restored(self, t, k):
        return chw(t, self.layouts()[k])

    def ordered_box(self, box, k):
        return Box(*(self.ordered(t, k) for t in box))

    def neurons(self, box, ask):
        if not ask.substitute:
            return Network.neurons(self, box, ask)
        bounds, lines, inputs, box = [], [], box, self.ordered_box(box, 0)
        for s, ops in enumerate(self.stages[:-1]):
            l, u = inputs
            exact = not ops or s == 0 and len(ops) == 1
            way = self.stages[:s + 1], lines, box, ask.budget
            if exact or ask.skip_stable:
                for op in ops:
                    l, u = op.interval(l, u)
            if not exact and ask.skip_stable:
                l, u = unstable_rows(l, u, *way)
            elif not exact:
                l, u = all_rows(*way)
            if not exact and ask.ascent:
                l, u = unstable_rows(l, u, *way, ask.ascent)
            bounds.append(Box(l, u))
            ordered = self.ordered_box(bounds[-1], s + 1)
            lines = [*lines, relax_relu(*ordered, ask.slope)]
            inputs = F.relu(l), F.relu(u)
        return bounds

    def margins(self, box, y, bounds, ask):
        """Samples go down in passes; no row is spent on the margin of y over itself."""
        P, K, n = self.P, self.K, len(y)
        if K == 1:               # nothing to bound; and where there are no rows PyTorch may crash
            return box.lower.new_zeros(P, n, 1)
        W, c = self.logits(box.lower)
        if ask.relax == "box":
            box, bounds = Box(*map(F.relu, bounds[-1])) if bounds else box, []
            if K <= 32:
                return self.box_of_few_classes(W, c, box, y)
        stages, start = self.stages[:len(bounds)], len(self.stages) - 1 - len(bounds)
        below = enumerate([box, *bounds], start)
        maps = [self.ordered_box(pair, k) for k, pair in below]

        def of_samples(b):
            some, *pairs = (for_rows(part) for part in parts_of(maps, slice(b, b + samples)))
            lines = [QuickLines(*relax_relu(*pair, ask.slope)) for pair in pairs]
            way = [QuickBox(*some), *interleaved([*stages, []], lines)]
            return best_slopes(*self.rows(W, c, y[b:b + samples]), way, ask.ascent, no_checkpoint)

        sizes = sizes_down(View(W.shape[2:]), stages)
        fit, keeps = ask.budget.fit(P * K, sizes, held=3 + 3 / K)
        samples = min(n, fit)
        jobs = [(b,) for b in range(0, n, samples)]
        low = ask.budget.run(of_samples, jobs, keeps * samples)
        return self.filled_up(torch.cat(low, 1), y)

    def box_of_few_classes(self, W, c, box, y):
        """The rows of all labels in one product, which serves all samples."""
        labels, which = y.unique(return_inverse=True)
        W = self.restored(W, len(self.stages) - 1)
        A, d = (t.flatten(1, 2) for t in self.rows(W, c, labels))              # (P, L*(K-1), N)
        low = d[:, None] + box.lower @ A.mT
        low = low + (box.upper - box.lower) @ minus(A).mT                      # (P, B, L*(K-1))
        low = low.unflatten(2, (len(labels), -1))
        low = low[:, torch.arange(len(y)), which]
        return self.filled_up(finite(low), y)

    def logits(self, like):
        """The logits as functions of what the last stage reads: W (P, K, N) and c (P, K)."""
        ops = self.stages[-1]
        if ops and ops[-1].stride is None:                                     # no product with eye
            *ops, last = ops
            W, c = hwc(last.weight, last.in_shape), last.bias
        else:
            W = self.ordered(torch.eye(self.K).to(like), len(self.stages))
            W = W.expand(self.P, -1, -1)
            c = W.new_zeros(W.shape[:2])
        for op in reversed(ops):
            W, c = op.back(W, c)
        return W, c

    def rows(self, W, c, y):
        """logit[y] - logit[k] for the other classes k: A (P, B, K-1, N) and d (P, B, K-1)."""
        def against(t):
            of_others = t.index_select(1, others.flatten()).unflatten(1, others.shape)
            return t.index_select(1, y).unsqueeze(2) - of_others

        others = self.others(y)
        return against(W), against(c)

    def others(self, y):
        """The other classes of each label, (B, K-1)."""
        return (y[:, None] + torch.arange(1, self.K).to(y)) % self.K

    def filled_up(self, low, y):
        """(P, B, K-1) of the other classes -> (P, B, K), with 0 for the label itself."""
        low_of_all = low.new_zeros(self.P, len(y), self.K)
        others = self.others(y).expand(self.P, -1, -1)
        return low_of_all.scatter(2, others, low)


def fast_network(network):
    """The FastNetwork of a Network; None, if it has no layer, or one that read_op does not know."""
    stages, source = [[] for _ in network.stages], ()      # source: shape of what the last Op gives
    for ops, layers in zip(stages, network.stages):
        for layer in layers:
            if not read_op(layer, ops, source):
                return None
            source = ops[-1].out_shape
    return FastNetwork(stages, network.shapes, network.P) if any(stages) else None
