"""Train a network whose robustness can be certified: networks, robust loss, evaluation, loop.

    python train.py                                                  digits, DeepPoly, RGS: a minute
    python train.py --relax box --opt grad                           the classic baseline (IBP)
    python train.py --relax mtl-ibp --alpha 0.1 --opt grad           a baseline of the field
    python train.py --dataset mnist --data-dir DIR                   needs its files, or downloads
    python train.py --resume runs/NAME                               goes on where it was stopped
    torchrun --nproc-per-node 2 train.py ...                         by several processes

A step (take_step): bounds of the margins over a ball around each image (relaxations.py), the
cross-entropy on them, and an estimate of its gradient, smoothed or not (gls.py), for Adam. Readers
of data, run folders (config.json, log.csv, checkpoint.pt) and processes are in plumbing/. Shape
letters as in relaxations.py.  Expected from the first command on 2 CPU cores: see README.md.
"""
import math
from contextlib import ExitStack
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import gls
from plumbing.attack import attack, forward_margin, margins_of, smallest
from plumbing.checks import check_problem, check_whole
from plumbing.console import (InputError, Progress, Setting, count, defaults, header, not_negative,
                              parser_of, pick_device, positive, positive_unit, refuse_others, run,
                              show_training, table, unit)
from plumbing.data import (CIFAR_STATISTICS, augment, by_data, dataset_kind, dataset_name,
                           hold_out, load_dataset)
from plumbing.processes import average, members_of_each, parts_of, process_group, ranks, summed
from plumbing.rounding import check_finite, first_not_finite, in_float64, unit_of
from plumbing.runs import (at_start, check_same_images, circumstances, locked, new_folder,
                           read_checkpoint, recording, restored, run_folder)
from relaxations import RELAXATIONS, margin_lower_bounds, preactivation_bounds

# --------------------------------------------------------------------------------------- settings
# Default, limits, meaning and source of each; the command line and its help are made from this.
# Sources: Shi = Shi et al. 2021, "Fast certified robust training with short warmup", and its code,
# for MNIST (your own data start there) and CIFAR-10; here = from a few runs on digits, not tuned.

BASELINES = "sabr", "mtl-ibp", "cc-ibp", "exp-ibp"       # they see an attack; see ATTACKING
NETWORKS = {  # conv: channels, kernel, stride, padding; then (BatchNorm and) ReLU. Those of CTBench
    # (eth-sri/CTBench, networks.py), but for a BatchNorm after cnn7's hidden linear layer
    "mlp": "flatten, linear 100, linear 100",
    "small": "conv 4 5 2 2, conv 8 4 2 1, flatten",
    "cnn3": "conv 16 5 2 2, conv 32 4 2 1, flatten",
    "cnn5": "conv 16 3 1 1, conv 16 4 2 1, conv 32 4 2 1, flatten, linear 512",
    "cnn7": "conv+bn 64 3 1 1, conv+bn 64 3 1 1, conv+bn 128 3 2 1, conv+bn 128 3 1 1, "
            "conv+bn 128 3 1 1, flatten, linear 512",
}

