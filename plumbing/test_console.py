"""The command line: what cannot be used is one line that names it, and help shows real defaults."""
import time
from pathlib import Path

import pytest
import torch

import certify
import train
from plumbing import console
from plumbing.for_tests import QUICK, command, weights


@pytest.mark.parametrize("args, words", [
    (["--dataset", "imagenet"], "--dataset: 'imagenet'"),
    (["--relax", "zonotope"], "--relax: invalid choice: 'zonotope'"),
    (["--net", "vgg"], "--net: 'vgg' is none of mlp, small"),
    (["--opt", "adam"], "--opt: invalid choice"),
    (["--eps", "-0.1"], "--eps: '-0.1'"),
    (["--eps", "8"], "--eps: '8' has to be a number >= 0 and <= 1"),
    (["--eps", "1/0"], "--eps"), (["--eps-train", "nan"], "--eps-train: 'nan'"),
    (["--lr", "0"], "--lr: '0'"),
    (["--opt", "pgpe", "--sigma", "0"], "--sigma: '0' has to be a number > 0"),
    (["--opt", "pgpe", "--samples", "0"], "--samples: '0'"),
    (["--opt", "pgpe", "--samples", "3"], "--samples: 3 is odd"),
    (["--samples", "5"], "--samples: 5 is odd"),
    (["--loss", "certified-error"], "use --opt pgpe"),
    (["--loss", "certified-error", "--opt", "pgpe", "--relax", "sabr"], "sabr has no"),
    (["--lam", "0"], "--lam: '0'"), (["--alpha", "2"], "--alpha: '2'"),
    (["--sigma-adapt", "scalar"], "--sigma-adapt"),
    (["--batch-size", "x"], "--batch-size"), (["--epochs", "-1"], "--epochs"),
    (["--device", "cuda"], "--device cuda"), (["--dataset", "no.npz"], "no.npz: no such file"),
    (["--unknown"], "--unknown")])
