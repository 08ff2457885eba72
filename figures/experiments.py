"""The experiments behind results/README.md: every cell a run of train.py and one of certify.py.

    python figures/experiments.py digits                what is missing of the table and the sweeps
    python figures/experiments.py digits --part tune    the search that chose the settings
    python figures/experiments.py mnist-cnn3-0.3 --data-dir DIR

Results go to results/NAME.jsonl, one line per cell, as soon as it is finished; a cell whose command
is there is not run again, so that an interrupted call continues where it stopped. Each of --jobs
processes uses one thread, so that a cell's result does not depend on how many there are.

Tuning. Every method gets the same number of tries, with the same seeds, on images held out from the
training set; the try with most images certified there is kept (of equals, that with the highest
natural accuracy). The test set is not used. The tries are the same for all methods, or, in the
older tables, drawn by each from one space (SPACE). Everything tried is in the file
results/NAME-tuning.jsonl. A network that was tuned may be one of the table: then it is not trained
again.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch                                                                       # noqa: E402

import certify                                                                     # noqa: E402
import train                                                                       # noqa: E402
from plumbing.console import duration, keep_memory                                 # noqa: E402

RESULTS, RUNS = ROOT / "results", ROOT / "runs" / "experiments"

# ------------------------------------------------------------------------------------------ design

GRID = [(r, opt) for r in ("box", "crown-ibp", "deeppoly") for opt in ("grad", "rgs", "pgpe")]
BASELINES = [(r, opt) for r in ("sabr", "mtl-ibp") for opt in ("grad", "rgs")]
TAPS = [(r, opt) for opt in ("grad", "rgs") for r in ("staps", "taps")]

SPACE = {   # what tuning draws from; the keys are options of train.py
    "lr": (0.003, 0.01, 0.03),
    "eps-train": (1.0, 1.2),                                 # in units of eps
    "l1": (0.0, 1e-5, 1e-4),
    "sigma": (0.003, 0.01, 0.03),                            # rgs, pgpe
    "alpha": (0.03, 0.1, 0.3),                               # mtl-ibp
    "lam": (0.2, 0.4, 0.7),                                  # sabr, staps
}

TRIES = [   # or tries that are the same for all methods; keys as above
    {"lr": 0.003, "eps-train": 1.0, "l1": 1e-5, "sigma": 0.003, "alpha": 0.1, "lam": 0.4},
    {"lr": 0.002, "eps-train": 1.2, "l1": 0.0, "sigma": 0.01, "alpha": 0.03, "lam": 0.7},
    {"lr": 0.005, "eps-train": 1.0, "l1": 1e-5, "sigma": 0.001, "alpha": 0.3, "lam": 0.2},
]

# What MNIST and CIFAR-10 are run with; FEW[:3] is box by grad and RGS, and CROWN-IBP by grad.
FEW = [(r, opt) for r in ("box", "crown-ibp", "deeppoly") for opt in ("grad", "rgs")] \
    + [("sabr", "grad"), ("mtl-ibp", "grad")]
MNIST = {"dataset": "mnist", "net": "cnn3", "subset": 10000, "epochs": 4, "ramp": 2,
         "milestones": (3,), "batch-size": 32}
HELD_OUT = {"validation": 500, "l1": 1e-5}               # also of the runs of the table
PGPE_LONG = MNIST | HELD_OUT | {"net": "small", "subset": 3200, "epochs": 12, "ramp": 6,
                                "milestones": (9,)}
ALL = MNIST | HELD_OUT | {"subset": 60000, "epochs": 10, "ramp": 3, "milestones": (7, 9),
                          "batch-size": 64}
TWO = [(r, opt) for r in ("box", "deeppoly") for opt in ("grad", "rgs")]

IN_PARTS = [({"parts": 2}, [("box", "rgs"), ("deeppoly", "rgs")])]   # RGS at a gradient's price
MORE_PAIRS = [({"samples": 512, "parts": 8, "lr": 0.03, "sigma": 0.01},  # as many images evaluated
               [(r, "pgpe") for r in ("box", "crown-ibp", "deeppoly")])]


def rates(*lrs, **others):
    """Tries that differ in the learning rate alone."""
    return [dict(lr=lr, **others) for lr in lrs]


# common: options of every run.  eps: to certify.  tries: of tuning, for each seed of tuning_seeds,
# a number (of draws from SPACE) or a list; one alone needs no tuning.  validation: images it is
# scored on.  samples: test images that are certified, timeout: seconds for each.  sweeps: {option:
# (values, methods)}.  variants: [(options changed together, methods)], for all seeds of the table.

TABLES = {
    "digits": dict(
        common=dict(dataset="digits", net="small", epochs=40, ramp=16, milestones=(30, 36)),
        eps=0.1, methods=GRID + BASELINES + [("alpha-crown", "grad"), ("alpha-crown", "rgs")],
        seeds=5, tries=8, validation=237, samples=None, timeout=30,
        sweeps={"sigma": ((0.001, 0.003, 0.01, 0.03, 0.1),
                          [(r, "rgs") for r in ("box", "deeppoly")]
                          + [(r, "pgpe") for r in ("box", "crown-ibp")]),
                "samples": ((2, 4, 8), [("box", "rgs"), ("deeppoly", "rgs")]),
                "eps-train": ((0.1, 0.12), [("box", "grad"), ("box", "rgs")])},
        sweep_seeds=3, variants=MORE_PAIRS),
    # Four times as long, for PGPE, which needs it. One learning rate for all, with which box by
    # PGPE did better on the held-out images than with 0.03 (plain box, above, was tuned to 0.03).
    "digits-long": dict(
        common={"dataset": "digits", "net": "small", "epochs": 160, "ramp": 64,
                "milestones": (120, 144), "validation": 237, "l1": 0.0},
        eps=0.1, methods=GRID + BASELINES[::2], seeds=5, validation=237, samples=None, timeout=30,
        sweep_seeds=3,
        tries=rates(0.01, sigma=0.01, alpha=0.1, lam=0.4)
        + rates(0.01, sigma=0.03, alpha=0.03, lam=0.2),
        sweeps={"samples": ((16, 256), [("box", "pgpe")])}, variants=IN_PARTS + MORE_PAIRS),
    "mnist-small-0.1": dict(
        common={"dataset": "mnist", "net": "small", "subset": 10000, "epochs": 6, "ramp": 2,
                "milestones": (4, 5), "batch-size": 64},
        eps=0.1, methods=FEW + [("box", "pgpe")], seeds=3, tries=3, validation=500, samples=1000,
        timeout=30, sweeps={}),
    "mnist-cnn3-0.1-first": dict(
        common=MNIST, eps=0.1, methods=FEW + [("box", "pgpe")], seeds=3, tries=TRIES,
        validation=300, samples=1000, timeout=10, sweep_seeds=3,
        sweeps={"lr": ((0.002, 0.005), [("deeppoly", "grad")])}),
    # From here on, one learning rate for all methods: of those tried with three of them, the best
    # on held-out images. lam by Mueller et al. 2023, alpha by De Palma et al. 2024 (for longer
    # recipes), sigma that of train.py.
    "mnist-cnn3-0.3-rates": dict(
        common=MNIST | HELD_OUT, eps=0.3, methods=FEW[:3], tuning_seeds=2, validation=400,
        tries=rates(0.002, 0.005, 0.01, sigma=0.01), timeout=5, seeds=0, sweeps={}),   # a search
    "mnist-cnn3-0.3": dict(
        common=MNIST | HELD_OUT, eps=0.3, methods=FEW, seeds=5,
        tries=rates(0.005, sigma=0.01, alpha=0.08, lam=0.6), samples=1000, timeout=5,
        sweep_seeds=3,
        sweeps={"sigma": ((0.003, 0.03), [("box", "rgs"), ("deeppoly", "rgs")]),
                "lr": ((0.002, 0.01), [("deeppoly", "grad")])}, variants=IN_PARTS),
    "mnist-cnn3-0.1": dict(
        common=MNIST | HELD_OUT, eps=0.1, methods=FEW, tuning_seeds=2, validation=500, seeds=5,
        tries=rates(0.005, sigma=0.003, alpha=0.1, lam=0.4)
        + rates(0.005, sigma=0.01, alpha=0.03, lam=0.7), samples=1000, timeout=5, sweeps={},
        variants=IN_PARTS),
    "mnist-pgpe-0.1": dict(
        common=MNIST | HELD_OUT | {"net": "small", "subset": 3200}, eps=0.1, seeds=3,
        methods=[(r, "pgpe") for r in ("box", "crown-ibp", "deeppoly")],
        tries=rates(0.01, sigma=0.01), samples=1000, timeout=5, sweep_seeds=3,
        sweeps={"lr": ((0.003, 0.03), [("box", "pgpe")])}),
    # Three times as many steps, with what served box by PGPE best on held-out images.
    "mnist-pgpe-long-rates": dict(
        common=PGPE_LONG, eps=0.1, methods=[("box", "pgpe")], tuning_seeds=2, validation=500,
        tries=[dict(lr=lr, sigma=sigma) for lr in (0.003, 0.01) for sigma in (0.01, 0.03)],
        timeout=5, seeds=0, sweeps={}),                                              # a search
    "mnist-pgpe-long": dict(
        common=PGPE_LONG, eps=0.1, methods=[(r, "pgpe") for r in ("box", "crown-ibp", "deeppoly")],
        seeds=3, tries=rates(0.01, sigma=0.01), samples=1000, timeout=5, sweeps={}),
    # All 60,000 images. Planned before the first run: box and DeepPoly, by grad and by RGS in two
    # parts, 3 seeds, everything from the tables above (sigma 0.003, the better one at 0.3), ramp
    # and milestones in proportion to 70 epochs; it ends when these 12 cells are finished.
    "mnist-cnn3-0.3-all": dict(
        common=ALL, eps=0.3, methods=TWO, tries=rates(0.005, sigma=0.003, parts=2), seeds=3,
        samples=1000, timeout=5, sweeps={}),
    # The same at eps 0.1, planned after that table was finished.
    "mnist-cnn3-0.1-all": dict(
        common=ALL, eps=0.1, methods=TWO, tries=rates(0.005, sigma=0.003, parts=2), seeds=3,
        samples=1000, timeout=5, sweeps={}),
    "cifar10-cnn3": dict(
        common=MNIST | HELD_OUT | {"dataset": "cifar10", "subset": 4000}, eps="2/255", seeds=5,
        methods=FEW, tries=rates(0.005, sigma=0.01, alpha=0.004, lam=0.1), samples=1000, timeout=5,
        sweep_seeds=3,
        sweeps={"sigma": ((0.003, 0.01, 0.03), [("box", "rgs"), ("deeppoly", "rgs")])}),
}

DIGITS = TABLES["digits"] | dict(sweeps={}, variants=[])
DEEPZ = {"slope": "parallel", "no-skip-stable": ()}
TABLES |= {   # the table of the digits, with what came later; tuned alike
    "digits-taps": DIGITS | dict(methods=TAPS),
    "digits-deepz": DIGITS | dict(methods=[("deeppoly", opt) for opt in ("grad", "rgs", "pgpe")],
                                  common=DIGITS["common"] | DEEPZ),
    "digits-long-taps": TABLES["digits-long"] | dict(methods=TAPS, sweeps={}, variants=[]),
    "mnist-cnn3-0.1-taps": TABLES["mnist-cnn3-0.1"] | dict(methods=TAPS, variants=[]),
    "mnist-cnn3-0.3-taps": TABLES["mnist-cnn3-0.3"] | dict(methods=TAPS, sweeps={}, variants=[]),
}


def settings(method, draw, eps):
    """Options of train.py for one method from a draw of SPACE."""
    relax, opt = method
    chosen = {k: draw[k] for k in ("lr", "l1") if k in draw}
    if "eps-train" in draw:
        chosen["eps-train"] = round(eps * draw["eps-train"], 6)
    if opt != "grad":
        chosen["sigma"] = draw["sigma"]
    if opt == "rgs" and "parts" in draw:
        chosen["parts"] = draw["parts"]
    if relax == "mtl-ibp":
        chosen["alpha"] = draw["alpha"]
    if relax in ("sabr", "staps"):
        chosen["lam"] = draw["lam"]
    return chosen


def command(table, method, seed, chosen, **more):
    """The arguments of train.py of one cell, its key in the results."""
    options = dict(table["common"], relax=method[0], opt=method[1], eps=table["eps"], **chosen,
                   seed=seed, **more)
    words = []
    for k, v in options.items():
        words += [f"--{k}", *(map(str, v) if isinstance(v, tuple) else [str(v)])]
    return words


def tries(table, method):
    """What tuning tries, as keys of SPACE: the table's own list, or draws, always the same."""
    if not isinstance(table["tries"], int):
        return table["tries"]
    generator, drawn = random.Random("/".join(method)), {}
    while len(drawn) < table["tries"]:
        draw = {k: generator.choice(v) for k, v in SPACE.items()}
        drawn.setdefault(str(settings(method, draw, 1.0)), draw)
    return list(drawn.values())


