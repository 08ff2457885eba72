"""Many processes give the result of one, and leave nothing behind."""
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import certify
import train
from plumbing import verdicts
from plumbing.for_tests import QUICK_RUN, command, stop_at, together, weights


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("world, extra", [
    (2, "--opt grad"), (3, "--opt grad --relax mtl-ibp"), (2, "--opt rgs"),
    (3, "--opt rgs --relax crown-ibp --beta 0.5"), (2, "--opt pgpe --samples 12 --members 4"),
    (3, "--opt pgpe --samples 6 --members 2 --sigma-adapt parameter"),
    (2, "--opt pgpe --samples 12 --members 2 --parts 3 --sigma-adapt scalar"),
    (2, "--opt rgs --parts 1"), (3, "--opt rgs --parts 2 --relax mtl-ibp")])
def test_many_processes_give_the_result_of_one(tmp_path, monkeypatch, world, extra):
    """Bit by bit for pgpe, which adds up losses in the same order; else up to rounding."""
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} {extra}".split()
    assert command(train.main, *args, "--out", "one") == 0
    assert together(world, *args, "--out", "many") == [0] * world
    one, many = weights("one"), weights("many")
    for k in one:
        if "pgpe" in extra:
            assert torch.equal(one[k], many[k]), k
        else:
            torch.testing.assert_close(one[k], many[k], atol=2e-5, rtol=0)
    logs = [np.loadtxt(f"{run}/log.csv", delimiter=",", skiprows=1) for run in ("one", "many")]
    np.testing.assert_allclose(*(log[:, :7] for log in logs), rtol=1e-3)       # all but the times


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_by_default_every_process_gets_a_part_of_the_population(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} --opt pgpe --samples 8".split()
    assert together(2, *args, "--out", "many") == [0, 0]
    assert json.loads(Path("many/config.json").read_text())["members"] == 4
    assert command(train.main, *args, "--members", "4", "--out", "one") == 0
    assert all(torch.equal(t, weights("one")[k]) for k, t in weights("many").items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_job_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = f"{QUICK_RUN} --opt pgpe --samples 8 --members 2".split()
    assert command(train.main, *args, "--out", "one") == 0
    def stop(rank):                                  # the signal reaches one process only
        stop_at(pytest.MonkeyPatch(), (4,) if rank else (), signal.SIGTERM)
    assert together(2, *args, "--out", "many", before=stop) == [143, 143]
    assert 0 < train.load_run("many")[2]["done"] < 14
    assert together(3, "--resume", "many", before=stop) == [143] * 3
    assert command(train.main, "--resume", "many") == 0
    assert all(torch.equal(t, weights("one")[k]) for k, t in weights("many").items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_first_process_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert together(2, *f"{QUICK_RUN} --relax box --opt grad".split()) == [0, 0]
    first, second = sorted(Path("runs").iterdir())
    assert first.name.startswith("digits-small-box-grad") and second.name == f"{first.name}-2"
    for folder in (first, second):
        assert json.loads((folder / "config.json").read_text())["processes"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_share_the_images_to_certify(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, *f"{QUICK_RUN} --out run --relax box --opt grad".split()) == 0
    args = "run --eps 0.01 --samples 40 --restarts 1 --steps 5".split()
    assert command(certify.main, *args, "--out", "one.jsonl") == 0
    assert together(3, *args, "--out", "many.jsonl", main=certify.main) == [0] * 3
    read = lambda path: [verdicts.unsealed(line) for line in Path(path).read_text().splitlines()]
    one, many = ({r["index"]: r["status"] for r in read(f"{name}.jsonl")[1:]}
                 for name in ("one", "many"))
    assert one == many and len(read("many.jsonl")) == 41 and len(set(one.values())) > 1
    lines = Path("many.jsonl").read_text().splitlines(keepends=True)
    Path("many.jsonl").write_text("".join(lines[:11]))               # as an interrupted job leaves
    Path("many.jsonl.process2").write_text("".join([lines[0], *lines[11:21]]))
    assert together(2, *args, "--out", "many.jsonl", main=certify.main) == [0] * 2
    assert {r["index"]: r["status"] for r in read("many.jsonl")[1:]} == one
    assert len(read("many.jsonl")) == 41 and not list(Path().glob("many.jsonl.*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists the threads of a process")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One alive when Python shuts down may abort the process. In fresh processes, where the group
    is made before the first optimizer step imports what remembers it."""
    code = ("import pathlib, sys, train; train.main(sys.argv[1:]); "
            "names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]; "
            "print([name for name in names if 'gloo' in name])")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [subprocess.Popen(
        [sys.executable, "-c", code, *f"{QUICK_RUN} --opt grad --out {tmp_path}/run".split()],
        env=os.environ | dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="localhost",
                              MASTER_PORT=port, PYTHONPATH=str(Path(train.__file__).parent)),
        stdout=subprocess.PIPE, text=True) for rank in "01"]
    assert [child.communicate()[0].splitlines()[-1] for child in children] == ["[]", "[]"]
