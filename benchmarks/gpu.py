"""One hour of a GPU, used well: tests, tables, populations, long recipes, in this order.

    python benchmarks/gpu.py --data-dir DIR               MNIST and CIFAR-10 are in DIR; no network
    python benchmarks/gpu.py --data-dir DIR               again: goes on with what is not finished
    python benchmarks/gpu.py --tiny --device cpu          the same on digits, in two minutes

Each part is a command of its own. What became of it, with the card and the commit, is in
OUT/gpu.json as soon as it ends; tables of measurements are files beside it. A part that has
finished is not run again. One whose time is up is stopped: a training saves itself and goes on in
the next call, if there is time; one that failed is tried again. Nothing starts after --minutes.
"""
import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import common                                       # first: it puts the checkout on the path
from plumbing.console import duration
from plumbing.runs import write_whole

ROOT = Path(__file__).resolve().parent.parent
GRACE = 60              # seconds that a training has to save itself


class Part(NamedTuple):
    name: str
    minutes: float       # that it may take, of what is left
    command: list        # after python
    run: Path = None     # the run folder of a training, or of what comes after it
    after: str = None    # the part that has to have finished before


def whole(args):
    """The parts in their order. The CIFAR-10 run takes what is left."""
    given = ["--data-dir", args.data_dir, "--device", args.device]
    runs = Path(args.runs)
    yield Part("tests", 8, ["-m", "pytest", "-q", "plumbing/test_device.py"])
    for name, minutes in (("targets", 2), ("population", 5), ("passes", 4)):
        yield Part(name, minutes, ["benchmarks/device.py", "--parts", name, *given])
    cases = "--cases cnn3 cnn3-256 cnn5 cnn7".split()
    yield Part("bounds", 10, ["benchmarks/bounds.py", *cases, *given])
    mnist = "--dataset mnist --net cnn3 --relax deeppoly --seed 0"
    recipes = {
        "mnist-pgpe": (8, f"{mnist} --opt pgpe --samples 1024 --members 64 --epochs 10 --lr 0.005"),
        "mnist-grad": (9, f"{mnist} --opt grad"),
        "mnist-rgs": (12, f"{mnist} --opt rgs"),
        "cifar10-rgs": (60, "--dataset cifar10 --net cnn3 --relax deeppoly --opt rgs --seed 0")}
    for name, (minutes, words) in recipes.items():
        yield Part(name, minutes, ["train.py", *words.split(), *given], runs / name)
        certify = ["certify.py", str(runs / name), "--samples", "1000", "--timeout", "5", *given]
        yield Part(f"{name}-certified", 5, certify, runs / name, after=name)


def tiny(args):
    """As whole, with the digits and small numbers."""
    given, runs = ["--device", args.device], Path(args.runs)
    yield Part("tests", 5, ["-m", "pytest", "-q", "plumbing/test_device.py", "-k",
                            "formulas or small-box or forces"])
    yield Part("tables", 5, ["benchmarks/device.py", "--tiny", "--pairs", "1", *given])
    one = "--cases digits --states init --rows box deeppoly --pairs 1 --no-peer --no-memory"
    yield Part("bounds", 5, ["benchmarks/bounds.py", *one.split(), *given])
    digits = "--net small --subset 96 --epochs 2 --ramp 1 --test-subset 20 --relax deeppoly"
    for opt in ("grad --samples 1", "pgpe --samples 8"):
        name = f"digits-{opt.split()[0]}"
        command = ["train.py", *digits.split(), "--opt", *opt.split(), *given]
        yield Part(name, 5, command, runs / name)
        certify = ["certify.py", str(runs / name), "--timeout", "2", *given]
        yield Part(f"{name}-certified", 5, certify, runs / name, after=name)


def full_command(part, out):
    """What is run: a training goes on where its folder is; a table is told where to go."""
    script, *words = part.command
    if script == "train.py" and (part.run / "checkpoint.pt").exists():
        kept = words[words.index("--device"):][:2]
        kept += words[words.index("--data-dir"):][:2] if "--data-dir" in words else []
        words = ["--resume", str(part.run), *kept]
    elif script == "train.py":
        words = [*words, "--out", str(part.run)]
    elif script.startswith("benchmarks/"):
        words = [*words, "--out", str(out / f"{part.name}.json")]
    return [sys.executable, script, *words]


