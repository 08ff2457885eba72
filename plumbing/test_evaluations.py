"""What a run came to, kept beside it, and several runs in one table."""
import json
from pathlib import Path

import numpy as np

import train
from plumbing import evaluations
from plumbing.for_tests import QUICK, command, npz


def test_a_run_keeps_its_table_and_several_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--seed", 1], ["--seed", 2], ["--sigma", 0.03]):
        assert command(train.main, "--net", "mlp", *QUICK, *words) == 0
    printed = capsys.readouterr().out
    folders = sorted(str(path) for path in Path("runs").iterdir())
    for folder in folders:
        found = json.loads(Path(folder, "evaluation.json").read_text())
        assert (found["n"], found["eps"]) == (60, 0.1) and ("commit" in found or "version" in found)
        assert all(f"{k}/60" in printed for k in found["counts"].values())
    assert command(train.main, "--compare", *folders) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    cells = [[word.strip() for word in line.split("|")[1:-1]] for line in [head, *lines]]
    assert set(rule) == {"|", "-"} and len(cells) == 5
    assert cells[0] == ["run", "sigma", "seed", "n", *found["counts"]]
    assert [row[1:4] for row in cells[1:4]] == [["0.01", "1", "60"], ["0.01", "2", "60"],
                                                ["0.03", "0", "60"]]
    natural = [100 * json.loads(Path(folder, "evaluation.json").read_text())["counts"]["natural"]
               / 60 for folder in folders]
    assert [row[4] for row in cells[1:4]] == [f"{p:.1f}" for p in natural]
    spread = f"{np.mean(natural[:2]):.1f} ± {np.std(natural[:2], ddof=1):.1f}"
    assert cells[4][:5] == ["mean of 2", "0.01", "all", "60", spread]


def test_runs_on_other_images_are_told_apart(tmp_path, monkeypatch, capsys):
    """Two files of images of one shape, and two seeds: no mean over both. A file that has moved
    is the same one."""
    monkeypatch.chdir(tmp_path)
    Path("moved").mkdir()
    npz("one.npz")
    npz("moved/one.npz")
    npz("two.npz", y_train=(np.arange(12) + 1) % 4)
    for seed, name in enumerate(("one", "two", "moved/one")):
        assert command(train.main, "--dataset", f"{name}.npz", "--net", "mlp", "--relax", "box",
                       "--epochs", 0, "--seed", seed, "--out", f"run{seed}") == 0
    capsys.readouterr()
    assert command(train.main, "--compare", "run0", "run1") == 0
    table = capsys.readouterr().out
    assert "dataset" in table and "two.npz" in table and "mean of" not in table
    assert command(train.main, "--compare", "run0", "run2") == 0
    table = capsys.readouterr().out
    assert "dataset" not in table and "mean of 2" in table


def test_a_count_that_a_run_lacks_is_not_zero(tmp_path):
    for seed, counts in enumerate((dict(natural=9, box=5), dict(natural=8))):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(seed=seed)))
        (folder / "evaluation.json").write_text(json.dumps(dict(n=10, eps=0.1, counts=counts)))
    rows = [row.split() for row in evaluations.comparison(sorted(tmp_path.iterdir()))]
    assert [row[-6:] for row in rows[2:4]] == [["10", "|", "90.0", "|", "50.0", "|"],
                                               ["10", "|", "80.0", "|", "-", "|"]]
    assert rows[4][-6:] == ["85.0", "±", "7.1", "|", "-", "|"]


def test_runs_that_cannot_be_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("wrong", '{"n": 60, "counts": {"natural": 61}}'), ("no", "{"),
                       ("list", "[]"), ("not", '{"n": "6", "counts": {}}'), ("deep", 9999 * "[")):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
        Path(name, "evaluation.json").write_text(text)
        assert command(train.main, "--compare", name) == 2
        err = capsys.readouterr().err
        assert f"{name}: its evaluation.json or config.json cannot be read" in err, name
    assert command(train.main, "--compare", "nowhere") == 2
    assert "python train.py --resume nowhere writes it" in capsys.readouterr().err
    assert command(train.main, "--compare", "wrong", "--lr", "1") == 2
    assert "leave out --lr" in capsys.readouterr().err


def test_a_longer_run_is_not_compared_by_what_it_came_to_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, "--net", "mlp", *QUICK, "--out", "run") == 0
    with monkeypatch.context() as m:                                 # killed before its first step
        m.setattr(train, "train", lambda *args, **options: exit(9))
        assert command(train.main, "--resume", "run", "--epochs", 50) == 9
    assert command(train.main, "--compare", "run") == 2
    assert "python train.py --resume run writes it" in capsys.readouterr().err


def test_code_outside_of_git_is_named_by_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("x")
    first = evaluations.code()
    (tmp_path / "train.py").write_text("y")
    assert list(first) == ["version"] and evaluations.code() != first
