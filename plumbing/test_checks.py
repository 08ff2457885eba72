"""What certify, evaluate and the bounds refuse: random mistakes, each refused at once."""
import math
import random
import sys
import time
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import certify                                                                     # noqa: E402
import relaxations                                                                 # noqa: E402
import train                                                                       # noqa: E402
from plumbing.for_tests import make                                                # noqa: E402
from relaxations import margin_lower_bounds                                        # noqa: E402

nan, inf, some = math.nan, math.inf, torch.tensor([0.1, 0.2])


def right():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8),
                        nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.rand(5, 1, 4, 4)
    return dict(net=net, x=x, y=net(x).argmax(1), eps=0.05)


def with_layer(i, layer):
    return lambda net: nn.Sequential(*net[:i], layer, *net[i + 1:]).eval()


def computed(net):
    """A weight that is the result of a computation."""
    w = net[3].weight
    del net[3].weight
    net[3].weight = 2 * w
    return net


def changed(net):
    net[3].forward = lambda z: z[:, :8]
    return net


def hooked(net):
    net[3].register_forward_hook(lambda module, given, z: z + 1)
    return net


class Own(torch.Tensor):
    """Of a subclass, which could compute anything."""


def of_subclass(net):
    net[3].weight = nn.Parameter(net[3].weight.detach().as_subclass(Own))
    return net


def sparse(net):
    net[3].weight = nn.Parameter(net[3].weight.detach().to_sparse())
    return net


MISTAKES = {
    "net": [computed, of_subclass, sparse, changed, hooked, with_layer(3, nn.LazyLinear(8)),
            with_layer(0, nn.LazyConv2d(3, 3, padding=1)), with_layer(5, nn.Linear(8, 1)),
            with_layer(4, nn.Sigmoid()), with_layer(5, nn.Linear(9, 4)),
            with_layer(3, nn.utils.weight_norm(nn.Linear(48, 8))),
            with_layer(3, nn.utils.spectral_norm(nn.Linear(48, 8))),
            lambda net: prune.l1_unstructured(net[3], "weight", 0.5) and net,
            lambda net: nn.Sequential(nn.BatchNorm2d(1), *net).train(),
            lambda net: nn.Sequential(*net, nn.Softmax(1)), lambda net: net[:2], list,
            lambda net: net.half(), lambda net: net.bfloat16(), lambda net: net.double(),
            lambda net: (net[3].double(), net)[1], lambda net: net.to("meta"),
            lambda net: net.to(torch.complex64), lambda net: nn.Linear(16, 4),
            lambda net: nn.Sequential(), lambda net: None, lambda net: net.forward],
    "x": [torch.Tensor.numpy, torch.Tensor.tolist, list, lambda x: None, torch.Tensor.sum,
          lambda x: (255 * x).byte(), lambda x: (255 * x).long(), lambda x: x > 0.5,
          torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16,
          lambda x: x.to(torch.complex64), lambda x: x.to(torch.float8_e5m2),
          torch.Tensor.to_sparse, lambda x: torch.nested.nested_tensor(list(x)),
          lambda x: x.as_subclass(Own), lambda x: x.to("meta"), lambda x: x[0],
          torch.Tensor.flatten, lambda x: x[:, 0, 0, 0],
          lambda x: x[None], lambda x: x[:, None], lambda x: x.movedim(1, -1), lambda x: x[:3],
          lambda x: x.expand(-1, 3, -1, -1), lambda x: torch.rand(5, 1, 5, 5),
          lambda x: (x - 0.5) / 0.25, lambda x: 255 * x, lambda x: -x, lambda x: x / 0,
          lambda x: torch.where(x == x[2, 0, 1, 1], nan, x)],
    "y": [lambda y: nn.functional.one_hot(y, 4), torch.Tensor.float, lambda y: y > 0,
          lambda y: y - 5, lambda y: y + 4, lambda y: y + 2 ** 40, lambda y: y[:, None],
          lambda y: y[:-1], lambda y: y[:0], lambda y: y[0], lambda y: torch.rand(5, 4),
          lambda y: y.numpy() / 1.0, lambda y: [0.0] * 5, lambda y: [2 ** 70] * 5,
          lambda y: [[1], [2, 3], 4, 5, 6], lambda y: "01234", lambda y: None, lambda y: {0: 1},
          lambda y: np.array([1, None, 2, 3, 1]), lambda y: torch.full((5,), 255).byte(),
          lambda y: y.to(torch.complex64)],
    "eps": [True, Fraction(-1, 10), -0.1, nan, inf, None, "0.1", [0.1], some, 1j, {},
            torch.full((5, 1, 1, 1), 0.1),
            np.full(5, 0.1), torch.tensor([0.1]), torch.tensor(-1.0), torch.tensor(nan)],
    "batch": [-1, 0, 2.5, nan, inf, "3", None, [1], 2 ** 70],
    "steps": [-1, 1.5, nan, inf, None, "40", [40], 2 ** 64],
    "restarts": [-1, 0.5, nan, inf, "1", [1]],
    "seed": [-1, 0.5, nan, None, "0", 2 ** 64],
    "report": [None, 3, "print"],
    "timeout": [-1, -1e-9, nan, -inf, "5", [1], some, 1j],
    "tolerance": [0.0, -1, nan, "1e-3", [1]],
    "slope": ["none", "", None, 0.5, ["zero"], some, {}],
    "stages": ["box", None, 5, ["boxes"], [1], [None], "crown-ibp", {"box": 1}, [some]],
}
OF_EVALUATE = "net", "x", "y", "eps", "batch", "slope"


