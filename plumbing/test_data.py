"""Data files: found, downloaded, read, refused. Run: pytest, in the folder above."""
import gzip
import hashlib
import http.server
import json
import os
import pickle
import resource
import socket
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import certify
import train
from plumbing import data
from plumbing.console import InputError
from plumbing.data import CIFAR_FILE, CIFAR_PYTHON, MNIST_FILES, MNIST_RAW
from plumbing.for_tests import (QUICK, command, fake_cifar, fake_cifar_python, fake_mnist, fuzz,
                                idx, npz, python2_pickle, same_as)


def test_hold_out_takes_the_last_training_images_for_the_test(tmp_path, capsys):
    data = train.load_dataset("digits")
    held = train.hold_out(data, 200)
    assert torch.equal(torch.cat([held.x_train, held.x_test]), data.x_train)
    assert torch.equal(held.y_test, data.y_train[-200:]) and len(held.x_test) == 200
    assert train.hold_out(data, 0) is data
    run = tmp_path / "run"
    assert command(train.main, "--validation", 200, "--out", run, *QUICK[:6]) == 0
    assert "200 test images" in capsys.readouterr().out
    assert command(certify.main, run, "--stages", "box", "--restarts", 0) == 0
    assert "200 test images" in capsys.readouterr().out
    labels = [json.loads(l)["label"]
              for l in next(run.glob("certify-*.jsonl")).read_text().splitlines()[1:]]
    assert sorted(labels) == sorted(held.y_test.tolist())
    out = tmp_path / "test.jsonl"                              # and the test images after all
    assert command(certify.main, run, "--stages", "box", "--restarts", 0, "--validation", 0,
                   "--out", out) == 0
    labels = [json.loads(l)["label"] for l in out.read_text().splitlines()[1:]]
    assert sorted(labels) == sorted(data.y_test.tolist())
    assert command(train.main, "--validation", 1437, "--out", tmp_path / "no") == 2
    assert "leaves none" in capsys.readouterr().err


def test_augment_shifts_and_flips():
    x = torch.arange(1., 3 * 16 + 1).view(1, 3, 4, 4).repeat(200, 1, 1, 1)
    g = torch.Generator().manual_seed(0)
    padded = nn.functional.pad(x[0], (2, 2, 2, 2))
    crops = {tuple(p[:, i:i + 4, j:j + 4].flatten().tolist()) for i in range(5) for j in range(5)
             for p in (padded, nn.functional.pad(x[0].flip(2), (2, 2, 2, 2)))}
    out = {tuple(image.flatten().tolist()) for image in train.augment(x, g)}
    assert out <= crops and len(out) > 40                              # of 50


@pytest.mark.parametrize("place, zipped", [
    ("MNIST/raw", True), ("MNIST/raw", False), ("raw", True), (".", True), (".", False)])
def test_mnist_files(tmp_path, place, zipped):
    content = fake_mnist(tmp_path / place, zipped)
    data = train.load_dataset("mnist", tmp_path)
    assert data.x_train.shape == (20, 1, 28, 28) and data.x_test.shape == (10, 1, 28, 28)
    assert data.classes == 10
    raw = np.frombuffer(content["train-images-idx3-ubyte"], np.uint8)[16:]
    assert torch.equal(data.x_train.flatten(), torch.tensor(raw) / 255)
    assert data.y_test.tolist() == list(content["t10k-labels-idx1-ubyte"][8:])


@pytest.mark.parametrize("damage, message", [
    (lambda b: b[:-5], "bytes where its header says"), (lambda b: b + b"x", "more bytes"),
    (lambda b: b"", "not an MNIST"),
    (lambda b: b"\x00\x00\x08\x01" + b[4:], "not an MNIST image file"),
    (lambda b: b[:4] + b"\x7f" * 4 + b[8:], "not an MNIST"),
    (lambda b: b"PK" + b, "not an MNIST")])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_mnist(tmp_path, damage, message, zipped):
    content = fake_mnist(tmp_path, zipped)
    bad = damage(content["train-images-idx3-ubyte"])
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(bad) if zipped else bad)
    with pytest.raises(InputError, match=message):
        train.load_dataset("mnist", tmp_path)


