"""Run folders: config.json, log.csv, checkpoint.pt. Whole at any moment, and one process's own.

Nothing here knows what is trained: a checkpoint holds plain values and tensors, and who reads it
says how a network is built from them.
"""
import csv
import io
import json
import os
import signal
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType

try:
    import fcntl
except ImportError:      # not on Windows: there, nothing keeps two processes from one run folder
    fcntl = None

import numpy as np
import torch

from plumbing.console import InputError, Interrupted, decimals, defaults, duration, warn
from plumbing.data import check_zip, dataset_kind, hold_out, load_dataset
from plumbing.networks import is_file
from plumbing.processes import any_process, check_agreement, from_first, ranks

CHECKPOINT = 2           # version of the checkpoint's layout
SAVE_EVERY = 60.0        # seconds, and after each epoch
MAY_CHANGE = {"out", "dataset", "dataset_path", "data_dir", "device"}     # between start and resume


# ---------------------------------------------------------------------------------------- writing

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


def write_config(folder, config):
    write_whole(Path(folder) / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def save_checkpoint(folder, net, config, training=None):
    """checkpoint.pt: {"format", "config", "state", "training"}, tensors and plain values.

    training: all that a step changes beside net, to continue; None at the start.
    """
    buffer = io.BytesIO()
    content = {"format": CHECKPOINT, "config": config, "state": net.state_dict()}
    torch.save(content | {"training": training}, buffer)
    write_whole(Path(folder) / "checkpoint.pt", buffer.getvalue())


# ---------------------------------------------------------------------------------------- reading

def run_folder(path):
    """The folder of a run that was named by it, or by a file in it."""
    path, files = Path(path), ("checkpoint.pt", "config.json", "log.csv", "evaluation.json")
    return path.parent if path.name in files else path


def read_checkpoint(folder, build):
    """(net, config, training) of a run folder. build makes the network that a config describes.

    Nothing in the file is executed; it is read only if it is about as large as it says, and the
    network gets its weights only if they have the names, shapes and types of its own. Raises
    InputError.
    """
    path = run_folder(folder) / "checkpoint.pt"
    saved = _read_plain(path)
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT:
        raise InputError(f"{path}: not a checkpoint of this version of train.py; train again")
    try:
        with torch.device("meta"):                              # takes no memory, whatever the size
            net = build(saved["config"])
        types = {k: t.dtype for k, t in net.state_dict().items()}
        if types != {k: t.dtype for k, t in saved["state"].items()}:
            raise ValueError("other layers, or other types")
        net.load_state_dict(saved["state"], assign=True)
        return net, saved["config"], saved["training"]
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: its weights and its config do not fit "
                         f"({str(e).splitlines()[0] if str(e) else type(e).__name__})") from None


