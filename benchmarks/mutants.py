"""Single errors planted at random in the functions that carry mathematics: do the tests notice?

    python benchmarks/mutants.py --count 100                      the same 100 for the same --seed
    python benchmarks/mutants.py --count 20 --functions gls.py:pgpe relaxations.py
    python benchmarks/mutants.py --count 100 --list               only shows what it would plant

The tests run once on the code as it is: how long does each take, which functions does it call?
Those that fail stay away. Then each error is planted in a copy of the checkout. First run tests
that call the function, the shortest case of each first, for up to a minute; then the others that
call it; then those that start processes, where calls are not seen. What no test calls, none can
notice. The first that fails, or takes ten times as long as before, notices it. Each outcome is at
once a line of --out, whose first says what was drawn; a later call goes on from there, and --again
repeats what survived. An error that nobody could observe is set aside by hand: add "aside": "the
reason" to its line.
"""
import argparse
import builtins
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

import errors
from errors import HERE

RUNS = HERE / "runs"
FIRST = 40               # seconds of tests that run at once; after them, the others
MEMORY = 12 * 2 ** 30    # bytes beyond which an error is a failure
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["numpy", "pytest", "torch", "torch._dynamo"]      # the last by the first use of Adam


# ----------------------------------------------- inside of pytest, which has this as a conftest.py
PASSED = {}              # {test: [seconds, "FILE:LINE" of the functions that it calls, "processes"
FAILED = set()           # if it starts some]}
builtins.CALLED = set()


def forget_what_is_cached(folder):
    """Else only the first test would be seen to call a function that keeps its results."""
    for module in list(sys.modules.values()):
        if folder in Path(getattr(module, "__file__", None) or "/").parents:
            for function in list(vars(module).values()):
                getattr(function, "cache_clear", lambda: None)()


def pytest_runtest_setup(item):
    if "MUTANTS_RECORD" in os.environ:
        forget_what_is_cached(item.config.rootpath)
        CALLED.clear()                                                              # noqa: F821
        item.begun = time.time()


def pytest_runtest_logreport(report):
    if report.outcome != "passed":
        FAILED.add(report.nodeid)


def pytest_runtest_teardown(item):
    if "MUTANTS_RECORD" in os.environ and item.nodeid not in FAILED:
        PASSED[item.nodeid] = time.time() - item.begun, sorted(CALLED)              # noqa: F821
        if len(PASSED) % 20 == 0:                      # in case that it is stopped
            write_record()


def starts_a_process(event, args):
    if event in ("os.fork", "subprocess.Popen", "os.system", "os.posix_spawn"):
        CALLED.add("processes")                                                     # noqa: F821


if "MUTANTS_RECORD" in os.environ:
    sys.addaudithook(starts_a_process)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With an error in it, a test may never end."""
    if "MUTANTS_ORDER" not in os.environ:
        return (yield)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("out of time"))
    signal.alarm(int(60 + 10 * item.session.seconds[item.nodeid]))
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_collection_modifyitems(session, items):
    if "MUTANTS_ORDER" in os.environ:
        session.seconds = json.loads(Path(os.environ["MUTANTS_ORDER"]).read_text())
        place = {test: i for i, test in enumerate(session.seconds)}
        items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])
    if "MUTANTS_RECORD" in os.environ:
        PASSED.update(json.loads(Path(os.environ["MUTANTS_RECORD"]).read_text()))
        items[:] = [i for i in items if i.nodeid not in PASSED]


def pytest_sessionfinish():
    if "MUTANTS_RECORD" in os.environ:
        write_record()


def write_record():
    Path(os.environ["MUTANTS_RECORD"]).write_text(json.dumps(PASSED))


# ------------------------------------------------------------------------------ outside of pytest

def copy_checkout():
    """A copy of this checkout, with this file, and errors.py that it imports, as conftest.py."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    left_out = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", "MNIST", "cifar-10-*")
    shutil.copytree(HERE, folder, dirs_exist_ok=True, ignore=left_out)
    shutil.copy(__file__, folder / "conftest.py")
    shutil.copy(errors.__file__, folder)
    return folder


