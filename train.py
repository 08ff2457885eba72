"""Train a network whose robustness can be certified: data, networks, robust loss, loop.

    python train.py                                                  digits, DeepPoly, RGS: a minute
    python train.py --relax box --opt grad                           the classic baseline (IBP)
    python train.py --relax box --opt pgpe                           no gradient of the bound needed
    python train.py --relax mtl-ibp --alpha 0.1 --opt grad           a baseline of the field
    python train.py --dataset mnist --data-dir DIR                   needs its files, or downloads
    python train.py --relax deeppoly --opt rgs --dataset cifar10
    python train.py --resume runs/NAME                               goes on where it was stopped
    torchrun --nproc-per-node 2 train.py ...                         by several processes

A step: bounds of the margins over a ball around each image (relaxations.py), cross-entropy on
them, and an estimate of its gradient, smoothed or not (gls.py), for Adam. The result lands in a
run folder: config.json, log.csv (legend: LOG below), checkpoint.pt. certify.py takes it from there.

Shape letters as in relaxations.py.  Expected from the first command on 2 CPU cores: see README.md.
"""
import argparse
import csv
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import signal
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from copy import deepcopy
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:      # not on Windows: there, nothing keeps two processes from one run folder
    fcntl = None

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.distributed as dist
from torch.func import functional_call, vmap
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import gls
from relaxations import RELAXATIONS, margin_lower_bounds, preactivation_bounds

# --------------------------------------------------------------------------------------- defaults
# Sources: Shi = Shi et al. 2021, "Fast certified robust training with short warmup", and its code;
# "here" = chosen in this repository from a few runs on digits, not tuned.

COMMON = dict(
    relax="deeppoly", opt="rgs",
    loss="cross-entropy", # or certified-error: 0 or 1 for each image, which only pgpe can follow
    beta=1.0,             # crown-ibp: its weight against box once eps is full; Zhang et al. end at
                          # 0 or 1, by data set, but 0 would make it box, and here it is studied
    alpha=0.1,            # here: mtl-, cc-, exp-ibp; De Palma et al. use 0.004 to 0.5, by data set
    lam=0.4,              # Mueller et al. for MNIST at 0.1; they use 0.1 to 0.7, by data set
    slope_steps=3,        # here: alpha-crown; each costs a bound and its gradient
    kappa=0.0,            # weight of the natural loss: 0 = only the bound counts
    l1=0.0,               # Shi's followers use 0 to 2e-5, by data set; off unless asked for
    regularize=0.5,       # Shi: weight of the two regularisers, falling to 0 over the ramp
    clip=10.0,            # Shi: gradient norm
    lr_decay=0.2,         # Shi: at the milestones
    init="ibp",           # Shi: keeps interval bounds from exploding at the start
    sigma=0.01,           # here: the size of cnn3's smaller initial weights; on digits 0.001 to
                          # 0.03 do as well, 0.1 spoils (README, figure 4); grad has none: 0
    samples=None,         # rgs: 2 (an antithetic pair), pgpe: 64 (32 pairs)
    antithetic=True,      # here: cancels the odd part of the noise, for free
    sigma_adapt="fixed",  # or scalar, parameter: PGPE's own adaptation of sigma
    sigma_lr=0.1,         # pgpelib's default for the step of sigma
    skip_stable=True,     # here: faster than the textbook, and certifies as much (benchmarks/)
    members=None,         # parameter vectors run at once; a run asks members_at_once
    subset=None, validation=0, test_subset=None, out=None,
)
DEFAULTS = {              # epochs, ramp and milestones count passes over the training set
    "digits": dict(net="cnn3", eps=0.1, epochs=20, ramp=8, milestones=(15, 18), batch_size=64,
                   lr=2e-3),                                  # here: a minute on 2 CPU cores
    "mnist": dict(net="cnn3", eps=0.1, epochs=70, ramp=20, milestones=(50, 60), batch_size=256,
                  lr=5e-4),                                   # Shi
    "cifar10": dict(net="cnn3", eps=2 / 255, epochs=160, ramp=80, milestones=(120, 140),
                    batch_size=128, lr=5e-4),                 # Shi
    "npz": dict(net="cnn3", eps=0.1, epochs=70, ramp=20, milestones=(50, 60), batch_size=128,
                lr=5e-4),                                     # as mnist; your data, your choice
}
CIFAR_STATISTICS = (.4914, .4822, .4465), (.2023, .1994, .2010)    # mean, std of the pixels; Shi