def test_what_is_not_mnist_but_in_its_form_is_used_and_named(tmp_path, capsys, monkeypatch):
    content = fake_mnist(tmp_path, True)                       # as Fashion-MNIST and KMNIST come
    train.load_dataset("mnist", tmp_path)
    assert "4 of 4 files are not those of the original mnist" in capsys.readouterr().err
    sums = [hashlib.md5(content[name]).hexdigest() for name in MNIST_FILES]
    monkeypatch.setattr("plumbing.data.MNIST_RAW", sums)
    train.load_dataset("mnist", tmp_path)
    assert not capsys.readouterr().err and len(set(MNIST_RAW)) == 4


@pytest.mark.parametrize("name, other, words", [
    ("train-labels-idx1-ubyte", b"\0\0\x0c\2" + np.array([20, 8], ">i4").tobytes() + bytes(640),
     r"int32 of shape \(20, 8\)"),                                        # QMNIST's labels
    ("train-labels-idx1-ubyte", idx(np.zeros((20, 28, 28)), 0x803), r"uint8 of shape \(20, 28"),
    ("train-images-idx3-ubyte", idx(np.zeros((20, 32, 32)), 0x803), r"uint8 of shape \(20, 32"),
    ("train-images-idx3-ubyte", np.array([0x803, 697_932, 28, 28], ">i4").tobytes(),
     r"uint8 of shape \(697932, 28, 28\)"),                               # EMNIST by class
    ("train-labels-idx1-ubyte", idx(np.arange(1, 21), 0x801), "labels outside 0..9: 1 to 20")])
def test_valid_files_of_other_data_sets_are_not_to_be_deleted(tmp_path, name, other, words):
    fake_mnist(tmp_path, True)
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(other))
    with pytest.raises(InputError, match=words) as error:
        train.load_dataset("mnist", tmp_path)
    assert "delete" not in str(error.value)


def test_damaged_gzip_and_wrong_labels(tmp_path):
    content = fake_mnist(tmp_path, True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    for bad in (good[:-3], b"no gzip", good[:12] + b"\xff" * 5 + good[17:]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="delete it, and it is downloaded again"):
            train.load_dataset("mnist", tmp_path)
    labels = content["train-labels-idx1-ubyte"]
    path.write_bytes(gzip.compress(labels[:-1] + b"\x0a"))
    with pytest.raises(InputError, match=r"y_train has labels outside 0..9"):
        train.load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cifar_files(tmp_path, zipped):
    files = fake_cifar(tmp_path, zipped)
    data = train.load_dataset("cifar10", tmp_path)
    assert data.x_train.shape == (15, 3, 32, 32) and data.x_test.shape == (3, 3, 32, 32)
    record = np.frombuffer(files["data_batch_2.bin"], np.uint8)[:3073]       # image 3
    assert data.y_train[3] == record[0]
    assert torch.equal(data.x_train[3].flatten(), torch.tensor(record[1:]) / 255)


FORMS = {"pickles of Python 2": python2_pickle,
         "pickles of Python 3": lambda x, y: pickle.dumps({"data": x, "labels": np.array(y)}, 4),
         "in columns": lambda x, y: pickle.dumps({b"labels": y, b"data": np.asfortranarray(x)}, 2)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_cifar_as_torchvision_leaves_it_is_the_same(tmp_path, zipped, form, capsys):
    fake_cifar_python(tmp_path, zipped, dump=FORMS[form])
    same_as(train.load_dataset("cifar10", tmp_path / "binary"))(
        train.load_dataset("cifar10", tmp_path), None)
    assert "6 of 6 files are not those of the original CIFAR-10" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (lambda x, y: pickle.dumps({"data": x, "fine_labels": y}), "it is CIFAR-100's"),
    (lambda x, y: pickle.dumps({"data": x[:, 1:], "labels": y}), r"not uint8 \(n, 3072\)"),
    (lambda x, y: pickle.dumps({"data": x.astype(int), "labels": y}), "its images are int64"),
    (lambda x, y: pickle.dumps({"data": x, "labels": y[1:]}), "no 3 labels"),
    (lambda x, y: pickle.dumps({"data": x, "labels": [10, *y[1:]]}), "no 3 labels of 0 to 9"),
    (lambda x, y: pickle.dumps({"data": x, "labels": [True] * 3}), "no 3 labels of 0 to 9"),
    (lambda x, y: pickle.dumps({"data": x.tolist(), "labels": y}), "no arrays of images"),
    (lambda x, y: pickle.dumps([x, y]), "no arrays of images"),
    (lambda x, y: python2_pickle(x, y)[:-7], "is no batch of CIFAR-10"),
    (lambda x, y: pickle.dumps({"data": x, "labels": y, "c": os.system}, 2),
     "system', which is never imported")])
