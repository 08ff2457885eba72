"""Networks as data: from words, from a user's file, as plain values in a checkpoint, and back.

Only from_file executes anything, and only what a command line names. A checkpoint holds the classes
and settings of the layers, so that a network of one's own is built from it without its file.
"""
import inspect
import math
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.console import InputError

LARGEST = 2 ** 30        # numbers that a layer may make of two images, in a network from a file
NETWORKS = {  # conv: channels, kernel, stride, padding; then (BatchNorm and) ReLU. Those of CTBench
    # (eth-sri/CTBench, networks.py; its cnn_7layer_bn is cnn7-bn)
    "mlp": "flatten, linear 100, linear 100",
    "small": "conv 4 5 2 2, conv 8 4 2 1, flatten",
    "cnn3": "conv 16 5 2 2, conv 32 4 2 1, flatten",
    "cnn5": "conv 16 3 1 1, conv 16 4 2 1, conv 32 4 2 1, flatten, linear 512",
    "cnn7": "conv+bn 64 3 1 1, conv+bn 64 3 1 1, conv+bn 128 3 2 1, conv+bn 128 3 1 1, "
            "conv+bn 128 3 1 1, flatten, linear 512",
}
NETWORKS["cnn7-bn"] = NETWORKS["cnn7"].replace("linear", "linear+bn")


def is_file(name):
    """Whether --net names a function in a file, FILE.py:FUNCTION, and no network of this code."""
    return ".py:" in name


def net_name(text):
    """An argument type: a name, or FILE.py:FUNCTION."""
    if text not in NETWORKS and not is_file(text):
        raise InputError(f"{text!r} is none of {', '.join(NETWORKS)}, or FILE.py:FUNCTION")
    return text


# -------------------------------------------------------------------------------------- by name

def build_network(name, input_shape, num_classes, init="ibp", statistics=None):
    """An eval-mode nn.Sequential: pixels in [0, 1], (B, *input_shape) -> logits (B, num_classes).

    statistics: (mean, std) per channel of the pixels, for a first layer that normalises.
    init: "ibp", see ibp_init, or "default", PyTorch's own. Uses torch's global generator.
    """
    for what, value, known in (("net", name, NETWORKS), ("init", init, ("ibp", "default"))):
        if value not in known:
            raise InputError(f"{what} {value!r} is none of {', '.join(known)}")
    if num_classes < 2:
        raise InputError("the images have one class; a margin is between two")
    layers = layers_of(name, input_shape, num_classes)
    if statistics is not None:
        layers.insert(0, normalization(*statistics))
    net = nn.Sequential(*layers).eval()
    return ibp_init(net) if init == "ibp" else net


def ibp_init(net):
    """net, with W ~ N(0, 2 pi / fan_in^2) for every layer but the last (Shi et al. 2021), so that
    no interval explodes; biases stay as they are. Uses torch's global generator."""
    kinds = nn.Conv1d, nn.Conv2d, nn.Linear
    affine = [layer for layer in net.modules() if isinstance(layer, kinds)]
    for layer in affine[:-1]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
    return net


def layers_of(name, shape, classes):
    """The layers of a network of NETWORKS, and the last one, for images of a shape."""
    layers, images = [], tuple(shape)
    for layer in NETWORKS[name].split(", "):
        kind, *sizes = layer.split()
        sizes = [int(size) for size in sizes]
        if kind == "flatten":
            layers.append(nn.Flatten())
            shape = [math.prod(shape)]
            continue
        if kind.startswith("linear"):
            layers.append(nn.Linear(*shape, *sizes))
            shape, norm = sizes, nn.BatchNorm1d
        else:
            out, kernel, stride, padding = sizes
            layers.append(nn.Conv2d(shape[0], *sizes))
            after = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:]]
            if min(after) < 1:
                raise InputError(f"net {name} needs larger images than {images}; try mlp")
            shape, norm = [out, *after], nn.BatchNorm2d
        layers += [norm(sizes[0]), nn.ReLU()] if kind.endswith("+bn") else [nn.ReLU()]
    return [*layers, nn.Linear(*shape, classes)]


def normalization(mean, std):
    """A layer that subtracts the mean of each channel and divides by std; it never learns."""
    layer = nn.BatchNorm2d(len(mean), eps=0.0, affine=False)
    layer.running_mean.copy_(torch.tensor(mean))
    layer.running_var.copy_(torch.tensor(std).square())
    return layer


def update_batchnorm(net, x):
    """Let BatchNorm see x: its running statistics move, as in any training.

    Bounds always use the running statistics, as constants: no gradient flows through them, and all
    members of a population share them. (Shi et al. bound with the statistics of the batch.) Layers
    without weights normalise the pixels and stay; a single image has no statistics.
    """
    kinds = nn.BatchNorm1d, nn.BatchNorm2d
    norms = [m for m in net.modules() if isinstance(m, kinds) and m.affine]
    if norms and len(x) > 1:
        for m in norms:
            m.train()
        with torch.no_grad():
            net(x)
        net.eval()


