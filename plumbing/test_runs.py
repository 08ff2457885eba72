"""Run folders: whole at any moment, one run's own, and a run goes on as if it had never stopped."""
import errno
import io
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import certify
import train
from plumbing import runs
from plumbing.console import InputError
from plumbing.for_tests import QUICK, command, fake_cifar, fuzz, npz, stop_at, weights


RUNS = {   # what a run may have beside weights: sigmas, running statistics, augmentation
    "rgs": "--net small --epochs 3 --subset 300 --test-subset 5 --ramp 2 --milestones 1 2",
    "pgpe": "--net small --opt pgpe --samples 4 --sigma-adapt parameter --epochs 2 --subset 200 "
            "--test-subset 5 --milestones 1",
    "parts": "--net small --relax sabr --samples 4 --parts 2 --epochs 2 --subset 200 "
             "--test-subset 5",
    "batchnorm": "--dataset own.npz --net cnn7 --relax box --opt grad --epochs 3 --batch-size 4",
    "augmented": "--dataset cifar10 --data-dir . --net small --relax sabr --epochs 2 "
                 "--batch-size 4"}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_stops_and_goes_on_ends_with_the_same_weights(
        tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    npz("own.npz")
    fake_cifar(tmp_path, zipped=True)
    assert command(train.main, *RUNS[kind].split(), "--out", "whole") == 0
    with monkeypatch.context() as m:
        stop_at(m, (2, 4, 5), signal.SIGTERM)
        assert command(train.main, *RUNS[kind].split(), "--out", "run") == 128 + signal.SIGTERM
        err = capsys.readouterr().err
        assert "python train.py --resume run goes on after epoch 1, batch 2" in err
        assert command(train.main, "--resume", "run") == 143 == command(
            train.main, "--resume", "run")
    assert any(not torch.equal(t, weights("whole")[k]) for k, t in weights("run").items())
    assert command(train.main, "--resume", "run") == 0
    for k, t in weights("run").items():
        assert torch.equal(t, weights("whole")[k]), k
    logs = [[line.split(",")[:7] for line in Path(run, "log.csv").read_text().splitlines()]
            for run in ("whole", "run")]
    assert logs[0] == logs[1] and len(logs[0]) > 2                     # all but the times
    before = Path("run/checkpoint.pt").read_bytes()
    assert command(train.main, "--resume", "run") == 0                 # nothing left to do
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children")
def test_fifty_kills_at_random_times_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    run = "--net mlp --relax box --opt rgs --epochs 40 --subset 640 --ramp 20 --test-subset 5"
    assert command(train.main, *run.split(), "--out", "whole") == 0
    with monkeypatch.context() as m:
        stop_at(m, (1,), signal.SIGINT)
        assert command(train.main, *run.split(), "--out", "run") == 130
    random, kills = np.random.default_rng(0), 0
    while kills < 50:
        child = os.fork()
        if child == 0:
            os._exit(command(train.main, "--resume", "run"))
        time.sleep(random.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert train.load_run("run")[2]["done"] > 0                    # always whole
    assert command(train.main, "--resume", "run") == 0
    assert all(torch.equal(t, weights("whole")[k]) for k, t in weights("run").items())


def test_a_run_from_before_there_were_parts_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, *RUNS["rgs"].split(), "--parts", 1, "--out", "whole") == 0
    with monkeypatch.context() as m:
        stop_at(m, (2,), signal.SIGTERM)
        assert command(train.main, *RUNS["rgs"].split(), "--parts", 1, "--out", "run") == 143
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    del saved["config"]["parts"]
    torch.save(saved, "run/checkpoint.pt")
    assert command(train.main, "--resume", "run") == 0
    assert all(torch.equal(t, weights("whole")[k]) for k, t in weights("run").items())


def test_a_second_interrupt_ends_at_once_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), runs.requests_to_stop() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(tmp_path, monkeypatch):
    save = runs.save_checkpoint
    def slow(folder, net, config, training=None):
        save(folder, net, config, training)
        if training:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(runs, "save_checkpoint", slow)
    assert command(train.main, "--out", tmp_path / "run", *QUICK) == 143


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    run, fsync, count = tmp_path / "run", os.fsync, [0]
    def full(handle):
        count[0] += 1
        if count[0] > 4:           # config, checkpoint at the start; log and checkpoint of epoch 1
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)
    monkeypatch.setattr(os, "fsync", full)
    quick = ["--epochs", 3, *QUICK[2:]]
    assert command(train.main, "--out", run, *quick) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
    assert train.load_run(run)[2]["done"] == 3 and {p.name for p in run.iterdir()} == {
        "config.json", "log.csv", "checkpoint.pt"}
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert command(train.main, "--resume", run) == 0