def test_batches_that_are_none(tmp_path, change, message):
    fake_cifar_python(tmp_path, False, dump=change)
    with pytest.raises(InputError, match=message) as error:
        train.load_dataset("cifar10", tmp_path)
    assert "\n" not in str(error.value) and "data_batch_1" in str(error.value)


@pytest.mark.parametrize("make, name, inner", [
    (fake_cifar_python, "cifar10", "cifar-10-batches-py"),
    (fake_cifar, "cifar10", "cifar-10-batches-bin")])
def test_data_dir_may_be_the_folder_itself_or_the_one_above(tmp_path, make, name, inner):
    make(tmp_path, zipped=False)
    above = train.load_dataset(name, tmp_path)
    same_as(above)(train.load_dataset(name, tmp_path / inner), None)


def test_damaged_cifar(tmp_path):
    fake_cifar(tmp_path / "a", False)
    (tmp_path / "a/cifar-10-batches-bin/data_batch_3.bin").write_bytes(b"x" * 3000)
    fake_cifar(tmp_path / "b", False)
    (tmp_path / "b/cifar-10-batches-bin/test_batch.bin").unlink()
    fake_cifar(tmp_path / "c", True)
    archive = tmp_path / "c" / CIFAR_FILE
    archive.write_bytes(archive.read_bytes()[:-2000])
    for folder, message in (("a", "data_batch_3.bin missing or not made of"),
                            ("b", "test_batch.bin is missing"), ("c", "cannot be read")):
        with pytest.raises(InputError, match=message):
            train.load_dataset("cifar10", tmp_path / folder)


def test_digits():
    data = train.load_dataset("digits")
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.min() == 0 and data.x_train.max() == 1 and data.classes == 10
    assert data.y_train[:10].tolist() == list(range(10))


def test_npz(tmp_path):
    path = tmp_path / "own.npz"
    arrays = npz(path)
    data = train.load_dataset(str(path))
    assert data.x_train.shape == (12, 3, 6, 5) and data.classes == 4                  # NHWC
    assert data.x_train[2, 1, 4, 3] == np.float32(arrays["x_train"][2, 4, 3, 1]) / np.float32(255)
    npz(path, x_train=np.ones((12, 3, 6, 5)), x_test=np.zeros((4, 3, 6, 5)))
    assert train.load_dataset(str(path)).x_train.shape == (12, 3, 6, 5)              # NCHW, float64
    npz(path, x_train=np.ones((12, 6, 5)), x_test=np.zeros((4, 6, 5), np.float32))
    assert train.load_dataset(str(path)).x_train.shape == (12, 1, 6, 5)


@pytest.mark.parametrize("change, message", [
    (dict(x_test=None), "lacks the arrays x_test"),
    (dict(y_test=np.array([0, 1, 2, 4])), "y_test has labels outside 0..3: 0 to 4"),
    (dict(y_train=np.arange(12) - 1), "labels outside"),
    (dict(y_train=np.arange(11)), "12 integer labels"),
    (dict(y_train=np.arange(12.)), "integer labels"),
    (dict(x_train=np.full((12, 6, 5, 3), 1.5)), "outside"),
    (dict(x_train=np.full((12, 6, 5, 3), np.nan)), "NaN"),
    (dict(x_train=np.zeros((12, 6, 5, 3), int)), "uint8 or float"),
    (dict(x_test=np.zeros((0, 6, 5, 3)), y_test=np.arange(0)), "x_test holds no image"),
    (dict(x_train=np.zeros((12, 90))), "has to be uint8 or float images"),
    (dict(x_train=np.zeros((12, 90), np.uint8)), r"got uint8 \(12, 90\)"),
    (dict(x_train=np.full((12, 6, 5, 3), -1.5)), "undo the normalisation"),
    (dict(x_train=np.full((12, 6, 5, 3), 200.)), "divide by the largest value"),
    (dict(y_train=np.zeros(12, int), y_test=np.zeros(4, int)), "needs two classes"),
    (dict(x_test=np.zeros((4, 5, 5, 3))), "test images"),
    (dict(x_train=np.array([{}] * 12)), "not a readable")])
def test_bad_npz(tmp_path, change, message):
    path = tmp_path / "own.npz"
    npz(path, **change)
    with pytest.raises(InputError, match=message):
        train.load_dataset(str(path))


