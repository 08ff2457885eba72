"""Is a network what its layers say? What is not is refused by a ValueError of one line, which names
the layer.

Bounds hold for the network that is read here. So all by which another one could run is looked at:
methods replaced on a class or on an object, hooks, state that moves at each call, tensors that are
computed from others. What is handed on are copies of the layers, which nobody else holds.
"""
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from plumbing.checks import is_plain

NORMS = nn.BatchNorm1d, nn.BatchNorm2d
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d
SIZES = "stride", "padding", "dilation", "output_padding"
FLOATS = "weight", "bias", "running_mean", "running_var"
TENSORS = *FLOATS, "num_batches_tracked"
# What an nn.Sequential runs by.
RUNNING = "forward", "__iter__", "__call__", "_call_impl", "__getattribute__", "__getattr__"
# What a class may define and still compute what its base does: a constructor, and what is shown.
HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__",
            "__static_attributes__", "__firstlineno__", "__annotate_func__",
            "__annotations_cache__", "__repr__", "extra_repr", "__slotnames__"}   # by copying


class Entry(NamedTuple):
    """A layer that was read."""
    module: nn.Module    # a copy; None stands for a ReLU
    tensors: dict        # what its state_dict holds: {name: (P, ...)}
    in_shape: tuple      # of one input
    out_shape: tuple


def read_layers(net, in_shape, params, affine, reshape, trusted=False):
    """P, the Entries of an nn.Sequential for inputs of in_shape, and the number of logits as (K,).

    params: {name of net.state_dict(): (P, ...)}, tensors to read instead. affine, reshape: the
    classes that are accepted beside nn.ReLU; those of reshape change shapes only and are left out.
    trusted: this network and the like of these params were read before, without it.
    """
    if not trusted:
        check_net(net)
    P, stacked = stack_tensors(net, params, trusted) if params else (1, lambda t: t[None])
    entries, shape, known = [], in_shape, (nn.ReLU, *affine, *reshape)
    for name, module in flat_layers(net):
        kind, before = kind_of(module, known), shape
        where = f"layer {name} ({type(module).__name__})"
        if kind is nn.ReLU:
            entries.append(Entry(None, {}, shape, shape))
            continue
        if not trusted:
            check_layer(module, kind, where, known)
        own = tensors_of(module)
        shape = shape_after(module, kind, own, before, where)
        if kind not in reshape:
            check_plain(own, where)
            tensors = {n: stacked(t) for n, t in own.items()}
            check_plain(tensors, where)                                # those of params, too
            entries.append(Entry(plain(module, kind, own), tensors, before, shape))
    if len(shape) != 1 or not any(entry.module for entry in entries):
        raise ValueError(f"the network ends in the shape {shape}, not in logits; "
                         "is nn.Flatten() or a layer missing?")
    return P, entries, shape


# ----------------------------------------------------------------------------------------- classes

def check_net(net):
    on_all = nn.modules.module
    hooks = [*on_all._global_forward_hooks.values(), *on_all._global_forward_pre_hooks.values()]
    # PyTorch's own only count.
    if not (is_sequential(net) and all(h.__module__.startswith("torch.") for h in hooks)):
        raise ValueError(f"net ({title(net)}) has to be a plain torch.nn.Sequential, and there may "
                         f"be no hooks on it or on all modules{way_out(net)}")


def way_out(net):
    """How to get a plain nn.Sequential out of what people bring."""
    if {"GraphModule", "ConvertModel"} & {kind.__name__ for kind in type(net).__mro__}:
        return ("; if its layers follow one another, nn.Sequential(*net.children()) is the same "
                "network (compare their outputs)")
    parts = [name for name in ("layers", "blocks") if hasattr(net, name)]
    parts += [name for name, part in getattr(net, "_modules", {}).items()
              if isinstance(part, (nn.Sequential, nn.ModuleList)) and name not in parts]
    if parts and not isinstance(net, nn.Sequential):
        return (f"; if its forward pass only runs them, nn.Sequential(*net.{parts[0]}) is the same "
                "network (compare their outputs)")
    return ""


