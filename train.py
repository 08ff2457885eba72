"""Train a network whose robustness can be certified: settings, robust loss, evaluation, loop.

    python train.py                                                  digits, DeepPoly, RGS: a minute
    python train.py --relax box --opt grad                           the classic baseline (IBP)
    python train.py --relax mtl-ibp --alpha 0.1 --opt grad           a baseline of the field
    python train.py --dataset mnist --data-dir DIR                   needs its files, or downloads
    python train.py --resume runs/NAME                               goes on where it was stopped
    torchrun --nproc-per-node 2 train.py ...                         by several processes

A step (take_step): bounds of the margins over a ball around each image (relaxations.py), the
cross-entropy on them, and an estimate of its gradient, smoothed or not (gls.py), for Adam. What
makes networks, reads data, attacks images and keeps run folders (config.json, log.csv,
checkpoint.pt) is in plumbing/. Shape letters as in relaxations.py; what to expect: README.md.
"""
import math
from contextlib import ExitStack
from fractions import Fraction
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import gls
from plumbing.attack import attack, forward_margin, margins_of, smallest
from plumbing.checks import check_choice, check_problem, check_training, check_whole
from plumbing.console import (InputError, Progress, Setting, check_together, checked, count, header,
                              not_negative, parser_of, pick_device, positive, positive_unit,
                              refuse_others, run, show_training, table, unit, warn_without_effect,
                              with_defaults)
from plumbing.data import (augment, by_data, dataset_kind, dataset_name, hold_out, load_dataset,
                           statistics_of)
from plumbing.evaluations import comparison, write_evaluation
from plumbing.networks import (NETWORKS, build_network, from_config, ibp_init, is_file, net_name,
                               new_network, update_batchnorm)
from plumbing.processes import average, members_of_each, parts_of, process_group, ranks, summed
from plumbing.reading import flat_layers
from plumbing.rounding import check_finite, first_not_finite, in_float64, scale_of
from plumbing.runs import (at_start, check_unchanged, circumstances, data_of_run, is_finished,
                           lengthen, locked, moved, new_folder, read_checkpoint, recording,
                           restored, run_folder)
from plumbing.taps import last_part, latent_margins
from plumbing.timing import seconds_at, time_left
from plumbing.weights import read_weights
from relaxations import (AFFINE, RELAXATIONS, RESHAPE, SLOPES, margin_lower_bounds,
                         preactivation_bounds, read_network)

# --------------------------------------------------------------------------------------- settings
# Default, limits, meaning and source of each; the command line and its help are made from this.
# Sources: Shi = Shi et al. 2021, "Fast certified robust training with short warmup", and its code,
# for MNIST (your own data start there) and CIFAR-10; here = from a few runs on digits, not tuned.

ATTACKING = "sabr", "mtl-ibp", "cc-ibp", "exp-ibp", "staps"      # baselines that see an attack
LAYERS = nn.ReLU, *AFFINE, *RESHAPE         # what a network of your own may be made of

