"""Data sets: found, downloaded, read and checked; nothing in a file is trusted.

Images leave this file as float32 in [0, 1], (n, C, H, W), labels as int64 in 0..K-1; whatever else
a file holds is an InputError that names the file and the mend.
"""
import gzip
import hashlib
import io
import math
import os
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.console import InputError, Progress, warn
from plumbing.pickles import Array, read_pickle


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
MNIST_RAW = ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
             "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")  # unpacked
CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",
                 "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/")
CIFAR_STATISTICS = (.4914, .4822, .4465), (.2023, .1994, .2010)   # mean, std of its pixels
CIFAR_FILE, CIFAR_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_PYTHON = "cifar-10-python.tar.gz"                            # as torchvision leaves it
CIFAR_FORMS = {  # (folder, archive): the files with the training images, and that of the test
    ("cifar-10-batches-bin", CIFAR_FILE): [*(f"data_batch_{i}.bin" for i in range(1, 6)),
                                           "test_batch.bin"],
    ("cifar-10-batches-py", CIFAR_PYTHON): [*(f"data_batch_{i}" for i in range(1, 6)),
                                            "test_batch"]}
CIFAR_PICKLES = ("c99cafc152244af753f735de768cd75f", "d4bba439e000b95fd0a9bffe97cbabec",
                 "54ebc095f3ab1f0389bbae665268c751", "634d18415352ddfa80567beed471001a",
                 "482c414d41f54cd18b22e5b47cb7c3cb", "40351d587109b95175f43aff81a1287e")
IDX_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}


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
        warn_of_others(name, data_dir, map(idx_checksum, arrays), MNIST_RAW)
    elif kind == "cifar10":
        arrays = _read_cifar(data_dir)
    else:
        arrays = _read_npz(Path(name))
    return _check_dataset(name, *arrays, classes=None if kind == "npz" else 10)


def statistics_of(data, config):
    """(mean, std) of the pixels of each channel, for a first layer that normalises; or None."""
    if not config["normalize"]:
        return None
    if config["dataset"] == "cifar10":
        return CIFAR_STATISTICS
    x = data.x_train[:config["subset"]]
    std, mean = torch.std_mean(x, (0, 2, 3))
    return tuple(tuple(round(v, 4) for v in t.clamp(min=0.001).tolist()) for t in (mean, std))


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
    """The arrays as a Dataset; of files of one's own, for which classes is None, with a warning
    for each thing that is allowed, but is probably a mistake."""
    if classes is None:
        warn_of_images(name, x_train)
        _ = warn_of_the_dark(name, x_train, "train") or warn_of_the_dark(name, x_test, "test")
    parts = [(x_train, y_train, "train"), (x_test, y_test, "test")]
    x_train, x_test = (_images(x, f"{name}: x_{part}") for x, _, part in parts)
    y_train, y_test = (_labels(y, f"{name}: y_{part}", len(x)) for x, y, part in parts)
    if classes is None:
        classes = int(y_train.max()) + 1
        warn_of_labels(name, y_train, classes)
    limit = min(classes, 10000)
    for y, part in ((y_train, "train"), (y_test, "test")):
        if y.min() < 0 or y.max() >= limit:
            raise InputError(f"{name}: y_{part} has labels outside 0..{limit - 1}: {y.min()} to "
                             f"{y.max()}")
    if classes < 2:
        raise InputError(f"{name}: all labels of y_train are 0; a classifier needs two classes")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(f"{name}: training images are {x_train.shape[1:]}, test images "
                         f"{x_test.shape[1:]}")
    return Dataset(*map(torch.from_numpy, (x_train, y_train, x_test, y_test)), classes)


