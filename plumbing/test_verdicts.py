"""Files of verdicts: what is in them, what continues them, what is refused."""
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import certify                                                                     # noqa: E402
import train                                                                       # noqa: E402
from plumbing import verdicts                                                      # noqa: E402
from plumbing.for_tests import QUICK, command, fuzz, stop_at                       # noqa: E402


def test_certify_saves_what_it_finds_and_continues_where_it_stopped(tmp_path, capsys):
    run = tmp_path / "run"
    assert command(train.main, "--out", run, *"--net mlp --relax box --opt grad --eps-train 0 "
                   "--init default --subset 400 --test-subset 60 --epochs 12 --ramp 1 --lr 0.01 "
                   "--batch-size 50".split()) == 0
    assert command(certify.main, run, "--eps", 0.07) == 0
    printed = capsys.readouterr().out
    assert " 0 unknown = 60 samples" in printed and "branch-and-bound" in printed
    path = next(run.glob("*.jsonl"))
    (net, *_), data = train.load_run(run), train.load_dataset("digits")
    attacked = 0
    for row in map(json.loads, path.read_text().splitlines()[1:]):
        assert abs(sum(row["seconds_by_stage"].values()) - row["seconds"]) < 1e-9
        if row["status"] == "attacked":
            i, attacked = row["index"], attacked + 1
            point = torch.from_numpy(np.load(run / row["counterexample"], allow_pickle=False))
            assert (point.double() - data.x_test[i].double()).abs().max() <= 0.07
            assert net.double()(point[None].double()).argmax() != data.y_test[i]
    assert attacked > 10
    times = ("seconds", "seconds_by_stage", "crc")
    strip = lambda: sorted(({k: v for k, v in json.loads(l).items() if k not in times} for l in
                            path.read_text().splitlines()), key=lambda r: r.get("index", -1))
    whole, text = strip(), path.read_bytes()
    path.write_bytes(text[:len(text) // 2])                            # cut in the middle of a line
    assert command(certify.main, run, "--eps", 0.07) == 0
    assert "verdicts already in" in capsys.readouterr().out
    for a, b in zip(strip(), whole, strict=True):  # other batches: other rounding, same verdicts
        assert a.get("bound") == pytest.approx(b.get("bound"), abs=1e-3)
        assert {**a, "bound": 0} == {**b, "bound": 0}
    before = path.read_bytes()
    assert command(certify.main, run, "--eps", 0.07, "--steps", 3) == 2    # other settings
    assert path.read_bytes() == before
    assert "holds other results: steps is 40 there, 3 here" in capsys.readouterr().err
    renamed = tmp_path / "renamed"                         # or copied: its weights are what counts
    run.rename(renamed)
    assert command(certify.main, renamed, "--eps", 0.07) == 0
    assert "60 verdicts already in" in capsys.readouterr().out
    assert command(certify.main, renamed, "--eps", 0.07, "--timeout", 5) == 2
    assert "timeout is 30.0 there, 5.0 here. Go on with" in capsys.readouterr().err


def test_no_two_files_of_verdicts_share_what_is_named_after_them(tmp_path):
    names = ["v-eps0.1", "v-eps0.2", "v-eps0", "v", "v.jsonl", "v.json", "v[0-9].jsonl", "v.1"]
    folders = [verdicts.points_of(tmp_path / name) for name in names]
    assert len(set(folders)) == len(names)
    known, file = verdicts.open_log(tmp_path / "v-eps0.1", dict(eps=0.1))
    file.close()
    row = verdicts.sealed(dict(index=5))
    for name, other in (("v-eps0", "v-eps0.1"), ("v[0-9].jsonl", "v1.jsonl.process1")):
        with open(tmp_path / other, "w") as file:
            file.write(verdicts.sealed(dict(eps=0.1)) + "\n" + row + "\n")
        before = (tmp_path / other).read_bytes()
        known, file, todo = verdicts.open_share(tmp_path / name, dict(eps=0.1), 8)
        file.close()
        assert not known and (tmp_path / other).read_bytes() == before


def test_verdicts_of_other_weights_are_not_those_of_the_run(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as m:
        stop_at(m, (2,), signal.SIGTERM)
        assert command(train.main, "--out", run, *QUICK) == 143
    assert command(certify.main, run, "--stages", "box") == 0
    assert "attack and bounds of the first images" in capsys.readouterr().out
    assert command(certify.main, run, "--stages", "box") == 0          # the same: continued
    assert "attack and bounds of" not in capsys.readouterr().out       # nothing is left to do
    assert command(train.main, "--resume", run) == 0
    assert command(certify.main, run, "--stages", "box") == 2
    assert "of other weights (perhaps the run was trained on since)" in capsys.readouterr().err


def test_fuzzed_verdicts(tmp_path):
    path, header = tmp_path / "certify.jsonl", dict(run="r", eps=0.1)
    known, file = verdicts.open_log(path, header, verdicts.verdict_of)
    rows = [dict(index=i, status="certified", stage="box", bound=i / 7, seconds=0.25,
                 seconds_by_stage={"box": 0.25}) for i in range(20)]
    with file:
        for row in rows:
            print(verdicts.sealed(row), file=file)
    def load():
        known, file = verdicts.open_log(path, header, verdicts.verdict_of)
        file.close()
        return known
    def check(known, _):
        assert all((v.status, v.bound) == ("certified", i / 7) for i, v in known.items())
        assert set(known) <= set(range(20))
    assert len(load()) == 20
    fuzz(path, load, check)
    path.write_text("[" * 10 ** 5 + "\n")
    with pytest.raises(train.InputError, match="damaged"):
        load()


def test_a_file_where_the_counterexamples_belong_is_refused_before_the_first_image(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("v.counterexamples").write_text("")
    with pytest.raises(verdicts.InputError, match="v.counterexamples"):
        verdicts.write_verdicts(tmp_path / "v", dict(eps=0.1), [0], lambda *_: None,
                                verdicts.verdict_of, "title")
