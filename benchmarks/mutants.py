"""Single errors planted at random in the functions that carry mathematics: do the tests notice?

    python benchmarks/mutants.py --count 100 --jobs 2             roughly a minute for each error
    python benchmarks/mutants.py --count 20 --functions gls.py:pgpe relaxations.py
    python benchmarks/mutants.py --count 100 --list               only shows what it would plant

The tests run once on the code as it is: how long does each take, which functions does it call?
Those that fail stay away. Then each error is planted in a copy of the checkout, and tests run until
one fails, or time is up: first those that call the function, the shortest first. Each outcome is at
once a line of --out; a later call goes on from there, and --again repeats what survived. An error
that nobody could observe is set aside by hand: add "aside": "the reason" to its line.
"""
import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

import errors
from errors import HERE

RUNS = HERE / "runs"


# ----------------------------------------------- inside of pytest, which has this as a conftest.py
PASSED = {}              # {test: (seconds, "FILE:LINE" of the functions that it calls)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if "MUTANTS_RECORD" not in os.environ:
        return (yield)
    folder = item.config.rootpath       # the copy's own; HERE is not, in the copy
    calls, start = set(), time.time()
    note = lambda frame, event, arg: calls.add(frame.f_code)          # None: no event for its lines
    sys.settrace(note)
    try:
        result = yield
    finally:
        sys.settrace(None)
    PASSED[item.nodeid] = time.time() - start, sorted(
        f"{Path(code.co_filename).relative_to(folder)}:{code.co_firstlineno}" for code in calls
        if Path(code.co_filename).parent in (folder, folder / "plumbing"))
    return result


def pytest_collection_modifyitems(items):
    if "MUTANTS_ORDER" in os.environ:
        order = json.loads(Path(os.environ["MUTANTS_ORDER"]).read_text())
        place = {test: i for i, test in enumerate(order)}
        items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])


def pytest_sessionfinish():
    if "MUTANTS_RECORD" in os.environ:
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


def run_tests(folder, limit=None, **environment):
    """What pytest prints in a copy, "" if all tests pass; None: not ready within limit seconds."""
    environment |= dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
         *["-x"] * (limit is not None)], cwd=folder, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=limit)
        return printed if process.returncode else ""
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):             # what the tests have started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def known_tests():
    """PASSED of all tests on the code as it is: of a run, or of the record of an earlier one."""
    sources = [p.read_bytes() for p in sorted(HERE.rglob("*.py"))
               if not {RUNS, HERE / "benchmarks"} & set(p.parents)]
    record = RUNS / f"mutants-calls-{hashlib.sha256(b''.join(sources)).hexdigest()[:12]}.json"
    if not record.exists():
        print("running the tests on the code as it is ...", file=sys.stderr)
        RUNS.mkdir(exist_ok=True)
        folder = copy_checkout()
        print(run_tests(folder, MUTANTS_RECORD=str(record)) or "all pass", file=sys.stderr)
        shutil.rmtree(folder)
    return json.loads(record.read_text())


def outcome(mutant, tests, folder):
    """Plant it in the copy, run the tests, mend it: a line of the report."""
    called = {f"{mutant.file}:{n}" for n in mutant.lines}
    order = sorted(tests, key=lambda t: (called.isdisjoint(tests[t][1]), tests[t][0]))
    (folder / "order.json").write_text(json.dumps(order))
    (folder / mutant.file).write_text(mutant.source)
    start, limit = time.time(), 60 + 3 * sum(seconds for seconds, _ in tests.values())
    printed = run_tests(folder, limit, MUTANTS_ORDER=str(folder / "order.json"))
    shutil.copy(HERE / mutant.file, folder / mutant.file)
    if printed:
        found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", printed, re.M)
        noticed = found[1] if found else "pytest ends without a result"
    else:
        noticed = "out of time" if printed is None else None
    return dict(key=mutant.key, noticed=noticed, seconds=round(time.time() - start, 1),
                **{k: v for k, v in mutant._asdict().items() if k not in ("lines", "source")})


def read_report(path, again):
    """{key: line} of what is known; without the survivors, if they are to run again."""
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {r["key"]: r for r in lines if r["noticed"] or "aside" in r or not again}


def run_all(drawn, known, path, jobs):
    """Run what is not known yet, and note it as soon as it is."""
    left, folders = [m for m in drawn if m.key not in known], SimpleQueue()
    tests = known_tests() if left else {}
    for _ in range(min(jobs, len(left))):
        folders.put(copy_checkout())

    def one(mutant):
        folder = folders.get()
        try:
            return mutant, outcome(mutant, tests, folder)
        finally:
            folders.put(folder)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in known.values()))
    with ThreadPoolExecutor(jobs) as pool:
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
    p.add_argument("--jobs", type=int, default=2, help="errors at once")
    p.add_argument("--functions", nargs="+", default=[], metavar="FILE[:NAME]")
    p.add_argument("--list", action="store_true", help="show them, run nothing")
    p.add_argument("--again", action="store_true", help="run those again that survived")
    p.add_argument("--out", type=Path, default=RUNS / "mutants.jsonl")
    args = p.parse_args()
    drawn = errors.draw(args.functions, args.count, args.seed)
    if args.list:
        print("\n".join(map(show, drawn)))
        return
    known = read_report(args.out, args.again)
    run_all(drawn, known, args.out, args.jobs)
    results = {m: known[m.key] for m in drawn}
    counted = [r for r in results.values() if "aside" not in r]
    noticed = sum(bool(r["noticed"]) for r in counted)
    print("\n".join(diff(m) for m, r in results.items() if r in counted and not r["noticed"]))
    print(f"{len(drawn)} errors, {len(drawn) - len(counted)} of them set aside; of the others "
          f"{noticed} noticed, {100 * noticed / max(1, len(counted)):.0f} %")


if __name__ == "__main__":
    main()
