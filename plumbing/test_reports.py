"""Several radii in one go, and weights from elsewhere."""
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import certify                                                                     # noqa: E402
import train                                                                       # noqa: E402
from plumbing.console import InputError                                            # noqa: E402
from plumbing.for_tests import command, fuzz, same_as                               # noqa: E402
from plumbing.reports import curve, inherited, outside_in                          # noqa: E402
from plumbing.verdicts import STATUSES, Verdict                                    # noqa: E402
from plumbing.weights import read_weights                                          # noqa: E402


def rows(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines:
        row.pop("crc")
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert command(train.main, "--out", out, *"--net mlp --relax box --opt grad --eps-train 0 "
                   "--init default --subset 400 --test-subset 40 --epochs 12 --ramp 1 --lr 0.01 "
                   "--batch-size 50".split()) == 0
    return out


def test_radii_in_one_go_give_the_files_of_single_runs_for_less(run, capsys, monkeypatch):
    radii, singles, asked = ("0.01", "0.03", "0.06"), {}, []
    for eps in radii:
        assert command(certify.main, run, "--eps", eps) == 0
        path = run / f"certify-eps{eps}.jsonl"
        singles[eps] = rows(path)
        path.unlink()
    sound = certify.certify
    monkeypatch.setattr(certify, "certify", lambda net, x, y, eps, **options: (
        asked.append((eps, len(x))), sound(net, x, y, eps, **options))[1])
    capsys.readouterr()
    assert command(certify.main, run, "--eps", *radii) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    kinds = {eps: [] for eps in radii}
    for eps in radii:
        header, *found = rows(run / f"certify-eps{eps}.jsonl")
        assert header == singles[eps][0]
        found, single = (sorted(r, key=lambda row: row["index"]) for r in (found, singles[eps][1:]))
        assert [v["status"] for v in found] == [v["status"] for v in single]
        kinds[eps] = [v["status"] for v in found]
        data, (net, *_) = train.load_dataset("digits"), train.load_run(run)
        for v in found:
            if v["status"] == "attacked":
                point = torch.from_numpy(np.load(run / v["counterexample"])).double()
                image = data.x_test[v["index"]].double()
                assert (point - image).abs().max() <= float(eps)
                assert net.double()(point[None]).argmax() != v["label"]
    for line, eps in zip(table[1:], radii):
        assert line.split()[:-1] == [eps, *(str(kinds[eps].count(s)) for s in STATUSES),
                                     f"{100 * kinds[eps].count('certified') / 40:.2f}"]
    assert dict(asked) == {0.06: 40, 0.01: 40 - kinds["0.06"].count("certified")
                           - kinds["0.06"].count("misclassified"),
                           0.03: sum(a == "certified" and b == "attacked"
                                     for a, b in zip(kinds["0.01"], kinds["0.06"]))}
    assert command(certify.main, run, "--eps", "0.03") == 0            # nothing is left to do
    assert asked[3:] == [(0.03, 0)]


def test_a_foreign_file_of_any_radius_is_refused_before_the_first_image(run, capsys, monkeypatch):
    path = run / "certify-eps0.02.jsonl"
    assert command(certify.main, run, "--eps", "0.02", "--samples", 2, "--timeout", 9) == 0
    before = path.read_bytes()
    monkeypatch.setattr(certify, "certify", lambda *args, **options: pytest.fail("too late"))
    for content, words in ((before, "timeout is 9.0 there"), (b"else\n", "no file of verdicts")):
        path.write_bytes(content)
        assert command(certify.main, run, "--eps", "0.04", "0.02", "0.05") == 2
        assert words in capsys.readouterr().err and path.read_bytes() == content
    path.unlink()


def test_radii_whose_files_have_one_name_are_refused_and_no_limit_is_a_limit(run, capsys):
    assert command(certify.main, run, "--eps", "0.06", "0.0600000001") == 2
    assert "two radii of --eps agree in the six digits" in capsys.readouterr().err
    assert command(certify.main, run, "--eps", "0.07", "--samples", 3, "--timeout", "inf") == 0
    assert "3 samples" in capsys.readouterr().out
    assert command(certify.main, run, "--eps", "0.07", "--samples", 3, "--timeout", "inf") == 0
    (run / "certify-eps0.07.jsonl").unlink()


def test_what_one_radius_says_about_another():
    point = torch.zeros(1)
    of = lambda status, **more: {0.1: {0: Verdict(status, "box", 0.5, 3.0, **more)}}
    for eps, status, more, want in (
            (0.05, "certified", {}, ("certified", 0.5)), (0.2, "certified", {}, None),
            (0.2, "attacked", dict(counterexample=point), ("attacked", -np.inf)),
            (0.05, "attacked", dict(counterexample=point), None), (0.2, "attacked", {}, None),
            (0.05, "misclassified", {}, ("misclassified", 0.5)), (0.05, "unknown", {}, None)):
        v = inherited(0, eps, of(status, **more))
        assert (v and (v.status, v.bound)) == want
        assert v is None or v.seconds == 0
    assert inherited(1, 0.05, of("certified")) is None
    assert outside_in([0.1, 0.3, 0.2, 0.4, 0.3]) == [0.4, 0.1, 0.3, 0.2]
    with pytest.raises(AssertionError, match="image 0 is attacked at 0.1 and certified at a"):
        curve(of("attacked") | {0.2: {0: Verdict("certified")}})
    curve(of("attacked") | {0.05: {0: Verdict("certified")}})


def test_weights_from_elsewhere_by_name_or_in_order(run, tmp_path, capsys):
    assert command(certify.main, run, "--eps", "0.02") == 0
    net, config, _ = train.load_run(run)
    torch.save(net.state_dict(), tmp_path / "ours.pt")
    torch.save({"state_dict": {f"blocks.{k}": t for k, t in net.state_dict().items()}},
               tmp_path / "theirs.pt")
    for name in ("ours.pt", "theirs.pt"):
        assert command(certify.main, "--weights", tmp_path / name, "--net", "mlp", "--samples", 40,
                       "--dataset", "digits", "--eps", "0.02") == 0
        (_, *ours), (_, *single) = (rows(path) for path in (
            tmp_path / f"{name}.certify-eps0.02.jsonl", run / "certify-eps0.02.jsonl"))
        same = lambda r: sorted((v["index"], v["status"], v["stage"]) for v in r)
        assert same(ours) == same(single)


def test_files_of_verdicts_may_have_different_numbers_of_images(run, capsys):
    assert command(certify.main, run, "--eps", 0.04) == 0
    capsys.readouterr()
    assert command(certify.main, run, "--eps", 0.04, 0.05, "--samples", 3) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [sum(map(int, line.split()[1:5])) for line in table] == [3, 3]


def test_verdicts_on_one_network_are_not_continued_for_another_of_the_same_weights(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("""
import torch.nn as nn
layers = lambda: (nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
one = lambda shape, classes: nn.Sequential(*layers())
two = lambda shape, classes: nn.Sequential(*layers(), nn.ReLU())
""")
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.ReLU(),
                                   torch.nn.Linear(20, 10)).state_dict(), "w.pt")
    words = "--weights w.pt --dataset digits --samples 3 --eps 0.01 --net".split()
    assert [command(certify.main, *words, f"own.py:{name}") for name in ("one", "one")] == [0, 0]
    assert command(certify.main, *words, "own.py:two") == 2
    assert "it is of another network" in capsys.readouterr().err


