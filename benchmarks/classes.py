"""Bounds of the margins, forward and backward, as the number of classes grows.

    python benchmarks/classes.py [--peer ../peer] [--out FILE.json]

One network (two hidden layers of 100, 28x28 random pixels), with K logits. Each number is the
median of the CPU seconds of several calls, by one thread; with --peer, those of another checkout,
which is called in turns. What is in proportion to K takes 5 times as long for 1,000 as for 200.
"""
import argparse
import importlib.util
import sys
import time
from pathlib import Path
from statistics import median

import torch

import common                                       # first: it puts the checkout on the path
import relaxations
import train

ROWS = {"box": dict(relax="box"), "crown-ibp": dict(relax="crown-ibp"), "deeppoly": dict()}


def relaxations_of(checkout):
    """The module of another checkout; the modules of plumbing it imports are its own, too."""
    names = [name for name in sys.modules if name.startswith("plumbing")]
    ours = {name: sys.modules.pop(name) for name in names}
    sys.path.insert(0, checkout)
    spec = importlib.util.spec_from_file_location("peer", Path(checkout) / "relaxations.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    sys.path.remove(checkout)
    sys.modules.update(ours)
    return peer


def problem(K, batch):
    torch.manual_seed(0)
    net = train.build_network("mlp", (1, 28, 28), K)
    return net, torch.rand(batch, 1, 28, 28), torch.randint(K, (batch,))


def cpu_seconds(module, net, x, y, options):
    begun = time.process_time()
    low = module.margin_lower_bounds(net, x, y, 0.1, **options)
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
    sides = {"here": relaxations}
    if args.peer:
        sides["peer"] = relaxations_of(str(Path(args.peer).resolve()))
    results = []
    for row in args.rows:
        for K in args.classes:
            task = problem(K, args.batch)
            times = {side: [] for side in sides}
            for turn in range(args.turns + 1):
                for side, module in sides.items():
                    seconds = cpu_seconds(module, *task, ROWS[row])
                    times[side] += [seconds] * (turn > 0)                # the first one warms up
            seconds = {side: median(each) for side, each in times.items()}
            print(f"{row:10} {K:5} classes" + "".join(f"{s:10.3f} s {side}"
                                                      for side, s in seconds.items()), flush=True)
            results.append(dict(row=row, K=K, seconds=seconds, times=times))
            common.write(args.out, **common.machine("cpu"), batch=args.batch, results=results)


if __name__ == "__main__":
    main()