SETTINGS = {
    "dataset": Setting("digits", dataset_name, "digits, mnist, cifar10, or PATH.npz"),
    "relax": Setting("deeppoly", (*RELAXATIONS, *ATTACKING, "taps"),
                     "the bound in the loss, or a baseline that is none"),
    "opt": Setting("rgs", ("grad", "rgs", "pgpe"),
                   "the gradient: plain, or of the smoothed loss, of first or of zeroth order"),
    "net": Setting("cnn3", net_name, f"the network: {', '.join(NETWORKS)}, or what "
                   "FILE.py:FUNCTION returns for (input shape, classes); see docs/networks.md"),
    "eps": Setting(by_data(0.1, 0.1, Fraction(2, 255), 0.1), unit,
                   "radius to certify, in pixels of [0, 1]"),
    "eps_train": Setting(None, unit, "radius to train at; default: that of --eps"),
    "epochs": Setting(by_data(20, 70, 160, 70), count(0), "passes over the training set",
                      "Shi; digits here: a minute on 2 CPU cores"),
    "ramp": Setting(by_data(8, 20, 80, 20), count(0),
                    "epochs in which eps grows; scaled with --epochs", "Shi; digits here"),
    "milestones": Setting(by_data([15, 18], [50, 60], [120, 140], [50, 60]),
                          [count(0)], "epochs after which lr decays; scaled with --epochs",
                          "Shi; digits here"),
    "batch_size": Setting(by_data(64, 256, 128, 128), count(1), "images in a step", "Shi; here"),
    "lr": Setting(by_data(2e-3, 5e-4, 5e-4, 5e-4), positive, "learning rate of Adam",
                  "Shi; digits here"),
    "lr_decay": Setting(0.2, positive_unit, "factor of lr at a milestone", "Shi"),
    "sigma": Setting(dict(grad=0.0, rgs=0.01, pgpe=0.01), positive,
                     "rgs, pgpe: standard deviation of the weight noise",
                     "here: the size of cnn3's smaller initial weights; on digits 0.001 to 0.03 do "
                     "as well, 0.1 spoils (results/, figure 4)"),
    "samples": Setting(dict(grad=1, rgs=2, pgpe=64), count(1),
                       "rgs, pgpe: loss evaluations in a step", "here: one pair; 32 pairs"),
    "antithetic": Setting(True, bool, "rgs: perturb by eps and by -eps, as pgpe always does",
                          "here: cancels the odd part of the noise, for free"),
    "parts": Setting(dict(grad=1, rgs=2, pgpe=1), count(1),
                     "rgs, pgpe: parts of a minibatch; each sample, or pair, sees one"),
    "sigma_adapt": Setting("fixed", ("fixed", "scalar", "parameter"),
                           "pgpe: follow the gradient of sigma too, one for all or one each"),
    "sigma_lr": Setting(0.1, not_negative, "scalar, parameter: step size of sigma (--sigma-adapt)",
                        "pgpelib's default"),
    "members": Setting(None, count(1), "rgs, pgpe: parameter vectors at once; default: by size"),
    "loss": Setting("cross-entropy", ("cross-entropy", "certified-error"),
                    "certified-error: the fraction not certified, gradient 0; for pgpe only"),
    "beta": Setting(1.0, unit, "crown-ibp: its weight against box at full eps, 1 at eps 0",
                    "Zhang et al. 2020 end at 0 or 1, by data set; 0 would make it box"),
    "alpha": Setting(0.1, unit, "mtl-ibp, cc-ibp, exp-ibp: weight of the box against the attack",
                     "here; De Palma et al. 2024 use 0.004 to 0.5, by data set"),
    "lam": Setting(0.4, positive_unit, "sabr, staps: radius of the small box, in units of eps",
                   "Mueller et al. 2023 for MNIST at 0.1; they use 0.1 to 0.7, by data set"),
    "split": Setting(1, count(1), "taps, staps: ReLUs in the last part of the network, which is "
                     "attacked instead of bounded", "1 to 6 in CTBench, mostly 1"),
    "expand": Setting(5.0, positive, "taps, staps: factor of the gradient of the attacked loss",
                      "CTBench's advice; 2 to 4 in its scripts, by data set"),
    "slope_steps": Setting(3, count(0), "alpha-crown: steps of ascent inside the loss",
                           "here; each costs a bound and its gradient"),
    "kappa": Setting(0.0, unit, "weight of the natural loss; 0: only the bound counts", "here"),
    "l1": Setting(0.0, not_negative, "weight of the sum of the absolute weights",
                  "off; Shi's followers use 0 to 2e-5, by data set"),
    "regularize": Setting(0.5, not_negative, "weight of the regularisers of Shi et al., falling "
                          "to 0 over the ramp", "Shi"),
    "clip": Setting(10.0, positive, "the largest norm of a gradient", "Shi"),
    "init": Setting("ibp", ("ibp", "default"), "initial weights: small, so that no interval "
                    "explodes, or PyTorch's; a network of your own keeps its weights", "Shi"),
    "slope": Setting("adaptive", tuple(SLOPES), "lower slope of an unstable ReLU, where bounds "
                     "substitute: that of the smaller area; 0; 1; that of the upper line",
                     "Singh et al. 2019"),
    "weights": Setting(None, str, "start from a state_dict in this file; default: from --init"),
    "skip_stable": Setting(True, bool,
                           "deeppoly, alpha-crown: back-substitute unstable neurons only",
                           "here: faster, and certifies as much (benchmarks/)"),
    "seed": Setting(0, count(0), "of the initial weights, the batches and the noise"),
    "device": Setting("auto", ("auto", "cpu", "cuda", "mps"), "what computes"),
    "augment": Setting(by_data(False, False, True, False), bool,
                       "flip and shift the training images at random", "Shi"),
    "normalize": Setting(by_data(False, False, True, False), bool,
                         "a first layer that normalises pixels, by the training images", "Shi"),
    "data_dir": Setting("data", str, "where the data set is, or is downloaded to"),
    "subset": Setting(None, count(1), "use only the first N training images; default: all"),
    "validation": Setting(0, count(0), "test on the last N training images, held out, to tune"),
    "test_subset": Setting(None, count(1), "test on the first N test images; default: all"),
    "out": Setting(None, str, "the run folder; default: runs/DATASET-NET-RELAX-OPT-..., with what "
                   "differs from the defaults"),
    "resume": Setting(None, run_folder, "go on with the run in this folder, from its last "
                      "checkpoint, or for more --epochs; beside these, only --dataset, --data-dir "
                      "and --device may be given"),
}


