"""Time and memory of the bounds, against auto_LiRPA where it can be imported.

    git clone https://github.com/Verified-Intelligence/auto_LiRPA       (0.7.1)
    PYTHONPATH=auto_LiRPA python benchmarks/bounds.py --data-dir data

Each row: one network, one batch, one relaxation; forward (no gradient), and forward + backward of
the loss that training uses. The two implementations take turns on the same tensors, and auto_LiRPA
runs in the faster of its two modes for convolutions (patches, matrix), found by a run on 2 images.
Its settings: adaptive slopes as here; sparse_intermediate_bounds=False for the textbook rows (then
both compute the same numbers: see the last column), its default for skip_stable. Memory is measured
in a process of its own. The networks: as initialised, and trained by train.py on real images, for a
few epochs, with box and with DeepPoly. (For a CNN7 trained by DeepPoly there is no time.)

On a CPU much depends on the allocator: train.py tells it to keep freed memory (keep_memory), which
helps auto_LiRPA even more. By default both get this help here; --fresh-memory denies it to both.

--profile shows instead where our forward pass spends its time.
"""
import argparse
import contextlib
import importlib.util
import io
import os
import sys
import time
import warnings
from collections import Counter
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import torch

import common                                       # first: it puts the checkout on the path
import relaxations
import train
from faster.layers import Op
from faster.windows import Windowed
from plumbing.console import keep_memory
from plumbing.data import CIFAR_STATISTICS, load_dataset

os.environ["PYTHONWARNINGS"] = "ignore"              # torch.jit.script in auto_LiRPA
warnings.simplefilter("ignore")
CASES = {  # name: (data set, network, batch, training radius, images and epochs of training)
    "digits": ("digits", "cnn3", 64, 0.1, 1437, 3),
    "cnn3": ("mnist", "cnn3", 64, 0.1, 2000, 3),
    "cnn3-256": ("mnist", "cnn3", 256, 0.1, 2000, 3),
    "cnn5": ("cifar10", "cnn5", 16, 2 / 255, 128, 2),
    "cnn7": ("cifar10", "cnn7", 1, 2 / 255, 128, 2),
    "cnn7-bn": ("cifar10", "cnn7-bn", 1, 2 / 255, 128, 2),
}
ROWS = {  # name: (our options, auto_LiRPA's method and options)
    "box": (dict(relax="box"), "IBP", {}),
    "crown-ibp": (dict(relax="crown-ibp"), "CROWN-IBP", {"sparse_intermediate_bounds": False}),
    "deeppoly": (dict(relax="deeppoly"), "CROWN", {"sparse_intermediate_bounds": False}),
    "skip-stable": (dict(relax="deeppoly", skip_stable=True), "CROWN", {}),
}


def run_folder(case, state, data_dir):
    """Train the network of a case, once; later calls find its run folder."""
    dataset, net, batch, eps, images, epochs = CASES[case]
    folder = Path("runs") / f"bench-{dataset}-{net}-{state}"
    if not (folder / "log.csv").is_file():
        print(f"training {folder} ...", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*f"--dataset {dataset} --net {net} --relax {state} --opt grad --eps {eps} "
                        f"--subset {images} --epochs {epochs} --ramp 1 --batch-size 32 --lr 1e-3 "
                        f"--test-subset 1 --out {folder} --data-dir".split(), data_dir])
    return folder


@lru_cache(maxsize=2)
def problem(case, state, data_dir, device):
    """(net, images, labels, eps)."""
    dataset, name, batch, eps, _, _ = CASES[case]
    data = load_dataset(dataset, data_dir)
    if state == "init":
        torch.manual_seed(0)
        statistics = CIFAR_STATISTICS if dataset == "cifar10" else None
        net = train.build_network(name, data.x_test.shape[1:], data.classes, statistics=statistics)
    else:
        net, *_ = train.load_run(run_folder(case, state, data_dir))
    return net.to(device), data.x_test[:batch].to(device), data.y_test[:batch].to(device), eps


def few(problem, n):
    net, x, y, eps = problem
    return net, x[:n], y[:n], eps


def ours(problem, options):
    net, x, y, eps = problem
    return net, lambda: relaxations.margin_lower_bounds(net, x, y, eps, **options)


def theirs(problem, method, options, conv_mode):
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    net, x, y, eps = problem
    options = {"relu": "adaptive", "conv_mode": conv_mode, **options}
    bounded = BoundedModule(net, torch.zeros_like(x[:1]), bound_opts=options, device=x.device)
    eye = torch.eye(bounded(x[:1]).shape[1], device=x.device)
    C = eye[y][:, None] - eye

    def margins():
        ball = PerturbationLpNorm(norm=float("inf"), x_L=(x - eps).clamp(min=0),
                                  x_U=(x + eps).clamp(max=1))
        return bounded.compute_bounds(x=(BoundedTensor(x, ball),), C=C, method=method,
                                      bound_upper=False)[0]
    return bounded, margins


def forward(net, margins):
    def call():
        with torch.no_grad():
            return margins()
    return call


def with_gradient(net, margins):
    def call():
        net.zero_grad()
        torch.logsumexp(-margins(), -1).mean().backward()
    return call


def sides(task, row, mode):
    options, method, their_options = ROWS[row]
    return ours(task, options) if mode is None else theirs(task, method, their_options, mode)


def prepare_peak(case, state, data_dir, device, row, mode, run):
    """For common.peak_memory: a warm-up on one image, then the call."""
    task = problem(case, state, data_dir, device)
    return run(*sides(few(task, 1), "box", None)), run(*sides(task, row, mode))