def test_train_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(train.main, *args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_has_a_line_and_a_real_default_for_every_option(capsys):
    assert command(train.main, "--help") == 0
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    assert "None" not in text
    for name, setting in train.SETTINGS.items():
        assert setting.meaning.split(";")[0] in text, name
        if setting.default is None:
            assert "default: " in setting.meaning or name == "resume"
        else:
            assert f"default: {console.shown(setting.default)}" in text, name
    assert "0.1 (digits), 0.1 (mnist), 2/255 (cifar10), 0.1 (npz)" in text


def test_the_parser_gives_what_was_given_and_the_table_the_rest():
    config = train.parse_config("--dataset cifar10 --opt pgpe --no-skip-stable".split())
    assert (config["eps"], config["eps_train"], config["sigma"], config["samples"]) == (
        2 / 255, 2 / 255, 0.01, 64)
    assert config["milestones"] == [120, 140]
    assert (config["skip_stable"], config["kappa"]) == (False, 0.0)
    shorter = train.parse_config("--epochs 10 --eps 8/255".split())
    assert (shorter["ramp"], shorter["milestones"], shorter["eps_train"]) == (4, [8, 9], 8 / 255)
    assert train.parse_config("--epochs 10 --ramp 2".split())["milestones"] == [15, 18]
    plain = train.parse_config("--opt grad --samples 9 --sigma 0.5".split())
    assert (plain["samples"], plain["sigma"]) == (1, 0.0)
    assert train.parse_config(["--resume", "a/b", "--device", "cpu"]) == dict(
        resume=Path("a/b"), device="cpu")
    assert train.SETTINGS["relax"].limits == (*train.RELAXATIONS, *train.BASELINES)


@pytest.mark.parametrize("args", [["--relax-", "box"], ["--eps-t", "0.1"], ["--ep", "3"]])
def test_options_are_written_out(capsys, args):
    assert command(train.main, *args) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


EFFECTS = {   # a value of each setting that only some read, and where one does and one does not
    "sigma": ("0.05", "--opt rgs", "--opt grad"), "samples": ("4", "--opt rgs", "--opt grad"),
    "antithetic": (None, "--opt rgs", "--opt pgpe --samples 4"),
    "sigma-lr": ("0.3", "--opt pgpe --samples 4 --sigma-adapt scalar", "--opt pgpe --samples 4"),
    "beta": ("0.5", "--relax crown-ibp", "--relax box"),
    "alpha": ("0.7", "--relax mtl-ibp", "--relax sabr"),
    "lam": ("0.9", "--relax sabr", "--relax box"),
    "slope-steps": ("1", "--relax alpha-crown", "--relax deeppoly"),
    "skip-stable": (None, "--relax deeppoly", "--relax crown-ibp")}


@pytest.mark.parametrize("name", EFFECTS)
def test_what_has_no_effect_is_said_and_only_then(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    value, reads, ignores = EFFECTS[name]
    given = [f"--no-{name}"] if value is None else [f"--{name}", value]
    common = "--net small --epochs 2 --ramp 1 --subset 96 --batch-size 32 --test-subset 2".split()
    for words, effect in ((reads, True), (ignores, False)):
        for out, more in (("with", given), ("without", [])):
            out_folder = f"{out}{effect}"
            assert command(train.main, *common, *words.split(), *more, "--out", out_folder) == 0
            said = f"warning: --{name} has no effect with --" in capsys.readouterr().err
            assert said == (out == "with" and not effect)
        same = [torch.equal(a, b) for a, b in zip(weights(f"with{effect}").values(),
                                                  weights(f"without{effect}").values())]
        assert all(same) != effect


@pytest.mark.parametrize("loss, words", [
    (2.3, "is about that of guessing"), (37.0, "is 16.1 times that of guessing"),
    (76663.0, "is 3.33e+04 times that of"), (2.9, "is 26 % above that of guessing"), (1.0, "")])
def test_a_loss_is_called_that_of_guessing_if_it_is(capsys, loss, words):
    row = dict(loss=loss, certified=0.1, seconds=1.0)
    console.show_training([row], dict(classes=10, ramp=1, epochs=2, relax="box"),
                          console.Progress())
    err = capsys.readouterr().err
    assert words in err and bool(err) == bool(words) and err.count("\n") <= 1


def test_progress_is_never_silent_for_long_in_the_first_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(console.time, "time", lambda: now[0])
    show, seen = console.Progress(), []
    for _ in range(240):
        show("line")
        seen += [now[0]] * bool(capsys.readouterr().out)
        now[0] += 0.5
    gaps = [b - a for a, b in zip(seen, seen[1:])]
    assert max(gaps[:19]) <= 3 and max(gaps) <= 10 and min(gaps) >= 3


def test_a_line_that_stays_is_shown_again(capsys):
    with console.Progress() as show:
        show("attacking")
        console.time.sleep(3.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attacking" and any(line.startswith("attacking  (") for line in lines)


def test_the_page_of_this_folder_names_each_of_its_modules():
    folder = Path(console.__file__).parent
    page = (folder / "README.md").read_text()
    modules = [p.name for p in folder.glob("*.py") if not p.name.startswith(("test_", "__"))]
    assert [name for name in modules if f"]({name})" not in page] == []


def test_a_certified_error_is_not_compared_with_the_loss_of_guessing(capsys):
    row = dict(loss=0.7, certified=0.3, seconds=1.0)
    config = dict(classes=2, ramp=1, epochs=2, relax="box", loss="certified-error")
    console.show_training([row], config, console.Progress())
    assert not capsys.readouterr().err


def test_a_slow_attack_and_slow_bounds_are_not_silent(tmp_path, monkeypatch, capsys):
    """Neither in the evaluation nor in the verdicts: what stays is shown again, with its age."""
    attack = train.attack
    monkeypatch.setattr(train, "attack", lambda *args: time.sleep(3.6) or attack(*args))
    assert command(train.main, "--net", "mlp", *QUICK, "--out", tmp_path / "run") == 0
    assert "attacking  (3 s ago)" in capsys.readouterr().out
    descend = certify.descend
    monkeypatch.setattr(certify, "descend", lambda *args: time.sleep(3.6) or descend(*args))
    assert command(certify.main, tmp_path / "run", "--restarts", 1, "--stages", "box") == 0
    assert "attack and bounds of the first images  (3 s ago)" in capsys.readouterr().out