def held_out(table):
    """Options of a tuning run that one of the table does not have."""
    return {} if "validation" in table["common"] else {"validation": table["validation"]}


def is_fixed(table):
    """Is there one try only, so that there is nothing to tune?"""
    return isinstance(table["tries"], list) and len(table["tries"]) == 1


def tuning_cells(table):
    if is_fixed(table):
        return []
    return [(method, seed, settings(method, draw, table["eps"]), held_out(table))
            for method in table["methods"] for draw in tries(table, method)
            for seed in range(table.get("tuning_seeds", 1))]


def tuned(name):
    """{method: its best settings on the validation images}."""
    best, table = {}, TABLES[name]
    if is_fixed(table):
        return {m: settings(m, *table["tries"], table["eps"]) for m in table["methods"]}
    known = {cell["train"]: cell for cell in read(f"{name}-tuning")}
    scores = defaultdict(lambda: (0, 0))                   # of a method and its settings
    for method, seed, chosen, more in tuning_cells(table):
        words = command(table, method, seed, chosen, **more)
        cell = known.get("python train.py " + " ".join(words))
        if cell is None:
            sys.exit(f"{'/'.join(method)} of {name} is not tuned; run: python "
                     f"figures/experiments.py {name} --part tune")
        key = method, tuple(chosen.items())
        scores[key] = tuple(a + cell.get(k, -1) for a, k in zip(scores[key],        # -1: it failed
                                                                ("certified", "natural")))
    for (method, chosen), score in scores.items():
        if method not in best or score > best[method][0]:
            best[method] = score, dict(chosen)
    return {m: chosen for m, (_, chosen) in best.items()}