def try_mode(case, row, data_dir, device, mode, keep):
    """Seconds of auto_LiRPA in one of its modes, on 2 images, of untrained weights."""
    if keep:
        keep_memory()
    task = few(problem(case, "init", data_dir, device), 2)
    call = (with_gradient if case != "cnn7" else forward)(*sides(task, row, mode))
    return min(common.seconds(call, device) for _ in range(2))


@lru_cache(maxsize=None)
def best_mode(case, row, data_dir, device, keep):
    """The faster of auto_LiRPA's two ways to keep a convolution's coefficients; None: neither.

    Tried on 2 images, in processes of their own: the slower one may not fit into the memory.
    """
    found = {}
    for mode in ("patches", "matrix"):
        try:
            found[mode] = common.alone(try_mode, case, row, data_dir, device, mode, keep,
                                       device=device)
        except Exception as e:         # out of memory or time, or a layer that it cannot do
            reason = (str(e).strip().splitlines() or [""])[-1][:200]
            print(f"  auto_LiRPA {mode}: {type(e).__name__}: {reason}", file=sys.stderr)
    return min(found, key=found.get) if found else None


def measure(case, state, row, args):
    task = problem(case, state, args.data_dir, args.device)
    result = dict(case=case, state=state, row=row, batch=len(task[1]))
    grads = [("forward", forward), ("forward+backward", with_gradient)]
    if case.startswith("cnn7"):
        grads = grads[:1]
    mode = best_mode(case, row, args.data_dir, args.device,
                     not args.fresh_memory) if args.peer else None
    for name, run in grads:
        calls = {"ours": run(*sides(task, row, None))}
        if mode:
            calls["auto_LiRPA"] = run(*sides(task, row, mode))
            if name == "forward":
                a, b = calls["ours"](), calls["auto_LiRPA"]()
                result |= dict(mode=mode, scale=a.abs().max().item(),
                               difference=(a - b).abs().max().item())
        times = common.in_turns(calls, args.pairs, args.device)
        result[name] = {k: median(t) for k, t in times.items()} | dict(times=times)
        if mode:
            result[name]["ratio"] = common.ratio(times, "ours", "auto_LiRPA")
        calls = None
        if args.memory:
            where = case, state, args.data_dir, args.device, row
            result[name]["MiB"] = {
                who: common.peak_memory(prepare_peak, (*where, how, run), args.device)
                for who, how in (("ours", None), ("auto_LiRPA", mode)) if who in times}
    return result


def profile(case, state, row, args):
    """Print the seconds of one forward pass by step of back-substitution and by what it works on:
    Op is an affine layer, Windowed one as windows see it (by an Op). The rest is the first ReLU."""
    spent, calls = Counter(), Counter()

    def timed(step):
        back = step.back

        def call(self, A, d, *more):
            start = time.perf_counter()
            found = back(self, A, d, *more)
            key = step.__name__, A.shape[-1]
            spent[key] += time.perf_counter() - start
            calls[key] += 1
            return found
        return call

    task = problem(case, state, args.data_dir, args.device)
    call = forward(*sides(task, row, None))
    call()
    with contextlib.ExitStack() as stack:
        for step in (Windowed, Op, relaxations.Lines, relaxations.Box):
            stack.enter_context(mock.patch.object(step, "back", timed(step)))
        total = common.seconds(call, args.device)
    print(f"{case} {state} {row}: {total:.2f} s")
    for key, t in spent.most_common(12):
        print("  {:5.1f} %  {:4} calls  {:8} {:6} coefficients a row".format(
            100 * t / total, calls[key], *key))


def line(r):
    def one(name):
        if name not in r:
            return " " * 42
        t, memory = r[name], r[name].get("MiB", {})
        text = f"{1e3 * t['ours']:9.1f}"
        text += f"{1e3 * t['auto_LiRPA']:10.1f}{t['ratio']:7.2f}" if "ratio" in t else " " * 17
        ours, theirs = memory.get("ours"), memory.get("auto_LiRPA")
        text += f"{ours or 0:8.0f}{theirs or 0:8.0f}"
        return text
    difference = f"{r['difference']:10.1e}" if "difference" in r else ""
    return f"{r['case']:9}{r['state']:9}{r['row']:12}" + one("forward") \
        + one("forward+backward") + difference


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--states", nargs="+", choices=("init", "box", "deeppoly"),
                   default=["init", "box", "deeppoly"])
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--data-dir", default="data")
    p.add_argument("--device", default="cpu")
    p.add_argument("--no-peer", dest="peer", action="store_false", help="without auto_LiRPA")
    p.add_argument("--no-memory", dest="memory", action="store_false")
    p.add_argument("--profile", action="store_true", help="where our time goes, instead")
    p.add_argument("--out", help="a JSON file")
    p.add_argument("--fresh-memory", action="store_true", help="leave the allocator as it is")
    args = p.parse_args()
    if not args.fresh_memory:
        keep_memory()
    common.limit_memory(args.device)
    if args.profile:
        for case, state, row in product(args.cases, args.states, args.rows):
            profile(case, state, row, args)
        return
    args.peer = args.peer and importlib.util.find_spec("auto_LiRPA") is not None
    print(f"{'':30}{'forward: ms ours, theirs, ratio, MiB':42}{'forward + backward':42}difference")
    results = []
    for case in args.cases:
        for state in args.states:
            if (case, state) == ("cnn7", "deeppoly"):
                continue
            for row in args.rows:
                results.append(measure(case, state, row, args))
                print(line(results[-1]), flush=True)
                common.write(args.out, **common.machine(args.device), results=results)


if __name__ == "__main__":
    main()