def child(folder, words, printed, environment, memory):
    """Run in a process of its own, which a server forks that has imported torch already."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    sys.dont_write_bytecode = False                    # of tests, whatever is set outside
    sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (HERE, HERE / "benchmarks")]
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.exit(int(pytest.main(words)))


def run_tests(folder, paths, limit=None, **environment):
    """What pytest prints in a copy, "" if all tests pass; None: not ready within limit seconds."""
    words = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *["-x"] * (limit is not None),
             *paths]
    printed = folder / "printed.txt"
    process = FORKS.Process(target=child, args=(folder, words, printed, environment,
                                                    MEMORY if limit else None))
    process.start()
    process.join(limit)
    running = process.is_alive()
    with suppress(ProcessLookupError):                 # what the tests have started, too
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if running:
        return None
    if process.exitcode in (3, 4):                     # pytest itself failed: that is no outcome
        raise RuntimeError(printed.read_text())
    return printed.read_text() if process.exitcode not in (0, 5) else ""   # 5: no test was chosen


def known_tests(paths):
    """PASSED of the tests in these files on the code as it is. What an earlier call recorded about
    the same code is not run again."""
    patterns = "*.py", "faster/*.py", "plumbing/*.py"
    sources = [p.read_bytes() for pattern in patterns for p in sorted(HERE.glob(pattern))
               if "test" not in p.name]
    record = RUNS / f"mutants-calls-{hashlib.sha256(b''.join(sources)).hexdigest()[:12]}.json"
    RUNS.mkdir(exist_ok=True)
    if not record.exists():
        record.write_text("{}")
    print("running the tests on the code as it is ...", file=sys.stderr)
    folder = copy_checkout()
    for file in errors.FILES:
        (folder / file).write_text(errors.told(file))
    printed = run_tests(folder, paths, MUTANTS_RECORD=str(record))
    print(printed or "all pass", file=sys.stderr)
    shutil.rmtree(folder)
    return json.loads(record.read_text())


def in_turns(mutant, tests):
    """The tests that may notice it, as {test: seconds}: the likely ones, then others. Of each test
    function first the shortest case, then the second, ...: what differs most comes first."""
    called, cases = {f"{mutant.file}:{n}" for n in mutant.lines}, Counter()
    order = []
    for t in sorted(tests, key=lambda t: tests[t][0]):
        if not called.isdisjoint(tests[t][1]):
            function = t.partition("[")[0]
            cases[function] += 1
            order.append((cases[function], tests[t][0], t))
    turns, spent = ({}, {}, {}), 0.0
    for _, seconds, t in sorted(order):
        spent += seconds
        turns[spent > FIRST][t] = seconds
    turns[2].update({t: seconds for t, (seconds, calls) in tests.items()
                     if called.isdisjoint(calls) and "processes" in calls})
    return [turn for turn in turns if turn]


def outcome(mutant, tests, folder):
    """Plant it in the copy, run the tests, mend it: a line of the report."""
    (folder / mutant.file).write_text(mutant.source)
    start, noticed, ran = time.time(), None, 0
    for turn in in_turns(mutant, tests):
        (folder / "order.json").write_text(json.dumps(turn))
        files = list(dict.fromkeys(test.partition("::")[0] for test in turn))
        printed = run_tests(folder, files, 120 + 4 * sum(turn.values()),
                            MUTANTS_ORDER=str(folder / "order.json"))
        ran += len(turn)
        if printed:
            found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", printed, re.M)
            noticed = found[1] if found else "pytest ends without a result"
        elif printed is None:
            noticed = "out of time"
        if noticed:
            break
    shutil.copy(HERE / mutant.file, folder / mutant.file)
    return dict(key=mutant.key, noticed=noticed, seconds=round(time.time() - start, 1),
                **{k: v for k, v in mutant._asdict().items() if k not in ("lines", "source")},
                **{} if noticed else dict(tests=ran))


def read_report(path, about, again):
    """{key: line} of what is known; without the survivors, if they are to run again."""
    lines = [*map(json.loads, path.read_text().splitlines())] if path.exists() else [about]
    drawn = {k: v for k, v in about.items() if k != "commit"}
    if lines[0] != about | {"commit": lines[0].get("commit")}:
        sys.exit(f"{path} is about other errors than {drawn}")
    return lines[0], {r["key"]: r for r in lines[1:]
                      if r["noticed"] or "aside" in r or not again}


def run_all(drawn, about, known, path, args):
    """Run what is not known yet, and note it as soon as it is."""
    left, folders = [m for m in drawn if m.key not in known], SimpleQueue()
    tests = known_tests(args.tests) if left else {}
    for _ in range(min(args.jobs, len(left))):
        folders.put(copy_checkout())

    def one(mutant):
        folder = folders.get()
        try:
            return mutant, outcome(mutant, tests, folder)
        finally:
            folders.put(folder)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in [about, *known.values()]))
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, r in pool.map(one, left):
            known[mutant.key] = r
            with path.open("a") as file:
                file.write(json.dumps(r) + "\n")
            print(f"{show(mutant)}\n    {r['noticed'] or 'SURVIVED'}, {r['seconds']} s", flush=True)
    while not folders.empty():
        shutil.rmtree(folders.get())


def show(m):
    before, after = (" ".join(text.split())[:60] for text in (m.before, m.after))
    return f"{m.file}:{m.line} {m.function}, {m.kind}: {before}  ->  {after}"


def diff(m):
    return "".join(difflib.unified_diff(
        (HERE / m.file).read_text().splitlines(True), m.source.splitlines(True),
        m.file, f"{m.file}, {m.function}", n=1))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--count", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--jobs", type=int, default=1, help="errors at once")
    p.add_argument("--functions", nargs="+", default=[], metavar="FILE[:NAME]")
    p.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="these files only")
    p.add_argument("--list", action="store_true", help="show them, run nothing")
    p.add_argument("--again", action="store_true", help="run those again that survived")
    p.add_argument("--out", type=Path, default=RUNS / "mutants.jsonl")
    args = p.parse_args()
    drawn = errors.draw(args.functions, args.count, args.seed)
    if args.list:
        print("\n".join(map(show, drawn)))
        return
    FORKS.set_forkserver_preload(PRELOADED)
    os.environ["OMP_NUM_THREADS"] = "1"
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True).stdout.strip()
    about = dict(commit=commit, count=args.count, seed=args.seed, functions=args.functions,
                 errors=hashlib.sha256("".join(m.key for m in drawn).encode()).hexdigest()[:12])
    about, known = read_report(args.out, about, args.again)
    run_all(drawn, about, known, args.out, args)
    results = {m: known[m.key] for m in drawn}
    counted = [r for r in results.values() if "aside" not in r]
    noticed = sum(bool(r["noticed"]) for r in counted)
    print("\n".join(diff(m) for m, r in results.items() if r in counted and not r["noticed"]))
    print(f"{len(drawn)} errors, {len(drawn) - len(counted)} of them set aside; of the others "
          f"{noticed} noticed, {100 * noticed / max(1, len(counted)):.1f} %")


if __name__ == "__main__":
    main()