LOG = {  # the columns of log.csv, one line per epoch; averages are over its batches
    "epoch": "passes over the training set so far",
    "eps": "training radius in its last batch, in pixels of [0, 1]",
    "lr": "learning rate",
    "sigma": "standard deviation of the weight noise (its mean, if per parameter); 0 for grad",
    "loss": "average robust loss, regularisers included (at the perturbed weights, if smoothed)",
    "certified": "fraction of training images certified at that eps by the training relaxation "
                 "(at the perturbed weights, if smoothed; for sabr in its small box only, which is "
                 "no certificate)",
    "gradient": "average norm of the gradient estimate, before clipping",
    "seconds": "of training so far, without the time between an interrupt and its --resume",
    "samples_per_s": "training images per second in this epoch",
}


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and the mend."""


class Interrupted(Exception):
    """A signal asked to stop; everything is saved. args: its number, and how to go on."""


# ------------------------------------------------------------------------------------------- data

class Dataset(NamedTuple):
    """Images in [0, 1], (n, C, H, W) float32, and labels 0..K-1, (n,) int64."""
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int


MAX_BYTES = 2 ** 30      # that a small file may unpack to: it may hide a very large one

MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/",
                 "http://yann.lecun.com/exdb/mnist/")
MNIST_FILES = {  # name: MD5 of the .gz, as torchvision checks it
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c"}
CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",
                 "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/")
CIFAR_FILE, CIFAR_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"


def load_dataset(name, data_dir="data"):
    """Dataset "digits", "mnist", "cifar10", or the path of an .npz file.

    Local files are checked for their structure; what is downloaded, for its checksum.
    Raises InputError for anything missing, damaged or out of range.
    """
    data_dir = Path(data_dir)
    if name == "digits":
        table = np.loadtxt(Path(__file__).parent / "data" / "digits.csv.gz", delimiter=",")
        x, y = (table[:, :-1] / 16).reshape(-1, 1, 8, 8), table[:, -1].astype(int)
        arrays = x[:1437], y[:1437], x[1437:], y[1437:]
    elif name == "mnist":
        arrays = [_read_idx(_find_mnist(file, data_dir), file) for file in MNIST_FILES]
    elif name == "cifar10":
        arrays = _read_cifar(data_dir)
    elif str(name).endswith(".npz"):
        arrays = _read_npz(Path(name))
    else:
        raise InputError(f"dataset {name!r} is none of digits, mnist, cifar10, or PATH.npz")
    return _check_dataset(name, *arrays, classes=None if str(name).endswith(".npz") else 10)


def hold_out(data, n):
    """For tuning: the last n training images take the place of the test images (n = 0: nothing)."""
    if n >= len(data.x_train):
        raise InputError(f"--validation {n} leaves none of the {len(data.x_train)} training images")
    x, y, k = data.x_train, data.y_train, len(data.x_train) - n
    return data._replace(x_train=x[:k], y_train=y[:k], x_test=x[k:], y_test=y[k:]) if n else data


def _check_dataset(name, x_train, y_train, x_test, y_test, classes):
    out = []
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if x.dtype == np.uint8:
            x = x.astype(np.float32) / 255
        if x.dtype.kind != "f" or x.ndim not in (3, 4) or not len(x):
            raise InputError(f"{name}: x_{part} has to be uint8 or float images, (n, H, W), "
                             f"(n, H, W, C) or (n, C, H, W); got {x.dtype} {x.shape}")
        if not ((x >= 0) & (x <= 1)).all():
            raise InputError(f"{name}: x_{part} has values outside [0, 1] or NaN; "
                             "divide by the maximum")
        if x.ndim == 3:
            x = x[:, None]
        elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):      # NHWC
            x = x.transpose(0, 3, 1, 2)
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise InputError(f"{name}: y_{part} has to hold {len(x)} integer labels, "
                             f"got {y.dtype} {y.shape}")
        classes = classes or int(y.max()) + 1
        if y.min() < 0 or y.max() >= min(classes, 10000):
            raise InputError(f"{name}: y_{part} has labels outside 0..{min(classes, 10000) - 1}: "
                             f"{y.min()} to {y.max()}")
        out += [torch.from_numpy(np.ascontiguousarray(x, np.float32)),
                torch.from_numpy(y.astype(np.int64))]
    if out[0].shape[1:] != out[2].shape[1:]:
        raise InputError(f"{name}: training images are {tuple(out[0].shape[1:])}, test images "
                         f"{tuple(out[2].shape[1:])}")
    return Dataset(*out, classes)


def _find_mnist(file, data_dir):
    places = [data_dir / "MNIST" / "raw", data_dir]
    for place in places:
        for path in (place / file, place / (file + ".gz")):
            if path.is_file():
                return path
    target = places[0] / (file + ".gz")
    _download([m + file + ".gz" for m in MNIST_MIRRORS], target, MNIST_FILES[file],
              f"the four files {', '.join(MNIST_FILES)} (.gz or not) into {places[0]}")
    return target


def _read_idx(path, file):
    """The IDX format: 0, 0, 8 (uint8), number of axes, their sizes as big-endian int32, data."""
    images = "images" in file
    head = 16 if images else 8
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            header = np.frombuffer(f.read(head).ljust(head, b"\0"), ">i4")   # too short: zeros
            sizes = header[1:].tolist()
            if header[0] != (0x803 if images else 0x801) \
                    or not 0 < sizes[0] <= 200_000 or sizes[1:] not in ([], [28, 28]):
                raise InputError(f"{path}: not an MNIST {'image' if images else 'label'} file "
                                 f"(header {header.tolist()}); delete it, and it is downloaded "
                                 "again")
            n = math.prod(sizes)
            data = np.frombuffer(f.read(n + 1), np.uint8)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({e}); delete it, and it is "
                         "downloaded again") from None
    if len(data) != n:
        raise InputError(f"{path}: holds {'more' if len(data) > n else len(data)} bytes where its "
                         f"header says {n}; delete it, and it is downloaded again")
    return data.reshape(sizes)


def _read_cifar(data_dir):
    """The binary version: records of 1 label byte and 3072 pixels, channels first."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    folder, archive = data_dir / "cifar-10-batches-bin", data_dir / CIFAR_FILE
    raw = {}
    if folder.is_dir():
        for n in names:
            if not (folder / n).is_file():
                raise InputError(f"{folder / n} is missing; unpack {CIFAR_FILE} again")
            raw[n] = _read_at_most(open(folder / n, "rb"), MAX_BYTES // 16, folder / n)
    else:
        if not archive.is_file():
            _download([m + CIFAR_FILE for m in CIFAR_MIRRORS], archive, CIFAR_MD5,
                      f"{CIFAR_FILE}, or its folder cifar-10-batches-bin, into {data_dir}")
        try:
            unpacked = _read_at_most(gzip.open(archive), MAX_BYTES // 4, archive)
            with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
                for member in tar:                                   # read, never unpacked to disk
                    n = os.path.basename(member.name)
                    if n in names and member.isfile() and not member.issparse():
                        raw[n] = tar.extractfile(member).read()
        except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
            raise InputError(f"{archive}: cannot be read ({e}); delete it, and it is "
                             "downloaded again") from None
    bad = [n for n in names if not raw.get(n) or len(raw[n]) % 3073]
    if bad:
        raise InputError(f"{folder if folder.is_dir() else archive}: {', '.join(bad)} missing or "
                         "not made of records of 3073 bytes; delete it, and it is downloaded again")
    parts = []
    for group in (names[:5], names[5:]):
        records = np.frombuffer(b"".join(raw[n] for n in group), np.uint8).reshape(-1, 3073)
        parts += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)]
    return parts


def _read_at_most(file, limit, path):
    with file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: holds more than {limit} bytes; that is not CIFAR-10")
    return content


def _check_zip(archive, path):
    """Refuse a small archive that would fill the memory."""
    size, limit = sum(e.file_size for e in archive.infolist()), 4 * path.stat().st_size
    if size > max(MAX_BYTES, limit):
        raise InputError(f"{path}: unpacks to {size} bytes, more than {max(MAX_BYTES, limit)}")


def _read_npz(path):
    keys = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with zipfile.ZipFile(path) as archive:
            _check_zip(archive, path)
        with np.load(path, allow_pickle=False) as file:
            missing = [k for k in keys if k not in file]
            if missing:
                raise InputError(f"{path}: lacks the arrays {', '.join(missing)}; "
                                 f"it needs {', '.join(keys)}")
            return [file[k] for k in keys]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError,
            NotImplementedError, RuntimeError, MemoryError, OverflowError) as e:
        raise InputError(f"{path}: not a readable .npz file ({e})") from None
    except ValueError as e:
        raise e if isinstance(e, InputError) else InputError(
            f"{path}: not a readable .npz file ({e})") from None


