"""Pictures of runs; and the figures of the pages, from the results and from the loss itself.

    python figures/draw.py RUN [RUN ...]    pictures of run folders, into them (see pictures.py)
    python figures/draw.py                  all figures, into figures/*.svg (10 minutes of one core)
    python figures/draw.py 1 3              some

Needs matplotlib. Figures 1, 2, 3, 7 and 8 compute what they show here; 4, 5 and 6 read the digits
of results/, which figures/experiments.py writes; 9 does both.
"""
import argparse
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
import torch
import torch.nn as nn

import experiments                                  # first: it puts the checkout on the path
import gls
import pictures
import tables
import train
from plumbing.console import run
from plumbing.data import load_dataset
from relaxations import margin_lower_bounds

matplotlib.use("svg")
import matplotlib.pyplot as plt                                                    # noqa: E402

plt.rcParams.update({"svg.hashsalt": "gls", "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False, "figure.constrained_layout.use": True,
                     "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25})
COLOR = {"box": "#0072b2", "crown-ibp": "#e69f00", "deeppoly": "#d55e00", "alpha-crown": "#cc79a7",
         "sabr": "#009e73", "mtl-ibp": "#56b4e9"}      # Okabe and Ito: told apart by everybody
NAME = tables.NAME | {"grad": "plain gradient"}
MARKER = {"grad": "o", "rgs": "s", "pgpe": "^"}
GREYS = {0.0: "#d55e00", 0.05: "#b8b8b8", 0.15: "#777777", 0.4: "#000000"}


def save(figure, name):
    """name: of a figure of the pages, or a path."""
    path = name if isinstance(name, Path) else Path(__file__).parent / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def smoothed(loss, theta, direction, ts, sigma, samples):
    """Estimates of the smoothed loss at theta + t direction, with the same noise for all t: (T,).

    sigma = 0: the loss itself. The same noise for all t makes the curve as smooth as an average of
    so many losses can be: a jump of the loss is left as jumps of 1/samples of its height.
    """
    points = theta + torch.as_tensor(ts, dtype=theta.dtype)[:, None] * direction
    if sigma == 0:
        with torch.no_grad():
            return torch.cat([loss(p) for p in points.split(64)]).numpy()
    values = [gls.smoothed_loss(loss, p, sigma, samples, torch.Generator().manual_seed(0),
                                chunk=64)[0] for p in points]
    return torch.stack(values).numpy()


# -------------------------------------------------------------------------- 1: a loss that jumps

def jumping_network():
    """Two hidden neurons, one input x in [0, 1]; margin = relu(z + b) - 2 relu(z) + 1, z = 2x - 1.

    DeepPoly's lower line of the first ReLU has the slope 0 if u <= -l, else 1; with l = b - 1 and
    u = b + 1 it flips at b = 0. The upper line of the second is x. So the margin is bounded by the
    minimum of -2x + 1, which is -1, for b <= 0, and by that of (z + b) - 2x + 1 = b for b > 0.
    """
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0], [2.0]]))
        net[0].bias.copy_(torch.tensor([-1.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([1.0, 0.0]))
    return net


def figure_1():
    net, x, y = jumping_network(), torch.tensor([[0.5]]), torch.tensor([0])
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    b = 2                                            # theta: the two weights first, then biases
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), sharey=True)
    ts = np.linspace(-0.999, 0.999, 400)
    for ax, relax in zip(axes, ("deeppoly", "box")):
        full = train.robust_loss(net, x, y, 0.5, relax)
        one = lambda biases: full(theta.repeat(len(biases), 1).index_copy(
            1, torch.tensor([b]), biases - 1))
        for sigma, color in GREYS.items():
            values = smoothed(one, torch.zeros(1), torch.ones(1), ts, sigma, 4000)
            if sigma == 0:                           # a line across the jump would hide it
                values[1:][np.abs(np.diff(values)) > 0.1] = np.nan
            ax.plot(ts, values, color=color, lw=2.2 if sigma == 0 else 1.4,
                    label="the loss itself" if sigma == 0 else f"smoothed, sigma = {sigma:g}")
        ax.set(title=NAME[relax], xlabel="bias b of the first neuron",
               xticks=np.linspace(-1, 1, 5))         # more would touch each other
    axes[0].set_ylabel("worst-case cross-entropy (bound)")
    axes[0].legend()
    save(fig, "1-jump")


