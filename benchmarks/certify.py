"""Complete certification of networks that were not trained for it: how far does certify.py get?

    git clone https://github.com/Verified-Intelligence/alpha-beta-CROWN
    python benchmarks/certify.py --checkout alpha-beta-CROWN --case mnist_cnn_a_adv --timeout 30

The networks and images are those on which beta-CROWN (Wang et al. 2021) is usually measured: CNN-A
of the SDP-FO benchmark (Dathathri et al. 2020), adversarially trained, two convolutions and two
linear layers, and 200 images each. Prints the table of certify.py; --out writes every verdict and
where they were found as JSON. Expect up to --timeout seconds for each image.

    git worktree add ../peer COMMIT
    python benchmarks/certify.py --run RUN --data-dir DIR --eps 0.1 --timeout 5 --peer ../peer

certifies the first test images of a run of train.py instead, or (--peer) with another checkout,
too, in a process of its own: one row for each, and no image may be lost. Seconds, of the limit as
well, are then of this process on the CPU (--clock cpu): what else runs does not count.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

import common                                       # first: it puts the checkout on the path

if "--code" in sys.argv:
    sys.path.insert(0, sys.argv[sys.argv.index("--code") + 1])
import certify                                                                     # noqa: E402
import train                                                                       # noqa: E402
from plumbing.data import load_dataset                                             # noqa: E402

CASES = {  # name: data set, radius, mean and std of the pixels in the first layer
    "mnist_cnn_a_adv": ("mnist", 0.3, None),
    "cifar_cnn_a_adv": ("cifar", 2 / 255, ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))),
    "cifar_cnn_a_mix": ("cifar", 2 / 255, ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))),
}


def load(checkout, case):
    """The network in eval mode, images (200, C, H, W) in [0, 1], labels and eps."""
    data, eps, statistics = CASES[case]
    root = Path(checkout) / "complete_verifier"
    images = np.load(root / f"datasets/sdp/{data}/X_sdp.npy", allow_pickle=False)   # NHWC
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().clamp(0, 1)
    y = torch.from_numpy(np.load(root / f"datasets/sdp/{data}/y_sdp.npy", allow_pickle=False))
    net = nn.Sequential(nn.Conv2d(x.shape[1], 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1),
                        nn.ReLU(), nn.Flatten(), nn.Linear(32 * (x.shape[2] // 4) ** 2, 100),
                        nn.ReLU(), nn.Linear(100, 10))
    net.load_state_dict(torch.load(root / f"models/sdp/{case}.model", map_location="cpu",
                                   weights_only=True))
    if statistics:
        normalize = nn.BatchNorm2d(3, eps=0.0, affine=False)
        normalize.running_mean.copy_(torch.tensor(statistics[0]) / 255)
        normalize.running_var.copy_((torch.tensor(statistics[1]) / 255).square())
        net = nn.Sequential(normalize, *net)
    return net.eval(), x, y.long(), eps


def load_run(args):
    """The same of a run of train.py, and its test images."""
    net, config, _ = train.load_run(args.run)
    data = load_dataset(config["dataset"], args.data_dir or config["data_dir"])
    return net, data.x_test, data.y_test, config["eps"] if args.eps is None else args.eps


def against(args):
    """This checkout and the peer, one after the other, as rows of a table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for code in (args.peer, str(Path(__file__).resolve().parent.parent)):
            out = Path(folder) / f"{len(rows)}.json"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--code", code, "--out", out,
                            "--clock", "cpu"], check=True, stdout=subprocess.DEVNULL)
            commit = subprocess.run(["git", "-C", code, "rev-parse", "--short", "HEAD"],
                                    capture_output=True, text=True).stdout.strip()
            rows.append(json.loads(out.read_text()) | dict(commit=commit))
    print("| eps, images | commit | certified | attacked | unknown | seconds | of them attacking |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        count = Counter(v["status"] for v in row["results"])
        attacking = sum(v["attacking"] for v in row["results"])
        print(f"| {row['eps']:.3g}, {len(row['results'])} | `{row['commit']}` | "
              f"{count['certified']} | {count['attacked']} | {count['unknown']} | "
              f"{row['seconds']:.1f} | {attacking:.1f} |")
    pairs = [[v["status"] for v in both] for both in zip(*(row["results"] for row in rows))]
    lost = sum(old == "certified" != new for old, new in pairs)
    wrong = sum({old, new} == {"certified", "attacked"} for old, new in pairs)
    print(f"{lost} certified images lost, {wrong} verdicts contradicted")


def on_cpu_time():
    """Samples are charged the CPU time that was spent on them, here or by an older checkout, which
    reads the clock in certify.py."""
    clock = SimpleNamespace(time=time.process_time, perf_counter=time.process_time,
                            monotonic=time.process_time)
    modules = [sys.modules.get(name) for name in ("certify", "plumbing.verdicts")]
    readers = [module for module in modules if hasattr(module, "time")]
    for module in readers:
        module.time = clock
    assert readers, "no module that reads the clock"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--checkout", help="of alpha-beta-CROWN")
    p.add_argument("--case", choices=CASES, default="mnist_cnn_a_adv")
    p.add_argument("--run", help="a run folder of train.py instead")
    p.add_argument("--data-dir", help="of the run")
    p.add_argument("--eps", type=float, help="of the run; default: its own")
    p.add_argument("--samples", type=int, default=200)
    p.add_argument("--timeout", type=float, default=30.0, help="seconds for each image")
    p.add_argument("--device", default="cpu")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    p.add_argument("--peer", help="another checkout of this repository")
    p.add_argument("--code", help="the checkout to measure; default: this one")
    p.add_argument("--out", help="a JSON file")
    args = p.parse_args()
    if not (args.run or args.checkout):
        p.error("name a --run, or a --checkout of alpha-beta-CROWN")
    if args.peer and not args.code:
        return against(args)
    net, x, y, eps = load_run(args) if args.run else load(args.checkout, args.case)
    x, y, net = (t.to(args.device) for t in (x[:args.samples], y[:args.samples], net))
    if args.clock == "cpu":
        on_cpu_time()

    def report(v):
        print(f"{v.index:4} {v.status:14} {v.stage:17} bound {v.bound:9.4f}  {v.seconds:6.1f} s",
              flush=True)

    begun = time.process_time()
    verdicts = certify.certify(net, x, y, eps, args.timeout, report=report)
    seconds = time.process_time() - begun
    lines = certify.summary(verdicts, certify.STAGES)
    print("\n".join(lines))
    rows = [dict(index=v.index, status=v.status, stage=v.stage, seconds=round(v.seconds, 2),
                 attacking=round(v.seconds_by_stage.get("attack", 0.0), 4),
                 bound=v.bound if v.bound > -float("inf") else None) for v in verdicts]
    common.write(args.out, **common.machine(args.device, args.code), case=args.case, eps=eps,
                 timeout=args.timeout, seconds=seconds, summary=lines, results=rows)


if __name__ == "__main__":
    main()
