"""Data sets: found, downloaded, read and checked; nothing in a file is trusted.

Images leave this file as float32 in [0, 1], (n, C, H, W), labels as int64 in 0..K-1; whatever else
a file holds is an InputError that names the file and the mend.
"""
import gzip
import hashlib
import io
import math
import os
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.console import InputError


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
CIFAR_STATISTICS = (.4914, .4822, .4465), (.2023, .1994, .2010)   # mean, std of its pixels
CIFAR_FILE, CIFAR_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"


def dataset_kind(name):
    """digits, mnist, cifar10, or npz for a path to such a file; InputError for anything else."""
    if str(name).endswith(".npz"):
        return "npz"
    if name not in ("digits", "mnist", "cifar10"):
        raise InputError(f"{name!r} is none of digits, mnist, cifar10, or PATH.npz")
    return name


def dataset_name(text):
    """An argument type: text, if it names a data set."""
    dataset_kind(text)
    return text


def by_data(digits, mnist, cifar10, npz):
    """A value that depends on the kind of data set."""
    return dict(digits=digits, mnist=mnist, cifar10=cifar10, npz=npz)


def load_dataset(name, data_dir="data"):
    """Dataset "digits", "mnist", "cifar10", or the path of an .npz file.

    Local files are checked for their structure; what is downloaded, for its checksum.
    Raises InputError for anything missing, damaged or out of range.
    """
    data_dir, kind = Path(data_dir), dataset_kind(name)
    if kind in ("mnist", "cifar10") and not data_dir.is_dir() and data_dir != Path("data"):
        raise InputError(f"--data-dir {data_dir}: no such folder; for a download, make it first")
    if kind == "digits":
        table = np.loadtxt(Path(__file__).parent.parent / "data" / "digits.csv.gz", delimiter=",")
        x = (table[:, :-1] / 16).reshape(-1, 1, 8, 8)
        y = table[:, -1].astype(int)
        arrays = x[:1437], y[:1437], x[1437:], y[1437:]
    elif kind == "mnist":
        arrays = [_read_idx(_find_mnist(file, data_dir), file) for file in MNIST_FILES]
    elif kind == "cifar10":
        arrays = _read_cifar(data_dir)
    else:
        arrays = _read_npz(Path(name))
    return _check_dataset(name, *arrays, classes=None if kind == "npz" else 10)


def hold_out(data, n):
    """For tuning: the last n training images take the place of the test images (n = 0: nothing)."""
    if n >= len(data.x_train):
        raise InputError(f"--validation {n} leaves none of the {len(data.x_train)} training images")
    if not n:
        return data
    x, held_x = data.x_train[:-n], data.x_train[-n:]
    y, held_y = data.y_train[:-n], data.y_train[-n:]
    return Dataset(x, y, held_x, held_y, data.classes)


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
        content = b"".join(raw[n] for n in group)
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels, pixels = records[:, 0], records[:, 1:]
        parts += [pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)]
    return parts


def _read_at_most(file, limit, path):
    with file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: holds more than {limit} bytes; that is not CIFAR-10")
    return content


def check_zip(archive, path):
    """Refuse a small archive that would fill the memory."""
    size, limit = sum(e.file_size for e in archive.infolist()), 4 * path.stat().st_size
    if size > max(MAX_BYTES, limit):
        raise InputError(f"{path}: unpacks to {size} bytes, more than {max(MAX_BYTES, limit)}")


def _read_npz(path):
    keys = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
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
    shift = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    x = torch.where(flip.to(x.device).view(B, 1, 1, 1), x.flip(3), x)
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(n) for n in (B, C, H, W)), indexing="ij")
    row, column = row + shift[0].view(B, 1, 1, 1), column + shift[1].view(B, 1, 1, 1)
    place = (t.to(x.device) for t in (image, channel, row, column))
    return F.pad(x, (pad,) * 4)[tuple(place)]
