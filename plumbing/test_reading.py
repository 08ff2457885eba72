"""What is no network for bounds, or no image, radius or label, is refused; what is, is read."""
import math
import re
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import certify
import relaxations
import train
from faster.windows import seen_cells
from plumbing.for_tests import in_ball, make, true_margins
from relaxations import margin_lower_bounds

RELAXATIONS = relaxations.RELAXATIONS[:3]


@pytest.mark.parametrize("fast", (True, False))
def test_hooks_on_backward_passes_change_no_bound(fast, monkeypatch):
    """The heart transposes layers by a backward pass; it runs copies, which have no hooks."""
    net, x, y = make("mlp")
    monkeypatch.setattr(relaxations, "FAST", fast)
    bounds = margin_lower_bounds(net, x, y, 0.1)
    net[0].register_full_backward_hook(lambda module, given, got: (0 * given[0],))
    net[2].register_full_backward_pre_hook(lambda module, got: (0 * got[0],))
    assert torch.equal(margin_lower_bounds(net, x, y, 0.1), bounds)


def test_what_changes_the_function_behind_our_back_is_refused():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    net, x, y = make("mlp")
    hooked, subclass, tied = deepcopy(net), deepcopy(net), deepcopy(net)
    hooked[1].register_forward_hook(lambda module, inputs, output: -output)
    subclass[0] = Twice(6, 7)
    tied[2], tied[4] = nn.Linear(7, 7), nn.Linear(7, 7)
    tied[4] = tied[2]
    tied.double()
    margin_lower_bounds(tied, x, y, 0.1)
    normed = deepcopy(net)
    torch.nn.utils.parametrizations.weight_norm(normed[2])
    torch.testing.assert_close(margin_lower_bounds(normed, x, y, 0.1),
                               margin_lower_bounds(net, x, y, 0.1))
    stack = lambda n: {k: torch.stack([p, p]) for k, p in n.named_parameters()}
    replaced, inner = deepcopy(net), deepcopy(net)
    replaced[2].forward = lambda h: -h
    inner.forward = lambda h: -h
    spectral = deepcopy(net).train()
    torch.nn.utils.parametrizations.spectral_norm(spectral[2])
    class Negative(nn.Sequential):
        def _call_impl(self, *args):
            return -super()._call_impl(*args)
    class Noisy(nn.Module):
        def forward(self, weight):
            return weight * torch.rand_like(weight)
    dropped, noisy, shared = deepcopy(net), deepcopy(net), deepcopy(tied)
    parametrize.register_parametrization(dropped[2], "bias", nn.Dropout(1e-9))
    parametrize.register_parametrization(noisy[2], "weight", Noisy())
    shared[4] = parametrize.register_parametrization(deepcopy(tied[2]), "weight", nn.Softplus())
    shared[2].weight = shared[4].parametrizations.weight.original
    changing = "another function at each call"
    for n, params, message in ((hooked, None, "without hooks"), (subclass, None, "Twice)"),
                               (replaced, None, "layer 2 (Linear)"), (inner, None, "plain"),
                               (spectral, None, changing), (normed, stack(normed), "unknown"),
                               (Negative(*net), None, "plain"), (dropped.train(), None, changing),
                               (noisy, None, changing),
                               (shared, {"2.weight": torch.ones(1, 7, 7)}, "unknown")):
        with pytest.raises(ValueError, match=re.escape(message)):
            margin_lower_bounds(n, x, y, 0.1, params=params)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="full precision"):
        margin_lower_bounds(net, x, y, 0.1)
    for register in (nn.modules.module.register_module_forward_hook,
                     nn.modules.module.register_module_forward_pre_hook):
        with register(lambda *args: None), pytest.raises(ValueError, match="on all modules"):
            margin_lower_bounds(net, x, y, 0.1)
    margin_lower_bounds(net, x, y, 0.1)


@pytest.mark.parametrize("fast", [True, False])
def test_bounds_leave_the_network_as_it_was_even_for_another_thread(fast, monkeypatch):
    """Not even for a moment do its layers hold other tensors, nor lose what computes theirs."""
    net, x, y = make("batchnorm")
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    weight_norm(weight_norm(net[1]), "bias", dim=None)
    before = [(type(module), [*module.parameters()], [*vars(module)]) for module in net.modules()]
    logits, rng = net(x), torch.get_rng_state()

    def call(module, *args):
        theirs = [id(m._parameters) for m in net.modules()]
        assert module not in net.modules() and id(module._parameters) not in theirs
        return torch.func.functional_call(module, *args)

    monkeypatch.setattr(relaxations, "FAST", fast)
    monkeypatch.setattr(relaxations, "functional_call", call)
    for relax in RELAXATIONS:
        margin_lower_bounds(net, x, y, 0.1, relax).sum().backward()
    after = [(type(module), [*module.parameters()], [*vars(module)]) for module in net.modules()]
    assert all(a is b for (_, old, _), (_, new, _) in zip(before, after) for a, b in zip(old, new))
    assert [(kind, names) for kind, _, names in before] == [(k, names) for k, _, names in after]
    assert torch.equal(net(x), logits) and torch.equal(torch.get_rng_state(), rng)