def _read_plain(path):
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one with train.py --out {path.parent}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
            if bad := archive.testzip():                       # torch.load does not look
                raise InputError(f"{path}: its part {bad} is damaged (wrong checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:       # torch.load raises many kinds for a damaged or foreign file
        raise InputError(f"{path}: not a readable checkpoint ({type(e).__name__}: "
                         f"{str(e).splitlines()[0][:80] if str(e) else ''}); train again") from None


def circumstances(data, config, device):
    """What fixes a run beside its options."""
    path = config["dataset"] if dataset_kind(config["dataset"]) == "npz" else ""
    return dict(
        input_shape=list(data.x_train.shape[1:]), classes=data.classes, device=str(device),
        threads=torch.get_num_threads(), processes=ranks()[1], torch=str(torch.__version__),
        fingerprint=fingerprint(data, config), dataset_path=path and str(Path(path).resolve()))


def moved(config, given):
    """The settings of a run, with what is given again: its data may have moved, but not become
    others. Raises InputError."""
    kind, name = dataset_kind(config["dataset"]), given.get("dataset")
    if name and dataset_kind(name) != kind:
        raise InputError(f"--dataset {name}: {config['out']} was trained on {config['dataset']}; "
                         "the option only says where an .npz file is now")
    return config | given


def data_of_run(config):
    """The data set of a run, new or not. An .npz file may have moved: of those with its name where
    the run had it, here, and in --data-dir, it is the one with the checksum of the run's images.
    Raises InputError."""
    name, folder = config["dataset"], Path(config["data_dir"])
    if dataset_kind(name) != "npz":
        return load_dataset(name, folder)
    places = Path(name), folder / name, folder / Path(name).name, Path(config.get("dataset_path")
                                                                       or name)
    there = [place for place in dict.fromkeys(places) if place.is_file()]
    if not there:
        raise InputError(f"{name}: no such file; name it with --dataset PATH.npz, or its folder "
                         "with --data-dir")
    found = [load_dataset(str(there[0]))]
    while len(there) > len(found) and not is_trained_on(found[-1], config):
        found.append(load_dataset(str(there[len(found)])))
    return found[-1] if is_trained_on(found[-1], config) else found[0]


def is_trained_on(data, config):
    """Are these the images that a run has trained on? Of a new one, they are."""
    held = hold_out(data, config["validation"])
    return config.get("fingerprint", fingerprint(held, config)) == fingerprint(held, config)


def check_images_of_run(data, config, path):
    """The images that a run is to be certified on look like those that it was trained on."""
    shape, classes = list(data.x_test.shape[1:]), data.classes
    if shape != config["input_shape"] or classes != config["classes"]:
        raise InputError(f"{path} was trained on images {config['input_shape']} of "
                         f"{config['classes']} classes, but {config['dataset']} has "
                         f"{shape} of {classes}")
    if not is_trained_on(data, config):
        warn(f"{path} was trained on other images than these")


def check_unchanged(data, config):
    """A run goes on on the same images only; and with the settings of its checkpoint, if those of
    config.json have been edited."""
    folder, edited = config["out"], ""
    if fingerprint(data, config) != config["fingerprint"]:
        raise InputError(f"{folder} was trained on other images than {config['dataset']} has in "
                         f"{config['data_dir']}; name its own with --dataset or --data-dir")
    with suppress(OSError, ValueError, AttributeError):
        there = json.loads((run_folder(folder) / "config.json").read_text())
        saved = json.loads(json.dumps(config))
        edited = ", ".join(f"{k} {there[k]} instead of {saved[k]}" for k in sorted(saved)
                           if k in there.keys() - MAY_CHANGE and there[k] != saved[k])
    if edited:
        warn(f"{folder}/config.json has been edited ({edited}); what checkpoint.pt has counts")


def fingerprint(data, config):
    n = config["subset"]
    return checksum(data.x_train[:n], data.y_train[:n])


def checksum(*tensors):
    """CRC-32 of their bytes, one after the other; takes no memory for large ones."""
    value = 0
    for t in tensors:
        value = zlib.crc32(np.ascontiguousarray(t.detach().cpu().numpy()).reshape(-1), value)
    return value


def lengthen(folder, net, saved, config, training):
    """A run that gets more epochs, at the learning rate and radius of its end, keeps them."""
    if config["epochs"] < saved["epochs"]:
        raise InputError(f"--epochs {config['epochs']}: {folder} has {saved['epochs']} already; "
                         "a run can only become longer")
    if config["epochs"] > saved["epochs"] and ranks()[0] == 0:
        (run_folder(folder) / "evaluation.json").unlink(missing_ok=True)       # of the shorter run
        longer = saved | dict(epochs=config["epochs"])
        save_checkpoint(folder, net, longer, training)
        write_config(folder, longer)


# ------------------------------------------------------------------------------------------ locks

def claim(handle, path):
    """Keep other processes from path, open as handle, until it is closed or this one ends."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is in use by another process") from None


@contextmanager
def locked(folder):
    """Claim a run folder, for all processes of a job, as long as the block runs."""
    if ranks()[0] or not fcntl:
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


@contextmanager
def new_folder(config, net, settings=MappingProxyType({})):
    """A folder that no other run has or gets, claimed as long as the block runs: config["out"], or
    runs/NAME, runs/NAME-2, ...  It holds config.json and checkpoint.pt; config["out"] is its path.
    settings: {name: Setting}; those without their default value are part of NAME. The first of many
    processes makes it."""
    if ranks()[0]:
        config["out"] = from_first(None)
        yield
        return
    what = *(Path(config[k]).stem for k in ("dataset", "net")), config["relax"], config["opt"]
    name = "-".join([*what, *told_apart(config, settings)])
    folder = _create(Path(config["out"])) if config["out"] else _create_first(name)
    with locked(folder):
        if any(folder.iterdir()):           # another run was here between its making and its lock
            raise InputError(f"--out {folder} exists already; name another folder, or delete it")
        config["out"] = from_first(str(folder))
        write_config(folder, config)
        save_checkpoint(folder, net, config)
        yield


# Settings that no name of a folder tells: those it has anyway, and those of size, place and speed.
UNTOLD = {"dataset", "net", "relax", "opt", "epochs", "ramp", "milestones", "members",
          "skip_stable", "weights", "device", "data_dir", "subset", "validation", "test_subset",
          "out", "resume"}


def told_apart(config, settings):
    """What makes a run different from others by the same method, as in ["sigma0.03", "seed1"]."""
    if not settings:
        return []
    usual = defaults(settings, dataset_kind(config["dataset"]), config["opt"])
    usual["eps_train"] = config["eps"]
    if is_file(config["net"]):
        usual["init"] = "default"
    words = []
    for name in settings:
        value = config.get(name, usual[name])
        if name not in UNTOLD and value != usual[name]:
            no = "no-" * (value is False)
            text = f"{value:.4g}" if type(value) in (int, float) else Path(str(value)).stem
            dash = "-" * name[-1].isdigit()                                 # l1-0.0001
            words.append(no + name.replace("_", "-") + (dash + text) * (type(value) is not bool))
    return words


def _create(out):
    """Make the folder out, or take it if it is empty."""
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        if not out.is_dir() or any(out.iterdir()):
            raise InputError(f"--out {out} exists already; name another folder, or delete "
                             "it") from None
    except OSError as e:
        raise InputError(f"--out {out} cannot be created ({e})") from None
    return out


def _create_first(name):
    """Make the first folder of runs/NAME, runs/NAME-2, runs/NAME-3, ... that is not there."""
    first = Path("runs") / name
    for i in range(1, 10 ** 6):
        folder = first.with_name(f"{first.name}-{i}") if i > 1 else first
        try:
            folder.mkdir(parents=True)      # of two processes, one fails: they never share it
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise InputError(f"{folder} cannot be created ({e})") from None
    raise InputError(f"{first} and its successors exist already; name a folder with --out")


# ------------------------------------------------------------------------------ what a run tells

LOG = {  # the columns of log.csv, one line per epoch; averages are over its batches
    "epoch": "passes over the training set so far",
    "eps": "training radius in its last batch, in pixels of [0, 1]",
    "lr": "learning rate",
    "sigma": "standard deviation of the weight noise (its mean, if per parameter); 0 for grad",
    "loss": "average robust loss, regularisers included (at the perturbed weights, if smoothed)",
    "certified": "fraction of training images certified at that eps by the training relaxation "
                 "(at the perturbed weights, if smoothed; for sabr and staps in a small box only, "
                 "which is no certificate; for other baselines by box)",
    "gradient": "average norm of the gradient estimate, before clipping",
    "seconds": "of training so far, without the time between an interrupt and its --resume",
    "samples_per_s": "training images per second in this epoch",
}


def log_row(now, epoch, eps, lr, n):
    """The line of log.csv after an epoch, from 1, over n images. now: see at_start."""
    loss, certified, norm = (now["totals"] / n).tolist()
    sigma, seconds = now["sigma"].mean().item(), now["seconds"]
    rate = n / (seconds - now["began"])
    return dict(epoch=epoch, eps=eps, lr=lr, sigma=sigma, loss=loss, certified=certified,
                gradient=norm, seconds=seconds, samples_per_s=rate)


def write_log(folder, rows):
    text = io.StringIO()
    log = csv.DictWriter(text, LOG, lineterminator="\n")
    log.writeheader()
    log.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
    write_whole(Path(folder) / "log.csv", text.getvalue().encode())


def progress_line(now, epoch, step, steps, config, eps, numbers, left):
    """One line while it runs; epoch and step, of so many, count from 1; left: seconds."""
    rate = step * config["batch_size"] / (now["seconds"] - now["began"])
    of_full = f" of {config['eps_train']:.2g}" * (eps < config["eps_train"])
    return (f"epoch {epoch}/{config['epochs']}  batch {step}/{steps}  eps {eps:.2g}{of_full}  "
            f"loss {decimals(numbers[0])}  certified {100 * numbers[1]:.1f} %  "
            f"{rate:.0f} samples/s  {duration(left)} left")


# ----------------------------------------------------------------------------- stopping, going on

@contextmanager
def requests_to_stop():
    """A list that SIGINT and SIGTERM append to, instead of ending the process; the second ends it.
    Only the main thread hears of them."""
    def note(number, _):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        if ranks()[0] == 0:                         # print may be what the signal has interrupted
            os.write(2, b"\nfinishing this batch; once more ends at once\n")

    requests = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def recording(folder, net, config, now, n, show, left, **generators):
    """Yields a function to call after each step, record(epoch, step, eps, numbers, images): it
    counts, shows, logs, saves, and stops.

    net, now (see at_start) and generators, which are the optimiser and the generators, are what is
    saved in folder, if there is one: after each epoch over n images, every SAVE_EVERY seconds, and
    before it stops. That is once a signal has asked any of many processes to, and by raising
    Interrupted in all; the first of them saves. left: see time_left; it is none of the training.
    epoch and step count from 0; numbers: (3,), the loss, the certified fraction and the gradient
    norm of so many images.
    """
    size, begun, saved = config["batch_size"], time.time() - now["seconds"], time.time()
    steps, how = -(-n // size), f"python train.py --resume {folder}"

    def save():
        if ranks()[0] == 0 and folder:
            state = {k: v.get_state() if isinstance(v, torch.Generator) else v.state_dict()
                     for k, v in generators.items()}
            write_log(folder, now["rows"])
            save_checkpoint(folder, net, config, now | state)

    def record(epoch, step, eps, numbers, images):
        nonlocal saved, begun
        if step == 0:
            now.update(began=now["seconds"], totals=torch.zeros_like(numbers))
        now["done"] += 1
        now["totals"] += numbers * images
        before, now["seconds"] = now["seconds"], time.time() - begun
        show(progress_line(now, epoch + 1, step + 1, steps, config, eps, numbers,
                           left(now["seconds"] - before)))
        begun = time.time() - now["seconds"]
        whole_epoch = step + 1 == steps
        if whole_epoch:
            lr = generators["optimizer"].param_groups[0]["lr"]
            now["rows"].append(log_row(now, epoch + 1, eps, lr, n))
            check_agreement(checksum(*net.parameters()))
        stop = any_process(bool(requests), numbers.device)
        if whole_epoch or stop or time.time() - saved > SAVE_EVERY:
            save()
            saved = time.time()
        if stop:
            number = requests[0] if requests else signal.SIGTERM
            raise Interrupted(number, f"{how} goes on after epoch {epoch + 1}, batch {step + 1}")

    with requests_to_stop() if folder else nullcontext([]) as requests:
        yield record
    if requests:                                       # while the last checkpoint was written
        raise Interrupted(requests[0], f"{how} shows the end of it")


def at_start(sigma):
    """What a step changes beside the weights, the optimiser and the generators.

    done: steps. order: of the images in this epoch. totals: loss, certified and gradient of this
    epoch so far. began: when it began, in seconds of training. rows: of the log.
    """
    return dict(done=0, seconds=0.0, began=0.0, order=None, rows=[], sigma=sigma,
                totals=torch.zeros(3, device=sigma.device))


def is_finished(config, training):
    return bool(training) and len(training.get("rows") or []) >= config["epochs"]


def restored(training, start, **generators):
    """The same, named and placed as in start, as it was when a run stopped; the optimiser and the
    generators are set back, too. Raises InputError."""
    try:
        now = {k: training[k] for k in start}
        now |= {k: now[k].to(start[k].device) for k in ("sigma", "totals")}
        for name, generator in generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(training[name])
            else:
                generator.load_state_dict(training[name])
        return now
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise InputError("the run cannot be continued: its checkpoint lacks, or has wrong, "
                         f"{e}") from None
