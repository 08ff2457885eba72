"""Pictures of run folders, for draw.py: training curves, bounds by layer, attacked images.

Each function returns a matplotlib figure, and draws numbers that it was given or that a function
beside it computes, so that they can be checked without a picture.
"""
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import train
from plumbing.console import InputError
from plumbing.data import hold_out, load_dataset
from plumbing.rounding import in_float64
from plumbing.runs import LOG, checksum
from plumbing.verdicts import unsealed
from relaxations import RELAXATIONS, preactivation_bounds

STATES = {"inactive": "#56b4e9", "unstable": "#d55e00", "active": "#0072b2"}


# ------------------------------------------------------------------------------- training curves

def read_log(folder):
    """log.csv of a run as columns, {name: (epochs,)}. Raises InputError."""
    path = Path(folder) / "log.csv"
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        columns = {name: np.array([float(row[name]) for row in rows]) for name in LOG}
    except OSError:
        why = "the run has not finished an epoch" if path.parent.is_dir() else "no such folder"
        raise InputError(f"{path} is not there: {why}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path} is damaged, or of another version of train.py") from None
    if not rows:
        raise InputError(f"{path} has no epoch yet")
    return columns


def curves(logs):
    """Loss, certified fraction and radius by epoch: logs {name of a run: columns of its log}."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3))
    panels = {"loss": "robust loss in training", "eps": "training radius, in pixels",
              "certified": "certified in training, at that radius, %"}
    for ax, (column, title) in zip(axes, panels.items()):
        for name, log in logs.items():
            values = log[column] * (100 if column == "certified" else 1)
            ax.plot(log["epoch"], values, marker=".", lw=1.2, label=name, gid=f"{column} {name}")
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=7)
    return fig


# ------------------------------------------------------------------------------- bounds by layer

def untrained(config):
    """The network that a run began with: its seed gives the same weights again."""
    torch.manual_seed(config["seed"])
    return train.network_of(config)


def relaxation_of(config):
    """The relaxation that bounds the neurons in a run's loss: that of a baseline is box."""
    relax = config["relax"] if config["relax"] in RELAXATIONS else "box"
    return "deeppoly" if relax == "alpha-crown" else relax


@torch.no_grad()
def by_layer(net, x, eps, relax, skip_stable):
    """Of the neurons before each ReLU, over the balls around x: the shares that are inactive,
    unstable and active, (layers, 3), and the mean width u - l of their bounds, (layers,)."""
    shares, widths = [], []
    for l, u in preactivation_bounds(net, x, eps, relax, skip_stable=skip_stable):
        inactive, active = (u <= 0).double().mean().item(), (l > 0).double().mean().item()
        shares.append([inactive, 1 - inactive - active, active])
        widths.append((u - l).mean().item())
    return np.array(shares), np.array(widths)


def layers(config, net, x):
    """by_layer of a run before and after training, at the radius that it is to certify."""
    how = config["eps"], relaxation_of(config), config["skip_stable"]
    return {"before training": by_layer(untrained(config), x, *how),
            "after": by_layer(net, x, *how)}


def layer_bars(found, title):
    """found: what layers() returns."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for i, (when, (shares, widths)) in enumerate(found.items()):
        at = np.arange(len(widths)) + 0.4 * (i - 0.5)
        bottom = np.zeros(len(widths))
        for (state, color), share in zip(STATES.items(), 100 * shares.T):
            bars = left.bar(at, share, 0.36, bottom, color=color, label=None if i else state)
            left.bar_label(bars, [f"{s:.0f}" if s >= 5 else "" for s in share], fontsize=7,
                           label_type="center", color="white")
            bottom += share
        bars = right.bar(at, widths, 0.36, label=when, color=("#b8b8b8", "#444444")[i])
        right.bar_label(bars, [f"{w:.3g}" for w in widths], fontsize=7)
    ticks = np.arange(len(widths)), [f"ReLU {k + 1}" for k in range(len(widths))]
    for ax, name in (left, "neurons, %: before training, after"), (right, "mean width u − l"):
        ax.set_xticks(*ticks)
        ax.set_title(name)
        ax.grid(axis="x", visible=False)
    left.set_ylim(0, 100)
    right.set_yscale("log")
    right.margins(y=0.15)
    left.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, -0.35), ncols=3)
    right.legend(fontsize=7)
    fig.suptitle(title, fontsize=9)
    return fig


# ------------------------------------------------------------------------------- attacked images

def read_attacked(path, data):
    """(eps, {index: label, counterexample}) of a file of verdicts. Raises InputError."""
    try:
        header, *rows = map(unsealed, path.read_text().splitlines())
        eps, images = float(header["eps"]), header["images"]
        rows = [r for r in rows if "counterexample" in r]
        attacked = [int(r["index"]) for r in rows]
        folders = [Path(r["counterexample"]).parent.name for r in rows]       # of older runs, too
        points = [np.load(path.with_name(folder) / f"{i}.npy", allow_pickle=False)
                  for folder, i in zip(folders, attacked)]
        fits = all(p.shape == data.x_test.shape[1:] for p in points)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}, or a counterexample to it, cannot be read ({e})") from None
    if not fits or images != checksum(data.x_test, data.y_test):
        raise InputError(f"{path} is about other images than those of the run")
    return eps, {i: torch.from_numpy(p).float() for i, p in zip(attacked, points)}


def picture(x):
    """(C, H, W) in [0, 1] as matplotlib shows it."""
    return x.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy()


@torch.no_grad()
def sheet(net, data, eps, points, most=10):
    """Attacked images, their counterexamples, and what is between them: grey is no difference,
    black and white are -eps and eps."""
    points = dict(sorted(points.items())[:most])
    fig, axes = plt.subplots(3, len(points), figsize=(1.1 * len(points) + 1, 4), squeeze=False)
    for column, (i, point) in zip(axes.T, points.items()):
        x, y = data.x_test[i], data.y_test[i].item()
        twin, exact = in_float64(net, point[None])
        read_as = twin(exact).argmax().item()
        shown = x, point, 0.5 + (point - x) / (2 * eps) if eps else torch.full_like(x, 0.5)
        titles = f"image {i}\nlabel {y}", f"read as {read_as}", ""
        for ax, image, title in zip(column, shown, titles):
            ax.imshow(picture(image), cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize=8)
            ax.set(xticks=[], yticks=[])
    names = "image", "counterexample", f"difference\nin ±{eps:.3g}"
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name, fontsize=8)
    return fig


# -------------------------------------------------------------------------------------- all of it

def draw_runs(folders, save, data_dir=None, images=100):
    """Pictures of run folders, each handed to save(figure, path): of all together curves.svg, in
    the first; of each layers.svg, and for each of its files of verdicts a sheet of attacked images.
    images: of the test set, that bounds by layer are averaged over. Raises InputError."""
    folders = [Path(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    save(curves(dict(zip(names, map(read_log, folders)))), folders[0] / "curves.svg")
    for name, folder in zip(names, folders):
        net, config, _ = train.load_run(folder)
        data = load_dataset(config["dataset"], data_dir or config["data_dir"])
        data = hold_out(data, config["validation"])
        found = layers(config, net, data.x_test[:images])
        title = (f"{name}: bounds by {relaxation_of(config)} at eps "
                 f"{config['eps']:.4g}, {len(data.x_test[:images])} test images")
        save(layer_bars(found, title), folder / "layers.svg")
        for path in sorted(folder.glob("certify-eps*.jsonl")):
            eps, points = read_attacked(path, data)
            if points:
                save(sheet(net, data, eps, points), path.with_suffix(".attacked.svg"))
