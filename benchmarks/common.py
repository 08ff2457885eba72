"""What the benchmarks share: the machine, interleaved timing, peak memory, a JSON file."""
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def machine(device, code=None):
    """Where and with what a number was measured. code: another checkout whose code it was."""
    here = code or Path(__file__).parent
    git = lambda *args: subprocess.run(["git", "-C", str(here), *args], capture_output=True,
                                       text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    return dict(device=torch.cuda.get_device_name() if device == "cuda" else cpu,
                machine=platform.platform(), threads=torch.get_num_threads(),
                python=platform.python_version(), torch=str(torch.__version__),
                commit=git("describe", "--always") + "-dirty" * bool(git("status", "-s", ":/*.py")),
                command=" ".join(["python", *placeless(sys.argv)]))


PLACES = "--data-dir", "--checkout", "--peer", "--code", "--run", "--out"


def placeless(words):
    """A command line without where this machine has its files."""
    return [word if before not in PLACES else before.strip("-").upper()
            for before, word in zip(["", *words], words)]


def seconds(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(calls, pairs, device):
    """Seconds of {name: call}, run in turns after one warm-up each: {name: [seconds]}."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(pairs):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def ratio(times, name, base):
    """Median over the turns of the time of base in units of that of name."""
    return median(b / t for b, t in zip(times[base], times[name]))


def limit_memory(device):
    """On a CPU, what does not fit has to raise, or the system would kill this process."""
    if device == "cpu":
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def hand_back():
    """Give memory that nothing needs any more back to the system (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _limited(function, args, device, limit):
    limit_memory(device)
    signal.alarm(limit)                                        # ends the process
    return function(*args)


def alone(function, *args, device, limit=600):
    """function(*args) in a process of its own, which has limit seconds, and whose memory goes back
    when it ends. function: at the top level of a module. Raises what it raises, and
    BrokenProcessPool if the process was killed or its time was up."""
    hand_back()                                                # or it would lack there
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_limited, function, args, device, limit).result()


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(prepare, args, device):
    """As peak_memory, but in this process, which should be new: what it kept would not count."""
    warm_up, call = prepare(*args)
    warm_up()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    hand_back()                                                # what the warm-up freed
    Path("/proc/self/clear_refs").write_text("5")              # VmHWM starts anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def peak_memory(prepare, args, device):
    """MiB that a call takes at its peak, in a process of its own: on a CPU, of resident memory.

    prepare(*args) -> (warm-up, call), at the top level of a module. None: it did not get there.
    """
    try:
        return alone(peak, prepare, args, device, device=device)
    except Exception:                                          # it failed, was too slow or killed
        return None


def write(path, **content):
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
