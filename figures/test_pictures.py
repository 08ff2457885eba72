"""Pictures of runs hold the numbers of the runs. Skipped without matplotlib."""
import json
import re

import numpy as np
import pytest
import torch

import certify
import train
from plumbing.console import InputError
from plumbing.data import load_dataset
from plumbing.for_tests import command, weights

pytest.importorskip("matplotlib")
import draw                                                                        # noqa: E402
import pictures                                                                    # noqa: E402

TINY = "--net mlp --opt grad --epochs 3 --ramp 2 --eps 0.02 --lr 1e-2 --test-subset 40".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders, of which the first has verdicts."""
    folder = tmp_path_factory.mktemp("runs")
    for relax in ("box", "crown-ibp"):
        assert command(train.main, *TINY, "--relax", relax, "--out", folder / relax) == 0
    assert command(certify.main, folder / "box", "--stages", "box", "--eps", 0.2) == 0
    return folder


def shown(path):
    """The texts of a picture: matplotlib leaves them as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_two_runs_are_drawn_with_their_numbers(runs):
    draw.main([str(runs / "box"), str(runs / "crown-ibp")])
    curves = runs / "box" / "curves.svg"
    assert {"box", "crown-ibp", "robust loss in training"} <= set(shown(curves))
    assert not (runs / "crown-ibp" / "curves.svg").exists()
    net, config, _ = train.load_run(runs / "box")
    x = load_dataset("digits").x_test[:100]
    found = pictures.layers(config, net, x)
    bars = shown(runs / "box" / "layers.svg")
    for shares, widths in found.values():
        assert {f"{100 * s:.0f}" for s in shares.flat if s >= 0.05} <= set(bars)
        assert {f"{w:.3g}" for w in widths} <= set(bars)
    assert (runs / "crown-ibp" / "layers.svg").exists()
    verdicts = [json.loads(line) for line in (
        runs / "box" / "certify-eps0.2.jsonl").read_text().splitlines()[1:]]
    attacked = [v["index"] for v in verdicts if v["status"] == "attacked"]
    sheet = shown(runs / "box" / "certify-eps0.2.attacked.svg")
    assert [t for t in sheet if t.startswith("image ")] == [f"image {i}" for i in attacked[:10]]
    assert len(attacked) > 3 and not list((runs / "crown-ibp").glob("*.attacked.svg"))


def test_curves_are_the_log(runs):
    log = pictures.read_log(runs / "box")
    text = (runs / "box" / "log.csv").read_text().splitlines()
    assert log["loss"].tolist() == [float(line.split(",")[4]) for line in text[1:]]
    loss, eps, certified = pictures.curves({"a run": log, "another": log}).axes
    for ax, column, unit in (loss, "loss", 1), (eps, "eps", 1), (certified, "certified", 100):
        for line in ax.lines:
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), log[column] * unit)
        assert len(ax.lines) == 2


def test_shares_and_widths_by_hand():
    """z = x - b for x in [0.4, 0.6]: two are active, one is inactive, two are unstable."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0]]))
        net[0].bias.copy_(torch.tensor([-0.1, -0.2, -0.9, -0.5, -1.0]))
    shares, widths = pictures.by_layer(net, torch.tensor([[0.5]]), 0.1, "box", False)
    np.testing.assert_allclose(shares, [[0.2, 0.4, 0.4]])
    np.testing.assert_allclose(widths, [(4 * 0.2 + 0.4) / 5], rtol=1e-6)


def test_before_training_means_the_weights_that_it_began_with(runs, tmp_path):
    options = [*TINY, "--relax", "box", "--epochs", 0, "--out", tmp_path / "new"]
    assert command(train.main, *options) == 0
    began = pictures.untrained(train.load_run(runs / "box")[1]).state_dict()
    assert all(torch.equal(t, began[k]) for k, t in weights(tmp_path / "new").items())
    assert any(not torch.equal(t, began[k]) for k, t in weights(runs / "box").items())


def test_a_sheet_has_the_points_and_what_the_network_makes_of_them(runs):
    net, data = train.load_run(runs / "box")[0], load_dataset("digits")
    eps, points = pictures.read_attacked(runs / "box" / "certify-eps0.2.jsonl", data)
    axes = np.array(pictures.sheet(net, data, eps, points, most=3).axes).reshape(3, 3)
    assert eps == 0.2 and net[1].weight.dtype == torch.float32            # as it was
    for (above, middle, below), (i, point) in zip(axes.T, sorted(points.items())):
        image = data.x_test[i, 0].numpy()
        label, read = int(data.y_test[i]), int(net(point[None]).argmax())
        assert above.get_title() == f"image {i}\nlabel {label}" and label != read
        assert middle.get_title() == f"read as {read}"
        drawn = [np.asarray(ax.images[0].get_array()) for ax in (above, middle, below)]
        np.testing.assert_array_equal(drawn[0], image)
        np.testing.assert_array_equal(drawn[1], point[0])
        np.testing.assert_allclose(drawn[2], 0.5 + (point[0].numpy() - image) / 0.4, atol=1e-6)


def test_what_cannot_be_drawn_is_refused_in_one_line(runs, tmp_path):
    with pytest.raises(InputError, match="has not finished an epoch"):
        pictures.draw_runs([tmp_path], None)
    (tmp_path / "log.csv").write_text("epoch,eps\n1,x\n")
    with pytest.raises(InputError, match="is damaged"):
        pictures.draw_runs([tmp_path], None)
    path, data = runs / "box" / "certify-eps0.2.jsonl", load_dataset("digits")
    other = data._replace(x_test=data.x_test.flip(0))
    with pytest.raises(InputError, match="other images"):
        pictures.read_attacked(path, other)
    damaged = tmp_path / path.name
    damaged.write_text(path.read_text().replace('"attacked"', '"certified"', 1))
    with pytest.raises(InputError, match="cannot be read"):
        pictures.read_attacked(damaged, data)


def test_without_a_run_the_figures_of_the_pages_are_drawn(monkeypatch):
    called = []
    monkeypatch.setattr(draw, "FIGURES", [lambda n=n: called.append(n) for n in range(1, 8)])
    monkeypatch.setattr(draw.pictures, "draw_runs", lambda folders, *_: called.append(folders))
    draw.main([])
    assert called == [1, 2, 3, 4, 5, 6, 7]
    called.clear()
    draw.main(["3", "1"])
    draw.main(["runs/a", "runs/b"])
    assert called == [3, 1, ["runs/a", "runs/b"]]
