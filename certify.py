"""Certify a network sample by sample: attack it, bound it, give each sample a verdict.

    python certify.py                        the newest run under runs/, on its whole test set
    python certify.py runs/NAME --samples 1000 --eps 0.1

Or any supported network (see relaxations.py), in five lines of Python:

    import certify
    verdicts = certify.certify(net, x, y, eps=0.1)      # x (n, ...) pixels in [0, 1], y (n,) labels
    for v in verdicts:
        print(v.status, v.stage, v.bound)

The stages, each on what the one before left open:

    forward    wrong without any perturbation                               -> misclassified
    attack     projected gradient descent finds a wrong point in the ball   -> attacked
    box, crown-ibp, deeppoly     all margins have a positive lower bound    -> certified
    otherwise                                                               -> unknown

Guarantee: "certified" holds for every point of the ball, up to rounding; bounds nearer to zero than
1e-4 are recomputed in float64. "attacked" comes with a counterexample in the ball (exactly, as
float32 numbers), misclassified by a float64 forward pass. "unknown" is neither: the bounds are
incomplete. Attacked samples are bounded too: one that comes out certified proves a bound wrong.
"""
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from relaxations import RELAXATIONS
from train import (CERTIFY, InputError, Parser, Progress, attack, certified_margin, count, duration,
                   forward_margin, load_dataset, load_run, number, pick_device, run)

STATUSES = ("misclassified", "attacked", "certified", "unknown")


class Verdict(NamedTuple):
    status: str        # one of STATUSES
    stage: str         # what settled it: forward, attack, box, ...; "" if unknown
    bound: float       # the smallest margin lower bound proved, the best over stages; -inf if none
    seconds: float     # spent on it; the time of a batch is shared equally
    counterexample: Optional[torch.Tensor] = None


class ContradictionError(AssertionError):
    """A sample is both certified and attacked: a bound is unsound, or a forward pass is wrong."""


def certify(net, x, y, eps, timeout=None, *, stages=RELAXATIONS, steps=40, restarts=3, batch=100,
            seed=0, progress=lambda line: None):
    """A list with one Verdict per sample, for the ball of radius eps (pixels) around each x.

    net: an nn.Sequential as relaxations.py supports it, in eval mode, on the device and in the
    dtype of x.  x: (n, ...) in [0, 1].  y: (n,) labels.  timeout: seconds per sample; a sample that
    has used them up enters no further stage (None: no limit).  stages: any of box, crown-ibp,
    deeppoly, in this order.  steps, restarts: of the attack; restarts=0 leaves it out.
    batch: samples bounded at once.

    Raises ContradictionError if a sample is certified and attacked, ValueError for bad arguments.
    """
    unknown = [s for s in stages if s not in RELAXATIONS]
    if unknown or len(x) != len(y) or not 0 <= eps < float("inf"):
        raise ValueError(f"stages {unknown} are unknown, or {len(x)} images do not fit {len(y)} "
                         f"labels, or eps={eps} is not a radius >= 0")
    verdicts = []
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        verdicts += _certify_batch(net, x[part], y[part], eps, timeout, stages, steps, restarts,
                                   seed, start)
        counts = Counter(v.status for v in verdicts)
        progress(f"{len(verdicts)}/{len(x)}  " + "  ".join(f"{counts[s]} {s}" for s in STATUSES))
    return verdicts


def _certify_batch(net, x, y, eps, timeout, stages, steps, restarts, seed, offset):
    n, begun = len(x), time.time()
    status, stage, points = ["unknown"] * n, [""] * n, [None] * n
    bound = torch.full((n,), -torch.inf, dtype=torch.float64)

    correct = (forward_margin(net, x, y) > 0).tolist()
    for i in range(n):
        if not correct[i]:
            status[i], stage[i] = "misclassified", "forward"
    left = [i for i in range(n) if correct[i]]
    if restarts and left:
        found, margin = attack(net, x[left], y[left], eps, steps, restarts, seed)
        for i, point, m in zip(left, found, margin.tolist()):
            if m <= 0:
                status[i], stage[i], points[i] = "attacked", "attack", point.clone()
    seconds = [(time.time() - begun) / n] * n
    for relax in stages:
        left = [i for i in range(n) if status[i] in ("unknown", "attacked")
                and (timeout is None or seconds[i] < timeout)]
        if not left:
            break
        begun = time.time()
        low = certified_margin(net, x[left], y[left], eps, relax, **CERTIFY[relax]).double().cpu()
        bound[left] = torch.maximum(bound[left], low)
        for i, m in zip(left, low.tolist()):
            seconds[i] += (time.time() - begun) / len(left)
            if m > 0 and status[i] == "attacked":
                raise ContradictionError(
                    f"sample {offset + i}: {relax} proves a margin of {m:.3g} at eps={eps}, yet a "
                    "point of the ball is misclassified; a bound is unsound. Please report this "
                    "with the network")
            if m > 0:
                status[i], stage[i] = "certified", relax
    return [Verdict(*v) for v in zip(status, stage, bound.tolist(), seconds, points)]


# ------------------------------------------------------------------------------------- command line

