"""Several processes at one job, as torchrun starts them. Alone, nothing here does anything."""
import io
import os
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist


def ranks():
    """The number of this process and how many there are, as torchrun tells them: (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device):
    """What torchrun started together, joined for as long as the block runs; alone: nothing."""
    if ranks()[1] == 1:
        yield
        return
    # The first step of an optimizer imports this module, whose functions have the group there is by
    # then as a default: its threads would live until Python shuts down, and could abort it.
    import torch.distributed.nn.functional
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(days=1))       # a step, or a verdict, may take long
    try:
        with redirect_stdout(io.StringIO() if ranks()[0] else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


class Total(torch.autograd.Function):
    """The sum over the processes; each gets the gradient of the sum of what all make of it."""

    @staticmethod
    def forward(ctx, t):
        return summed(t.clone())

    @staticmethod
    def backward(ctx, grad):
        return Total.forward(ctx, grad)


def share(x, y, weight=1.0):
    """This process's part of images that count by weight, and how a loss is to count it: (x, y,
    options).

    weight makes the mean over the processes the mean over the images, and total sums what is not a
    mean, such as the statistics of regularisers, over the processes, in its gradient too.
    """
    rank, world = ranks()
    if world == 1 or len(x) < world:                         # too few: everybody takes all of it
        return x, y, dict(weight=weight)
    part = torch.arange(len(x)).tensor_split(world)[rank]
    options = dict(weight=weight * len(part) * world / len(x), total=Total.apply)
    return x[part], y[part], options


def parts_of(x, y, number, shared):
    """A minibatch cut into so many parts of nearly equal size; all in one, if it has fewer images.
    Of each [(x, y, options), ...], shared among the processes or not, as by share.

    The mean of their losses is that of the minibatch: one with more images weighs more.
    """
    number = number if len(x) >= number else 1               # the same in all processes
    parts = []
    for images, labels in zip(x.tensor_split(number), y.tensor_split(number)):
        weight = len(images) * number / len(x)
        part = images, labels, dict(weight=weight)
        parts.append(share(images, labels, weight) if shared else part)
    return parts


def members_at_once(net, config):
    """How many parameter vectors to run at once, where --members does not say; for speed alone.

    Small ones together save overhead; large ones, on a CPU, only miss its cache. The limit, in
    neurons times images, is measured (benchmarks/population.py). Of a minibatch in parts, each sees
    as many images less: so many more run at once.
    """
    most = 16 * config["parts"]
    if config["device"] != "cpu":
        return most
    like, neurons = next(net.parameters(), torch.zeros(())), 0
    x = like.new_zeros(1, *config["input_shape"])
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, torch.nn.ReLU):
                neurons += x.numel()
            x = x if isinstance(layer, torch.nn.Sequential) else layer(x)
    substituted = config["relax"] in ("crown-ibp", "deeppoly", "alpha-crown")
    limit = 2 ** 19 if substituted else 2 ** 21
    limit = limit * config["parts"] // (config["batch_size"] * max(1, neurons))
    return max(1, min(most, limit))


def members_of_each(net, config):
    """--members, or members_at_once, but so few that each process has some."""
    most = max(1, config["samples"] // ranks()[1])
    return config["members"] or min(members_at_once(net, config), most)


def summed(t):
    """t, summed over the processes, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(t)
    return t


def average(values, like):
    """The mean of a list of numbers, of those in all processes; a () tensor like that."""
    total, n = summed(like.new_tensor([sum(values), len(values)]))
    return total / n


def any_process(flag, device):
    """Whether flag is true in any of them."""
    if ranks()[1] > 1:
        flag = bool(summed(torch.tensor([float(flag)], device=device)))
    return flag


def from_first(value):
    """The first process's value, in all of them."""
    values = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def check_agreement(value):
    """All processes have the same value; else something is broken: FloatingPointError."""
    if ranks()[1] > 1:
        values = [None] * ranks()[1]
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise FloatingPointError("the processes disagree about the weights; resume from the "
                                     "last checkpoint")