def _download(urls, target, md5, by_hand):
    """Fetch the first of urls that answers and has the right MD5, under a temporary name first."""
    problems = []
    for url in urls:
        temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            digest, done = hashlib.md5(usedforsecurity=False), 0
            with urllib.request.urlopen(url, timeout=30) as source, open(temporary, "wb") as out:
                total = int(source.headers.get("Content-Length") or 0)
                while block := source.read(1 << 18):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    if sys.stderr.isatty():
                        bar = "#" * (30 * done // max(total, done))
                        print(f"\r{target.name} [{bar:30}] {done / 1e6:6.1f} MB", end="",
                              file=sys.stderr)
            if sys.stderr.isatty():
                print(file=sys.stderr)
            if digest.hexdigest() == md5:
                os.replace(temporary, target)
                return
            problems.append(f"{url}: wrong checksum")
        except (OSError, ValueError) as e:                   # URLError and timeouts are OSErrors
            problems.append(f"{url}: {e}")
        finally:
            temporary.unlink(missing_ok=True)
    raise InputError(f"{target.name} could not be downloaded ({'; '.join(problems)}). "
                     f"Put {by_hand}, or name their folder with --data-dir")


def augment(x, generator, pad=2):
    """CIFAR-10 training: random horizontal flip and crop after zero padding by 2. (B, C, H, W)."""
    B, C, H, W = x.shape
    flip = torch.rand(B, generator=generator) < 0.5
    x = torch.where(flip.to(x.device)[:, None, None, None], x.flip(3), x)
    shift = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    rows = (shift[0] + torch.arange(H)).to(x.device)[:, None, :, None]
    cols = (shift[1] + torch.arange(W)).to(x.device)[:, None, None, :]
    b, c = torch.arange(B)[:, None, None, None], torch.arange(C)[None, :, None, None]
    return F.pad(x, (pad,) * 4)[b.to(x.device), c.to(x.device), rows, cols]


# --------------------------------------------------------------------------------------- networks
# Convolutions as (channels, kernel, stride, padding), then hidden linear layers, as in CTBench
# (eth-sri/CTBench, networks.py). cnn7 has BatchNorm after each convolution; CTBench puts one after
# the hidden linear layer too, which is left out here: nn.Linear cannot be followed by BatchNorm2d.

NETWORKS = {
    "mlp": ([], [100, 100]),
    "small": ([(4, 5, 2, 2), (8, 4, 2, 1)], []),
    "cnn3": ([(16, 5, 2, 2), (32, 4, 2, 1)], []),
    "cnn5": ([(16, 3, 1, 1), (16, 4, 2, 1), (32, 4, 2, 1)], [512]),
    "cnn7": ([(64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)], [512]),
}


def build_network(name, input_shape, num_classes, init="ibp", statistics=None):
    """An eval-mode nn.Sequential: pixels in [0, 1], (B, *input_shape) -> logits (B, num_classes).

    statistics: (mean, std) per channel of the pixels, for a first layer that normalises.
    init: "ibp", W ~ N(0, 2 pi / fan_in^2) for every affine layer but the last (Shi et al. 2021), or
    "default", PyTorch's own; biases are PyTorch's. Uses torch's global generator.
    """
    if name not in NETWORKS:
        raise InputError(f"net {name!r} is none of {', '.join(NETWORKS)}")
    if init not in ("ibp", "default"):
        raise InputError(f"init {init!r} is neither ibp nor default")
    convs, hidden = NETWORKS[name]
    shape, layers = tuple(input_shape), []
    if statistics is not None:
        normalize = nn.BatchNorm2d(shape[0], eps=0.0, affine=False)
        normalize.running_mean.copy_(torch.tensor(statistics[0]))
        normalize.running_var.copy_(torch.tensor(statistics[1]).square())
        layers.append(normalize)
    for out, k, s, p in convs:
        shape = (shape[0], *((n + 2 * p - k) // s + 1 for n in shape[1:]))
        if min(shape[1:]) < 1:
            raise InputError(f"net {name} needs larger images than {tuple(input_shape)}; try mlp")
        layers += [nn.Conv2d(shape[0], out, k, s, p)]
        layers += [nn.BatchNorm2d(out)] if name == "cnn7" else []
        layers += [nn.ReLU()]
        shape = (out, *shape[1:])
    layers.append(nn.Flatten())
    width = math.prod(shape)
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU()]
        width = out
    layers.append(nn.Linear(width, num_classes))
    if init == "ibp":
        for layer in [m for m in layers if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]:
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
    return nn.Sequential(*layers).eval()


def unflatten(thetas, net):
    """Parameter vectors (P, D) -> {name: (P, ...)}, in the order of net.parameters(). Views."""
    params, start = {}, 0
    for name, p in net.named_parameters():
        params[name] = thetas[:, start:start + p.numel()].view(-1, *p.shape)
        start += p.numel()
    return params


def update_batchnorm(net, x):
    """Let BatchNorm see x: its running statistics move, as in any training.

    Bounds always use the running statistics, as constants: no gradient flows through them, and all
    members of a population share them. (Shi et al. bound with the statistics of the batch.)
    """
    norms = [m for m in net if isinstance(m, nn.BatchNorm2d) and m.affine]
    if norms:
        for m in norms:
            m.train()
        with torch.no_grad():
            net(x)
        net.eval()


# --------------------------------------------------------------------------------- the robust loss

def eps_at(progress, eps):
    """Training radius after a fraction of the ramp: quartic up to a quarter of it, then linear,
    with the same value and slope where they meet (the smooth schedule of Shi et al. 2021)."""
    t, middle = min(max(progress, 0.0), 1.0), 0.25
    a = 1 / (middle ** 4 + 4 * middle ** 3 * (1 - middle))
    return eps * (a * t ** 4 if t < middle
                  else a * middle ** 4 + 4 * a * middle ** 3 * (t - middle))


def regularizers(bounds, radius, total=lambda t: t):
    """The two regularisers of Shi et al. 2021, summed: (P,).

    bounds: [(l, u), ...] before each ReLU, (P, B, ...). radius: mean radius of the input box.
    tightness  mean over layers of relu(1/2 - radius / mean radius there) / (1/2): bounds that grow
    balance    mean over layers of [relu(1/2 - rho(m)) + relu(1/2 - rho(v))] / (1/2), where m is the
               ratio of the centres of active to those of inactive neurons, v that of their
               squared distances from the mean of all, and rho(t) = min(t, 1/t); a layer where
               one is undefined is skipped
    total: sums over the processes that share a minibatch.
    """
    sums = lambda *ts: total(torch.stack([t.sum((1, 2)) for t in ts]))             # (len(ts), P)
    tightness, balance = [], []
    for l, u in bounds:
        l, u = l.flatten(2), u.flatten(2)
        c, r = (l + u) / 2, (u - l) / 2
        c_sum, r_sum, images = sums(c, r, torch.ones_like(c[:, :, :1]))
        n = images * c.shape[2]
        tightness.append(F.relu(0.5 - radius / (r_sum / n).clamp(min=1e-12)) / 0.5)
        active, inactive = (l > 0).to(c.dtype), (u < 0).to(c.dtype)
        spread = (c - (c_sum / n)[:, None, None]).square()
        both = sums(c * active, -c * inactive, spread * active, spread * inactive)
        m, v = both[:2], both[2:]
        defined = (both > 1e-12).all(0)
        loss = 0.0
        for top, bottom in (m, v):
            ratio = torch.where(defined, top, 1.0) / torch.where(defined, bottom, 1.0)
            loss = loss + F.relu(0.5 - torch.minimum(ratio, 1 / ratio)) / 0.5
        balance.append(torch.where(defined, loss, 0.0))
    return torch.stack(tightness).mean(0) + torch.stack(balance).mean(0)


ATTACKING = {  # what becomes of the margins in the box, m, and at the points of an attack, a
    # Mueller et al. 2023, "Certified training: small boxes are all you need"
    "sabr": lambda m, a, alpha: cross_entropy(m),             # m in a small box around the points
    # De Palma et al. 2024, "Expressive losses for verified robustness via convex combinations"
    "mtl-ibp": lambda m, a, alpha: alpha * cross_entropy(m) + (1 - alpha) * cross_entropy(a),
    "cc-ibp": lambda m, a, alpha: cross_entropy(alpha * m + (1 - alpha) * a),
    "exp-ibp": lambda m, a, alpha: (cross_entropy(m).clamp(min=1e-9) ** alpha
                                    * cross_entropy(a).clamp(min=1e-9) ** (1 - alpha)),
}


def cross_entropy(margins):
    """Of logits that are less than that of the label by margins (..., K): log sum_k exp(-m_k)."""
    return torch.logsumexp(-margins, -1)


def robust_loss(net, x, y, eps, relax="deeppoly", *, loss="cross-entropy", kappa=0.0, l1=0.0,
                regularize=0.0, skip_stable=False, beta=1.0, alpha=0.1, lam=0.4, slope_steps=3,
                certified=None, weight=1.0, total=lambda t: t):
    """The loss of a minibatch as a function (P, D) -> (P,) of parameter vectors, for gls.py.

        (1 - kappa) E[CE(-m, y)] + kappa E[CE(logits, y)] + l1 |weights|_1 + regularize * (...)

    m are lower bounds of the margins logit[y] - logit[k]: -m are logits of the worst case, relative
    to that of y, and their cross-entropy log sum_k exp(-m_k) is an upper bound of the largest
    cross-entropy in the ball. (m_y = 0.)  With loss="certified-error" the fraction of images with
    some m_k <= 0 takes its place, an upper bound of the worst error; its gradient is zero.

    relax  box, deeppoly    the bounds of relaxations.py
           crown-ibp        beta m + (1 - beta) (m of box), as Zhang et al. 2020 train with it
           alpha-crown      the margins by slope_steps steps of ascent, between DeepPoly's bounds
                            of the neurons; a gradient holds the slopes found fixed
           ATTACKING        baselines that see an attack (8 steps of PGD on net as it is, once for
                            all parameter vectors) beside the box: no upper bounds of the worst case
    alpha, lam: weight of the box for those; radius of sabr's small box in units of eps.
    certified: a list to which the certified fraction of each call, averaged over P, is appended.
    weight, total: for a part of a minibatch, see share.
    """
    center, radius = x, eps
    if relax in ATTACKING:
        points = attack(net, x, y, eps, steps=8, restarts=1)
    if relax == "sabr":
        radius = lam * eps
        center = points.clamp(x - (eps - radius), x + (eps - radius))
    outputs = "box" if relax in ATTACKING else relax
    neurons = "deeppoly" if relax == "alpha-crown" else outputs

    def forward(params, x):
        return vmap(lambda p: functional_call(net, p, (x,)))(params)                # (P, B, K)

    def losses(thetas):
        params = unflatten(thetas, net)
        bounds = preactivation_bounds(net, center, radius, neurons, params, skip_stable=skip_stable)
        margins = lambda relax: margin_lower_bounds(net, center, y, radius, relax, params,
                                                    intermediate=bounds, steps=slope_steps)
        m = margins(outputs)                                                        # (P, B, K)
        if relax == "crown-ibp" and beta < 1:
            m = beta * m + (1 - beta) * margins("box")
        is_certified = (m > 0).sum(-1) == m.shape[-1] - 1                           # (P, B)
        if certified is not None:
            certified.append(weight * is_certified.float().mean())
        if loss == "certified-error":
            value = 1 - is_certified.to(m.dtype)
        elif relax in ATTACKING:
            logits = forward(params, points)
            a = logits.gather(2, y.expand(len(logits), -1)[..., None]) - logits
            value = ATTACKING[relax](m, a, alpha)
        else:
            value = cross_entropy(m)
        value = weight * (1 - kappa) * value.mean(-1)
        if kappa:
            natural = vmap(F.cross_entropy, (0, None))(forward(params, x), y)
            value = value + weight * kappa * natural
        if l1:
            norms = (w.abs().flatten(1).sum(1) for w in params.values() if w.dim() > 2)
            value = value + l1 * sum(norms)
        if regularize and bounds:
            first = net[0] if isinstance(net[0], nn.BatchNorm2d) else nn.Identity()  # normalisation
            low, high = first((center - radius).clamp(min=0)), first((center + radius).clamp(max=1))
            widths = (high - low).abs().flatten(1).mean(1)
            width, images = total(torch.stack([widths.sum(), torch.ones_like(widths).sum()]))
            value = value + regularize * regularizers(bounds, width / images / 2, total)
        return value
    return losses


# -------------------------------------------------------------------------------------- evaluation

CLOSE = 1e-4     # margins nearer to zero, relative to the largest if that exceeds 1, need float64


def in_float64(net, *tensors):
    """Copies in float64 (on the CPU if the device has none, as MPS), to decide close calls."""
    device = "cpu" if tensors[0].device.type == "mps" else tensors[0].device
    return deepcopy(net).to(device, torch.float64), *(
        t.to(device, torch.float64 if t.is_floating_point() else t.dtype) for t in tensors)


def smallest(margins, y):
    """The smallest entry k != y of margins (..., B, K): (..., B)."""
    return margins.masked_fill(F.one_hot(y, margins.shape[-1]).bool(), torch.inf).amin(-1)


@torch.no_grad()
def forward_margin(net, x, y):
    """min over k != y of logit[y] - logit[k], in float64: (B,). Correct means positive."""
    net, x, y = in_float64(net, x, y)
    logits = torch.cat([net(part) for part in x.split(500)])
    return smallest(logits.gather(1, y[:, None]) - logits, y)


@torch.no_grad()
def certified_margin(net, x, y, eps, relax, batch=100, **options):
    """A sound lower bound of forward_margin over the ball, (B,); close to zero, from float64."""
    if not len(x):
        return x.new_zeros(0)
    low = torch.cat([margin_lower_bounds(net, a, b, eps, relax, **options)
                     for a, b in zip(x.split(batch), y.split(batch))])
    bound, scale = smallest(low, y), low.abs().amax(-1).clamp(min=1)
    close = bound.abs() < CLOSE * scale
    if close.any() and x.dtype != torch.float64:
        again = certified_margin(*in_float64(net, x[close], y[close]), eps, relax, batch, **options)
        bound[close] = again.to(bound)
    return bound


def ball(x, eps):
    """Lower and upper ends of the ball, in the dtype of x and rounded inwards: exactly inside."""
    wide = x.detach().cpu().double()
    lower, upper = (wide - eps).clamp(min=0), (wide + eps).clamp(max=1)
    low, high = lower.to(x.dtype), upper.to(x.dtype)
    low = torch.where(low < lower, torch.nextafter(low, torch.ones_like(low)), low)
    high = torch.where(high > upper, torch.nextafter(high, torch.zeros_like(high)), high)
    return low.to(x.device), high.to(x.device)


def attack(net, x, y, eps, steps=40, restarts=3, seed=0):
    """Projected gradient descent (PGD, Madry et al. 2018) on the margin, with restarts.

    Returns the worst points found, (B, ...), exactly inside the ball. Restart 0 lowers the smallest
    margin; restart r > 0 lowers the margin to the r-th runner-up class, from a random start, which
    is the same for all samples: what is found for one does not depend on the others.
    """
    low, high = ball(x, eps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        ranking = torch.cat([net(part) for part in x.split(500)]).scatter(1, y[:, None], -torch.inf)
        ranking = ranking.argsort(1, descending=True)                          # (B, K), y last
    best, best_margin = x.clone(), torch.full_like(x.flatten(1)[:, 0], torch.inf)
    for r in range(restarts):
        start = torch.rand(x.shape[1:], generator=generator).to(x)
        z = low + (high - low) * start if r else x
        target = ranking[:, (r - 1) % (ranking.shape[1] - 1)]
        for k in range(steps + 1):
            z = z.detach().clamp(low, high).requires_grad_()
            logits = net(z)
            margins = logits.gather(1, y[:, None]) - logits
            worst = smallest(margins, y)
            better = worst.detach() < best_margin
            best_margin = torch.where(better, worst.detach(), best_margin)
            best[better] = z.detach()[better]
            if k < steps:
                goal = worst if r == 0 else margins.gather(1, target[:, None])
                step = eps * (0.25 if k < steps / 2 else 0.1 if k < 3 * steps / 4 else 0.02)
                z = z - step * torch.autograd.grad(goal.sum(), z)[0].sign()
    return best


def evaluate(net, x, y, eps, batch=500, progress=lambda line: None):
    """Which samples are correct, survive the attack, and are certified: {name: (n,) bool}.

    "best" is certified by any of the three relaxations. Raises AssertionError if a certified
    sample was attacked: then a bound is wrong, and no number can be trusted.
    """
    result = {"natural": forward_margin(net, x, y).cpu() > 0}
    progress("attacking")
    attacked = [forward_margin(net, attack(net, a, b, eps), b).cpu()
                for a, b in zip(x.split(batch), y.split(batch))]
    result["attack"] = result["natural"] & (torch.cat(attacked) > 0)
    for relax in CERTIFY:
        progress(f"bounding by {relax}")
        result[relax] = certified_margin(net, x, y, eps, relax, **CERTIFY[relax]).cpu() > 0
    result["best"] = torch.stack([result[r] for r in CERTIFY]).any(0)
    wrong = (result["best"] & ~result["attack"]).nonzero().flatten().tolist()
    if wrong:
        raise AssertionError(f"samples {wrong[:10]} are both certified and attacked at eps={eps}: "
                             "a bound is unsound; please report this with the run folder")
    return result


# How certification uses DeepPoly: only the neurons that intervals leave unstable are substituted.
# Faster on trained networks, and on those tried about as tight: see benchmarks/README.md.
CERTIFY = {"box": {}, "crown-ibp": {}, "deeppoly": dict(skip_stable=True)}
TITLES = {"natural": "natural accuracy", "attack": "under attack (PGD)",
          "box": "certified by box (IBP)", "crown-ibp": "certified by CROWN-IBP",
          "deeppoly": "certified by DeepPoly", "best": "certified by the best of them"}


def table(result):
    """The evaluation as lines of text."""
    n = len(result["natural"])
    return [f"  {TITLES[k]:32}{100 * v.float().mean():6.2f} %   {int(v.sum())}/{n}"
            for k, v in result.items()]


# --------------------------------------------------------------------------------------- run folder

CHECKPOINT = 2           # version of the checkpoint's layout
SAVE_EVERY = 60.0        # seconds, and after each epoch


def write_whole(path, content):
    """Write bytes to path so that at any moment, even after a power cut, path is the old file or
    the new one. Raises InputError if that fails; then it is the old one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({e.strerror}); what it held before is "
                         "untouched") from None


def save_checkpoint(folder, net, config, training=None):
    """checkpoint.pt: {"format", "config", "state", "training"}, tensors and plain values.

    training: all that a step changes beside net, to continue (see train); None at the start.
    """
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT, "config": config, "state": net.state_dict(),
                "training": training}, buffer)
    write_whole(folder / "checkpoint.pt", buffer.getvalue())


def claim(handle, path):
    """Keep other processes from path, open as handle, until it is closed or this one ends."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is in use by another process") from None


@contextmanager
def locked(folder):
    """Claim a run folder, for all processes of a job. None: there is none yet."""
    if folder is None or ranks()[0] or not fcntl:
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise InputError(f"{folder} cannot be opened ({e.strerror})") from None
    try:
        claim(handle, folder)
        yield
    finally:
        os.close(handle)


def load_run(folder):
    """(net, config, training) of a run folder. Nothing in the file is executed; it is read only if
    it is about as large as it says. Raises InputError."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one with train.py --out {folder}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_zip(archive, path)
            if bad := archive.testzip():                       # torch.load does not look
                raise InputError(f"{path}: its part {bad} is damaged (wrong checksum)")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:       # torch.load raises many kinds for a damaged or foreign file
        raise InputError(f"{path}: not a readable checkpoint ({type(e).__name__}: "
                         f"{str(e).splitlines()[0][:80] if str(e) else ''}); train again") from None
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT:
        raise InputError(f"{path}: not a checkpoint of this version of train.py; train again")
    try:
        c = saved["config"]
        with torch.device("meta"):                              # takes no memory, whatever the size
            net = build_network(c["net"], c["input_shape"], c["classes"], c["init"],
                                c["statistics"])
        types = {k: t.dtype for k, t in net.state_dict().items()}
        if types != {k: t.dtype for k, t in saved["state"].items()}:
            raise ValueError("other layers, or other types")
        net.load_state_dict(saved["state"], assign=True)
        return net, c, saved["training"]
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: its weights and its config do not fit "
                         f"({str(e).splitlines()[0] if str(e) else type(e).__name__})") from None


def new_folder(out, name):
    """Create the run folder; an existing one is never reused."""
    if out is None:
        out = Path("runs") / name
        for i in range(2, 10 ** 6):
            if not out.exists():
                break
            out = Path("runs") / f"{name}-{i}"
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already; name another folder, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out} cannot be created ({e})") from None
    return out


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a line at most every few seconds."""

    def __init__(self, every=10.0):
        self.terminal, self.start, self.last = sys.stdout.isatty(), time.time(), 0.0
        self.every = 0.2 if self.terminal else every

    def __call__(self, line, force=False):
        if force or time.time() - self.last >= self.every:
            print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n",
                  flush=True)
            self.last = time.time()

    def done(self, line):
        print(f"\r{line}\033[K" if self.terminal else line, flush=True)


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# ----------------------------------------------------------------------------------------- training

def ranks():
    """The number of this process and how many there are, as torchrun tells them: (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Total(torch.autograd.Function):
    """The sum over the processes; each gets the gradient of the sum of what all make of it."""

    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, grad):
        return Total.forward(ctx, grad)


def samples_are_shared(config):
    """Whether the processes share out the samples of an estimate; else, the minibatch."""
    return config["opt"] == "pgpe" or (config["opt"] == "rgs"
                                       and config["samples"] % ranks()[1] == 0)


def share(x, y, config):
    """This process's part of a minibatch, and how robust_loss is to count it: (x, y, options).

    weight makes the mean over the processes the mean over the images, and total sums what is not a
    mean, such as the statistics of the regularisers, over the processes, in its gradient too.
    """
    rank, world = ranks()
    if world == 1 or samples_are_shared(config) or len(x) < world:     # everybody needs all of it
        return x, y, {}
    part = torch.arange(len(x)).tensor_split(world)[rank]
    return x[part], y[part], dict(weight=len(part) * world / len(x), total=Total.apply)


def estimate(loss, theta, sigma, config, generator):
    """The gradient estimate config["opt"] asks for: (loss, gradient, sigma gradient or None)."""
    opt, samples, chunk = (config[k] for k in ("opt", "samples", "members"))
    shard = ranks() if samples_are_shared(config) else (0, 1)
    if opt == "pgpe":
        return gls.pgpe(loss, theta, sigma, samples // 2, generator, chunk,
                        adapt=config["sigma_adapt"] != "fixed", shard=shard)
    value, grad, _ = gls.gradient(loss, theta) if opt == "grad" else gls.rgs(
        loss, theta, sigma, samples, generator, config["antithetic"], chunk, shard)
    if shard != ranks():                                   # each has that of its part of the images
        both = torch.cat([value[None], grad])
        dist.all_reduce(both)
        value, grad = (both / ranks()[1]).split([1, len(theta)])
        value = value[0]
    return value, grad, None


def members_at_once(net, config):
    """How many parameter vectors to run at once, where --members does not say; for speed alone.

    Small ones together save overhead; large ones, on a CPU, only miss its cache. The limit, in
    neurons times images, is measured (benchmarks/population.py).
    """
    if config["device"] != "cpu":
        return 16
    limit = 2 ** 21 if config["relax"] in ("box", *ATTACKING) else 2 ** 19
    bounds = preactivation_bounds(net, torch.zeros(1, *config["input_shape"]), 0, "box")
    size = config["batch_size"] * sum(l.numel() for l, _ in bounds)
    return max(1, min(16, limit // size))


def adapt_sigma(sigma, grad, lr):
    """sigma - lr sigma^2 dL/dsigma, by at most 20 % a step (Sehnke et al. 2010, as in pgpelib)."""
    return torch.clamp(sigma - lr * sigma ** 2 * grad, 0.8 * sigma, 1.2 * sigma)


def lr_at(epoch, config):
    """Learning rate in the epoch with this number, from 0."""
    return math.prod([config["lr"], *(config["lr_decay"] for m in config["milestones"]
                                      if m <= epoch)])


def loss_of_step(net, x, y, eps, config, **options):
    """robust_loss by the settings in config; what depends on the ramp goes by eps / eps_train."""
    full = eps / config["eps_train"] if config["eps_train"] else 1.0
    options |= {k: config[k] for k in ("relax", "loss", "kappa", "l1", "skip_stable", "alpha",
                                       "lam", "slope_steps")}
    return robust_loss(net, x, y, eps, regularize=config["regularize"] * (1 - full),
                       beta=1 + (config["beta"] - 1) * full, **options)


def culprit(net, x, eps, config, grad):
    """Where numbers stop being finite: a layer's bounds, else a parameter's gradient."""
    relax = config["relax"] if config["relax"] in RELAXATIONS else "box"
    with torch.no_grad():
        bounds = preactivation_bounds(net, x, eps, relax, skip_stable=config["skip_stable"])
    relus = [i for i, layer in enumerate(net) if isinstance(layer, nn.ReLU)]
    for i, pair in zip(relus, bounds):
        if not all(t.isfinite().all() for t in pair):
            return f"the bounds before layer {i} ({net[i]}) are not finite"
    for name, g in unflatten(grad[None], net).items():
        if not g.isfinite().all():
            return f"the gradient of layer {name} is not finite"
    return "the bounds of the output, or a regulariser, are not finite"


def take_step(net, theta, optimizer, sigma, x, y, eps, config, noise, where, requests):
    """One step of the optimiser: sigma after it, (loss, certified, gradient norm) before it, and
    whether any process is asked to stop."""
    certified = []
    update_batchnorm(net, x)
    x, y, options = share(x, y, config)
    loss = loss_of_step(net, x, y, eps, config, certified=certified, **options)
    value, theta.grad, sigma_grad = estimate(loss, theta, sigma, config, noise)
    counts = theta.new_tensor([sum(certified), len(certified), len(requests)])
    if ranks()[1] > 1:
        dist.all_reduce(counts)
    norm = clip_grad_norm_([theta], config["clip"])
    if not (value.isfinite() and norm.isfinite()):
        raise FloatingPointError(
            f"{where}, eps {eps:.4g}: the loss is {value:.4g}, the gradient's norm {norm:.4g}; "
            f"{culprit(net, x, eps, config, theta.grad)}. Try a smaller --lr or a longer --ramp; "
            "the last good checkpoint is kept")
    optimizer.step()
    if sigma_grad is not None:
        sigma = adapt_sigma(sigma, sigma_grad, config["sigma_lr"])
    return sigma, torch.stack([value, counts[0] / counts[1], norm]), counts[2] > 0


@contextmanager
def requests_to_stop():
    """A list that SIGINT and SIGTERM append to, instead of ending the process; the second ends it.
    """
    def note(number, _):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    requests = []
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(net, x, y, config, device, folder, show=print, training=None):
    """Train net on images x and labels y, by the settings in config (see DEFAULTS, COMMON).

    Writes log.csv and, after each epoch and every SAVE_EVERY seconds, checkpoint.pt into folder;
    returns the rows of the log. Every random number comes from two generators seeded with
    config["seed"]: one draws batches, one noise.  training: as load_run returns it with net, to
    continue; the weights in the end are then, bit by bit, those of a run that never stopped.
    Raises FloatingPointError where numbers cease to be finite, Interrupted after a signal.
    """
    batches = torch.Generator().manual_seed(config["seed"])
    noise = torch.Generator(device).manual_seed(config["seed"] + 1)
    theta = parameters_to_vector(net.parameters()).detach().clone()
    vector_to_parameters(theta, net.parameters())      # as views: net follows theta from here on
    optimizer = torch.optim.Adam([theta], lr=config["lr"])
    sigma = torch.tensor(config["sigma"], device=device)
    if config["sigma_adapt"] == "parameter":
        sigma = torch.full_like(theta, config["sigma"])
    # What else a step changes. order: of the images in this epoch. totals: loss, certified and
    # gradient of this epoch so far. began: when it began, in seconds of training.
    now = dict(done=0, seconds=0.0, began=0.0, order=None, rows=[], sigma=sigma,
               totals=torch.zeros(3, device=device))
    if training:
        try:
            now = {k: training[k] for k in now}
            now |= {k: now[k].to(device) for k in ("sigma", "totals")}
            optimizer.load_state_dict(training["optimizer"])
            batches.set_state(training["batches"])
            noise.set_state(training["noise"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise InputError(f"{folder} cannot be continued: its checkpoint lacks, or has wrong, "
                             f"{e}") from None
    size, steps = config["batch_size"], -(-len(x) // config["batch_size"])
    first, saved = ranks()[0] == 0, time.time()        # the first of many processes writes files
    start = saved - now["seconds"]
    with requests_to_stop() as requests:
        while now["done"] < config["epochs"] * steps:
            epoch, step = divmod(now["done"], steps)
            if step == 0:
                now |= dict(order=torch.randperm(len(x), generator=batches), began=now["seconds"],
                            totals=torch.zeros(3, device=device))
            optimizer.param_groups[0]["lr"] = lr_at(epoch, config)
            index = now["order"][step * size:(step + 1) * size]
            xb, yb = x[index].to(device), y[index].to(device)
            if config["augment"]:
                xb = augment(xb, batches)
            now["done"] += 1
            eps = eps_at(now["done"] / (config["ramp"] * steps) if config["ramp"] else 1.0,
                         config["eps_train"])
            now["sigma"], numbers, stop = take_step(
                net, theta, optimizer, now["sigma"], xb, yb, eps, config, noise,
                f"epoch {epoch + 1}, batch {step + 1}", requests)
            now["totals"] += numbers * len(index)
            now["seconds"] = time.time() - start
            report(show, now, epoch, step, steps, config, eps, numbers)
            if step + 1 == steps:
                now["rows"].append(log_row(now, epoch, eps, len(x), config))
                check_agreement(theta)
            if first and (step + 1 == steps or stop or time.time() - saved > SAVE_EVERY):
                write_log(folder, now["rows"])
                save_checkpoint(folder, net, config, dict(
                    now, optimizer=optimizer.state_dict(), batches=batches.get_state(),
                    noise=noise.get_state()))
                saved = time.time()
            if stop:
                raise Interrupted(requests[0] if requests else signal.SIGTERM, "python train.py "
                                  f"--resume {folder} goes on after epoch {epoch + 1}, batch "
                                  f"{step + 1}")
    if requests:                                       # while the last checkpoint was written
        raise Interrupted(requests[0], f"python train.py --resume {folder} shows the end of it")
    return now["rows"]


def check_agreement(theta):
    """All processes have the same weights, bit by bit; else something is broken: stop."""
    if ranks()[1] > 1:
        sums = [None] * ranks()[1]
        dist.all_gather_object(sums, checksum(theta))
        if len(set(sums)) > 1:
            raise FloatingPointError("the processes disagree about the weights; resume from the "
                                     "last checkpoint")


def report(show, now, epoch, step, steps, config, eps, numbers):
    """One line of progress."""
    left = now["seconds"] / now["done"] * (config["epochs"] * steps - now["done"])
    rate = (step + 1) * config["batch_size"] / (now["seconds"] - now["began"])
    show(f"epoch {epoch + 1}/{config['epochs']}  batch {step + 1}/{steps}  eps {eps:.4f}  "
         f"loss {numbers[0]:.4f}  certified {100 * numbers[1]:.1f} %  {rate:.0f} samples/s  "
         f"{duration(left)} left")


def log_row(now, epoch, eps, n, config):
    loss, certified, norm = (now["totals"] / n).tolist()
    return dict(epoch=epoch + 1, eps=eps, lr=lr_at(epoch, config), sigma=now["sigma"].mean().item(),
                loss=loss, certified=certified, gradient=norm, seconds=now["seconds"],
                samples_per_s=n / (now["seconds"] - now["began"]))


def write_log(folder, rows):
    text = io.StringIO()
    log = csv.DictWriter(text, LOG, lineterminator="\n")
    log.writeheader()
    log.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
    write_whole(folder / "log.csv", text.getvalue().encode())


# ------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(low, high, open_low=False):
    """An argument type: a number or fraction ("8/255") within limits."""
    def parse(text):
        try:
            value = float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        above = low < value if open_low else low <= value
        if not above or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text!r} has to be a number {'>' if open_low else '>='} {low:g}"
                + (f" and <= {high:g}" if high < math.inf else "") + ", such as 0.1 or 2/255")
        return value
    return parse


def count(low, high=10 ** 9):
    def parse(text):
        if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} has to be a whole number >= {low}")
        return int(text)
    return parse


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch finds no CUDA GPU; use --device cpu, or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this PyTorch finds no Apple GPU; use --device cpu, or auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


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


def arguments():
    p = Parser(prog="train.py", description="Train a certifiably robust network, with or without "
               "Gaussian loss smoothing.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    eps, switch = number(0, 1), argparse.BooleanOptionalAction
    p.add_argument("--dataset", default="digits", help="digits, mnist, cifar10, or PATH.npz")
    p.add_argument("--relax", choices=(*RELAXATIONS, *ATTACKING), default=COMMON["relax"],
                   help="the bound in the loss, or a baseline that is none")
    p.add_argument("--opt", choices=("grad", "rgs", "pgpe"), default=COMMON["opt"])
    p.add_argument("--net", choices=NETWORKS, help="default: by data set")
    p.add_argument("--eps", type=eps,
                   help="radius to certify, in pixels of [0, 1]; default: by data set")
    p.add_argument("--eps-train", type=eps, help="radius to train at; default: that of --eps")
    p.add_argument("--epochs", type=count(0), help="default: by data set")
    p.add_argument("--ramp", type=count(0), help="epochs in which eps grows; default: by data set")
    p.add_argument("--milestones", type=count(0), nargs="*",
                   help="epochs after which lr decays; by data set")
    p.add_argument("--batch-size", type=count(1), help="default: by data set")
    p.add_argument("--lr", type=number(0, math.inf, True), help="of Adam; default: by data set")
    p.add_argument("--lr-decay", type=number(0, 1, True), default=COMMON["lr_decay"])
    p.add_argument("--sigma", type=number(0, math.inf, True), default=COMMON["sigma"],
                   help="standard deviation of the weight noise (rgs, pgpe)")
    p.add_argument("--samples", type=count(1),
                   help="loss evaluations per step; default: rgs 2, pgpe 64")
    p.add_argument("--antithetic", action=switch, default=COMMON["antithetic"],
                   help="rgs: perturb by eps and by -eps (pgpe always does)")
    p.add_argument("--sigma-adapt", choices=("fixed", "scalar", "parameter"),
                   default=COMMON["sigma_adapt"],
                   help="pgpe: follow the gradient of sigma too, one for all or one per parameter")
    p.add_argument("--sigma-lr", type=number(0, math.inf), default=COMMON["sigma_lr"])
    p.add_argument("--members", type=count(1),
                   help="parameter vectors run at once; default: see members_at_once")
    p.add_argument("--loss", choices=("cross-entropy", "certified-error"), default=COMMON["loss"],
                   help="certified-error: the fraction not certified; for pgpe only")
    p.add_argument("--beta", type=number(0, 1), default=COMMON["beta"],
                   help="crown-ibp: its weight against box at full eps, 1 at eps 0")
    p.add_argument("--alpha", type=number(0, 1), default=COMMON["alpha"],
                   help="mtl-ibp, cc-ibp, exp-ibp: weight of the box against the attack")
    p.add_argument("--lam", type=number(0, 1, True), default=COMMON["lam"],
                   help="sabr: radius of the small box, in units of eps (lambda)")
    p.add_argument("--slope-steps", type=count(0), default=COMMON["slope_steps"],
                   help="alpha-crown: steps of ascent inside the loss")
    p.add_argument("--kappa", type=number(0, 1), default=COMMON["kappa"],
                   help="weight of the natural loss")
    p.add_argument("--l1", type=number(0, math.inf), default=COMMON["l1"])
    p.add_argument("--regularize", type=number(0, math.inf), default=COMMON["regularize"],
                   help="weight of the regularisers of Shi et al., during the ramp")
    p.add_argument("--clip", type=number(0, math.inf, True), default=COMMON["clip"],
                   help="gradient norm")
    p.add_argument("--init", choices=("ibp", "default"), default=COMMON["init"])
    p.add_argument("--skip-stable", action=switch, default=COMMON["skip_stable"],
                   help="deeppoly: back-substitute unstable neurons only")
    p.add_argument("--seed", type=count(0), default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    p.add_argument("--data-dir", help="where the data set is, or is downloaded to; default: data")
    p.add_argument("--subset", type=count(1), help="use only the first N training images")
    p.add_argument("--validation", type=count(0), default=COMMON["validation"],
                   help="hold out the last N training images and test on them, to tune settings")
    p.add_argument("--test-subset", type=count(1), help="evaluate on the first N test images only")
    p.add_argument("--out", help="the run folder; default: runs/DATASET-NET-RELAX-OPT")
    p.add_argument("--resume", metavar="RUN", help="continue the run in this folder, from its last "
                   "checkpoint, with its own settings; only --data-dir and --device may be given")
    return p


def parse_config(argv):
    """Settings from a command line: COMMON, DEFAULTS of the data set, and what argv changes."""
    p, argv = arguments(), sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    if args.resume:
        others = {a.split("=")[0] for a in argv if a.startswith("--")} - {
            "--resume", "--data-dir", "--device"}
        if others:
            p.error(f"argument --resume: a run keeps its settings; leave out {', '.join(others)}")
        return vars(args)
    kind = "npz" if args.dataset.endswith(".npz") else args.dataset
    if kind not in DEFAULTS:
        p.error(f"argument --dataset: {args.dataset!r} is none of digits, mnist, cifar10, "
                "or PATH.npz")
    config = {**COMMON, **DEFAULTS[kind], **{k: v for k, v in vars(args).items() if v is not None}}
    if args.epochs is not None and args.ramp is None:      # a shorter run keeps the recipe's shape
        scale = args.epochs / DEFAULTS[kind]["epochs"]
        config["ramp"] = round(DEFAULTS[kind]["ramp"] * scale)
        if args.milestones is None:
            config["milestones"] = [max(1, round(m * scale)) for m in DEFAULTS[kind]["milestones"]]
    config = dict(data_dir="data", device="auto") | config
    config["eps_train"] = config["eps"] if args.eps_train is None else args.eps_train
    if config["opt"] == "grad":
        config |= dict(samples=1, sigma=0.0)
    config["samples"] = config["samples"] or {"rgs": 2, "pgpe": 64}[config["opt"]]
    paired = config["opt"] == "pgpe" or config["opt"] == "rgs" and config["antithetic"]
    if paired and config["samples"] % 2:
        p.error(f"argument --samples: {config['samples']} is odd, but {config['opt']} uses "
                f"antithetic pairs; use {config['samples'] + 1}"
                + (", or --no-antithetic" * (config["opt"] == "rgs")))
    if config["loss"] == "certified-error":
        if config["opt"] != "pgpe":
            p.error("argument --loss: the gradient of certified-error is 0; use --opt pgpe")
        if config["relax"] in ATTACKING:
            p.error(f"argument --loss: {config['relax']} has no certified-error; use a --relax of "
                    + ", ".join(RELAXATIONS))
    if config["sigma_adapt"] != "fixed" and config["opt"] != "pgpe":
        p.error(f"argument --sigma-adapt: only --opt pgpe estimates a gradient of sigma, not "
                f"--opt {config['opt']}; use fixed")
    return config


def start_run(config, data, device):
    """A new run: (net, config). Its folder is made by the first process."""
    cifar = config["dataset"] == "cifar10"
    config = config | dict(
        input_shape=list(data.x_train.shape[1:]), classes=data.classes, augment=cifar,
        statistics=CIFAR_STATISTICS if cifar else None, milestones=list(config["milestones"]),
        device=str(device), threads=torch.get_num_threads(), processes=ranks()[1],
        torch=str(torch.__version__), fingerprint=fingerprint(data, config))
    torch.manual_seed(config["seed"])
    net = build_network(config["net"], data.x_train.shape[1:], data.classes, config["init"],
                        config["statistics"])
    config["members"] = config["members"] or max(1, min(        # some for each process
        members_at_once(net, config), config["samples"] // ranks()[1]))
    if ranks()[0] == 0:
        folder = new_folder(config["out"], "-".join([Path(config["dataset"]).stem, *(
            config[k] for k in ("net", "relax", "opt"))]))
        config["out"] = str(folder)
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        save_checkpoint(folder, net, config)
    names = [config["out"]]
    if ranks()[1] > 1:
        dist.broadcast_object_list(names, src=0)
    return net, config | dict(out=names[0])


def checksum(*tensors):
    return zlib.crc32(b"".join(t.cpu().numpy().tobytes() for t in tensors))


def fingerprint(data, config):
    """Of what is trained on: a run is continued on the same images only."""
    return checksum(data.x_train[:config["subset"]], data.y_train[:config["subset"]])


def main(argv=None):
    config = parse_config(argv)
    resumed = config.pop("resume", None)
    with locked(resumed), ExitStack() as stack:
        if resumed:
            net, saved, training = load_run(resumed)
            given = {k: config[k] for k in ("data_dir", "device") if config[k]}
            config = saved | dict(out=resumed) | given
        device = pick_device(config["device"].split(":")[0])
        stack.enter_context(process_group(device))
        data = load_dataset(config["dataset"], config["data_dir"])
        data = hold_out(data, config["validation"])
        if not resumed:
            net, config = start_run(config, data, device)
            stack.enter_context(locked(config["out"]))
            train_and_show(net, config, None, data, device)
        elif fingerprint(data, config) == config["fingerprint"]:
            train_and_show(net, config, training, data, device)
        else:
            raise InputError(f"{resumed} was trained on other images than {config['dataset']} has "
                             f"in {config['data_dir']}")


def train_and_show(net, config, training, data, device):
    """Train, from the start or from where training was, and print the table of the test images."""
    folder, net, show = Path(config["out"]), net.to(device), Progress()
    x, y = (t[:config["subset"]] for t in (data.x_train, data.y_train))
    x_test, y_test = (t[:config["test_subset"]].to(device) for t in (data.x_test, data.y_test))
    print(f"{Path(config['dataset']).stem}: {len(x)} training and {len(x_test)} test images "
          f"{tuple(x.shape[1:])}, {data.classes} classes\n"
          f"{config['net']}: {sum(p.numel() for p in net.parameters())} parameters; "
          f"{config['relax']} bounds, {config['opt']}; eps {config['eps_train']:.4g} in training, "
          f"{config['eps']:.4g} in the test; {device}")
    rows = train(net, x, y, config, device, folder, show, training)
    if ranks()[0]:
        return                                         # the first process shows the rest
    if rows:
        last = rows[-1]
        show.done(f"trained {len(rows)} epochs in {duration(last['seconds'])}: loss "
                  f"{last['loss']:.4f}, {100 * last['certified']:.1f} % certified in training")
        if config["ramp"] < config["epochs"] and last["loss"] > 0.98 * math.log(data.classes):
            print(f"warning: the loss is that of guessing, ln {data.classes} = "
                  f"{math.log(data.classes):.3f}; try a longer --ramp, a smaller --eps-train or "
                  "--lr, or --relax box", file=sys.stderr)
    result = evaluate(net, x_test, y_test, config["eps"], progress=show)
    show.done(f"{len(x_test)} test images, eps {config['eps']:.4g}:")
    print("\n".join(table(result)))
    print(f"to certify it sample by sample:  python certify.py {folder}")


def keep_memory():
    """Tell glibc's malloc to keep freed memory instead of handing it back to the system.

    A step frees and allocates the same megabytes again and again, and each fresh page costs a
    fault: about a third of a DeepPoly step on a CPU. No effect with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD
    for option, value in ((-4, 0), (-1, -1), (-2, 2 ** 26)):
        mallopt(option, value)


def run(main):
    """Run a command line: whatever the user can mend is one line on stderr and exit status 2."""
    keep_memory()
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as e:
        number, how = e.args
        print(f"\ninterrupted and saved; {how}", file=sys.stderr)
        sys.exit(128 + number)
    except KeyboardInterrupt:
        print("\ninterrupted; the run folder is complete up to the last epoch or verdict",
              file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