def _images(x, what):
    """(n, C, H, W) float32 in [0, 1], from uint8 or floats, NHWC or NCHW or NHW."""
    if x.ndim in (3, 4) and not x.size:
        raise InputError(f"{what} holds no image: its shape is {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f" or x.ndim not in (3, 4):
        raise InputError(f"{what} has to be uint8 or float images, (n, H, W), (n, H, W, C) or "
                         f"(n, C, H, W); got {x.dtype} {x.shape}")
    if x.ndim == 3:
        x = x[:, None]
    elif is_channels_last(x.shape):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype == np.uint8:
        return np.divide(x, np.float32(255), dtype=np.float32, order="C")
    low, high = x.min(), x.max()
    if not (low >= 0 and high <= 1):
        mend = ("undo the normalisation: pixels are in [0, 1], and --normalize normalises them in "
                "the network" if low < 0 else "divide by the largest value pixels can have")
        mend = "look where they are from" if np.isnan(low) else mend
        raise InputError(f"{what} has values outside [0, 1] or NaN: {low:.4g} to {high:.4g}; "
                         f"{mend}")
    return np.ascontiguousarray(x, np.float32)


def is_channels_last(shape):
    return shape[1] not in (1, 3) and shape[3] in (1, 3)


def _labels(y, what, n):
    """(n,) int64; a column (n, 1), as keras and medmnist have it, is taken, too."""
    if y.dtype.kind not in "iu" or y.shape not in ((n,), (n, 1)):
        raise InputError(f"{what} has to hold {n} integer labels, got {y.dtype} {y.shape}")
    return y.reshape(n).astype(np.int64)


def warn_of_images(name, x):
    """Images that are probably not what they are read as."""
    if x.ndim == 4 and x.shape[1] == x.shape[2] > x.shape[3] and not is_channels_last(x.shape):
        warn(f"{name}: x_train {x.shape} is read as {x.shape[1]} channels of {x.shape[2]} x "
             f"{x.shape[3]} pixels; if its channels come last, store x.transpose(0, 3, 1, 2)")


def warn_of_the_dark(name, x, part):
    """Images without a bright pixel, divided by 255 once too often, probably. Says if it warned."""
    high = x.max() if x.size and (x.dtype == np.uint8 or x.dtype.kind == "f") else 255
    dark = 0 <= high < (64 if x.dtype == np.uint8 else 0.25)
    if dark:
        how = "is uint8 and " * (x.dtype == np.uint8)
        warn(f"{name}: x_{part} {how}has no value above {high:.4g}; "
             + "it is divided by 255, so that " * (x.dtype == np.uint8)
             + f"all is dark: if {high:.4g} is white, store x / {high:.4g} as float32")
    return dark


def warn_of_labels(name, y, classes):
    """Classes without an image: mostly, labels that do not begin at 0 or have gaps."""
    empty = np.setdiff1d(np.arange(min(classes, 10000)), y)
    if len(empty):
        some = ", ".join(map(str, empty[:5])) + ", ..." * (len(empty) > 5)
        warn(f"{name}: {len(empty)} of {classes} classes have no training image ({some}); labels "
             f"are {y.min()} to {y.max()}, and have to count from 0 without gaps, or the network "
             "has outputs for nothing")


def warn_of_others(name, place, found, original):
    """MD5 checksums found in place: are these the images of that name, or others in its form?"""
    changed = sum(a != b for a, b in zip(found, original, strict=True))
    if changed:
        warn(f"{place}: {changed} of {len(original)} files are not those of the original {name}, "
             "though in its form" + " (Fashion-MNIST and KMNIST come like that)" * (name == "mnist")
             + "; they are used as they are")


def idx_checksum(array):
    """MD5 of an IDX file that holds this array of bytes."""
    header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    digest = hashlib.md5(header, usedforsecurity=False)
    digest.update(array)
    return digest.hexdigest()


def _find_mnist(file, data_dir):
    places = [data_dir / "MNIST" / "raw", data_dir / "raw", data_dir]
    for place in places:
        for path in (place / file, place / (file + ".gz")):
            if path.is_file():
                return path
    target = places[0] / (file + ".gz")
    _download([m + file + ".gz" for m in MNIST_MIRRORS], target, MNIST_FILES[file],
              f"the four files {', '.join(MNIST_FILES)} (.gz or not) into {places[0]}")
    return target


def _read_idx(path, file):
    """The IDX format: 0, 0, a type (8: uint8), number of axes, their sizes as big-endian int32,
    data. A whole file of other numbers or another shape is not called damaged: it may be EMNIST's
    or QMNIST's."""
    images = "images" in file
    what, axes = ("image", 3) if images else ("label", 1)
    again = "delete it, and it is downloaded again"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            magic = f.read(4).ljust(4, b"\1")                             # too short: no IDX
            header = f.read(4 * magic[3])
            sizes = np.frombuffer(header[:len(header) // 4 * 4], ">i4").tolist()
            n = math.prod(sizes)
            if magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or len(sizes) != magic[3] \
                    or not sizes or min(sizes) <= 0:
                raise InputError(f"{path}: not an MNIST {what} file (header {magic.hex()}, sizes "
                                 f"{sizes[:4]}); {again}")
            if magic[2] != 8 or len(sizes) != axes or sizes[1:] not in ([], [28, 28]) \
                    or n > MAX_BYTES // 4:
                raise InputError(
                    f"{path}: not an MNIST {what} file, but {IDX_TYPES[magic[2]]} of shape "
                    f"{tuple(sizes)}; other data sets are read from an .npz file (--dataset "
                    "PATH.npz)")
            data = np.frombuffer(f.read(n + 1), np.uint8)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({e}); {again}") from None
    if len(data) != n:
        raise InputError(f"{path}: holds {'more' if len(data) > n else len(data)} bytes where its "
                         f"header says {n}; {again}")
    return data.reshape(sizes)


# CIFAR-10 comes as records of 1 label byte and 3072 pixels, channels first (the binary version), or
# as pickled dictionaries (the python version, which torchvision downloads).

def _read_cifar(data_dir):
    """x_train, y_train, x_test, y_test; of the six files, if they are unpacked, only the pixels of
    one at a time are in memory, since the images as float32 fill 740 MB."""
    print(f"reading CIFAR-10 in {data_dir}", flush=True)                       # it takes seconds
    place, names, files = _find_cifar(data_dir)
    arrays, checksums = [], []
    for group in (names[:5], names[5:]):
        rows = sum(_size(files[name]) for name in group) // 3072            # at least as many
        x, y, n = np.empty((rows, 3, 32, 32), np.float32), [], 0
        for name in group:
            file = files.pop(name)
            with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content:
                checksums.append(_checksum(content))
                parse = _cifar_records if name.endswith(".bin") else _cifar_pickle
                pixels, labels = parse(content, place, name)
            np.divide(pixels.reshape(-1, 3, 32, 32), np.float32(255), out=x[n:n + len(labels)],
                      dtype=np.float32)
            n += len(labels)
            y.append(labels)
        arrays += [x[:n], np.concatenate(y).astype(np.int64)]
    if not names[0].endswith(".bin"):
        warn_of_others("CIFAR-10", place, checksums, CIFAR_PICKLES)
    return arrays


def _size(file):
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if size > MAX_BYTES // 16:
        raise InputError(f"{file}: holds {size} bytes; that is not CIFAR-10")
    return size


def _checksum(file):
    """MD5 of an open file, which is then at its beginning again."""
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def _find_cifar(data_dir):
    """Where CIFAR-10 is, its six names, and {name: path, or content if it is in an archive}."""
    for (folder, archive), names in CIFAR_FORMS.items():
        for place in (data_dir / folder, data_dir):
            if place.name == folder and place.is_dir() or (place / names[-1]).is_file():
                missing = [n for n in names if not (place / n).is_file()]
                if missing:
                    raise InputError(f"{place / missing[0]} is missing; unpack {archive} again")
                return place, names, {n: place / n for n in names}
    for (folder, archive), names in CIFAR_FORMS.items():
        if (data_dir / archive).is_file():
            return data_dir / archive, names, _read_archive(data_dir / archive, names)
    target = data_dir / CIFAR_FILE
    _download([m + CIFAR_FILE for m in CIFAR_MIRRORS], target, CIFAR_MD5,
              f"{CIFAR_FILE}, {CIFAR_PYTHON}, or what they unpack to, into {data_dir}")
    return _find_cifar(data_dir)


def _read_archive(path, names):
    """{name: content}; read, never unpacked to the disk, and to its end, where its checksum is."""
    content, limit = {}, MAX_BYTES // 4
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as tar:
            for member in tar:
                n = os.path.basename(member.name)
                if member.offset_data + member.size > limit:
                    raise InputError(f"{path}: unpacks to more than {limit} bytes; that is not "
                                     "CIFAR-10")
                if n in names and member.isfile() and not member.issparse():
                    content[n] = tar.extractfile(member).read()
            while unpacked.read(1 << 20) and unpacked.tell() <= limit:
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({e}); delete it, and it is downloaded "
                         "again") from None
    missing = [n for n in names if n not in content]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing; delete it, and it is downloaded "
                         "again")
    return content


def _cifar_records(file, place, name):
    content = file.read()
    if not content or len(content) % 3073:
        raise InputError(f"{place}: {name} missing or not made of records of 3073 bytes; delete "
                         "it, and it is downloaded again")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _cifar_pickle(file, place, name):
    try:
        batch = read_pickle(file)
        if "fine_labels" in batch:
            raise ValueError("it is CIFAR-100's")
        pixels, labels = batch["data"].content, batch["labels"]
        labels = labels.content.tolist() if isinstance(labels, Array) else labels
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ValueError(f"its images are {pixels.dtype} {pixels.shape}, not uint8 (n, 3072)")
        if not all(type(label) is int and 0 <= label <= 9 for label in labels) \
                or len(labels) != len(pixels):
            raise ValueError(f"it has no {len(pixels)} labels of 0 to 9")
        return pixels, np.array(labels, int)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        why = e if isinstance(e, ValueError) else "it has no arrays of images and labels"
        raise InputError(f"{place}: {name} is no batch of CIFAR-10 ({why}); unpack {CIFAR_PYTHON} "
                         "again") from None


def check_zip(archive, path):
    """Refuse a small archive that would fill the memory."""
    size, limit = sum(e.file_size for e in archive.infolist()), 4 * path.stat().st_size
    if size > max(MAX_BYTES, limit):
        raise InputError(f"{path}: unpacks to {size} bytes, more than {max(MAX_BYTES, limit)}")


def _read_npz(path):
    keys = ["x_train", "y_train", "x_test", "y_test"]
    try:
        if path.stat().st_size > 2 ** 25:
            print(f"reading {path}", flush=True)                               # it takes seconds
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
    with Progress() as show:                     # which says so while a server does not answer
        for url in urls:
            temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                digest, done = hashlib.md5(usedforsecurity=False), 0
                show(f"downloading {url}", force=True)
                answer = urllib.request.urlopen(url, timeout=30)
                with answer as source, open(temporary, "wb") as out:
                    total = int(source.headers.get("Content-Length") or 0)
                    size = f"{total / 1e6:.1f}" if total else "unknown"
                    show(f"downloading {url}: {size} MB", force=True)
                    while block := source.read(1 << 18):
                        out.write(block)
                        digest.update(block)
                        done += len(block)
                        show(f"downloading {url}: {done / 1e6:.1f} of {size} MB")
                if digest.hexdigest() == md5:
                    os.replace(temporary, target)
                    show.done(f"downloaded {url}: {done / 1e6:.1f} MB, to {target}")
                    return
                problems.append(f"{url}: wrong checksum")
            except (OSError, ValueError) as e:               # URLError and timeouts are OSErrors
                problems.append(f"{url}: {e}")
            finally:
                temporary.unlink(missing_ok=True)
    raise InputError(f"{target.name} could not be downloaded ({'; '.join(problems)}). "
                     f"Put {by_hand}, or name their folder with --data-dir")


def augment(x, generator):
    """Random horizontal flip, and crop after zero padding: by 2 as usual for CIFAR-10, by 4 for the
    larger images of Tiny-ImageNet. (B, C, H, W)."""
    B, C, H, W = x.shape
    pad = max(2, H // 16)
    flip = torch.rand(B, generator=generator) < 0.5
    shift = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    x = torch.where(flip.to(x.device).view(B, 1, 1, 1), x.flip(3), x)
    image, channel, row, column = torch.meshgrid(
        *(torch.arange(n) for n in (B, C, H, W)), indexing="ij")
    row, column = row + shift[0].view(B, 1, 1, 1), column + shift[1].view(B, 1, 1, 1)
    place = (t.to(x.device) for t in (image, channel, row, column))
    return F.pad(x, (pad,) * 4)[tuple(place)]