# ------------------------------------------------------ 2: the loss of a real network on one line

def trained(relax="deeppoly", opt="grad", seed=0, **other):
    """(network, minibatch x, y): a cell of the digits table, trained again if it is not there."""
    chosen = {**experiments.tuned("digits")[relax, opt], **other}
    words = experiments.command(experiments.TABLES["digits"], (relax, opt), seed, chosen)
    folder = experiments.train_cell(words, str(experiments.ROOT / "data"))
    data = load_dataset("digits")
    return train.load_run(folder)[0], data.x_train[:128], data.y_train[:128]


def loss_of(net, x, y, relax):
    return train.robust_loss(net, x, y, experiments.TABLES["digits"]["eps"], relax,
                             skip_stable=train.SETTINGS["skip_stable"].default)


def figure_2():
    """Above, a step as long as many of training; below, the same line magnified, without trend."""
    net, x, y = trained()
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    fig, axes = plt.subplots(2, 3, figsize=(9.5, 5))
    for column, relax in zip(axes.T, ("box", "crown-ibp", "deeppoly")):
        loss = loss_of(net, x, y, relax)
        _, grad, _ = gls.gradient(loss, theta)
        down = -grad / grad.norm()
        for ax, reach, count in ((column[0], 0.4, 400), (column[1], 0.004, 800)):
            ts, few = np.linspace(-reach, reach, count), np.linspace(-reach, reach, 41)
            raw = smoothed(loss, theta, down, ts, 0, 1)
            trend = np.polyfit(ts, raw, 1) if reach < 0.1 else [0.0, 0.0]
            flat = lambda t, values: (values - np.polyval(trend, t)) * (1e3 if reach < 0.1 else 1)
            ax.plot(ts, flat(ts, raw), color=COLOR[relax], lw=1, label="the loss itself")
            for sigma, style in ((0.01, "--"), (0.03, "-")):
                values = flat(few, smoothed(loss, theta, down, few, sigma, 64))
                ax.plot(few, values - (values.mean() if reach < 0.1 else 0), style, color="black",
                        lw=1, label=f"smoothed, sigma = {sigma:g}")
        column[0].set(title=NAME[relax])
        column[1].set(xlabel="step along the negative gradient")
    axes[0, 0].set_ylabel("robust loss, 128 training digits")
    axes[1, 0].set_ylabel("the same, magnified, without\nits linear trend, in 1/1000")
    axes[0, 0].legend()
    save(fig, "2-line")


# ------------------------------------------------------------------- 3: PGPE and RGS on a step