SETTINGS = {
    "dataset": Setting("digits", dataset_name, "digits, mnist, cifar10, or PATH.npz"),
    "relax": Setting("deeppoly", (*RELAXATIONS, *BASELINES),
                     "the bound in the loss, or a baseline that is none"),
    "opt": Setting("rgs", ("grad", "rgs", "pgpe"),
                   "the gradient: plain, or of the smoothed loss, of first or of zeroth order"),
    "net": Setting("cnn3", tuple(NETWORKS), "the network"),
    "eps": Setting(by_data(0.1, 0.1, Fraction(2, 255), 0.1), unit,
                   "radius to certify, in pixels of [0, 1]"),
    "eps_train": Setting(None, unit, "radius to train at; default: that of --eps"),
    "epochs": Setting(by_data(20, 70, 160, 70), count(0), "passes over the training set",
                      "Shi; digits here: a minute on 2 CPU cores"),
    "ramp": Setting(by_data(8, 20, 80, 20), count(0),
                    "epochs in which eps grows; scaled with --epochs", "Shi; digits here"),
    "milestones": Setting(by_data([15, 18], [50, 60], [120, 140], [50, 60]), [count(0)],
                          "epochs after which lr decays; scaled with --epochs", "Shi; digits here"),
    "batch_size": Setting(by_data(64, 256, 128, 128), count(1), "images in a step",
                          "Shi; digits here"),
    "lr": Setting(by_data(2e-3, 5e-4, 5e-4, 5e-4), positive, "learning rate of Adam",
                  "Shi; digits here"),
    "lr_decay": Setting(0.2, positive_unit, "factor of lr at a milestone", "Shi"),
    "sigma": Setting(dict(grad=0.0, rgs=0.01, pgpe=0.01), positive,
                     "standard deviation of the weight noise",
                     "here: the size of cnn3's smaller initial weights; on digits 0.001 to 0.03 do "
                     "as well, 0.1 spoils (README, figure 4)"),
    "samples": Setting(dict(grad=1, rgs=2, pgpe=64), count(1), "loss evaluations in a step",
                       "here: an antithetic pair; 32 pairs"),
    "antithetic": Setting(True, bool, "rgs: perturb by eps and by -eps, as pgpe always does",
                          "here: cancels the odd part of the noise, for free"),
    "parts": Setting(1, count(1), "rgs, pgpe: parts of a minibatch; a sample, or pair, sees one"),
    "sigma_adapt": Setting("fixed", ("fixed", "scalar", "parameter"),
                           "pgpe: follow the gradient of sigma too, one for all or one each"),
    "sigma_lr": Setting(0.1, not_negative, "step size of sigma", "pgpelib's default"),
    "members": Setting(None, count(1), "parameter vectors run at once; default: by their size"),
    "loss": Setting("cross-entropy", ("cross-entropy", "certified-error"),
                    "certified-error: the fraction not certified, gradient 0; for pgpe only"),
    "beta": Setting(1.0, unit, "crown-ibp: its weight against box at full eps, 1 at eps 0",
                    "Zhang et al. 2020 end at 0 or 1, by data set; 0 would make it box"),
    "alpha": Setting(0.1, unit, "mtl-ibp, cc-ibp, exp-ibp: weight of the box against the attack",
                     "here; De Palma et al. 2024 use 0.004 to 0.5, by data set"),
    "lam": Setting(0.4, positive_unit, "sabr: radius of the small box, in units of eps (lambda)",
                   "Mueller et al. 2023 for MNIST at 0.1; they use 0.1 to 0.7, by data set"),
    "slope_steps": Setting(3, count(0), "alpha-crown: steps of ascent inside the loss",
                           "here; each costs a bound and its gradient"),
    "kappa": Setting(0.0, unit, "weight of the natural loss; 0: only the bound counts", "here"),
    "l1": Setting(0.0, not_negative, "weight of the sum of the absolute weights",
                  "off; Shi's followers use 0 to 2e-5, by data set"),
    "regularize": Setting(0.5, not_negative,
                          "weight of the regularisers of Shi et al., falling to 0 over the ramp",
                          "Shi"),
    "clip": Setting(10.0, positive, "the largest norm of a gradient", "Shi"),
    "init": Setting("ibp", ("ibp", "default"),
                    "initial weights: small, so that no interval explodes, or PyTorch's", "Shi"),
    "skip_stable": Setting(True, bool, "deeppoly: back-substitute unstable neurons only",
                           "here: faster, and certifies as much (benchmarks/)"),
    "seed": Setting(0, count(0), "of the initial weights, the batches and the noise"),
    "device": Setting("auto", ("auto", "cpu", "cuda", "mps"), "what computes"),
    "data_dir": Setting("data", str, "where the data set is, or is downloaded to"),
    "subset": Setting(None, count(1), "use only the first N training images; default: all"),
    "validation": Setting(0, count(0), "test on the last N training images, held out, to tune"),
    "test_subset": Setting(None, count(1), "test on the first N test images; default: all"),
    "out": Setting(None, str, "the run folder; default: runs/DATASET-NET-RELAX-OPT"),
    "resume": Setting(None, run_folder, "go on with the run in this folder, from its last "
                      "checkpoint; of other options only --data-dir and --device may be given"),
}