def test_names_of_params_are_those_of_the_state_dict():
    """Named and sliced networks; tied tensors follow each other, whichever name is given."""
    net, x, y = make("mlp")
    twice = {k: torch.stack([v, 1.1 * v]) for k, v in net.state_dict().items()}
    expected = margin_lower_bounds(net, x, y, 0.1, params=twice)
    titles = dict(zip(("0", "2", "4"), ("first", "second", "last")))
    named = nn.Sequential(OrderedDict((titles.get(k, "relu" + k), m)
                                      for k, m in net.named_children()))
    renamed = {f"{titles[k[0]]}{k[1:]}": v for k, v in twice.items()}
    assert torch.equal(margin_lower_bounds(named, x, y, 0.1, params=renamed), expected)
    padded = nn.Sequential(nn.Flatten(), *net)
    sliced = {f"{int(k[0]) + 1}{k[1:]}": v for k, v in twice.items()}
    assert torch.equal(margin_lower_bounds(padded[1:], x, y, 0.1, params=sliced), expected)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    tied.double()[2].weight = tied[0].weight
    for name in ("0.weight", "2.weight"):
        params = {name: torch.stack([tied[0].weight.detach(), 2 * tied[0].weight.detach()])}
        low = margin_lower_bounds(tied, x, y, 0.1, params=params)
        double = deepcopy(tied)
        double[0].weight.data *= 2                                     # and so that of layer 2
        torch.testing.assert_close(low[1], margin_lower_bounds(double, x, y, 0.1))
    with pytest.raises(ValueError, match="under several names"):
        both = {name: params["2.weight"] for name in ("0.weight", "2.weight")}
        margin_lower_bounds(tied, x, y, 0.1, params=both)


def pad_by_a_parameter():
    layer = nn.ConstantPad2d(1, 0.0)
    layer.value = nn.Parameter(torch.tensor(-0.5), requires_grad=False)
    return layer