def table_cells(name, table):
    best = tuned(name)
    return [(m, seed, best[m], {}) for seed in range(table["seeds"]) for m in table["methods"]]


def sweep_cells(name, table):
    best = tuned(name)
    return [(m, seed, {**best[m], option: value}, {})
            for option, (values, methods) in table["sweeps"].items()
            for seed in range(table["sweep_seeds"]) for m in methods for value in values]


def variant_cells(name, table):
    best = tuned(name)
    return [(m, seed, {**best[m], **changed}, {})
            for changed, methods in table.get("variants", [])
            for seed in range(table["seeds"]) for m in methods]


# ----------------------------------------------------------------------------------------- running

def read(name):
    """Finished cells, in the order in which they were finished."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def commit():
    git = lambda *args: subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True,
                                       text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(git("status", "-s", "--", "*.py"))


def processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def run_folder(words):
    return RUNS / "-".join(w.lstrip("-") for w in words).replace("/", "_")


def train_cell(words, data_dir):
    """Train one cell, silently, or what is left of it; returns its folder."""
    folder, local = run_folder(words), ["--data-dir", data_dir, "--device", "cpu"]
    if (folder / "checkpoint.pt").exists():
        words = ["--resume", str(folder)]
    else:
        words = [*words, "--test-subset", "1", "--out", str(folder)]
        if "rgs" in words and "--parts" not in words:       # its default when the tables were made
            words += ["--parts", "1"]
        shutil.rmtree(folder, ignore_errors=True)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        train.main([*words, *local])
    return folder


def run_cell(words, certify_words, data_dir):
    """Train and certify one cell; returns what is known of it then."""
    torch.set_num_threads(1)
    keep_memory()
    try:
        folder = train_cell(words, data_dir)
    except FloatingPointError as e:
        return dict(failed=str(e).split(";")[0])
    verdicts = folder / f"{'-'.join(w.lstrip('-') for w in certify_words)}.jsonl"
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        certify.main([str(folder), *certify_words, "--data-dir", data_dir, "--device", "cpu",
                      "--out", str(verdicts)])
    verdicts = [json.loads(line) for line in verdicts.read_text().splitlines()][1:]
    assert str(len(verdicts)) == certify_words[certify_words.index("--samples") + 1]
    status, stage = (Counter(v[k] for v in verdicts) for k in ("status", "stage"))
    log = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    column = {k: [float(row[i]) for row in log[1:]] for i, k in enumerate(log[0])}
    curve = {k: [round(v, 4) for v in column[k]] for k in ("eps", "loss", "certified")}
    return dict(n=len(verdicts), natural=len(verdicts) - status["misclassified"],
                attacked=status["attacked"], certified=status["certified"],
                unknown=status["unknown"], certified_by={s: stage[s] for s in certify.STAGES},
                train_seconds=column["seconds"][-1],
                certify_seconds=round(sum(v["seconds"] for v in verdicts), 2), curve=curve)


def run(name, file, cells, table, args, tuning=False):
    """Run the cells that file does not have yet, and append them to it."""
    known = {cell["train"] for cell in read(file)}
    cells = [cell for cell in cells if cell[0][0] in (args.relax or cell[0])]
    machine = dict(commit=commit(), processor=processor(), threads=1, jobs=args.jobs,
                   torch=str(torch.__version__))
    todo = {}
    for method, seed, chosen, more in cells:
        words = command(table, method, seed, chosen, **more)
        line = "python train.py " + " ".join(words)
        if line not in known:
            todo[line] = (method, seed, chosen, words, more)
    print(f"{name}: {len(cells) - len(todo)} of {len(cells)} cells are finished or repeated",
          flush=True)
    if not todo:
        return
    RESULTS.mkdir(exist_ok=True)
    begun, context = time.time(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool, \
            open(RESULTS / f"{file}.jsonl", "a") as out:
        jobs = {}
        for line, (method, seed, chosen, words, more) in todo.items():
            samples = table["validation"] if tuning else table["samples"] or 360
            cert = ["--samples", str(samples), "--timeout", str(table["timeout"])]
            if not tuning and not held_out(table):
                cert += ["--validation", "0"]              # the test images after all
            jobs[pool.submit(run_cell, words, cert, args.data_dir)] = line, cert
        for i, job in enumerate(as_completed(jobs)):
            if job.exception():                                # or else all others would run first
                pool.shutdown(cancel_futures=True)
            line, cert = jobs[job]
            method, seed, chosen, words, _ = todo[line]
            cell = dict(relax=method[0], opt=method[1], seed=seed, settings=chosen, train=line,
                        certify="python certify.py RUN " + " ".join(cert), **job.result(),
                        **machine)
            print(json.dumps(cell), file=out, flush=True)
            left = (time.time() - begun) / (i + 1) * (len(jobs) - i - 1)
            print(f"{i + 1}/{len(jobs)}  {'/'.join(method)} seed {seed}: "
                  + (cell.get("failed") or f"natural {cell['natural']}, certified "
                     f"{cell['certified']} of {cell['n']}") + f"  {duration(left)} left",
                  flush=True)


def main():
    p = argparse.ArgumentParser(description="Run the experiments behind results/README.md.")
    p.add_argument("name", choices=TABLES)
    p.add_argument("--part", choices=("tune", "table", "sweeps", "variants"), nargs="*",
                   default=["table", "sweeps"])
    p.add_argument("--relax", nargs="*", help="only cells with these")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    args = p.parse_args()
    table = TABLES[args.name]
    if "tune" in args.part:
        run(args.name, f"{args.name}-tuning", tuning_cells(table), table, args,
            tuning=True)
    if "table" in args.part:
        run(args.name, args.name, table_cells(args.name, table), table, args)
    if "sweeps" in args.part:
        run(args.name, args.name, sweep_cells(args.name, table), table, args)
    if "variants" in args.part:
        run(args.name, args.name, variant_cells(args.name, table), table, args)


if __name__ == "__main__":
    main()