def test_one_process_for_each_run_and_only_on_its_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    npz("own.npz")
    own = "--dataset own.npz --net mlp --relax box --opt grad --epochs 1"
    assert command(train.main, *own.split(), "--out", "run") == 0
    with runs.locked("run"):
        assert command(train.main, "--resume", "run") == 2
        assert "run is in use by another process" in capsys.readouterr().err
    assert command(certify.main, "run", "--stages", "box") == 0
    with open(next(Path("run").glob("*.jsonl"))) as file:
        runs.claim(file, "")
        assert command(certify.main, "run", "--stages", "box") == 2
    assert "in use" in capsys.readouterr().err
    npz("own.npz", y_train=(np.arange(12) + 1) % 4)
    for args, words in (([], "was trained on other images"), (["--lr", "1"], "leave out --lr")):
        assert command(train.main, "--resume", "run", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert command(train.main, "--resume", "nowhere") == 2
    assert "nowhere cannot be opened" in capsys.readouterr().err
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    npz("own.npz")
    for damage in ({"training": {"done": 0}}, {"training": saved["training"] | {"noise": 3}},
                   {"config": saved["config"] | {"input_shape": [3, 10 ** 6, 10 ** 6]}},
                   {"state": {k: t.double() for k, t in saved["state"].items()}}):
        torch.save(saved | damage, "run/checkpoint.pt")
        assert command(train.main, "--resume", "run") == 2, damage.keys()
        assert capsys.readouterr().err.count("\n") == 1


def test_run_folders_and_checkpoints_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    assert command(certify.main) == 2 and "no run found" in capsys.readouterr().err
    assert command(train.main, "--out", "full", *QUICK) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]
    for _ in range(2):
        assert command(train.main, "--epochs", 0, "--test-subset", 5) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-cnn3-deeppoly-rgs", "digits-cnn3-deeppoly-rgs-2"]
    assert command(certify.main) == 0                                  # the newest
    assert "digits-cnn3-deeppoly-rgs-2" in capsys.readouterr().out
    path = tmp_path / "runs/digits-cnn3-deeppoly-rgs/checkpoint.pt"
    good = path.read_bytes()
    for bad in (b"", b"hello", good[:-100], good.replace(b"format", b"foreign")):
        path.write_bytes(bad)
        assert command(certify.main, path.parent) == 2
        err = capsys.readouterr().err
        assert "checkpoint" in err and err.count("\n") == 1
    saved = torch.load(io.BytesIO(good), weights_only=True)
    for change in (dict(format=99), dict(config=saved["config"] | {"net": "cnn5"}), dict(state={})):
        torch.save(saved | change, path)
        assert command(certify.main, path.parent) == 2 and capsys.readouterr().err.count("\n") == 1
    assert command(certify.main, tmp_path / "nowhere") == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_fuzzed_checkpoint(tmp_path):
    assert command(train.main, "--net", "mlp", "--dataset", npz(tmp_path / "o.npz") and tmp_path
                   / "o.npz", "--relax", "box", "--epochs", 1, "--out", tmp_path / "run") == 0
    good = weights(tmp_path / "run")
    def check(result, _):
        net, config, training = result
        assert all(torch.equal(t, good[k]) for k, t in net.state_dict().items())
        assert training["done"] == 1 and config["relax"] == "box"
    fuzz(tmp_path / "run/checkpoint.pt", lambda: train.load_run(tmp_path / "run"), check)


