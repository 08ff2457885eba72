"""What each piece of the fast path is worth: how many times slower the bounds are without it.

    python benchmarks/prices.py --data-dir data [--cases digits cnn3 cnn5] [--pairs 7]

Everything runs in one process, with and without one piece in turns, forward and backward; the
networks are as initialised. The pieces are those of faster/.
"""
import argparse
from contextlib import ExitStack
from itertools import product
from unittest import mock

import torch

import common                                       # first: it puts the checkout on the path
import bounds
import relaxations
from faster import backward, layers, network, rows
from plumbing.console import keep_memory


def all_of(l, u, stages, lines, box, budget, ascent=0):
    """unstable_rows, by bounding all rows."""
    low, high = rows.all_rows(stages, lines, box, budget)
    unstable = (l < 0) & (u > 0)
    return (torch.where(unstable, torch.maximum(l, low), l),
            torch.where(unstable, torch.minimum(u, high), u))


class Constant:
    """backward.Constant by autograd."""

    @staticmethod
    def apply(A, bias):
        return (A @ bias.mT).squeeze(-1)


PIECES = {  # name: where it is, and what takes its place
    "first_relu": [(rows, "can_fuse", lambda below, view: False)],
    "is_dense": [(layers.Op, "is_dense", lambda op, size: False)],
    "unstable_rows": [(network, "unstable_rows", all_of)],
    "sub_pixel": [(layers, "FEW", 0)],
    "backward": [(backward.QuickLines, "back", relaxations.Lines.back),
                 (backward.QuickBox, "back", relaxations.Box.back), (layers, "Constant", Constant)],
    "all of it": [(relaxations, "FAST", False)],
}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", nargs="+", default=["digits", "cnn3"], choices=bounds.CASES)
    p.add_argument("--state", default="init", choices=("init", "box", "deeppoly"))
    p.add_argument("--rows", nargs="+", default=["crown-ibp", "deeppoly", "skip-stable"],
                   choices=bounds.ROWS)
    p.add_argument("--pieces", nargs="+", default=list(PIECES)[:-1], choices=PIECES)
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--data-dir", default="data")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    keep_memory()
    results = []
    for case, row in product(args.cases, args.rows):
        task = bounds.problem(case, args.state, args.data_dir, "cpu")
        call = bounds.with_gradient(*bounds.ours(task, bounds.ROWS[row][0]))
        for piece in args.pieces:
            def slower():
                with ExitStack() as patched:
                    for replaced in PIECES[piece]:
                        patched.enter_context(mock.patch.object(*replaced))
                    call()
            times = common.in_turns({"with": call, "without": slower}, args.pairs, "cpu")
            ratio = common.ratio(times, "with", "without")
            print(f"{case:8}{row:12}{piece:16}{ratio:8.2f} times as long without it", flush=True)
            results.append(dict(case=case, row=row, piece=piece, ratio=ratio, times=times))
            common.write(args.out, **common.machine("cpu"), results=results)


if __name__ == "__main__":
    main()
