"""What the tests share: networks to bound, what a function was given, command lines in this
process, small fake data files, damaged ones."""
import gzip
import inspect
import io
import math
import os
import socket
import tarfile

import numpy as np
import pytest
import torch
import torch.nn as nn

import certify
import relaxations
import train
from plumbing.console import InputError, run
from plumbing.data import CIFAR_FILE, CIFAR_PYTHON, MNIST_FILES
from relaxations import preactivation_bounds

RELAXATIONS = relaxations.RELAXATIONS[:3]     # alpha-crown, which is slow, has tests of its own


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test that has this name in its module draws the same numbers, whichever ran before."""
    torch.manual_seed(0)


def random_bn(channels, kind=nn.BatchNorm2d):
    bn = kind(channels)
    bn.running_mean.uniform_(-0.5, 0.5)
    bn.running_var.uniform_(0.3, 2.0)
    nn.init.uniform_(bn.weight, -1.5, 1.5)
    nn.init.uniform_(bn.bias, -0.5, 0.5)
    return bn


NETS = {
    "mlp": lambda: ((6,), [
        nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)]),
    "windows": lambda: ((1, 9, 8), [                   # convolutions over convolutions, odd sizes
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, (2, 3), stride=(1, 2)), nn.ReLU(),
        nn.Conv2d(3, 2, 2, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)]),
    "strides": lambda: ((2, 11, 9), [                  # strides that leave a rest, dilation, groups
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 2, stride=2, dilation=(2, 1), padding=(1, 0), groups=4), nn.ReLU(),
        nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(),
        nn.LazyLinear(3)]),
    "outgrown": lambda: ((1, 5, 5), [                  # kernels larger than the map
        nn.Conv2d(1, 2, 5, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 5, padding=2), nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]),
    "batchnorm": lambda: ((2, 6, 7), [                 # in every place; two affine layers in a row
        random_bn(2), nn.Conv2d(2, 3, 3, padding=1), random_bn(3), nn.ReLU(), random_bn(3),
        nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(4), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)]),
    "others": lambda: ((1, 6, 6), [                    # nested, and all that only the heart reads
        nn.Conv2d(1, 2, 3, padding=1), nn.AvgPool2d(2), nn.ReLU(),
        nn.Sequential(nn.ConvTranspose2d(2, 2, 3, stride=2), nn.Identity(), nn.ReLU()),
        nn.Upsample((5, 6), mode="bilinear"), nn.ZeroPad2d((1, 0, 0, 2)), nn.Dropout(),
        nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(5), random_bn(5, nn.BatchNorm1d), nn.ReLU(), nn.LazyLinear(3)]),
    "signals": lambda: ((2, 7), [                      # one dimension
        nn.Conv1d(2, 3, 3, padding="same"), random_bn(3, nn.BatchNorm1d), nn.ReLU(),
        nn.AvgPool1d(2), nn.Unflatten(2, (3, 1)), nn.Flatten(2), nn.Conv1d(3, 2, 2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3)]),
    "relus": lambda: ((2, 4, 4), [                     # first, last, twice, after Flatten
        nn.ReLU(), nn.Conv2d(2, 2, 2, padding="same", dilation=2), nn.Flatten(), nn.ReLU(),
        nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3), nn.ReLU()]),
}


def make(name, seed=0, dtype=torch.float64, batch=3):
    """A random network of the list above, images with pixels at both ends of [0, 1], and labels."""
    torch.manual_seed(seed)
    shape, layers = NETS[name]()
    net = nn.Sequential(*layers).eval()
    net(torch.zeros(1, *shape))                        # sets the sizes of lazy layers
    net = net.to(dtype)
    for p in net.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    x = (1.4 * torch.rand(batch, *shape, dtype=dtype) - 0.2).clamp(0, 1)
    return net, x, net(x).argmax(1)


def true_margins(net, x, y):
    logits = net(x)
    return logits.gather(1, y[:, None]) - logits


def in_ball(x, eps, n, generator):
    """n points of the ball around each x: half of them corners. (n, B, ...)"""
    u = 2 * torch.rand(n, *x.shape, dtype=x.dtype, generator=generator) - 1
    u[::2] = u[::2].sign()
    return (x + eps * u).clamp(0, 1)


def idx(images, magic):
    sizes = np.array([magic, *images.shape], ">i4").tobytes()
    return sizes + images.astype(np.uint8).tobytes()


def fake_mnist(folder, zipped):
    rng, content = np.random.default_rng(0), {}
    for name in MNIST_FILES:
        n = 20 if "train" in name else 10
        array = rng.integers(0, 256, (n, 28, 28)) if "images" in name else rng.integers(0, 10, n)
        content[name] = idx(array, 0x803 if "images" in name else 0x801)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content[name]) if zipped else content[name])
    return content


def fake_cifar(folder, zipped, n=3):
    rng, files = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = rng.integers(0, 256, (n, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    if zipped:
        with tarfile.open(folder / CIFAR_FILE, "w:gz") as tar:
            for name, b in files.items():
                info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
                info.size = len(b)
                tar.addfile(info, io.BytesIO(b))
    else:
        (folder / "cifar-10-batches-bin").mkdir()
        for name, b in files.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(b)
    return files


def python2_pickle(pixels, labels):
    """A batch of CIFAR-10 as Python 2 and its numpy pickled it, instruction by instruction."""
    word = lambda text: b"U" + bytes([len(text)]) + text
    names = b"".join(word(b"%d.png" % i) for i in range(len(labels)))
    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
             + word(b"b") + b"\x87q\x05Rq\x06(K\x01M" + len(pixels).to_bytes(2, "little")
             + b"M\x00\x0c\x86q\x07cnumpy\ndtype\nq\x08" + word(b"u1")
             + b"K\x00K\x01\x87q\x09Rq\x0a(K\x03" + word(b"|")
             + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
             + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb")
    return (b"\x80\x02}q\x01(" + word(b"batch_label") + word(b"training batch 1 of 5")
            + word(b"labels") + b"]q\x02(" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
            + word(b"data") + array + word(b"filenames") + b"](" + names + b"eu.")


def fake_cifar_python(folder, zipped, n=3, dump=python2_pickle):
    """The same images as fake_cifar, in the python version of CIFAR-10."""
    records = fake_cifar(folder / "binary", zipped=False, n=n)
    files = {}
    for name, content in records.items():
        table = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        files[name.removesuffix(".bin")] = dump(table[:, 1:], table[:, 0].tolist())
    if zipped:
        with tarfile.open(folder / CIFAR_PYTHON, "w:gz") as tar:
            for name in ("data_batch_4", "test_batch", *sorted(files.keys() - {"data_batch_4",
                                                                              "test_batch"})):
                info = tarfile.TarInfo("cifar-10-batches-py/" + name)
                info.size = len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))
    else:
        (folder / "cifar-10-batches-py").mkdir()
        for name, content in files.items():
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
    return files


def npz(path, **change):
    rng = np.random.default_rng(0)
    arrays = dict(x_train=rng.integers(0, 256, (12, 6, 5, 3)).astype(np.uint8),
                  y_train=np.arange(12) % 4,
                  x_test=rng.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8),
                  y_test=np.arange(4)) | change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


torch.set_num_threads(1)     # tiny networks: a second thread only spins
QUICK = "--epochs 1 --ramp 0 --subset 96 --test-subset 60 --batch-size 32".split()
QUICK_RUN = ("--net small --epochs 2 --ramp 1 --subset 200 --batch-size 33 --test-subset 5 "
             "--l1 1e-4 --kappa 0.1 --milestones 1")


def command(main, *args):
    """Exit status of a command line."""
    try:
        run(lambda: main([str(a) for a in args]))
    except SystemExit as e:
        return e.code
    return 0


def weights(folder):
    return train.load_run(folder)[0].state_dict()


def stop_at(monkeypatch, steps, number):
    """Send this process a signal in the middle of each of these steps, counted over all runs."""
    take_step, count = train.take_step, [0]
    def step(*args, **options):
        count[0] += 1
        if count[0] in steps:
            os.kill(os.getpid(), number)
        return take_step(*args, **options)
    monkeypatch.setattr(train, "take_step", step)


def together(world, *args, main=train.main, before=lambda rank: None):
    """Exit statuses of a command line run by so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            before(rank)
            os._exit(command(main, *args))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def mutations(content, count, seed=0):
    """Copies of content: cut, with bits flipped, parts overwritten, repeated, removed, zeroed."""
    random = np.random.default_rng(seed)
    for i in range(count):
        a, b = sorted(random.integers(0, len(content), 2).tolist())
        b = min(b, a + 64) if i % 2 else b
        kind = i % 7
        if kind == 0:
            yield content[:a]
        elif kind in (1, 2):
            damaged = bytearray(content)
            for _ in range(kind):
                damaged[random.integers(len(content))] ^= 1 << int(random.integers(8))
            yield bytes(damaged)
        elif kind == 3:
            yield content[:a] + random.bytes(b - a) + content[b:]
        elif kind == 4:
            yield content[:b] + content[a:]
        elif kind == 5:
            yield content[:a] + content[b:]
        else:
            yield content[:a] + bytes(b - a) + content[b:]