@pytest.mark.parametrize("layers, message", [
    ([pad_by_a_parameter()], "or pads with another value than 0"),
    ([nn.AvgPool2d(1), nn.Conv2d(1, 2, 3, stride=(2,)), nn.Flatten(), nn.Linear(2, 3)],
     "layer 1 (Conv2d) has a stride, padding or dilation such as (2,)"),
    ([nn.ConvTranspose2d(1, 2, 3, padding=(1,))], "layer 0 (ConvTranspose2d) has a stride"),
    ([nn.Flatten(), nn.Sigmoid()], "layer 1 (Sigmoid) is a torch.nn.modules.activation.Sigmoid"),
    ([nn.Sequential(nn.Flatten(), nn.Tanh())], "layer 0.1 (Tanh) is a torch.nn"),
    ([nn.Upsample(scale_factor=2, mode="bicubic")], "layer 0 (Upsample) has negative coefficients"),
    ([nn.ConstantPad2d(1, 0.5)], "or pads with another value than 0"),
    ([nn.AvgPool2d(2, divisor_override=-3)], "layer 0 (AvgPool2d) has negative coefficients"),
    ([nn.Dropout().train()], "layer 0 (Dropout) is another function at each call"),
    ([nn.Conv2d(2, 2, 3)], "layer 0 (Conv2d) cannot read the shape (1, 4, 4)"),
    ([nn.Conv2d(1, 2, 7)], "Kernel size can't be greater than actual input size"),
    ([nn.Conv2d(1, 2, 3), nn.Linear(5, 3)], "is nn.Flatten() missing?"),
    ([nn.Flatten(0)], "layer 0 (Flatten) mixes the images of a batch"),
    ([nn.Flatten(), nn.ZeroPad2d((0, 0, 1, -1)), nn.Linear(16, 3)],     # one image down
     "layer 1 (ZeroPad2d) mixes the images of a batch"),
    ([nn.Conv2d(1, 2, 3)], "not in logits"),
    ([nn.BatchNorm2d(1).train(), nn.Flatten(), nn.Linear(16, 3)],
     "layer 0 (BatchNorm2d) uses batch statistics"),
    ([nn.Flatten(2), nn.Linear(16, 3)], "the network ends in the shape (1, 3), not in logits"),
])
def test_networks_that_cannot_be_bounded(layers, message):
    with pytest.raises(ValueError) as error:
        margin_lower_bounds(nn.Sequential(*layers), torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(relax="zonotope"), "relax='zonotope' is not one of box, crown-ibp, deeppoly"),
    (dict(eps=-0.1), "eps=-0.1"), (dict(eps=math.nan), "eps=nan"),
    (dict(x=torch.full((1, 6), 1.2)), "outside [0, 1]"),
    (dict(x=torch.full((1, 6), math.nan)), "outside [0, 1]"),
    (dict(x=torch.zeros(1, 6).double()), "all float32 or all float64"),
    (dict(x=torch.zeros(1, 6).half()), "all float32"),
    (dict(x=torch.zeros(0, 6), y=torch.zeros(0).long()), "x is empty"),
    (dict(eps=torch.zeros(5, 1)), "broadcasts with x"),
    (dict(y=torch.tensor([True])), "integer labels"),
    (dict(intermediate=[]), "intermediate has to hold a pair"),
    (dict(params={"0.weight": torch.zeros(2, 6, 7)}), "but the layer's is (7, 6)"),
    (dict(slope=lambda l, u: -1 + 0 * l), "slope(l, u) has to be in [0, 1]"),
    (dict(slope=lambda l, u: 1.01 + 0 * l), "slope(l, u) has to be in [0, 1]"),
    (dict(slope=lambda l, u: None), "slope(l, u) has to return a tensor like l"),
    (dict(slope=lambda l, u: torch.ones(3, 5)), "slope(l, u) has to return a tensor like l"),
    (dict(params={"0.weight": torch.zeros(2, 7, 6).as_subclass(type("T", (torch.Tensor,), {}))}),
     "layer 0 (Linear) has a weight that is a T (torch.strided), not a dense"),
    (dict(params={"0.weight": torch.zeros(0, 7, 6)}), "one leading P >= 1"),
    (dict(y=torch.tensor([4])), "labels outside 0..3"),
    (dict(y=torch.tensor([0, 1])), "1 integer labels"),
    (dict(params={"0.weights": torch.zeros(2, 7, 6)}), "unknown ['0.weights']"),
    (dict(net=nn.Linear(6, 4)), "has to be a plain torch.nn.Sequential"),
    (dict(x=torch.zeros(6)), "x has to be a batch of images (B, ...), got the shape (6,)"),
    (dict(x=[[0.0] * 6]), "x has to be a tensor of images, got list"),
    (dict(x=torch.zeros(1, 6, dtype=torch.uint8)), "all float32"),
    (dict(y=None), "y has to hold 1 integer labels, got NoneType"),
    (dict(y=[[0, 1], [0]]), "y has to hold 1 integer labels, got list"),
    (dict(eps="0.1"), "eps='0.1' is no number"), (dict(eps=None), "eps=None is no number"),
    (dict(x=torch.zeros(6, 6), y=torch.zeros(6).long(), eps=torch.full((6,), 0.1)),
     "one of each image: (B, 1, ...)"),
    (dict(steps=-1), "steps=-1 has to be a whole number"), (dict(steps=2.5), "steps=2.5 has to be"),
    (dict(intermediate=[(torch.zeros(1, 7), torch.zeros(1, 7)), (torch.zeros(1, 6).double(),) * 2]),
     "of each of the shapes [(1, 7), (1, 6)], torch.float32 on cpu as x is"),
    (dict(intermediate=[(torch.zeros(1, 7), torch.zeros(1, 7)),
                        (torch.zeros(1, 6, device="meta"),) * 2]), "torch.float32 on cpu as x is"),
    (dict(intermediate=[None, None]), "intermediate has to hold a pair"),
    (dict(net=nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.LazyLinear(4))),
     "layer 2 (LazyLinear) has no weights yet, run the network once"),
    (dict(memory=math.inf), "memory=inf has to be a number of bytes"),
    (dict(intermediate=[(torch.ones(1, 7), torch.zeros(1, 7)), (torch.zeros(1, 6),) * 2]),
     "intermediate[0] has lower bounds above upper ones"),
    (dict(memory="1G"), "memory=1G has to be"), (dict(params=[1]), "names to tensors, got list"),
    (dict(params={"0.weight": 1.0}), "names to tensors, got dict"),
    (dict(memory=math.nan), "memory=nan has to be"), (dict(memory=-1), "memory=-1 has to be"),
])
def test_arguments_that_make_no_sense(change, message):
    args = dict(net=make("mlp", dtype=torch.float32)[0], x=torch.zeros(1, 6),
                y=torch.tensor([0]), eps=0.1) | change
    with pytest.raises(ValueError) as error:
        margin_lower_bounds(**args)
    assert message in str(error.value) and "\n" not in str(error.value)