@pytest.mark.parametrize("change, words", [
    (dict(x_train=np.ones((12, 8, 8, 4), np.float32), x_test=np.ones((4, 8, 8, 4), np.float32)),
     ["(12, 8, 8, 4) is read as 8 channels of 8 x 4 pixels"]),
    (dict(y_train=np.arange(12) % 4 + 1, y_test=np.arange(4) + 1),
     ["1 of 5 classes have no training image (0)", "labels are 1 to 4"]),
    (dict(y_train=np.arange(12) % 4 * 9, y_test=np.arange(4) * 9), ["24 of 28", "0 to 27"]),
    (dict(x_train=np.ones((12, 8, 8), np.uint8), x_test=np.ones((4, 8, 8), np.uint8)),
     ["no value above 1;", "x / 1 as float32"]),
    (dict(x_train=np.full((12, 8, 8), 1 / 255), x_test=np.full((4, 8, 8), 1 / 255)),
     ["x_train has no value above 0.003922; all is dark"]),
    (dict(x_train=np.ones((12, 8, 8)), x_test=np.ones((4, 8, 8), np.uint8)),
     ["x_test is uint8 and has no value above 1; it is divided by 255"]),
    (dict(x_train=np.full((12, 8, 8), 16, np.uint8), x_test=np.ones((4, 8, 8), np.uint8)),
     ["no value above 16;"]),
    (dict(y_train=(np.arange(12) % 4)[:, None], y_test=np.arange(4)[:, None]), [])])
def test_what_is_probably_a_mistake_is_one_line_of_warning(tmp_path, capsys, change, words):
    npz(tmp_path / "own.npz", **change)
    data = train.load_dataset(str(tmp_path / "own.npz"))
    err = capsys.readouterr().err
    assert err.count("\n") == bool(words) and all(word in err for word in words)
    assert data.y_train.shape == (12,)


def test_own_data_is_normalised_and_augmented_if_asked(tmp_path):
    npz(tmp_path / "own.npz")
    data = train.load_dataset(str(tmp_path / "own.npz"))
    words = ["--dataset", str(tmp_path / "own.npz"), "--net", "mlp"]
    _, plain = train.new_run(train.parse_config(words), data, torch.device("cpu"))
    assert (plain["augment"], plain["statistics"]) == (False, None)
    net, config = train.new_run(train.parse_config([*words, "--normalize", "--augment"]), data,
                                torch.device("cpu"))
    assert config["augment"] and isinstance(net[0], nn.BatchNorm2d)
    x = net[0](data.x_train)
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    cifar = train.parse_config(["--dataset", "cifar10", "--no-normalize", "--no-augment"])
    net, config = train.new_run(cifar, data, torch.device("cpu"))
    assert not config["augment"] and isinstance(net[0], nn.Conv2d)