def parse_config(argv=None):
    """Settings from a command line: what it gives, and the defaults of the rest. With --resume
    only what it gives, since a run keeps its settings."""
    parser = parser_of(SETTINGS, "train.py", "Train a certifiably robust network, with or without "
                       "Gaussian loss smoothing.")
    parser.add_argument("--compare", nargs="+", type=run_folder, metavar="RUN", help="only print a "
                        "table of finished runs: what they differ in, and their accuracies")
    given = vars(parser.parse_args(argv))
    if "compare" in given:
        refuse_others(parser, given, "compare")
        return given
    if "resume" in given:
        refuse_others(parser, given, "resume", "dataset", "data_dir", "device", "epochs")
        return given
    return complete(given, parser.error)


def complete(given, error=InputError.raised):
    """All settings: those given, and the defaults of the rest, which depend on them."""
    config = with_defaults(SETTINGS, given, dataset_kind(given.get("dataset", "digits")))
    if "init" not in given and is_file(config["net"]):
        config["init"] = "default"
    check_together(config, RELAXATIONS, error)
    warn_without_effect(SETTINGS, given, config)
    return config


# -------------------------------------------------------------------------------- the robust loss
# Of m, lower bounds of the margins in the ball (-m are logits of the worst case), and for baselines
# of a, the margins at points found by an attack: 8 steps of PGD on net as it is, once for all P
# (for taps and staps see latent_margins).
#   box, deeppoly      the bounds of relaxations.py
#   crown-ibp          beta m + (1 - beta) (m of box), as Zhang et al. 2020 train with it
#   alpha-crown        the margins by slope_steps steps of ascent, between DeepPoly's bounds of the
#                      neurons; a gradient holds the slopes found fixed
#   BASELINES          see each; they are no upper bounds of the worst case

