"""What a GPU is to reach, large populations, and the sizes that suit it.

    python benchmarks/device.py --device cuda --data-dir DIR --out FILE.json

targets     a DeepPoly bound with its gradient, and a step of PGPE, against the times aimed at on an
            H100 or H200
population  the losses of P = 1 to 1,024 perturbed networks, so many at once
passes      DeepPoly with other values of plumbing.memory.CHUNK and of memory=

Each row is printed and written as soon as it is measured; what does not fit says so. --tiny does
the same with the digits and small numbers, on a CPU in seconds.
"""
import argparse
from functools import partial
from statistics import median
from unittest import mock

import torch

import bounds
import common                                       # puts the checkout on the path
import gls
import population
import relaxations
from plumbing.console import keep_memory
from plumbing.memory import CHUNK, default_memory

RELAXED = "box", "crown-ibp", "deeppoly"


def measure(call, args):
    """(ms, MiB) of a call, medians after a warm-up, MiB on a GPU only; (None, None): no memory."""
    cuda = args.device == "cuda"
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = common.in_turns({"": call}, args.pairs, args.device)[""]
        peak = torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else None
        return 1e3 * median(times), peak
    except torch.OutOfMemoryError:
        return None, None


def targets(args):
    """A bound's time is the median of its turns; that of PGPE depends on how many run at once."""
    case, P = ("digits", 8) if args.tiny else ("cnn3-256", 256)
    task = bounds.problem(case, "init", args.data_dir, args.device)
    for row in ("deeppoly", "skip-stable"):
        call = bounds.with_gradient(*bounds.sides(task, row, None))
        yield dict(row=row, case=case, aim=15.0), call
    dataset, batch = ("digits", 8) if args.tiny else ("mnist", 64)
    loss, theta, _ = population.problem(dataset, "cnn3", "box", batch, args.data_dir, args.device)
    for chunk in (P // 16, P // 4, P):
        generator = torch.Generator(args.device).manual_seed(0)
        call = partial(gls.pgpe, loss, theta, population.SIGMA, P // 2, generator, chunk)
        yield dict(row="pgpe", P=P, chunk=chunk, aim=40.0), call


def populations(args):
    dataset, batch, most = ("digits", 8, 8) if args.tiny else ("mnist", 64, 1024)
    for relax in RELAXED:
        loss, theta, chosen = population.problem(dataset, "cnn3", relax, batch, args.data_dir,
                                                 args.device)
        for P in (P for P in (1, 4, 16, 64, 256, 1024) if P <= most):
            thetas = population.perturbed(theta, P)
            for chunk in sorted({min(P, n) for n in (1, 16, 64, 256, 1024)}):
                if chunk > 1 or P <= 16:                       # a loop over more would take minutes
                    yield (dict(row=relax, P=P, chunk=chunk, chosen=chosen),
                           partial(population.losses, loss, thetas, chunk))


def passes(args):
    kind = torch.device(args.device).type
    for case in ("digits",) if args.tiny else ("cnn3-256", "cnn5"):
        net, x, y, eps = bounds.problem(case, "init", args.data_dir, args.device)
        most = default_memory(x.device)
        sizes = [(2 ** k, most) for k in ((21, 23) if args.tiny else (21, 23, 25, 27, 29))]
        sizes += [(CHUNK[kind], most // n) for n in (8, 64, 512)]
        for chunk, memory in sizes:
            def call():
                with mock.patch.dict(CHUNK, {kind: chunk}):
                    low = relaxations.margin_lower_bounds(net, x, y, eps, "deeppoly", memory=memory)
                    torch.logsumexp(-low, -1).mean().backward()
            yield dict(row="deeppoly", case=case, CHUNK=chunk, memory=memory), call


PARTS = dict(targets=targets, population=populations, passes=passes)


def show(part, row):
    """A measured row as a line of text."""
    what = "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("ms", "MiB", "aim", "part"))
    ms = "does not fit" if row["ms"] is None else f"{row['ms']:.1f} ms"
    aim = f", the aim is {row['aim']:g} ms" if "aim" in row else ""
    return f"{part}: {what}: {ms}{aim}" + (f", {row['MiB']:.0f} MiB" if row["MiB"] else "")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--pairs", type=int, default=7, help="measurements of each row")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="digits and small numbers")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    keep_memory()
    results = []
    for part in args.parts:
        for row, call in PARTS[part](args):
            ms, peak = measure(call, args)
            results.append(dict(part=part, **row, ms=ms, MiB=peak))
            print(show(part, results[-1]), flush=True)
            common.write(args.out, **common.machine(args.device), results=results)


if __name__ == "__main__":
    main()