def title(module):
    """Its class, with where that is from."""
    return f"{type(module).__module__}.{type(module).__name__}"


def flat_layers(net, prefix=""):
    """(name, layer) of all layers, by their names in net.state_dict()."""
    for name, module in net._modules.items():
        if is_sequential(module):
            yield from flat_layers(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def unchanged(module):
    """Does it run by the methods of its class, and nothing else?"""
    return not (module._forward_hooks or module._forward_pre_hooks
                or any(map(callable, vars(module).values())))


def class_of(module):
    """Its class before torch.nn.utils.parametrize made another one of it, by which it runs but for
    tensors that are computed."""
    kind = type(module)
    adds = vars(kind).keys() - HARMLESS - {"__getstate__", "__deepcopy__", *TENSORS}
    return kind.__bases__[0] if "parametrizations" in module._modules and not adds else kind


def kind_of(module, known):
    """Which of the known classes it computes what that computes, or None."""
    return runs_as(class_of(module), known) if unchanged(module) else None


@lru_cache(maxsize=1024)
def runs_as(kind, known):
    for i, base in enumerate(kind.__mro__):
        if base in known and kind.__mro__[i:] == base.__mro__:
            return base
        if vars(base).keys() - HARMLESS:
            return None


def is_sequential(net):
    """Is it an nn.Sequential, or a subclass that only builds one?"""
    return (isinstance(net, nn.Sequential) and unchanged(net) and "_modules" in vars(net)
            and all(getattr(type(net), name) is getattr(nn.Sequential, name) for name in RUNNING))


# ------------------------------------------------------------------------------------------ layers

def check_layer(module, kind, where, known):
    if kind is None:
        changed = runs_as(class_of(module), known) is not None
        lazy = any(map(is_lazy, module.parameters()))
        names = ", ".join(each.__name__ for each in known)
        raise ValueError(f"{where} " + f"is a {title(module)} and " * (lazy + changed == 0)
                         + "may compute something else than its class, and " * changed
                         + "has no weights yet, run the network once; till then it " * lazy
                         + f"is not supported; supported are {names}, in an nn.Sequential, without "
                         "hooks and with the methods of their class")
    if kind in NORMS and (module.training or module.running_mean is None):
        raise ValueError(f"{where} uses batch statistics; call net.eval() (and keep "
                         "track_running_stats=True), so that it is a fixed affine map")
    sizes = [vars(module).get(name) for name in SIZES]
    if issubclass(kind, CONVOLUTIONS) and any(isinstance(each, (tuple, list))
                                              and len(each) != module.weight.dim() - 2
                                              for each in sizes):
        raise ValueError(f"{where} has a stride, padding or dilation such as (2,), which "
                         "torch.func takes for another than its forward pass; 2 or (2, 2) will do")
    changing = any(m.training and (isinstance(m, nn.modules.dropout._DropoutNd) or m._buffers)
                   for m in module.modules())
    computed = module._modules.get("parametrizations", ())
    if changing or not all(torch.equal(getattr(module, n), getattr(module, n)) for n in computed):
        raise ValueError(f"{where} is another function at each call; call net.eval()")
    divisor, value = (getattr(module, name, 0) or 0 for name in ("divisor_override", "value"))
    if getattr(module, "mode", "") == "bicubic" or divisor < 0 or value != 0:
        raise ValueError(f"{where} has negative coefficients and no weight, or pads with another "
                         "value than 0, which is not supported")


def check_plain(tensors, where):
    for name, t in tensors.items():
        if not is_plain(t):
            kind = f"{type(t).__name__} ({t.layout})"
            raise ValueError(f"{where} has a {name} that is a {kind}, not a dense torch.Tensor, "
                             "and may compute something else")


def tensors_of(module):
    """{name: tensor} of what the module computes with, whether it holds or computes them."""
    own = vars(module) | module._parameters | module._buffers
    own |= {name: getattr(module, name) for name in module._modules.get("parametrizations", ())}
    return {name: own[name] for name in TENSORS if own.get(name) is not None}


def plain(module, kind, tensors):
    """A module of the same settings, in eval mode, that holds these tensors, computed or not. The
    heart sets other tensors in it, for which the network, used by other threads, is no place."""
    copy, settings = kind.__new__(kind), vars(module).keys() - {*TENSORS}
    vars(copy).update((name, vars(module)[name]) for name in settings)
    nn.Module.__init__(copy)               # no hooks: those of backward would change the heart
    vars(copy).update(_parameters=module._parameters | tensors, training=False)
    return copy


def shape_after(module, kind, tensors, shape, where):
    """What a layer makes of one input of that shape: by running it, or by arithmetic, where that
    is not worth the time."""
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return (math.prod(shape),)
    plain_bias = "bias" not in tensors or tensors["bias"].dim() == 1         # not one of each image
    if kind is nn.Linear and shape == tensors["weight"].shape[1:] and plain_bias:
        return tuple(tensors["weight"].shape[:1])
    if kind is nn.Conv2d and len(shape) == 3 and module.padding_mode == "zeros" \
            and shape[0] == module.in_channels and not isinstance(module.padding, str):
        kernel = tensors["weight"].shape[2:]
        along = zip(shape[1:], kernel, module.stride, module.padding, module.dilation)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along]
        if min(size) > 0:
            return (len(tensors["weight"]), *size)
    like = next(iter(tensors.values()), torch.zeros(()))
    try:
        with torch.no_grad():
            after = [module(like.new_zeros(n, *shape)).shape for n in (2, 3)]
    except (RuntimeError, ValueError, IndexError) as e:
        hint = "; is nn.Flatten() missing?" if kind is nn.Linear else ""
        raise ValueError(f"{where} cannot read the shape {shape}{hint} "
                         f"({str(e).splitlines()[0]})") from None
    pads = module.padding if isinstance(module, nn.modules.padding._ConstantPadNd) else ()
    # One that adds an image and crops another one keeps the shape.
    shifts = any(pads[2 * len(shape):])
    if shifts or [(n, *after[0][1:]) for n in (2, 3)] != [tuple(each) for each in after]:
        raise ValueError(f"{where} mixes the images of a batch")
    return tuple(after[0][1:])


