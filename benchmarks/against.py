"""This checkout against another one, or its plain heart against its fast path, in one run.

    git worktree add ../peer COMMIT
    python benchmarks/against.py --peer ../peer --data-dir data       both checkouts, in turns
    python benchmarks/against.py --heart --data-dir data              FAST = False against True

Each row: one network, one batch, one relaxation; the margins alone (forward), or with the gradient
of their cross-entropy with respect to all parameters (forward + backward). The population is that
of PGPE: 16 perturbed parameter vectors at once, and the gradients of their losses.

The two sides are processes of their own, new for each row, which load the same weights and images
from one file. A side works only when it is told to, so that they take strict turns. Its first call
gives the peak of memory, its second the numbers to compare, the others the times. "times" is this
side in units of the other: of the times, the median over the turns; below 1, this side is better.
Expect float32 to differ by 1e-5 of the largest number, and --double by 1e-13.

Only what has a stable signature is called in the peer: build_network and margin_lower_bounds.
"""
import argparse
import ctypes
import importlib
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median

import torch

import common              # no module of the checkout here: the sides would have it, not their own

HERE = Path(__file__).resolve().parent.parent
CASES = {"cnn3": "cnn3", "cnn5": "cnn5", "digits": "digits", "population": "digits"}  # of bounds.py
ROWS = {
    "box": dict(relax="box"), "crown-ibp": dict(relax="crown-ibp"),
    "deeppoly": dict(relax="deeppoly", skip_stable=False),
    "skip-stable": dict(relax="deeppoly", skip_stable=True),
}
WHAT = ("forward", "forward+backward")
HEART = {"digits": list(ROWS), "cnn3": ["box", "crown-ibp"]}     # what the heart alone can manage
P, SIGMA = 16, 0.01          # the population
LONG = 2.0                   # seconds: a row whose turns are short gets more of them, up to so long


# ------------------------------------------------------------------------------- one of the sides

def load(train, task):
    """The network of a task, as the checkout of this side builds it."""
    state, statistics = task["state"], None
    if "0.running_mean" in state:                      # it begins with a layer that normalises
        statistics = state["0.running_mean"].tolist(), state["0.running_var"].sqrt().tolist()
    net = train.build_network(task["net"], task["x"].shape[1:], task["classes"],
                              statistics=statistics)
    net.load_state_dict(state)
    return net.to(task["x"].dtype).eval()


def prepare(relaxations, net, task, images, options):
    """A call that returns {name: tensor}: the margins, and the gradients if the task asks for them.
    """
    x, y, params = task["x"][:images], task["y"][:images], task["params"]
    leaves = dict(net.named_parameters()) if params is None else params
    backward = task["what"] == "forward+backward"
    for leaf in leaves.values():
        leaf.requires_grad_(backward)

    def call():
        with torch.set_grad_enabled(backward):
            margins = relaxations.margin_lower_bounds(net, x, y, task["eps"], params=params,
                                                      **options)
        result = {"margins": margins.detach()}
        if backward:
            loss = torch.logsumexp(-margins, -1).mean(-1).sum()         # the sum is over members
            result |= zip(leaves, torch.autograd.grad(loss, list(leaves.values())))
        return result
    return call


def exact_peak(warm_up, call):
    """MiB that the call takes at its peak, to 1 % or 0.3 MiB: every block of 64 KiB or more
    is a mapping of its own, so that what is freed goes back at once and no gaps are counted."""
    M_MMAP_THRESHOLD = -3                              # of glibc's malloc.h
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2 ** 16)
    return common.peak(lambda: (warm_up, call), (), "cpu")


def keep_memory(train):
    """As a training run does; an older checkout has the function in another place."""
    home = train if hasattr(train, "keep_memory") else importlib.import_module("plumbing.console")
    home.keep_memory()


def serve(checkout, fast, threads, path, connection):
    """A side: load the task in path, then do what the parent says, once each time."""
    sys.path[:] = [checkout, *(p for p in sys.path if HERE not in (Path(p), *Path(p).parents))]
    relaxations, train = map(importlib.import_module, ("relaxations", "train"))
    torch.set_num_threads(threads)
    if hasattr(relaxations, "FAST"):
        relaxations.FAST = fast
    elif not fast:
        print(f"{checkout} has no fast path to switch off", file=sys.stderr)
    task = torch.load(path, weights_only=True)
    net = load(train, task)
    warm_up = prepare(relaxations, net, task, 1, ROWS["box"])
    call = prepare(relaxations, net, task, None, task["options"])
    actions = {"peak": lambda: exact_peak(warm_up, call),
               "keep memory": lambda: keep_memory(train),
               "result": lambda: {name: t.numpy() for name, t in call().items()},
               "seconds": lambda: common.seconds(call, "cpu")}
    while wish := connection.recv():
        connection.send(actions[wish]())


# ----------------------------------------------------------------------------------- the parent