def parse_config(argv=None):
    """Settings from a command line: what it gives, and the defaults of the rest. With --resume
    only what it gives, since a run keeps its settings."""
    parser = parser_of(SETTINGS, "train.py", "Train a certifiably robust network, with or without "
                       "Gaussian loss smoothing.")
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        refuse_others(parser, given, "resume", "data_dir", "device")
        return given
    chosen = {name: setting.default for name, setting in SETTINGS.items()} | given
    recipe = defaults(SETTINGS, dataset_kind(chosen["dataset"]), chosen["opt"])
    config = recipe | given
    if "epochs" in given and "ramp" not in given:          # a shorter run keeps the recipe's shape
        scale = given["epochs"] / recipe["epochs"]
        config["ramp"] = round(recipe["ramp"] * scale)
        if "milestones" not in given:
            config["milestones"] = [max(1, round(m * scale)) for m in recipe["milestones"]]
    if "eps_train" not in given:
        config["eps_train"] = config["eps"]
    if config["opt"] == "grad":
        config |= dict(samples=1, sigma=0.0)
    _check_together(config, parser.error)
    del config["resume"]
    return config


def _check_together(config, error):
    """Settings that are right one by one, but not together."""
    opt, relax, samples, parts = (config[k] for k in ("opt", "relax", "samples", "parts"))
    paired = opt == "pgpe" or opt == "rgs" and config["antithetic"]
    if paired and samples % 2:
        error(f"argument --samples: {samples} is odd, but {opt} uses antithetic pairs; use "
              f"{samples + 1}" + ", or --no-antithetic" * (opt == "rgs"))
    if samples % (2 * parts if opt == "pgpe" else parts):
        error(f"argument --parts: {opt} cannot use {parts} parts equally often with {samples} "
              "samples" + ", which are pairs" * (opt == "pgpe"))
    if config["loss"] == "certified-error" and opt != "pgpe":
        error("argument --loss: the gradient of certified-error is 0; use --opt pgpe")
    if config["loss"] == "certified-error" and relax in BASELINES:
        error(f"argument --loss: {relax} has no certified-error; use a --relax of "
              + ", ".join(RELAXATIONS))
    if config["sigma_adapt"] != "fixed" and opt != "pgpe":
        error("argument --sigma-adapt: only --opt pgpe estimates a gradient of sigma, not "
              f"--opt {opt}; use fixed")


# --------------------------------------------------------------------------------------- networks

