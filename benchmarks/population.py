"""Many parameter vectors at once: what a population, a smoothed step and a larger batch cost.

    python benchmarks/population.py --data-dir data

1. The losses of P = 64 perturbed networks, as PGPE needs them, in one call and in a loop.
2. A step of RGS with 2 samples against a plain gradient.
3. Time and peak memory against the batch and against P: linear, if all is well; and from that, the
   largest batch that fits.
Ratios are medians over turns. Networks as initialised, real images, the loss of train.py.
"""
import argparse
from functools import partial
from statistics import median

import torch

import common                                       # first: it puts the checkout on the path
import gls
import train

RADIUS = {"digits": 0.1, "mnist": 0.1, "cifar10": 2 / 255}
SIGMA = 0.01


def problem(dataset, net, relax, batch, data_dir, device):
    """(the loss of one minibatch, theta)."""
    data = train.load_dataset(dataset, data_dir)
    torch.manual_seed(0)
    net = train.build_network(net, data.x_train.shape[1:], data.classes).to(device)
    x, y = (t[:batch].to(device) for t in (data.x_train, data.y_train))
    loss = train.robust_loss(net, x, y, RADIUS[dataset], relax, regularize=0.5, skip_stable=True)
    return loss, torch.nn.utils.parameters_to_vector(net.parameters()).detach()


def estimators(loss, theta):
    generator = torch.Generator(theta.device).manual_seed(0)
    return {
        "gradient": lambda: gls.gradient(loss, theta),
        "rgs": lambda: gls.rgs(loss, theta, SIGMA, 2, generator, antithetic=True)}


def losses(loss, thetas, members):
    with torch.no_grad():
        return torch.cat([loss(part) for part in thetas.split(members)])


def perturbed(theta, P):
    noise = torch.randn(P, len(theta), generator=torch.Generator().manual_seed(1))
    return theta + SIGMA * noise.to(theta.device)


def prepare_peak(dataset, net, relax, batch, P, data_dir, device):
    """For common.peak_memory: a plain gradient at P parameter vectors."""
    loss, theta = problem(dataset, net, relax, batch, data_dir, device)
    small, _ = problem(dataset, net, "box", 1, data_dir, device)

    def call(loss, P):
        points = perturbed(theta, P).requires_grad_()
        loss(points).sum().backward()
    return partial(call, small, 1), partial(call, loss, P)


def population(args, results):
    print(f"{'':28}{'loop s':>9}{'16 at once':>12}{'64 at once':>12}{'ratios':>14}")
    for relax in ("box", "crown-ibp", "deeppoly"):
        loss, theta = problem("digits", "cnn3", relax, 64, args.data_dir, args.device)
        thetas = perturbed(theta, 64)
        calls = {m: partial(losses, loss, thetas, m) for m in (1, 16, 64)}
        torch.testing.assert_close(calls[1](), calls[64](), rtol=1e-4, atol=1e-5)
        times = common.in_turns(calls, args.pairs, args.device)
        ratios = [common.ratio(times, m, 1) for m in (16, 64)]
        print(f"{'digits cnn3 ' + relax + ', P = 64':28}{median(times[1]):9.3f}"
              f"{median(times[16]):12.3f}{median(times[64]):12.3f}{ratios[0]:7.2f}{ratios[1]:7.2f}",
              flush=True)
        results.append(dict(what="population", dataset="digits", net="cnn3", relax=relax, P=64,
                            batch=64, ratio_16=ratios[0], ratio_64=ratios[1],
                            times={str(m): t for m, t in times.items()}))


def steps(args, results):
    print(f"\n{'':28}{'gradient s':>11}{'RGS, 2 s':>10}{'ratio':>8}")
    for dataset in ("digits", "mnist"):
        for relax in ("box", "deeppoly"):
            loss, theta = problem(dataset, "cnn3", relax, 64, args.data_dir, args.device)
            times = common.in_turns(estimators(loss, theta), args.pairs, args.device)
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
            loss, theta = problem(dataset, net, "deeppoly", batch, args.data_dir, args.device)
            call = partial(gls.rgs, loss, theta, SIGMA, P, torch.Generator(args.device))
            times = common.in_turns({"": call}, 3, args.device)[""]
            memory = common.peak_memory(
                prepare_peak, (dataset, net, "deeppoly", batch, P, args.data_dir, args.device),
                args.device)
            print(f"{f'{dataset} {net}, batch {batch}, P {P}':28}{median(times):22.3f}"
                  f"{median(times) / batch / P:10.4f}{memory or 0:8.0f}", flush=True)
            results.append(dict(what="growth", dataset=dataset, net=net, relax="deeppoly", P=P,
                                batch=batch, seconds=median(times), times=times, MiB=memory))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", nargs="+", choices=("population", "steps", "growth"),
                   default=["population", "steps", "growth"])
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--data-dir", default="data")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    train.keep_memory()
    results = []
    for part in args.parts:
        {"population": population, "steps": steps, "growth": growth}[part](args, results)
        common.write(args.out, **common.machine(args.device), results=results)


if __name__ == "__main__":
    main()
