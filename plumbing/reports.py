"""What certify.py says in the end, and what it knows from other radii."""
import math
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from plumbing.console import InputError, Parser, count, number
from plumbing.processes import ranks
from plumbing.runs import checksum, run_folder
from plumbing.verdicts import (STATUSES, ContradictionError, points_of, read_log, save_point,
                               verdict_of, write_verdicts)


def newest_run(root="runs"):
    runs = sorted(Path(root).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run found under {root}/; train one with python train.py, or name its "
                         "folder")
    return runs[-1].parent


def summary(verdicts, stages):
    """The final table, as lines of text: counts that add up to the number of samples."""
    n, counts = len(verdicts), Counter(v.status for v in verdicts)
    settled = Counter(v.stage for v in verdicts if v.status == "certified")

    def line(title, k):
        return f"  {title:34}{100 * k / n:7.2f} %   {k}/{n}"

    lines = [line("natural accuracy", n - counts["misclassified"]),
             line("not attacked (upper bound)", counts["certified"] + counts["unknown"])]
    total = 0
    for stage in stages:
        total += settled[stage]
        lines.append(line(f"certified up to {stage}", total))
    spent = sum((Counter(v.seconds_by_stage) for v in verdicts), Counter())
    seconds = [f"{stage} {spent[stage]:.1f}" for stage in ("attack", *stages) if stage in spent]
    if seconds:                             # none where all is known from other radii
        lines.append("  seconds: " + ", ".join(seconds))
    total = " + ".join(f"{counts[status]} {status}" for status in STATUSES)
    lines.append(f"  {total} = {n} samples, {sum(v.seconds for v in verdicts):.1f} s")
    return lines


# ------------------------------------------------------------------------- several radii in one go

def outside_in(radii):
    """The radii in the order largest, smallest, second largest, ...: each image that is certified
    at a large one, or attacked at a small one, is known at all those between."""
    left = sorted(set(radii))
    return [left.pop(-1 if i % 2 == 0 else 0) for i in range(len(left))]


def inherited(i, eps, known):
    """The verdict on image i that those at other radii, known {eps: {i: verdict}}, imply: what is
    certified is so in every smaller ball, and a counterexample lies in every larger one. Or None.
    """
    for other, verdicts in known.items():
        v = verdicts.get(i)
        if v is None:
            continue
        free = dict(seconds=0.0, seconds_by_stage={})
        if v.status == "misclassified" or v.status == "certified" and other >= eps:
            return replace(v, **free)
        if v.status == "attacked" and other <= eps and v.counterexample is not None:
            return replace(v, bound=-math.inf, **free)
    return None


def curve(known):
    """The table of verdicts {eps: {i: verdict}}, as lines of text. Raises AssertionError where an
    image is certified in a ball that has a counterexample."""
    lines = [f"  {'eps':>10}" + "".join(f"{status:>15}" for status in STATUSES) + "   certified"]
    for eps in sorted(known):
        verdicts = known[eps].values()
        counts = Counter(v.status for v in verdicts)
        lines.append(f"  {eps:10.6g}" + "".join(f"{counts[status]:15}" for status in STATUSES)
                     + f"{100 * counts['certified'] / len(verdicts):10.2f} %")
    for small in known:
        for i, v in known[small].items():
            larger = [eps for eps in known if eps >= small]
            if v.status == "attacked" and any(known[eps][i].status == "certified"
                                              for eps in larger):
                raise AssertionError(f"image {i} is attacked at {small:.6g} and certified at a "
                                     "larger radius: a bound is unsound")
    return lines


def report_inherited(indices, eps, known, report):
    """Report what is known of these images from other radii; the places in indices of the rest."""
    left = []
    for place, i in enumerate(indices):
        v = inherited(i, eps, known)
        if v is None:
            left.append(place)
        else:
            report(replace(v, index=place))
    return left


def certify_radii(certify, net, config, data, path, args):
    """Write a verdict for each test image and radius, a file for each radius, and show their
    counts; what one radius tells about others is used. certify: that of certify.py. With many
    processes each takes its share of the images; the first gathers what they wrote."""
    n = min(len(data.x_test), args.samples or config["test_subset"] or len(data.x_test))
    x, y = data.x_test[:n], data.y_test[:n]
    settings = dict(stages=args.stages, timeout=args.timeout, steps=args.steps, seed=args.seed,
                    restarts=data.classes if args.restarts is None else args.restarts)
    if (slope := args.slope or config.get("slope", "adaptive")) != "adaptive":
        settings["slope"] = slope
    header = dict(run=path.resolve().name, **settings, network=checksum(*net.state_dict().values()),
                  images=checksum(data.x_test, data.y_test))
    if args.weights and "layers" in config:           # another FILE.py may make the same tensors
        header["layers"] = zlib.crc32(repr(config["layers"]).encode())
    known, made = {}, "" if args.weights else f" trained by {config['relax']}, {config['opt']}"
    radii = outside_in(args.eps or [config["eps"]])
    files = {eps: file_of(args, path, eps) for eps in radii}
    if len(set(files.values())) < len(files):
        raise InputError("two radii of --eps agree in the six digits that name their files")
    for eps in radii if ranks()[0] == 0 else []:           # before any of them takes its time
        read_log(files[eps], header | dict(eps=eps), verdict_of)
    for eps in radii:

        def certify_some(indices, report):
            left = report_inherited(indices, eps, known, report)
            images = [indices[place] for place in left]
            certify_images(certify, net, x, y, eps, files[eps], images, batch=args.batch_size,
                           **settings, report=lambda v: report(replace(v, index=left[v.index])))

        title = f"{path}: {config['net']}{made}; eps {eps:.4g}; {n} test images"
        found = write_verdicts(files[eps], header | dict(eps=eps), y.tolist(), certify_some,
                               verdict_of, title, batch=args.batch_size)
        known[eps] = {i: v for i, v in found.items() if i < n}       # its file may have more
        if ranks()[0] == 0:
            print("\n".join(summary([known[eps][i] for i in range(n)], settings["stages"])))
    if len(known) > 1 and ranks()[0] == 0:
        print("\n".join(curve(known)))


