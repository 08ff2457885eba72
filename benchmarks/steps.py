"""What smoothing adds to a training step, by train.py's own log, here and in another checkout.

    git worktree add ../peer COMMIT
    python benchmarks/steps.py --peer ../peer --data-dir data

Each side is a checkout and its options: a plain gradient and RGS with 2 samples in 2 parts here,
RGS with 2 samples as it comes there. In turns each trains CNN3 on the same images of MNIST, at full
eps from the first step on, for two epochs; the seconds of a step are those of the second in
log.csv, the CPU seconds those of both. Ratios are medians over the turns: a turn has all sides, so
that what else the machine does meets all of them.

A checkout is one process, which runs what it is told to, so that nothing is imported in between.
"""
import argparse
import csv
import importlib
import io
import multiprocessing
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from statistics import median

import torch

import common              # no module of the checkout here: the sides would have it, not their own

HERE = Path(__file__).resolve().parent.parent
RUN = "--dataset mnist --net cnn3 --epochs 2 --ramp 0 --milestones 2 --device cpu --test-subset 1"
SIDES = {"gradient": ("here", "--opt grad"), "RGS in parts": ("here", "--opt rgs --parts 2"),
         "RGS there": ("there", "--opt rgs")}


def serve(checkout, threads, connection):
    """Run the commands of train.py that come, one by one, and answer with the seconds of a step, by
    the log, and with the CPU seconds of the whole training."""
    sys.path[:] = [checkout, *(p for p in sys.path if HERE not in (Path(p), *Path(p).parents))]
    train = importlib.import_module("train")
    torch.set_num_threads(threads)
    home = train if hasattr(train, "keep_memory") else importlib.import_module("plumbing.console")
    home.keep_memory()
    plain, cpu = train.train, []

    def timed(*args, **kwargs):
        start = time.process_time()
        rows = plain(*args, **kwargs)
        cpu.append(time.process_time() - start)
        return rows

    train.train = timed
    with suppress(EOFError):                                      # the parent has ended
        while True:
            words, silent = connection.recv(), io.StringIO()
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(silent), \
                    redirect_stderr(silent):
                train.main([*words, "--out", f"{folder}/run"])
                with open(f"{folder}/run/log.csv") as file:
                    first, second = (float(row["seconds"]) for row in csv.DictReader(file))
            connection.send((second - first, cpu[-1]))


def started(checkout, threads):
    """A function that makes a new process of the checkout run a command."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(checkout, threads, theirs), daemon=True).start()
    theirs.close()

    def ask(words):
        ours.send(words)
        return ours.recv()
    return ask


def compare(ask, relax, args):
    """{"seconds": {side: one of each turn}, "cpu": the same, "ratios": {name: [by log, by CPU]}}"""
    times = {side: [] for side in SIDES}
    words = [*RUN.split(), "--batch-size", str(args.batch), "--subset",
             str(args.batch * args.steps),
             "--relax", relax, "--data-dir", args.data_dir]
    for turn in range(args.pairs + 1):
        for side, (checkout, more) in SIDES.items():
            found = ask[checkout]([*words, *more.split()])
            if turn:                                              # the first warms up
                times[side].append(found)
    ratio = lambda a, b: [median(x[i] / y[i] for x, y in zip(times[a], times[b])) for i in (0, 1)]
    return dict(relax=relax, batch=args.batch, steps=args.steps,
                seconds={side: [t / args.steps for t, _ in found] for side, found in times.items()},
                cpu={side: [t / args.steps / 2 for _, t in found] for side, found in times.items()},
                to_gradient=ratio("RGS in parts", "gradient"),
                there_to_gradient=ratio("RGS there", "gradient"),
                faster=ratio("RGS there", "RGS in parts"))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--peer", required=True, help="another checkout")
    p.add_argument("--relax", nargs="+", default=["box", "crown-ibp", "deeppoly"])
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=10, help="in each of the two epochs")
    p.add_argument("--pairs", type=int, default=7, help="turns")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--data-dir", default="data")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    peer = str(Path(args.peer).resolve())
    commit = subprocess.run(["git", "-C", peer, "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    ask = {"here": started(str(HERE), args.threads), "there": started(peer, args.threads)}
    results, machine = [], common.machine("cpu")                 # as it is when the sides begin
    print("by the log, and by CPU seconds" + "".join(f"{side:>22}, ms" for side in SIDES)
          + "   RGS / gradient: in parts      there   times faster")
    for relax in args.relax:
        r = compare(ask, relax, args)
        results.append(r)
        both = "".join(f"{1e3 * median(r['seconds'][s]):16.0f}{1e3 * median(r['cpu'][s]):9.0f}"
                       for s in SIDES)
        print(f"{relax:30}{both}" + "".join("{:10.2f}{:6.2f}".format(*r[k]) for k in (
            "to_gradient", "there_to_gradient", "faster")), flush=True)
        common.write(args.out, **machine, peer=commit, results=results)


if __name__ == "__main__":
    main()