def test_the_script_of_the_page_writes_tiny_imagenet(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    root, random = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    names = [f"n{i:08}" for i in range(200)]
    pixels = random.integers(0, 256, (400, 8, 8, 3)).astype(np.uint8)
    def save(image, path):                                       # PNG keeps pixels; some are grey
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, format="PNG")
    for i, name in enumerate(names):
        save(pixels[i], root / f"train/{name}/images/{name}_0.JPEG")
        image = pixels[200 + i, :, :, 0] if i == 7 else pixels[200 + i]
        save(image, root / f"val/images/v{i}.JPEG")
    (root / "wnids.txt").write_text("\n".join(random.permutation(names)) + "\n")
    (root / "val/val_annotations.txt").write_text(
        "".join(f"v{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(names)))
    page = Path(train.__file__).parent / "docs/runs.md"
    script = page.read_text().split("<!-- script tiny-imagenet -->\n```py\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", str(root)])
    exec(script, {})
    data = train.load_dataset("tiny-imagenet.npz")
    assert data.classes == 200 and data.x_train.shape == data.x_test.shape == (200, 3, 8, 8)
    assert data.y_train.tolist() == data.y_test.tolist() == list(range(200))
    assert np.array_equal((data.x_train * 255).round().numpy().transpose(0, 2, 3, 1), pixels[:200])
    assert (data.x_test[7] == data.x_test[7, :1]).all()
    args = "--dataset tiny-imagenet.npz --eps 1/255 --augment --normalize --net mlp --relax box"
    assert command(train.main, *args.split(), "--epochs", 1, "--ramp", 1, "--out", "run") == 0
    assert command(certify.main, "run", "--samples", 3, "--timeout", 1, "--restarts", 1) == 0


def test_files_that_are_no_npz(tmp_path):
    good = tmp_path / "good.npz"
    npz(good)
    for i, content in enumerate((b"", b"hello", good.read_bytes()[:-40], good.read_bytes()[:200])):
        bad = tmp_path / f"bad{i}.npz"
        bad.write_bytes(content)
        with pytest.raises(InputError, match="not a readable"):
            train.load_dataset(str(bad))


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, for downloads: serves tmp_path/www."""
    (tmp_path / "www").mkdir()
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{s.server_address[1]}/"
        s.shutdown()


def test_download_tries_mirrors_and_checks_what_came(tmp_path, server, monkeypatch, capsys):
    folder, url = server
    fake_mnist(folder, True)
    (folder / "damaged").mkdir()
    for path in folder.glob("*.gz"):
        (folder / "damaged" / path.name).write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr("plumbing.data.MNIST_MIRRORS", (url + "missing/", url + "damaged/", url))
    sums = {n: hashlib.md5((folder / (n + ".gz")).read_bytes()).hexdigest()
            for n in MNIST_FILES}
    monkeypatch.setattr("plumbing.data.MNIST_FILES", sums)
    target = tmp_path / "data"
    target.mkdir()
    assert len(train.load_dataset("mnist", target).x_train) == 20
    said = capsys.readouterr().out
    for name in sums:                                              # from where, how large, how far
        size = f"{(folder / (name + '.gz')).stat().st_size / 1e6:.1f} MB"
        assert f"downloading {url}{name}.gz: {size}" in said
        assert f"downloaded {url}{name}.gz: {size}, to {target / 'MNIST/raw'}" in said
    names = sorted(p.name for p in target.rglob("*") if p.is_file())
    assert names == sorted(n + ".gz" for n in sums)
    monkeypatch.setattr("plumbing.data.MNIST_MIRRORS", (url + "damaged/", "http://127.0.0.1:1/"))
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError) as error:
        train.load_dataset("mnist", tmp_path / "other")
    assert "wrong checksum" in str(error.value) and "Put the four files" in str(error.value)
    assert not [p for p in (tmp_path / "other").rglob("*") if p.is_file()]     # nothing left behind


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_typo_in_data_dir_makes_no_folder_and_the_default_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plumbing.data.MNIST_MIRRORS", ("http://127.0.0.1:1/",))
    monkeypatch.setattr("plumbing.data.CIFAR_MIRRORS", ("http://127.0.0.1:1/",))
    with pytest.raises(InputError, match="--data-dir dta: no such folder"):
        train.load_dataset(name, "dta")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="could not be downloaded"):
        train.load_dataset(name)


@pytest.mark.parametrize("zipped", [True, False])
def test_fuzzed_mnist(tmp_path, zipped):
    fake_mnist(tmp_path, zipped)
    load = lambda: train.load_dataset("mnist", tmp_path)
    def plausible(data, _):                      # raw pixels have no checksum: any are as good
        assert data.x_test.shape == (10, 1, 28, 28) and len(data.x_train) == len(data.y_train) == 20
    for name in ("t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        fuzz(tmp_path / (name + ".gz" * zipped), load, same_as(load()) if zipped else plausible,
             count=1000)


def test_fuzzed_cifar(tmp_path):
    fake_cifar(tmp_path, zipped=True, n=1)
    load = lambda: train.load_dataset("cifar10", tmp_path)
    archive, good = tmp_path / CIFAR_FILE, load()
    fuzz(archive, load, same_as(good))
    tar, plain = gzip.decompress(archive.read_bytes()), tmp_path / "cifar-10-binary.tar"
    plain.write_bytes(tar)
    def zipped_again():                          # behind a right checksum of gzip
        archive.write_bytes(gzip.compress(plain.read_bytes(), 1))
        return load()
    def plausible(data, _):
        assert data.x_train.shape[1:] == (3, 32, 32) and len(data.x_test) == len(data.y_test)
    fuzz(plain, zipped_again, plausible, count=1000)


def test_fuzzed_cifar_of_torchvision(tmp_path):
    fake_cifar_python(tmp_path / "zipped", zipped=True, n=1)
    load = lambda: train.load_dataset("cifar10", tmp_path / "zipped")
    fuzz(tmp_path / "zipped" / CIFAR_PYTHON, load, same_as(load()), count=1000)
    fake_cifar_python(tmp_path, zipped=False, n=1)
    load = lambda: train.load_dataset("cifar10", tmp_path)
    good = load()
    def plausible(data, _):           # a batch has no checksum that all have: pixels may be others
        assert data.x_train.shape == (5, 3, 32, 32) and torch.equal(data.x_test, good.x_test)
        assert ((0 <= data.y_train) & (data.y_train < 10)).all() and data.x_train.max() <= 1
    batch = tmp_path / "cifar-10-batches-py/data_batch_2"
    fuzz(batch, load, plausible)


def test_fuzzed_npz(tmp_path):
    npz(tmp_path / "own.npz")
    load = lambda: train.load_dataset(str(tmp_path / "own.npz"))
    fuzz(tmp_path / "own.npz", load, same_as(load()))


@pytest.mark.parametrize("make, name", [(fake_cifar, "cifar-10-batches-bin/data_batch_1.bin"),
                                        (fake_cifar_python, "cifar-10-batches-py/test_batch")])
def test_a_file_of_a_terabyte_is_refused_unread(tmp_path, make, name):
    make(tmp_path, zipped=False)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(2 ** 40)                                          # sparse
    with pytest.raises(InputError, match="holds 1099511627776 bytes; that is not CIFAR-10"):
        train.load_dataset("cifar10", tmp_path)


def test_bombs_and_foreign_paths(tmp_path):
    """Small files that unpack to gigabytes, or that ask to be written elsewhere."""
    zeros = bytes(2 ** 24)
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("x_train.npy", "w", force_zip64=True) as entry:
        for _ in range(65):                                            # just above the limit
            entry.write(zeros)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(bomb.read_bytes())
    tar = tmp_path / "tar"
    (tar / "MNIST/raw").mkdir(parents=True)
    with gzip.open(tar / CIFAR_FILE, "wb", 1) as archive:
        info = tarfile.TarInfo("../" * 5 + "test_batch.bin")
        info.size = 2 ** 30
        archive.write(info.tobuf())
        for _ in range(64):
            archive.write(zeros)
    with gzip.open(tar / "MNIST/raw/train-images-idx3-ubyte.gz", "wb", 1) as images:
        images.write(np.array([0x803, 150_000, 28, 28], ">i4").tobytes())
        for _ in range(64):
            images.write(zeros)
    sparse = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000000000\0".replace(b"0", b"7")            # its size once expanded
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / CIFAR_FILE).write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (lambda: train.load_dataset(str(bomb)), lambda: train.load_run(run),
                 lambda: train.load_dataset("cifar10", tar),
                 lambda: train.load_dataset("cifar10", tmp_path / "sparse"),
                 lambda: train.load_dataset("mnist", tar)):
        with pytest.raises(InputError):
            load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20       # KiB
    assert not (tmp_path.parent / "test_batch.bin").exists()


def test_a_server_that_does_not_answer_is_waited_for_aloud(tmp_path, monkeypatch, capsys):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(data, "MNIST_MIRRORS", (url,))
        urlopen = data.urllib.request.urlopen
        monkeypatch.setattr("urllib.request.urlopen", lambda u, timeout: urlopen(u, timeout=3.6))
        with pytest.raises(InputError, match="could not be downloaded"):
            train.load_dataset("mnist", tmp_path)
    assert "gz  (3 s ago)" in capsys.readouterr().out


def test_reading_what_takes_long_is_said_before(tmp_path, capsys, monkeypatch):
    fake_cifar(tmp_path, zipped=True)
    seen = []
    with monkeypatch.context() as m:
        m.setattr("plumbing.data._find_cifar", lambda *_: seen.append(capsys.readouterr().out) or 1)
        with pytest.raises(TypeError):
            train.load_dataset("cifar10", tmp_path)
    assert seen == [f"reading CIFAR-10 in {tmp_path}\n"]
    shape = 8200, 64, 64                                                       # 34 MB
    npz(tmp_path / "large.npz", x_train=np.full(shape, 255, np.uint8), y_train=np.arange(8200) % 2,
        x_test=np.full((1, 64, 64), 255, np.uint8), y_test=np.zeros(1, int))
    train.load_dataset(str(tmp_path / "large.npz"))
    assert f"reading {tmp_path / 'large.npz'}\n" in capsys.readouterr().out