def figure_3():
    sigma, ts = 0.5, np.linspace(-2, 2, 21)
    step = lambda thetas: (thetas[:, 0] > 0).to(thetas.dtype)
    draws = {"pgpe": lambda t, g: gls.pgpe(step, t, sigma, 32, g, adapt=False)[1],
             "rgs": lambda t, g: gls.rgs(step, t, sigma, 64, g, antithetic=True)[1]}
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.9))
    fine, normal = np.linspace(-2, 2, 400), torch.distributions.Normal(0, 1)
    z = torch.tensor(fine / sigma)
    axes[0].plot(fine, fine > 0, color=COLOR["deeppoly"], lw=2, label="loss")
    axes[0].plot(fine, normal.cdf(z), color="black", label=f"smoothed, sigma = {sigma:g}")
    axes[0].set(xlabel="theta", ylabel="loss", title="a step", ylim=(-0.1, 1.4))
    axes[0].legend(loc="upper left")
    axes[1].plot(fine, normal.log_prob(z).exp() / sigma, color="black",
                 label="gradient of the smoothed loss")
    for opt, draw in draws.items():
        g = torch.Generator().manual_seed(0)
        estimates = np.array([[draw(torch.tensor([t], dtype=torch.float32), g).item()
                               for _ in range(50)] for t in ts])
        axes[1].errorbar(ts, estimates.mean(1), estimates.std(1), fmt=MARKER[opt], ms=4, lw=1,
                         color=COLOR["box"] if opt == "pgpe" else COLOR["crown-ibp"],
                         label=f"{NAME[opt]}, 64 evaluations: mean and spread")
    axes[1].set(xlabel="theta", ylabel="slope", title="what the estimators see", ylim=(-0.1, 1.3))
    axes[1].legend(fontsize=7, loc="upper left")
    save(fig, "3-step")


# ----------------------------------------------------------------- 4, 5, 6: from the results

def statistics(found):
    """Mean and standard deviation of the certified accuracy, in percent."""
    values = [100 * c["certified"] / c["n"] for c in found]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def figure_4():
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True)
    for ax, (name, option) in zip(axes, (("digits", "sigma"), ("digits", "samples"),
                                         ("digits-long", "samples"))):
        table, best, grid = (experiments.TABLES[name], experiments.tuned(name),
                             tables.table_cells(name))
        values, methods = table["sweeps"][option]
        few = lambda cells: [c for c in cells if c["seed"] < table["sweep_seeds"]]
        for relax, opt in methods:
            tuned = {"samples": {"rgs": 2, "pgpe": 64}[opt], **best[relax, opt]}[option]
            points = [(tuned, *statistics(few(grid[relax, opt])))]
            for value in set(values) - {tuned}:
                found = [c for c in few(experiments.read(name))
                         if (c["relax"], c["opt"]) == (relax, opt) and "failed" not in c
                         and c["settings"] == {**best[relax, opt], option: value}]
                points += [(value, *statistics(found))] if found else []
            points.sort()
            ax.errorbar(*zip(*points), fmt=MARKER[opt] + ("-" if opt == "rgs" else "--"),
                        color=COLOR[relax], capsize=2, label=f"{NAME[relax]}, {NAME[opt]}")
            ax.axhline(statistics(few(grid[relax, "grad"]))[0], color=COLOR[relax], lw=0.6, ls=":")
        ax.set_xscale("log", base=10 if option == "sigma" else 2)
        ax.set(title=f"{table['common']['epochs']} epochs",
               xlabel={"sigma": "sigma, standard deviation of the weight noise",
                       "samples": "evaluations per step"}[option])
        ax.legend(fontsize=7)
    axes[0].set_ylabel("certified test digits, %\n(dotted: plain gradient)")
    save(fig, "4-sweeps")


def certified_radius(net, x, y, relax, slope, steps=12):
    """Mean over correct images of the largest radius that relax certifies, by bisection."""
    right = train.forward_margin(net, x, y) > 0
    x, y = x[right], y[right]
    low, high = torch.zeros(len(x)), torch.full((len(x),), 0.5)
    for _ in range(steps):
        middle = (low + high) / 2
        with torch.no_grad():
            margins = margin_lower_bounds(net, x, y, middle[:, None, None, None], relax,
                                          slope=slope)
        proved = train.smallest(margins, y) > 0
        low, high = torch.where(proved, middle, low), torch.where(proved, high, middle)
    return low.mean().item()