def unflatten(thetas, net):
    """Parameter vectors (P, D) -> {name: (P, ...)}, in the order of net.parameters(). Views."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    parts = thetas.split([shape.numel() for shape in shapes.values()], 1)
    return {name: part.unflatten(1, shapes[name]) for name, part in zip(shapes, parts)}


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
    of_box = cross_entropy(m).clamp(min=1e-9)
    of_attack = cross_entropy(a).clamp(min=1e-9)
    return of_box ** alpha * of_attack ** (1 - alpha)


# Mao et al. 2023, "Connecting certified and adversarial training"; a: latent_margins. staps is the
# same in sabr's box. Of each image: the authors' code multiplies the means of a minibatch.
def taps(m, a, alpha):
    return cross_entropy(m) * cross_entropy(a)


BASELINES = {"sabr": sabr, "mtl-ibp": mtl_ibp, "cc-ibp": cc_ibp, "exp-ibp": exp_ibp,
             "staps": taps, "taps": taps}


def regularizers(bounds, radius, total=lambda t: t):
    """The two regularisers of Shi et al. 2021, summed: (P,).

    bounds: [(l, u), ...] before each ReLU, (P, B, ...). radius: mean radius of the input box.
    tightness  mean over layers of relu(1/2 - radius / mean radius there) / (1/2): bounds that grow
    balance    mean over layers of [relu(1/2 - rho(m)) + relu(1/2 - rho(v))] / (1/2), where m is the
               sum of the centres of active neurons over that of minus those of inactive ones, v
               the ratio of the sums of their squared distances from the mean of all, and
               rho(t) = min(t, 1/t); a layer where one is undefined is skipped
    total: sums over the processes that share a minibatch.
    """
    sums = lambda *ts: total(torch.stack([t.sum((1, 2)) for t in ts]))             # (len(ts), P)
    tightness, balance = [], []
    for l, u in bounds:
        l, u = l.flatten(2), u.flatten(2)
        c, r = (l + u) / 2, (u - l) / 2
        c_sum, r_sum, images = sums(c, r, torch.ones_like(c[:, :, :1]))
        n = images * c.shape[2]
        tightness.append(F.relu(0.5 - radius / (r_sum / n).clamp(min=1e-18)) / 0.5)
        active, inactive = l > 0, u < 0
        spread = (c - (c_sum / n)[:, None, None]).square()
        both = sums(c * active, -c * inactive, spread * active, spread * inactive)
        both = both.unflatten(0, (2, 2))                     # (m or v, active or inactive, P)
        defined = (both > 1e-12 * both.amax(1, keepdim=True)).all((0, 1))
        m_v = torch.where(defined, both, 1.0)
        ratios = m_v[:, 0] / m_v[:, 1]
        off_balance = F.relu(0.5 - torch.minimum(ratios, 1 / ratios)) / 0.5
        balance.append(torch.where(defined, off_balance.sum(0), 0.0))
    return torch.stack(tightness).mean(0) + torch.stack(balance).mean(0)


def input_radius(net, x, eps, total=lambda t: t):
    """Mean radius of the input boxes, in units of what the first layer that learns sees."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    for _, layer in flat_layers(net):
        if list(layer.parameters()):
            break
        low, high = layer(low), layer(high)
    widths = (high - low).abs().flatten(1).mean(1)
    width, n = total(torch.stack([widths, torch.ones_like(widths)]).sum(1))
    return width / n / 2


def small_box(x, points, eps, lam):
    """Center and radius of sabr's box of lam * eps around points, moved into the ball around x."""
    radius = lam * eps
    return points.clamp(x - (eps - radius), x + (eps - radius)), radius


def robust_loss(net, x, y, eps, relax="deeppoly", *, loss="cross-entropy", kappa=0.0, l1=0.0,
                regularize=0.0, skip_stable=False, slope="adaptive", beta=1.0, alpha=0.1, lam=0.4,
                split=1, expand=5.0, slope_steps=3, certified=None, weight=1.0, total=lambda t: t,
                trusted=False):
    """The loss of a minibatch as a function (P, D) -> (P,) of parameter vectors, for gls.py.

        (1 - kappa) E[CE(-m, y)] + kappa E[CE(logits, y)] + l1 |weights|_1 + regularize * (...)

    CE(-m, y) bounds the largest cross-entropy in the ball from above. With loss="certified-error"
    the fraction of images with some m_k <= 0, whose gradient is zero, takes its place.
    certified: a list to which each call appends its certified fraction, averaged over P.
    weight, total: see plumbing.processes.share.  trusted: see margin_lower_bounds."""
    center, radius = x, eps
    if relax in ATTACKING:
        points = attack(net, x, y, eps, steps=8, restarts=1)
    if relax in ("sabr", "staps"):
        center, radius = small_box(x, points, eps, lam)
    outputs = "box" if relax in BASELINES else relax
    neurons = "deeppoly" if relax == "alpha-crown" else outputs
    bounds_of = partial(preactivation_bounds, slope=slope, skip_stable=skip_stable, trusted=trusted)
    margins_by = partial(margin_lower_bounds, slope=slope, steps=slope_steps, trusted=trusted)
    def losses(thetas):
        params = unflatten(thetas, net)
        bounds = bounds_of(net, center, radius, neurons, params)
        margins = partial(margins_by, net, center, y, radius, params=params, intermediate=bounds)
        logits = lambda x: vmap(lambda p: functional_call(net, p, (x,)))(params)    # (P, B, K)
        m = margins(outputs)                                                        # (P, B, K)
        if relax == "crown-ibp" and beta < 1:
            m = beta * m + (1 - beta) * margins("box")
        is_certified = (m > 0).sum(-1) == m.shape[-1] - 1                           # (P, B)
        if certified is not None:
            certified.append(weight * is_certified.float().mean())
        if loss == "certified-error":
            value = 1 - is_certified.to(m.dtype)
        elif relax in BASELINES:
            a = (latent_margins(net, params, bounds, y, m.shape[-1], split, expand)
                 if "taps" in relax else margins_of(logits(points), y))
            value = BASELINES[relax](m, a, alpha)
        else:
            value = cross_entropy(m)
        value = weight * (1 - kappa) * value.mean(-1)
        if kappa:
            value = value + weight * kappa * vmap(F.cross_entropy, (0, None))(logits(x), y)
        if l1:
            value = value + l1 * size_of_weights(params)
        if regularize and bounds:
            width = input_radius(net, center, radius, total)
            value = value + regularize * regularizers(bounds, width, total)
        return value
    return losses