# ------------------------------------------------------------------------- of a run, old or new

def from_config(config, kinds):
    """The network that a config describes: its layers, if it is the user's own, or its name."""
    if "layers" in config:
        return from_description(config["layers"], kinds, config["input_shape"])
    architecture = (config[k] for k in ("net", "input_shape", "classes", "init", "statistics"))
    return build_network(*architecture)


def new_network(config, kinds, read):
    """The same for a new run, which may run a file; config then gets its layers, and the network is
    built from them, as it will be when the run goes on.  read: what tells whether a network can be
    bounded, relaxations.read_network."""
    if not is_file(config["net"]):
        return from_config(config, kinds)
    net = from_file(config["net"], config["input_shape"], config["classes"])
    try:
        logits, = read(net, config["input_shape"]).shapes[-1]
    except ValueError as e:
        raise InputError(f"--net {config['net']}: {e}") from None
    if logits != config["classes"]:
        raise InputError(f"--net {config['net']}: {logits} logits for {config['classes']} classes")
    config["layers"] = description(net, kinds)
    net = built_again(net, config, kinds)
    return ibp_init(net) if config["init"] == "ibp" else net


def built_again(net, config, kinds):
    """The network that config describes, with the tensors of net, in the order of its classes.
    Raises InputError where it computes something else than net."""
    shape = config["input_shape"]
    x = torch.linspace(0, 1, 2 * math.prod(shape)).view(2, *shape)
    try:
        twin = from_config(config, kinds)
        twin.load_state_dict(net.state_dict(), assign=True)
        same = torch.allclose(twin(x), net(x), equal_nan=True)
    except (RuntimeError, ValueError):         # other tensors than the settings of its layers say
        same = False
    if not same:
        raise InputError(f"--net {config['net']}: a layer has been changed since it was made, and "
                         "a run folder could not keep that; make it with its final settings")
    return twin


def from_file(source, input_shape, classes):
    """What FUNCTION of FILE.py returns for (input_shape, classes). This runs the file, which may
    import its neighbours."""
    file, _, function = source.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"--net {source}: there is no file {file}")
    sys.path.append(str(Path(file).resolve().parent))
    try:
        make = runpy.run_path(file).get(function)
    finally:
        sys.path.pop()
    if not callable(make):
        raise InputError(f"--net {source}: {file} has no function {function}")
    net = make(tuple(input_shape), classes)
    if not isinstance(net, nn.Sequential):
        raise InputError(f"--net {source}: {function}{tuple(input_shape), classes} returned "
                         f"{type(net).__name__}, not an nn.Sequential")
    return net.float().eval()


def description(net, kinds):
    """[[name, class, settings], ...] of an nn.Sequential of these kinds, as plain values; a nested
    one has its own in place of settings. Raises InputError for what it could not be built from."""
    layers = []
    for name, layer in net._modules.items():
        if isinstance(layer, nn.Sequential):
            layers.append([name, "Sequential", description(layer, kinds)])
            continue
        kind = next((kind for kind in type(layer).__mro__ if kind in kinds), None)
        if kind is None or hasattr(layer, "parametrizations"):
            raise InputError(f"layer {name} ({type(layer).__name__}) cannot be kept in a run "
                             "folder: its class, or what its weights are computed from, is no data")
        settings = {key: plain(layer, key) for key in settings_of(kind)}
        layers.append([name, kind.__name__, settings])
    if len(list(net.named_parameters(remove_duplicate=False))) > len(list(net.parameters())):
        raise InputError("layers that share weights cannot be kept in a run folder")
    return layers


def settings_of(kind):
    """Names of the settings of a class of layers, which it has as attributes, too."""
    names = inspect.signature(kind).parameters
    return [name for name in names if name not in ("device", "dtype", "args", "kwargs")]


def plain(layer, name):
    """A setting as a plain value: bias is a switch, sizes are tuples."""
    value = getattr(layer, name)
    if name == "bias":
        return value is not None
    return tuple(value) if isinstance(value, (tuple, list)) else value


def from_description(layers, kinds, input_shape):
    """The nn.Sequential of a description, in eval mode, whose tensors take no memory yet ("meta").
    Raises ValueError for anything else, and for layers that make too much of an image."""
    with torch.device("meta"):
        net = built(layers, {kind.__name__: kind for kind in kinds}).eval()
        x = torch.zeros(2, *input_shape)
        for layer in net.modules():
            x = x if isinstance(layer, nn.Sequential) else layer(x)
            if x.numel() > LARGEST:
                raise ValueError("a layer is too large")
    return net


def built(layers, kinds):
    modules = OrderedDict()
    for name, kind, settings in layers:
        if kind == "Sequential":
            modules[name] = built(settings, kinds)
        elif set(settings) <= set(settings_of(kinds[kind])):
            modules[name] = kinds[kind](**settings)
        else:
            raise ValueError(f"layer {name} has settings that {kind} does not have")
    return nn.Sequential(modules)