class FlattenOfAConverter(nn.Flatten):
    """Defines nothing but a constructor."""
    def __init__(self, axis):
        super().__init__(axis)


@pytest.mark.parametrize("layers, pads", [
    ([FlattenOfAConverter(1)], 0), ([nn.Flatten(-3)], 0), ([nn.Sequential(nn.Flatten(-3, -2)),
                                                            FlattenOfAConverter(1)], 0),
    ([nn.ConstantPad2d((1, 0, 0, 2), 0), nn.Flatten(-3)], 1),
    ([nn.Flatten(2), nn.ConstantPad1d(1, 0.0), nn.Flatten()], 1)])
@pytest.mark.parametrize("fast", [True, False])
def test_layers_as_converters_make_them_are_read(layers, pads, fast, monkeypatch):
    monkeypatch.setattr(relaxations, "FAST", fast)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), *layers, nn.LazyLinear(5), nn.ReLU(),
                        nn.Linear(5, 3))
    x, y = torch.rand(4, 1, 5, 6), torch.tensor([0, 1, 2, 0])
    net(x)
    net, x = net.double(), x.double()
    for relax in RELAXATIONS:
        exact = margin_lower_bounds(net, x, y, 0, relax)
        torch.testing.assert_close(exact, true_margins(net, x, y))
        low = margin_lower_bounds(net, x, y, 0.1, relax)
        for point in in_ball(x, 0.1, 50, torch.Generator().manual_seed(0)):
            assert (true_margins(net, point, y) >= low - 1e-9).all()
    entries = relaxations.read_network(net, x.shape[1:]).stages
    assert [len(layers) for layers in entries] == [1, 1 + pads, 1]


@pytest.mark.parametrize("methods", [
    dict(forward=lambda self, h: -h.flatten(1)), dict(__call__=lambda self, h: -h.flatten(1)),
    dict(start_dim=property(lambda self: 2, lambda self, value: None)),
    dict(__getattribute__=lambda self, name: object.__getattribute__(self, name))])
def test_a_subclass_that_may_compute_something_else_is_refused(methods):
    net = nn.Sequential(type("Own", (nn.Flatten,), methods)(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"layer . \(Own\) is a .*Own and is not supported"):
        margin_lower_bounds(net, torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1)


def test_a_layer_is_computed_by_parametrize_only_if_its_class_is_made_by_it():
    layer = type("Own", (nn.Linear,), dict(forward=lambda self, h: -h))(16, 3)
    layer.parametrizations = nn.ModuleDict()
    with pytest.raises(ValueError, match=r"layer 1 \(Own\) is a .*Own and is not supported"):
        margin_lower_bounds(nn.Sequential(nn.Flatten(), layer), torch.zeros(1, 1, 4, 4), [0], 0.1)


def test_a_sequential_that_shows_other_layers_than_it_runs_is_refused():
    class Own(nn.Sequential):
        def __getattribute__(self, name):
            return {} if name == "_modules" else super().__getattribute__(name)

    class Shown(nn.Sequential):
        _modules = property(lambda self: vars(self)["shown"],
                            lambda self, layers: vars(self).update(shown=layers))
    with pytest.raises(ValueError, match="plain torch.nn.Sequential"):
        net = Shown(nn.Flatten(), nn.Linear(16, 3))
        margin_lower_bounds(net, torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="plain torch.nn.Sequential"):
        margin_lower_bounds(Own(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(1, 1, 4, 4), [0], 0.1)


def test_padding_goes_by_the_kernel_that_there_is():
    """Not by kernel_size, which is not what the layer runs by."""
    layer = nn.Conv2d(1, 2, 3, padding="same")
    layer.weight = nn.Parameter(torch.randn(2, 1, 5, 1))
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3)).double()
    x, y = torch.rand(2, 1, 6, 6).double(), torch.tensor([0, 1])
    for relax in RELAXATIONS:
        low = margin_lower_bounds(net, x, y, 0, relax)
        torch.testing.assert_close(low, true_margins(net, x, y))