def size_of_weights(params):
    """The sum of the absolute weights, without biases: (P,)."""
    weights = [w for w in params.values() if w.dim() > 2]
    return sum(w.abs().flatten(1).sum(1) for w in weights)


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
    batches = zip(x.split(batch), y.split(batch))
    low = [margin_lower_bounds(net, a, b, eps, relax, **options) for a, b in batches]
    low = torch.cat(low)
    bound = smallest(low, y)
    scale = low.abs().amax(-1).clamp(min=scale_of(net, x))
    close = bound.abs() < CLOSE * scale
    if close.any() and x.dtype != torch.float64:
        exact = in_float64(net, x[close], y[close])
        again = certified_margin(*exact, eps, relax, batch, **options)
        bound[close] = again.to(bound)
    return bound


def evaluate(net, x, y, eps, batch=500, progress=lambda line: None, slope="adaptive"):
    """Which samples are correct, survive the attack, and are certified: {name: (n,) bool}.

    "best": by any of the three relaxations. Raises ValueError for what the bounds refuse, and
    AssertionError if a certified sample was attacked: then no number can be trusted.
    """
    check_whole(1, batch=batch)
    check_choice(SLOPES, slope=slope)
    y = check_problem(net, x, y, eps, margin_lower_bounds, preactivation_bounds)
    result = {"natural": forward_margin(net, x, y).cpu() > 0}
    progress("attacking")
    batches = zip(x.split(batch), y.split(batch))
    points = [attack(net, *some, eps) for some in batches]
    attacked = forward_margin(net, torch.cat(points), y).cpu()
    result["attack"] = result["natural"] & (attacked > 0)
    for relax in CERTIFY:
        progress(f"bounding by {relax}")
        bound = certified_margin(net, x, y, eps, relax, slope=slope, **CERTIFY[relax])
        result[relax] = bound.cpu() > 0
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
    middle = 0.25
    t = min(max(progress, 0.0), 1.0)
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


def losses_of_step(net, x, y, eps, config, certified=None, trusted=False):
    """robust_loss of each part of a minibatch (of all, if its images are fewer), by the settings in
    config; what depends on the ramp goes by eps / eps_train. Their average is the loss of the whole
    but for the regularisers, ratios of means, which each part has of its own images."""
    full = eps / config["eps_train"] if config["eps_train"] else 1.0
    options = {k: config[k] for k in ("relax", "loss", "kappa", "l1", "skip_stable", "slope",
                                      "alpha", "lam", "split", "expand", "slope_steps")}
    options |= dict(regularize=config["regularize"] * (1 - full), certified=certified,
                    trusted=trusted, beta=1 + (config["beta"] - 1) * full)
    if full < 1 - 1e-9:                                  # in the ramp, as the authors' code does it
        options["relax"] = dict(taps="box", staps="sabr").get(config["relax"], config["relax"])
    parts = parts_of(x, y, config.get("parts", 1), shared=not samples_are_shared(config))
    return [robust_loss(net, *images, eps, **options, **count) for *images, count in parts]


