"""One step of training by one process and by several, threads divided fairly.

    python benchmarks/scaling.py --data-dir data --out results/benchmarks/scaling.json

Rounds are taken in turns; the table shows medians, and the bytes that one process sends and
receives in a step, counted from the sizes of what is added up.
"""
import argparse
import multiprocessing
import os
import socket
import time
from statistics import median

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common                                       # first: it puts the checkout on the path
import train
from plumbing.console import keep_memory
from plumbing.data import load_dataset
from plumbing.processes import process_group

CASES = {
    "digits cnn3, PGPE, box, 64": "--relax box --opt pgpe --members 8",
    "digits cnn3, PGPE, CROWN-IBP, 64": "--relax crown-ibp --opt pgpe --members 8",
    "digits cnn3, PGPE, DeepPoly, 64": "--relax deeppoly --opt pgpe --members 8",
    "digits cnn3, RGS, DeepPoly, 2": "--relax deeppoly --opt rgs",
    "digits cnn3, gradient, DeepPoly": "--relax deeppoly --opt grad",
    "MNIST cnn3, RGS, DeepPoly, 2": "--relax deeppoly --opt rgs --dataset mnist --batch-size 64",
    "MNIST cnn3, gradient, DeepPoly": "--relax deeppoly --opt grad --dataset mnist --batch-size 64",
}


def steps(rank, world, threads, port, words, data_dir, count, queue):
    """Seconds of each of count steps, after one to warm up; only the first process reports."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    keep_memory()
    config, device = train.parse_config(words.split()), torch.device("cpu")
    data = load_dataset(config["dataset"], data_dir)
    x, y = (t[:config["batch_size"]] for t in (data.x_train, data.y_train))
    torch.manual_seed(0)
    net = train.build_network(config["net"], x.shape[1:], data.classes)
    theta = parameters_to_vector(net.parameters()).detach().clone()
    vector_to_parameters(theta, net.parameters())
    optimizer, noise = torch.optim.Adam([theta], lr=1e-4), torch.Generator().manual_seed(0)
    seconds = []
    with process_group(device):
        for _ in range(count + 1):
            begun = time.perf_counter()
            train.take_step(net, theta, optimizer, torch.tensor(0.01), x, y, config["eps"], config,
                            noise=noise)
            seconds.append(time.perf_counter() - begun)
    if rank == 0:
        queue.put((median(seconds[1:]), len(theta), config))


def together(world, threads, words, data_dir, count):
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    processes = [context.Process(target=steps, args=(rank, world, threads, port, words, data_dir,
                                                     count, queue)) for rank in range(world)]
    for p in processes:
        p.start()
    result = queue.get(timeout=600)
    for p in processes:
        p.join()
    return result


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--data-dir", default="data")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--count", type=int, default=5)
    p.add_argument("--out")
    args = p.parse_args()
    rows = []
    for name, words in CASES.items():
        times = {1: [], args.processes: []}
        for _ in range(args.rounds):
            for world in times:
                second, D, config = together(world, args.processes // world, words, args.data_dir,
                                             args.count)
                times[world].append(second)
        exchanged = 4 * (config["samples"] if config["opt"] == "pgpe" else 1 + D) + 12
        one, many = (median(t) for t in times.values())
        ratio = median(a / b for a, b in zip(*times.values()))
        rows.append(dict(case=name, seconds_one=one, seconds_many=many, ratio=ratio,
                         bytes=exchanged, rounds=times))
        print(f"{name:36} one process {1e3 * one:8.1f} ms   {args.processes} processes "
              f"{1e3 * many:8.1f} ms   {ratio:.2f} times as fast   {exchanged} bytes", flush=True)
    common.write(args.out, **common.machine("cpu"), processes=args.processes, results=rows)


if __name__ == "__main__":
    main()