@pytest.mark.parametrize("fast", (True, False))
def test_a_bias_that_broadcasts_is_read_unless_over_the_batch(fast, monkeypatch):
    monkeypatch.setattr(relaxations, "FAST", fast)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    x, y = torch.rand(2, 4).double(), torch.tensor([0, 1])
    for size in ((1,), (1, 3), (2, 3)):
        net[0].bias = nn.Parameter(torch.rand(size).double())
        for relax in RELAXATIONS:
            if size == (2, 3):
                with pytest.raises(ValueError, match="layer 0 .Linear. cannot read the shape"):
                    margin_lower_bounds(net, x, y, 0, relax)
            else:
                low = margin_lower_bounds(net, x, y, 0, relax)
                torch.testing.assert_close(low, true_margins(net, x, y))


def test_a_copy_of_a_subclass_is_read_too():
    """Copying an object leaves __slotnames__ in its class."""
    own = type("Own", (nn.Linear,), {})(4, 3)
    margin_lower_bounds(nn.Sequential(deepcopy(own)), torch.zeros(1, 4), [0], 0.1)


class Mixin(nn.Module):
    def __call__(self, h):
        return -super().__call__(h)


def test_a_second_base_that_comes_before_that_of_the_layer_is_refused():
    net = nn.Sequential(nn.Flatten(), type("Own", (nn.Linear, Mixin), {})(16, 3))
    with pytest.raises(ValueError, match=r"layer . \(Own\) is a .*Own and is not supported"):
        margin_lower_bounds(net, torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Flatten(), nn.Linear(16, 3)])

    def forward(self, h):
        return self.layers[1](self.layers[0](h))


class ConvertModel(nn.Sequential):
    """Stands for that of onnx2pytorch, which has a forward pass of its own."""
    def forward(self, h):
        return super().forward(h)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, h):
        return self.body(h)


@pytest.mark.parametrize("net, way", [
    (torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), "net.children()"),
    (ConvertModel(nn.Flatten(), nn.Linear(16, 3)), "net.children()"),
    (Layers(), "net.layers"), (Body(), "net.body"), (nn.Linear(16, 3), None)])
def test_the_error_says_how_to_get_a_plain_network_out_of_another(net, way):
    x, y = torch.zeros(1, 1, 4, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="plain torch.nn.Sequential") as error:
        margin_lower_bounds(net, x, y, 0.1)
    said = re.search(r"nn.Sequential\(\*(net.\S+)\)", str(error.value))
    assert "\n" not in str(error.value) and (said and said[1]) == way
    if way:                                              # and what it says is right
        plain = eval(f"nn.Sequential(*{said[1]})")
        margin_lower_bounds(plain, x, y, 0.1)
        assert torch.equal(plain(x), net(x))


@pytest.mark.parametrize("wrong", ["0", "3.1", "5"])
def test_a_layer_that_bounds_and_forward_pass_take_for_two_is_named(wrong, monkeypatch):
    """A Linear that adds 0.1 when it is called, but not as the bounds call it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Identity(),
                        nn.Sequential(nn.ReLU(), nn.Linear(5, 5), nn.ReLU()), nn.Identity(),
                        nn.Linear(5, 3)).eval().requires_grad_(False)
    module = net.get_submodule(wrong)
    module.weight += 0.3                               # so that what is below reaches the logits
    marked = module.weight.double()
    forward = nn.Linear.forward

    def changed(self, z):
        bounded = not isinstance(self.weight, nn.Parameter)            # by reading.plain
        same = self.weight.shape == marked.shape and torch.equal(self.weight.double(), marked)
        return forward(self, z) + 0.1 * (same and not bounded) * torch.arange(len(self.bias))

    monkeypatch.setattr(nn.Linear, "forward", changed)
    x, y = torch.rand(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=rf"radius of 0: layer {wrong} \(Linear\) does not"):
        certify.certify(net, x, y, 0.1)
    with pytest.raises(ValueError, match=rf"radius of 0: layer {wrong} \(Linear\) does not"):
        train.evaluate(net, x, y, 0.1)


def test_labels_of_any_integer_type_and_inference_mode():
    net, x, y = make("windows")
    expected = margin_lower_bounds(net, x, y, 0.1)
    for labels in (y.to(torch.uint8), y.to(torch.int16), y.tolist()):
        assert torch.equal(margin_lower_bounds(net, x, labels, 0.1), expected)
    seen_cells.cache_clear()
    with torch.inference_mode():
        margin_lower_bounds(net, x, y, 0.1)
        with pytest.raises(ValueError, match="no_grad"):
            margin_lower_bounds(net, x, y, 0.1, "alpha-crown")
    with torch.no_grad():
        margin_lower_bounds(net, x, y, 0.1, "alpha-crown")
    margin_lower_bounds(net, x, y, 0.1).sum().backward()               # what was cached serves too