def why_not_finite(net, x, eps, config, grad):
    relax = config["relax"] if config["relax"] in RELAXATIONS else "box"
    with torch.no_grad():
        bounds = preactivation_bounds(net, x, eps, relax, skip_stable=config["skip_stable"],
                                      slope=config["slope"])
    return first_not_finite(flat_layers(net), bounds, unflatten(grad[None], net))


def take_step(net, theta, optimizer, sigma, x, y, eps, config, *,
              noise, where="", trusted=False):
    """One step of the optimiser, on theta, in place: sigma after it, and (loss, certified fraction,
    gradient norm) before it, (3,). FloatingPointError instead, if they are not finite."""
    certified = []
    update_batchnorm(net, x)
    losses = losses_of_step(net, x, y, eps, config, certified, trusted)
    value, theta.grad, sigma_grad = estimate(losses, theta, sigma, config, noise)
    norm = clip_grad_norm_([theta], config["clip"])
    check_finite(value, norm, f"{where}, eps {eps:.4g}",
                 lambda: why_not_finite(net, x, eps, config, theta.grad))
    optimizer.step()
    if sigma_grad is not None:
        sigma = adapt_sigma(sigma, sigma_grad, config["sigma_lr"])
    return sigma, torch.stack([value, average(certified, theta), norm])


