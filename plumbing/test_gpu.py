"""benchmarks/gpu.py: what has finished is not run again; what was stopped or failed is."""
import json
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
sys.path.append(str(ROOT / "benchmarks"))
import common                                                                      # noqa: E402
import gpu                                                                         # noqa: E402


def gpu_main(folder, *more):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(folder / "out"),
                  "--runs", str(folder / "runs"), *more])
    return ended.value.code, json.loads((folder / "out" / "gpu.json").read_text())


def python(name, code, minutes=1.0, **more):
    return gpu.Part(name, minutes, ["-c", code], **more)


def test_parts_finish_fail_wait_and_are_not_repeated(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "runs" / "ran"
    ran.parent.mkdir()
    mark = f"open({str(ran)!r}, 'a').write"
    parts = [python("first", f"{mark}('1'); print('done in', {str(tmp_path / 'runs')!r})"),
             python("fails", f"{mark}('2'); raise SystemExit(3)"),
             python("waits", f"{mark}('3')", after="fails"),
             python("last", f"{mark}('4')")]
    monkeypatch.setattr(gpu, "tiny", lambda args: parts)
    code, known = gpu_main(tmp_path)
    assert code == 1 and ran.read_text() == "124"
    assert {name: entry["status"] for name, entry in known.items()} == {
        "first": "finished", "fails": "failed", "last": "finished"}
    assert known["first"]["output"] == ["done in RUNS"]                # no path of this machine
    assert str(tmp_path) not in json.dumps(known) and known["first"]["commit"]
    parts[1] = python("fails", f"{mark}('2')")
    code, known = gpu_main(tmp_path)
    assert code == 0 and ran.read_text() == "12423"
    assert {entry["status"] for entry in known.values()} == {"finished"}
    assert gpu_main(tmp_path) == (0, known) and ran.read_text() == "12423"
    monkeypatch.setattr(gpu, "tiny", lambda args: [python("late", f"{mark}('5')")])
    assert gpu_main(tmp_path, "--minutes", "0") == (0, known)          # time is up
    assert "4 parts finished" in capsys.readouterr().out


def test_a_training_whose_time_is_up_goes_on_in_the_next_call(tmp_path, monkeypatch):
    words = "--net mlp --relax box --opt grad --subset 300 --test-subset 5 --epochs".split()
    run = tmp_path / "runs" / "one"

    command = ["train.py", *words, str(10 ** 5), "--device", "cpu"]

    def go_on(epoch, minutes=0.08):
        """Call it, for longer each time, until it has come further than epoch: its entry."""
        monkeypatch.setattr(gpu, "tiny", lambda args: [gpu.Part("one", minutes, command, run)])
        code, known = gpu_main(tmp_path)
        assert code == 0 and known["one"]["status"] == "stopped"
        further = known["one"]["epoch"].get("epoch", 0) > epoch
        return known["one"] if further else go_on(epoch, 2 * minutes)

    first = go_on(0)
    assert train.load_run(run)[2]["done"] > 0 and "/one" in first["command"]
    second = go_on(first["epoch"]["epoch"])
    assert "--resume RUNS/one" in second["command"] and second["seconds"] > first["seconds"]
    assert second["epoch"]["seconds"] > first["epoch"]["seconds"]


def test_a_command_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    found, seconds = gpu.execute([sys.executable, "-c", code], 1.0, tmp_path / "log", {})
    assert found in (None, -15) and seconds < 30


def test_the_whole_has_every_part_of_its_plan_in_order():
    args = type("Args", (), dict(data_dir="DIR", device="cuda", runs="RUNS"))
    parts = list(gpu.whole(args))
    names = [part.name for part in parts if part.after is None]
    assert names == ["tests", "targets", "population", "passes", "bounds", "mnist-pgpe",
                     "mnist-grad", "mnist-rgs", "cifar10-rgs"]
    for part in parts:
        if part.command[0] == "train.py":
            train.parse_config(part.command[1:])                       # no option is misspelt
        if not part.name.endswith("tests"):
            assert "DIR" in part.command and "cuda" in part.command


def test_a_recorded_command_says_nothing_of_where_files_were():
    words = ["certify.py", "--run", "/a/b", "--samples", "4", "--code", "../c", "--out", "/d.json"]
    assert common.placeless(words) == ["certify.py", "--run", "RUN", "--samples", "4",
                                       "--code", "CODE", "--out", "OUT"]