@pytest.mark.parametrize("out", [None, "runs/same"])
def test_simultaneous_starts_never_share_a_folder(tmp_path, monkeypatch, out):
    """Of eight at the same moment, each has a folder of its own; with --out, one has it."""
    monkeypatch.chdir(tmp_path)
    net, start = torch.nn.Linear(1, 1), threading.Barrier(8, timeout=20)
    def begin(number, turn):
        config = dict(out=out and f"{out}-{turn}", dataset="digits", net="n", relax=f"r{turn}",
                      opt="o", number=number)
        start.wait()
        try:
            with runs.new_folder(config, net):
                folder = Path(config["out"])
                found = json.loads((folder / "config.json").read_text())
                start.wait()                    # until all have one, or have been refused
                return str(folder), found["number"] == number
        except InputError as e:
            assert "in use" in str(e) or "exists already" in str(e)
            start.wait()
            return None, True
    for turn in range(25):
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(begin, range(8), [turn] * 8))
        folders = [folder for folder, _ in results if folder]
        assert all(own for _, own in results) and len(set(folders)) == len(folders)
        assert len(folders) == (1 if out else 8)


def test_a_run_is_also_named_by_its_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, "--out", "run", *QUICK) == 0
    table = capsys.readouterr().out.splitlines()[-7:]
    assert command(train.main, "--resume", "run/checkpoint.pt") == 0
    assert capsys.readouterr().out.splitlines()[-7:] == table
    assert train.load_run("run/checkpoint.pt")[1]["out"] == "run"
    for name in ("checkpoint.pt", "log.csv"):
        assert command(certify.main, f"run/{name}", "--samples", 2, "--timeout", 1) == 0
        assert "verdicts in run/certify-eps0.1.jsonl" in capsys.readouterr().out


def test_another_data_set_is_not_that_of_a_run(tmp_path, monkeypatch, capsys):
    """Nothing is looked for, or downloaded."""
    monkeypatch.chdir(tmp_path)
    assert command(train.main, "--out", "run", *QUICK) == 0
    for main, words in ((certify.main, ["run"]), (train.main, ["--resume", "run"])):
        for other in ("mnist", "own.npz"):
            capsys.readouterr()
            assert command(main, *words, "--dataset", other) == 2
            told = capsys.readouterr()
            assert f"--dataset {other}: run was trained on digits" in told.err and not told.out


def test_an_interrupt_is_answered_at_once(tmp_path, monkeypatch, capfd):
    stop_at(monkeypatch, (2,), signal.SIGINT)
    assert command(train.main, "--out", tmp_path / "run", *QUICK) == 130
    assert "finishing this batch; once more ends at once" in capfd.readouterr().err


def test_a_norm_that_overflows_is_named_so(tmp_path, monkeypatch, capsys):
    """The gradient is finite, but the sum of its squares is not, in float32."""
    monkeypatch.setattr(train, "estimate", lambda losses, theta, *_: (
        theta.new_tensor(2.0), torch.full_like(theta, 1e25), None))
    assert command(train.main, "--out", tmp_path / "run", *QUICK) == 1
    err = capsys.readouterr().err
    assert "the gradient is finite, but the sum of its squares is not" in err
    monkeypatch.setattr(train, "estimate", lambda losses, theta, *_: (
        theta.new_tensor(2.0), torch.full_like(theta, torch.inf), None))
    assert command(train.main, "--out", tmp_path / "run2", *QUICK) == 1
    assert "the gradient of layer 0.weight is not finite" in capsys.readouterr().err


def test_progress_and_the_log_by_hand():
    """After 5 of 12 steps in 10 s, of which 2 of 3 steps, 8 images each, since second 4."""
    now = dict(done=5, seconds=10.0, began=4.0, sigma=torch.tensor([0.1, 0.3]),
               totals=torch.tensor([40.0, 10.0, 60.0]))
    config = dict(epochs=4, batch_size=8, eps_train=2 / 255)
    numbers = torch.tensor([2.5, 0.75, 1.0])
    line = runs.progress_line(now, 2, 2, 3, config, 3.14e-12, numbers, 14.4)
    assert line == ("epoch 2/4  batch 2/3  eps 3.1e-12 of 0.0078  loss 2.5000  certified 75.0 %  "
                    "3 samples/s  0:00:14 left")
    huge = runs.progress_line(now, 2, 2, 3, config, 2 / 255, torch.tensor([4.1e19, 0, 1]), 14.4)
    assert "  loss 4.1e+19  " in huge
    assert "  eps 0.0078  " in runs.progress_line(now, 2, 2, 3, config, 2 / 255, numbers, 14.4)
    row = runs.log_row(now, 2, 0.05, 0.01, 20)
    assert row == pytest.approx(dict(epoch=2, eps=0.05, lr=0.01, sigma=0.2, loss=2, certified=0.5,
                                     gradient=3, seconds=10, samples_per_s=20 / 6))
    assert list(row) == list(runs.LOG)


