"""The file of verdicts: JSON lines, sealed by checksums, written as soon as each is known.

The first line has the settings; a file is continued with the same settings only, wherever it, the
run or the images are now: these are known by their checksums. With many processes each writes a
file of its own, PATH.process1, PATH.process2, ..., which the first gathers into PATH.
"""
import glob
import json
import math
import time
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist

from plumbing.console import InputError, Progress, duration
from plumbing.processes import ranks
from plumbing.rounding import ROUNDING
from plumbing.runs import claim
from plumbing.timing import VerdictsLeft

STATUSES = ("misclassified", "attacked", "certified", "unknown")


@dataclass
class Verdict:
    status: str = "unknown"    # one of STATUSES
    stage: str = ""            # what settled it: forward, attack, box, ...; "" if unknown
    bound: float = -math.inf   # the smallest margin lower bound proved, the best over stages; where
    #                            branching was cut short, up to rounding in float32
    seconds: float = 0.0       # spent on it; the time of a batch is shared equally
    counterexample: Optional[torch.Tensor] = None
    seconds_by_stage: dict = field(default_factory=dict)
    index: int = 0             # of the sample

    def spend(self, stage, seconds):
        self.seconds += seconds
        self.seconds_by_stage[stage] = self.seconds_by_stage.get(stage, 0.0) + seconds

    def prove(self, stage, bound, unit):
        """All margins are at least bound in the whole ball. unit: that of the network's margins."""
        self.bound = max(self.bound, bound)
        if bound > ROUNDING * unit and self.status == "attacked":
            raise ContradictionError(self.index, stage, bound, self.counterexample)
        if bound > 0 and self.status == "unknown":
            self.status, self.stage = "certified", stage

    def refute(self, stage, point, unit):
        """A point of the ball is misclassified."""
        if self.status == "certified" and self.bound > ROUNDING * unit:
            raise ContradictionError(self.index, self.stage, self.bound, point)
        if self.status != "attacked":
            self.status, self.stage, self.counterexample = "attacked", stage, point.clone()


@contextmanager
def charged(stage, verdicts):
    """The time that passes inside was spent on these samples, an equal share on each. What is
    inside has to wait for results of a GPU."""
    begun = time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    for v in verdicts:
        v.spend(stage, seconds / len(verdicts))


class ContradictionError(AssertionError):
    """A sample is both certified and attacked: a bound is unsound, or a forward pass is wrong.
    Carries the witnesses: index of the sample, stage and bound, and the counterexample."""

    def __init__(self, index, stage, bound, counterexample):
        super().__init__(f"sample {index}: {stage} proves a margin of {bound:.3g}, yet a point of "
                         "the ball is misclassified; a bound is unsound. Please report this with "
                         "the network")
        self.index, self.stage, self.bound = index, stage, bound
        self.counterexample = counterexample


def verdict_of(row):
    bound = -math.inf if row["bound"] is None else row["bound"]
    return Verdict(row["status"], row["stage"], bound, row["seconds"],
                   seconds_by_stage=row["seconds_by_stage"])


def sealed(row):
    """A line of JSON with a checksum of the rest of it."""
    return json.dumps(row | {"crc": zlib.crc32(json.dumps(row).encode())})


def unsealed(line):
    """The row of such a line; raises ValueError, KeyError or TypeError if it was damaged."""
    row = json.loads(line)
    if row.pop("crc") != zlib.crc32(json.dumps(row).encode()):
        raise ValueError("wrong checksum")
    return row


def open_log(path, header, read=dict):
    """What path already holds, {index: read(row)}, and the file to append to.

    The first line of the file is its settings. A file of other settings is never touched; a last
    line that an interrupt cut short is dropped. Raises InputError.
    """
    file = open(path, "a")
    claim(file, path)
    known, complete = read_log(path, header, read)
    file.truncate(complete)
    if not complete:
        print(sealed(header), file=file, flush=True)
    return known, file


def read_log(path, header, read=dict):
    """What path holds, {index: read(row)}, and how many bytes of it are complete lines; nothing if
    it is not there. Raises InputError for other settings than header has, and for other files."""
    known, lines = {}, []
    try:
        with suppress(FileNotFoundError):
            lines = path.read_bytes().split(b"\n")[:-1]        # what ends in a newline is complete
        other = differences(unsealed(lines[0]), header) if lines else ""
        for row in map(unsealed, [] if other else lines[1:]):
            known[row["index"]] = read(row)
    except OSError as e:
        raise InputError(f"--out {path} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged, or no file of verdicts; choose another file with "
                         "--out, or delete it") from None
    if other:
        raise InputError(f"{path} holds other results: {other}. Go on with what it has, choose "
                         "another file with --out, or delete it")
    return known, sum(len(line) + 1 for line in lines)