def build_network(name, input_shape, num_classes, init="ibp", statistics=None):
    """An eval-mode nn.Sequential: pixels in [0, 1], (B, *input_shape) -> logits (B, num_classes).

    statistics: (mean, std) per channel of the pixels, for a first layer that normalises.
    init: "ibp", W ~ N(0, 2 pi / fan_in^2) for every affine layer but the last (Shi et al. 2021), or
    "default", PyTorch's own; biases are PyTorch's. Uses torch's global generator.
    """
    for what, value in (("net", name), ("init", init)):
        if value not in SETTINGS[what].limits:
            raise InputError(f"{what} {value!r} is none of {', '.join(SETTINGS[what].limits)}")
    if num_classes < 2:
        raise InputError("the images have one class; a margin is between two")
    shape, layers = list(input_shape), []
    if statistics is not None:
        normalize = nn.BatchNorm2d(shape[0], eps=0.0, affine=False)
        mean, std = map(torch.tensor, statistics)
        normalize.running_mean.copy_(mean)
        normalize.running_var.copy_(std.square())
        layers.append(normalize)
    for words in NETWORKS[name].split(", "):
        kind, *sizes = words.split()
        sizes = [int(size) for size in sizes]
        if kind == "flatten":
            layers.append(nn.Flatten())
            shape = [math.prod(shape)]
        elif kind == "linear":
            layers += [nn.Linear(*shape, *sizes), nn.ReLU()]
            shape = sizes
        else:
            out, kernel, stride, padding = sizes
            layers.append(nn.Conv2d(shape[0], *sizes))
            layers += [nn.BatchNorm2d(out), nn.ReLU()] if kind == "conv+bn" else [nn.ReLU()]
            shape = [out, *((n + 2 * padding - kernel) // stride + 1 for n in shape[1:])]
            if min(shape) < 1:
                raise InputError(f"net {name} needs larger images than {tuple(input_shape)}; "
                                 "try mlp")
    layers.append(nn.Linear(*shape, num_classes))
    if init == "ibp":
        affine = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
        for layer in affine[:-1]:
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / fan_in)
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


# -------------------------------------------------------------------------------- the robust loss
# Of m, lower bounds of the margins in the ball (-m are logits of the worst case), and for baselines
# of a, the margins at points found by an attack: 8 steps of PGD on net as it is, once for all P.
#   box, deeppoly      the bounds of relaxations.py
#   crown-ibp          beta m + (1 - beta) (m of box), as Zhang et al. 2020 train with it
#   alpha-crown        the margins by slope_steps steps of ascent, between DeepPoly's bounds of the
#                      neurons; a gradient holds the slopes found fixed
#   ATTACKING          see each; they are no upper bounds of the worst case

def cross_entropy(margins):
    """Of logits that are less than that of the label by margins (..., K): log sum_k exp(-m_k)."""
    return torch.logsumexp(-margins, -1)


# Mueller et al. 2023, "Certified training: small boxes are all you need"; m is that of small_box
def sabr(m, a, alpha):
    return cross_entropy(m)


# De Palma et al. 2024, "Expressive losses for verified robustness via convex combinations"
def mtl_ibp(m, a, alpha):
    return alpha * cross_entropy(m) + (1 - alpha) * cross_entropy(a)


def cc_ibp(m, a, alpha):
    return cross_entropy(alpha * m + (1 - alpha) * a)


def exp_ibp(m, a, alpha):
    of_box, of_attack = (cross_entropy(t).clamp(min=1e-9) for t in (m, a))
    return of_box ** alpha * of_attack ** (1 - alpha)


ATTACKING = dict(zip(BASELINES, (sabr, mtl_ibp, cc_ibp, exp_ibp)))


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
        active, inactive = l > 0, u < 0
        spread = (c - (c_sum / n)[:, None, None]).square()
        both = sums(c * active, -c * inactive, spread * active, spread * inactive)
        defined = (both > 1e-12).all(0)
        m_v = torch.where(defined, both, 1.0).unflatten(0, (2, 2))                  # (2, 2, P)
        ratios = m_v[:, 0] / m_v[:, 1]
        off_balance = F.relu(0.5 - torch.minimum(ratios, 1 / ratios)) / 0.5
        balance.append(torch.where(defined, off_balance.sum(0), 0.0))
    return torch.stack(tightness).mean(0) + torch.stack(balance).mean(0)


def input_radius(net, x, eps, total=lambda t: t):
    """Mean radius of the input boxes, in units of what the first layer that learns sees."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    if isinstance(net[0], nn.BatchNorm2d):                                          # normalisation
        low, high = net[0](low), net[0](high)
    widths = (high - low).abs().flatten(1).mean(1)
    images = torch.ones_like(widths)
    width, n = total(torch.stack([widths.sum(), images.sum()]))
    return width / n / 2


def small_box(x, points, eps, lam):
    """Center and radius of sabr's box of lam * eps around points, moved into the ball around x."""
    radius = lam * eps
    return points.clamp(x - (eps - radius), x + (eps - radius)), radius


def robust_loss(net, x, y, eps, relax="deeppoly", *, loss="cross-entropy", kappa=0.0, l1=0.0,
                regularize=0.0, skip_stable=False, beta=1.0, alpha=SETTINGS["alpha"].default,
                lam=SETTINGS["lam"].default, slope_steps=SETTINGS["slope_steps"].default,
                certified=None, weight=1.0, total=lambda t: t):
    """The loss of a minibatch as a function (P, D) -> (P,) of parameter vectors, for gls.py.

        (1 - kappa) E[CE(-m, y)] + kappa E[CE(logits, y)] + l1 |weights|_1 + regularize * (...)

    CE(-m, y) bounds the largest cross-entropy in the ball from above. With loss="certified-error"
    the fraction of images with some m_k <= 0, whose gradient is zero, takes its place.
    certified: a list to which each call appends its certified fraction, averaged over P.
    weight, total: for a part of a minibatch, see plumbing.processes.share.
    """
    center, radius = x, eps
    if relax in ATTACKING:
        points = attack(net, x, y, eps, steps=8, restarts=1)
    if relax == "sabr":
        center, radius = small_box(x, points, eps, lam)
    outputs = "box" if relax in ATTACKING else relax
    neurons = "deeppoly" if relax == "alpha-crown" else outputs

    def losses(thetas):
        params = unflatten(thetas, net)
        bounds = preactivation_bounds(net, center, radius, neurons, params, skip_stable=skip_stable)
        margins = lambda relax: margin_lower_bounds(net, center, y, radius, relax, params,
                                                    intermediate=bounds, steps=slope_steps)
        logits = lambda x: vmap(lambda p: functional_call(net, p, (x,)))(params)    # (P, B, K)
        m = margins(outputs)                                                        # (P, B, K)
        if relax == "crown-ibp" and beta < 1:
            m = beta * m + (1 - beta) * margins("box")
        is_certified = (m > 0).sum(-1) == m.shape[-1] - 1                           # (P, B)
        if certified is not None:
            certified.append(weight * is_certified.float().mean())
        if loss == "certified-error":
            value = 1 - is_certified.to(m.dtype)
        elif relax in ATTACKING:
            value = ATTACKING[relax](m, margins_of(logits(points), y), alpha)
        else:
            value = cross_entropy(m)
        value = weight * (1 - kappa) * value.mean(-1)
        if kappa:
            value = value + weight * kappa * vmap(F.cross_entropy, (0, None))(logits(x), y)
        if l1:
            weights = [w for w in params.values() if w.dim() > 2]                   # no biases
            value = value + l1 * sum(w.abs().flatten(1).sum(1) for w in weights)
        if regularize and bounds:
            width = input_radius(net, center, radius, total)
            value = value + regularize * regularizers(bounds, width, total)
        return value
    return losses


# ------------------------------------------------------------------------------------- evaluation

CLOSE = 1e-4     # margins nearer to zero, relative to the largest if that exceeds 1, need float64
# How certification uses DeepPoly: only the neurons that intervals leave unstable are substituted.
# Faster on trained networks, and on those tried about as tight: see benchmarks/README.md.
CERTIFY = {"box": {}, "crown-ibp": {}, "deeppoly": dict(skip_stable=True)}


@torch.no_grad()
def certified_margin(net, x, y, eps, relax, batch=100, **options):
    """A sound lower bound of forward_margin over the ball, (B,); close to zero, from float64."""
    if not len(x):
        return x.new_zeros(0)
    low = torch.cat([margin_lower_bounds(net, a, b, eps, relax, **options)
                     for a, b in zip(x.split(batch), y.split(batch))])
    bound, scale = smallest(low, y), low.abs().amax(-1).clamp(min=unit_of(net))
    close = bound.abs() < CLOSE * scale
    if close.any() and x.dtype != torch.float64:
        again = certified_margin(*in_float64(net, x[close], y[close]), eps, relax, batch, **options)
        bound[close] = again.to(bound)
    return bound


def evaluate(net, x, y, eps, batch=500, progress=lambda line: None):
    """Which samples are correct, survive the attack, and are certified: {name: (n,) bool}.

    "best" is certified by any of the three relaxations. Raises ValueError for what the bounds
    refuse, and AssertionError if a certified sample was attacked: then a bound is wrong, and no
    number can be trusted.
    """
    check_whole(1, batch=batch)
    y = check_problem(net, x, y, eps, margin_lower_bounds, preactivation_bounds)
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


# ----------------------------------------------------------------------------- estimator and loop

def eps_at(progress, eps):
    """Training radius after a fraction of the ramp: quartic up to a quarter of it, then linear,
    with the same value and slope where they meet (the smooth schedule of Shi et al. 2021)."""
    t, middle = min(max(progress, 0.0), 1.0), 0.25
    a = 1 / (middle ** 4 + 4 * middle ** 3 * (1 - middle))
    if t < middle:
        return eps * (a * t ** 4)
    return eps * (a * middle ** 4 + 4 * a * middle ** 3 * (t - middle))


def lr_at(epoch, config):
    """Learning rate in the epoch with this number, from 0."""
    passed = sum(milestone <= epoch for milestone in config["milestones"])
    return math.prod([config["lr"], *[config["lr_decay"]] * passed])


def adapt_sigma(sigma, grad, lr):
    """sigma - lr sigma^2 dL/dsigma, by at most 20 % a step (Sehnke et al. 2010, as in pgpelib)."""
    return torch.clamp(sigma - lr * sigma ** 2 * grad, 0.8 * sigma, 1.2 * sigma)


def samples_are_shared(config):
    """Whether many processes share out the samples of an estimate; else, the minibatch."""
    opt, samples = config["opt"], config["samples"]
    return opt == "pgpe" or opt == "rgs" and samples % ranks()[1] == 0


def estimate(losses, theta, sigma, config, generator):
    """The gradient estimate config["opt"] asks for: (loss, gradient, sigma gradient or None)."""
    opt, samples, chunk = (config[k] for k in ("opt", "samples", "members"))
    shard = ranks() if samples_are_shared(config) else (0, 1)
    if opt == "pgpe":
        adapt = config["sigma_adapt"] != "fixed"
        return gls.pgpe(losses, theta, sigma, samples // 2, generator, chunk, adapt, shard)
    if opt == "rgs":
        pairs = config["antithetic"]
        value, grad, _ = gls.rgs(losses, theta, sigma, samples, generator, pairs, chunk, shard)
    else:
        value, grad, _ = gls.gradient(*losses, theta)
    if shard != ranks():                                   # each has that of its part of the images
        value, grad = (summed(t) / ranks()[1] for t in (value, grad))
    return value, grad, None


def losses_of_step(net, x, y, eps, config, certified=None):
    """robust_loss of each part of a minibatch (of all, if its images are fewer), whose average is
    its loss, by the settings in config; what depends on the ramp goes by eps / eps_train."""
    full = eps / config["eps_train"] if config["eps_train"] else 1.0
    options = {k: config[k] for k in ("relax", "loss", "kappa", "l1", "skip_stable", "alpha", "lam",
                                      "slope_steps")}
    options |= dict(regularize=config["regularize"] * (1 - full), certified=certified,
                    beta=1 + (config["beta"] - 1) * full)
    parts = parts_of(x, y, config.get("parts", 1), shared=not samples_are_shared(config))
    return [robust_loss(net, *images, eps, **options, **count) for *images, count in parts]


def why_not_finite(net, x, eps, config, grad):
    relax = config["relax"] if config["relax"] in RELAXATIONS else "box"
    with torch.no_grad():
        bounds = preactivation_bounds(net, x, eps, relax, skip_stable=config["skip_stable"])
    return first_not_finite(net, bounds, unflatten(grad[None], net))


def take_step(net, theta, optimizer, sigma, x, y, eps, config, *, noise, where=""):
    """One step of the optimiser, on theta, in place: sigma after it, and (loss, certified fraction,
    gradient norm) before it, (3,). FloatingPointError instead, if they are not finite."""
    certified = []
    update_batchnorm(net, x)
    losses = losses_of_step(net, x, y, eps, config, certified)
    value, theta.grad, sigma_grad = estimate(losses, theta, sigma, config, noise)
    norm = clip_grad_norm_([theta], config["clip"])
    check_finite(value, norm, f"{where}, eps {eps:.4g}",
                 lambda: why_not_finite(net, x, eps, config, theta.grad))
    optimizer.step()
    if sigma_grad is not None:
        sigma = adapt_sigma(sigma, sigma_grad, config["sigma_lr"])
    return sigma, torch.stack([value, average(certified, theta), norm])


def train(net, x, y, config, device, folder, show=print, training=None):
    """Train net on images x and labels y, by the settings in config (see SETTINGS).

    Returns the rows of log.csv, which it writes into folder, as checkpoint.pt (plumbing/runs.py).
    Two generators seeded with config["seed"] draw all random numbers: one batches, one noise.
    training: as load_run returns it with net, to continue; the weights in the end are, bit by bit,
    those of a run that never stopped. Raises FloatingPointError where numbers cease to be finite,
    Interrupted after a signal.
    """
    theta = parameters_to_vector(net.parameters()).detach().clone()
    vector_to_parameters(theta, net.parameters())      # as views: net follows theta from here on
    optimizer = torch.optim.Adam([theta], lr=config["lr"])
    batches = torch.Generator().manual_seed(config["seed"])
    noise = torch.Generator(device).manual_seed(config["seed"] + 1)
    generators = dict(optimizer=optimizer, batches=batches, noise=noise)
    sigma = torch.tensor(config["sigma"], device=device)
    if config["sigma_adapt"] == "parameter":
        sigma = torch.full_like(theta, config["sigma"])
    now = at_start(sigma)
    if training:
        now = restored(training, now, **generators)
    size = config["batch_size"]
    steps = -(-len(x) // size)
    ramp = config["ramp"] * steps or 1                       # without one, full from the first step
    with recording(folder, net, config, now, len(x), show, **generators) as record:
        while now["done"] < config["epochs"] * steps:
            epoch, step = divmod(now["done"], steps)
            if step == 0:
                now["order"] = torch.randperm(len(x), generator=batches)
            images = now["order"][step * size:(step + 1) * size]
            xb, yb = x[images].to(device), y[images].to(device)
            if config["augment"]:
                xb = augment(xb, batches)
            eps = eps_at((now["done"] + 1) / ramp, config["eps_train"])
            optimizer.param_groups[0]["lr"] = lr_at(epoch, config)
            now["sigma"], numbers = take_step(
                net, theta, optimizer, now["sigma"], xb, yb, eps, config, noise=noise,
                where=f"epoch {epoch + 1}, batch {step + 1}")
            record(epoch, step, eps, numbers, len(images))   # it may save, and stop
    return now["rows"]


# ------------------------------------------------------------------------------------------- main

def load_run(folder):
    """(net, config, training) of a run folder; nothing in it is executed. Raises InputError."""
    return read_checkpoint(folder, network_of)


def network_of(config):
    architecture = (config[k] for k in ("net", "input_shape", "classes", "init", "statistics"))
    return build_network(*architecture)


def new_run(config, data, device):
    """A new network, and the settings with what images, device and processes add to them."""
    cifar = config["dataset"] == "cifar10"
    config = config | circumstances(data, config, device)
    config |= dict(augment=cifar, statistics=CIFAR_STATISTICS if cifar else None)
    torch.manual_seed(config["seed"])
    net = network_of(config)
    config["members"] = members_of_each(net, config)
    return net, config


def main(argv=None):
    config = parse_config(argv)
    resumed, training = config.pop("resume", None), None
    with ExitStack() as stack:
        if resumed:
            stack.enter_context(locked(resumed))
            net, saved, training = load_run(resumed)
            config = saved | dict(out=str(resumed)) | config       # --data-dir, --device may differ
        device = pick_device(config["device"].split(":")[0])
        stack.enter_context(process_group(device))
        data = hold_out(load_dataset(config["dataset"], config["data_dir"]), config["validation"])
        if not resumed:
            net, config = new_run(config, data, device)
            stack.enter_context(new_folder(config, net))
        else:
            check_same_images(data, config)
        train_and_show(net.to(device), config, training, data, device)


def train_and_show(net, config, training, data, device):
    """Train, from the start or from where training was, and print the table of the test images."""
    show = Progress()
    print(header(config, data, net))
    x, y = data.x_train[:config["subset"]], data.y_train[:config["subset"]]
    rows = train(net, x, y, config, device, config["out"], show, training)
    if ranks()[0]:
        return                                         # the first process shows the rest
    if rows:
        show_training(rows, config, show)
    n = config["test_subset"]
    x, y = data.x_test[:n].to(device), data.y_test[:n].to(device)
    result = evaluate(net, x, y, config["eps"], progress=show)
    show.done(f"{len(x)} test images, eps {config['eps']:.4g}:")
    print("\n".join(table(result)))
    print(f"to certify it sample by sample:  python certify.py {config['out']}")


if __name__ == "__main__":
    run(main)
