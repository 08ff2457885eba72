"""Networks as data: any accepted one is kept and built again; a file runs only when it is named."""
import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import certify
import train
from plumbing import networks
from plumbing.console import InputError
from plumbing.data import Dataset
from plumbing.for_tests import arrivals, command, train_on_noise, weights
from plumbing.runs import save_checkpoint

OWN = """
import torch.nn as nn
open("executed", "a").write("x")
def net(shape, classes):
    body = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AvgPool2d(2, 1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(36, 20), nn.BatchNorm1d(20), nn.ReLU(),
                         nn.Linear(20, classes))
def narrow(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def other(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
def module(shape, classes):
    return nn.Linear(64, 10)
def tied(shape, classes):
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(64, classes))
def reordered(shape, classes):
    layer = nn.Linear(64, 20)
    weight = layer.weight
    del layer.weight
    layer.weight = weight                        # now after the bias, as remove_weight_norm does it
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(20, classes))
def repadded(shape, classes):
    layer = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    layer.padding = (0, 0)                       # it pads by a copy that it made before
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(128, classes))
def resized(shape, classes):
    layer = nn.Linear(8, 20)
    layer.weight = nn.Parameter(nn.Linear(64, 20).weight)
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(20, classes))
def computed(shape, classes):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, classes))
    return nn.Sequential(nn.Flatten(), layer)
"""
RUN = ("--net own.py:net --epochs 2 --ramp 1 --milestones 1 --subset 90 --batch-size 30 "
       "--test-subset 9 --eps 0.02")


def everything():
    """A network of nearly all classes that are accepted, with settings that are no defaults."""
    body = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, 1, count_include_pad=False))
    return nn.Sequential(
        nn.BatchNorm2d(2, eps=0.0, affine=False), nn.ZeroPad2d((1, 0, 2, 1)), body,
        nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, dilation=2, bias=False), nn.BatchNorm2d(3),
        nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d((4, None)), nn.Dropout(0.3),
        nn.Flatten(2), nn.Conv1d(3, 2, 3, padding="same"), nn.AvgPool1d(2), nn.ZeroPad1d(1),
        nn.Flatten(-2), nn.Unflatten(1, (2, -1)), nn.Flatten(), nn.LazyLinear(5),
        nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False))


def test_a_network_is_built_again_from_plain_values(tmp_path):
    torch.manual_seed(0)
    net, x = everything().eval(), torch.rand(2, 2, 5, 6)
    logits = net(x)
    torch.save(networks.description(net, train.LAYERS), tmp_path / "layers.pt")
    layers = torch.load(tmp_path / "layers.pt", weights_only=True)
    again = networks.from_description(layers, train.LAYERS, (2, 5, 6))
    again.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(again(x), logits) and str(again) == str(net)
    assert networks.description(again, train.LAYERS) == layers
    kinds = {type(layer) for layer in net.modules()}
    assert len(kinds & set(train.LAYERS)) >= 17


CIRCLE = []
CIRCLE.append(["0", "Sequential", CIRCLE])


@pytest.mark.parametrize("layers", [CIRCLE,
    [["0", "Linear", dict(in_features=4, out_features=3, device="cpu")]],
    [["0", "system", {}]], [["0", "Conv2d", dict(in_channels=4)]], [["0", "Linear"]], "Linear", [3],
    [["0", "Conv2d", dict(in_channels=1, out_channels=1, kernel_size=1, groups=0)]],
    [["a.b", "ReLU", {}]], [[0, "ReLU", {}]],
    [["0", "Upsample", dict(scale_factor=1e5)]], [["0", "ZeroPad2d", dict(padding=10 ** 9)]],
    [["0", "Upsample", dict(size=(10 ** 30, 4))]], [["0", "Sequential", {"a": 1}]],
    [["0", "AvgPool2d", dict(kernel_size=0)]], [["0", "Flatten", dict(end_dim=9)]],
    [["0", "Linear", dict(in_features=-1, out_features=3)]]])