def differences(there, here):
    """What makes the verdicts of a file those of other settings than here; "" if nothing does. What
    a run is called does not."""
    keys = [k for k in {**there, **here} if k != "run" and there.get(k) != here.get(k)]
    words = dict(network="it is of other weights (perhaps the run was trained on since)",
                 images="it is of other images", layers="it is of another network")
    return ", ".join(words.get(k) or f"{k} is {there.get(k)} there, {here.get(k)} here"
                     for k in keys)


def merge(path, header, known, file, read=dict):
    """Move the verdicts of other processes, path.process1, ..., into those of the first."""
    for part in sorted(path.parent.glob(glob.escape(path.name) + ".process[0-9]*")):
        more, handle = open_log(part, header, read)
        with handle:
            known |= more
            file.writelines(part.read_text().splitlines(keepends=True)[1:])
            file.flush()
            part.unlink()


def open_share(path, header, n, read=dict):
    """This process's share of n samples: what is known, the file to append to, and the indices
    still to do. Raises InputError if a file cannot be written or holds other results."""
    rank, world = ranks()
    known, file = {}, None
    try:
        if rank == 0:
            known, file = open_log(path, header, read)
            merge(path, header, known, file, read)                 # of a job that was interrupted
        todo = [[i for i in range(n) if i not in known]]
        if world > 1:
            dist.broadcast_object_list(todo, src=0)
        if rank:
            _, file = open_log(path.with_name(f"{path.name}.process{rank}"), header, read)
    except OSError as e:
        raise InputError(f"--out {path} cannot be written ({e})") from None
    return known, file, todo[0][rank::world]


def gather(path, header, known, file, read=dict):
    """When each process has done its share: all verdicts, in the file of the first and in known."""
    rank, world = ranks()
    if rank:
        file.close()                                               # and its claim is given up
    if world > 1:
        dist.barrier()
    if rank == 0:
        merge(path, header, known, file, read)


def write_verdicts(path, header, labels, certify, read, title, *, batch=1):
    """The verdicts {index: verdict} of the samples with these labels, each written to path as soon
    as it is known; those of path, if it has the same header, are known already.

    certify(indices, report) calls report(verdict) for each of the samples, verdict.index being its
    place in indices; read(row) is the verdict of a row. batch: samples bounded together, before the
    first of them is reported. With many processes each takes its share, and only the first returns
    them all. Raises InputError.
    """
    n, points = len(labels), points_of(path)
    if points.exists() and not points.is_dir():
        raise InputError(f"{points} is a file, where the folder of the counterexamples belongs")
    known, file, todo = open_share(path, header, n, read)
    print(title + (f", {len(known)} verdicts already in {path}" if known else ""))
    begun, reported, left = time.monotonic(), Counter(), VerdictsLeft(batch)

    def report(v):
        i, known_before = todo[v.index], not v.seconds               # from another radius
        reported[known_before] += 1
        known[i] = v
        write_down(v, i, labels[i], file, points)
        counts = Counter(v.status for v in known.values())
        shown = "  ".join(f"{counts[status]} {status}" for status in STATUSES)
        line = f"{len(known)}/{n}  {shown}"
        if not known_before:
            work = len(todo) - reported[True]
            line += f"  {duration(left(time.monotonic() - begun, reported[False], work))} left"
        show(line)

    with file, Progress() as show:
        if todo:
            show(f"{len(known)}/{n}  attack and bounds of the first images")
        certify(todo, report)
        gather(path, header, known, file, read)
    show.done(f"verdicts in {path}, counterexamples in {points}:")
    return known


def points_of(path):
    """The folder of the counterexamples to the verdicts in path. Its name goes on where that of the
    file ends: so no two files share one."""
    return path.with_name(path.name + ".counterexamples")


def write_down(v, index, label, file, points):
    """Append a verdict to the file, and save its counterexample, if any, in the folder points."""
    row = dict(index=index, label=label, status=v.status, stage=v.stage,
               bound=v.bound if v.bound > -math.inf else None, seconds=v.seconds,
               seconds_by_stage=v.seconds_by_stage)
    if v.counterexample is not None:
        save_point(points, index, v.counterexample)
        row["counterexample"] = f"{points.name}/{index}.npy"
    print(sealed(row), file=file, flush=True)


def save_point(folder, name, point):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.npy"
    np.save(path, point.cpu().numpy())
    return path
