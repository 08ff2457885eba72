"""Bounds of the margins, forward and backward, as the number of classes grows.

    python benchmarks/classes.py [--peer ../peer] [--out FILE.json]

One network (two hidden layers of 100, 28x28 random pixels), with K logits. Each number is the
median of the CPU seconds of several calls, by one thread; with --peer, those of another checkout,
which is called in turns. What is in proportion to K takes 5 times as long for 1,000 as for 200.
"""
import argparse
import importlib
import sys
import time
from pathlib import Path
from statistics import median

import torch

import common                                       # first: it puts the checkout on the path
import train

ROWS = {"box": dict(relax="box"), "crown-ibp": dict(relax="crown-ibp"), "deeppoly": dict()}


def modules_of(checkout):
    """{name: module} of the relaxations of a checkout and of all that they import from it."""
    def named():
        return [m for m in sys.modules if m.split(".")[0] in ("relaxations", "faster", "plumbing")]

    before = {name: sys.modules.pop(name) for name in named()}
    sys.path.insert(0, str(Path(checkout).resolve()))
    importlib.import_module("relaxations")
    if (Path(checkout) / "faster").exists():
        importlib.import_module("faster.network")
    found = {name: sys.modules.pop(name) for name in named()}
    del sys.path[0]
    sys.modules.update(before)
    return found


def problem(K, batch):
    torch.manual_seed(0)
    net = train.build_network("mlp", (1, 28, 28), K)
    return net, torch.rand(batch, 1, 28, 28), torch.randint(K, (batch,))


def cpu_seconds(modules, net, x, y, options):
    sys.modules.update(modules)                        # bounds import some of theirs when called
    begun = time.process_time()
    low = modules["relaxations"].margin_lower_bounds(net, x, y, 0.1, **options)
    torch.logsumexp(-low, -1).mean().backward()
    return time.process_time() - begun


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--classes", nargs="+", type=int, default=[10, 200, 1000])
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--peer", help="another checkout")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    torch.set_num_threads(1)
    sides = {"here": modules_of(Path(__file__).parent.parent)}
    if args.peer:
        sides["peer"] = modules_of(args.peer)
    results = []
    for row in args.rows:
        for K in args.classes:
            task = problem(K, args.batch)
            times = {side: [] for side in sides}
            for turn in range(args.turns + 1):
                for side, modules in sides.items():
                    seconds = cpu_seconds(modules, *task, ROWS[row])
                    times[side] += [seconds] * (turn > 0)                # the first one warms up
            seconds = {side: median(each) for side, each in times.items()}
            print(f"{row:10} {K:5} classes" + "".join(f"{s:10.3f} s {side}"
                                                      for side, s in seconds.items()), flush=True)
            results.append(dict(row=row, K=K, seconds=seconds, times=times))
            common.write(args.out, **common.machine("cpu"), batch=args.batch, results=results)


if __name__ == "__main__":
    main()
