"""Many parameter vectors at once: what a population, a smoothed step and a larger batch cost.

    python benchmarks/population.py --data-dir data

1. The losses of P perturbed networks, as PGPE needs them, in a loop and so many at once.
2. A step of RGS with 2 samples against a plain gradient.
   (* marks the number that train.py runs at once.)
3. Time and peak memory against the batch and against P: linear, if all is well; and from that, the
   largest batch that fits.
4. What PGPE itself holds at its peak with many weights, beside theta: the noise of one chunk.
Ratios are medians over turns. Networks as initialised, real images, the loss of train.py.
"""
import argparse
from functools import partial
from statistics import median

import torch

import common                                       # first: it puts the checkout on the path
import gls
import train
from plumbing.console import keep_memory
from plumbing.data import load_dataset
from plumbing.processes import members_at_once

RADIUS = {"digits": 0.1, "mnist": 0.1, "cifar10": 2 / 255}
SIGMA = 0.01


def problem(dataset, net, relax, batch, data_dir, device):
    """(the loss of one minibatch, theta, how many members train.py would run at once)."""
    data = load_dataset(dataset, data_dir)
    torch.manual_seed(0)
    net = train.build_network(net, data.x_train.shape[1:], data.classes).to(device)
    x, y = (t[:batch].to(device) for t in (data.x_train, data.y_train))
    loss = train.robust_loss(net, x, y, RADIUS[dataset], relax, regularize=0.5, skip_stable=True)
    config = dict(device=device, relax=relax, batch_size=batch, parts=1,
                  input_shape=x.shape[1:])
    members = members_at_once(net, config)
    return loss, torch.nn.utils.parameters_to_vector(net.parameters()).detach(), members


def estimators(loss, theta, members):
    generator = torch.Generator(theta.device).manual_seed(0)
    return {
        "gradient": lambda: gls.gradient(loss, theta),
        "rgs": lambda: gls.rgs(loss, theta, SIGMA, 2, generator, antithetic=True, chunk=members)}


def losses(loss, thetas, members):
    with torch.no_grad():
        return torch.cat([loss(part) for part in thetas.split(members)])


def perturbed(theta, P):
    noise = torch.randn(P, len(theta), generator=torch.Generator().manual_seed(1))
    return theta + SIGMA * noise.to(theta.device)


def prepare_peak(dataset, net, relax, batch, P, data_dir, device):
    """For common.peak_memory: a plain gradient at P parameter vectors."""
    loss, theta, _ = problem(dataset, net, relax, batch, data_dir, device)
    small, *_ = problem(dataset, net, "box", 1, data_dir, device)

    def call(loss, P):
        points = perturbed(theta, P).requires_grad_()
        loss(points).sum().backward()
    return partial(call, small, 1), partial(call, loss, P)


def population(args, results):
    print(f"{'':32}ms for each member, and times as fast as a loop")
    for dataset, net, P in (("digits", "small", 64), ("digits", "cnn3", 64), ("mnist", "cnn3", 16)):
        for relax in ("box", "crown-ibp", "deeppoly"):
            loss, theta, chosen = problem(dataset, net, relax, 64, args.data_dir, args.device)
            thetas = perturbed(theta, P)
            calls = {m: partial(losses, loss, thetas, m) for m in sorted({1, 4, P, 16, chosen})}
            torch.testing.assert_close(calls[1](), calls[P](), rtol=1e-4, atol=1e-5)
            times = common.in_turns(calls, args.pairs, args.device)
            ratios = {m: common.ratio(times, m, 1) for m in calls}
            print(f"{f'{dataset} {net} {relax}, P = {P}':32}" + "  ".join(
                f"{m}{'*' * (m == chosen)}: {1e3 * median(times[m]) / P:.1f} ({ratios[m]:.2f})"
                for m in calls), flush=True)
            results.append(dict(what="population", dataset=dataset, net=net, relax=relax, P=P,
                                batch=64, chosen=chosen, ratios=ratios, times=times))


def steps(args, results):
    print(f"\n{'':28}{'gradient s':>11}{'RGS, 2 s':>10}{'ratio':>8}")
    for dataset in ("digits", "mnist"):
        for relax in ("box", "crown-ibp", "deeppoly"):
            task = problem(dataset, "cnn3", relax, 64, args.data_dir, args.device)
            times = common.in_turns(estimators(*task), args.pairs, args.device)
            ratio = common.ratio(times, "gradient", "rgs")
            print(f"{dataset + ' cnn3 ' + relax + ', batch 64':28}{median(times['gradient']):11.3f}"
                  f"{median(times['rgs']):10.3f}{ratio:8.2f}", flush=True)
            results.append(dict(what="rgs", dataset=dataset, net="cnn3", relax=relax, batch=64,
                                ratio=ratio, times=times))


def growth(args, results):
    print(f"\n{'':28}{'forward + backward s':>22}{'per unit':>10}{'MiB':>8}")
    for dataset, net, sizes in (("mnist", "cnn3", [(b, 1) for b in (32, 64, 128, 256)]),
                                ("digits", "cnn3", [(64, p) for p in (1, 4, 16, 64)]),
                                ("cifar10", "cnn5", [(4, 1), (8, 1), (16, 1)])):
        for batch, P in sizes:
            loss, theta, _ = problem(dataset, net, "deeppoly", batch, args.data_dir, args.device)
            call = partial(gls.rgs, loss, theta, SIGMA, P, torch.Generator(args.device))
            times = common.in_turns({"": call}, 3, args.device)[""]
            memory = common.peak_memory(
                prepare_peak, (dataset, net, "deeppoly", batch, P, args.data_dir, args.device),
                args.device)
            print(f"{f'{dataset} {net}, batch {batch}, P {P}':28}{median(times):22.3f}"
                  f"{median(times) / batch / P:10.4f}{memory or 0:8.0f}", flush=True)
            results.append(dict(what="growth", dataset=dataset, net=net, relax="deeppoly", P=P,
                                batch=batch, seconds=median(times), times=times, MiB=memory))


def prepare_noise(weights, pairs, chunk):
    """For common.peak_memory: PGPE for a loss that takes nothing itself."""
    def call(weights, pairs):
        theta = torch.zeros(weights)
        gls.pgpe(lambda thetas: thetas[:, 0], theta, SIGMA, pairs, torch.Generator(), chunk)
    return partial(call, 10, 2), partial(call, weights, pairs)


def noise(args, results):
    weights, pairs, chunk = 5 * 10 ** 6, 64, 2
    vector = 4 * weights / 2 ** 20
    MiB = common.peak_memory(prepare_noise, (weights, pairs, chunk), args.device)
    print(f"\nPGPE, {weights:,} weights of {vector:.1f} MiB, {pairs} pairs, chunk {chunk}: "
          f"{MiB:.0f} MiB at the peak, {MiB - 2 * vector:.0f} beside theta and one copy",
          flush=True)
    results.append(dict(what="noise", weights=weights, pairs=pairs, chunk=chunk, MiB=MiB,
                        beside=MiB - 2 * vector))


PARTS = {"population": population, "steps": steps, "growth": growth, "noise": noise}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--data-dir", default="data")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    keep_memory()
    results = []
    for part in args.parts:
        PARTS[part](args, results)
        common.write(args.out, **common.machine(args.device), results=results)


if __name__ == "__main__":
    main()
