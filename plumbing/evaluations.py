"""evaluation.json, what the test of a run came to, and a table of several runs."""
import json
import subprocess
import zlib
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch

from plumbing.console import InputError
from plumbing.runs import MAY_CHANGE, run_folder, write_whole

ROOT = Path(__file__).resolve().parent.parent


def code():
    """Which code this is: its commit, "-dirty" if a file differs, or without git a checksum."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("ls-files", "train.py"):                  # not the repository of something around it
            dirty = "-dirty" * bool(git("status", "--short", "--", "*.py"))
            return dict(commit=git("rev-parse", "--short", "HEAD") + dirty)
    except OSError:                                                                    # no git here
        pass
    folders = ROOT, ROOT / "faster", ROOT / "plumbing"
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    value = zlib.crc32(b"".join(path.read_bytes() for path in sources))
    return dict(version=f"code with checksum {value:08x}")


def write_evaluation(folder, result, config):
    """The counts of result, {name: (n,) bool} of train.evaluate, in evaluation.json."""
    counts = {name: int(hits.sum()) for name, hits in result.items()}
    found = dict(eps=config["eps"], n=len(result["natural"]), counts=counts, **code(),
                 torch=str(torch.__version__))
    write_whole(Path(folder) / "evaluation.json", (json.dumps(found, indent=2) + "\n").encode())


def read_run(path):
    """(evaluation, config) of a run folder. Raises InputError."""
    folder = run_folder(path)
    try:
        found = json.loads((folder / "evaluation.json").read_text())
        if found["n"] < 1 or not all(0 <= k <= found["n"] for k in found["counts"].values()):
            raise ValueError("counts that are none")
        config = json.loads((folder / "config.json").read_text())
        images = f"{config.pop('fingerprint', 0):08x}"     # their checksum: file names may repeat
        return found, config | {"eps": found["eps"], "images": images}
    except FileNotFoundError as e:
        raise InputError(f"{e.filename}: no such file; python train.py --resume {folder} writes "
                         "it at the end of a run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{folder}: its evaluation.json or config.json cannot be read "
                         f"({str(e) or type(e).__name__})") from None


def comparison(folders):
    """A table of runs as lines of text: what they differ in, and accuracies in %; below, the mean
    and the standard deviation of those that differ in the seed only."""
    runs = {folder: read_run(folder) for folder in map(str, folders)}
    configs = [config for _, config in runs.values()]
    names = list(dict.fromkeys(name for config in configs for name in config))
    differ = lambda name: any(config.get(name) != configs[0].get(name) for config in configs)
    ignored = MAY_CHANGE - {"dataset"} if differ("images") else MAY_CHANGE
    varied = [name for name in names if name not in ignored | {"members"} and differ(name)]
    kinds = list(dict.fromkeys(k for found, _ in runs.values() for k in found["counts"]))
    rows, groups = [["run", *varied, "n", *kinds]], defaultdict(list)
    for folder, (found, config) in runs.items():
        settings, n = [brief(config.get(name)) for name in varied], str(found["n"])
        counts = [found["counts"].get(kind) for kind in kinds]
        percent = [None if k is None else 100 * k / found["n"] for k in counts]
        rows.append([folder, *settings, n, *(accuracy([p]) for p in percent)])
        others = ["all" if name == "seed" else s for name, s in zip(varied, settings)]
        groups[(*others, n)].append(percent)
    for group, percents in groups.items():
        if len(percents) > 1 and "seed" in varied:
            rows.append([f"mean of {len(percents)}", *group, *map(accuracy, zip(*percents))])
    return aligned(rows)


def accuracy(values):
    """One in %, or the mean and the standard deviation of several; "-" where one is missing."""
    if None in values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def brief(value):
    return f"{value:.4g}" if type(value) in (int, float) else str(value)


def aligned(rows):
    """Rows of words as the lines of a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(word.ljust(w) for word, w in zip(row, widths)) + " |"
             for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