def figure_5():
    """Tightness is measured where no bound has trained: on networks trained against an attack."""
    x, y = (t[:120] for t in load_dataset("digits")[2:4])
    attacked = [trained("mtl-ibp", "grad", seed, alpha=0.0, regularize=0.0)[0] for seed in range(3)]
    names = "box", "crown-ibp", "deeppoly", "alpha-crown"
    bounds = {relax: (relax, "adaptive") for relax in names}
    bounds["deepz"] = "deeppoly", "parallel"
    radii = {name: [certified_radius(net, x, y, *bound) for net in attacked]
             for name, bound in bounds.items()}
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
    for ax, name in zip(axes, ("digits", "digits-long")):
        grid = tables.merged("digits+digits-deepz" if name == "digits" else name)
        for opt in ("grad", "rgs", "pgpe"):
            points = sorted((mean(radii[relax]), *statistics(grid[relax, opt])) for relax in radii
                            if (relax, opt) in grid)
            ax.errorbar(*zip(*points), fmt=f"{MARKER[opt]}-", capsize=2, label=NAME[opt])
        for (relax, values), height in zip(radii.items(), (1.0, 1.0, 1.0, 1.05, 1.1)):
            if (relax, "grad") in grid:
                ax.axvline(mean(values), color="grey", lw=0.5)
                ax.annotate(NAME[relax], (mean(values), height), xycoords=("data", "axes fraction"),
                            ha="center", va="bottom", fontsize=7)
        ax.set(xlabel="tightness: mean radius it certifies,\nnetworks trained against an attack")
        ax.set_title(f"{experiments.TABLES[name]['common']['epochs']} epochs", pad=28)
    axes[0].set_ylabel("certified test digits, %")
    axes[0].legend()
    save(fig, "5-paradox")


def figure_6():
    table, grid = experiments.TABLES["digits-long"], tables.table_cells("digits-long")
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.9), sharey=True)
    for ax, opt in zip(axes, ("grad", "rgs", "pgpe")):
        for relax in ("box", "crown-ibp", "deeppoly"):
            curves = np.array([c["curve"]["certified"] for c in grid[relax, opt]]) * 100
            epochs = np.arange(1, curves.shape[1] + 1)
            ax.plot(epochs, curves.mean(0), color=COLOR[relax], label=NAME[relax])
            ax.fill_between(epochs, curves.min(0), curves.max(0), color=COLOR[relax], alpha=0.2,
                            lw=0)
        ax.axvline(table["common"]["ramp"], color="grey", lw=0.8, ls=":")
        ax.set(title=NAME[opt] + ("" if opt == "grad" else ", at the perturbed weights"),
               xlabel="epoch (eps is full from the dotted line on)")
        ax.legend(fontsize=7)
    axes[0].set_ylabel("training digits certified\nby its own bound at its eps, %")
    save(fig, "6-training")


# --------------------------------------------------------------------- 7: the surface, measured

def roughness(values):
    """(largest jump, standard deviation of the slope, deviation from convexity) on a grid.

    A jump is what a difference of neighbours exceeds both differences beside it by; the slope is
    that of neighbours; the deviation is the largest distance to the convex envelope.
    """
    steps = np.diff(values)
    beside = np.maximum(np.abs(steps[:-2]), np.abs(steps[2:]))
    jump = np.maximum(np.abs(steps[1:-1]) - beside, 0).max()
    hull = []
    for p in enumerate(values):                      # lower hull of the points, left to right
        while len(hull) > 1 and ((hull[-1][1] - hull[-2][1]) * (p[0] - hull[-1][0])
                                 >= (p[1] - hull[-1][1]) * (hull[-1][0] - hull[-2][0])):
            hull.pop()
        hull.append(p)
    envelope = np.interp(np.arange(len(values)), *zip(*hull))
    return jump, steps.std(), (values - envelope).max()