def test_weights_that_do_not_fit_and_hostile_files_are_refused(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    net = train.build_network("mlp", (1, 8, 8), 10)
    other = train.build_network("mlp", (1, 8, 7), 10)
    files = dict(hostile=Hostile(), empty={}, number=3, list=[torch.zeros(2)],
                 other=other.state_dict(), few=dict(list(net.state_dict().items())[:3]))
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(pickle.dumps(content)) if name == "hostile" else torch.save(content, path)
        with pytest.raises(InputError, match=name):
            read_weights(path, net)
    with pytest.raises(InputError):
        read_weights(tmp_path / "nowhere", net)
    assert not (tmp_path / "executed").exists()
    run = ["run", "--weights", "w", "--net", "mlp", "--dataset", "digits"]
    for words, mend in ((["--net", "mlp"], "--net: it is for --weights FILE"),
                        (run, "--weights: takes no run folder; leave out run"),
                        (run[1:3], "--weights: give --net and --dataset, too"),
                        (run[1:5], "--weights: give --dataset, too"),
                        (["run", "--eps", "0.1", "0.2", "--out", "o"], "--out: one file")):
        assert command(certify.main, *words) == 2
        err = capsys.readouterr().err
        assert err.startswith("certify.py: error: argument " + mend) and err.count("\n") == 1


def test_the_order_of_the_tensors_counts_only_where_their_names_say_nothing(tmp_path):
    """Those of BatchNorm have one shape."""
    net, other = (train.build_network("cnn7-bn", (1, 8, 8), 10) for _ in "ab")
    for t in net.state_dict().values():
        t.normal_() if t.is_floating_point() else t
    there = {k: t for k, t in sorted(net.state_dict().items()) if "num_batches" not in k}
    torch.save(there, tmp_path / "sorted.pt")
    again = read_weights(tmp_path / "sorted.pt", other).state_dict()
    assert all(torch.equal(t, again[k]) for k, t in there.items())
    only = [k for k in there if k.startswith("1.")]
    torch.save({f"a.{k}": there[k] for k in only}, tmp_path / "swapped.pt")
    with pytest.raises(InputError, match="a.1.bias stands where the network has 0.weight"):
        read_weights(tmp_path / "swapped.pt", torch.nn.Sequential(torch.nn.BatchNorm2d(64)))


def test_fuzzed_weights(tmp_path):
    good, path = train.build_network("mlp", (1, 4, 4), 3), tmp_path / "weights.pt"
    torch.save(good.state_dict(), path)
    load = lambda: read_weights(path, train.build_network("mlp", (1, 4, 4), 3)).parameters()
    fuzz(path, load, same_as(list(good.parameters())))