def execute(command, seconds, log, environment):
    """(exit status, None if it had to be killed; seconds) of a command, whose output goes to log.
    At the end of its time it gets SIGTERM, then GRACE seconds."""
    begun = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            for limit in (seconds, GRACE):
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(limit), time.time() - begun
                process.terminate()
            return None, time.time() - begun
        finally:
            with suppress(ProcessLookupError):             # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def status_of(part, code):
    if code == 0:
        return "finished"
    return "stopped" if code in (None, -signal.SIGTERM, 128 + signal.SIGTERM) else "failed"


def last_epoch(part):
    """The last line of a training's log, as numbers."""
    log = part.run / "log.csv" if part.run and part.after is None else None
    if log is None or not log.exists():
        return {}
    rows = list(csv.DictReader(log.read_text().splitlines()))
    return {k: float(v) for k, v in rows[-1].items()} if rows else {}


def without_paths(text, args):
    """No path of this machine is left in what is kept."""
    for path, name in ((args.data_dir, "DIR"), (args.out, "OUT"), (args.runs, "RUNS"),
                       (str(ROOT), "."), (sys.executable, "python")):
        text = text.replace(str(Path(path).resolve()), name) if path else text
        text = text.replace(path, name) if path and Path(path).is_absolute() else text
    return text


def run_part(part, seconds, args, out):
    """Run it; what becomes of it, as plain values."""
    command, log = full_command(part, out), out / f"{part.name}.log"
    code, took = execute(command, seconds, log, {"GLS_TEST_DEVICE": args.device})
    table = out / f"{part.name}.json"
    if table.exists():
        write_whole(table, without_paths(table.read_text(), args).encode())
    lines = without_paths(log.read_text(errors="replace"), args).splitlines()
    log.unlink()
    about = common.machine(args.device)
    del about["command"]
    shown = without_paths(" ".join(["python", *map(str, command[1:])]), args)
    return dict(status=status_of(part, code), seconds=round(took, 1), command=shown, **about,
                epoch=last_epoch(part), output=[line[:200] for line in lines[-40:]])


def summary(name, entry):
    shown = f"{name:22}{entry['status']:10}{duration(entry['seconds']):>9}"
    if entry["epoch"]:
        e = entry["epoch"]
        shown += (f"   epoch {e['epoch']:.0f}, loss {e['loss']:.4f}, "
                  f"{100 * e['certified']:.1f} % certified in training")
    elif entry["output"]:
        shown += "   " + entry["output"][-1].strip()
    return shown


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", default="data", help="where MNIST and CIFAR-10 are")
    p.add_argument("--minutes", type=float, default=60.0, help="nothing starts after them")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="digits and small numbers, in two minutes")
    p.add_argument("--out", default=str(ROOT / "runs" / "gpu-results"), help="a folder")
    p.add_argument("--runs", default=str(ROOT / "runs" / "gpu"), help="a folder for the trainings")
    args = p.parse_args(argv)
    if args.device == "cuda" and not common.torch.cuda.is_available():
        sys.exit("error: this PyTorch finds no CUDA GPU; --tiny --device cpu tries the command out")
    for name in ("out", "runs", "data_dir"):
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    end, out = time.time() + 60 * args.minutes, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "gpu.json"
    known = json.loads(ledger.read_text()) if ledger.exists() else {}
    finished = lambda name: known.get(name, {}).get("status") == "finished"
    for part in (tiny if args.tiny else whole)(args):
        seconds = min(60 * part.minutes, end - time.time())
        if finished(part.name) or seconds <= 0 or part.after and not finished(part.after):
            continue
        before = known.get(part.name, {}).get("seconds", 0) if part.run else 0
        known[part.name] = run_part(part, seconds, args, out)
        known[part.name]["seconds"] += before                    # of a training that went on
        write_whole(ledger, (json.dumps(known, indent=1) + "\n").encode())
        print(summary(part.name, known[part.name]), flush=True)
    failed = [name for name, entry in known.items() if entry["status"] == "failed"]
    for name in failed:
        print(f"\n{name} failed:", *known[name]["output"], sep="\n  ")
    print(f"\n{sum(map(finished, known))} parts finished; all of it is in {ledger}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
