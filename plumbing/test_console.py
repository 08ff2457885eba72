"""The command line: what cannot be used is one line that names it, and help shows real defaults."""
import pytest
import torch

import train
from plumbing.for_tests import command


@pytest.mark.parametrize("args, words", [
    (["--dataset", "imagenet"], "--dataset: 'imagenet'"),
    (["--relax", "zonotope"], "--relax: invalid choice: 'zonotope'"),
    (["--net", "vgg"], "--net: invalid choice"), (["--opt", "adam"], "--opt: invalid choice"),
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