@contextmanager
def started(checkout, fast, threads, path):
    """A function that makes a new side do something, and returns what came of it.
    It raises EOFError or ConnectionError if the side has ended; why, is on stderr."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(checkout, fast, threads, path, theirs))
    process.start()
    theirs.close()

    def ask(wish):
        time.sleep(0.01)                               # until the other side's threads are idle
        ours.send(wish)
        return ours.recv()

    try:
        yield ask
    finally:
        process.terminate()
        process.join()


def make_task(args, case, state, row, what):
    """All that a side needs to know, as tensors and plain values."""
    import bounds                                      # which imports the modules of this checkout
    name = CASES[case]
    net, x, y, eps = bounds.problem(name, state, args.data_dir, "cpu")
    dtype = torch.float64 if args.double else torch.float32
    params, generator = None, torch.Generator().manual_seed(0)
    if case == "population":
        params = {k: (p + SIGMA * torch.randn(P, *p.shape, generator=generator)).to(dtype).detach()
                  for k, p in net.named_parameters()}
    return dict(net=bounds.CASES[name][1], classes=net(x[:1]).shape[1], state=net.state_dict(),
                params=params, x=x.to(dtype), y=y, eps=eps, options=ROWS[row], what=what)


def difference(a, b, names):
    """The largest difference in units of the largest number of its tensor; None without names."""
    ratios = [float(abs(a[k] - b[k]).max() / max(abs(b[k]).max(), 1e-30)) for k in names]
    return max((math.inf if math.isnan(r) else r for r in ratios), default=None)


def compare(sides, task, args):
    """Measure a task on both sides: {"MiB": ..., "times": ..., "ratio": ..., ...}."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "task.pt")
        torch.save(task, path)
        with started(*sides[0], args.threads, path) as one, \
                started(*sides[1], args.threads, path) as other:
            memory = one("peak"), other("peak")
            one("keep memory"), other("keep memory")
            a, b = one("result"), other("result")
            times, end = [], time.time() + LONG
            while len(times) < args.pairs or time.time() < end:
                times.append((one("seconds"), other("seconds")))
    gradients = [k for k in a if k != "margins"]
    return dict(MiB=memory, memory=memory[0] / max(memory[1], 1), times=times,
                seconds=[median(t) for t in zip(*times)], ratio=median(t / s for t, s in times),
                values=difference(a, b, ["margins"]), gradients=difference(a, b, gradients))


def line(r):
    """A row of the table."""
    text = "{case:11}{state:9}{row:12}{what:17}".format(**r)
    if "seconds" not in r:
        return text + "  failed"
    (ours, theirs), (mine, yours) = r["seconds"], r["MiB"]
    text += f"{1e3 * ours:10.1f}{1e3 * theirs:10.1f}{r['ratio']:8.3f}{len(r['times']):7}"
    text += f"{mine:12.1f}{yours:7.1f}{r['memory']:7.2f}{r['values']:9.1e}"
    return text if r["gradients"] is None else text + f"{r['gradients']:11.1e}"


def verdict(results):
    """The worst of all rows."""
    rows = [r for r in results if "ratio" in r]
    most = lambda *names: max((r[k] or 0 for r in rows for k in names), default=math.nan)
    faster = sum(r["ratio"] < 1 for r in rows)
    return (f"{len(rows)} rows, {len(results) - len(rows)} failed; faster in {faster}; at most "
            f"{most('ratio'):.3f} times as long and {most('memory'):.2f} times the memory; "
            f"largest relative difference {most('values', 'gradients'):.1e}")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--peer", help="another checkout")
    which.add_argument("--heart", action="store_true", help="this one with FAST = False and True")
    p.add_argument("--cases", nargs="+", choices=CASES)
    p.add_argument("--states", nargs="+", choices=("init", "box", "deeppoly"),
                   default=["init", "box", "deeppoly"], help="initial, or trained by")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    p.add_argument("--pairs", type=int, default=7, help="turns, at least")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--double", action="store_true", help="in float64")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    args.cases = args.cases or (list(HEART) if args.heart else ["cnn3", "cnn5", "population"])
    return args


def main():
    args = parse_args()
    peer = str(HERE if args.heart else Path(args.peer).resolve())
    sides = (str(HERE), not args.heart), (peer, True)
    commit = subprocess.run(["git", "-C", peer, "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    ours, theirs = ("heart", "fast") if args.heart else ("here", "there")
    print(f"{'':49}{'ms: ' + ours:>10}{theirs:>10}{'times':>8}{'turns':>7}{'MiB: ' + ours:>12}"
          f"{theirs:>7}{'times':>7}{'values':>9}{'gradients':>11}")
    results = []
    for case, state, row, what in product(args.cases, args.states, args.rows, args.what):
        if args.heart and row not in HEART.get(case, ROWS):
            continue
        result = dict(case=case, state=state, row=row, what=what)
        try:
            result |= compare(sides, make_task(args, case, state, row, what), args)
        except (EOFError, ConnectionError):
            print("a side has failed, see above", file=sys.stderr)
        results.append(result)
        print(line(result), flush=True)
        common.write(args.out, **common.machine("cpu"), peer=commit, heart=args.heart,
                     double=args.double, side_threads=args.threads, results=results)
    print(verdict(results))


if __name__ == "__main__":
    main()