def figure_7(lines=4, points=81, samples=32, reach=0.1):
    """Lines through weights trained by DeepPoly, in random directions; each weight moves by about
    reach at the ends. Losses in units of that at the trained weights."""
    net, x, y = trained()
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    ts, generator = np.linspace(-reach, reach, points), torch.Generator().manual_seed(0)
    directions = torch.randn(lines, len(theta), generator=generator)
    sigmas, titles = (0.0, 0.003, 0.01, 0.03), ("largest jump", "standard deviation of the slope",
                                                "deviation from convexity")
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.9))
    for i, relax in enumerate(("box", "crown-ibp", "deeppoly")):
        loss = loss_of(net, x, y, relax)
        for k, sigma in enumerate(sigmas):
            unit = loss(theta[None]).item()
            rough = np.array([roughness(smoothed(loss, theta, d, ts, sigma, samples) / unit)
                              for d in directions]) / [1, 2 * reach / (points - 1), 1]
            for ax, column in zip(axes, rough.T):
                ax.errorbar(k + 0.2 * (i - 1), column.mean(), column.std() / lines ** 0.5, fmt="o",
                            color=COLOR[relax], capsize=2, label=NAME[relax] if not k else None)
            print(f"{relax} sigma {sigma:g}: " + "  ".join(
                f"{t} {m:.4g}" for t, m in zip(titles, rough.mean(0))), flush=True)
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel="sigma of the smoothing")
        ax.set_yscale("log") if ax is axes[1] else ax.set_yscale("symlog", linthresh=1e-5)
        ax.set_xticks(range(len(sigmas)), [f"{s:g}" if s else "none" for s in sigmas])
    axes[0].set_ylabel("in units of the loss at the trained weights")
    axes[0].legend()
    save(fig, "7-surface")


# ------------------------------------------------- 8: how far an estimate is from the gradient

IMAGES = {64: "#000000", 32: "#0072b2", 8: "#d55e00"}      # that one perturbed network sees
COSTS = {"rgs": (64, 128, 256, 512, 1024), "pgpe": (1024, 2048, 4096, 16384)}


def distance(grads, reference):
    """Root mean square distance of gradients (n, D) to the reference, in units of its length."""
    return ((grads - reference).square().sum(1).mean().sqrt() / reference.norm()).item()