def test_own_data_is_found_by_its_checksum_wherever_it_is_now(tmp_path, monkeypatch, capsys):
    (tmp_path / "begun").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    npz("own.npz")
    own = "--dataset own.npz --net mlp --relax box --opt grad --epochs 1"
    assert command(train.main, *own.split(), "--out", "run") == 0
    Path("../here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    npz("own.npz", y_train=(np.arange(12) + 1) % 4)          # of the same name, but not the run's
    run = ["../begun/run", "--stages", "box"]
    assert command(train.main, "--resume", run[0]) == 0 == command(certify.main, *run)
    Path("../moved").mkdir()
    Path("../begun/own.npz").rename("../moved/else.npz")
    capsys.readouterr()
    assert command(train.main, "--resume", run[0]) == 2
    assert "name its own with --dataset or --data-dir" in capsys.readouterr().err
    assert command(train.main, "--resume", run[0], "--dataset", "../moved/else.npz") == 0
    assert command(certify.main, *run, "--dataset", "../moved/else.npz") == 0
    Path("../moved/else.npz").rename("../moved/own.npz")
    assert command(train.main, "--resume", run[0], "--data-dir", "../moved") == 0
    assert command(certify.main, *run, "--data-dir", "../moved") == 0
    assert "other images" not in capsys.readouterr().err
    assert command(certify.main, *run, "--out", "other.jsonl") == 0        # allowed, and said
    assert "trained on other images" in capsys.readouterr().err
    Path("own.npz").unlink()
    assert command(certify.main, *run) == 2
    assert "own.npz: no such file; name it with --dataset" in capsys.readouterr().err


def test_an_edited_config_is_named_and_the_checkpoint_counts(tmp_path, capsys):
    assert command(train.main, "--out", tmp_path / "run", *QUICK) == 0
    before = weights(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "renamed")
    assert command(train.main, "--resume", tmp_path / "renamed") == 0
    assert "edited" not in capsys.readouterr().err
    path = tmp_path / "renamed/config.json"
    path.write_text(path.read_text().replace('"epochs": 1', '"epochs": 7'))
    assert command(train.main, "--resume", tmp_path / "renamed") == 0
    words = "edited (epochs 7 instead of 1); what checkpoint.pt has counts"
    assert words in capsys.readouterr().err
    assert all(torch.equal(t, before[k]) for k, t in weights(tmp_path / "renamed").items())


def test_the_folder_of_a_run_says_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--sigma", 0.03], ["--seed", 1, "--sigma", 0.01], ["--opt", "grad"],
                  ["--eps", "8/255", "--no-antithetic", "--augment"]):
        assert command(train.main, "--net", "mlp", "--epochs", 0, "--test-subset", 2, *words) == 0
    assert {p.name for p in Path("runs").iterdir()} == {
        "digits-mlp-" + name for name in (
            "deeppoly-rgs", "deeppoly-rgs-sigma0.03", "deeppoly-rgs-seed1", "deeppoly-grad",
            "deeppoly-rgs-eps0.03137-no-antithetic-augment")}
    config = train.complete(dict(init="default", l1=1e-4, kappa=0.5))
    assert runs.told_apart(config, train.SETTINGS) == ["kappa0.5", "l1-0.0001", "initdefault"]


def test_a_run_is_certified_on_images_like_its_own():
    config = dict(input_shape=[1, 4, 4], classes=3, dataset="own.npz", validation=0)
    alike = SimpleNamespace(x_test=torch.rand(2, 1, 4, 4), classes=3)
    for other in (dict(x_test=torch.rand(2, 1, 5, 4)), dict(classes=4)):
        data = SimpleNamespace(**vars(alike) | other)
        with pytest.raises(InputError, match=r"R was trained on images \[1, 4, 4\] of 3 classes"):
            runs.check_images_of_run(data, config, "R")