def stack_tensors(net, params, trusted=False):
    """P, and a function from a tensor of net to what params has in its place, or else to P times
    itself. A tensor with several names (tied weights) is the same under all of them."""
    own = dict(net.named_parameters(remove_duplicate=False))
    own |= dict(net.named_buffers(remove_duplicate=False))
    computed_from = {id(t) for name, t in own.items() if "parametrizations." in name}
    own = {name: t for name, t in own.items() if id(t) not in computed_from}
    if not trusted:
        check_params(params, own)
    given = {id(own[name]): t for name, t in params.items()}
    P = len(next(iter(params.values())))
    return P, lambda t: given[id(t)] if id(t) in given else t.expand(P, *t.shape)


def check_params(params, own):
    if not isinstance(params, dict) or not all(map(torch.is_tensor, params.values())):
        raise ValueError(f"params has to map names to tensors, got {type(params).__name__}")
    unknown = sorted(params.keys() - own.keys())
    sizes = {tuple(t.shape[:1]) for t in params.values()}
    if unknown or len(sizes) > 1 or (0,) in sizes or () in sizes:
        raise ValueError("params has to map names such as '0.weight' to tensors with one leading P "
                         f">= 1; got the sizes {sorted(sizes)}, unknown {unknown}")
    for name, t in params.items():
        if t.shape[1:] != own[name].shape:
            raise ValueError(f"params[{name!r}] is {tuple(t.shape)}, but the layer's is "
                             f"{tuple(own[name].shape)}")
    if len({id(own[name]) for name in params}) < len(params):
        raise ValueError("params has one tensor of net under several names; give it under one")