def test_what_describes_no_network_is_one_line(layers, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    config = dict(layers=layers, input_shape=[1, 8, 8], classes=10, net="own.py:net")
    save_checkpoint(tmp_path, net, config)
    with pytest.raises((ValueError, TypeError, LookupError, RuntimeError, AttributeError)):
        networks.from_description(layers, train.LAYERS, (1, 8, 8))
    with pytest.raises(InputError) as error:
        train.load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_of_no_layer_are_refused_before_anything_is_built():
    layers = [["0", "Flatten", {}],
              ["1", "Linear", dict(in_features=64, out_features=10, device="cpu")]]
    with pytest.raises(ValueError, match="settings that Linear does not have"):
        networks.from_description(layers, train.LAYERS, (1, 8, 8))


def test_a_network_of_ones_own_trains_goes_on_and_is_certified_without_its_file(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    assert command(train.main, *RUN.split()) == 0
    run, executed = Path("runs/digits-own-deeppoly-rgs-eps0.02-batch-size30"), Path("executed")
    assert executed.read_text() == "x" and run.is_dir()
    assert command(train.main, *RUN.split(), "--epochs", 3, "--out", "long") == 0
    Path("own.py").write_text("raise SystemExit('executed')")
    with monkeypatch.context() as m:                                 # killed before its first step
        m.setattr(train, "train", lambda *args, **options: exit(9))
        assert command(train.main, "--resume", run, "--epochs", 3) == 9
    assert train.load_run(run)[1]["epochs"] == 3
    assert command(train.main, "--resume", run) == 0
    for k, t in weights("long").items():
        assert torch.equal(t, weights(run)[k]), k                    # as if it had been planned
    assert train.load_run(run)[1]["epochs"] == 3
    assert '"epochs": 3' in (run / "config.json").read_text()
    capsys.readouterr()
    assert command(train.main, "--resume", run, "--epochs", 2) == 2
    assert "can only become longer" in capsys.readouterr().err
    assert command(certify.main, run, "--samples", 5, "--timeout", 2) == 0
    assert "own.py:net trained by deeppoly" in capsys.readouterr().out
    assert executed.read_text() == "xx"
    state = weights(run)
    assert state["0.1.num_batches_tracked"] == 9 == state["3.num_batches_tracked"]


@pytest.mark.parametrize("net, words", [
    ("gone.py:net", "no file gone.py"), ("own.py:gone", "no function gone"),
    ("own.py:narrow", "3 logits for 10"), ("own.py:other", "layer 2 (Sigmoid)"),
    ("own.py:module", "returned Linear, not an nn.Sequential"), ("own.py:tied", "share weights"),
    ("own.py:computed", "layer 1 (ParametrizedLinear)"), ("own", "is none of mlp"),
    ("own.py:repadded", "changed since it was made"), ("own.py:resized", "changed since it was")])
def test_what_is_no_network_of_ones_own_is_one_line(tmp_path, monkeypatch, capsys, net, words):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    assert command(train.main, "--net", net, "--out", "run") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not Path("run").exists()


def test_a_run_goes_on_whatever_the_order_in_which_a_network_of_ones_own_made_its_tensors(
        tmp_path, monkeypatch):
    """Adam's state and the noise are in the order of the parameters."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    words = RUN.replace(":net", ":reordered").split()
    assert command(train.main, *words, "--out", "whole") == 0
    assert command(train.main, *words, "--out", "parts", "--epochs", 1, "--ramp", 1) == 0
    assert command(train.main, "--resume", "parts", "--epochs", 2) == 0
    for k, t in weights("whole").items():
        assert torch.equal(t, weights("parts")[k]), k


def test_the_weights_of_a_network_of_ones_own_are_kept_unless_init_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    config = lambda *more: train.parse_config(["--net", "own.py:net", *more])
    assert config()["init"] == "default" and train.parse_config([])["init"] == "ibp"
    data = train.load_dataset("digits")
    stds = [train.new_run(config(*more), data, torch.device("cpu"))[0][0][0].weight.std().item()
            for more in ([], ["--init", "ibp"])]
    assert stds[0] == pytest.approx(3 ** -0.5 / 3, rel=0.3)          # PyTorch's, uniform
    assert stds[1] == pytest.approx((2 * torch.pi) ** 0.5 / 9, rel=0.3)


def test_training_starts_from_given_weights_and_certify_takes_them_too(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    assert command(train.main, *RUN.split(), "--out", "first") == 0
    torch.save(weights("first"), "first.pt")
    more = ["--weights", "first.pt", "--epochs", 0, "--init", "ibp", "--out", "second"]
    assert command(train.main, *RUN.split(), *more) == 0
    for k, t in weights("first").items():
        assert torch.equal(t, weights("second")[k]), k
    Path("first.pt").unlink()
    assert command(train.main, "--resume", "second", "--epochs", 1) == 0
    assert any(not torch.equal(t, weights("second")[k]) for k, t in weights("first").items())
    torch.save(weights("second"), "second.pt")
    assert command(certify.main, "--weights", "second.pt", "--net", "own.py:net", "--dataset",
                   "digits", "--samples", 3, "--eps", 0.01, "--slope", "parallel") == 0
    assert command(train.main, "--weights", "gone.pt", "--out", "third") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "gone.pt" in err and not Path("third").exists()


def test_fit_is_a_run_without_a_folder_in_any_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--net small --epochs 2 --ramp 1 --subset 90 --batch-size 40 --test-subset 5 --out run"
    assert command(train.main, *words.split()) == 0
    rows = (tmp_path / "run/log.csv").read_text().splitlines()[1:]
    torch.manual_seed(0)
    net, data = train.build_network("small", (1, 8, 8), 10), train.load_dataset("digits")
    x, y, out = data.x_train[:90], data.y_train[:90], []
    settings = dict(eps=0.1, epochs=2, ramp=1, milestones=[2, 2], batch_size=40, lr=2e-3)
    thread = threading.Thread(target=lambda: out.append(train.fit(
        net, x, y, "cpu", lambda line: None, **settings)))
    before = list(Path().iterdir())
    thread.start()
    thread.join()
    for k, t in weights("run").items():
        assert torch.equal(t, net.state_dict()[k]), k
    assert list(Path().iterdir()) == before
    assert [f"{row['loss']:.6g}" for row in out[0]] == [row.split(",")[4] for row in rows]


def test_a_run_may_be_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, out = "--net mlp --epochs 1 --ramp 0 --subset 40 --test-subset 5".split(), []
    thread = threading.Thread(target=lambda: out.append(command(train.main, *words)))
    thread.start()
    thread.join()
    assert out == [0]


@pytest.mark.parametrize("settings, words", [
    (dict(eps=2), "'2' has to be a number"), (dict(opt="adam"), "opt='adam' has to be one of"),
    (dict(samples=3), "3 is odd"), (dict(epoch=3), "epoch is no setting here; known are relax"),
    (dict(dataset="mnist"), "dataset is no setting"), (dict(skip_stable=3), "skip_stable=3"),
    (dict(milestones=["x"]), "'x' has to be a whole number"),
    (dict(milestones=5), "milestones=5 has to be a list"),
    (dict(antithetic="no"), r"antithetic='no' has to be one of \(False, True\)"),
    (dict(sigma=1e-50), "'1e-50' has to be a number > 0"),
    (dict(lr=1e39), "'1e\\+39' has to be a number > 0")])
def test_fit_refuses_what_is_no_setting(settings, words):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=words):
        train.fit(net, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), **settings)


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x.numpy(), y), "x has to be a tensor of images"),
    (lambda x, y: (x.double(), y), "all float32 or all float64"),
    (lambda x, y: (x * 255, y), r"values outside \[0, 1\]"),
    (lambda x, y: (x, y[:-1]), "y has to hold 4 integer labels"),
    (lambda x, y: (x, torch.cat([y, y])), "y has to hold 4 integer labels"),
    (lambda x, y: (x[:0], y[:0]), "x holds no image"),
    (lambda x, y: (x, y + 10), "y has labels outside 0..9")])
def test_fit_refuses_images_and_labels_in_the_words_of_the_bounds(change, words):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = change(torch.rand(4, 1, 8, 8) / 2 + 0.1, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=words):
        train.fit(net, x, y, "cpu", lambda line: None, opt="grad", relax="box", epochs=1)


def test_fit_refuses_what_can_only_be_bounded():
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).requires_grad_(False))
    x, y = torch.rand(4, 1, 8, 8), [0, 1, 2, 3]
    for wrong, words in ((net, "layer 1 has weights that are computed"), (None, "got NoneType"),
                         (frozen, "1.weight is frozen")):
        with pytest.raises(ValueError, match=words):
            train.fit(wrong, x, y, "cpu", lambda line: None, opt="grad", relax="box", epochs=1)


def test_fit_has_no_gradient_in_inference_mode_and_says_so():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.inference_mode(), pytest.raises(ValueError, match="has no gradients"):
        train.fit(net, torch.rand(4, 1, 8, 8), [0, 1, 2, 3], epochs=1)


def test_fit_says_what_has_no_effect(capsys):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(4, 1, 8, 8)
    for settings, said in ((dict(lam=0.2), "--lam has no effect with --relax box"), ({}, "")):
        train.fit(net, x, [3, 1, 0, 9], "cpu", lambda line: None, opt="grad", relax="box", epochs=1,
                  **settings)
        err = capsys.readouterr().err
        assert said in err and err.count("no effect") == bool(said)


def test_fit_takes_labels_in_a_list():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(4, 1, 8, 8)
    settings = dict(opt="grad", relax="box", epochs=1, batch_size=2)
    assert len(train.fit(net, x, [3, 1, 0, 9], "cpu", lambda line: None, **settings)) == 1


def test_ctbench_names_its_layers_as_cnn7_bn_behind_a_normalisation():
    """Names and sizes of a state_dict of CTBench's cnn_7layer_bn, but for its "layers."."""
    net = train.build_network("cnn7-bn", (3, 8, 8), 10, statistics=([0.5] * 3, [0.2] * 3))
    shapes = {k: list(t.shape) for k, t in net.state_dict().items() if "weight" in k}
    assert shapes == {
        "1.weight": [64, 3, 3, 3], "2.weight": [64], "4.weight": [64, 64, 3, 3], "5.weight": [64],
        "7.weight": [128, 64, 3, 3], "8.weight": [128], "10.weight": [128, 128, 3, 3],
        "11.weight": [128], "13.weight": [128, 128, 3, 3], "14.weight": [128],
        "17.weight": [512, 2048], "18.weight": [512], "20.weight": [10, 512]}


def test_update_batchnorm_moves_what_learns_in_nested_networks_too():
    net = nn.Sequential(nn.BatchNorm2d(1, affine=False),
                        nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)), nn.Flatten(),
                        nn.Linear(18, 4), nn.BatchNorm1d(4)).eval()
    x = torch.rand(8, 1, 4, 4)
    mean = net[1][0](net[0](x)).mean((0, 2, 3))
    train.update_batchnorm(net, x)
    torch.testing.assert_close(net[1][1].running_mean, 0.1 * mean)
    assert net[4].running_mean.abs().min() > 0 and net[0].running_mean == 0
    assert not any(m.training for m in net[1].modules() if m is not net)
    before = net[4].running_mean.clone()
    train.update_batchnorm(net, x[:1])                                  # no variance: nothing
    assert torch.equal(net[4].running_mean, before)