def trial(net, x, y, config, device):
    """A gradient estimate at a fraction of the radius, as a function of that; it changes nothing
    and is for its time, with a part of a minibatch: of fewer images most of it would be fixed."""
    theta = parameters_to_vector(net.parameters()).detach()
    size = config["batch_size"]
    part = min(size, max(64, size // 4))
    x, y = x[:part].to(device), y[:part].to(device)
    noise, sigma = torch.Generator(device), torch.tensor(config["sigma"], device=device)
    return lambda full: estimate(losses_of_step(net, x, y, full * config["eps_train"], config),
                                 theta, sigma, config, noise)[0].item()


def train(net, x, y, config, device, folder, show=print, training=None, *, measure=None):
    """Train net on images x and labels y, by the settings in config (see SETTINGS).

    Returns the rows of log.csv, which it writes into folder, as checkpoint.pt (plumbing/runs.py).
    Two generators seeded with config["seed"] draw all random numbers: one batches, one noise.
    training: as load_run returns it with net, to continue; the weights in the end are, bit by bit,
    those of a run that never stopped. measure: of steps, see plumbing/timing.py. Raises
    FloatingPointError where numbers cease to be finite, Interrupted after a signal.
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
    first, size = now["done"], config["batch_size"]          # the first step checks what is given
    steps = -(-len(x) // size)
    ramp = config["ramp"] * steps or 1                       # without one, full from the first step
    end = config["epochs"] * steps
    fractions = [eps_at((i + 1) / ramp, 1.0) for i in range(end)]
    left = time_left(fractions, now["done"], measure)
    with recording(folder, net, config, now, len(x), show, left, **generators) as record:
        while now["done"] < end:
            epoch, step = divmod(now["done"], steps)
            if step == 0:
                now["order"] = torch.randperm(len(x), generator=batches)
            images = now["order"][step * size:(step + 1) * size]
            xb = x[images].to(device)
            yb = y[images].to(device)
            if config["augment"]:
                xb = augment(xb, batches)
            eps = eps_at((now["done"] + 1) / ramp, config["eps_train"])
            optimizer.param_groups[0]["lr"] = lr_at(epoch, config)
            now["sigma"], numbers = take_step(
                net, theta, optimizer, now["sigma"], xb, yb, eps, config, noise=noise,
                where=f"epoch {epoch + 1}, batch {step + 1}", trusted=now["done"] > first)
            record(epoch, step, eps, numbers, len(images))   # it may save, and stop
    return now["rows"]


def fit(net, x, y, device="auto", show=None, **settings):
    """Train a network of your own, in place, from its weights on; returns the rows of log.csv.

    net: an nn.Sequential of LAYERS.  x: (n, ...) float32 in [0, 1]; y: (n,) labels.  settings: any
    of SETTINGS that is about training, such as eps=0.1, relax="box", opt="grad", epochs=20; the
    others are those of --dataset PATH.npz.  show(line) is called once a step.
    Writes nothing, sets no signal handler, and runs in any thread. Raises ValueError.
    """
    elsewhere = "dataset net data_dir subset validation test_subset weights normalize out resume"
    given = checked(SETTINGS, settings, elsewhere.split())
    config = complete(given | dict(dataset="own.npz"))
    check_training(net, x)
    device = pick_device(device)
    net = net.eval().to(x.device)
    y = check_problem(net, x, y, config["eps"], margin_lower_bounds, preactivation_bounds)
    logits, = read_network(net, x.shape[1:]).shapes[-1]
    config |= dict(input_shape=list(x.shape[1:]), classes=logits, device=str(device))
    if settings.get("init") == "ibp":
        ibp_init(net)
    config["members"] = members_of_each(net, config)
    return train(net.to(device), x, y, config, device, None, show or Progress())


# ------------------------------------------------------------------------------------------- main

def load_run(folder):
    """(net, config, training) of a run folder; nothing in it is executed. Raises InputError."""
    return read_checkpoint(folder, network_of)


def network_of(config):
    return from_config(config, LAYERS)


def new_run(config, data, device):
    """A new network, and the settings with what images, device and processes add to them."""
    config = config | circumstances(data, config, device)
    config["statistics"] = statistics_of(data, config)
    torch.manual_seed(config["seed"])
    net = new_network(config, LAYERS, read_network)
    if config["weights"]:
        read_weights(config["weights"], net)
    if "taps" in config["relax"]:
        last_part(net, config["split"])                                  # or one line says why not
    config["members"] = members_of_each(net, config)
    return net, config


def main(argv=None):
    config = parse_config(argv)
    if "compare" in config:
        return print("\n".join(comparison(config["compare"])))
    resumed, training = config.pop("resume", None), None
    with ExitStack() as stack:
        if resumed:
            stack.enter_context(locked(resumed))
            net, saved, training = load_run(resumed)
            since = with_defaults(SETTINGS, dict(parts=1) | saved, dataset_kind(saved["dataset"]))
            config = moved(since | dict(out=str(resumed)), config)     # what may be given again
        device = pick_device(config["device"].split(":")[0])
        stack.enter_context(process_group(device))
        data = hold_out(data_of_run(config), config["validation"])
        if not resumed:
            net, config = new_run(config, data, device)
            stack.enter_context(new_folder(config, net, SETTINGS))
        else:
            check_unchanged(data, config | dict(epochs=saved["epochs"]))
            lengthen(resumed, net, saved, config, training)
        show = stack.enter_context(Progress())
        train_and_show(net.to(device), config, training, data, device, show)


def train_and_show(net, config, training, data, device, show):
    """Train, from the start or from where training was, and print the table of the test images."""
    print(header(config, data, net), flush=True)
    n, measure = config["subset"], None
    x, y = data.x_train[:n], data.y_train[:n]
    if config["ramp"] and not is_finished(config, training):
        show("measuring how long a step takes")
        measure = lambda: seconds_at(trial(net, x, y, config, device))
    rows = train(net, x, y, config, device, config["out"], show, training, measure=measure)
    if ranks()[0]:
        return                                         # the first process shows the rest
    if rows:
        show_training(rows, config, show)
    n = config["test_subset"]
    x = data.x_test[:n].to(device)
    y = data.y_test[:n].to(device)
    result = evaluate(net, x, y, config["eps"], progress=show, slope=config["slope"])
    write_evaluation(config["out"], result, config)
    show.done(f"{len(x)} test images, eps {config['eps']:.4g}:")
    print("\n".join(table(result)))
    print(f"to certify it sample by sample:  python certify.py {config['out']}")


if __name__ == "__main__":
    run(main)
