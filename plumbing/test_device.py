"""The same on a device as on the CPU in float64: bounds, losses, estimators, runs, verdicts.

    GLS_TEST_DEVICE=cuda pytest plumbing/test_device.py

Without the variable the device is the CPU itself, which keeps these tests in order until a card is
at hand. Random numbers of a device are its own: what depends on them is compared with formulas.
"""
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import certify
import gls
import relaxations
import train
from plumbing import precision
from plumbing.data import load_dataset
from plumbing.for_tests import command, stop_at, weights
from relaxations import margin_lower_bounds, preactivation_bounds

DEVICE = torch.device(os.environ.get("GLS_TEST_DEVICE", "cpu"))
TYPES = [torch.float32] if DEVICE.type == "mps" else [torch.float32, torch.float64]
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}           # relative to the largest number


def networks():
    torch.manual_seed(0)
    nets = {name: train.build_network(name, (1, 8, 8), 10, init="default")
            for name in ("mlp", "small", "cnn3")}
    conv, layers = nn.Conv2d(1, 3, 3, padding=1), [nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.ConvTranspose2d(3, 2, 3, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()]
    nets["others"] = nn.Sequential(conv, *layers, nn.Linear(162, 10)).eval()
    nets["normalised"] = train.build_network("small", (1, 8, 8), 10, "default", [(0.3,), (0.4,)])
    return nets


NETS = networks()


def images(n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 8, 8, generator=generator).double(), torch.arange(n)


def agree(found, exact):
    """found, of DEVICE, is what exact, of the CPU in float64, is, up to rounding in its type."""
    assert found.device.type == DEVICE.type and exact.dtype == torch.float64
    difference = (found.detach().cpu().double() - exact).abs().max()
    assert difference <= CLOSE[found.dtype] * exact.abs().max().clamp(min=1)


def population(net, P=3):
    theta = nn.utils.parameters_to_vector(net.parameters()).detach().cpu().double()
    return theta + 0.01 * torch.randn(P, len(theta), generator=torch.Generator().manual_seed(2),
                                      dtype=torch.double)


def both(net, dtype):
    """(network, images, labels) on the CPU in float64, and on the device in dtype."""
    x, y = images()
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        yield deepcopy(net).to(device, kind), x.to(device, kind), y.to(device)


# ----------------------------------------------------------------------------- bounds and losses

@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("relax, options", [
    ("box", {}), ("crown-ibp", {}), ("deeppoly", {}), ("deeppoly", dict(skip_stable=True)),
    ("deeppoly", dict(memory=0)), ("alpha-crown", dict(steps=2))])
@pytest.mark.parametrize("name", NETS)
def test_bounds_and_gradients(name, relax, options, dtype):
    found = []
    for net, x, y in both(NETS[name], dtype):
        low = margin_lower_bounds(net, x, y, 0.05, relax, **options)
        grads = torch.autograd.grad(train.cross_entropy(-low).sum(), list(net.parameters()))
        bounds = preactivation_bounds(net, x, 0.05, relax, **options)
        found.append([low, *(t for pair in bounds for t in pair), *grads])
    for exact, on_device in zip(*found, strict=True):
        agree(on_device, exact.detach())


@pytest.mark.parametrize("relax", ["box", "crown-ibp", "deeppoly"])
def test_the_heart_alone(relax, monkeypatch):
    monkeypatch.setattr(relaxations, "FAST", False)
    (net, x, y), on_device = both(NETS["cnn3"], TYPES[-1])
    exact = margin_lower_bounds(net, x, y, 0.05, relax)
    agree(margin_lower_bounds(*on_device, 0.05, relax), exact.detach())


@pytest.mark.parametrize("relax", ["crown-ibp", "deeppoly", "mtl-ibp", "sabr"])
def test_the_loss_of_a_population(relax):
    found = []
    for net, x, y in both(NETS["small"], TYPES[-1]):
        loss = train.robust_loss(net, x, y, 0.05, relax, kappa=0.1, l1=1e-4, regularize=0.5,
                                 skip_stable=True)
        points = population(net).to(x).requires_grad_()
        values = loss(points)
        found.append((values, *torch.autograd.grad(values.sum(), points)))
    for exact, on_device in zip(*found):
        agree(on_device, exact.detach())


# ------------------------------------------------------------------------------------ estimators

def noise(rows, D, seed):
    """What gls draws on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.stack([torch.empty(D, device=DEVICE, dtype=TYPES[-1]).normal_(generator=generator)
                        for _ in range(rows)]).cpu().double()


def surface(thetas):
    return (thetas ** 2 @ torch.arange(1, 8).to(thetas)).sin()


def slope(points):
    points = points.requires_grad_()
    return torch.autograd.grad(surface(points).sum(), points)[0]


@pytest.mark.parametrize("chunk", [None, 4])
def test_pgpe_and_rgs_are_their_formulas(chunk):
    theta, sigma, n = torch.linspace(-1, 1, 7, dtype=torch.float64), 0.1, 6
    eps, on_device = noise(n, 7, seed=3), theta.to(DEVICE, TYPES[-1])
    generator = torch.Generator(DEVICE).manual_seed(3)
    value, grad, by_sigma = gls.pgpe(surface, on_device, sigma, n, generator, chunk)
    plus, minus = surface(theta + sigma * eps), surface(theta - sigma * eps)
    middle = (plus + minus) / 2
    surplus = (middle - middle.mean()) * n / (n - 1)
    agree(value, middle.mean())
    agree(grad, (plus - minus) / 2 @ eps / (n * sigma))
    agree(by_sigma, (surplus @ (eps ** 2 - 1)).sum() / (n * sigma))
    assert torch.equal(generator.get_state(), after(3, n))
    value, grad, _ = gls.rgs(surface, on_device, sigma, 2 * n,
                             torch.Generator(DEVICE).manual_seed(3), True, chunk)
    agree(value, middle.mean())
    agree(grad, slope(theta + sigma * torch.cat([eps, -eps])).mean(0))


def after(seed, rows):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for _ in range(rows):
        torch.empty(7, device=DEVICE, dtype=TYPES[-1]).normal_(generator=generator)
    return generator.get_state()


# ----------------------------------------------------------------------------- runs and verdicts

def run(out, *more):
    return command(train.main, *"--net small --epochs 3 --ramp 2 --milestones 2 --subset 300 "
                   "--test-subset 30 --device".split(), DEVICE.type, "--out", out, *more)


@pytest.mark.parametrize("options", [
    ["--relax", "deeppoly", "--opt", "rgs"], ["--relax", "sabr", "--opt", "grad"],
    ["--relax", "box", "--opt", "pgpe", "--samples", 8, "--sigma-adapt", "parameter"]])
def test_a_run_that_stops_goes_on_and_can_be_read_on_the_cpu(tmp_path, monkeypatch, options):
    """To the same weights; on a GPU up to the order in which it sums."""
    assert run(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as m:
        stop_at(m, (4,), signal.SIGTERM)
        assert run(tmp_path / "run", *options) == 128 + signal.SIGTERM
    assert command(train.main, "--resume", tmp_path / "run") == 0
    whole, again = (weights(tmp_path / name) for name in ("whole", "run"))
    for k, t in whole.items():
        assert t.device.type == "cpu"
        same = torch.equal(t, again[k]) if DEVICE.type == "cpu" else torch.allclose(
            t, again[k], rtol=1e-2, atol=1e-3)
        assert same, k
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "run")]
    assert [line.split(",")[:3] for line in logs[0]] == [line.split(",")[:3] for line in logs[1]]
    assert command(train.main, "--resume", tmp_path / "run", "--device", "cpu") == 0


def test_verdicts_are_those_of_the_cpu():
    net = deepcopy(NETS["small"])
    data = load_dataset("digits")
    x, y = data.x_test[:12], data.y_test[:12]
    net.load_state_dict(trained())
    found = []
    for device in ("cpu", DEVICE):
        on = deepcopy(net).to(device)
        verdicts = certify.certify(on, x.to(device), y.to(device), 0.1, batch=5)
        found.append([(v.status, v.stage) for v in verdicts])
        for v in verdicts:
            if v.status == "attacked":
                point = v.counterexample.cpu().double()
                assert (point - x[v.index].double()).abs().max() <= 0.1
                assert deepcopy(net).double()(point[None]).argmax() != y[v.index]
    assert [status for status, _ in found[0]] == [status for status, _ in found[1]]
    assert len({status for status, _ in found[0]}) > 1


def trained(epochs=6):
    """Weights of a small network that certifies some digits, trained on the CPU."""
    torch.manual_seed(0)
    net = train.build_network("small", (1, 8, 8), 10)
    data = load_dataset("digits")
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    optimizer = torch.optim.Adam([theta], lr=1e-2)
    for epoch in range(epochs):
        for x, y in zip(data.x_train.split(64), data.y_train.split(64)):
            eps = 0.05 * min(1.0, epoch / 4)
            _, theta.grad, _ = gls.gradient(train.robust_loss(net, x, y, eps, "box"), theta)
            optimizer.step()
    nn.utils.vector_to_parameters(theta, net.parameters())
    return net.state_dict()


def test_an_evaluation_is_that_of_the_cpu():
    net, data = deepcopy(NETS["small"]), load_dataset("digits")
    net.load_state_dict(trained())
    x, y = data.x_test[:40], data.y_test[:40]
    here, there = (train.evaluate(deepcopy(net).to(device), x.to(device), y.to(device), 0.05)
                   for device in ("cpu", DEVICE))
    assert here.keys() == there.keys() and 0 < here["best"].sum() < 40
    for name, passed in here.items():
        assert (passed != there[name]).sum() <= (name == "attack"), name   # it may step otherwise


# ------------------------------------------------------------------------------------- precision

PROBE = """
import torch
{before}
import relaxations, train
{after}
net, x = train.build_network("mlp", (1, 4, 4), 3).to({device!r}), torch.rand(2, 1, 4, 4)
x, y = x.to({device!r}), torch.arange(2).to({device!r})
exact = relaxations.margin_lower_bounds(net.double(), x.double(), y, 0.1, "crown-ibp")
try:
    low = relaxations.margin_lower_bounds(net.float(), x, y, 0.1, "crown-ibp")
except ValueError as e:
    print("refused:", e)
else:
    assert (low - exact).abs().max() < 1e-5 * exact.abs().max()
    print("exact")
"""


SWITCHES = [           # what comes before the import, what after it, whether a GPU has to refuse
    ("", "", False),
    ("torch.backends.cudnn.allow_tf32 = True", "", False),             # the import switches it off
    ("torch.backends.cuda.matmul.allow_tf32 = True", "", True),
    ("", "torch.set_float32_matmul_precision('high')", True),
    ("", "torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
    ("", "torch.backends.cudnn.conv.fp32_precision = 'tf32'", True),
    ("import os; os.environ['NVIDIA_TF32_OVERRIDE'] = '0'", "", False),
    ("import os; os.environ['NVIDIA_TF32_OVERRIDE'] = '1'", "", True)]


@pytest.mark.skipif(DEVICE.type == "mps", reason="it has no float64, nor such switches")
@pytest.mark.parametrize("before, after, refused_on_a_gpu",
                         SWITCHES if DEVICE.type == "cuda" else SWITCHES[-1:])
def test_products_are_exact_or_refused(before, after, refused_on_a_gpu):
    code = PROBE.format(before=before, after=after, device=DEVICE.type)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent,
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr
    refused = refused_on_a_gpu and DEVICE.type == "cuda"
    assert done.stdout.startswith("refused:" if refused else "exact")


def test_what_forces_tf32_from_outside_is_seen(monkeypatch):
    """NVIDIA's libraries round with it whatever PyTorch's switches say."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert precision.reduced("cuda") is None
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert precision.reduced("cuda") == "NVIDIA_TF32_OVERRIDE"
    assert precision.reduced("cpu") is None
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert precision.reduced("cuda") is None