def fuzz(path, load, check, count=2000):
    """Every mutation of the file is refused with InputError, or passes check."""
    content, refused = path.read_bytes(), 0
    for damaged in mutations(content, count):
        path.write_bytes(damaged)
        try:
            result = load()
        except InputError as e:
            assert str(e) and "\n" not in str(e)
            refused += 1
        else:
            check(result, damaged)
    path.write_bytes(content)
    assert refused > 0.4 * count


def same_as(good):
    def check(result, damaged):
        for a, b in zip(result, good, strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    return check


def relu_inputs(net, x):
    """The input of each ReLU, by running the network."""
    found = []
    for layer in flat(net):
        if isinstance(layer, nn.ReLU):
            found.append(x)
        x = layer(x)
    return found


def flat(net):
    """Its layers, those of nested ones too."""
    return [layer for layer in net.modules() if not isinstance(layer, nn.Sequential)]


def points_seen(estimator, losses, D, dtype=torch.float64):
    """What each of so many losses is given, with theta = 0: [(P, D), ...], a call after another."""
    seen = [[] for _ in range(losses)]
    def watch(points):
        return lambda thetas: (points.append(thetas.detach().clone()), thetas.sum(1))[1]
    estimator([watch(points) for points in seen], torch.zeros(D, dtype=dtype), 0.1,
              generator=torch.Generator().manual_seed(0))
    return seen


def loss_at(net, x, y, eps, relax, **options):
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    return train.robust_loss(net, x, y, eps, relax, **options)(theta).item()


def arrivals(monkeypatch, module, name):
    """A list of what each call of module.name is given, {parameter: value}, and of its result."""
    calls, function = [], getattr(module, name)
    signature = inspect.signature(function)
    def spy(*args, **options):
        given = signature.bind(*args, **options)
        given.apply_defaults()
        calls.append((given.arguments, function(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(module, name, spy)
    return calls


def steps_of_adam(monkeypatch):
    """A list of (learning rate, norm of the gradient) at each step of the optimiser."""
    seen, step = [], torch.optim.Adam.step
    def spy(self):
        group, = self.param_groups
        seen.append((group["lr"], group["params"][0].grad.norm().item()))
        return step(self)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return seen


def train_on_noise(folder, words, net=None, augment=False):
    """The rows of the log of a short training: 20 images, 8, 8 and 4 of them in the 3 steps of an
    epoch."""
    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    config = train.parse_config(f"--batch-size 8 {words}".split()) | {"augment": augment}
    return train.train(net, x, y, config, torch.device("cpu"), folder, lambda line: None)


def random_subdomain(net, x, y, eps, cuts, seed=0):
    """A node with random cuts and random multipliers, slopes and target; its problem."""
    g = torch.Generator().manual_seed(seed)
    bounds = preactivation_bounds(net, x, eps, "deeppoly")
    problem = certify.pose(net, x, y, eps, 1.0, bounds)
    l, u = problem.l[0], problem.u[0]
    unstable = ((l < 0) & (u > 0)).nonzero().flatten()
    neurons = unstable[torch.randperm(len(unstable), generator=g)[:cuts]]
    signs = torch.randint(0, 2, neurons.shape, generator=g).to(x) * 2 - 1
    multipliers = signs * torch.rand(neurons.shape, generator=g).to(x)
    slopes = torch.rand(l.shape, generator=g).to(x)
    target = (int(y[0]) + 1) % problem.rows.shape[1]
    return problem, certify.Node(-math.inf, 0, target, slopes, neurons, signs, multipliers)


UNITS = {  # radius, layers
    "mlp": lambda: (0.04, [nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(),
                           nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10)]),
    "conv": lambda: (0.06, [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
                            nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(),
                            nn.Linear(20, 10)]),
}


def hard_problem(name="conv"):
    """Digits that a random network is sure of, at a radius where each stage settles some."""
    torch.manual_seed(0)
    eps, layers = UNITS[name]()
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    for layer in net:
        if hasattr(layer, "weight"):
            layer.weight *= 2
    x = train.load_dataset("digits").x_test[:25]
    return net, x, net(x).argmax(1), eps