def figure_8(runs=8, sigma=0.01):
    """One minibatch of 64 digits, a network after a quarter of its training. The reference is RGS
    with 2,048 samples of the whole minibatch."""
    net, x, y = trained("deeppoly", "rgs", epochs=10, ramp=4, milestones=(8, 9))
    x, y = x[:64], y[:64]
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True)
    for ax, relax in zip(axes, ("box", "crown-ibp", "deeppoly")):
        g = torch.Generator().manual_seed(0)
        losses = {n: [loss_of(net, *part, relax) for part in zip(x.split(n), y.split(n))]
                  for n in IMAGES}
        draws = {"rgs": lambda n, k: gls.rgs(losses[n], theta, sigma, k, g, True, chunk=64),
                 "pgpe": lambda n, k: gls.pgpe(losses[n], theta, sigma, k // 2, g, chunk=64,
                                               adapt=False)}
        reference = draws["rgs"](64, 2048)[1]
        of_gradient = distance(gls.gradient(losses[64][0], theta)[1][None], reference)
        ax.axhline(of_gradient, color="grey", ls=":", label="plain gradient")
        for opt, draw in draws.items():
            for n, color in IMAGES.items():
                costs = [c for c in COSTS[opt] if c >= 128 or n < 64]           # pairs need two
                found = [distance(torch.stack([draw(n, c // n)[1] for _ in range(runs)]),
                                  reference) for c in costs]
                ax.plot(costs, found, f"{MARKER[opt]}-", color=color, ms=4, lw=1,
                        label=f"{NAME[opt]}, {n} images a sample")
                print(f"{relax} {opt} {n}: " + "  ".join(
                    f"{c} {d:.3g}" for c, d in zip(costs, found)), flush=True)
        print(f"{relax}: plain gradient {of_gradient:.3g}; gls.relative_error of RGS, 2 samples: "
              f"{gls.relative_error(lambda: draws['rgs'](64, 2), 32):.3g}", flush=True)
        ax.set(title=NAME[relax], xlabel="images evaluated for one estimate", xscale="log",
               yscale="log")
    axes[0].set_ylabel("distance to the smoothed gradient,\nin units of its length")
    axes[2].legend(fontsize=6)
    save(fig, "8-estimates")


# ------------------------------------------------------- 9: does the gain follow the roughness?

def own_loss(relax, seed):
    """(loss, weights) of a network of the digits table, trained by plain gradients of that loss."""
    net, x, y = trained(relax, "grad", seed)
    chosen = experiments.tuned("digits")[relax, "grad"]
    own = {k: chosen[k] for k in ("alpha", "lam") if k in chosen}
    loss = train.robust_loss(net, x, y, experiments.TABLES["digits"]["eps"], relax,
                             skip_stable=True, **own)
    return loss, nn.utils.parameters_to_vector(net.parameters()).detach()


def rough_at_home(relax, seed, lines=6, points=81, reach=0.1, sigma=0.01):
    """Of that loss at its own weights: (largest jump, deviation from convexity), means over random
    lines in units of the loss, and the noise of its gradient: the standard deviation at weights
    perturbed by sigma, in units of the mean."""
    loss, theta = own_loss(relax, seed)
    ts, generator = np.linspace(-reach, reach, points), torch.Generator().manual_seed(seed)
    directions = torch.randn(lines, len(theta), generator=generator)
    unit = loss(theta[None]).item()
    jump, _, convexity = np.mean([roughness(smoothed(loss, theta, d, ts, 0, 1) / unit)
                                  for d in directions], 0)
    noise = gls.relative_error(lambda: gls.rgs(loss, theta, sigma, 1, generator), runs=32)
    return jump, convexity, noise.item()


def figure_9(seeds=2):
    """What RGS gained is read from the table of the digits, which has more seeds."""
    grid = tables.table_cells("digits")
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
    for relax in ("box", "crown-ibp", "deeppoly", "sabr", "mtl-ibp"):
        found = np.array([rough_at_home(relax, seed) for seed in range(seeds)])
        gain, error = tables.contrast(*([tables.percent(grid[relax, opt], "certified")]
                                        for opt in ("rgs", "grad")))
        print(f"{relax}: gain {gain:+.1f} ± {error:.1f}  " + "  ".join(
            f"{a:.3g} ({b:.3g} to {c:.3g})" for a, b, c in
            zip(found.mean(0), found.min(0), found.max(0))), flush=True)
        for ax, values in zip(axes, found.T):
            ax.errorbar(values.mean(), gain, error, np.abs(values[[0, -1]] - values.mean()).max(),
                        fmt="o", color=COLOR[relax], capsize=2, label=NAME[relax])
    for ax, title in zip(axes, ("largest jump, of the loss",
                                "deviation from convexity, of the loss",
                                "noise of the gradient, of its mean")):
        ax.axhline(0, color="grey", lw=0.8, ls=":")
        ax.set(xlabel=title)
    axes[0].set_xscale("symlog", linthresh=1e-5)
    axes[0].set_xlim(left=-2e-6)
    axes[0].set_ylabel("certified by RGS less\nby plain gradient, points")
    axes[2].legend(fontsize=7)
    save(fig, "9-gain")


FIGURES = (figure_1, figure_2, figure_3, figure_4, figure_5, figure_6, figure_7, figure_8,
           figure_9)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("which", nargs="*", metavar="RUN or NUMBER", help="run folders, or figures")
    p.add_argument("--data-dir", help="of the runs' images; default: theirs")
    args = p.parse_args(argv)
    numbers = [str(n) for n in range(1, len(FIGURES) + 1)]
    folders = [which for which in args.which if which not in numbers]
    if folders:
        pictures.draw_runs(folders, save, args.data_dir)
    for n in args.which or numbers:
        if n in numbers:
            FIGURES[int(n) - 1]()


if __name__ == "__main__":
    run(main)