def test_images_that_a_convolution_leaves_nothing_of_are_refused():
    for shape in ((1, 2, 8), (1, 8, 2), (3, 1, 1)):
        with pytest.raises(InputError, match="net small needs larger images"):
            train.build_network("small", shape, 4)
    assert train.build_network("small", (1, 3, 8), 4)(torch.zeros(1, 1, 3, 8)).shape == (1, 4)


def test_the_normalisation_is_exact_and_does_not_learn():
    net = train.build_network("mlp", (2, 3, 3), 4, "default", [(0.25, 0.5), (0.5, 0.125)])
    x = torch.rand(5, 2, 3, 3)
    mean, std = torch.tensor([[0.25, 0.5], [0.5, 0.125]])[:, :, None, None]
    torch.testing.assert_close(net[0](x), (x - mean) / std, rtol=1e-6, atol=1e-6)
    assert not list(net[0].parameters())


def test_network_sizes_and_initialisation():
    count = lambda net: sum(p.numel() for p in net.parameters())
    torch.manual_seed(0)
    for name, shape, n in (("cnn3", (1, 28, 28), 24330), ("cnn3", (3, 32, 32), 29930),
                           ("cnn5", (1, 28, 28), 820954), ("cnn5", (3, 32, 32), 1067002)):
        assert count(train.build_network(name, shape, 10)) == n
    assert 13.2e6 < count(train.build_network("cnn7", (1, 28, 28), 10)) < 13.4e6
    net = train.build_network("cnn5", (3, 32, 32), 10)
    for layer in (net[2], net[4], net[7]):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / fan_in, rel=0.05)
    last = net[9].weight.abs().max() * math.sqrt(512)                  # the last keeps PyTorch's
    assert 0.9 < last <= 1
    line = train.ibp_init(nn.Sequential(nn.Conv1d(50, 200, 5), nn.ReLU(), nn.Linear(3, 2)))[0]
    assert line.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 250, rel=0.05)
    mean, std, x = [0.1, 0.2, 0.3], [0.5, 0.4, 0.2], torch.rand(2, 3, 4, 4)
    normalized = train.build_network("mlp", (3, 4, 4), 3, statistics=(mean, std))[0](x)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    torch.testing.assert_close(normalized, (x - mean) / std)
    for shape in ((1, 7, 9), (3, 13, 5)):                              # any input size
        for name in train.NETWORKS:
            net = train.build_network(name, shape, 3, "default")
            assert net(torch.zeros(2, *shape)).shape == (2, 3)


def test_cifar_10_is_normalised_and_augmented(tmp_path, monkeypatch):
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    data = Dataset(x, y, x, y, 4)
    for dataset, augmented, first in (("cifar10", True, nn.BatchNorm2d),
                                      ("own.npz", False, nn.Conv2d)):
        config = train.parse_config(["--dataset", dataset])
        net, config = train.new_run(config, data, torch.device("cpu"))
        assert config["augment"] == augmented and type(net[0]) is first
    changed = arrivals(monkeypatch, train, "augment")
    calls = arrivals(monkeypatch, train, "take_step")
    train_on_noise(tmp_path, "--opt grad --epochs 1", augment=True)
    assert len(calls) == 3
    assert all(given["x"] is x for (given, _), (_, x) in zip(calls, changed, strict=True))