def mistake(seed, names):
    """Arguments of which one to three are wrong, and which."""
    draw, arguments, wrong = random.Random(seed), right(), []
    for name in draw.sample(names, draw.choice((1, 1, 2, 3))):
        k = draw.randrange(len(MISTAKES[name]))
        change = MISTAKES[name][k]
        arguments[name] = change(arguments[name]) if callable(change) else change
        wrong.append((name, k))
    return arguments, wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_random_mistakes_are_refused_in_under_a_second(part):
    """2,000, a quarter of them given to evaluate."""
    for seed in range(500 * part, 500 * part + 500):
        evaluated = seed % 4 == 0
        call = train.evaluate if evaluated else certify.certify
        arguments, wrong = mistake(seed, OF_EVALUATE if evaluated else list(MISTAKES))
        begun = time.process_time()
        try:
            call(**arguments)
        except ValueError as e:
            assert str(e), wrong
        except BaseException as e:
            raise AssertionError(f"{wrong}: {type(e).__name__}") from e
        else:
            raise AssertionError(f"{wrong} were accepted")
        assert time.process_time() - begun < 1, wrong


def test_a_slope_that_is_none_is_refused_whatever_the_images_turn_out_to_be():
    """Wrong images are not bounded, so that no bound would see the slope."""
    given = right()
    given["y"] = (given["y"] + 1) % 4
    with pytest.raises(ValueError, match="slope='ibp' is none of adaptive, zero"):
        certify.certify(**given, slope="ibp")


def words_of(call, name, change):
    """With which a mistake is refused; "" if it is none."""
    arguments = right()
    arguments[name] = change(arguments[name]) if callable(change) else change
    try:
        call(**arguments)
    except ValueError as e:
        return str(e)
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_EVALUATE)
def test_certify_evaluate_and_the_bounds_refuse_in_the_same_words(name):
    """The bounds take more: one logit, and a weight that cannot be copied. Where the images are one
    too few in their shape and too many in number, they name the other fault."""
    for change in MISTAKES[name]:
        words = words_of(certify.certify, name, change)
        assert words and words_of(train.evaluate, name, change) == words
        if name in ("net", "x", "y"):
            of_bounds = words_of(relaxations.margin_lower_bounds, name, change)
            other = "the network has 1 logit", "the network cannot be copied", "y has to hold"
            fault = "" if "network" in words else "cannot read the shape"
            assert of_bounds == words or words.startswith(other) and fault in of_bounds


def test_a_mistake_in_the_shape_of_labels_or_radii_is_one_line_with_the_mend():
    for name, change, mend in (("y", lambda y: y[:, None], "y.flatten()"),
                               ("y", lambda y: nn.functional.one_hot(y, 4), "y.argmax(1)"),
                               ("x", lambda x: x[0], "for images (1, 4, 4)"),
                               ("eps", lambda eps: torch.full((5, 1, 1, 1), eps), "a tensor (5, ")):
        words = words_of(certify.certify, name, change)
        assert mend in words and "\n" not in words


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluate_answers_alike_in_every_mode(mode):
    """Also where the network and its images were made in it."""
    there = {name: hits.tolist() for name, hits in train.evaluate(**right()).items()}
    with mode():
        here = train.evaluate(**right())
    assert {name: hits.tolist() for name, hits in here.items()} == there


def test_fit_does_not_depend_on_the_default_dtype():
    losses = []
    for dtype in (torch.float32, torch.float64):
        arguments = right()
        torch.set_default_dtype(dtype)
        try:
            row, = train.fit(*map(arguments.get, ("net", "x", "y")), "cpu", lambda line: None,
                             epochs=1, ramp=0)
        finally:
            torch.set_default_dtype(torch.float32)
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_labels_may_be_a_list_or_an_array_of_any_integers():
    problem = right()
    y = problem.pop("y")
    verdicts = [[v.status for v in certify.certify(y=labels, **problem)] for labels in (
        y, y.tolist(), y.numpy(), y.byte(), y.numpy().astype(np.uint16), y.to(torch.int16))]
    assert all(v == verdicts[0] for v in verdicts)
    assert all(train.evaluate(y=y.tolist(), **problem)["natural"])


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_computed_may_be_those_of_the_last_layer():
    arguments = right()
    nn.utils.parametrizations.weight_norm(arguments["net"][5])
    verdicts = certify.certify(**arguments)
    assert {v.status for v in verdicts} == {"certified"}