def summary(verdicts, stages):
    """The final table, as lines of text: counts that add up to the number of samples."""
    n, counts = len(verdicts), Counter(v.status for v in verdicts)
    settled = Counter(v.stage for v in verdicts)
    def line(title, k):
        return f"  {title:34}{100 * k / n:7.2f} %   {k}/{n}"
    lines = [line("natural accuracy", n - counts["misclassified"]),
             line("not attacked (upper bound)", counts["certified"] + counts["unknown"])]
    total = 0
    for stage in stages:
        total += settled[stage]
        lines.append(line(f"certified up to {stage}", total))
    lines.append("  " + " + ".join(f"{counts[s]} {s}" for s in STATUSES) + f" = {n} samples, "
                 f"{sum(v.seconds for v in verdicts):.1f} s")
    return lines


def newest_run(root="runs"):
    runs = sorted(Path(root).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run found under {root}/; train one with python train.py, or name its "
                         "folder")
    return runs[-1].parent


def open_log(path, header):
    """Verdicts that path already holds {index: Verdict}, and the file to append to.

    The first line of the file is its settings. A file of other settings is never touched; a last
    line that an interrupt cut short is dropped.
    """
    known = {}
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]            # what ends in a newline is complete
        try:
            rows = [json.loads(line) for line in lines]
            same = bool(rows) and rows[0] == header
            for r in rows[1:] if same else []:
                bound = -math.inf if r["bound"] is None else r["bound"]
                known[r["index"]] = Verdict(r["status"], r["stage"], bound, r["seconds"])
        except (ValueError, KeyError, TypeError):
            same = False
        if lines and not same:
            raise InputError(f"{path} holds other results; choose another file with --out, or "
                             "delete it")
        with open(path, "r+b") as f:
            f.truncate(sum(len(line) + 1 for line in lines))
    file = open(path, "a")
    if not path.stat().st_size:
        print(json.dumps(header), file=file, flush=True)
    return known, file


def parse_args(argv):
    p = Parser(prog="certify.py", description="Certify a trained run, sample by sample.")
    p.add_argument("run", nargs="?", help="run folder of train.py; default: the newest under runs/")
    p.add_argument("--eps", type=number(0, 1), help="radius in pixels; default: the run's")
    p.add_argument("--samples", type=count(1), help="first N test images; default: the run's")
    p.add_argument("--relax", nargs="+", choices=RELAXATIONS, default=list(RELAXATIONS),
                   help="bounds to try; default: all")
    p.add_argument("--steps", type=count(1), default=40, help="of the attack")
    p.add_argument("--restarts", type=count(0), default=3, help="of the attack; 0: no attack")
    p.add_argument("--batch-size", type=count(1), default=100)
    p.add_argument("--seed", type=count(0), default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--data-dir", help="default: that of the run")
    p.add_argument("--out", help="JSON lines, one verdict each; default: RUN/certify-epsEPS.jsonl")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    folder = Path(args.run) if args.run else newest_run()
    net, config = load_run(folder)
    data = load_dataset(config["dataset"], args.data_dir or config["data_dir"])
    if list(data.x_test.shape[1:]) != config["input_shape"] or data.classes != config["classes"]:
        raise InputError(f"{folder} was trained on images {config['input_shape']} of "
                         f"{config['classes']} classes, but {config['dataset']} has "
                         f"{list(data.x_test.shape[1:])} of {data.classes}")
    eps = config["eps"] if args.eps is None else args.eps
    n = min(len(data.x_test), args.samples or config["test_subset"] or len(data.x_test))
    stages = [r for r in RELAXATIONS if r in args.relax]
    path = Path(args.out) if args.out else folder / f"certify-eps{eps:.6g}.jsonl"
    attack_settings = dict(steps=args.steps, restarts=args.restarts, seed=args.seed)
    header = dict(run=folder.resolve().name, eps=eps, stages=stages, **attack_settings)
    try:
        known, file = open_log(path, header)
    except OSError as e:
        raise InputError(f"--out {path} cannot be written ({e})") from None
    print(f"{folder}: {config['net']} trained by {config['relax']}, {config['opt']}; "
          f"eps {eps:.4g}; {n} test images"
          + (f", {len(known)} verdicts already in {path}" if known else ""))
    net.to(device)
    show, begun, todo = Progress(), time.time(), [i for i in range(n) if i not in known]
    with file:
        for k in range(0, len(todo), args.batch_size):
            part = todo[k:k + args.batch_size]
            x, y = data.x_test[part].to(device), data.y_test[part].to(device)
            try:
                verdicts = certify(net, x, y, eps, stages=stages, batch=args.batch_size,
                                   **attack_settings)
            except ContradictionError as e:
                print(f"abort: among the test images {part[0]} to {part[-1]}, {e}", file=sys.stderr)
                sys.exit(1)
            for i, v in zip(part, verdicts):
                known[i] = v
                row = dict(index=i, label=int(data.y_test[i]), status=v.status, stage=v.stage,
                           bound=v.bound if v.bound > -math.inf else None, seconds=v.seconds)
                print(json.dumps(row), file=file, flush=True)
            counts, done = Counter(v.status for v in known.values()), k + len(part)
            left = (time.time() - begun) / done * (len(todo) - done)
            show(f"{len(known)}/{n}  " + "  ".join(f"{counts[s]} {s}" for s in STATUSES)
                 + f"  {duration(left)} left")
    show.done(f"verdicts in {path}:")
    print("\n".join(summary([known[i] for i in range(n)], stages)))


if __name__ == "__main__":
    run(main)