def certify_images(certify, net, x, y, eps, file, images, **options):
    """certify these of the images x. A contradiction ends the program; its witness is kept beside
    the file of verdicts."""
    device = next(net.parameters()).device
    try:
        certify(net, x[images].to(device), y[images].to(device), eps, **options)
    except ContradictionError as e:
        i = images[e.index]
        witness = save_point(points_of(file), f"contradiction-{i}", e.counterexample)
        print(f"abort: test image {i} is certified and attacked: {e}. The counterexample is in "
              f"{witness}", file=sys.stderr)
        sys.exit(1)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv, stages, settings):
    """The command line of certify.py. stages: of certify; settings: of train.py."""
    p = Parser(prog="certify.py", description="Certify a trained run, sample by sample.")
    p.add_argument("run", nargs="?", type=run_folder,
                   help="run folder of train.py; default: the newest under runs/")
    p.add_argument("--eps", type=number(0, 1), nargs="+",
                   help="radius in pixels, or several; default: the run's")
    p.add_argument("--weights", metavar="FILE", help="instead of a run: a state_dict that "
                   "torch.save wrote, of the network --net for the images --dataset")
    p.add_argument("--net", type=settings["net"].limits,
                   help="with --weights: " + settings["net"].meaning)
    p.add_argument("--dataset", type=settings["dataset"].limits,
                   help="with --weights: " + settings["dataset"].meaning
                   + "; else PATH.npz, if the run's has moved")
    p.add_argument("--samples", type=count(1), help="first N test images; default: the run's")
    p.add_argument("--validation", type=count(0), help="certify the last N training images, not "
                   "those of the test; 0: those of the test; default: the run's")
    p.add_argument("--stages", nargs="+", choices=stages, default=list(stages), metavar="STAGE",
                   help=f"of {', '.join(stages)}; default: all")
    p.add_argument("--timeout", type=number(0, endless=True), default=30.0,
                   help="seconds for each image, inf for no limit; default: 30")
    p.add_argument("--slope", choices=settings["slope"].limits,
                   help=settings["slope"].meaning + "; default: the run's, or adaptive")
    p.add_argument("--steps", type=count(1), default=40,
                   help="of each descent of the attack; default: 40")
    p.add_argument("--restarts", type=count(0),
                   help="descents of the attack; 0: no attack; default: one for each class")
    p.add_argument("--batch-size", type=count(1), default=100,
                   help="images bounded at once; default: 100")
    p.add_argument("--seed", type=count(0), default=0, help="of the attack; default: 0")
    p.add_argument("--device", choices=settings["device"].limits, default="auto",
                   help=settings["device"].meaning + "; default: auto")
    p.add_argument("--data-dir", help=settings["data_dir"].meaning + "; default: that of the run, "
                   "or data")
    p.add_argument("--out", help="JSON lines, one verdict each; default: certify-epsEPS.jsonl in "
                   "the run folder, or beside FILE")
    args = p.parse_args(argv)
    args.stages = [stage for stage in stages if stage in args.stages]
    args.given = {k: v for k, v in vars(args).items() if k in ("dataset", "data_dir") and v}
    if args.net and not args.weights:
        p.error("argument --net: it is for --weights FILE; the network of a run is in its folder")
    if args.weights and args.run:
        p.error(f"argument --weights: takes no run folder; leave out {args.run}, or --weights")
    missing = [f"--{name}" for name in ("net", "dataset") if not getattr(args, name)]
    if args.weights and missing:
        p.error(f"argument --weights: give {' and '.join(missing)}, too: a file of weights does "
                "not tell")
    if args.out and len(args.eps or ()) > 1:
        p.error("argument --out: one file is for one radius; leave it out, or give one --eps")
    return args


def file_of(args, path, eps):
    """The file of verdicts for a radius."""
    if args.out:
        return Path(args.out)
    name = f"certify-eps{eps:.6g}.jsonl"
    return path.with_name(f"{path.name}.{name}") if args.weights else path / name