def test_what_is_right_is_taken():
    """Weight norm as a parametrisation, gradients on, an eps of any kind, no images."""
    problem = right()
    net, x, y = problem["net"], problem["x"], problem["y"]
    nn.utils.parametrizations.weight_norm(net[3])
    for eps in (0.05, np.float64(0.05), np.float32(0.05), torch.tensor(0.05), 0, Fraction(1, 20)):
        assert train.evaluate(net, x, y, eps)["natural"].all()
        found = certify.certify(net, x.clone().requires_grad_(), y, eps, batch=np.int64(2))
        assert {v.status for v in found} <= {"certified", "attacked"}
    assert certify.certify(net, x[:0], y[:0], 0.1) == []


@pytest.mark.parametrize("change", [
    dict(eps=-0.1), dict(eps=math.nan), dict(eps=math.inf), dict(eps=None), dict(eps="0.1"),
    dict(eps=torch.tensor([0.1, 0.2])), dict(timeout=math.nan), dict(timeout=-1.0),
    dict(batch=0), dict(batch=-1), dict(batch=2.5), dict(steps=-1), dict(steps=math.nan),
    dict(restarts=-1), dict(restarts=math.inf), dict(seed=-1), dict(tolerance=0.0),
    dict(tolerance=math.nan), dict(stages=["deep-poly"]), dict(stages="box"),
    dict(y=[0, 1]), dict(y=[[0], [1, 2]]), dict(y=torch.zeros(2).long()), dict(y=torch.zeros(3)),
    dict(y=torch.zeros(3, 4).long()), dict(y=torch.tensor([0, 1, 4])),
    dict(y=torch.tensor([0, -1, 2])),
    dict(x=torch.full((3, 6), 1.5)), dict(x=torch.full((3, 6), -0.1)), dict(x=torch.zeros(6)),
    dict(x=torch.full((3, 6), torch.nan)), dict(x=torch.zeros(3, 1, 6)), dict(x=np.zeros((3, 6))),
    dict(x=torch.zeros(3, 6).byte()), dict(x=torch.zeros(3, 6).double())],
    ids=lambda change: next(iter(change)))
def test_nonsense_is_refused_before_the_first_stage(change, monkeypatch):
    net, _, y = make("mlp", dtype=torch.float32)
    arguments = dict(net=net, x=torch.zeros(3, 6), y=y, eps=0.1) | change
    monkeypatch.setattr(certify, "certify_batch", None)
    with pytest.raises(ValueError):
        certify.certify(**arguments)


def test_what_bounds_refuse_is_refused_in_their_words_and_before_the_attack(monkeypatch):
    monkeypatch.setattr(certify, "certify_batch", None)
    net, x, y = make("mlp", dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        half = deepcopy(net).to(dtype), x.to(dtype)
        with pytest.raises(ValueError, match="all float32 or all float64"):
            margin_lower_bounds(*half, y, 0.1)
        with pytest.raises(ValueError, match="all float32 or all float64"):
            certify.certify(*half, y, 0.1)
    unsupported = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"layer 1 \(Sigmoid\)"):
        certify.certify(unsupported, x, (unsupported(x).argmax(1) + 1) % 4, 0.1)
    for refusing in (certify.certify, train.evaluate):
        with pytest.raises(ValueError, match="a margin is between two"):
            refusing(nn.Sequential(nn.Linear(6, 1)), x, torch.zeros(3).long(), 0.1)
    with pytest.raises(train.InputError, match="a margin is between two"):
        train.build_network("mlp", (1, 8, 8), 1)
    net[1].forward = lambda z: z.clamp(min=-0.1)           # the network that runs is another one
    with pytest.raises(ValueError, match=r"layer 1 \(ReLU\) may compute something else"):
        certify.certify(net, x, y, 0.1)
    net, sound = make("mlp", dtype=torch.float32)[0], certify.margin_lower_bounds
    monkeypatch.setattr(certify, "margin_lower_bounds", lambda *args: sound(*args) + 0.01)
    with pytest.raises(ValueError, match="bounds and forward pass of the network differ by 0.01"):
        certify.certify(net, x, y, 0.1)


def test_the_first_step_of_a_training_checks_and_the_others_trust_it(monkeypatch):
    trusted, bounds = [], train.preactivation_bounds
    monkeypatch.setattr(train, "preactivation_bounds", lambda *args, **options: (
        trusted.append(options["trusted"]), bounds(*args, **options))[1])
    for _ in range(2):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        train.fit(net, torch.rand(6, 3), torch.tensor([0, 1] * 3), device="cpu", relax="box",
                  opt="grad", eps=0.1, epochs=1, batch_size=2)
    assert trusted == [False, True, True] * 2
